"""The loop: the loss falls, stopping changes nothing, and neither does the number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import losses
import train
from images import InputError
from pat import build, load_run
from test_archives import pack
from test_published import encoded, picture
from train import Stream, gradients, learning_rate, parameter_groups, parse, recipe, restart
from world import World

ROOT = Path(__file__).parent.parent
TINY = dict(batch=4, points=64, crf_samples=64, width=48, hs_heads=4, decoder_width=32, spade_hidden=16, head_width=32,
            mixer_hidden=32, codes=(32, 16, 8, 32), val_images=4, log_every=1, pretrained="none")


def tiny(**changes):
    return recipe("world", **{**TINY, **changes})


def micro_batches(config, rank, world, step=0):
    local, dataset = config.batch // (world * config.accumulate), World("train")
    samples = [Stream(dataset, config, step, rank, world)[i] for i in range(local * config.accumulate)]
    return [(torch.stack([s[0] for s in part]), torch.stack([s[1] for s in part]), torch.tensor([s[2] for s in part]))
            for part in (samples[k * local:(k + 1) * local] for k in range(config.accumulate))]


def one_step(config, rank=0, world=1, restart_codes=False):
    """Gradients in float64 (or the codebooks after restarting dead codes) of the first step; name -> tensor."""
    torch.manual_seed(config.seed)
    model = build(config).double().train()
    text = model.vlm.embed_text(World.train_names)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    _, tokens = gradients(wrapped, text, micro_batches(config, rank, world), config, world=world)
    if restart_codes:
        done = restart(model, tokens, config, 0)
        assert sum(done.values()) > 0
        return {n: p.detach() for n, p in model.named_parameters() if "codebook" in n}
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def process(rank, world, config, port, path, restart_codes):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    result = one_step(config, rank, world, restart_codes)
    if rank == 0:
        torch.save(result, path)
    dist.destroy_process_group()


def on_two_processes(config, path, restart_codes=False):
    mp.spawn(process, (2, config, 29000 + os.getpid() % 1000, path, restart_codes), nprocs=2)
    return torch.load(path, weights_only=True)


def same(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < tolerance, name


def test_two_processes_compute_the_gradient_of_one(tmp_path):
    """A batch of 4 on one process, 2 + 2 on two: every gradient in float64 to 1e-9."""
    same(one_step(tiny()), on_two_processes(tiny(), tmp_path / "g.pt"))


def test_accumulation_computes_the_gradient_of_the_whole_batch():
    same(one_step(tiny()), one_step(tiny(accumulate=2)))


def test_dead_codes_restart_alike_on_any_number_of_processes(tmp_path):
    config = tiny(restart_after=1)
    alone, split = one_step(config, restart_codes=True), one_step(tiny(restart_after=1, accumulate=2), restart_codes=True)
    same(alone, split)
    same(alone, on_two_processes(config, tmp_path / "c.pt", restart_codes=True))


def test_off_the_sphere_no_code_restarts():
    config = tiny(restart_after=1, vmf=False)
    model = build(config)
    before = {n: p.clone() for n, p in model.named_parameters() if "codebook" in n}
    _, tokens = gradients(model, model.vlm.embed_text(World.train_names), micro_batches(config, 0, 1), config)
    assert restart(model, tokens, config, 0) == {}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if "codebook" in n)


def test_the_stream_covers_every_image_once_however_it_is_split():
    whole = Stream(None, tiny(steps=3), 0, 0, 1).numbers
    parts = [Stream(None, tiny(steps=3), 0, rank, 2).numbers for rank in range(2)]
    assert whole == list(range(12)) and sorted(parts[0] + parts[1]) == whole
    assert Stream(None, tiny(steps=3), 2, 0, 1).numbers == [8, 9, 10, 11]


@pytest.mark.parametrize("model", ["pat", "san"])
def test_a_short_training_lowers_the_loss(model, tmp_path):
    """Forty steps over the shipped CLIP: naming, and for PAT pixels and codes, fall well below the start."""
    config = tiny(model=model, steps=40, lr=3e-3, warmup=5, pretrained="world", out=str(tmp_path / "run"))
    lines = [json.loads(line) for line in (train.train(config) / "log.jsonl").read_text().splitlines()]
    mean = lambda name, part: sum(line[name] for line in part) / len(part)                # noqa: E731
    for name, ratio in [("ce_2", 0.85)] + [("l2", 0.5), ("vq", 0.5)] * (model == "pat"):
        assert mean(name, lines[-8:]) < ratio * mean(name, lines[:4]), name
    assert {"config.json", "log.jsonl", "checkpoint.safetensors", "scores.txt", "scores.json", "samples.png",
            "pictures"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_resuming_equals_never_having_stopped(tmp_path):
    """Six steps at once, and three, a stop, three more: every weight, every logged loss, bit for bit."""
    for name, stops in (("whole", [0]), ("broken", [3, 0])):
        for k, stop in enumerate(stops):
            train.train(tiny(steps=6, restart_after=2, stop_at=stop, out=str(tmp_path / name)), resume=k > 0)
    a, b = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "broken")]
    for x, y in zip(*logs, strict=True):
        assert {k: v for k, v in x.items() if k != "ms_per_step"} == {k: v for k, v in y.items() if k != "ms_per_step"}


@pytest.mark.parametrize("flags", [["--no-vmf"], ["--scales", "4", "4", "4"], ["--scales", "1", "1", "1"], ["--no-align"],
                                   ["--align", "literal"], ["--no-mixer"], ["--no-residual"], ["--unified"],
                                   ["--separate-decoders"], ["--decoder-stages", "mid", "late"], ["--decoder-stages", "late"],
                                   ["--decoder-stages"], ["--model", "san"]], ids=" ".join)
def test_every_row_of_table_two_trains_a_step(flags, tmp_path):
    """From the command line to finite losses; the row's terms are the ones it claims."""
    config, *_ = parse([*flags, "--out", str(tmp_path / "run")])
    for field, value in {**TINY, "steps": 2, "batch": 2}.items():
        setattr(config, field, value)
    line = json.loads((train.train(config) / "log.jsonl").read_text().splitlines()[-1])
    assert ("crf" in line) == (flags not in (["--no-align"], ["--model", "san"]))
    assert ("l2" in line) == (flags != ["--model", "san"])


def test_the_learning_rate_warms_up_decays_and_ends_at_zero():
    config = tiny(lr=1.0, warmup=10, steps=100)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 50) == pytest.approx(0.5**0.9)
    assert learning_rate(config, 99) == pytest.approx(0.01**0.9)


def test_norms_positions_queries_and_codebooks_do_not_decay():
    model = build(tiny())
    decay, free = (set(map(id, group["params"])) for group in parameter_groups(model, 0.01))
    where = {name: id(p) in free for name, p in model.named_parameters() if p.requires_grad}
    assert not decay & free and len(decay | free) == len(where)
    for name in ("side.query_embed", "side.query_pos_embed", "side.pos_embed", "latent.codebook", "side.blocks.0.norm1.bias",
                 "fusion.0.norm.weight", "vlm.model.visual.positional_embedding", "semantic.0.norm_t.weight"):
        assert where[name], name
    for name in ("side.blocks.0.attn.qkv.weight", "side.blocks.0.attn.qkv.bias", "background", "decoder.lift.late.weight"):
        assert not where[name], name


def test_presets_are_the_papers_recipe():
    config, *_ = parse(["--preset", "coco", "--data", "somewhere"])
    assert (config.steps, config.batch, config.lr, config.weight_decay, config.clip) == (120_000, 12, 1e-4, 1e-4, 0.01)
    assert (config.vlm, config.pretrained, config.codes, config.points) == ("ViT-B-16", "openai", (128, 64, 32, 256), 12544)
    eva, *_ = parse(["--preset", "coco-eva", "--model", "san"])
    assert (eva.vlm, eva.model) == ("EVA02-B-16", "san")


@pytest.mark.parametrize("flags, says", [
    (["--stepz", "3"], "did you mean --steps"), (["--batch", "7", "--accumulate", "2"], "--batch 7 cannot be split"),
    (["--model", "pot"], "pot"), (["--preset", "moon"], "moon"), (["--preset", "coco"], "--data DIR"),
    (["--data", "nowhere"], "nowhere"), (["--resume", "nowhere"], "nowhere"), (["--align", "tight"], "tight"),
    (["--steps", "many"], "many"), (["--steps", "0"], "--steps 0"), (["--accumulate", "0"], "--accumulate 0"),
    (["--seed", "-1"], "--seed -1"), (["--precision", "bf61"], "bf61"), (["--model", "san", "--no-align"], "no alignment"),
    (["--model", "san", "--unified"], "no unified"), (["--preset", "coco", "--from-scratch"], "not ViT-B-16")])
def test_bad_flags_end_in_one_line(flags, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        config, resume, device, _ = parse([*flags] if "--resume" in flags else [*flags, "--out", str(tmp_path / "run")])
        train.train(config, resume, "cpu")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


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


def test_weights_that_run_away_end_in_one_line(tmp_path, monkeypatch):
    """NaN masks reach the matching first; that too names the step."""
    monkeypatch.setattr(train, "segmentation", lambda masks, *a, **k: losses.segmentation(masks * float("nan"), *a, **k))
    with pytest.raises(InputError, match="step 0: the matching cost is not finite"):
        train.train(tiny(steps=2, out=str(tmp_path / "run")))


def test_from_scratch_trains_the_worlds_clip_first(tmp_path, monkeypatch):
    """The weights land in the run directory and the run is set to use them."""
    made = []
    monkeypatch.setattr(train, "pretrain", lambda path, seed: made.append(path))
    config, *_ = parse(["--from-scratch", "--out", str(tmp_path / "run")])
    assert made == [config.pretrained] == [str(tmp_path / "run" / "world_clip.safetensors")]


def test_a_loss_that_is_not_finite_stops_and_names_step_and_term(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "reconstruction", lambda *a: dict(l1=torch.tensor(0.0), l2=torch.tensor(float("nan"))))
    with pytest.raises(InputError, match="step 0: loss term l2 is nan"):
        train.train(tiny(steps=2, out=str(tmp_path / "run")))


def test_commands_exit_with_two_and_one_line():
    for command in (["train.py", "--stepz", "1"], ["eval.py", "nowhere"]):
        done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_torchrun_trains_scores_and_draws(tmp_path):
    """Two gloo processes from the command line leave one complete run."""
    flags = [f"--{k.replace('_', '-')}" + (f"={v}" if not isinstance(v, tuple) else "") for k, v in TINY.items() if k != "codes"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port",
                           str(29000 + (os.getpid() + 1) % 1000), ROOT / "train.py", *flags, "--steps=2", "--out", tmp_path / "run"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "mIoU" in (tmp_path / "run" / "scores.txt").read_text()


def test_the_coco_preset_trains_on_what_the_folder_holds(tmp_path):
    """COCO-Stuff's archives give its training split, at the preset's sizes; beside a classes.txt, a folder of yours."""
    pack(tmp_path / "train2017.zip", {"train2017/000000000009.jpg": picture(1)})
    pack(tmp_path / "stuffthingmaps_trainval2017.zip", {"train2017/000000000009.png": encoded(np.uint8([[0, 181, 255]] * 2))})
    dataset = train.training_set(recipe("coco", data=str(tmp_path)))
    assert dataset.route == "stuffthingmaps" and len(dataset.train_names) == 171 and len(dataset) == 1
    image, label = dataset.draw(0, 0)
    assert image.shape == (3, 640, 640) and set(label.unique().tolist()) == {-1, 0, 170}
    (tmp_path / "classes.txt").write_text("sky")
    with pytest.raises(InputError, match="images: no such folder"):
        train.training_set(recipe("coco", data=str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="needs train2017.zip .* a folder of your own needs images/, labels/ and classes"):
        train.training_set(recipe("coco", data=str(tmp_path / "empty")))


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
