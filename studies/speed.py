"""How fast, how large, and where the time goes; every figure of docs/speed.md comes from here.

    python -m studies.speed                 the world: images/s of PAT and SAN, training and inference, time per part
    python -m studies.speed --preset coco   one 640x640 image, one training step and one inference of each, random CLIP
    python -m studies.speed --preset coco-eva
    python -m studies.speed --preset coco --device cuda    batch 12 in training, 1 in inference, bf16; PAT twice: by
                                            Triton, and by the plain functions
    python -m studies.speed --preset coco --memory         training steps of 1, 2 and 4 images, PAT with and without
                                            `recompute`: their peaks
    python -m studies.speed --loader        images/s of one data-loading process, 640x480 JPEGs; share of time per part
    python -m studies.speed --loader --data DIR    the same of COCO-Stuff's training images, or of a folder of yours
    python -m studies.speed --everything --out docs/gpu.md    on a GPU: all that there is to measure, as one page, in
                                            nine minutes or --minutes N; see gpu_day.py

Each row runs in a process of its own, so that its peak memory is its own; its first round is not counted, the median of
the others is.  Peak memory is the process's, on a GPU what torch held there.  A training round is forward, losses,
backward and the recipe's own optimisers, without drawing the images.  Ratios within one call are comparable; absolute
times depend on the machine and on what else it does.

What a part is says the model (Segmenter.parts).  Time within a part counts once, for the part that was entered first.

# ours: all of it.

Tests: tests/studies/test_speed.py.  Read next: gpu_day.py.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from cli import InputError, check_device, parse_flags, run_cli
from data import rng_for
from published import augment, folder
from published.images_of import training_set
from published.perceptual import vgg_path
from runs import build, changed, model_class
from studies import gpu_day
from train import Stream, gradients, parameter_groups, recipe
from world.scenes import World

RUNNING = []                           # the part that is being timed, if any


def now():
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, name, spent):
    """`function`, adding its seconds to spent[name]; within another timed function they are that one's."""
    def run(*args, **kwargs):
        if RUNNING:
            return function(*args, **kwargs)
        RUNNING.append(name)
        start = now()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += now() - start
            RUNNING.pop()
    return run


def watch(model, spent):
    """Make the parts of a model report their forward time.

    All modules within a part are timed, for a model may call them without the part's own forward.
    """
    model.vlm.features = timed(model.vlm.features, "CLIP features", spent)
    model.vlm.recognise = timed(model.vlm.recognise, "recognition", spent)
    for name, parts in model.parts().items():
        for module in (module for part in parts for module in part.modules()):
            module.forward = timed(module.forward, name, spent)


def samples(config, n):
    """A training micro-batch of n images at the preset's size: the world's scenes, else noise with two dozen labels."""
    if config.run.preset == "world":
        drawn = [World("train").draw(0, i) for i in range(n)]
    else:
        side, gen = config.run.net.clip.short_side, torch.Generator().manual_seed(0)
        blocks = torch.randint(0, 24, (n, 5, 5), generator=gen).float()
        labels = F.interpolate(blocks[:, None], size=(side, side))[:, 0].long()
        drawn = [(torch.randn(3, side, side, generator=gen), label) for label in labels]
    return torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn]), torch.arange(n)


def titled(model_name, chosen):
    """What a row is called: ("pat", {"kernels": "triton", "recompute": True}) -> "PAT, kernels triton, recompute"."""
    return ", ".join([model_class(model_name).__name__, *(name if value is True else f"{name} {value}"
                                                          for name, value in chosen.items())])


def measure(preset, model_name, chosen, training, batch, rounds, device):
    """(median seconds a round, peak GiB, mean seconds a round, and each part's of those); run in a fresh process.

    chosen: what is not the preset's, {"kernels": "plain"}.
    """
    config = recipe(preset, model_name, pretrained="none", batch=batch, **chosen)
    if getattr(config.run.net, "perceptual", False) and not vgg_path().is_file():
        config = changed(config, perceptual=False)            # the first line of the table says so
    torch.manual_seed(0)
    model = build(config.run).to(device).train(training)
    names = len(World.train_names) if preset == "world" else 171
    text = F.normalize(torch.randn(names, model.vlm.text_width), dim=-1).to(device)
    optimizers = model.optimizers(parameter_groups(model, config.recipe), changed(config.recipe, lr=1e-6))
    micro, seconds, spent = samples(config, batch), [], defaultdict(float)
    image = micro[0].to(device)
    for k in range(rounds + 1):
        if k == 1:
            watch(model, spent)
        start = now()
        if training:
            model.zero_grad(set_to_none=True)
            gradients(model, text, [micro], config)
            for optimizer in optimizers:
                optimizer.step()
        else:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                model(image, text)
        seconds.append(now() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    seconds = seconds[1:]
    return statistics.median(seconds), peak, statistics.mean(seconds), {name: s / rounds for name, s in spent.items()}


def photos(root, n=40):
    """A folder dataset of n JPEGs 640x480: soft colours under sensor noise, about 110 kB each; labels of 48 blocks."""
    for sub in ("images", "labels"):
        (root / sub).mkdir()
    for k in range(n):
        rng = rng_for(0, k)
        soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = np.asarray(soft) + rng.normal(0, 8, (480, 640, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{k:02}.jpg", quality=92)
        blocks = Image.fromarray(rng.integers(0, 171, (6, 8), dtype=np.uint8))
        blocks.resize((640, 480), Image.NEAREST).save(root / "labels" / f"{k:02}.png")
    (root / "classes.txt").write_text("\n".join(f"class {k}" for k in range(171)))


def loader(root, rounds, draws=40):
    """Print, and return, images/s of one worker at the coco preset; then, in this process, those a second of CPU time.

    The two rates agree on a quiet machine; on a shared one the second is what a core of one's own would do.
    """
    config = recipe("coco", data=str(root), batch=1, steps=draws * (rounds + 1))
    dataset, seconds, spent = training_set(config.run), [], defaultdict(float)
    samples = iter(DataLoader(Stream(dataset, config, 0, 0, 1), 1, num_workers=1))
    for _ in range(rounds + 1):                               # in the first the process starts and fills its queue
        start = time.perf_counter()
        for _ in range(draws):
            next(samples)
        seconds.append(time.perf_counter() - start)
    rate = draws / statistics.median(seconds[1:])
    print(f"loader, 640x640 crops, {len(dataset):,} images: {rate:.1f} images/s a worker, median of {rounds} rounds of "
          f"{draws}")
    dataset.label = timed(dataset.label, "read label", spent)
    with ExitStack() as stack:
        for module, name, part in ((folder, "read_image", "read image"), (folder, "to_tensor", "to tensor"),
                                   (augment, "resized", "resize image"), (augment, "jitter", "colour jitter")):
            stack.enter_context(patch.object(module, name, timed(getattr(module, name), part, spent)))
        start, cpu = time.perf_counter(), time.process_time()
        for n in range(draws):
            dataset.draw(0, n)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
    spent["window, flip, padding"] = total - sum(spent.values())
    shares = ", ".join(f"{part} {100 * s / total:.0f}%" for part, s in spent.items())
    print(f"    {draws / cpu:.1f} images a second of CPU time: {shares}")
    return rate


def loading(root=None, rounds=3):
    """`loader` of a folder, by default one of made-up photos."""
    with tempfile.TemporaryDirectory() as made:
        if not root:
            photos(Path(made))
        return loader(root or made, rounds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="world", choices=("world", "coco", "coco-eva", "coco-large"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", action="store_true", help="the peaks of training steps of 1, 2 and 4 images")
    parser.add_argument("--loader", action="store_true", help="the data loader in place of the model")
    parser.add_argument("--data", metavar="DIR", help="with --loader: its images (default: 40 made up)")
    parser.add_argument("--everything", action="store_true", help="a page of all that there is to measure on a GPU")
    parser.add_argument("--out", metavar="FILE", help="with --everything: the page, Markdown")
    parser.add_argument("--minutes", type=float, default=9.0, help="with --everything: what it may take (9)")
    parser.add_argument("--dry", action="store_true", help="with --everything: no GPU, no figure of one")
    args = parse_flags(parser, argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    its = {"out", "minutes", "dry"}
    for name in sorted(given - its - {"everything"} if args.everything else given & its):
        raise InputError(f"--{name}: {'not' if args.everything else 'only'} together with --everything")
    if args.everything:
        if not args.out:
            raise InputError("--everything: --out FILE says where the page goes")
        if not 1 <= args.minutes <= 600:
            raise InputError(f"--minutes {args.minutes:g}: takes a number from 1 to 600")
        words = sys.argv[1:] if argv is None else argv
        return gpu_day.everything(measure, titled, loading, args.out, args.minutes, args.dry, words)
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds}: takes a positive number")
    check_device(args.device)
    if args.data and not args.loader:
        raise InputError("--data: only together with --loader")
    if args.loader and args.memory:
        raise InputError("--memory: not together with --loader")
    if args.loader:
        return loading(args.data, args.rounds)
    batches = (16, 16) if args.preset == "world" else (12, 1) if args.device == "cuda" else (1, 1)
    rounds = [(True, 1), (True, 2), (True, 4)] if args.memory else list(zip((True, False), batches))
    chip = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args.preset}, torch {torch.__version__}, {chip}, median of {args.rounds} rounds after one" +
          (", without LPIPS, whose VGG-16 is not here" if args.preset != "world" and not vgg_path().is_file() else ""))
    print(f"{'':36}{'s/round':>9}{'images/s':>10}{'peak GiB':>10}{'vs SAN':>8}")
    kinds = [{"kernels": "triton"}, {"kernels": "plain"}] if args.device == "cuda" else [{}]
    rows = [("san", {}), *(("pat", chosen) for chosen in ([{}, {"recompute": True}] if args.memory else kinds))]
    spawn = multiprocessing.get_context("spawn")
    for training, batch in rounds:
        baseline, what = None, "training" if training else "inference"
        for name, chosen in rows:
            with ProcessPoolExecutor(1, spawn) as fresh:
                row = fresh.submit(measure, args.preset, name, chosen, training, batch, args.rounds, args.device)
                seconds, peak, mean, spent = row.result()
            baseline = baseline or seconds                    # SAN, the first row
            title = f"{titled(name, chosen)}: {what}, {batch}"
            print(f"{title:36}{seconds:9.3f}{batch / seconds:10.1f}{peak:10.2f}{seconds / baseline:8.2f}", flush=True)
            spent["losses, backward, optimiser" if training else "rest"] = mean - sum(spent.values())
            print("    " + ", ".join(f"{part} {100 * s / mean:.0f}%" for part, s in spent.items()), flush=True)


if __name__ == "__main__":
    run_cli(main)
