"""Before the first step: what a training starts from, and whether what stands in its place is the same run.

    warm_start(model, RUN)           --init: every entry of another run's checkpoint that has a place here
    rehearse(model, config, step)    one step and one scored image, and nothing kept of them
    same_run(run, there, asked)      for who goes on without being told: the same numbers, or one line that names the other

# ours: all of it.

Tests: tests/guards/test_starting.py.
"""

from pathlib import Path

import torch

from cli import InputError
from runs import fingerprint, flat, load_config, part, read_checkpoint, trained_state


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
    tensors, metadata = read_checkpoint(run)
    state = part(tensors, "model.")
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


def rehearse(model, config, step):
    """Try `step`, which leaves gradients, and score one image, and keep nothing: what can fail fails before step 0.

    Raises InputError for images that cannot be read or scored, for numbers that are not finite, for too little memory.
    """
    from predict import segment                               # here: scoring comes after training
    from published.images_of import scored_on
    scored, _ = scored_on(config.run)
    try:
        with torch.random.fork_rng(devices=[]):
            step()
            model.zero_grad(set_to_none=True)
            sample, text = scored[0], model.vlm.embed_text(scored.names)
            segment(model.eval(), sample["image"].to(text.device), text, sample["label"].shape)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(f"--batch {config.recipe.batch}: a step does not fit into memory; take a smaller one, or "
                         "--accumulate") from error
    except FloatingPointError as error:
        raise InputError(f"before the first step: {error}; look at these images, or at what --init starts from") from error
    model.train()


def same_run(run, there, asked, but=()):
    """Raises InputError if `there`, the Training that stands in `run`, has other numbers than `asked`, but for some.

    A moved run is the same run, and so is one that was stopped early.
    """
    there, asked = flat(there), flat(asked)
    names = asked.keys() - {"out", "stop_at", *but}
    for name in sorted(names, key=lambda name: (name != "model", name)):                      # a model has its own names
        if there[name] != asked[name]:
            raise InputError(f"{run}: was trained with {name} {there[name]!r}, not {asked[name]!r}; ask for that, or "
                             "choose another --out")
