"""Each feature's code in one pass: vq.py's `assign` and `quantise`, without the (N,K) matrix between them.

    index = argmax_k  g(e_k)ᵀ x                  code = g(e_index)            cosine = g(x)ᵀ code

The argmax needs neither kappa nor |x| (both only scale a whole row of scores), so x is multiplied as it comes and only
the winner's cosine is divided by its length.

What is read and written, in numbers a feature of D = 32 (K = 128 codes stay in the cache):

              Eq. 1 word by word                                              here
    forward   x; g(x) and K scores, written and read; code; 3   = 387         x, code, index, cosine, distance      = 67
    backward  three to five passes over (N,32)                                x, grad of zq, grad of x, index       = 97

Who owns what: program i of `assign_kernel` owns ROWS features and walks over all codes, CHUNK at a time.  Program (p, c)
of `backward_kernel` owns codes c*CODES... and every tile of features from p*rounds on; it adds its tiles in order, by a
product with the one-hot matrix of the index, and leaves a partial sum (K,D); torch adds the partial sums in order.  No
atomics anywhere, so the same inputs give the same bits.

What is fp32 and why: sums, lengths, the cosine and the codebook gradient always; the scores at the precision of x
(`tile.product`), since they only choose: a rounded score may choose a code whose cosine is lower by the rounding.

The gradient.  zq = g(x) + sg(code - g(x)), d = |g(x) - code|² / D, L = d(sg x, e) + beta d(x, sg e) of each feature:

    to g(x):    grad_zq + a e      a = -2 beta dL/D        since d|x - e|² = -2 e up to what is parallel to x, and
    to g(e_k):  Σ over the features of code k of  b g(x)      b = -2 dL/D                      likewise for e;
    then each goes through g: only its tangent part survives, divided by the length.

`assign` has the same two with a = b = dL/dcosine of each row, no grad_zq, and Σ grad_code added to the codes'.

Ties go to the lowest code; a zero row has index 0 and cosine 0, a row with NaN index 0 and cosine NaN, as in vq.py.
Limits: D <= 64; rows shorter than 1e-12 count as zero rows; rows so long that |x|² overflows are not defined.

Measured on a GPU: not yet.  On the CPU see `python -m kernels.bench`; registers and memory: compile_report.py.
Tests: tests/kernels/test_kernels.py.  Read next: mean_shift.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import limits
from kernels.tile import Launch, check_together, mode, multiprocessors, power_of_two, product, rounds, through_unit, unit

# Tiles (ROWS features, CHUNK or CODES codes, warps) by (capability, mode, D rounded up to 32 or 64); capability None is
# every GPU that has no entry of its own.  `python -m kernels.bench --tune` prints entries for the GPU it runs on; none was
# measured yet.  These compile without spilling (compile_report.py).
TILES = {(None, "bf16", 32): dict(forward=(64, 64, 4), backward=(64, 128, 8)),
         (None, "bf16", 64): dict(forward=(64, 64, 4), backward=(64, 128, 8)),
         (None, "tf32", 32): dict(forward=(64, 32, 4), backward=(64, 128, 8)),
         (None, "tf32", 64): dict(forward=(64, 32, 4), backward=(64, 128, 8)),
         (None, "fp32", 32): dict(forward=(64, 64, 4), backward=(64, 128, 8)),
         (None, "fp32", 64): dict(forward=(32, 64, 8), backward=(64, 128, 8))}


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def assign_kernel(
    X,                                     # (N,D) features, rows x_row apart
    E,                                     # (K,D) unit codes, in x's dtype
    CODE, INDEX, COSINE, DISTANCE,         # (N,D), (N) int64, (N) fp32, (N) fp32
    N, K, x_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    MODE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    here = (rows < N)[:, None] & (d < D)[None, :]
    x = tl.load(X + rows[:, None] * x_row + d[None, :], here, 0.0).to(tl.float32)         # (ROWS,BLOCK_D)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32)
    for j in tl.static_range(CHUNKS):
        codes = j * CHUNK + tl.arange(0, CHUNK)
        e = tl.load(E + codes[None, :] * D + d[:, None], (codes < K)[None, :] & (d < D)[:, None], 0.0)
        score = product(x, e.to(tl.float32), tl.zeros([ROWS, CHUNK], tl.float32), MODE)
        # Codes past the last score -inf, not 0: a feature opposite to every code has negative scores only.  NaN also.
        score = tl.where((codes < K)[None, :] & (score == score), score, float("-inf"))
        top, which = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        index = tl.where(top > best, j * CHUNK + which, index)                            # > : a tie stays left
        best = tl.maximum(top, best)
    code = tl.load(E + index[:, None] * D + d[None, :], here, 0.0)
    e = code.to(tl.float32)
    u, length = unit(x)
    tl.store(CODE + rows[:, None] * D + d[None, :], code, here)
    tl.store(INDEX + rows, index.to(tl.int64), rows < N)
    tl.store(COSINE + rows, tl.sum(u * e, 1), rows < N)
    tl.store(DISTANCE + rows, tl.sum((u - e) * (u - e), 1), rows < N)


@triton.jit
def backward_kernel(
    X, E, INDEX,                           # as above; E in fp32
    GRAD_ZQ, A,                            # (N,D) straight-through; (N) fp32 weight of e in the gradient of g(x)
    GRAD_CODE, B,                          # (N,D); (N) fp32 weight of g(x) in the gradient of g(e)
    DX,                                    # (N,D)
    DE,                                    # (programs,K,D) fp32 partial sums
    N, K, x_row, a_row, b_row,             # a_row = 0: one weight for all rows
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, ROUNDS: tl.constexpr,
    HAS_ZQ: tl.constexpr, HAS_CODE: tl.constexpr,
):
    program, chunk = tl.program_id(0), tl.program_id(1)
    codes = chunk * CODES + tl.arange(0, CODES)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([CODES, BLOCK_D], tl.float32)
    for i in range(ROUNDS):
        rows = (program.to(tl.int64) * ROUNDS + i) * ROWS + tl.arange(0, ROWS)
        here = (rows < N)[:, None] & (d < D)[None, :]
        x, length = unit(tl.load(X + rows[:, None] * x_row + d[None, :], here, 0.0).to(tl.float32))
        index = tl.load(INDEX + rows, rows < N, -1)                                       # -1: nobody's feature
        if chunk == 0:                                                                    # the others only sum
            a = tl.load(A + rows * a_row, rows < N, 0.0)
            e = tl.load(E + index[:, None] * D + d[None, :], here, 0.0)
            grad = a[:, None] * e
            if HAS_ZQ:
                grad += tl.load(GRAD_ZQ + rows[:, None] * D + d[None, :], here, 0.0).to(tl.float32)
            grad = through_unit(grad, x, length)
            tl.store(DX + rows[:, None] * D + d[None, :], grad.to(DX.dtype.element_ty), here)
        b = tl.load(B + rows * b_row, rows < N, 0.0)
        share = b[:, None] * x
        if HAS_CODE:
            share += tl.load(GRAD_CODE + rows[:, None] * D + d[None, :], here, 0.0).to(tl.float32)
        chosen = (index[None, :] == codes[:, None]).to(tl.float32)                        # (CODES,ROWS), exact in TF32
        high = (share.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(chosen, share - high, total, input_precision="tf32")
        total = tl.dot(chosen, high, total, input_precision="tf32")
    place = (program.to(tl.int64) * K + codes)[:, None] * D + d[None, :]
    tl.store(DE + place, total, (codes < K)[:, None] & (d < D)[None, :])


# --- launches: plain functions of shapes and dtypes ---------------------------------------------------------------------


def tiles(x, kernel):
    """(ROWS, CHUNK or CODES, warps) of a kernel for x's GPU, dtype and width."""
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
    key = mode(x.dtype), power_of_two(x.shape[1], least=32)
    return TILES.get((capability, *key), TILES[None, *key])[kernel]


def plan_forward(x, e):
    """(Launch, (code, index, cosine, distance)) for x (N,D) and unit codes e (K,D) of x's dtype."""
    (N, D), K = x.shape, len(e)
    rows, chunk, warps = tiles(x, "forward")
    chunk = min(chunk, power_of_two(K))
    out = (x.new_empty(N, D), torch.empty(N, dtype=torch.int64, device=x.device),
           x.new_empty(N, dtype=torch.float32), x.new_empty(N, dtype=torch.float32))
    constants = dict(D=D, BLOCK_D=power_of_two(D), ROWS=rows, CHUNK=chunk, CHUNKS=triton.cdiv(K, chunk),
                     MODE=mode(x.dtype), num_warps=warps, num_stages=1)
    return Launch(assign_kernel, (triton.cdiv(N, rows),), (x, e, *out, N, K, x.stride(0)), constants), out


def plan_backward(x, e, index, grad_zq, a, grad_code, b):
    """(Launch, (dx, partial sums of de)); grad_zq and grad_code may be None, a and b have stride 0 or 1."""
    (N, D), K = x.shape, len(e)
    rows, codes, warps = tiles(x, "backward")
    codes = min(codes, power_of_two(K))
    blocks = triton.cdiv(N, rows)
    length = rounds(blocks, 2 * multiprocessors(x.device))
    programs = triton.cdiv(blocks, length)
    out = x.new_empty(N, D), x.new_empty(programs, K, D, dtype=torch.float32)
    constants = dict(D=D, BLOCK_D=power_of_two(D), ROWS=rows, CODES=codes, ROUNDS=length, HAS_ZQ=grad_zq is not None,
                     HAS_CODE=grad_code is not None, num_warps=warps, num_stages=1)
    args = (x, e, index, x if grad_zq is None else grad_zq, a, x if grad_code is None else grad_code, b, *out, N, K,
            x.stride(0), a.stride(0), b.stride(0))
    return Launch(backward_kernel, (programs, triton.cdiv(K, codes)), args, constants), out


# --- operators, known to torch.compile, with their gradients ------------------------------------------------------------


def rows_of(x):
    """x as the kernels read it: any distance between rows, none between the numbers of a row."""
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("pat::vmf_assign", mutates_args=())
def vmf_assign(x: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N,D), unit codes e (K,D) fp32 -> code (N,D) in x's dtype, index, cosine and distance |g(x)-code|², (N) each"""
    launch, out = plan_forward(rows_of(x), e.to(x.dtype).contiguous())
    launch.run()
    return out


@vmf_assign.register_fake
def _(x, e):
    cosine, distance = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.int64), cosine, distance


@torch.library.custom_op("pat::vmf_assign_backward", mutates_args=())
def vmf_assign_backward(
    x: torch.Tensor, e: torch.Tensor, index: torch.Tensor, grad_zq: torch.Tensor | None, a: torch.Tensor,
    grad_code: torch.Tensor | None, b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The header's gradient: -> dx (N,D) in x's dtype, de (K,D) fp32.  a, b (N) fp32, or (1) for all rows."""
    grad_zq, grad_code = (None if grad is None else grad.contiguous() for grad in (grad_zq, grad_code))
    launch, (dx, de) = plan_backward(rows_of(x), e.contiguous(), index, grad_zq, a.expand(len(x)), grad_code,
                                     b.expand(len(x)))
    launch.run()
    return dx, de.sum(0)


@vmf_assign_backward.register_fake
def _(x, e, index, grad_zq, a, grad_code, b):
    return x.new_empty(x.shape), e.new_empty(e.shape)


def keep_for_assign(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def assign_gradient(ctx, grad_code, _, grad_cosine, __):
    x, e, index = ctx.saved_tensors
    return torch.ops.pat.vmf_assign_backward(x, e, index, None, grad_cosine, grad_code, grad_cosine)


vmf_assign.register_autograd(assign_gradient, setup_context=keep_for_assign)


@torch.library.custom_op("pat::vmf_quantise", mutates_args=())
def vmf_quantise(x: torch.Tensor, e: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> zq (N,D), index (N), L (N) fp32: `vmf_assign` with another gradient, see the header."""
    code, index, _, distance = torch.ops.pat.vmf_assign(x, e)
    return code, index, distance * ((1 + beta) / x.shape[1])


@vmf_quantise.register_fake
def _(x, e, beta):
    return x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)


def keep_for_quantise(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.beta = inputs[2]


def quantise_gradient(ctx, grad_zq, _, grad_loss):
    x, e, index = ctx.saved_tensors
    b = grad_loss * (-2 / x.shape[1])
    return *torch.ops.pat.vmf_assign_backward(x, e, index, grad_zq, ctx.beta * b, None, b), None


vmf_quantise.register_autograd(quantise_gradient, setup_context=keep_for_quantise)


# --- the two functions, as in vq.py ---------------------------------------------------------------------------------


def check(x, codes):
    """Raises ValueError for what the kernels do not take; see `kernels.limits`."""
    if x.dim() != 2 or codes.dim() != 2 or x.shape[1] != codes.shape[1] or not len(codes):
        raise ValueError(f"x {tuple(x.shape)}, codes {tuple(codes.shape)}: takes (N,D) and (K,D), K at least 1")
    reason = limits(x.device, x.dtype, x.shape[1])
    if reason:
        raise ValueError(reason)
    check_together(x, codes)


def assign(x, codes):
    """Each feature's code by largest cosine, ties to the lowest index; see vq.assign.

    x (n,D) of any length, codes (K,D) of any length -> index (n) int64, code (n,D) unit, cosine (n) in [-1,1].
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    check(x, codes)
    code, index, cosine, _ = torch.ops.pat.vmf_assign(x, F.normalize(codes.float(), dim=-1))
    return index, code, cosine


def quantise(x, codes, beta=0.25):
    """Assignment with a straight-through gradient and its loss; see vq.quantise.

    x (n,D), codes (K,D) -> zq (n,D), index (n) int64, loss (n) of each feature.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    check(x, codes)
    return torch.ops.pat.vmf_quantise(x, F.normalize(codes.float(), dim=-1), float(beta))
