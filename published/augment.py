"""SAN's training augmentation, of photos on disk: the world's scenes need none.

    a 480x640 pair -> short side 320, 384, ..., 960 -> 640x640 window -> colour jitter -> flip -> padding

# paper: SAN's.   # differs: HSV in place of OpenCV's 8 bits of it, labels by pixel centres (see there).

Tests: tests/published/test_augment.py.  Measured: docs/speed.md, the loader.  Read next: folder.py.
"""

import numpy as np

from data import PADDING, resized, short_size


def nearest_rows(old, new):
    """Which of `old` pixels in a row each of `new` shows: the one under its centre.  -> (new,) int64"""
    # differs: SAN's labels go through torch's "nearest", which samples the corner of a pixel and so shifts them by up
    # to half a pixel against the image.  This is PIL's: the centre, found in steps that are added up, rounding and all.
    # Effect on the score: not measured.
    step = old / new
    return np.cumsum([step / 2] + [step] * (new - 1)).astype(np.int64)


def through(levels, image):
    """Image (H,W,3) uint8, each byte looked up in `levels` (256,) uint8.  -> a view of planes (3,H,W), read-only"""
    planes = np.moveaxis(image, 2, 0)
    planes = np.frombuffer(planes.tobytes().translate(levels.tobytes()), np.uint8).reshape(planes.shape)
    return np.moveaxis(planes, 0, 2)


def shift_hsv(image, gain=1.0, turn=0):
    """RGB (H,W,3) uint8 with its saturation times `gain` and its hue turned by `turn` (OpenCV's unit: two degrees).

    V is the highest channel, S = (V - lowest) / V.  As the hue turns, one channel at a time moves, from the lowest
    value to the highest in 60 degrees, or back.  So neither H nor S has to be known.  -> a view of planes (3,H,W)
    """
    # differs: rounded after each change, at most 1.25 levels of 255 from real HSV for gains up to 1.5.  OpenCV's, of
    # which 8 bits are kept in between, to need no OpenCV: 0.5 levels from this on average, at most 6, on noise.
    planes = np.ascontiguousarray(np.moveaxis(image, 2, 0))       # R, G, B each for itself: arithmetic is fastest there
    high, low = planes.max(0), planes.min(0)                      # (H,W)
    if turn:
        sextants, rest = divmod(turn, 30)                         # 60 degrees on, R is what G was, upside down
        planes = np.roll(planes, -sextants, axis=0)
        if sextants % 2:
            planes = high + low - planes                          # what wraps past 255 wraps back
        step = ((np.multiply(high - low, rest, dtype=np.uint16) + 15) // 30).astype(np.uint8)
        # R rises once G has come down to `low`, and falls once G is up at `high`: by what is left of the step.
        ahead = np.roll(planes, -1, axis=0)
        rise = np.minimum(high - planes, step - np.minimum(step, ahead - low))
        fall = np.minimum(planes - low, step - np.minimum(step, high - ahead))
        planes = planes + rise - fall
    if gain != 1:                                                 # below V, distances grow alike, the largest up to V
        growth = np.minimum(np.divide(high, np.maximum(high - low, 1), dtype=np.float32), np.float32(gain))
        planes = np.stack([high - ((high - plane) * growth + 0.5).astype(np.uint8) for plane in planes])
    return np.moveaxis(planes, 0, 2)


def jitter(image, rng):
    """SSD's colour jitter of (H,W,3) uint8: four changes, each with probability 1/2, the contrast early or last."""
    bright, contrast, early, saturate, turn = rng.random(5) < 0.5
    shift = rng.uniform(-32, 32)
    factor, gain = rng.uniform(0.5, 1.5, 2)
    hue = int(rng.integers(-18, 19))
    # What becomes of a byte's 256 values: this table gathers the changes and meets the image as late as it can.
    levels = same = np.arange(256, dtype=np.uint8)
    harder = (levels * factor).clip(0, 255).astype(np.uint8)
    if bright:
        levels = (levels + shift).clip(0, 255).astype(np.uint8)
    if contrast and early:
        levels = harder[levels]
    if saturate or turn:                                          # neighbours in both orders, so both at once
        image = shift_hsv(through(levels, image), gain if saturate else 1.0, hue if turn else 0)
        levels = same
    if contrast and not early:
        levels = harder[levels]
    return image if levels is same else through(levels, image)


def augment(image, label, rng, crop, long=2560):
    """SAN's training augmentation: image (H,W,3) uint8, label (H,W) int64 -> (S,S,3) uint8, (S,S) int64, S = crop.

    Resize (short side 0.5..1.5 times the crop, long side at most `long`), random window, colour jitter, flip, pad.
    """
    short = crop * int(rng.integers(5, 16)) // 10                 # 320, 384, ..., 960 for a crop of 640
    (H, W), (h, w) = label.shape, short_size(*label.shape, short, long)
    y, x = int(rng.integers(max(h - crop, 0) + 1)), int(rng.integers(max(w - crop, 0) + 1))
    # Only the window is ever made: of the label its rows and columns, of the image the box that they show.  PIL's
    # filter looks beyond the box, so this is the whole, cut, to a level (hardly ever two) where its float32 rounds.
    rows, columns = nearest_rows(H, h)[y:y + crop], nearest_rows(W, w)[x:x + crop]
    box = x * W / w, y * H / h, (x + len(columns)) * W / w, (y + len(rows)) * H / h       # multiplied first: never > W
    image = jitter(resized(image, len(rows), len(columns), box), rng)
    if rng.random() < 0.5:
        image, columns = image[:, ::-1], columns[::-1]
    label = label.take(columns, 1).take(rows, 0)
    below, right = crop - len(rows), crop - len(columns)
    if below or right:
        image = np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=128)
        label = np.pad(label, ((0, below), (0, right)), constant_values=PADDING)
    return image, label
