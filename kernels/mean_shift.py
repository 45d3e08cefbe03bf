"""Mean-shift attention in one pass over the keys: hsattn.py's `hypersphere_attention` and `mean_shift`.

    out_i = g( Σ_j p_ij v_j ),   p_ij = softmax_j(kappa c_ij),   c_ij = g(q_i)ᵀ g(k_j)

Flash attention needs a running maximum, a running denominator and, for its backward, the log of the sum and a pre-pass.
Two identities make all of that unnecessary here.

**1. g cancels the denominator.**  g(u / s) = g(u) for any s > 0, so any common factor of a row's weights will do.  And
c <= 1, so w = exp(kappa (c - 1)) lies in (0,1] without a maximum.  Sums over parts of the keys therefore simply add:

    u_i = Σ_j w_ij v_j,    s_i = Σ_j w_ij,    out_i = g(u_i)            w >= exp(-2 kappa) > 0 in fp32 up to kappa = 43

s is kept because of the small print: m = u / s is the mean that plain softmax gives, g divides by max(|m|, 1e-12), and
where all keys are far |u|² would underflow and |m|² does not.  A padded key must not reach s: its zeros would weigh
exp(-kappa), not 0, so it is masked, never left to its zeros.

**2. The softmax's delta term is zero.**  The gradient that reaches m is tangent to the sphere:

    G_i = (dOut_i - out_i (out_iᵀ dOut_i)) / |m_i|,    so   Σ_j p_ij (G_iᵀ v_j) = G_iᵀ m_i = 0,    p = w / s

which is exactly the term that softmax's backward subtracts in every row.  What is left is

    dv_j = Σ_i p_ij G_i        r_ij = kappa p_ij (G_iᵀ v_j)        dg(q)_i = Σ_j r_ij g(k)_j        dg(k)_j = Σ_i r_ij g(q)_i

and dq, dk are the tangent parts of dg(q), dg(k), divided by the lengths.

Read and written, in numbers (M queries, P keys of D numbers, a head of an image): plain keeps c and p, 2 M P, and reads
them three times; here q, k, v, out and M P / BLOCK_N partial sums, about (2 P + 3 M) D.

Who owns what: program (s, i, h) of `forward_kernel` owns BLOCK_M queries of one head and the s-th part of its keys; it
leaves a partial u and s, and `combine_kernel` adds the parts in order.  `backward_keys_kernel` owns BLOCK_N keys and walks
over all queries; `backward_queries_kernel` is split like the forward.  No atomics: the same inputs give the same bits.

What is fp32 and why: u, s, lengths and all gradients are summed in fp32; products run at the precision of the inputs
(`tile.product`).  fp16 inputs are multiplied as TF32, because exp(kappa (c - 1)) is often too small a number for fp16.

Limits: D <= 64 (above, every tile of the backward spilled its registers), 0 < kappa <= 43, B * heads <= 65,535.  A query
without a single unmasked key gives a zero row, as in hsattn.py.

Measured on a GPU: not yet.  On the CPU see `python -m kernels.bench`; registers and memory: compile_report.py.
Tests: tests/kernels/test_kernels.py.  Read next: bench.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import limits
from kernels.tile import Launch, check_together, mode, multiprocessors, power_of_two, product, rounds, through_unit, unit
from kernels.vmf_assign import assign

# Tiles (BLOCK_M queries, BLOCK_N keys, warps) by (capability, mode, D rounded up to 32 or 64); capability None stands for
# every GPU that has no entry of its own.  `python -m kernels.bench --tune` prints entries for the GPU it runs on; none
# was measured yet.  These are the largest that compile without spilling (compile_report.py).
TILES = {(None, "bf16", 32): dict(forward=(128, 64, 8), keys=(32, 64, 4), queries=(64, 64, 4)),
         (None, "bf16", 64): dict(forward=(128, 64, 8), keys=(32, 32, 4), queries=(64, 32, 4)),
         (None, "tf32", 32): dict(forward=(64, 64, 4), keys=(32, 64, 4), queries=(64, 64, 4)),
         (None, "tf32", 64): dict(forward=(64, 64, 4), keys=(32, 32, 4), queries=(64, 64, 4)),
         (None, "fp32", 32): dict(forward=(64, 64, 4), keys=(32, 64, 4), queries=(64, 32, 4)),
         (None, "fp32", 64): dict(forward=(64, 32, 8), keys=(16, 32, 4), queries=(32, 32, 4))}


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def rows_at(X, rows, count, x_row, d, D: tl.constexpr):
    """Rows of a matrix as fp32, zeros past its end: (len(rows), len(d))"""
    here = (rows < count)[:, None] & (d < D)[None, :]
    return tl.load(X + rows[:, None].to(tl.int64) * x_row + d[None, :], here, 0.0).to(tl.float32)


@triton.jit
def keys_at(K, V, MASK, keys, P, k_row, v_row, d, D: tl.constexpr, MASKED: tl.constexpr):
    """Keys on the sphere and their lengths, values, and which of them count: (n,D), (n), (n,D), (n), n = len(keys)"""
    k, length = unit(rows_at(K, keys, P, k_row, d, D))
    live = keys < P
    if MASKED:
        live = live & (tl.load(MASK + keys, keys < P, 0) != 0)
    return k, length, rows_at(V, keys, P, v_row, d, D), live


@triton.jit
def weights(cosine, live, kappa):
    """w = exp(kappa (c - 1)), 0 where not live; as a power of two, which is what the hardware has."""
    return tl.where(live, tl.exp2((cosine - 1.0) * (kappa * 1.4426950408889634)), 0.0)


@triton.jit
def tangent(OUT, DOUT, LENGTH, SUM, place, rows, M, d, D: tl.constexpr):
    """G of the header, (len(rows), len(d)), and 1 / s; zeros where there is no row, or no key for it."""
    out, grad = rows_at(OUT + place * D, rows, M, D, d, D), rows_at(DOUT + place * D, rows, M, D, d, D)
    length = tl.load(LENGTH + place + rows, rows < M, 1.0)
    s = tl.load(SUM + place + rows, rows < M, 0.0)
    grad = grad - out * tl.sum(out * grad, 1)[:, None]
    return grad / length[:, None], tl.where(s > 0, 1.0 / tl.where(s > 0, s, 1.0), 0.0)


@triton.jit
def forward_kernel(
    Q, K, V,                               # (B,heads,M,D), (B,heads,P,D) twice, any strides but the last
    MASK,                                  # (B,P) uint8, 1 = a key that counts; read only if MASKED
    U, S,                                  # (splits,B*heads,M,D) and (splits,B*heads,M) fp32 partial sums
    M, P, heads, kappa,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROUNDS: tl.constexpr,
    MASKED: tl.constexpr, MODE: tl.constexpr,
):
    split, block, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    rows, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q, q_length = unit(rows_at(Q + b * q_batch + h * q_head, rows, M, q_row, d, D))              # (BLOCK_M,BLOCK_D)
    u, s = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for i in range(ROUNDS):
        keys = (split * ROUNDS + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        k, k_length, v, live = keys_at(K + b * k_batch + h * k_head, V + b * v_batch + h * v_head, MASK + b * P,
                                       keys, P, k_row, v_row, d, D, MASKED)
        cosine = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), MODE)
        w = weights(cosine, live[None, :], kappa)
        u, s = product(w, v, u, MODE), s + tl.sum(w, 1)
    place = (split.to(tl.int64) * tl.num_programs(2) + which) * M + rows
    tl.store(U + place[:, None] * D + d[None, :], u, (rows < M)[:, None] & (d < D)[None, :])
    tl.store(S + place, s, rows < M)


@triton.jit
def combine_kernel(
    U, S,                                  # as above, with R = B*heads*M rows
    OUT, LENGTH, SUM,                      # (R,D); (R) fp32, |m| and s of the header
    R, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):
    rows, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    u, s = tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS], tl.float32)
    part, size = tl.zeros([], tl.int64), tl.full([], R, tl.int64)
    while part < splits:                                      # Triton 3.6's interpreter has no range(splits)
        u += rows_at(U + part * size * D, rows, R, D, d, D)
        s += tl.load(S + part * size + rows, rows < R, 0.0)
        part += 1
    out, length = unit(u / tl.where(s > 0, s, 1.0)[:, None])                              # no key at all: a zero row
    tl.store(OUT + rows[:, None].to(tl.int64) * D + d[None, :], out.to(OUT.dtype.element_ty),
             (rows < R)[:, None] & (d < D)[None, :])
    tl.store(LENGTH + rows, length, rows < R)
    tl.store(SUM + rows, s, rows < R)


@triton.jit
def backward_keys_kernel(
    Q, K, V, MASK,                         # as in the forward
    OUT, LENGTH, SUM, DOUT,                # (B,heads,M,D), (B,heads,M) fp32 twice, (B,heads,M,D), contiguous
    DK, DV,                                # (B,heads,P,D) contiguous
    M, P, heads, kappa,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROUNDS: tl.constexpr,
    MASKED: tl.constexpr, MODE: tl.constexpr,
):
    block, which = tl.program_id(0), tl.program_id(1)
    b, h = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    keys, d = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k, k_length, v, live = keys_at(K + b * k_batch + h * k_head, V + b * v_batch + h * v_head, MASK + b * P,
                                   keys, P, k_row, v_row, d, D, MASKED)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    place = which.to(tl.int64) * M
    for i in range(ROUNDS):
        rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
        q, q_length = unit(rows_at(Q + b * q_batch + h * q_head, rows, M, q_row, d, D))          # (BLOCK_M,BLOCK_D)
        grad, per_sum = tangent(OUT, DOUT, LENGTH, SUM, place, rows, M, d, D)
        cosine = product(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), MODE)
        p = weights(cosine, live[:, None], kappa) * per_sum[None, :]                      # (BLOCK_N,BLOCK_M)
        dv = product(p, grad, dv, MODE)
        r = kappa * p * product(v, tl.trans(grad), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), MODE)
        dk = product(r, q, dk, MODE)
    dk = through_unit(dk, k, k_length)
    here = (keys < P)[:, None] & (d < D)[None, :]
    place = (which.to(tl.int64) * P + keys)[:, None] * D + d[None, :]
    tl.store(DK + place, dk.to(DK.dtype.element_ty), here)
    tl.store(DV + place, dv.to(DV.dtype.element_ty), here)


@triton.jit
def backward_queries_kernel(
    Q, K, V, MASK, OUT, LENGTH, SUM, DOUT, # as above
    DQ,                                    # (splits,B*heads,M,D) fp32 partial sums of the gradient of g(q)
    M, P, heads, kappa,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROUNDS: tl.constexpr,
    MASKED: tl.constexpr, MODE: tl.constexpr,
):
    split, block, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    rows, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q, q_length = unit(rows_at(Q + b * q_batch + h * q_head, rows, M, q_row, d, D))
    grad, per_sum = tangent(OUT, DOUT, LENGTH, SUM, which.to(tl.int64) * M, rows, M, d, D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(ROUNDS):
        keys = (split * ROUNDS + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        k, k_length, v, live = keys_at(K + b * k_batch + h * k_head, V + b * v_batch + h * v_head, MASK + b * P,
                                       keys, P, k_row, v_row, d, D, MASKED)
        cosine = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), MODE)
        p = weights(cosine, live[None, :], kappa) * per_sum[:, None]
        r = kappa * p * product(grad, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), MODE)
        dq = product(r, k, dq, MODE)
    place = (split.to(tl.int64) * tl.num_programs(2) + which) * M + rows
    tl.store(DQ + place[:, None] * D + d[None, :], dq, (rows < M)[:, None] & (d < D)[None, :])


@triton.jit
def project_kernel(
    PARTS,                                 # (splits,B,heads,M,D) fp32
    Q, DQ,                                 # (B,heads,M,D), any strides but the last; contiguous
    M, splits, heads, q_batch, q_head, q_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):
    block, which = tl.program_id(0), tl.program_id(1)
    b, h = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    rows, d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    q, length = unit(rows_at(Q + b * q_batch + h * q_head, rows, M, q_row, d, D))
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    part = tl.zeros([], tl.int64)
    while part < splits:
        dq += rows_at(PARTS + (part * tl.num_programs(1) + which) * M * D, rows, M, D, d, D)
        part += 1
    dq = through_unit(dq, q, length)
    here = (rows < M)[:, None] & (d < D)[None, :]
    tl.store(DQ + (which.to(tl.int64) * M + rows)[:, None] * D + d[None, :], dq.to(DQ.dtype.element_ty), here)


# --- launches: plain functions of shapes and dtypes ---------------------------------------------------------------------


def tiles(q, kernel):
    """(BLOCK_M, BLOCK_N, warps) of one of the three kernels for q's GPU, dtype and width."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
    key = mode(q.dtype), power_of_two(q.shape[-1], least=32)
    return TILES.get((capability, *key), TILES[None, *key])[kernel]


def shared(q, k, v, mask, kappa):
    """The arguments, and the constants, that all kernels of one call have in common."""
    (_, heads, M, D), P = q.shape, k.shape[2]
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    constants = dict(D=D, BLOCK_D=power_of_two(D), MASKED=mask is not None, MODE=mode(q.dtype), num_stages=2)
    return (q, k, v, q if mask is None else mask), (M, P, heads, kappa, *strides), constants


def plan_split(q, k, kernel):
    """Constants and grid of a kernel that owns queries and splits the keys, about two programs a multiprocessor."""
    (B, heads, M, _), P = q.shape, k.shape[2]
    block_m, block_n, warps = tiles(q, kernel)
    block_m = min(block_m, power_of_two(M))
    queries, keys = triton.cdiv(M, block_m), triton.cdiv(P, block_n)
    length = rounds(keys, max(1, 2 * multiprocessors(q.device) // (queries * B * heads)))
    grid = triton.cdiv(keys, length), queries, B * heads
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, ROUNDS=length, num_warps=warps), grid


def plan_forward(q, k, v, mask, kappa):
    """([Launch of the parts, Launch of their sum], (out (B,heads,M,D), |m| and s, (B,heads,M) fp32))"""
    (B, heads, M, D) = q.shape
    tensors, numbers, constants = shared(q, k, v, mask, kappa)
    own, grid = plan_split(q, k, "forward")
    u, s = q.new_empty(grid[0], B, heads, M, D, dtype=torch.float32), q.new_empty(grid[0], B, heads, M, dtype=torch.float32)
    out = q.new_empty(B, heads, M, D), *(q.new_empty(B, heads, M, dtype=torch.float32) for _ in range(2))
    R = B * heads * M
    sum_up = dict(D=D, BLOCK_D=power_of_two(D), ROWS=64, num_warps=4, num_stages=1)
    return [Launch(forward_kernel, grid, (*tensors, u, s, *numbers), {**constants, **own}),
            Launch(combine_kernel, (triton.cdiv(R, 64),), (u, s, *out, R, grid[0]), sum_up)], out


def plan_backward(q, k, v, mask, kappa, out, length, s, dout):
    """([Launch of dk and dv, Launch of dq's parts, Launch of their sum], (dq, dk, dv))"""
    (B, heads, M, D), P = q.shape, k.shape[2]
    tensors, numbers, constants = shared(q, k, v, mask, kappa)
    tensors = (*tensors, out, length, s, dout)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))

    block_m, block_n, warps = tiles(q, "keys")
    block_m = min(block_m, power_of_two(M))
    keys = dict(BLOCK_M=block_m, BLOCK_N=block_n, ROUNDS=rounds(triton.cdiv(M, block_m), 1), num_warps=warps)
    own, grid = plan_split(q, k, "queries")
    parts = q.new_empty(grid[0], B, heads, M, D, dtype=torch.float32)
    sum_up = dict(D=D, BLOCK_D=power_of_two(D), ROWS=64, num_warps=4, num_stages=1)
    return [
        Launch(backward_keys_kernel, (triton.cdiv(P, block_n), B * heads), (*tensors, dk, dv, *numbers), {**constants, **keys}),
        Launch(backward_queries_kernel, grid, (*tensors, parts, *numbers), {**constants, **own}),
        Launch(project_kernel, (triton.cdiv(M, 64), B * heads), (parts, q, dq, M, grid[0], heads, *q.stride()[:3]), sum_up),
    ], (dq, dk, dv)


# --- the operator, known to torch.compile, with its gradient -----------------------------------------------------------


@torch.library.custom_op("pat::mean_shift_attention", mutates_args=())
def mean_shift_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
                         kappa: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B,heads,M,D), k, v (B,heads,P,D), mask (B,P) uint8 or None -> out (B,heads,M,D), |m| and s (B,heads,M) fp32"""
    launches, out = plan_forward(*map(inner_contiguous, (q, k, v)), mask, kappa)
    for launch in launches:
        launch.run()
    return out


@mean_shift_attention.register_fake
def _(q, k, v, mask, kappa):
    return q.new_empty(q.shape), *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("pat::mean_shift_attention_backward", mutates_args=())
def mean_shift_attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, kappa: float, out: torch.Tensor,
    length: torch.Tensor, s: torch.Tensor, dout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, each in the shape and dtype of its input, contiguous"""
    q, k, v = map(inner_contiguous, (q, k, v))
    launches, grads = plan_backward(q, k, v, mask, kappa, out, length, s, dout.contiguous())
    for launch in launches:
        launch.run()
    return grads


@mean_shift_attention_backward.register_fake
def _(q, k, v, mask, kappa, out, length, s, dout):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep(ctx, inputs, output):
    *tensors, ctx.kappa = inputs
    ctx.save_for_backward(*tensors, *output)


def gradient(ctx, dout, *_):
    q, k, v, mask, out, length, s = ctx.saved_tensors
    grads = torch.ops.pat.mean_shift_attention_backward(q, k, v, mask, ctx.kappa, out, length, s, dout)
    return *grads, None, None


mean_shift_attention.register_autograd(gradient, setup_context=keep)


def inner_contiguous(x):
    """x as the kernels read it: any strides but the last, which is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


# --- the two functions, as in hsattn.py -----------------------------------------------------------------------------


def check(q, k, v, kappa, mask):
    """Raises ValueError for what the kernels do not take; see `kernels.limits`."""
    if not q.dim() == k.dim() == v.dim() >= 2 or k.shape != v.shape or q.shape[:-2] != k.shape[:-2] \
            or q.shape[-1] != k.shape[-1] or 0 in k.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: takes (...,M,D), (...,P,D) and "
                         "(...,P,D) with the same dimensions in front and at least one key")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: give all three the same dtype")
    reason = limits(q.device, q.dtype, q.shape[-1], kappa)
    if reason:
        raise ValueError(reason)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], k.shape[-2]) or q.dim() < 3):
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype}: takes (B,P) bool, here "
                         f"({q.shape[0]},{k.shape[-2]}), True for a key that counts")
    check_together(q, k, v, *([] if mask is None else [mask]))


def hypersphere_attention(q, k, v, kappa, mask=None):
    """g(softmax(kappa g(q) g(k)ᵀ) v); see hsattn.hypersphere_attention.

    q (...,M,D), k and v (...,P,D), mask (B,P) bool, True for a key that counts, B the first dimension -> (...,M,D) with
    unit rows.  Under autocast the three are rounded to its dtype.  Raises ValueError for wrong shapes, dtypes, devices, or
    a kappa outside (0, 43].
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    check(q, k, v, kappa, mask)
    mask = None if mask is None else mask.to(torch.uint8).contiguous()
    batch = q.shape[:-2]
    q, k, v = (x.reshape(batch[0] if batch else 1, -1, *x.shape[-2:]) for x in (q, k, v))     # (B,heads,rows,D)
    out, *_ = torch.ops.pat.mean_shift_attention(q, k, v, mask, float(kappa))
    return out.view(*batch, *out.shape[-2:])


def mean_shift(x, seeds, kappa, steps):
    """Cluster unit features by iterating hypersphere attention; see hsattn.mean_shift.

    x (...,P,D), seeds (...,N,D) -> modes (...,N,D) of unit length, cluster (...,P) int64 in 0..N-1.
    Raises ValueError as `hypersphere_attention` does.
    """
    x, modes = F.normalize(x, dim=-1), F.normalize(seeds, dim=-1)
    for _ in range(steps):
        modes = hypersphere_attention(modes, x, x, kappa)
    pairs = zip(x.reshape(-1, *x.shape[-2:]), modes.reshape(-1, *modes.shape[-2:]))
    return modes, torch.stack([assign(*pair)[0] for pair in pairs]).view(x.shape[:-1])
