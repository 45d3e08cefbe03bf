"""What aggregation.py promises: attention over places and over names, each against its formula written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from siblings.aggregation import Aggregation, ClassBlock, SwinBlock, Up, conv, each, linear_attention, shared


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < tolerance


# --- functions --------------------------------------------------------------------------------------------------------
def test_linear_attention_by_hand():
    """phi(0) = 1, phi(1) = 2: a query of 0 gives weights 1/3, 2/3; one of 1 the same, since it only scales them; phi(-log 2)
    is a half."""
    q, k = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
    assert linear_attention(q, k, torch.tensor([[3.0], [0.0]])).flatten().tolist() == pytest.approx([1, 1], abs=1e-5)
    k = torch.tensor([[0.0], [-0.6931472]])
    assert linear_attention(q, k, torch.tensor([[3.0], [0.0]])).flatten().tolist() == pytest.approx([2, 2], abs=1e-5)


def test_linear_attention_is_the_quadratic_form_and_its_weights_sum_to_one():
    q, k, v = torch.randn(3, 2, 5, 7, 4)
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)                           # (2,5,7,7)
    weights = weights / weights.sum(-1, keepdim=True)
    close(linear_attention(q, k, v), weights @ v)
    close(linear_attention(q, k, torch.ones_like(v)), torch.ones_like(v))
    assert not linear_attention(q - 1e4, k, v).isnan().any()                              # phi 0: nothing is divided by 0


def test_the_maps_of_all_names_pass_as_one_batch():
    """each: name by name; shared: what an image has goes to each of its own names."""
    x = torch.randn(2, 3, 4, 6, 5)
    conv2d = nn.Conv2d(4, 2, 3, 2)
    close(each(conv2d, x), torch.stack([torch.stack([conv2d(x[b, l][None])[0] for l in range(3)]) for b in range(2)]))
    a = torch.randn(2, 7)
    assert torch.equal(shared(a, 3), torch.stack([a[0]] * 3 + [a[1]] * 3))


@pytest.mark.parametrize("width, groups", [(128, 8), (64, 4), (16, 1), (8, 1), (50, 1), (512, 32)])
def test_norms_have_sixteen_channels_a_group_where_they_divide(width, groups):
    convolution, norm, act = conv(3, width)
    assert norm.num_groups == groups and convolution.bias is None and type(act) is nn.ReLU


# --- places -----------------------------------------------------------------------------------------------------------
def swin_by_hand(block, x, guide):
    """A block whose window covers the map (h,w,K): every place asks every place."""
    h, w, K = x.shape
    n = F.layer_norm(x, (K,), block.norm1.weight, block.norm1.bias).view(h * w, K)
    both = torch.cat([n, guide.view(h * w, -1)], 1)
    q, k, v = both @ block.qk.weight[:K].T + block.qk.bias[:K], both @ block.qk.weight[K:].T + block.qk.bias[K:], block.v(n)
    heads, d = block.heads, K // block.heads
    parts = [slice(i * d, i * d + d) for i in range(heads)]
    a = torch.cat([(q[:, s] @ k[:, s].T / d ** 0.5).softmax(-1) @ v[:, s] for s in parts], 1)
    x = x + block.out(a).view(h, w, K)
    n = F.layer_norm(x, (K,), block.norm2.weight, block.norm2.bias)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(n)))


@pytest.mark.parametrize("window, shift", [(4, 0), (5, 2)])
def test_a_block_over_places_by_hand(window, shift):
    block, x, guide = SwinBlock(6, 2, 3, window, shift), torch.randn(2, 4, 3, 6), torch.randn(2, 4, 3, 3)
    close(block(x, guide), torch.stack([swin_by_hand(block, *both) for both in zip(x, guide)]))
    assert block.mlp.fc1.out_features == 24


def test_shifted_windows_are_blocks_over_their_own_places():
    """8x4 in windows of 4 shifted by 2: rows 2 to 5 ask one another, the two rows above and below among themselves."""
    block, x, guide = SwinBlock(6, 3, 2, 4, 2), torch.randn(1, 8, 4, 6), torch.randn(1, 8, 4, 2)
    rows = [slice(0, 2), slice(2, 6), slice(6, 8)]
    close(block(x, guide)[0], torch.cat([swin_by_hand(block, x[0, s], guide[0, s]) for s in rows]))


def test_values_do_not_see_the_appearance():
    """Where every place weighs the same, guidance changes nothing; elsewhere it does."""
    block, x, guide = SwinBlock(6, 2, 3, 4, 0), torch.randn(1, 4, 4, 6), torch.randn(1, 4, 4, 3)
    assert (block(x, guide) - block(x, 2 * guide)).abs().max() > 1e-4
    nn.init.zeros_(block.qk.weight)
    assert torch.equal(block(x, guide), block(x, 2 * guide))


# --- names ------------------------------------------------------------------------------------------------------------
def names_by_hand(block, X, guide):
    """What a block adds at one place: X (L,K), guide (L,G) -> (L,K)"""
    K, L = X.shape[1], len(X)
    if block.pad > L:
        X = torch.cat([X, block.pad_token.expand(block.pad - L, K)])
        guide = torch.cat([guide, block.pad_guide.expand(block.pad - L, -1)])
    n = F.layer_norm(X, (K,), block.norm1.weight, block.norm1.bias)
    both, d = torch.cat([n, guide], 1), K // block.heads
    q, k, v = both @ block.qk.weight[:K].T + block.qk.bias[:K], both @ block.qk.weight[K:].T + block.qk.bias[K:], block.v(n)
    parts = []
    for s in (slice(i * d, i * d + d) for i in range(block.heads)):
        weights = (F.elu(q[:, s]) + 1) @ (F.elu(k[:, s]) + 1).T
        parts.append(weights / (weights.sum(1, keepdim=True) + 1e-6) @ v[:, s])
    X = X + torch.cat(parts, 1)
    first, second = block.mlp.layers
    return (X + second(F.relu(first(F.layer_norm(X, (K,), block.norm2.weight, block.norm2.bias)))))[:L]


@pytest.mark.parametrize("pad", [0, 3, 4, 9])
def test_a_block_over_names_by_hand(pad):
    """At test every place by itself; of 4 names, 9 are padded with 5 rows of the learned token, 3 and 4 with none."""
    block, x, guide = ClassBlock(6, 2, 3, 2, pad).eval(), torch.randn(2, 4, 6, 3, 5), torch.randn(2, 4, 3)
    want = x.clone()
    for b in range(2):
        for i in range(3):
            for j in range(5):
                want[b, :, :, i, j] += names_by_hand(block, x[b, :, :, i, j], guide[b])
    close(block(x, guide), want)
    assert block.mlp.layers[0].out_features == 24 and hasattr(block, "pad_token") == (pad > 0)


def test_in_training_names_meet_on_a_coarser_map():
    """4x6 places pooled by two, answered on 2x3, up-sampled corner to corner, added; an odd side keeps its last place."""
    block, x, guide = ClassBlock(6, 2, 3, 2, 0).train(), torch.randn(1, 4, 6, 4, 6), torch.randn(1, 4, 3)
    pooled = x[0].unflatten(-1, (3, 2)).unflatten(-3, (2, 2)).mean((-3, -1))               # (L,K,2,3)
    coarse = torch.stack([torch.stack([names_by_hand(block, pooled[:, :, i, j], guide[0]) for j in range(3)], -1)
                          for i in range(2)], -2)
    close(block(x, guide)[0], x[0] + F.interpolate(coarse, (4, 6), mode="bilinear", align_corners=True))
    x = torch.randn(1, 4, 6, 1, 3)                            # 1x3: pooled to two, the mean of two places and the third
    pooled = torch.stack([x[0, :, :, 0, :2].mean(-1), x[0, :, :, 0, 2]])                  # (2,L,K)
    coarse = torch.stack([names_by_hand(block, one, guide[0]) for one in pooled], -1)[..., None, :]
    close(block(x, guide)[0], x[0] + F.interpolate(coarse, (1, 3), mode="bilinear", align_corners=True))


def test_padding_learns_where_there_is_any_and_has_a_gradient_of_zero_where_there_is_none():
    """Not None: processes that wait for one another's gradients would wait for ever."""
    for pad, learns in ((9, True), (4, False)):
        block = ClassBlock(6, 2, 3, 2, pad)
        (block(torch.randn(1, 4, 6, 2, 2), torch.randn(1, 4, 3)) * torch.randn(1, 4, 6, 2, 2)).sum().backward()
        assert all((p.grad.abs().max() > 0) == learns for p in (block.pad_token, block.pad_guide))


def test_names_in_another_order_and_places_that_do_not_meet():
    block, x, guide, order = ClassBlock(6, 2, 3, 2, 7).eval(), torch.randn(1, 4, 6, 2, 2), torch.randn(1, 4, 3), [2, 0, 3, 1]
    close(block(x[:, order], guide[:, order]), block(x, guide)[:, order])
    other = x.clone()
    other[:, 0, :, 0, 0] += torch.randn(6)
    moved = (block(x, guide) != block(other, guide)).any(2)[0]                            # (L,h,w)
    assert moved[:, 0, 0].all() and moved.sum() == 4


# --- together ---------------------------------------------------------------------------------------------------------
def test_a_layer_is_places_then_names_and_the_second_block_is_shifted_by_half_a_window():
    """The appearance is normed once, and is the same for all names of an image."""
    layer, x = Aggregation(6, 2, 3, 4, 2, 0).eval(), torch.randn(2, 5, 6, 8, 4)
    appearance, names = torch.randn(2, 8, 4, 3), torch.randn(2, 5, 3)
    assert [(block.window, block.shift) for block in layer.spatial] == [(4, 0), (4, 2)] and layer.names.pool == 2
    guide = F.layer_norm(appearance, (3,), layer.norm.weight, layer.norm.bias)
    maps = [[x[b, l].movedim(0, -1)[None] for l in range(5)] for b in range(2)]
    for block in layer.spatial:
        maps = [[block(maps[b][l], guide[b:b + 1]) for l in range(5)] for b in range(2)]
    want = torch.stack([torch.stack([maps[b][l][0].movedim(-1, 0) for l in range(5)]) for b in range(2)])
    close(layer(x, appearance, names), layer.names(want, names))


def test_twice_as_fine_by_hand():
    """The map takes what the guide leaves of the width; two convolutions, each with norm and ReLU."""
    up, y, guide = Up(12, 6, 4), torch.randn(2, 3, 12, 2, 5), torch.randn(2, 4, 4, 10)
    assert up.up.out_channels == 8 and len(up.convs) == 6
    first, norm1, _, second, norm2, _ = up.convs
    for b in range(2):
        for l in range(3):
            x = torch.cat([up.up(y[b, l][None]), guide[b:b + 1]], 1)
            x = F.relu(norm2(second(F.relu(norm1(first(x))))))
            close(up(y, guide)[b, l], x[0])
