"""The fast forms of a CPU equal the plain ones, in value and in every gradient, wherever the parts end; and which path runs.

In float64, so that "equal" means ten digits, and under random upstream gradients.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import hsattn
import kernels
import vq
from hsattn import HSAttn
from kernels import cpu
from vq import vMFVQ


def rows(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def grads_of(outputs, ups, inputs):
    return torch.autograd.grad(outputs, inputs, ups)


def check_equal(ours, theirs):
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.5, 30.0, 300.0])
@pytest.mark.parametrize("lead, N, P, D", [((), 3, 7, 4), ((1,), 1, 1, 1), ((4,), 5, 9, 3), ((5, 2), 3, 6, 4), ((2, 2, 2), 2, 5, 3)])
def test_attention_equals_the_plain_one_in_value_and_gradient(lead, N, P, D, kappa):
    """Without a batch, one image, several, heads, any number of dimensions in front; at kappa 300 exp(-600) is a weight."""
    inputs, up = [rows(*lead, n, D) for n in (N, P, P)], torch.randn(*lead, N, D, dtype=torch.float64)
    ours, theirs = (attention(*inputs, kappa) for attention in (cpu.hypersphere_attention, hsattn.hypersphere_attention))
    check_equal([ours, *grads_of(ours, up, inputs)], [theirs, *grads_of(theirs, up, inputs)])


def test_masked_attention_equals_the_plain_one_in_value_and_gradient():
    """A random mask, a mask of one key, one of all keys and one of none: zero row, zero gradient."""
    inputs, up = [rows(4, 2, n, 3) for n in (3, 6, 6)], torch.randn(4, 2, 3, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, True], [False] * 5 + [True], [True] * 6, [False] * 6])
    ours, theirs = (attention(*inputs, 9.0, mask) for attention in (cpu.hypersphere_attention, hsattn.hypersphere_attention))
    mine, reference = grads_of(ours, up, inputs), grads_of(theirs, up, inputs)
    check_equal([ours, *mine], [theirs, *reference])
    assert all((x[3] == 0).all() for x in (ours, theirs, *mine, *reference))
    torch.testing.assert_close(ours[1], F.normalize(inputs[2][1, :, 5:], dim=-1).expand(2, 3, 3))    # the only key's value
    with pytest.raises(ValueError, match="with a batch dimension"):
        cpu.hypersphere_attention(*(x[0, 0] for x in inputs), 9.0, mask)


@pytest.mark.parametrize("images, parts", [(5, 1), (4, 2), (3, 2), (2, 3), (1, 5), (0.5, 5)])
def test_a_batch_in_parts_is_the_batch(images, parts, monkeypatch):
    """A large batch goes a few images at a time; masks and gradients follow.  At least one goes, however large."""
    ran, apply = [], cpu.MeanShift.apply
    monkeypatch.setattr(cpu.MeanShift, "apply", lambda q, *others: (ran.append(len(q)), apply(q, *others))[1])
    inputs, up = [rows(5, 2, n, 4) for n in (3, 6, 6)], torch.randn(5, 2, 3, 4, dtype=torch.float64)
    mask = torch.rand(5, 6) < 0.7
    monkeypatch.setattr(cpu, "CACHED", int(images * 2 * 3 * 6))               # weights of an image: 2 heads, 3 queries, 6 keys
    ours, theirs = (attention(*inputs, 9.0, mask) for attention in (cpu.hypersphere_attention, hsattn.hypersphere_attention))
    assert len(ran) == parts and sum(ran) == 5 and max(ran) == max(1, int(images))
    check_equal([ours, *grads_of(ours, up, inputs)], [theirs, *grads_of(theirs, up, inputs)])


def test_gradients_of_attention_are_right():
    """Analytic against numeric: the gradient is written by hand, so the plain one's word alone is not enough."""
    q, k, v, up = rows(1, 2, 3), rows(1, 4, 3), rows(1, 4, 3), torch.randn(1, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: (cpu.hypersphere_attention(*a, 5.0) * up).sum(), (q, k, v))


def test_a_zero_query_looks_at_every_feature_alike():
    """It has no direction: every cosine is 0, so it is the mean of the values, in both forms."""
    q, k, v = torch.zeros(1, 1, 3), torch.randn(1, 5, 3), torch.randn(1, 5, 3)
    for attention in (cpu.hypersphere_attention, hsattn.hypersphere_attention):
        torch.testing.assert_close(attention(q, k, v, 30.0), F.normalize(v.mean(1, keepdim=True), dim=-1))


def test_half_precision_is_for_outside_only():
    """bf16 in and out and autocast around it; inside fp32, like the plain one: the error is the rounding of the end."""
    q, k, v = (torch.randn(2, n, 30).bfloat16() for n in (8, 200, 200))
    exact = hsattn.hypersphere_attention(q.double(), k.double(), v.double(), 30.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wide = cpu.hypersphere_attention(q, k, v, 30.0), cpu.hypersphere_attention(q.float(), k.float(), v.float(), 30.0)
    assert out.dtype == torch.bfloat16 and (out.double() - exact).abs().max() <= 2**-9
    assert wide.dtype == torch.float32 and (wide.double() - exact).abs().max() <= 1e-5


# --- assignment -----------------------------------------------------------------------------------------------------


def check_assignment(x, codes, beta=0.25):
    """`nearest`, `assign` and `quantise` of cpu.py against those of vq.py, and all gradients."""
    ours, theirs = cpu.assign(x, codes), vq.assign(x, codes)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(cpu.nearest(x, codes), vq.nearest(x, codes))
    ups = torch.randn_like(x), torch.randn_like(x[:, 0])
    check_equal([*ours[1:], *grads_of(ours[1:], ups, (x, codes))], [*theirs[1:], *grads_of(theirs[1:], ups, (x, codes))])
    ours, theirs = cpu.quantise(x, codes, beta), vq.quantise(x, codes, beta)
    assert torch.equal(ours[1], theirs[1])
    ups = torch.randn_like(x), torch.randn_like(x[:, 0])
    check_equal([*ours[::2], *grads_of(ours[::2], ups, (x, codes))], [*theirs[::2], *grads_of(theirs[::2], ups, (x, codes))])
    for output, up, inputs in ((2, ups[1], (x, codes)), (0, ups[0], (x,))):               # the loss alone, zq alone
        check_equal(*(grads_of(form.quantise(x, codes, beta)[output], up, inputs) for form in (cpu, vq)))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("K, D", [(1, 3), (7, 5)])
def test_assignment_in_chunks_equals_the_plain_one_in_value_and_gradient(n, K, D, monkeypatch):
    """Four features at a time: less than a chunk, a chunk, one more, two chunks, one more.  Two losses' weights."""
    monkeypatch.setattr(cpu, "CHUNK", 4)
    x, codes = rows(n, D), rows(K, D)
    check_assignment(x, codes)
    check_assignment(x, codes, beta=3.0)


def test_assignment_at_the_real_size_of_a_chunk():
    check_assignment(rows(cpu.CHUNK + 1, 8), rows(20, 8))


def test_no_features_have_no_codes():
    index, code, cosine = cpu.assign(torch.zeros(0, 8), torch.randn(3, 8))
    assert index.shape == (0,) and code.shape == (0, 8) and cosine.shape == (0,)


def test_ties_go_to_the_lowest_code_in_every_chunk(monkeypatch):
    """Codes north, east, east, north: every feature lies between two pairs of equals; the sixth starts a third chunk."""
    monkeypatch.setattr(cpu, "CHUNK", 2)
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [5.0, 0.0], [4.0, 4.0]])
    for assign in (cpu.assign, vq.assign):
        assert assign(x, codes)[0].tolist() == [0, 1, 0, 0, 1, 0]


def test_zero_rows_and_nan_rows_are_defined_in_every_chunk(monkeypatch):
    """Zero: index 0, cosine 0.  NaN: index 0, cosine NaN.  Their neighbours do not notice; at both ends of a chunk."""
    monkeypatch.setattr(cpu, "CHUNK", 4)
    codes, x = torch.randn(9, 3), torch.randn(9, 3)
    x[[3, 4]], x[7, 2], x[8, 0] = 0, torch.nan, torch.nan
    rest = [0, 1, 2, 5, 6]
    for assign in (cpu.assign, vq.assign):
        index, code, cosine = assign(x, codes)
        assert index[[3, 4, 7, 8]].tolist() == [0] * 4 and (cosine[[3, 4]] == 0).all() and cosine[[7, 8]].isnan().all()
        assert torch.equal(index[rest], vq.assign(x[rest], codes)[0]) and cosine[rest].isfinite().all()
        assert torch.equal(code, F.normalize(codes, dim=-1)[index])
    x[[7, 8]] = 0
    check_assignment(x.double().requires_grad_(), codes.double().requires_grad_())


def test_the_length_of_a_feature_changes_nothing():
    """The fast form scores features as they come: from 1e-9 to 1e9 long, the same codes and cosines."""
    x, codes, length = torch.randn(200, 8), torch.randn(16, 8), torch.logspace(-9, 9, 200)[:, None]
    (index, _, cosine), (again, _, same) = cpu.assign(x, codes), cpu.assign(x * length, codes)
    assert torch.equal(index, again)
    torch.testing.assert_close(cosine, same)


def test_the_codebook_gradient_is_the_same_bits_every_time():
    """Thousands of features add up in a handful of codes; on two threads too, always in the same order."""
    threads, x, codes = torch.get_num_threads(), torch.randn(8192, 32), torch.randn(4, 32, requires_grad=True)
    torch.set_num_threads(2)
    up = torch.randn(8192, 32)
    grads = [torch.autograd.grad([cpu.assign(x, codes)[1], cpu.quantise(x, codes)[2]], codes, [up, up[:, 0]])[0]
             for _ in range(10)]
    torch.set_num_threads(threads)
    assert all(torch.equal(grads[0], other) for other in grads)


# --- which path runs ------------------------------------------------------------------------------------------------


def test_each_choice_takes_its_path_on_each_device(monkeypatch):
    """plain: the formula anywhere.  auto: Triton on a GPU, cpu.py on a CPU, the formula elsewhere.  triton: or an error."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    devices, fp32 = [torch.device(name) for name in ("cpu", "cuda", "mps")], torch.float32
    taken = {choice: [kernels.path(choice, device, fp32, 32, 30.0) for device in devices] for choice in ("plain", "auto")}
    assert taken == {"plain": ["plain"] * 3, "auto": ["cpu", "triton", "plain"]}
    assert kernels.path("triton", torch.device("cuda"), fp32, 32, 30.0) == "triton"
    for device in ("cpu", "mps"):
        with pytest.raises(ValueError, match=f"the Triton kernels run on a GPU, not on {device}: use kernels auto"):
            kernels.path("triton", torch.device(device), fp32, 32)
    assert kernels.CHOICES == ("plain", "auto", "triton")


def test_auto_on_a_cpu_takes_any_dtype_width_and_kappa():
    """What limits Triton does not limit cpu.py: float64, 240 numbers a row, kappa 100."""
    assert kernels.path("auto", torch.device("cpu"), torch.float64, 240, 100.0) == "cpu"


def test_attention_on_a_gpu_is_plain_where_kappa_is_too_large():
    """Its twin is safe up to kappa 43: auto takes the formula above it, triton says why not."""
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(2, 20, 30))
    assert kernels.kernel(hsattn.hypersphere_attention, "auto", x, 43.5) is hsattn.hypersphere_attention
    with pytest.raises(ValueError, match="kappa 43.5: the Triton kernel is safe for 0 < kappa <= 43, use kernels auto"):
        kernels.kernel(hsattn.hypersphere_attention, "triton", x, 43.5)
    with pytest.raises(ValueError, match="kappa 0: the Triton kernel is safe for 0 < kappa"):
        kernels.kernel(hsattn.hypersphere_attention, "triton", x, 0.0)
    assert kernels.path("auto", x.device, x.dtype, 64, 43.0) == "triton"


@pytest.mark.parametrize("choice, way", [("plain", "plain"), ("auto", "cpu")])
def test_the_modules_run_the_path_they_are_set_to(choice, way, monkeypatch):
    """HSAttn attends by it, vMFVQ quantises and chooses by it; what comes out is the same."""
    ran = []
    for home, where in ((hsattn, "plain"), (vq, "plain"), (cpu, "cpu")):
        for name in ("hypersphere_attention", "assign", "quantise"):
            if hasattr(home, name):
                function = getattr(home, name)

                def spy(*args, where=where, name=name, function=function):
                    ran.append((where, name))
                    return function(*args)

                spy.__name__ = name                           # by which the switch finds a twin
                monkeypatch.setattr(home, name, spy)
    module, quantiser = HSAttn(16, 2, kernels=choice), vMFVQ(6, 9, 8, kernels=choice)
    t, z, u = torch.randn(2, 4, 16), torch.randn(2, 20, 16), torch.randn(2, 6, 3, 3)
    moved, tokens = module(t, z, z), quantiser(u)
    index = quantiser.choose(tokens.x.permute(0, 2, 3, 1).flatten(0, 2), quantiser.codes())
    assert ran == [(way, "hypersphere_attention"), (way, "quantise"), (way, "assign")]
    other = "auto" if choice == "plain" else "plain"
    module.kernels = quantiser.kernels = other
    torch.testing.assert_close(module(t, z, z), moved)
    assert torch.equal(quantiser(u).index, tokens.index) and torch.equal(index, tokens.index.flatten())


def test_off_the_sphere_there_is_one_path():
    """Table II's "no vMF" has no twin: the plain distance or dot product, whatever the switch says."""
    for choice in kernels.CHOICES:
        for metric in ("dot", "euclidean"):
            assert vMFVQ(6, 9, 8, metric=metric, kernels=choice)(torch.randn(1, 6, 3, 3)).zq.shape == (1, 8, 3, 3)


class Both(torch.nn.Module):
    """Attention and assignment of one choice, in one graph."""

    def __init__(self, choice):
        super().__init__()
        self.attention, self.quantiser = HSAttn(16, 2, kernels=choice), vMFVQ(16, 9, 8, kernels=choice)

    def forward(self, t, u):
        tokens = self.quantiser(u)
        return self.attention(t, u.flatten(2).transpose(1, 2), u.flatten(2).transpose(1, 2)), tokens.zq, tokens.loss


@pytest.mark.parametrize("choice", ["plain", "auto"])
def test_a_graph_takes_them_whole(choice, monkeypatch):
    """torch.compile with fullgraph=True, and its gradients; torch.export.  No loop over chunks gets in, at any CHUNK."""
    monkeypatch.setattr(cpu, "CHUNK", 5)
    monkeypatch.setattr(cpu, "CACHED", 1)
    model, t, u = Both(choice), torch.randn(2, 4, 16), torch.randn(2, 16, 4, 5, requires_grad=True)
    eager, compiled = model(t, u), torch.compile(model, fullgraph=True, backend="aot_eager")(t, u)
    ups, inputs = [torch.randn_like(x) for x in eager], [u, *model.parameters()]
    for a, b in zip([*eager, *grads_of(eager, ups, inputs)], [*compiled, *grads_of(compiled, ups, inputs)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (t, u))
    calls = [str(node.target) for graph in exported.graph_module.modules() for node in graph.graph.nodes]
    assert calls.count("aten.argmax.default") == 1 and not any("split" in call or "max.dim" in call for call in calls)
    for a, b in zip(eager, exported.module()(t, u)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
