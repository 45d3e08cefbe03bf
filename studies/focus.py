"""What training the names did to FISA: where a mask token looks now, and what one more name does to the others.

    python -m studies.focus RUN                    RUN/pictures/focus.png, and two numbers

    focus     for the best mask of three test images: what its token looks at in CLIP's last block, before training (CLIP's
              own queries, no names told) and after.  It can look nowhere but at cls and at the cells of its mask
    fifth     each image is asked for four names, then for a fifth as well.  By how much do the logits of the four move,
              and for how many masks is another of the four now best?  Nothing moves where SEVE is off

    a_q = mean over the heads of softmax(q kᵀ/√d + M)     (1+P): its share on cls, and a map (h,w)

# paper: none of PAT's.  FISA (arXiv 2409.16278) tunes queries to "adapt the image focus of mask tokens".
# ours: which masks, and both measures.

Tests: tests/studies/test_focus.py.  Read next: meaning.py.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import InputError, parse_flags, run_cli, write_files
from data import rng_for
from predict import pad
from published.images_of import scored_on
from runs import load_run
from siblings.fisa import FISA
from studies.oracle import fits, overlaps
from studies.pictures import contact_sheet, make_folder

IMAGES, FIFTH = 100, 31                                       # of the second measure; the word of its random keys


@torch.no_grad()
def looks(model, image, text, masks):
    """Where mask tokens look in the last block: image (1,3,H,W), masks (1,Q,h,w) -> (Q,1+P), rows sum to 1, cls first."""
    z, sees = model.start(image, masks)
    last, n = len(model.vlm.blocks) - 1, sees.shape[-1]
    for l in range(last):
        z = model.step(l, z, sees, text)
    if last < len(model.seve):
        z = model.seve[last](z, text)
    q, k, _ = model.attention(last, z, n)
    scores = q[:, :, n:] @ k.transpose(-1, -2) / k.shape[-1] ** 0.5                       # (1,heads,Q,1+P)
    return scores.masked_fill(~sees[:, None], float("-inf")).softmax(-1).mean(1)[0]


def heat(a):
    """A map (h,w) of weights -> (h,w,3) uint8, white where nothing is, dark red at its largest."""
    t = (a / a.max().clamp(min=1e-9)).cpu().numpy()[..., None]
    return (255 * (1 - t) + np.array([140, 0, 20]) * t).round().astype(np.uint8)


@torch.no_grad()
def focus(model, dataset, images=3, cell=176):
    """A row an image: it, its best mask, where that mask's token looked before training and looks now -> PIL image."""
    before, text = deepcopy(model), model.vlm.embed_text(dataset.names)
    before.reset()
    rows, captions = [], []
    for i in range(min(images, len(dataset))):
        sample = dataset[i]
        image = pad(sample["image"].to(text.device), model.stride)
        out, crop = model(image, text), tuple(sample["image"].shape[-2:])
        iou = fits(overlaps(model.answer(out, 0), sample["label"], tuple(image.shape[-2:]), crop), sample["label"])   # (Q,L)
        q, name = divmod(int(iou.argmax()), iou.shape[1])
        masks, grid = out["masks"][-1], model.vlm.embed(image)[1]
        rows.append([sample["original"], heat(masks[0, q].sigmoid())])
        captions.append(["", f"fits {dataset.names[name]}"])
        for each in (before, model):
            a = looks(each, image, text, masks)[q]                                        # (1+P)
            rows[-1].append(heat(a[1:].unflatten(0, grid)))
            captions[-1].append(f"{a[0]:.0%} on cls, {a[1:].max():.0%} on the darkest")
    return contact_sheet(rows, ["the image", "its best mask", "before training", "after"], cell, captions)


@torch.no_grad()
def fifth_name(model, dataset, images=IMAGES):
    """(mean change of a logit, share of masks with another best name) of four names when a fifth is asked for too.

    The four are names that the image shows, and random others where it shows fewer; the fifth is drawn like them.
    """
    text, moved, other = model.vlm.embed_text(dataset.names), [], []
    for i in tqdm(range(min(images, len(dataset))), "fifth name", unit="image", leave=False):
        sample = dataset[i]
        image, shown = pad(sample["image"].to(text.device), model.stride), set(sample["label"].unique().tolist())
        order = rng_for(0, FIFTH, i).permutation(len(dataset.names)).tolist()
        five = sorted(order, key=lambda name: name not in shown)[:5]                      # stable: random among the shown
        four, fifth = (model(image, text[five[:n]])["classes"][-1][0, :, :4] for n in (4, 5))     # (Q,4)
        moved.append((fifth - four).abs().mean())
        other.append((fifth.argmax(1) != four.argmax(1)).float().mean())
    return torch.stack(moved).mean().item(), torch.stack(other).mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory of FISA")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"ask the first N for a fifth name ({IMAGES})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parse_flags(parser, argv)
    if args.images < 1:
        raise InputError(f"--images {args.images}: at least 1")
    model, config = load_run(args.run, args.device)
    if not isinstance(model, FISA):
        raise InputError(f"{args.run}: is a run of {type(model).__name__}; only FISA has mask tokens to follow")
    dataset, _ = scored_on(config, args.images)
    out = Path(args.run) / "pictures" / "focus.png"
    make_folder(out.parent)
    write_files({out: focus(model, dataset)})
    moved, other = fifth_name(model, dataset, args.images)
    print(f"written: {out}\na fifth name moves the logits of the other four by {moved:.4f} on average, and gives "
          f"{other:.1%} of the masks another of the four")


if __name__ == "__main__":
    run_cli(main)
