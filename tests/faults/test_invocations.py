"""Every command, told something wrong: one line, status 2, nothing written, nothing changed, within seconds and SIZE.

A case is a command and what is typed after it.  {run}, {pat}, {photo}, ... stand for things that are fine (`place`);
{bad...} for such as somebody damaged.  A case that ends in any other way is a bug of the command, not of the user.
"""

import dataclasses
import importlib
import json
import re
import resource
import shutil
import signal
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import cli
from runs import CHECKPOINTS, build, leaves
from tests.helpers import save_run, tiny
from train import FLAGS, recipe

SECONDS = 30                           # at most, on a busy machine; most of them take milliseconds, opening a run takes one
SIZE = 2**30                           # bytes that a case may add to the most this process ever took


# --- a place with everything there may be ----------------------------------------------------------------------------


def damaged(run, to, **how):
    """A copy of a run directory with one file changed: name -> bytes, or None to remove it, or a function of its bytes."""
    shutil.copytree(run, to)
    for name, change in how.items():
        path = to / {"config": "config.json", "checkpoint": CHECKPOINTS[0]}[name]
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    return to


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """{name: what stands for it}: runs, photos, folders, tokens, fine and damaged; the folder they are in is 'here'."""
    here = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    things = {"here": here, "nowhere": here / "nowhere", "new": here / "new"}
    for kind in ("san", "pat"):
        things[{"san": "run"}.get(kind, kind)] = save_run(here / kind, build(tiny(kind).run), tiny(kind), recipe("world").recipe.steps)
    run = things["run"]
    config = json.loads((run / "config.json").read_text())
    wrong = {"list": b"[]", "empty": b"", "cut": b'{"model": "san"', "binary": bytes(range(256)), "model": {"model": "pot"}, "nan": {"lr": float("nan")},
             "text": {"lr": "fast"}, "negative": {"width": -48}, "huge": {"width": 10**9}, "null": {"queries": None},
             "bool": {"steps": True}, "object": {"seed": {}}, "heads": {"heads": 7}, "depths": {"depths": [0, 1]},
             "float": {"depth": 1.5}, "vlm": {"vlm": "ViT-Z"}, "weights": {"pretrained": "/no/such/file"}, "number": {"model": 3}}
    for name, change in wrong.items():
        text = change if isinstance(change, bytes) else json.dumps({**config, **change}).encode()
        things[f"config {name}"] = damaged(run, here / f"config-{name}", config=text)
    flips = {"cut": lambda data: data[:-7], "empty": b"", "short": lambda data: data[:4], "text": b"hello", "absent": None,
             "bit": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
             "header": lambda data: (10**15).to_bytes(8, "little") + data[8:],
             "pickle": lambda data: b"\x80\x04\x95" + data[3:], "other": lambda data: (things["pat"] / CHECKPOINTS[0]).read_bytes()}
    for name, change in flips.items():
        things[f"weights {name}"] = damaged(run, here / f"weights-{name}", checkpoint=change)
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(here / "photo.png")
    things["photo"] = here / "photo.png"
    for name, data in {"text": b"hello", "empty": b"", "cut": (here / "photo.png").read_bytes()[:60]}.items():
        things[f"photo {name}"] = here / f"photo-{name}.png"
        things[f"photo {name}"].write_bytes(data)
    bomb = here / "bomb.png"                                                              # a header that claims 60,000 x 60,000
    header = bytearray((here / "photo.png").read_bytes())
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    bomb.write_bytes(header)
    things["photo bomb"] = bomb
    for name, classes in {"folder": "sky\ngrass\n", "folder twice": "sky\nsky\n", "folder blank": "sky\n\n", "folder none": ""}.items():
        root = things[name] = here / name.replace(" ", "-")
        for part in ("images", "labels"):
            (root / part).mkdir(parents=True)
        shutil.copy(here / "photo.png", root / "images" / "a.png")
        Image.fromarray(np.full((40, 60), 0, np.uint8)).save(root / "labels" / "a.png")
        (root / "classes.txt").write_text(classes)
    for name, spoil in {"folder size": lambda root: Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "labels" / "a.png"),
                        "folder id": lambda root: Image.fromarray(np.full((40, 60), 7, np.uint8)).save(root / "labels" / "a.png"),
                        "folder photo": lambda root: (root / "images" / "a.png").write_bytes(b"hello"),
                        "folder label": lambda root: (root / "labels" / "a.png").write_bytes(b"hello"),
                        "folder unlabelled": lambda root: (root / "labels" / "a.png").unlink(),
                        "folder empty": lambda root: (root / "images" / "a.png").unlink()}.items():
        root = things[name] = here / name.replace(" ", "-")
        shutil.copytree(things["folder"], root)
        spoil(root)
    (here / "file").write_text("a file")
    things["file"] = here / "file"
    for name, entries in {"tokens text": None, "tokens empty": {}, "tokens array": {"x": np.zeros(3)}}.items():
        things[name] = here / f"{name.replace(' ', '-')}.npz"
        if entries is None:
            things[name].write_text("hello")
        else:
            np.savez(things[name], **entries)
    things["zip"] = here / "zip.npz"
    with zipfile.ZipFile(things["zip"], "w") as archive:
        archive.writestr("../escaped.npy", b"x")
    return things


# --- the cases -------------------------------------------------------------------------------------------------------


def numbers_of(model):
    """Wrong texts for every number of a model and of the loop, by the kind of its default."""
    for name, part in leaves(recipe("world", model)).items():
        spec = next(field for field in dataclasses.fields(part) if field.name == name)
        kind = type(spec.default)
        texts = {bool: ["maybe"], int: ["1.5", "x", "1e400"], float: ["nan", "inf", "x"], tuple: ["1,x", "1.5"], str: []}[kind]
        if "low" in spec.metadata:
            texts = texts + [str(spec.metadata["low"] - 1), str(spec.metadata["high"] * 10)]
        if "allowed" in spec.metadata:
            texts = texts + ["nonsense"]
        yield from (f"--model {model} --set {name}={text}" for text in texts)


def cases():
    """[(command, what is typed)]"""
    train = [*numbers_of("pat"), *numbers_of("san")]
    train += [f"--{name.replace('_', '-')}" for flags in FLAGS.values() for name in flags]                # without a value
    train += ["--set", "--set x", "--set =3", "--set lr", "--stepz 3", "--model pot", "--preset moon", "--model san --kernels plain",
              "--model dense --set code_dim=3", "--ablate nonsense", "--model san --ablate no-mixer", "--vlm ViT-Z", "--pretrained {file}",
              "--pretrained {nowhere}", "--init {nowhere}", "--init {file}", "--init {weights cut}", "--out {file}", "--out {file}/x",
              "--out {run}", "--out {here}/" + "x" * 300, "--data {nowhere}", "--data {file}", "--data {folder none}", "--data {folder twice}",
              "--data {folder blank}", "--data {folder empty}", "--data {folder size}", "--data {folder id}", "--data {folder photo}",
              "--data {folder label}", "--data {folder unlabelled}", "--data {folder} --val-data {nowhere}", "--val-data {nowhere}", "--val-data {folder photo}",
              "--data {folder} --val-data {folder size}", "--preset coco", "--preset coco --data {nowhere} --pretrained none", "--batch 8 --accumulate 3",
              "--batch 1000000000", "--workers 100000", "--steps 1000000000000", "--set short_side=1000000", "--set heads=7", "--set hs_heads=5",
              "--set scales=4,1,2", "--set scales=3,2,1", "--set codes=1,2,3", "--set depths=0,1", "--set depths=0,1,2,900", "--set depth=2",
              "--perceptual", "--set perceptual=true", "--device tpu", "--model fisa --set generator={nowhere}",
              "--model fisa --set generator={pat} --set simo=nobody", "--model senatra --data {folder}", "--model senatra --batch 7",
              "--model fgaseg --set topk=3 --set fast=false", "--model fgaseg --set hidden=31", "--resume {nowhere}", "--resume {file}", "extra words",
              "--resume {weights absent}", "--resume {run} --batch 2", "--resume {run} --set width=32", "--resume {run} --seed 3", "--resume {run} --lr nan"]
    runs = [f"{{config {name}}}" for name in ("list", "empty", "cut", "binary", "model", "nan", "text", "negative", "huge", "null", "bool", "object", "heads",
                                            "depths", "float", "vlm", "weights", "number")]
    runs += [f"{{weights {name}}}" for name in ("cut", "empty", "short", "text", "absent", "bit", "header", "pickle", "other")] + ["{nowhere}", "{file}", "{folder}"]
    loop = ("{config nan}", "{config text}", "{config bool}") # of the loop's own numbers, which only the loop reads
    of_runs = [("train", f"--resume {run}") for run in loop] + [command for run in runs if run not in loop for command in (("eval", f"{run} --images 1"), ("predict", f"{run} {{photo}} --labels sky --out {{new}}.png"),
                                                     ("train", f"--resume {run}"), ("tokenizer", f"encode {{photo}} --run {run} --out {{new}}.npz"),
                                                     ("studies.gallery", f"stages {run}"), ("studies.oracle", f"{run} --images 1"))]
    other = {
        "eval": ["", "{run} --images 0", "{run} --images x", "{run} --data {nowhere}", "{run} --data {folder size}", "{run} --names {nowhere}",
                 "{run} --compare {nowhere}", "{run} --workers -1", "{run} --datum x", "{run} {run}", "{run} --image {photo}"],
        "predict": ["", "{run}", "{run} {photo}", "{run} {photo} --labels ,", "{run} {photo} --labels sky,sky", "{run} {nowhere} --labels sky",
                    "{run} {photo text} --labels sky", "{run} {photo empty} --labels sky", "{run} {photo cut} --labels sky",
                    "{run} {photo bomb} --labels sky", "{run} {here} --labels sky", "{run} {photo} --labels sky --out {new}.xyz",
                    "{run} {photo} --labels sky --out {nowhere}/x/y.png", "{run} {photo} --labels sky --out {here}", "{run} {photo} --labelz sky"],
        "tokenizer": ["", "encode", "encode {nowhere} --run {pat} --out {new}.npz", "encode {photo text} --run {pat} --out {new}.npz",
                      "encode {photo bomb} --run {pat} --out {new}.npz", "encode {photo} --run {run} --out {new}.npz", "encode {photo} {photo} --run {pat} --out {new}.npz",
                      "encode {photo} --run {pat} --out {new}.npz --short-side -1", "encode {photo} --run {pat} --out {new}.npz --short-side 1000000",
                      "encode {photo} --run {pat} --out {nowhere}/x/y.npz", "decode {nowhere} --run {pat} --out {new}", "decode {tokens text} --run {pat} --out {new}",
                      "decode {tokens empty} --run {pat} --out {new}", "decode {tokens array} --run {pat} --out {new}", "decode {zip} --run {pat} --out {new}",
                      "save {run} --out {new}.safetensors", "save {nowhere} --out {new}.safetensors", "save {pat} --out {nowhere}/x/y.safetensors"],
        "studies.gallery": ["", "nonsense", "stages", "stages {nowhere}", "masks {run} --image {nowhere}", "stages {pat} --image {photo text}"],
        "studies.oracle": ["", "{run} --images 0", "{run} --data {nowhere}"],
        "studies.meaning": ["", "{run}", "{pat} --images 1", "{pat} --images x", "{pat} --data {nowhere}"],
        "studies.ablations": ["--seeds 0", "--only nonsense", "--resume {run}", "--seed 3", "--ablate no-mixer", "--model san", "--stepz 3", "--seeds x"],
        "studies.models": ["--seeds 0", "--models pot", "--models pat,pat", "--models ,", "--seed 3", "--resume {run}", "--stop-at 3"],
        "studies.seeds": ["--seeds 0", "--seeds 3,x", "--stepz 1"],
        "studies.report": ["", "{nowhere}", "{config cut}", "{weights cut}"],
        "studies.benchmark": ["", "{run} --dataset nonsense", "{run} --dataset ade20k --data {nowhere}", "{nowhere} --dataset ade20k --data {here}"],
        "studies.costs": ["", "{run}", "{pat}", "{nowhere}"], "studies.focus": ["", "{run}", "{nowhere}"], "studies.groups": ["", "{run}", "{nowhere}"],
        "studies.speed": ["--nonsense", "--batch 0", "--batch x", "--everything", "--dry", "--everything --dry --out {nowhere}/x/y.md",
                          "--everything --dry --minutes 0 --out {new}.md", "--everything --dry --rounds 3 --out {new}.md"],
        "published.browse": ["", "nonsense", "check", "check {nowhere}", "show {nowhere}"],
        "published.san_checkpoints": ["", "{nowhere} --out {new}", "{file} --out {new}", "{photo} --out {new}"],
        "world.pretrain": ["--seed x", "--out {nowhere}", "--out {file}", "--nonsense"],
        "siblings.senatra": ["--seed x", "--nonsense", "--pretrain --out {run}"]}
    return [("train", words) for words in train] + of_runs + [(command, words) for command, all_ in other.items() for words in all_]


def what_stands(here):
    """{path: (size, time of its last change)} of everything below a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in here.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("command, words", cases(), ids=lambda text: text.replace("{", "").replace("}", "")[:70] or "nothing")
def test_what_is_wrong_ends_in_one_line_with_status_two_and_nothing_is_written(command, words, place, capsys, monkeypatch):
    typed = [word.format_map(place) for word in re.findall(r"(?:[^\s{]|\{[^}]*\})+", words)]       # {names} may hold blanks
    monkeypatch.setattr("sys.argv", [command, *typed])
    monkeypatch.chdir(place["here"])
    before, began, most = what_stands(place["here"]), time.monotonic(), peak()
    signal.signal(signal.SIGALRM, runaway)
    signal.alarm(SECONDS)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run_cli(importlib.import_module(command).main)
    finally:
        signal.alarm(0)
    out = capsys.readouterr()
    assert ended.value.code == 2, out
    lines = [line for line in out.err.splitlines() if line.strip() and "image/s" not in line]                 # a progress bar
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in out.out, out.err
    assert len(lines[0]) < 600 and what_stands(place["here"]) == before
    assert time.monotonic() - began < SECONDS and peak() - most < SIZE


def peak():
    """The most memory that this process ever took, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def runaway(*_):
    raise AssertionError(f"it was still at work after {SECONDS} seconds: nobody noticed")


def test_there_are_at_least_250_and_every_command_is_among_them():
    commands = {command for command, _ in cases()}
    assert len(cases()) >= 250 and {"train", "eval", "predict", "tokenizer"} <= commands and len(commands) >= 18
