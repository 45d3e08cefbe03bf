"""The shared decoder: the same tokens become pixels and masks (Eq. 3).

    y = W_post zq_latent (B,g,g,256)        q = Linear(q8)
    late, mid, early:   y = Up(y);   y = SPADE-Transformer(y | W_post zq_stage);   q = CrossAttn(q, y)
    two plain blocks, then LN before every head                       y (B,160,160,256)
    masks  = MLP(q) · MLP(y)                                          (B,100,160,160)
    bias   = MLP(q) · MLP_heads(average pool of y to the side grid)   (B,12,100,40,40)   what CLIP's copies attend to
    image^ = ConvTranspose(y)                                         (B,3,640,640) in [0,1] units

SPADE lets a map c modulate every pixel:  SPADE(x, c) = norm(x) * (1 + gamma(c)) + beta(c), the norm free of parameters.
DySample up-samples by looking: each new pixel reads the old map at a learned offset; zero offsets are bilinear x2.
Keys and values of every self-attention are average-pooled onto the side grid, in training and at any test size, so the
decoder stays light.  One mask head serves both supervised outputs: after the last stage, and at the end.

# paper: Eq. 3, SPADE conditions per stage, DySample, cross-attention of the queries at each stage, two heads.
# ours: pre-norm transformer blocks with two SPADEs each; spatial-reduction attention; pooling for the
#       bias; MLP heads as SAN's; one LN before the heads.
# differs: leaky ReLU in SPADE for its ReLU.

Maps inside this file are (B,h,w,c), channels last: linears, norms and attention read them as they are.
Demo: `python decoder.py` up-samples a disc with DySample.  Tests: tests/test_decoder.py.  Read next: pat.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cli import InputError
from data import MEAN
from hsattn import Attn
from san import FeedForward, MaskHead


def log2(n, what):
    """How often to halve or double for a factor n; raises InputError if n is not a power of two."""
    if n < 1 or 2 ** round(math.log2(n)) != n:
        raise InputError(f"{what} is a factor of {n}: scales must be powers of two, none larger than the one before it")
    return round(math.log2(n))


class DySample(nn.Module):
    """Twice the size by sampling at learned offsets (DySample, style 'lp', 4 groups of channels)."""

    def __init__(self, width, groups=4):
        super().__init__()
        self.groups = groups
        self.offset = nn.Conv2d(width, 2 * groups * 4, 1)     # x and y, each group, each of the 2x2 new pixels
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x):
        """(B,c,h,w) -> (B,c,2h,2w)"""
        B, _, h, w = x.shape
        offset = F.pixel_shuffle(0.25 * self.offset(x), 2)                                # (B,2*groups,2h,2w)
        offset = offset.reshape(B * self.groups, 2, 2 * h, 2 * w).permute(0, 2, 3, 1)        # (B*groups,2h,2w,2)
        ys = (torch.arange(2 * h, device=x.device) + 0.5) / 2                             # where bilinear would look
        xs = (torch.arange(2 * w, device=x.device) + 0.5) / 2
        where = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1) + offset
        where = 2 * where / where.new_tensor([w, h]) - 1                                  # to grid_sample's [-1,1]
        groups = x.reshape(B * self.groups, -1, h, w).to(where.dtype)                     # bf16 cannot tell places apart
        groups = F.grid_sample(groups, where, padding_mode="border", align_corners=False)
        return groups.view(B, -1, 2 * h, 2 * w).to(x.dtype)


class Up(nn.Sequential):
    """DySample as often as the factor needs; nothing at factor 1.  (B,c,h,w) -> (B,c,factor*h,factor*w)"""

    def __init__(self, width, factor):
        super().__init__(*(DySample(width) for _ in range(log2(factor, "up-sampling"))))


def on_map(module, y):
    """Apply a module for (B,c,h,w) to y (B,h,w,c); the permutes are views."""
    return module(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SPADE(nn.Module):
    """norm(x) * (1 + gamma(c)) + beta(c), both by two convolutions of c.

    Leaky between: SPADE's own ReLU dies at our rates, unit by unit, until nobody reads what the stage says
    (docs/results.md).
    """

    def __init__(self, width, hidden):
        super().__init__()
        self.shared = nn.Conv2d(width, hidden, 3, padding=1)
        self.gamma_beta = nn.Conv2d(hidden, 2 * width, 3, padding=1)

    def forward(self, x, c):
        """x and c (B,h,w,c) -> (B,h,w,c)"""
        gamma, beta = on_map(self.gamma_beta, F.leaky_relu(on_map(self.shared, c), 0.2)).chunk(2, -1)
        return F.layer_norm(x, x.shape[-1:]) * (1 + gamma) + beta


class PlainNorm(nn.LayerNorm):
    """LayerNorm with SPADE's signature, for the blocks without a condition."""

    def forward(self, x, c=None):
        return super().forward(x)


class PooledSelfAttn(Attn):
    """Self-attention of a map whose keys and values are average-pooled by `pool`."""

    def forward(self, y, pool):
        """(B,h,w,c) -> (B,h,w,c)"""
        small = on_map(lambda x: F.avg_pool2d(x, pool), y) if pool > 1 else y
        return super().forward(y.flatten(1, 2), small.flatten(1, 2), small.flatten(1, 2)).view_as(y)


class DecoderBlock(nn.Module):
    """Pre-norm transformer block on a map; with `spade_hidden`, both norms are conditioned on a map c."""

    def __init__(self, width, heads, spade_hidden=0):
        super().__init__()
        norm = (lambda: SPADE(width, spade_hidden)) if spade_hidden else (lambda: PlainNorm(width))
        self.norm1, self.attn, self.norm2, self.mlp = norm(), PooledSelfAttn(width, heads), norm(), FeedForward(width)

    def forward(self, y, pool, c=None):
        """(B,h,w,c) -> (B,h,w,c)"""
        y = y + self.attn(self.norm1(y, c), pool)
        return y + self.mlp(self.norm2(y, c))


class CrossAttn(nn.Module):
    """The queries read the map: q = LN(q + Attn(q, y)); q = LN(q + MLP(q))."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.norm1 = Attn(width, heads), nn.LayerNorm(width)
        self.mlp, self.norm2 = FeedForward(width), nn.LayerNorm(width)

    def forward(self, q, y):
        """q (B,Q,c), y (B,h,w,c) -> (B,Q,c)"""
        y = y.flatten(1, 2)
        q = self.norm1(q + self.attn(q, y, y))
        return self.norm2(q + self.mlp(q))


class Decoder(nn.Module):
    """See the header.

    `scales`: stage -> how many times finer than the side grid it is, finest first: {"early": 4, "mid": 2, "late": 1}.
    `stages`: those of them that keep their SPADE block and cross-attention (default all); every Up stays.
    `tasks`: ("masks", "pixels"), or one of them (the ablation with two separate decoders).
    `recompute`: what is inside the blocks is made again in the backward pass, not kept for it: equal bits, less memory.
    """

    def __init__(self, *, code_dim, query_width, width, heads, spade_hidden, scales, patch, clip_heads,
                 stages=None, tasks=("masks", "pixels"), recompute=False):
        super().__init__()
        self.scales, self.code_dim, self.recompute = dict(scales), code_dim, recompute
        self.order = list(scales)[::-1]                       # up from the side grid: late, mid, early
        self.stages = [s for s in self.order if stages is None or s in stages]
        self.lift = nn.ModuleDict({s: nn.Linear(code_dim, width) for s in ["latent", *self.stages]})      # W_post
        self.up, before = nn.ModuleDict(), 1
        for stage in self.order:
            self.up[stage], before = Up(width, self.scales[stage] / before), self.scales[stage]
        self.spade = nn.ModuleDict({s: DecoderBlock(width, heads, spade_hidden) for s in self.stages})
        self.plain = nn.ModuleList(DecoderBlock(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)                       # pre-norm blocks leave y unnormalised
        self.query = self.cross = self.head = self.pixel_head = None
        if "masks" in tasks:
            self.query = nn.Linear(query_width, width)
            self.cross = nn.ModuleDict({s: CrossAttn(width, heads) for s in self.stages})
            self.head = MaskHead(width, width, width, clip_heads)
        if "pixels" in tasks:
            factor = 2 ** log2(patch / before, "the pixel head")
            self.pixel_head = nn.ConvTranspose2d(width, 3, factor, factor)
            # It starts with the mean image: from elsewhere the pixels' gradient is 100 times the masks', under one clip.
            nn.init.normal_(self.pixel_head.weight, std=0.001)
            self.pixel_head.bias = nn.Parameter(torch.tensor(MEAN))

    def forward(self, zq, q=None):
        """zq: stage -> (B,D,h,w), "latent" among them, a missing stage reads as zero; q (B,Q,S) for masks
        -> dict(masks=[...], bias=[...]) and/or image (B,3,H,W).  In training two masks and biases, else the last."""
        y = self.lift["latent"](zq["latent"].permute(0, 2, 3, 1))                         # (B,g,g,c)
        g, out = y.shape[1:3], {}
        if self.head:
            q, out = self.query(q), dict(masks=[], bias=[])
        for stage in self.order:
            y = on_map(self.up[stage], y).contiguous()                                    # (B,h,w,c) of this stage
            if stage in self.spade:
                c = zq.get(stage, y.new_zeros(1, self.code_dim, *y.shape[1:3])).permute(0, 2, 3, 1)       # (B,h,w,D)
                y = self.run(self.spade[stage], y, y.shape[1] // g[0], self.lift[stage](c))
                if self.head:
                    q = self.cross[stage](q, y)
        if self.head and self.training:
            self.predict(q, self.norm(y), g, out)
        for block in self.plain:
            y = self.run(block, y, y.shape[1] // g[0])
        y = self.norm(y)
        if self.head:
            self.predict(q, y, g, out)
        if self.pixel_head:
            out["image"] = self.pixel_head(y.permute(0, 3, 1, 2))                         # (B,3,H,W)
        return out

    def run(self, block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=False) if self.recompute and self.training else block(*inputs)

    def predict(self, q, y, g, out):
        for name, made in zip(("masks", "bias"), self.head(q, y, on_map(lambda x: F.avg_pool2d(x, y.shape[1] // g[0]), y))):
            out[name].append(made)


if __name__ == "__main__":
    from PIL import Image

    yy, xx = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    disc = (yy**2 + xx**2 < 0.5).float().expand(1, 8, 16, 16)
    up = DySample(8)
    twice = (255 * up(up(disc))[0, 0].detach()).clamp(0, 255).byte()
    Image.fromarray(twice.numpy()).resize((512, 512), 0).save("dysample.png")
    error = (up(disc) - F.interpolate(disc, scale_factor=2, mode="bilinear")).abs().max()
    print(f"DySample at initialisation is bilinear to within {error:.4f}")
