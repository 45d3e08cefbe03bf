"""What FGAseg segments: each name's likeness to every place, as a picture; and how many names it takes.

    python -m studies.costs RUN        -> RUN/pictures/costs.png and topk.png, and the second in numbers

costs   three images, of each the two names with the most pixels and the first name that is not there.  Row by row: the
        cosine with CLIP's text, S^g, S^l and the logits, all names of a row on one colour scale, from its least to its
        greatest value: so a row says what tells names apart, and what does not (docs/fgaseg.md on S^l).
topk    names that are nowhere among the k best are given up on the way (`topk`): for k = 1, 2, ... how many of the L
        are left, and the mIoU, beside that of the whole model.

    maps (n,a,b) of the n names of a row, on the model's own grid -> pictures (a,b,3) uint8

# paper: FGAseg's Fig. 5 is our model for the second.
# ours: the first; which names are shown.

Tests: tests/studies/test_costs.py.  Read next: gallery.py.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import InputError, check_device, parse_flags, run_cli, write_files
from data import IGNORE, to_unit
from eval import confusion, scores
from predict import device_of, name_pixels, pad, to_image, unpad
from published.images_of import scored_on
from runs import changed, load_config, load_run, model_class
from siblings.fgaseg import DROPPED, FGASeg, cosines
from studies.gallery import named
from studies.pictures import GREY, Figure, contact_sheet, make_folder, plot

SCALE = np.array([(13, 8, 60), (110, 20, 110), (215, 60, 80), (250, 160, 60), (252, 250, 190)], float)   # low to high
SHOWN, IMAGES = 3, 20                                         # images of costs; of topk, unless --images says another number
KINDS = {"cosine": "cosine", "gcs": "S^g", "lcs": "S^l", "logits": "logits"}


def heat(maps):
    """maps (n,a,b) -> n pictures (a,b,3) uint8 on one colour scale, and its ends."""
    low, high = maps.min().item(), maps.max().item()
    x = ((maps - low) / max(high - low, 1e-9)).cpu().numpy()
    steps = np.linspace(0, 1, len(SCALE))
    return list(np.stack([np.interp(x, steps, channel) for channel in SCALE.T], -1).round().astype(np.uint8)), (low, high)


def chosen(label, L):
    """label (H,W) of L names -> the two of most pixels, and the first that is not there; as many as there are."""
    pixels = torch.bincount(label[label != IGNORE].flatten(), minlength=L)                # (L)
    present = pixels.argsort(descending=True, stable=True)[:2]
    return [*present[pixels[present] > 0].tolist(), *(pixels == 0).nonzero().flatten()[:1].tolist()]


@torch.no_grad()
def likenesses(model, image, text):
    """image (3,h,w), text (L,E) -> {kind of KINDS: (L,a,b)}, without padding; of a model in eval mode."""
    padded = pad(image.to(text.device), model.stride)
    out, (f, _) = model(padded, text), model.look(padded)
    out["cosine"] = cosines(text[None], f)
    crop, whole = tuple(image.shape[-2:]), tuple(padded.shape[-2:])
    return {kind: unpad(out[kind][0], crop, whole).float() for kind in KINDS if kind in out}


def costs(model, samples, cell=120):
    """The picture `costs` of the first three samples: dicts of image, original, label.  -> PIL image"""
    text, rows, captions = model.vlm.embed_text(samples.names), [], []
    if len(text) > model.config.most_names:
        raise InputError(f"these images have {len(text)} names: costs shows {model.config.most_names} at most, most_names")
    for sample in (samples[i] for i in range(min(SHOWN, len(samples)))):
        names, picture = chosen(sample["label"], len(text)), to_image(to_unit(sample["image"]))
        beside = [picture, named(sample["original"], sample["label"], samples.names, cell), None, None]
        for (kind, maps), shown in zip(likenesses(model, sample["image"], text).items(), beside):
            pictures, (low, high) = heat(maps[names])
            pictures += [None] * (3 - len(pictures))
            rows.append([shown, *pictures])
            said = [samples.names[l] for l in names] + [""] * (3 - len(names))
            captions.append([f"{KINDS[kind]}: {low:.2f} .. {high:.2f}", *said])
    return contact_sheet(rows, ["the image, its names", "most pixels", "second most", "not there"], cell, captions)


def numbers_of_k(L):
    """1, 2, 3, 4, 6, 8, 12, ... and L"""
    return sorted({k for power in range(20) for k in (2**power, 3 * 2**power) if k < L} | {L})


@torch.no_grad()
def survive(model, dataset, images, progress=True):
    """{k: (names left on average, mIoU)} of a model in eval mode over the first images of a dataset; k = 0: all of it."""
    text, device, was, found = model.vlm.embed_text(dataset.names), device_of(model), model.config.topk, {}
    L = len(text)
    try:
        for k in tqdm([0, *numbers_of_k(L)], "topk", unit="k", disable=not progress):
            model.config.topk, left, matrix = k, [], 0
            for sample in (dataset[i] for i in range(min(images, len(dataset)))):
                image, label = sample["image"], sample["label"]
                padded = pad(image.to(device), model.stride)
                out = model(padded, text)
                left.append((out["logits"][0] != DROPPED).flatten(1).any(1).sum().item())
                sizes = tuple(padded.shape[-2:]), tuple(image.shape[-2:]), tuple(label.shape)
                said = name_pixels(model.answer(out, 0), *sizes)
                matrix = matrix + confusion(said, label, L)
            found[k] = sum(left) / len(left), scores(matrix, {})["mIoU"]
    finally:
        model.config.topk = was
    return found


def topk(found):
    """The picture of `survive`: PIL image."""
    figure, by_k = Figure(900, 262), {k: values for k, values in found.items() if k}
    whole = [(min(by_k), found[0][1]), (max(by_k), found[0][1])]
    panels = {"names left": {"left": [(k, left) for k, (left, _) in by_k.items()]},
              "mIoU": {"topk": [(k, miou) for k, (_, miou) in by_k.items()], "whole": whole}}
    for x, (title, lines) in zip((48, 498), panels.items()):
        plot(figure, (x, 40, x + 318, 222), title, lines, steps=max(by_k))
        figure.text(x + 318, 246, "k", 11, GREY, "rm")
    return figure.image()


def format_topk(found):
    """`survive` as text."""
    lines = [f"{'k':>6} {'left':>8} {'mIoU':>8}"]
    return "\n".join(lines + [f"{k or 'whole':>6} {left:8.1f} {miou:8.3f}" for k, (left, miou) in found.items()]) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run of FGAseg that train.py left")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"topk: the first N ({IMAGES})")
    parser.add_argument("--data", metavar="DIR", help="images from here: a folder of yours, or COCO-Stuff")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parse_flags(parser, argv)
    check_device(args.device)
    if args.images < 1:
        raise InputError(f"--images {args.images}: at least 1")
    kind = model_class(load_config(args.run).model)           # no weights are needed to refuse
    if not issubclass(kind, FGASeg):
        raise InputError(f"{args.run}: {kind.__name__} compares no place with a name before it segments; FGAseg does")
    model, config = load_run(args.run, args.device)
    samples, _ = scored_on(changed(config, val_data=args.data or config.val_data))
    folder = Path(args.run) / "pictures"
    pictures = {folder / "costs.png": costs(model, samples)}
    if model.aux is not None:                                 # without, nobody says early who may go
        found = survive(model, samples, args.images)
        print(format_topk(found), end="")
        pictures[folder / "topk.png"] = topk(found)
    make_folder(folder)
    write_files(pictures)
    print("written:", ", ".join(map(str, pictures)))


if __name__ == "__main__":
    run_cli(main)
