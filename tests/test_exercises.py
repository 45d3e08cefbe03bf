"""EXERCISES.md speaks of tests, files and functions by name: they are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "EXERCISES.md").read_text()
TESTS = {path.name: re.findall(r"^def (test_\w+)", path.read_text(), re.M) for path in ROOT.rglob("tests/**/test_*.py")}
SOURCE = "".join(path.read_text() for room in (".", "published", "siblings") for path in (ROOT / room).glob("*.py"))


def test_every_test_it_names_exists():
    """By its whole name, or by its beginning and three dots."""
    named = set(re.findall(r"`(test_\w+(?:\.\.\.)?)`", TEXT))
    tests = [name for names in TESTS.values() for name in names]
    assert len(named) > 10
    for name in named:
        assert any(test == name or name.endswith("...") and test.startswith(name[:-3]) for test in tests), name


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^pytest tests/.*$", TEXT, re.M))))
def test_every_selection_it_runs_selects_something(line):
    """Each word after -k is part of the name of a test of that file."""
    files, words = re.findall(r"test_\w+\.py", line), re.findall(r"\w+", line.partition("-k")[2])
    assert files
    for word in set(words) - {"or", "mine"}:                  # the model that exercise 7 adds
        assert any(word in name for file in files for name in TESTS[file]), word


def test_every_name_it_points_to_is_in_the_code():
    """What stands in the paragraphs "Where to look" between backticks: files, functions, classes, fields, flags."""
    where = re.findall(r"\*\*Where to look\.\*\*(.*?)\n\n", TEXT, re.S)
    assert len(where) == 7
    for name in re.findall(r"`([^`]+)`", "".join(where)):
        assert (ROOT / name).exists() or re.search(rf"\b{re.escape(name.split('.')[-1])}\b", SOURCE), name
