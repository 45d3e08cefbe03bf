"""What `--kernels auto` computes on a CPU: hsattn.py's and vq.py's functions, so that the big matrices stay in its cache.

    out   = g( softmax(kappa g(q) g(k)ᵀ) v )          hypersphere_attention: (B,heads,N,P) scores
    index = argmax_k  g(e_k)ᵀ x                       assign, quantise, nearest: (n,K) scores

Both score matrices are far larger than what they are made of, and the plain functions walk through them several times,
from memory each time: attention of 128 queries in 8 heads to 12 images of 1,600 features holds 75 MiB of scores, the
early stage's 307,200 features by 128 codes 150 MiB.  Here a few images, or a few thousand features, go at a time, in one
piece of memory that is reused, and attention walks through its scores as seldom as it can:

1.  g cancels the denominator of the softmax: g(u / s) = g(u) for s > 0, so the weights need no sum.  With q' = kappa g(q),
        u_i = Σ_j w_ij v_j,   w_ij = exp(c_ij - max_j c_ij),   c_ij = q'_iᵀ g(k_j),   out_i = u_i / |u_i|
2.  The gradient G_i = (d_i - out_i (out_iᵀ d_i)) / |u_i| that reaches u is tangent to out, so Σ_j w_ij G_iᵀ v_j =
    G_iᵀ u_i = 0: the term that a softmax's backward subtracts in each row.  What is left, r_ij = w_ij G_iᵀ v_j:
        dv = wᵀ G,   dg(q) = kappa r g(k),   dg(k) = rᵀ q'
3.  |x| changes no argmax: `assign` scores features as they come, and only the winner's cosine is divided by the length.
4.  With e the chosen code and l the loss's upstream gradient, the loss pulls code and feature towards each other:
        de = 2/D l (e - g(x)),   dg(x) = dzq - beta de

Inside a compiled or exported graph there is no loop over any number of rows: all rows are one part there.

Equal to the plain functions up to rounding, in value and gradient; like the Triton twins it stands on torch alone.
Measured: docs/, `python -m kernels.bench`.
Tests: tests/kernels/test_cpu.py.  Read next: tile.py.
"""

from itertools import repeat

import torch
import torch.nn.functional as F

CACHED = 2**21                             # weights held at a time: 8 MiB of fp32, which its cache takes
CHUNK = 4096                               # features scored at a time: (4096,K) scores stay in its cache


def through_g(d, unit, length):
    """The gradient that reaches x when d reaches g(x) = unit: what of d is tangent to the sphere, over |x|."""
    return (d - unit * (unit * d).sum(-1, keepdim=True)) / length


class MeanShift(torch.autograd.Function):
    """`hypersphere_attention` of one part of the batch, with the gradient written out: steps 1 and 2 of the header."""

    @staticmethod
    def forward(ctx, q, k, v, kappa, mask):
        q_length, k_length = (x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k))
        q, k = q / q_length, k / k_length
        w = kappa * q @ k.transpose(-1, -2)                                               # (...,N,P)
        if mask is not None:
            w.masked_fill_(~mask, -torch.inf)
        w.sub_(w.amax(-1, keepdim=True).clamp(min=-kappa)).exp_()                         # no key at all: w = 0, out = 0
        out = w @ v
        length = out.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        out /= length
        ctx.save_for_backward(q, k, v, q_length, k_length, w, out, length)
        ctx.kappa = kappa
        return out

    @staticmethod
    def backward(ctx, d):
        q, k, v, q_length, k_length, w, out, length = ctx.saved_tensors
        G = through_g(d, out, length)                                                     # (...,N,D)
        r = (G @ v.transpose(-1, -2)).mul_(w)                                             # (...,N,P)
        dv, dq, dk = w.transpose(-1, -2) @ G, ctx.kappa * (r @ k), r.transpose(-1, -2) @ (ctx.kappa * q)
        return through_g(dq, q, q_length), through_g(dk, k, k_length), dv, None, None


def hypersphere_attention(q, k, v, kappa, mask=None):
    """g(softmax(kappa g(q) g(k)ᵀ) v); see hsattn.hypersphere_attention.

    q (..., N, D), k (..., P, D), v (..., P, D), mask (B,P) bool, True for a key that counts, B the first dimension
    -> (..., N, D) with rows of unit length, zero for a query without any key; ValueError for a mask without a batch.
    """
    if q.dim() == 2:
        if mask is not None:
            raise ValueError("a mask (B,P) says which keys of each image count: give q, k and v with a batch dimension")
        return hypersphere_attention(q[None], k[None], v[None], kappa)[0]
    if mask is not None:
        mask = mask.view(len(mask), *[1] * (q.dim() - 2), -1)                             # (B,1,...,1,P)
    wide = torch.promote_types(q.dtype, torch.float32)
    whole = q.to(wide), k.to(wide), v.to(wide), mask
    parts = [whole]
    if not torch.compiler.is_compiling():
        weights = q[..., 0].numel() * k.shape[-2]                                         # of the whole batch
        size = max(1, CACHED * q.shape[0] // max(1, weights))                             # images a part
        parts = zip(*(repeat(None) if x is None else x.split(size) for x in whole))
    with torch.autocast(q.device.type, enabled=False):
        outs = [MeanShift.apply(q, k, v, float(kappa), mask) for q, k, v, mask in parts]
    return torch.cat(outs).to(q.dtype)


@torch.no_grad()
def nearest(x, codes):
    """The index of the largest dot product, the lowest on a tie; see vq.nearest.  x (n,D), codes (K,D) -> (n) int64"""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (x @ codes.T).argmax(1)
    index, best = torch.empty(len(x), dtype=torch.int64), x.new_empty(len(x))
    memory = x.new_empty(min(CHUNK, len(x)), len(codes))                                  # the scores of every chunk
    for part, *out in zip(x.split(CHUNK), best.split(CHUNK), index.split(CHUNK)):
        scores = torch.mm(part, codes.T, out=memory[:len(part)])
        torch.max(scores, 1, out=out)                                                     # twice as fast as argmax
    return index


def assign(x, codes):
    """Each feature's code by largest cosine, ties to the lowest index; see vq.assign.

    x (n,D) of any length, codes (K,D) of any length -> index (n) int64, code (n,D) unit, cosine (n) in [-1,1].
    """
    codes = F.normalize(codes, dim=-1).to(x.dtype)            # g of vq.py
    index = nearest(x, codes)
    code = F.embedding(index, codes)
    cosine = torch.einsum("nd,nd->n", x, code) / x.norm(dim=1).clamp(min=1e-12)
    return index, code, cosine


class Quantise(torch.autograd.Function):
    """`quantise` of some features to unit codes, with the gradient written out: step 4 of the header."""

    @staticmethod
    def forward(ctx, x, codes, beta):
        length = x.norm(dim=1, keepdim=True).clamp(min=1e-12)
        x = x / length
        index = nearest(x, codes)
        code = F.embedding(index, codes)                      # straight through: the value of zq is the code's
        ctx.save_for_backward(x, codes, index, length)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        ctx.beta = beta
        return code, index, (code - x).square().mean(1) * (1 + beta)

    @staticmethod
    def backward(ctx, dzq, _, dloss):
        x, codes, index, length = ctx.saved_tensors
        if dloss is None:
            return through_g(dzq, x, length), None, None
        dcode = (F.embedding(index, codes) - x).mul_(dloss[:, None] * (2 / x.shape[1]))
        dcodes = torch.ops.aten.embedding_dense_backward(dcode, index, len(codes), -1, False)       # always in one order
        dx = -ctx.beta * dcode if dzq is None else dzq - ctx.beta * dcode
        return through_g(dx, x, length), dcodes, None


def quantise(x, codes, beta=0.25):
    """Assignment with a straight-through gradient and its loss; see vq.quantise.

    x (n,D), codes (K,D), of any length -> zq (n,D), index (n) int64, loss (n) of each feature.
    """
    codes = F.normalize(codes, dim=-1).to(x.dtype)
    parts = [x] if torch.compiler.is_compiling() else x.split(2 * CHUNK)                  # each in two chunks of scores
    zq, index, loss = zip(*(Quantise.apply(part, codes, beta) for part in parts))
    return torch.cat(zq), torch.cat(index), torch.cat(loss)
