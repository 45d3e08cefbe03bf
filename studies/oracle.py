"""Names or masks: what holds a score back?  Once the true names on a model's masks, once its names on the true masks.

    python -m studies.oracle RUN [RUN ...]         one table and one picture over the first run's test images

    as scored                  the model's masks, the model's names
    oracle names               the model's masks; each takes the name of most labelled pixels where it is above a half, and
                               a mask above none of them is dropped
    oracle masks, own bias     the true region of each name; it is called as the model calls that mask of its own which fits
                               the region best (IoU).  SAN and PAT: so CLIP looks through the bias made for that mask
    oracle masks, plain bias   the true region of each name; CLIP looks at it through a bias that the model did not make:
                               0 where a cell touches the region, -100 elsewhere (FISA: its own kind, 0 and -inf)

What true names gain is lost by wrong names, what they leave to 1 by wrong masks; what true masks gain is lost by wrong
masks, what they leave to 1 by wrong names.  SAN and PAT learned what CLIP makes of *their* biases, which are no plain
regions: the last row asks them for what they were never trained to do.  A model that scores every name at every pixel
(dense, MaskCLIP) has no masks to ask.

    inside (C,L) pixels, each mask's on each name:   name_c = argmax_l inside_cl      IoU_cl = inside_cl / (|c| + |l| - inside_cl)

# paper: none of PAT's; FISA (arXiv 2409.16278) asks so in its Fig. 2a, and finds that names cost the most.
# ours: the rules for a mask's true name and for the mask that fits.

Tests: tests/studies/test_oracle.py.  Read next: focus.py.
"""

import argparse
import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import InputError, parse_flags, run_cli, write_files
from data import IGNORE
from eval import METRICS, cell, confusion, label_of, scores
from predict import UNNAMED, name_pixels, pad, two_step_bands
from published.images_of import scored_on
from runs import changed, load_run
from san import SAN
from studies.pictures import GREY, INK, Axis, Figure, fitted, make_folder

SCENES = 300                                                  # of the world, unless --images says another number
COLUMNS = ("mIoU", "mIoU_seen", "mIoU_unseen", "mIoU_stuff", "foreground_accuracy")
SCORED, NAMES, OWN, PLAIN = "as scored", "oracle names", "oracle masks, own bias", "oracle masks, plain bias"
OUTSIDE = -100.0                                              # as good as -inf, and finite like SAN's


# --- masks and true regions ------------------------------------------------------------------------------------------


def overlaps(answer, label, padded, crop):
    """How many labelled pixels each mask has above a half, on each name: label (H,W), 0..L-1 or IGNORE -> (C,L) float.

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
    return covered


def with_true_names(answer, inside):
    """An Answer with the same maps whose mix says of each what it mostly covers; inside (C,L) as `overlaps` gives it."""
    most, name = inside.max(1)                                                            # (C)
    weight = (most > 0) * (1 - answer.mix[:, -1] if answer.none else 1.0)                 # a query that says "none" stays out
    return answer._replace(mix=F.one_hot(name, inside.shape[1]).float() * weight[:, None], none=False)


def fits(inside, label):
    """IoU of each mask with each name's true region, over the labelled pixels: inside (C,L) of `overlaps` -> (C,L)."""
    region = torch.bincount(label[label != IGNORE], minlength=inside.shape[1]).to(inside)     # (L) pixels
    return inside / (inside.sum(1, keepdim=True) + region - inside).clamp(min=1)


def names_by_fit(answer, inside, label):
    """What the model calls each true region: the name of the mask that fits it best -> (L) int64.

    UNNAMED for a region that no mask meets, and for a name without a pixel.
    """
    iou, mask = fits(inside, label).max(0)                                                # (L)
    said = answer.mix[:, :len(iou)].argmax(1)[mask]
    return torch.where(iou > 0, said, UNNAMED).cpu()


def names_by_sight(model, image, text, label, crop):
    """What the model calls each true region when CLIP is shown just that -> (L) int64, UNNAMED for a name without a pixel.

    image (1,3,Hp,Wp) padded, text (L,E), label (H,W), crop (h,w).  None for a model that takes no masks of others.
    """
    present = label[label != IGNORE].unique()                                             # (M)
    regions = (label == present[:, None, None]).float()[None]                             # (1,M,H,W)
    regions = F.interpolate(regions, size=crop, mode="nearest-exact")
    regions = F.pad(regions, (0, image.shape[-1] - crop[1], 0, image.shape[-2] - crop[0])).to(image.device)
    if isinstance(model, SAN):
        pyramid, _ = model.fuse(image)
        touched = F.adaptive_max_pool2d(regions, pyramid.grid)                            # (1,M,h,w)
        bias = (OUTSIDE * (1 - touched))[:, None].expand(-1, model.vlm.heads, -1, -1, -1)     # (1,heads,M,h,w)
        classes = model.classify(pyramid, [bias], text)[0][0]                             # (M,L+1)
    elif "masks" in inspect.signature(model.forward).parameters:
        classes = model(image, text, masks=2 * regions - 1)["classes"][-1][0]
    else:
        return None
    names = torch.full((len(text),), UNNAMED)
    names[present] = classes[:, :-1].argmax(1).cpu()
    return names


@torch.no_grad()
def rows_of(model, image, label, text):
    """{row: the prediction (H,W)} of one image (3,h,w), in a model's eval mode."""
    padded_image = pad(image.to(text.device), model.stride)
    padded, crop, size = tuple(padded_image.shape[-2:]), tuple(image.shape[-2:]), tuple(label.shape)
    said = model.answer(model(padded_image, text), 0)
    inside = overlaps(said, label, padded, crop)
    called = {OWN: names_by_fit(said, inside, label), PLAIN: names_by_sight(model, padded_image, text, label, crop)}
    on_truth = {row: torch.where(label == IGNORE, UNNAMED, names[label]) for row, names in called.items() if names is not None}
    return {SCORED: name_pixels(said, padded, crop, size),
            NAMES: name_pixels(with_true_names(said, inside), padded, crop, size), **on_truth}


def oracle(model, dataset, images=None, device="cpu", progress=True):
    """{row: `eval.scores`} of a model over the first `images` of a dataset."""
    was_training, L = model.training, len(dataset.names)
    model.eval().to(device)
    text, sums = model.vlm.embed_text(dataset.names), {}
    for i in tqdm(range(min(images or len(dataset), len(dataset))), "oracle", unit="image", disable=not progress):
        sample = dataset[i]
        for row, prediction in rows_of(model, sample["image"], sample["label"], text).items():
            sums[row] = sums.get(row, 0) + confusion(prediction, sample["label"], L)
    model.train(was_training)
    return {row: scores(matrix, dataset.groups) for row, matrix in sums.items()}


# --- the table, and the picture --------------------------------------------------------------------------------------


def gains(found, row):
    """What a row of `oracle` has above what was scored, a number for each of COLUMNS, None where there is nothing."""
    return [None if found[SCORED].get(key) is None else found[row][key] - found[SCORED][key] for key in COLUMNS]


def format_oracle(rows):
    """{label: `oracle`} as text: a line a row, and under each true row what it gains."""
    lines = [f"{'':57}" + " ".join(f"{METRICS[key][0]:>8}" for key in COLUMNS)]
    for label, found in rows.items():
        for row, values in found.items():
            lines.append(f"{label:32} {row:24}" + " ".join(f"{cell(key, values):>8}" for key in COLUMNS))
            if row != SCORED:
                said = ["-" if gain is None else f"{gain:+.3f}" for gain in gains(found, row)]
                lines.append(f"{'':32} {'  gain':24}" + " ".join(f"{text:>8}" for text in said))
    return "\n".join(lines) + "\n"


def bars(rows, keys=("mIoU_seen", "mIoU_unseen")):
    """{label: `oracle`} as bars, FISA's Fig. 2a: a panel for each of `keys`, a group a run, a bar a row -> PIL image.

    Data without these groups of names show their mIoU alone.
    """
    keys = [key for key in keys if all(found[SCORED].get(key) is not None for found in rows.values())] or ["mIoU"]
    kinds = [row for row in (SCORED, OWN, PLAIN, NAMES) if any(row in found for found in rows.values())]
    colours = dict(zip((SCORED, OWN, PLAIN, NAMES), (GREY, INK[0], (190, 200, 225), INK[1])))
    wide, tall, bar = 60 + 140 * len(rows), 220, 26
    figure = Figure(max(620, 40 + len(keys) * (wide + 40)), tall + 160)
    figure.text(20, 12, "Names or masks? The same images with the true names, and with the true masks", 16)
    x = 20
    for row in kinds:
        figure.box(x, 44, x + 12, 56, colours[row])
        figure.text(x + 17, 50, row, 12, "black", "lm")
        x += 36 + 7 * len(row)
    for p, key in enumerate(keys):
        left, bottom = 50 + p * (wide + 40), 96 + tall
        up = Axis(0, 1, bottom, bottom - tall)
        figure.text(left, 74, f"mIoU, {METRICS[key][0]}" if key != "mIoU" else "mIoU", 14)
        for value in up.ticks():
            figure.line([(left, up(value)), (left + wide, up(value))], (228, 228, 232), 0.7)
            figure.text(left - 6, up(value), f"{value:g}", 11, GREY, "rm")
        for r, (label, found) in enumerate(rows.items()):
            start = left + 20 + 140 * r
            for k, row in enumerate(row for row in kinds if found.get(row, {}).get(key) is not None):
                at, height = start + (bar + 3) * k, up(found[row][key])
                figure.box(at, height, at + bar, bottom, colours[row])
                figure.text(at + bar / 2, height - 8, f"{found[row][key]:.2f}", 11, "black", "mm")
            figure.text(start + 2 * bar, bottom + 14, label.split()[0], 13, "black", "mm")
            place, font = fitted(Path(label.split(" ", 1)[-1]).name, 134, 11)
            figure.text(start + 2 * bar, bottom + 31, place, font.size, GREY, "mm")
        figure.line([(left, bottom), (left + wide, bottom)], GREY, 0.8)
    return figure.image()


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
    text, run = format_oracle(rows), Path(args.runs[0])
    make_folder(run / "pictures")
    write_files({run / "oracle.txt": text, run / "oracle.json": json.dumps(rows, indent=1, allow_nan=False) + "\n",
                 run / "pictures" / "oracle.png": bars(rows)})
    print(text, end="")


if __name__ == "__main__":
    run_cli(main)
