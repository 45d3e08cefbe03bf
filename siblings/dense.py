"""dense: the simplest baseline.  CLIP's four fused maps -> linear -> cosine with the names, cross-entropy a pixel.

    f (B,S,h,w) = Σ_i bilinear(Conv1x1(LN(F_i)))        on a grid of `fine` pixels a cell
    logits_lp   = exp(logit_scale) cos( W GELU(f_p), text_l )         (B,L,h,w), up-sampled to the label: that is all

No queries, no matching, no masks, no tokens.  It shows what the others have to beat, and what the contract of
segmenter.py asks of a model at the least.  64x64 world: maps (8,128,8,8) -> f (8,96,32,32) -> logits (8,49,32,32).

# ours: all of it.

Tests: tests/siblings/test_dense.py, and tests/test_segmenter.py as for every model.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from cli import number
from clip import CLIPConfig, load_vlm
from data import IGNORE
from san import SAN, Fusion
from segmenter import VLMS, Answer, Segmenter, identity


@dataclass
class DenseConfig:
    """Every number of the model; defaults are for ViT-B/16 at 640 pixels."""

    clip: CLIPConfig = field(default_factory=CLIPConfig)
    dense_width: int = number(256, 1, 16384)    # S
    fine: int = number(8, 1, 256)               # pixels a cell of the grid on which names are told apart


class Dense(Segmenter):
    """`model(image, text)` -> dict(logits (B,L,h,w))."""

    Config = DenseConfig
    PRESETS = {name: {**vlm, **(dict(dense_width=96, fine=2) if name == "world" else {})} for name, vlm in VLMS.items()}
    RECIPES = SAN.RECIPES
    watch = ("ce",)
    curves = {"segmentation losses": {"cross-entropy": "ce"}}

    def __init__(self, config):
        super().__init__()
        self.config, clip = config, config.clip
        self.vlm = load_vlm(clip.vlm, clip.pretrained, scale=clip.clip_scale, depths=clip.depths)
        self.fusion = nn.ModuleList(Fusion(self.vlm.width, config.dense_width) for _ in self.vlm.depths)
        self.head = nn.Linear(config.dense_width, self.vlm.text_width)
        self.stride = 32 if clip.vlm != "world" else 8        # inputs are padded to a multiple, as SAN's

    def features(self, image):
        """image (B,3,H,W) -> f (B,S,h,w)"""
        grid = (image.shape[-2] // self.config.fine, image.shape[-1] // self.config.fine)
        return sum(fuse(m, grid) for fuse, m in zip(self.fusion, self.vlm.features(image).maps))

    def forward(self, image, text):
        f = self.features(image)
        pixels = F.normalize(self.head(F.gelu(f).permute(0, 2, 3, 1)), dim=-1).to(text.dtype)             # (B,h,w,E)
        return dict(logits=self.vlm.logit_scale * torch.einsum("bhwe,le->blhw", pixels, text))

    def answer(self, out, b=0):
        return Answer(out["logits"][b].float(), gate=identity)

    def totals(self, labels):
        """How many pixels have a label."""
        return (labels != IGNORE).sum().double()[None]

    def terms(self, out, batch):
        logits = F.interpolate(out["logits"].float(), size=batch.labels.shape[-2:], mode="bilinear")      # (B,L,H,W)
        ce = F.cross_entropy(logits, batch.labels, ignore_index=IGNORE, reduction="sum")
        return dict(ce=(1.0, ce * batch.parts / batch.totals[0].clamp(min=1)))
