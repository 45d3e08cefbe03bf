"""Images and labels: the built-in world, and folders of your own.

The world is a generator of 64x64 scenes with exact labels: one to four objects (8 colours x 8 shapes x 4 textures) on
one or two of six textured stuffs.  Its classes are the 64 names "colour shape" and the six stuffs.  A folder of your
own is `images/*`, `labels/*` (class ids as grey values) and `classes.txt` (one name per line).

    image (H,W,3) uint8 RGB        label (H,W) int64, 0..L-1, or IGNORE = -1 where nobody says what it is
    the world: L = 70, 0..63 objects, 64..69 stuffs, every pixel labelled

Open vocabulary in miniature: 43 of the 64 object names (`SEEN`) occur in training scenes; the other 21 (`UNSEEN`) occur
only in test scenes.  Every colour and every shape is among the seen, so "unseen" here means an unseen *combination*.

Every draw is keyed: sample n of seed s is always the same picture, whoever asks for it and on however many processes.
So there is no sampler and no shuffling state to save: the step number says it all.

A dataset is anything with `names`, `train_names`, `groups` (class ids whose scores are averaged apart), `crop` (S),
`len()`, `data[i]` for testing and `data.draw(seed, n)` for training; `World` and `Folder` below are two.

Demo: `python data.py` draws a contact sheet of the world.  Tests: tests/test_data.py.  Read next: hsattn.py.
"""

import colorsys
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# H, W an image's height and width; S the side of a training crop; L classes.

IGNORE = -1                                            # ours: one value for every dataset, below every class id
MEAN = (0.48145466, 0.4578275, 0.40821073)             # CLIP's, RGB, of values in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
TEMPLATES = (                                          # SAN's 14 sentences (`vild`), punctuation as published
    "a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene", "There is the {} in the scene",
    "a photo of a {} in the scene", "a photo of a small {}.", "a photo of a medium {}.", "a photo of a large {}.",
    "This is a photo of a small {}.", "This is a photo of a medium {}.", "This is a photo of a large {}.",
    "There is a small {} in the scene.", "There is a medium {} in the scene.", "There is a large {} in the scene.")

# ours: the whole world is our invention; the paper trains on COCO-Stuff.
COLOURS = {"red": (212, 38, 36), "orange": (244, 136, 28), "yellow": (246, 224, 52), "green": (36, 168, 60),
           "blue": (38, 70, 214), "purple": (128, 44, 168), "pink": (250, 138, 194), "white": (246, 246, 246)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
TEXTURES = ("plain", "striped", "dotted", "checked")
STUFFS = ("grass", "sky", "sand", "water", "brick", "gravel")
OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
WORLD_NAMES = OBJECTS + STUFFS
UNSEEN = tuple(c * 8 + s for c in range(8) for s in range(8) if (s - c) % 8 in (0, 3) or ((s - c) % 8 == 5 and c < 5))
SEEN = tuple(i for i in range(64) if i not in UNSEEN)


# ---- what a user gave, and what to say when it cannot be used ----
class InputError(Exception):
    """Something the user gave cannot be used.  The message is one line: where, what is wrong, what to do."""


def run_cli(main):
    """Run `main()`; an InputError ends the program with one line on stderr and status 2, without a traceback."""
    try:
        main()
    except InputError as error:
        # A DataLoader worker hands its error over as a whole traceback whose last line is ours.
        print("error: " + str(error).rstrip().splitlines()[-1].split("InputError: ")[-1], file=sys.stderr)
        sys.exit(2)


def parse_names(given, where="--labels", item="name"):
    """Class names from "red star, grass" or from a list -> tuple of str, stripped; item k of it is class k.

    Raises InputError if there is none, or one is blank or occurs twice; `where` and `item` word its message.
    """
    names = tuple(name.strip() for name in (given.split(",") if isinstance(given, str) else given))
    if not any(names):
        raise InputError(f"{where}: holds no class names; give at least one, such as: red star, grass")
    for k, name in enumerate(names, 1):
        if not name:
            raise InputError(f"{where}: {item} {k} is blank; remove it, or write the class name that belongs there")
        if names.index(name) + 1 < k:
            raise InputError(f"{where}: {item} {k} repeats {item} {names.index(name) + 1}, {name!r}; remove either")
    return names


def palette(n):
    """Colours (n,3) uint8 of classes 0..n-1: class i has the same colour in every picture, whatever n is."""
    rows = [colorsys.hsv_to_rgb(0.618034 * i % 1,                 # golden ratio: neighbours in i are far apart in hue
                                (0.85, 0.5, 0.7)[i % 3], (1.0, 0.85, 0.6)[i // 3 % 3]) for i in range(n)]
    return np.round(255 * np.array(rows).reshape(n, 3)).astype(np.uint8)


def colour_label(label):
    """Label (H,W) -> picture (H,W,3) uint8 in `palette`'s colours; ignored pixels are black."""
    label = np.asarray(label)
    return np.vstack([palette(label.max() + 1), np.zeros((1, 3), np.uint8)])[label]    # IGNORE = -1 takes the last row


# ---- the world ----
def rng_for(*key):
    """A generator that depends on nothing but the integers of `key`, such as (seed, step, image), each below 2**32."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def inside(shape, u, v):
    """Membership (h,w) bool of the points (u, v), in units of the object's radius, v pointing down."""
    rho = np.hypot(u, v)
    if shape == "circle":
        return rho < 0.95
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.82
    if shape == "triangle":
        return (v < 0.75) & (v > 1.9 * abs(u) - 1.05)
    if shape == "star":
        wave = np.abs((np.arctan2(u, -v) / (2 * np.pi) * 5) % 1 - 0.5) * 2          # 1 at a tip, 0 in a notch
        return rho < 0.45 + 0.65 * wave**1.3
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.33) & (np.maximum(abs(u), abs(v)) < 1.0)
    if shape == "ring":
        return (rho < 1.0) & (rho > 0.5)
    if shape == "heart":
        x, y = 1.15 * u, -1.15 * v + 0.1
        return (x * x + y * y - 0.7) ** 3 < 1.6 * x * x * y**3
    if shape == "moon":
        return (rho < 1.0) & (np.hypot(u - 0.55, v) > 0.72)
    raise ValueError(f"no shape {shape!r}; the world has {', '.join(SHAPES)}")


def paint_stuff(name, rng, yy, xx):
    """Colours (h,w,3) float in 0..255 of one stuff over the pixel grid; its phase is drawn from `rng`."""
    a, b = rng.uniform(0, 2 * np.pi, 2)
    base, other, mix = {
        "grass": lambda: ((78, 132, 50), (108, 160, 70), np.sin(1.1 * xx + a) * np.sin(0.45 * yy + b) > 0.25),
        "sky": lambda: ((138, 190, 236), (190, 220, 248), 0.5 + 0.5 * np.sin(0.11 * yy + 0.07 * xx + a)),
        "sand": lambda: ((222, 196, 142), (204, 174, 118),
                         0.5 + 0.5 * np.sin(0.7 * yy + 1.5 * np.sin(0.15 * xx + a) + b)),
        "water": lambda: ((28, 104, 142), (64, 146, 176), np.sin(0.5 * yy + 1.2 * np.sin(0.35 * xx + a) + b) > 0.5),
        "brick": lambda: ((158, 80, 60), (202, 186, 172), ((yy + int(a * 9)) % 8 < 2)
                          | ((xx + int(b * 9) + 6 * ((yy + int(a * 9)) // 8 % 2)) % 12 < 2)),
        "gravel": lambda: ((112, 112, 116), (146, 146, 148),
                           np.sin(1.3 * xx + a) + np.sin(1.1 * yy + 0.9 * xx + b) > 0.7),
    }[name]()
    mix = np.asarray(mix, np.float32)[..., None]
    return np.array(base, np.float32) * (1 - mix) + np.array(other, np.float32) * mix


def scene(rng, size=64, objects=(1, 4), classes=range(64), stuffs=(1, 2)):
    """One scene: (image (size,size,3) uint8, label (size,size) int64, things, grounds).

    `things` lists (class, texture) of each object that kept at least 20 pixels; `grounds` the names of the stuffs.
    `objects` and `stuffs` are inclusive ranges of how many are drawn, `classes` the object classes allowed.
    """
    yy, xx = np.mgrid[:size, :size].astype(np.float32)
    grounds = list(rng.permutation(len(STUFFS))[: rng.integers(stuffs[0], stuffs[1] + 1)])
    image = paint_stuff(STUFFS[grounds[0]], rng, yy, xx)
    label = np.full((size, size), 64 + grounds[0])
    if len(grounds) == 2:                                     # a wavy border somewhere through the middle
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        along = np.cos(angle) * (xx - size / 2) + np.sin(angle) * (yy - size / 2)
        across = -np.sin(angle) * xx + np.cos(angle) * yy
        second = along > rng.uniform(-0.15, 0.15) * size + 3 * np.sin(0.15 * across + phase)
        image = np.where(second[..., None], paint_stuff(STUFFS[grounds[1]], rng, yy, xx), image)
        label[second] = 64 + grounds[1]

    placed = []
    for _ in range(rng.integers(objects[0], objects[1] + 1)):
        for _ in range(12):                                   # a free place, or give this object up
            r = rng.uniform(8.5, 14.5)
            y, x = rng.uniform(0.85 * r, size - 0.85 * r, 2)
            if all(np.hypot(y - y2, x - x2) > 0.85 * (r + r2) for y2, x2, r2, *_ in placed):
                break
        else:
            continue
        kind, texture, turn = int(rng.choice(classes)), int(rng.integers(4)), rng.uniform(-0.3, 0.3)
        placed.append((y, x, r, kind, texture))
        box = (slice(max(0, int(y - 1.5 * r)), int(y + 1.5 * r)), slice(max(0, int(x - 1.5 * r)), int(x + 1.5 * r)))
        v, u = yy[box] - y, xx[box] - x
        v, u = np.cos(turn) * v - np.sin(turn) * u, np.sin(turn) * v + np.cos(turn) * u
        mask = inside(SHAPES[kind % 8], u / r, v / r)
        dark = {"plain": lambda: np.zeros_like(mask), "striped": lambda: np.sin((u + v) * 2 * np.pi / 6) > 0,
                "dotted": lambda: np.sin(np.pi * u / 2.5) * np.sin(np.pi * v / 2.5) > 0.45,
                "checked": lambda: (np.floor(u / 4) + np.floor(v / 4)) % 2 > 0}[TEXTURES[texture]]()
        colour = np.array(list(COLOURS.values())[kind // 8]) + rng.normal(0, 5, 3)
        image[box][mask] = (colour * np.where(dark, 0.74, 1.0)[..., None])[mask]
        label[box][mask] = kind
    image = image * rng.uniform(0.92, 1.06) + 2.0 * rng.standard_normal(image.shape, np.float32)   # light, sensor noise
    things = [(kind, texture) for *_, kind, texture in placed if (label == kind).sum() >= 20]
    return image.clip(0, 255).round().astype(np.uint8), label, things, [STUFFS[g] for g in grounds]


# ---- files to arrays, arrays to tensors ----
def to_tensor(image):
    """Image (H,W,3) uint8 RGB -> (3,H,W) float32 as CLIP wants it: (value / 255 - MEAN) / STD, about -1.8..2.2."""
    unit = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255                         # (3,H,W)
    return (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def to_unit(tensor):
    """The inverse of `to_tensor`: normalised (...,3,H,W) -> the same shape with values in 0..1 (to float rounding)."""
    return tensor * tensor.new_tensor(STD).view(3, 1, 1) + tensor.new_tensor(MEAN).view(3, 1, 1)


@contextmanager
def opened(path):
    """The PIL image at `path`; inside this block, whatever PIL says about the file becomes an InputError."""
    try:
        # Through a stream: Pillow (13.0) maps a TIFF that it is given by name, and scrambles it if it is to be rotated.
        with open(path, "rb") as stream, Image.open(stream) as file:
            yield file
    except InputError:
        raise
    except Exception as error:             # decoders raise OSError, SyntaxError, ValueError, EOFError, ... on bad bytes
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        reason = "no image format known to PIL" if isinstance(error, UnidentifiedImageError) else reason
        raise InputError(f"{path}: cannot be read ({reason}); is it there, whole, and an image?") from error


def read_image(path):
    """The picture at `path` as (H,W,3) uint8 RGB, upright (EXIF orientation applied).

    Transparent pixels are laid on white; 16-bit grey is scaled to 8 bits; everything else goes the way PIL converts it.
    Raises InputError for a missing, broken or truncated file, and for float or over 16-bit pixels.
    """
    with opened(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise InputError(f"{path}: has float pixels, whose range nobody knows; save it as an 8-bit PNG or JPEG")
        if image.mode.startswith("I"):                    # PIL's own conversion clips every value above 255 to white
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise InputError(f"{path}: has grey values outside 0..65535; save it as an 8-bit PNG or JPEG")
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))             # 65535 = 255 * 257 is white
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(image.convert("RGB"))


def read_label(path):
    """The class ids at `path` as (H,W) int64, exactly as stored: grey values, or palette indices; 8 or 16 bits.

    Raises InputError if the file is missing, broken or truncated, or holds anything but whole, unaltered indices.
    """
    with opened(path) as file:
        if len(file.getbands()) > 1:
            raise InputError(f"{path}: is colour-coded ({file.mode}), not class ids; save one grey value per class")
        if file.format not in ("PNG", "TIFF") or file.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise InputError(f"{path}: {file.format} {file.mode} pixels are no exact ids; save it as 8- or 16-bit PNG")
        stored = file.tile[0].args                        # how the pixels lie in the file, before PIL touches them
        stored = stored if isinstance(stored, str) else stored[0]
        if file.mode in ("1", "L") and stored not in ("1", "1;R", "L", "L;R"):     # PIL stretches 4-bit grey to 0..255
            raise InputError(f"{path}: has grey values stored as {stored}, which PIL rescales; save it as an 8-bit PNG")
        return np.array(file).astype(np.int64)


# ---- resizing, and SAN's training augmentation ----
def resize_short(image, short, long, nearest=False):
    """Image (H,W,3) uint8 or label (H,W) int64, resized to short side `short` unless its long side would pass `long`.

    Bilinear for an image; `nearest=True` for a label, whose ids must not mix.  Sizes are rounded half up.
    """
    h, w = image.shape[:2]
    scale = min(short / min(h, w), long / max(h, w))
    size = max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))                     # PIL wants (W, H)
    if nearest:
        # differs: SAN's labels go through torch's "nearest", which samples the corner of a pixel and so shifts them by
        # up to half a pixel against the image; PIL samples its centre.  Effect on the score: not measured.
        return np.array(Image.fromarray(image.astype(np.int32)).resize(size, Image.NEAREST)).astype(np.int64)
    return np.array(Image.fromarray(image).resize(size, Image.BILINEAR))


def shift_hsv(image, gain=1.0, turn=0):
    """RGB (H,W,3) uint8 with its saturation times `gain` and its hue turned by `turn` (OpenCV's unit: two degrees)."""
    # differs: PIL's 8-bit HSV in place of OpenCV's, to need no OpenCV: 1 level of 255 on average, at most 14, on noise.
    h, s, v = Image.fromarray(image).convert("HSV").split()
    h = (np.asarray(h, np.int64) + round(turn * 255 / 180)) % 255                         # PIL's full circle is 255
    s = (np.asarray(s) * gain).clip(0, 255)
    return np.array(Image.merge("HSV", [Image.fromarray(x.astype(np.uint8)) for x in (h, s)] + [v]).convert("RGB"))


def jitter(image, rng):
    """SSD's colour jitter of (H,W,3) uint8: four changes, each with probability 1/2, the contrast early or last."""
    bright, contrast, early, saturate, turn = rng.random(5) < 0.5
    shift, factor, gain, hue = rng.uniform(-32, 32), *rng.uniform(0.5, 1.5, 2), int(rng.integers(-18, 19))
    if bright:
        image = (image + shift).clip(0, 255).astype(np.uint8)
    if contrast and early:
        image = (image * factor).clip(0, 255).astype(np.uint8)
    if saturate or turn:                                          # neighbours in both orders, so one trip to HSV
        image = shift_hsv(image, gain if saturate else 1.0, hue if turn else 0)
    if contrast and not early:
        image = (image * factor).clip(0, 255).astype(np.uint8)
    return image


def augment(image, label, rng, crop, long=2560):
    """SAN's training augmentation: image (H,W,3) uint8, label (H,W) int64 -> (S,S,3) uint8, (S,S) int64, S = crop.

    Resize (short side 0.5..1.5 times the crop, long side at most `long`), random window, colour jitter, flip, pad.
    """
    short = crop * int(rng.integers(5, 16)) // 10                 # 320, 384, ..., 960 for a crop of 640
    image, label = resize_short(image, short, long), resize_short(label, short, long, nearest=True)
    y, x = (int(rng.integers(max(size - crop, 0) + 1)) for size in label.shape)
    image, label = image[y:y + crop, x:x + crop], label[y:y + crop, x:x + crop]
    image = jitter(image, rng)
    if rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    below, right = crop - label.shape[0], crop - label.shape[1]
    image = np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=128)
    return image, np.pad(label, ((0, below), (0, right)), constant_values=IGNORE)


# ---- datasets ----
TRAIN, VAL, ORDER, AUGMENT = range(4)      # the middle word of a key (seed, word, n): no two uses share a generator


class World:
    """The built-in scenes.  Training is an endless stream of seen classes; testing, `length` scenes of all classes."""

    names, crop = WORLD_NAMES, 64
    groups = {"seen": SEEN, "unseen": UNSEEN, "stuff": tuple(range(64, 70))}
    train_ids = SEEN + tuple(range(64, 70))
    train_names = tuple(WORLD_NAMES[i] for i in train_ids)        # unseen names are not even wrong answers in training

    def __init__(self, split="val", length=500, seed=0):
        if split not in ("train", "val"):
            raise ValueError(f"no split {split!r}; the world has train and val")
        self.split, self.length, self.seed = split, length, seed

    def __len__(self):
        return self.length

    def draw(self, seed, n):
        """Training sample n of stream `seed`: image (3,64,64) float, normalised; label (64,64), ids of `train_names`."""
        image, label, _, _ = scene(rng_for(seed, TRAIN, n), classes=SEEN)
        return to_tensor(image), torch.from_numpy(np.searchsorted(self.train_ids, label))

    def __getitem__(self, i):
        """Test scene i: dict of image (3,64,64) float, label (64,64) int64, name, original (64,64,3) uint8.

        Split "val": all classes, keyed apart from every training scene.  Split "train": the first samples of `draw`.
        """
        if not 0 <= i < self.length:
            raise IndexError(f"scene {i} of {self.length}")
        train = self.split == "train"
        key, classes = (self.seed, TRAIN if train else VAL, i), SEEN if train else range(64)
        image, label, _, _ = scene(rng_for(*key), classes=classes)
        return dict(image=to_tensor(image), label=torch.from_numpy(label), name=f"{self.split}_{i:05d}", original=image)


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


# ---- demo ----
def main():
    """Draw world.png: 5 x 8 test scenes, each beside its label; print the cost of a scene."""
    start = time.perf_counter()
    scenes = list(World("val", length=40))
    cost = (time.perf_counter() - start) / 40 * 1000
    cells = [np.hstack([s["original"], colour_label(s["label"])]) for s in scenes]                   # (64,128,3) each
    cells = [np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255) for cell in cells]
    sheet = np.vstack([np.hstack(cells[row:row + 8]) for row in range(0, 40, 8)])
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.NEAREST).save("world.png")
    print(f"world.png: 40 scenes, {cost:.1f} ms each")


if __name__ == "__main__":
    run_cli(main)
