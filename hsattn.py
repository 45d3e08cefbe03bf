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

Demo: `python hsattn.py` moves points on a circle to their modes; `python gallery.py modes` draws it.
Tests: tests/test_hsattn.py.  Read next: vq.py.

Dimensions (the same letters in every file)
    B batch    H, W image    h, w a stage's grid, P = h*w    C CLIP width    S side width    D code width (32)
    K codes of a stage    N local tokens of a stage    Q global tokens (mask queries)    L classes
"""

from itertools import repeat

import torch
import torch.nn.functional as F
from torch import nn

from kernels import path


def g(x):
    """Onto the unit sphere along the last axis; a zero row stays zero.  (..., D) -> (..., D)"""
    return F.normalize(x, dim=-1)


CACHED = 2**21                             # weights held at a time on the CPU: 8 MiB of fp32, which its cache takes


class MeanShift(torch.autograd.Function):
    """g(softmax(kappa g(q) g(k)ᵀ) v) with the gradient written out; call `hypersphere_attention`.

    1. g cancels the denominator of the softmax: g(u / s) = g(u) for s > 0, so the weights need no sum,
           u_i = Σ_j w_ij v_j,   w_ij = exp(kappa (c_ij - max_j c_ij)),   out_i = u_i / |u_i|
    2. The gradient G_i = (d_i - out_i (out_iᵀ d_i)) / |u_i| that reaches u is tangent to out, so Σ_j w_ij G_iᵀ v_j =
       G_iᵀ u_i = 0: the term that a softmax's backward subtracts in each row.  What is left, r_ij = kappa w_ij G_iᵀ v_j:
           dv = wᵀ G,   dg(q) = r g(k),   dg(k) = rᵀ g(q)
    """

    @staticmethod
    def forward(ctx, q, k, v, kappa, mask):
        q_length, k_length = (x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k))
        q, k = q / q_length, k / k_length
        w = q @ k.transpose(-1, -2)                                                       # (...,N,P), cosines
        if mask is not None:
            w.masked_fill_(~mask, -torch.inf)
        w.sub_(w.amax(-1, keepdim=True).clamp(min=-1)).mul_(kappa).exp_()                 # no key at all: w = 0, out = 0
        out = w @ v
        length = out.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        out /= length
        ctx.save_for_backward(q, k, v, q_length, k_length, w, out, length)
        ctx.kappa = kappa
        return out

    @staticmethod
    def backward(ctx, d):
        q, k, v, q_length, k_length, w, out, length = ctx.saved_tensors
        G = (d - out * (out * d).sum(-1, keepdim=True)) / length                          # (...,N,D), tangent to out
        r = (G @ v.transpose(-1, -2)).mul_(w).mul_(ctx.kappa)                             # (...,N,P)
        dv, dq, dk = w.transpose(-1, -2) @ G, r @ k, r.transpose(-1, -2) @ q
        dq, dk = ((dx - x * (x * dx).sum(-1, keepdim=True)) / length                      # through g: tangent again
                  for dx, x, length in ((dq, q, q_length), (dk, k, k_length)))
        return dq, dk, dv, None, None


def hypersphere_attention(q, k, v, kappa, mask=None):
    """g(softmax(kappa g(q) g(k)ᵀ) v), Eq. 1.

    q (..., N, D), k (..., P, D), v (..., P, D) -> (..., N, D) with rows of unit length.  `kappa` > 0 is the
    concentration: how sharply a query looks at the features in its own direction.  mask (B,P) bool, B the first
    dimension: True for a key that counts; a query without any gives a zero row; ValueError for a mask without a batch.
    Never in half precision inside.
    """
    if q.dim() == 2:
        if mask is not None:
            raise ValueError("a mask (B,P) says which keys of each image count: give q, k and v with a batch dimension")
        return hypersphere_attention(q[None], k[None], v[None], kappa)[0]
    if mask is not None:
        mask = mask.view(mask.shape[0], *[1] * (q.dim() - 2), -1)                         # (B,...,1,P)
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = [(q.to(wide), k.to(wide), v.to(wide), mask)]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():      # a few images at a time: see CACHED
        size = max(1, CACHED * q.shape[0] // max(1, q[..., 0].numel() * k.shape[-2]))
        parts = zip(*(repeat(None) if x is None else x.split(size) for x in parts[0]))
    with torch.autocast(q.device.type, enabled=False):
        outs = [MeanShift.apply(q, k, v, float(kappa), mask) for q, k, v, mask in parts]
    return torch.cat(outs).to(q.dtype)


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

    def __init__(self, width, heads, kappa=30.0, kernels="auto"):
        super().__init__(width, heads)
        self.kappa, self.kernels = kappa, kernels

    def attend(self, q, k, v):
        if path(self.kernels, q.device, q.dtype, q.shape[-1], self.kappa) == "triton":
            from kernels.mean_shift import hypersphere_attention as fused                 # Triton exists on Linux only
            return fused(q, k, v, self.kappa)
        return hypersphere_attention(q, k, v, self.kappa)


if __name__ == "__main__":
    torch.manual_seed(0)
    angles = torch.cat([torch.randn(24) * 0.3 + a for a in (0.2, 1.7, 3.4)])
    points = torch.stack([angles.cos(), angles.sin()], -1)                                # (72,2), three bunches
    for kappa in (1, 10, 100):
        modes, _ = mean_shift(points, points, kappa, 200)
        degrees = sorted({round(a) % 360 for a in torch.atan2(modes[:, 1], modes[:, 0]).rad2deg().tolist()})
        print(f"kappa {kappa}: the points end at {', '.join(f'{a} deg' for a in degrees)}")
