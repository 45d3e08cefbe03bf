"""The benchmark measures the model it names, part by part."""

from collections import defaultdict

import torch

from bench import samples, timed, watch
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
