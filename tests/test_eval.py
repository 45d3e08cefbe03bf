"""What eval.py promises: honest tables and pictures of a run, and no half-written files."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as E
from checkpoint import save_checkpoint
from data import Published
from images import InputError, checksum
from pat import build
from test_published import STEMS, packed, unpacked
from test_tally import FakeInception, FakeModel, FakeVLM, TwoHalves
from test_train import tiny
from vocabulary import DATASETS, load_vocabulary


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Folders `pat` and `san` that load as the fake models, and an empty folder `data`."""
    for name in ("pat", "san", "data"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(E, "load_run", lambda run, device="cpu": (m := FakeModel(Path(run).name == "pat"), m.config))
    monkeypatch.setattr(E, "VLM", FakeVLM)
    monkeypatch.setattr(E, "open_model", lambda name, pretrained: (None, None))
    monkeypatch.setattr(E, "patches_of", lambda *args, **kwargs: {})
    monkeypatch.setattr(E, "run_pictures", lambda *args, **kwargs: {"masks": Image.new("RGB", (8, 8))})
    monkeypatch.setattr("data.World", lambda *args, **kwargs: TwoHalves())
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
    assert sorted(path.name for path in (runs / "pat").iterdir()) == [
        "pictures", "report.html", "samples.png", "scores.json", "scores.txt"]
    page = (runs / "pat/report.html").read_text()
    assert "PAT pat" in page and "names on masks" in page and (runs / "pat/pictures/masks.png").is_file()


def test_rfid_is_measured_with_its_weights_or_not_at_all(runs, monkeypatch, capsys):
    """Without --rfid, and without its package: n/m and the reason.  With both: a number, its images, its worth."""
    E.main(["pat"])
    text = capsys.readouterr().out
    assert "    rFID\n" in text and "rFID n/m: not measured; it takes --rfid weights-inception" in text
    monkeypatch.setattr(E, "load_inception", lambda path, device: None)
    E.main(["pat", "--rfid", "w.pth"])
    out, error = capsys.readouterr()
    assert out == text and error.startswith("rFID will not be measured: pip install -r requirements-rfid.txt")
    monkeypatch.setattr(E, "load_inception", lambda path, device: FakeInception())
    E.main(["pat", "--compare", "san", "--rfid", "w.pth"])
    text, table = capsys.readouterr().out, json.loads((runs / "pat/scores.json").read_text())
    assert table["rows"]["PAT pat"]["reconstruction"]["rFID"] == pytest.approx(0, abs=1e-3)
    assert "rFID: 2 images against their reconstructions" in text and "Fewer than 10,000" in text
    assert "2,048 features: the covariances are singular" in text and "not measured; it takes" not in text
    packed(runs / "data", "voc20")
    E.main(["pat", "--dataset", "voc20", "--data", "data", "--rfid", "w.pth"])
    assert "rFID: 2 images against their reconstructions" in capsys.readouterr().out


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


# --- the published datasets -----------------------------------------------------------------------------------------


def white_and_black(root, name, raw):
    """The dataset unpacked; its first picture is white and its second black, whose label is the first's upside down."""
    unpacked(root, name, raw)
    for path in sorted(root.rglob("*.jpg")):
        Image.new("RGB", (3, 2), "white" if path.stem == STEMS[name][0] else "black").save(path)
    return root


def test_the_trap_of_pascal_context_459_by_hand(runs, capsys):
    """Classes 0 0 0 / 0 2 void; the model says class 0 on all that is white and class 1 on all that is black.

    G = (8, 0, 2), P = (5, 5, 0), T = (4, 0, 0): IoU = 4/9, 0/5, 0/2.  Class 1 has no ground truth, and neither have the
    other 456, but it was said: 2/9 is the mean over classes 0 and 2, 4/27 the old one over the three.
    """
    white_and_black(runs / "data", "pc459", [[1, 1, 1], [1, 3, 0]])
    (runs / "san/names.txt").write_text("accordion\n")
    E.main(["san", "--dataset", "pc459", "--data", "data"])
    table = json.loads((runs / "san/scores/pc459.json").read_text())
    s = table["rows"]["SAN san"]["segmentation"]
    assert (s["mIoU"], s["mIoU_old_rule"]) == (pytest.approx(2 / 9), pytest.approx(4 / 27))
    assert (s["absent"], s["absent_predicted"]) == (457, 1)
    assert (s["pixel_accuracy"], s["mean_accuracy"]) == (0.4, 0.25) and s["fwIoU"] == pytest.approx(0.8 * 4 / 9)
    assert (s["mIoU_seen"], s["mIoU_unseen"]) == (pytest.approx(4 / 9), 0) and table["groups"]["seen"] == [0]
    assert (table["images"], table["published_images"]) == (2, 5104) and table["route"] == "LabelMap of the .mat files"
    assert table["checksum"] == table["published_checksum"] == load_vocabulary("pc459").checksum
    text = capsys.readouterr().out
    assert "0.222    0.148" in text and "2/5104" in text and table["checksum"] in text and "LabelMap" in text
    assert "457 of 459 names have no ground truth in these images, 1 of them were predicted: the two rules d" in text
    assert "among the 1 names of san/names.txt" in text
    assert sorted(path.name for path in (runs / "san/scores").iterdir()) == ["pc459.json", "pc459.txt"]


def test_where_both_rules_agree_the_table_says_so(runs, capsys):
    """The only predicted classes are 0 and 1, and both occur: IoU 3/(6+5-3) and 2/(4+5-2), in the mean .330."""
    white_and_black(runs / "data", "voc20", [[1, 1, 1], [2, 2, 0]])
    E.main(["san", "--dataset", "voc20", "--data", "data"])
    text = capsys.readouterr().out
    assert "0.330     same" in text and "18 of 20 names have no ground truth in these images, 0 of them" in text
    assert "COCO-Stuff's 171 (san does not say which names it was trained with)" in text


def test_all_datasets_in_one_command(runs, capsys):
    """Four of the six are there: four rows, two that say which archive is missing; the route of each set is told."""
    for name in ("voc20", "pc59", "pc459", "ade150"):
        packed(runs / "data", name)
    E.main(["pat", "--dataset", "all", "--data", "data", "--workers", "1"])
    text = (runs / "pat/scores/published.txt").read_text()
    assert text in capsys.readouterr().out
    order = [line.split()[0] for line in text.splitlines() if line.split()[0].rstrip(":") in DATASETS]
    assert order[:6] == ["voc20", "pc59", "pc459", "ade150", "coco-stuff:", "ade847:"]
    assert "coco-stuff: not there: val2017.zip" in text and "route B, the 459 labels through the id map" in text
    for name in ("voc20", "pc59", "pc459", "ade150"):
        table = json.loads((runs / f"pat/scores/{name}.json").read_text())
        assert table["images"] == 2 and table["checksum"] == load_vocabulary(name).checksum
        assert table["rows"]["PAT pat"]["reconstruction"]["PSNR"] > 20
    assert not list((runs / "pat/scores").glob("*.safetensors"))


def test_a_stopped_command_reads_no_dataset_twice(runs, monkeypatch, capsys):
    """Killed in the second of three sets, given again: nothing of the first is read, and the tables are the same."""
    for name in ("voc20", "pc459", "ade150"):
        packed(runs / "data", name)
    command = ["san", "--dataset", "voc20", "pc459", "ade150", "--data", "data"]
    E.main(command)
    wanted, asked, read = capsys.readouterr().out, [], Published.read
    names = ["san/scores/voc20.json", "san/scores/pc459.json", "san/scores/ade150.json"]
    before = [(runs / name).read_text() for name in names]

    def reads(self, i, stop=True):
        asked.append((self.name, i))
        if stop and self.name == "pc459" and i == 1:
            raise KeyboardInterrupt
        return read(self, i)

    monkeypatch.setattr("tally.SAVE_EVERY", 1)
    monkeypatch.setattr(Published, "read", reads)
    with pytest.raises(KeyboardInterrupt):
        E.main(command)
    assert asked == [("voc20", 0), ("voc20", 1), ("pc459", 0), ("pc459", 1)]
    asked.clear()
    capsys.readouterr()
    monkeypatch.setattr(Published, "read", lambda self, i: reads(self, i, stop=False))
    E.main(command)
    assert asked == [("pc459", 1), ("ade150", 0), ("ade150", 1)]
    text = capsys.readouterr().out
    assert text == "voc20: goes on after 2 of 2 images\npc459: goes on after 1 of 2 images\n" + wanted
    assert [(runs / name).read_text() for name in names] == before


def test_a_quick_look_touches_no_full_result(runs, capsys):
    """--images 1 has files of its own, named after it, and says how many of how many."""
    packed(runs / "data", "voc20")
    E.main(["san", "--dataset", "voc20", "--data", "data"])
    before = (runs / "san/scores/voc20.json").read_bytes()
    E.main(["san", "--dataset", "voc20", "--data", "data", "--images", "1"])
    assert (runs / "san/scores/voc20.json").read_bytes() == before
    assert json.loads((runs / "san/scores/voc20-first-1.json").read_text())["images"] == 1
    assert "1/1449" in capsys.readouterr().out


def test_other_names_for_a_dataset_are_recorded(runs, capsys):
    """Twenty names in a file: the score file holds them, the file's name, their checksum and the published one."""
    packed(runs / "data", "voc20")
    names = [f"{name} photo" for name in load_vocabulary("voc20").names]
    (runs / "names.txt").write_text("\n".join(names))
    E.main(["san", "--dataset", "voc20", "--data", "data", "--names", "names.txt"])
    table = json.loads((runs / "san/scores/voc20.json").read_text())
    assert table["names"] == names and table["names_file"] == "names.txt"
    assert table["checksum"] == checksum(names, load_vocabulary("voc20").raw) != table["published_checksum"]
    assert f"{table['checksum']} (--names names.txt)" in capsys.readouterr().out
    with pytest.raises(InputError, match="has 20 names, but these labels have 459"):
        packed(runs / "data", "pc459")
        E.main(["san", "--dataset", "pc459", "--data", "data", "--names", "names.txt"])


def test_what_is_not_there_is_an_error_only_by_name(runs):
    """By name it is one line; of "all", only if nothing is there; a wrong name lists the right ones."""
    packed(runs / "data", "voc20")
    for argv, words in ((["pc459"], "Pascal Context 459 val is not there; it needs VOCtrainval_03-May-2010.tar"),
                        (["voc20", "pc495"], "no dataset 'pc495'; there are coco-stuff, voc20"),
                        (["all", "--names", "x"], "--names replaces the names of one dataset")):
        with pytest.raises(InputError, match=words):
            E.main(["san", "--dataset", *argv, "--data", "data"])
    (runs / "empty").mkdir()
    with pytest.raises(InputError, match="empty: none of the published datasets is there"):
        E.main(["san", "--dataset", "all", "--data", "empty"])
    assert not (runs / "san/scores").exists()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A real, untrained PAT over a random CLIP, in a run directory."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    model = build(tiny())
    save_checkpoint(run / "checkpoint.safetensors", model, torch.optim.AdamW(model.parameters()), 0, None)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(tiny())))
    return run


def test_two_processes_give_the_scores_of_one(tiny_run, tmp_path, monkeypatch, capsys):
    """torchrun and gloo over a published dataset: both files byte for byte, every printed line."""
    packed(tmp_path, "voc20")
    monkeypatch.chdir(tiny_run.parent)
    flags, files = ["tiny", "--dataset", "voc20", "--data", str(tmp_path)], ["scores/voc20.json", "scores/voc20.txt"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                  # as torchrun does: sums round by the number of threads
    E.main(flags)
    torch.set_num_threads(threads)
    alone, before = capsys.readouterr().out, [(tiny_run / name).read_bytes() for name in files]
    for name in files:
        (tiny_run / name).unlink()
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port",
                          str(30000 + os.getpid() % 1000), E.__file__, *flags], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert "process 1 of 2" in two.stderr and two.stdout == alone
    assert [(tiny_run / name).read_bytes() for name in files] == before
    assert [path.name for path in tiny_run.rglob("*.safetensors")] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("data", [[], ["--data", "own"], ["--dataset", "voc20", "--data", "data"]])
def test_only_the_first_process_writes_and_prints(runs, monkeypatch, capsys, data):
    """The second of two, over the world, a folder and a published dataset, leaves its tallies and no word."""
    packed(runs / "data", "voc20")
    for part in ("images", "labels"):
        (runs / "own" / part).mkdir(parents=True)
        for name in "ab":
            Image.new("L", (8, 8), 0).save(runs / "own" / part / f"{name}.png")
    (runs / "own/classes.txt").write_text("day\nnight")
    monkeypatch.setattr(E, "process_group", lambda device: nullcontext((1, 2, device)))
    monkeypatch.setattr("tally.dist.all_reduce", lambda tensor: None)
    E.main(["pat", *data])
    assert all(path.suffixes == [".1", ".safetensors"] for path in (runs / "pat").rglob("*") if path.is_file())
    assert capsys.readouterr().out == ""


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
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "b.png", "--rfid", "w"], "leave --compare.* --rfid out"),
    (["pat", "--rfid", "gone.pth"], "--rfid gone.pth: cannot be read"),
    (["pat", "--dataset", "all"], "give --data DIR with the archives"),
    (["pat", "--dataset", "all", "--data", "d", "--compare", "san"], "one run at a time"),
    (["pat", "--dataset", "all", "--data", "d", "--ignore", "0"], "folder of your own"),
    (["pat", "--names", "n.txt"], "give --data DIR with it"),
    (["pat", "--workers", "-1"], "--workers -1: at least 0"),
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


def test_scores_are_kept_when_the_drawing_fails(runs, monkeypatch):
    """Scoring took the hours; a picture that cannot be drawn must not take the table with it."""
    def fail(*args, **kwargs):
        raise InputError("log.jsonl: cannot be read")
    monkeypatch.setattr(E, "run_pictures", fail)
    with pytest.raises(InputError, match="log.jsonl"):
        E.main(["pat"])
    assert json.loads((runs / "pat/scores.json").read_text())["rows"] and not (runs / "pat/report.html").exists()
