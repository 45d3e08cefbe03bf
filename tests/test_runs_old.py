"""Run directories of before November 2026, when a run had one flat config for every model, still mean what they meant."""

import json

import pytest
import torch

from cli import InputError
from runs import RunConfig, build, filled, flat, load_config, load_run, preset, read_config, save_checkpoint
from pat import PATConfig
from san import SANConfig
from tests.helpers import TEXT, images
from train import Recipe, parse

# config.json as it was written then, for either model: PAT's numbers stood in SAN's too.  None of them is a default.
OLD = json.loads("""{
 "vlm": "world", "pretrained": "none", "clip_scale": 0.9, "depths": [0, 1, 3, 4], "width": 48, "depth": 5, "heads": 3,
 "patch": 4, "grid": 9, "queries": 7, "head_width": 40, "model": "pat", "preset": "world", "seed": 11, "short_side": 48,
 "long_side": 200, "data": "photos", "val_data": "more", "ignore": 254, "codes": [9, 8, 7, 6], "code_dim": 16,
 "kappa": 21.5, "hs_heads": 2, "mixer_hidden": 20, "decoder_width": 24, "decoder_heads": 3, "spade_hidden": 12,
 "decoder_attention": "pooled", "scales": [2, 2, 1], "vmf": true, "mixer": true, "residual": false, "unified": false,
 "separate_decoders": true, "decoder_stages": ["mid", "late"], "kernels": "torch", "out": "somewhere", "init": "from",
 "steps": 77, "batch": 6, "accumulate": 2, "lr": 0.0003, "warmup": 9, "weight_decay": 0.02, "clip": 0.7,
 "precision": "fp32", "points": 333, "w_vq": 1.5, "w_align": 0.3, "w_rec": 2.5, "align": "literal", "crf_samples": 55,
 "restart_after": 4, "restart_share": 0.3, "workers": 1, "log_every": 3, "save_every": 44, "stop_at": 5, "val_images": 8}""")


def written(path, **changes):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**OLD, **changes}, indent=1))
    return path


def as_now(value):
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("model", ["pat", "san"])
def test_every_number_of_an_old_config_is_read(model, tmp_path):
    """All of the model's and the run's under their own names; PAT's in a run of SAN are nobody's."""
    config = load_config(written(tmp_path, model=model))
    renamed = {"kernels": "auto", "model": model}             # "torch" was what auto is on a CPU
    younger = {"align_latent": False, "perceptual": False, "recompute": False, "metric": "cosine"}     # vmf was its name
    numbers = flat(config)
    assert numbers == {name: renamed.get(name, as_now({**OLD, **younger}[name])) for name in numbers}
    assert isinstance(config, RunConfig) and isinstance(config.net, {"pat": PATConfig, "san": SANConfig}[model])
    gone = {"decoder_attention", "clip", "vmf"} | (set(flat(Recipe())) - {"grad_clip", "muon", "save_minutes"})
    only_of = {"pat": {"head_width"}, "san": set(flat(PATConfig())) - set(flat(SANConfig())) - younger.keys()}[model]
    assert set(OLD) - set(numbers) == gone | only_of


def test_the_loops_numbers_of_an_old_config_are_read(tmp_path):
    """`clip` was the norm that gradients are cut to."""
    recipe = filled(Recipe(), read_config(written(tmp_path)))
    numbers = flat(recipe)
    assert numbers == {name: {**OLD, "grad_clip": OLD["clip"], "muon": False, "save_minutes": 0.0}[name] for name in numbers}
    assert recipe.grad_clip == 0.7 and recipe.precision == "fp32"


def test_without_the_sphere_meant_the_dot_product(tmp_path):
    """`vmf` is now `metric`: true was the cosine, false the dot product."""
    assert load_config(written(tmp_path, vmf=False)).net.metric == "dot"
    assert load_config(written(tmp_path, vmf=True)).net.metric == "cosine"


def test_resuming_takes_all_of_them(tmp_path):
    config, resume, *_ = parse(["--resume", str(written(tmp_path))])
    assert resume and config.recipe.out == str(tmp_path) and config.recipe.stop_at == 0
    assert (config.recipe.grad_clip, config.recipe.steps, config.run.seed, config.run.net.side.width) == (0.7, 77, 11, 48)


def test_what_an_old_config_leaves_out_is_the_default(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "pat", "w_rec": 3.0}')
    config = load_config(tmp_path)
    assert config.net.w_rec == 3.0 and config.net.clip.vlm == "ViT-B-16" and config.net.side.width == 240


def test_the_clip_beside_an_old_run_is_found_wherever_it_lies(tmp_path):
    run = written(tmp_path / "moved", pretrained="clip.safetensors")
    assert load_config(run).net.clip.pretrained == "clip.safetensors"
    (run / "clip.safetensors").write_text("")
    assert load_config(run).net.clip.pretrained == str(run / "clip.safetensors")


@pytest.mark.parametrize("model", ["pat", "san"])
@torch.no_grad()
def test_an_old_run_loads(model, tmp_path):
    """Its config as it was written then, over a checkpoint of the same names: the same answer, bit for bit."""
    numbers = {"pat": dict(pretrained="none", scales=(2, 2, 1)), "san": dict(pretrained="none")}[model]
    config = preset("world", model, **numbers)
    torch.manual_seed(0)
    trained = build(config)
    for p in trained.parameters():
        p.add_(0.01 * torch.randn_like(p)) if p.requires_grad else None
    stored = {**OLD, **json.loads(json.dumps(flat(config))), "kernels": "torch"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    save_checkpoint(tmp_path, trained, [], 5)
    loaded, found = load_run(tmp_path)
    assert found == config and torch.equal(loaded(images(), TEXT)["masks"][0], trained.eval()(images(), TEXT)["masks"][0])


def test_a_config_that_names_no_model_there_is_says_so(tmp_path):
    with pytest.raises(InputError, match="pot: there are pat, san"):
        load_config(written(tmp_path, model="pot"))
