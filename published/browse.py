"""What is there: what a folder of downloads holds, and images beside their labels.

    python -m published.browse check DIR                       what of each dataset is there, which ids, what is missing
    python -m published.browse show DIR NAME --out sheet.png   images beside their labels, in colours, with names
    (NAME is left out for a folder of your own.)

# ours: all of it.

Tests: tests/published/test_browse.py.  Read next: weights.py.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cli import InputError, parse_flags, run_cli, write_files
from data import IGNORE, colour_label, palette, read_classes
from predict import fitting
from published.datasets import SETS, NotFound, find, open_dataset, open_shelf
from published.folder import layout


def contents(dataset, images=None, title=""):
    """Read the first `images` labels (default all): -> pixels of each class (L,) int64, then of IGNORE, as (L+1,)."""
    L, n = len(dataset.names), min(images or len(dataset), len(dataset))
    pixels = np.zeros(L + 1, np.int64)
    for i in tqdm(range(n), desc=title, unit="label", leave=False):
        label = dataset.label(i)
        pixels += np.bincount(np.where(label == IGNORE, L, label).flatten(), minlength=L + 1)
    return pixels


def describe(dataset, published, images, title):
    """One line: how many images of how many, which ids, how much void."""
    pixels, n = contents(dataset, images, title), min(images or len(dataset), len(dataset))
    ids = np.flatnonzero(pixels[:-1])
    of = f" of {published:,}" if published else ""
    span = f" from {ids[0]} to {ids[-1]}" if ids.size else ""
    return (f"{len(dataset):,}{of} images; {n:,} labels read: {ids.size} of {len(dataset.names)} ids{span}, void "
            f"{pixels[-1] / pixels.sum():.1%}")


def check(root, images=None, ignore=255):
    """Print, for every dataset, what of it is under `root`.  Raises InputError at the end if something is unusable."""
    if kind := layout(root):
        own = kind(root, ignore=ignore)
        own.read(0)
        print(f"folder: {describe(own, None, images, 'folder')}\n    names {own.checksum}")
        return
    shelf, broken = open_shelf(root), 0
    for kind, split in ((kind, split) for kind in SETS.values() for split in kind.counts):
        title = f"{kind.name} {split}"
        print(f"{title}: ", end="", flush=True)
        try:
            dataset = kind(find(kind.name, shelf, split), crop=640, short_side=640, long_side=2560)
            dataset.read(0)                            # of the images, one is looked at
            print(describe(dataset, kind.counts[split], images, title))
            print(f"    {dataset.found.where} ({dataset.route}), names {dataset.checksum}")
        except NotFound as error:
            print(f"not there; it needs {error.missing}")
        except InputError as error:
            broken += 1
            print(f"UNUSABLE\n    {error}")
    if broken:
        raise InputError(f"{root}: {broken} of the datasets above cannot be used as they are; see what each line says")


def label_sheet(dataset, count=8, width=320):
    """`count` images spread over the dataset, each beside its label in colours, above a legend of the names drawn."""
    rows, pixels = [], np.zeros(len(dataset.names), np.int64)
    for i in np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)):
        image, label = dataset.read(i)
        pixels += np.bincount(label[label != IGNORE], minlength=len(pixels))
        size = fitting(image, width)[::-1]
        left = Image.fromarray(image).resize(size)
        right = Image.fromarray(colour_label(label)).resize(size, Image.NEAREST)
        rows.append(Image.fromarray(np.hstack((left, right))))
    # The rows stand in two columns, the first half on the left; below them the legend, in columns of 250 pixels.
    half = math.ceil(len(rows) / 2)
    sides = rows[:half], rows[half:]
    height = max(sum(row.height + 4 for row in side) for side in sides)
    drawn = [int(k) for k in np.argsort(-pixels, kind="stable") if pixels[k]]        # the classes, largest first
    legend = [(tuple(palette(k + 1)[k].tolist()), f"{k} {dataset.names[k]}"[:32]) for k in drawn]
    legend.append(((0, 0, 0), "void"))
    columns = 4 * width // 250
    lines = math.ceil(len(legend) / columns)
    sheet = Image.new("RGB", (4 * width + 8, height + 20 * lines + 8), "white")
    for x, side in zip((0, 2 * width + 8), sides):
        y = 0
        for row in side:
            sheet.paste(row, (x, y))
            y += row.height + 4
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for k, (colour, text) in enumerate(legend):
        x, y = 4 + k % columns * 250, height + 4 + k // columns * 20
        draw.rectangle((x, y, x + 14, y + 14), fill=colour, outline="black")
        draw.text((x + 20, y - 2), text, fill="black", font=font)
    return sheet


USAGE = "python -m published.browse check DIR [--images N], or: python -m published.browse show DIR NAME [--out FILE]"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, usage=USAGE)
    parser.add_argument("command", nargs="?", choices=("check", "show"))
    parser.add_argument("root", nargs="?", metavar="DIR", help="what holds the datasets, or is one of your own")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(SETS)}")
    parser.add_argument("--images", type=int, metavar="N", help="check: read the first N labels of each (default all)")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="show: of coco-stuff")
    parser.add_argument("--names", metavar="FILE", help="show: other names, one a line in order of ids")
    parser.add_argument("--ignore", type=int, default=255, help="unlabelled in a folder of yours (255)")
    parser.add_argument("--out", metavar="FILE", help="show: where the sheet goes (NAME.png)")
    args = parse_flags(parser, argv)
    if args.command is None or args.root is None:
        raise InputError(f"usage: {USAGE}")
    if args.images is not None and args.images < 1:
        raise InputError(f"--images {args.images}: at least 1")
    if args.command == "check":
        return check(args.root, args.images, args.ignore)
    names = read_classes(Path(args.names)) if args.names else None
    if args.name is None and (kind := layout(args.root)):
        dataset = kind(args.root, ignore=args.ignore, names=names)
    elif args.name is None:
        raise InputError(f"show {args.root}: say which, {', '.join(SETS)}; a folder of your own has a classes.txt")
    else:
        dataset = open_dataset(args.name, args.root, args.split, names=names)
    out = Path(args.out or f"{args.name or 'folder'}.png")
    write_files({out: label_sheet(dataset)})
    print(f"{out}: {min(8, len(dataset))} of {len(dataset):,} images, {dataset.route}, names {dataset.checksum}")


if __name__ == "__main__":
    run_cli(main)
