"""The world's CLIP: its architecture, and its weights as shipped; pretrain.py made them.

    image (B,3,64,64) -> 8x8 patches of 8 pixels, 6 blocks of width 128 -> joint space of 64 numbers, 9 MB in fp16

# ours: all of it.

Tests: tests/test_clip.py.  Read next: pretrain.py.
"""

from pathlib import Path

import open_clip
from safetensors.torch import load_file

from cli import InputError

WORLD_WEIGHTS = Path(__file__).parent / "clip.safetensors"


def world_clip(image_size=64):
    """The world's CLIP: patch 8, width 128, 6 blocks; text width 64, 2 blocks, 24 words; joint space 64."""
    vision = open_clip.CLIPVisionCfg(image_size=image_size, patch_size=8, width=128, layers=6, head_width=32)
    return open_clip.CLIP(64, vision, open_clip.CLIPTextCfg(context_length=24, width=64, heads=2, layers=2))


def open_model(name, pretrained):
    """(model, tokenizer) with the weights that are shipped ("world"), those of a file, or random ones ("none").

    Raises InputError for a file that holds other weights; `name` is always "world": see published.weights.open_model.
    """
    model = world_clip()
    if pretrained != "none":
        path = WORLD_WEIGHTS if pretrained == "world" else Path(pretrained)
        try:
            model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        except Exception as error:
            raise InputError(f"{path}: not the weights of the world's CLIP ({str(error).splitlines()[0]}); "
                             "train them with `python -m world.pretrain --train`") from error
    return model, open_clip.SimpleTokenizer(context_length=24)
