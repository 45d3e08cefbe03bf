"""The GPU day: all that this project wants to know of a GPU, by one command that knows how long it has.

    python -m studies.speed --everything --out docs/gpu.md                on a GPU: nine minutes, nothing is downloaded
    python -m studies.speed --everything --out docs/gpu.md --minutes 20   where the last rows were out of time
    python -m studies.speed --everything --out page.md --dry              anywhere: every row, but no figure of a GPU

The page is one table, a row a question: what was measured, and a sentence on the paper's 120,000 steps of 12 images.

    days = 120,000 * seconds a step / 86,400;   of a smaller batch, 12 / batch of its steps make one

The rows are in order of importance.  Each runs in a process of its own, which is ended, with all that it started, when
its time is over; the page is written again after each, so a command that is killed leaves what it has.  A row that
fails, finds no memory or no time says so ("not measured: out of memory"), and the next one goes on.

# ours: all of it.

Tests: tests/studies/test_gpu_day.py.  What calls it and measures a step: speed.py; the kernels: kernels/bench.py.
"""

import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from cli import InputError, write_files
from kernels import bench
from published.perceptual import vgg_path

STEPS, BATCH = 120_000, 12             # the paper's
ROUNDS = 5
MARGIN, LEAST = 30, 10                 # seconds: to start and end the command; with fewer left no row is begun
STEP = "PAT, kernels triton, batch 12"    # what the loader has to feed
SIZES = {"attention": (BATCH, bench.HEADS, 128, 1600, bench.HEAD), "assign": (BATCH * 25600, 128)}


class NotMeasured(Exception):
    """Why a row has no figure, in words."""


class Row(NamedTuple):
    title: str
    seconds: float                     # the most it may take
    work: Callable                     # in a process of its own
    args: tuple = ()
    say: Callable = lambda found, before: found    # (what it found, {title: what earlier rows did}) -> (cell, sentence)
    gpu: bool = True                   # a dry run leaves it out
    timed: bool = False                # work is told its seconds too, last


def days(seconds):
    """What the paper's steps take, of so many seconds each."""
    return STEPS * seconds / 86_400


def reason(error):
    """What follows "not measured: ", in one line that a table can hold."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in text.lower():
        return "out of memory"
    return (text if isinstance(error, NotMeasured) else f"{type(error).__name__}: {text}")[:200]


# --- a process of its own -------------------------------------------------------------------------------------------


def child(pipe, work, args):
    """Send (what work(*args) found, None), or (None, why it found nothing)."""
    os.setsid()                                               # a group, to be ended together with what it starts
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os.killpg(0, signal.SIGKILL)), daemon=True).start()
    try:
        pipe.send((work(*args), None))
    except BaseException as error:
        traceback.print_exc()
        pipe.send((None, reason(error)))


def alone(work, args, seconds):
    """What work(*args) finds in a fresh process.  Raises NotMeasured if it fails, or takes longer than `seconds`."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=child, args=(there, work, args))
    process.start()
    there.close()                                             # so that the process's end is the pipe's
    try:
        if not here.poll(seconds):
            raise NotMeasured(f"out of time, {seconds:.0f} s")
        found, why = here.recv()
    except EOFError:
        process.join(5)
        found, why = None, f"its process ended with status {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(5)
    if why:
        raise NotMeasured(why)
    return found


# --- the rows -------------------------------------------------------------------------------------------------------


def machine():
    """Chip, versions, driver."""
    versions = f"torch {torch.__version__}, triton {__import__('triton').__version__}"
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads; {versions}; no driver", "nothing: there is no GPU here"
    chip = torch.cuda.get_device_properties(0)
    told = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    driver = re.search(r"\d+\.[\d.]+", told)
    return (f"{chip.name}, {chip.total_memory / 2**30:.0f} GiB, sm_{chip.major}{chip.minor}; {versions}; driver "
            f"{driver[0] if driver else 'unknown'}", "the days below are this chip's")


def kernel_tests(tests="tests/kernels"):
    done = subprocess.run([sys.executable, "-m", "pytest", tests, "-q"], cwd=Path(__file__).parent.parent,
                          capture_output=True, text=True)
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if not counts:
        raise RuntimeError(last)
    cell = ", ".join(f"{n} {what}" for what, n in ({"passed": 0, "failed": 0} | counts).items())
    if not done.returncode:
        return cell, "the 120,000 steps may run on the kernels: here they compute what the plain functions do"
    names = re.findall(r"^(?:FAILED|ERROR) (?:.*?::)?(.*?)(?: - .*)?$", done.stdout, re.M)
    return f"{cell}: {', '.join(names[:5])}", "the 120,000 steps need `--kernels plain` until these pass"


def right(dtype):
    """The Triton kernels at the paper's sizes against float64, and their bits from call to call; fp32 in TF32."""
    torch.set_float32_matmul_precision("high")
    label = f"triton {str(dtype).removeprefix('torch.')}: "
    found = {what.replace(label, ""): figure for what, figure, _ in bench.correctness(["triton"], [dtype])}
    steady = all(figure for what, figure in found.items() if "repeats" in what)
    shown = {what: figure if isinstance(figure, bool) else f"{figure:.1e}" for what, figure in found.items()}
    return (", ".join(f"{what} {figure}" for what, figure in shown.items()),
            f"run again, the 120,000 steps get {'the same' if steady else 'OTHER'} bits from the kernels")


def versus(operation, dtype, seconds):
    """An operation at SIZES, its tiles tuned, against what else computes it, as far as the time goes; fp32 in TF32.

    30 of its seconds are for the process's start and for what is at work at the end; a third of the rest is the tiles'.
    """
    torch.set_float32_matmul_precision("high")
    end = time.monotonic() + seconds - 30
    tiles = bench.tune(operation, dtype, (seconds - 30) / 3)[1]
    cells, shares = [f"tiles {', '.join(f'{kernel} {tile}' for kernel, tile in tiles.items())}"], []
    for backward in (True, False):
        told = []
        for name in bench.contenders(operation, backward):
            try:
                if time.monotonic() > end:
                    raise NotMeasured("out of time")
                took = bench.measure(operation, SIZES[operation], dtype, backward, name, 20)["seconds"]
            except Exception as error:                        # the library is not installed, no compiler is, ...
                told.append(f"{name} not measured: {reason(error)}")
                continue
            told.append(f"{name} {1000 * took:.3f} ms")
            shares += [f"{days(took):.2g} by {name}"] * backward
        cells.append(f"forward{' + backward' * backward}: {', '.join(told)}")
    shares = ", ".join(shares) or "not measured"
    return "; ".join(cells), f"days for one call, with gradients, in each of 120,000 steps: {shares}"


def say_step(batch, found, before):
    seconds, peak = found[:2]
    each = f", {BATCH // batch} x {batch} images each," if batch < BATCH else ""
    return (f"{seconds:.3f} s, {batch / seconds:.1f} images/s, peak {peak:.2f} GiB",
            f"120,000 steps{each} take {days(seconds * BATCH / batch):.3g} days")


def say_loading(rate, before):
    need = "not measured"
    if STEP in before:
        wanted = BATCH / before[STEP][0]
        need = f"{math.ceil(wanted / rate)}, for {wanted:.1f} images/s"
    return (f"{rate:.1f} images/s by one worker; workers for {STEP}: {need}; {os.cpu_count()} cores here",
            f"one worker draws the images of 120,000 steps in {days(BATCH / rate):.3g} days")


def rows(measure, titled, loading):
    """The most important first.  measure, titled, loading: studies.speed's."""
    def steps(batch):
        rows = (("pat", {"kernels": "triton"}), ("san", {}), ("pat", {"kernels": "plain"}),
                ("pat", {"kernels": "triton", "recompute": True}))
        return [Row(f"{titled(name, chosen)}, batch {batch}", 75, measure, ("coco", name, chosen, True, batch, ROUNDS, "cuda"),
                    partial(say_step, batch)) for name, chosen in rows]

    def compared(dtype, word):
        return [Row(f"{operation}, {word}, against others", 100, versus, (operation, dtype), timed=True)
                for operation in SIZES]

    return [Row("this machine", 60, machine, gpu=False), Row("pytest tests/kernels", 180, kernel_tests), *steps(12),
            Row("kernels, bf16, against float64", 60, right, (torch.bfloat16,)),
            Row("kernels, TF32, against float64", 60, right, (torch.float32,)), *compared(torch.bfloat16, "bf16"),
            Row("data loading", 60, loading, say=say_loading, gpu=False),
            *steps(4), *steps(1), *compared(torch.float32, "TF32")]


# --- the page -------------------------------------------------------------------------------------------------------


def page(command, cells):
    """Markdown of {title: (cell, sentence)}."""
    lines = [[text.replace("|", "/") for text in (title, *told)] for title, told in cells.items()]
    return f"""# On a GPU

`{command}`, {time.strftime('%Y-%m-%d')}.

PAT and SAN: a training step at 640x640, ViT-B/16 with random weights, bf16, the images drawn before, {
    'with' if vgg_path().is_file() else 'without'} LPIPS; median of {ROUNDS} after one. Kernels against others: {BATCH}
images (assign: the early stage), medians. Loading: made-up 640x480 JPEGs, 640x640 crops. How: studies/gpu_day.py.

| | measured | for 120,000 steps of 12 images |
|---|---|---|
""" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fill(out, command, listed, seconds, dry, clock=time.monotonic, alone=alone):
    """Measure the rows one by one, as far as `seconds` go, and leave the page at `out` after each."""
    start, found, cells = clock(), {}, {row.title: ("not measured: not reached", "-") for row in listed}
    write_files({out: page(command, cells)})                  # a place that cannot be written is told now
    for row in listed:
        share = min(row.seconds, seconds - (clock() - start))
        try:
            if dry and row.gpu:
                raise NotMeasured("a dry run")
            if share < LEAST:
                raise NotMeasured("out of time")
            result = alone(row.work, (*row.args, share) if row.timed else row.args, share)
            cells[row.title], found[row.title] = row.say(result, found), result
        except Exception as error:
            cells[row.title] = f"not measured: {reason(error)}", "-"
        write_files({out: page(command, cells)})
        print(f"{clock() - start:4.0f} s  {row.title}: {cells[row.title][0]}", flush=True)


def everything(measure, titled, loading, out, minutes, dry, words):
    """The command that was typed as `words`.  Raises InputError without a GPU, unless it is a dry run."""
    if not dry and not torch.cuda.is_available():
        raise InputError("--everything: no GPU is visible here; --dry writes the page without a GPU's figures")
    if not dry:
        os.environ.pop("TRITON_INTERPRET", None)              # natively, in every process from here on
    fill(out, f"python -m studies.speed {shlex.join(words)}", rows(measure, titled, loading), 60 * minutes - MARGIN, dry)
