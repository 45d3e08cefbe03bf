"""SeNaTra: its sizes, its two trainings by hand, that no mask leaves Captions, and a stranger's way through it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval
import predict
import train
from cli import InputError
from data import IGNORE, rng_for, to_tensor
from predict import two_step_bands
from guards.starting import warm_start
from runs import build, changed, load_run, preset, save_checkpoint, trained_state
from san import trainable
from segmenter import Batch
from siblings import senatra as S
from siblings.grouping import Grouping, Uniform, compose, shares
from siblings.senatra import Attn, Captions, SeNaTra, WindowBlock, name_loss, watched
from tests.test_segmenter import first_gradients, micro_batches, samples, small
from train import gradients
from world.scenes import OBJECTS, SEEN, STUFFS, TEXTURES, UNSEEN, WORLD_NAMES, World, scene

both_trainings = pytest.mark.parametrize("supervision", ["names", "masks"])


@pytest.fixture
def net():
    return build(small("senatra").run)


@pytest.fixture
def native():
    return build(small("senatra", supervision="masks").run)


def text(n=5):
    return F.normalize(torch.randn(n, 64), dim=-1)


# --- sizes ----------------------------------------------------------------------------------------------------------
def test_the_size_of_the_world_is_pinned():
    """Patch and blocks, three grouping layers, norm and projection; of masks, a two-layer head in its place."""
    model = build(preset("world", "senatra", pretrained="none"))
    parts = [model.patch, model.norm_patch, model.levels], [model.groupings], [model.norm, model.project]
    assert [sum(map(trainable, part)) for part in parts] == [1_051_848, 512_204, 12_736]
    assert trainable(model) == 1_576_788 and model.stride == 16
    masks = build(preset("world", "senatra", pretrained="none", supervision="masks"))
    assert trainable(masks.native) == 49_408 and trainable(masks) == 1_576_788 - 12_352 + 49_408
    assert not hasattr(masks, "project") and not hasattr(model, "native")


@pytest.mark.parametrize("size, blocks, grouping, head, everything", [
    ("T", 25.8e6, 3_623_564, .53e6, 29.7e6), ("B", 82.4e6, 14.5e6, .79e6, 97.4e6),
    ("L", 185.2e6, 32.5e6, 1.05e6, 218.5e6)])
def test_the_papers_three_sizes_on_no_memory_at_all(size, blocks, grouping, head, everything):
    """Over the text of ViT-B/16, as far as the summaries' digits go; the total is with the projection of names."""
    with torch.device("meta"):
        names, masks = (build(preset("coco", "senatra", pretrained="none", supervision=supervision, **S.SIZES[size]))
                        for supervision in ("names", "masks"))
    counted = sum(map(trainable, [names.patch, names.norm_patch, names.levels]))
    assert counted == pytest.approx(blocks, abs=5e4) and trainable(masks.native) == pytest.approx(head, abs=5e3)
    assert trainable(names.groupings) == pytest.approx(grouping, abs=0 if size == "T" else 5e4)
    assert trainable(names) == pytest.approx(everything, abs=5e4) and names.stride == 32
    name = {"T": "coco", "B": "coco-eva", "L": "coco-large"}[size]
    assert preset(name, "senatra").net.widths == S.SIZES[size]["widths"]


def test_what_the_command_prints_is_what_is_counted(capsys):
    S.main([])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["T", "B", "L", "world"]
    assert printed[-1].endswith("patch, blocks 1,051,848, grouping 512,204, norm, head for names 12,736, all 1,576,788")


@both_trainings
def test_nothing_of_clip_is_trained_and_every_parameter_of_ours_is(supervision):
    config = small("senatra", supervision=supervision)
    grads = first_gradients(config)
    assert not any(name.startswith("vlm.") for name in grads)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


# --- image-level names ----------------------------------------------------------------------------------------------
def test_captions_give_an_image_and_the_words_that_are_true_of_it_and_no_label_map():
    """Of 90 words those of the same scene's objects, their textures and nouns, and its stuffs; one number each."""
    data = Captions("all", 6)
    assert data.train_names == (*WORLD_NAMES, *TEXTURES, *S.NOUNS) and [len(g) for g in data.grains] == [70, 4, 16]
    for n in range(24):
        image, true = data.draw(3, n)
        single, size = n < 6 or n % 3 == 0, 32 if n < 6 else 64
        drawn = scene(rng_for(3, S.CAPTION, n), size, (1, 1) if single else (n % 3, 3), stuffs=(1, 1 if single else 2),
                      radius=(11, 16) if n < 6 else (12.0, 18.0))
        assert torch.equal(image, to_tensor(drawn.image)) and image.shape == (3, size, size)
        assert true.shape == (90,) and true.dtype == torch.int64 and set(true.tolist()) <= {0, 1}
        said = {word for word, is_true in zip(data.train_names, true) if is_true}
        shown = {WORLD_NAMES[i] for i in np.unique(drawn.label) if (drawn.label == i).sum() >= 20}
        assert {name for name in said if name in OBJECTS} == {name for name in shown if name in OBJECTS}
        assert said & set(STUFFS) == set(drawn.grounds)
        assert said - set(WORLD_NAMES) == {word for name in said & set(OBJECTS) for word in name.split()}
        objects = len(drawn.things)
        assert objects == 1 if single else objects <= 3


def test_captions_begin_small_and_single_and_a_third_stay_single():
    data = Captions("all", 30)
    assert [data.draw(0, n)[0].shape[-1] for n in (0, 29, 30, 31)] == [32, 32, 64, 64]
    stuffs, objects = (np.array([data.draw(0, n)[1][part].sum().item() for n in range(60)]) for part in
                       (slice(64, 70), slice(0, 64)))
    for part in (slice(0, 30), slice(30, 60, 3)):
        assert (stuffs[part] == 1).all() and (objects[part] == 1).all()
    assert stuffs[30:].max() == 2 and objects[30:].max() == 3


def test_captions_are_of_all_names_or_of_those_that_have_masks():
    """And no sample of Captions is a training scene of the world."""
    data, every = Captions("seen"), Captions("all")
    assert data.train_names == (*World.train_names, *TEXTURES, *S.NOUNS)
    drawn = torch.stack([data.draw(0, n)[1] for n in range(60)])
    assert not set(data.train_names) & {OBJECTS[i] for i in UNSEEN} and drawn[:, :43].sum() > 60
    told = torch.stack([every.draw(0, n)[1] for n in range(60)])
    assert told[:, list(UNSEEN)].sum() > 10 and told[:, list(SEEN)].sum() > 30
    assert all(not torch.equal(data.draw(0, n)[0], World("train").draw(0, n)[0]) for n in range(3))
    assert not torch.equal(data.draw(0, 1)[0], data.draw(1, 1)[0])


def test_what_it_is_trained_on_follows_the_supervision(tmp_path):
    names = SeNaTra.dataset(preset("world", "senatra", captions="seen", switch=64))
    assert type(names) is Captions and names.switch == 64 and len(names.train_names) == 49 + 20
    assert SeNaTra.dataset(preset("world", "senatra", supervision="masks")) is None
    for run in (preset("coco", "senatra", supervision="names"), preset("world", "senatra", data=str(tmp_path))):
        with pytest.raises(InputError, match="--set supervision=masks"):
            SeNaTra.dataset(run)


def test_the_loss_of_names_by_hand():
    """Two equal logits, both true: log 2.  One of (0, log 3) true, the second: log 4/3.  None true: 0.  Their mean."""
    logits = torch.tensor([[5.0, 5.0], [0.0, 3.0]]).clamp(min=1e-9)
    logits[1] = torch.tensor([1.0, 3.0]).log()
    logits = torch.cat([logits, torch.tensor([[9.0, -9.0]])])
    true = torch.tensor([[1, 1], [0, 1], [0, 0]])
    want = (torch.tensor(2.0).log() + torch.tensor(4 / 3).log()) / 3
    assert torch.allclose(name_loss(logits, true), want) and name_loss(logits, true * 0) == 0


def terms_of(net, out, labels, totals=None, parts=1):
    totals = net.totals(labels) if totals is None else totals
    return net.terms({"chain": [], "scores": torch.zeros(len(labels), 2, 2, 3), **out},
                     Batch(None, labels, None, [], totals, parts))


def test_every_grain_has_a_softmax_and_a_third_of_the_loss(net, monkeypatch):
    """A logit of 1 more on a name takes nothing from a texture or a noun; the mean of the three is what is lowered."""
    monkeypatch.setattr(S, "watched", lambda chain, grid: dict(groups=torch.tensor(7.0)))
    true = torch.zeros(2, 90, dtype=torch.int64)
    true[0, [3, 66, 71, 74]] = 1                              # "checked house" on sand, striped, house
    true[1, 66] = 1                                           # an object that nothing is left of
    terms = terms_of(net, dict(whole=torch.zeros(2, 90)), true)
    want = dict(names=70, textures=4, nouns=16)
    assert list(terms) == [*want, "groups"] and terms["groups"] == (0, 7)
    for grain, n in want.items():
        images = 2 if grain == "names" else 1                 # the second has no texture and no noun
        assert terms[grain][0] == pytest.approx(1 / 3)
        assert terms[grain][1].item() == pytest.approx(images / 2 * torch.tensor(float(n)).log().item())
    whole = torch.zeros(2, 90)
    whole[:, 3] = 5.0
    changed_terms = terms_of(net, dict(whole=whole), true)
    assert changed_terms["names"][1] != terms["names"][1] and changed_terms["nouns"][1] == terms["nouns"][1]
    assert terms_of(net, dict(whole=whole), true * 0 + IGNORE)["names"][1] == 0           # and padding is no name
    assert net.totals(true).shape == (0,)


# --- masks ----------------------------------------------------------------------------------------------------------
def test_the_loss_of_masks_by_hand(native, monkeypatch):
    """Two groups of scores (0, log 3) and (log 3, 0) on a 2x4 map: the outer columns are theirs, those between
    shared, the logits alike.  p of the first name is 1/4, 1/2, 1/2, 3/4 in both rows; the last pixel has no label."""
    monkeypatch.setattr(S, "watched", lambda chain, grid: {})
    A = torch.tensor([[1.0, 0], [0.5, 0.5], [0.5, 0.5], [0, 1]]).repeat(2, 1)[None]       # (1,8,2)
    log3 = torch.tensor(3.0).log()
    scores = torch.tensor([[[[0, log3], [log3, 0]]]])                                     # (1,1,2,2)
    labels = torch.tensor([[[0, 0, 1, 0], [1, 1, 1, IGNORE]]])
    out = dict(chain=[A], scores=scores)
    assert native.totals(labels).tolist() == [7]
    (name, (weight, loss)), = terms_of(native, out, labels).items()
    p_true = torch.tensor([1 / 4, 1 / 2, 1 / 2, 3 / 4, 3 / 4, 1 / 2, 1 / 2])
    assert (name, weight) == ("pixels", 1) and loss.item() == pytest.approx(-p_true.log().mean().item())
    share = terms_of(native, out, labels, torch.tensor([28.0]), parts=2)["pixels"][1]     # 2 x 7 of 28 pixels
    assert share.item() == pytest.approx(loss.item() / 2)
    assert terms_of(native, out, torch.full_like(labels, IGNORE))["pixels"][1] == 0
    large = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)                        # (1,4,8): logits follow
    logits = F.interpolate((A[0] @ scores[0, 0]).T.reshape(1, 2, 2, 4), scale_factor=2, mode="bilinear")
    want = F.cross_entropy(logits, large, ignore_index=IGNORE)
    assert terms_of(native, out, large)["pixels"][1].item() == pytest.approx(want.item())


def test_masks_too_split_over_micro_batches_without_a_change():
    """In float64 to 1e-9; test_segmenter.py asks it of names."""
    config = small("senatra", supervision="masks")
    whole, parts = first_gradients(config), first_gradients(changed(config, accumulate=2))
    assert whole.keys() == parts.keys() and all((whole[name] - parts[name]).abs().max() < 1e-9 for name in whole)
    assert {type(samples(config)), type(samples(small("senatra")))} == {World, Captions}


# --- the model by hand ----------------------------------------------------------------------------------------------
@both_trainings
@torch.no_grad()
def test_groups_and_the_whole_image_are_cosines_times_clips_scale(supervision):
    """Of two pictures wider than high: the head after the last norm; the whole is the mean before it is made unit."""
    net, names = build(small("senatra", supervision=supervision).run), text(7)
    image = torch.randn(2, 3, 32, 64)
    x, chain = net.backbone(image)
    out = net(image, names)
    if supervision == "names":
        z = x @ net.project.weight.T + net.project.bias
    else:
        (one, two) = net.native.layers
        z = F.gelu(x @ one.weight.T + one.bias) @ two.weight.T + two.bias
    unit = z / z.norm(dim=-1, keepdim=True)
    whole = z.mean((1, 2)) / z.mean((1, 2)).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(out["scores"], net.vlm.logit_scale * unit @ names.T)
    torch.testing.assert_close(out["whole"], net.vlm.logit_scale * whole @ names.T)
    assert out["scores"].shape == (2, 2, 4, 7) and net.vlm.logit_scale > 1
    assert all(torch.equal(A, B) for A, B in zip(out["chain"], chain)) and len(chain) == 3
    assert torch.allclose(x.mean(-1), torch.zeros(()), atol=1e-5)                         # the last norm's


@torch.no_grad()
def test_the_backbone_is_patch_blocks_group_blocks_in_turn(net):
    image = torch.randn(1, 3, 64, 32)
    x = net.norm_patch(F.conv2d(image, net.patch.weight, net.patch.bias, stride=2).permute(0, 2, 3, 1))
    for level, grouping in zip(net.levels[:3], net.groupings):
        for block in level:
            x = block(x)
        x, A = grouping(x)
    for block in net.levels[3]:
        x = block(x)
    found, chain = net.backbone(image)
    assert torch.equal(found, net.norm(x)) and torch.equal(chain[2], A)
    assert [tuple(A.shape) for A in chain] == [(1, 16, 8, 4, 9), (1, 8, 4, 4, 9), (1, 32, 8)]
    assert [len(level) for level in net.levels] == [1, 1, 3, 2]


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 80)])
def test_the_groups_share_every_pixel_among_them_at_any_size(net, size):
    """No position is absolute: 32x32, 64x64, 96x80 run alike, and the rows of the chain sum to 1."""
    out = net(torch.randn(2, 3, *size), text())
    A = shares(out["chain"], out["scores"].shape[1:3])
    assert A.shape == (2, size[0] // 2, size[1] // 2, size[0] * size[1] // 256)
    assert torch.allclose(A.sum(-1), torch.ones(()), atol=1e-5) and A.min() >= 0


@torch.no_grad()
def test_what_a_group_says(net, native):
    """Names: its best name alone, or, `soft`, all by softmax.  Masks: its scores.  The gate leaves weights alone."""
    image, names = torch.randn(2, 3, 64, 96), text(7)
    out = net(image, names)
    answer, scores = net.answer(out, 1), out["scores"][1].flatten(0, 1)
    assert answer.maps.shape == (24, 32, 48) and torch.allclose(answer.maps.sum(0), torch.ones(()), atol=1e-5)
    assert torch.allclose(answer.maps.permute(1, 2, 0), shares([A[1:] for A in out["chain"]], (4, 6))[0])
    assert torch.equal(answer.mix.argmax(-1), scores.argmax(-1)) and torch.equal(answer.mix.sum(-1), torch.ones(24))
    assert set(answer.mix.flatten().tolist()) == {0, 1} and not answer.none and answer.floor == float("-inf")
    assert torch.equal(answer.gate(answer.maps), answer.maps)
    net.config.soft = True
    assert torch.allclose(net.answer(out, 1).mix, scores.softmax(-1))
    out = native(image, names)
    assert torch.equal(native.answer(out, 1).mix, out["scores"][1].flatten(0, 1))
    assert not torch.equal(native.answer(out, 0).maps, native.answer(out, 1).maps)


@torch.no_grad()
def test_interpolating_groups_and_mixing_names_can_change_places(native):
    """Both are linear: names of interpolated groups = interpolated names, which is what training saw."""
    out = native(torch.randn(1, 3, 64, 64), text(7))
    answer, sizes = native.answer(out, 0), ((64, 64), (50, 60), (33, 47))
    named = compose(out["chain"], out["scores"])[0].permute(2, 0, 1)                      # (L,h1,w1)
    for maps, mix in ((answer.maps, answer.mix), (named, torch.eye(7))):
        bands = [torch.einsum("cl,crw->lrw", mix, band) for _, band in two_step_bands(maps, *sizes, 1)]
        scores = torch.cat(bands, 1)
        assert scores.shape == (7, 33, 47)
        first = scores if maps is answer.maps else first
    assert torch.allclose(first, scores, atol=1e-4)


def test_is_anything_grouped_by_hand():
    """Two images, two groups: all pixels in the first; half in each.  Max A_ups: .9 .8 .7 .6, and 1 1 1 1 -> .875"""
    A = torch.tensor([[[.9, .1], [.8, .2], [.7, .3], [.6, .4]], [[1, 0], [0, 1], [0, 1], [1, 0]]])
    said = watched([A.repeat_interleave(2, 1)], (1, 2))
    assert said.keys() == {"groups", "sharp_2"}
    assert said["groups"] == 1.5 and said["sharp_2"].item() == pytest.approx(.875)
    many = torch.zeros(1, 400, 100)
    many[0, :, 0], many[0, :4, 7], many[0, 4:9, 5] = 0.5, 1, 1                            # of 400 pixels 391, 4, 5
    assert watched([many], (1, 100))["groups"] == 2                                       # four are 1 %, not more


# --- attention ------------------------------------------------------------------------------------------------------
def reach(module, x, y, column):
    """Which cells of x (1,h,w,c) the output at (y, column) depends on, (h,w) bool."""
    x = x.clone().requires_grad_()
    module(x)[0, y, column].pow(2).sum().backward()
    return x.grad[0].abs().amax(-1) > 0


def test_attention_stays_in_windows_that_are_shifted_in_every_second_block_and_is_global_at_the_end(net):
    """On 16x16: of cell (0, 0) the first window of 8; shifted, of cell (5, 5), those from 4 to 11.  8x8: all of it."""
    net = build(small("senatra", blocks=(2, 1, 1, 2), window=8).run).double()
    first, second = net.levels[0]
    x = torch.randn(1, 16, 16, 8, dtype=torch.float64)
    window = torch.zeros(16, 16, dtype=torch.bool)
    window[:8, :8] = True
    assert torch.equal(reach(first, x, 0, 0), window)
    assert torch.equal(reach(second, x, 5, 5), window.roll((4, 4), (0, 1)))
    assert reach(first, x[:, :8, :8], 0, 0).all() and reach(second, x[:, :8, :8], 0, 0).all()
    assert reach(net.levels[3][1], torch.randn(1, 16, 16, 64, dtype=torch.float64), 0, 0).all()
    assert [[(block.window, block.shift) for block in level] for level in net.levels] == [
        [(8, 0), (8, 4)], [(8, 0)], [(8, 0)], [(0, 0), (0, 0)]]


def test_the_worlds_windows_are_as_large_a_part_of_a_map_as_the_papers():
    """7 of 56, 28 and 14 cells are 4 of 32, 16 and 8; wider ones mix an image's names into every group."""
    assert preset("world", "senatra").net.window == 4 and preset("coco", "senatra").net.window == 8


@torch.no_grad()
def test_a_window_padded_or_not_sees_the_same():
    """A map of 12x8 in windows of 8: half of the lower window is padding, which nobody sees."""
    block, x = WindowBlock(8, 2, 2, 8, 0).double(), torch.randn(2, 12, 8, 8, dtype=torch.float64)
    assert torch.allclose(block(x)[:, :8], block(x[:, :8])) and torch.allclose(block(x)[:, 8:], block(x[:, 8:]))


@torch.no_grad()
def test_a_block_by_hand():
    """Pre-norm, residual, a global map of 2x3."""
    block, x = WindowBlock(8, 2, 3, 0, 0), torch.randn(2, 2, 3, 8)
    y = x + block.attn(block.norm1(x).flatten(1, 2), (2, 3)).view(x.shape)
    hidden = F.gelu(block.norm2(y) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    assert hidden.shape[-1] == 24
    torch.testing.assert_close(block(x), y + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)


@torch.no_grad()
def test_attention_by_hand():
    """Two heads of 8 numbers on 2x3 cells: pairs of a query's and a key's numbers are complex, and turned by y, y/100, x,
    x/100 radians; values are not.  softmax(Re q k* / √8) v."""
    attn, x = Attn(16, 2), torch.randn(2, 6, 16)
    q, k, v = (x @ w.T + b for w, b in zip(attn.qkv.weight.split(16), attn.qkv.bias.split(16)))
    y_, x_ = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), indexing="ij")
    turn = torch.polar(torch.ones(()), torch.stack([y_, y_ / 100, x_, x_ / 100], -1).flatten(0, 1))       # (6,4)
    want = []
    for head in (slice(0, 8), slice(8, 16)):
        q_, k_ = (torch.view_as_complex(t[..., head].unflatten(-1, (4, 2)).contiguous()) * turn for t in (q, k))
        want.append(((q_ @ k_.mH).real / 8**0.5).softmax(-1) @ v[..., head])
    torch.testing.assert_close(attn(x, (2, 3)), torch.cat(want, -1) @ attn.proj.weight.T + attn.proj.bias)


@torch.no_grad()
def test_attention_knows_how_far_apart_two_cells_are_and_not_where():
    """Keys and queries all alike, values that say where: a weight follows from the offset alone, and a row is another
    offset than a column; without positions all weights would be 1/T."""
    attn, (h, w) = Attn(16, 1), (3, 4)
    attn.proj.weight.copy_(torch.eye(16))
    attn.proj.bias.zero_()
    attn.qkv.weight.zero_()
    attn.qkv.weight[32:] = torch.eye(16)                      # values are the cells themselves, one-hot
    attn.qkv.bias[:32] = torch.randn(16).repeat(2) * 2
    attn.qkv.bias[32:] = 0
    x = F.pad(torch.eye(12), (0, 4))[None]
    weights = attn(x, (h, w))[0, :, :12]                                                  # (T,T), rows sum to 1
    assert torch.allclose(weights.sum(1), torch.ones(12), atol=1e-5)
    logits, by_offset = weights.log(), {}
    for a in range(12):
        for b in range(12):
            offset = a // w - b // w, a % w - b % w
            by_offset.setdefault(offset, []).append((logits[a, b] - logits[a, a]).item())
    assert all(max(seen) - min(seen) < 1e-3 for seen in by_offset.values())
    assert abs(by_offset[0, 1][0] - by_offset[1, 0][0]) > 1e-2 and abs(by_offset[0, 1][0]) > 1e-2
    assert not torch.equal(attn(x, (h, w)), attn(x, (w, h)))


# --- numbers, switches ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("numbers, says", [
    (dict(supervision="labels"), "supervision labels: there are masks, names"),
    (dict(group_init="zero"), "group_init zero: there are conv, embedding"), (dict(captions="no"), "captions no"),
    (dict(uniform=(2, 5)), "uniform 2 5: takes some whole numbers, each from 2 to 4"), (dict(group_update="lstm"), "there are skip, gru"),
    (dict(blocks=(1, 0, 1, 1)), "blocks 1 0 1 1: takes 4 whole"), (dict(widths=(8, 16)), "widths 8 16: takes 4"),
    (dict(head_dim=6, widths=(6, 12, 24, 48)), "head_dim 6: takes a multiple of 4"), (dict(rounds=0), "rounds 0"),
    (dict(head_dim=16), "head_dim 16 does not divide the width 8"), (dict(switch=-1), "switch -1"),
    (dict(window=0), "window 0"), (dict(patch=0), "patch 0")], ids=lambda v: str(v)[:40])
def test_bad_numbers_end_in_one_line(numbers, says):
    with pytest.raises(InputError, match=says) as error:
        build(small("senatra", **numbers).run)
    assert "\n" not in str(error.value)


def test_a_step_has_images_of_one_size():
    """A switch inside a step would need a batch of both: refused before anything is drawn; masks do not care."""
    config = small("senatra", switch=6)
    with pytest.raises(InputError, match="switch 6 is no multiple of --batch 4"):
        build(config.run).optimizers([], config.recipe)
    group = [dict(params=[torch.zeros(1, requires_grad=True)], muon=False)]
    assert build(changed(config, switch=8).run).optimizers(group, config.recipe)
    assert build(changed(config, supervision="masks").run).optimizers(group, config.recipe)


def test_muon_takes_the_matrices_and_adamw_the_rest(net):
    config = small("senatra")
    adamw, muon = net.optimizers(train.parameter_groups(net, config.recipe), config.recipe)
    matrices = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert (id(p) in matrices) == (p.ndim == 2 and len(p) > 1), name          # a single row is none
    assert config.recipe.muon and config.recipe.lr == 2e-3 and config.run.net.switch == 800 * 32


def rows_of(net):
    """The rows of ABLATIONS that a model is, by what it is made of."""
    last, grouping = net.groupings[-1], [layer for layer in net.groupings if type(layer) is Grouping]
    uniform = tuple(k for k, layer in enumerate(net.groupings, 2) if type(layer) is Uniform)
    seeds = [layer.seeds.query_embed for layer in grouping if layer.seeds.query_embed is not None]
    said = {"uniform": uniform == (2, 3, 4), "uniform-2": uniform == (2,), "uniform-3": uniform == (3,),
            "uniform-4": uniform == (4,), "one-round": {layer.rounds for layer in grouping} == {1},
            "local-last": last in grouping and not last.dense,
            "no-rel-bias": {layer.rel for layer in grouping} == {None},
            "embedding-init": [p.shape[1:] for p in seeds] == [(16, 16, 16), (32, 8, 8), (64, 4, 4)],
            "gru": bool(grouping) and all(layer.gru for layer in grouping), "masks": hasattr(net, "native"),
            "soft": net.config.soft, "seen-captions": net.config.captions == "seen"}
    assert said.keys() == SeNaTra.ABLATIONS.keys()
    return [name for name, is_so in said.items() if is_so]


@pytest.mark.parametrize("row", SeNaTra.ABLATIONS)
def test_a_row_switches_what_it_says_and_nothing_else_and_trains(row):
    config = small("senatra", **SeNaTra.ABLATIONS[row])
    net = build(config.run).train()
    assert rows_of(net) == [row]
    names = net.vlm.embed_text(samples(config).train_names)
    terms, _ = gradients(net, names, micro_batches(config), config)
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert terms.keys() == {*S.TERMS[net.config.supervision], *S.WATCHED.values()}


def test_by_default_the_last_grouping_is_dense_and_all_go_three_rounds(net):
    assert [layer.dense for layer in net.groupings] == [False, False, True]
    assert [layer.rounds for layer in net.groupings] == [3, 3, 3] and rows_of(net) == []
    assert [(layer.k.in_features, layer.k.out_features) for layer in net.groupings] == [(8, 16), (16, 32), (32, 64)]


@both_trainings
def test_a_training_watches_and_draws_its_own_terms(supervision):
    net = build(small("senatra", supervision=supervision).run)
    own = S.TERMS[supervision]
    assert net.watch == own[:1] and list(net.curves["cross-entropy"]) == list(own)
    assert set(SeNaTra.curves["cross-entropy"]) == {"names", "textures", "nouns", "pixels"}
    assert set(net.parts()) == {"blocks", "grouping"}


# --- runs -----------------------------------------------------------------------------------------------------------
def test_masks_start_from_a_run_of_names(tmp_path, net, native):
    """Everything but the head is taken."""
    config = small("senatra")
    (tmp_path / "config.json").write_text(json.dumps(train.flat(config)))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01)
    save_checkpoint(tmp_path, net, [], 3)
    said = warm_start(native, tmp_path)
    assert "without a place here: project; not in it: native" in said and "another" not in said
    taken = {name: p for name, p in trained_state(native).items() if "native" not in name}
    assert all(torch.equal(p, trained_state(net)[name]) for name, p in taken.items())


def test_the_hour_is_six_times_ten_minutes_and_leaves_a_small_run(tmp_path, monkeypatch, capsys):
    """Of the training beside it: the same weights in fp16, and nothing that only a training needs; under 4 MB."""
    place, asked = tmp_path / "deep" / "names", []

    def trains(config, resume, device):
        asked.append((config.recipe.steps, config.run.net.switch, config.run.seed, resume, device))
        run = tmp_path / "deep" / "names-training"
        assert config.recipe.out == str(run) and config.run.net.supervision == "names"
        run.mkdir(exist_ok=True)
        model = build(config.run)
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        sum(p.sum() for p in opt.param_groups[0]["params"]).backward()
        opt.step()
        save_checkpoint(run, model, [opt], 9000)
        (run / "config.json").write_text(json.dumps(train.flat(config)))
        (run / "names.txt").write_text("striped boat\n")

    monkeypatch.setattr(train, "train", trains)
    S.main(["--pretrain", "--out", str(place), "--seed", "3"])
    assert asked == [(9000, 6 * 25_600, 3, False, "cpu")]
    assert f"--init {place} starts from it" in capsys.readouterr().out
    assert {path.name for path in place.iterdir()} == {"config.json", "names.txt", "checkpoint.safetensors"}
    assert 3e6 < (place / "checkpoint.safetensors").stat().st_size < 4e6
    small_one, big = load_run(place)[0], load_run(tmp_path / "deep" / "names-training")[0]
    for name, value in trained_state(big).items():
        assert torch.equal(trained_state(small_one)[name], value.half().float()), name
    with pytest.raises(InputError, match="names: holds a run already"):
        S.main(["--pretrain", "--out", str(place)])
    (place / "checkpoint.safetensors").unlink()               # stopped before its end: the same command goes on
    S.main(["--pretrain", "--out", str(place)])
    assert asked[1][3] is True
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a directory"):
        S.main(["--pretrain", "--out", str(tmp_path / "file" / "names")])


@both_trainings
def test_it_learns_and_every_command_takes_it(supervision, tmp_path, capsys):
    """Forty steps lower the loss; scored, a photo named, the page drawn: by no code of its own."""
    config = small("senatra", supervision=supervision, steps=40, lr=3e-3, warmup=5, batch=8, pretrained="world")
    run = train.train(changed(config, out=str(tmp_path / "run")))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    term = S.TERMS[supervision][0]
    first, last = (sum(line[term] for line in part) / len(part) for part in (lines[:4], lines[-8:]))
    assert last < 0.85 * first
    assert {"groups", "sharp_2", "sharp_3", "sharp_4"} <= lines[-1].keys() and 0 < lines[-1]["sharp_4"] <= 1
    files = {path.name for path in run.iterdir()}
    assert {"scores.txt", "scores.json", "samples.png", "report.html", "pictures"} <= files
    assert {path.name for path in (run / "pictures").iterdir()} == {"masks.png", "curves.png"}
    assert (run / "names.txt").read_text().splitlines()[-1] == ("butterfly" if supervision == "names" else "gravel")
    eval.main([str(run), "--images", "2"])
    assert f"SeNaTra {run}" in json.loads((run / "scores.json").read_text())["rows"]
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (90, 60), "green").save(photo)
    predict.main([str(run), str(photo), "--labels", "grass, red star", "--out", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (90, 60) and "SeNaTra has no tokens" in capsys.readouterr().out


def test_a_folder_is_no_place_for_captions(tmp_path):
    with pytest.raises(InputError, match="supervision names: has captions of the built-in world alone"):
        given = ["--model", "senatra", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
        train.train(*train.parse(given))
    assert not (tmp_path / "run").exists()
