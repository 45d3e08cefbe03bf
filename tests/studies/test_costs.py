"""What studies/costs.py promises: likenesses as they are, on one scale a row, and what giving names up costs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import studies.costs as C
from cli import InputError
from data import IGNORE
from runs import build
from siblings.fgaseg import cosines
from tests.helpers import save_run
from tests.test_segmenter import small
from world.scenes import World


@pytest.fixture(scope="module")
def model():
    """Names differ at once: the auxiliary heads are not at their start."""
    torch.manual_seed(0)
    model = build(small("fgaseg").run).eval()
    with torch.no_grad():
        for head in model.aux:
            head.weight.normal_()
    return model


def test_a_row_has_one_scale_from_its_least_to_its_greatest_value():
    """-1 is the darkest, 3 the lightest, and the middle the middle, wherever they stand; all the same is all dark."""
    pictures, ends = C.heat(torch.tensor([[[-1.0, 1.0]], [[3.0, -1.0]]]))
    dark, middle, light = (C.SCALE[i].tolist() for i in (0, 2, 4))
    assert [picture.tolist() for picture in pictures] == [[[dark, middle]], [[light, dark]]] and ends == (-1, 3)
    assert C.heat(torch.zeros(1, 1, 1))[0][0].tolist() == [[dark]]


def test_the_names_shown_are_the_two_of_most_pixels_and_the_first_that_is_not_there():
    assert C.chosen(torch.tensor([[3, 3, 1, IGNORE], [1, 3, 0, IGNORE]]), 5) == [3, 1, 2]
    assert C.chosen(torch.tensor([[0, 0]]), 5) == [0, 1] and C.chosen(torch.tensor([[0, 1]]), 2) == [0, 1]


def test_likenesses_are_those_of_the_model_without_padding(model):
    """An image of 60x41 on a grid of 8x6; the cosine is with the text as CLIP gives it."""
    image, text = torch.randn(3, 60, 41), model.vlm.embed_text(World.names[:4])
    found = C.likenesses(model, image, text)
    assert {kind: tuple(maps.shape) for kind, maps in found.items()} == {
        "cosine": (4, 8, 6), "gcs": (4, 8, 6), "lcs": (4, 8, 6), "logits": (4, 30, 21)}
    padded = torch.nn.functional.pad(image, (0, 7, 0, 4))[None]
    with torch.no_grad():
        assert torch.equal(found["gcs"], model(padded, text)["gcs"][0])
        assert torch.allclose(found["cosine"], cosines(text[None], model.look(padded)[0])[0])
    assert (found["cosine"] - found["gcs"]).abs().max() > 1e-3


def test_every_kind_is_a_row_of_the_sheet(model, monkeypatch):
    """Three images, four rows each: the scene and its truth once, three names, and under the scene the ends of the scale."""
    given = {}
    monkeypatch.setattr(C, "contact_sheet", lambda rows, titles, cell, captions: given.update(rows=rows, captions=captions))
    C.costs(model, World("val", 3))
    assert len(given["rows"]) == 12 and all(len(row) == 4 for row in given["rows"])
    assert [row[0] is None for row in given["rows"]] == [False, False, True, True] * 3
    assert [caption[0].split(":")[0] for caption in given["captions"][:4]] == list(C.KINDS.values())
    label = World("val", 3)[0]["label"]
    assert given["captions"][3][1:] == [World.names[l] for l in C.chosen(label, 70)]
    low, high = map(float, given["captions"][3][0].split(": ")[1].split(" .. "))
    logits = C.likenesses(model, World("val", 3)[0]["image"], model.vlm.embed_text(World.names))["logits"]
    assert logits[C.chosen(label, 70)].min().item() == pytest.approx(low, abs=0.006) and low < high


def test_a_model_without_lcs_has_a_row_less_and_too_many_names_are_one_line(model, monkeypatch):
    torch.manual_seed(0)
    blank = build(small("fgaseg", lcs="none", p2t=False).run).eval()
    text = model.vlm.embed_text(World.names[:2])
    assert list(C.likenesses(blank, torch.randn(3, 64, 64), text)) == ["cosine", "gcs", "logits"]
    monkeypatch.setattr(model.config, "most_names", 69)
    with pytest.raises(InputError, match="70 names: costs shows 69"):
        C.costs(model, World("val", 3))


def test_how_many_names_are_tried():
    assert C.numbers_of_k(70) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 70] and C.numbers_of_k(1) == [1]


def test_with_every_name_nothing_is_lost_and_with_one_few_are_left(model):
    """The model is as it was after; more may survive a larger k."""
    dataset = World("val", 2)
    found = C.survive(model, dataset, 2, progress=False)
    assert found[0] == found[70] and found[0][0] == 70 and model.config.topk == 0
    left = [found[k][0] for k in C.numbers_of_k(70)]
    assert left[0] < 30 and left == sorted(left)
    assert C.survive(model, dataset, 9, progress=False) == found
    said = C.format_topk(found).splitlines()
    assert said[1].split() == ["whole", "70.0", f"{found[0][1]:.3f}"] and said[2].split()[0] == "1"


def test_the_picture_has_what_is_left_and_the_whole_beside_it(monkeypatch):
    drawn = {}
    monkeypatch.setattr(C, "plot", lambda figure, box, title, lines, steps: drawn.update({title: lines, "steps": steps}))
    picture = C.topk({0: (5.0, 0.5), 1: (2.0, 0.2), 3: (4.0, 0.4), 5: (5.0, 0.5)})
    assert drawn == {"names left": {"left": [(1, 2.0), (3, 4.0), (5, 5.0)]}, "steps": 5,
                     "mIoU": {"topk": [(1, 0.2), (3, 0.4), (5, 0.5)], "whole": [(1, 0.5), (5, 0.5)]}}
    assert picture.size == (900, 262)


def test_one_command_draws_both(model, tmp_path, monkeypatch, capsys):
    run = save_run(tmp_path / "run", model, small("fgaseg"))
    monkeypatch.setattr(C, "numbers_of_k", lambda L: [4, L])
    C.main([str(run), "--images", "1"])
    assert {path.name for path in (run / "pictures").iterdir()} == {"costs.png", "topk.png"}
    assert Image.open(run / "pictures/costs.png").width == 4 + 4 * 124 and "whole" in capsys.readouterr().out
    assert np.asarray(Image.open(run / "pictures/topk.png")).std() > 1


def test_a_run_without_auxiliary_heads_has_the_first_picture_alone(tmp_path, capsys):
    config = small("fgaseg", fast=False)
    run = save_run(tmp_path / "run", build(config.run), config)
    C.main([str(run)])
    assert {path.name for path in (run / "pictures").iterdir()} == {"costs.png"} and "whole" not in capsys.readouterr().out


@pytest.mark.parametrize("argv, part", [
    (["--images", "0"], "--images 0: at least 1"), (["--kappa", "3"], "unknown argument --kappa"),
    ([], "SAN compares no place")])
def test_wrong_commands_end_in_one_line(argv, part, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "san"}))
    with pytest.raises(InputError, match=part) as error:
        C.main([str(tmp_path), *argv])
    assert "\n" not in str(error.value) and len(list(tmp_path.iterdir())) == 1
