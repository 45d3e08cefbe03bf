"""What published/labels.py promises: other people's encodings of a label, worked by hand, or refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from cli import InputError
from published.labels import Masks, json_array, merged_masks, paint, read_16_bit, read_codes, read_mat, run_lengths, shrink
from tests.helpers import mat


# ---- Pascal Context ----
def test_later_masks_cover_earlier_ones():
    """The same two masks in both orders."""
    full, left = (2, dict(size=[1, 2], counts=[0, 2])), (9, dict(size=[1, 2], counts=[0, 1, 1]))
    assert paint(Masks("x", "y", 1, 2, [full, left])).tolist() == [[9, 2]]
    assert paint(Masks("x", "y", 1, 2, [left, full])).tolist() == [[2, 2]]


def test_masks_run_down_the_columns_zeros_first():
    """[1, 2, 3] of 2 rows and 3 columns: of the pixels counted down the columns the second and third; 0 elsewhere."""
    masks = [(7, dict(size=[2, 3], counts=[1, 2, 3]))]
    assert paint(Masks("x", "y", 2, 3, masks)).tolist() == [[0, 7, 0], [7, 0, 0]]


def test_one_json_holds_the_masks_of_the_validation_images(tmp_path):
    """Images of training are left out, and so are their masks; an image's masks stay in the order of the file."""
    image, mask = dict(height=2, width=3), dict(size=[2, 3], counts=[6])
    text = {"images": [dict(image_id=7, file_name="a.jpg", phase="val", **image),
                       dict(image_id=9, file_name="b.jpg", phase="train", **image)],
            "annos_segmentation": [dict(image_id=k, category_id=c, segmentation=mask) for k, c in ((7, 5), (9, 6), (7, 4))]}
    (tmp_path / "m.json").write_text(json.dumps(text))
    assert merged_masks(tmp_path / "m.json") == {"a": Masks(tmp_path / "m.json", "a", 2, 3, [(5, mask), (4, mask)])}


def test_cocos_text_by_hand():
    """"5" is 5; "R1": 82-48 = 34 = 2 and more follows, 49-48 = 1, so 2 + 1*32 = 34; "O" is 31 with the sign bit: -1.

    From the fourth on, numbers are differences to the one before the last: 5, 6, 7, then 6 + 1, then 7 - 1.
    """
    assert run_lengths("5") == [5] and run_lengths("R1") == [34]
    assert run_lengths("5671O") == [5, 6, 7, 7, 6] and run_lengths([1, 2]) == [1, 2] and run_lengths("") == []


def text_of(numbers):
    """The inverse of `run_lengths`, written from COCO's description of its format."""
    text = ""
    for k, number in enumerate(numbers):
        number -= numbers[k - 2] if k > 2 else 0
        while True:
            five, number = number & 31, number >> 5
            more = number != (-1 if five & 16 else 0)
            text += chr(48 + five + 32 * more)
            if not more:
                break
    return text


def test_cocos_text_and_back():
    """Run lengths of any size survive the text, with differences of both signs."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        numbers = [int(n) for n in rng.integers(0, 10 ** rng.integers(1, 7), rng.integers(1, 12))]
        assert run_lengths(text_of(numbers)) == numbers


@pytest.mark.parametrize("segmentation", [
    dict(size=[2, 3], counts=[1, 2]), dict(size=[3, 2], counts=[6]), dict(size=[2, 3]),
    dict(size=[2, 3], counts=[-1, 7]), dict(size=[2, 3], counts="4"),
    dict(size=[2, 3], counts=[10**14]), dict(size=[2, 3], counts=None), [[1.0, 2.0]]])
def test_a_mask_of_another_size_is_refused(segmentation):
    """Too few pixels, rows and columns exchanged, no counts, a negative run, far too many, a polygon."""
    with pytest.raises(InputError, match="x.json: image y: a mask of category 5 is no run-length code of 3x2 pixels"):
        paint(Masks("x.json", "y", 2, 3, [(5, segmentation)]))


def test_a_json_array_comes_one_object_at_a_time():
    """Blanks, commas and line ends between objects; other arrays are passed over; it stops at the bracket."""
    text = '{"a": [1, 2], "b" : [ {"x": [3]} ,\n {"x": 4}\n], "c": [5]}'
    assert list(json_array("f", text, "b")) == [{"x": [3]}, {"x": 4}] and list(json_array("f", text, "a")) == [1, 2]
    assert next(json_array("f", '[{"b": [7, ', "b")) == 7


# ---- ADE20K ----
def test_an_ade_code_by_hand(tmp_path):
    """wall: R = 110, G = 162 -> 11 * 256 + 162 = 2978, whatever B; 256 needs more than 8 bits: R = 10, G = 0."""
    rgb = np.array([[[110, 162, 3], [110, 162, 250], [0, 0, 9], [10, 0, 0]]], np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a_seg.png")
    assert read_codes(tmp_path / "a_seg.png").tolist() == [[2978, 2978, 0, 256]]


@pytest.mark.parametrize("pixels, why", [(np.full((1, 2, 3), 111, np.uint8), "red value of 111"),
                                         (np.zeros((1, 2), np.uint8), "holds L pixels, not ADE20K's RGB")])
def test_what_is_no_ade_code_is_refused(tmp_path, pixels, why):
    """The challenge's index maps, and any other picture."""
    Image.fromarray(pixels).save(tmp_path / "a_seg.png")
    with pytest.raises(InputError, match=f"a_seg.png: .*{why}.*ADE20K_2021_17_01"):
        read_codes(tmp_path / "a_seg.png")


def test_shrinking_by_hand():
    """5x10 to a short side of 2: scale 2.5, rows 0, floor(2.5) = 2; columns 0, 2, 5, 7.

    Bilinear without a filter: output column j lies at (j + .5) * 2.5 - .5 = .75, 3.25, 5.75, 8.25 of a ramp 0, 20, ...
    """
    label = np.arange(50).reshape(5, 10)
    image = np.repeat((np.arange(10) * 20)[None, :, None], 5, 0).repeat(3, 2).astype(np.uint8)
    small, ids = shrink(image, label, short=2)
    assert ids.tolist() == [[0, 2, 5, 7], [20, 22, 25, 27]]
    assert small.shape == (2, 4, 3) and small.dtype == np.uint8 and small[0, :, 0].tolist() == [15, 65, 115, 165]
    tall, turned = shrink(image.transpose(1, 0, 2).copy(), label.T, short=2)
    assert (turned == ids.T).all() and (tall == small.transpose(1, 0, 2)).all()
    assert shrink(image, label, short=5)[1] is shrink(image, label, short=6)[1] is label       # small enough already
    assert shrink(image, label)[1] is label and shrink(np.zeros((513, 520, 3), np.uint8), np.zeros((513, 520)))[1].shape == (512, 519)


def test_ids_above_255_need_16_bits(tmp_path):
    """256 and 65535 come through a 16-bit PNG or TIFF; a file of 8 bits may have lost them, and is refused."""
    for kind in ("png", "tiff"):
        Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / f"a.{kind}")
        assert read_16_bit(tmp_path / f"a.{kind}").tolist() == [[0, 256, 65535]]
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png: holds L pixels of 8 bits"):
        read_16_bit(tmp_path / "b.png")


@pytest.mark.parametrize("content, why", [
    (mat([[1, 2, 3]] * 2, np.uint8), "LabelMap is 2-D uint8, not 2-D uint16"), (mat([[1]], name="Labels"), "KeyError"),
    (b"not a mat file" * 40, "holds no LabelMap"), (mat([[1, 2, 3]] * 2)[:150], "holds no LabelMap"),
    (mat([[1, 2, 3]] * 2, np.float64), "2-D float64")])
def test_a_mat_that_may_have_lost_ids_is_refused(tmp_path, content, why):
    """8 bits cannot hold 459 ids; another variable, another file, half a file."""
    (tmp_path / "2008_000002.mat").write_bytes(content)
    with pytest.raises(InputError, match=f"2008_000002.mat: .*{why}.*trainval.tar.gz again") as caught:
        read_mat(tmp_path / "2008_000002.mat")
    assert "\n" not in str(caught.value)
