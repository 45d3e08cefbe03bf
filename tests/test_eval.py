"""What eval.py promises: honest tables and pictures of a run, and no half-written files."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import eval as E
from images import InputError, to_tensor, to_unit
from vq import Tokens

# --- a tiny run: bright is name 0, dark is name 1 -------------------------------------------------------------------


@dataclass
class Config:
    model: str = "pat"
    preset: str = "world"
    seed: int = 7
    short_side: int = 32
    long_side: int = 128
    data: str = ""
    vmf: bool = True
    vlm: str = "fake"
    pretrained: str = "none"
    clip_scale: float = 1.0
    depths: tuple = ()


class FakeVLM(nn.Module):
    """Names are rows of an identity matrix; a patch points to name 0 when bright, to name 1 when dark."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def embed_text(self, names):
        return torch.eye(len(names))

    def dense(self, image):
        bright = F.avg_pool2d(to_unit(image).mean(1, keepdim=True), 8)                    # (B,1,h,w)
        return torch.cat([bright, 1 - bright], 1)


class FakeModel(nn.Module):
    """Two queries, bright and dark, sure of their names; PAT repaints its input and numbers its tokens 0, 1, 2, ..."""

    def __init__(self, pat=True):
        super().__init__()
        self.vlm, self.stride, self.pat, self.config = FakeVLM(), 8, pat, Config(model="pat" if pat else "san")

    def codebook(self, stage):
        return F.normalize(torch.randn(64, 4, generator=torch.Generator().manual_seed(3)), dim=-1)

    def forward(self, image, text):
        assert image.shape[-2] % 8 == image.shape[-1] % 8 == 0 and not self.training
        bright = 20 * (F.avg_pool2d(to_unit(image).mean(1, keepdim=True), 8) - 0.5)       # (B,1,h,w)
        classes = 12 * torch.eye(2, text.shape[0] + 1)[None]
        out = {"masks": [torch.cat([bright, -bright], 1)], "classes": [classes]}
        if self.pat:
            h, w = bright.shape[-2:]
            index = torch.arange(h * w).view(1, h, w) % 64
            code = self.codebook("early")[index].permute(0, 3, 1, 2)
            out["image"] = to_unit(image)
            out["tokens"] = {stage: Tokens(code, index, code, None, None) for stage in ("early", "mid", "late", "latent")}
        return out


class TwoHalves:
    """Two pictures, bright above and dark below, with one ignored column; every size differs."""

    names, groups = ("day", "night"), {"seen": (0,), "stuff": (1,)}

    def __len__(self):
        return 2

    def __getitem__(self, i):
        size = (32, 40) if i == 0 else (48, 44)
        original = np.zeros((*size, 3), np.uint8)
        original[:size[0] // 2] = 255
        label = torch.ones(size, dtype=torch.int64)
        label[:size[0] // 2], label[:, 3] = 0, -1
        return {"image": to_tensor(original), "label": label, "name": str(i), "original": original}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Folders `pat` and `san` that load as the fake models."""
    for name in ("pat", "san"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(E, "load_run", lambda run, device="cpu": (m := FakeModel(Path(run).name == "pat"), m.config))
    monkeypatch.setattr(E, "VLM", FakeVLM)
    monkeypatch.setattr(E, "open_model", lambda name, pretrained: (None, None))
    monkeypatch.setattr(E, "World", lambda *args, **kwargs: TwoHalves())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_that_knows_everything_scores_one(runs):
    """Exactly: the border between bright and dark falls between patches, so upsampling keeps every pixel right."""
    model = FakeModel().train()
    row = E.evaluate(model, TwoHalves(), progress=False)
    assert model.training                                     # as it was found
    assert row["segmentation"]["mIoU"] == row["segmentation"]["foreground_accuracy"] == 1
    assert row["reconstruction"]["PSNR"] > 99 and row["reconstruction"]["SSIM"] == pytest.approx(1)
    assert set(row["codebooks"]) == {"early", "mid", "late", "latent"}
    early = row["codebooks"]["early"]
    assert early["share_used"] == 36 / 64                     # 6x6 tokens in the second picture, the first has fewer
    assert early["bf16"] == 1


def test_names_may_be_swapped_and_images_limited():
    row = E.evaluate(FakeModel(False), TwoHalves(), names=("light", "dark", "fog"), progress=False, images=1)
    assert row["images"] == 1 and len(row["segmentation"]["IoU"]) == 3
    assert row["reconstruction"] is None and row["codebooks"] == {}


def test_the_score_command_writes_table_json_and_pictures(runs, capsys):
    E.main(["pat", "--compare", "san"])
    table = json.loads((runs / "pat/scores.json").read_text())
    assert list(table["rows"]) == ["PAT pat", "SAN san", "MaskCLIP, no training", "chance"]
    assert table["config"]["seed"] == 7 and table["config"]["preset"] == "world" and table["torch"] == torch.__version__
    text = (runs / "pat/scores.txt").read_text()
    assert text in capsys.readouterr().out
    assert "old rule" in text and "PSNR dB" in text and "latent" in text
    if table["rows"]["PAT pat"]["reconstruction"]["LPIPS"] is None:
        assert "n/m" in text and "not measured" in text
    assert table["rows"]["chance"]["segmentation"]["pixel_accuracy"] == 0.5
    assert Image.open(runs / "pat/samples.png").width == 4 + 4 * 196
    assert sorted(path.name for path in (runs / "pat").iterdir()) == ["samples.png", "scores.json", "scores.txt"]


def test_maskclip_that_cannot_be_loaded_is_left_out_and_said(runs, monkeypatch):
    def gone(name, pretrained):
        raise InputError("no weights here")

    monkeypatch.setattr(E, "open_model", gone)
    E.main(["san"])
    assert "MaskCLIP row not measured: no weights here" in (runs / "san/scores.txt").read_text()


def half_bright(h, w):
    picture = np.zeros((h, w), np.uint8)
    picture[:h // 2] = 255
    return picture


def upside_down(path):
    exif = Image.Exif()
    exif[0x0112] = 6                                          # stored lying down: turn 90 degrees clockwise to view
    Image.fromarray(half_bright(30, 50)).save(path, exif=exif)


@pytest.mark.parametrize("name, save, size", [
    ("rgb.png", lambda p: Image.fromarray(half_bright(30, 50)).convert("RGB").save(p), (50, 30)),
    ("rgba.png", lambda p: Image.fromarray(half_bright(37, 21)).convert("RGBA").save(p), (21, 37)),
    ("grey.jpg", lambda p: Image.fromarray(half_bright(64, 64)).save(p), (64, 64)),
    ("palette.png", lambda p: Image.fromarray(half_bright(30, 50)).convert("P").save(p), (50, 30)),
    ("rotated.jpg", upside_down, (30, 50)),
    ("deep.png", lambda p: Image.fromarray(half_bright(30, 50).astype(np.uint16) * 257).save(p), (50, 30)),
    ("thin.png", lambda p: Image.fromarray(half_bright(2, 300)).save(p), (300, 2)),
    ("dot.png", lambda p: Image.fromarray(half_bright(1, 1)).save(p), (1, 1)),
])
def test_every_kind_of_picture_comes_back_at_its_own_size(runs, name, save, size):
    save(runs / name)
    E.main(["pat", "--image", name, "--labels", "bright, dark", "--out", "out.png"])
    for part in ("", "_reconstruction", "_tokens_early", "_tokens_mid", "_tokens_late", "_tokens_latent"):
        assert Image.open(runs / f"out{part}.png").size == size, part
    assert Image.open(runs / "out_legend.png").width > 50


def test_san_says_what_it_does_not_have(runs, capsys):
    Image.fromarray(half_bright(30, 50)).save("a.png")
    E.main(["san", "--image", "a.png", "--labels", "bright, dark", "--out", "out.png", "--none-of-these"])
    assert "no token maps, no reconstruction" in capsys.readouterr().out
    assert sorted(path.name for path in runs.glob("out*")) == ["out.png", "out_legend.png"]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    ([], "give the run directory"),
    (["pat", "--comparr", "san"], "did you mean --compare"),
    (["pat", "--label", "a"], "did you mean --labels"),
    (["pat", "--images", "0"], "at least 1"),
    (["pat", "--images", "many"], "invalid int"),
    (["pat", "--compare", "pat"], "named twice"),
    (["pat", "--labels", "a, b"], "only together with --image"),
    (["pat", "--image", "a.png", "--out", "b.png"], "needs --labels"),
    (["pat", "--image", "a.png", "--labels", "a, a", "--out", "b.png"], "--labels: name 2"),
    (["pat", "--image", "gone.png", "--labels", "a, b", "--out", "b.png"], "gone.png"),
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "nowhere/b.png"], "existing folder"),
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "b.txt"], "picture's ending"),
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "a.png"], "overwrite the input"),
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "b.png", "--data", "d"], "leave --compare"),
])
def test_bad_input_is_one_line_and_writes_nothing(runs, argv, words):
    Image.fromarray(half_bright(30, 50)).save("a.png")
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=words) as error:
        E.main(argv)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_from_the_shell_bad_input_ends_with_status_2():
    """The real program: one line on stderr, no traceback."""
    script = Path(E.__file__)
    done = subprocess.run([sys.executable, script, "no/such/run"], capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
