"""What a SeNaTra groups: its masks before they have names, from pixels up, and how pure they are.

    python -m studies.groups RUN                   RUN/pictures/groups.png and chain.png, RUN/groups.json
    python -m studies.groups RUN --beside RUN      another run below each image, such as one of --ablate uniform

    groups   an image, the outlines of whom its pixels go to at 16x16 and at 8x8, the 16 final groups in colour, names;
             below it the same of groups that do not look, bilinear ones, or of the other run
    chain    one final group on its way up: its share of each cell at 4x4, 8x8, 16x16, 32x32; below it a bilinear one's.
             It is the group that is most decided, by the largest Σ_p A_p² / Σ_p A_p: no label has chosen it

    purity = Σ_j max_l n_jl / n      n_jl pixels of label l are in group j of their image: every group has one label

Three rows of purity: the run's groups, those of the same model before training, bilinear ones, which are a grid of 4x4.
Nothing in it knows names, so it tells whether there are masks, whoever names them.  (meaning.py's purity is of codes
that all images share; these groups are each image's own.)

    64x64 scene -> A_2 (1,16,16,4,9), A_3 (1,8,8,4,9), A_4 (1,64,16) -> owners (32,32), shares of group j (1,32,32,1)

# paper: its figures of groups, and of masks without mask supervision, are the models for both.   # ours: the purity.

Tests: tests/studies/test_groups.py.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from cli import InputError, parse_flags, run_cli, write_files
from data import palette
from predict import fitting, name_pixels, overlay, pad, resize, segment, spread, unpad
from published.images_of import scored_on
from runs import build, load_config, load_run, model_class
from segmenter import Answer, identity
from siblings.grouping import bilinear, compose, shares
from siblings.senatra import SeNaTra
from studies.gallery import named
from studies.meaning import count_pairs, purity
from studies.pictures import INK, contact_sheet, make_folder

IMAGES = 200                                                  # whose groups are measured
SHOWN = 4                                                     # of which are drawn
AT_ONCE = 256                                                 # groups whose shares are held; early stages have more


@torch.no_grad()
def chain_of(model, image):
    """image (3,h,w) normalised -> chain [A_2, A_3, A_4] of one image, the groups' grid, sizes (crop, padded)."""
    padded = pad(image, model.stride)
    x, chain = model.backbone(padded)                                                     # x (1,h,w,C)
    return chain, tuple(x.shape[1:3]), (tuple(image.shape[-2:]), tuple(padded.shape[-2:]))


def uniform_chain(grid):
    """Three groupings that do not look, which end in `grid` (h,w)."""
    return [bilinear(grid[0] * n, grid[1] * n) for n in (4, 2, 1)]


def owners(chain, grid):
    """Which group has most of each pixel: a chain that ends in `grid` (h,w) -> (h1,w1) int64"""
    best = []
    for ids in torch.arange(grid[0] * grid[1]).split(AT_ONCE):
        z = torch.zeros(grid[0] * grid[1], len(ids)).index_put((ids, torch.arange(len(ids))), torch.ones(()))
        share, index = compose(chain, z.view(1, *grid, -1))[0].max(-1)                    # (h1,w1)
        best.append((share, ids[index]))
    share, index = map(torch.stack, zip(*best))
    return index.gather(0, share.argmax(0, keepdim=True))[0]


def grouped_pixels(chain, grid, sizes, size):
    """The group of each pixel of a picture of `size` (H,W): names are drawn from the same interpolated shares."""
    maps = shares(chain, grid)[0].permute(2, 0, 1)                                        # (N,h1,w1)
    return name_pixels(Answer(maps, gate=identity), sizes[1], sizes[0], tuple(size))


def most_decided(chain, grid):
    """The group that has what it has to itself: argmax of Σ_p A_p² / Σ_p A_p."""
    A = shares(chain, grid)[0].flatten(0, 1)                                              # (P,N)
    return int(((A * A).sum(0) / A.sum(0).clamp(min=1e-6)).argmax())


# --- how pure -------------------------------------------------------------------------------------------------------
def group_purity(chains, dataset, n):
    """Of the first n images: chains(image) -> chain, grid, sizes.  A group of an image has its commonest label."""
    tables = []
    for sample in (dataset[i] for i in range(min(n, len(dataset)))):
        chain, grid, sizes = chains(sample["image"])
        group = grouped_pixels(chain, grid, sizes, sample["label"].shape)                 # (H,W)
        tables.append(count_pairs(group, sample["label"], grid[0] * grid[1], len(dataset.names)))
    return purity(torch.cat(tables))


# --- pictures -------------------------------------------------------------------------------------------------------
def row_of(chain, grid, sizes, picture):
    """Outlines of whom pixels go to at stage 2 and 3, and the final groups in colour: three pictures."""
    pictures = []
    for k, n in ((1, 4), (2, 2), (3, 1)):
        there = grid[0] * n, grid[1] * n
        index = spread(owners(chain[:k], there), *sizes, picture.shape[:2])
        pictures.append(overlay(picture, index, palette(there[0] * there[1]), 0.7 if n == 1 else 0.0))
    return pictures


@torch.no_grad()
def draw_groups(model, samples, names, beside=None, cell=208):
    """samples: dicts of image (3,h,w), original (H,W,3); beside: another model, None for bilinear groups.  PIL image"""
    text, rows, captions = model.vlm.embed_text(names), [], []
    for sample in samples:
        original = sample["original"]
        picture = resize(original, fitting(original, cell))
        chain, grid, sizes = chain_of(model, sample["image"])
        for who, net, own in (("", model, chain), ("beside", beside, None)):
            if who and net is not None:
                own, grid, sizes = chain_of(net, sample["image"])
            drawn = row_of(own or uniform_chain(grid), grid, sizes, picture)
            if net is not None:
                said, _ = segment(net, sample["image"], text, original.shape[:2])
                drawn.append(named(original, said, names, cell))
            rows.append([None if who else picture, *drawn, *[None] * (4 - len(drawn))])
            words = f"{grid[0] * grid[1]} groups" if net is not None else "bilinear: no image is looked at"
            captions.append(["", "", "", words, ""])
    titles = ["the image", *(f"{grid[0] * n}x{grid[1] * n} groups" for n in (4, 2, 1)), "named by the model"]
    return contact_sheet(rows, titles, cell, captions)


def heat(share, colour):
    """share (h,w) in 0..1 -> (h,w,3) uint8, a little less than white to `colour`."""
    return torch.lerp(torch.full((3,), 246.0), torch.tensor(colour.tolist()).float(), share[..., None]).byte().numpy()


@torch.no_grad()
def draw_chain(model, samples, cell=176):
    """One group of each image, from its own cell to the pixels, above a bilinear one of the same cell.  PIL image"""
    rows, captions = [], []
    for i, sample in enumerate(samples):
        own, grid, sizes = chain_of(model, sample["image"])
        j = most_decided(own, grid)
        for matrices in (own, uniform_chain(grid)):
            z = torch.eye(grid[0] * grid[1])[:, j].view(1, *grid, 1)
            steps = [compose(matrices[k:], z)[0, ..., 0] for k in (3, 2, 1, 0)]           # (h,w), ..., (h1,w1)
            picture = sample["original"] if matrices is own else None
            rows.append([picture, *(heat(unpad(step, *sizes), INK[i % len(INK)]) for step in steps)])
            captions.append([f"group {j + 1} of {len(z.flatten())}" if matrices is own else "bilinear", "",
                             *(f"at most {step.max():.2f}" for step in steps[1:])])
    titles = ["the image", *(f"its share of {grid[0] * n}x{grid[1] * n} cells" for n in (1, 2, 4, 8))]
    return contact_sheet(rows, titles, cell, captions)


# --- the command ----------------------------------------------------------------------------------------------------
def senatra_run(run):
    """(model, RunConfig) of a run directory.  Raises InputError for another model's."""
    kind = model_class(load_config(run).model)
    if not issubclass(kind, SeNaTra):
        raise InputError(f"{run}: {kind.__name__} has no groups; train one with python train.py --model senatra")
    return load_run(run)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory of SeNaTra")
    parser.add_argument("--beside", metavar="RUN", help="another, drawn below it (bilinear groups)")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"purity of the first N ({IMAGES})")
    args = parse_flags(parser, argv)
    if args.images < 1:
        raise InputError(f"--images {args.images}: takes a positive number")
    model, config = senatra_run(args.run)
    beside = senatra_run(args.beside)[0] if args.beside else None
    dataset, _ = scored_on(config)
    first = [dataset[i] for i in range(min(SHOWN, len(dataset)))]
    torch.manual_seed(config.seed)
    untrained = build(config).eval()

    def uniform(image):
        _, grid, sizes = chain_of(model, image)
        return uniform_chain(grid), grid, sizes

    rows = {"bilinear": uniform, "its groups": partial(chain_of, model),
            "before training": partial(chain_of, untrained)}
    if beside:
        rows[f"those of {args.beside}"] = partial(chain_of, beside)
    n = min(args.images, len(dataset))
    measured = {row: group_purity(chains, dataset, n) for row, chains in rows.items()}
    folder = Path(args.run) / "pictures"
    make_folder(folder)
    files = {folder / "groups.png": draw_groups(model, first, dataset.names, beside),
             folder / "chain.png": draw_chain(model, first),
             Path(args.run) / "groups.json": json.dumps(dict(images=n, purity=measured), indent=1) + "\n"}
    write_files(files)
    for row, value in measured.items():
        print(f"purity of {n} images, {row}: {value:.3f}")
    print(f"written: {', '.join(map(str, files))}")


if __name__ == "__main__":
    run_cli(main)
