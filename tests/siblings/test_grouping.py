"""The grouping layer: what its matrices sum to, that they are applied as if built, and what grouping is for."""

import pytest
import torch
import torch.nn.functional as F

from siblings.grouping import (Grouping, Seeds, Uniform, bilinear, children, compose, mean, neighbours, returned,
                               shares, unfolded, up)

KINDS = [dict(), dict(dense=True), dict(rel_bias=False), dict(dense=True, rel_bias=False), dict(gru=True),
         dict(grid=(2, 3)), dict(rounds=1)]


def layer(width=4, out=8, sharp=1.0, **numbers):
    """A grouping layer in float64 none of whose numbers is what it starts from; it does choose."""
    grouping = Grouping(width, out, **numbers).double()
    with torch.no_grad():
        for p in grouping.parameters():
            p.add_(0.3 * torch.randn_like(p))
        grouping.log_tau.add_(sharp)
    return grouping


def image(h=6, w=8, d=4, B=2):
    return torch.randn(B, h, w, d, dtype=torch.float64)


def chain(h=8, w=12):
    """Three layers as the model has them, local, local, dense, over (h,w) inputs -> their A_ups."""
    x, found = image(h, w), []
    for k, grouping in enumerate((layer(4, 8), layer(8, 16), layer(16, 32, dense=True))):
        x, A = grouping(x)
        found.append(A)
    return found


def matrix(A, h, w):
    """A of one image as the matrix (4hw,hw) it stands for, entry by entry."""
    if A.dim() == 2:
        return A
    M = torch.zeros(2 * h, 2 * w, h, w, dtype=A.dtype)
    for y, x, i, j in ((y, x, i, j) for y in range(2 * h) for x in range(2 * w) for i in range(h) for j in range(w)):
        di, dj = i - y // 2, j - x // 2                       # of the group from the input's own cell
        if max(abs(di), abs(dj)) <= 1:
            M[y, x, i, j] = A[y // 2, x // 2, 2 * (y % 2) + x % 2, 3 * (di + 1) + dj + 1]
    return M.view(4 * h * w, h * w)


# --- where things stand ---------------------------------------------------------------------------------------------
def test_children_and_neighbours_by_hand():
    """A map of 4x4 numbered 1..16: cell (0, 1) has 3 4 7 8; around cell (0, 0) of 2x2 are 0 0 0 / 0 1 2 / 0 3 4."""
    x = torch.arange(1.0, 17).view(1, 4, 4, 1)
    assert children(x)[0, ..., 0].tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]], [[9, 10, 13, 14], [11, 12, 15, 16]]]
    assert torch.equal(unfolded(children(x)), x)
    z = torch.arange(1.0, 5).view(1, 2, 2, 1)
    assert neighbours(z)[0, 0, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 2, 0, 3, 4]
    assert neighbours(z)[0, 1, 0, :, 0].tolist() == [0, 1, 2, 0, 3, 4, 0, 0, 0]


def test_returned_is_the_transpose_of_neighbours():
    """<neighbours(z), y> = <z, returned(y)> for any z and y, on a map that is wider than high."""
    z, y = image(3, 5), torch.randn(2, 3, 5, 9, 4, dtype=torch.float64)
    assert (neighbours(z) * y).sum().item() == pytest.approx((z * returned(y)).sum().item())


def test_the_gradients_of_both_written_by_hand_are_right():
    """Analytic against numeric, once and twice, on an oblong map."""
    for function, shape in ((neighbours, (2, 3, 4, 2)), (returned, (2, 3, 4, 9, 2))):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


# --- what A sums to -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("numbers", KINDS, ids=str)
def test_every_row_of_a_ups_sums_to_1_and_every_column_of_a_down(numbers):
    """Border cells too; no share is negative, and none goes to what is outside the map."""
    _, A = layer(**numbers)(image())
    assert A.shape == ((2, 48, 12) if numbers.get("dense") else (2, 3, 4, 4, 9)) and (A >= 0).all()
    for of_one in A:
        M = matrix(of_one, 3, 4)
        assert torch.allclose(M.sum(1), torch.ones(48).double())
        down = torch.stack([mean(A[:1] * 0 + of_one, x.view(1, 6, 8, 1)).flatten() for x in torch.eye(48).double()])
        assert torch.allclose(down.sum(0), torch.ones(12).double()) and torch.allclose(down, M / M.sum(0))


@pytest.mark.parametrize("h, w", [(8, 8), (16, 16), (24, 40)])
def test_composed_rows_sum_to_1(h, w):
    A = shares(chain(h, w), (h // 8, w // 8))
    assert A.shape == (2, h, w, h * w // 64) and (A >= 0).all()
    assert torch.allclose(A.sum(-1), torch.ones(2, h, w).double(), atol=1e-12)


def test_a_group_without_inputs_is_no_division_by_zero():
    A = torch.zeros(1, 1, 1, 4, 9, requires_grad=True)
    centre = mean(A, torch.ones(1, 2, 2, 3))
    centre.sum().backward()
    assert (centre == 0).all() and torch.isfinite(A.grad).all()


# --- applied as if it were built ------------------------------------------------------------------------------------
def test_up_and_mean_and_their_compositions_equal_the_explicit_matrices():
    """Paper's two equations: A_ups = A_2 A_3 A_4, and A_down of the three in turn, each transposed; a map of 8x16."""
    found, sides = chain(8, 16), [(4, 8), (2, 4), (1, 2)]
    for b in range(2):
        ups = [matrix(A[b], *side) for A, side in zip(found, sides)]
        downs = [M / M.sum(0) for M in ups]
        one, x = [A[b:b + 1] for A in found], image(8, 16, 5, B=1)
        for A, M, D, (h, w) in zip(one, ups, downs, sides):
            z, inputs = image(h, w, 5, B=1), image(2 * h, 2 * w, 5, B=1)
            assert torch.allclose(up(A, z)[0].flatten(0, 1), M @ z[0].flatten(0, 1))
            assert torch.allclose(mean(A, inputs)[0].flatten(0, 1), D.T @ inputs[0].flatten(0, 1))
        assert torch.allclose(shares(found, (1, 2))[b].flatten(0, 1), ups[0] @ ups[1] @ ups[2])
        z = image(1, 2, 3, B=1)
        assert torch.allclose(compose(one, z)[0].flatten(0, 1), ups[0] @ ups[1] @ ups[2] @ z[0].flatten(0, 1))
        y = mean(one[2], mean(one[1], mean(one[0], x)))
        assert torch.allclose(y[0].flatten(0, 1), downs[2].T @ downs[1].T @ downs[0].T @ x[0].flatten(0, 1))


def by_algorithm_1(grouping, x):
    """Groups (P,d') and A_ups (4P,P) of one image x (2h,2w,d), from the header's lines and full matrices alone."""
    h, w = x.shape[0] // 2, x.shape[1] // 2

    def norm(n, y):
        y = y - y.mean(-1, keepdim=True)
        return y / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * n.weight + n.bias

    if grouping.seeds.conv is not None:
        seeds = F.conv2d(x.permute(2, 0, 1)[None], grouping.seeds.conv.weight, stride=2, padding=1)
    else:
        seeds = F.interpolate(grouping.seeds.query_embed, size=(h, w), mode="bilinear")
    groups = norm(grouping.seeds.norm, seeds[0].flatten(1).T)                             # (P,d')
    inputs = norm(grouping.norm_in, x).flatten(0, 1)                                      # (4P,d)
    k, v = inputs @ grouping.k.weight.T, inputs @ grouping.v.weight.T
    M = torch.zeros(4 * h * w, h * w, dtype=x.dtype)
    for r, g in ((r, g) for r in range(4 * h * w) for g in range(h * w)):
        (y, x_), (i, j) = divmod(r, 2 * w), divmod(g, w)
        di, dj = i - y // 2, j - x_ // 2
        if grouping.dense:
            offset = torch.tensor([(y + 0.5) / 2 - (i + 0.5), (x_ + 0.5) / 2 - (j + 0.5)], dtype=x.dtype)
            M[r, g] = grouping.rel(offset)[0] if grouping.rel else 0
        elif max(abs(di), abs(dj)) > 1:
            M[r, g] = float("-inf")
        elif grouping.rel:
            M[r, g] = grouping.rel.weight[2 * (y % 2) + x_ % 2, 3 * (di + 1) + dj + 1]
    for _ in range(grouping.rounds):
        S = grouping.log_tau.exp() * k @ (norm(grouping.norm_q, groups) @ grouping.q.weight.T).T + M
        A = S.exp() / S.exp().sum(1, keepdim=True)
        step = norm(grouping.norm_mean, (A / A.sum(0)).T @ v)
        groups = grouping.gru(step, groups) if grouping.gru else groups + step
        fc1, fc2 = grouping.mlp.fc1, grouping.mlp.fc2
        groups = groups + norm(grouping.norm_mlp, F.gelu(groups @ fc1.weight.T + fc1.bias) @ fc2.weight.T + fc2.bias)
    return groups, A


@pytest.mark.parametrize("numbers", KINDS, ids=str)
@torch.no_grad()
def test_the_layer_is_algorithm_1(numbers):
    """Two images of 6x8 inputs: groups, and the A of the last round, which the last update no longer changes."""
    grouping, x = layer(**numbers), image()
    groups, A = grouping(x)
    for b in range(2):
        want, M = by_algorithm_1(grouping, x[b])
        assert torch.allclose(groups[b].flatten(0, 1), want) and torch.allclose(matrix(A[b], 3, 4), M)
        assert M.amax(1).mean() > 0.3                         # it chooses: no entry is right by being uniform


# --- by hand --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dense", [False, True])
def test_four_inputs_and_one_group_by_hand(dense):
    """All go to it, it is the mean of the four, and has moved by LN of the mean of v, and by LN of its MLP."""
    grouping, x = layer(dense=dense, rounds=1), image(2, 2, B=1)
    groups, A = grouping(x)
    centre = A.sum(-1)
    assert torch.allclose(centre, torch.ones_like(centre))
    v = grouping.v(grouping.norm_in(x)).mean((1, 2), keepdim=True)
    assert torch.allclose(mean(A, grouping.v(grouping.norm_in(x))), v)
    moved = grouping.seeds(x) + grouping.norm_mean(v)
    assert torch.allclose(groups, moved + grouping.norm_mlp(grouping.mlp(moved)))


@pytest.mark.parametrize("dense", [False, True])
def test_two_groups_by_hand(dense):
    """tau 1, k . q of 2 and 0: an input goes to the first by e² / (e² + 1) = .88, to the second by .12."""
    grouping = Grouping(1, 2, dense=dense, rel_bias=False)
    with torch.no_grad():
        grouping.log_tau.zero_()
    k = torch.tensor([2.0, 0]).expand(1, 2, 4, 2)
    q = torch.tensor([[[[1.0, 0], [0, 1]]]])                                              # (1,1,2,2)
    A = matrix(grouping.assign(k, q)[0], 1, 2)
    assert torch.allclose(A, torch.tensor([0.880797, 0.119203]).expand(8, 2), atol=1e-6)


def test_equal_logits_share_among_the_groups_that_are_there():
    """1/9 in the interior, 1/6 at a side, 1/4 at a corner, and all of it on groups that exist."""
    A = Grouping(1, 2, rel_bias=False).assign(torch.zeros(1, 6, 6, 2), torch.zeros(1, 3, 3, 2))[0]
    for i, j, share in [(1, 1, 1 / 9), (0, 1, 1 / 6), (2, 1, 1 / 6), (1, 0, 1 / 6), (0, 0, 1 / 4), (2, 2, 1 / 4)]:
        assert torch.allclose(A[i, j][A[i, j] > 0], torch.tensor(share)) and (A[i, j] > 0).sum() == round(4 / share)
    assert torch.equal(A > 0, (neighbours(torch.ones(1, 3, 3, 1))[0] > 0).mT.expand_as(A))


@pytest.mark.parametrize("dense, rel", [(False, 4 * 9), (True, 3 * 16 + 17)])
def test_how_many_numbers_a_layer_has(dense, rel):
    """d to 2d: the convolution 18 d², k and v 4, q 4, the MLP 16; norms and the MLP's biases 24 d; tau; B_rel."""
    count = sum(p.numel() for p in Grouping(24, 48, dense=dense).parameters())
    assert count == 42 * 24**2 + 24 * 24 + 1 + rel


@torch.no_grad()
def test_a_dense_layer_starts_near():
    """Of an offset (dy, dx) -2 (s(dy) + s(dx)) less than at home, s(t) = t erf(t/√2); equal logits give a grid."""
    grouping = Grouping(4, 8, dense=True)
    rel = grouping.rel(torch.tensor([[0.0, 0], [1, 0], [0, -1], [1, 1], [-2, 0]]))[:, 0]
    assert (rel - rel[0]).tolist() == pytest.approx([0, -1.3654, -1.3654, -2.7308, -3.8180], abs=0.02)
    A = grouping.assign(torch.zeros(1, 8, 6, 8), torch.zeros(1, 4, 3, 8))[0]
    homes = torch.arange(12).view(4, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(A.argmax(-1), homes.flatten())


@torch.no_grad()
def test_a_local_layer_starts_without_a_preference():
    assert Grouping(4, 8).rel.weight.abs().max() < 0.1


def test_tau_starts_where_attention_has_it():
    assert Grouping(8, 16).log_tau.exp().item() == pytest.approx(16**-0.5)


@torch.no_grad()
def test_a_large_tau_makes_a_tree():
    """Rows become one-hot, and so does their product: every pixel is in exactly one group."""
    sharp, x = [], image(16, 16, B=1)
    for grouping in (layer(4, 8, 12.0), layer(8, 16, 12.0), layer(16, 32, 12.0, dense=True)):
        x, A = grouping(x)
        assert (A.amax(-1) > 1 - 1e-9).float().mean() > 0.98
        sharp.append(F.one_hot(A.argmax(-1), A.shape[-1]).double())
    tree = shares(sharp, (2, 2))
    assert ((tree == 0) | (tree == 1)).all() and (tree.sum(-1) == 1).all()


# --- what it is for -------------------------------------------------------------------------------------------------
def colour_layer(width, dense):
    """Keys, queries and values are the colours: seeds are the mean colour of a cell, nothing else is learned."""
    grouping = Grouping(width, 2 * width, dense=dense, rel_bias=False)
    twice = torch.eye(width).repeat(2, 1)                                                 # (2 width, width)
    with torch.no_grad():
        grouping.seeds.conv.weight.zero_()[:, :, 1:, 1:] = twice[..., None, None] / 4     # the cell's own four inputs
        for linear in (grouping.k, grouping.v):
            linear.weight.copy_(twice)
        grouping.q.weight.copy_(torch.eye(2 * width))
        grouping.log_tau.fill_(2.0)
        grouping.norm_mlp.weight.zero_()
    return grouping


@torch.no_grad()
def test_groups_follow_a_border_where_a_grid_cannot():
    """Two flat colours on 32x32, their border at column 13, inside the second of four columns of groups.  Every pixel's
    likeliest group lies on the pixel's own side, and no more than a thousandth of it goes to the other; a uniform
    chain gives columns 13 to 15 to the group whose middle, 12, is on the other side."""
    left = (torch.arange(32) < 13).expand(32, 32)
    x = torch.stack([left, ~left], -1).float()[None]                                      # (1,32,32,2)
    found, uniform, y = [], [], x
    for width, dense in ((2, False), (4, False), (8, True)):
        y, A = colour_layer(width, dense)(y)
        found.append(A)
        uniform.append(bilinear(*y.shape[1:3]))
    side_of_group = (4 + 8 * torch.arange(4) < 13).repeat(4)                              # of their middles, (16)
    masks = shares(found, (4, 4))[0]                                                      # (32,32,16)
    assert torch.equal(side_of_group[masks.argmax(-1)], left)
    assert torch.where(left, masks[..., ~side_of_group].sum(-1), masks[..., side_of_group].sum(-1)).max() < 1e-3
    by_grid = side_of_group[shares(uniform, (4, 4))[0].argmax(-1)] == left
    assert not by_grid.all() and (~by_grid).any(0).nonzero().flatten().tolist() == [13, 14, 15]


# --- the uniform twin -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("h, w", [(1, 1), (2, 3), (4, 4)])
def test_uniform_groups_are_bilinear_up_sampling_three_times_in_turn(h, w):
    """And not once by eight, which is another thing."""
    z, sides = torch.randn(2, 5, h, w), [(4 * h, 4 * w), (2 * h, 2 * w), (h, w)]
    A = [bilinear(*side).expand(2, -1, -1, -1, -1) for side in sides]
    want = z
    for _ in range(3):
        want = F.interpolate(want, scale_factor=2, mode="bilinear", align_corners=False)
    said = compose(A, z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(said, want, atol=1e-6)
    assert all(torch.allclose(M.sum(-1), torch.ones(())) for M in A)
    once = F.interpolate(z, scale_factor=8, mode="bilinear", align_corners=False)
    assert h == 1 or not torch.allclose(said, once, atol=1e-2)


def test_the_shares_of_a_uniform_grouping_by_hand():
    """The upper left input of an inner cell: 9/16 to its own, 3/16 above and left, 1/16 to the corner between them."""
    A = bilinear(3, 3)[0, 1, 1] * 16
    assert A[0].tolist() == [1, 3, 0, 3, 9, 0, 0, 0, 0] and A[3].tolist() == [0, 0, 0, 0, 9, 3, 0, 3, 1]
    assert A[1].tolist() == [0, 3, 1, 0, 9, 3, 0, 0, 0] and A[2].tolist() == [0, 0, 0, 3, 9, 0, 1, 3, 0]


def test_a_uniform_layer_is_its_seeds_and_knows_no_image():
    uniform, x = Uniform(4, 8).double(), image()
    groups, A = uniform(x)
    assert torch.equal(groups, uniform.seeds(x)) and A.dtype == x.dtype and torch.equal(A[0], A[1])
    assert torch.equal(A, uniform(image())[1]) and A.shape == (2, 3, 4, 4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert uniform.float()(x.bfloat16())[1].dtype == torch.float32


# --- seeds, precision, gradients ------------------------------------------------------------------------------------
def test_seeds_see_what_is_there_or_are_learned():
    """Of the convolution they differ from image to image; learned ones, on a grid of any size, do not."""
    x = image()
    looks, learned = Seeds(4, 8).double(), Seeds(4, 8, (2, 2)).double()
    assert looks(x).shape == learned(x).shape == (2, 3, 4, 8)
    assert not torch.allclose(looks(x)[0], looks(x)[1]) and torch.equal(learned(x)[0], learned(x)[1])
    assert learned.conv is None and not torch.allclose(learned(x)[0, 0, 0], learned(x)[0, 2, 3])


@pytest.mark.parametrize("dense", [False, True])
def test_an_assignment_is_never_in_half_precision(dense):
    """Under bf16 its rows still sum to 1 to six digits, and the means are those of the same values in full."""
    grouping, x = layer(dense=dense).float(), image().float()
    with torch.autocast("cpu", torch.bfloat16):
        groups, A = grouping(x)
        again = grouping.moved(torch.zeros_like(groups), A, grouping.v(x))
        v = grouping.v(x)
    assert A.dtype == torch.float32 and (A.sum(-1) - 1).abs().max() < 1e-6 and v.dtype == torch.bfloat16
    assert torch.equal(again, grouping.norm_mean(mean(A, v.float())))
    k, q = (torch.randn(1, *side, 8).bfloat16() for side in ((6, 8), (3, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouping.assign(k, q), grouping.assign(k.float(), q.float()))


@pytest.mark.parametrize("numbers", KINDS, ids=str)
def test_every_parameter_gets_a_gradient_and_it_is_right(numbers):
    """Under a random upstream gradient of the groups and of A."""
    grouping, x = layer(2, 4, **numbers), image(4, 4, 2, B=1)
    groups, A = grouping(x)
    up_groups, up_A = torch.randn_like(groups), torch.randn_like(A)
    ((groups * up_groups).sum() + (A * up_A).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in grouping.parameters())
    assert torch.autograd.gradcheck(grouping, x.requires_grad_(), atol=1e-5)
