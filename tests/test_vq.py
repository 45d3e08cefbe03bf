"""Each feature takes the code it points to most, and gradients go where the text says."""

import math

import pytest
import torch
import torch.nn.functional as F

from data import rng_for
from vq import (RULES, assign, closest, codebook_health, commitment_loss, features_at, nearest, quantise, restart_dead_codes,
                straight_through, vMFVQ)


def test_a_feature_takes_the_code_it_points_to_most():
    """Codes east and north; the lengths of codes and features do not matter."""
    codes = torch.tensor([[0.01, 0.0], [0.0, 100.0]])
    index, code, cosine = assign(torch.tensor([[5.0, 1.0], [0.1, 0.2], [-3.0, 1.0]]), codes)
    assert index.tolist() == [0, 1, 1]
    assert code.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert cosine.tolist() == pytest.approx([5 / 26**0.5, 2 / 5**0.5, 1 / 10**0.5])


def test_assignment_does_not_change_with_the_length_of_x_or_of_a_code():
    x, codes = torch.randn(200, 32), torch.randn(16, 32)
    other = assign(x * torch.rand(200, 1).add(0.1), codes * torch.rand(16, 1).add(0.1))
    assert torch.equal(assign(x, codes)[0], other[0])


def test_it_is_the_mode_of_the_vmf_posterior_at_any_kappa():
    x, codes = F.normalize(torch.randn(50, 8), dim=-1), F.normalize(torch.randn(6, 8), dim=-1)
    for kappa in (0.5, 30.0):
        posterior = (kappa * x @ codes.T).softmax(-1)                         # over the codes
        assert torch.equal(posterior.argmax(-1), assign(x, codes)[0])


def test_ties_go_to_the_lowest_index():
    assert assign(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))[0].tolist() == [0]


def test_zero_and_nan_features_are_defined():
    """Zero: index 0, cosine 0.  NaN: index 0, cosine NaN."""
    index, code, cosine = assign(torch.tensor([[0.0, 0.0], [0.0, torch.nan]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    assert index.tolist() == [0, 0] and code.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]] * 2
    assert cosine[0] == 0 and cosine[1].isnan()


def test_a_code_opposite_to_the_feature_still_has_an_index():
    """All cosines are negative: the largest is the least opposite."""
    index, _, cosine = assign(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [-1.0, 1.0]]))
    assert index.tolist() == [1] and cosine.item() == pytest.approx(-0.5**0.5)


def test_by_dot_product_length_counts():
    """x = (2, 1): dot products 2 and 3 with (1, 0) and (0, 3), though the first points nearer."""
    x, codes = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert nearest(x, codes).tolist() == [1] and assign(x, codes)[0].tolist() == [0]


def test_three_metrics_three_codes():
    """x = (2, 1).  (3, 1.5) points the same way; (2, 0) lies nearest, 1 away; (0, 9) has the largest product, 9."""
    x, codes = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 1.5], [2.0, 0.0], [0.0, 9.0]])
    assert assign(x, codes)[0].tolist() == [0] and nearest(x, codes).tolist() == [2] and closest(x, codes).tolist() == [1]
    assert RULES == {"dot": nearest, "euclidean": closest}


def test_closest_is_argmin_of_the_distance():
    """Against torch.cdist, where no two distances are within rounding."""
    x, codes = torch.randn(200, 8, dtype=torch.float64), 3 * torch.randn(30, 8, dtype=torch.float64)
    assert torch.equal(closest(x, codes), torch.cdist(x, codes).argmin(1))


def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_x():
    x, code, up = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    zq = straight_through(x, code)
    torch.testing.assert_close(zq, code)
    (zq * up).sum().backward()
    torch.testing.assert_close(x.grad, up)
    assert code.grad is None


def test_the_loss_by_hand():
    """One pixel, W_pre the identity, x = (1, 0), the code at 60 degrees: |x - e|² = 1, mean over 2 channels .5."""
    vq = vMFVQ(2, 1, 2)
    with torch.no_grad():
        vq.pre.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        vq.pre.bias.zero_()
        vq.codebook.copy_(torch.tensor([[math.cos(math.pi / 3), math.sin(math.pi / 3)]]))
    tokens = vq(torch.tensor([3.0, 0.0]).view(1, 2, 1, 1))
    assert tokens.loss.item() == pytest.approx(0.5 + 0.25 * 0.5)


def test_the_codes_follow_the_features_four_times_as_fast_as_the_features_the_codes():
    """x = (1, 0), e = (0, 1), two numbers: dL/de = 2 (e - x) / 2 = (-1, 1); dL/dx = .25 (1, -1)."""
    x, code = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 1.0]], requires_grad=True)
    to_x, to_code = torch.autograd.grad(commitment_loss(x, code, 0.25).sum(), (x, code))
    assert to_code.tolist() == [[-1.0, 1.0]] and to_x.tolist() == [[0.25, -0.25]]


def test_quantise_is_the_assignment_and_the_loss_of_each_feature():
    """Three features, codes east and north: zq the unit codes, a loss each, 0 on its code; and beta reaches the loss."""
    x, codes = torch.tensor([[3.0, 0.0], [2.0, 1.0], [0.0, 1.0]]), torch.tensor([[9.0, 0.0], [0.0, 0.1]])
    zq, index, loss = quantise(x, codes)
    assert zq.tolist() == [[1, 0], [1, 0], [0, 1]] and index.tolist() == [0, 0, 1]
    apart = (2 - 4 / 5**0.5) / 2                              # |g(2,1) - east|² = 2 - 2 cos; mean of two numbers
    assert loss.tolist() == pytest.approx([0, 1.25 * apart, 0])
    assert quantise(x, codes, 1.0)[2].tolist() == pytest.approx([0, 2 * apart, 0])


def test_gradients_reach_the_features_through_zq_and_the_codes_through_the_loss():
    vq, u = vMFVQ(6, 5), torch.randn(2, 6, 4, 4)
    tokens = vq(u)
    (tokens.zq * torch.randn_like(tokens.zq)).sum().backward()
    assert vq.pre.weight.grad.abs().sum() > 0 and vq.codebook.grad is None
    vq(u).loss.mean().backward()
    assert vq.codebook.grad.abs().sum() > 0


def test_the_codebook_gradient_is_the_same_bits_every_time():
    """Thousands of features add up in a handful of codes; on two threads too, always in the same order."""
    threads, x, codes = torch.get_num_threads(), torch.randn(8192, 32), torch.randn(4, 32, requires_grad=True)
    torch.set_num_threads(2)
    up = torch.randn(8192, 32)
    grads = [torch.autograd.grad((assign(x, codes)[1] * up).sum(), codes)[0] for _ in range(10)]
    torch.set_num_threads(threads)
    assert all(torch.equal(grads[0], other) for other in grads)


QUANTISERS = {"vMFVQ": lambda: vMFVQ(6, 16, 4), "vMFVQ, plain": lambda: vMFVQ(6, 16, 4, kernels="plain"),
              "off the sphere": lambda: vMFVQ(6, 16, 4, metric="dot"),
              "nearest in space": lambda: vMFVQ(6, 16, 4, metric="euclidean")}           # 16 codes of 4


@pytest.mark.parametrize("kind", QUANTISERS)
def test_what_a_quantiser_returns_fits_together(kind):
    """Whatever the rule: zq is the code of the index, a loss each, x has the same index again, zq moves W_pre."""
    vq = QUANTISERS[kind]()
    tokens, codes = vq(torch.randn(2, 6, 3, 5)), vq.codes()
    assert tokens.zq.shape == tokens.x.shape == (2, 4, 3, 5) and codes.shape == (16, 4)
    assert tokens.index.shape == (2, 3, 5) and tokens.index.dtype == torch.int64 and tokens.index.unique().numel() > 4
    torch.testing.assert_close(tokens.zq, codes[tokens.index].permute(0, 3, 1, 2))
    assert torch.equal(vq.choose(tokens.x.permute(0, 2, 3, 1).flatten(0, 2), codes), tokens.index.flatten())
    assert tokens.loss.shape == (2, 3, 5)
    if vq.codebook is not None:                               # a rule without a codebook has nothing to lose
        x = F.normalize(tokens.x, dim=1) if vq.metric == "cosine" else tokens.x           # zq has the value of the code
        torch.testing.assert_close(tokens.loss, 1.25 * (x - tokens.zq).square().mean(1))
    (tokens.zq * torch.randn_like(tokens.zq)).sum().backward()
    assert vq.pre.weight.grad.abs().sum() > 0


def test_bf16_is_asked_by_the_quantisers_own_rule():
    """By dot product the long code takes everything; by cosine half the features lie on a border that bf16 moves."""
    codes, x = torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.001, 1.002]])
    counts, off = torch.tensor([0, 2]), vMFVQ(2, 2, 2, metric="dot")
    assert [codebook_health(counts, codes, x, *rule)["bf16"] for rule in ((), (off.choose,))] == [0.5, 1.0]


def test_without_vmf_length_matters():
    """Dot-product VQ: a long code wins over a parallel short one; its code is returned unnormalised."""
    vq = vMFVQ(2, 2, 2, metric="dot")
    with torch.no_grad():
        vq.pre.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        vq.pre.bias.zero_()
        vq.codebook.copy_(torch.tensor([[1.0, 0.0], [4.0, 4.0]]))
    tokens = vq(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1))                    # dot products 2 and 8; cosines 1 and .71
    assert tokens.index.item() == 1 and tokens.zq.flatten().tolist() == [4.0, 4.0]


def test_perplexity_and_cosine_by_hand():
    """Four codes used 2, 1, 1, 0 times: entropy 1.5 bits; the used ones at 0, 90 and 180 degrees: cosines 0, 0, -1."""
    codes = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.6, 0.8]])
    health = codebook_health(torch.tensor([2, 1, 1, 0]), codes)
    assert health["perplexity"] == pytest.approx(2**1.5) and health["used"] == 3
    assert health["cosine"] == pytest.approx(-1 / 3)


def test_perplexity_alone_is_fooled_by_a_collapsed_codebook_and_the_other_two_are_not():
    """All codes within about 1e-3 of one point: used evenly, yet cosine ~1 and most indices die in bf16."""
    codes = F.normalize(torch.ones(8, 32) + 1e-3 * torch.randn(8, 32), dim=-1)
    x = F.normalize(codes.repeat(50, 1) + 2e-5 * torch.randn(400, 32), dim=-1)
    counts = torch.bincount(assign(x, codes)[0], minlength=8)
    health = codebook_health(counts, codes, x)
    assert health["perplexity"] > 7 and health["cosine"] > 0.999 and health["bf16"] < 0.6
    apart = torch.randn(8, 32)
    assert codebook_health(counts, apart, apart.repeat(50, 1))["bf16"] == 1.0


def test_a_code_falls_behind_image_by_image_and_uses_make_up_for_as_many_as_they_were_expected_in():
    """Eight images, 80 features, two codes: an even share is 5 uses an image, a tenth of it .5.  Two uses make up for 4
    images of the 8, twenty for all and no more; 0 uses: 8 further behind."""
    codebook, idle = torch.zeros(2, 1), torch.tensor([10.0, 10.0])
    for counts, behind in (([78, 2], [0, 14]), ([60, 20], [0, 0]), ([80, 0], [0, 8])):
        put = restart_dead_codes(codebook, idle, torch.tensor(counts), torch.ones(2, 1), 8, 100, 0.1)
        assert idle.tolist() == pytest.approx(behind) and not put.any()


def test_only_codes_far_enough_behind_restart_and_begin_anew():
    """Four images a step, unused codes: 0, 4 and 4 behind become 4, 0 (it was used) and 8, which is the limit."""
    codebook, idle = torch.zeros(3, 2), torch.tensor([0.0, 4.0, 4.0])
    put = restart_dead_codes(codebook, idle, torch.tensor([0, 6, 0]), torch.full((3, 2), 9.0), 4, 8, 0.1)
    assert put.tolist() == [False, False, True]
    assert codebook.tolist() == [[0, 0], [0, 0], [9, 9]] and idle.tolist() == [4, 0, 0]


@pytest.mark.parametrize("features, codes", [(8192, 128), (512, 256)])
def test_a_code_used_as_expected_lives_in_every_stage(features, codes):
    """Ten steps of eight images with uses of a fifth of an even share: no code dies of a tenth, all die of a half."""
    for share, dies in ((0.1, False), (0.5, True)):
        codebook, idle, dead = torch.zeros(codes, 1), torch.zeros(codes), torch.zeros(codes, dtype=torch.bool)
        counts = torch.full((codes,), 0.2 * features / codes)
        counts[0] += features - counts.sum()
        for _ in range(20):
            dead |= restart_dead_codes(codebook, idle, counts, torch.ones(codes, 1), 8, 80, share)
        assert dead[1:].all() == dead[1:].any() == dies and not dead[0]


def test_a_code_that_has_not_begun_begins_on_a_feature_used_or_not_and_only_once():
    """Idle inf: it starts on its candidate in the first step, whatever it was chosen for; restart_after 0: only then.  A
    step without any feature changes nothing."""
    codebook, idle, candidates = torch.zeros(2, 1), torch.full((2,), torch.inf), torch.tensor([[3.0], [4.0]])
    assert restart_dead_codes(codebook, idle, torch.tensor([5, 0]), candidates, 2, 0, 0.1).all()
    assert codebook.tolist() == [[3], [4]] and idle.tolist() == [0, 0]
    for _ in range(3):
        assert not restart_dead_codes(codebook, idle, torch.tensor([1000, 0]), -candidates, 2, 0, 0.1).any()
    assert codebook.tolist() == [[3], [4]] and idle.tolist() == [0, 6]
    assert not restart_dead_codes(codebook, idle, torch.tensor([0, 0]), -candidates, 2, 80, 0.1).any()
    assert codebook.tolist() == [[3], [4]] and idle.isfinite().all()


def test_features_at_is_the_loop_over_whoever_holds_the_image():
    """As loops; an image that nobody here holds offers zeros, so the sum over processes is right."""
    x, numbers, all_ = torch.randn(3, 4, 5, 2), torch.tensor([12, 10, 17]), torch.ones(3, 5, 2, dtype=torch.bool)
    rng = rng_for(0)
    images, places = 10 + rng.integers(8, size=20), rng.random(20)
    expected = torch.zeros(20, 4)
    for k in range(20):
        for b in (numbers == int(images[k])).nonzero()[:, 0].tolist():
            expected[k] = x.flatten(2)[b, :, int(places[k] * 10)]
    found = features_at(x, all_, numbers, images, places)
    assert torch.equal(found, expected) and 0 < (found == 0).all(1).sum() < 20
    halves = [features_at(x[part], all_[part], numbers[part], images, places) for part in (slice(0, 1), slice(1, 3))]
    assert torch.equal(sum(halves), expected)
    assert torch.equal(features_at(x, all_, numbers, [17], [0.999999])[0], x[2, :, 4, 1])
    all_[2, :, 1], all_[2, 3:] = False, False                 # of image 17 three features of the first column are left
    thirds = features_at(x, all_, numbers, [17, 17, 17], [0.1, 0.5, 0.999999])
    assert torch.equal(thirds, x[2, :, :3, 0].T)


def test_a_codebook_that_is_given_goes_before_its_own():
    vq, other = vMFVQ(6, 5, 4), torch.randn(3, 4)
    tokens = vq(torch.randn(1, 6, 4, 4), other)
    torch.testing.assert_close(tokens.zq, F.normalize(other, dim=1)[tokens.index].permute(0, 3, 1, 2))
    assert torch.equal(vq.codes(other), F.normalize(other, dim=1)) and vq.codes().shape == (5, 4)
