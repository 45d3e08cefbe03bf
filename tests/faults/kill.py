"""Kill a training again and again, at random moments, and see what is lost.

    python -m tests.faults.kill --kills 50         PAT in the world, tiny; about two minutes for ten on two quiet cores
    python -m tests.faults.kill --kills 2 --processes 2      torchrun --max-restarts: a worker is killed, torchrun starts all again

A run that nobody disturbs, and one that is sent SIGKILL --kills times and each time started again by the same command
(`--resume auto`).  After every kill the newest checkpoint must be whole; at the end all tensors and all lines of the log
but their times must be equal.  Kills fall at any moment; of those that hit a checkpoint being written the count is told.
"""

import argparse
import json
import os
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
QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def command(model, steps, out, torchrun=()):
    """The command of a tiny training that saves after every step, and goes on where it was."""
    numbers = {**TINY, **TINY_OF[model], "save_every": 1, "steps": steps, "val_images": 1}
    words = [f"--set={name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in numbers.items()
             if name != "pretrained"]
    program = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return [sys.executable, *program, ROOT / "train.py", "--model", model, "--pretrained", "none", "--resume", "auto", "--out", str(out), *words]


def step_of(run):
    """Of the newest checkpoint; 0 before there is one."""
    return int(read_checkpoint(run)[1]["step"]) if (run / CHECKPOINTS[0]).exists() else 0


def killed_again_and_again(model, steps, kills, out, seed=0):
    """-> dict: kills sent, how many while a file was being written, starts it took."""
    rng, sent, writing, starts = random.Random(seed), 0, 0, 0
    while not (out / "scores.json").exists():
        run = subprocess.Popen(command(model, steps, out), **QUIET)
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


def children(pid):
    """Of a process, whichever of its threads started them; none where it has ended."""
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def workers_killed(model, steps, kills, out, processes, seed=0):
    """The same of one torchrun, told to start all workers again when one dies: SIGKILL to any of them, --kills times."""
    rng, sent = random.Random(seed), 0
    agent = subprocess.Popen(command(model, steps, out, (f"--nproc_per_node={processes}", f"--max-restarts={kills}")), **QUIET)
    while sent < kills and agent.poll() is None:
        before = step_of(out)
        while agent.poll() is None and step_of(out) < before + 3:                             # it got somewhere this time
            time.sleep(0.02)
        if workers := children(agent.pid):
            os.kill(rng.choice(workers), signal.SIGKILL)
            sent += 1
    if agent.wait():
        raise InputError(f"{out}: torchrun ended with status {agent.returncode}")
    return dict(kills=sent, writing=0, starts=1 + sent)


def equal(a, b):
    """(how many tensors are equal, how many there are, whether the logs are equal but for their times) of two runs."""
    (x, _), (y, _) = read_checkpoint(a), read_checkpoint(b)
    lines = [[{**json.loads(line), "ms_per_step": 0} for line in (run / "log.jsonl").read_text().splitlines()] for run in (a, b)]
    return sum(torch.equal(x[name], y[name]) for name in x.keys() & y.keys()), len(x.keys() | y.keys()), lines[0] == lines[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=10, metavar="N")
    parser.add_argument("--model", default="pat", choices=tuple(TINY_OF))
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="2 or 4: under torchrun, which starts killed workers again")
    args = parse_flags(parser, argv)
    if args.kills < 1 or args.processes not in (1, 2, 4):
        raise InputError("--kills takes at least 1, and --processes 1, 2 or 4")
    with TemporaryDirectory() as place:
        whole, killed = Path(place, "whole"), Path(place, "killed")
        if args.processes == 1:
            steps, torchrun = 3 * args.kills + 2, ()
        else:
            steps, torchrun = 5 * args.kills + 5, (f"--nproc_per_node={args.processes}",)
        subprocess.run(command(args.model, steps, whole, torchrun), check=True, **QUIET)
        if args.processes == 1:
            told = killed_again_and_again(args.model, steps, args.kills, killed)
        else:
            told = workers_killed(args.model, steps, args.kills, killed, args.processes)
        same, all_, logs = equal(whole, killed)
    print(f"{args.model}, {steps} steps, {args.processes} process(es): {told['kills']} kills sent, {told['writing']} while a checkpoint was being written, "
          f"{told['starts']} starts; every checkpoint met was whole; {same} of {all_} tensors equal, logs {'equal' if logs else 'DIFFER'}")
    if same != all_ or not logs:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
