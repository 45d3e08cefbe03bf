"""Names or masks: what holds a score back?  The same masks, once with the model's names and once with the true ones.

    python -m studies.oracle RUN [RUN ...]         one table over the first run's test images

    as scored       the model's masks, the model's names
    oracle names    the model's masks; each takes the name of most labelled pixels where it is above a half, with the weight
                    the model gave to any name at all; a mask above none of them is dropped

What oracle names gain is lost by wrong names, what they leave to 1 by wrong masks.  A model that scores every name at
every pixel (dense, MaskCLIP) has no masks to ask.

    maps (C,h,w), mix (C,L) of segmenter.Answer  ->  the same maps, mix (C,L) of zeros but for one name a map

# paper: none of PAT's; FISA (arXiv 2409.16278) asks so in its Fig. 2a, and finds that names cost the most.
# ours: the rule for a mask's true name.

Tests: tests/studies/test_oracle.py.  Read next: meaning.py.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import InputError, parse_flags, run_cli, write_files
from data import IGNORE
from eval import METRICS, cell, confusion, label_of, scores
from predict import name_pixels, pad, two_step_bands
from published.images_of import scored_on
from runs import changed, load_run

SCENES = 300                                                  # of the world, unless --images says another number
COLUMNS = ("mIoU", "mIoU_seen", "mIoU_unseen", "mIoU_stuff", "foreground_accuracy")


def with_true_names(answer, label, padded, crop):
    """An Answer with the same maps whose mix says of each what it mostly covers, and nothing else; label (H,W), 0..L-1 or IGNORE.

    Sizes as in predict.two_step_bands.  Raises InputError for an answer without masks.
    """
    if answer.mix is None:
        raise InputError("this model has no masks: it scores every name at every pixel, so only its names can be asked")
    maps, L = answer.maps.float(), answer.mix.shape[1] - answer.none
    covered = maps.new_zeros(len(maps), L)
    for rows, band in two_step_bands(maps, padded, crop, tuple(label.shape), 2 * len(maps) + L):
        true = label.to(rows.device)[rows].flatten()                                      # (n) pixels of the band
        known = true != IGNORE
        inside = (answer.gate(band).flatten(1)[:, known] > 0.5).float()                   # (C,n)
        covered += inside @ F.one_hot(true[known], L).float()
    most, name = covered.max(1)                                                           # (C)
    weight = (most > 0) * (1 - answer.mix[:, -1] if answer.none else 1.0)                 # a query that says "none" stays out
    return answer._replace(mix=F.one_hot(name, L).float() * weight[:, None], none=False)


@torch.no_grad()
def oracle(model, dataset, images=None, device="cpu", progress=True):
    """{row: `eval.scores`} of a model over the first `images` of a dataset."""
    was_training, L = model.training, len(dataset.names)
    model.eval().to(device)
    text = model.vlm.embed_text(dataset.names)
    sums = {row: torch.zeros(L + 1, L + 1, dtype=torch.int64) for row in ("as scored", "oracle names")}
    for i in tqdm(range(min(images or len(dataset), len(dataset))), "oracle", unit="image", disable=not progress):
        sample = dataset[i]
        image, label = sample["image"], sample["label"]
        padded_image = pad(image.to(device), model.stride)
        sizes = tuple(padded_image.shape[-2:]), tuple(image.shape[-2:])
        said = model.answer(model(padded_image, text), 0)
        for row, answer in {"as scored": said, "oracle names": with_true_names(said, label, *sizes)}.items():
            sums[row] += confusion(name_pixels(answer, *sizes, tuple(label.shape)), label, L)
    model.train(was_training)
    return {row: scores(matrix, dataset.groups) for row, matrix in sums.items()}


def format_oracle(rows):
    """{label: `oracle`} as text: two lines a run, and what true names gain."""
    titles = [METRICS[key][0] for key in COLUMNS]
    lines = [f"{'':46}" + " ".join(f"{title:>8}" for title in titles)]
    for label, found in rows.items():
        for row, values in found.items():
            lines.append(f"{label:32} {row:13}" + " ".join(f"{cell(key, values):>8}" for key in COLUMNS))
        gains = [None if found["as scored"].get(key) is None else found["oracle names"][key] - found["as scored"][key]
                 for key in COLUMNS]
        lines.append(f"{'':32} {'gain':13}" + " ".join(f"{'-' if gain is None else f'{gain:+.3f}':>8}" for gain in gains))
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories that train.py left, of models with masks")
    parser.add_argument("--images", type=int, metavar="N", help=f"the first N only (all of a folder; {SCENES} of the world)")
    parser.add_argument("--data", metavar="DIR", help="images from here: a folder of yours, or COCO-Stuff")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parse_flags(parser, argv)
    if args.images is not None and args.images < 1:
        raise InputError(f"--images {args.images}: at least 1")
    rows = {}
    for path in args.runs:
        model, config = load_run(path, args.device)
        dataset, _ = scored_on(changed(config, val_data=args.data or config.val_data), args.images or SCENES)
        rows[label_of(model, path)] = oracle(model, dataset, args.images, args.device)
    text = format_oracle(rows)
    write_files({Path(args.runs[0]) / "oracle.txt": text,
                 Path(args.runs[0]) / "oracle.json": json.dumps(rows, indent=1, allow_nan=False) + "\n"})
    print(text, end="")


if __name__ == "__main__":
    run_cli(main)
