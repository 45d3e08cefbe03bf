"""The benchmark measures the model it names, part by part."""

import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from cli import InputError
from kernels.muon import Muon
from published import augment, folder
from published.folder import Folder
from runs import build
from studies import speed
from studies.speed import loader, main, measure, photos, samples, timed, watch
from train import recipe


def test_timed_adds_up_and_changes_nothing():
    spent = defaultdict(float)
    twice = timed(lambda x: 2 * x, "double", spent)
    assert [twice(3), twice(4)] == [6, 8] and spent["double"] > 0


def test_a_part_within_a_part_counts_once():
    """The inner second is the outer part's, and an error lets the next part be timed."""
    spent = defaultdict(float)
    inner = timed(lambda: time.sleep(0.02), "inner", spent)
    timed(lambda: inner(), "outer", spent)()
    assert spent["outer"] >= 0.02 and "inner" not in spent
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0, "broken", spent)()
    inner()
    assert 0.02 <= spent["inner"] < spent["outer"] + 0.02


def test_every_part_reports_and_the_answer_stays():
    config = recipe("world", pretrained="none", batch=2)
    model, spent = build(config.run).eval(), defaultdict(float)
    image, text = samples(config, 2)[0], torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    before = model(image, text)["masks"][0]
    watch(model, spent)
    assert torch.equal(before, model(image, text)["masks"][0])
    assert set(spent) == {"CLIP features", "fusion", "pixel branch", "side ViT + semantic", "latent", "decoder",
                          "recognition"}


@pytest.mark.parametrize("name, chosen", [("san", {}), ("pat", {"recompute": True}), ("dense", {})])
def test_a_row_measures_any_model_of_the_registry(name, chosen):
    """A round of training and one of inference: the parts take no longer than the whole, CLIP's features among them."""
    for training in (True, False):
        median, peak, mean, spent = measure("world", name, chosen, training, 2, 1, "cpu")
        assert 0 < sum(spent.values()) <= mean and median == mean and peak > 0
        assert "CLIP features" in spent and ("decoder" in spent) == (name == "pat")


def test_a_round_of_training_ends_with_the_recipes_own_optimisers(monkeypatch):
    """In the world Muon's step was once half of PAT's, and a benchmark with one AdamW for all did not see it."""
    stepped = []
    monkeypatch.setattr(Muon, "step", lambda self: stepped.append("muon"))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: stepped.append("adamw"))
    measure("world", "san", {}, True, 2, 1, "cpu")
    assert stepped == ["adamw", "muon"] * 2


def test_where_vgg_is_missing_a_row_is_measured_without_lpips_and_the_table_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(speed, "recipe", lambda *args, **numbers: recipe("world", "pat", **{**numbers, "perceptual": True}))
    assert measure("world", "pat", {}, True, 1, 1, "cpu")[0] > 0

    def first_row(*_):
        raise InputError("enough")

    monkeypatch.setattr(speed, "ProcessPoolExecutor", first_row)
    for preset, told in (("coco", True), ("world", False)):
        with pytest.raises(InputError, match="enough"):
            main(["--preset", preset])
        assert ("without LPIPS, whose VGG-16 is not here" in capsys.readouterr().out) == told


def test_memory_is_three_batches_of_three_rows(monkeypatch, capsys):
    """SAN, PAT, PAT with recompute, each training with 1, 2 and 4 images; ratios are to SAN with as many."""
    asked = []

    class Fresh:
        def __init__(self, *_): ...
        def __enter__(self): return self
        def __exit__(self, *_): ...

        def submit(self, function, preset, name, chosen, training, batch, rounds, device):
            asked.append((preset, name, chosen, training, batch))
            return SimpleNamespace(result=lambda: (batch * (1.0 if name == "san" else 4.0), 2.5, 1.0, {}))

    monkeypatch.setattr(speed, "ProcessPoolExecutor", Fresh)
    main(["--preset", "coco", "--memory", "--rounds", "1"])
    assert asked == [("coco", name, chosen, True, batch) for batch in (1, 2, 4)
                     for name, chosen in (("san", {}), ("pat", {}), ("pat", {"recompute": True}))]
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:3] in ("SAN", "PAT")]
    assert lines[5].split() == ["PAT,", "recompute:", "training,", "2", "8.000", "0.2", "2.50", "4.00"]
    with pytest.raises(InputError, match="--memory: not together with --loader"):
        main(["--memory", "--loader"])


def test_samples_have_the_presets_size():
    image, label, numbers = samples(recipe("coco", pretrained="none"), 1)
    assert image.shape == (1, 3, 640, 640) and label.shape == (1, 640, 640) and 10 < len(label.unique()) <= 24
    assert numbers.tolist() == [0]


def test_the_loader_row_adds_up_to_the_whole_draw(tmp_path, capsys):
    """Images of 640x480; the parts' shares add up to 100 % (six roundings); afterwards nothing is timed any more."""
    before = folder.read_image, folder.to_tensor, augment.resized, augment.jitter
    photos(tmp_path, n=2)
    assert Folder(tmp_path).read(1)[0].shape == (480, 640, 3)
    loader(tmp_path, rounds=1, draws=2)
    rate, parts = capsys.readouterr().out.splitlines()
    assert rate.startswith("loader, 640x640 crops, 2 images: ") and rate.endswith("median of 1 rounds of 2")
    assert "images a second of CPU time: " in parts
    shares = [int(part.split()[-1].rstrip("%")) for part in parts.split(", ") if part[-1] == "%"]
    assert len(shares) == 6 and 97 <= sum(shares) <= 103
    assert (folder.read_image, folder.to_tensor, augment.resized, augment.jitter) == before


def test_data_is_for_the_loader_only():
    with pytest.raises(InputError, match="--data: only together with --loader"):
        main(["--data", "somewhere"])
