"""The GPU day: every row is on the page, whatever becomes of it, and the time is kept.  The clock is a made-up one."""

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cli import InputError
from kernels import bench
from studies import gpu_day, speed
from studies.gpu_day import STEP, NotMeasured, Row, alone, days, fill, kernel_tests, reason, right, rows, versus

TITLES = ["this machine", "pytest tests/kernels",
          "PAT, kernels triton, batch 12", "SAN, batch 12", "PAT, kernels plain, batch 12",
          "PAT, kernels triton, recompute, batch 12",
          "kernels, bf16, against float64", "kernels, TF32, against float64",
          "attention, bf16, against others", "assign, bf16, against others", "data loading",
          "PAT, kernels triton, batch 4", "SAN, batch 4", "PAT, kernels plain, batch 4",
          "PAT, kernels triton, recompute, batch 4",
          "PAT, kernels triton, batch 1", "SAN, batch 1", "PAT, kernels plain, batch 1",
          "PAT, kernels triton, recompute, batch 1",
          "attention, TF32, against others", "assign, TF32, against others"]


def table(path):
    """{title: [cell, sentence]} of a page."""
    lines = [line.strip("| ").split(" | ") for line in Path(path).read_text().splitlines() if line.startswith("| ")][1:]
    return {title: told for title, *told in lines}


def quick():
    return 24.0                                               # images/s of a worker


def never(*_):
    raise AssertionError("no GPU is to be used here")


# --- the page, its order and its time -------------------------------------------------------------------------------


def test_a_dry_page_has_every_row_and_no_figure_of_a_gpu(tmp_path, monkeypatch):
    """The command itself: the machine and the loader are measured, each in its process."""
    monkeypatch.setattr(speed, "loading", quick)
    speed.main(["--everything", "--dry", "--out", str(tmp_path / "gpu.md")])
    page = (tmp_path / "gpu.md").read_text()
    assert f"`python -m studies.speed --everything --dry --out {tmp_path}/gpu.md`, {time.strftime('%Y-')}" in page
    found = table(tmp_path / "gpu.md")
    assert [*found] == TITLES
    cells = {title: told[0] for title, told in found.items()}
    assert f"; torch {torch.__version__}, triton 3." in cells.pop("this machine")
    assert cells.pop("data loading").startswith(f"24.0 images/s by one worker; workers for {STEP}: not measured; ")
    assert set(cells.values()) == {"not measured: a dry run"}


@pytest.mark.parametrize("dry", [True, False])
def test_a_dry_run_leaves_out_what_takes_a_gpu_and_nothing_else(dry, tmp_path):
    listed = [Row("chip", 50, never), Row("core", 50, never, gpu=False)]
    fill(tmp_path / "p.md", "go", listed, 1000, dry, alone=lambda *_: ("done", "-"))
    assert [cell for cell, _ in table(tmp_path / "p.md").values()] == ["not measured: a dry run" if dry else "done", "done"]


def test_the_page_is_written_again_after_each_row(tmp_path):
    """Whoever kills the command in a row's middle has those before it."""
    seen = []

    def watched(work, args, seconds):
        seen.append({title: cell for title, (cell, _) in table(tmp_path / "p.md").items()})
        return f"the cell of {args[0]}", "a sentence"

    fill(tmp_path / "p.md", "go", [Row(name, 50, never, (name,)) for name in "abc"], 1000, False, alone=watched)
    waits = "not measured: not reached"
    assert seen == [dict(a=waits, b=waits, c=waits), dict(a="the cell of a", b=waits, c=waits),
                    dict(a="the cell of a", b="the cell of b", c=waits)]
    assert table(tmp_path / "p.md")["c"] == ["the cell of c", "a sentence"]


@pytest.mark.parametrize("error, cell", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"), (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("none left"), "out of memory"), (RuntimeError("CUDA error: out of memory\nat x"), "out of memory"),
    (NotMeasured("out of time, 75 s"), "out of time, 75 s"), (ValueError("a | b\n  c"), "ValueError: a / b c"),
    (InputError("no"), "InputError: no")])
def test_a_row_that_fails_says_so_in_its_cell_and_the_next_goes_on(error, cell, tmp_path):
    def fails(work, args, seconds):
        if args:
            raise error
        return "fine", "a sentence"

    fill(tmp_path / "p.md", "go", [Row("bad", 50, never, (1,)), Row("good", 50, never)], 1000, False, alone=fails)
    assert table(tmp_path / "p.md") == {"bad": ["not measured: " + cell, "-"], "good": ["fine", "a sentence"]}


def test_a_row_whose_figures_cannot_be_said_is_no_end_either(tmp_path):
    """Nor do later rows build on it."""
    listed = [Row("bad", 50, never, say=lambda found, before: found[7]),
              Row("good", 50, never, say=lambda found, before: (", ".join(before), found))]
    listed.append(listed[1]._replace(title="better"))
    fill(tmp_path / "p.md", "go", listed, 1000, False, alone=lambda *_: "x")
    assert table(tmp_path / "p.md")["bad"][0].startswith("not measured: IndexError")
    assert table(tmp_path / "p.md")["better"] == ["good", "x"]


def test_the_budget_is_kept(tmp_path):
    """250 seconds: 100, 100 and the last 50, of which a timed row is told; then none is begun, with 10 left or fewer."""
    now, given = [1000.0], []

    def spends(work, args, seconds):
        given.append((args, seconds))
        now[0] += seconds - 5 * (seconds == 50)
        return "done", "-"

    listed = [Row("a", 100, never, (1,)), Row("b", 100, never), Row("c", 100, never, (2,), timed=True), Row("d", 100, never)]
    fill(tmp_path / "p.md", "go", listed, 250, False, clock=lambda: now[0], alone=spends)
    assert given == [((1,), 100), ((), 100), ((2, 50), 50)] and now[0] <= 1250
    assert [cell for cell, _ in table(tmp_path / "p.md").values()] == ["done"] * 3 + ["not measured: out of time"]


def test_a_real_day_keeps_its_minutes_and_its_interpreter_out(tmp_path, monkeypatch):
    """Nine minutes are 540 s less 30 to start and end; what begins natively is native."""
    called = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_day, "fill", lambda *args: called.append((*args, os.environ.get("TRITON_INTERPRET"))))
    speed.main(["--everything", "--out", "a b.md"])
    [(out, command, listed, seconds, dry, interpreted)] = called
    assert (out, command) == ("a b.md", "python -m studies.speed --everything --out 'a b.md'")
    assert [row.title for row in listed] == TITLES and (seconds, dry, interpreted) == (510, False, None)


@pytest.mark.parametrize("words, told", [
    ("--everything --out x.md", "--everything: no GPU is visible here; --dry writes the page without a GPU's figures"),
    ("--everything --dry", "--everything: --out FILE says where the page goes"),
    ("--everything --dry --out x.md --minutes 0", "--minutes 0: takes a number from 1 to 600"),
    ("--everything --dry --out x.md --minutes nan", "--minutes nan: takes a number from 1 to 600"),
    ("--everything --dry --out x.md --loader", "--loader: not together with --everything"),
    ("--everything --dry --out x.md --rounds 1", "--rounds: not together with --everything"),
    ("--dry", "--dry: only together with --everything"), ("--minutes 3", "--minutes: only together with --everything"),
    ("--everything --dry --out missing/x.md", "missing/x.md: cannot be written")])
def test_what_cannot_be_done_is_told_before_anything_is_measured(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_day, "rows", lambda *_: [])
    monkeypatch.setattr(speed, "ProcessPoolExecutor", never)
    with pytest.raises(InputError) as error:
        speed.main(words.split())
    assert str(error.value).startswith(told) and not [*tmp_path.iterdir()]


# --- a process of its own -------------------------------------------------------------------------------------------


def leaves_something():
    return os.getpid(), subprocess.Popen(["sleep", "600"]).pid


def fails():
    raise torch.OutOfMemoryError("no")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def runs(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(") ")[2][0] != "Z"


def test_a_row_has_a_process_of_its_own_and_what_it_started_ends_with_it():
    pids = alone(leaves_something, (), 300)
    end = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert os.getpid() not in pids and not any(map(runs, pids))


@pytest.mark.parametrize("work, args, seconds, told", [
    (fails, (), 300, "out of memory"), (dies, (), 120, "its process ended with status -9"),
    (time.sleep, (300,), 1, "out of time, 1 s")])
def test_a_process_that_finds_nothing_says_why(work, args, seconds, told):
    start = time.monotonic()
    with pytest.raises(NotMeasured) as error:
        alone(work, args, seconds)
    assert str(error.value) == told == reason(error.value) and time.monotonic() - start < 290


def test_a_row_does_not_outlive_a_command_that_is_killed(tmp_path):
    """No signal can be caught there: the row itself looks whether its parent is still there."""
    (tmp_path / "command.py").write_text("""
import os, time
from pathlib import Path
from studies.gpu_day import alone

def waits():
    Path("part").write_text(str(os.getpid()))
    os.rename("part", "pid")
    time.sleep(300)

if __name__ == "__main__":
    alone(waits, (), 300)
""")
    command = subprocess.Popen([sys.executable, "command.py"], cwd=tmp_path)
    try:
        end = time.monotonic() + 300
        while not (tmp_path / "pid").exists() and time.monotonic() < end:
            time.sleep(0.1)
        row = int((tmp_path / "pid").read_text())
        assert runs(row)
    finally:
        command.kill()
        command.wait()
    end = time.monotonic() + 10
    while runs(row) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs(row)


# --- what the rows say ----------------------------------------------------------------------------------------------


def test_the_days_of_the_papers_steps_by_hand():
    """0.72 s a step: 86,400 s.  Of four images, three such rounds a step; of one, twelve."""
    assert days(0.72) == pytest.approx(1) and days(1) == pytest.approx(120_000 / 86_400)
    said = {row.title: row.say((0.72, 10.5, 0.8, {}), {}) for row in rows(speed.measure, speed.titled, quick) if row.work is speed.measure}
    assert said["SAN, batch 12"] == ("0.720 s, 16.7 images/s, peak 10.50 GiB", "120,000 steps take 1 days")
    assert said["SAN, batch 4"] == ("0.720 s, 5.6 images/s, peak 10.50 GiB", "120,000 steps, 3 x 4 images each, take 3 days")
    assert said["SAN, batch 1"][1] == "120,000 steps, 12 x 1 images each, take 12 days"


def test_how_many_workers_feed_a_gpu_by_hand():
    """12 images in 0.1 s are 120 a second: five workers of 25 or 29, four of 30; 1,440,000 images / 30 are 48,000 s."""
    say = next(row.say for row in rows(speed.measure, speed.titled, quick) if row.title == "data loading")
    for rate, workers in ((25, 5), (29, 5), (30, 4)):
        cell, sentence = say(rate, {STEP: (0.1, 10.0)})
        assert f"workers for {STEP}: {workers}, for 120.0 images/s; {os.cpu_count()} cores here" in cell
    assert sentence == "one worker draws the images of 120,000 steps in 0.556 days"
    assert "batch 12: not measured; " in say(30, {})[0]


def test_a_step_is_measured_by_the_command_that_measures_steps():
    """Every row's arguments fit, and one of them, small, comes out of its process as a row can say it."""
    listed = [row for row in rows(speed.measure, speed.titled, quick) if row.work is speed.measure]
    bound = [inspect.signature(speed.measure).bind(*row.args).arguments for row in listed]
    kinds = (("pat", {"kernels": "triton"}), ("san", {}), ("pat", {"kernels": "plain"}),
             ("pat", {"kernels": "triton", "recompute": True}))
    assert [(b["model_name"], b["chosen"], b["batch"]) for b in bound] == [
        (*model, batch) for batch in (12, 4, 1) for model in kinds]
    assert all((b["preset"], b["training"], b["device"]) == ("coco", True, "cuda") for b in bound) and STEP in TITLES
    cell, sentence = listed[1].say(alone(speed.measure, ("world", "san", {}, True, 1, 1, "cpu"), 300), {})
    assert " images/s, peak " in cell and sentence.startswith("120,000 steps take ")


def test_the_kernel_tests_are_counted_and_those_that_fail_named(tmp_path):
    """By pytest itself; a parameter may hold blanks, colons and bars."""
    file = tmp_path / "test_three.py"
    file.write_text("import pytest\n\n\n@pytest.mark.parametrize('x', ['fine', 'a row: b | c'])\ndef test_it(x):\n"
                    "    assert x == 'fine'\n\n\ndef test_skipped():\n    pytest.skip('no')\n")
    assert kernel_tests(str(file)) == ("1 passed, 1 failed, 1 skipped: test_it[a row: b | c]",
                                       "the 120,000 steps need `--kernels plain` until these pass")


@pytest.mark.parametrize("status, printed, cell, sentence", [
    (0, "....\n4 passed, 2 skipped in 9.1s\n", "4 passed, 0 failed, 2 skipped", "the 120,000 steps may run on the kernels: here"),
    (1, "ERROR tests/a.py\n!!! stopping\n1 error in 2.0s\n", "0 passed, 0 failed, 1 error: tests/a.py", "the 120,000 steps need")])
def test_what_pytest_said_is_read_by_its_status(status, printed, cell, sentence, monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda words, **how: ran.append((words, how["cwd"])) or subprocess.CompletedProcess(
        words, status, printed, ""))
    found = kernel_tests()
    assert found[0] == cell and found[1].startswith(sentence)
    assert ran == [([sys.executable, "-m", "pytest", "tests/kernels", "-q"], Path(gpu_day.__file__).parent.parent)]


def test_a_pytest_that_is_not_there_is_no_row_of_passed_tests(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 1, "", "a\nNo module pytest"))
    with pytest.raises(RuntimeError, match="No module pytest"):
        kernel_tests()


@pytest.fixture
def precision():
    yield
    torch.set_float32_matmul_precision("highest")


def test_the_errors_and_the_repeats_of_both_kernels_are_told(monkeypatch, precision):
    """Interpreted here, and small; the numbers are kernels/bench.py's."""
    cell, sentence = right(torch.float32)
    assert torch.get_float32_matmul_precision() == "high"     # TF32, on a GPU
    for what in ("features' gradient, relative error", "codebook gradient, relative error", "attention, relative error",
                 "gradient of q, relative error", "gradient of k, relative error", "gradient of v, relative error"):
        assert f"{what} " in cell
    for what in ("assign", "attention"):
        for way in ("forward", "backward"):
            assert f"{what} {way}, {bench.REPEATS} repeats, bitwise equal True" in cell
    assert sentence == "run again, the 120,000 steps get the same bits from the kernels"
    monkeypatch.setattr(bench, "correctness", lambda *_: [("triton bfloat16: attention forward, 9 repeats", False, "True")])
    assert right(torch.bfloat16) == ("attention forward, 9 repeats False",
                                     "run again, the 120,000 steps get OTHER bits from the kernels")


def test_an_operation_is_held_against_the_others_as_far_as_the_time_goes(monkeypatch, precision):
    """Two are measured, one is not installed; with no time for any, each says so."""
    tuned = []
    monkeypatch.setattr(bench, "tune", lambda *args: tuned.append(args) or ("key", dict(forward=(64, 32, 4))))
    monkeypatch.setitem(gpu_day.SIZES, "assign", (50, 9))
    makers, absent = bench.contenders("assign", True), ModuleNotFoundError("No module named 'x'")

    def missing(K, device):
        raise absent

    shown = {"ours": makers["ours"], "literal eager": makers["literal eager"], "library": missing}
    monkeypatch.setattr(bench, "contenders", lambda operation, backward: shown)
    cell, sentence = versus("assign", torch.float32, 90)
    tiles, both, forward = cell.split("; ")
    assert tiles == "tiles forward (64, 32, 4)" and tuned == [("assign", torch.float32, 20)]
    for told, way in ((both, "forward + backward: "), (forward, "forward: ")):
        ours, literal, library = told.removeprefix(way).split(", ")
        assert ours.startswith("ours ") and literal.startswith("literal eager ") and ours.endswith(" ms") and told.startswith(way)
        assert library == "library not measured: ModuleNotFoundError: No module named 'x'"
    assert sentence.startswith("days for one call, with gradients, in each of 120,000 steps: ") and sentence.count(" by ") == 2
    cell, sentence = versus("assign", torch.float32, 20)
    assert cell.count("not measured: out of time") == 6 and sentence.endswith("steps: not measured")
