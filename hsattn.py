"""Hypersphere attention: one step of von Mises-Fisher mean shift, written as attention.

Eq. 1 of the paper compares every feature with every code on the unit sphere and then does one of two things with the
*same* score matrix kappa * cos(code, feature):

                         features ->
                    ┌───────────────┐   HSAttn (this file): softmax along a ROW, over the features. Each code moves to
             codes  │ kappa * cos   │     the weighted mean direction of the features around it.
                    └───────────────┘   VQ (vq.py): argmax down a COLUMN, over the codes. Each feature takes one code.

    g(x)         = x / |x|
    HSAttn(Q,K,V) = g( softmax(kappa g(Q) g(K)ᵀ) V )             softmax over the keys (features), for each query (token)

With V = g(K) this is exactly one step of mean shift under a von Mises-Fisher kernel exp(kappa cos): the queries are the
seeds, and iterating moves each of them to a mode of the feature density (`mean_shift`).

    q (B,N,S) = (2,128,240), k and v (B,P,S) = (2,1600,240)  ->  (B,N,S), unit rows per head before the out projection

# paper: Eq. 1; the idea of mean shift as attention is the Mean Shift Mask Transformer's, and so is kappa = 30.
# ours: 8 heads of S/8, q and k normalised per head, v not, the head's output normalised, then one linear.

Demo: `python hsattn.py` moves points on a circle to their modes.  Tests: tests/test_hsattn.py.  Read next: vq.py.

Dimensions (the same letters in every file)
    B batch    H, W image    h, w a stage's grid, P = h*w    C CLIP width    S side width    D code width (32)
    K codes of a stage    N local tokens of a stage    Q global tokens (mask queries)    L classes
"""

import torch
import torch.nn.functional as F
from torch import nn


def g(x):
    """Onto the unit sphere along the last axis; a zero row stays zero.  (..., D) -> (..., D)"""
    return F.normalize(x, dim=-1)


def hypersphere_attention(q, k, v, kappa):
    """g(softmax(kappa g(q) g(k)ᵀ) v), Eq. 1.

    q (..., N, D), k (..., P, D), v (..., P, D) -> (..., N, D) with rows of unit length.  `kappa` > 0 is the
    concentration: how sharply a query looks at the features in its own direction.
    """
    return g(F.scaled_dot_product_attention(g(q), g(k), v, scale=float(kappa)))          # (..., N, D)


def mean_shift(x, seeds, kappa, steps):
    """Cluster unit features by iterating hypersphere attention: the modes, and which mode each feature belongs to.

    x (..., P, D), seeds (..., N, D) -> modes (..., N, D) of unit length, cluster (..., P) int64 in 0..N-1.
    Seeds that reach the same mode stay separate rows; a feature goes to the nearest, the lowest index on a tie.
    """
    x, modes = g(x), g(seeds)
    for _ in range(steps):
        modes = hypersphere_attention(modes, x, x, kappa)
    return modes, (x @ modes.transpose(-1, -2)).argmax(-1)


class Attn(nn.Module):
    """Plain multi-head cross-attention, softmax(Q Kᵀ / sqrt(d)) V: how global tokens read the image."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"Attn: {heads} heads do not divide the width {width}")
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                          # (B,N,S) -> (B,heads,N,d)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, q, k, v):
        """q (B,N,S), k and v (B,P,S) -> (B,N,S)"""
        x = self.attend(self.split(self.q(q)), self.split(self.k(k)), self.split(self.v(v)))   # (B,heads,N,d)
        return self.out(x.transpose(1, 2).flatten(2))                                     # (B,N,S)


class HSAttn(Attn):
    """Multi-head hypersphere attention: queries, keys and each head's output live on the sphere; values do not."""

    def __init__(self, width, heads, kappa=30.0):
        super().__init__(width, heads)
        self.kappa = kappa

    def attend(self, q, k, v):
        return hypersphere_attention(q, k, v, self.kappa)


if __name__ == "__main__":
    from PIL import Image, ImageDraw

    torch.manual_seed(0)
    angles = torch.cat([torch.randn(60) * 0.25 + a for a in (0.2, 1.6, 3.2)])
    points = torch.stack([angles.cos(), angles.sin()], -1)                                # (180,2), three bunches
    picture = Image.new("RGB", (900, 320), "white")
    draw = ImageDraw.Draw(picture)
    for column, kappa in enumerate((1, 10, 100)):
        modes, _ = mean_shift(points, points, kappa, 200)
        for p, m in zip(points.tolist(), modes.tolist()):
            for (x, y), radius, r, fill in ((p, 100, 3, "#9ab"), (m, 70, 5, "#c22")):
                cx, cy = 150 + 300 * column + radius * x, 170 + radius * y
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
        distinct = len({tuple((m * 20).round().int().tolist()) for m in modes})
        draw.text((90 + 300 * column, 15), f"kappa {kappa}: {distinct} modes", fill="black")
        print(f"kappa {kappa}: {distinct} modes")
    picture.save("mean_shift.png")
