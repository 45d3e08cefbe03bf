"""What eval.py promises: honest tables and pictures of a run, and no half-written files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as E
from images import InputError
from test_tally import FakeModel, FakeVLM, TwoHalves


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
