"""Text embeddings on disk: read where everything they depend on is the same, and only there."""

from pathlib import Path

import open_clip
import pytest
import torch

import clip
from clip import TEMPLATES, load_vlm, wrap
from world.clip import world_clip
from published import text_cache
from published.text_cache import cached_file


class Broken(Exception):
    pass


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """(VLM, its copy whose text tower may not run); the world's tower is small, so the limit goes."""
    monkeypatch.setattr(clip, "SMALL_TOWER", 0)
    monkeypatch.setenv("PAT_CACHE", str(tmp_path / "cache"))
    vlm, copy = load_vlm("world", "none", scale=1.0), world_clip()
    copy.load_state_dict(vlm.model.state_dict())

    def broken(*args, **kwargs):
        raise Broken

    copy.encode_text = broken
    return vlm, wrap(copy, vlm.tokenizer, scale=1.0)


def test_the_second_call_reads_from_disk_and_runs_no_text_tower(cached, tmp_path):
    vlm, copy = cached
    with pytest.raises(Broken):
        copy.embed_text(["grass", "red star"])
    first = vlm.embed_text(["grass", "red star"])
    assert torch.equal(copy.embed_text(["grass", "red star"]), first)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cached_file(vlm.text_key(("grass", "red star"))).name]


def test_other_names_orders_templates_weights_and_activations_miss(cached, monkeypatch):
    """And a change of the image tower or of the temperature does not."""
    vlm, copy = cached
    vlm.embed_text(["grass", "red star"])
    with torch.no_grad():
        copy.model.visual.proj.add_(1), copy.model.logit_scale.add_(1)
    copy.embed_text(["grass", "red star"])
    for names in (["red star", "grass"], ["grass"], ["grass", "red stars"], ["grassred star"]):
        with pytest.raises(Broken):
            copy.embed_text(names)
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(clip, "TEMPLATES", TEMPLATES[:-1] + ("{}",))
        copy.embed_text(["grass", "red star"])
    copy.model.transformer.resblocks[1].mlp.gelu = open_clip.transformer.QuickGELU()
    with pytest.raises(Broken):
        copy.embed_text(["grass", "red star"])
    copy.model.transformer.resblocks[1].mlp.gelu = torch.nn.GELU()
    copy.embed_text(["grass", "red star"])
    with torch.no_grad():
        copy.model.token_embedding.weight[40_000, 3] += 1e-6
    with pytest.raises(Broken):
        copy.embed_text(["grass", "red star"])


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"x" * 99],
                         ids=["truncated", "empty", "one bit", "foreign"])
def test_a_damaged_file_is_embedded_again_with_one_line(cached, capsys, damage):
    vlm, copy = cached
    first, path = vlm.embed_text(["grass"]), cached_file(vlm.text_key(("grass",)))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    vlm.cache.clear()
    assert torch.equal(vlm.embed_text(["grass"]), first)
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "embedding names" not in line]
    assert len(said) == 1 and said[0].startswith(f"{path}: damaged (")
    assert path.read_bytes() == whole and torch.equal(copy.embed_text(["grass"]), first)


def test_a_cache_that_cannot_be_written_is_said_and_changes_nothing(cached, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    monkeypatch.setenv("PAT_CACHE", str(tmp_path / "file"))
    assert cached[0].embed_text(["grass"]).shape == (1, 64)
    assert "set PAT_CACHE to a folder that can" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_full_disk_leaves_no_half_file(cached, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(text_cache, "save_file", full)
    assert cached[0].embed_text(["grass"]).shape == (1, 64)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_default_run_leaves_nothing_in_the_home_directory(cached, monkeypatch, tmp_path):
    """The world's text tower is below the limit; larger ones go to ~/.cache/pat, or below PAT_CACHE."""
    monkeypatch.undo()
    monkeypatch.setenv("PAT_CACHE", str(tmp_path / "other"))
    cached[0].embed_text(["sand"])
    assert not (tmp_path / "other").exists() and cached_file("k") == tmp_path / "other" / "text-k.safetensors"
    monkeypatch.delenv("PAT_CACHE")
    assert cached_file("k") == Path.home() / ".cache" / "pat" / "text-k.safetensors"
