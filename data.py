"""Folders of your own: images, labels and the names of their classes.

A folder holds `images/*`, `labels/*` (class ids as grey values, paired by stem) and `classes.txt` (one name per line).

A dataset is anything with `names`, `train_names`, `groups` (class ids whose scores are averaged apart), `crop` (S),
`len()`, `data[i]` for testing and `data.draw(seed, n)` for training; `Folder` below is one, `World` another.

Tests: tests/test_data.py.  Read next: hsattn.py.
"""

from pathlib import Path

import numpy as np
import torch

from images import (AUGMENT, IGNORE, ORDER, InputError, augment, parse_names, read_image, read_label, resize_short,
                    rng_for, to_tensor)


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


def read_classes(path):
    """Class names of a classes.txt: line k names class k - 1.  InputError if missing, not text, blank or doubled."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write one name per line, in order of ids") from error
    return parse_names(lines, where=path, item="line")


class Folder:
    """Your own data: `root/images/*`, `root/labels/*` (index PNG or TIFF, paired by stem), `root/classes.txt`.

    `ignore` is the value in the label files that means unlabelled (255, or 65535 in 16-bit files); `names` replaces
    classes.txt.  Names and pairing are checked here, sizes and ids when a file is read; both raise InputError.
    """

    groups = {}

    def __init__(self, root, *, ignore=255, crop=640, short_side=640, long_side=2560, names=None):
        root = Path(root)
        images, labels = files_by_stem(root / "images"), files_by_stem(root / "labels")
        for have, lack, what in ((images, labels, "label"), (labels, images, "image")):
            lone = [path.name for stem, path in have.items() if stem not in lack]
            if lone:
                more = f" and {len(lone) - 3} more" if len(lone) > 3 else ""
                raise InputError(f"{root}: no {what} for {', '.join(lone[:3])}{more}; add it, or remove the file")
        self.pairs = [(images[stem], labels[stem]) for stem in sorted(images)]
        self.names = self.train_names = parse_names(names) if names is not None else read_classes(root / "classes.txt")
        if 0 <= ignore < len(self.names):
            raise InputError(f"{root}: ignore value {ignore} is the id of {self.names[ignore]!r} too; give another, "
                             "such as 65535")
        self.ignore, self.crop, self.short_side, self.long_side = ignore, crop, short_side, long_side

    def __len__(self):
        return len(self.pairs)

    def read(self, i):
        """Pair i as stored: image (H,W,3) uint8, label (H,W) int64 with IGNORE for unlabelled."""
        image_path, label_path = self.pairs[i]
        image, label = read_image(image_path), read_label(label_path)
        if image.shape[:2] != label.shape:
            (h, w), (h2, w2) = image.shape[:2], label.shape
            raise InputError(f"{label_path}: is {w2}x{h2}, but {image_path} is {w}x{h} (after EXIF orientation); "
                             "label the upright image at its own size")
        wrong = label[(label != self.ignore) & ((label < 0) | (label >= len(self.names)))]
        if wrong.size:
            raise InputError(f"{label_path}: has class id {wrong[0]}, but the {len(self.names)} names are ids 0 to "
                             f"{len(self.names) - 1}; name it, or make it the ignore value (now {self.ignore})")
        return image, np.where(label == self.ignore, IGNORE, label)

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
        return dict(image=to_tensor(small), label=torch.from_numpy(label), name=self.pairs[i][0].stem, original=image)
