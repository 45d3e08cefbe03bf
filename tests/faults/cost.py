"""What it costs to look: each check of a step, and each part of a save, beside the step.

    python -m tests.faults.cost [--preset coco]     the world's PAT, or the paper's sizes with random weights

Medians of process time on one thread, so that what else the machine does hardly counts; fsync is the disk's, by the clock.
The step of the world is measured here; the paper's would take minutes on a CPU, and its time on a GPU is not measured.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import default_collate

from cli import parse_flags, run_cli
from published.images_of import training_set
from runs import CHECKPOINTS, build, digest, read_checkpoint, save_checkpoint
from san import trainable
from train import Stream, gradients, parameter_groups, recipe


def median(work, n, clock=time.process_time):
    """Milliseconds."""
    took = []
    for _ in range(n):
        began = clock()
        work()
        took.append(1000 * (clock() - began))
    return statistics.median(took)


def step_of(config, model, optimizers):
    """One training step of the world, without checks but those of `gradients`."""
    dataset, text = training_set(config.run), model.vlm.embed_text(training_set(config.run).train_names)
    batch = default_collate([Stream(dataset, config, 0, 0, 1)[j] for j in range(config.recipe.batch)])

    def step():
        gradients(model, text, [batch], config)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.recipe.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
    return step


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=("world", "coco"), default="world")
    args = parse_flags(parser, argv)
    torch.set_num_threads(1)
    config = recipe(args.preset, **({} if args.preset == "world" else dict(pretrained="none")))
    model = build(config.run).train()
    optimizers = model.optimizers(parameter_groups(model, config.recipe), config.recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.preset == "world":
        print(f"a step                                  {median(step_of(config, model, optimizers), 5):10.2f} ms")
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()                                      # its moments are there from the first step on
    terms, norm = [torch.rand(()) for _ in range(20)], torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    each = {"a step: 20 loss terms are finite": (lambda: all(torch.isfinite(term) for term in terms), 200),
            "a step: the gradient's norm is finite": (lambda: bool(norm.isfinite()), 200),
            "a save: every trained number is finite": (lambda: all(p.isfinite().all() for p in parameters), 5)}
    for what, (work, n) in each.items():
        print(f"{what:40}{median(work, n):10.3f} ms")
    with TemporaryDirectory(dir=".") as run:
        whole = median(lambda: save_checkpoint(Path(run), model, optimizers, 1), 3)
        tensors, told = read_checkpoint(run)
        print(f"{'a save: checksum':40}{median(lambda: digest(tensors, told), 3):10.1f} ms\n{'a save: all of it but the disk':40}{whole:10.1f} ms")
        with open(Path(run, "plain"), "wb") as file:
            file.write(Path(run, CHECKPOINTS[0]).read_bytes())
            print(f"{'a save: fsync':40}{median(lambda: os.fsync(file.fileno()), 1, time.perf_counter):10.1f} ms")
        size = Path(run, CHECKPOINTS[0]).stat().st_size
    print(f"{trainable(model):,} trained numbers; a checkpoint of {size:,} bytes; {4 * trainable(model):,} bytes all-reduced a step")


if __name__ == "__main__":
    run_cli(main)
