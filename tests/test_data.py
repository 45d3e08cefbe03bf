"""What data.py promises: a world that never changes, files read exactly or refused, augmentation worked by hand."""

import colorsys
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (IGNORE, OBJECTS, SEEN, TEMPLATES, UNSEEN, Folder, InputError, World, augment, colour_label, jitter,
                  palette, parse_names, read_image, read_label, resize_short, rng_for, run_cli, scene, shift_hsv,
                  to_tensor, to_unit)

GOLDEN = ((0, [3, 16, 18, 68], 137.76), (1, [1, 6, 44, 45, 64, 67], 95.96), (2, [21, 27, 68], 122.28),
          (3, [17, 33, 40, 67, 68], 109.01))         # scene, class ids, mean of all its bytes


# ---- the world ----
def test_a_scene_depends_on_its_key_alone():
    """The same key gives the same picture and label; another number, another picture."""
    first, again, other = (scene(rng_for(*key)) for key in ((3, 0, 5), (3, 0, 5), (3, 0, 6)))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all() and first[2:] == again[2:]
    assert (first[0] != other[0]).any()


def test_the_world_is_the_one_its_clip_was_trained_on():
    """Four scenes as they were when this repository's CLIP was pretrained on them: class ids, mean colour."""
    for n, ids, mean in GOLDEN:
        image, label, _, _ = scene(rng_for(0, 0, n))
        assert np.unique(label).tolist() == ids
        assert image.mean() == pytest.approx(mean, abs=0.05)        # a last bit of sin() may differ between machines


def test_43_of_64_objects_are_seen_and_every_colour_and_shape_is_among_them():
    """So an unseen class is a new combination of parts that were seen: 43 + 21 = 64."""
    assert (len(SEEN), len(UNSEEN), len(OBJECTS)) == (43, 21, 64)
    assert sorted(SEEN + UNSEEN) == list(range(64))
    seen, unseen = ([OBJECTS[i].split() for i in ids] for ids in (SEEN, UNSEEN))
    assert {c for c, _ in seen} == set(data.COLOURS) and {s for _, s in seen} == set(data.SHAPES)
    assert {c for c, _ in unseen} == set(data.COLOURS)
    assert [OBJECTS[i] for i in UNSEEN[:4]] == ["red circle", "red star", "red ring", "orange square"]
    assert OBJECTS[0] == "red circle" and OBJECTS[63] == "white moon" and World.names[64] == "grass"


def test_training_scenes_hold_no_unseen_class_and_test_scenes_do():
    """150 training scenes show seen classes and stuff only; 150 test scenes show nearly all 70."""
    drawn = {i for n in range(150) for i in scene(rng_for(0, data.TRAIN, n), classes=SEEN)[1].flatten().tolist()}
    tested = {i for sample in World("val", length=150) for i in sample["label"].unique().tolist()}
    assert not drawn & set(UNSEEN) and len(drawn & set(SEEN)) >= 40 and set(range(64, 70)) <= drawn
    assert len(tested & set(UNSEEN)) >= 18 and len(tested & set(SEEN)) >= 38


def test_training_labels_count_through_the_training_names():
    """49 names in training: 43 seen objects, 6 stuffs; id k of a drawn label is the k-th of them, in the scene's order."""
    world = World("train")
    assert len(world.train_names) == 49 and not set(world.train_names) & {OBJECTS[i] for i in UNSEEN}
    for n in range(5):
        stored, drawn = scene(rng_for(3, data.TRAIN, n), classes=SEEN)[1], world.draw(3, n)[1].numpy()
        assert [world.train_names[i] for i in drawn.flatten()] == [World.names[i] for i in stored.flatten()]


def test_test_scenes_are_never_training_scenes():
    """Their keys differ in the middle word, so no picture of one stream is a picture of the other."""
    train = {World("train", seed=s)[i]["original"].tobytes() for s in range(3) for i in range(20)}
    val = {World("val", seed=s)[i]["original"].tobytes() for s in range(3) for i in range(20)}
    assert len(train) == len(val) == 60 and not train & val


def test_labels_agree_with_the_picture():
    """The pixels labelled "red star" of a plain red star are red: close to the class colour, up to light and noise."""
    checked = 0
    for n in range(60):
        image, label, things, _ = scene(rng_for(0, 9, n), objects=(1, 1))
        for kind, texture in things:
            if data.TEXTURES[texture] == "plain":
                want = np.array(list(data.COLOURS.values())[kind // 8])
                assert abs(image[label == kind].mean(0) - want).max() < 35      # light 0.92..1.06, colour sigma 5
                assert abs(image[label >= 64].mean(0) - want).max() > 35        # and the ground is not
                checked += 1
    assert checked > 8


def test_every_pixel_of_the_world_is_labelled():
    """The world has no ignored pixels, and 64x64 scenes of two stuffs and four objects fit its 70 names."""
    for sample in World("val", length=30):
        assert sample["label"].shape == (64, 64) and sample["label"].dtype == torch.int64
        assert 0 <= sample["label"].min() and sample["label"].max() < len(World.names) == 70


def test_an_unknown_shape_is_named():
    """A typing error in a shape says which shapes there are."""
    with pytest.raises(ValueError, match="hexagon.*circle"):
        data.inside("hexagon", np.zeros((1, 1)), np.zeros((1, 1)))


# ---- one endless stream, however many read it ----
def test_the_training_stream_is_the_same_for_one_process_and_for_three():
    """Rank r of three takes n = r, r + 3, ...; dealt back together that is the stream of a single process."""
    world = World("train")
    alone = [world.draw(7, n) for n in range(9)]
    ranks = [[World("train").draw(7, n) for n in range(r, 9, 3)] for r in (2, 0, 1)]             # in any order of work
    dealt = [ranks[(1, 2, 0)[n % 3]][n // 3] for n in range(9)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, dealt))


def test_iterating_a_dataset_ends():
    """`for sample in dataset` visits len(dataset) samples: past the end is an IndexError, not scene number 500."""
    assert len(list(World("val", length=3))) == len(World("val", length=3)) == 3
    assert [s["name"] for s in World("val", length=2)] == ["val_00000", "val_00001"]


# ---- names, colours, tensors ----
def test_names_are_split_at_commas_and_stripped():
    """--labels "red star, grass" is two names; a list is taken item by item, commas and all."""
    assert parse_names(" red star, grass ") == ("red star", "grass")
    assert parse_names(["tree, palm tree", "sky"]) == ("tree, palm tree", "sky")


@pytest.mark.parametrize("given, why", [("", "no class names"), (" , ", "no class names"), ([], "no class names"),
                                        ("a,,b", "name 2 is blank"), ("a,b, a", "name 3 repeats name 1, 'a'")])
def test_empty_blank_and_doubled_names_are_refused(given, why):
    """The message counts from one, as people do."""
    with pytest.raises(InputError, match=f"--labels: .*{why}"):
        parse_names(given)


def test_there_are_14_templates_with_one_place_for_the_name():
    """SAN's `vild` set, the published order."""
    assert len(set(TEMPLATES)) == 14 and all(t.count("{}") == 1 for t in TEMPLATES)
    assert TEMPLATES[0].format("red star") == "a photo of a red star."
    assert TEMPLATES[13].format("red star") == "There is a large red star in the scene."


def test_a_class_has_the_same_colour_in_every_picture():
    """Colour i does not depend on how many classes there are, 847 classes have 847 colours, and ignored is black."""
    assert (palette(70) == palette(847)[:70]).all() and palette(847).dtype == np.uint8
    assert len({tuple(c) for c in palette(847)}) == 847
    picture = colour_label(np.array([[0, 2], [IGNORE, 1]]))
    assert (picture[[0, 0, 1], [0, 1, 1]] == palette(3)[[0, 2, 1]]).all() and (picture[1, 0] == 0).all()


def test_to_unit_undoes_to_tensor():
    """Red 255: (1 - 0.48145466) / 0.26862954 = 1.9303; and back to 1, for one image or a batch."""
    image = np.array([[[255, 0, 128]]], np.uint8)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 1, 1) and tensor.dtype == torch.float32
    assert tensor[0].item() == pytest.approx(1.9303, abs=1e-4)
    for given in (tensor, tensor[None]):
        assert torch.allclose(to_unit(given).flatten(), torch.tensor([1.0, 0.0, 128 / 255]), atol=1e-6)


# ---- reading pictures ----
def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6 says "turn me to the right": black beside white as stored is black above white upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, how in (("a.png", {}), ("a.tif", {}), ("b.tif", dict(compression="tiff_lzw"))):
        Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / name, exif=exif, **how)
        assert read_image(tmp_path / name)[..., 0].tolist() == [[0], [255]], name
    Image.fromarray(np.array([[7, 300]], np.uint16)).save(tmp_path / "label.tif", exif=exif)
    assert read_label(tmp_path / "label.tif").tolist() == [[7], [300]]          # PIL turns a TIFF, and so its label


def test_transparent_pixels_are_laid_on_white(tmp_path):
    """Red at alpha 0 is white, at 255 red, at 51 = a fifth: 0.2 * (200,0,0) + 0.8 * 255 = (244,204,204)."""
    rgba = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 51]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png").tolist() == [[[255, 255, 255], [200, 0, 0], [244, 204, 204]]]
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0, :, 0].tolist() == [255, 200, 244]
    indexed = Image.fromarray(np.array([[0, 1]], np.uint8))
    indexed.putpalette([9, 9, 9, 30, 60, 90])
    indexed.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [30, 60, 90]]]


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    """0, 257, 32896 = 128 * 257 and 65535 become 0, 1, 128 and 255."""
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "i.tif")
    for name in ("a.png", "i.tif"):
        image = read_image(tmp_path / name)
        assert image.dtype == np.uint8 and (image == np.array([0, 1, 128, 255])[None, :, None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_every_ordinary_mode_becomes_rgb(tmp_path, mode):
    """White on the left, black on the right, whatever the file calls it; (H,W,3) uint8 comes out."""
    picture = Image.fromarray(np.repeat(np.array([[255, 0]], np.uint8)[..., None], 3, 2)).convert(mode)
    picture.save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").tolist() == [[[255] * 3, [0] * 3]]


def noise(h=8, w=6, seed=0):
    """A picture of uniform noise (h,w,3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def broken(kind, path):
    """Write a file that cannot be used."""
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "png")
    if kind == "truncated":
        path.write_bytes(whole.getvalue()[:3000])
    elif kind == "bad chunk":
        path.write_bytes(whole.getvalue()[:40] + b"\xff" * 40 + whole.getvalue()[80:])
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "float":
        Image.fromarray(np.ones((2, 2), np.float32)).save(path, "tiff")
    elif kind == "bomb":                          # a header that promises 60000 x 60000 pixels
        header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        path.write_bytes(whole.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole.getvalue()[33:])
    elif kind == "32 bits":
        Image.fromarray(np.full((2, 2), 70000, np.int32)).save(path, "tiff")


@pytest.mark.parametrize("kind", ["missing", "truncated", "bad chunk", "text", "empty", "folder", "float", "bomb",
                                  "32 bits"])
def test_an_unusable_picture_is_an_input_error_naming_the_file(tmp_path, kind):
    """One line, with the path in it; never a decoder's own exception."""
    broken(kind, tmp_path / "photo.png")
    with pytest.raises(InputError, match="photo.png") as caught:
        read_image(tmp_path / "photo.png")
    assert "\n" not in str(caught.value)


# ---- reading labels ----
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_come_back_as_stored(tmp_path, suffix, dtype):
    """8 and 16 bits, PNG and TIFF; ids above 255 survive (ADE has 847 classes and 65535 for unlabelled)."""
    ids = np.array([[0, 1, 255], [7, 254, 3]] if dtype == np.uint8 else [[0, 256, 65535], [846, 300, 255]], dtype)
    Image.fromarray(ids).save(tmp_path / f"a.{suffix}")
    label = read_label(tmp_path / f"a.{suffix}")
    assert label.dtype == np.int64 and label.tolist() == ids.tolist()


def test_a_palette_label_keeps_its_indices(tmp_path):
    """VOC's labels are palette PNGs: index 2 is class 2, whatever colour it is shown in, at 2, 4 or 8 bits a pixel."""
    for bits in (2, 4, 8):
        indexed = Image.fromarray(np.array([[0, 2], [1, 3]], np.uint8))
        indexed.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
        indexed.save(tmp_path / "a.png", bits=bits)
        assert read_label(tmp_path / "a.png").tolist() == [[0, 2], [1, 3]]


def write_4_bit_grey(path):
    """A 2x1 grey PNG of 4 bits a pixel holding 1 and 2; PIL would read it as 17 and 34."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    pixels = zlib.compress(b"\x00\x12")                             # a filter byte, then the two half bytes
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind, why", [
    ("rgb", "colour-coded"), ("jpeg", "no exact ids"), ("float", "no exact ids"), ("4 bits", "rescales"),
    ("missing", "cannot be read"), ("truncated", "cannot be read"), ("text", "cannot be read")])
def test_a_label_that_is_no_index_map_is_refused(tmp_path, kind, why):
    """Colours, lossy files and rescaled grey would all give wrong classes without a word."""
    path = tmp_path / "map.png"
    if kind in ("rgb", "jpeg"):
        Image.fromarray(noise() if kind == "rgb" else noise()[..., 0]).save(path, "png" if kind == "rgb" else "jpeg")
    elif kind == "4 bits":
        write_4_bit_grey(path)
    elif kind == "truncated":
        Image.fromarray(noise(64, 64)[..., 0]).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        broken(kind, path)
    with pytest.raises(InputError, match=f"map.png.*{why}"):
        read_label(path)


# ---- resizing and augmentation ----
@pytest.mark.parametrize("h, w, want", [(480, 640, (640, 853)), (640, 427, (959, 640)), (100, 1000, (256, 2560)),
                                        (481, 640, (640, 852)), (1, 9000, (1, 2560))])
def test_the_short_side_becomes_640_unless_the_long_one_passes_2560(h, w, want):
    """480x640: 640 * 640/480 = 853.33 -> 853.  481x640: 851.56 -> 852.  100x1000 would be 6400 long."""
    assert resize_short(np.zeros((h, w, 3), np.uint8), 640, 2560).shape == (*want, 3)
    assert resize_short(np.zeros((h, w), np.int64), 640, 2560, nearest=True).shape == want


def test_a_resized_label_holds_no_new_ids():
    """Nearest, so 0 beside 900 never gives 450, and IGNORE stays IGNORE."""
    label = resize_short(np.array([[0, 900], [IGNORE, 900]]), 5, 100, nearest=True)
    assert label.dtype == np.int64 and set(np.unique(label)) == {IGNORE, 0, 900}
    assert label[0, 0] == 0 and label[4, 0] == IGNORE and label[0, 4] == 900


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
    """4x4 at scale 5 / 10 in a crop of 4: 2x2 of image, the rest grey 128 and IGNORE - after the flip, not before."""
    image, label = augment(np.full((4, 4, 3), 10, np.uint8), np.full((4, 4), 3), Dice([0.1], [5, 0, 0, 0]), 4)
    assert label.tolist() == [[3, 3, IGNORE, IGNORE]] * 2 + [[IGNORE] * 4] * 2
    assert (image[label == 3] == 10).all() and (image[label == IGNORE] == 128).all()


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
    monkeypatch.setattr(data, "jitter", lambda image, rng: image)
    label = np.kron(np.random.default_rng(0).integers(0, 4, (6, 8)), np.ones((20, 20), np.int64))
    table = coded(np.arange(4)).astype(int)
    for n in range(30):
        image, out = augment(coded(label), label, rng_for(0, 3, n), 96)
        assert image.shape == (96, 96, 3) and out.shape == (96, 96)
        assert image.dtype == np.uint8 and out.dtype == np.int64
        known = out != IGNORE
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
    assert abs(shift_hsv(red, turn=30).astype(int) - [200, 200, 0]).max() <= 5          # PIL's hue steps: 1.4 degrees
    assert abs(shift_hsv(red, turn=-60).astype(int) - [0, 0, 200]).max() <= 5
    assert shift_hsv(red, gain=0.0).tolist() == [[[200, 200, 200]]]
    assert abs(shift_hsv(noise(50, 50)).astype(int) - noise(50, 50)).mean() < 1         # a round trip, nothing asked


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


# ---- folders ----
@pytest.fixture
def root(tmp_path):
    """A folder of three pictures 6 wide and 8 high; classes sky, tree, road; 255 is unlabelled."""
    for sub in ("images", "labels"):
        (tmp_path / sub).mkdir()
    for k, stem in enumerate(("b", "a", "c.1")):
        Image.fromarray(noise(seed=k)).save(tmp_path / "images" / f"{stem}.png")
        label = np.random.default_rng(k).integers(0, 3, (8, 6), dtype=np.uint8)
        label[0, 0] = 255
        Image.fromarray(label).save(tmp_path / "labels" / f"{stem}.png")
    (tmp_path / "classes.txt").write_text("sky\ntree\nroad\n")
    return tmp_path


def test_a_folder_reads_its_pairs_in_order_of_their_names(root):
    """Test images are resized (short side 12 here), labels and originals keep the file's size; 255 becomes IGNORE."""
    (root / "images" / ".DS_Store").write_text("clutter")
    folder = Folder(root, short_side=12)
    assert folder.names == ("sky", "tree", "road") and folder.groups == {} and len(folder) == 3
    assert [s["name"] for s in folder] == ["a", "b", "c.1"]
    sample = folder[0]
    assert sample["image"].shape == (3, 16, 12) and sample["image"].dtype == torch.float32
    assert (sample["original"] == noise(seed=1)).all() and sample["label"].shape == (8, 6)
    assert sample["label"][0, 0] == IGNORE and sample["label"].dtype == torch.int64
    assert (sample["label"].flatten()[1:] >= 0).all()


def test_given_names_replace_the_file(root):
    """With names= there need be no classes.txt."""
    (root / "classes.txt").unlink()
    assert Folder(root, names=["x", "y", "z"]).names == ("x", "y", "z")


def test_a_folder_with_more_than_255_classes(root):
    """300 classes in 16-bit labels: id 255 is a class like any other and 65535 is unlabelled."""
    (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(300)))
    for path in (root / "labels").iterdir():
        Image.fromarray(np.array([[299, 255, 65535]] * 8, np.uint16).repeat(2, 1)).save(path)
    label = Folder(root, ignore=65535)[0]["label"]
    assert label[0].tolist() == [299, 299, 255, 255, IGNORE, IGNORE]
    with pytest.raises(InputError, match="255.*'class 255'"):
        Folder(root)                                                # 255 cannot be both a class and unlabelled


def test_a_rotated_photo_needs_an_upright_label(root):
    """EXIF turns the 6x8 picture to 8x6; a label of 6x8 does not fit, one of 8x6 does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise()).save(root / "images" / "a.png", exif=exif)
    with pytest.raises(InputError, match=r"a.png: is 6x8, but .*a.png is 8x6 \(after EXIF"):
        Folder(root)[0]
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(root / "labels" / "a.png")
    assert Folder(root)[0]["original"].shape == (6, 8, 3)


def test_a_folders_stream_is_keyed_and_every_epoch_visits_every_image(root):
    """Sample n is a function of (seed, n) alone; three samples are an epoch; another seed or epoch, another order."""
    one, two = Folder(root, crop=8), Folder(root, crop=8)
    forward = [one.draw(5, n) for n in range(6)]
    backward = [two.draw(5, n) for n in reversed(range(6))][::-1]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(forward, backward))
    assert forward[0][0].shape == (3, 8, 8) and forward[0][1].shape == (8, 8) and forward[0][1].dtype == torch.int64
    assert not torch.equal(one.draw(5, 0)[0], one.draw(6, 0)[0])
    visited = []
    one.read = lambda i: visited.append(int(i)) or (noise(), np.zeros((8, 6), np.int64))
    for n in range(30):
        one.draw(5, n)
    epochs = [tuple(visited[k:k + 3]) for k in range(0, 30, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len(set(epochs)) > 1


def unpair(root):
    """Five images that have no label."""
    for k in range(5):
        Image.fromarray(noise()).save(root / "images" / f"lone{k}.jpg")


SPOILED = {                                       # what went wrong: (how to get there, what the message must say)
    "no images folder": (lambda r: [p.unlink() for p in (r / "images").iterdir()] and (r / "images").rmdir(),
                         "images: no such folder"),
    "empty images folder": (lambda r: [p.unlink() for p in (r / "images").iterdir()], "images: holds no files"),
    "sub-folder": (lambda r: (r / "images" / "train").mkdir(), "train: is a folder"),
    "image without label": (unpair, r"no label for lone0.jpg, lone1.jpg, lone2.jpg and 2 more"),
    "label without image": (lambda r: (r / "images" / "b.png").unlink(), "no image for b.png"),
    "stem twice": (lambda r: Image.fromarray(noise()).save(r / "images" / "a.jpg"), "a.png: has the stem of a.jpg"),
    "no classes": (lambda r: (r / "classes.txt").unlink(), "classes.txt: cannot be read"),
    "classes not text": (lambda r: (r / "classes.txt").write_bytes(b"\xff\xfe\xfa"), "classes.txt: cannot be read"),
    "classes empty": (lambda r: (r / "classes.txt").write_text(""), "classes.txt: holds no class names"),
    "classes blank": (lambda r: (r / "classes.txt").write_text("sky\n\nroad\n"), "classes.txt: line 2 is blank"),
    "classes doubled": (lambda r: (r / "classes.txt").write_text("sky\ntree\nsky\n"),
                        "classes.txt: line 3 repeats line 1, 'sky'"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_folder_is_refused_before_training_starts(root, what):
    """At construction, in one line, naming the file and the line."""
    spoil, message = SPOILED[what]
    spoil(root)
    with pytest.raises(InputError, match=message) as caught:
        Folder(root)
    assert "\n" not in str(caught.value)


def test_an_id_without_a_name_is_refused_when_read(root):
    """Class 200 of 3: the message names the id, the file and the remedy."""
    Image.fromarray(np.full((8, 6), 200, np.uint8)).save(root / "labels" / "b.png")
    folder = Folder(root)
    folder[0]
    with pytest.raises(InputError, match=r"b.png: has class id 200, but the 3 names are ids 0 to 2; .*ignore value"):
        folder[1]


# ---- command lines ----
def test_an_input_error_ends_the_program_with_one_line_and_status_2(capsys):
    """Also when a DataLoader worker wrapped it in a traceback of its own."""
    def main():
        raise InputError("Caught InputError in DataLoader worker process 0.\n ...\ndata.InputError: x.png: is gone\n")

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: x.png: is gone\n"
    run_cli(lambda: None)                                           # and nothing happens when nothing is wrong


def test_the_demo_draws_the_contact_sheet(tmp_path):
    """`python data.py` writes world.png, 8 pairs of 64x64 across and 5 down, doubled, with a frame of 2."""
    done = subprocess.run([sys.executable, data.__file__], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("world.png: 40 scenes")
    assert Image.open(tmp_path / "world.png").size == (2 * 8 * 132, 2 * 5 * 68)
