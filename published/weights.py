"""CLIP weights as others publish them: open_clip's names and tags, local files, OpenAI's TorchScript archives.

    open_model(name, pretrained)    an open_clip name and a tag, a local file, or "none"  ->  (model, tokenizer)
    load_pickle(path)               what torch.save wrote, as tensors alone: no code that the file may carry is run

clip.py asks here for every model but the world's.  With a file nothing asks for a network.

# ours: how a file whose activation nobody wrote down is told from OpenAI's.

Tests: tests/published/test_weights.py.  Read next: text_cache.py.
"""

import difflib
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import open_clip
import torch
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file

from cli import InputError

TESTED = ("ViT-B-16", "ViT-L-14-336", "EVA02-B-16", "EVA02-L-14-336")


def reason(error):
    """An exception in a few words: its kind, and the first line of what it says."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:150]}"


def load_pickle(path):
    """What torch.save wrote to `path`, on the CPU.  Raises InputError; never runs code that the file may carry."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: is no checkpoint, or holds Python objects beside tensors, whose loading could run "
                         "code; if you trust it, save its tensors alone with torch.save or safetensors") from error
    except Exception as error:                                # zip, legacy tar and file system each have their own
        raise InputError(f"{path}: cannot be read ({reason(error)}); it may be truncated: "
                         "copy it again") from error


def read_weights(path):
    """A CLIP's state dict, name -> tensor, from .safetensors, from a pickled one, or from OpenAI's TorchScript archive.

    Raises InputError when the file is none of these, is damaged, or holds code.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif zipfile.is_zipfile(path) and any("/constants.pkl" in name for name in zipfile.ZipFile(path).namelist()):
            with warnings.catch_warnings(action="ignore"):    # torch would rather we used torch.export
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = load_pickle(path)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); it may be truncated: "
                         "copy it again") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{path}: holds no state dict; give the weights in open_clip's layout, name by name")
    numbers = ("input_resolution", "context_length", "vocab_size")                        # of OpenAI's archives
    return {name.removeprefix("module."): value for name, value in state.items() if name not in numbers}


def differences(own, given, most=30):
    """What keeps the state dict `given` from fitting `own`: the first `most` entries of each kind; "" if it fits."""
    wrong = {"missing": own.keys() - given.keys(), "unknown": given.keys() - own.keys(),
             "of another shape": [f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
                                  for name in own.keys() & given.keys() if own[name].shape != given[name].shape]}
    return "; ".join(f"{len(names)} {what}: {', '.join(sorted(names)[:most])}" +
                     (f" and {len(names) - most} more" if len(names) > most else "")
                     for what, names in wrong.items() if names)


def is_ours(config):
    """Whether an open_clip config is a plain ViT with a cls token or a EVA-02, beside CLIP's own text tower."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    plain = set(vision) <= {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
    eva = vision.get("timm_model_name", "").startswith(("eva02_base", "eva02_large"))
    own_text = not any(key.startswith("hf_") for key in text) and "multimodal_cfg" not in config
    return own_text and (eva or plain and isinstance(vision["layers"], int))


def find_weights(name, pretrained, tags):
    """(state dict or None, whether it wants quick-GELU, or None if nobody knows) of what `open_model` is given."""
    if pretrained == "none":
        return None, "openai" in tags
    if Path(pretrained).suffix or os.sep in pretrained or Path(pretrained).is_file():
        if not Path(pretrained).is_file():
            raise InputError(f"{pretrained}: no such file; give a checkpoint of {name}, an open_clip tag, or none")
        state = read_weights(Path(pretrained))
        proj = state.get("visual.proj", torch.empty(0))
        theirs = torch.equal(proj.half().to(proj.dtype), proj)
        return state, (True if theirs else None) if "openai" in tags else False
    if not open_clip.is_pretrained_cfg(name, pretrained):
        close = difflib.get_close_matches(pretrained, [*tags, "none"], 1, cutoff=0)[0]
        raise InputError(f"{name} has no weights called {pretrained!r}; did you mean {close!r}? There are "
                         f"{', '.join(tags)}, a local file, and none")
    weights = open_clip.get_pretrained_cfg(name, pretrained)
    try:
        path = open_clip.download_pretrained(weights)
    except Exception as error:                                # whatever the network raised
        raise InputError(f"weights {pretrained!r} of {name} are neither here nor can they be downloaded "
                         f"({reason(error)}); where there is no network, give a file: "
                         "--pretrained FILE") from error
    return read_weights(Path(path)), weights.get("quick_gelu", False)


def open_model(name, pretrained):
    """(model, tokenizer) of an open_clip name and a tag, a local file, or "none" (random weights).

    The activation is not in the weights.  A tag knows its own; a file or "none" is taken for OpenAI's, quick-GELU,
    where OpenAI published that model, and NAME-gelu or NAME-quickgelu says otherwise.  OpenAI's matrices are half
    precision, so a file whose projection does not survive fp16 is not theirs, and then the name must say it.  With a
    file nothing asks for a network.  Raises InputError: unknown name or tag, weights that cannot be had or do not fit.
    """
    base = name.removesuffix("-quickgelu").removesuffix("-gelu")
    config = open_clip.get_model_config(base)
    if config is None:
        close = difflib.get_close_matches(base, open_clip.list_models(), 1)
        raise InputError(f"no VLM is called {name!r}; " + (f"did you mean {close[0]}?" if close else
                                                           f"try world, {', '.join(TESTED)}"))
    if not is_ours(config):
        raise InputError(f"{name}: only ViTs with a cls token and EVA02 base or large work here, with CLIP's own text "
                         f"tower; try {', '.join(TESTED)}")
    tags = open_clip.list_pretrained_tags_by_model(base)
    state, quick = find_weights(base, pretrained, tags)
    quick = name.endswith("-quickgelu") if base != name else quick
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = kind(**{**config, "quick_gelu": bool(quick)})
    if state is not None:
        own = model.state_dict()
        if "positional_embedding" in state and "positional_embedding" not in own:
            state = convert_to_custom_text_state_dict(state)  # an older layout of models with a text tower apart
        wrong = differences(own, state, most=5)
        if wrong:
            raise InputError(f"{pretrained}: not weights of {name} in open_clip's layout: {wrong}")
        if quick is None:
            raise InputError(f"{pretrained}: not OpenAI's weights, and a file does not say which activation it was "
                             f"trained with; name it: --vlm {name}-gelu or --vlm {name}-quickgelu")
        model.load_state_dict(state)
    return model, open_clip.get_tokenizer(base)


def with_activation(name, vlm):
    """The name by which `open_model` needs no weights to know the activation: ViT-B-16 -> ViT-B-16-quickgelu."""
    if name == "world" or hasattr(vlm.model.visual, "trunk"):         # the world's and timm's EVA come with one only
        return name
    base = name.removesuffix("-quickgelu").removesuffix("-gelu")
    return base + ("-quickgelu" if isinstance(vlm.blocks[0].mlp.gelu, QuickGELU) else "-gelu")
