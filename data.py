"""Datasets to train and test on: a folder of your own, and six published ones as they were published.

    Folder(DIR)               DIR/images/*, DIR/labels/* (class ids as grey values, paired by stem), DIR/classes.txt
    open_dataset(NAME, DIR)   coco-stuff, voc20, pc59, pc459, ade150 or ade847, found by itself under DIR (published.py)

A dataset is anything with `names`, `train_names`, `groups` (class ids whose scores are averaged apart), `crop` (S),
`checksum` (of the names and of what labels hold), `route` (where labels come from), `key` (which images at which size),
`len()`, `data[i]` for testing and `data.draw(seed, n)` for training; these are some, world.World is another.

    a 480x640 photo: data[i]     image (3,640,853) float, label (480,640) int64, whose size the answer is scored at
                     data.draw   image (3,640,640) float, label (640,640) int64: a window of it, IGNORE where padded

Commands:  python data.py check DIR                        what is there, how much of it, which ids its labels hold
           python data.py show DIR NAME --out sheet.png    images beside their labels, in colours, with names
           (NAME is left out for a folder of your own.)

Tests: tests/test_data.py.  Read next: hsattn.py.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from archives import Shelf
from images import (AUGMENT, IGNORE, ORDER, InputError, augment, checksum, colour_label, palette, parse_flags,
                    parse_names, read_image, read_label, resize_short, rng_for, run_cli, to_tensor, write_files)
from published import COUNTS, TITLES, ZIPS, NotFound, find, shrink
from vocabulary import FOREIGN, load_vocabulary, overlap, read_classes
from world import World


class Pairs:
    """What every dataset of image and label files shares.  Sub-classes say what a label means: `label(i)`.

    pairs: list of (stem, image source, label source); names: what class k is called.
    """

    def __init__(self, pairs, names, crop, short_side, long_side):
        self.pairs, self.names, self.train_names = pairs, names, names
        self.crop, self.short_side, self.long_side = crop, short_side, long_side

    def __len__(self):
        return len(self.pairs)

    @property
    def key(self):
        """16 hex digits of which pairs these are and of the size they are tested at; files are not opened."""
        return checksum([f"{self.route} {self.short_side} {self.long_side}", *(str(label) for *_, label in self.pairs)])

    def label(self, i):
        """Label i at its stored size: (H,W) int64, class ids and IGNORE."""
        raise NotImplementedError

    def read(self, i):
        """Pair i: image (H,W,3) uint8, label (H,W) int64 with IGNORE for unlabelled.  InputError if sizes differ."""
        _, image_path, label_path = self.pairs[i]
        image, label = read_image(image_path), self.label(i)
        if image.shape[:2] != label.shape:
            (h, w), (h2, w2) = image.shape[:2], label.shape
            raise InputError(f"{label_path}: is {w2}x{h2}, but {image_path} is {w}x{h} (after EXIF orientation); "
                             "label the upright image at its own size")
        return image, label

    def draw(self, seed, n):
        """Training sample n of stream `seed`: image (3,S,S) float, normalised; label (S,S) int64.

        Each epoch (len(self) samples) visits every image once, in an order of its own.
        """
        epoch, k = divmod(n, len(self))
        order = rng_for(seed, ORDER, epoch).permutation(len(self))
        image, label = augment(*self.read(order[k]), rng_for(seed, AUGMENT, n), self.crop, self.long_side)
        return to_tensor(image), torch.from_numpy(label)

    def __getitem__(self, i):
        """Test pair i: dict of image (3,h,w) float at test resolution, label (H,W), name (stem), original (H,W,3)."""
        image, label = self.read(i)
        small = resize_short(image, self.short_side, self.long_side)
        return dict(image=to_tensor(small), label=torch.from_numpy(label), name=self.pairs[i][0], original=image)


# ---- a folder of your own ----
def files_by_stem(folder):
    """{stem: path} of the files in `folder`, sorted; InputError if it is missing, empty, nested or has a stem twice."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a dataset is a folder with images/, labels/ and classes.txt")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):                             # .DS_Store, .gitignore
            continue
        if path.is_dir():
            raise InputError(f"{path}: is a folder; put the files directly into {folder}")
        if path.stem in found:
            raise InputError(f"{path}: has the stem of {found[path.stem].name} too; stems pair the files, rename one")
        found[path.stem] = path
    if not found:
        raise InputError(f"{folder}: holds no files; put the dataset's {folder.name} there")
    return found


class Folder(Pairs):
    """Your own data: `root/images/*`, `root/labels/*` (index PNG or TIFF, paired by stem), `root/classes.txt`.

    `ignore` is the value in the label files that means unlabelled (255, or 65535 in 16-bit files); `names` replaces
    classes.txt.  Names and pairing are checked here, sizes and ids when a file is read; both raise InputError.
    """

    groups, route = {}, "a folder with classes.txt"

    def __init__(self, root, *, ignore=255, crop=640, short_side=640, long_side=2560, names=None):
        root = Path(root)
        images, labels = files_by_stem(root / "images"), files_by_stem(root / "labels")
        for have, lack, what in ((images, labels, "label"), (labels, images, "image")):
            lone = [path.name for stem, path in have.items() if stem not in lack]
            if lone:
                more = f" and {len(lone) - 3} more" if len(lone) > 3 else ""
                raise InputError(f"{root}: no {what} for {', '.join(lone[:3])}{more}; add it, or remove the file")
        names = parse_names(names) if names is not None else read_classes(root / "classes.txt")
        if 0 <= ignore < len(names):
            raise InputError(f"{root}: ignore value {ignore} is the id of {names[ignore]!r} too; give another, "
                             "such as 65535")
        super().__init__([(stem, images[stem], labels[stem]) for stem in sorted(images)], names, crop, short_side,
                         long_side)
        self.ignore, self.checksum = ignore, checksum(names)

    def label(self, i):
        _, _, path = self.pairs[i]
        label = read_label(path)
        wrong = label[(label != self.ignore) & ((label < 0) | (label >= len(self.names)))]
        if wrong.size:
            raise InputError(f"{path}: has class id {wrong[0]}, but the {len(self.names)} names are ids 0 to "
                             f"{len(self.names) - 1}; name it, or make it the ignore value (now {self.ignore})")
        return np.where(label == self.ignore, IGNORE, label)


def layout(root):
    """The class that reads a folder of your own, told by what lies in it; None if no class here does.

    Every such class is called as Folder is.  Training, scoring, `check` and `show` all ask here: the place for a new one.
    """
    return Folder if (Path(root) / "classes.txt").exists() else None


# ---- a published dataset ----
class Published(Pairs):
    """One split of a published dataset; `groups` parts its names into those seen in training and the others.

    `found`: where and how, see published.find; `names` replaces its list, class by class; `training`: see overlap.
    """

    def __init__(self, name, found, crop, short_side, long_side, names=None, training=None):
        vocabulary = load_vocabulary(name)
        if names is not None:
            names = parse_names(names, where="--names")
            vocabulary.same_order(names, "--names")
        names = names or vocabulary.names
        super().__init__(found.pairs, names, crop, short_side, long_side)
        self.name, self.found, self.route = name, found, found.route
        self.groups, self.checksum = overlap(names, training), checksum(names, vocabulary.raw)

    def label(self, i):
        _, _, source = self.pairs[i]
        raw, table = self.found.read(source), self.found.lookup
        label = table[np.minimum(raw, len(table) - 1)]                                                # (H,W)
        wrong = raw[(label == FOREIGN) | (raw >= len(table))]
        if wrong.size:
            raise InputError(f"{source}: holds the value {wrong[0]}, which no label of {TITLES[self.name]} "
                             f"({self.route}) has; take the labels of this dataset, converted once or not at all")
        return label

    def read(self, i):
        image, label = super().read(i)
        return shrink(image, label) if self.found.shrink else (image, label)


def open_dataset(name, root, split="val", *, crop=640, short_side=640, long_side=2560, names=None, training=None):
    """The Published of a name of vocabulary.DATASETS under the folder `root`; split "val", or "train" of coco-stuff.

    `names` (a list, or text with commas) replaces the published names, class by class; `training` are the names that
    count as seen (default COCO-Stuff's).  Raises InputError when the dataset is not there, damaged or incomplete, or is
    another one; and when a file is read, for what is wrong in it.
    """
    return Published(name, find(name, Shelf(root, ZIPS), split), crop, short_side, long_side, names, training)


# ---- the dataset of a run ----
def test_set(config, data=None, ignore=255, images=None, names=None):
    """What eval.py scores a run on: the folder `data`, or (`images` of) the world's test scenes for a run of the world."""
    if data is not None:
        kind = layout(data) or Folder                         # which says what is missing, or takes `names` instead
        return kind(data, ignore=ignore, short_side=config.short_side, long_side=config.long_side, names=names)
    if config.preset != "world" or config.data:
        raise InputError("a run that was trained on a folder is scored on one: give --data DIR")
    return World("val", **({} if images is None else {"length": images}))


def opened(config, root, split):
    """The dataset in `root`: a folder of your own if `layout` knows it, else that split of COCO-Stuff.

    config: a PATConfig, for its sizes and its ignore value.  Raises InputError if it is neither.
    """
    sizes = dict(crop=config.short_side, short_side=config.short_side, long_side=config.long_side)
    if kind := layout(root):
        return kind(root, ignore=config.ignore, **sizes)
    try:
        return open_dataset("coco-stuff", root, split, **sizes)
    except NotFound as error:
        raise InputError(f"{error}; a folder of your own needs images/, labels/ and classes.txt") from error


def scored_on(config, scenes=500):
    """(dataset, where it is from in words) of a run's scores and pictures.

    `val_data` if it was given, else the images it was trained on, else the world's test scenes (`scenes` of them).
    Raises InputError for a run that says of none where they are, such as an imported one.
    """
    if config.val_data:
        return opened(config, config.val_data, "val"), config.val_data
    if config.data:
        return opened(config, config.data, "train"), f"training images of {config.data}"
    if config.preset == "world":
        return World("val", scenes), "the world's test scenes"
    raise InputError("the run does not say which images it is scored on: give --data DIR, or a picture: --image FILE")


# ---- what is there ----
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
    ids, of = np.flatnonzero(pixels[:-1]), f" of {published:,}" if published else ""
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
    shelf, broken = Shelf(root, ZIPS), 0
    for name, split in ((name, split) for name in COUNTS for split in COUNTS[name]):
        print(f"{name} {split}: ", end="", flush=True)
        try:
            dataset = Published(name, find(name, shelf, split), 640, 640, 2560)
            dataset.read(0)                            # the images are looked at by one
            print(describe(dataset, COUNTS[name][split], images, f"{name} {split}"))
            print(f"    {dataset.found.where} ({dataset.route}), names {dataset.checksum}")
        except NotFound as error:
            print(f"not there; it needs {error.missing}")
        except InputError as error:
            broken += 1
            print(f"UNUSABLE\n    {error}")
    if broken:
        raise InputError(f"{root}: {broken} of the datasets above cannot be used as they are; see what each line says")


def label_sheet(dataset, count=8, width=320):
    """`count` images spread over the dataset, each beside its label in colours, above a legend of the names seen."""
    font, rows, pixels = ImageFont.load_default(14), [], np.zeros(len(dataset.names), np.int64)
    for i in np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)):
        image, label = dataset.read(i)
        pixels += np.bincount(label[label != IGNORE], minlength=len(pixels))
        size = width, max(1, round(width * image.shape[0] / image.shape[1]))
        halves = (Image.fromarray(image).resize(size), Image.fromarray(colour_label(label)).resize(size, Image.NEAREST))
        rows.append(Image.fromarray(np.hstack(halves)))
    seen = [int(k) for k in np.argsort(-pixels, kind="stable") if pixels[k]]
    columns = 4 * width // 250
    lines = -(-(len(seen) + 1) // columns)
    sides = rows[:-(-len(rows) // 2)], rows[-(-len(rows) // 2):]
    height = max(sum(row.height + 4 for row in side) for side in sides)
    sheet = Image.new("RGB", (4 * width + 8, height + 20 * lines + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for x, side in zip((0, 2 * width + 8), sides):
        y = 0
        for row in side:
            sheet.paste(row, (x, y))
            y += row.height + 4
    legend = [(tuple(palette(k + 1)[k].tolist()), f"{k} {dataset.names[k]}"[:32]) for k in seen] + [((0, 0, 0), "void")]
    for k, (colour, text) in enumerate(legend):
        x, y = 4 + k % columns * 250, height + 4 + k // columns * 20
        draw.rectangle((x, y, x + 14, y + 14), fill=colour, outline="black")
        draw.text((x + 20, y - 2), text, fill="black", font=font)
    return sheet


USAGE = "python data.py check DIR [--images N], or: python data.py show DIR NAME [--out FILE]"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, usage=USAGE)
    parser.add_argument("command", nargs="?", choices=("check", "show"))
    parser.add_argument("root", nargs="?", metavar="DIR", help="what holds the datasets, or is one of your own")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(COUNTS)}")
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
        raise InputError(f"show {args.root}: say which, {', '.join(COUNTS)}; a folder of your own has a classes.txt")
    else:
        dataset = open_dataset(args.name, args.root, args.split, names=names)
    out = Path(args.out or f"{args.name or 'folder'}.png")
    write_files({out: label_sheet(dataset)})
    print(f"{out}: {min(8, len(dataset))} of {len(dataset):,} images, {dataset.route}, names {dataset.checksum}")


if __name__ == "__main__":
    run_cli(main)
