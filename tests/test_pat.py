"""The model: what flows where, what each switch of Table II changes, how large it is."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from images import InputError
from pat import PYRAMID, STAGES, TokenMixer, build, fingerprint, load_run, load_weights, preset, trained_state
from san import trainable
from train import recipe, save_checkpoint

TEXT = F.normalize(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), dim=-1)


def world(**changes):
    torch.manual_seed(0)
    return build(preset("world", pretrained="none", **changes))


def images(n=2):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def every_gradient(model, out):
    """Backward under a random upstream gradient; the trained parameters that got none."""
    leaves = out["masks"] + out["classes"] + [out["image"]] + [t.zq for t in out["tokens"].values()]
    loss = sum((x * torch.randn_like(x)).sum() for x in leaves) + sum(t.loss for t in out["tokens"].values())
    loss.backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_the_shapes_of_the_header_at_the_worlds_size():
    out = world()(images(), TEXT)
    assert out["image"].shape == (2, 3, 64, 64)
    assert [m.shape for m in out["masks"]] == [(2, 20, 32, 32)] * 2 and [c.shape for c in out["classes"]] == [(2, 20, 6)] * 2
    assert {s: tuple(t.index.shape) for s, t in out["tokens"].items()} == {
        "early": (2, 32, 32), "mid": (2, 16, 16), "late": (2, 8, 8), "latent": (2, 8, 8)}


def test_every_trained_parameter_gets_a_gradient():
    model = world()
    assert every_gradient(model, model(images(), TEXT)) == []


def test_pyramid_codes_know_nothing_of_queries_and_side_blocks():
    """Change every side block, the queries and the semantic stages: early, mid, late stay bit for bit, latent moves."""
    model = world().eval()
    before = model(images(), TEXT)["tokens"]
    private = ("side.blocks", "side.query", "side.pos_embed", "side.patch_embed", "semantic")
    other = {n: torch.randn_like(p) for n, p in model.named_parameters() if n.startswith(private)}
    after = functional_call(model, other, (images(), TEXT))["tokens"]
    assert all(torch.equal(before[s].zq, after[s].zq) for s in PYRAMID)
    assert not torch.equal(before["latent"].index, after["latent"].index)


def test_pyramid_codes_send_no_gradient_to_queries_and_side_blocks():
    """And they do send one to what the branches share: the fusion convolutions."""
    model = world()
    tokens = model(images(), TEXT)["tokens"]
    sum((tokens[s].zq * torch.randn_like(tokens[s].zq)).sum() for s in PYRAMID).backward()
    for name, p in model.named_parameters():
        if name.startswith(("side.", "semantic.")):
            assert p.grad is None or not p.grad.any(), name
    assert model.fusion[1].proj.weight.grad.abs().sum() > 0 and model.pixels.down["early"][0].weight.grad.abs().sum() > 0


def test_codes_learn_from_the_quantiser_and_from_the_semantic_branch():
    for of in ("vq", "masks"):
        model = world()
        out = model(images(), TEXT)
        loss = sum(t.loss for t in out["tokens"].values()) if of == "vq" else (out["masks"][1] * torch.randn(2, 20, 32, 32)).sum()
        loss.backward()
        assert all(model.pixels.vq[s].codebook.grad.abs().sum() > 0 for s in PYRAMID), of


def test_token_mixer_mixes_tokens_and_not_channels():
    mixer, t = TokenMixer(6, 4, 8), torch.randn(1, 6, 5)
    changed = t.clone()
    changed[..., 2] += 1
    difference = (mixer(changed) - mixer(t)).abs().sum((0, 1))
    assert mixer(t).shape == (1, 4, 5) and (difference > 0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("changes, claim", [
    (dict(vmf=False), lambda m, out: type(m.semantic[0].hsattn).__name__ == "Attn"
     and not torch.allclose(out["tokens"]["early"].zq.norm(dim=1), torch.ones(2, 32, 32))),
    (dict(scales=(4, 4, 4)), lambda m, out: all(out["tokens"][s].index.shape[-1] == 32 for s in PYRAMID)),
    (dict(scales=(1, 1, 1)), lambda m, out: all(out["tokens"][s].index.shape[-1] == 8 for s in PYRAMID)),
    (dict(mixer=False), lambda m, out: not any("mix" in n or "hsattn" in n or ".tok." in n for n, _ in m.named_parameters())),
    (dict(residual=False), lambda m, out: m.pixels.down is None),
    (dict(unified=True), lambda m, out: not any("codebook" in n for n, _ in m.named_parameters())
     and all(len(m.codebook(s)) == 20 for s in STAGES)),
    (dict(separate_decoders=True), lambda m, out: m.decoder.pixel_head is None and m.pixel_decoder.head is None),
    (dict(decoder_stages=("mid", "late")), lambda m, out: set(m.decoder.spade) == {"mid", "late"}),
    (dict(decoder_stages=("late",)), lambda m, out: set(m.decoder.spade) == {"late"}),
    (dict(decoder_stages=()), lambda m, out: len(m.decoder.spade) == len(m.decoder.cross) == 0),
    (dict(decoder_attention="full"), lambda m, out: m.decoder.pool(torch.zeros(1, 32, 32, 1), (8, 8)) == 1),
], ids=str)
def test_every_switch_changes_what_it_claims_and_leaves_no_idle_parameter(changes, claim):
    model = world(**changes)
    out = model(images(), TEXT)
    assert claim(model, out) and not claim(world(), world()(images(), TEXT))
    assert out["image"].shape == (2, 3, 64, 64)
    assert every_gradient(model, out) == []


def test_without_residual_the_codes_do_not_see_pixels_that_clip_does_not():
    """CLIP's maps held fixed, other pixels: only with the residual do the early tokens change."""
    for residual, same in ((True, False), (False, True)):
        model = world(residual=residual)
        f = [torch.randn(1, 96, 8, 8) for _ in range(3)]
        given = dict.fromkeys(PYRAMID)
        a, b = (model.pixels(images(1) * k, f, given)["early"].x for k in (1.0, -1.0))
        assert torch.equal(a, b) == same


def test_the_reference_sizes_are_the_papers():
    """"23M" in the paper; the exact counts are ours and pinned."""
    assert trainable(build(preset("coco", pretrained="none"))) == 23_335_361
    assert trainable(build(preset("coco-eva", pretrained="none"))) == EVA
    assert trainable(world()) == 1_878_401


EVA = 23_335_361


def test_tokens_may_be_as_fine_as_pixels():
    """The first scale equal to the patch: nothing is left to halve in the stem, nor to expand in the pixel head."""
    assert world(scales=(8, 4, 2))(images(), TEXT)["tokens"]["early"].index.shape == (2, 64, 64)


def test_any_multiple_of_the_patch_works_and_batch_does_not_matter():
    model, wide = world().eval(), torch.randn(2, 3, 48, 80)
    out = model(wide, TEXT)
    assert out["image"].shape == (2, 3, 48, 80) and out["masks"][0].shape == (2, 20, 24, 40)
    torch.testing.assert_close(model(wide[:1], TEXT)["image"], out["image"][:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes, says", [
    (dict(scales=(4, 3, 1)), "--scales 4 3 1|factor of 3"), (dict(scales=(1, 2, 4)), "--scales"),
    (dict(scales=(4, 2)), "--scales 4 2: takes 3"), (dict(scales=(16, 8, 4)), "the stem is a factor"),
    (dict(scales=(16, 16, 16), residual=False), "the pixel head"), (dict(codes=(8, 8, 8)), "--codes 8 8 8: takes 4"),
    (dict(decoder_stages=("top",)), "top"), (dict(model="pot"), "pot"), (dict(heads=5), "--heads 5 does not divide"),
    (dict(hs_heads=7), "--hs-heads 7"), (dict(decoder_attention="ful"), "--decoder-attention ful"),
    (dict(model="san", mixer=False), "--model san has no mixer")], ids=str)
def test_numbers_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        world(**changes)


# --- checkpoints ---


@pytest.fixture
def run(tmp_path):
    import json
    from dataclasses import asdict

    config = recipe("world", pretrained="none")
    torch.manual_seed(config.seed)
    model = build(config)
    with torch.no_grad():
        model.background.add_(1)
    save_checkpoint(tmp_path / "checkpoint.safetensors", model, torch.optim.AdamW(model.parameters()), 7, None)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    return tmp_path, model


def test_a_run_loads_as_it_was_saved(run):
    path, model = run
    loaded, config = load_run(path)
    assert config.preset == "world" and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_a_checkpoint_holds_what_training_changes_and_not_the_frozen_clip(run):
    names = set(trained_state(run[1]))
    assert "vlm.model.visual.positional_embedding" in names and "latent.idle" in names
    assert not any("resblocks" in name for name in names)


def test_other_clip_weights_have_another_fingerprint():
    a, b = world(), world()
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        b.vlm.model.visual.ln_post.bias[0] += 1e-3
    assert fingerprint(a) != fingerprint(b)


def test_damaged_and_foreign_checkpoints_are_refused(run, tmp_path):
    path, model = run
    checkpoint = path / "checkpoint.safetensors"
    with pytest.raises(InputError, match="another preset or other switches"):
        load_weights(world(mixer=False), checkpoint)
    other = world()
    with torch.no_grad():
        other.vlm.model.visual.proj.add_(1)
    with pytest.raises(InputError, match="other CLIP weights"):
        load_weights(other, checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(InputError, match="checkpoint.safetensors: not a readable checkpoint"):
        load_run(path)
    checkpoint.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_run(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="no run directory"):
        load_run(path)
