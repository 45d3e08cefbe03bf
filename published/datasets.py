"""Six published datasets, read as they were published: where their files lie, and which of them make a split.

Found by themselves under one folder DIR or in its folders one level down: the archives as downloaded, read without
unpacking; the folders they unpack to; or the folders that detectron2's users convert them to, ids from 0 inside.

    name        archives, read in place                                a label pixel holds     converted folder
    coco-stuff  {train,val}2017.zip, stuffthingmaps_trainval2017.zip   0..181 (0 person), 255  stuffthingmaps_detectron2
    voc20       VOCtrainval_11-May-2012.tar, SegmentationClassAug.zip  1..20, void 0 and 255   annotations_detectron2
    pc59        VOCtrainval_03-May-2010.tar, trainval_merged.json      59 of the 459           pcontext
    pc459       the same tar; trainval/*.mat, unpacked                 1..459, uint16          pcontext_full
    ade150      ADEChallengeData2016.zip                               1..150, void 0          annotations_detectron2
    ade847      the .zip that holds ADE20K_2021_17_01                  RGB: R // 10 * 256 + G  annotations_detectron2

One class a dataset, listed in `SETS`; it says what the dataset is called and in which `Form`s it lies on a disk, the
one to prefer first.  A seventh is one more class, its names in published/names/ and in vocabulary.DATASETS.

    open_dataset("voc20", DIR)   -> a VOC20, which is a folder.Pairs; or NotFound, which says what to get, and where from

Archives are read in place, see archives.py.  The one gzipped tar, trainval.tar.gz, has to be unpacked once; we say so.
A label comes as raw values (labels.py); `Found.lookup` takes them to class ids, to IGNORE where this dataset says void,
and to FOREIGN where none of its labels can be.  ADE20K also comes with an index pickle; the archive's own names tell
the same, and a stranger's pickle can run anything, so it is left alone.

# paper: the splits of SAN's scores.

Tests: tests/published/test_datasets.py.  Read next: browse.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cli import InputError, parse_names
from data import names_checksum, read_classes
from published.archives import Listing, Shelf
from published.folder import Pairs
from published.labels import merged_masks, paint, read_16_bit, read_codes, read_label, read_mat, shrink
from published.vocabulary import FOREIGN, Vocabulary, load_vocabulary, overlap, pascal_context_val

VOC10, VOC12, VOC_AUG = "VOCtrainval_03-May-2010.tar", "VOCtrainval_11-May-2012.tar", "SegmentationClassAug.zip"
MAPS, ADE, ADE_FULL = "stuffthingmaps_trainval2017.zip", "ADEChallengeData2016", "ADE20K_2021_17_01"
MERGED = "trainval_merged.json", "VOCdevkit/VOC2010/trainval_merged.json", "VOC2010/trainval_merged.json"
IMAGES = (".jpg", ".jpeg", ".JPG")


class NotFound(InputError):
    """No form of a dataset is there; `missing` says what to get, and where from."""

    def __init__(self, root, what, missing):
        super().__init__(f"{root}: {what} is not there; it needs {missing}")
        self.missing = missing


# ---- places, as Shelf.find takes them: (archive, folder inside it), or (None, folder) ----
def inside(archive, folder):
    """The two places of a folder that comes in an archive: in there, or where it lands when unpacked."""
    return (archive, folder), (None, folder)


def unpacked(*folders):
    """Places of plain folders."""
    return tuple((None, folder) for folder in folders)


def devkit(archive, folder):
    """Places of a folder of VOCdevkit: inside its tar, unpacked, and where DIR is VOCdevkit itself or a copy of it."""
    return inside(archive, f"VOCdevkit/{folder}") + unpacked(folder)


# ---- which stems make a split, of the images and labels that were found ----
def every_image(shelf, images, labels):
    """All: published labels come with one for every image."""
    return sorted({*labels.files, *images.files})


def every_label(shelf, images, labels):
    """Those with a label; there may be images of other splits among them."""
    return sorted(labels.files)


def context_val(shelf, images, labels):
    """Of Pascal Context's 5,104 validation images those with a label."""
    return [stem for stem in pascal_context_val() if stem in labels.files]


def voc_val(shelf, images, labels):
    """Those of VOC's own list, whether or not they have a label."""
    lists = shelf.find(devkit(VOC12, "VOC2012/ImageSets/Segmentation"), (".txt",))
    if not lists or "val" not in lists.files:
        raise InputError(f"{images.place}: comes without ImageSets/Segmentation/val.txt; take it from {VOC12}")
    with lists.files["val"].open("rb") as file:
        return sorted(file.read().decode().split())


# ---- how a dataset lies on a disk ----
@dataclass(frozen=True)
class Form:
    """One way in which a split can lie on a disk."""

    route: str                         # where the labels come from, for the score file
    images: tuple                      # places
    labels: tuple                      # places
    suffix: tuple                      # of the label files
    void: tuple | range                # raw values that mean void
    read: Callable = read_label        # label source -> raw (H,W) int64
    stems: Callable = every_image      # (shelf, images, labels) -> the stems of the split, sorted

    def find_labels(self, shelf):
        """Their Listing, or None."""
        return shelf.find(self.labels, self.suffix)

    def has_labels(self, shelf):
        return self.find_labels(shelf) is not None

    def lookup(self, vocabulary, place):
        """Table (n,) from raw value to class id, IGNORE or FOREIGN, of labels found at `place`."""
        return vocabulary.lookup(self.void)


class MaskForm(Form):
    """All labels in one JSON file, as masks to be painted one over the other."""

    def find_labels(self, shelf):
        path = shelf.path(*MERGED)
        return path and Listing(path, merged_masks(path))

    def has_labels(self, shelf):
        return shelf.path(*MERGED) is not None                   # without reading 590 MB


class Converted(Form):
    """A folder as detectron2's users make it: a class id a pixel, void 255, or 65535 where 255 is a class."""

    def __init__(self, images, labels, suffix=(".png",), read=read_label):
        super().__init__("converted folder", images, labels, suffix, (), read, every_label)

    def lookup(self, vocabulary, place):
        for classes in (place / "classes.txt", place.parent / "classes.txt"):
            if classes.exists():                                 # whoever converted them says in which order
                vocabulary.same_order(read_classes(classes), classes)
        L = len(vocabulary.names)
        void = 255 if L <= 255 else 65535
        return Vocabulary(vocabulary.names, range(L)).lookup(void=(void,))


class Found(NamedTuple):
    """A split that was found: what it takes to read it."""

    pairs: list                        # (stem, image source, label source), sorted by stem
    read: Callable                     # label source -> raw (H,W) int64
    lookup: np.ndarray                 # (n,) raw value -> class id, IGNORE or FOREIGN
    route: str
    where: str                         # the places, in words


# ---- the six, see data.py for what a dataset is ----
class Published(Pairs):
    """One split of a published dataset; `groups` parts its names into those seen in training and the others.

    `found`: where and how, see `find`; `names` replaces its list, class by class; `training`: see overlap.
    Sub-classes say what the dataset is.  `images_from` and `labels_from`: what to get, and where from.
    """

    name = title = images_from = labels_from = ""
    counts = {}                        # {split: how many images were published}

    @classmethod
    def forms(cls, split):
        """Its Forms, the ones to prefer first: published before converted."""
        raise NotImplementedError

    @classmethod
    def instead(cls, shelf, labels):
        """In a sentence, what lies there in the dataset's place, or None; `labels`: whether its labels are there."""

    def __init__(self, found, crop, short_side, long_side, names=None, training=None):
        vocabulary = load_vocabulary(self.name)
        if names is not None:
            names = parse_names(names, where="--names")
            vocabulary.same_order(names, "--names")
        names = names or vocabulary.names
        super().__init__(found.pairs, names, crop, short_side, long_side)
        self.found, self.route = found, found.route
        self.groups, self.checksum = overlap(names, training), names_checksum(names, vocabulary.raw)

    def label(self, i):
        _, _, source = self.pairs[i]
        raw, table = self.found.read(source), self.found.lookup
        label = table[np.minimum(raw, len(table) - 1)]                                                # (H,W)
        wrong = raw[(label == FOREIGN) | (raw >= len(table))]
        if wrong.size:
            raise InputError(f"{source}: holds the value {wrong[0]}, which no label of {self.title} ({self.route}) "
                             "has; take the labels of this dataset, converted once or not at all")
        return label


class COCOStuff(Published):
    name, title, counts = "coco-stuff", "COCO-Stuff-171", {"train": 118287, "val": 5000}
    images_from = "{split}2017.zip (images.cocodataset.org/zips)"
    labels_from = f"{MAPS} (calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset)"

    @classmethod
    def forms(cls, split):
        full = f"{split}2017"
        images = inside(f"{full}.zip", full) + unpacked(f"images/{full}")
        folders = "stuffthingmaps", "stuffthingmaps_trainval2017", "annotations", "."
        maps = ((MAPS, full), *unpacked(*(f"{folder}/{full}" for folder in folders)))
        return (Form("stuffthingmaps", images, maps, (".png",), void=(*range(182), 255)),     # 11 of them never occur
                Converted(images, unpacked(f"stuffthingmaps_detectron2/{full}")))


class VOC20(Published):
    name, title, counts = "voc20", "VOC-20", {"val": 1449}
    images_from = f"{VOC12} (the PASCAL VOC 2012 site)"
    labels_from = f"{VOC_AUG}, or the SegmentationClass of {VOC12}"

    @classmethod
    def forms(cls, split):
        images = devkit(VOC12, "VOC2012/JPEGImages")
        augmented = inside(VOC_AUG, "SegmentationClassAug") + devkit(VOC_AUG, "VOC2012/SegmentationClassAug")
        plain = dict(suffix=(".png",), void=(0, 255), stems=voc_val)
        return (Form("SegmentationClassAug", images, augmented, **plain),
                Form("SegmentationClass", images, devkit(VOC12, "VOC2012/SegmentationClass"), **plain),
                Converted(images, devkit(VOC12, "VOC2012/annotations_detectron2/val")))


class PascalContext(Published):
    """What its two lists of classes share: the photos, and the .mat files, whose archive cannot be read in place."""

    counts = {"val": 5104}
    images_from = f"{VOC10} (the PASCAL VOC 2010 site)"
    images = devkit(VOC10, "VOC2010/JPEGImages")
    mats = dict(images=images, labels=inside("trainval.tar", "trainval") + devkit(VOC10, "VOC2010/trainval"),
                suffix=(".mat",), read=read_mat, stems=context_val)

    @classmethod
    def converted(cls, folder, **how):
        labels = unpacked(f"{folder}/label") + devkit(VOC10, f"VOC2010/annotations_detectron2/{cls.name}_val")
        return Converted(unpacked(f"{folder}/image") + cls.images, labels, **how)

    @classmethod
    def instead(cls, shelf, labels):
        packed = shelf.path("trainval.tar.gz")
        if packed and not labels:
            return (f"{packed}: is a gzipped tar, which can only be read from its beginning; run: "
                    f"tar xzf {packed} -C {packed.parent}")


class PascalContext59(PascalContext):
    name, title = "pc59", "Pascal Context 59"
    labels_from = "trainval_merged.json (codalabuser.blob.core.windows.net/public), or trainval.tar.gz as for pc459"

    @classmethod
    def forms(cls, split):
        return (MaskForm("route A, trainval_merged.json", cls.images, (), (), range(460), paint, every_label),
                Form("route B, the 459 labels through the id map", void=range(460), **cls.mats),
                cls.converted("pcontext/val"))


class PascalContext459(PascalContext):
    name, title = "pc459", "Pascal Context 459"
    labels_from = "trainval.tar.gz (roozbehm.info/pascal-context), unpacked"

    @classmethod
    def forms(cls, split):
        return (Form("LabelMap of the .mat files", void=(0,), **cls.mats),
                cls.converted("pcontext_full/val", suffix=(".tif", ".tiff"), read=read_16_bit))


class ADE150(Published):
    name, title, counts = "ade150", "ADE20K-150", {"val": 2000}
    images_from = labels_from = f"{ADE}.zip (data.csail.mit.edu/places/ADEchallenge)"

    @classmethod
    def forms(cls, split):
        images, labels = (inside(f"{ADE}.zip", f"{ADE}/{kind}/validation") for kind in ("images", "annotations"))
        return (Form("annotations", images, labels, (".png",), void=(0,)),
                Converted(images, unpacked(f"{ADE}/annotations_detectron2/validation")))


class ADE847(Published):
    name, title, counts = "ade847", "ADE20K-847", {"val": 2000}
    images_from = labels_from = (f"the zip that holds {ADE_FULL} (a personal link, after registering at "
                                 "ade20k.csail.mit.edu)")

    @classmethod
    def forms(cls, split):
        both = inside("*.zip", f"{ADE_FULL}/images/ADE/validation")                       # its zip has a personal name
        made = (unpacked(f"{ADE_FULL}/{kind}_detectron2/validation") for kind in ("images", "annotations"))
        return (Form("_seg.png codes, shrunk to 512", both, both, ("_seg.png",), range(6656), read_codes),
                Converted(*made, suffix=(".tif", ".tiff"), read=read_16_bit))

    @classmethod
    def instead(cls, shelf, labels):
        others = [path for base in shelf.bases for path in base.glob("ADE20K_*") if not path.name.startswith(ADE_FULL)]
        for archive, members in shelf.tables.items():
            first = next(iter(members), "")
            if first.startswith("ADE20K_") and not first.startswith(ADE_FULL):
                others.append(archive)
        if others:
            return (f"{others[0]}: is another release of ADE20K, whose class indices differ; get {ADE_FULL}, by the "
                    "link that comes after registering at ade20k.csail.mit.edu")

    def read(self, i):
        image, label = super().read(i)
        return shrink(image, label) if self.found.read is read_codes else (image, label)     # converted: shrunk already


SETS = {kind.name: kind for kind in (COCOStuff, VOC20, PascalContext59, PascalContext459, ADE150, ADE847)}


# ---- finding one ----
def open_shelf(root):
    """The Shelf at `root`, where the zip with a personal name is not looked for among those whose names we know."""
    known = set()
    for kind in SETS.values():
        for split in kind.counts:
            for form in kind.forms(split):
                known.update(archive for archive, _ in form.images + form.labels if archive)
    return Shelf(root, known)


def nothing_found(kind, shelf, split):
    """The InputError that says what is missing, or what lies there in its place."""
    form = kind.forms(split)[0]
    images, labels = shelf.find(form.images, IMAGES), form.has_labels(shelf)
    if other := kind.instead(shelf, labels):
        return InputError(other)
    missing = [] if images else [kind.images_from.format(split=split)]
    if not labels and kind.labels_from not in missing:
        missing.append(kind.labels_from)
    return NotFound(shelf.root, f"{kind.title} {split}", " and ".join(missing))


def find(name, shelf, split="val"):
    """The Found of one of SETS on a Shelf.

    Raises NotFound where it is not there, and InputError where what is there is broken, incomplete or something else.
    """
    vocabulary = load_vocabulary(name)
    kind = SETS[name]
    if split not in kind.counts:
        raise InputError(f"{name} has no split {split!r} here; there is {' and '.join(kind.counts)}")
    for form in kind.forms(split):
        images = shelf.find(form.images, IMAGES)
        labels = images and form.find_labels(shelf)
        if images and labels:
            break
    else:
        raise nothing_found(kind, shelf, split)
    stems = form.stems(shelf, images, labels)
    if not stems:
        raise InputError(f"{labels.place}: holds no label of the validation images; unpack the whole of it")
    for listing, what in ((images, "image"), (labels, "label")):
        missing = [stem for stem in stems if stem not in listing.files]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(f"{listing.place}: lacks the {what} of {missing[0]}{more}; download or unpack it again")
    pairs = [(stem, images.files[stem], labels.files[stem]) for stem in stems]
    places = dict.fromkeys(str(listing.place.relative_to(shelf.root)) for listing in (images, labels))
    return Found(pairs, form.read, form.lookup(vocabulary, labels.place), form.route, " + ".join(places))


def open_dataset(name, root, split="val", *, crop=640, short_side=640, long_side=2560, names=None, training=None):
    """The Published of a name of SETS under the folder `root`; split "val", or "train" of coco-stuff.

    `names` (a list, or text with commas) replaces the published names, class by class; `training` are the names that
    count as seen (default COCO-Stuff's).  Raises InputError when the dataset is not there, damaged or incomplete, or is
    another one; and when a file is read, for what is wrong in it.
    """
    found = find(name, open_shelf(root), split)
    return SETS[name](found, crop, short_side, long_side, names, training)
