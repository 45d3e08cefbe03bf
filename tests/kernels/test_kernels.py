"""Each Triton kernel equals its plain function: in value, in every gradient, at every size, in what it refuses.

Without a GPU the kernels run under Triton's interpreter, on CPU tensors, one program after another: what they compute
is tested, how fast is not.  On a GPU the same tests run the compiled kernels.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hsattn
import kernels
import pat
import vq
from cli import InputError
from kernels import bench
from runs import build
from train import gradients, recipe
from world.scenes import World

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it exists on Linux only): the kernels cannot run", allow_module_level=True)

from kernels import mean_shift, tile, vmf_assign  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROOT = Path(__file__).parents[2]
native_only = pytest.mark.skipif(not GPU, reason="no GPU here, and Triton's interpreter multiplies bf16 tiles wrongly")


def randn(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape).to(DEVICE, dtype).requires_grad_(grad)


def double(*tensors):
    """The same numbers in float64, as leaves of their own."""
    return [x.detach().double().requires_grad_() for x in tensors]


def relative(ours, reference):
    """|ours - reference| / |reference|, Frobenius norms."""
    return ((ours.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def grads_of(outputs, ups, inputs):
    return torch.autograd.grad(sum((o * up.to(o.dtype)).sum() for o, up in zip(outputs, ups)), inputs)


@pytest.fixture
def launched(monkeypatch):
    """The launches of a test in order: (name of the kernel, grid, constants)."""
    found, run = [], tile.Launch.run

    def record(launch):
        found.append((launch.kernel.__name__, launch.grid, launch.constants))
        run(launch)

    monkeypatch.setattr(tile.Launch, "run", record)
    return found


# --- fused vMF assignment -------------------------------------------------------------------------------------------


def check_assign(module, N, K, D, dtype=torch.float32):
    """Value and gradients of `assign` and `quantise` against the plain functions in float64; raises AssertionError."""
    lost, near = {torch.float32: (2e-6, 2e-6), torch.float16: (1e-3, 2e-3), torch.bfloat16: (4e-3, 1e-2)}[dtype]
    x, codes = randn(N, D, dtype=dtype, grad=True), randn(K, D, grad=True)
    x64, codes64 = double(x, codes)
    index, code, cosine = module.assign(x, codes)
    best_index, _, best = vq.assign(x64, codes64)
    assert torch.equal(code, F.normalize(codes, dim=-1).to(dtype)[index])     # bitwise
    unit, target = F.normalize(x64, dim=-1), F.normalize(codes64, dim=-1)[index]
    reached = (unit * target).sum(1)
    assert (best - reached).max() <= lost and (cosine.double() - reached).abs().max() <= near
    if dtype == torch.float32:                                # with rounded scores another index may win
        assert torch.equal(index, best_index)
    ups = randn(N, D), randn(N)
    reference = grads_of((target, reached), ups, (x64, codes64))
    for mine, theirs in zip(grads_of((code, cosine), ups, (x, codes)), reference):
        assert relative(mine, theirs) <= near

    zq, index2, loss = module.quantise(x, codes, 0.25)
    assert torch.equal(index2, index) and torch.equal(zq, code)
    unit, target = F.normalize(x64, dim=-1), F.normalize(codes64, dim=-1)[index]
    zq64, loss64 = vq.straight_through(unit, target), vq.commitment_loss(unit, target, 0.25)
    assert relative(loss, loss64) <= near
    ups = randn(N, D), randn(N)
    reference = grads_of((zq64, loss64), ups, (x64, codes64))
    for mine, theirs in zip(grads_of((zq, loss), ups, (x, codes)), reference):
        assert relative(mine, theirs) <= near


@pytest.mark.parametrize("N, K, D, chunk, chunks", [
    (1, 1, 32, 16, 1), (70, 100, 32, 64, 2), (65, 1, 5, 16, 1), (1, 33, 30, 64, 1), (130, 257, 33, 64, 5)])
def test_assignment_equals_the_plain_one_in_value_and_gradient(N, K, D, chunk, chunks, launched):
    """Sizes that fill no tile, one code, one feature, one chunk of codes and several, against float64."""
    check_assign(vmf_assign, N, K, D)
    names = [name for name, _, _ in launched]
    assert names == ["assign_kernel", "backward_kernel", "assign_kernel", "backward_kernel"]
    forward, backward = launched[0][2], launched[1]
    assert (forward["CHUNK"], forward["CHUNKS"]) == (chunk, chunks)
    assert backward[1][1] == -(-K // 128) and (backward[2]["HAS_CODE"], backward[2]["HAS_ZQ"]) == (True, False)
    assert (launched[3][2]["HAS_CODE"], launched[3][2]["HAS_ZQ"]) == (False, True)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=native_only)])
def test_assignment_of_half_precision_features(dtype):
    """The chosen code is the best up to the rounding of the scores; sums and gradients are fp32 inside."""
    check_assign(vmf_assign, 200, 100, 32, dtype)


def test_long_inputs_are_shared_by_programs_that_walk(launched):
    """1,500 features are 24 tiles; the interpreter counts two multiprocessors, so 4 programs take 6 tiles each."""
    x, codes = randn(1500, 8, grad=True), randn(5, 8, grad=True)
    vmf_assign.quantise(x, codes)[2].mean().backward()
    (name, grid, constants), = [launch for launch in launched if launch[0] == "backward_kernel"]
    if not GPU:
        assert grid == (4, 1) and constants["ROUNDS"] == 6
    x64, codes64 = double(x, codes)
    vq.quantise(x64, codes64)[2].mean().backward()
    assert relative(codes.grad, codes64.grad) <= 1e-6 and relative(x.grad, x64.grad) <= 1e-6


def test_ties_go_to_the_lowest_code(module=vmf_assign):
    """Codes 0, 3 and 70 are one and the same: across lanes of a tile and across tiles the first wins."""
    codes = randn(100, 8)
    codes[[3, 70]] = codes[0].clone()
    index, _, _ = module.assign(codes[[0, 3, 70]] * 2, codes)
    assert index.tolist() == [0, 0, 0]


def test_a_feature_opposite_to_every_code_still_gets_a_real_one(module=vmf_assign):
    """All scores are negative, so the padding behind the last code must not look like a score of zero."""
    codes = F.normalize(torch.ones(5, 8) + 0.1 * torch.randn(5, 8), dim=-1).to(DEVICE)
    x = -codes.repeat(3, 1)
    index, _, cosine = module.assign(x, codes)
    plain_index, _, plain = vq.assign(x, codes)
    assert torch.equal(index, plain_index) and cosine.max() < 0
    torch.testing.assert_close(cosine, plain)


def test_zero_rows_and_nan_rows_are_defined():
    """Zero: index 0, cosine 0.  NaN: index 0, cosine NaN.  Their neighbours in the tile do not notice."""
    codes, x = randn(70, 8), randn(5, 8)
    x[1], x[3, 2] = 0, torch.nan
    for assign in (vmf_assign.assign, vq.assign):
        index, code, cosine = assign(x, codes)
        assert index[[1, 3]].tolist() == [0, 0] and cosine[1] == 0 and cosine[3].isnan()
        rest = [0, 2, 4]
        assert torch.equal(index[rest], vq.assign(x[rest], codes)[0])
        assert torch.equal(code, F.normalize(codes, dim=-1)[index])
    x[3] = 0
    x, codes = x.requires_grad_(), codes.requires_grad_()
    ups = randn(5, 8), torch.ones((), device=DEVICE)
    ours, theirs = (grads_of((q[0], q[2]), ups, (x, codes)) for q in (vmf_assign.quantise(x, codes), vq.quantise(x, codes)))
    for mine, reference in zip(ours, theirs):
        torch.testing.assert_close(mine, reference)


def test_features_may_lie_anywhere_in_memory():
    """Transposed, every second row, and so far apart that offsets pass 2^31."""
    codes, wide, tall = randn(20, 8), randn(8, 30), randn(60, 8)
    huge = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)                    # 4 GiB, of which pages are touched
    far = huge.as_strided((3, 8), (2**30, 1))
    far.copy_(randn(3, 8))
    for x in (wide.T, tall[::2], far):
        index, code, cosine = vmf_assign.assign(x, codes)
        again = vmf_assign.assign(x.contiguous(), codes)
        assert torch.equal(index, again[0]) and torch.equal(code, again[1]) and torch.equal(cosine, again[2])


def test_no_features_at_all():
    index, code, cosine = vmf_assign.assign(randn(0, 8), randn(3, 8))
    assert index.shape == (0,) and code.shape == (0, 8) and cosine.shape == (0,)


# --- mean-shift attention -------------------------------------------------------------------------------------------


def heads(B, H, n, D, dtype=torch.float32):
    """(B,H,n,D) as the model has it: a view into (B,n,H*D)."""
    return randn(B, n, H * D, dtype=dtype).unflatten(-1, (H, D)).transpose(1, 2).requires_grad_()


def check_attention(module, B, H, M, P, D, masked=False, same=False, dtype=torch.float32, kappa=30.0):
    """Value and gradients against the plain function in float64; raises AssertionError."""
    near = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 5e-2}[dtype]
    q, k = heads(B, H, M, D, dtype), heads(B, H, P, D, dtype)
    v = k if same else heads(B, H, P, D, dtype)
    mask = (torch.rand(B, P) < 0.7).to(DEVICE) if masked else None
    inputs = (q, k) if same else (q, k, v)
    q64, k64, v64 = double(q, k, v)
    v64 = k64 if same else v64
    out = module.hypersphere_attention(q, k, v, kappa, mask)
    reference = hsattn.hypersphere_attention(q64, k64, v64, kappa, mask)
    assert out.shape == q.shape and out.dtype == dtype and relative(out, reference) <= near
    up = randn(*q.shape)
    for mine, theirs in zip(grads_of([out], [up], inputs), grads_of([reference], [up], (q64, k64, v64)[:len(inputs)])):
        assert relative(mine, theirs) <= near


@pytest.mark.parametrize("B, H, M, P, D, kappa, masked, same, grid, rounds", [
    (1, 1, 1, 5, 5, 2.0, False, False, (1, 1, 1), 1),         # less than a tile of everything
    (2, 3, 37, 150, 30, 30.0, False, False, (1, 1, 6), 3),    # heads as in the model: enough programs, keys not split
    (1, 1, 70, 300, 32, 30.0, False, True, (2, 2, 1), 3),     # K = V, two query blocks, keys in two parts
    (2, 1, 33, 130, 64, 30.0, True, False, (2, 1, 2), 3),     # the widest head, with a mask
])
def test_attention_equals_the_plain_one_in_value_and_gradient(B, H, M, P, D, kappa, masked, same, grid, rounds, launched):
    """One part of the keys and several, one query block and several, against float64."""
    check_attention(mean_shift, B, H, M, P, D, masked, same, kappa=kappa)
    names = [name for name, _, _ in launched]
    assert names == ["forward_kernel", "combine_kernel", "backward_keys_kernel", "backward_queries_kernel", "project_kernel"]
    assert launched[0][2]["MASKED"] == masked
    if not GPU:
        assert launched[0][1] == grid and launched[0][2]["ROUNDS"] == rounds


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=native_only)])
def test_attention_in_half_precision(dtype):
    check_attention(mean_shift, 1, 2, 20, 100, 30, dtype=dtype)


def test_kappa_at_the_safe_end(module=mean_shift):
    """At kappa 43 keys opposite to the query weigh exp(-86), about the smallest fp32 there is, and still give their mean."""
    check_attention(module, 1, 1, 9, 80, 16, kappa=43.0)
    q, k = torch.tensor([[[1.0, 0.0]]], device=DEVICE), torch.tensor([[[-1.0, 0.0], [-2.0, 0.0]]], device=DEVICE)
    v = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], device=DEVICE, requires_grad=True)
    out = module.hypersphere_attention(q, k, v, 43.0)
    torch.testing.assert_close(out, torch.full((1, 1, 2), 0.5**0.5, device=DEVICE))
    up = torch.tensor([[[1.0, 0.0]]], device=DEVICE)          # tangent part (1,-1)/2, over |m| = .71, each key's half of it
    torch.testing.assert_close(grads_of([out], [up], [v])[0], torch.tensor([[[1.0, -1.0]] * 2], device=DEVICE) * 0.125**0.5)


def test_a_padded_key_counts_for_nothing(module=mean_shift):
    """Keys behind the mask change neither the output nor the other gradients, and get none themselves."""
    q, k, v = heads(2, 2, 9, 8), heads(2, 2, 20, 8), heads(2, 2, 20, 8)
    mask = (torch.arange(20, device=DEVICE) < 13).expand(2, 20)
    up = randn(2, 2, 9, 8)
    out = module.hypersphere_attention(q, k, v, 10.0, mask)
    short = hsattn.hypersphere_attention(q, k[:, :, :13], v[:, :, :13], 10.0)
    torch.testing.assert_close(out, short, rtol=1e-4, atol=1e-5)
    for mine, reference in zip(grads_of([out], [up], (q, k, v)), grads_of([short], [up], (q, k, v))):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_a_query_without_any_key_is_a_zero_row():
    """Of two images one is all padding: zeros and finite, zero gradients there, in both versions."""
    mask = torch.tensor([[True] * 5, [False] * 5], device=DEVICE)
    for attention in (mean_shift.hypersphere_attention, hsattn.hypersphere_attention):
        q, k, v = heads(2, 1, 3, 8), heads(2, 1, 5, 8), heads(2, 1, 5, 8)
        out = attention(q, k, v, 30.0, mask)
        assert (out[1] == 0).all() and torch.allclose(out[0].norm(dim=-1), torch.ones(1, 3, device=DEVICE))
        for grad in grads_of([out], [randn(2, 1, 3, 8)], (q, k, v)):
            assert (grad[1] == 0).all() and grad.isfinite().all() and grad[0].abs().sum() > 0


def test_attention_reads_any_memory_layout():
    """Inner strides other than 1, and images so far apart that offsets pass 2^31."""
    q, v = randn(2, 1, 4, 8), randn(2, 1, 6, 8)
    k = randn(2, 1, 8, 6).transpose(2, 3)
    huge = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = huge.as_strided((2, 1, 4, 8), (2**31, 8, 8, 1))
    far.copy_(q)
    near = mean_shift.hypersphere_attention(q, k.contiguous(), v, 9.0)
    assert torch.equal(mean_shift.hypersphere_attention(q, k, v, 9.0), near)
    half = [x.half() for x in (k, v)]
    assert torch.equal(mean_shift.hypersphere_attention(far, *half, 9.0), mean_shift.hypersphere_attention(q.half(), *half, 9.0))


def test_mean_shift_reaches_the_same_modes_and_clusters():
    """Three bunches on the sphere, two images, eight steps."""
    centres = F.normalize(torch.randn(2, 3, 32), dim=-1)
    x = (centres.repeat_interleave(40, 1) + 0.1 * torch.randn(2, 120, 32)).to(DEVICE)
    modes, cluster = mean_shift.mean_shift(x, x[:, ::30], 20.0, 8)
    plain_modes, plain_cluster = hsattn.mean_shift(x, x[:, ::30], 20.0, 8)
    torch.testing.assert_close(modes, plain_modes, rtol=1e-4, atol=1e-5)
    # Seeds of one bunch reach one mode up to rounding, and a feature then takes either: compare where it goes, not the row.
    ours, theirs = (torch.gather(m, 1, c[..., None].expand(-1, -1, 32)) for m, c in ((modes, cluster), (modes, plain_cluster)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert cluster.shape == (2, 120) and cluster.dtype == torch.int64


# --- both -----------------------------------------------------------------------------------------------------------


def everything(seed=0):
    """All outputs and gradients of both operations on fixed inputs."""
    torch.manual_seed(seed)
    x, codes, q, k = randn(300, 32, grad=True), randn(50, 32, grad=True), heads(1, 2, 20, 30), heads(1, 2, 140, 30)
    zq, index, loss = vmf_assign.quantise(x, codes)
    out = mean_shift.hypersphere_attention(q, k, k, 30.0)
    grads = torch.autograd.grad((zq * randn(300, 32)).sum() + (loss * randn(300)).sum() + (out * randn(*out.shape)).sum(), (x, codes, q, k))
    return zq, index, loss, out, *grads


def test_the_same_inputs_give_the_same_bits():
    """No sum depends on which program finishes first: 100 repeats on a GPU, 3 under the (sequential) interpreter."""
    first = everything()
    for _ in range(100 if GPU else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, everything()))


@pytest.mark.parametrize("name", ["vmf_assign", "vmf_quantise", "mean_shift_attention"])
def test_the_operators_are_well_formed(name):
    """torch's own checks: schema, shapes and dtypes without running, gradient registration, tracing."""
    codes = F.normalize(randn(7, 8), dim=-1).requires_grad_()
    inputs = dict(vmf_assign=(randn(20, 8, grad=True), codes), vmf_quantise=(randn(20, 8, grad=True), codes, 0.25),
                  mean_shift_attention=(heads(1, 1, 3, 8), heads(1, 1, 9, 8), heads(1, 1, 9, 8), None, 10.0))[name]
    torch.library.opcheck(getattr(torch.ops.pat, name).default, inputs)


def test_torch_compile_takes_them_in_one_graph():
    """fullgraph=True raises on any break; values and gradients stay the same."""
    def both(x, codes, q, k):
        zq, index, loss = vmf_assign.quantise(x, codes)
        return zq.sum() + loss.sum() + (mean_shift.hypersphere_attention(q, k, k, 9.0) * k[:, :, :3]).sum(), index

    inputs = randn(30, 8, grad=True), randn(5, 8, grad=True), heads(1, 2, 3, 8), heads(1, 2, 9, 8)
    eager, compiled = both(*inputs), torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(eager[1], compiled[1])
    torch.testing.assert_close(eager[0], compiled[0])
    for a, b in zip(torch.autograd.grad(eager[0], inputs), torch.autograd.grad(compiled[0], inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=native_only)])
def test_autocast_reaches_attention_and_leaves_assignment_in_fp32(dtype):
    """As in the model: HSAttn answers in autocast's dtype; vMFVQ's tokens stay fp32."""
    module, quantiser = hsattn.HSAttn(16, 2, kernels="triton").to(DEVICE), vq.vMFVQ(6, 9, 8, kernels="triton").to(DEVICE)
    t, z, u = randn(1, 4, 16), randn(1, 20, 16), randn(1, 6, 3, 3)
    with torch.autocast(DEVICE, dtype=dtype):
        attended, tokens = module(t, z, z), quantiser(u)
    assert attended.dtype == dtype and tokens.zq.dtype == tokens.loss.dtype == torch.float32
    module.kernels = "plain"
    torch.testing.assert_close(attended.float(), module(t, z, z), rtol=0.05, atol=0.01)
    (attended.float().square().sum() + tokens.loss.sum()).backward()


def test_the_switch_takes_the_kernel_on_a_gpu_only_and_says_why_not():
    """auto: Triton on a GPU within the limits, else the plain one.  triton: that, or an error; nothing else quietly."""
    gpu, cpu, fp32 = torch.device("cuda"), torch.device("cpu"), torch.float32
    assert kernels.path("auto", gpu, fp32, 30, 30.0) == "triton" and kernels.path("auto", cpu, fp32, 30, 30.0) == "cpu"
    assert kernels.path("plain", gpu, fp32, 30, 30.0) == "plain"
    for refused in ((gpu, torch.float64, 32), (gpu, fp32, 65), (gpu, fp32, 65, 30.0), (gpu, fp32, 30, 50.0)):
        assert kernels.path("auto", *refused) == "plain"
        with pytest.raises(ValueError, match="use kernels auto"):
            kernels.path("triton", *refused)
    with pytest.raises(ValueError, match="there are plain, auto, triton"):
        kernels.path("fast", gpu, fp32, 30)


def test_the_switch_reaches_the_modules(launched):
    """Same module, same input, either path: equal results, and the kernel ran exactly when asked to."""
    module, quantiser = hsattn.HSAttn(16, 2).to(DEVICE), vq.vMFVQ(6, 9, 8).to(DEVICE)
    t, z, u = randn(1, 4, 16), randn(1, 20, 16), randn(1, 6, 3, 3)
    found = {}
    for choice in ("plain", "triton"):
        module.kernels = quantiser.kernels = choice
        tokens = quantiser(u)
        found[choice] = module(t, z, z), tokens.zq, tokens.loss, tokens.index
        assert [name for name, _, _ in launched] == (
            [] if choice == "plain" else ["assign_kernel", "forward_kernel", "combine_kernel"])
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_training_says_which_path_each_operation_takes_or_that_it_cannot(monkeypatch):
    monkeypatch.setattr(pat, "perceptual", lambda device: None)

    def paths(device, **numbers):
        return build(recipe("world", **numbers).run).notes(device).removeprefix("LPIPS off; ")

    assert paths("cpu", kernels="plain") == "assignment by plain, mean shift by plain"
    assert paths("cpu", kernels="auto") == "assignment by cpu, mean shift by cpu"
    assert paths("cuda", kernels="auto") == "assignment by triton, mean shift by triton"
    assert paths("cuda", kappa=100.0) == "assignment by triton, mean shift by plain"
    assert paths("cpu", model="san") == "" and paths("cuda", metric="dot", restart_after=0) == "no operation with a kernel"
    with pytest.raises(InputError, match="kappa 100: the Triton kernel is safe for"):
        paths("cuda", kernels="triton", kappa=100.0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="--kernels triton: the Triton kernels run on a GPU, not on cpu"):
        paths("cpu", kernels="triton")


@pytest.mark.parametrize("call, message", [
    (lambda: vmf_assign.assign(randn(4, 8), randn(3, 9)), r"x \(4, 8\), codes \(3, 9\): takes"),
    (lambda: vmf_assign.assign(randn(4, 8), randn(0, 8)), "K at least 1"),
    (lambda: vmf_assign.assign(randn(4, 8).double(), randn(3, 8)), "not float64"),
    (lambda: vmf_assign.assign(randn(4, 200), randn(3, 200)), "1 to 64 numbers, not 200"),
    (lambda: vmf_assign.assign(randn(4, 8), torch.empty(3, 8, device="meta")), "move them to one device"),
    (lambda: mean_shift.hypersphere_attention(randn(1, 4, 8), randn(1, 5, 8), randn(1, 6, 8), 9.0), "takes"),
    (lambda: mean_shift.hypersphere_attention(randn(1, 4, 8), randn(1, 0, 8), randn(1, 0, 8), 9.0), "at least one key"),
    (lambda: mean_shift.hypersphere_attention(randn(1, 4, 8), randn(1, 5, 8).half(), randn(1, 5, 8), 9.0), "same dtype"),
    (lambda: mean_shift.hypersphere_attention(randn(1, 4, 65), randn(1, 5, 65), randn(1, 5, 65), 9.0), "1 to 64 numbers"),
    (lambda: mean_shift.hypersphere_attention(*[randn(1, 5, 8)] * 3, 44.0), "safe for 0 < kappa <= 43"),
    (lambda: mean_shift.hypersphere_attention(*[randn(1, 5, 8)] * 3, 0.0), "safe for 0 < kappa <= 43"),
    (lambda: mean_shift.hypersphere_attention(*[randn(1, 5, 8)] * 3, 9.0, torch.ones(1, 5)), r"takes \(B,P\) bool"),
    (lambda: mean_shift.hypersphere_attention(*[randn(1, 5, 8)] * 3, 9.0, torch.ones(1, 4) > 0), r"here \(1,5\)"),
])
def test_wrong_inputs_are_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("exact, rounded", [(1, 1), (16, 16), (17, 18), (25, 26), (33, 36), (400, 416)])
def test_the_length_of_a_walk_is_rounded_to_four_leading_bits(exact, rounded):
    """Each length is compiled once, so there are few; no walk is more than an eighth longer than it must be."""
    assert tile.rounds(exact, 1) == rounded and rounded <= exact * 9 / 8


def test_a_walk_shares_blocks_among_programs():
    assert tile.rounds(100, 8) == 13 and tile.rounds(3, 8) == 1 and tile.rounds(0, 8) == 1


def train_steps(choice, steps):
    """The losses of a few training steps of a small PAT in the world, by one path or the other."""
    config = recipe("world", kernels=choice, batch=1, codes=(20, 12, 8, 24), queries=6, decoder_width=16, decoder_heads=2,
                    width=24, hs_heads=2, heads=2, precision="fp32", points=128, crf_samples=16)
    torch.manual_seed(0)
    model = build(config.run).to(DEVICE).train()
    text = model.vlm.embed_text(World.train_names[:5]).to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(steps):
        image, label = World("train").draw(0, step)
        optimizer.zero_grad()
        terms, _ = gradients(model, text, [(image[None], label[None].clamp(max=4), torch.tensor([step]))], config)
        optimizer.step()
        losses.append({name: float(value) for name, value in terms.items()})
    return losses


def test_training_with_and_without_kernels_gives_the_same_losses(launched):
    """Every loss of every step; the whole model, so 4 quantisers and 3 HSAttn, forward and backward, in each step."""
    steps = 20 if GPU else 3
    fused = train_steps("triton", steps)
    names = [name for name, _, _ in launched]
    assert names.count("assign_kernel") == names.count("backward_kernel") == 4 * steps
    assert names.count("forward_kernel") == names.count("backward_keys_kernel") == 3 * steps
    plain = train_steps("plain", steps)
    assert len(launched) == len(names)                        # the other path launched nothing
    for ours, theirs in zip(fused, plain):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_the_benchmark_compares_equals():
    """Every contender that is ours to write computes what the project's own function computes, gradients included."""
    for operation, size, backward in (("assign", (50, 9), False), ("assign", (50, 9), True), ("attention", (2, 3, 4, 20, 6), True)):
        inputs, ups = bench.make(operation, size, torch.float32, DEVICE)
        makers = bench.contenders(operation, backward)
        wanted = bench.once(makers["ours"](size[1], DEVICE), inputs, ups, backward)
        for name in set(makers) - {"ours", "torch.compile", bench.LIBRARY}:
            found = bench.once(makers[name](size[1], DEVICE), inputs, ups, backward)
            for a, b in zip(found, wanted):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_floors_of_the_benchmark_by_hand():
    """100 fp32 features of 32 to 7 codes: 100*(2*32*4 + 16) bytes, 2*100*7*32 operations; attention likewise."""
    assert bench.cost("assign", (100, 7), torch.float32, False) == (27200, 44800)
    assert bench.cost("assign", (100, 7), torch.bfloat16, True) == (100 * (2 * 32 * 2 + 16) + 100 * (3 * 32 * 2 + 8), 51200)
    assert bench.cost("attention", (1, 2, 3, 5, 4), torch.float32, False) == (8 * (6 + 10) * 4, 4 * 2 * 3 * 5 * 4)


@pytest.mark.parametrize("operation, module, kernels", [("assign", vmf_assign, 2), ("attention", mean_shift, 3)])
def test_tuning_leaves_the_fastest_tiles_where_launches_look(operation, module, kernels, monkeypatch):
    """By made-up times: (128, 32, 8) is the fastest for each kernel, and one beside it does not compile."""
    tried, given = [], module.TILES[None, "bf16", 32]
    monkeypatch.setattr(module, "TILES", dict(module.TILES))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 9))
    monkeypatch.setattr(bench, "make", lambda *_: ([], []))

    def seconds(*_):
        tried.append(module.TILES[(9, 9), "bf16", 32])
        if (128, 32, 4) in tried[-1].values():
            raise RuntimeError("out of resources")
        return 1 + sum(tile != (128, 32, 8) for tile in tried[-1].values())

    monkeypatch.setattr(bench, "median_seconds", seconds)
    entry = dict.fromkeys(given, (128, 32, 8))
    assert bench.tune(operation, torch.bfloat16) == (((9, 9), "bf16", 32), entry)
    assert module.TILES[(9, 9), "bf16", 32] == entry and len(tried) == kernels * 18


@pytest.mark.parametrize("works", [True, False])
def test_tuning_without_time_tries_what_there_is_and_keeps_it(works, monkeypatch):
    given, tried = vmf_assign.TILES[None, "tf32", 32], []
    monkeypatch.setattr(vmf_assign, "TILES", dict(vmf_assign.TILES))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 9))
    monkeypatch.setattr(bench, "make", lambda *_: ([], []))
    monkeypatch.setattr(bench, "median_seconds", lambda *_: tried.append(vmf_assign.TILES[(9, 9), "tf32", 32]) or (
        1.0 if works else never_compiles()))
    assert bench.tune("assign", torch.float16, 0)[1] == given == vmf_assign.TILES[(9, 9), "tf32", 32]
    assert tried == [given] * 2                               # its two kernels


def never_compiles():
    raise RuntimeError("out of resources")


def test_repeats_tell_a_call_whose_bits_change(monkeypatch):
    """The last of them too; forward and backward apart."""
    x, calls = torch.ones(3, requires_grad=True), []
    monkeypatch.setattr(bench, "REPEATS", 3)

    def changes_at_last(x):
        calls.append(1)
        return x * (2 + (len(calls) == 4) * 2**-20)

    for backward in (False, True):
        calls.clear()
        assert not bench.steady(changes_at_last, [x], [torch.ones(3)], backward) and len(calls) == 4
        assert bench.steady(lambda x: (2 * x, x.sum()), [x], [torch.ones(3), torch.ones(())], backward)


# --- bugs that were planted on purpose --------------------------------------------------------------------------------

PLANTED = {
    "the padding behind the last code scores 0": (vmf_assign, 'score, float("-inf"))', "score, 0.0)"),
    "a tie goes to the right within a tile": (vmf_assign, "tie_break_left=True", "tie_break_left=False"),
    "a tie goes to the right across tiles": (vmf_assign, "top > best, j", "top >= best, j"),
    "the gradient of x is not tangent": (vmf_assign, "through_unit(grad, x, length)", "grad / length[:, None]"),
    "beta is dropped": (vmf_assign, "ctx.beta * b, None, b", "b, None, b"),
    "padding weighs exp(-kappa)": (mean_shift, "live = keys < P\n", "live = keys < P + 999\n"),
    "the caller's mask is not read": (mean_shift, "keys < P, 0) != 0)", "keys < P, 0) >= 0)"),
    "the gradient of out is not tangent": (mean_shift, "grad = grad - out * tl.sum(out * grad, 1)[:, None]", "grad = grad"),
    "the gradient of k is not tangent": (mean_shift, "dk = through_unit(dk, k, k_length)", "dk = dk / k_length[:, None]"),
    "the gradient of q is not tangent": (mean_shift, "dq = through_unit(dq, q, length)", "dq = dq / length[:, None]"),
    "parts of the keys are not added": (mean_shift, "u += rows_at", "u = rows_at"),
    "kappa is missing in the gradient": (mean_shift, "r = kappa * p", "r = p"),
}


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=pytest.mark.skipif(
    "within a tile" in bug and not GPU, reason="no GPU here, and Triton's interpreter breaks every tie to the left")) for bug in PLANTED])
def test_a_planted_bug_is_found(bug, tmp_path):
    """The checks above, run on a copy of the kernel with one line broken, must fail."""
    module, right, wrong = PLANTED[bug]
    source = Path(module.__file__).read_text()
    assert right in source
    name = "planted_" + "".join(c if c.isalnum() else "_" for c in bug)
    source = source.replace(right, wrong).replace("pat::", name + "::").replace("ops.pat.", f"ops.{name}.")
    (tmp_path / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    with pytest.raises(AssertionError):
        if module is vmf_assign:
            test_ties_go_to_the_lowest_code(broken)
            test_a_feature_opposite_to_every_code_still_gets_a_real_one(broken)
            check_assign(broken, 70, 100, 32)
        else:
            check_attention(broken, 1, 1, 20, 150, 30)
            test_kappa_at_the_safe_end(broken)
            test_a_padded_key_counts_for_nothing(broken)


# --- compiled, without a GPU ------------------------------------------------------------------------------------------


def test_what_the_compiler_makes_of_every_launch(tmp_path):
    """No spilled register, at most 99 KiB of shared memory, 16-byte loads, tensor cores, no atomics; for an A100 and an H100.
    (The report's third, sm_86, has sm_80's tensor-core instructions and the 99 KiB that are asked for.)"""
    out = tmp_path / "report.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-m", "kernels.compile_report", "--sm", "80", "90", "--json", out], check=True, env=env, cwd=ROOT)
    rows = json.loads(out.read_text())["rows"]
    assert {row["sm"] for row in rows} == {80, 90} and len(rows) >= 60
    for row in rows:
        multiplies = row["kernel"].split()[0] in ("assign", "quantise", "attention")
        good = (row["stack"] == 0 and row["shared"] <= 99 * 1024 and row["atomics"] == 0
                and (row["128-bit"] > 0 or "D=30" in row["kernel"]) and (row["tensor"] > 0 or not multiplies))
        assert good, row
