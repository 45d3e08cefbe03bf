"""What pictures.py, and the drawing of predict.py, promise: names and tokens where they belong, in fixed colours."""

import numpy as np
import pytest
import torch

from cli import InputError
from data import palette
from predict import overlay, spread, token_map
from studies.pictures import INK, Axis, Figure, contact_sheet, make_folder, place, plot, write_names


def test_the_overlay_tints_names_and_leaves_unnamed_pixels_alone():
    image, colours = np.full((3, 3, 3), 100, np.uint8), palette(2)
    tinted = overlay(image, torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0]]), colours, strength=0.5)
    assert np.abs(tinted[0, 0] - (100 + colours[0].astype(float)) / 2).max() <= 0.5
    assert (overlay(image, torch.full((3, 3), -1), colours) == image).all()


def test_a_token_keeps_its_square_and_its_colour():
    """A 2x2 token grid over an 8x8 input of which 8x6 is image, drawn at twice the size: columns 0-7 | 8-11."""
    index = torch.tensor([[0, 1], [2, 3]])
    drawn = token_map(index, 4, (8, 6), (8, 8), (16, 12))
    colours = palette(4)
    assert drawn.shape == (16, 12, 3)
    assert (drawn[:8, :8] == colours[0]).all() and (drawn[:8, 8:] == colours[1]).all() and (drawn[8:, 8:] == colours[3]).all()


def test_padding_is_not_drawn():
    """A token map of 2x2 over 16x16, of which 16x8 is picture: only its left column shows."""
    index = torch.tensor([[0, 1], [2, 3]])
    assert spread(index, (16, 8), (16, 16), (4, 2)).tolist() == [[0, 0], [0, 0], [2, 2], [2, 2]]


def pixel(picture, x, y):
    return np.asarray(picture)[round(y), round(x)]


def ellipse(h, w, y, x, a, b):
    yy, xx = np.mgrid[:h, :w]
    return ((yy - y) / a) ** 2 + ((xx - x) / b) ** 2 < 1


@pytest.mark.parametrize("region, lines", [
    (ellipse(120, 160, 60, 50, 40, 45), 2), (ellipse(120, 160, 30, 100, 20, 55), 1),
    (ellipse(200, 160, 100, 80, 95, 30), 2)], ids=["round", "flat", "tall"])
def test_a_name_is_written_inside_its_region(region, lines):
    """Nothing outside the region changes, and something inside does; only the flat one has the name on one line."""
    picture = np.full((*region.shape, 3), 128, np.uint8)
    written = write_names(picture, np.where(region, 0, -1), ["orange circle"])
    changed = (written != picture).any(-1)
    assert changed.any() and not changed[~region].any()
    assert (written == 255).all(-1).any() and (written == 20).all(-1).any()               # white, outlined
    text, _, box = place(region, "orange circle")
    assert text.split("\n") == (["orange circle"] if lines == 1 else ["orange", "circle"])
    assert region[box[1]:box[3], box[0]:box[2]].all()


def test_a_region_too_small_for_its_name_is_named_around_its_middle_within_the_picture():
    region = np.zeros((40, 160), bool)
    region[10:14, 2:8] = True
    _, _, (left, top, right, bottom) = place(region, "orange circle")
    assert left == 0 and 0 <= top <= 11 < bottom <= 40 and right <= 160


def test_each_region_of_a_name_is_named_and_specks_are_not():
    prediction = np.full((60, 300), -1)
    prediction[:, :100], prediction[:, 200:], prediction[30, 150] = 0, 0, 0
    written = write_names(np.zeros((60, 300, 3), np.uint8), prediction, ["sky"]).any(-1)
    assert written[:, :100].any() and written[:, 200:].any() and not written[:, 100:200].any()


def test_axes_put_values_at_their_pixels_and_have_round_ticks():
    across, up = Axis(0, 1000, 50, 250), Axis(0.01, 1, 200, 100, log=True)
    assert across(0) == 50 and across(250) == 100 and across(1000) == 250
    assert up(0.1) == pytest.approx(150) and up(1) == pytest.approx(100)                  # a decade is half the height
    assert across.ticks() == [0, 200, 400, 600, 800, 1000]
    assert up.ticks() == pytest.approx([0.01, 0.1, 1]) and Axis(1, 6, 0, 1, log=True).ticks() == [1, 2, 5]


def test_a_known_point_is_drawn_at_its_pixel():
    """A line from (0,1) to (100,100) on a log axis passes (50,10) and not (50,50)."""
    figure = Figure(300, 200)
    across, up = plot(figure, (40, 30, 240, 180), "", {"a": [(0, 1.0), (100, 100.0)]}, log=True, steps=100)
    drawn = figure.image()
    assert (pixel(drawn, across(100), up(100)) == INK[0]).all()                           # the end, a dot
    assert np.abs(pixel(drawn, across(50), up(10)).astype(int) - INK[0]).max() < 90       # on the line, half covered
    assert (pixel(drawn, across(50), up(50)) == 255).all()


def test_captions_stay_under_their_pictures():
    """A caption too long is set smaller and then cut: nothing is drawn in the gap beside its cell."""
    cell = np.full((50, 50, 3), 200, np.uint8)
    sheet = np.asarray(contact_sheet([[cell, cell]], ["a", "b"], 50, [["x" * 60, ""]]))
    strip = sheet[24 + 50:, :, 0]
    assert (strip[:, 4:54] < 200).any() and (strip[:, 54:] == 255).all()


def test_a_folder_is_made_with_its_parents_or_refused(tmp_path):
    """Once more is no error; where a file stands, it is one."""
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/b: cannot be made a folder \(Not a directory\)"):
        make_folder(tmp_path / "file" / "b")
