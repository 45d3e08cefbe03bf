"""Datasets of image and label files: what all of them share, and a folder of your own.

    DIR/images/*  any pictures    DIR/labels/*  class ids as grey values, paired by stem    DIR/classes.txt  line k: id k-1

Checked before training starts: names and pairs here, sizes and ids when a file is read.  `layout` is the one place that
knows which class reads a folder: the place for a new one (EXERCISES.md, 6).

# ours: all of it.

Tests: tests/published/test_folder.py, and tests/test_data.py as for every dataset.  Read next: vocabulary.py.
"""

from pathlib import Path

import torch

from cli import InputError, parse_names
from data import AUGMENT, IGNORE, ORDER, names_checksum, read_classes, read_image, resize_short, rng_for, to_tensor
from published.augment import augment
from published.labels import read_label


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
        labels = [str(label) for _, _, label in self.pairs]
        return names_checksum([f"{self.route} {self.short_side} {self.long_side}", *labels])

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


def files_by_stem(folder):
    """{stem: path} of the files in `folder`, sorted; InputError if it is missing, empty, nested or has a stem twice."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a dataset is a folder with images/, labels/ and classes.txt")
    paths = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):                             # .DS_Store, .gitignore
            continue
        if path.is_dir():
            raise InputError(f"{path}: is a folder; put the files directly into {folder}")
        if path.stem in paths:
            raise InputError(f"{path}: has the stem of {paths[path.stem].name} too; stems pair the files, rename one")
        paths[path.stem] = path
    if not paths:
        raise InputError(f"{folder}: holds no files; put the dataset's {folder.name} there")
    return paths


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
        pairs = [(stem, images[stem], labels[stem]) for stem in sorted(images)]
        super().__init__(pairs, names, crop, short_side, long_side)
        self.ignore, self.checksum = ignore, names_checksum(names)

    def label(self, i):
        _, _, path = self.pairs[i]
        label = read_label(path)
        wrong = label[(label != self.ignore) & ((label < 0) | (label >= len(self.names)))]
        if wrong.size:
            raise InputError(f"{path}: has class id {wrong[0]}, but the {len(self.names)} names are ids 0 to "
                             f"{len(self.names) - 1}; name it, or make it the ignore value (now {self.ignore})")
        label[label == self.ignore] = IGNORE
        return label


def layout(root):
    """The class that reads a folder of your own, told by what lies in it; None if no class here does.

    Every such class is called as Folder is.  Training, scoring, `check` and `show` all ask here: a new one goes here.
    """
    return Folder if (Path(root) / "classes.txt").exists() else None
