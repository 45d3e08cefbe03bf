"""The lists of bugs fit the sources as they are, and the program that puts them in tells the truth about them."""

import re
from pathlib import Path

import pytest

from tests.mutations import Mutation
from tests.mutations.__main__ import ENOUGH, SHORT, failing, files_of, given, lists, main, mutated, run

ROOT = Path(__file__).parent.parent
EVERY = [m for found in lists().values() for m in found]


def test_every_list_is_found_and_holds_something():
    files = {path.stem for path in (ROOT / "tests" / "mutations").glob("*.py")} - {"__init__", "__main__"}
    assert lists().keys() == files and all(lists().values())


def test_every_bug_has_one_place_and_is_still_a_program():
    """Its file and its tests are there, what is taken out stands there exactly once, and the two programs differ."""
    for m in EVERY:
        text = (ROOT / m.file).read_text()
        assert text.count(m.old) == 1, (m.file, m.what, text.count(m.old))
        assert m.old != m.new, (m.file, m.what)
        compile(text.replace(m.old, m.new), m.file, "exec")
        named = [word for word in given(m).split() if word.startswith("tests/")]
        assert named and all((ROOT / word.split("::")[0]).is_file() for word in named), (m.file, m.what)


def test_no_bug_is_listed_twice():
    assert len({(m.file, m.old, m.new) for m in EVERY}) == len({(m.file, m.what) for m in EVERY}) == len(EVERY)


def test_the_short_list_names_files():
    assert all((ROOT / file).is_file() for file in SHORT)


def test_the_mirror_of_a_file():
    assert given(Mutation("vq.py", "", "", "")) == "tests/test_vq.py"
    assert given(Mutation("kernels/cpu.py", "", "", "")) == "tests/kernels/test_cpu.py"
    assert given(Mutation("vq.py", "", "", "", "tests/test_pat.py -k vq")) == "tests/test_pat.py -k vq"


# --- a tiny tree of its own -------------------------------------------------------------------------------------------

PLUS = Mutation("sums.py", "minus", "a + b", "a - b")
SWAP = Mutation("sums.py", "the other way round", "a + b", "b + a")
TIMES = Mutation("sums.py", "times is plus", "a * b", "a + b")                # 2 * 2 = 2 + 2
BROKEN = Mutation("sums.py", "plus, where another test fails", "a * b", "a", "tests/test_broken.py")


@pytest.fixture
def tree(tmp_path):
    """A program and its tests: sums are tested well, products badly, something else fails anyway."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef mul(a, b):\n    return a * b\n")
    (tmp_path / "tests/test_sums.py").write_text("from sums import add, mul\n\n\ndef test_two_and_three_are_five():\n"
                                                 "    assert add(2, 3) == 5\n\n\ndef test_mul():\n"
                                                 "    assert mul(2, 2) == 4\n")
    (tmp_path / "tests/test_broken.py").write_text("def test_never():\n    assert False\n")
    (tmp_path / "tests/test_slow.py").write_text("def test_slow():\n    while True:\n        pass\n")
    (tmp_path / ".hidden").write_text("")
    return tmp_path


def test_a_run_tells_what_was_caught_by_which_test_and_what_survived(tree, capsys):
    """One caught of the three that a test must notice; one has a reason and is not asked for; nothing stays changed."""
    before = (tree / "sums.py").read_text()
    share = run(tree, [PLUS, SWAP._replace(survives="a + b is b + a"), TIMES, BROKEN], processes=2)
    said = capsys.readouterr().out
    assert share == pytest.approx(1 / 3) and share < ENOUGH and (tree / "sums.py").read_text() == before
    for fate, rest in (("caught", "minus  <- test_two_and_three_are_five"), ("SURVIVED", "times is plus"),
                       ("survives", "the other way round  <- a \\+ b is b \\+ a"),
                       ("tests fail already", "plus, where another test fails  <- test_never")):
        assert len(re.findall(rf"^{fate} +\d+ s  sums.py: {rest}$", said, re.M)) == 1, said
    for file in ("sums.py", "total"):
        assert re.search(rf"^{file} +1 tests fail already, 1 survives, 1 caught, 1 SURVIVED$", said, re.M)


def test_a_test_that_never_ends_has_noticed(tree):
    assert failing(tree, ["tests/test_slow.py"], 2)[0] == "hangs"


def test_a_bug_that_has_no_place_is_an_error_and_not_a_survivor(tree):
    with pytest.raises(ValueError, match="sums.py: nowhere: its `old` occurs 0 times"):
        mutated(tree, Mutation("sums.py", "nowhere", "a / b", "a"), ["tests"], 60)


def test_without_git_hidden_files_and_caches_stay_behind(tree, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tree.parent))
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__/sums.pyc").write_text("")
    assert sorted(files_of(tree)) == ["sums.py", "tests/test_broken.py", "tests/test_slow.py", "tests/test_sums.py"]


def test_a_file_without_a_bug_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "nothing.py"])
    assert "no bug is listed for nothing.py" in capsys.readouterr().err
