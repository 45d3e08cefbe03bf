"""The built-in world: endless 64x64 scenes with exact labels, to train and test on without a download.

A scene shows one to four objects (8 colours x 8 shapes x 4 textures) on one or two of six textured stuffs.  Its classes
are the 64 names "colour shape" and the six stuffs, L = 70: 0..63 objects, 64..69 stuffs, every pixel labelled.

    scene(rng)   image (64,64,3) uint8, label (64,64) int64, things, grounds;   rng = rng_for(seed, TRAIN or VAL, n)
    World        the scenes as a dataset, see data.py for what that is

Open vocabulary in miniature: 43 of the 64 object names (`SEEN`) occur in training scenes; the other 21 (`UNSEEN`) occur
only in test scenes.  Every colour and every shape is among the seen, so "unseen" here means an unseen *combination*.

# ours: the whole world is our invention; the paper trains on COCO-Stuff.

Demo: `python -m world.scenes` draws a contact sheet, world.png.  Tests: tests/world/test_scenes.py.
Read next: clip.py.
"""

import time

import numpy as np
import torch
from PIL import Image

from cli import run_cli
from data import TRAIN, VAL, colour_label, names_checksum, rng_for, to_tensor

COLOURS = {"red": (212, 38, 36), "orange": (244, 136, 28), "yellow": (246, 224, 52), "green": (36, 168, 60),
           "blue": (38, 70, 214), "purple": (128, 44, 168), "pink": (250, 138, 194), "white": (246, 246, 246)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
TEXTURES = ("plain", "striped", "dotted", "checked")
STUFFS = ("grass", "sky", "sand", "water", "brick", "gravel")
OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
WORLD_NAMES = OBJECTS + STUFFS
UNSEEN = tuple(c * 8 + s for c in range(8) for s in range(8) if (s - c) % 8 in (0, 3) or ((s - c) % 8 == 5 and c < 5))
SEEN = tuple(i for i in range(64) if i not in UNSEEN)


# ---- one scene ----
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


# ---- the scenes as a dataset ----
class World:
    """The built-in scenes.  Training is an endless stream of seen classes; testing, `length` scenes of all classes."""

    names, crop = WORLD_NAMES, 64
    checksum, route = names_checksum(WORLD_NAMES), "drawn by world/scenes.py"
    groups = {"seen": SEEN, "unseen": UNSEEN, "stuff": tuple(range(64, 70))}
    train_ids = SEEN + tuple(range(64, 70))
    train_names = tuple(WORLD_NAMES[i] for i in train_ids)        # unseen names are not even wrong answers in training

    def __init__(self, split="val", length=500, seed=0):
        if split not in ("train", "val"):
            raise ValueError(f"no split {split!r}; the world has train and val")
        self.split, self.length, self.seed = split, length, seed

    def __len__(self):
        return self.length

    @property
    def key(self):
        return f"{self.split} {self.seed}"

    def draw(self, seed, n):
        """Training sample n of `seed`: image (3,64,64) float, normalised; label (64,64) int64, ids of `train_names`."""
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
