"""What groups.py promises: whose a pixel is, how pure that is, and two pictures that show it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cli import InputError
from data import IGNORE, palette
from predict import UNNAMED
from runs import build
from siblings.grouping import shares
from studies import groups as G
from studies.pictures import INK
from tests.helpers import save_run, tiny
from tests.test_segmenter import small
from world.scenes import World


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(small("senatra", pretrained="world").run).eval()


@pytest.fixture(scope="module")
def scenes():
    return [World("val")[i] for i in range(2)]


def dense(owner, N):
    """A chain of one dense grouping in which every pixel belongs to one group: owner (2h,2w) -> [(1,4hw,N)]."""
    return [F.one_hot(torch.as_tensor(owner).flatten(), N).float()[None]]


# --- whose a pixel is -----------------------------------------------------------------------------------------------
def test_the_owner_of_a_pixel_is_the_group_with_the_largest_share(model, scenes, monkeypatch):
    """However many groups are looked at at once; at every stage of the way."""
    chain, grid, sizes = G.chain_of(model, scenes[0]["image"])
    assert grid == (4, 4) and sizes == ((64, 64), (64, 64)) and [A.dim() for A in chain] == [5, 5, 3]
    for k, n in ((1, 4), (2, 2), (3, 1)):
        there = (4 * n, 4 * n)
        want = shares(chain[:k], there)[0].argmax(-1)
        assert torch.equal(G.owners(chain[:k], there), want) and len(want.unique()) > 1
        monkeypatch.setattr(G, "AT_ONCE", 5)
        assert torch.equal(G.owners(chain[:k], there), want)


def test_groups_that_do_not_look_are_a_grid():
    """16 squares of 8x8 pixels of the first grid, numbered row by row; three times 2x3 on a wider map."""
    square = (torch.arange(32) // 8)[:, None] * 4 + torch.arange(32) // 8
    assert torch.equal(G.owners(G.uniform_chain((4, 4)), (4, 4)), square)
    assert G.owners(G.uniform_chain((2, 3)), (2, 3)).shape == (16, 24)


def test_a_picture_is_padded_and_its_padding_has_no_pixels(model):
    image = torch.randn(3, 40, 50)
    chain, grid, sizes = G.chain_of(model, image)
    assert grid == (3, 4) and sizes == ((40, 50), (48, 64))
    group = G.grouped_pixels(chain, grid, sizes, (80, 100))
    assert group.shape == (80, 100) and group.min() >= 0 and group.max() < 12
    maps = F.interpolate(shares(chain, grid).permute(0, 3, 1, 2), size=(48, 64), mode="bilinear")[..., :40, :50]
    assert (F.interpolate(maps, size=(80, 100), mode="bilinear")[0].argmax(0) == group).float().mean() > 0.999


def test_the_most_decided_group_by_hand():
    """One has a quarter of the pixels to itself; the others share the rest, about half each."""
    A = torch.tensor([[1.0, 0, 0], [0, .6, .4], [0, .4, .6], [0, .5, .5]])[None].repeat_interleave(3, 1)
    assert G.most_decided([A], (1, 3)) == 0
    assert G.most_decided([A[..., [1, 0, 2]]], (1, 3)) == 1


# --- how pure -------------------------------------------------------------------------------------------------------
class Two(list):
    names = ("a", "b", "c")


def test_purity_by_hand():
    """Two images of 2x4, two groups each, halves.  Of the first: left 3 a of 4, right 2 b of 3, one is void; of the
    second, whose groups have the same numbers but are others: left all c, right 2 of 4.  (3 + 2 + 4 + 2) of 15."""
    halves = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    labels = torch.tensor([[[0, 0, 1, 2], [0, 1, 1, IGNORE]], [[2, 2, 0, 1], [2, 2, 0, 1]]])
    data = Two(dict(image=label, label=label) for label in labels)

    def chains(image):
        return dense(halves, 2), (1, 2), ((2, 4), (2, 4))

    assert G.group_purity(chains, data, 5) == pytest.approx(11 / 15)
    assert G.group_purity(chains, data, 1) == pytest.approx(5 / 7)


# --- pictures -------------------------------------------------------------------------------------------------------
def pixel(picture, x, y):
    return np.asarray(picture)[round(y), round(x)].astype(int)


def test_outlines_and_colours_of_a_row():
    """Of a grid: white lines between cells of 4x4 and of 8x8 pixels, nothing tinted; the last in palette's colours."""
    picture = np.full((64, 64, 3), 100, np.uint8)
    fine, coarse, final = G.row_of(G.uniform_chain((4, 4)), (4, 4), ((64, 64), (64, 64)), picture)
    for drawn, side in ((fine, 4), (coarse, 8)):
        line = (np.arange(64) % side == 0) & (np.arange(64) > 0)
        want = np.where((line[:, None] | line)[..., None], 255, picture)
        assert np.array_equal(drawn, want)
    for j, (y, x) in enumerate((y, x) for y in (8, 24, 40, 56) for x in (8, 24, 40, 56)):
        assert np.abs(final[y, x] - (0.3 * 100 + 0.7 * palette(16)[j])).max() <= 1


def test_below_each_image_stand_groups_that_do_not_look_or_those_of_another_run(model, scenes):
    """Two rows an image, five columns; without another run there are no names below, with one there are."""
    names, cell = World.names, 80
    drawn = G.draw_groups(model, scenes, names, cell=cell)
    both = G.draw_groups(model, scenes, names, beside=model, cell=cell)
    assert drawn.size == both.size == (4 + 5 * (cell + 4), 24 + 4 * (cell + 4 + 18))
    below, column = 24 + cell + 22, 4 + 4 * (cell + 4)
    assert (np.asarray(drawn)[below + 2:below + cell - 2, column + 2:column + cell] == 255).all()
    first, second = (np.asarray(both)[y:y + cell, 88:] for y in (24, below))
    assert np.array_equal(first, second)                      # beside itself
    grid = G.row_of(G.uniform_chain((4, 4)), (4, 4), ((64, 64), (64, 64)), np.zeros((cell, cell, 3), np.uint8))[2]
    x, y = 4 + 3 * (cell + 4) + 5, below + 5
    assert np.abs(pixel(drawn, x, y) - grid[5, 5] - 0.3 * pixel(drawn, 4 + 5, 24 + 5)).max() <= 2


def test_a_group_on_its_way_up(model, scenes):
    """At 4x4 it is its own cell, then its shares of finer cells, in the image's colour; below, a bilinear one's."""
    drawn, cell = G.draw_chain(model, scenes[:1], cell=64), 64
    chain, grid, _ = G.chain_of(model, scenes[0]["image"])
    j = G.most_decided(chain, grid)
    y, x = divmod(j, 4)
    for row in (24, 24 + cell + 22):
        for k in range(16):
            at = pixel(drawn, 4 + 68 + 16 * (k % 4) + 8, row + 16 * (k // 4) + 8)
            assert np.abs(at - (INK[0] if k == j else 246)).max() <= 1
    share = shares(chain, grid)[0, ..., j]
    shown = pixel(drawn, 4 + 4 * 68 + 2 * 20 + 1, 24 + 2 * 9 + 1)
    assert np.abs(shown - (246 + share[9, 20].item() * (INK[0] - 246.0))).max() <= 1
    assert drawn.size == (4 + 5 * 68, 24 + 2 * (cell + 22))


def test_shares_are_shown_between_nearly_white_and_the_colour():
    shown = G.heat(torch.tensor([[0.0, 1.0, 0.5]]), np.array([46, 146, 246], np.uint8))
    assert shown.tolist() == [[[246, 246, 246], [46, 146, 246], [146, 196, 246]]]


# --- the command ----------------------------------------------------------------------------------------------------
def test_the_command_measures_draws_and_tells(model, tmp_path, monkeypatch, capsys):
    """Of few scenes: bilinear groups are the same whoever is asked; the trained rows are their own models'."""
    config = small("senatra", pretrained="world").run
    monkeypatch.setattr(G, "scored_on", lambda run: (World("val", 3), "three scenes"))
    for name in ("a", "b"):
        save_run(tmp_path / name, model, config)
    G.main([str(tmp_path / "a"), "--beside", str(tmp_path / "b"), "--images", "5"])
    said, told = capsys.readouterr().out, json.loads((tmp_path / "a" / "groups.json").read_text())
    assert {path.name for path in (tmp_path / "a" / "pictures").iterdir()} == {"groups.png", "chain.png"}
    rows = ["bilinear", "its groups", "before training", f"those of {tmp_path / 'b'}"]
    assert told["images"] == 3 and list(told["purity"]) == rows
    assert all(f"purity of 3 images, {row}: {told['purity'][row]:.3f}" in said for row in rows)
    assert told["purity"]["its groups"] == told["purity"][rows[3]]
    again = G.group_purity(lambda image: G.chain_of(model, image), World("val", 3), 3)
    assert told["purity"]["its groups"] == pytest.approx(again)
    assert 0.6 < told["purity"]["bilinear"] < 1 and "written: " in said
    G.main([str(tmp_path / "b"), "--images", "1"])
    assert list(json.loads((tmp_path / "b" / "groups.json").read_text())["purity"]) == rows[:3]


def test_the_untrained_row_is_the_model_of_the_runs_seed(tmp_path, monkeypatch):
    """A run that was never trained is as pure as before training."""
    config = small("senatra", seed=5, pretrained="none").run
    torch.manual_seed(5)
    save_run(tmp_path, build(config), config)
    monkeypatch.setattr(G, "scored_on", lambda run: (World("val", 1), ""))
    G.main([str(tmp_path), "--images", "1"])
    purity = json.loads((tmp_path / "groups.json").read_text())["purity"]
    assert purity["its groups"] == purity["before training"]


@pytest.mark.parametrize("argv, part", [(["RUN"], "SAN has no groups"), (["RUN", "--images", "0"], "--images 0: takes"),
                                        (["nowhere"], "config.json"), (["RUN", "--besides", "x"], "mean --beside")])
def test_wrong_commands_end_in_one_line(argv, part, tmp_path):
    save_run(tmp_path / "san", build(tiny("san").run), tiny("san"))
    with pytest.raises(InputError, match=part) as error:
        G.main([str(tmp_path / "san") if word == "RUN" else word for word in argv])
    assert "\n" not in str(error.value)


def test_no_pixel_is_left_without_a_group():
    group = G.grouped_pixels(G.uniform_chain((1, 2)), (1, 2), ((8, 16), (8, 16)), (8, 16))
    assert UNNAMED not in group and group[0].tolist() == [0] * 8 + [1] * 8
