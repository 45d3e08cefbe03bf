"""SAN's augmentation, worked by hand: image and label stay together, colours move as HSV says, draws are throws of dice."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from data import IGNORE, PADDING, resize_short, rng_for
from published import augment as module
from published.augment import augment, jitter, nearest_rows, shift_hsv
from tests.helpers import noise


def test_nearest_takes_the_pixel_under_the_centre():
    """2 -> 5: centres .2, .6, 1.0, 1.4, 1.8 lie in pixels 0 0 1 1 1; 5 -> 2: 1.25 and 3.75 in 1 and 3."""
    assert nearest_rows(2, 5).tolist() == [0, 0, 1, 1, 1] and nearest_rows(5, 2).tolist() == [1, 3]
    assert nearest_rows(4, 4).tolist() == [0, 1, 2, 3]


def test_nearest_is_pils():
    """The same pixel for every pair of sizes, borders between two pixels included, along rows and along columns."""
    rng = np.random.default_rng(0)
    pairs = [(old, new) for old in (*range(1, 12), 427, 480, 640, 1001) for new in (1, 2, 7, 320, 853, 960, 1280)]
    for old, new in pairs + rng.integers(1, 2000, (100, 2)).tolist():
        row = Image.fromarray(np.arange(old, dtype=np.int32)[None])
        assert np.array(row.resize((new, 1), Image.NEAREST))[0].tolist() == nearest_rows(old, new).tolist(), (old, new)
        column = row.transpose(Image.TRANSPOSE)
        assert np.array(column.resize((1, new), Image.NEAREST))[:, 0].tolist() == nearest_rows(old, new).tolist()


def test_a_resized_label_holds_no_new_ids():
    """Nearest, so 0 beside 900 never gives 450, and IGNORE stays IGNORE.  2x2 to 5x5, all of it inside the window."""
    given = np.array([[0, 900], [IGNORE, 900]])
    image, label = augment(np.zeros((2, 2, 3), np.uint8), given, Dice([0.9], [10, 0, 0, 0]), 5)
    assert label.dtype == np.int64 and set(np.unique(label)) == {IGNORE, 0, 900}
    assert label[0, 0] == 0 and label[4, 0] == IGNORE and label[0, 4] == 900


def real_hsv(image, gain, turn):
    """What `shift_hsv` stands for: to HSV and back in real numbers, pixel by pixel, by the standard library."""
    h, s, v = np.vectorize(colorsys.rgb_to_hsv)(*np.moveaxis(image / 255, 2, 0))
    return 255 * np.stack(np.vectorize(colorsys.hsv_to_rgb)((h + turn / 180) % 1, np.minimum(s * gain, 1), v), axis=2)


def plain_augment(image, label, rng, crop):
    """`augment` without short cuts: everything resized whole by PIL, then cut; arithmetic on every pixel.

    The third value says whether the same pixels are asked for: nothing was cut, and HSV not entered.
    """
    h, w = label.shape
    scale = crop * int(rng.integers(5, 16)) // 10 / min(h, w)
    size = int(w * scale + 0.5), int(h * scale + 0.5)
    image = np.array(Image.fromarray(image).resize(size, Image.BILINEAR)).astype(float)
    label = np.array(Image.fromarray(label.astype(np.int32)).resize(size, Image.NEAREST))
    y, x = (int(rng.integers(max(side - crop, 0) + 1)) for side in label.shape)
    uncut = max(label.shape) <= crop
    image, label = image[y:y + crop, x:x + crop], label[y:y + crop, x:x + crop]
    bright, contrast, early, saturate, turn = rng.random(5) < 0.5
    shift, factor, gain, hue = rng.uniform(-32, 32), *rng.uniform(0.5, 1.5, 2), int(rng.integers(-18, 19))
    image = np.floor((image + shift * bright).clip(0, 255))
    image = np.floor((image * factor).clip(0, 255)) if contrast and early else image
    if saturate or turn:
        image = np.round(real_hsv(image, gain if saturate else 1, hue if turn else 0))
    image = np.floor((image * factor).clip(0, 255)) if contrast and not early else image
    if rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    canvas, ids = np.full((crop, crop, 3), 128.0), np.full((crop, crop), PADDING)
    canvas[:image.shape[0], :image.shape[1]], ids[:label.shape[0], :label.shape[1]] = image, label
    return canvas, ids, uncut and not saturate and not turn


def test_the_fast_way_is_the_plain_way():
    """Tables of 256 values, windows alone, planes for HSV against the plain arithmetic, draw after draw.

    Labels are the same.  So are pixels, to two roundings: the box's (one level, for `resized`), then HSV's (one level),
    both multiplied by whichever of contrast and saturation comes later, 1.5 each at most: 6 levels on noise, not 0.6 on
    average.
    """
    same = 0
    for n in range(100):
        shape = rng_for(1, n).integers(14, 60, 2)
        image, label = noise(*shape, seed=n), rng_for(2, n).integers(-1, 300, shape)
        fast = augment(image, label, rng_for(0, 3, n), 32)
        *plain, exact = plain_augment(image, label, rng_for(0, 3, n), 32)
        off = abs(fast[0] - plain[0])
        assert (fast[1] == plain[1]).all() and off.max() <= (0 if exact else 6) and off.mean() < 0.6, n
        same += exact
    assert same >= 3


@pytest.mark.parametrize("step", [5, 7, 10, 13, 15])
def test_a_window_resized_alone_is_that_window_of_the_whole(step):
    """Also at its borders, where PIL's filter looks at what lies beyond: 24..72 high, windows of 48 at every corner and
    inside.  A level at most where a rounding falls otherwise; not one where the window is the whole."""
    image, label = noise(60, 80), np.zeros((60, 80), np.int64)
    whole = resize_short(image, 48 * step // 10, 2560)
    h, w = whole.shape[:2]
    for y, x in ((0, 0), (0, max(w - 48, 0)), (max(h - 48, 0), 0), (max(h - 48, 0) // 2, max(w - 48, 0) // 3)):
        window = whole[y:y + 48, x:x + 48]
        alone = augment(image, label, Dice([0.9], [step, y, x, 0]), 48)[0][:window.shape[0], :window.shape[1]]
        assert abs(alone.astype(int) - window).max() <= (step > 5)


class Dice:
    """A stand-in generator whose throws are written down: `coins` for random(), `ints` for integers()."""

    def __init__(self, coins, ints, five=(0.9,) * 5):
        self.coins, self.ints, self.five = list(coins), list(ints), np.array(five)

    def random(self, n=None):
        return self.coins.pop(0) if n is None else self.five

    def integers(self, *bounds):
        value = self.ints.pop(0)
        assert np.arange(*bounds)[[0, -1]][0] <= value <= np.arange(*bounds)[-1]
        return value

    def uniform(self, low, high, n=None):
        return float(high) if n is None else np.array([float(high)] * n)


def test_a_flip_moves_image_and_label_together():
    """Crop 4, scale 10 / 10, no jitter, coin 0.1 < 0.5: the columns of both come out backwards."""
    image, label = noise(4, 4), np.arange(16).reshape(4, 4)
    still = augment(image, label, Dice([0.9], [10, 0, 0, 0]), 4)
    flipped = augment(image, label, Dice([0.1], [10, 0, 0, 0]), 4)
    assert (still[0] == image).all() and (still[1] == label).all()
    assert (flipped[0] == image[:, ::-1]).all() and (flipped[1] == label[:, ::-1]).all()


def test_a_short_image_is_padded_right_and_below():
    """4x4 at scale 5 / 10 in a crop of 4: 2x2 of image, the rest grey 128 and PADDING - after the flip, not before."""
    image, label = augment(np.full((4, 4, 3), 10, np.uint8), np.full((4, 4), 3), Dice([0.1], [5, 0, 0, 0]), 4)
    assert label.tolist() == [[3, 3, PADDING, PADDING]] * 2 + [[PADDING] * 4] * 2
    assert (image[label == 3] == 10).all() and (image[label == PADDING] == 128).all()


def test_the_window_is_where_the_dice_say():
    """A 4x6 image, crop 4, window at y = 0, x = 2: columns 2 to 5."""
    image, label = noise(4, 6), np.arange(24).reshape(4, 6)
    out = augment(image, label, Dice([0.9], [10, 0, 2, 0]), 4)
    assert (out[0] == image[:, 2:]).all() and (out[1] == label[:, 2:]).all()


def test_the_eleven_scales_of_a_640_crop():
    """Short sides 320, 384, ..., 960, all drawn; here a square of 640 shows its scale as its unpadded width."""
    sides = set()
    for step in range(5, 16):
        image, label = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.int64)
        sides.add(int((augment(image, label, Dice([0.9], [step, 0, 0, 0]), 640)[1][0] == 0).sum()))
    assert sides == {320, 384, 448, 512, 576, 640}                  # the larger five fill the crop
    drawn = {int(rng_for(0, 3, n).integers(5, 16)) for n in range(200)}
    assert drawn == set(range(5, 16))


def coded(label):
    """An image whose colour tells its label: class i is grey-free colour number i, far from every other."""
    hues = [colorsys.hsv_to_rgb(i / 4, 1, 0.6) for i in range(4)]
    return np.round(255 * np.array(hues)).astype(np.uint8)[label]


def test_image_and_label_stay_aligned_through_everything(monkeypatch):
    """Image colours encode the label; after resize, window, flip and pad they still decode to it, away from borders."""
    monkeypatch.setattr(module, "jitter", lambda image, rng: image)
    label = np.kron(np.random.default_rng(0).integers(0, 4, (6, 8)), np.ones((20, 20), np.int64))
    table = coded(np.arange(4)).astype(int)
    for n in range(30):
        image, out = augment(coded(label), label, rng_for(0, 3, n), 96)
        assert image.shape == (96, 96, 3) and out.shape == (96, 96)
        assert image.dtype == np.uint8 and out.dtype == np.int64
        known = out >= 0
        decoded = abs(image[..., None, :].astype(int) - table).sum(-1).argmin(-1)
        assert (decoded == out)[known].mean() > 0.95 and (image[~known] == 128).all()       # bilinear blurs the borders
        same = (out[1:-1, 1:-1] == out[:-2, 1:-1]) & (out[1:-1, 1:-1] == out[2:, 1:-1])
        same &= (out[1:-1, 1:-1] == out[1:-1, :-2]) & (out[1:-1, 1:-1] == out[1:-1, 2:]) & known[1:-1, 1:-1]
        assert (decoded == out)[1:-1, 1:-1][same].mean() > 0.998


def test_hue_and_saturation_leave_grey_alone_and_turn_red_into_yellow():
    """Grey has no hue to turn; 60 degrees (30 of OpenCV's) from red: yellow; saturation 0 leaves the largest value."""
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    assert (shift_hsv(grey, 1.5, 18) == grey).all()
    red = np.array([[[200, 0, 0]]], np.uint8)
    assert shift_hsv(red, turn=30).tolist() == [[[200, 200, 0]]]
    assert shift_hsv(red, turn=-60).tolist() == [[[0, 0, 200]]]
    assert shift_hsv(red, gain=0.0).tolist() == [[[200, 200, 200]]]
    assert (shift_hsv(noise(50, 50)) == noise(50, 50)).all()                            # nothing asked, nothing changed


def test_hue_and_saturation_by_hand():
    """(200,100,120) has hue 30 * (100 - 120) / 100 = -6 (OpenCV's) and saturation 1/2.

    Turned by 18, hue 12: G stands 12/30 of 100 above the lowest, (200,140,100).  By -18, hue -24: B stands 24/30 above.
    Saturation times 1.5: 150 and 120 below 200.  Times 2.25 it would be 1.125, and stays 1: 200 and 160 below.
    """
    image = np.array([[[200, 100, 120]]], np.uint8)
    assert shift_hsv(image, turn=18).tolist() == [[[200, 140, 100]]]
    assert shift_hsv(image, turn=-18).tolist() == [[[200, 100, 180]]]
    assert shift_hsv(image, 1.5).tolist() == [[[200, 50, 80]]] and shift_hsv(image, 2.25).tolist() == [[[200, 0, 40]]]


def test_hsv_is_real_hsv_to_a_rounding_after_each_change():
    """Half a level after one change.  After two, that half times the gain, at most 1.5, and another half: 1.25."""
    corners = np.array(np.meshgrid([0, 255], [0, 128, 255], [0, 255])).reshape(3, 1, -1).transpose(1, 2, 0)
    for image in (noise(16, 16), noise(16, 16) // 8, 100 + noise(16, 16) // 9, corners.astype(np.uint8)):
        for turn in (*range(-18, 19), 30, -30, 77, 90, -100, 179):
            assert abs(shift_hsv(image, turn=turn) - real_hsv(image, 1, turn)).max() <= 0.501, turn
        for gain in (0.0, 0.5, 0.83, 1.2, 1.5):
            assert abs(shift_hsv(image, gain) - real_hsv(image, gain, 0)).max() <= 0.501, gain
            for turn in (-18, -7, 1, 13):
                assert abs(shift_hsv(image, gain, turn) - real_hsv(image, gain, turn)).max() <= 1.251, (gain, turn)


def test_brightness_and_contrast_by_hand():
    """Pixel 100, shift +32, factor 1.5: 132, 150, and both (132 * 1.5 = 198); 250 stops at 255."""
    image = np.array([[[100, 100, 100], [250, 250, 250]]], np.uint8)
    yes, no = 0.1, 0.9
    cases = ((yes, no, [132, 255]), (no, yes, [150, 255]), (yes, yes, [198, 255]), (no, no, [100, 250]))
    for bright, contrast, want in cases:
        for early in (yes, no):
            assert jitter(image, Dice([], [0], (bright, contrast, early, no, no)))[0, :, 0].tolist() == want


def test_the_two_orders_of_contrast_differ():
    """(200,100,100) has saturation 1/2; contrast and saturation times 1.5, in either order.

    Contrast first: (255,150,150) after clipping, saturation 105/255 * 1.5 = 0.618, others 255 * 0.382 = 97.5.
    Contrast last: saturation 0.75 makes (200,50,50), times 1.5 (255,75,75).
    """
    image = np.array([[[200, 100, 100]]], np.uint8)
    early = jitter(image, Dice([], [0], (0.9, 0.1, 0.1, 0.1, 0.9)))[0, 0].astype(int)
    late = jitter(image, Dice([], [0], (0.9, 0.1, 0.9, 0.1, 0.9)))[0, 0].astype(int)
    assert abs(early - [255, 97, 97]).max() <= 2 and abs(late - [255, 75, 75]).max() <= 2


def test_hue_and_saturation_have_a_coin_each():
    """Hue by its largest step, 18 of OpenCV's = 36 degrees, saturation by 1.5; neither waits for the other."""
    image, no = noise(), 0.9
    turned, saturated = (jitter(image, Dice([], [18], (no, no, no, *coins))) for coins in ((no, 0.1), (0.1, no)))
    assert (turned == shift_hsv(image, 1.0, 18)).all() and (saturated == shift_hsv(image, 1.5, 0)).all()


def test_jitter_changes_half_of_the_pictures_each_way():
    """All four changes miss with probability 1/16, so about 1 of 16 pictures comes back untouched."""
    image = noise()
    untouched = sum((jitter(image, rng_for(0, 3, n)) == image).all() for n in range(800))
    assert 25 <= untouched <= 80                                    # 50 expected, sigma 6.8
