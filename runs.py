"""A run directory, whatever its model: which model it is, its numbers, its weights.

    config.json              every number, flat: leaf names are unique among the parts of a config
    checkpoint.safetensors   model.NAME       every trained parameter and every buffer of ours, by its name in the model
                             adam.KIND.NAME   the optimisers' moments and step counters, where the run may go on
                             metadata         step, and a checksum of the frozen weights that these belong to
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
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cli import InputError
from pat import PAT
from san import SAN

MODELS = {"pat": PAT, "san": SAN, "dense": "siblings.dense.Dense", "fgaseg": "siblings.fgaseg.FGASeg",
          "fisa": "siblings.fisa.FISA", "senatra": "siblings.senatra.SeNaTra"}


@dataclass
class RunConfig:
    """What every run needs, and its model's own numbers."""

    net: object                        # the model's Config
    model: str = "pat"                 # a name of MODELS
    preset: str = "coco"               # which preset the numbers started from
    seed: int = 0                      # of the weights and of every draw in training
    data: str = ""                     # the folder it is trained on; the world needs none
    val_data: str = ""                 # what it is scored on: a folder, or COCO-Stuff val; "" = first images of `data`
    ignore: int = 255                  # value in the folders' label files that means unlabelled


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
    """A copy with other numbers.  Raises InputError for a name it does not have: whose it is, or the closest."""
    config = deepcopy(config)
    parts = leaves(config)
    for name, value in numbers.items():
        if name not in parts:
            others = [other for other in MODELS if name in leaves(model_class(other).Config())]
            whose = f": that number is {others[0].upper()}'s" if others else closest(name, parts)
            raise InputError(f"{config_name(config)} has no number called {name}{whose}")
        setattr(parts[name], name, value)
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
        return type(default)(text)
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
OLD_VALUES = {("kernels", "torch"): "auto", ("metric", True): "cosine", ("metric", False): "dot"}
NEW_VALUES = {"perceptual": False}                            # LPIPS was where its file happened to be


def filled(config, stored):
    """A copy of `config` with what a config.json holds for it; entries it does not know are left out."""
    if stored.get("decoder_attention", "pooled") != "pooled":
        raise InputError("its decoder_attention was full, which is no more: train it again")
    stored = {RENAMED.get(name, name): tuple(v) if isinstance(v, list) else v for name, v in (NEW_VALUES | stored).items()}
    stored = {name: OLD_VALUES.get((name, value), value) for name, value in stored.items()}
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
    config, path = load_config(run), Path(run) / "checkpoint.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the run has not written a checkpoint yet")
    if hasattr(config.net, "kernels"):
        config.net.kernels = "auto"                           # how it was trained binds nobody who only uses it
    torch.manual_seed(config.seed)                            # with pretrained "none", CLIP comes from the seed
    model = build(config)
    load_weights(model, path)
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


def read_checkpoint(path):
    """(name -> tensor of the trained part, metadata) of a checkpoint.  Raises InputError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            state = {key[6:]: file.get_tensor(key) for key in file.keys() if key.startswith("model.")}
            return state, file.metadata() or {}
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]}); it may be truncated: "
                         "copy it again or train again") from error


def load_weights(model, path):
    """Load the trained part of a checkpoint.  Raises InputError unless names, shapes and the VLM agree."""
    state, metadata = read_checkpoint(path)
    own = trained_state(model)
    wrong = sorted(key for key in own.keys() | state.keys()
                   if key not in own or key not in state or own[key].shape != state[key].shape)
    if wrong:
        raise InputError(f"{path}: {len(wrong)} entries do not fit this model, the first is {wrong[0]}; "
                         "it belongs to another preset or other switches")
    if metadata.get("vlm") != fingerprint(model):
        raise InputError(f"{path}: was trained over other CLIP weights than {model.config.clip.pretrained!r}")
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def save_checkpoint(path, model, optimizers, step):
    """Weights, the optimisers' state and the step in one safetensors file, replaced atomically."""
    tensors = {f"model.{name}": value for name, value in trained_state(model).items()}
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors.update({f"adam.{kind}.{names[p]}": value for kind, value in state.items()})
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    temporary = path.with_name("." + path.name)
    save_file(tensors, temporary, {"step": str(step), "vlm": fingerprint(model)})
    os.replace(temporary, path)


def load_checkpoint(path, model, optimizers):
    """Restore what `save_checkpoint` wrote; returns the step.  Raises InputError on a damaged or foreign file."""
    load_weights(model, path)
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            if key.startswith("adam."):
                _, kind, name = key.split(".", 2)
                p = parameters[name]
                device = "cpu" if kind == "step" else p.device                            # AdamW keeps its counter there
                owner[p].state[p][kind] = file.get_tensor(key).to(device)
        return int(file.metadata()["step"])


def layers(names, everything):
    """`names` in short: a layer of which every entry of `everything` is among them stands for all of these."""
    prefixes = set()
    for name in names:
        parts = name.split(".")
        for prefix in (".".join(parts[:k]) for k in range(1, len(parts) + 1)):
            if all(other in names for other in everything if other == prefix or other.startswith(prefix + ".")):
                prefixes.add(prefix)
                break
    return sorted(prefixes)


def warm_start(model, run):
    """Start from another run: copy every trained entry of its checkpoint that has a place of its shape in `model`.

    CLIP's position embedding belongs to its CLIP, so it comes along only if the frozen weights are the same.  -> a line
    that says what was taken, and which layers were not.  Raises InputError if there is no such run, or nothing fits.
    """
    if Path(run).is_file():
        raise InputError(f"--init {run}: takes a run directory; a published SAN checkpoint becomes one with "
                         f"python -m published.san_checkpoints {run} --out runs/san-published")
    load_config(run)
    state, metadata = read_checkpoint(Path(run) / "checkpoint.safetensors")
    own, same = trained_state(model), metadata.get("vlm") == fingerprint(model)
    fits = {name for name in own.keys() & state.keys()
            if own[name].shape == state[name].shape and (same or not name.startswith("vlm."))}
    if not fits:
        raise InputError(f"--init {run}: nothing in its checkpoint fits this model; is it of another preset?")
    with torch.no_grad():
        for name in fits:
            own[name].copy_(state[name])
    said = {"without a place here": layers(state.keys() - own.keys(), state),
            "not in it": layers(own.keys() - state.keys(), own),
            "of another shape or another CLIP": layers(own.keys() & state.keys() - fits, own)}
    return (f"started from {run}: {len(fits)} of its {len(state)} entries taken" +
            "".join(f"; {what}: {', '.join(names)}" for what, names in said.items() if names))
