"""What runs.py promises: configs of parts, checkpoints that join only what belongs together."""

import json
from pathlib import Path

import pytest
import torch

import runs
import train
from cli import InputError
from published.san_checkpoints import import_published
from runs import (MODELS, RunConfig, build, changed, filled, fingerprint, flat, layers, leaves,
                  load_checkpoint, load_config, load_run, load_weights, model_class, parse_value, preset, save_checkpoint,
                  trained_state, warm_start)
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
    save_checkpoint(tmp_path / "checkpoint.safetensors", models[0], optimizers[0], 2)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", models[1], optimizers[1]) == 2
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


def test_a_checkpoint_that_is_not_written_to_its_end_leaves_the_last_one(run, monkeypatch):
    """The disk is full after half of it: the run still has the checkpoint it had, bit for bit."""
    path, model = run[0] / "checkpoint.safetensors", run[1]
    before = path.read_bytes()

    def half(tensors, where, metadata):
        Path(where).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(runs, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, model, [], 8)
    assert path.read_bytes() == before


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
        load_weights(world(mixer=False), file)
    other = world()
    with torch.no_grad():
        other.vlm.model.visual.proj.add_(1)
    with pytest.raises(InputError, match="other CLIP weights"):
        load_weights(other, file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="checkpoint.safetensors: not a readable checkpoint"):
        load_run(path)
    file.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_run(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="no run directory"):
        load_run(path)


# --- starting from another run ---


def test_a_layer_stands_for_its_entries_only_if_all_are_there():
    everything = ["a.x", "a.y", "b.c.x", "b.c.y", "b.d", "e"]
    assert layers({"a.x", "a.y", "b.c.x", "b.c.y", "e"}, everything) == ["a", "b.c", "e"]
    assert layers({"a.x", "b.d", "b.c.x", "b.c.y"}, everything) == ["a.x", "b"]


def test_a_warm_start_takes_what_fits_and_lists_exactly_what_does_not(published, tmp_path):
    """PAT from SAN, with 12 queries instead of 20: the mask head has no place, the queries have another shape."""
    path, theirs, config = published
    import_published(path, tmp_path / "san", config)
    clip = str(tmp_path / "san" / "clip.safetensors")
    model = build(preset("world", pretrained=clip, queries=12))
    before = {name: value.clone() for name, value in trained_state(model).items()}
    said = warm_start(model, tmp_path / "san")
    after, state = trained_state(model), trained_state(theirs)
    taken = {name for name in after if not torch.equal(after[name], before[name])}
    shapes = {"side.query_embed", "side.query_pos_embed"}
    positions = "vlm.model.visual.positional_embedding"       # equal before and after: the imported CLIP brings its own
    assert taken == {name for name in state if not name.startswith("head.")} - shapes - {positions}
    assert all(torch.equal(after[name], state[name]) for name in taken | {positions})
    head = sum(name.startswith("head.") for name in state)
    assert said == (f"started from {tmp_path / 'san'}: {len(state) - head - 2} of its {len(state)} entries taken; "
                    "without a place here: head; not in it: decoder, latent, pixels, semantic; "
                    "of another shape or another CLIP: side.query_embed, side.query_pos_embed")


def test_over_another_clip_its_position_embedding_stays(published, tmp_path):
    path, theirs, config = published
    import_published(path, tmp_path / "san", config)
    model = build(preset("world", pretrained="world", model="san"))
    own = model.vlm.positions.clone()
    assert warm_start(model, tmp_path / "san").endswith("of another shape or another CLIP: vlm")
    assert torch.equal(model.vlm.positions, own) and torch.equal(model.side.query_embed, theirs.side.query_embed)


def test_as_many_numbers_in_another_shape_are_not_taken(run, monkeypatch):
    """(64,1) is not (1,64)."""
    own = {"background": torch.zeros(64, 1), "side.query_embed": torch.zeros(1, 20, 96)}
    monkeypatch.setattr(runs, "trained_state", lambda model: own)
    assert warm_start(*run[::-1]).endswith("of another shape or another CLIP: background")
    assert not own["background"].any() and own["side.query_embed"].any()


def test_a_warm_start_names_what_it_cannot_start_from(published, run, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    for where, says in [(published[0], "python -m published.san_checkpoints"), (tmp_path / "nowhere", "no run directory"),
                        (tmp_path / "broken", "not a readable checkpoint")]:
        with pytest.raises(InputError, match=says) as error:
            warm_start(world(), where)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(runs, "trained_state", lambda model: {"background": torch.zeros(1, 63), "other": torch.ones(1)})
    with pytest.raises(InputError, match="nothing in its checkpoint fits"):
        warm_start(world(), run[0])


def test_a_warm_started_run_resumes_bit_for_bit_and_brings_its_clip(published, tmp_path, capsys):
    """Two steps at once, and one, a stop, one more, from the command line; the second start needs no first run."""
    path, _, config = published
    import_published(path, tmp_path / "san", config)
    flags = ["--model", "san", "--init", str(tmp_path / "san"), "--steps", "2", "--batch", "2", "--set", "points=64",
             "--val-images", "1"]
    for more, starts in ((["--out", str(tmp_path / "whole")], True), (["--out", str(tmp_path / "broken"), "--stop-at", "1"], True),
                         (["--resume", str(tmp_path / "broken")], False)):
        if not starts:
            (tmp_path / "san" / "checkpoint.safetensors").unlink()
        train.train(*train.parse(flags * starts + more)[:2])
        assert ("started from" in "".join(capsys.readouterr())) == starts
    (a, config), (b, _) = (load_run(tmp_path / name) for name in ("whole", "broken"))
    assert config.net.clip.pretrained == str(tmp_path / "san" / "clip.safetensors")
    a, b = a.state_dict(), b.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
