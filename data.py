"""What a sample is: a photo and its labels as arrays, and what a dataset owes.

    image (H,W,3) uint8 RGB        label (H,W) int64, 0..L-1, or IGNORE = -1 where nobody says what it is
    a photo -> read_image -> resize_short -> to_tensor -> (3,h,w) float32, as CLIP wants it
    in training files go through SAN's augmentation: published/augment.py

A dataset is anything with `names`, `train_names`, `groups` (class ids whose scores are averaged apart), `crop` (S),
`checksum` (of the names and of what labels hold), `route` (where labels come from), `key` (which images at which size),
`len()`, `data[i]` for testing and `data.draw(seed, n)` for training: the built-in scenes (world/scenes.py), a folder of
your own, which is the place to see how (published/folder.py), the published sets (published/datasets.py).

    a 480x640 photo: data[i]     image (3,640,853) float, label (480,640) int64, whose size the answer is scored at
                     data.draw   image (3,640,640) float, label (640,640) int64: a window of it, PADDING where padded

Every draw is keyed: `rng_for(seed, word, n)` is the same generator for the same key, whoever asks for it and on however
many processes.  So there is no sampler and no shuffling state to save: the step number says it all.  Class i has one
colour everywhere.  Label files: published/labels.py.

Tests: tests/test_data.py.  Read next: hsattn.py.
"""

import colorsys
import hashlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from cli import MOST_NAMES, InputError, parse_names

IGNORE = -1                                            # ours: one value for every dataset, below every class id
PADDING = -2                                           # in training only: not even a pixel; a model sees IGNORE there
MEAN = (0.48145466, 0.4578275, 0.40821073)             # CLIP's, RGB, of values in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
MOST_PIXELS = 10**8                    # of a picture or a label: what a header claims is asked before memory is taken
Image.MAX_IMAGE_PIXELS = None          # PIL's own bound is a warning first: `opened` holds to the one above instead
TRAIN, VAL, ORDER, AUGMENT = range(4)      # the middle word of a key (seed, word, n): no two uses share a generator


def rng_for(*key):
    """A generator that depends on nothing but the integers of `key`, such as (seed, step, image), each below 2**32."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def palette(n):
    """Colours (n,3) uint8 of classes 0..n-1: class i has the same colour in every picture, whatever n is."""
    rows = []
    for i in range(n):
        hue = 0.618034 * i % 1                                    # golden ratio: neighbours in i are far apart in hue
        saturation, value = (0.85, 0.5, 0.7)[i % 3], (1.0, 0.85, 0.6)[i // 3 % 3]
        rows.append(colorsys.hsv_to_rgb(hue, saturation, value))
    return np.round(255 * np.array(rows).reshape(n, 3)).astype(np.uint8)


def colour_label(label):
    """Label (H,W) -> picture (H,W,3) uint8 in `palette`'s colours; ignored pixels are black."""
    label = np.asarray(label)
    return np.vstack([palette(label.max() + 1), np.zeros((1, 3), np.uint8)])[label]    # IGNORE = -1 takes the last row


# ---- names ----
def names_checksum(names, raw=None):
    """16 hex digits of a list of names and of what label files hold for each (`raw`, default 0, 1, ...), in order."""
    raw = range(len(names)) if raw is None else raw
    text = "".join(f"{value}\t{name}\n" for value, name in zip(raw, names, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_classes(path):
    """Class names of a classes.txt: line k names class k - 1.  InputError if missing, not text, blank or doubled."""
    try:
        if path.stat().st_size > 100 * MOST_NAMES:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes are no list of at most {MOST_NAMES:,} names (cli.MOST_NAMES)")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write one name per line, in order of ids") from error
    return parse_names(lines, where=path, item="line")


# ---- files to arrays, arrays to tensors ----
def to_tensor(image):
    """Image (H,W,3) uint8 RGB -> (3,H,W) float32 as CLIP wants it: (value / 255 - MEAN) / STD, about -1.8..2.2."""
    tensor = np.empty((3, *image.shape[:2]), np.float32)
    for channel, pixels, mean, std in zip(tensor, np.moveaxis(image, 2, 0), MEAN, STD):
        np.divide(pixels, 255, out=channel, dtype=np.float32)
        channel -= mean                                           # in place: memory costs more than arithmetic here
        channel /= std
    return torch.from_numpy(tensor)


def to_unit(tensor):
    """The inverse of `to_tensor`: normalised (...,3,H,W) -> the same shape with values in 0..1 (to float rounding)."""
    return tensor * tensor.new_tensor(STD).view(3, 1, 1) + tensor.new_tensor(MEAN).view(3, 1, 1)


def bounded(path, width, height):
    """Raises InputError for a picture at `path` of more than MOST_PIXELS."""
    if width * height > MOST_PIXELS:
        raise InputError(f"{path}: says it has {width}x{height} pixels, and a picture may have {MOST_PIXELS / 1e6:.0f} "
                         "megapixels (data.MOST_PIXELS); shrink it")


@contextmanager
def opened(path):
    """The PIL image at `path`; inside this block, whatever PIL says about the file becomes an InputError.

    `path`: str, Path, or anything else with an open(mode) that prints as its place, such as a file inside an archive.
    """
    try:
        source = Path(path) if isinstance(path, str) else path
        # Through a stream: Pillow (13.0) maps a TIFF that it is given by name, and scrambles it if it is to be rotated.
        with source.open("rb") as stream, Image.open(stream) as file:
            bounded(path, *file.size)
            yield file
    except InputError:
        raise
    except Exception as error:             # decoders raise OSError, SyntaxError, ValueError, EOFError, ... on bad bytes
        why = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        why = "no image format known to PIL" if isinstance(error, UnidentifiedImageError) else why
        raise InputError(f"{path}: cannot be read ({why}); is it there, whole, and an image?") from error


def read_image(path):
    """The picture at `path` as (H,W,3) uint8 RGB, upright (EXIF orientation applied).

    Transparent pixels are laid on white; 16-bit grey is scaled to 8 bits; everything else goes the way PIL converts it.
    Raises InputError for a missing, broken or truncated file, and for float or over 16-bit pixels.
    """
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise InputError(f"{path}: has float pixels, whose range nobody knows; save it as an 8-bit PNG or JPEG")
        if image.mode.startswith("I"):                    # PIL's own conversion clips every value above 255 to white
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise InputError(f"{path}: has grey values outside 0..65535; save it as an 8-bit PNG or JPEG")
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))             # 65535 = 255 * 257 is white
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))       # converting copies even RGB


# ---- resizing ----
def short_size(h, w, short, long):
    """(h,w) of a picture with short side `short`, unless its long side would pass `long`; rounded half up."""
    # Multiplied in detectron2's order, so that 53x1024 rounds to 132 high as there: 132.5 is not reached by a hair.
    h, w = (short, short / h * w) if h < w else (short / w * h, short)
    scale = min(1, long / max(h, w))
    return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))


def resized(image, h, w, box=None):
    """Image (H,W,3) uint8, bilinear -> (h,w,3); of its part `box` alone, if given: left, top, right, bottom."""
    return np.array(Image.fromarray(image).resize((w, h), Image.BILINEAR, box))           # PIL wants (W, H)


def resize_short(image, short, long):
    """Image (H,W,3) uint8, bilinear to `short_size`."""
    return resized(image, *short_size(*image.shape[:2], short, long))
