"""What studies/oracle.py promises: true names on a model's own masks, by hand, and what of a score they give back."""

import json

import pytest
import torch

import studies.oracle as O
from cli import InputError
from runs import build
from segmenter import Answer, identity
from tests.helpers import save_run, tiny
from world.scenes import World


def test_a_mask_takes_the_name_of_most_of_its_pixels_by_hand():
    """Label 0 0 1 1 / 0 0 2 -.  Mask 0 holds the left half: name 0.  Mask 1 the right: two of 1, one of 2: name 1.  Mask
    2 only the 2, by .05.  Mask 3 only the pixel without a label, mask 4 is above a half nowhere: both are dropped."""
    label = torch.tensor([[0, 0, 1, 1], [0, 0, 2, -1]])
    maps = torch.full((5, 2, 4), -9.0)
    maps[0, :, :2], maps[1, :, 2:], maps[2, 1, 2], maps[3, 1, 3], maps[4] = 9, 9, 0.2, 9, -0.1
    wrong = torch.tensor([[0, 0, 1, 0.0]]).expand(5, 4)
    true = O.with_true_names(Answer(maps, mix=wrong, none=True), label, (2, 4), (2, 4))
    assert true.mix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]] and not true.none
    assert torch.equal(true.maps, maps)


def test_a_mask_keeps_the_weight_it_had_for_any_name():
    """Two equal masks over name 0: one is a quarter "none of these", the other all of it, and so has no say."""
    mix = torch.tensor([[0.0, 0.75, 0.25], [0.0, 0.0, 1.0]])
    true = O.with_true_names(Answer(torch.full((2, 1, 2), 9.0), mix=mix, none=True), torch.tensor([[0, 0]]), (1, 2), (1, 2))
    assert true.mix.tolist() == [[0.75, 0], [0, 0]]


def test_maps_that_are_weights_already_are_cut_at_a_half_too():
    """A gate of identity: .6 is inside and .4 is not."""
    maps = torch.tensor([[[0.6, 0.4]], [[0.4, 0.6]]])
    true = O.with_true_names(Answer(maps, mix=torch.ones(2, 2), gate=identity), torch.tensor([[1, 0]]), (1, 2), (1, 2))
    assert true.mix.tolist() == [[0, 1], [1, 0]]


def test_padding_is_cropped_before_a_mask_is_asked():
    """A mask that covers name 1 and much padding is a mask of name 1: the padding has no pixel in the label."""
    maps = torch.full((1, 4, 4), -9.0)
    maps[0, :, 1:] = 9                                        # columns 2 and 3 are padding
    true = O.with_true_names(Answer(maps, mix=torch.ones(1, 2)), torch.tensor([[0, 1]] * 4), (4, 4), (4, 2))
    assert true.mix.tolist() == [[0, 1]]


def test_a_model_without_masks_is_refused():
    with pytest.raises(InputError, match="has no masks"):
        O.with_true_names(Answer(torch.ones(2, 4, 4), gate=identity), torch.zeros(4, 4).long(), (4, 4), (4, 4))


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
    text = capsys.readouterr().out
    assert text == (run / "oracle.txt").read_text() and "gain" in text and "1.000" in text


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--images 0: at least 1"):
        O.main(["RUN", "--images", "0"])
    with pytest.raises(InputError, match="none"):
        O.main([str(tmp_path / "none")])
