"""LPIPS needs a file of somebody else's: used as it is, never fetched, refused when it is something else."""

import pytest

from cli import InputError
from published import perceptual


def test_lpips_without_its_backbone_is_not_measured_and_opens_no_connection(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("network"))
    perceptual.load_lpips.cache_clear()
    assert perceptual.load_lpips() is None
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / perceptual.VGG).write_bytes(b"half a file")
    perceptual.load_lpips.cache_clear()
    with pytest.raises(InputError, match="not torchvision's VGG-16"):
        perceptual.load_lpips()
    perceptual.load_lpips.cache_clear()
