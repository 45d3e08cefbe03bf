"""What runs.py promises: configs of parts, checkpoints that join only what belongs together."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import runs
from cli import InputError
from runs import (CHECKPOINTS, MODELS, RunConfig, changed, filled, fingerprint, flat, leaves, load_checkpoint, load_config,
                  load_run, load_weights, model_class, parse_value, preset, read_checkpoint, save_checkpoint, trained_state,
                  write_checkpoint)
from tests.helpers import world
from train import Recipe, Training, recipe

every_model = pytest.mark.parametrize("model", MODELS)

# --- configs: parts, and leaves with names of their own --------------------------------------------------------------


@every_model
def test_every_preset_and_recipe_names_only_numbers_that_exist(model):
    """And of the kind that the default has, or `--set` could not say it; every ablation too."""
    kind = model_class(model)
    own, loop = flat(kind.Config()), flat(Recipe())
    for numbers in (*kind.PRESETS.values(), *kind.ABLATIONS.values()):
        assert numbers.keys() <= own.keys()
        assert all(type(value) is type(own[name]) for name, value in numbers.items())
    for name, numbers in kind.RECIPES.items():
        assert name in kind.PRESETS and numbers.keys() <= loop.keys()
        assert all(type(value) in (type(loop[n]), int) for n, value in numbers.items())


def parts_of(config):
    """Every dataclass of a config, itself first."""
    inner = [value for value in vars(config).values() if hasattr(value, "__dataclass_fields__")]
    return [config, *(part for value in inner for part in parts_of(value))]


@every_model
def test_a_config_is_flat_on_disk_and_comes_back(model):
    """Every leaf name is unique among all parts of a Training, or flat() would lose a number."""
    config = recipe("world", model, seed=3, short_side=48)
    names = [name for part in parts_of(config) for name, value in vars(part).items()
             if not hasattr(value, "__dataclass_fields__")]
    assert len(names) == len(set(names)) and set(names) == leaves(config).keys() == flat(config).keys()
    stored = json.loads(json.dumps(flat(config)))
    assert all(not isinstance(value, dict) for value in stored.values())
    default = Training(RunConfig(model_class(model).Config()))
    assert filled(default, stored) == config != default       # tuples are tuples again
    assert filled(default, {**stored, "a number of tomorrow": 1}) == config
    assert filled(config, {}) == config


def test_changing_a_config_leaves_the_first_as_it_was():
    first = preset("world")
    second = changed(first, short_side=32, codes=(1, 2, 3, 4))
    assert (first.net.clip.short_side, second.net.clip.short_side) == (64, 32) and second.net.codes == (1, 2, 3, 4)
    assert first == preset("world")


@pytest.mark.parametrize("config, name, says", [
    (preset("world"), "curvature", "model pat has no number called curvature"),
    (preset("world"), "code_dims", "has no number called code_dims; did you mean code_dim.$"),
    (preset("world", "san"), "w_rec", "model san has no number called w_rec: that number is PAT's"),
    (preset("world"), "dense_width", "model pat has no number called dense_width: that number is DENSE's")])
def test_an_unknown_number_is_one_line_that_helps(config, name, says):
    with pytest.raises(InputError, match=says) as error:
        changed(config, **{name: 1})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("default, text, value", [
    (1.0, "60", 60.0), (2, "3", 3), ("auto", "plain", "plain"), (True, "false", False), (False, "True", True),
    ((4, 2, 1), "2,2,1", (2, 2, 1)), ((4, 2, 1), "", ()), (("early", "late"), "late", ("late",)), ((), "0, 2", (0, 2))])
def test_the_text_of_a_number_gets_the_kind_of_its_default(default, text, value):
    found = parse_value("x", default, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("default, text, says", [
    (1.0, "much", "x=much: takes a number, such as 1.0"), (2, "1.5", "takes a whole number, such as 2"),
    (True, "maybe", "takes true or false, such as True"), ((1, 2), "1,b", "takes values with commas between")])
def test_the_wrong_kind_is_one_line_with_an_example(default, text, says):
    with pytest.raises(InputError, match=says) as error:
        parse_value("x", default, text)
    assert "\n" not in str(error.value)


def test_a_run_of_before_loads(run, tmp_path):
    """Its config.json says `clip` of the gradient norm, kernels `torch`, and numbers that are no more."""
    path, model = run
    stored = json.loads((path / "config.json").read_text())
    del stored["grad_clip"]
    stored.update(clip=0.125, kernels="torch", decoder_attention="pooled")
    (path / "config.json").write_text(json.dumps(stored))
    assert filled(Recipe(), stored).grad_clip == 0.125 and load_config(path).net.kernels == "auto"
    loaded, _ = load_run(path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_the_registry_refuses_what_it_does_not_hold():
    with pytest.raises(InputError, match="--model pot: there are pat, san, dense"):
        model_class("pot")
    with pytest.raises(InputError, match="no preset of san is called 'moon'; there are world, coco"):
        preset("moon", "san")


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Momentum(torch.optim.Optimizer):
    """As Muon: it keeps a momentum for each parameter, and no counter."""

    def __init__(self, params):
        super().__init__(params, dict(lr=0.1, rate=1.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                p.sub_(buffer.mul_(0.9).add_(p.grad), alpha=group["lr"])


def two_optimizers(model):
    """Momentum for the weights of the side blocks, AdamW for all else."""
    chosen = {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("side.blocks")}
    parts = [[p for name, p in model.named_parameters() if p.requires_grad and (name in chosen) == mine]
             for mine in (True, False)]
    return [Momentum(parts[0]), torch.optim.AdamW(parts[1], lr=0.01)]


def stepped(model, optimizers, step):
    """A step under gradients that `step` alone determines."""
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g) if p.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()


def test_every_optimisers_state_is_saved_and_goes_on_bit_for_bit(tmp_path):
    """Two steps of AdamW and of one that has momenta alone; saved, loaded into a new model, a third step: as never stopped."""
    models = [world("san"), world("san")]
    optimizers = [two_optimizers(model) for model in models]
    for step in range(2):
        stepped(models[0], optimizers[0], step)
    save_checkpoint(tmp_path, models[0], optimizers[0], 2)
    assert load_checkpoint(tmp_path, models[1], optimizers[1]) == 2
    assert [len(optimizer.state) for optimizer in optimizers[1]] == [len(optimizer.state) for optimizer in optimizers[0]]
    kinds = [{kind for state in optimizer.state.values() for kind in state} for optimizer in optimizers[1]]
    assert kinds == [{"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}]
    for model, both in zip(models, optimizers):
        stepped(model, both, 2)
    a, b = (trained_state(model) for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_holds_what_training_changes_and_not_the_frozen_clip(run):
    names = set(trained_state(run[1]))
    assert "vlm.model.visual.positional_embedding" in names and "latent.idle" in names
    assert not any("resblocks" in name for name in names)


@pytest.mark.parametrize("breaks", ["fsync", "replace"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(run, monkeypatch, breaks):
    """Whatever the disk refuses, the run still has the checkpoint it had, bit for bit, nothing else, and one line says so."""
    path, model = run[0] / CHECKPOINTS[0], run[1]
    before, there = path.read_bytes(), sorted(run[0].iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, breaks, full)
    with pytest.raises(InputError, match="cannot be written .No space left on device.; what stood there is whole"):
        save_checkpoint(run[0], model, [], 8)
    assert path.read_bytes() == before and sorted(run[0].iterdir()) == there


def test_the_last_two_checkpoints_are_kept_and_the_newest_is_taken(run):
    path, model = run
    for step in (1, 2, 3):
        save_checkpoint(path, model, [], step)
    assert [read_checkpoint(path)[1]["step"], runs.read_file(path / CHECKPOINTS[1])[1]["step"]] == ["3", "2"]
    assert not [file for file in path.iterdir() if file.name.startswith(".")]


def test_a_flipped_bit_anywhere_is_noticed_and_the_checkpoint_before_is_taken(run, capsys):
    """In the first tensor, in the last, and in the step that the header tells: then the newest is not taken, and said to be so."""
    path, model = run
    for step in (4, 5):
        save_checkpoint(path, model, [], step)
    whole = (path / CHECKPOINTS[0]).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in (header, header + 1000, len(whole) - 1, whole.index(b'"step":"5"') + 8):
        (path / CHECKPOINTS[0]).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        assert read_checkpoint(path)[1]["step"] == "4"
        said = capsys.readouterr().err
        assert "checkpoint.safetensors: damaged, its checksum" in said and said.count("\n") == 1
        assert "instead checkpoint.before.safetensors is taken, of step 4" in said
    (path / CHECKPOINTS[1]).write_bytes(whole[:1000])
    with pytest.raises(InputError, match="checkpoint.safetensors: damaged"):
        read_checkpoint(path)


def test_a_checkpoint_of_tomorrow_is_refused_and_one_of_before_has_no_checksum(run):
    path, model = run
    tensors, told = read_checkpoint(path)
    write_checkpoint(path, tensors, **{**told, "format": "3"})
    with pytest.raises(InputError, match="of format 3; this program reads 2"):
        runs.read_file(path / CHECKPOINTS[0])
    save_file(tensors, path / CHECKPOINTS[0], {"step": "7", "vlm": told["vlm"]})              # as it was written until then
    assert runs.read_file(path / CHECKPOINTS[0])[1] == {"step": "7", "vlm": told["vlm"]}


def test_a_number_that_is_not_finite_is_never_saved(run):
    """A code that has not begun is behind by inf images: that is a buffer, and means something."""
    path, model = run
    assert model.latent.idle.isinf().all()
    before = (path / CHECKPOINTS[0]).read_bytes()
    with torch.no_grad():
        model.background[0, 3] = torch.nan
    with pytest.raises(InputError, match="background is not finite after 9 steps; the checkpoint in .* stays as it was"):
        save_checkpoint(path, model, [], 9)
    assert (path / CHECKPOINTS[0]).read_bytes() == before


def test_files_of_a_run_obey_the_umask(run):
    before = os.umask(0o027)
    try:
        save_checkpoint(run[0], run[1], [], 8)
    finally:
        os.umask(before)
    assert (run[0] / CHECKPOINTS[0]).stat().st_mode & 0o777 == 0o640


def test_a_run_is_loaded_ready_to_answer(run):
    """In eval mode, with the kernels of this machine however it was trained, whatever was drawn before."""
    path, model = run
    stored = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**stored, "kernels": "plain"}))
    torch.manual_seed(99)
    loaded, config = load_run(path)
    assert not any(module.training for module in loaded.modules()) and config.net.kernels == "auto"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_other_clip_weights_have_another_fingerprint():
    a, b = world(), world()
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        b.vlm.model.visual.ln_post.bias[0] += 1e-3
    assert fingerprint(a) != fingerprint(b)


def test_damaged_and_foreign_checkpoints_are_refused(run, tmp_path):
    path, model = run
    file = path / "checkpoint.safetensors"
    with pytest.raises(InputError, match="another preset or other switches"):
        load_weights(world(mixer=False), read_checkpoint(path), path)
    other = world()
    with torch.no_grad():
        other.vlm.model.visual.proj.add_(1)
    with pytest.raises(InputError, match="other CLIP weights"):
        load_weights(other, read_checkpoint(path), path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="checkpoint.safetensors: not a readable checkpoint"):
        load_run(path)
    file.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_run(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="no run directory"):
        load_run(path)


# --- ranges ----------------------------------------------------------------------------------------------------------


@every_model
def test_every_number_of_every_model_has_a_range_beside_it_or_is_a_word(model):
    """A number that can be out of range silently is a test that nobody wrote: this is that test, for those to come too."""
    for name, part in leaves(recipe("world", model)).items():
        spec = next(field for field in dataclasses.fields(part) if field.name == name)
        assert type(spec.default) in (bool, str) or "low" in spec.metadata or "allowed" in spec.metadata, name


def wrong_for(spec):
    """Values that a field of a config must not take: other kinds, words it does not know, beyond both ends."""
    kind, limits = type(spec.default), spec.metadata
    wrong = {bool: ["yes", 2], str: [3, ("a",)], int: [1.5, "3", True], tuple: [5, (1.5,), (None,)],
             float: ["1", True, float("nan"), float("inf"), -float("inf")]}[kind] + [None, {}]
    if "allowed" in limits:
        wrong += [("no such word",) if kind is tuple else "no such word"]
    if "low" in limits:
        ends = [limits["low"] - 1, limits["high"] + 1]
        wrong += [(end,) * (limits["n"] or 1) for end in ends] if kind is tuple else ends
    return wrong + ([(1,) * (limits["n"] + 1), ()] if limits.get("n") else [])


@every_model
def test_what_is_out_of_range_or_of_another_kind_is_refused_for_every_number_by_name(model):
    """NaN, infinities, beyond both ends, another kind: as a number of ours, and from a config.json that somebody edited."""
    config = recipe("world", model)
    for name, part in leaves(config).items():
        spec = next(field for field in dataclasses.fields(part) if field.name == name)
        for value in wrong_for(spec):
            for way in (lambda: changed(config, **{name: value}), lambda: filled(config, {name: value})):
                with pytest.raises(InputError) as error:
                    way()
                assert str(error.value).startswith(f"{name} ") and "\n" not in str(error.value)
    assert changed(config, lr=1).recipe.lr == 1.0 and type(changed(config, lr=1).recipe.lr) is float


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, capsys):
    """A process writes one after the other, as fast as it can: who reads beside it is never told that one is damaged."""
    program = """
import torch, runs
k = 0
while True:
    runs.write_checkpoint("RUN", {f"t{i}": torch.full((1000,), float(k)) for i in range(40)}, step=str(k))
    k += 1
"""
    with subprocess.Popen([sys.executable, "-c", program.replace("RUN", str(tmp_path))], cwd=Path(runs.__file__).parent) as writer:
        while writer.poll() is None and not (tmp_path / CHECKPOINTS[1]).exists():
            time.sleep(0.02)
        steps, ends = set(), time.monotonic() + 4
        while time.monotonic() < ends:
            tensors, told = read_checkpoint(tmp_path)
            steps.add(told["step"])
            assert all((value == float(told["step"])).all() for value in tensors.values())
        writer.kill()
    assert capsys.readouterr().err == "" and len(steps) > 20
