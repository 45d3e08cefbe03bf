"""What data.py promises: files read exactly or refused, sizes by hand, streams that are keyed."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from cli import InputError
from data import IGNORE, PADDING, colour_label, palette, read_image, resize_short, rng_for, to_tensor, to_unit
from published.datasets import open_dataset
from published.folder import layout
from published.labels import read_label
from tests.helpers import filled, noise, packed
from world.scenes import World


# ---- colours and tensors ----
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


def test_images_are_normalised_by_the_numbers_clip_was_trained_with():
    """open_clip's own constants."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    assert data.MEAN == tuple(OPENAI_DATASET_MEAN) and data.STD == tuple(OPENAI_DATASET_STD)


def test_no_two_keys_share_a_generator():
    """Not even keys with the same numbers in another order, or the same sum, or one number more."""
    keys = ((1, 2, 3), (3, 2, 1), (2, 2, 2), (1, 2), (1, 2, 3, 1), (0, 6, 0))
    draws = {key: tuple(rng_for(*key).integers(2**32, size=4).tolist()) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert tuple(rng_for(1, 2, 3).integers(2**32, size=4).tolist()) == draws[1, 2, 3]


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


# ---- resizing, tensors ----
@pytest.mark.parametrize("h, w, want", [(480, 640, (640, 853)), (640, 427, (959, 640)), (100, 1000, (256, 2560)),
                                        (481, 640, (640, 852)), (1, 9000, (1, 2560)),
                                        (53, 1024, (132, 2560)), (3072, 33, (2560, 27))])
def test_the_short_side_becomes_640_unless_the_long_one_passes_2560(h, w, want):
    """480x640: 640 * 640/480 = 853.33 -> 853.  481x640: 851.56 -> 852.  100x1000 would be 6400 long.

    53x1024: exactly 132.5, but 640 / (640 / 53 * 1024 / 2560) as detectron2 computes it is a hair less, so 132.
    """
    assert resize_short(np.zeros((h, w, 3), np.uint8), 640, 2560).shape == (*want, 3)


def test_to_tensor_is_the_plain_arithmetic_bit_by_bit():
    """(value / 255 - mean) / std in float32, for all 256 values of each channel; views are fine too."""
    image = np.arange(256, dtype=np.uint8)[None, ::-1, None].repeat(3, 2)
    plain = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    plain = (plain - torch.tensor(data.MEAN).view(3, 1, 1)) / torch.tensor(data.STD).view(3, 1, 1)
    assert torch.equal(to_tensor(image), plain)


# ---- what every dataset promises: a new class gets a line in this table ----
SIZES = dict(crop=8, short_side=12)
DATASETS = {"a folder": lambda path: layout(filled(path))(path, **SIZES),
            "voc20": lambda path: open_dataset("voc20", packed(path, "voc20"), **SIZES),
            "the world's training scenes": lambda path: World("train", length=3),
            "the world's test scenes": lambda path: World("val", length=3)}


@pytest.fixture(params=DATASETS)
def dataset(request, tmp_path):
    return DATASETS[request.param](tmp_path)


def test_a_dataset_says_what_it_is(dataset):
    """Names once each, groups of their ids, the size of a crop; checksum, route, key: text, which score files hold."""
    for names in (dataset.names, dataset.train_names):
        assert len(set(names)) == len(names) > 0 and all(type(name) is str for name in names)
    assert all(0 <= i < len(dataset.names) for ids in dataset.groups.values() for i in ids)
    assert dataset.crop > 0
    assert all(type(text) is str and text for text in (dataset.checksum, dataset.route, dataset.key))


def test_a_training_sample_is_a_function_of_seed_and_number(dataset):
    """Drawn again, in another order, by a copy as worker processes hold it: the same bits; another number, others."""
    first = [dataset.draw(5, n) for n in range(7)]            # more than an epoch of any of these
    copy = pickle.loads(pickle.dumps(dataset))
    again = [copy.draw(5, n) for n in reversed(range(7))][::-1]
    assert all(torch.equal(a, b) for one, two in zip(first, again) for a, b in zip(one, two))
    assert any(not torch.equal(first[0][0], image) for image, _ in first[1:])
    assert any(not torch.equal(first[n][0], dataset.draw(6, n)[0]) for n in range(7))


def test_a_training_sample_is_a_square_crop_with_ids_of_the_training_names(dataset):
    S = dataset.crop
    for n in range(7):
        image, label = dataset.draw(5, n)
        assert image.shape == (3, S, S) and image.dtype == torch.float32 and -3 < image.min() <= image.max() < 3
        assert label.shape == (S, S) and label.dtype == torch.int64
        assert set(label.unique().tolist()) <= {PADDING, IGNORE, *range(len(dataset.train_names))}


def test_a_test_sample_keeps_the_labels_size_and_iterating_ends(dataset):
    """The image at test resolution, the label and the original at theirs, ids of the names, something labelled."""
    samples = list(dataset)
    assert len(samples) == len(dataset) and len({s["name"] for s in samples}) == len(samples)
    for s in samples:
        assert s["image"].ndim == 3 and len(s["image"]) == 3 and s["image"].dtype == torch.float32
        assert s["label"].dtype == torch.int64 and s["original"].shape == (*s["label"].shape, 3)
        assert s["original"].dtype == np.uint8 and (s["label"] != IGNORE).any()
        assert set(s["label"].unique().tolist()) <= {IGNORE, *range(len(dataset.names))}
