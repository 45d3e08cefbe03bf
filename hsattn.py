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

This formula is the definition.  `HSAttn` takes a twin of it that is faster (kernels/: cpu.py on a CPU, mean_shift.py on a
GPU), or the formula itself with `--kernels plain`.

Demo: `python hsattn.py` moves points on a circle to their modes; `python -m studies.gallery modes` draws it.
Tests: tests/test_hsattn.py.  Read next: vq.py.

Dimensions (the same letters in every file)
    B batch    H, W image    h, w a stage's grid, P = h*w    C CLIP width    S side width    D code width (32)
    K codes of a stage    N local tokens of a stage    Q global tokens (mask queries)    L classes
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import kernel


def g(x):
    """Onto the unit sphere along the last axis; a zero row stays zero.  (..., D) -> (..., D)"""
    return F.normalize(x, dim=-1)


def beside(mask, scores):
    """mask (B,P) in the shape that stands beside scores (B,...,N,P): the same for all heads and queries of an image."""
    if scores.dim() == 2:
        raise ValueError("a mask (B,P) says which keys of each image count: give q, k and v with a batch dimension")
    return mask.view(len(mask), *[1] * (scores.dim() - 2), -1)                            # (B,1,...,1,P)


def hypersphere_attention(q, k, v, kappa, mask=None):
    """g(softmax(kappa g(q) g(k)ᵀ) v), Eq. 1.

    q (..., N, D), k (..., P, D), v (..., P, D) -> (..., N, D) with rows of unit length.  `kappa` > 0 is the
    concentration: how sharply a query looks at the features in its own direction.  mask (B,P) bool, B the first
    dimension: True for a key that counts; a query without any gives a zero row; ValueError for a mask without a batch.
    Never in half precision inside.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    with torch.autocast(q.device.type, enabled=False):
        scores = kappa * g(q) @ g(k).transpose(-1, -2)                                    # (...,N,P)
        if mask is not None:                              # a key that does not count: no weight, and nothing to give
            mask = beside(mask, scores)                                                   # (B,...,1,P)
            scores = scores.masked_fill(~mask, torch.finfo(wide).min)
            v = v.masked_fill(~mask.transpose(-1, -2), 0)
        weights = scores.softmax(-1)                                                      # over the FEATURES
        return g(weights @ v).to(dtype)                                                   # (...,N,D)


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
    """Multi-head hypersphere attention: queries, keys and each head's output live on the sphere; values do not.

    `kernels` chooses between `hypersphere_attention` above and its twins: see kernels/__init__.py.
    """

    def __init__(self, width, heads, kappa=30.0, kernels="auto"):
        super().__init__(width, heads)
        self.kappa, self.kernels = kappa, kernels

    def attend(self, q, k, v):
        attention = kernel(hypersphere_attention, self.kernels, q, self.kappa)            # the function above, or a twin
        return attention(q, k, v, self.kappa)


if __name__ == "__main__":
    torch.manual_seed(0)
    angles = torch.cat([torch.randn(24) * 0.3 + a for a in (0.2, 1.7, 3.4)])
    points = torch.stack([angles.cos(), angles.sin()], -1)                                # (72,2), three bunches
    for kappa in (1, 10, 100):
        modes, _ = mean_shift(points, points, kappa, 200)
        degrees = sorted({round(a) % 360 for a in torch.atan2(modes[:, 1], modes[:, 0]).rad2deg().tolist()})
        print(f"kappa {kappa}: the points end at {', '.join(f'{a} deg' for a in degrees)}")
