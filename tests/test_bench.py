"""The benchmark measures the model it names, part by part."""

from collections import defaultdict

import pytest
import torch

import data
import images
from bench import loader, main, photos, samples, timed, watch
from data import Folder
from images import InputError
from pat import build
from train import recipe


def test_timed_adds_up_and_changes_nothing():
    spent = defaultdict(float)
    twice = timed(lambda x: 2 * x, "double", spent)
    assert [twice(3), twice(4)] == [6, 8] and spent["double"] > 0


def test_every_part_reports_and_the_answer_stays():
    config = recipe("world", pretrained="none", batch=2)
    model, spent = build(config).eval(), defaultdict(float)
    image, text = samples(config, 2)[0], torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    before = model(image, text)["masks"][0]
    watch(model, spent)
    assert torch.equal(before, model(image, text)["masks"][0])
    assert set(spent) == {"CLIP features", "fusion", "pixel branch", "side ViT + semantic", "latent", "decoder",
                          "recognition"}


def test_samples_have_the_presets_size():
    image, label, numbers = samples(recipe("coco", pretrained="none"), 1)
    assert image.shape == (1, 3, 640, 640) and label.shape == (1, 640, 640) and 10 < len(label.unique()) <= 24
    assert numbers.tolist() == [0]


def test_the_loader_row_adds_up_to_the_whole_draw(tmp_path, capsys):
    """Images of 640x480; the parts' shares add up to 100 % (six roundings); afterwards nothing is timed any more."""
    before = data.read_image, data.to_tensor, images.resize_short, images.jitter
    photos(tmp_path, n=2)
    assert Folder(tmp_path).read(1)[0].shape == (480, 640, 3)
    loader(tmp_path, rounds=1, draws=2)
    rate, parts = capsys.readouterr().out.splitlines()
    assert rate.startswith("loader, 640x640 crops, 2 images: ") and rate.endswith("median of 1 rounds of 2")
    assert "images a second of CPU time: " in parts
    shares = [int(part.split()[-1].rstrip("%")) for part in parts.split(", ") if part[-1] == "%"]
    assert len(shares) == 6 and 97 <= sum(shares) <= 103
    assert (data.read_image, data.to_tensor, images.resize_short, images.jitter) == before


def test_data_is_for_the_loader_only():
    with pytest.raises(InputError, match="--data: only together with --loader"):
        main(["--data", "somewhere"])
