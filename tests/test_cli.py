"""What cli.py promises: a wrong command is one line, and no file is left half-written."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from cli import (InputError, check_device, parse_flags, parse_names, run_cli,
                 tensors_checksum, write_files)
from tests.helpers import noise


# ---- names ----
def test_names_are_split_at_commas_and_stripped():
    """--labels "red star, grass" is two names; a list is taken item by item, commas and all."""
    assert parse_names(" red star, grass ") == ("red star", "grass")
    assert parse_names(["tree, palm tree", "sky"]) == ("tree, palm tree", "sky")


@pytest.mark.parametrize("given, why", [("", "no class names"), (" , ", "no class names"), ([], "no class names"),
                                        ("a,,b", "name 2 is blank"), ("a,b, a", "name 3 repeats name 1, 'a'")])
def test_empty_blank_and_doubled_names_are_refused(given, why):
    """The message counts from one, as people do."""
    with pytest.raises(InputError, match=f"--labels: .*{why}"):
        parse_names(given)


# ---- commands ----
def test_an_input_error_ends_the_program_with_one_line_and_status_2(capsys):
    """Also when a DataLoader worker wrapped it in a traceback of its own."""
    def main():
        raise InputError("Caught InputError in DataLoader worker process 0.\n ...\ncli.InputError: x.png: is gone\n")

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: x.png: is gone\n"
    run_cli(lambda: None)                                           # and nothing happens when nothing is wrong


def test_a_failed_write_leaves_the_old_files(tmp_path):
    """The second place cannot be written, so the first keeps what it held, and no temporary file stays."""
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(InputError, match="cannot be written"):
        write_files({tmp_path / "a.txt": "new", tmp_path / "gone/b.txt": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_files_of_every_kind_are_written_whole(tmp_path):
    """Text, bytes, a picture and an array, replacing what was there, with nothing left beside them."""
    (tmp_path / "a.txt").write_text("old")
    image = noise()
    write_files({tmp_path / "a.txt": "new", str(tmp_path / "b.bin"): b"\0\1", tmp_path / "c.png": image,
                 tmp_path / "d.png": Image.fromarray(image)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.bin", "c.png", "d.png"]
    assert (tmp_path / "a.txt").read_text() == "new" and (tmp_path / "b.bin").read_bytes() == b"\0\1"
    assert all((np.array(Image.open(tmp_path / name)) == image).all() for name in ("c.png", "d.png"))


def test_a_picture_of_no_known_format_is_not_written(tmp_path):
    with pytest.raises(InputError, match="a.jpgg: cannot be written"):
        write_files({tmp_path / "a.jpgg": noise()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given, words", [
    (["--stepz", "3"], r"unknown argument --stepz; did you mean --steps\?$"),
    (["--stepz=3"], "unknown argument --stepz; did you mean --steps"),
    (["--step", "3"], "--step; did you mean --steps"), (["--qqq"], "unknown argument --qqq; see --help"),
    (["stray"], "unknown argument stray; see --help"), (["--steps", "many"], "invalid int value: 'many'; see --help")])
def test_a_flag_that_there_is_not_names_the_closest_one(given, words):
    """One line in every case, with the flag as it was typed; a shortened flag is not taken for the full one."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--steps", type=int)
    with pytest.raises(InputError, match=words) as caught:
        parse_flags(parser, given)
    assert "\n" not in str(caught.value)
    assert parse_flags(parser, ["--steps", "3"]).steps == 3


# ---- what a command checks before it works ----
def test_a_device_that_is_not_there_is_refused(monkeypatch):
    """The CPU is everywhere; "cuda" needs a visible GPU."""
    check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: no GPU is visible here.*use the CPU"):
        check_device("cuda")


def test_a_checksum_of_tensors_sees_names_shapes_types_and_bits():
    """Order of the dict and strides of a tensor do not count; everything else does."""
    one, two = torch.arange(6.0).view(2, 3), torch.ones(2)
    digits = tensors_checksum({"a": one, "b": two})
    assert digits == tensors_checksum({"b": two, "a": one.T.contiguous().T}) and len(digits) == 64
    others = ({"a": one, "c": two}, {"a": one.view(3, 2), "b": two}, {"a": one, "b": two.double()},
              {"a": one, "b": torch.nextafter(two, 2 * two)})
    assert len({digits, *map(tensors_checksum, others)}) == 5


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    """Of this very name, and of a process that is no more; another's, and another name's, stay."""
    for name in (".99999999.a.txt", ".1.a.txt", ".99999999.b.txt"):
        (tmp_path / name).write_text("half")
    write_files({tmp_path / "a.txt": "whole"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".1.a.txt", ".99999999.b.txt", "a.txt"]


@pytest.mark.parametrize("number, ends", [(28, True), (30, True), (36, True), (5, False)])
def test_a_full_disk_where_nobody_looked_is_one_line_and_a_broken_one_is_not_hidden(number, ends, capsys):
    def main():
        raise OSError(number, "what the system says", "runs/x/log.jsonl")

    with pytest.raises(SystemExit if ends else OSError) as error:
        run_cli(main)
    if ends:
        said = capsys.readouterr().err
        assert error.value.code == 2 and said == "error: runs/x/log.jsonl: what the system says; what was written before is whole\n"


def test_ctrl_c_before_anything_began_is_quiet():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as error:
        run_cli(main)
    assert error.value.code == 130
