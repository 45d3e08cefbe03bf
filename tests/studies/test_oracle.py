"""What studies/oracle.py promises: true names on a model's own masks and its names on true masks, by hand, and what of a
score either gives back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import studies.oracle as O
from cli import InputError
from data import IGNORE
from predict import UNNAMED, segment
from runs import build, load_run
from segmenter import Answer, identity
from studies.pictures import GREY, INK
from tests.helpers import FakeModel, TwoHalves, generator, images, save_run, tiny, world
from world.scenes import World


def with_true_names(answer, label, padded, crop):
    return O.with_true_names(answer, O.overlaps(answer, label, padded, crop))


def test_a_mask_takes_the_name_of_most_of_its_pixels_by_hand():
    """Label 0 0 1 1 / 0 0 2 -.  Mask 0 holds the left half: name 0.  Mask 1 the right: two of 1, one of 2: name 1.  Mask
    2 only the 2, by .05.  Mask 3 only the pixel without a label, mask 4 is above a half nowhere: both are dropped."""
    label = torch.tensor([[0, 0, 1, 1], [0, 0, 2, -1]])
    maps = torch.full((5, 2, 4), -9.0)
    maps[0, :, :2], maps[1, :, 2:], maps[2, 1, 2], maps[3, 1, 3], maps[4] = 9, 9, 0.2, 9, -0.1
    wrong = torch.tensor([[0, 0, 1, 0.0]]).expand(5, 4)
    true = with_true_names(Answer(maps, mix=wrong, none=True), label, (2, 4), (2, 4))
    assert true.mix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]] and not true.none
    assert torch.equal(true.maps, maps)


def test_a_mask_keeps_the_weight_it_had_for_any_name():
    """Two equal masks over name 0: one is a quarter "none of these", the other all of it, and so has no say."""
    mix = torch.tensor([[0.0, 0.75, 0.25], [0.0, 0.0, 1.0]])
    true = with_true_names(Answer(torch.full((2, 1, 2), 9.0), mix=mix, none=True), torch.tensor([[0, 0]]), (1, 2), (1, 2))
    assert true.mix.tolist() == [[0.75, 0], [0, 0]]


def test_maps_that_are_weights_already_are_cut_at_a_half_too():
    """A gate of identity: .6 is inside and .4 is not."""
    maps = torch.tensor([[[0.6, 0.4]], [[0.4, 0.6]]])
    true = with_true_names(Answer(maps, mix=torch.ones(2, 2), gate=identity), torch.tensor([[1, 0]]), (1, 2), (1, 2))
    assert true.mix.tolist() == [[0, 1], [1, 0]]


def test_padding_is_cropped_before_a_mask_is_asked():
    """A mask that covers name 1 and much padding is a mask of name 1: the padding has no pixel in the label."""
    maps = torch.full((1, 4, 4), -9.0)
    maps[0, :, 1:] = 9                                        # columns 2 and 3 are padding
    true = with_true_names(Answer(maps, mix=torch.ones(1, 2)), torch.tensor([[0, 1]] * 4), (4, 4), (4, 2))
    assert true.mix.tolist() == [[0, 1]]


def test_a_model_without_masks_is_refused():
    with pytest.raises(InputError, match="has no masks"):
        O.overlaps(Answer(torch.ones(2, 4, 4), gate=identity), torch.zeros(4, 4).long(), (4, 4), (4, 4))


# --- true masks ------------------------------------------------------------------------------------------------------


def test_how_well_a_mask_fits_a_region_by_hand():
    """Four pixels of name 0, three of 1, one of neither, none of 2.  Mask 0 holds 3 and 1 of them, mask 1 none and 2: of
    mask 0 and name 0 together there are 4 + 4 - 3 = 5, so 3/5; of mask 1 and name 1: 2 / (2 + 3 - 2)."""
    inside, label = torch.tensor([[3.0, 1, 0], [0, 2, 0]]), torch.tensor([[0, 0, 0, 0], [1, 1, 1, IGNORE]])
    assert O.fits(inside, label).flatten().tolist() == pytest.approx([3 / 5, 1 / 6, 0, 0, 2 / 3, 0])


def test_a_true_region_is_called_as_the_mask_that_fits_it_by_hand():
    """The masks above: region 0 is called as mask 0 is, region 1 as mask 1, though mask 0 has a pixel of it; "none of
    these", the last column, is no name.  Name 2 has no pixel: nobody is asked."""
    inside, label = torch.tensor([[3.0, 1, 0], [0, 2, 0]]), torch.tensor([[0, 0, 0, 0], [1, 1, 1, IGNORE]])
    answer = Answer(torch.zeros(2, 2, 4), mix=torch.tensor([[0.1, 0.2, 0.0, 0.7], [0.4, 0.2, 0.3, 0.1]]), none=True)
    assert O.names_by_fit(answer, inside, label).tolist() == [1, 0, UNNAMED]
    unmet = torch.tensor([[3.0, 0, 0], [1, 0, 0]])
    assert O.names_by_fit(answer, unmet, label).tolist() == [1, UNNAMED, UNNAMED]


@pytest.fixture(scope="module")
def san():
    return load_run(generator())[0]


def scene_of_three(size=(64, 64)):
    """A label: name 3 on the left half, one pixel of name 5 in the right, 7 elsewhere, an unlabelled row below."""
    label = torch.full(size, 7)
    label[:, :size[1] // 2], label[0, -1], label[-1] = 3, 5, IGNORE
    return label


def test_a_plain_bias_is_0_where_a_cell_touches_the_region(san, monkeypatch):
    """8x8 cells of 8 pixels: name 3 has the four left columns, name 5 the one cell in the corner that holds its pixel,
    name 7 the right half, that cell too; -100 elsewhere, the same for every head.  Names go back to their own places."""
    asked, text = [], torch.eye(9, 64)

    def classify(pyramid, biases, text):
        asked.append(biases[0])
        return [torch.eye(3, 10)[None] + torch.eye(1, 10).roll(9, 1)[None] * 5]           # regions 0, 1, 2; none of these wins

    monkeypatch.setattr(san, "classify", classify)
    said = O.names_by_sight(san, images(1), text, scene_of_three(), (64, 64))
    bias, = asked
    assert said.tolist() == [-1, -1, -1, 0, -1, 1, -1, 2, -1] and bias.shape == (1, 4, 3, 8, 8)
    want = torch.full((3, 8, 8), -100.0)
    want[0, :, :4], want[1, 0, 7], want[2, :, 4:] = 0, 0, 0
    assert all(torch.equal(bias[0, head], want) for head in range(4))


def test_a_true_region_is_cut_to_the_input_and_ends_where_padding_begins(san, monkeypatch):
    """A label of 128x48 of an input of 64x24, padded to 64x40: everything but the two columns of cells that are padding."""
    asked = []
    monkeypatch.setattr(san, "classify", lambda pyramid, biases, text: asked.append(biases[0]) or [torch.zeros(1, 1, 3)])
    O.names_by_sight(san, images(1, 64, 40), torch.eye(2, 64), torch.ones(128, 48).long(), (64, 24))
    assert (asked[0][0, 0, 0, :, :3] == 0).all() and (asked[0][0, 0, 0, :, 3:] == -100).all()


@torch.no_grad()
def test_fisa_is_shown_true_regions_in_its_own_way():
    """As masks.  Back at CLIP itself, a region of everything is called as CLIP calls the picture; others otherwise."""
    net, image = world("fisa", generator=generator()).eval(), images(1)
    net.reset()
    text = torch.nn.functional.normalize(torch.randn(40, 64), dim=-1)
    best = (net.vlm.model.encode_image(image, normalize=True) @ text.T).argmax()
    said = O.names_by_sight(net, image, text, torch.full((64, 64), 2), (64, 64))
    assert said[2] == best and (said[:2] == UNNAMED).all()
    masks = 2 * (scene_of_three() == torch.tensor([3, 5, 7])[:, None, None]).float()[None] - 1
    want = net(image, text, masks=masks)["classes"][0][0, :, :-1].argmax(1)
    assert torch.equal(O.names_by_sight(net, image, text, scene_of_three(), (64, 64))[[3, 5, 7]], want)


def test_a_model_that_takes_no_masks_of_others_has_no_row_of_plain_biases():
    """And one whose masks and names are right scores 1 in every row it has."""
    found = O.oracle(FakeModel(pat=False).eval(), TwoHalves(), progress=False)
    assert [*found] == [O.SCORED, O.NAMES, O.OWN] and all(row["mIoU"] > 0.99 for row in found.values())


def test_every_pixel_of_a_true_region_gets_one_name_and_no_other_pixel_any(san):
    """And what is scored is what the model answers."""
    label, image, text = scene_of_three(), images(1)[0], torch.nn.functional.normalize(torch.randn(9, 64), dim=-1)
    found = O.rows_of(san, image, label, text)
    assert [*found] == [O.SCORED, O.NAMES, O.OWN, O.PLAIN]
    assert torch.equal(found[O.SCORED], segment(san, image, text, (64, 64))[0])
    for row in (O.OWN, O.PLAIN):
        assert all(len(found[row][label == name].unique()) == 1 for name in (3, 5, 7))
        assert (found[row][label == IGNORE] == UNNAMED).all() and (found[row][label == 3] != UNNAMED).all()


@torch.no_grad()
def test_the_bias_that_fits_is_the_models_own(san):
    """The best mask's name is what CLIP says through that mask's own bias: not asked again, and the same."""
    label, image, text = scene_of_three(), images(1), torch.nn.functional.normalize(torch.randn(9, 64), dim=-1)
    told, classify = [], san.classify
    san.classify = lambda *given: told.append(given) or classify(*given)
    answer = san.answer(san(image, text), 0)
    del san.classify
    inside = O.overlaps(answer, label, (64, 64), (64, 64))
    mask = O.fits(inside, label)[:, 3].argmax()
    pyramid, (*_, bias), _ = told[0]
    said = san.classify(pyramid, [bias[:, :, mask:mask + 1]], text)[0][0, 0, :-1].argmax()
    assert O.names_by_fit(answer, inside, label)[3] == said


# --- the table, the picture, the command -----------------------------------------------------------------------------


def test_perfect_masks_with_wrong_names_gain_everything(tmp_path, capsys, monkeypatch):
    """A model whose masks are the truth and whose names are all wrong: 0 as scored, 1 with true names."""
    torch.manual_seed(0)
    run = save_run(tmp_path / "run", build(tiny("san").run), tiny("san"))
    truth = iter([World("val", 3)[i]["label"] for i in range(3)])

    def answer(self, out, b=0):
        masks = torch.nn.functional.one_hot(next(truth), 70).movedim(-1, 0).float() * 40 - 20             # (70,64,64)
        return Answer(masks, mix=torch.eye(70).roll(1, 1))

    monkeypatch.setattr("san.SAN.answer", answer)
    O.main([str(run), "--images", "3"])
    found = json.loads((run / "oracle.json").read_text())[f"SAN {run}"]
    assert found["as scored"]["mIoU"] < 0.05 and found["oracle names"]["mIoU"] == 1
    assert found[O.OWN]["mIoU"] < 0.05                        # perfect masks were there already: only names are missing
    text = capsys.readouterr().out
    assert text == (run / "oracle.txt").read_text() and "gain" in text and "1.000" in text
    assert Image.open(run / "pictures" / "oracle.png").size[0] > 200


FOUND = {"as scored": dict(mIoU=0.4, mIoU_seen=0.5, mIoU_unseen=0.25, mIoU_stuff=None),
         "oracle names": dict(mIoU=0.6, mIoU_seen=0.75, mIoU_unseen=0.5, mIoU_stuff=None),
         "oracle masks, own bias": dict(mIoU=0.3, mIoU_seen=0.25, mIoU_unseen=1.0, mIoU_stuff=None)}


def test_the_table_says_what_each_row_gains_by_hand():
    assert O.gains(FOUND, "oracle names")[:4] == [pytest.approx(0.2), 0.25, 0.25, None]
    lines = O.format_oracle({"SAN runs/a": FOUND}).splitlines()
    assert len(lines) == 6 and lines[0].split() == ["mIoU", "seen", "unseen", "stuff", "fg/bg"]
    assert lines[2].split() == "SAN runs/a oracle names 0.600 0.750 0.500 n/m -".split()
    assert lines[3].split() == "gain +0.200 +0.250 +0.250 - -".split()
    assert lines[5].split() == "gain -0.100 -0.250 +0.750 - -".split()
    assert len({len(line) for line in lines}) == 1            # columns stand under their titles


def pixels(picture, x, top, bottom):
    return {tuple(colour) for colour in np.asarray(picture)[top:bottom, x].tolist()}


def test_a_bar_is_as_high_as_its_score():
    """Two panels, 220 pixels for 0 to 1; seen: .5 grey, then true masks .25, then true names .75; unseen: .25, 1, .5."""
    picture = O.bars({"SAN runs/a": FOUND})
    bottom, white = 96 + 220, (255, 255, 255)
    for left, heights in ((50, (0.5, 0.25, 0.75)), (50 + 200 + 40, (0.25, 1.0, 0.5))):
        for k, (height, colour) in enumerate(zip(heights, (GREY, tuple(INK[0]), tuple(INK[1])))):
            x, top = left + 20 + 29 * k + 4, bottom - round(220 * height)
            assert pixels(picture, x, top + 2, bottom - 2) == {colour}, (left, k)
            assert colour not in pixels(picture, x, 66, top - 2) and white in pixels(picture, x, 66, top - 2)


def test_data_without_seen_names_show_their_miou_alone():
    """One panel of 140 pixels a run, not two, whose bars are .4, .3 and .6 high."""
    plain = {row: dict(mIoU=scores["mIoU"]) for row, scores in FOUND.items()}
    four = O.bars({f"{k} r": plain for k in range(4)})
    assert four.size[0] == 40 + (60 + 4 * 140 + 40) < O.bars({f"{k} r": FOUND for k in range(4)}).size[0]
    assert pixels(four, 50 + 20 + 3 * 140 + 4, 316 - 86, 314) == {GREY} and GREY not in pixels(four, 494, 180, 316 - 90)


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--images 0: at least 1"):
        O.main(["RUN", "--images", "0"])
    with pytest.raises(InputError, match="none"):
        O.main([str(tmp_path / "none")])
