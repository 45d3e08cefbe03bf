"""Train a segmenter: one flat loop, the same for every model, on a laptop, on two processes and on GPUs.

    python train.py                                           PAT in the built-in world, 10-20 minutes on two cores
    python train.py --model san                               the baseline on the same images
    python train.py --preset coco --data DIR                  the paper's recipe: COCO-Stuff, or a folder of yours
    torchrun --nproc_per_node=3 train.py --preset coco --data DIR
    python train.py --resume runs/world-pat-0                 go on where it stopped, as if it never had (guards/)
    python train.py --ablate no-mixer --out runs/no-mixer     a row of the paper's Table II; all: studies/ablations.py
    python train.py --set w_rec=1 --set scales=2,2,1          any other number, by its name

A step:  learning rate -> forward -> named losses -> weighted sum -> backward -> clip -> optimiser -> the model's own.

Sample i of step s is number n = s * batch + i of one endless stream, whoever draws it; random points are keyed by
(seed, n), counts of masks and codes are summed over processes.  So 1 process with a batch of 12, 2 with 6 each, or 1
with 6 accumulated twice compute the same gradient.

A run directory (runs.py) ends with log.jsonl, a line a logged step, and, once it is scored, report.html, which shows all.

# paper: AdamW 1e-4, weight decay 1e-4, poly 0.9, clip 0.01, 120,000 steps of 12 images on 3 GPUs, mixed precision.
# ours: the world's numbers (RECIPES of each model); bf16 for mixed precision, which needs no loss scaling.

Tests: tests/test_train.py.  This is where everything comes together: read it last, or first.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from cli import InputError, check_device, choice, number, parse_flags, run_cli, write_files
from data import IGNORE, PADDING
from runs import (CHECKPOINTS, MODELS, RunConfig, build, changed, closest, filled, flat, leaves, load_checkpoint,
                  load_config, model_class, parse_value, preset, read_config, save_checkpoint)
from san import trainable
from segmenter import Batch, summed


@dataclass
class Recipe:
    """The loop's own numbers; defaults are the paper's where it states them."""

    out: str = ""                               # run directory; "" = runs/PRESET-MODEL-SEED
    init: str = ""                              # a run to start from, and whose CLIP to take unless --pretrained is given
    steps: int = number(120_000, 1, 10**8)
    batch: int = number(12, 1, 4096)            # images a step, over all processes and accumulation
    accumulate: int = number(1, 1, 4096)        # forward-backward passes a step
    lr: float = number(1e-4, 0, 10)
    warmup: int = number(0, 0, 10**8)           # steps of linear warm-up before poly decay with power 0.9
    weight_decay: float = number(1e-4, 0, 10)   # none on norms, positions, queries and codebooks
    muon: bool = False                          # Muon for the matrices, AdamW for the rest; False: AdamW for all
    grad_clip: float = number(0.01, 1e-9, 1e9)  # global gradient norm
    precision: str = choice("bf16", "fp32")     # autocast on a GPU: bf16 or fp32; the CPU runs fp32
    workers: int = number(4, 0, 128)            # data-loading processes; one draws some 30 photos/s (studies.speed --loader)
    log_every: int = number(50, 1, 10**8)       # steps
    save_every: int = number(1000, 1, 10**8)    # steps, and
    save_minutes: float = number(0.0, 0, 1e5)   # minutes; 0: by steps alone
    stop_at: int = number(0, 0, 10**8)          # stop, with a checkpoint, after this many steps; --resume goes on
    val_images: int = number(300, 1, 10**7)     # how many images are scored at the end


@dataclass
class Training:
    """A run and how it is trained: all of config.json."""

    run: RunConfig
    recipe: Recipe = field(default_factory=Recipe)


def recipe(name, model="pat", **numbers):
    """The Training of a model at a preset: its RunConfig and the loop's numbers that go with it."""
    config = Training(preset(name, model), changed(Recipe(), **model_class(model).RECIPES.get(name, {})))
    return changed(config, **numbers)


# --- a batch -------------------------------------------------------------------------------------------------------
class Stream(Dataset):
    """The samples of this process in the order it needs them: step by step, micro-step by micro-step."""

    def __init__(self, dataset, config, start, rank, processes):
        self.dataset, self.config, self.start, self.rank, self.processes = dataset, config, start, rank, processes
        self.local = config.recipe.batch // (processes * config.recipe.accumulate)

    def __len__(self):
        return (self.config.recipe.steps - self.start) * self.config.recipe.accumulate * self.local

    def number(self, i):
        """Of sample i of this process, in the stream of all."""
        parts, j = divmod(i, self.local)
        step, a = divmod(parts, self.config.recipe.accumulate)
        return (self.start + step) * self.config.recipe.batch + (a * self.processes + self.rank) * self.local + j

    def __getitem__(self, i):
        n = self.number(i)
        return (*self.dataset.draw(self.config.run.seed, n), n)


def gradients(model, text, micro_batches, config, processes=1):
    """Forward and backward over the micro-batches of one step; gradients are left in the parameters.

    micro_batches: list of (images (b,3,H,W), labels (b,H,W), numbers (b)).  -> the terms by name, averaged over the
    micro-batches, and what the model remembers of each, see Segmenter.after_step.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    device, n = text.device, len(micro_batches)
    autocast = dict(device_type=device.type, dtype=torch.bfloat16,
                    enabled=device.type == "cuda" and config.recipe.precision != "fp32")
    micro_batches = [(images.to(device, text.dtype, non_blocking=True), labels.to(device).clamp(min=IGNORE),
                      labels.to(device) != PADDING, numbers) for images, labels, numbers in micro_batches]
    # Totals over all processes and accumulation steps, known before any forward pass, divided by the number of shares:
    # DDP averages over processes and the loss below over micro-batches, so each image ends up with its weight / total.
    totals = summed(sum(bare.totals(labels) for _, labels, _, _ in micro_batches))
    logged, remembered = {}, []
    for k, (images, labels, inside, numbers) in enumerate(micro_batches):
        if model is not bare:
            model.require_backward_grad_sync = k == n - 1     # one exchange a step
        with torch.autocast(**autocast):
            out = model(images, text)
        keys = [(config.run.seed, int(number)) for number in numbers]
        batch = Batch(images, labels, inside, keys, totals, n * processes)
        terms = bare.terms(out, batch)
        for name, (_, term) in terms.items():
            if not torch.isfinite(term):
                raise FloatingPointError(f"loss term {name} is {term.item()}, of images {numbers.tolist()}")
            logged[name] = logged.get(name, 0.0) + term.detach().double() / n
        loss = sum(weight * term for weight, term in terms.values()) / n
        loss.backward()
        remembered.append((numbers, bare.remember(out, batch)))
    return logged, remembered


# --- optimiser -----------------------------------------------------------------------------------------------------
NO_DECAY = ("pos_embed", "positional_embedding", "query_embed", "query_pos_embed", "codebook")      # beside all norms


def parameter_groups(model, recipe):
    """Trained parameters by learning rate (Segmenter.rates), by weight decay, none on norms, positions, queries and
    codebooks, and, of those that decay, by whether they are matrices, if Muon is to have these."""
    norms = {p for m in model.modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.GroupNorm)) for p in m.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = next((factor for prefix, factor in model.rates.items() if name.startswith(prefix)), 1.0)
            plain = p in norms or name.split(".")[-1] in NO_DECAY
            matrix = recipe.muon and not plain and p.ndim == 2 and min(p.shape) > 1       # a single row is none
            groups.setdefault((rate, plain, matrix), []).append(p)
    return [dict(params=groups[rate, plain, muon], rate=rate, weight_decay=0.0 if plain else recipe.weight_decay, muon=muon)
            for rate, plain, muon in sorted(groups)]


def learning_rate(recipe, step):
    """Linear warm-up, then poly decay with power 0.9, 0 at the end."""
    return recipe.lr * min(1.0, (step + 1) / max(recipe.warmup, 1)) * (1 - step / recipe.steps) ** 0.9


def forget(optimizers, new):
    """Zero the moments of rows that are new, {parameter: rows (bool)}: what they moved like before says nothing."""
    for p, rows in new.items():
        for optimizer in optimizers:
            for moment in (kept for kept in optimizer.state.get(p, {}).values() if kept.shape == p.shape):
                moment[rows] = 0


# --- the run -------------------------------------------------------------------------------------------------------
CHANGEABLE = ("steps", "accumulate", "lr", "warmup", "weight_decay", "grad_clip", "precision", "workers", "log_every",
              "save_every", "save_minutes", "stop_at", "val_data", "val_images")              # on resuming


def load_training(run):
    """The Training of a run directory."""
    return Training(load_config(run), filled(Recipe(), read_config(run)))


def place_of(config):
    return Path(config.recipe.out or f"runs/{config.run.preset}-{config.run.model}-{config.run.seed}")


def run_directory(config, resume):
    """The run directory, made ready; raises InputError rather than overwrite a run."""
    run = place_of(config)
    if not resume and (run / CHECKPOINTS[0]).exists():
        raise InputError(f"{run}: holds a run already; go on with --resume {run}, or choose another --out")
    if resume and not (run / CHECKPOINTS[0]).exists():
        raise InputError(f"{run}: stopped before its first checkpoint; train it again without --resume")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {run}: cannot be made a directory ({error.strerror})") from error
    return run


def open_log(run, config, names, start):
    """Write config.json and names.txt, open log.jsonl; on resuming, lines from after the checkpoint are dropped.

    What the run goes on with otherwise is added to config.json's "changes", with the step.
    """
    now, before = flat(config), read_config(run) if start else {}
    new = {name: now[name] for name in CHANGEABLE if now[name] != before.get(name, now[name]) and name != "stop_at"}
    changes = before.get("changes", []) + ([{"step": start, **new}] if new else [])
    write_files({run / "config.json": json.dumps(now | ({"changes": changes} if changes else {}), indent=1) + "\n",
                 run / "names.txt": "".join(name + "\n" for name in names)})
    path = run / "log.jsonl"
    kept = path.read_text().splitlines() if start and path.exists() else []
    kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] < start]     # a kill may cut a line
    write_files({path: "".join(line + "\n" for line in kept)})
    return open(path, "a")


def diverged(run, step, what):
    """One line for numbers that are no longer finite."""
    return (f"step {step}: {what}; the checkpoint in {run} stays as it was: go on from it with a smaller rate, "
            f"--resume {run} --set lr=..., or look at these images")


def check_recipe(config, processes):
    """Raises InputError, naming the number, for a recipe that cannot run."""
    recipe = config.recipe
    parts = processes * recipe.accumulate
    if recipe.batch % parts:
        raise InputError(f"--batch {recipe.batch} cannot be split over {processes} processes x {recipe.accumulate} "
                         f"accumulation steps; the nearest that can is {max(1, round(recipe.batch / parts)) * parts}")


def train(config, resume=False, device="cpu", asked=None):
    """Train as `config` (a Training) says, then score and draw.  Returns the run directory.

    asked: a Stopping that listens for signals, or None; asked to stop, it saves after the step and raises Stopped.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    main, recipe = rank == 0, config.recipe
    check_recipe(config, processes)

    # ---- data, model, optimiser ----
    from guards.locking import locked                         # here: what a run of days needs, and files, are not the loop's
    from guards.starting import rehearse, warm_start
    from guards.stopping import Stopped, Stopping
    from published.images_of import training_set
    asked = asked or Stopping()                               # one that does not listen
    dataset = model_class(config.run.model).dataset(config.run) or training_set(config.run)
    dataset.draw(config.run.seed, 0)                          # a dataset that cannot be read at all speaks up here
    torch.manual_seed(config.run.seed)
    model = build(config.run).to(device).train()
    notes = model.notes(device)
    began = warm_start(model, recipe.init) if recipe.init and not resume else ""
    optimizers = model.optimizers(parameter_groups(model, recipe), recipe)
    local = recipe.batch // (processes * recipe.accumulate)
    text = model.vlm.embed_text(dataset.train_names)
    drawn = [Stream(dataset, config, 0, 0, 1)[j] for j in range(local)]
    rehearse(model, config, lambda: gradients(model, text, [default_collate(drawn)], config))
    run = run_directory(config, resume)                       # from here on there is something on disk
    lock = locked(run) if main else None                      # held until it is closed, or the process ends
    start = load_checkpoint(run, model, optimizers) if resume else 0
    stop, saved = min(recipe.steps, recipe.stop_at or recipe.steps), time.monotonic()
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    samples = iter(DataLoader(Stream(dataset, config, start, rank, processes), local, num_workers=recipe.workers,
                              pin_memory=device.startswith("cuda")))
    log = open_log(run, config, dataset.train_names, start) if main else None
    if main:
        said = [f"{type(model).__name__} {config.run.preset}: {trainable(model):,} trainable parameters, {recipe.batch} "
                f"images a step on {processes} process(es), {device}", notes]
        tqdm.write("; ".join(filter(None, said)) + (f"\n{began}" if began else ""))
    since, before = time.perf_counter(), start
    bar = tqdm(range(start, stop), initial=start, total=stop, unit="step", disable=not main)
    for step in bar:
        micro_batches = [next(samples) for _ in range(recipe.accumulate)]

        # ---- the step ----
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step) * group["rate"]
            optimizer.zero_grad(set_to_none=True)
        try:
            terms, remembered = gradients(wrapped, text, micro_batches, config, processes)
        except FloatingPointError as error:
            raise InputError(diverged(run, step, error)) from error
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        if not norm.isfinite():
            numbers = torch.cat([numbers for *_, numbers in micro_batches]).tolist()
            error = FloatingPointError(f"the gradient's norm is {norm.item()}, of images {numbers}")
            raise InputError(diverged(run, step, error)) from error
        for optimizer in optimizers:
            optimizer.step()
        forget(optimizers, model.after_step(remembered, step, config) or {})
        # ---- end of the step ----

        if (step + 1) % recipe.log_every == 0 or step + 1 == recipe.steps:                # a stop has no line of its own
            line = {"step": step, "lr": learning_rate(recipe, step), "grad_norm": norm.item()}
            line.update({name: summed(value).item() / processes for name, value in terms.items()})
            line["ms_per_step"] = 1000 * (time.perf_counter() - since) / (step + 1 - before)
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None
            line.update(model.log())
            since, before = time.perf_counter(), step + 1
            if main:
                print(json.dumps(line), file=log, flush=True)
                bar.set_postfix({name: f"{line[name]:.3f}" for name in model.watch})
        stopped = summed(torch.tensor(int(asked() > 0))).item()                           # alike on all processes
        due = recipe.save_minutes and time.monotonic() - saved > 60 * recipe.save_minutes
        if main and ((step + 1) % recipe.save_every == 0 or step + 1 == stop or due or stopped):
            save_checkpoint(run, model, optimizers, step + 1)
            saved = time.monotonic()
        if stopped:
            bar.close()
            if main:
                print(f"asked to stop: {step + 1} of {recipe.steps} steps are saved; go on with: python train.py --resume {run}")
            raise Stopped(asked() or signal.SIGTERM)
    asked.end()                                               # scores and pictures need not be finished
    if main:
        log.close()
        lock.close()
    if main and stop < recipe.steps:
        print(f"stopped after {stop} of {recipe.steps} steps; go on with: python train.py --resume {run}")
    elif main:
        from studies.report import score_and_draw             # here, where training is over: what it needs is not ours

        score_and_draw(run, model, config, device)
    return run


# --- the command line ----------------------------------------------------------------------------------------------

FLAGS = {                                  # title -> {number of a config: what its flag says}; all others by --set
    "what": {"model": f"one of {', '.join(MODELS)} (pat)", "preset": "world, coco, coco-eva, ... (world)",
             "ablate": "switch one idea off: a row of the paper's Table II", "vlm": "open_clip name of the frozen CLIP",
             "pretrained": "its open_clip tag, a file, or none", "kernels": "plain, triton, or auto: Triton on a GPU"},
    "on what": {"data": "DIR with COCO-Stuff's archives, or a folder of yours", "val_data": "the same, to score on",
                "val_images": "how many images are scored"},
    "how": {"steps": "", "batch": "images a step, over all processes", "accumulate": "passes a step", "lr": "",
            "seed": "of weights and draws", "precision": "on a GPU: bf16 or fp32", "workers": "data-loading processes",
            "save_every": "steps", "save_minutes": "the same, by the clock"},
    "where": {"out": "run directory", "init": "a run to start from", "stop_at": "stop after so many steps",
              "resume": "a run to go on with; auto: the --out of this command, if it holds one (torchrun's default)"}}


def parser_of():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, words in flags.items():
            group.add_argument("--" + name.replace("_", "-"), metavar=name.upper(), help=words)
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[],
                        help="any number of the model or the recipe, by its name in the code; as often as needed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def settings(config, pairs):
    """Each NAME=VALUE as {name: value}, of the kind that its default has.  Raises InputError."""
    numbers, parts = {}, leaves(config)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise InputError(f"--set {pair}: takes NAME=VALUE, such as --set w_rec=1")
        if name not in parts:
            changed(config, **{name: text})                   # says whose number it is, or the closest
        numbers[name] = parse_value(name, getattr(parts[name], name), text)
    return numbers


def parse(argv=None):
    """(config, resume, device) from the command line.

    Raises InputError for an unknown flag or number, naming the closest, or for a value of the wrong kind.
    """
    parser, own, argv = parser_of(), argv is None, sys.argv[1:] if argv is None else argv
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag not in parser._option_string_actions:
            from guards.flags import replaced
            if now := replaced(flag, {model: recipe("world", model) for model in MODELS}):
                raise InputError(f"{flag} is now {now}")
    args = {name: text for name, text in vars(parse_flags(parser, argv)).items() if text}
    device, pairs, resume = args.pop("device"), args.pop("set", []), args.pop("resume", "")
    check_device(device)
    if resume and resume != "auto":
        config = load_training(resume)
        numbers = settings(config, ["stop_at=0", *(f"{name}={text}" for name, text in args.items() if name != "ablate"), *pairs])
        extra = sorted({*numbers, *args.keys() & {"ablate"}} - {*CHANGEABLE})
        if extra:
            raise InputError(f"--resume takes its settings from {resume}/config.json; leave out {extra[0].replace('_', '-')}: "
                             f"only {', '.join(CHANGEABLE)} may be others")
        return changed(config, **{**numbers, "out": str(resume)}), True, device
    model, name, row = args.pop("model", "pat"), args.pop("preset", "world"), args.pop("ablate", "")
    config = recipe(name, model)
    numbers = settings(config, [*(f"{name}={text}" for name, text in args.items()), *pairs])
    if row:
        rows = model_class(model).ABLATIONS
        if row not in rows:
            has = ", ".join(rows) or "nothing to switch off"
            raise InputError(f"--ablate {row}: {model} has {has}{closest(row, rows)}")
        config = changed(config, **rows[row])
    config = changed(config, **numbers)
    if config.recipe.init and Path(config.recipe.init).is_dir() and "pretrained" not in numbers:
        began = load_config(config.recipe.init).net.clip
        if config.run.net.clip.vlm in (began.vlm, re.sub("-(quick)?gelu$", "", began.vlm)):
            config = changed(config, vlm=began.vlm, pretrained=began.pretrained)
    run = place_of(config)
    again = resume or own and "TORCHELASTIC_RUN_ID" in os.environ                         # torchrun gives a command again
    goes_on = again and (run / CHECKPOINTS[0]).exists() and not (run / "scores.json").exists()
    if goes_on:
        from guards.starting import same_run
        same_run(run, load_training(run), config, CHANGEABLE)
    return config, bool(goes_on), device


def main():
    config, resume, device = parse()
    if "RANK" in os.environ:                                  # started by torchrun
        store, rank, processes = next(dist.rendezvous("env://"))      # torchrun keeps one store over all its restarts, and
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)    # dead processes' addresses in it
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=processes)
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    from guards.stopping import Stopping
    try:
        with Stopping() as asked:
            train(config, resume, device, asked)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
