"""What tuned.py promises: CLIP as it was until a copy moves, dense features by hand, and CLIP itself never touched."""

import copy

import pytest
import torch

from cli import InputError
from clip import load_vlm
from siblings.tuned import Tuned

DEPTHS = (0, 2, 4, 5)


@pytest.fixture
def vlm():
    """None of its numbers is what it starts with, biases of zero least of all."""
    vlm = load_vlm("world", "none", scale=1.0, depths=DEPTHS).requires_grad_(False)
    for p in vlm.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return vlm


def image(n=2, h=64, w=96):
    return torch.randn(n, 3, h, w)


def replaced(vlm, tuned):
    """A CLIP of its own whose queries and values are the copies."""
    other = copy.deepcopy(vlm)
    for block, q, v in zip(other.blocks, tuned.q, tuned.v):
        width = len(q)
        block.attn.in_proj_weight.data[:width], block.attn.in_proj_weight.data[2 * width:] = q.data, v.data
    return other


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < tolerance * b.abs().max()


def test_there_is_a_copy_of_q_and_v_for_every_block_and_nothing_else(vlm):
    """Twelve matrices of 128x128 in the world: 196,608 numbers."""
    tuned = Tuned(vlm)
    assert {name: tuple(p.shape) for name, p in tuned.named_parameters()} == {"q": (6, 128, 128), "v": (6, 128, 128)}
    assert all(p.requires_grad for p in tuned.parameters()) and not list(tuned.buffers())
    for block, q, v in zip(vlm.blocks, tuned.q, tuned.v):
        own = block.attn.in_proj_weight
        assert torch.equal(q, own[:128]) and torch.equal(v, own[256:]) and q.data_ptr() != own.data_ptr()


def test_copies_that_nobody_moved_see_what_clip_sees(vlm):
    """The maps after blocks 2 and 4 are those that clip.VLM.features gives, in this order, on a grid of 8x12."""
    x = image()
    _, maps = Tuned(vlm)(vlm, x)
    assert maps[0].shape == (2, 128, 8, 12)
    for ours, clips in zip(maps, vlm.features(x).maps[1:3], strict=True):
        close(ours, clips, 1e-6)


def test_dense_features_by_hand(vlm):
    """The last block's values of every token, plus cls, through its MLP, the last norm and the projection: no unit rows."""
    x = image()
    f, _ = Tuned(vlm)(vlm, x)
    before, grid = vlm.embed(x)
    before = vlm.run(vlm.blocks[:-1], before, grid)                                       # (B,1+P,C)
    block = vlm.blocks[-1]
    y = vlm.values(block, before) + before[:, 0, None]
    y = y + block.mlp(block.ln_2(y))
    want = vlm.model.visual.ln_post(y) @ vlm.model.visual.proj
    close(f.flatten(2).transpose(1, 2), want[:, 1:])
    assert f.shape == (2, 64, 8, 12) and (f.norm(dim=1) - 1).abs().min() > 0.01


def test_moved_copies_act_as_if_clip_were_so(vlm):
    """Every q and v at random: as a CLIP that has them inside, while this one stays as it was; no other order will do."""
    tuned, before, x = Tuned(vlm), copy.deepcopy(vlm.state_dict()), image(1, 64, 64)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p))
    f, maps = tuned(vlm, x)
    other = replaced(vlm, tuned)
    want, clips = Tuned(other)(other, x)
    close(f, want)
    for ours, theirs, clip in zip(maps, clips, other.features(x).maps[1:3]):
        close(ours, theirs)
        close(ours, clip)
    assert (f - Tuned(vlm)(vlm, x)[0]).abs().max() > 0.01
    assert all(torch.equal(value, vlm.state_dict()[name]) for name, value in before.items())


def test_every_copy_learns_but_the_last_query(vlm):
    """Keys are CLIP's, so are biases; the last block mixes nothing, so that no query is asked for: a gradient of 0."""
    tuned = Tuned(vlm)
    f, maps = tuned(vlm, image(1, 64, 64))
    (f * torch.randn_like(f)).sum().backward()
    moved = {name: [grad.abs().max() > 0 for grad in p.grad] for name, p in tuned.named_parameters()}
    assert moved == {"q": [True] * 5 + [False], "v": [True] * 6}
    assert all(p.grad is None for p in vlm.parameters())


def test_how_far_the_copies_are_by_hand(vlm):
    """All of q by .5, half of v by 3."""
    tuned = Tuned(vlm)
    assert tuned.drift(vlm) == (0, 0)
    with torch.no_grad():
        tuned.q -= 0.5
        tuned.v[:3] += 3
    assert tuned.drift(vlm) == pytest.approx((0.5, 1.5))


@pytest.mark.parametrize("depths", [(0, 0, 4, 5), (0, 2, 6, 6)])
def test_maps_from_no_block_or_from_the_last_are_refused(depths):
    with pytest.raises(InputError, match="the second and the third take numbers from 1 to 5|depths 0 2 6 6: takes rising numbers below 6"):
        Tuned(load_vlm("world", "none", scale=1.0, depths=depths))


def test_one_image_is_seen_as_in_a_batch(vlm):
    tuned, x = Tuned(vlm), image()
    close(tuned(vlm, x)[0][1:], tuned(vlm, x[1:])[0])
