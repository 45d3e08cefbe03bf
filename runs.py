"""A run directory, whatever its model: which model it is, its numbers, its weights.

    config.json              every number, flat: leaf names are unique among the parts of a config
    checkpoint.safetensors   model.NAME       every trained parameter and every buffer of ours, by its name in the model
                             adam.KIND.NAME   the optimisers' moments and step counters, where the run may go on
                             log.NAME         counts that no logged line has told yet
                             metadata         step, format, a checksum of the frozen weights that these belong to, and one
                                              of the file, so that a flipped bit is noticed
    checkpoint.before.safetensors            the one before; the newest whole one is taken
    names.txt                what it was trained with, a name a line

The frozen CLIP is not in it: 600 MB that everybody has once.  Its checksum is, so that a checkpoint is not joined to
other CLIP weights.  Nothing is pickled; a file is replaced only by a whole one; what does not fit is an `InputError`.

    preset("world", "pat", scales=(1, 1, 1))  ->  RunConfig(model, preset, seed, ..., net=PATConfig(clip=..., side=...))

# ours: all of it.

Tests: tests/test_runs.py.  Read next: train.py.
"""

import difflib
import hashlib
import importlib
import json
import os
import shutil
import sys
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from cli import InputError, checked, number, tensors_checksum
from pat import PAT
from san import SAN

MODELS = {"pat": PAT, "san": SAN, "dense": "siblings.dense.Dense", "fgaseg": "siblings.fgaseg.FGASeg",
          "fisa": "siblings.fisa.FISA", "senatra": "siblings.senatra.SeNaTra"}

CHECKPOINTS = "checkpoint.safetensors", "checkpoint.before.safetensors"                   # the newest, the one before
FORMAT = "2"                           # of a checkpoint; of before November 2026 it says none, and has no checksum


@dataclass
class RunConfig:
    """What every run needs, and its model's own numbers."""

    net: object                                 # the model's Config
    model: str = "pat"                          # a name of MODELS
    preset: str = "coco"                        # which preset the numbers started from
    seed: int = number(0, 0, 2**32 - 1)         # of the weights and of every draw in training
    data: str = ""                              # the folder it is trained on; the world needs none
    val_data: str = ""                          # what it is scored on: a folder, or COCO-Stuff val; "" = first images of `data`
    ignore: int = number(255, 0, 65535)         # value in the folders' label files that means unlabelled


# --- configs: parts, and leaves with names of their own -------------------------------------------------------------
def leaves(config):
    """Every number of a config and of its parts: name -> the part that holds it."""
    parts = {}
    for field in fields(config):
        value = getattr(config, field.name)
        parts.update(leaves(value) if is_dataclass(value) else {field.name: config})
    return parts


def flat(config):
    """name -> value of every number, as config.json holds them."""
    return {name: getattr(part, name) for name, part in leaves(config).items()}


def closest(word, names):
    """"; did you mean NAME?", or "" where none is close."""
    return "".join(f"; did you mean {close}?" for close in difflib.get_close_matches(word, list(names), 1))


def changed(config, **numbers):
    """A copy with other numbers.  Raises InputError for one out of its range, or a name it does not have: whose it is, or the
    closest."""
    config = deepcopy(config)
    parts = leaves(config)
    for name, value in numbers.items():
        if name not in parts:
            others = [other for other in MODELS if name in leaves(model_class(other).Config())]
            whose = f": that number is {others[0].upper()}'s" if others else closest(name, parts)
            raise InputError(f"{config_name(config)} has no number called {name}{whose}")
        spec = next(field for field in fields(parts[name]) if field.name == name)
        setattr(parts[name], name, checked(name, value, spec))
    return config


def config_name(config):
    """The model of a config, or of its run, in words."""
    run = getattr(config, "run", config)
    return f"model {run.model}" if hasattr(run, "model") else type(config).__name__


def parse_value(name, default, text):
    """The text of `--set name=text` as a value of the kind of `default`.  Raises InputError."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            kind = str if default and isinstance(default[0], str) else int
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        return type(default)(text.strip())
    except (ValueError, KeyError) as error:
        kind = {bool: "true or false", tuple: "values with commas between", int: "a whole number",
                float: "a number"}[type(default)]
        raise InputError(f"{name}={text}: takes {kind}, such as {default}") from error


# --- models ---------------------------------------------------------------------------------------------------------
def model_class(name):
    """The class of a model of MODELS, the one registry; a sibling is imported when asked.  InputError for another name."""
    if name not in MODELS:
        raise InputError(f"--model {name}: there are {', '.join(MODELS)}")
    entry = MODELS[name]
    if isinstance(entry, str):
        module, _, kind = entry.rpartition(".")
        return getattr(importlib.import_module(module), kind)
    return entry


def preset(name, model="pat", **numbers):
    """The RunConfig of a model at a preset: world, coco (the paper's), coco-eva, coco-large (SAN-L's), coco-eva-large."""
    kind = model_class(model)
    if name not in kind.PRESETS:
        raise InputError(f"no preset of {model} is called {name!r}; there are {', '.join(kind.PRESETS)}")
    run = changed(RunConfig(kind.Config(), model, name), **kind.PRESETS[name])
    return changed(run, **numbers)


def build(run):
    """The model of a RunConfig.  Raises InputError for numbers that do not fit together."""
    kind = model_class(run.model)
    kind.check(run.net)
    return kind(run.net)


# --- config.json ----------------------------------------------------------------------------------------------------

RENAMED = {"clip": "grad_clip", "vmf": "metric"}              # in runs of before November 2026
OLD_VALUES = {("kernels", "torch"): "auto", ("metric", "True"): "cosine", ("metric", "False"): "dot"}
NEW_VALUES = {"perceptual": False}                            # LPIPS was where its file happened to be


def filled(config, stored):
    """A copy of `config` with what a config.json holds for it; entries it does not know are left out."""
    if stored.get("decoder_attention", "pooled") != "pooled":
        raise InputError("its decoder_attention was full, which is no more: train it again")
    stored = {RENAMED.get(name, name): tuple(v) if isinstance(v, list) else v for name, v in (NEW_VALUES | stored).items()}
    stored = {name: OLD_VALUES.get((name, str(value)), value) for name, value in stored.items()}
    return changed(config, **{name: stored[name] for name in leaves(config) if name in stored})


def read_config(run):
    """config.json of a run directory as a dict.  Raises InputError if it is missing or damaged."""
    try:
        stored = json.loads((Path(run) / "config.json").read_text())
        if not isinstance(stored, dict):
            raise ValueError("holds no object")
        return stored
    except (OSError, ValueError) as error:
        raise InputError(f"{run}: no run directory (config.json: {error}); make one with `python train.py`") from error


def load_config(run):
    """The RunConfig of a run directory; CLIP weights beside it are found wherever the directory lies."""
    stored = read_config(run)
    try:
        config = filled(RunConfig(model_class(stored.get("model", "pat")).Config()), stored)
        beside = Path(run) / config.net.clip.pretrained
    except TypeError as error:
        raise InputError(f"{run}: no run directory (config.json: {error}); make one with `python train.py`") from error
    return changed(config, pretrained=str(beside)) if beside.is_file() else config


def load_run(run, device="cpu"):
    """(model in eval mode, its RunConfig) of a run directory with config.json and checkpoint.safetensors.

    Raises InputError, naming the file, when one is missing, damaged or belongs to another model.
    """
    config, found = load_config(run), read_checkpoint(run)
    if hasattr(config.net, "kernels"):
        config.net.kernels = "auto"                           # how it was trained binds nobody who only uses it
    torch.manual_seed(config.seed)                            # with pretrained "none", CLIP comes from the seed
    model = build(config)
    load_weights(model, found, run)
    return model.to(device).eval(), config


# --- checkpoints ----------------------------------------------------------------------------------------------------
def trained_state(model):
    """What training changes: trained parameters and our buffers, not the frozen VLM.  name -> tensor"""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **{name: b for name, b in model.named_buffers() if not name.startswith("vlm.")}}


def fingerprint(model):
    """A checksum of the frozen VLM, so that a checkpoint is not joined to other CLIP weights."""
    digest = hashlib.sha256()
    for _, p in sorted(model.vlm.named_parameters()):
        if not p.requires_grad:
            digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest(tensors, told):
    """A checksum of everything a checkpoint says: its tensors and its metadata."""
    return hashlib.sha256(f"{tensors_checksum(tensors)} {sorted(told.items())}".encode()).hexdigest()


def write_checkpoint(run, tensors, **told):
    """Tensors and metadata (str) as the run's newest checkpoint; the one there was becomes CHECKPOINTS[1].

    The file stands whole on the disk, fsync, before it takes its name.  Raises InputError where it cannot be written.
    """
    path, before = (Path(run) / name for name in CHECKPOINTS)
    temporary, old = path.with_name("." + path.name), path.with_name("." + before.name)
    told = {"format": FORMAT, **told}
    try:
        with open(temporary, "wb") as file:
            file.write(save(tensors, {**told, "digest": digest(tensors, told)}))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copyfile(path, old)                        # so that the newest has its name at every moment
            os.replace(old, before)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)            # a name, too, is on the disk only once its folder is
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        for file in (temporary, old):
            file.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror}); what stood there is whole") from error


def read_file(path):
    """(name -> tensor, metadata) of a checkpoint file.  Raises InputError if it is damaged, or of another format."""
    try:
        # At once: safetensors' own reader opens a path twice, and a training may replace the file between the two.
        data = Path(path).read_bytes()
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        tensors, told = load(data), header.get("__metadata__", {})
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]}); it may be truncated: "
                         "copy it again or train again") from error
    if told.get("format", FORMAT) != FORMAT:
        raise InputError(f"{path}: of format {told['format']}; this program reads {FORMAT}")
    said = told.pop("digest", None)
    if said is not None and said != digest(tensors, told):
        raise InputError(f"{path}: damaged, its checksum does not fit: copy it again or train again")
    return tensors, told


def read_checkpoint(run):
    """(name -> tensor, metadata) of the newest whole checkpoint of a run directory; a damaged one is named on stderr.

    Raises InputError, naming the newest, if there is none, or none is whole.
    """
    paths = [path for path in (Path(run) / name for name in CHECKPOINTS) if path.is_file()]
    if not paths:
        raise InputError(f"{Path(run) / CHECKPOINTS[0]}: no such file; the run has not written a checkpoint yet")
    errors = []
    for path in paths:
        try:
            found = read_file(path)
            for error in errors:
                print(f"{error}; instead {path.name} is taken, of step {found[1].get('step')}", file=sys.stderr)
            return found
        except InputError as error:
            errors.append(error)
    raise errors[0]


def part(tensors, prefix):
    """The entries of a checkpoint whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_weights(model, found, run):
    """Load the trained part of what `read_checkpoint(run)` found.  Raises InputError unless names, shapes and the VLM agree."""
    tensors, told = found
    own, state = trained_state(model), part(tensors, "model.")
    wrong = sorted(key for key in own.keys() | state.keys()
                   if key not in own or key not in state or own[key].shape != state[key].shape)
    if wrong:
        raise InputError(f"{run}: {len(wrong)} entries do not fit this model, the first is {wrong[0]}; "
                         "it belongs to another preset or other switches")
    if told.get("vlm") != fingerprint(model):
        raise InputError(f"{run}: was trained over other CLIP weights than {model.config.clip.pretrained!r}")
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def save_checkpoint(run, model, optimizers, step):
    """Weights, the optimisers' state, what waits for the log and the step, in one file.

    Raises InputError, and writes nothing, where a trained number is not finite.
    """
    tensors = {f"model.{name}": value for name, value in trained_state(model).items()}
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    for p, name in trained.items():
        if not p.isfinite().all():
            error = FloatingPointError(f"{name} is not finite after {step} steps")
            raise InputError(f"{error}; the checkpoint in {run} stays as it was") from error
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors.update({f"adam.{kind}.{trained[p]}": value for kind, value in state.items()})
    tensors.update({f"log.{name}": value for name, value in model.unlogged().items()})
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_checkpoint(run, tensors, step=str(step), vlm=fingerprint(model))


def load_checkpoint(run, model, optimizers):
    """Restore what `save_checkpoint` wrote; returns the step.  Raises InputError on a damaged or foreign file."""
    tensors, told = found = read_checkpoint(run)
    load_weights(model, found, run)
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, value in part(tensors, "adam.").items():
        kind, name = name.split(".", 1)
        p = parameters[name]
        device = "cpu" if kind == "step" else p.device                                    # AdamW keeps its counter there
        owner[p].state[p][kind] = value.to(device)
    model.unlogged().update(part(tensors, "log."))
    return int(told["step"])
