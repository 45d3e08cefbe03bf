"""The contract: what a model owes the loop, the scores and the pictures.  Whoever keeps it is trained, scored and drawn.

    Config, PRESETS, RECIPES   its numbers: a dataclass of parts; preset name -> numbers of the model; -> of the loop
    ABLATIONS                  name -> changed numbers: what `--ablate NAME` switches off
    check(config)              raises InputError, naming the number, where numbers do not fit together

    forward(image, text)       image (B,3,H,W) CLIP-normalised, sides multiples of `stride`; text (L,E) unit -> out, a
                               dict only the model reads.  Any L: the same names in another order, the same answer.
    answer(out, b)             what image b says -> Answer: how its pixels get names
    totals(labels)             counts of a micro-batch (n,), whose sums over all processes `terms` divides by
    terms(out, batch)          -> {name: (weight, loss)}, unweighted; weight 0: only logged.  Splitting a batch over
                               processes or steps must not change the gradient.

One step of train.py, whole:

    totals = summed(sum(model.totals(labels) for _, labels, _ in micro_batches))
    for images, labels, numbers in micro_batches:
        out   = model(images, text)
        terms = model.terms(out, Batch(images, labels, inside, keys, totals, parts))
        loss  = sum(weight * term for weight, term in terms.values()) / len(micro_batches)

and one prediction of eval.py, for masks, maps of names and groups alike:

    s_lp = Σ_c mix_cl gate( maps_c, interpolated, at p )        name_p = argmax_l s_lp

A model may also repaint its image, out["image"] (B,3,H,W) in [0,1], and quantise, out["tokens"] {stage: vq.Tokens}, with
`stages`, `codebook(stage)` and `quantisers()`: then it is scored and drawn for that too.

# ours: all of it.

Tests: tests/test_segmenter.py, the same for every model.  Smallest follower: siblings/dense.py.  Read next: san.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

VLMS = {                                   # preset -> the frozen CLIP every model of that preset stands on
    "world": dict(vlm="world", pretrained="world", clip_scale=1.0, depths=(0, 1, 2, 3), short_side=64, long_side=256),
    "coco": {},                            # the paper's: OpenAI's ViT-B/16 sees 320 of 640 pixels, as a 20x20 grid
    "coco-eva": dict(vlm="EVA02-B-16", pretrained="merged2b_s8b_b131k"),
    "coco-large": dict(vlm="ViT-L-14-336", clip_scale=0.7),                              # SAN-L's: 448 of 640, 32x32
    "coco-eva-large": dict(vlm="EVA02-L-14-336", pretrained="merged2b_s6b_b61k", clip_scale=0.7)}    # nobody published it


class Batch(NamedTuple):
    """A micro-batch as `terms` needs it."""

    images: torch.Tensor       # (b,3,H,W) CLIP-normalised
    labels: torch.Tensor       # (b,H,W) int64, ids of the training names or IGNORE
    inside: torch.Tensor       # (b,H,W) bool, False where there is no image but padding
    keys: list                 # b tuples of integers: whatever is drawn at random for an image is keyed by its own
    totals: torch.Tensor       # (n,) float64: `totals`, summed over all processes and micro-batches of the step
    parts: int                 # of how many micro-batches this is one: a sum is divided by total / parts


identity = nn.Identity()                   # the gate of maps that are scores, or weights, already


class Answer(NamedTuple):
    """How the pixels of one image get their names; see the header."""

    maps: torch.Tensor                     # (C,h,w), on any grid over the padded input
    mix: torch.Tensor | None = None        # (C,L): what map c says of each name; None: map c IS name c
    none: bool = False                     # whether mix has one more column, the last: "none of these"
    gate: Callable = torch.sigmoid         # interpolated maps to weights; `identity` where they are scores already
    floor: float = float("-inf")           # what the best score must reach where "none of these" has no column


def summed(value):
    """The sum of a tensor over all processes; itself where there is one process."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = value.detach().to(device, copy=True)
    dist.all_reduce(total)
    return total.to(value.device)


class Segmenter(nn.Module):
    """The defaults that most models keep.  A model sets `config` (its Config), `vlm` (clip.VLM) and `stride`."""

    PRESETS, RECIPES, ABLATIONS = {}, {}, {}
    stages = ()                            # names of the stages that have a codebook
    rates = {}                             # prefix of parameter names -> factor of the learning rate
    watch = ()                             # terms that the progress bar shows
    curves = {}                            # title of a panel -> {label: term}: what `studies.gallery curves` draws

    @classmethod
    def check(cls, config):
        """Raises InputError where the numbers of `config` do not fit together."""

    def totals(self, labels):
        return torch.zeros(0, dtype=torch.float64)            # every term is a mean over images of one size

    @classmethod
    def dataset(cls, run):
        """Training samples of its own, or None for those of the run (a RunConfig)."""
        return None

    def notes(self, device):
        """Words for the log's first line.  Raises InputError for what cannot run on `device`."""
        return ""

    def optimizers(self, groups, recipe):
        """groups: [dict(params, weight_decay, rate, muon)] -> the optimisers that step in turn."""
        matrices, rest = ([group for group in groups if group["muon"] == muon] for muon in (True, False))
        from kernels.muon import Muon                         # torch's, faster on a CPU
        return [torch.optim.AdamW(rest, lr=recipe.lr), *([Muon(matrices, lr=recipe.lr)] if matrices else [])]

    def remember(self, out, batch):
        """What `after_step` needs of one micro-batch, detached."""
        return None

    def after_step(self, remembered, step, config):
        """Once the optimiser has stepped.  remembered: [(numbers (b), remember(out, batch))] of the step; config: a Training
        -> {parameter: rows (bool) that are new}: the loop clears their moments."""
        return {}

    def log(self):
        """Further entries of a logged line, on every process: {name: number or dict}."""
        return {}

    def unlogged(self):
        """{name: tensor} that the next line will tell, alike on all processes; a checkpoint keeps it, resuming updates it."""
        return {}

    def parts(self):
        """{title: [modules]} whose forward time studies/speed.py shows apart."""
        return {}
