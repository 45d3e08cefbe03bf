"""Other people's bytes -> raw labels: the encodings that published datasets use for "this pixel is class k".

    read_label(path)      class ids as a file holds them, whole and unaltered, or an error
    read_16_bit(source)   a converted TIFF or PNG that must hold 16 bits, or ids above 255 may be lost
    read_mat(source)      Pascal Context's LabelMap, 0..459 in uint16
    read_codes(source)    ADE20K's RGB, R // 10 * 256 + G: (110, 162, any) -> 11 * 256 + 162 = 2978, which is wall
    merged_masks(path)    {stem: Masks} of trainval_merged.json;  paint(Masks) lays the masks of one image on each other

Each gives (H,W) int64 exactly as published, and no id passes through 8 bits; what the values mean stands in the tables
of published/names/.  A "source" is a Path or a Member of an archive.  What is not what it should be is an InputError.

# paper: the encodings and the painting order of SAN's scores.
# differs: ADE-847's converters save the shrunk image as JPEG once more; we do not.  Effect on the score: not measured.

Tests: tests/published/test_labels.py.  Read next: datasets.py.
"""

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import loadmat, whosmat

from cli import InputError
from data import bounded, opened

# H, W an image's height and width.


# ---- one file, one label ----
@contextmanager
def whole(path):
    """`opened`, and a PNG's checksums are right: PIL does not look at those of the pixels where it reads them."""
    with opened(path) as file:
        file.verify()
    with opened(path) as file:
        yield file


def read_label(path):
    """The class ids at `path` as (H,W) int64, exactly as stored: grey values, or palette indices; 8 or 16 bits.

    Raises InputError if the file is missing, broken or truncated, or holds anything but whole, unaltered indices.
    """
    with whole(path) as file:
        if len(file.getbands()) > 1:
            raise InputError(f"{path}: is colour-coded ({file.mode}), not class ids; save one grey value per class")
        if file.format not in ("PNG", "TIFF") or file.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise InputError(f"{path}: {file.format} {file.mode} pixels are no exact ids; save it as 8- or 16-bit PNG")
        stored = file.tile[0].args                        # how the pixels lie in the file, before PIL touches them
        stored = stored if isinstance(stored, str) else stored[0]
        if file.mode in ("1", "L") and stored not in ("1", "1;R", "L", "L;R"):    # PIL stretches 4-bit grey to 0..255
            raise InputError(f"{path}: has grey values stored as {stored}, which PIL rescales; save it as an 8-bit PNG")
        return np.array(file).astype(np.int64)


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
            for name, shape, _ in whosmat(stream):            # what its headers say, before anything is unpacked
                bounded(f"{source} ({name})", math.prod(shape), 1)
            stream.seek(0)
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
    with whole(source) as file:
        if file.mode != "RGB":
            raise InputError(f"{source}: holds {file.mode} pixels, not ADE20K's RGB codes; take it from the "
                             "ADE20K_2021_17_01 archive")
        red, green, _ = np.moveaxis(np.asarray(file).astype(np.int64), -1, 0)            # (H,W) each; B: the instance
    if (red % 10).any():
        raise InputError(f"{source}: has a red value of {red[red % 10 > 0][0]}, and ADE20K's are multiples of 10; take "
                         "it from the ADE20K_2021_17_01 archive")
    return red // 10 * 256 + green


# ---- trainval_merged.json: every mask of every image in one file ----
def run_lengths(counts):
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
        if bits & 32:                                  # the number goes on in the next character
            continue
        value -= (bits & 16) << shift - 4              # the sign bit counts minus 2**shift, not plus half of it
        if len(numbers) > 2:
            value += numbers[-2]
        numbers.append(value)
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
    bounded(source, source.width, source.height)
    label = np.zeros(source.width * source.height, np.int64)                             # column after column
    for category, segmentation in source.masks:
        try:
            lengths = run_lengths(segmentation["counts"])
            if list(segmentation["size"]) != [source.height, source.width] or sum(lengths) != label.size:
                raise ValueError("another size")
            odd = np.arange(len(lengths)) % 2 == 1                                       # runs of ones: 2nd, 4th, ...
            label[np.repeat(odd, lengths)] = category
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise InputError(f"{source}: a mask of category {category} is no run-length code of "
                             f"{source.width}x{source.height} pixels; download the file again") from error
    return label.reshape(source.width, source.height).T


def json_array(path, text, key):
    """The objects of the array `key` in a JSON text, one by one: as a whole, 590 MB of it would take many GB."""
    start = re.search(rf'"{key}"\s*:\s*\[', text)
    gap, decode = re.compile(r"[\s,]*"), json.JSONDecoder().raw_decode
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
        images = {}
        for item in json_array(path, text, "images"):
            if item["phase"] == "val":
                if not all(type(item[side]) is int and 0 < item[side] < 2**16 for side in ("height", "width")):
                    raise TypeError(f"an image of {item['width']}x{item['height']} pixels")
                images[item["image_id"]] = Masks(path, Path(item["file_name"]).stem, item["height"], item["width"], [])
        for item in json_array(path, text, "annos_segmentation"):
            if item["image_id"] in images:
                images[item["image_id"]].masks.append((item["category_id"], item["segmentation"]))
    except (OSError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: is not Pascal Context's ({reason}); download trainval_merged.json again") from error
    return {image.stem: image for image in images.values()}


# ---- the size ADE-847 is scored at ----
def shrink(image, label, short=512):
    """ADE-847's benchmark size: a pair whose short side is above `short`, brought down to it; others as they are.

    image (H,W,3) uint8 bilinearly, without a filter, as OpenCV does; label (H,W): row i takes row floor(i * H / H').
    """
    h, w = label.shape
    if min(h, w) <= short:
        return image, label
    new_h = short if h <= w else round(h / w * short)
    new_w = short if w <= h else round(w / h * short)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float()                                       # (1,3,H,W)
    small = F.interpolate(batch, (new_h, new_w), mode="bilinear")[0]                                      # (3,H',W')
    small = small.permute(1, 2, 0).round().byte().contiguous().numpy()                                    # (H',W',3)
    rows, columns = np.arange(new_h) * h // new_h, np.arange(new_w) * w // new_w
    return small, label[rows[:, None], columns]
