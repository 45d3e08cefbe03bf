"""Up-sampling that looks, norms that listen, and one decoder for two tasks."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import decoder
from cli import InputError
from decoder import SPADE, CrossAttn, Decoder, DecoderBlock, DySample, PooledSelfAttn, Up, log2


def small(**changes):
    return Decoder(**{**dict(code_dim=8, query_width=12, width=16, heads=2, spade_hidden=8, patch=8, clip_heads=3,
                             scales=dict(early=4, mid=2, late=1)), **changes})


def codes():
    return {s: torch.randn(2, 8, n, n) for s, n in (("early", 16), ("mid", 8), ("late", 4), ("latent", 4))}


def test_dysample_with_zero_offsets_is_bilinear():
    up = DySample(8)
    torch.nn.init.zeros_(up.offset.weight)
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(up(x), F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
                               rtol=1e-5, atol=1e-5)


def test_dysample_reads_where_its_offset_points():
    """An offset of 4 x 0.25 = one old pixel to the right turns the sample at column j into the one at column j + 1."""
    up = DySample(4, groups=1)
    torch.nn.init.zeros_(up.offset.weight)
    with torch.no_grad():
        up.offset.bias.view(2, 4)[0] = 4.0                                    # x offsets of the four new pixels
    x = torch.randn(1, 4, 3, 6)
    plain = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up(x)[..., 1:-3], plain[..., 3:-1], rtol=1e-5, atol=1e-5)


def test_four_times_is_twice_twice():
    assert [len(Up(8, f)) for f in (1, 2, 4)] == [0, 1, 2]
    assert Up(8, 4)(torch.randn(1, 8, 3, 5)).shape == (1, 8, 12, 20)


def test_spade_without_gamma_and_beta_is_the_parameter_free_norm():
    spade = SPADE(6, 4)
    torch.nn.init.zeros_(spade.gamma_beta.weight)
    torch.nn.init.zeros_(spade.gamma_beta.bias)
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(spade(x, torch.randn(2, 3, 4, 6)), F.layer_norm(x, (6,)))


def test_spade_scales_by_one_plus_gamma_and_shifts_by_beta():
    spade = SPADE(2, 4)
    torch.nn.init.zeros_(spade.gamma_beta.weight)
    with torch.no_grad():
        spade.gamma_beta.bias.copy_(torch.tensor([2.0, 0.0, 0.0, 5.0]))       # gamma (2, 0), beta (0, 5)
    x = torch.tensor([3.0, 1.0]).view(1, 1, 1, 2)                             # its norm: (1, -1) up to epsilon
    assert spade(x, torch.zeros(1, 1, 1, 2)).flatten().tolist() == pytest.approx([3.0, 4.0], abs=1e-4)


def test_a_condition_is_read_even_where_every_hidden_unit_is_below_zero():
    """With a ReLU there it would be nobody's, and would never come back: no gradient reaches what feeds it."""
    spade, c = SPADE(6, 4), torch.randn(2, 3, 4, 6, requires_grad=True)
    with torch.no_grad():
        spade.shared.weight.mul_(0.1)
        spade.shared.bias.fill_(-1.0)
    spade(torch.randn(2, 3, 4, 6), c).square().sum().backward()
    assert (c.grad != 0).all() and spade.shared.weight.grad.abs().sum() > 1e-3


def test_pooled_attention_is_full_attention_on_pooled_keys():
    """On a map that is constant in 2x2 cells, pooling keys and values by 2 changes nothing at all."""
    attn = PooledSelfAttn(8, 2)
    y = torch.randn(1, 3, 3, 8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(attn(y, 2), attn(y, 1), rtol=1e-4, atol=1e-5)


def test_plain_block_is_torchs_pre_norm_layer():
    block, theirs = DecoderBlock(16, 2), torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True,
                                                                          norm_first=True)
    a = block.attn
    theirs.load_state_dict({
        "self_attn.in_proj_weight": torch.cat([a.q.weight, a.k.weight, a.v.weight]),
        "self_attn.in_proj_bias": torch.cat([a.q.bias, a.k.bias, a.v.bias]),
        "self_attn.out_proj.weight": a.out.weight, "self_attn.out_proj.bias": a.out.bias,
        "linear1.weight": block.mlp.fc1.weight, "linear1.bias": block.mlp.fc1.bias,
        "linear2.weight": block.mlp.fc2.weight, "linear2.bias": block.mlp.fc2.bias,
        **{f"norm{i}.{k}": getattr(getattr(block, f"norm{i}"), k) for i in (1, 2) for k in ("weight", "bias")}})
    y = torch.randn(2, 3, 4, 16)
    torch.testing.assert_close(block(y, 1).flatten(1, 2), theirs(y.flatten(1, 2)), rtol=1e-4, atol=1e-5)


def test_shapes_follow_ratios():
    out = small()(codes(), torch.randn(2, 5, 12))
    assert out["image"].shape == (2, 3, 32, 32)                               # grid 4, patch 8
    assert [m.shape for m in out["masks"]] == [(2, 5, 16, 16)] * 2            # two supervised outputs on the early grid
    assert [b.shape for b in out["bias"]] == [(2, 3, 5, 4, 4)] * 2
    assert len(small().eval()(codes(), torch.randn(2, 5, 12))["masks"]) == 1


@pytest.mark.parametrize("scales, early", [((4, 4, 4), 16), ((1, 1, 1), 4)])
def test_the_decoder_ends_on_the_early_grid(scales, early):
    zq = {s: torch.randn(1, 8, 4 * k, 4 * k) for s, k in zip(("early", "mid", "late"), scales)}
    decoder = small(scales=dict(zip(("early", "mid", "late"), scales)))
    out = decoder({**zq, "latent": torch.randn(1, 8, 4, 4)}, torch.randn(1, 5, 12))
    assert out["image"].shape[-1] == 32 and out["masks"][0].shape[-1] == early


def test_a_missing_stage_reads_as_zero():
    decoder, zq, q = small().eval(), codes(), torch.randn(2, 5, 12)
    without = {s: z for s, z in zq.items() if s != "mid"}
    torch.testing.assert_close(decoder(without, q)["image"],
                               decoder({**zq, "mid": torch.zeros_like(zq["mid"])}, q)["image"])
    assert not torch.equal(decoder(without, q)["image"], decoder(zq, q)["image"])


def test_a_removed_stage_keeps_its_up():
    decoder = small(stages=("late",))
    assert list(decoder.spade) == list(decoder.cross) == ["late"] and [len(decoder.up[s]) for s in decoder.up] == [0, 1, 1]
    assert decoder(codes(), torch.randn(2, 5, 12))["image"].shape == (2, 3, 32, 32)


def test_recomputing_keeps_less_and_changes_no_bit():
    """Outputs and every gradient the same bits, with less than two thirds of the numbers kept for the backward pass."""
    plain, again = small().train(), small(recompute=True).train()
    again.load_state_dict(plain.state_dict())
    zq, q, kept, grads, outs = codes(), torch.randn(2, 5, 12), [], [], []
    for model in (plain, again):
        kept.append(0)

        def count(x):
            kept[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            out = model({s: x.requires_grad_() for s, x in zq.items()}, q)
        outs.append([*out["masks"], *out["bias"], out["image"]])
        loss = sum(x.square().mean() for x in outs[-1])
        grads.append(torch.autograd.grad(loss, [*zq.values(), *model.parameters()]))
    assert all(map(torch.equal, outs[0], outs[1])) and all(map(torch.equal, grads[0], grads[1]))
    assert kept[1] < 2 / 3 * kept[0]


def test_recomputing_is_for_training_only(monkeypatch):
    ran = []
    monkeypatch.setattr(decoder, "checkpoint", lambda block, *inputs, use_reentrant: (ran.append(block), block(*inputs))[1])
    for training, recompute, times in ((True, True, 5), (True, False, 0), (False, True, 0)):
        small(recompute=recompute).train(training)(codes(), torch.randn(2, 5, 12))
        assert len(ran) == times                              # three SPADE blocks, two plain ones
        ran.clear()


def test_the_names_and_the_number_of_stages_are_the_scales():
    """Two stages of other names: the coarsest first on the way up, and `stages` picks among them by name."""
    decoder = small(scales=dict(fine=2, coarse=1), stages=("fine",))
    assert decoder.order == ["coarse", "fine"] and [len(decoder.up[s]) for s in decoder.order] == [0, 1]
    assert list(decoder.spade) == ["fine"] and list(small(scales=dict(fine=2, coarse=1)).spade) == ["coarse", "fine"]
    zq = dict(fine=torch.randn(2, 8, 8, 8), coarse=torch.randn(2, 8, 4, 4), latent=torch.randn(2, 8, 4, 4))
    out = decoder(zq, torch.randn(2, 5, 12))
    assert out["image"].shape == (2, 3, 32, 32) and out["masks"][0].shape == (2, 5, 8, 8)


def test_scales_that_are_no_powers_of_two_are_refused():
    with pytest.raises(InputError, match="factor of 3"):
        log2(3, "up-sampling")


@torch.no_grad()
@pytest.mark.parametrize("stages", [None, ("mid", "late"), ()], ids=str)
def test_the_decoder_is_the_headers_lines(stages):
    """Every line of Eq. 3 again in plain calls: y up, SPADE on the stage's codes, then the queries read that y; two heads."""
    decoder, zq, q0 = small(stages=stages).train(), codes(), torch.randn(2, 5, 12)
    last = lambda x: x.permute(0, 2, 3, 1)                                                # noqa: E731
    first = lambda x: x.permute(0, 3, 1, 2)                                               # noqa: E731
    y, q = decoder.lift["latent"](last(zq["latent"])), decoder.query(q0)
    for stage, finer in (("late", 1), ("mid", 2), ("early", 4)):
        y = last(decoder.up[stage](first(y)))
        if stages is None or stage in stages:
            y = decoder.spade[stage](y, finer, decoder.lift[stage](last(zq[stage])))
            q = decoder.cross[stage](q, y)
    between = decoder.norm(y)
    for block in decoder.plain:
        y = block(y, 4)
    y = decoder.norm(y)
    out = decoder(zq, q0)
    for i, seen in enumerate((between, y)):
        masks, bias = decoder.head(q, seen, last(F.avg_pool2d(first(seen), 4)))
        assert torch.equal(out["masks"][i], masks) and torch.equal(out["bias"][i], bias)
    assert torch.equal(out["image"], decoder.pixel_head(first(y)))
    alone = decoder.eval()(zq, q0)
    assert torch.equal(alone["masks"][0], out["masks"][1]) and len(alone["bias"]) == 1


@torch.no_grad()
def test_the_decoders_blocks_by_hand():
    """Two SPADEs before attention and MLP; queries read the map through a cross-attention whose norms come after."""
    block, y, c = DecoderBlock(16, 2, 8), torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 16)
    after = y + block.attn(block.norm1(y, c), 2)
    assert torch.equal(block(y, 2, c), after + block.mlp(block.norm2(after, c)))
    cross, q = CrossAttn(16, 2), torch.randn(1, 3, 16)
    after = cross.norm1(q + cross.attn(q, y.flatten(1, 2), y.flatten(1, 2)))
    assert torch.equal(cross(q, y), cross.norm2(after + cross.mlp(after)))


# --- Eq. 3 once more, from the weights alone: none of the modules' own forwards ---------------------------------------


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def normal(x, layer=None):
    """Mean 0 and variance 1 along the last axis, then the layer's scale and shift, if it has them."""
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x if layer is None else x * layer.weight + layer.bias


def twice(x, up):
    """(B,h,w,c) -> (B,2h,2w,c): a new pixel reads the old map where a bilinear x2 would, plus a quarter of its offset.

    Channels of the offset: group by group, x and y, and in each of these the 2x2 new pixels of an old one, row by row.
    """
    B, h, w, c = x.shape
    offset, wide, out = linear(x, nn_linear(up.offset)), c // up.groups, x.new_zeros(B, 2 * h, 2 * w, c)
    for b, k, i, j in itertools.product(range(B), range(up.groups), range(2 * h), range(2 * w)):
        dx, dy = offset[b, i // 2, j // 2].view(up.groups, 2, 4)[k, :, 2 * (i % 2) + j % 2].tolist()
        row = min(max((i + 0.5) / 2 - 0.5 + dy / 4, 0), h - 1)                            # the border repeats for ever
        column = min(max((j + 0.5) / 2 - 0.5 + dx / 4, 0), w - 1)
        for y, near in ((int(row), 1 - row % 1), (min(int(row) + 1, h - 1), row % 1)):
            for z, side in ((int(column), 1 - column % 1), (min(int(column) + 1, w - 1), column % 1)):
                out[b, i, j, k * wide:(k + 1) * wide] += near * side * x[b, y, z, k * wide:(k + 1) * wide]
    return out


def nn_linear(convolution):
    """A 1x1 convolution as the linear it is."""
    return SimpleNamespace(weight=convolution.weight[:, :, 0, 0], bias=convolution.bias)


def spade(x, c, m):
    """norm(x) * (1 + gamma(c)) + beta(c); gamma and beta from two 3x3 convolutions with a leaky ReLU between them."""
    c = F.conv2d(c.permute(0, 3, 1, 2), m.shared.weight, m.shared.bias, padding=1)
    c = torch.where(c < 0, 0.2 * c, c)
    gamma_beta = F.conv2d(c, m.gamma_beta.weight, m.gamma_beta.bias, padding=1).permute(0, 2, 3, 1)
    gamma, beta = gamma_beta[..., :x.shape[-1]], gamma_beta[..., x.shape[-1]:]
    return normal(x) * (1 + gamma) + beta


def read(q, x, m):
    """Each of q (B,n,c) reads x (B,P,c), head by head: softmax(Q Kᵀ / sqrt d) V."""
    q, k, v = linear(q, m.q), linear(x, m.k), linear(x, m.v)
    d, found = q.shape[-1] // m.heads, []
    for i in range(m.heads):
        mine = slice(i * d, (i + 1) * d)
        weights = (q[..., mine] @ k[..., mine].mT / d**0.5).exp()
        found.append(weights / weights.sum(-1, keepdim=True) @ v[..., mine])
    return linear(torch.cat(found, -1), m.out)


def two_layers(x, m):
    x = linear(x, m.fc1)
    return linear(x * (1 + torch.erf(x / 2**0.5)) / 2, m.fc2)                             # the exact GELU


def pooled(y, finer):
    """The mean of every finer x finer cells."""
    B, h, w, c = y.shape
    return y.view(B, h // finer, finer, w // finer, finer, c).mean((2, 4))


def block_on(y, finer, m, c=None):
    """Pre-norm; a map looks at itself on the side grid."""
    norm = normal if c is None else lambda x, layer: spade(x, c, layer)
    x = norm(y, m.norm1)
    y = y + read(x.flatten(1, 2), pooled(x, finer).flatten(1, 2), m.attn).view_as(y)
    return y + two_layers(norm(y, m.norm2), m.mlp)


def three_layers(x, m):
    for layer in m.layers[:2]:
        x = linear(x, layer).clamp(min=0)
    return linear(x, m.layers[2])


def equation_3(decoder, zq, q, scales, training):
    """The header, line by line -> masks, biases, the y that is repainted.  scales: of late, mid, early."""
    y, before, seen = linear(zq["latent"].permute(0, 2, 3, 1), decoder.lift["latent"]), 1, []
    q = linear(q, decoder.query)
    for stage, finer in zip(("late", "mid", "early"), scales):
        for k in range({1: 0, 2: 1, 4: 2}[finer // before]):
            y = twice(y, decoder.up[stage][k])
        c = zq[stage].permute(0, 2, 3, 1) if stage in zq else y.new_zeros(*y.shape[:3], decoder.code_dim)
        y = block_on(y, finer, decoder.spade[stage], linear(c, decoder.lift[stage]))
        m, before = decoder.cross[stage], finer
        q = normal(q + read(q, y.flatten(1, 2), m.attn), m.norm1)
        q = normal(q + two_layers(q, m.mlp), m.norm2)
    if training:
        seen.append(normal(y, decoder.norm))
    for block in decoder.plain:
        y = block_on(y, finer, block)
    seen.append(normal(y, decoder.norm))
    head, masks, biases = decoder.head, [], []
    for y in seen:
        asked, n = three_layers(q, head.query_mlp), head.clip_heads
        masks.append(torch.einsum("bqc,bhwc->bqhw", asked, three_layers(y, head.pix_mlp)))
        told = three_layers(pooled(y, finer), head.attn_mlp).chunk(n, -1)                 # a piece per head of CLIP
        biases.append(torch.stack([torch.einsum("bqc,bhwc->bqhw", asked, piece) for piece in told], 1)
                      * head.bias_scaling.weight + head.bias_scaling.bias)
    return masks, biases, y


@torch.no_grad()
@pytest.mark.parametrize("without", ["", "mid"], ids=["all stages", "mid is missing"])
@pytest.mark.parametrize("scales", [(4, 2, 1), (4, 4, 4), (1, 1, 1)], ids=str)
def test_the_decoder_is_equation_3_from_its_weights(scales, without):
    """In float64 to 1e-9 on an oblong grid, both supervised outputs and the one at test time; no weight is special."""
    names = ("early", "mid", "late")
    decoder = small(scales=dict(zip(names, scales))).double()
    for p in decoder.parameters():
        p.add_(0.1 * torch.randn_like(p))
    zq = {s: torch.randn(2, 8, 2 * k, 3 * k).double() for s, k in zip((*names, "latent"), (*scales, 1)) if s != without}
    q = torch.randn(2, 5, 12).double()
    for training in (True, False):
        out, (masks, biases, y) = decoder.train(training)(zq, q), equation_3(decoder, zq, q, scales[::-1], training)
        assert len(masks) == len(out["masks"]) == len(biases) == len(out["bias"]) == 1 + training
        for found, expected in zip((*out["masks"], *out["bias"]), (*masks, *biases)):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out["image"], decoder.pixel_head(y.permute(0, 3, 1, 2)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_new_dysample_is_bilinear_to_within_a_hundredth():
    """It learns to look elsewhere from there."""
    x = torch.randn(2, 8, 5, 7)
    assert (DySample(8)(x) - F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)).abs().max() < 0.01


def test_a_new_pixel_head_says_the_mean_image_whatever_it_is_given_and_still_listens():
    """CLIP's mean colour to within a fiftieth, and not exactly: with zero weights no gradient would reach the map."""
    out = small()(codes(), torch.randn(2, 3, 12))["image"]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    assert 1e-4 < (out - mean).abs().max() < 0.02
