"""The perceptual loss: LPIPS over VGG-16, whose backbone is somebody else's file.

    load_lpips(device)    the metric, frozen, or None where $TORCH_HOME/hub/checkpoints has no VGG: never downloaded
    needed(device)        the same, or an error with a way out: what training asks for

# paper: L_rec has a perceptual term.   # ours: LPIPS-VGG for it, ViT-VQGAN's choice.

Tests: tests/published/test_perceptual.py.
"""

import functools
from pathlib import Path

import torch

from cli import InputError

VGG = "vgg16-397923af.pth"             # LPIPS's backbone, torchvision's file name in the torch hub cache
URL = f"https://download.pytorch.org/models/{VGG}"


def vgg_path():
    """Where torch keeps, and looks for, VGG-16."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG


@functools.lru_cache
def load_lpips(device="cpu"):
    """LPIPS-VGG, frozen, or None when its backbone is not in the torch hub cache; never downloads or unpickles code.

    Raises InputError if the file is there but is not torchvision's VGG-16.
    """
    path = vgg_path()
    if not path.is_file():
        return None
    import lpips

    metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)      # its linear layers come with the package
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        metric.net.load_state_dict({key: state["features." + key.split(".", 1)[1]] for key in metric.net.state_dict()})
    except Exception as error:
        why = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path}: not torchvision's VGG-16 weights ({why}); delete it") from error
    return metric.requires_grad_(False).to(device)


def needed(device="cpu"):
    """LPIPS-VGG as `load_lpips` gives it.  Raises InputError also where its backbone is not at hand."""
    metric = load_lpips(device)
    if metric is None:
        raise InputError(f"{vgg_path()}: no such file, and the perceptual loss stands on it; put {URL} there (528 MB), or "
                         "train without it: --set perceptual=false")
    return metric
