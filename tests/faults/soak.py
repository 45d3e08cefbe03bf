"""A long life on a short clock: does memory or the number of open files grow?

    python -m tests.faults.soak --minutes 10 --out soak.png

Two programs in turn, half of the time each, watched from outside once a second, their children included:

    training       train.py, tiny, that saves after every step; at the end it is sent SIGTERM and has to end with 143
    answering      one process that gets photos of any size and other words each time: segment, encode to a file, decode

Growth is the median of the last fifth of the samples less the median of the fifth after the first (the start is not
steady yet).  Over LEAK MiB, or over three files more: status 1.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cli import InputError, parse_flags, run_cli, write_files
from data import rng_for
from predict import check_picture, segment_photo
from runs import build
from studies.pictures import Figure, plot
from tests.faults.kill import QUIET, children, command
from tests.helpers import tiny
from tokenizer import Tokenizer, decode_file, encode_files

LEAK = 48                              # MiB; malloc's own arenas come and go by some ten
ROOT = Path(__file__).parents[2]


def family(pid):
    """A process and its children, theirs included."""
    return [pid, *(one for child in children(pid) for one in family(child))]


def sample(pid):
    """(MiB resident, files open) of a process and its children; a child that ends meanwhile counts nothing."""
    memory = files = 0
    for one in family(pid):
        try:
            said = Path(f"/proc/{one}/status").read_text()
            memory += int(re.search(r"VmRSS:\s+(\d+)", said)[1]) / 1024
            files += len(os.listdir(f"/proc/{one}/fd"))
        except (OSError, TypeError):
            continue
    return memory, files


def watched(process, seconds, every=1.0):
    """[(seconds, MiB, files)] of a running process.  Raises InputError if it ends by itself before the time is over."""
    began, samples = time.monotonic(), []
    while (now := time.monotonic() - began) < seconds:
        if process.poll() is not None:
            raise InputError(f"it ended after {now:.0f} of {seconds:.0f} seconds with status {process.returncode}")
        samples.append((now, *sample(process.pid)))
        time.sleep(every)
    return samples


def growth(samples):
    """(MiB, files) of [(seconds, MiB, files)]: medians, the last fifth less the second."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth:2 * fifth], samples[-fifth:]
    return tuple(statistics.median(s[k] for s in late) - statistics.median(s[k] for s in early) for k in (1, 2))


def answer(photos=10**9):
    """Photos of random sizes, random words, one after the other, in a folder that goes away.  -> how many kinds of words it keeps"""
    model = build(tiny("pat").run).eval()
    tokenizer = Tokenizer.of(model, latent=True)
    with TemporaryDirectory() as place:
        photo, tokens = Path(place, "photo.png"), Path(place, "photo.npz")
        for n in range(photos):
            rng = rng_for(0, n)
            size, names = rng.integers(8, 160, 2), [f"thing {k}" for k in rng.integers(0, 10**6, rng.integers(1, 9))]
            picture = rng.integers(0, 256, (*size, 3), np.uint8)
            segment_photo(model, picture, list(dict.fromkeys(names)))
            write_files({photo: picture})
            encode_files([photo], tokens, tokenizer)
            decode_file(tokens, Path(place, "back"), tokenizer)
            Path(place, "back", "photo.png").unlink()
    return len(model.vlm.cache)


def draw(curves):
    """{program: samples} -> PIL image: memory and files, a panel each."""
    figure = Figure(860, 300)
    for k, (title, x) in enumerate((("memory, MiB, over seconds", 60), ("open files, over seconds", 480))):
        lines = {name: [(s[0], s[1 + k]) for s in samples] for name, samples in curves.items()}
        plot(figure, (x, 50, x + 270, 250), title, lines, steps=max(s[0] for samples in curves.values() for s in samples))
    return figure.image()


def soak(seconds):
    """{program: samples}, half of `seconds` each.  Raises InputError where training does not end as SIGTERM promises."""
    with TemporaryDirectory() as place:
        training = subprocess.Popen(command("pat", 10**8, Path(place, "run")), **QUIET)
        curves = {"training": watched(training, seconds / 2)}
        training.send_signal(signal.SIGTERM)
        if training.wait(60) != 143:
            raise InputError(f"training ended with status {training.returncode} on SIGTERM, not 143")
    answering = subprocess.Popen([sys.executable, "-c", "from tests.faults.soak import answer; answer()"], cwd=ROOT, **QUIET)
    try:
        curves["answering"] = watched(answering, seconds / 2)
    finally:
        answering.kill()
    return curves


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N")
    parser.add_argument("--out", default="soak.png", metavar="FILE", help="the curves")
    args = parse_flags(parser, argv)
    if not 0.5 <= args.minutes <= 10**5:
        raise InputError(f"--minutes {args.minutes:g}: from 0.5 to 100,000; the start alone takes some ten seconds")
    check_picture(args.out)
    curves, grown = soak(60 * args.minutes), False
    for name, samples in curves.items():
        memory, files = growth(samples)
        grown |= memory > LEAK or files > 3
        first, last = (statistics.median(s[1] for s in part) for part in (samples[len(samples) // 5:][:5], samples[-5:]))
        print(f"{name:9}  {len(samples)} samples: {first:.0f} MiB first, {last:.0f} last, growth {memory:+.1f} MiB, {files:+.0f} files")
    write_files({args.out: draw(curves)})
    print(f"written: {args.out}")
    if grown:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
