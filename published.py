"""Six published datasets, read as they were published: where their files lie, and what their bytes mean.

Found by themselves under one folder DIR or in its folders one level down: the archives as downloaded, read without
unpacking; the folders they unpack to; or the folders that detectron2's users convert them to, ids from 0 inside.

    name        archives, read in place                                a label pixel holds     converted folder
    coco-stuff  {train,val}2017.zip, stuffthingmaps_trainval2017.zip   0..181 (0 person), 255  stuffthingmaps_detectron2
    voc20       VOCtrainval_11-May-2012.tar, SegmentationClassAug.zip  1..20, void 0 and 255   annotations_detectron2
    pc59        VOCtrainval_03-May-2010.tar, trainval_merged.json      59 of the 459           pcontext
    pc459       the same tar; trainval/*.mat, unpacked                 1..459, uint16          pcontext_full
    ade150      ADEChallengeData2016.zip                               1..150, void 0          annotations_detectron2
    ade847      the .zip that holds ADE20K_2021_17_01                  RGB: R // 10 * 256 + G  annotations_detectron2

Archives are read in place, see archives.py.  The one gzipped tar, trainval.tar.gz, has to be unpacked once; we say so.

Labels come as raw values, (H,W) int64, and never pass through 8 bits.  `Found.lookup` takes them to class ids, to
IGNORE where this dataset says void, and to FOREIGN where none of its labels can be.  ADE20K also comes with an index
pickle; the archive's own names tell the same, and a stranger's pickle can run anything, so it is left alone.

# paper: the splits, encodings and painting order of SAN's scores.
# differs: ADE-847's converters save the shrunk image as JPEG once more; we do not.  Effect on the score: not measured.

Tests: tests/test_published.py.  Read next: data.py.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import loadmat

from archives import Listing
from images import InputError, opened, read_label
from vocabulary import Vocabulary, load_vocabulary, pascal_context_val, read_classes

# H, W an image's height and width.  A "source" of bytes is a Path or a Member; a "stem" pairs an image with its label.


# ---- bytes to raw labels ----
def read_16_bit(source):
    """`read_label` of a file that must hold 16 bits a pixel; raises InputError where 255 may have swallowed ids."""
    with opened(source) as file:
        if not file.mode.startswith("I"):
            raise InputError(f"{source}: holds {file.mode} pixels of 8 bits, too few for its classes; convert it again "
                             "to 16-bit TIFF, or use the published labels")
    return read_label(source)


def read_mat(source):
    """Pascal Context's LabelMap, (H,W) int64 of 0..459.  Raises InputError unless it was stored as uint16."""
    try:
        with source.open("rb") as stream:
            labels = loadmat(stream, variable_names=["LabelMap"])["LabelMap"]
    except InputError:
        raise
    except Exception as error:                         # scipy raises whatever the broken bytes lead it to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{source}: holds no LabelMap ({reason}); take it from trainval.tar.gz again") from error
    if labels.dtype != np.uint16 or labels.ndim != 2:
        raise InputError(f"{source}: LabelMap is {labels.ndim}-D {labels.dtype}, not 2-D uint16 as published, so ids "
                         "may be lost; take it from trainval.tar.gz again")
    return labels.astype(np.int64)


def read_codes(source):
    """ADE20K's class index of every pixel, (H,W) int64, 0 unlabelled: R // 10 * 256 + G of its RGB file."""
    with opened(source) as file:
        if file.mode != "RGB":
            raise InputError(f"{source}: holds {file.mode} pixels, not ADE20K's RGB codes; take it from the "
                             "ADE20K_2021_17_01 archive")
        red, green, _ = np.moveaxis(np.asarray(file).astype(np.int64), -1, 0)            # (H,W) each; B: the instance
    if (red % 10).any():
        raise InputError(f"{source}: has a red value of {red[red % 10 > 0][0]}, and ADE20K's are multiples of 10; take "
                         "it from the ADE20K_2021_17_01 archive")
    return red // 10 * 256 + green


def runs(counts):
    """The run lengths of a COCO mask, from their list or from COCO's text.

    Text: 5 bits a character (its code minus 48, low bits first), the sixth says that more follow, the highest of the
    last five is the sign; from the fourth on, a number is the difference to the one before the last.
    Worked: "5" = 5; "R1" = 34-32 + 1*32 = 34; "O" = 31 -> -1.
    """
    if isinstance(counts, list):
        return counts
    numbers, value, shift = [], 0, 0
    for code in counts.encode():
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4          # the sign bit counts minus 2**shift, not plus half of it
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    return numbers


class Masks(NamedTuple):
    """The label of one image as trainval_merged.json holds it."""

    path: Path
    stem: str
    height: int
    width: int
    masks: list                        # (category id, RLE segmentation), in the order of the file

    def __str__(self):
        return f"{self.path}: image {self.stem}"


def paint(source):
    """The Masks' category ids as one label (H,W) int64: later masks cover earlier ones, 0 where there is none.

    Run lengths count down the columns, zeros first: [1, 2, 3] of a 2x3 mask is [[0, 1, 0], [1, 0, 0]].
    """
    label = np.zeros(source.width * source.height, np.int64)
    for category, segmentation in source.masks:
        try:
            lengths = runs(segmentation["counts"])
            if list(segmentation["size"]) != [source.height, source.width] or sum(lengths) != label.size:
                raise ValueError("another size")
            label[np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)] = category       # (W*H) bool
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{source}: a mask of category {category} is no run-length code of "
                             f"{source.width}x{source.height} pixels; download the file again") from error
    return label.reshape(source.width, source.height).T


def json_array(path, text, key):
    """The objects of the array `key` in a JSON text, one by one: as a whole, 590 MB of it would take many GB."""
    start, gap, decode = re.search(rf'"{key}"\s*:\s*\[', text), re.compile(r"[\s,]*"), json.JSONDecoder().raw_decode
    if start is None:
        raise InputError(f"{path}: has no array {key!r}, so it is not Pascal Context's; download trainval_merged.json")
    try:
        at = gap.match(text, start.end()).end()
        while text[at] != "]":
            item, at = decode(text, at)
            yield item
            at = gap.match(text, at).end()
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: array {key!r} breaks off ({error}); download trainval_merged.json again") from error


def merged_masks(path):
    """{stem: Masks} of the validation images in trainval_merged.json.  Raises InputError if it is something else."""
    try:
        text = path.read_text(encoding="utf-8")
        images = {i["image_id"]: Masks(path, Path(i["file_name"]).stem, i["height"], i["width"], [])
                  for i in json_array(path, text, "images") if i["phase"] == "val"}
        for item in json_array(path, text, "annos_segmentation"):
            if item["image_id"] in images:
                images[item["image_id"]].masks.append((item["category_id"], item["segmentation"]))
    except (OSError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: is not Pascal Context's ({reason}); download trainval_merged.json again") from error
    return {image.stem: image for image in images.values()}


def shrink(image, label, short=512):
    """ADE-847's benchmark size: a pair whose short side is above `short`, brought down to it; others as they are.

    image (H,W,3) uint8 bilinearly, without a filter, as OpenCV does; label (H,W): row i takes row floor(i * H / H').
    """
    h, w = label.shape
    if min(h, w) <= short:
        return image, label
    size = short if h <= w else round(h / w * short), short if w <= h else round(w / h * short)
    small = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), size, mode="bilinear")   # (1,3,H',W')
    small = small[0].permute(1, 2, 0).round().byte().contiguous().numpy()                                 # (H',W',3)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w)))
    return small, label[rows[:, None], columns]


# ---- which files make a dataset ----
class Form(NamedTuple):
    """One way in which a dataset can lie on a disk; places as in Shelf.find."""

    route: str                         # where the labels come from, for the score file
    images: tuple                      # places
    labels: tuple                      # places
    suffix: tuple                      # of the label files
    read: Callable = read_label        # label source -> raw (H,W) int64
    void: tuple | range | None = None  # raw values that mean void; None: a converted folder, ids from 0
    split: str = ""                    # which stems: "" all there are, "voc" those of val.txt, "context" the 5,104


class Found(NamedTuple):
    """A dataset that was found: what it takes to read it."""

    pairs: list                        # (stem, image source, label source), sorted by stem
    read: Callable                     # label source -> raw (H,W) int64
    lookup: np.ndarray                 # (n,) raw value -> class id, IGNORE or FOREIGN
    shrink: bool                       # ADE-847: see `shrink`
    route: str
    where: str                         # the places, in words


class NotFound(InputError):
    """No form of a dataset is there; `missing` says what to get, and where from."""

    def __init__(self, root, what, missing):
        super().__init__(f"{root}: {what} is not there; it needs {missing}")
        self.missing = missing


TITLES = {"coco-stuff": "COCO-Stuff-171", "voc20": "VOC-20", "pc59": "Pascal Context 59", "pc459": "Pascal Context 459",
          "ade150": "ADE20K-150", "ade847": "ADE20K-847"}
COUNTS = {"coco-stuff": {"train": 118287, "val": 5000}, "voc20": {"val": 1449}, "pc59": {"val": 5104},
          "pc459": {"val": 5104}, "ade150": {"val": 2000}, "ade847": {"val": 2000}}         # images, as published
VOC10, VOC12, VOC_AUG = "VOCtrainval_03-May-2010.tar", "VOCtrainval_11-May-2012.tar", "SegmentationClassAug.zip"
MAPS, ADE, ADE_FULL = "stuffthingmaps_trainval2017.zip", "ADEChallengeData2016", "ADE20K_2021_17_01"
ZIPS = ("train2017.zip", "val2017.zip", MAPS, VOC_AUG, f"{ADE}.zip")       # ADE_FULL's zip has a personal name
MERGED = "trainval_merged.json", "VOCdevkit/VOC2010/trainval_merged.json", "VOC2010/trainval_merged.json"
IMAGES = (".jpg", ".jpeg", ".JPG")
ORIGINS = {                            # of images, of labels: what to get, and where from
    "coco-stuff": ("{split}2017.zip (images.cocodataset.org/zips)",
                   f"{MAPS} (calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset)"),
    "voc20": (f"{VOC12} (the PASCAL VOC 2012 site)", f"{VOC_AUG}, or the SegmentationClass of {VOC12}"),
    "pc59": (f"{VOC10} (the PASCAL VOC 2010 site)",
             "trainval_merged.json (codalabuser.blob.core.windows.net/public), or trainval.tar.gz as for pc459"),
    "pc459": (f"{VOC10} (the PASCAL VOC 2010 site)", "trainval.tar.gz (roozbehm.info/pascal-context), unpacked"),
    "ade150": (f"{ADE}.zip (data.csail.mit.edu/places/ADEchallenge)",) * 2,
    "ade847": (f"the zip that holds {ADE_FULL} (a personal link, after registering at ade20k.csail.mit.edu)",) * 2}


def inside(archive, folder):
    """The two places of a folder that comes in an archive: in there, or where it lands when unpacked."""
    return (archive, folder), (None, folder)


def unpacked(*folders):
    """Places of plain folders."""
    return tuple((None, folder) for folder in folders)


def devkit(archive, folder):
    """Places of a folder of VOCdevkit: inside its tar, unpacked, and where DIR is VOCdevkit itself or a copy of it."""
    return inside(archive, f"VOCdevkit/{folder}") + unpacked(folder)


def forms(name, split):
    """The Forms of a dataset's split, the ones to prefer first: published before converted."""
    converted = "converted folder"
    if name == "coco-stuff":
        full = f"{split}2017"
        images = inside(f"{full}.zip", full) + unpacked(f"images/{full}")
        maps = ((MAPS, full), *unpacked(*(f"{folder}/{full}" for folder in
                                          ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations", "."))))
        return (Form("stuffthingmaps", images, maps, (".png",), void=(*range(182), 255)),     # 11 of them never occur
                Form(converted, images, unpacked(f"stuffthingmaps_detectron2/{full}"), (".png",)))
    if name == "voc20":
        images, plain = devkit(VOC12, "VOC2012/JPEGImages"), dict(suffix=(".png",), void=(0, 255), split="voc")
        augmented = inside(VOC_AUG, "SegmentationClassAug") + devkit(VOC_AUG, "VOC2012/SegmentationClassAug")
        return (Form("SegmentationClassAug", images, augmented, **plain),
                Form("SegmentationClass", images, devkit(VOC12, "VOC2012/SegmentationClass"), **plain),
                Form(converted, images, devkit(VOC12, "VOC2012/annotations_detectron2/val"), (".png",)))
    if name in ("pc59", "pc459"):
        images = devkit(VOC10, "VOC2010/JPEGImages")
        mats = dict(images=images, suffix=(".mat",), read=read_mat, split="context",
                    labels=inside("trainval.tar", "trainval") + devkit(VOC10, "VOC2010/trainval"))
        folder = {"pc59": "pcontext/val", "pc459": "pcontext_full/val"}[name]
        made = dict(images=unpacked(f"{folder}/image") + images,
                    labels=unpacked(f"{folder}/label") + devkit(VOC10, f"VOC2010/annotations_detectron2/{name}_val"))
        if name == "pc459":
            return (Form("LabelMap of the .mat files", void=(0,), **mats),
                    Form(converted, suffix=(".tif", ".tiff"), read=read_16_bit, **made))
        return (Form("route A, trainval_merged.json", images, (), (), paint, void=range(460)),
                Form("route B, the 459 labels through the id map", void=range(460), **mats),
                Form(converted, suffix=(".png",), **made))
    if name == "ade150":
        images, labels = (inside(f"{ADE}.zip", f"{ADE}/{kind}/validation") for kind in ("images", "annotations"))
        return (Form("annotations", images, labels, (".png",), void=(0,)),
                Form(converted, images, unpacked(f"{ADE}/annotations_detectron2/validation"), (".png",)))
    both = inside("*.zip", f"{ADE_FULL}/images/ADE/validation")
    return (Form("_seg.png codes, shrunk to 512", both, both, ("_seg.png",), read_codes, void=range(6656)),
            Form(converted, unpacked(f"{ADE_FULL}/images_detectron2/validation"),
                 unpacked(f"{ADE_FULL}/annotations_detectron2/validation"), (".tif", ".tiff"), read_16_bit))


def find_labels(shelf, form):
    """The Listing of a form's labels, or None."""
    if form.read is not paint:
        return shelf.find(form.labels, form.suffix)
    path = shelf.path(*MERGED)
    return path and Listing(path, merged_masks(path))


def nothing_found(shelf, name, split):
    """The InputError that says what is missing, or what lies there in its place."""
    form, missing, packed = forms(name, split)[0], [], shelf.path("trainval.tar.gz")
    if not shelf.find(form.images, IMAGES):
        missing.append(ORIGINS[name][0].format(split=split))
    if not (shelf.path(*MERGED) if form.read is paint else shelf.find(form.labels, form.suffix)):
        missing.append(ORIGINS[name][1])
        if name in ("pc59", "pc459") and packed:
            return InputError(f"{packed}: is a gzipped tar, which can only be read from its beginning; run: "
                              f"tar xzf {packed} -C {packed.parent}")
    others = [path for base in shelf.bases for path in base.glob("ADE20K_*") if not path.name.startswith(ADE_FULL)]
    others += [path for path, members in shelf.tables.items() for first in list(members)[:1]
               if first.startswith("ADE20K_") and not first.startswith(ADE_FULL)]
    if name == "ade847" and others:
        return InputError(f"{others[0]}: is another release of ADE20K, whose class indices differ; get {ADE_FULL}, by "
                          "the link that comes after registering at ade20k.csail.mit.edu")
    return NotFound(shelf.root, f"{TITLES[name]} {split}", " and ".join(dict.fromkeys(missing)))


def stems_of(shelf, form, images, labels):
    """The stems that make the split, sorted.  Raises InputError where one lacks its image or label."""
    stems = sorted(labels.files)
    if form.split == "context":
        stems = [stem for stem in pascal_context_val() if stem in labels.files]
    if form.split == "voc":
        lists = shelf.find(devkit(VOC12, "VOC2012/ImageSets/Segmentation"), (".txt",))
        if not lists or "val" not in lists.files:
            raise InputError(f"{images.place}: comes without ImageSets/Segmentation/val.txt; take it from {VOC12}")
        with lists.files["val"].open("rb") as file:
            stems = sorted(file.read().decode().split())
    if not stems:
        raise InputError(f"{labels.place}: holds no label of the validation images; unpack the whole of it")
    every = form.void is not None and not form.split and form.read is not paint          # a label for every image
    wanted = {*stems, *(images.files if every else ())}
    for listing, what in ((images, "image"), (labels, "label")):
        missing = sorted(wanted - set(listing.files))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(f"{listing.place}: lacks the {what} of {missing[0]}{more}; download or unpack it again")
    return stems


def find(name, shelf, split="val"):
    """The Found of one of vocabulary.DATASETS on a Shelf.

    Raises NotFound where it is not there, and InputError where what is there is broken, incomplete or something else.
    """
    vocabulary = load_vocabulary(name)
    if split not in COUNTS[name]:
        raise InputError(f"{name} has no split {split!r} here; there is {' and '.join(COUNTS[name])}")
    for form in forms(name, split):
        images = shelf.find(form.images, IMAGES)
        labels = images and find_labels(shelf, form)
        if images and labels:
            break
    else:
        raise nothing_found(shelf, name, split)
    stems = stems_of(shelf, form, images, labels)
    if form.void is None:
        for classes in (labels.place / "classes.txt", labels.place.parent / "classes.txt"):
            if classes.exists():
                vocabulary.same_order(read_classes(classes), classes)
        L = len(vocabulary.names)
        lookup = Vocabulary(vocabulary.names, range(L)).lookup(void=(65535 if L > 255 else 255,))
    else:
        lookup = vocabulary.lookup(form.void)
    where = dict.fromkeys(str(listing.place.relative_to(shelf.root)) for listing in (images, labels))
    return Found([(stem, images.files[stem], labels.files[stem]) for stem in stems], form.read, lookup,
                 form.read is read_codes, form.route, " + ".join(where))
