"""Kill a training again and again, at random moments, and see what is lost.

    python -m tests.faults.kill --kills 50         PAT in the world, tiny; about a minute for ten on two quiet cores

A run that nobody disturbs, and one that is sent SIGKILL --kills times and each time started again by the same command
(`--resume auto`).  After every kill the newest checkpoint must be whole; at the end all tensors and all lines of the log
but their times must be equal.  Kills fall at any moment; of those that hit a checkpoint being written the count is told.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cli import InputError, parse_flags, run_cli
from runs import CHECKPOINTS, read_checkpoint
from tests.helpers import TINY, TINY_OF

ROOT = Path(__file__).parents[2]


def command(model, steps, out):
    """The command of a tiny training that saves after every step."""
    numbers = {**TINY, **TINY_OF[model], "save_every": 1, "steps": steps, "val_images": 1}
    words = [f"--set={name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in numbers.items()
             if name != "pretrained"]
    return [sys.executable, ROOT / "train.py", "--model", model, "--pretrained", "none", "--resume", "auto", "--out", str(out), *words]


def step_of(run):
    """Of the newest checkpoint; 0 before there is one."""
    return int(read_checkpoint(run)[1]["step"]) if (run / CHECKPOINTS[0]).exists() else 0


def killed_again_and_again(model, steps, kills, out, seed=0):
    """-> dict: kills sent, how many while a file was being written, starts it took."""
    rng, sent, writing, starts = random.Random(seed), 0, 0, 0
    while not (out / "scores.json").exists():
        run = subprocess.Popen(command(model, steps, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        starts += 1
        if sent < kills:
            before = step_of(out)
            while run.poll() is None and step_of(out) < before + 1:                           # it got somewhere this time
                time.sleep(0.02)
            time.sleep(rng.random() * 0.3)
            if run.poll() is None:
                run.send_signal(signal.SIGKILL)
                sent += 1
            run.wait()
            writing += any(out.glob(".checkpoint*"))
            step_of(out)                                      # whole, or this raises
        elif run.wait():
            raise InputError(f"{out}: ended with status {run.returncode}")
    return dict(kills=sent, writing=writing, starts=starts)


def equal(a, b):
    """(how many tensors are equal, how many there are, whether the logs are equal but for their times) of two runs."""
    (x, _), (y, _) = read_checkpoint(a), read_checkpoint(b)
    lines = [[{**json.loads(line), "ms_per_step": 0} for line in (run / "log.jsonl").read_text().splitlines()] for run in (a, b)]
    return sum(torch.equal(x[name], y[name]) for name in x.keys() & y.keys()), len(x.keys() | y.keys()), lines[0] == lines[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=10, metavar="N")
    parser.add_argument("--model", default="pat", choices=tuple(TINY_OF))
    args = parse_flags(parser, argv)
    if args.kills < 1:
        raise InputError(f"--kills {args.kills}: at least 1")
    with TemporaryDirectory() as place:
        whole, killed = Path(place, "whole"), Path(place, "killed")
        steps = 3 * args.kills + 2
        subprocess.run(command(args.model, steps, whole), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        told = killed_again_and_again(args.model, steps, args.kills, killed)
        same, all_, logs = equal(whole, killed)
    print(f"{args.model}, {steps} steps: {told['kills']} kills sent, {told['writing']} while a checkpoint was being written, "
          f"{told['starts']} starts; every checkpoint met was whole; {same} of {all_} tensors equal, logs {'equal' if logs else 'DIFFER'}")
    if same != all_ or not logs:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
