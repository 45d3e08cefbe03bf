"""FISA, a reconstruction: what it promises of itself.  No test here says anything of the paper's numbers.

First and last: a mask of everything is CLIP's image embedding; the generator never moves; a run outlives its generator's.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

import train
from cli import InputError
from data import IGNORE
from losses import CE
from runs import build, changed, fingerprint, flat, load_config, load_run, part, preset, read_checkpoint
from san import trainable
from segmenter import Batch
from siblings.fisa import FISA, SEVE, names_of, visible
from studies.oracle import main as oracle
from tests.helpers import TEXT, generator, images, save_run, tiny, world
from tests.test_segmenter import first_gradients, micro_batches, small
from train import gradients, parameter_groups, recipe
from world.scenes import World


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Each CLIP reads its vocabulary anew, half of the time that these tests would take: here all have one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("open_clip.SimpleTokenizer", cache(open_clip.SimpleTokenizer))
        yield


def fisa(**numbers):
    """In training mode, over a small SAN; the same numbers every time."""
    return world("fisa", **{"generator": generator(), **numbers})


@pytest.fixture(scope="module")
def net():
    """One to look at, never to change: in eval mode, every W and γ its own."""
    model = fisa().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def clip():
    """CLIP itself: its own queries, no names told to it."""
    model = fisa().eval()
    model.reset()
    return model


def blob(*boxes, size=8):
    """Mask logits (1,Q,8,8), 9 inside of the box (top, left, bottom, right), -9 outside."""
    masks = torch.full((1, len(boxes), size, size), -9.0)
    for q, (top, left, bottom, right) in enumerate(boxes):
        masks[0, q, top:bottom, left:right] = 9
    return masks


def last_tokens(model, image, masks, text=TEXT):
    """Tokens of the image and of the masks after every block: (B,1+P,C), (B,Q,C)."""
    z, sees = model.start(image, masks)
    for l in range(len(model.vlm.blocks)):
        z = model.step(l, z, sees, text)
    return z[:, :sees.shape[-1]], z[:, sees.shape[-1]:]


# --- what it is at the start: CLIP -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mask_of_everything_is_clips_embedding_of_the_image(clip):
    """Any number of them, of any two pictures, wider than high too; and a mask of a part is not."""
    image = images(2)
    masks = torch.ones(2, 3, 16, 16)
    masks[:, 2, :, :8] = -1
    classes = clip(image, TEXT, masks=masks)["classes"][0]
    want = clip.vlm.logit_scale * clip.vlm.model.encode_image(image, normalize=True) @ TEXT.T
    for q in (0, 1):
        torch.testing.assert_close(classes[:, q, :5], want, atol=1e-4, rtol=1e-5)         # logits of 14: cosines to 1e-5
    assert (classes[:, 2, :5] - want).abs().max() > 0.1
    wide = images(1, 64, 96)
    pyramid = clip.vlm.features(wide)
    x = clip.vlm.run(clip.vlm.blocks[clip.vlm.depths[-1]:], pyramid.tokens, pyramid.grid)
    want = clip.vlm.logit_scale * clip.vlm.project(x)[:, 0] @ TEXT.T
    torch.testing.assert_close(clip(wide, TEXT, masks=torch.ones(1, 1, 8, 12))["classes"][0][:, 0, :5], want, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_tokens_of_the_image_are_clips_after_every_block(clip):
    image = images(2)
    z, sees = clip.start(image, blob((0, 0, 4, 4)).expand(2, -1, -1, -1))
    x, grid = clip.vlm.embed(image)
    for l, block in enumerate(clip.vlm.blocks):
        z, x = clip.step(l, z, sees, TEXT), clip.vlm.run([block], x, grid)
        torch.testing.assert_close(z[:, :65], x, atol=1e-5, rtol=1e-5)


def test_training_begins_at_clips_queries_and_almost_without_names(net):
    """Both copies of every block are the first third of its matrix; γ is .01.  `reset` goes back there, and to γ = 0."""
    model = fisa()
    assert [*model.queries] == ["image", "mask"] and len(model.seve) == 2
    for linears in model.queries.values():
        for linear, block in zip(linears, model.vlm.blocks, strict=True):
            assert torch.equal(linear.weight, block.attn.in_proj_weight[:128])
            assert torch.equal(linear.bias, block.attn.in_proj_bias[:128]) and linear.weight.requires_grad
    assert all((seve.gamma == 0.01).all() for seve in model.seve)
    background = model.background.clone()
    with torch.no_grad():
        for p in (*model.queries.parameters(), *model.seve.parameters()):
            p.add_(1)
    model.reset()
    assert all(torch.equal(linear.bias, block.attn.in_proj_bias[:128]) and torch.equal(linear.weight, block.attn.in_proj_weight[:128])
               for linears in model.queries.values() for linear, block in zip(linears, model.vlm.blocks))
    assert all((seve.gamma == 0).all() for seve in model.seve) and torch.equal(model.background, background)


# --- SEVE and SIMO ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_seve_by_hand():
    """z + γ (W_o softmax((W_q LN z)(W_k T)ᵀ / √d) W_v T + b_o), two heads of width 2 each, a loop over heads."""
    seve, z, text = SEVE(16, 6, 2), torch.randn(3, 5, 16), torch.randn(4, 6)
    for p in seve.parameters():
        p.copy_(torch.randn_like(p))
    q = F.layer_norm(z, (16,), seve.norm.weight, seve.norm.bias) @ seve.q.weight.T + seve.q.bias          # (3,5,4)
    k, v = (text @ linear.weight.T + linear.bias for linear in (seve.k, seve.v))                          # (4,4)
    heads = [(q[..., part] @ k[:, part].T / 2 ** 0.5).softmax(-1) @ v[:, part] for part in (slice(0, 2), slice(2, 4))]
    want = z + seve.gamma * (torch.cat(heads, -1) @ seve.out.weight.T + seve.out.bias)
    torch.testing.assert_close(seve(z, text), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_block_by_hand(net):
    """Block 3, which is told no names: a loop over heads and tokens, W_img for the image, W_mask for masks, CLIP's k and v."""
    z, sees = net.start(images(1), blob((0, 0, 1, 3), (2, 2, 3, 4)))
    z = z + 0.1 * torch.randn_like(z)
    block, l = net.vlm.blocks[3], 3
    y, attn = F.layer_norm(z, (128,), block.ln_1.weight, block.ln_1.bias)[0], block.attn
    seen = torch.zeros(67, 128)
    for head in range(4):
        part = slice(32 * head, 32 * head + 32)
        k = y[:65] @ attn.in_proj_weight[128:256].T + attn.in_proj_bias[128:256]
        v = y[:65] @ attn.in_proj_weight[256:].T + attn.in_proj_bias[256:]
        for t in range(67):
            own = net.queries["image" if t < 65 else "mask"][l]
            q = y[t] @ own.weight.T + own.bias
            may = torch.arange(65) if t < 65 else torch.tensor([[0, 1, 2, 3], [0, 19, 20, 0]][t - 65][:4 - (t - 65)])
            scores = k[may][:, part] @ q[part] / 32 ** 0.5
            seen[t, part] = scores.softmax(0) @ v[may][:, part]
    u = z[0] + attn.out_proj(seen)
    want = u + block.mlp(F.layer_norm(u, (128,), block.ln_2.weight, block.ln_2.bias))
    torch.testing.assert_close(net.step(l, z, sees, TEXT)[0], want, atol=1e-4, rtol=1e-4)


def test_a_mask_token_may_look_at_cls_and_where_its_mask_is_above_a_half_by_hand():
    """4x4 logits on a grid of 2x2: one pixel is enough for its cell, 0 is not above a half, an empty mask sees cls."""
    masks = torch.full((1, 3, 4, 4), -1.0)
    masks[0, 0, 0, 3], masks[0, 1] = 0.1, 0.0
    masks[0, 2, 2:] = 5
    assert visible(masks, (2, 2))[0].int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 1, 1]]


@torch.no_grad()
def test_patches_outside_its_mask_are_nothing_to_a_mask_token(net):
    """One block: patches beyond the mask are changed, its token is not, that of a larger mask is; an empty mask is finite."""
    z, sees = net.start(images(1), blob((0, 0, 4, 8), (0, 0, 5, 8), (0, 0, 0, 0)))
    changed_z = z.clone()
    changed_z[:, 1 + 32:65] += torch.randn(1, 32, 128)        # the patches of the four lower rows
    one, other = (net.step(4, each, sees, TEXT)[0, 65:] for each in (z, changed_z))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert torch.equal(one[2], other[2]) and one[2].isfinite().all()


@torch.no_grad()
def test_masks_are_nothing_to_the_image_and_to_each_other(net):
    """Together or one at a time, a mask gets the same logits; the tokens of the image never hear of masks."""
    image, masks = images(2), torch.randn(2, 4, 8, 8)
    together = net(image, TEXT, masks=masks)["classes"][0]
    for q in range(4):
        alone = net(image, TEXT, masks=masks[:, q:q + 1])["classes"][0]
        torch.testing.assert_close(alone[:, 0], together[:, q], atol=1e-4, rtol=1e-4)
    one, other = (last_tokens(net, image, each)[0] for each in (masks, masks[:, :1] - 1))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_seve_tells_names_to_the_first_blocks_alone(net):
    """Other names change the tokens of image and of masks after blocks 1 and 2, and what block 3 and later do with given
    tokens is the same for any names."""
    other = TEXT.flip(1)
    z, sees = net.start(images(1), blob((0, 0, 4, 4)))
    for l in range(6):
        one, two = (net.step(l, z, sees, text) for text in (TEXT, other))
        told = [not torch.equal(one[:, part], two[:, part]) for part in (slice(0, 65), slice(65, None))]
        assert told == [l < 2, l < 2], l


@torch.no_grad()
def test_names_in_another_order_get_their_own_logits(net):
    order = torch.tensor([3, 0, 4, 1, 2])
    one, other = (net(images(1), text)["classes"][0] for text in (TEXT, TEXT[order]))
    torch.testing.assert_close(one[..., order], other[..., :5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one[..., 5], other[..., 5], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("numbers, changes", [({}, True), (dict(seve=False), False)], ids=["seve", "no-seve"])
def test_a_fifth_name_changes_the_scores_of_the_other_four_with_seve_and_not_without(numbers, changes):
    """The price of asking early: what is seen depends on what is asked for."""
    model = fisa(**numbers).eval()
    for p in (*model.queries.parameters(), *model.seve.parameters()):
        p.add_(0.05 * torch.randn_like(p))
    four, five = (model(images(1), TEXT[:n])["classes"][0][..., :4] for n in (4, 5))
    assert ((four - five).abs().max() > 1e-3) == changes
    if not changes:
        torch.testing.assert_close(four, five, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_are_clips_scale_times_cosines_and_the_background_is_last(net):
    classes = net(images(1), torch.cat([TEXT, -TEXT]))["classes"][0]
    assert classes.shape == (1, 20, 11) and net.vlm.logit_scale > 1
    torch.testing.assert_close(classes[..., :5], -classes[..., 5:10], atol=1e-4, rtol=1e-4)
    g = F.normalize(net.background, dim=-1)
    with_g = net(images(1), torch.cat([TEXT, -TEXT]), masks=blob((0, 0, 8, 8)))["classes"][0]
    u = last_tokens(net, images(1), blob((0, 0, 8, 8)), torch.cat([TEXT, -TEXT]))[1]
    torch.testing.assert_close(with_g[..., 10], (net.vlm.logit_scale * net.vlm.project(u) @ g.T)[..., 0], atol=1e-4, rtol=1e-4)


def test_the_answer_is_sans(net):
    """Mask logits, the softmax of the classes, the background last."""
    out = dict(masks=[torch.zeros(2, 1, 2, 2)], classes=[torch.tensor([[[0.0, 0, 0]], [[3.0, 1, 2]]])])
    answer = net.answer(out, 1)
    assert answer.none and torch.equal(answer.maps, out["masks"][0][1])
    assert torch.equal(answer.mix, out["classes"][0][1].softmax(-1)) and answer.gate(torch.zeros(1)) == 0.5


# --- names for masks, and the loss -----------------------------------------------------------------------------------

LEFT = torch.where(torch.arange(8) < 4, 2, 1).expand(8, 8)                                # name 2 left, name 1 right


def test_many_masks_may_show_one_name_and_a_bad_one_shows_none_by_hand():
    """Dice costs by 1 - (2 both + 1) / (one + other + 1): 0 for the half itself, 1 - 49/57 for six of its eight rows; 16
    pixels in each half: 1 - 33/65 = .49, too far from both; nearly all of the right half: its name."""
    masks = blob((0, 0, 8, 4), (0, 0, 6, 4), (0, 2, 8, 6), (0, 5, 8, 8), (0, 0, 0, 0)) * 3
    assert names_of(masks[0], LEFT, 5, "dice", (0,)).tolist() == [2, 2, 5, 1, 5]


def test_the_cost_that_is_too_large_is_above_four_tenths():
    """20 of 32 pixels of the left half and 12 of the right: 1 - 41/65 = .369, named; 18 and 14: 1 - 37/65 = .43, not."""
    for n, name in ((20, 2), (18, 5)):
        halves = [(torch.arange(32) < m).view(8, 4) for m in (n, 32 - n)]                 # of the left and of the right
        mask = torch.where(torch.cat(halves, 1), 27.0, -27.0)
        assert names_of(mask[None], LEFT, 5, "dice", (0,)).tolist() == [name]


def test_masks_of_another_size_are_compared_at_the_labels():
    """A 4x4 mask of the left half of an 8x8 label; and unlabelled pixels belong to no name: a mask of them shows none."""
    mask = torch.full((2, 4, 4), -60.0)
    mask[0, :, :2], mask[1, :, 2:] = 60, 60
    label = torch.where(LEFT == 1, IGNORE, LEFT)
    assert names_of(mask, label, 5, "dice", (0,)).tolist() == [2, 5]
    assert names_of(mask, torch.full((8, 8), IGNORE), 5, "dice", (0,)).tolist() == [5, 5]


def test_one_to_one_names_each_region_once():
    """The better of two masks on one half takes its name, the other none; the same key, the same points."""
    masks = blob((0, 0, 6, 4), (0, 0, 8, 4), (0, 4, 8, 8)) * 3
    assert names_of(masks[0], LEFT, 5, "hungarian", (0, 1)).tolist() == [5, 2, 1]
    many = torch.randn(6, 8, 8)
    assert torch.equal(*(names_of(many, LEFT, 5, "hungarian", (3,)) for _ in range(2)))


def test_the_loss_by_hand(net):
    """Two masks, name 2 of L = 3 and background (3); logits (0, 0, log 5, 0): CE = log 8 - log 5 and log 8, weights 1 and
    .1, over BQ = 2, times 2.  A second picture without a label doubles BQ and adds two backgrounds."""
    logits = torch.tensor([0, 0, 5.0, 0]).clamp(min=1).log().expand(1, 2, 4)
    out = dict(masks=[blob((0, 0, 8, 4), (0, 2, 8, 6)) * 3], classes=[logits])
    terms = net.terms(out, Batch(None, LEFT[None], None, [(0,)], net.totals(LEFT[None]), 1))
    log5, log8 = torch.tensor(5.0).log(), torch.tensor(8.0).log()
    assert terms["ce"][0] == CE == 2 and terms["ce"][1].item() == pytest.approx(((log8 - log5 + 0.1 * log8) / 2).item())
    assert terms["named"][0] == 0 and terms["named"][1] == 0.5 and len(terms) == 2
    two = dict(masks=[out["masks"][0].expand(2, -1, -1, -1)], classes=[logits.expand(2, -1, -1)])
    labels = torch.stack([LEFT, torch.full((8, 8), IGNORE)])
    terms = net.terms(two, Batch(None, labels, None, [(0,), (1,)], net.totals(labels), 1))
    assert terms["ce"][1].item() == pytest.approx(((log8 - log5 + 0.3 * log8) / 4).item())
    assert terms["named"][1] == 0.25 and net.totals(labels).shape == (0,)


def test_the_assignment_is_the_configs():
    """Of two masks on the left half one has a name if names go one to one, both if not."""
    labels, out = LEFT[None], dict(masks=[blob((0, 0, 8, 4), (0, 0, 7, 4)) * 3], classes=[torch.zeros(1, 2, 4)])
    for assign, share in (("dice", 1.0), ("hungarian", 0.5)):
        model = fisa(assign=assign)
        terms = model.terms(out, Batch(None, labels.where(labels == 2, IGNORE), None, [(0, 1)], model.totals(labels), 1))
        assert terms["named"][1] == share


# --- what is trained, and what never moves ---------------------------------------------------------------------------


def test_the_worlds_sizes_are_pinned():
    """W_mask and W_img: six blocks of 128*128 + 128; SEVE twice 12,896; the background 64: 224,000.  By switches:"""
    queries, seve = 6 * (128 * 128 + 128), 2 * (128 * 32 + 32 + 2 * (64 * 32 + 32) + 32 * 128 + 128 + 256 + 128)
    assert (queries, seve) == (99_072, 25_792)
    for numbers, size in [({}, 224_000), (dict(seve=False), 2 * queries + 64), (dict(seve_blocks=1), 2 * queries + seve // 2 + 64),
                          (dict(simo="mask"), queries + seve + 64), (dict(simo="image"), queries + seve + 64),
                          (dict(simo="none"), seve + 64), (dict(seve=False, simo="none"), 64)]:
        model = fisa(**numbers)
        assert trainable(model) == size == sum(p.numel() for p in model.parameters() if p.requires_grad), numbers
    assert [*fisa(simo="mask").queries] == ["mask"] and [*fisa(simo="image").queries] == ["image"]


@pytest.mark.parametrize("name, size", [("coco", 16_155_392), ("coco-large", 57_760_512)])
def test_the_sizes_over_the_published_clips_are_pinned(name, size):
    """Over a SAN of that preset; shapes alone."""
    what = {**flat(preset(name, "san")), "run": "san", "weights": "0"}
    with torch.device("meta"):
        model = build(preset(name, "fisa", pretrained="none", generator="san", generator_is=json.dumps(what)))
    assert trainable(model) == size and model.stride == 32


def test_own_numbers_are_trained_and_nothing_else(net):
    """Names of all that is trained; each has a gradient, all but the image queries of the last block, whose answer nobody
    reads, one that is not zero."""
    config = small("fisa")
    found = first_gradients(config)
    assert {name.split(".")[0] for name in found} == {"seve", "queries", "background"}
    still = {name for name, gradient in found.items() if (gradient == 0).all()}
    assert still == {"queries.image.5.weight", "queries.image.5.bias"}


@pytest.fixture
def stepped():
    """(a model, its CLIP's and its generator's numbers and masks before, the model after two steps of AdamW in training mode)"""
    torch.manual_seed(0)
    config = small("fisa", lr=1e-2)
    model = build(config.run).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks, print_ = model.generator(images(2), TEXT[:0])["masks"][-1], fingerprint(model)
    optimizer, = model.optimizers(parameter_groups(model, config.recipe), config.recipe)
    for _ in range(2):
        optimizer.zero_grad()
        gradients(model, model.vlm.embed_text(World.train_names), micro_batches(config), config)
        optimizer.step()
    return model, before, masks, print_


def test_neither_clip_nor_the_generator_moves(stepped):
    """Every number of theirs bit for bit, and the masks, in training mode too; CLIP's fingerprint; ours did move."""
    model, before, masks, print_ = stepped
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"seve", "queries", "background"}
    assert model.training and not any(module.training for module in model.generator.modules())
    out = model(images(2), TEXT)
    assert torch.equal(out["masks"][0], masks) and not out["masks"][0].requires_grad and fingerprint(model) == print_
    assert not any(p.requires_grad for p in model.generator.parameters()) and not any(p.requires_grad for p in model.vlm.parameters())


@pytest.mark.parametrize("kind", ["san", "pat"])
@torch.no_grad()
def test_masks_are_those_of_the_generators_run(kind):
    """Bit for bit as the run itself gives them, one set of masks, over the same CLIP: no second copy of its weights."""
    theirs, _ = load_run(generator(kind))
    model = fisa(generator=generator(kind)).eval()
    own = model(images(1), TEXT)["masks"]
    assert len(own) == 1 and torch.equal(own[0], theirs(images(1), TEXT)["masks"][-1])
    assert model.stride == theirs.stride == 8 and type(model.generator) is type(theirs)
    a, b = (dict(each.model.visual.named_parameters()) for each in (model.vlm, model.generator.vlm))
    assert a.keys() - b.keys() == {"positional_embedding"} and all(a[name] is p for name, p in b.items())
    assert not torch.equal(model.vlm.positions, model.generator.vlm.positions)
    assert model.notes("cpu") == f"masks of {generator(kind)}, {kind.upper()}, frozen"


def test_a_generator_of_another_scale_keeps_its_own(tmp_path):
    """It sees CLIP's maps where it was trained on them."""
    config = tiny("san", depths=(0, 2, 3, 4))
    torch.manual_seed(0)
    run = save_run(tmp_path / "san", build(config.run), config, 1300)
    assert fisa(generator=str(run)).generator.vlm.depths == (0, 2, 3, 4) and fisa().generator.vlm.depths == (0, 1, 2, 3)


# --- a run directory that stays whole --------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """(a run of FISA, the run of its generator, what it answers): nobody else's."""
    theirs = tmp_path / "san"
    shutil.copytree(generator(), theirs)
    config = small("fisa", generator=str(theirs))
    torch.manual_seed(0)
    model = build(config.run).eval()
    run = save_run(tmp_path / "run", model, config, config.recipe.steps)
    with torch.no_grad():
        return run, theirs, model(images(1), TEXT)


@torch.no_grad()
def same(run, out):
    found = load_run(run)[0](images(1), TEXT)
    return torch.equal(found["masks"][0], out["masks"][0]) and torch.equal(found["classes"][0], out["classes"][0])


def test_a_run_is_whole_without_its_generators(runs, tmp_path):
    """It loads with the generator's run beside it, after that is deleted, after it was trained anew, and moved elsewhere."""
    run, theirs, out = runs
    assert same(run, out)
    shutil.rmtree(theirs)
    assert same(run, out)
    shutil.copytree(generator(seed=1), theirs)                # the same place, other numbers
    assert same(run, out)
    (theirs / "config.json").write_text("{")                  # and what stands there may be broken
    assert same(run, out)
    shutil.move(run, tmp_path / "moved")
    assert same(tmp_path / "moved", out)


def test_the_checkpoint_holds_the_whole_generator_and_nothing_of_clip(runs):
    run, theirs, _ = runs
    own, given = (part(read_checkpoint(path)[0], "model.") for path in (run, theirs))
    held = {name.split(".", 2)[2]: value for name, value in own.items() if name.startswith("generators.")}
    assert given.keys() <= held.keys() and all(torch.equal(held[name], value) for name, value in given.items())
    extra = {name for name in held.keys() - given.keys()}
    assert all(name.startswith("vlm.") and "mask" in name for name in extra)              # open_clip's constant masks
    assert json.loads(load_config(run).net.generator_is)["model"] == "san"


def test_a_checkpoint_of_another_generator_is_refused(runs, tmp_path):
    """Of the same shapes: a run whose checkpoint was taken from a run over another SAN."""
    run, _, _ = runs
    other = small("fisa", generator=generator(seed=1))
    torch.manual_seed(0)
    save_run(tmp_path / "other", build(other.run), other)
    shutil.copy(tmp_path / "other" / "checkpoint.safetensors", run / "checkpoint.safetensors")
    with pytest.raises(InputError, match="entries do not fit this model, the first is generators"):
        load_run(run)


@torch.no_grad()
def test_without_its_generator_and_without_a_checkpoint_nothing_is_answered(runs):
    """NaN, which stops a training with one line, and never masks of random numbers."""
    run, theirs, _ = runs
    shutil.rmtree(theirs)
    config = load_config(run)
    torch.manual_seed(0)
    assert build(config).eval()(images(1), TEXT)["masks"][0].isnan().all()


def test_a_config_that_was_built_once_builds_again_and_over_another(runs):
    """`generator_is` is written into it; a new `generator` counts for more than what the last one was."""
    _, theirs, out = runs
    config = small("fisa", generator=str(theirs)).run
    masks = []
    for each in (config, config, changed(config, generator=generator("pat")), changed(config, generator=generator(seed=1))):
        torch.manual_seed(0)
        model = build(each).eval()
        with torch.no_grad():
            masks.append(model(images(1), TEXT)["masks"][0])
    assert json.loads(config.net.generator_is)["run"] == str(theirs)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], out["masks"][0])
    assert not any(masks[k].isnan().any() or torch.equal(masks[0], masks[k]) for k in (2, 3))


def test_twenty_steps_over_five_of_san_are_trained_resumed_scored_and_drawn(tmp_path, capsys):
    """By the commands themselves, and the generator's run deleted half-way."""
    san = train.train(changed(tiny("san"), steps=5, out=str(tmp_path / "san")))
    numbers = dict(generator=str(san), steps=20, stop_at=10, lr=3e-3, warmup=2, out=str(tmp_path / "run"))
    run = train.train(small("fisa", **numbers))
    shutil.rmtree(san)
    config, resume, device = train.parse(["--resume", str(run), "--device", "cpu"])
    train.train(config, resume, device)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and {"ce", "named"} <= lines[0].keys() and lines[0]["grad_norm"] > 0
    assert {"scores.txt", "scores.json", "samples.png", "report.html", "pictures"} <= {path.name for path in run.iterdir()}
    assert {path.name for path in (run / "pictures").iterdir()} == {"masks.png", "curves.png"}
    said = capsys.readouterr()
    assert f"masks of {san}, SAN, frozen" in said.out + said.err
    oracle([str(run), "--images", "2"])
    assert (run / "pictures" / "oracle.png").exists() and "oracle masks, plain bias" in capsys.readouterr().out


def test_twenty_steps_lower_the_loss():
    """On one batch, over the masks of a SAN that was never trained."""
    torch.manual_seed(0)
    config = small("fisa", lr=1e-3)
    model, batch = build(config.run).train(), micro_batches(config)
    optimizer, = model.optimizers(parameter_groups(model, changed(config.recipe, lr=1e-3)), config.recipe)
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        terms, _ = gradients(model, model.vlm.embed_text(World.train_names), batch, config)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        found.append(terms["ce"].item())
    assert found[-1] < 0.7 * found[0]


# --- numbers, switches, bad input ------------------------------------------------------------------------------------


def test_the_recipes():
    """1,300 steps of the world's at 3e-4; 10,000 of 8 images at 1e-4 over the published CLIPs.  A third of the blocks is told."""
    loop = recipe("world", "fisa").recipe
    assert (loop.steps, loop.batch, loop.lr, loop.warmup, loop.weight_decay, loop.grad_clip) == (1300, 8, 3e-4, 50, 0.01, 1.0)
    for name in ("coco", "coco-large"):
        loop = recipe(name, "fisa").recipe
        assert (loop.steps, loop.batch, loop.lr, loop.weight_decay, loop.grad_clip) == (10_000, 8, 1e-4, 0.05, 0.01)
    told = {name: preset(name, "fisa").net.seve_blocks for name in FISA.PRESETS}
    assert told == {"world": 2, "coco": 4, "coco-eva": 4, "coco-large": 8, "coco-eva-large": 8}
    assert {name: preset(name, "fisa").net.generator for name in ("world", "coco")} == {
        "world": "runs/world-pat-0", "coco": "runs/coco-pat-0"}


def test_every_switch_is_a_row():
    assert FISA.ABLATIONS == {
        "no-seve": dict(seve=False), "seve-1-block": dict(seve_blocks=1), "simo-mask": dict(simo="mask"),
        "simo-image": dict(simo="image"), "no-simo": dict(simo="none"), "hungarian": dict(assign="hungarian"),
        "untrained": dict(seve=False, simo="none")}
    config, _, _ = train.parse(["--model", "fisa", "--ablate", "untrained", "--set", "generator=runs/x", "--device", "cpu"])
    assert (config.run.net.seve, config.run.net.simo, config.run.net.generator) == (False, "none", "runs/x")


def refused(says, **numbers):
    """The one line that these numbers end in."""
    torch.manual_seed(0)
    with pytest.raises(InputError, match=says) as error:
        build(small("fisa", **numbers).run)
    assert "\n" not in str(error.value)


def test_a_generator_that_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch):
    """None, missing, a file, of another kind, half trained, over another CLIP, damaged."""
    monkeypatch.chdir(tmp_path)
    refused(r"generator \(none\): no finished run there; `python train.py` makes", generator="")
    refused("generator runs/world-pat-0: no finished run there; .* --set generator=RUN", generator="runs/world-pat-0")
    (tmp_path / "file").write_text("")
    refused("generator file: no finished run there", generator="file")
    dense = small("dense")
    torch.manual_seed(0)
    save_run(tmp_path / "dense", build(dense.run), dense, 1300)
    refused("generator dense: is a run of Dense; FISA takes the masks of SAN or of PAT", generator="dense")
    san = tiny("san", steps=20)
    torch.manual_seed(0)
    save_run(tmp_path / "half", build(san.run), san, 19)
    refused("generator half: stopped after 19 of 20 steps; finish it with `python train.py --resume half`", generator="half")
    torch.manual_seed(7)
    save_run(tmp_path / "other", build(san.run), san, 20)
    refused("generator other: sees through another CLIP than world, 'none'; give --vlm world --pretrained none",
            generator="other")
    (tmp_path / "other" / "checkpoint.safetensors").write_bytes(b"no")
    refused("not a readable checkpoint", generator="other")
    (tmp_path / "half" / "config.json").write_text("{")
    refused("half: no run directory", generator="half")


def test_a_run_of_fisa_is_no_generator(runs):
    run, _, _ = runs
    refused("is a run of FISA; FISA takes the masks of SAN or of PAT", generator=str(run))


@pytest.mark.parametrize("numbers, says", [
    (dict(simo="masks"), "simo masks: there are image-mask, image, mask, none"),
    (dict(assign="nearest"), "assign nearest: there are dice, hungarian"),
    (dict(seve_blocks=0), "seve_blocks 0: takes a whole number from 1"), (dict(seve_heads=0), "seve_heads 0: takes a whole number from 1"),
    (dict(seve_blocks=7), "seve_blocks 7: world has 6 blocks"), (dict(seve_heads=5), "seve_heads 5 does not divide the width 32"),
    (dict(generator_is="5"), "generator_is: is written by the training itself"),
    (dict(generator_is="{"), "generator_is: is written by the training itself")])
def test_numbers_that_do_not_fit_are_refused(numbers, says):
    refused(says, **numbers)


def test_seve_may_be_told_to_every_block_and_is_not_asked_where_it_is_off():
    assert len(fisa(seve_blocks=6).seve) == 6 and len(fisa(seve=False, seve_blocks=7).seve) == 0


def test_eva_is_refused(monkeypatch):
    """Its blocks have other parts; said before anything else."""
    monkeypatch.setattr("siblings.fisa.load_vlm", lambda *args, **kwargs: torch.nn.Identity())
    refused("vlm EVA02-B-16: FISA reads the blocks of OpenAI's ViTs", vlm="EVA02-B-16", pretrained="none")


def test_its_parts_are_timed_apart(net):
    assert net.parts()["generator"] == [net.generator] and net.parts()["SEVE"] == [*net.seve]
    assert Path(generator()).name == "san"
