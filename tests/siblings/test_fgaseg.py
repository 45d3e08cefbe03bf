"""FGAseg, worked by hand: each equation against itself written out name by name, and what its LCS can and cannot say."""

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from cli import InputError
from data import IGNORE
from predict import name_pixels
from guards.starting import warm_start
from runs import build, changed, fingerprint, preset, trained_state
from san import trainable
from segmenter import Batch
from siblings import fgaseg as S
from studies.speed import watch
from tests.helpers import save_run
from tests.test_segmenter import first_gradients, micro_batches, small


def text(L=5, E=64):
    return F.normalize(torch.randn(L, E), dim=-1)


def images(n=2, h=64, w=64):
    return torch.randn(n, 3, h, w)


@pytest.fixture
def net():
    """Small, its numbers all at random: what starts at zero, or small, would hide what it is for."""
    return varied(build(small("fgaseg").run))


def varied(net):
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad and p.ndim < 3:
                p.add_(0.2 * torch.randn_like(p))
    return net.eval()


def close(a, b, tolerance=1e-4):
    assert a.shape == b.shape and (a - b).abs().max() < tolerance * max(1, b.abs().max())


# --- sizes ------------------------------------------------------------------------------------------------------------
def count(*modules):
    return sum(trainable(module) for module in modules)


def parts(net):
    return {"guidance": count(net.guidance), "P2Tformer": count(net.p2t), "T2P": count(net.t2p), "LCS": count(net.lcs),
            "embeddings": count(net.embed, net.embed_local), "fusion": count(net.fuse), "local": count(net.local_up),
            "projections": count(net.project, net.appearance, net.words), "aggregation": count(net.aggregation),
            "decoder": count(net.ups, net.head), "q, v": count(net.vlm.tuned), "auxiliary": count(net.aux)}


@pytest.mark.parametrize("name, sizes, total", [
    ("world", (49_200, 20_992, 75_329, 37_505, 3_200, 4_688, 6_736, 23_436, 86_528, 12_685, 196_608, 723), 516_907),
    ("coco", (2_359_680, 1_314_816, 4_788_737, 2_364_417, 12_800, 74_048, 106_816, 747_824, 1_354_240, 200_497,
              14_155_776, 2_883), 27_479_651),
    ("coco-large", (3_146_112, 2_955_264, 10_771_201, 5_316_097, 12_800, 74_048, 106_816, 1_075_504, 1_354_240, 200_497,
                    50_331_648, 2_883), 75_344_227)])
def test_the_sizes_are_pinned(name, sizes, total):
    """Part by part, and without the auxiliary heads in all; positions, keys and the text tower stay CLIP's."""
    with torch.device("meta"):
        net = build(preset(name, "fgaseg", pretrained="none"))
    assert tuple(parts(net).values()) == sizes and trainable(net) == total + sizes[-1]
    assert net.stride == (8 if name == "world" else 16) and not any(p.requires_grad for p in net.vlm.model.parameters())


def test_cat_seg_is_what_is_left_without_the_three():
    """`blank`: a name's cosines alone; `frozen` trains the rest; each switch takes its own part away."""
    nets = {row: build(changed(preset("world", "fgaseg", pretrained="none"), **numbers))
            for row, numbers in S.FGASeg.ABLATIONS.items()}
    full, missing = 516_907 + 723, {"no-p2t": 20_992, "no-t2p": 75_329, "no-lcs": 37_505 + 1_600 + 4_688 + 6_736}
    for row, less in missing.items():
        assert trainable(nets[row]) == full - less
    assert trainable(nets["blank"]) == full - sum(missing.values()) and nets["fusion-add"].fuse[0].linear is None
    assert trainable(nets["frozen"]) == full and nets["frozen"].rates == {"vlm.tuned.": 0.0}
    assert nets["lcs-linear"].rates == {"vlm.tuned.": 0.1} and not nets["lcs-linear"].lcs.softmax and nets["frozen"].lcs.softmax


def test_shapes_of_the_world_and_the_start_where_one_name_of_49_is_there():
    net, words = build(preset("world", "fgaseg", pretrained="none")).train(), text(49)
    out = net(images(), words)
    assert out["logits"].shape == out["t2p"].shape == (2, 49, 32, 32)
    assert out["gcs"].shape == out["lcs"].shape == (2, 49, 8, 8)
    assert [tuple(o.shape[2:]) for o in out["aux"]] == [(8, 8), (8, 8), (16, 16)]
    assert all(head.bias.item() == pytest.approx(-math.log(48)) for head in (net.head, *net.aux))
    net.eval()
    assert net(images(1, 72, 40), words[:3])["logits"].shape == (1, 3, 36, 20)


# --- names look at the image ------------------------------------------------------------------------------------------
def test_positions_by_hand():
    """E = 8: two rates, 1 and 1/100; of two rows the second stands at 2 pi, of one column the only one too."""
    found = S.sine_positions((2, 1), torch.zeros(1, 8))
    want = [[math.sin(u / r) if even else math.cos(u / r) for u in (y, 2 * math.pi) for r in (1, 100) for even in (1, 0)]
            for y in (math.pi, 2 * math.pi)]
    close(found, torch.tensor(want), 1e-5)
    wide = S.sine_positions((3, 4), torch.zeros(12, 16))
    assert wide.shape == (12, 16) and torch.equal(wide[0, :8], wide[3, :8]) and torch.equal(wide[0, 8:], wide[8, 8:])


def test_the_p2tformer_by_hand():
    """Two layers: the second asks with what the first said; the sum at the end is with the first text again."""
    module, T, f = varied(S.P2Tformer(8, 2, 2)), text(3, 8).expand(2, -1, -1), torch.randn(2, 8, 2, 3)
    t, x = T, f.flatten(2).mT
    for attn, mix, norm in zip(module.attn, module.mix, module.norm):
        t = norm(t + mix(attn(t, x + S.sine_positions((2, 3), x), x)))
    assert len(module.attn) == 2
    close(module(T, f), T + module.gamma * t, 1e-6)


def test_the_p2tformer_starts_gently_and_no_name_sees_another():
    module, T, f = S.P2Tformer(8, 2, 1), text(3, 8)[None], torch.randn(1, 8, 2, 3)
    assert module.gamma.tolist() == pytest.approx([0.1] * 8)
    assert all(layer.weight.abs().max() <= (6 / 16) ** 0.5 for layer in module.modules() if isinstance(layer, nn.Linear))
    assert max(layer.weight.abs().max() for layer in module.modules() if isinstance(layer, nn.Linear)) > 8 ** -0.5
    close(module(T[:, 1:2], f), module(T, f)[:, 1:2], 1e-6)


def test_where_gamma_is_zero_likeness_is_the_cosine_of_clips_dense_features(net):
    """And with any gamma F goes on as it is: only the names have moved."""
    image, words = images(), text()
    f, _ = net.look(image)
    cosine = torch.einsum("le,behw->blhw", words, F.normalize(f, dim=1))
    assert (net(image, words)["gcs"] - cosine).abs().max() > 0.05
    close(net(image, words)["gcs"], S.cosines(net.p2t(words.expand(2, -1, -1), f), f), 1e-6)
    nn.init.zeros_(net.p2t.gamma)
    close(net(image, words)["gcs"], cosine, 1e-6)


# --- the three likenesses ---------------------------------------------------------------------------------------------
def test_global_likeness_by_hand():
    """Names (1, 0) and (0, 2), places (3, 4) and (0, -5): cosines .6 .8 and 0 -1.  Lengths say nothing."""
    names, f = torch.tensor([[[1.0, 0], [0, 2]]]), torch.tensor([[3.0, 0], [4, -5]]).view(1, 2, 1, 2)
    close(S.cosines(names, f)[0, :, 0], torch.tensor([[0.6, 0], [0.8, -1]]), 1e-6)
    close(S.cosines(7 * names, f), S.cosines(names, 7 * f), 1e-6)
    assert S.cosines(torch.randn(2, 3, 9), torch.randn(2, 9, 5, 4)).abs().max() <= 1 + 1e-6


def kernel_of(module, bias):
    """The module with this bias b_t for name t, whatever its kernels: names are the rows of an identity matrix."""
    with torch.no_grad():
        module.kernel.bias[-1] = 0
        module.kernel.weight[-1] = torch.tensor(bias)
    return module


def test_f1_on_flat_features_all_that_lcs_says_of_a_name_is_its_bias():
    """A map that is (.6, .8) everywhere, kernels at random: taps sum to 1 in each channel, so that every place but those
    at the border has b_t + .6 + .8: 1.5 for b = .1, 1.2 for -.2.  Without the softmax names differ by more than that."""
    names, f = torch.eye(2)[None], torch.tensor([0.6, 0.8]).view(1, 2, 1, 1).expand(1, 2, 5, 6)
    for k, inside in ((3, slice(1, -1)), (5, slice(2, -2)), (1, slice(None))):
        module = kernel_of(S.LocalSimilarity(2, k, softmax=True), [0.1, -0.2])
        nn.init.normal_(module.kernel.weight[:-1])
        said = module(names, 3 * f)[0, :, inside, inside]                                 # F is normed here, too
        close(said, torch.tensor([1.5, 1.2])[:, None, None].expand_as(said), 1e-5)
    linear = kernel_of(S.LocalSimilarity(2, 3, softmax=False), [0.1, -0.2])
    nn.init.normal_(linear.kernel.weight[:-1])
    said = linear(names, f)[0, :, 2, 2]
    assert abs(said[0] - said[1] - 0.3) > 0.01


def test_f1_with_kernels_of_one_tap_the_image_says_nothing_of_names():
    """k = 1: the softmax of one number is 1, so at every place two names differ by their biases, on any features."""
    module, names, f = S.LocalSimilarity(8, 1, softmax=True), text(3, 8)[None], torch.randn(1, 8, 4, 5)
    said, (_, bias) = module(names, f)[0], module.kernels(names)
    close(said - said[:1], (bias[0] - bias[0, :1])[:, None, None].expand_as(said), 1e-5)
    close(said, F.normalize(f, dim=1).sum(1) + bias[0][:, None, None], 1e-5)


def test_f1_what_is_left_of_a_kernel_is_a_derivative():
    """S^l = b_t + Σ_c x_c + Σ_c Σ_tap ŵ (x_tap - x), inside: the last is 0 on a flat map, and it alone has the kernel."""
    module, names, f = S.LocalSimilarity(8, 3, softmax=True), text(3, 8)[None], torch.randn(1, 8, 5, 5)
    taps, bias = module.kernels(names)
    assert torch.allclose(taps.sum((-1, -2)), torch.ones(1, 3, 8)) and taps.min() > 0
    x = F.normalize(f, dim=1)[0]
    steps = torch.stack([torch.stack([x.roll((-i, -j), (1, 2)) - x for j in (-1, 0, 1)]) for i in (-1, 0, 1)])
    want = bias[0][:, None, None] + x.sum(0) + torch.einsum("lcij,ijchw->lhw", taps[0], steps)
    close(module(names, f)[0, :, 1:-1, 1:-1], want[:, 1:-1, 1:-1], 1e-5)


@pytest.mark.parametrize("k, softmax", [(3, True), (5, False), (1, False)])
def test_local_likeness_is_a_convolution_for_each_image_and_each_name(k, softmax):
    """Zeros around; the kernel of a name does not ask how long it is."""
    module, names, f = S.LocalSimilarity(6, k, softmax), torch.randn(2, 3, 6), torch.randn(2, 6, 4, 5)
    said = module(names, f)
    for b in range(2):
        for l in range(3):
            numbers = module.kernel.weight @ F.normalize(names[b, l], dim=0) + module.kernel.bias
            taps = numbers[:-1].view(6, k * k)
            taps = (taps.softmax(-1) if softmax else taps).view(1, 6, k, k)
            one = F.conv2d(F.normalize(f[b:b + 1], dim=1), taps, padding=k // 2)[0, 0] + numbers[-1]
            close(said[b, l], one, 1e-5)
    close(module(7 * names, 7 * f), said, 1e-5)


def test_a_text_kernel_with_its_centre_alone_is_a_dot_product():
    """T2P: a name as it is, not its direction, is 3x3 taps for E/2 channels of a map four times as fine, and a bias."""
    module, names, f = S.T2P(8), torch.randn(2, 3, 8), torch.randn(2, 8, 3, 2)
    fine = module.refine(f)
    assert fine.shape == (2, 4, 12, 8)
    with torch.no_grad():
        rows = torch.arange(36).view(4, 9)
        module.kernel.weight[rows[:, [0, 1, 2, 3, 5, 6, 7, 8]].flatten()] = 0
        module.kernel.bias[:-1] = 0
    centre = names @ module.kernel.weight[rows[:, 4]].T                                   # (2,3,4)
    bias = names @ module.kernel.weight[-1] + module.kernel.bias[-1]
    close(module(names, f), torch.einsum("blc,bchw->blhw", centre, fine) + bias[..., None, None], 1e-5)


def test_what_the_text_kernels_see_by_hand():
    """Twice as fine, convolved, normed, ReLU; again, to half the width; one linear."""
    module, f = varied(S.T2P(32)), torch.randn(1, 32, 2, 3)
    convs = [layer for layer in module.refine if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in module.refine if isinstance(layer, nn.GroupNorm)]
    x = f
    for convolution, norm in zip(convs, norms):
        x = F.relu(norm(convolution(F.interpolate(x, scale_factor=2, mode="bilinear"))))
    assert [norm.num_groups for norm in norms] == [2, 1] and [c.out_channels for c in convs] == [32, 16, 16]
    close(module.refine(f), convs[2](x), 1e-5)


def test_at_test_there_is_no_t2p_and_no_auxiliary_map(net, monkeypatch):
    assert set(net.train()(images(), text())) == {"logits", "gcs", "lcs", "t2p", "aux"}
    monkeypatch.setattr(net.t2p, "forward", None)
    for head in net.aux:
        monkeypatch.setattr(head, "forward", None)
    assert set(net.eval()(images(), text())) == {"logits", "gcs", "lcs"}


# --- from likenesses to masks -----------------------------------------------------------------------------------------
def by_hand(net, image, words):
    """One image, its names one by one wherever they do not meet -> logits and the three auxiliary maps, and T2P."""
    f, maps = net.look(image)
    T = words[None] if net.p2t is None else net.p2t(words[None], f)
    fuses = [lambda a, b: a, lambda a, b: a, lambda a, b: a]
    if net.lcs is not None:
        fuses = [lambda a, b, fuse=fuse: a + b if fuse.linear is None else fuse.linear(torch.cat([a, b])[None])[0]
                 for fuse in net.fuse]
    global_, local = [net.embed(s[None, None])[0] for s in S.cosines(T, f)[0]], [None] * len(words)
    if net.lcs is not None:
        local = [net.embed_local(s[None, None])[0] for s in net.lcs(T, f)[0]]
    e = [fuses[0](*pair) for pair in zip(global_, local)]
    x = torch.stack(e)[None]
    near = net.appearance(f).clamp(min=0).movedim(1, -1)
    for layer in net.aggregation:
        x = layer(x, near, net.words(F.normalize(T, dim=-1)).clamp(min=0))
    r = [net.project[i](net.guidance[i](maps[i])).clamp(min=0) for i in range(2)]
    logits, o = [], [[], [], []]
    for l in range(len(words)):
        o[0].append(net.aux[0](e[l][None])[0, 0])
        y = fuses[1](x[0, l], local[l])
        o[1].append(net.aux[1](y[None])[0, 0])
        y = net.ups[0](y[None, None], r[0])[0, 0]
        y = fuses[2](y, None if local[l] is None else net.local_up(local[l][None])[0])
        o[2].append(net.aux[2](y[None])[0, 0])
        logits.append(net.head(net.ups[1](y[None, None], r[1])[0])[0, 0])
    return torch.stack(logits), [torch.stack(maps) for maps in o], T


@pytest.mark.parametrize("row", ["full", "fusion-add", "no-lcs", "no-p2t", "blank", "lcs-linear"])
@torch.no_grad()
def test_the_way_from_likeness_to_logits_by_hand(row):
    """Each image by itself, each name by itself where names do not meet; in training with its auxiliary maps and T2P."""
    net = varied(build(small("fgaseg", **S.FGASeg.ABLATIONS.get(row, {})).run))
    image, words = images(2, 64, 48), text(4)
    for training in (False, True):
        out = net.train(training)(image, words)
        for b in range(2):
            logits, o, T = by_hand(net, image[b:b + 1], words)
            close(out["logits"][b], logits)
            if training:
                for ours, want in zip(out["aux"], o, strict=True):
                    close(ours[b], want)
                if net.t2p is not None:
                    close(out["t2p"][b], net.t2p(T, net.look(image[b:b + 1])[0])[0])


@torch.no_grad()
def test_every_number_of_the_model_reaches_its_place():
    """Of the Config: none is read twice, none is forgotten."""
    net = build(preset("world", "fgaseg", pretrained="none", hidden=24, guide=10, agg_layers=3, agg_heads=3, window=6,
                       pool=4, pad=7, p2t_layers=2, p2t_heads=8, lcs_kernel=5, guidance=(12, 20), guidance_proj=(6, 2),
                       decoder_widths=(14, 18)))
    layer = net.aggregation[2]
    assert len(net.aggregation) == 3 and (layer.names.pool, layer.names.pad, layer.names.heads) == (4, 7, 3)
    assert layer.norm.normalized_shape == (10,)
    assert [b.heads for b in layer.spatial] == [3, 3] and layer.spatial[1].shift == 3
    assert len(net.p2t.attn) == 2 and net.p2t.attn[1].heads == 8 and net.lcs.k == 5
    assert [(g.out_channels, g.stride[0], g.kernel_size[0]) for g in net.guidance] == [(12, 2, 2), (20, 4, 4)]
    assert [p.out_channels for p in net.project] == [6, 2] and [h.in_channels for h in net.aux] == [24, 24, 14]
    assert net.head.in_channels == 18 and net.local_up[0].out_channels == 12
    assert net(images(1), text(3))["logits"].shape == (1, 3, 32, 32)


def test_logits_are_answered_as_they_are_and_below_a_half_is_none_of_these(net):
    out = dict(logits=torch.tensor([[[[-1.0, 0.6]], [[-0.5, 0.2]]]]).repeat(2, 1, 1, 1))
    out["logits"][0] = 9
    answer = net.answer(out, 1)
    assert name_pixels(answer, (1, 2), (1, 2), (1, 2)).tolist() == [[1, 0]]
    assert name_pixels(answer, (1, 2), (1, 2), (1, 2), none_of_these=True).tolist() == [[-1, 0]]


# --- names that are given up ------------------------------------------------------------------------------------------
def test_who_survives_by_hand():
    """Three names at two places, the best two of each: 0 and 2 at the first, 2 and 0 at the second; the best one: 0, 2."""
    o = torch.tensor([[[[5.0, 1.0]], [[0.0, 0.0]], [[4.0, 2.0]]]])
    assert S.survivors(o, 2).tolist() == S.survivors(o, 1).tolist() == [[0, 2]]
    assert S.survivors(o, 9).tolist() == [[0, 1, 2]]


@torch.no_grad()
def test_as_many_as_there_are_names_is_the_whole_model():
    config, image, words = small("fgaseg").run, images(), text(6)
    torch.manual_seed(1)
    whole = varied(build(config))
    torch.manual_seed(1)
    some = varied(build(changed(config, topk=6)))
    close(some(image, words)["logits"], whole(image, words)["logits"], 1e-5)
    some.config.topk = 1                                      # nobody is given up in training
    assert torch.equal(some.train()(image, words)["logits"], whole.train()(image, words)["logits"])


@torch.no_grad()
def test_names_that_win_nowhere_are_given_up_as_if_nobody_had_asked_for_them(net, monkeypatch):
    """Two images, each its own, where every head drops two names, the least on average: twelve, ten, eight, six.  Those whom
    the first head keeps are answered as if only they were asked; later ones are at -100 too, but were heard by the rest."""
    def best(o):
        return o.mean((1, 2)).topk(len(o) - 2).indices.sort().values

    monkeypatch.setattr(S, "survivors", lambda o, k: best(o[0])[None])
    net.config.topk, image, words = 1, images(), text(12)
    out = net(image, words)
    net.config.topk = 0
    for b in range(2):
        first = best(by_hand(net, image[b:b + 1], words)[1][0])
        logits, heads, _ = by_hand(net, image[b:b + 1], words[first])
        second = best(heads[1])
        third = best(heads[2][second])
        alive = first[second][third]
        close(out["logits"][b, alive], logits[second[third]])
        assert ((out["logits"][b] == S.DROPPED).flatten(1).all(1).nonzero().flatten().tolist() ==
                sorted(set(range(12)) - set(alive.tolist()))) and len(alive) == 6
    assert out["gcs"].shape == (2, 12, 8, 8)


@torch.no_grad()
def test_beyond_the_bound_names_that_are_nowhere_alike_get_no_map(net):
    """Of six at most four, each image its own by its best place; they are answered as if only they were asked."""
    net.config.most_names, image, words = 4, images(), text(6)
    out = net(image, words)
    f, _ = net.look(image)
    best = S.cosines(net.p2t(words.expand(2, -1, -1), f), f).flatten(2).max(-1).values    # (2,6)
    for b in range(2):
        kept = best[b].argsort(descending=True)[:4]
        close(out["logits"][b, kept], net(image[b:b + 1], words[kept])["logits"][0])
        assert (out["logits"][b] == S.DROPPED).flatten(1).all(1).sum() == 2
    assert [tuple(out[name].shape[:2]) for name in ("gcs", "lcs")] == [(2, 6), (2, 4)]
    out = net.train()(image, words)
    assert out["aux"][0].shape[1] == out["t2p"].shape[1] == 6
    assert (out["aux"][0] == S.DROPPED).flatten(2).all(-1).sum() == 4


@torch.no_grad()
def test_the_bound_asks_for_a_names_best_place_by_hand(net, monkeypatch):
    """Five names, four go on: name 0 is least alike on the whole, but most at one place; name 1 is nowhere more than .1."""
    likeness = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).view(1, 5, 1, 1).repeat(1, 1, 8, 8)
    likeness[0, 0, 3, 5] = 0.9
    monkeypatch.setattr(S, "cosines", lambda names, f: likeness)
    for bound, lost in ((4, [1]), (3, [1, 2]), (5, [])):
        net.config.most_names = bound
        gone = (net(images(1), text(5))["logits"][0] == S.DROPPED).flatten(1).all(1)
        assert gone.nonzero().flatten().tolist() == lost


def test_names_in_another_order_and_images_alone(net):
    image, words, order = images(), text(), torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        logits = net(image, words)["logits"]
        close(net(image, words[order])["logits"], logits[:, order], 1e-5)
        close(net(image[1:], words)["logits"], logits[1:], 1e-5)


@torch.no_grad()
def test_in_half_precision_what_leaves_the_model_is_not(net):
    """As on a GPU: every map is float32 again, and near those of full precision; padded names and dropped ones too."""
    net = varied(build(small("fgaseg", pad=9).run)).train()
    net.config.most_names, image, words = 4, images(), text(5)
    whole = net(image, words)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(image, words)
    for name in ("logits", "t2p"):
        assert half[name].dtype == torch.float32
    assert all(o.dtype == torch.float32 for o in half["aux"])
    near = (half["t2p"] - whole["t2p"]).abs().max() / whole["t2p"].abs().max()
    assert 0 < near < 0.1 and (half["logits"] - whole["logits"]).abs().median() < 0.1 * whole["logits"].std()


# --- training ---------------------------------------------------------------------------------------------------------
def test_the_losses_by_hand(net):
    """2x2 pixels: name 0, name 1, no label, name 1.  Logits of log 3 for name 0, 0 for name 1: where a name is there it
    costs log 4/3 and log 2, else log 4 and log 2; a pixel without a label shows neither.  Weights 1, .2, .02."""
    labels = torch.tensor([[[0, 1], [IGNORE, 1]]])
    o = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    batch = Batch(None, labels, None, [], net.totals(labels), 1)
    want = (math.log(4 / 3) + 3 * math.log(4) + 4 * math.log(2)) / 8
    terms = net.terms(dict(logits=o, aux=[o, o, 0 * o], t2p=o), batch)
    assert {name: weight for name, (weight, _) in terms.items()} == dict(bce=1.0, aux=0.2, t2p=0.02)
    assert terms["bce"][1].item() == terms["t2p"][1].item() == pytest.approx(want)
    assert terms["aux"][1].item() == pytest.approx(2 * want + math.log(2)) and net.totals(labels).shape == (0,)
    assert set(net.terms(dict(logits=o), batch)) == {"bce"}


def test_logits_are_brought_to_the_label_and_the_label_to_the_text_kernels(net):
    """Logits 0 4 become 0 1 3 4 on four columns; A on two columns meets the labels of columns 0 and 2."""
    labels, o = torch.tensor([[[0, 1, 1, 0]]]), torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    terms = net.terms(dict(logits=o.repeat(1, 2, 1, 1), aux=[o.repeat(1, 2, 1, 1)], t2p=o.repeat(1, 2, 1, 1)),
                      Batch(None, labels, None, [], None, 1))

    def soft(x):
        return math.log1p(math.exp(x))

    want = sum(soft(-x) + soft(x) for x in (0, 1, 3, 4)) / 8  # at each column one name is there and the other is not
    assert terms["bce"][1].item() == terms["aux"][1].item() == pytest.approx(want)
    a = torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]])
    said = net.terms(dict(logits=o.repeat(1, 2, 1, 1), t2p=a), Batch(None, labels, None, [], None, 1))["t2p"][1]
    assert said.item() == pytest.approx((soft(-0.0) + soft(4) + 2 * math.log(2)) / 4)     # name 0 is at column 0, not at 2


def test_only_copies_of_clip_move_and_the_checkpoint_holds_them():
    """A step of the optimiser: CLIP is bit for bit what it was, and so is its checksum."""
    config = small("fgaseg")
    net = build(config.run).train()
    before, mark = {n: p.clone() for n, p in net.vlm.model.state_dict().items()}, fingerprint(net)
    kept = net.vlm.tuned.q.detach().clone()
    (optimizer,) = net.optimizers(train.parameter_groups(net, config.recipe), config.recipe)
    assert {group["rate"] for group in optimizer.param_groups} == {0.1, 1.0}
    train.gradients(net, net.vlm.embed_text(["house", "boat"] * 25)[:49], micro_batches(config), config)
    for group in optimizer.param_groups:
        group["lr"] *= group["rate"]
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.vlm.model.state_dict().items())
    assert fingerprint(net) == mark and not torch.equal(net.vlm.tuned.q[:5], kept[:5])
    state = trained_state(net)
    assert {name for name in state if name.startswith("vlm.")} == {"vlm.tuned.q", "vlm.tuned.v"}
    assert net.log().keys() == {"q moved", "v moved", "gamma"} and min(net.log().values()) > 0


def test_a_start_from_another_run_takes_the_copies_only_if_they_are_of_the_same_clip(tmp_path):
    """Seeds 0 and 1 have random CLIPs of their own."""
    nets = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        nets.append(build(small("fgaseg").run))
    with torch.no_grad():
        nets[0].vlm.tuned.q.add_(1)
    run = save_run(tmp_path / "run", nets[0], small("fgaseg"))
    assert "another CLIP: vlm" in warm_start(nets[1], run) and "another CLIP" not in warm_start(nets[2], run)
    assert torch.equal(nets[2].vlm.tuned.q, nets[0].vlm.tuned.q) and nets[1].log()["q moved"] == 0
    assert torch.equal(nets[1].head.weight, nets[0].head.weight)


def test_every_part_learns_and_a_frozen_clip_does_not():
    """Every trained parameter has a gradient that is not zero, but the last block's q."""
    config = small("fgaseg", agg_layers=2, pad=60)
    found = first_gradients(config)
    assert all(gradient.abs().max() > 0 for gradient in found.values()) and found["vlm.tuned.q"][-1].abs().max() == 0
    net = build(changed(config, **S.FGASeg.ABLATIONS["frozen"]).run)
    rates = {rate for group in train.parameter_groups(net, config.recipe) for rate in [group["rate"]]
             if any(p is net.vlm.tuned.q for p in group["params"])}
    assert rates == {0.0}


def test_what_is_logged_without_the_p2tformer():
    net = build(small("fgaseg", p2t=False).run)
    assert net.log() == {"q moved": 0, "v moved": 0} and "P2Tformer" not in net.parts()


def test_every_part_reports_its_time(net):
    """studies/speed.py's parts, T2P's in training alone."""
    spent = defaultdict(float)
    watch(net, spent)
    net(images(1), text(2))
    assert set(spent) == {"CLIP features", "P2Tformer", "LCS", "aggregation", "decoder"}
    net.train()(images(1), text(2))
    assert set(spent) == net.parts().keys() and len(spent) == 6


@pytest.mark.parametrize("numbers, says", [
    (dict(vlm="EVA02-B-16"), "vlm EVA02-B-16: .* take ViT-B-16"), (dict(lcs="hard"), "lcs hard: there are softmax, linear"),
    (dict(fusion="mul"), "fusion mul: there are cat, add"), (dict(guidance=(3,)), "guidance 3: takes 2 whole numbers"),
    (dict(decoder_widths=(16, 0)), "decoder_widths 16 0: takes 2"), (dict(guidance_proj=(1, 2, 3)), "guidance_proj 1 2 3"),
    (dict(hidden=31), "agg_heads 2 does not divide the width 31"),
    (dict(hidden=31, agg_heads=1), "hidden 31: takes an even"), (dict(lcs_kernel=4), "lcs_kernel 4: takes an odd"),
    (dict(hidden=8), "hidden 8: takes more than the 8 of guidance_proj"),
    (dict(guidance_proj=(8, 16)), "the first of decoder_widths 16: takes more than the 16"),
    (dict(fusion="add", decoder_widths=(24, 8)), "fusion add: takes decoder_widths that begin with 16, half of hidden"),
    (dict(depths=(0, 2)), "depths 0 2: takes 4"), (dict(depths=(0, 2, -1, 4)), "depths 0 2 -1 4: takes some whole"),
    (dict(topk=-1), "topk -1: takes a whole number from 0"), (dict(pad=-1), "pad -1"), (dict(clip_lr=-0.1), "clip_lr -0.1"),
    (dict(topk=4, fast=False), "topk 4: takes fast=true"), (dict(prior=1), "prior 1: takes 2 or more"),
    (dict(window=0), "window 0: takes a whole number from 1"), (dict(p2t_heads=5), "p2t_heads 5 does not divide the width 64"),
    (dict(depths=(0, 2, 6, 6)), "depths 0 2 6 6: takes rising numbers below 6"), (dict(most_names=0), "most_names 0")],
    ids=lambda v: v if isinstance(v, str) else None)
def test_numbers_that_do_not_fit_end_in_one_line(numbers, says):
    with pytest.raises(InputError, match=says) as error:
        build(preset("world", "fgaseg", **{"pretrained": "none", **numbers}))
    assert "\n" not in str(error.value)


def test_numbers_at_the_edge_of_what_fits_are_taken():
    for numbers in (dict(fusion="add", lcs="none", decoder_widths=(24, 8)), dict(prior=2, fast=False), dict(hidden=10)):
        build(preset("world", "fgaseg", pretrained="none", **numbers))


def test_it_learns_two_pictures_by_heart():
    """Two scenes, three names: cross-entropies far below that of who knows how often each name is there, and no more."""
    config = small("fgaseg", prior=3)
    net = build(config.run).train()
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[0, 20:50, 10:30], labels[1, :, 40:] = 1, 2
    image, words = 0.3 * images() + 2 * F.one_hot(labels, 3).movedim(-1, 1), text(3)
    often = F.one_hot(labels, 3).double().mean((0, 1, 2))
    ignorant = F.binary_cross_entropy(often.expand(10, 3), often.expand(10, 3)).item()
    groups, batch = train.parameter_groups(net, config.recipe), Batch(None, labels, None, [], None, 1)
    optimizer = torch.optim.AdamW([{**group, "lr": 5e-3 * group["rate"]} for group in groups])
    for _ in range(55):
        optimizer.zero_grad()
        terms = net.terms(net(image, words), batch)
        sum(weight * term for weight, term in terms.values()).backward()
        optimizer.step()
    assert terms["bce"][1] < 0.4 * ignorant and terms["aux"][1] < 3 * 0.4 * ignorant and terms["t2p"][1] < 0.6 * ignorant


def test_it_is_trained_scored_and_drawn(tmp_path):
    run = train.train(small("fgaseg", steps=2, val_images=2, out=str(tmp_path / "run")))
    assert {"scores.txt", "report.html"} <= {path.name for path in run.iterdir()}
    assert {path.name for path in (run / "pictures").iterdir()} == {"masks.png", "curves.png"}
