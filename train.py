"""Train PAT, or SAN beside it: one flat loop, the same on a laptop, on two processes and on GPUs.

    python train.py                                           the built-in world, about ten minutes on two cores
    python train.py --model san                               the baseline on the same images
    python train.py --preset coco --data DIR                  the paper's recipe: COCO-Stuff, or a folder of yours
    torchrun --nproc_per_node=3 train.py --preset coco --data DIR
    python train.py --resume runs/world-pat-0                 go on where it stopped, as if it never had
    python train.py --ablations --seeds 3                     every row of the paper's Table II, see ablations.py

A step:  learning rate -> forward -> named losses -> weighted sum -> backward -> clip -> AdamW -> dead codes restart.

Sample i of step s is number n = s * batch + i of one endless stream, whoever draws it; random points are keyed by
(seed, n), counts of masks and codes are summed over processes.  So 1 process with a batch of 12, 2 with 6 each, or 1
with 6 accumulated twice compute the same gradient.

A run directory holds config.json, names.txt (what it was trained with, one a line), log.jsonl (one line a logged step),
checkpoint.safetensors (weights, AdamW's state and the step in one file, replaced atomically, no pickle), scores.txt,
scores.json, samples.png, pictures (gallery.py) and report.html, which shows them all.

# paper: AdamW 1e-4, weight decay 1e-4, poly 0.9, clip 0.01, 120,000 steps of 12 images on 3 GPUs, mixed precision.
# ours: the world's numbers; restart of dead codes there.

Tests: tests/test_train.py.  This is where everything comes together: read it last, or first.
"""

import argparse
import json

import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ablations import STEPS, ablate, ablation_seeds
from checkpoint import load_checkpoint, save_checkpoint, warm_start
from clip import pretrain
from data import opened, scored_on
from eval import format_table, score_table, write_run
from hsattn import g
from images import InputError, parse_flags, rng_for, run_cli, to_unit, write_files
from kernels import path
from losses import BCE, CE, DICE, alignment, class_weight, load_lpips, reconstruction, segmentation, targets
from pat import PATConfig, build, load_config, preset
from patches import PATCH_IMAGES
from san import trainable
from tally import Pass
from vq import codebook_health, restart_dead_codes
from world import World


@dataclass
class TrainConfig(PATConfig):
    """Everything about a run; defaults are the paper's where it states them."""

    out: str = ""                      # run directory; "" = runs/PRESET-MODEL-SEED
    init: str = ""                     # a run to start from, and whose CLIP to take unless --pretrained is given
    steps: int = 120_000
    batch: int = 12                    # images a step, over all processes and accumulation
    accumulate: int = 1                # forward-backward passes a step
    lr: float = 1e-4
    warmup: int = 0                    # steps of linear warm-up before poly decay with power 0.9
    weight_decay: float = 1e-4         # none on norms, positions, queries and codebooks
    clip: float = 0.01                 # global gradient norm
    precision: str = "bf16"            # autocast on a GPU: bf16, fp16 (with loss scaling) or fp32; the CPU runs fp32
    points: int = 12544                # for matching and for the mask losses
    w_vq: float = 0.1                  # weights of L_VQ, L_align, L_rec
    w_align: float = 0.1
    w_rec: float = 1.0
    align: str = "scale-free"          # or "literal", the paper's; "none" (--no-align) drops it, Table II
    crf_samples: int = 1000            # pixels an image and stage
    restart_after: int = 0             # steps without use before a code restarts, in the first 85 % of them; 0 = never
    restart_share: float = 0.0         # "use" means more than this fraction of an even share of the features
    workers: int = 4                   # data-loading processes; one draws some 30 photos/s (bench.py --loader)
    log_every: int = 50                # steps
    save_every: int = 1000
    stop_at: int = 0                   # stop, with a checkpoint, after this many steps; --resume goes on
    val_images: int = 300              # how many images are scored at the end


def recipe(name, **changes):
    """The training preset that goes with a model preset."""
    numbers = dict(asdict(preset(name)))
    if name == "world":
        numbers.update(
            steps=1300, batch=8,       # 10,400 scenes: what two cores can do in ten minutes
            lr=8e-4, warmup=100, clip=1.0, weight_decay=0.01,
            points=1024, crf_samples=128,                     # a scene has 4,096 pixels
            w_vq=5.0, w_rec=60.0,      # 0.1 and 1 in the paper, which trains 140 times longer and adds LPIPS
            restart_after=10, restart_share=0.2, save_every=200, log_every=20,
            workers=0)                                        # a scene is drawn in a millisecond
    return TrainConfig(**{**numbers, **changes})


# --- a batch -------------------------------------------------------------------------------------------------------


class Stream(Dataset):
    """The samples of this process in the order it needs them: step by step, micro-step by micro-step."""

    def __init__(self, dataset, config, start, rank, world):
        self.dataset, self.seed = dataset, config.seed
        local = config.batch // (world * config.accumulate)
        self.numbers = [step * config.batch + (a * world + rank) * local + j for step in range(start, config.steps)
                        for a in range(config.accumulate) for j in range(local)]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return (*self.dataset.draw(self.seed, self.numbers[i]), self.numbers[i])


def summed(value):
    """The sum over all processes of a number or tensor; itself where there is one process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = tensor.detach().to(device, copy=True)
        dist.all_reduce(tensor)
        return tensor.to(value.device) if torch.is_tensor(value) else tensor.item()
    return value


def loss_terms(out, images, found, numbers, config, shares, lpips):
    """Every loss by name, unweighted, and their weighted sum.

    `found`: `losses.targets` of each image; `shares`: num_masks and weight, see `gradients`.
    """
    keys = [(config.seed, int(n)) for n in numbers]
    terms = {}
    for i, (masks, classes) in enumerate(zip(out["masks"], out["classes"]), 1):
        terms.update({f"{name}_{i}": value for name, value in segmentation(
            masks, classes, found, [(*key, i) for key in keys], points=config.points, **shares).items()})
    weights = {f"{name}_{i}": w for i in (1, 2) for name, w in (("ce", CE), ("mask", BCE), ("dice", DICE))}
    if "tokens" in out:
        terms["vq"] = sum(tokens.loss for tokens in out["tokens"].values())
        weights["vq"] = config.w_vq
        if config.align != "none":
            parts = [alignment(tokens.zq, images, [(*key, 3 + i) for key in keys], config.align, config.crf_samples)
                     for i, tokens in enumerate(out["tokens"].values())]
            terms.update(crf=sum(p["crf"] for p in parts), tv=sum(p["tv"] for p in parts))
            weights.update(crf=config.w_align, tv=config.w_align)
        terms.update(reconstruction(out["image"], to_unit(images), lpips))
        weights.update(l1=0.1 * config.w_rec, l2=1.0 * config.w_rec, lpips=0.1 * config.w_rec)
    return terms, sum(weights[name] * term for name, term in terms.items())


def gradients(model, text, micro_batches, config, *, world=1, scaler=None, lpips=None):
    """Forward and backward over the micro-batches of one step; gradients are left in the parameters.

    micro_batches: list of (images (b,3,H,W), labels (b,H,W), numbers (b)).  -> the terms by name, averaged over the
    micro-batches, and for PAT what `restart` needs of each: (numbers (b), {stage: (counts (K), features (b,D,h,w))}).
    """
    device, shares_of = text.device, len(micro_batches) * world
    found = [[targets(label.to(device)) for label in labels] for _, labels, _ in micro_batches]
    # Totals over all processes and accumulation steps, known before any forward pass, divided by the number of shares:
    # DDP averages over processes and the loss below over micro-batches, so each image ends up with its weight / total.
    classes = [c for batch in found for c, _ in batch]
    totals = [sum(len(c) for c in classes), class_weight(classes, config.queries)]
    totals = summed(torch.tensor(totals, dtype=torch.float64))
    shares = dict(num_masks=max(totals[0].item(), 1.0) / shares_of, weight=totals[1].item() / shares_of)
    amp = dict(device_type=device.type, enabled=device.type == "cuda" and config.precision != "fp32",
               dtype=torch.float16 if config.precision == "fp16" else torch.bfloat16)
    logged, tokens = {}, []
    for k, (images, _, numbers) in enumerate(micro_batches):
        images = images.to(device, text.dtype, non_blocking=True)
        last = k == len(micro_batches) - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last           # one exchange a step
        with torch.autocast(**amp):
            out = model(images, text)
        terms, loss = loss_terms(out, images, found[k], numbers, config, shares, lpips)
        for name, term in terms.items():
            logged[name] = logged.get(name, 0.0) + term.detach().double() / len(micro_batches)
            if not torch.isfinite(term):
                raise FloatingPointError(f"loss term {name} is {term.item()}")
        loss = loss / len(micro_batches)
        (scaler.scale(loss) if scaler else loss).backward()
        if "tokens" in out:
            tokens.append((numbers, {stage: (t.counts, t.x.detach()) for stage, t in out["tokens"].items()}))
    return logged, tokens


RESTART = 99                           # the word of its random keys


def restart(model, tokens, config, step):
    """Restart dead codes on features of this step's batch; the same on any number of processes.  stage -> how many"""
    done = {}
    for which, (stage, vq) in enumerate(model.quantisers().items()):
        counts = summed(sum(found[stage][0] for _, found in tokens))
        # The unified codebook belongs to the queries.  Off the sphere a code on a long feature wins features of half
        # the space and draws them to its length; the next restart lands on a longer one: L_VQ reached 45,000 in 160 steps.
        if vq.codebook is None or not vq.vmf:
            continue
        K, rng = len(counts), rng_for(config.seed, step, which, RESTART)
        images, places = step * config.batch + rng.integers(config.batch, size=K), rng.random(K)
        candidates = torch.zeros_like(vq.codebook)
        for numbers, found in tokens:                         # whoever holds the image of code k offers its feature
            x = found[stage][1].flatten(2)                                                # (b,D,P)
            for k in range(K):
                for b in (numbers == int(images[k])).nonzero()[:, 0].tolist():
                    candidates[k] = x[b, :, int(places[k] * x.shape[2])]
        candidates = g(summed(candidates))
        done[stage] = restart_dead_codes(vq.codebook, vq.idle, counts, candidates, config.restart_after,
                                         config.restart_share)
    return done


# --- optimiser -----------------------------------------------------------------------------------------------------


def parameter_groups(model, weight_decay):
    """No weight decay on norms, positions, queries and codebooks."""
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    decay, free = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = id(p) in norms or any(word in name for word in ("pos", "query_embed", "codebook"))
            (free if plain else decay).append(p)
    return [dict(params=decay, weight_decay=weight_decay), dict(params=free, weight_decay=0.0)]


def learning_rate(config, step):
    """Linear warm-up, then poly decay with power 0.9, 0 at the end."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup, 1)) * (1 - step / config.steps) ** 0.9


# --- the run -------------------------------------------------------------------------------------------------------


def training_set(config):
    if config.preset == "world" and not config.data:
        return World("train")
    if not config.data:
        raise InputError(f"preset {config.preset} trains on COCO-Stuff or on a folder of yours: give --data DIR with its "
                         "archives, or with images/, labels/, classes.txt")
    return opened(config, config.data, "train")


def run_directory(config, resume):
    """The run directory, made ready; raises InputError rather than overwrite a run."""
    run = Path(config.out or f"runs/{config.preset}-{config.model}-{config.seed}")
    if not resume and (run / "checkpoint.safetensors").exists():
        raise InputError(f"{run}: holds a run already; go on with --resume {run}, or choose another --out")
    if resume and not (run / "checkpoint.safetensors").exists():
        raise InputError(f"{run}: stopped before its first checkpoint; train it again without --resume")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {run}: cannot be made a directory ({error.strerror})") from error
    return run


def open_log(run, config, names, start):
    """Write config.json and names.txt, open log.jsonl; on resuming, lines from after the checkpoint are dropped."""
    write_files({run / "config.json": json.dumps(asdict(config), indent=1) + "\n",
                 run / "names.txt": "".join(name + "\n" for name in names)})
    path = run / "log.jsonl"
    kept = path.read_text().splitlines() if start and path.exists() else []
    kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] < start]     # a kill may cut a line
    write_files({path: "".join(line + "\n" for line in kept)})
    return open(path, "a")


def codebook_lines(model, seen, tokens, restarted):
    """Per stage, the health of its codebook since the last logged step.  `seen`: stage -> counts of this process."""
    lines = {}
    for stage, counts in seen.items():
        x = tokens[0][1][stage][1].movedim(1, -1).flatten(0, 2)                           # (b*h*w,D) features
        lines[stage] = codebook_health(summed(counts), model.codebook(stage), x, model.quantisers()[stage].choose)
        lines[stage]["restarted"] = restarted.get(stage, 0)
    return lines


def score(run, model, config, device):
    """The table and the pictures at the end of a run, on what it is scored on (data.scored_on)."""
    test, where = scored_on(config, config.val_images)
    label = f"{config.model.upper()} {run}"
    how = Pass(images=config.val_images, workers=config.workers)
    table = score_table({label: (model, test)}, device, how, where)
    written = write_run(run, model, test, table, min(config.val_images, PATCH_IMAGES), device)
    print(format_table(table), end="")
    print(f"written: config.json, names.txt, log.jsonl, checkpoint.safetensors, {written}")


def check_recipe(config, processes):
    """Raises InputError, naming the flag, for a recipe that cannot run."""
    for name in ("steps", "batch", "accumulate", "points", "crf_samples", "log_every", "save_every", "val_images"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: takes a positive number")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"--seed {config.seed}: takes a number from 0 to 2^32 - 1")
    if config.precision not in ("bf16", "fp16", "fp32"):
        raise InputError(f"--precision {config.precision}: there are bf16, fp16 and fp32")
    parts = processes * config.accumulate
    if config.batch % parts:
        raise InputError(f"--batch {config.batch} cannot be split over {processes} processes x {config.accumulate} "
                         f"accumulation steps; the nearest that can is {max(1, round(config.batch / parts)) * parts}")
    if config.align not in ("scale-free", "literal", "none"):
        raise InputError(f"--align {config.align}: there are scale-free, literal and none")
    if config.model == "san" and config.align == "none":
        raise InputError("--model san has no alignment to switch: --no-align is PAT's")


def paths(config, device):
    """Which path the two operations with a Triton kernel take, in words.  InputError if the one asked for cannot run."""
    if config.model == "san" or not config.vmf:
        return "no operation with a kernel"
    try:                                                      # every precision that autocast may choose goes the same way
        found = {"assignment": path(config.kernels, torch.device(device), torch.float32, config.code_dim)}
        if config.mixer:
            D = config.width // config.hs_heads
            found["mean shift"] = path(config.kernels, torch.device(device), torch.float32, D, config.kappa)
    except ValueError as error:
        raise InputError(f"--kernels {config.kernels}: {error}") from error
    return ", ".join(f"{name} by {way}" for name, way in found.items())


def train(config, resume=False, device="cpu"):
    """Train as `config` says, score, draw.  Returns the run directory."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    main = rank == 0
    check_recipe(config, world)
    ways = paths(config, device)
    dataset = training_set(config)
    dataset.draw(config.seed, 0)                              # a dataset that cannot be read at all speaks up here

    # ---- model, optimiser, data ----
    torch.manual_seed(config.seed)
    model = build(config).to(device).train()
    began = warm_start(model, config.init, load_config) if config.init and not resume else ""
    run = run_directory(config, resume)                       # from here on there is something on disk
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr)
    scaler = torch.amp.GradScaler() if config.precision == "fp16" and device.startswith("cuda") else None
    lpips = load_lpips(device) if config.model == "pat" else None
    start = load_checkpoint(run / "checkpoint.safetensors", model, optimizer, scaler) if resume else 0
    stop = min(config.steps, config.stop_at or config.steps)
    text = model.vlm.embed_text(dataset.train_names)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    samples = iter(DataLoader(Stream(dataset, config, start, rank, world), config.batch // (world * config.accumulate),
                              num_workers=config.workers, pin_memory=device.startswith("cuda")))
    log = open_log(run, config, dataset.train_names, start) if main else None
    if main:
        tqdm.write(f"{config.model.upper()} {config.preset}: {trainable(model):,} trainable parameters, {config.batch} "
                   f"images a step on {world} process(es), {device}; LPIPS {'on' if lpips else 'off'}; {ways}")
    if main and began:
        tqdm.write(began)
    seen, since, before = {}, time.perf_counter(), start
    bar = tqdm(range(start, stop), initial=start, total=stop, unit="step", disable=not main)
    for step in bar:
        micro_batches = [next(samples) for _ in range(config.accumulate)]

        # ---- the step ----
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad(set_to_none=True)
        try:
            terms, tokens = gradients(wrapped, text, micro_batches, config, world=world, scaler=scaler, lpips=lpips)
        except FloatingPointError as error:
            raise InputError(f"step {step}: {error}; a checkpoint in {run} stays whole, try a smaller --lr") from error
        if scaler:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        restarted = {}
        if tokens and config.restart_after and step < 0.85 * config.steps:    # the last steps keep the codes there are
            restarted = restart(model, tokens, config, step)
        # ---- end of the step ----

        for _, found in tokens:
            for stage, (counts, _) in found.items():
                seen[stage] = seen.get(stage, 0) + counts
        if (step + 1) % config.log_every == 0 or step + 1 == stop:
            line = {"step": step, "lr": learning_rate(config, step), "grad_norm": norm.item()}
            line.update({name: summed(value.item()) / world for name, value in terms.items()})
            line["ms_per_step"] = 1000 * (time.perf_counter() - since) / (step + 1 - before)
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None
            line.update(codebook_lines(model, seen, tokens, restarted))
            seen, since, before = {}, time.perf_counter(), step + 1
            if main:
                print(json.dumps(line), file=log, flush=True)
                bar.set_postfix({k: f"{v:.3f}" for k, v in line.items() if k in ("ce_2", "dice_2", "l2", "vq")})
        if main and ((step + 1) % config.save_every == 0 or step + 1 == stop):
            save_checkpoint(run / "checkpoint.safetensors", model, optimizer, step + 1, scaler)
    if main:
        log.close()
    if main and stop < config.steps:
        print(f"stopped after {stop} of {config.steps} steps; go on with: python train.py --resume {run}")
    elif main:
        score(run, model, config, device)
    return run


def parse(argv=None):
    """(config, resume, device, seeds) from the command line: every field of TrainConfig is a flag.

    seeds: of each row of Table II, `config` being the default row; 0 = no ablation, one ordinary run.
    Raises InputError for an unknown flag (naming the closest) or a value of the wrong kind.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", metavar="RUN", help="go on with this run, with the settings it was started with")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--from-scratch", action="store_true", help="train the world's CLIP first, into the run directory")
    parser.add_argument("--ablations", action="store_true",
                        help=f"train every row of Table II; in the world {STEPS} steps each if --steps is not given")
    parser.add_argument("--seeds", type=int, help="with --ablations: seeds 0..N-1 of each row (3)")
    for field in fields(TrainConfig):
        flag, kind, default = "--" + field.name.replace("_", "-"), type(field.default), argparse.SUPPRESS
        if kind is bool:                                      # --no-vmf for what is on, --unified for what is off
            flag = flag.replace("--", "--no-") if field.default else flag
            action = "store_false" if field.default else "store_true"
            parser.add_argument(flag, dest=field.name, action=action, default=default)
        elif kind is tuple:
            parser.add_argument(flag, nargs="*", type=str if field.name == "decoder_stages" else int, default=default)
        else:
            parser.add_argument(flag, type=kind, default=default)
    parser.add_argument("--no-align", dest="align", action="store_const", const="none", default=argparse.SUPPRESS)
    args = vars(parse_flags(parser, argv))
    resume, device, from_scratch = args.pop("resume"), args.pop("device"), args.pop("from_scratch")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is visible here; leave it out to use the CPU")
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    seeds = ablation_seeds(args, resume, from_scratch)
    if resume:
        extra = sorted(set(args) - {"stop_at"})
        if extra:
            flag = extra[0].replace("_", "-")
            raise InputError(f"--resume takes its settings from {resume}/config.json; leave out --{flag}")
        config = load_config(resume, TrainConfig)
        config.out, config.stop_at = str(resume), args.get("stop_at", 0)
        return config, True, device, 0
    config = recipe(args.pop("preset", "world"), **args)
    if config.init and Path(config.init).is_dir() and "pretrained" not in args:
        began = load_config(config.init)
        config.pretrained = began.pretrained if began.vlm == config.vlm else config.pretrained
    if from_scratch:
        if config.vlm != "world":
            raise InputError(f"--from-scratch trains the world's CLIP, not {config.vlm}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("--from-scratch runs on one process; make the weights first with python clip.py --pretrain")
        config.pretrained = str(run_directory(config, False) / "world_clip.safetensors")
        pretrain(config.pretrained, config.seed)
    return config, False, device, seeds


def main():
    config, resume, device, seeds = parse()
    if seeds:                                                 # whole runs are shared out: no process group
        return ablate(config, seeds, train, device)
    if "RANK" in os.environ:                                  # started by torchrun
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    try:
        train(config, resume, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
