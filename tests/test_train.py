"""The loop: the loss falls, stopping changes nothing, and neither does the number of processes."""

import json
import os
import shutil
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import pat
import san
import train
from cli import InputError
from data import PADDING
from guards.flags import replaced
from guards.stopping import Stopped, Stopping
from published.images_of import training_set
from runs import MODELS, build, changed, flat, load_config, load_run, model_class, read_checkpoint, save_checkpoint, trained_state
from tests.helpers import TINY, TINY_OF, encoded, micro_batches, pack, picture, tiny
from train import Recipe, Stream, check_recipe, gradients, learning_rate, parameter_groups, parse, recipe
from world.scenes import World

ROOT = Path(train.__file__).parent


def one_step(config, rank=0, processes=1):
    """Gradients in float64 of the first step; name -> tensor."""
    torch.manual_seed(config.run.seed)
    model = build(config.run).double().train()
    text = model.vlm.embed_text(World.train_names)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    gradients(wrapped, text, micro_batches(config, rank, processes), config, processes)
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def process(rank, processes, configs, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    results = [one_step(config, rank, processes) for config in configs]
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


def on_processes(n, configs, path):
    """What `one_step` gives for each config, on n processes that exchange."""
    mp.spawn(process, (n, configs, 29000 + os.getpid() % 1000, path), nprocs=n)
    return torch.load(path, weights_only=True)


def same(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < tolerance, name


@pytest.fixture
def unscored(monkeypatch):
    """The directories of the runs that were over: none is scored, which takes longer than a few steps."""
    over = []
    monkeypatch.setattr("studies.report.score_and_draw", lambda run, *args: over.append(run))
    return over


# --- the step, by hand -----------------------------------------------------------------------------------------------


def test_the_first_step_is_adamws_with_clipped_gradients_at_the_schedules_rate(monkeypatch, tmp_path):
    """p becomes p (1 - lr decay) - lr g / (|g| + 1e-8), g the gradient cut to the global norm, lr the first of a warm-up.

    AdamW's first step hardly depends on the length of g, unless g is as small as its 1e-8: so 1e-6 is the norm here.
    Of four steps of warm-up to 0.01 the first has 0.01 / 4; the side network's own rate is half of that.
    """
    monkeypatch.setattr(san.SAN, "rates", {"side.": 0.5})
    config = tiny("san", muon=False, seed=3, steps=8, stop_at=1, warmup=4, lr=0.01, weight_decay=4.0, grad_clip=1e-6,
                  out=str(tmp_path / "run"))
    torch.manual_seed(3)
    model = build(config.run).train()
    gradients(model, model.vlm.embed_text(World.train_names), micro_batches(config), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norm = sum(p.grad.double().square().sum() for p in trained.values()).sqrt().item()
    run = train.train(config)
    assert norm > 0.1 and json.loads((run / "log.jsonl").read_text())["grad_norm"] == pytest.approx(norm, rel=1e-4)
    after = trained_state(load_run(run)[0])
    assert after.keys() == trained.keys()
    for name, p in trained.items():
        lr = 0.00125 if name.startswith("side.") else 0.0025
        decay = 0.0 if any(word in name for word in ("norm", "pos_embed", "positional", "query_embed")) else 4.0
        g = p.grad * 1e-6 / norm
        torch.testing.assert_close(after[name], (p * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)).detach(), rtol=0, atol=2e-6,
                                   msg=lambda text: f"{name}: {text}")
    assert (run / "names.txt").read_text().splitlines() == list(World.train_names)


def test_a_second_step_forgets_the_gradients_of_the_first(steps, tmp_path):
    """At rate 0 the weights stay, so the second step's gradients are those of its own images alone."""
    config = tiny("san", muon=False, steps=3, stop_at=2, lr=0.0, grad_clip=1e9, out=str(tmp_path / "run"))
    train.train(config)
    torch.manual_seed(config.run.seed)
    model = build(config.run).train()
    gradients(model, model.vlm.embed_text(World.train_names), micro_batches(config, step=1), config)
    grads = [p.grad.norm() for p in model.parameters() if p.requires_grad]
    assert steps[1][1] == pytest.approx(torch.stack(grads).norm().item(), rel=1e-4)


def test_the_loop_takes_a_batch_in_passes(unscored, tmp_path):
    """Four images at once, or two and two: the same lines of log; it ends after its steps, wherever it may stop."""
    logs = []
    for passes in (1, 2):
        run = train.train(tiny("san", steps=2, stop_at=9, accumulate=passes, out=str(tmp_path / f"run{passes}")))
        logs.append([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()])
    assert unscored == [tmp_path / "run1", tmp_path / "run2"] and [line["step"] for line in logs[1]] == [0, 1]
    for one, two in zip(*logs, strict=True):
        for name in ("ce_1", "mask_1", "dice_1", "ce_2", "mask_2", "dice_2", "grad_norm", "lr"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_what_each_pass_is_told(monkeypatch):
    """Draws are keyed by the seed and the number of the image, whatever its pass; totals are of the whole step; fp32."""
    told, terms = [], san.SAN.terms
    monkeypatch.setattr(san.SAN, "terms", lambda self, out, batch: (told.append(batch), terms(self, out, batch))[1])
    config = tiny("san", accumulate=2, seed=7)
    model, parts, rounded = build(config.run).train(), micro_batches(config, step=3), []
    model.register_forward_pre_hook(lambda *_: rounded.append(torch.is_autocast_enabled("cpu")))
    gradients(model, model.vlm.embed_text(World.train_names), parts, config)
    assert [batch.keys for batch in told] == [[(7, 12), (7, 13)], [(7, 14), (7, 15)]]
    whole = model.totals(torch.cat([labels for _, labels, _ in parts]))
    assert rounded == [False, False] and config.recipe.precision == "bf16"                # which is for a GPU
    for batch, (_, labels, _) in zip(told, parts, strict=True):
        assert torch.equal(batch.labels, labels) and batch.parts == 2
        torch.testing.assert_close(batch.totals, whole)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_term_that_is_not_finite_is_named(monkeypatch, value):
    terms = san.SAN.terms
    monkeypatch.setattr(san.SAN, "terms", lambda *args: {**terms(*args), "far": (0.0, torch.tensor(float(value)))})
    config = tiny("san")
    model = build(config.run).train()
    with pytest.raises(FloatingPointError, match=f"loss term far is {value}"):
        gradients(model, model.vlm.embed_text(World.train_names), micro_batches(config), config)


def numbers_of(stream):
    return [stream.number(i) for i in range(len(stream))]


def test_passes_of_two_processes_are_numbered_by_hand():
    """Eight images a step, two processes, two passes: a pass of a process is two images; draws have the seed."""
    class Echo:
        draw = staticmethod(lambda seed, n: (f"seed {seed}", f"sample {n}"))

    config = tiny(steps=3, batch=8, accumulate=2, seed=5)
    first, second = (Stream(Echo, config, 1, rank, 2) for rank in range(2))
    assert numbers_of(first) == [8, 9, 12, 13, 16, 17, 20, 21] and numbers_of(second) == [10, 11, 14, 15, 18, 19, 22, 23]
    assert len(second) == 8 and second[0] == ("seed 5", "sample 10", 10) and second[7] == ("seed 5", "sample 23", 23)


def test_lines_and_checkpoints_come_as_often_as_asked(steps, monkeypatch, tmp_path):
    """Every third step is logged and the last of all; every second is saved, and where it stops; by this clock each takes 1 s."""
    saved = []
    monkeypatch.setattr(train, "save_checkpoint", lambda run, model, optimizers, step: saved.append(step))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: float(len(steps)), monotonic=lambda: 0.0))
    run = train.train(tiny("san", steps=9, stop_at=7, log_every=3, save_every=2, out=str(tmp_path / "run")))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 5] and saved == [2, 4, 6, 7]
    assert [line["ms_per_step"] for line in lines] == [1000.0] * 2
    run = train.train(tiny("san", steps=4, log_every=3, out=str(tmp_path / "other")))
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [2, 3]


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_the_papers_numbers_of_the_loop():
    """AdamW at 1e-4 with decay 1e-4, 120,000 steps of 12 images, clipped at 0.01; the paper states no warm-up."""
    paper = dict(steps=120_000, batch=12, lr=1e-4, weight_decay=1e-4, grad_clip=0.01)
    ours = dict(out="", init="", accumulate=1, warmup=0, muon=False, precision="bf16", workers=4, log_every=50, save_every=1000,
                save_minutes=0.0, stop_at=0, val_images=300)
    assert asdict(Recipe()) == {**paper, **ours}
    assert recipe("coco").recipe == recipe("coco", "san").recipe == Recipe()
    (optimizer,) = build(tiny("san").run).optimizers(
        [dict(params=[torch.zeros(1, requires_grad=True)], muon=False)], Recipe())
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["lr"] == 1e-4


@pytest.mark.parametrize("model", ["pat", "san", "dense"])
def test_the_worlds_numbers_of_the_loop(model):
    """Ten minutes on two cores: 1,300 steps of 8 scenes, warmed up over 100."""
    assert recipe("world", model).recipe == Recipe(steps=1300, batch=8, lr=4e-3, muon=True, warmup=100, grad_clip=1.0,
                                                   weight_decay=0.01, save_every=200, log_every=20, val_images=1000, workers=0)


@pytest.mark.parametrize("numbers, processes, says", [
    (dict(batch=7, accumulate=2), 1, "--batch 7 .* 1 processes x 2 accumulation steps; the nearest that can is 8"),
    (dict(batch=8, accumulate=1), 3, "--batch 8 .* 3 processes x 1 accumulation steps; the nearest that can is 9"),
    (dict(batch=1, accumulate=2), 2, "the nearest that can is 4"), (dict(seed=2**32), 1, "seed 4294967296: takes")])
def test_a_batch_or_seed_that_cannot_be_is_refused(numbers, processes, says):
    with pytest.raises(InputError, match=says):
        check_recipe(tiny("san", **numbers), processes)
    check_recipe(tiny("san", batch=12, accumulate=2, seed=2**32 - 1), 3)


def test_a_run_that_starts_from_another_takes_its_clip(tmp_path):
    """Unless --pretrained says otherwise, or it stands on another CLIP altogether."""
    (tmp_path / "config.json").write_text(json.dumps(flat(tiny("san", pretrained="none"))))
    start = ["--init", str(tmp_path)]
    for flags, pretrained in [([], "world"), (start, "none"), ([*start, "--pretrained", "other"], "other"),
                              ([*start, "--vlm", "ViT-B-16"], "world")]:
        assert parse(flags)[0].run.net.clip.pretrained == pretrained, flags


# --- processes, passes, stops ----------------------------------------------------------------------------------------


def test_three_processes_compute_the_gradient_of_one(tmp_path):
    """A batch of 6 on one process; 2 + 2 + 2 on three; 1 + 1 + 1 twice on three: every gradient in float64 to 1e-9.  (Two
    processes, for every model: tests/test_segmenter.py.)"""
    whole = one_step(tiny("san", batch=6))
    for parts in on_processes(3, [tiny("san", batch=6), tiny("san", batch=6, accumulate=2)], tmp_path / "g.pt"):
        same(whole, parts)


def test_accumulation_computes_the_gradient_of_the_whole_batch():
    same(one_step(tiny()), one_step(tiny(accumulate=2)))


def test_the_stream_covers_every_image_once_however_it_is_split():
    whole = numbers_of(Stream(None, tiny(steps=3), 0, 0, 1))
    parts = [numbers_of(Stream(None, tiny(steps=3), 0, rank, 2)) for rank in range(2)]
    assert whole == list(range(12)) and sorted(parts[0] + parts[1]) == whole
    assert numbers_of(Stream(None, tiny(steps=3), 2, 0, 1)) == [8, 9, 10, 11]
    assert len(Stream(None, tiny(steps=10**8), 0, 0, 1)) == 4 * 10**8                         # computed, not listed


@pytest.mark.parametrize("model", ["pat", "san"])
def test_a_short_training_lowers_the_loss(model, tmp_path):
    """Forty steps over the shipped CLIP: naming, and for PAT pixels and codes, fall well below the first.  (Not to half of
    it: pixels start as the mean image, and 49 names are learned by objects of four scenes a step.)"""
    config = tiny(model=model, steps=40, lr=3e-3, warmup=5, pretrained="world", out=str(tmp_path / "run"))
    lines = [json.loads(line) for line in (train.train(config) / "log.jsonl").read_text().splitlines()]
    mean = lambda name, part: sum(line[name] for line in part) / len(part)                # noqa: E731
    for name, ratio in [("ce_2", 0.85)] + [("l2", 0.6), ("vq", 0.75)] * bool(model_class(model).stages):
        assert mean(name, lines[-8:]) < ratio * lines[0][name], name
    assert {"config.json", "log.jsonl", "checkpoint.safetensors", "scores.txt", "scores.json", "samples.png",
            "pictures"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_resuming_equals_never_having_stopped(tmp_path):
    """Six steps at once, and three, a stop, three more: every weight, every logged loss, bit for bit."""
    for name, stops in (("whole", [6]), ("broken", [3, 6])):  # of seven: nothing is scored
        for k, stop in enumerate(stops):
            train.train(tiny(steps=7, restart_after=2, stop_at=stop, out=str(tmp_path / name)), resume=k > 0)
    a, b = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "broken")]
    for x, y in zip(*logs, strict=True):
        assert {k: v for k, v in x.items() if k != "ms_per_step"} == {k: v for k, v in y.items() if k != "ms_per_step"}


@pytest.mark.parametrize("flags", [
    ["--ablate", "no-vmf"], ["--ablate", "no-vmf-dot"], ["--ablate", "scales-4-4-4"], ["--ablate", "scales-1-1-1"], ["--ablate", "no-align"],
    ["--set", "align=literal"], ["--ablate", "no-mixer"], ["--ablate", "no-residual"], ["--ablate", "unified"],
    ["--ablate", "separate-decoders"], ["--ablate", "one-stage-removed"], ["--ablate", "two-stages-removed"],
    ["--ablate", "three-stages-removed"], ["--model", "san"]], ids=" ".join)
def test_every_row_of_table_two_trains_a_step(flags, tmp_path):
    """From the command line to finite losses; the row's terms are the ones it claims.  Those of other parts than PAT's are
    scored and drawn as well."""
    config, *_ = parse([*flags, "--out", str(tmp_path / "run")])
    stop = 0 if flags[1] in ("no-mixer", "unified", "separate-decoders", "three-stages-removed", "san") else 2
    small = {**TINY, **TINY_OF[config.run.model], "steps": 2 + bool(stop), "stop_at": stop, "batch": 2}
    line = json.loads((train.train(changed(config, **small)) / "log.jsonl").read_text().splitlines()[-1])
    assert ("crf" in line) == (flags not in (["--ablate", "no-align"], ["--model", "san"]))
    assert ("l2" in line) == (flags != ["--model", "san"])


def test_the_learning_rate_warms_up_decays_and_ends_at_zero():
    config = tiny(lr=1.0, warmup=10, steps=100, stop_at=60).recipe
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 50) == pytest.approx(0.5**0.9)
    assert learning_rate(config, 99) == pytest.approx(0.01**0.9)


def test_norms_positions_queries_and_codebooks_do_not_decay():
    model = build(tiny().run)
    decay, free = groups = parameter_groups(model, tiny(weight_decay=0.01, muon=False).recipe)
    assert [(group["weight_decay"], group["rate"]) for group in groups] == [(0.01, 1.0), (0.0, 1.0)]
    decay, free = (set(map(id, group["params"])) for group in (decay, free))
    where = {name: id(p) in free for name, p in model.named_parameters() if p.requires_grad}
    assert not decay & free and len(decay | free) == len(where)
    for name in ("side.query_embed", "side.query_pos_embed", "side.pos_embed", "latent.codebook", "side.blocks.0.norm1.bias",
                 "fusion.0.norm.weight", "vlm.model.visual.positional_embedding", "semantic.0.norm_t.weight"):
        assert where[name], name
    for name in ("side.blocks.0.attn.qkv.weight", "side.blocks.0.attn.qkv.bias", "background", "decoder.lift.late.weight"):
        assert not where[name], name


def test_only_the_very_names_of_positions_queries_and_codebooks_are_free_of_decay():
    """A layer called "compose" holds "pos" and decays all the same; so do its codebook's own linear and a pose."""
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rates, self.compose, self.codebook_in = {}, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            self.pose, self.pos_embed, self.codebook = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))

    model = Other()
    decay, free = parameter_groups(model, Recipe())
    assert {name for name, p in model.named_parameters() if any(p is other for other in free["params"])} == {"pos_embed", "codebook"}
    assert decay["weight_decay"] == 1e-4 and free["weight_decay"] == 0 and len(decay["params"]) == 5


def test_padding_is_told_apart_from_what_nobody_labelled(monkeypatch):
    """Of a row class 3, void, padding, a model is told labels 3, -1, -1, and that the last one is not inside; nor do the
    totals count it."""
    config, told = tiny("san", batch=1), []
    model = build(config.run).train()
    (image, labels, numbers), = micro_batches(config)
    labels[:] = -1
    labels[0, :, :30], labels[0, :, 40:] = 3, PADDING
    terms, totals = model.terms, model.totals
    monkeypatch.setattr(model, "terms", lambda out, batch: told.append(batch) or terms(out, batch))
    monkeypatch.setattr(model, "totals", lambda labels: told.append(labels) or totals(labels))
    gradients(model, model.vlm.embed_text(World.train_names), [(image, labels, numbers)], config)
    counted, batch = told
    assert torch.equal(batch.labels, counted) and batch.labels[0, 5].tolist() == [3] * 30 + [-1] * 34
    assert batch.inside[0, 5].tolist() == [True] * 40 + [False] * 24 and batch.inside.shape == labels.shape


def test_muon_has_the_matrices_and_adamw_norms_biases_convolutions_codebooks_queries_and_single_rows():
    """Of PAT in the world: each trained parameter in one group; Muon's have two sides of more than one, and decay."""
    config = tiny("pat")
    model = build(config.run)
    groups = parameter_groups(model, config.recipe)
    names = {p: name for name, p in model.named_parameters()}
    of = {muon: {names[p] for group in groups if group["muon"] == muon for p in group["params"]} for muon in (True, False)}
    assert of[True] | of[False] == {name for name, p in model.named_parameters() if p.requires_grad} and not of[True] & of[False]
    assert {"side.blocks.0.mlp.fc1.weight", "decoder.lift.early.weight", "semantic.1.tok.weight"} <= of[True]
    assert {"background", "latent.codebook", "side.query_embed", "side.pos_embed", "side.patch_embed.weight"} <= of[False]
    assert not any(word in name for name in of[True] for word in ("norm", "bias", "codebook", "embed"))
    assert all(group["weight_decay"] == 0.01 for group in groups if group["muon"])
    assert not any(group["muon"] for group in parameter_groups(model, tiny("pat", muon=False).recipe))


def test_rows_that_a_model_says_are_new_lose_their_moments_within_the_step(monkeypatch, unscored, tmp_path):
    """after_step names the one row of the background: its moments are zero in the checkpoint, the others' are not."""
    monkeypatch.setattr(san.SAN, "after_step", lambda self, *_: {self.background: torch.ones(1).bool()})
    run = train.train(tiny("san", steps=1, out=str(tmp_path / "run")))
    state = load_file(run / "checkpoint.safetensors")
    assert not state["adam.exp_avg.background"].any() and not state["adam.exp_avg_sq.background"].any()
    assert state["adam.exp_avg.side.query_embed"].any() and state["adam.step.background"] == 1


def test_presets_are_the_papers_recipe():
    config, *_ = parse(["--preset", "coco", "--data", "somewhere"])
    loop, net = config.recipe, config.run.net
    assert (loop.steps, loop.batch, loop.lr, loop.weight_decay, loop.grad_clip) == (120_000, 12, 1e-4, 1e-4, 0.01)
    assert (net.clip.vlm, net.clip.pretrained, net.codes, net.points) == ("ViT-B-16", "openai", (128, 64, 32, 256), 12544)
    eva, *_ = parse(["--preset", "coco-eva", "--model", "san"])
    assert (eva.run.net.clip.vlm, eva.run.model) == ("EVA02-B-16", "san")


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, says", [
    (["--stepz", "3"], "did you mean --steps"), (["--batch", "7", "--accumulate", "2"], "--batch 7 cannot be split"),
    (["--model", "pot"], "pot"), (["--preset", "moon"], "moon"), (["--preset", "coco"], "--data DIR"),
    (["--data", "nowhere"], "nowhere"), (["--resume", "nowhere"], "nowhere"), (["--set", "align=tight"], "align tight"),
    (["--steps", "many"], "many"), (["--steps", "0"], "steps 0"), (["--accumulate", "0"], "accumulate 0"),
    (["--seed", "-1"], "seed -1"), (["--precision", "bf61"], "bf61"), (["--precision", "fp16"], "there are bf16, fp32"),
    (["--model", "san", "--ablate", "no-align"], "--ablate no-align: san has nothing to switch off"),
    (["--model", "san", "--set", "unified=true"], "model san has no number called unified: that number is PAT's"),
    (["--ablate", "no-mixxer"], "--ablate no-mixxer: pat has no-vmf, .*; did you mean no-mixer"),
    (["--ablate", "tokens"], "--ablate tokens: pat has no-vmf, no-vmf-dot, scales-4-4-4"),
    (["--set", "w_rek=1"], "no number called w_rek; did you mean w_rec"), (["--set", "w_rec"], "--set w_rec: takes NAME=VALUE"),
    (["--set", "mixer=perhaps"], "mixer=perhaps: takes true or false"), (["--set", "scales=a,b"], "scales=a,b: takes values with"),
    (["--set", "w_rec=much"], "w_rec=much: takes a number, such as 120.0"), (["--set", "points=1.5"], "takes a whole number"),
    (["--set", "dense_width=3"], "model pat has no number called dense_width: that number is DENSE's"),
    (["--resume", "runs/x", "--set", "w_rec=1"], "runs/x: no run directory"),
    (["--w-rec", "1"], "--w-rec is now --set w_rec=..."), (["--no-mixer"], "--no-mixer is now --ablate no-mixer"),
    (["--clip=0.5"], "--clip is now --set grad_clip=..."), (["--scales", "4", "4", "4"], "--scales is now --set scales=..."),
    (["--unified"], "--unified is now --ablate unified"), (["--decoder-stages"], "now --set decoder_stages"),
    (["--from-scratch"], "--from-scratch is now python -m world.pretrain"),
    (["--ablations"], "--ablations is now python -m studies.ablations")])
def test_bad_flags_end_in_one_line(flags, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        config, resume, device = parse([*flags] if "--resume" in flags else [*flags, "--out", str(tmp_path / "run")])
        train.train(config, resume, "cpu")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_set_gives_any_number_its_kind_wherever_it_lives():
    """Of the loop, of the model, of its parts; the last one counts, and --set beside its own flag agrees with it."""
    pairs = ["w_rec=1", "scales=2,2,1", "mixer=false", "decoder_stages=late", "depths=0,1,2,3", "width=48", "warmup=7",
             "grad-clip=0.5", "align = literal", "lr=3e-4", "w_vq=1", "w_vq=2"]
    config, resume, *_ = parse([word for pair in pairs for word in ("--set", pair)])
    net, loop = config.run.net, config.recipe
    assert (net.w_rec, net.scales, net.mixer, net.decoder_stages, net.w_vq) == (1.0, (2, 2, 1), False, ("late",), 2.0)
    assert (net.clip.depths, net.side.width, loop.warmup, loop.grad_clip, loop.lr) == ((0, 1, 2, 3), 48, 7, 0.5, 3e-4)
    assert not resume and isinstance(net.w_rec, float)
    assert parse(["--set", "steps=9"])[0] == parse(["--steps", "9"])[0] != parse([])[0]


def test_set_wins_over_the_row_it_goes_with():
    """--ablate switches, --set then says one number of it otherwise."""
    config, *_ = parse(["--ablate", "scales-4-4-4", "--set", "scales=2,2,2"])
    assert config.run.net.scales == (2, 2, 2)
    config, *_ = parse(["--ablate", "three-stages-removed", "--set", "decoder_stages=mid,late"])
    assert config.run.net.decoder_stages == ("mid", "late")


def test_every_flag_of_before_is_still_one_or_says_what_replaced_it():
    """The flags of the last release, as its --help listed them."""
    gone = """--from-scratch --ablations --seeds --clip-scale --depths --width --depth --heads --patch --grid --queries
        --head-width --short-side --long-side --ignore --codes --code-dim --kappa --hs-heads --mixer-hidden --decoder-width
        --decoder-heads --spade-hidden --scales --no-vmf --no-mixer --no-residual --unified --separate-decoders
        --decoder-stages --warmup --weight-decay --clip --points --w-vq --w-align --w-rec --align --crf-samples
        --restart-after --restart-share --log-every --save-every --no-align""".split()
    kept = """--resume --device --vlm --pretrained --model --preset --seed --data --val-data --kernels --out --init --steps
        --batch --accumulate --lr --precision --workers --stop-at --val-images""".split()
    assert all(replaced(flag, {model: recipe("world", model) for model in MODELS}) for flag in gone)
    assert set(kept) <= train.parser_of()._option_string_actions.keys()


def test_help_fits_a_screen_and_is_grouped():
    text = train.parser_of().format_help()
    options = re.findall(r"^  (?:-h, )?--[a-z-]+", text, re.M)
    assert 15 <= len(options) == len(train.parser_of()._actions) <= 25
    assert all(f"\n{title}:\n" in text for title in ("what", "on what", "how", "where"))


# --- run directories -------------------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten(tmp_path):
    for name in ("config.json", "checkpoint.safetensors"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match="holds a run already"):
        train.train(tiny(steps=1, out=str(tmp_path)))
    assert (tmp_path / "config.json").read_text() == (tmp_path / "checkpoint.safetensors").read_text() == "precious"


def test_a_run_that_never_saved_starts_anew_and_cannot_resume(tmp_path):
    """Only config.json is there: an interrupted first minute is no run."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="before its first checkpoint"):
        train.train(tiny(steps=1, out=str(tmp_path)), resume=True)
    train.train(tiny(steps=1, out=str(tmp_path)))
    file = tmp_path / "a file"
    file.write_text("precious")
    with pytest.raises(InputError, match="cannot be made a directory"):
        train.train(tiny(steps=1, out=str(file)))


def from_call(n, function, broken):
    """`function` until its call number n, which `broken` answers in its place: the first call is the rehearsal's."""
    calls = []

    def either(*args, **kwargs):
        calls.append(1)
        return (function if len(calls) < n else broken)(*args, **kwargs)
    return either


def test_weights_that_run_away_end_in_one_line(tmp_path, monkeypatch):
    """NaN masks reach the matching first; that too names the step, and what may be tried next is what --resume takes."""
    segmentation = san.segmentation
    broken = lambda masks, *a, **k: segmentation(masks * float("nan"), *a, **k)              # noqa: E731
    monkeypatch.setattr(san, "segmentation", from_call(5, segmentation, broken))             # two outputs a step
    with pytest.raises(InputError, match="step 1: the matching cost is not finite; .* --resume .*run --set lr=") as error:
        train.train(tiny(steps=3, save_every=1, out=str(tmp_path / "run")))
    assert "\n" not in str(error.value)
    assert read_checkpoint(tmp_path / "run")[1]["step"] == "1"


def test_a_loss_that_is_not_finite_stops_and_names_step_term_and_images(tmp_path, monkeypatch):
    """The second step has images 4 to 7."""
    broken = lambda *a: dict(l1=torch.tensor(0.0), l2=torch.tensor(float("nan")))             # noqa: E731
    monkeypatch.setattr(pat, "reconstruction", from_call(3, pat.reconstruction, broken))
    with pytest.raises(InputError, match="step 1: loss term l2 is nan, of images .4, 5, 6, 7.; the checkpoint in .* stays"):
        train.train(tiny(steps=3, out=str(tmp_path / "run")))


def test_a_gradient_that_is_not_finite_stops_before_the_step_and_nothing_of_it_is_saved(tmp_path, monkeypatch):
    """The loss is finite, its gradient is not (the root at zero): the step is not taken, the checkpoint is of the one before."""
    def broken(image_hat, *a):
        return dict(l1=(image_hat - image_hat.detach()).abs().sum().sqrt(), l2=image_hat.mean())

    monkeypatch.setattr(pat, "reconstruction", from_call(3, pat.reconstruction, broken))
    with pytest.raises(InputError, match="step 1: the gradient's norm is (nan|inf), of images .4, 5, 6, 7.; the checkpoint in"):
        train.train(tiny(steps=3, save_every=1, out=str(tmp_path / "run")))
    assert read_checkpoint(tmp_path / "run")[1]["step"] == "1"
    assert all(value.isfinite().all() for name, value in read_checkpoint(tmp_path / "run")[0].items())


def test_what_no_line_has_told_yet_is_in_the_checkpoint(tmp_path):
    """Lines come every three steps; stopped after the fourth and resumed, the sixth's line is as if nothing had been."""
    lines = []
    for name, stops in (("whole", [6]), ("broken", [4, 6])):
        for n, stop in enumerate(stops):
            config = tiny("pat", steps=7, log_every=3, save_every=50, stop_at=stop, out=str(tmp_path / name))
            train.train(config, resume=bool(n))
        lines.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    whole, broken = ({line["step"]: line for line in each} for each in lines)
    assert {**whole[5], "ms_per_step": 0} == {**broken[5], "ms_per_step": 0} and whole[5]["early"]["used"] > 0


def test_a_run_whose_folder_is_deleted_ends_in_one_line(tmp_path, monkeypatch):
    def save(run, *what):
        shutil.rmtree(run)
        save_checkpoint(run, *what)
    monkeypatch.setattr(train, "save_checkpoint", save)
    with pytest.raises(InputError, match="checkpoint.safetensors: cannot be written .No such file or directory.") as error:
        train.train(tiny("san", steps=3, save_every=1, out=str(tmp_path / "run")))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_it_saves_by_the_clock_too(tmp_path, monkeypatch):
    """A step takes a minute by this clock: --save-minutes 2 saves after every third."""
    saved, minutes = [], iter(range(0, 6000, 60))
    monkeypatch.setattr(train, "save_checkpoint", lambda run, model, optimizers, step: saved.append(step))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(minutes)))
    train.train(tiny("san", steps=20, stop_at=9, save_every=1000, save_minutes=2.5, out=str(tmp_path / "run")))
    assert saved[-1] == 9 and 1 < len(saved) < 9 and all(b - a <= 3 for a, b in zip(saved, saved[1:]))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_never_had(tmp_path, signum, capsys, monkeypatch):
    """Asked in its second step: two steps are saved, and with the rest they equal a run that nobody disturbed."""
    whole = train.train(tiny("san", steps=4, out=str(tmp_path / "whole")))
    asked, heard = Stopping(), iter([0, *[signum] * 9])
    monkeypatch.setattr(Stopping, "__call__", lambda self: next(heard) if self is asked else 0)
    with pytest.raises(Stopped) as stopped:
        train.train(tiny("san", steps=4, save_every=100, out=str(tmp_path / "run")), asked=asked)
    assert stopped.value.code == 128 + signum and "2 of 4 steps are saved; go on with: python train.py --resume" in capsys.readouterr().out
    train.train(tiny("san", steps=4, save_every=100, out=str(tmp_path / "run")), resume=True)
    (a, _), (b, _) = read_checkpoint(whole), read_checkpoint(tmp_path / "run")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_commands_exit_with_two_and_one_line():
    for command in (["train.py", "--stepz", "1"], ["eval.py", "nowhere"]):
        done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_torchrun_trains_scores_and_draws(tmp_path):
    """Two gloo processes from the command line leave one complete run."""
    numbers = {**TINY, **TINY_OF["pat"], "codes": "32,16,8,32"}
    flags = [word for name, value in numbers.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port",
                           str(29000 + (os.getpid() + 1) % 1000), ROOT / "train.py", *flags, "--steps=2", "--out", tmp_path / "run"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "mIoU" in (tmp_path / "run" / "scores.txt").read_text()
    alone = train.train(tiny(steps=2, stop_at=1, out=str(tmp_path / "alone")))            # what is logged is of both processes
    one, two = (json.loads((run / "log.jsonl").read_text().splitlines()[0]) for run in (alone, tmp_path / "run"))
    for name in ("ce_1", "mask_2", "dice_2", "vq", "crf", "tv", "l1", "l2", "grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_the_coco_preset_trains_on_what_the_folder_holds(tmp_path):
    """COCO-Stuff's archives give its training split, at the preset's sizes; beside a classes.txt, a folder of yours."""
    pack(tmp_path / "train2017.zip", {"train2017/000000000009.jpg": picture(1)})
    pack(tmp_path / "stuffthingmaps_trainval2017.zip", {"train2017/000000000009.png": encoded(np.uint8([[0, 181, 255]] * 2))})
    dataset = training_set(recipe("coco", data=str(tmp_path)).run)
    assert dataset.route == "stuffthingmaps" and len(dataset.train_names) == 171 and len(dataset) == 1
    image, label = dataset.draw(0, 0)
    assert image.shape == (3, 640, 640) and set(label.unique().tolist()) <= {-2, -1, 0, 170}
    (tmp_path / "classes.txt").write_text("sky")
    with pytest.raises(InputError, match="images: no such folder"):
        training_set(recipe("coco", data=str(tmp_path)).run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="needs train2017.zip .* a folder of your own needs images/, labels/ and classes"):
        training_set(recipe("coco", data=str(tmp_path / "empty")).run)


def test_a_folder_that_cannot_be_read_leaves_no_run(tmp_path):
    """Its only picture is half a file: one line before anything is on disk."""
    data = tmp_path / "data"
    for part in ("images", "labels"):
        (data / part).mkdir(parents=True)
        (data / part / "a.png").write_bytes(encoded(np.zeros((8, 8), np.uint8))[:40])
    (data / "classes.txt").write_text("sky\ntree")
    with pytest.raises(InputError, match="a.png"):
        train.train(tiny("san", steps=1, data=str(data), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_run_killed_between_checkpoints_forgets_the_lines_after_its_last(tmp_path):
    """The log has two steps more than the checkpoint, the last one cut short by the kill: they are logged again, once."""
    config = tiny("san", steps=5, stop_at=4, out=str(tmp_path / "run"))
    log = train.train(changed(config, stop_at=2)) / "log.jsonl"
    first = log.read_text()
    log.write_text(first + '{"step": 2, "lr": 1}\n{"step": 3, "lr"')
    train.train(config, resume=True)
    assert log.read_text().startswith(first)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]


def test_a_folder_trains_and_scores(tmp_path):
    """Two images of your own, 16-bit labels, with the same commands."""
    from PIL import Image

    data = tmp_path / "data"
    for part in ("images", "labels"):
        (data / part).mkdir(parents=True)
    for i in range(2):
        sample = World("val", 2)[i]
        Image.fromarray(sample["original"]).save(data / "images" / f"{i}.png")
        label = sample["label"].numpy().astype(np.uint16)
        label[0, 0] = 65535
        Image.fromarray(label).save(data / "labels" / f"{i}.png")
    (data / "classes.txt").write_text("\n".join(World.names))
    run = train.train(tiny(steps=1, data=str(data), ignore=65535, out=str(tmp_path / "run")))
    assert str(data) in (run / "scores.txt").read_text()
    assert (run / "names.txt").read_text() == (data / "classes.txt").read_text() + "\n"


def test_a_coco_run_is_scored_on_its_validation_archives(tmp_path):
    """--val-data may be a folder with val2017.zip and the label maps; the score file says that all names were trained."""
    for split in ("train", "val"):
        pack(tmp_path / f"{split}2017.zip", {f"{split}2017/000000000009.jpg": picture(1)})
    label = encoded(np.uint8([[0, 181, 255]] * 2))
    pack(tmp_path / "stuffthingmaps_trainval2017.zip", {f"{split}2017/000000000009.png": label for split in ("train", "val")})
    run = train.train(tiny(steps=1, batch=1, data=str(tmp_path), val_data=str(tmp_path), out=str(tmp_path / "run")))
    table = json.loads((run / "scores.json").read_text())
    assert table["route"] == "stuffthingmaps" and table["groups"] == {"seen": list(range(171))} and table["images"] == 1
    assert len((run / "names.txt").read_text().splitlines()) == 171


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """Of every step of AdamW: the learning rates of its groups, and the norm of all gradients it was given."""
    seen, step = [], torch.optim.AdamW.step

    def spied(self, *args, **kwargs):
        norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(([group["lr"] for group in self.param_groups], torch.stack(norms).norm().item()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    return seen


def test_every_step_takes_the_schedules_rate_and_clipped_gradients(steps, tmp_path):
    """Warm-up and decay reach the optimiser, for each group times its own rate; the log says the norm before clipping."""
    config = tiny("san", muon=False, steps=6, stop_at=5, warmup=2, lr=0.01, grad_clip=0.125, out=str(tmp_path / "run"))
    lines = [json.loads(line) for line in (train.train(config) / "log.jsonl").read_text().splitlines()]
    assert [rates for rates, _ in steps] == [[learning_rate(config.recipe, step)] * 2 for step in range(5)]
    assert [line["lr"] for line in lines] == [rates[0] for rates, _ in steps] and len(set(line["lr"] for line in lines)) == 5
    assert all(norm == pytest.approx(0.125, rel=1e-3) for _, norm in steps)
    assert all(line["grad_norm"] > 0.2 for line in lines)


def test_a_models_rates_multiply_the_learning_rate_of_its_parameters(steps, monkeypatch, tmp_path):
    """Groups by rate and by decay; the rate is the first prefix's; at rate 0 nothing moves."""
    monkeypatch.setattr(san.SAN, "rates", {"side.blocks.0": 0.0, "side.": 0.5})
    config = tiny("san", muon=False, steps=4, stop_at=3, weight_decay=0.01, out=str(tmp_path / "run"))
    torch.manual_seed(config.run.seed)
    model = build(config.run)
    groups = parameter_groups(model, config.recipe)
    assert [(group["rate"], group["weight_decay"]) for group in groups] == [
        (0.0, 0.01), (0.0, 0.0), (0.5, 0.01), (0.5, 0.0), (1.0, 0.01), (1.0, 0.0)]
    names = {p: name for name, p in model.named_parameters()}
    for group in groups:
        for name in (names[p] for p in group["params"]):
            want = 0.0 if name.startswith("side.blocks.0") else 0.5 if name.startswith("side.") else 1.0
            assert group["rate"] == want, name
    assert sum(len(group["params"]) for group in groups) == len([p for p in model.parameters() if p.requires_grad])
    before = {name: value.clone() for name, value in trained_state(model).items()}
    after = trained_state(load_run(train.train(config))[0])
    assert [rates for rates, _ in steps] == [[r * learning_rate(config.recipe, step) for r in (0, 0, 0.5, 0.5, 1, 1)]
                                             for step in range(3)]
    for name in after:
        still = name.startswith("side.blocks.0")
        assert torch.equal(before[name], after[name]) == still, name


def test_several_optimisers_step_in_turn_and_resume(monkeypatch, tmp_path):
    """A model with two: SGD with momentum for its first group, AdamW for the second; stopped and gone on with, the same."""
    def both(self, groups, recipe):
        return [torch.optim.SGD(groups[:1], lr=recipe.lr, momentum=0.9), torch.optim.AdamW(groups[1:], lr=recipe.lr)]

    monkeypatch.setattr(san.SAN, "optimizers", both)
    for name, stops in (("whole", [4]), ("broken", [2, 4])):
        for k, stop in enumerate(stops):
            train.train(tiny("san", steps=5, stop_at=stop, out=str(tmp_path / name)), resume=k > 0)
    a, b = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    torch.manual_seed(tiny("san").run.seed)
    model = build(tiny("san").run)
    for group in parameter_groups(model, tiny("san").recipe):                   # each has moved its own
        names = {id(p): name for name, p in model.named_parameters()}
        assert not all(torch.equal(p, a[names[id(p)]]) for p in group["params"])


def test_a_run_says_every_number_it_was_trained_with(tmp_path):
    """config.json is flat: a Training comes back from it whole, by --resume."""
    config = tiny(steps=2, stop_at=1, w_vq=2.5, scales=(2, 2, 1), out=str(tmp_path / "run"))
    run = train.train(config)
    stored = json.loads((run / "config.json").read_text())
    assert not any(isinstance(value, dict) for value in stored.values())
    assert (stored["w_vq"], stored["short_side"], stored["width"], stored["batch"]) == (2.5, 64, 48, 4)
    assert load_config(run) == config.run and parse(["--resume", str(run)])[0] == changed(config, stop_at=0)


def test_terms_of_weight_zero_are_logged_and_train_nothing(monkeypatch):
    """loss = sum of weight times term; a term is logged whatever its weight."""
    config = tiny("san")
    model = build(config.run).train()
    text = model.vlm.embed_text(World.train_names)
    terms = san.SAN.terms

    def with_more(self, out, batch):
        return {**terms(self, out, batch), "watched": (0.0, self.background.sum())}

    found, _ = gradients(model, text, micro_batches(config), config)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    monkeypatch.setattr(san.SAN, "terms", with_more)
    model.zero_grad()
    more, _ = gradients(model, text, micro_batches(config), config)
    assert more.keys() - found.keys() == {"watched"} and more["watched"] == model.background.sum().item()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)
