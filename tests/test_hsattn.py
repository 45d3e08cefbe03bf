"""Hypersphere attention is one step of mean shift on the sphere."""

import math

import pytest
import torch
import torch.nn.functional as F

from hsattn import Attn, HSAttn, hypersphere_attention, mean_shift


def test_one_call_is_one_vmf_mean_shift_step():
    """With V = g(K) each query moves to the normalised kernel-weighted mean of the features, summed here by hand."""
    x, seeds, kappa = F.normalize(torch.randn(40, 5), dim=-1), F.normalize(torch.randn(7, 5), dim=-1), 30.0
    moved = torch.zeros(7, 5)
    for n in range(7):
        for p in range(40):
            moved[n] += math.exp(kappa * float(seeds[n] @ x[p])) * x[p]       # the vMF kernel, its constant cancels
        moved[n] /= moved[n].norm()
    torch.testing.assert_close(hypersphere_attention(3 * seeds, 0.2 * x, x, kappa), moved, rtol=1e-4, atol=1e-5)


def test_two_features_by_hand():
    """q halfway between two orthogonal features stays; q on the first leaves it by exp(-kappa)."""
    k = torch.eye(2)[None]
    middle = hypersphere_attention(torch.tensor([[[1.0, 1.0]]]), k, k, 10.0)
    torch.testing.assert_close(middle, torch.full((1, 1, 2), 0.5**0.5))
    near = hypersphere_attention(torch.tensor([[[1.0, 0.0]]]), k, k, 2.0)[0, 0]
    assert near[1] / near[0] == pytest.approx(math.exp(-2.0), rel=1e-5)


def test_values_keep_their_lengths():
    """q halfway between two orthogonal features, of values (2, 0) and (0, 1): their mean is (1, 1/2), at unit length."""
    out = hypersphere_attention(torch.ones(1, 1, 2), torch.eye(2)[None], torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), 10.0)
    torch.testing.assert_close(out, torch.tensor([[[2.0, 1.0]]]) / 5**0.5)


def test_the_softmax_runs_over_the_features():
    """Doubling a feature pulls the token towards it; doubling a token changes no other token."""
    q, k = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    base = hypersphere_attention(q, k, k, 3.0)
    doubled_feature = hypersphere_attention(q, torch.cat([k, k[:, :1]], 1), torch.cat([k, k[:, :1]], 1), 3.0)
    cos = F.cosine_similarity(base, k[:, :1], dim=-1), F.cosine_similarity(doubled_feature, k[:, :1], dim=-1)
    assert (cos[1] > cos[0]).all()
    doubled_token = hypersphere_attention(torch.cat([q, q[:, :1]], 1), k, k, 3.0)
    torch.testing.assert_close(doubled_token[:, :2], base)


def test_rows_have_unit_norm_whatever_the_lengths():
    out = hypersphere_attention(5 * torch.randn(2, 6, 8), torch.randn(2, 9, 8), 7 * torch.randn(2, 9, 8), 30.0)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 6))


def test_the_length_of_queries_and_keys_does_not_matter():
    q, k, v = torch.randn(1, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    torch.testing.assert_close(hypersphere_attention(4 * q, k * torch.rand(1, 5, 1).add(0.1), v, 9.0),
                               hypersphere_attention(q, k, v, 9.0))


def test_gradients_are_right():
    """Analytic against numeric, in float64, through both normalisations and under a random upstream gradient."""
    q, k, v = (torch.randn(1, n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 4, 4))
    up = torch.randn(1, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: (hypersphere_attention(*a, 5.0) * up).sum(), (q, k, v))


def test_the_images_of_a_batch_do_not_see_each_other():
    """A batch is as good as its images one by one, masks and heads and all."""
    q, k, v, mask = *(torch.randn(3, 2, n, 4) for n in (3, 6, 6)), torch.rand(3, 6) < 0.7
    alone = [hypersphere_attention(q[i:i + 1], k[i:i + 1], v[i:i + 1], 9.0, mask[i:i + 1]) for i in range(3)]
    torch.testing.assert_close(hypersphere_attention(q, k, v, 9.0, mask), torch.cat(alone))


def test_a_masked_feature_is_as_good_as_gone():
    """In value and gradient; a token that may look at nothing is a zero row with a zero gradient."""
    q, k, v = (torch.randn(2, n, 4, requires_grad=True) for n in (3, 6, 6))
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    out, up = hypersphere_attention(q, k, v, 9.0, mask), torch.randn(2, 3, 4)
    torch.testing.assert_close(out[0], hypersphere_attention(q[:1], k[:1, :4], v[:1, :4], 9.0)[0])
    assert (out[1] == 0).all()
    for grad in torch.autograd.grad((out * up).sum(), (q, k, v)):
        assert (grad[1] == 0).all() and grad[0].abs().sum() > 0
    with pytest.raises(ValueError, match="with a batch dimension"):
        hypersphere_attention(q[0], k[0], v[0], 9.0, mask)


def test_a_key_that_does_not_count_may_point_at_the_query():
    """Hiding comes before the softmax: the one visible key weighs exp(-20) of a hidden one and still gives the answer."""
    q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    v, mask = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), torch.tensor([[False, True]])
    for kappa in (10.0, 1000.0):
        assert hypersphere_attention(q, k, v, kappa, mask).tolist() == [[[0.0, 1.0]]]


def test_half_precision_is_for_outside_only():
    """bf16 in and out, but cosines and weights in fp32: the error is the rounding of the ends, not kappa times it."""
    q, k, v = (torch.randn(1, n, 30).bfloat16() for n in (8, 200, 200))
    out = hypersphere_attention(q, k, v, 30.0)
    exact = hypersphere_attention(q.float(), k.float(), v.float(), 30.0)
    assert out.dtype == torch.bfloat16 and (out.float() - exact).abs().max() <= 2**-9
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hypersphere_attention(q.float(), k.float(), v.float(), 30.0)
    assert torch.equal(inside, exact)


def test_mean_shift_finds_the_modes_and_names_each_point():
    """Two bunches on a circle, one seed in each: the modes are the bunches' mean directions."""
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2])
    x = torch.stack([angles.cos(), angles.sin()], -1)
    modes, cluster = mean_shift(x, x[[0, 5]], 20.0, 30)
    assert torch.atan2(modes[:, 1], modes[:, 0]).tolist() == pytest.approx([0.1, 3.1], abs=1e-4)
    assert cluster.tolist() == [0, 0, 0, 1, 1, 1]


def test_small_kappa_has_one_mode_and_large_kappa_many():
    angles = torch.tensor([0.3, 2.2, 4.2])
    x = torch.stack([angles.cos(), angles.sin()], -1)
    spread = [torch.pdist(mean_shift(x, x, kappa, 100)[0]).min().item() for kappa in (0.5, 50.0)]
    assert spread[0] < 1e-2 and spread[1] > 1.0


@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_every_head_lives_on_the_sphere(kernels):
    """Before the out projection each head's output has unit length, so a token has norm sqrt(heads)."""
    module = HSAttn(24, 4, kernels=kernels)
    module.out = torch.nn.Identity()
    t = module(torch.randn(2, 5, 24), torch.randn(2, 9, 24), torch.randn(2, 9, 24))
    torch.testing.assert_close(t.norm(dim=-1), torch.full((2, 5), 2.0))


@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_each_head_is_equation_1_of_its_own_part_at_the_models_kappa(kernels):
    """Two heads of 4 numbers each, kappa 3: a head's share of q, k and v, sliced here by hand, through the formula."""
    module, q, k, v = HSAttn(8, 2, kappa=3.0, kernels=kernels), *(torch.randn(2, n, 8) for n in (5, 9, 9))
    q_, k_, v_ = module.q(q), module.k(k), module.v(v)
    heads = [hypersphere_attention(q_[..., part], k_[..., part], v_[..., part], 3.0) for part in (slice(4), slice(4, 8))]
    torch.testing.assert_close(module(q, k, v), module.out(torch.cat(heads, -1)))


def test_plain_attention_is_torchs():
    ours, theirs = Attn(24, 4), torch.nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    q, k, v = torch.randn(2, 5, 24), torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    torch.testing.assert_close(ours(q, k, v), theirs(q, k, v)[0])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide the width 24"):
        HSAttn(24, 5)
