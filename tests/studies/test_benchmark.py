"""What benchmark.py promises: every image once; stopped or not, on one process or two, the same numbers, and files."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import studies.report
from cli import InputError
from data import names_checksum, to_unit
from eval import Tally, evaluate
from published.datasets import SETS, Published
from published.vocabulary import load_vocabulary
from runs import build
from studies import benchmark
from studies.benchmark import SharedPass
from tests.helpers import (STEMS, FakeInception, FakeModel, Noisy, fake_runs, packed, save_run, tiny, unpacked)

ROOT = Path(benchmark.__file__).parent.parent
QUIET = SharedPass(progress=False)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    return fake_runs(monkeypatch, tmp_path)


# --- stopped, gone on with, shared out ------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A Pass that keeps its tally, every two images."""
    monkeypatch.setattr(benchmark, "SAVE_EVERY", 2)
    return replace(QUIET, folder=tmp_path / "scores", title="noisy")


def stopped(how, model=None):
    """A pass that is killed while it reads image 5, so that its file holds four."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(model or FakeModel(), Noisy(stop_at=5), how=how)


def test_stopped_and_gone_on_with_equals_never_stopped(kept, capsys):
    """Killed at image 5 with four on disk: the rest is read, and every number of the row is the same."""
    whole, second = evaluate(FakeModel(), Noisy(), how=QUIET), Noisy()
    stopped(kept)
    row = evaluate(FakeModel(), second, how=kept)
    assert second.asked == [4, 5, 6] and row == whole and row["images"] == 7
    assert capsys.readouterr().out == "noisy: goes on after 4 of 7 images\n"
    assert 0 < row["reconstruction"]["SSIM"] < 1.1 and 0 < row["segmentation"]["mIoU"] < 1
    third = Noisy()
    assert evaluate(FakeModel(), third, how=kept) == whole and third.asked == []              # finished, nothing left
    benchmark.forget(kept.folder, "noisy")
    assert not kept.folder.exists()


@pytest.mark.parametrize("what", ["checkpoint", "settings", "names", "dataset", "images", "processes"])
def test_what_changed_starts_anew_and_is_said(kept, capsys, what):
    """Other weights, another size, other names, other data, fewer images, another number of processes: all are read."""
    stopped(kept)
    model, dataset, names, how = FakeModel(), Noisy(), None, kept
    if what == "checkpoint":
        model.register_buffer("weight", torch.ones(1))
    if what == "settings":
        model.config.clip.short_side = 48
    if what == "names":
        names = ("day", "night", "dawn")
    if what == "dataset":
        dataset.key = "another"
    if what == "images":
        how = replace(kept, images=6)
    if what == "processes":
        how = replace(kept, processes=2)
    if what == "processes":                                   # nobody to add up with: only what was read counts here
        with pytest.raises(ValueError, match="process group"):
            evaluate(model, dataset, names, how=how)
        assert dataset.asked == [0, 2, 4, 6]
    else:
        row = evaluate(model, dataset, names, how=how)
        assert dataset.asked == list(range(row["images"]))
        assert row == evaluate(model, Noisy(), names, how=replace(QUIET, images=how.images))
    assert capsys.readouterr().out == f"noisy: starts anew: {what} changed since it was stopped\n"


def test_where_the_weights_lie_does_not_matter(kept, capsys):
    """A run that was moved goes on: its config names another file, with the same weights in it."""
    stopped(kept)
    model = FakeModel()
    model.config.clip.pretrained = "elsewhere/clip.safetensors"
    evaluate(model, Noisy(), how=kept)
    assert "goes on after 4" in capsys.readouterr().out


def test_a_damaged_tally_is_said_and_not_used(kept, capsys):
    stopped(kept)
    path = kept.folder / "noisy.0.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert evaluate(FakeModel(), Noisy(), how=kept) == evaluate(FakeModel(), Noisy(), how=QUIET)
    assert "noisy: starts anew: its file is damaged" in capsys.readouterr().out


@pytest.fixture
def tallies(monkeypatch):
    """The tally of every pass, as its process leaves it: nobody adds them up."""
    monkeypatch.setattr(benchmark.dist, "all_reduce", lambda tensor: None)
    left, run = [], SharedPass.run
    monkeypatch.setattr(SharedPass, "run", lambda *args: left.append(run(*args)) or left[-1])
    return left


def test_two_shares_add_up_to_the_whole(tallies):
    """Processes 0 and 1 of 2 read 0 2 4 6 and 1 3 5; added up, their tensors are those of one process, bit for bit."""
    sets = [Noisy() for _ in range(3)]
    for rank, dataset in enumerate(sets):
        evaluate(FakeModel(), dataset, how=replace(QUIET, rank=rank % 2, processes=1 + (rank < 2)))
    assert [dataset.asked for dataset in sets] == [[0, 2, 4, 6], [1, 3, 5], [0, 1, 2, 3, 4, 5, 6]]
    a, b, whole = (t.tensors for t in tallies)
    assert len(whole) == 6                                    # matrix, painted, four stages
    for key in whole:
        assert torch.equal((a[key] + b[key]).nan_to_num(), whole[key].nan_to_num()), key
    assert whole["matrix"].sum() == sum(40 * (24 + 8 * i) for i in range(7))


def test_rfid_of_two_processes_and_of_a_stopped_pass_is_rfid(kept, tallies):
    """Its sums are those of numpy over all seven images, bit for bit, whoever counted them in whatever order."""
    inception = FakeInception()
    whole = evaluate(FakeModel(), Noisy(), how=QUIET, inception=inception)
    for rank in (0, 1):
        evaluate(FakeModel(), Noisy(), how=replace(QUIET, rank=rank, processes=2), inception=inception)
    one, *two = (t.tensors for t in tallies)
    for key in ("rfid.sums", "rfid.products"):
        assert torch.equal(two[0][key] + two[1][key], one[key]), key
    features = np.stack([inception(to_unit(Noisy()[i]["image"])).numpy() for i in range(7)])
    assert (one["rfid.sums"][0].numpy() == features.sum(0)).all()
    assert (one["rfid.products"][0].numpy() == features.T @ features).all()
    with pytest.raises(KeyboardInterrupt):
        evaluate(FakeModel(), Noisy(stop_at=5), how=kept, inception=inception)
    again = Noisy()
    assert evaluate(FakeModel(), again, how=kept, inception=inception) == whole and again.asked == [4, 5, 6]
    assert whole["reconstruction"]["rFID"] < 1e-3             # this model repaints its input, to float rounding


def test_rfid_asked_for_later_reads_everything_again(kept, capsys):
    stopped(kept)
    again = Noisy()
    row = evaluate(FakeModel(), again, how=kept, inception=FakeInception())
    assert again.asked == list(range(7)) and row["reconstruction"]["rFID"] is not None
    assert capsys.readouterr().out == "noisy: starts anew: rFID changed since it was stopped\n"
    assert evaluate(FakeModel(), Noisy(), how=QUIET)["reconstruction"]["rFID"] is None
    assert evaluate(FakeModel(False), Noisy(), how=QUIET, inception=FakeInception())["reconstruction"] is None


def test_more_processes_than_images(monkeypatch):
    """The last of eight has none of the seven, and still everything to add to the others'."""
    monkeypatch.setattr(benchmark.dist, "all_reduce", lambda tensor: None)
    last = replace(QUIET, rank=7, processes=8).run(None, Noisy(), Tally(7, 3, {"early": 8}), None)
    assert {key: tuple(tensor.shape) for key, tensor in last.tensors.items()} == {
        "matrix": (4, 4), "painted": (7, 4), "codes.early": (9,)}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "scores").write_text("a file")
    with pytest.raises(InputError, match="scores: cannot be made a folder"):
        evaluate(FakeModel(), Noisy(), how=replace(QUIET, folder=tmp_path / "scores"))


def test_rfid_is_measured_with_its_weights_or_not_at_all(runs, monkeypatch, capsys):
    """Without --rfid, and without its package: n/m and the reason.  With both: a number, its images, its worth."""
    benchmark.main(["pat"])
    text = capsys.readouterr().out
    assert "    rFID\n" in text and "rFID n/m: not measured; it takes python -m studies.benchmark --rfid WEIGHTS" in text
    monkeypatch.setattr(benchmark, "load_inception", lambda path, device: None)
    benchmark.main(["pat", "--rfid", "w.pth"])
    out, error = capsys.readouterr()
    assert out == text and error.startswith("rFID will not be measured: pip install -r requirements-rfid.txt")
    monkeypatch.setattr(benchmark, "load_inception", lambda path, device: FakeInception())
    benchmark.main(["pat", "--compare", "san", "--rfid", "w.pth"])
    text, table = capsys.readouterr().out, json.loads((runs / "pat/scores.json").read_text())
    assert table["rows"]["FakeModel pat"]["reconstruction"]["rFID"] == pytest.approx(0, abs=1e-3)
    assert "rFID: 2 images against their reconstructions" in text and "Fewer than 10,000" in text
    assert "2,048 features: the covariances are singular" in text and "not measured; it takes" not in text
    assert any(note.startswith("rFID: 2 images") for note in table["notes"])
    packed(runs / "data", "voc20")
    benchmark.main(["pat", "--dataset", "voc20", "--data", "data", "--rfid", "w.pth"])
    assert capsys.readouterr().out.count("rFID: 2 images against their reconstructions") == 1


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
    benchmark.main(["san", "--dataset", "pc459", "--data", "data"])
    table = json.loads((runs / "san/scores/pc459.json").read_text())
    s = table["rows"]["FakeModel san"]["segmentation"]
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
    benchmark.main(["san", "--dataset", "voc20", "--data", "data"])
    text = capsys.readouterr().out
    assert "0.330     same" in text and "18 of 20 names have no ground truth in these images, 0 of them" in text
    assert "COCO-Stuff's 171 (san does not say which names it was trained with)" in text


def test_all_datasets_in_one_command(runs, capsys):
    """Four of the six are there: four rows, two that say which archive is missing; the route of each set is told."""
    for name in ("voc20", "pc59", "pc459", "ade150"):
        packed(runs / "data", name)
    benchmark.main(["pat", "--dataset", "all", "--data", "data", "--workers", "1"])
    text = (runs / "pat/scores/published.txt").read_text()
    assert text in capsys.readouterr().out
    order = [line.split()[0] for line in text.splitlines() if line.split()[0].rstrip(":") in SETS]
    assert order[:6] == ["voc20", "pc59", "pc459", "ade150", "coco-stuff:", "ade847:"]
    assert "coco-stuff: not there: val2017.zip" in text and "route B, the 459 labels through the id map" in text
    for name in ("voc20", "pc59", "pc459", "ade150"):
        table = json.loads((runs / f"pat/scores/{name}.json").read_text())
        assert table["images"] == 2 and table["checksum"] == load_vocabulary(name).checksum
        assert table["rows"]["FakeModel pat"]["reconstruction"]["PSNR"] > 20
    assert not list((runs / "pat/scores").glob("*.safetensors"))


def test_a_stopped_command_reads_no_dataset_twice(runs, monkeypatch, capsys):
    """Killed in the second of three sets, given again: nothing of the first is read, and the tables are the same."""
    for name in ("voc20", "pc459", "ade150"):
        packed(runs / "data", name)
    command = ["san", "--dataset", "voc20", "pc459", "ade150", "--data", "data"]
    benchmark.main(command)
    wanted, asked, read = capsys.readouterr().out, [], Published.read
    names = ["san/scores/voc20.json", "san/scores/pc459.json", "san/scores/ade150.json"]
    before = [(runs / name).read_text() for name in names]

    def reads(self, i, stop=True):
        asked.append((self.name, i))
        if stop and self.name == "pc459" and i == 1:
            raise KeyboardInterrupt
        return read(self, i)

    monkeypatch.setattr("studies.benchmark.SAVE_EVERY", 1)
    monkeypatch.setattr(Published, "read", reads)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(command)
    assert asked == [("voc20", 0), ("voc20", 1), ("pc459", 0), ("pc459", 1)]
    asked.clear()
    capsys.readouterr()
    monkeypatch.setattr(Published, "read", lambda self, i: reads(self, i, stop=False))
    benchmark.main(command)
    assert asked == [("pc459", 1), ("ade150", 0), ("ade150", 1)]
    text = capsys.readouterr().out
    assert text == "voc20: goes on after 2 of 2 images\npc459: goes on after 1 of 2 images\n" + wanted
    assert [(runs / name).read_text() for name in names] == before


def test_a_quick_look_touches_no_full_result(runs, capsys):
    """--images 1 has files of its own, named after it, and says how many of how many."""
    packed(runs / "data", "voc20")
    benchmark.main(["san", "--dataset", "voc20", "--data", "data"])
    before = (runs / "san/scores/voc20.json").read_bytes()
    benchmark.main(["san", "--dataset", "voc20", "--data", "data", "--images", "1"])
    assert (runs / "san/scores/voc20.json").read_bytes() == before
    assert json.loads((runs / "san/scores/voc20-first-1.json").read_text())["images"] == 1
    assert "1/1449" in capsys.readouterr().out


def test_other_names_for_a_dataset_are_recorded(runs, capsys):
    """Twenty names in a file: the score file holds them, the file's name, their checksum and the published one."""
    packed(runs / "data", "voc20")
    names = [f"{name} photo" for name in load_vocabulary("voc20").names]
    (runs / "names.txt").write_text("\n".join(names))
    benchmark.main(["san", "--dataset", "voc20", "--data", "data", "--names", "names.txt"])
    table = json.loads((runs / "san/scores/voc20.json").read_text())
    assert table["names"] == names and table["names_file"] == "names.txt"
    assert table["checksum"] == names_checksum(names, load_vocabulary("voc20").raw) != table["published_checksum"]
    assert f"{table['checksum']} (--names names.txt)" in capsys.readouterr().out
    with pytest.raises(InputError, match="has 20 names, but these labels have 459"):
        packed(runs / "data", "pc459")
        benchmark.main(["san", "--dataset", "pc459", "--data", "data", "--names", "names.txt"])


def test_what_is_not_there_is_an_error_only_by_name(runs):
    """By name it is one line; of "all", only if nothing is there; a wrong name lists the right ones."""
    packed(runs / "data", "voc20")
    for argv, words in ((["pc459"], "Pascal Context 459 val is not there; it needs VOCtrainval_03-May-2010.tar"),
                        (["voc20", "pc495"], "no dataset 'pc495'; there are coco-stuff, voc20"),
                        (["all", "--names", "x"], "--names replaces the names of one dataset")):
        with pytest.raises(InputError, match=words):
            benchmark.main(["san", "--dataset", *argv, "--data", "data"])
    (runs / "empty").mkdir()
    with pytest.raises(InputError, match="empty: none of the published datasets is there"):
        benchmark.main(["san", "--dataset", "all", "--data", "empty"])
    assert not (runs / "san/scores").exists()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A real, untrained PAT over a random CLIP, in a run directory."""
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", build(tiny().run), tiny())


def test_two_processes_give_the_scores_of_one(tiny_run, tmp_path, monkeypatch, capsys):
    """torchrun and gloo over a published dataset: both files byte for byte, every printed line."""
    packed(tmp_path, "voc20")
    monkeypatch.chdir(tiny_run.parent)
    flags, files = ["tiny", "--dataset", "voc20", "--data", str(tmp_path)], ["scores/voc20.json", "scores/voc20.txt"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                  # as torchrun does: sums round by the number of threads
    benchmark.main(flags)
    torch.set_num_threads(threads)
    alone, before = capsys.readouterr().out, [(tiny_run / name).read_bytes() for name in files]
    for name in files:
        (tiny_run / name).unlink()
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port",
                          str(30000 + os.getpid() % 1000), "-m", "studies.benchmark", *flags], capture_output=True, text=True)
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
    monkeypatch.setattr(benchmark, "process_group", lambda device: nullcontext((1, 2, device)))
    monkeypatch.setattr(benchmark.dist, "all_reduce", lambda tensor: None)
    benchmark.main(["pat", *data])
    assert all(path.suffixes == [".1", ".safetensors"] for path in (runs / "pat").rglob("*") if path.is_file())
    assert capsys.readouterr().out == ""


def test_stopped_over_the_world_goes_on_and_equals_the_report(runs, monkeypatch, capsys):
    """Without --dataset: studies.report's files, byte for byte, from a pass that was killed after its first image."""
    studies.report.main(["pat", "--compare", "san"])
    said, files = capsys.readouterr().out, ("scores.json", "scores.txt", "report.html")
    before = [(runs / "pat" / name).read_bytes() for name in files]
    monkeypatch.setattr(benchmark, "SAVE_EVERY", 1)
    forward, calls = FakeModel.forward, []

    def killed(self, *args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FakeModel, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(["pat", "--compare", "san"])
    assert [path.name for path in (runs / "pat/scores").iterdir()] == ["world-0.0.safetensors"]
    benchmark.main(["pat", "--compare", "san"])
    assert capsys.readouterr().out == "world-0: goes on after 1 of 2 images\n" + said
    assert [(runs / "pat" / name).read_bytes() for name in files] == before and not (runs / "pat/scores").exists()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    ([], "arguments are required: RUN"),
    (["pat", "--comparr", "san"], "did you mean --compare"),
    (["pat", "--images", "0"], "at least 1"),
    (["pat", "--images", "many"], "invalid int"),
    (["pat", "--compare", "pat"], "named twice"),
    (["pat", "--rfid", "gone.pth"], "--rfid gone.pth: cannot be read"),
    (["pat", "--dataset", "all"], "give --data DIR with the archives"),
    (["pat", "--dataset", "all", "--data", "d", "--compare", "san"], "one run at a time"),
    (["pat", "--dataset", "all", "--data", "d", "--ignore", "0"], "folder of your own"),
    (["pat", "--names", "n.txt"], "give --data DIR with it"),
    (["pat", "--workers", "-1"], "--workers -1: at least 0"),
])
def test_bad_input_is_one_line_and_writes_nothing(runs, argv, words):
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=words) as error:
        benchmark.main(argv)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_from_the_shell_bad_input_ends_with_status_2():
    """The real program: one line on stderr, no traceback."""
    done = subprocess.run([sys.executable, "-m", "studies.benchmark", "no/such/run"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
