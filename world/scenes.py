"""The built-in world: endless 64x64 storybook scenes with exact labels, to train and test on without a download.

A scene shows one to three objects on one or two of six textured stuffs.  An object is one of 16 nouns, an arrangement
of two or three *parts* (a boat is a hull, a pole and a sail), and its first part, the body, wears one of 4 textures:
64 names, "striped boat".  Classes: these and the stuffs, L = 70: 0..63 objects, 64..69 stuffs, every pixel labelled.

    scene(rng)   Scene(image (64,64,3) uint8, label (64,64), ...);     rng = rng_for(seed, TRAIN or VAL, n)
    World        the scenes as a dataset, see data.py for what that is

Designed from what the paper says of its stages, from colour and edge over part to object, and fixed before any model
was trained on it:

- *Colour* means nothing: each part has one of 8, drawn at random, unlike its object's other parts.  A stage that tells
  colours apart has not thereby told names apart.
- *Parts* are shared: a pole is a mast, a lamp's stand or an umbrella's stick, a sail is a boat's or a kite.  Some are
  thin, two or three pixels, which no 8x8 grid can follow.
- A *noun* is how its parts stand together: a dome is a mushroom's cap on a thick stem, an umbrella on a thin pole.
- A *texture* is a matter of a few pixels, and only of the body: the pixels of a mast know nothing of a striped hull.

Part and colour of every pixel come along, for studies to ask each stage what it knows; training never sees them.

Open vocabulary in miniature: 43 of the 64 object names (`SEEN`) occur in training scenes; the other 21 (`UNSEEN`) occur
only in test scenes.  Every noun is seen in two textures at least and every texture on ten nouns or more, so "unseen" here
means an unseen *combination*.

# ours: the whole world is our invention; the paper trains on COCO-Stuff.

Demo: `python -m world.scenes` draws a contact sheet, world.png.  Tests: tests/world/test_scenes.py.
Read next: clip.py.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from cli import run_cli
from data import TRAIN, VAL, colour_label, names_checksum, rng_for, to_tensor

COLOURS = {"red": (212, 38, 36), "orange": (244, 136, 28), "yellow": (246, 224, 52), "green": (36, 168, 60),
           "blue": (38, 70, 214), "purple": (128, 44, 168), "pink": (250, 138, 194), "white": (246, 246, 246)}
TEXTURES = ("plain", "striped", "dotted", "checked")
RADIUS = (12.0, 18.0)                                         # of an object, in pixels
STUFFS = ("grass", "sky", "sand", "water", "brick", "gravel")


# ---- nouns, part by part ----
def disc(u, v, x, y, r):
    return np.hypot(u - x, v - y) < r


# Where a part is, of points (u, v) in units of the object's radius, v pointing down.  The first is the body; a later
# part covers an earlier one.
NOUNS = {
    "house": dict(wall=lambda u, v: (abs(u) < 0.72) & (v > -0.2) & (v < 0.9),
                  roof=lambda u, v: (v < -0.1) & (v > 0.9 * abs(u) - 1.0),
                  door=lambda u, v: (abs(u) < 0.2) & (v > 0.3) & (v < 0.9)),
    "boat": dict(hull=lambda u, v: (v > 0.2) & (v < 0.85) & (abs(u) < 1.05 - 0.6 * (v - 0.2)),
                 pole=lambda u, v: (abs(u + 0.05) < 0.07) & (v > -1.0) & (v <= 0.2),
                 sail=lambda u, v: (u > 0.04) & (v < 0.1) & (v > 1.25 * u - 0.95)),
    "tree": dict(crown=lambda u, v: disc(u, v, 0, -0.28, 0.7),
                 trunk=lambda u, v: (abs(u) < 0.15) & (v > 0.3) & (v < 1.0)),
    "fish": dict(body=lambda u, v: ((u + 0.22) / 0.78) ** 2 + (v / 0.55) ** 2 < 1,
                 tail=lambda u, v: (u > 0.42) & (u < 1.0) & (abs(v) < 0.1 + 0.85 * (u - 0.42)),
                 eye=lambda u, v: disc(u, v, -0.6, -0.12, 0.13)),
    "car": dict(body=lambda u, v: (abs(u) < 1.0) & (v > -0.15) & (v < 0.5),
                cabin=lambda u, v: (v > -0.65) & (v < -0.1) & (abs(u + 0.05) < 0.75 + 0.5 * v),
                wheel=lambda u, v: disc(abs(u), v, 0.56, 0.5, 0.28)),
    "flower": dict(petals=lambda u, v: np.hypot(u, v + 0.38) < 0.56 + 0.12 * np.cos(6 * np.arctan2(u, v + 0.38)),
                   centre=lambda u, v: disc(u, v, 0, -0.38, 0.2),
                   stem=lambda u, v: (abs(u) < 0.08) & (v > 0.2) & (v < 1.0)),
    "mushroom": dict(cap=lambda u, v: (v < 0.05) & ((u / 0.95) ** 2 + ((v - 0.05) / 0.9) ** 2 < 1),
                     stem=lambda u, v: (abs(u) < 0.2 + 0.15 * v) & (v > 0.05) & (v < 0.9)),
    "snowman": dict(ball=lambda u, v: disc(u, v, 0, 0.42, 0.56) | disc(u, v, 0, -0.34, 0.38),
                    hat=lambda u, v: (abs(v + 0.81) < 0.21) & (abs(u) < np.where(v < -0.72, 0.27, 0.46)),
                    scarf=lambda u, v: (abs(u) < 0.36) & (abs(v + 0.05) < 0.09)),
    "cup": dict(bowl=lambda u, v: (abs(u + 0.2) < 0.62) & (abs(v) < 0.68),
                handle=lambda u, v: (u > 0.4) & (np.hypot(u - 0.42, v) < 0.45) & (np.hypot(u - 0.42, v) > 0.24)),
    "rocket": dict(body=lambda u, v: (abs(u) < 0.38) & (v > -0.45) & (v < 0.65),
                   nose=lambda u, v: (v < -0.4) & (v > 1.6 * abs(u) - 1.05),
                   fins=lambda u, v: (abs(u) > 0.36) & (v > 0.1) & (v < 0.9) & (abs(u) < 0.36 + 0.6 * (v - 0.1))),
    "umbrella": dict(canopy=lambda u, v: (v < -0.1 * abs(np.sin(4.5 * u))) & (u * u + (v / 0.9) ** 2 < 1),
                     pole=lambda u, v: (abs(u) < 0.07) & (v > -0.1) & (v < 0.75) |
                     (v >= 0.72) & (abs(np.hypot(u - 0.2, v - 0.72) - 0.2) < 0.08)),
    "lamp": dict(shade=lambda u, v: (v > -0.9) & (v < 0.0) & (abs(u) < 0.85 + 0.5 * v),
                 pole=lambda u, v: (abs(u) < 0.08) & (v >= 0.0) & (v < 0.8),
                 foot=lambda u, v: (abs(u) < 0.5) & (v > 0.76) & (v < 0.95)),
    "cat": dict(face=lambda u, v: (u / 0.85) ** 2 + ((v - 0.2) / 0.68) ** 2 < 1,
                ear=lambda u, v: (v < -0.2) & (v > 2.2 * abs(abs(u) - 0.55) - 0.95),
                eye=lambda u, v: disc(abs(u), v, 0.33, 0.12, 0.13)),
    "kite": dict(sail=lambda u, v: abs(u) / 0.75 + abs(v + 0.25) / 0.78 < 1,
                 tail=lambda u, v: (abs(u - 0.16 * np.sin(8 * (v - 0.5))) < 0.08) & (v > 0.45) & (v < 1.1)),
    "arrow": dict(shaft=lambda u, v: (abs(v) < 0.3) & (u > -1.0) & (u < 0.2),
                  head=lambda u, v: (u > 0.12) & (abs(v) < 0.8 * (1.0 - u))),
    "butterfly": dict(wing=lambda u, v: disc(abs(u), v, 0.5, -0.35, 0.48) | disc(abs(u), v, 0.42, 0.42, 0.38),
                      trunk=lambda u, v: (abs(u) < 0.12) & (abs(v) < 0.75),
                      feeler=lambda u, v: (v < -0.7) & (v > -1.1) & (abs(abs(u) + 0.8 * (v + 0.7)) < 0.09))}
PARTS = tuple(dict.fromkeys(part for parts in NOUNS.values() for part in parts))                    # 33 words
OBJECTS = tuple(f"{texture} {noun}" for noun in NOUNS for texture in TEXTURES)
WORLD_NAMES = OBJECTS + STUFFS
UNSEEN = tuple(4 * n + t for n in range(16) for t in range(4) if (n + t) % 4 == 0 or ((n + t) % 4 == 2 and n < 5))
SEEN = tuple(i for i in range(64) if i not in UNSEEN)


# ---- one scene ----
class Scene(NamedTuple):
    """What `scene` draws; S its side."""

    image: np.ndarray       # (S,S,3) uint8
    label: np.ndarray       # (S,S) int64, 0..63 objects (4 * noun + texture), 64..69 stuffs
    things: list            # (class, colour of its body) of each object that kept at least 20 pixels
    grounds: list           # the names of the stuffs
    part: np.ndarray        # (S,S) int64 into PARTS, -1 on stuff
    colour: np.ndarray      # (S,S) int64 into COLOURS, -1 on stuff


def is_dark(texture, u, v):
    """Where a body is dark, (h,w) bool, at points (u, v) in pixels from the object's centre."""
    if texture == "plain":
        return np.zeros(u.shape, bool)
    if texture == "striped":
        return np.sin((u + v) * 2 * np.pi / 6) > 0
    if texture == "dotted":
        return np.sin(np.pi * u / 2.5) * np.sin(np.pi * v / 2.5) > 0.4
    if texture == "checked":
        return (np.floor(u / 4) + np.floor(v / 4)) % 2 > 0
    raise ValueError(f"no texture {texture!r}; the world has {', '.join(TEXTURES)}")


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


def scene(rng, size=64, objects=(1, 3), classes=range(64), stuffs=(1, 2), radius=RADIUS):
    """One Scene.  `objects` and `stuffs` are inclusive ranges of how many are drawn, `classes` the object classes
    allowed, `radius` the objects' in pixels."""
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

    part, colour, placed = np.full_like(label, -1), np.full_like(label, -1), []
    for _ in range(rng.integers(objects[0], objects[1] + 1)):
        for _ in range(12):                                   # a free place, or give this object up
            r = rng.uniform(*radius)
            y, x = rng.uniform(0.9 * r, size - 0.9 * r, 2)
            if all(np.hypot(y - y2, x - x2) > 0.9 * (r + r2) for y2, x2, r2, *_ in placed):
                break
        else:
            continue
        kind, turn, mirror = int(rng.choice(classes)), rng.uniform(-0.2, 0.2), rng.choice((-1, 1))
        colours = rng.permutation(list(COLOURS))              # of its parts, in turn
        placed.append((y, x, r, kind, str(colours[0])))
        box = (slice(max(0, int(y - 1.3 * r)), int(y + 1.3 * r)), slice(max(0, int(x - 1.3 * r)), int(x + 1.3 * r)))
        v, u = yy[box] - y, xx[box] - x
        v, u = np.cos(turn) * v - np.sin(turn) * u, mirror * (np.sin(turn) * v + np.cos(turn) * u)
        parts = [*NOUNS.values()][kind // 4]
        shade = np.where(is_dark(TEXTURES[kind % 4], u, v), 0.5, 1.0)[..., None]          # (h,w,1), the body's
        for word, name in zip(parts, colours):
            mask = parts[word](u / r, v / r)                                   #            (h,w)
            image[box][mask] = ((np.array(COLOURS[name]) + rng.normal(0, 5, 3)) * shade)[mask]
            label[box][mask], part[box][mask], colour[box][mask] = kind, PARTS.index(word), [*COLOURS].index(name)
            shade = np.ones_like(shade)
    image = image * rng.uniform(0.92, 1.06) + 2.0 * rng.standard_normal(image.shape, np.float32)   # light, sensor noise
    things = [(kind, name) for *_, kind, name in placed if (label == kind).sum() >= 20]
    return Scene(image.clip(0, 255).round().astype(np.uint8), label, things, [STUFFS[g] for g in grounds], part, colour)


# ---- the scenes as a dataset ----
class World:
    """The built-in scenes.  Training is an endless stream of seen classes; testing, `length` scenes of all classes."""

    names, crop = WORLD_NAMES, 64
    checksum, route = names_checksum(WORLD_NAMES), "drawn by world/scenes.py"
    groups = {"seen": SEEN, "unseen": UNSEEN, "stuff": tuple(range(64, 70))}
    train_ids = SEEN + tuple(range(64, 70))
    train_names = tuple(WORLD_NAMES[i] for i in train_ids)        # unseen names are not even wrong answers in training

    def __init__(self, split="val", length=1000, seed=0):
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
        drawn = scene(rng_for(seed, TRAIN, n), classes=SEEN)
        return to_tensor(drawn.image), torch.from_numpy(np.searchsorted(self.train_ids, drawn.label))

    def __getitem__(self, i):
        """Test scene i: dict of image (3,64,64) float, label (64,64) int64, name, original (64,64,3) uint8.

        Split "val": all classes, keyed apart from every training scene.  Split "train": the first samples of `draw`.
        """
        if not 0 <= i < self.length:
            raise IndexError(f"scene {i} of {self.length}")
        train = self.split == "train"
        key, classes = (self.seed, TRAIN if train else VAL, i), SEEN if train else range(64)
        drawn = scene(rng_for(*key), classes=classes)
        return dict(image=to_tensor(drawn.image), label=torch.from_numpy(drawn.label), name=f"{self.split}_{i:05d}",
                    original=drawn.image, part=torch.from_numpy(drawn.part), colour=torch.from_numpy(drawn.colour))


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
