"""Checkpoints: what training changes, in one safetensors file beside the run's config.json.

    model.NAME      every trained parameter and every buffer of ours, by its name in the model
    adam.KIND.NAME  AdamW's moments and step counter, where the run may go on
    metadata        step, the loss scale, and a checksum of the frozen VLM that the weights belong to

The frozen CLIP is not in it: 600 MB that everybody has once.  Its checksum is, so that a checkpoint is not joined to
other CLIP weights.  Nothing is pickled; a file is replaced only by a whole one; what does not fit is an `InputError`.

# ours: all of it.

Tests: tests/test_checkpoint.py.  Read next: pat.py.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from images import InputError


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
        raise InputError(f"{path}: was trained over other CLIP weights than {model.config.pretrained!r}")
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def save_checkpoint(path, model, optimizer, step, scaler):
    """Weights, AdamW's moments, step and loss scale in one safetensors file, replaced atomically."""
    tensors = {f"model.{name}": value for name, value in trained_state(model).items()}
    names = {p: name for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        tensors.update({f"adam.{kind}.{names[p]}": value for kind, value in state.items()})
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    scale = json.dumps(scaler.state_dict() if scaler else {})
    temporary = path.with_name("." + path.name)
    save_file(tensors, temporary, {"step": str(step), "vlm": fingerprint(model), "scaler": scale})
    os.replace(temporary, path)


def load_checkpoint(path, model, optimizer, scaler):
    """Restore what `save_checkpoint` wrote; returns the step.  Raises InputError on a damaged or foreign file."""
    load_weights(model, path)
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        for name, p in model.named_parameters():
            if f"adam.step.{name}" in keys:
                state = {kind: file.get_tensor(f"adam.{kind}.{name}") for kind in ("step", "exp_avg", "exp_avg_sq")}
                where = {"step": "cpu"}                       # AdamW keeps its step counter there
                optimizer.state[p] = {kind: value.to(where.get(kind, p.device)) for kind, value in state.items()}
    if scaler and json.loads(metadata["scaler"]):
        scaler.load_state_dict(json.loads(metadata["scaler"]))
    return int(metadata["step"])


def layers(names, everything):
    """`names` in short: a layer of which every entry of `everything` is among them stands for all of these."""
    found = set()
    for name in names:
        parts = name.split(".")
        for prefix in (".".join(parts[:k]) for k in range(1, len(parts) + 1)):
            if all(other in names for other in everything if other == prefix or other.startswith(prefix + ".")):
                found.add(prefix)
                break
    return sorted(found)


def warm_start(model, run, load_config):
    """Start from another run: copy every trained entry of its checkpoint that has a place of its shape in `model`.

    CLIP's position embedding belongs to its CLIP, so it comes along only if the frozen weights are the same.
    `load_config(run)` refuses what is no run directory (pat.py's: this file knows no model).  -> a line that says what
    was taken, and which layers were not.  Raises InputError if there is no such run, or nothing fits.
    """
    if Path(run).is_file():
        raise InputError(f"--init {run}: takes a run directory; a published SAN checkpoint becomes one with "
                         f"python pat.py import {run} --out runs/san-published")
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
