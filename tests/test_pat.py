"""The model: what flows where, what each switch of Table II changes, how large it is, and how its codes live and restart."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch.func import functional_call

import losses
import pat
import train
from cli import InputError
from data import PADDING, rng_for, to_unit
from hsattn import g
from pat import PAT, PYRAMID, RESTART, STAGES, PATConfig, TokenMixer
from published.perceptual import load_lpips
from runs import build, changed, flat, load_run, preset
from san import SAN, tokens, trainable
from segmenter import Batch
from tests.helpers import TEXT, images, micro_batches, randomised, tiny, world
from train import gradients
from vq import codebook_health
from world.scenes import World


def every_gradient(model, out):
    """Backward under a random upstream gradient; the trained parameters that got none."""
    leaves = out["masks"] + out["classes"] + [out["image"]] + [t.zq for t in out["tokens"].values()]
    loss = sum((x * torch.randn_like(x)).sum() for x in leaves) + sum(t.loss.mean() for t in out["tokens"].values())
    loss.backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_the_shapes_of_the_header_at_the_worlds_size():
    model = world()
    out = model(images(), TEXT)
    assert [len(model.codebook(stage)) for stage in STAGES] == [128, 64, 32, 256]
    assert out["image"].shape == (2, 3, 64, 64)
    assert [m.shape for m in out["masks"]] == [(2, 20, 32, 32)] * 2 and [c.shape for c in out["classes"]] == [(2, 20, 6)] * 2
    assert {s: tuple(t.index.shape) for s, t in out["tokens"].items()} == {
        "early": (2, 32, 32), "mid": (2, 16, 16), "late": (2, 8, 8), "latent": (2, 8, 8)}


def test_every_trained_parameter_gets_a_gradient():
    model = world()
    assert every_gradient(model, model(images(), TEXT)) == []


@pytest.mark.parametrize("separate", [False, True])
def test_recompute_reaches_every_decoder(separate):
    model = world(separate_decoders=separate, recompute=True)
    decoders = [model.decoder, model.pixel_decoder] if separate else [model.decoder]
    assert all(decoder.recompute for decoder in decoders) and not world().decoder.recompute


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
    assert model.fusion[1].proj.weight.grad.abs().sum() > 0 and model.pixels.down[PYRAMID[0]][0].weight.grad.abs().sum() > 0


def test_local_tokens_listen_to_the_image_and_the_stage_before_but_not_to_global_ones():
    """The paper's flow is bottom-up: other queries, the same t to the last bit; another image or stage before, another t."""
    stage, codes = world().semantic[1], torch.randn(64, 32)
    q, z, before = torch.randn(2, 20, 96), torch.randn(2, 64, 96), torch.randn(2, 128, 96)
    t, q_out = stage(codes, q, z, before)
    assert torch.equal(stage(codes, -q, z, before)[0], t)
    assert not torch.equal(stage(codes, q, -z, before)[0], t) and not torch.equal(stage(codes, q, z, -before)[0], t)
    assert not torch.equal(stage(codes, q, z, -before)[1], q_out)             # while q does listen to t


@pytest.mark.parametrize("of", ["image", "masks"])
def test_both_tasks_train_the_features_of_all_four_stages(of):
    """Straight through the codes, so through the decoder's zq: the semantic branch has none of W_pre."""
    model = world()
    made = model(images(), TEXT)[of]
    made = made[-1] if of == "masks" else made
    (made * torch.randn_like(made)).sum().backward()
    assert all(vq.pre.weight.grad.abs().sum() > 0 for vq in model.quantisers().values())


def test_codes_learn_from_the_quantiser_and_from_the_semantic_branch():
    for of in ("vq", "masks"):
        model = world()
        out = model(images(), TEXT)
        loss = sum(t.loss.mean() for t in out["tokens"].values()) if of == "vq" else (out["masks"][1] * torch.randn(2, 20, 32, 32)).sum()
        loss.backward()
        assert all(model.pixels.vq[s].codebook.grad.abs().sum() > 0 for s in PYRAMID), of


def test_the_unified_codebook_is_the_queries_and_trains_them():
    """Straight through is no way to a code, so no output of the walk tells: L_VQ's gradient goes by `codebook`."""
    model = randomised(world(unified=True))
    for stage in STAGES:
        codes = model.codebook(stage)
        torch.testing.assert_close(codes, unit(model.side.query_embed[0] @ model.to_code.weight.T + model.to_code.bias))
        assert torch.autograd.grad(codes[:, 0].sum(), model.side.query_embed)[0].any()


def test_token_mixer_mixes_tokens_and_not_channels():
    mixer, t = TokenMixer(6, 4, 8), torch.randn(1, 6, 5)
    changed = t.clone()
    changed[..., 2] += 1
    difference = (mixer(changed) - mixer(t)).abs().sum((0, 1))
    assert mixer(t).shape == (1, 4, 5) and (difference > 0).tolist() == [False, False, True, False, False]


# --- the figure: every line of the header again, in plain calls ---


def test_without_semantic_stages_the_side_vit_is_sans(monkeypatch):
    """The same fusion after the same blocks, the same positions before them: what SAN's mask head is given, bit for bit."""
    model, san = world(depth=5).eval(), world("san", depth=5).eval()
    shared = {n: p for n, p in model.state_dict().items() if n.startswith(("side.", "fusion.", "vlm."))}
    missing, unknown = san.load_state_dict(shared, strict=False)
    assert not unknown and all(name.startswith(("head.", "background")) for name in missing)
    given, kept = [], {}
    head, latent = san.head.forward, model.latent.forward
    monkeypatch.setattr(san.head, "forward", lambda q, z: given.append((q, z)) or head(q, z))
    for stage in model.semantic:
        monkeypatch.setattr(stage, "forward", lambda codes, q, z, t: (t, q))
    monkeypatch.setattr(model.latent, "forward", lambda z, codes: kept.update(z=z) or latent(z, codes))
    san(images(), TEXT)
    _, q = model.walk(images(), model.fuse(images())[1])
    (sans_q, sans_z), = given
    assert torch.equal(q, sans_q) and torch.equal(kept["z"].permute(0, 2, 3, 1), sans_z)


def by_hand(model, image):
    """Tokens and q of a PAT, as pat.py's header writes them down, the branches one after the other."""
    _, f = model.fuse(image)
    found, x = {}, image                                                      # the pixel branch, alone
    for i, stage in enumerate(PYRAMID):
        x = model.pixels.down[stage](x)
        u = model.pixels.up[stage](f[i + 1]) + x
        found[stage] = model.pixels.vq[stage](u, model.given())
    side, Q = model.side, model.config.side.queries                           # the side ViT and the semantic branch
    pos = side.positions(tuple(f[0].shape[-2:]))
    start = torch.cat([side.query_embed.expand(len(image), -1, -1), tokens(side.patch_embed(image))], 1) + pos
    q, z, t = start[:, :Q], start[:, Q:] + tokens(f[0]), None
    for i, block in enumerate(side.blocks):
        x = torch.cat([q, z], 1) + (pos if i else 0)
        x = block(x)
        q, z = x[:, :Q], x[:, Q:]
        if i < 3:
            z, part = z + tokens(f[i + 1]), model.semantic[i]
            start = q if part.tok is None else part.tok(model.codebook(PYRAMID[i])).expand(len(image), -1, -1)
            t = start if i == 0 else start + part.mix_before(t)
            t = part.norm_t(t + part.hsattn(t, z, z))
            q = part.norm_q(q + part.attn(q + part.mix(t), z, z))
    found["latent"] = model.latent(z.transpose(1, 2).unflatten(2, f[0].shape[-2:]), model.given())
    return found, q


@pytest.mark.parametrize("switches", [{}, dict(unified=True), dict(scales=(4, 4, 4), depth=5)], ids=str)
@torch.no_grad()
def test_the_walk_is_the_headers_lines(switches):
    """On an oblong batch: the loop that interleaves the two branches gives what each gives alone."""
    model, image = world(**switches).eval(), images(2, 48, 80)
    found, q = model.walk(image, model.fuse(image)[1])
    expected, expected_q = by_hand(model, image)
    assert torch.equal(q, expected_q) and list(found) == list(expected) == list(STAGES)
    assert all(torch.equal(getattr(found[s], part), getattr(expected[s], part)) for s in STAGES for part in ("zq", "index", "x"))


# --- Eq. 2, from the design alone: no forward of a sub-module runs but the side ViT's blocks and DySample ---


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def rows(m):
    """A map (B,S,h,w) as rows (B,h*w,S)."""
    return m.flatten(2).transpose(1, 2)


def conv(layer, x, **how):
    """A convolution by its weights, with the strides that the design names."""
    return F.conv2d(x, layer.weight, layer.bias, **how)


def attended(layer, heads, q, k, v, kappa=None):
    """Attn, one head after the other; with `kappa` HSAttn: q, k and what comes out on the sphere, v not."""
    q, k, v = layer.q(q), layer.k(k), layer.v(v)
    width, out = q.shape[-1] // heads, []
    for i in range(heads):
        q_i, k_i, v_i = (x[..., i * width:(i + 1) * width] for x in (q, k, v))
        scores = q_i @ k_i.mT / width**0.5 if kappa is None else kappa * unit(q_i) @ unit(k_i).mT
        moved = scores.exp() / scores.exp().sum(-1, keepdim=True) @ v_i                   # softmax over the features
        out.append(moved if kappa is None else unit(moved))
    return layer.out(torch.cat(out, -1))


def mix(mixer, t):
    """(B,N,S) -> (B,M,S): three linears along the token axis, GELU between them."""
    first, second, third = mixer.mlp.layers
    return third(F.gelu(second(F.gelu(first(t.mT))))).mT


def assigned(u, vq, codes, metric):
    """The code of the largest cosine with the gradient of the unit feature; off the sphere all of it on raw vectors: the
    code of the largest dot product, or the nearest one."""
    x = rows(conv(vq.pre, u))                                                             # (B,h*w,D)
    x, codes = (unit(x), unit(codes)) if metric == "cosine" else (x, codes)
    index = torch.cdist(x, codes).argmin(-1) if metric == "euclidean" else (x @ codes.T).argmax(-1)
    zq = codes[index].detach() + x - x.detach()
    return zq.mT.reshape(len(u), -1, *u.shape[2:]), index.reshape(len(u), *u.shape[2:])


def eq2(model, image, f):
    """Section 4 of the design, a line there a line here: {stage: (zq, index)}, q8 of image (B,3,H,W) and four f."""
    c, side, found, t = model.config, model.side, {}, None
    (h, w), scales = f[0].shape[2:], dict(zip(PYRAMID, c.scales))

    def codes(stage):                                                                     # E, or one embedding for all
        return F.linear(side.query_embed[0], model.to_code.weight, model.to_code.bias) if c.unified else \
            (model.latent if stage == "latent" else model.pixels.vq[stage]).codebook

    x, before = image, c.side.patch                                                       # the pixel branch
    for stage, f_s in zip(PYRAMID, f[1:]):
        s = scales[stage]
        if c.residual and stage == "early":                                               # x = stem(image)
            halving = [layer for layer in model.pixels.down["early"] if hasattr(layer, "weight")]
            times = (c.side.patch // s).bit_length() - 1
            assert len(halving) == max(times, 1)                                          # s = patch: nothing to halve
            for i, layer in enumerate(halving):
                x = conv(layer, F.gelu(x) if i else x, stride=2 if times else 1, padding=1)
        elif c.residual:                                                                  # x = Down(x before)
            x = conv(model.pixels.down[stage], x, stride=before // s, padding=1)
        u, before = f_s, s                                                                # u = Up_s(f) + x
        assert 2 ** len(model.pixels.up[stage]) == s
        for dysample in model.pixels.up[stage]:
            u = dysample(u)
        u = u + x if c.residual else u
        assert u.shape[2:] == (h * s, w * s)
        found[stage] = assigned(u, model.pixels.vq[stage], codes(stage), c.metric)           # zq = vMFVQ(E, W_pre u)

    pos = side.pos_embed.mT.reshape(1, -1, c.side.grid, c.side.grid)                      # the side ViT, as SAN has it
    pos = rows(F.interpolate(pos, (h, w), mode="bicubic"))
    z = rows(conv(side.patch_embed, image, stride=c.side.patch)) + pos + rows(f[0])
    q = (side.query_embed + side.query_pos_embed).expand(len(image), -1, -1)
    for i, block in enumerate(side.blocks):
        if i > 0:
            q, z = q + side.query_pos_embed, z + pos
        q, z = block(torch.cat([q, z], 1)).split([c.side.queries, h * w], 1)
        if i < 3:                                                                         # the semantic branch
            stage, layers = PYRAMID[i], model.semantic[i]
            z = z + rows(f[i + 1])                                                        # z = z + f
            if c.mixer:
                E = unit(codes(stage)) if c.metric == "cosine" else codes(stage)
                start = q if c.unified else layers.tok(E)                                 # t = W_tok g(E) [+ Mix(t')]
                t = start if i == 0 else start + mix(layers.mix_before, t)
                t = layers.norm_t(t + attended(layers.hsattn, c.hs_heads, t, z, z, c.kappa if c.metric == "cosine" else None))
            e_global = mix(layers.mix, t) if c.mixer else 0                               # q = LN(q + Attn(q + Mix(t)..
            q = layers.norm_q(q + attended(layers.attn, c.hs_heads, q + e_global, z, z))
    z8 = z.mT.reshape(len(image), -1, h, w)
    found["latent"] = assigned(z8, model.latent, codes("latent"), c.metric)
    return found, q


@pytest.mark.parametrize("switches", [
    {}, dict(metric="dot"), dict(metric="euclidean"), dict(scales=(4, 4, 4)), dict(scales=(1, 1, 1)), dict(scales=(2, 2, 1)), dict(scales=(8, 4, 2)),
    dict(mixer=False), dict(residual=False), dict(unified=True), dict(unified=True, metric="dot"), dict(depth=3)], ids=str)
def test_the_walk_is_eq_2_to_the_last_digits_forward_and_backward(switches):
    """On an oblong batch, with five blocks, a kappa of its own and no number as it starts, in float64.

    The pixel branch on its own, the detached tokenizer, gives the same three.
    """
    model = randomised(build(tiny(**{"depth": 5, "kappa": 7.0, **switches}).run)).double()
    image, f = images(2, 48, 80).double(), [torch.randn(2, 48, 6, 10).double().requires_grad_() for _ in range(4)]
    found, q = model.walk(image, f)
    expected, expected_q = eq2(model, image, f)
    assert list(found) == ["early", "mid", "late", "latent"]
    assert all(torch.equal(found[s].index, index) for s, (_, index) in expected.items())
    alone = model.pixels(image, f[1:], model.given())
    assert all(torch.equal(alone[s].zq, found[s].zq) and torch.equal(alone[s].index, found[s].index) for s in PYRAMID)
    outputs = [[*(found[s].zq for s in found), q], [*(zq for zq, _ in expected.values()), expected_q]]
    near = dict(rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(*outputs):
        torch.testing.assert_close(ours, theirs, **near)
    upstream = [torch.randn_like(x) for x in outputs[0]]
    inputs = {**{n: p for n, p in model.named_parameters() if p.requires_grad}, **{f"f{i}": x for i, x in enumerate(f)}}
    gradients_of = (torch.autograd.grad(x, list(inputs.values()), upstream, allow_unused=True) for x in outputs)
    for name, a, b in zip(inputs, *gradients_of):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda told: f"{name}: {told}")


def test_the_walk_interleaves_the_branches(monkeypatch):
    """Per stage: the codes the image chose, a side block, the semantic stage on those codes; then the other blocks, latent."""
    model, said = world(depth=5), []

    def hear(module, name, word):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: said.append(word(*a)) or right(*a))

    hear(model.pixels, "stage", lambda stage, *_: stage)
    hear(model.side, "step", lambda i, *_: f"block {i + 1}")
    for i, part in enumerate(model.semantic):
        hear(part, "forward", lambda codes, q, z, t, i=i: f"semantic {i + 1} of {len(codes)}"
             + (f" after {t.shape[1]}" if t is not None else ""))
    hear(model.latent, "forward", lambda z, codes: "latent")
    model(images(1), TEXT)
    assert said == ["early", "block 1", "semantic 1 of 128", "mid", "block 2", "semantic 2 of 64 after 128",
                    "late", "block 3", "semantic 3 of 32 after 64", "block 4", "block 5", "latent"]


@torch.no_grad()
def test_masks_are_named_as_sans_are_and_both_tasks_read_the_same_codes(monkeypatch):
    """The decoder is given all four zq and q; CLIP names the regions of its biases; image and masks are its own."""
    model = world()
    given, right = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda zq, q: given.append((zq, q)) or right(zq, q))
    out = model(images(), TEXT)
    pyramid, f = model.fuse(images())
    found, q = model.walk(images(), f)
    (zq, q_given), = given
    assert list(zq) == list(STAGES) and all(torch.equal(zq[s], found[s].zq) for s in STAGES) and torch.equal(q_given, q)
    decoded = right(zq, q)
    assert torch.equal(out["image"], decoded["image"]) and len(out["masks"]) == len(out["classes"]) == 2
    named = model.classify(pyramid, decoded["bias"], TEXT)
    for masks, classes, m, c in zip(decoded["masks"], named, out["masks"], out["classes"]):
        assert torch.equal(masks, m) and torch.equal(classes, c)


@torch.no_grad()
def test_regions_are_named_alike_alone_and_all_at_once():
    """One pass of CLIP for both outputs: a copy sees the image through its own bias, and no other copy."""
    model = world()
    pyramid, f = model.fuse(images())
    first, last = (3 * torch.randn(2, model.vlm.heads, 20, 8, 8) for _ in range(2))
    both = model.classify(pyramid, [first, last], TEXT)
    for bias, found in zip((first, last), both):
        torch.testing.assert_close(found, model.classify(pyramid, [bias], TEXT)[0], rtol=0, atol=1e-4)   # logits up to 50


def test_half_precision_ends_at_the_models_door():
    """Under autocast masks and image leave as the picture came: losses and scores are fp32."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = world()(images(), TEXT)
    assert [m.dtype for m in (*out["masks"], out["image"])] == [torch.float32] * 3


def test_numbers_arrive_where_they_count():
    """The kernels at every quantiser and every HSAttn, heads at both kinds of attention, hidden widths; none as usual."""
    model = world(kernels="plain", hs_heads=4, decoder_heads=16, spade_hidden=24, mixer_hidden=40)
    asked = [m.kernels for m in model.modules() if hasattr(m, "kernels")]
    assert asked == ["plain"] * (len(STAGES) + len(PYRAMID))
    assert all(part.hsattn.heads == part.attn.heads == 4 for part in model.semantic)
    blocks = [*model.decoder.spade.values(), *model.decoder.plain, *model.decoder.cross.values()]
    assert len(blocks) == 8 and all(block.attn.heads == 16 for block in blocks)
    assert all(block.norm1.shared.out_channels == block.norm2.shared.out_channels == 24 for block in blocks[:3])
    mixers = [m for m in model.modules() if isinstance(m, TokenMixer)]
    assert [[layer.out_features for layer in m.mlp.layers[:2]] for m in mixers] == [[40, 40]] * 5


# --- Table II ---


def test_every_row_of_table_ii_switches_what_the_design_says():
    """Section 10, literally: that number and no other."""
    table = {"no-vmf": dict(metric="euclidean"), "no-vmf-dot": dict(metric="dot"),
             "scales-4-4-4": dict(scales=(4, 4, 4)), "scales-1-1-1": dict(scales=(1, 1, 1)),
             "no-align": dict(align="none"), "no-mixer": dict(mixer=False), "no-residual": dict(residual=False),
             "unified": dict(unified=True), "separate-decoders": dict(separate_decoders=True),
             "one-stage-removed": dict(decoder_stages=("mid", "late")),
             "two-stages-removed": dict(decoder_stages=("late",)), "three-stages-removed": dict(decoder_stages=()),
             "only-early-mid": dict(decoder_stages=("early", "mid")), "only-early": dict(decoder_stages=("early",))}
    assert {row: PAT.ABLATIONS[row] for row in table} == table


@pytest.mark.parametrize("changes, claim", [
    (dict(metric="dot"), lambda m, out: type(m.semantic[0].hsattn).__name__ == "Attn"
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
], ids=lambda value: str(value) if isinstance(value, dict) else "claim")
def test_every_switch_changes_what_it_claims_and_leaves_no_idle_parameter(changes, claim):
    model = world(**changes)
    out = model(images(), TEXT)
    assert claim(model, out) and not claim(world(), world()(images(), TEXT))
    assert out["image"].shape == (2, 3, 64, 64)
    assert every_gradient(model, out) == []


def test_the_rows_of_table_two_are_numbers_of_the_model():
    """Fourteen names, each another model than the whole and than the other rows."""
    whole = preset("world")
    rows = [whole, *(changed(whole, **numbers) for numbers in pat.PAT.ABLATIONS.values())]
    assert len(rows) == 15 and all(a != b for i, a in enumerate(rows) for b in rows[:i])


def test_without_residual_the_codes_do_not_see_pixels_that_clip_does_not():
    """CLIP's maps held fixed, other pixels: only with the residual do the early tokens change."""
    for residual, same in ((True, False), (False, True)):
        model = world(residual=residual)
        f = [torch.randn(1, 96, 8, 8) for _ in range(3)]
        a, b = (model.pixels(images(1) * k, f, None)["early"].x for k in (1.0, -1.0))
        assert torch.equal(a, b) == same


@pytest.mark.parametrize("net", [PATConfig(), preset("coco").net], ids=["defaults", "coco"])
def test_every_number_of_the_papers_configuration(net):
    """Sections 2 to 10 of the design, number by number; all switches of Table II are off."""
    stated = dict(codes=(128, 64, 32, 256), code_dim=32, scales=(4, 2, 1), kappa=30.0, hs_heads=8, mixer_hidden=256,
                  decoder_width=256, decoder_heads=8, spade_hidden=128,
                  width=240, depth=8, heads=6, patch=16, grid=40, queries=100,
                  vlm="ViT-B-16", pretrained="openai", clip_scale=0.5, depths=(), short_side=640, long_side=2560,
                  w_vq=0.1, w_align=0.1, w_rec=1.0, points=12544, crf_samples=1000, align="scale-free",
                  align_latent=False, perceptual=True, restart_after=240, restart_share=0.1, metric="cosine", mixer=True, residual=True, unified=False, separate_decoders=False,
                  decoder_stages=("early", "mid", "late"))
    assert {name: flat(net)[name] for name in stated} == stated


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
    (dict(scales=(4, 3, 1)), "factor of 3: scales must be powers of two"),
    (dict(scales=(1, 2, 4)), "^scales 1 2 4: each is the one before it, or half of it"),
    (dict(scales=(4, 1, 1)), "^scales 4 1 1: each is the one before it, or half of it"),
    (dict(scales=(4, 2, 0)), "^scales 4 2 0: takes 3 whole"),
    (dict(codes=(8, 8, 8, 0)), "^codes 8 8 8 0: takes 4 whole"),
    (dict(scales=(4, 2)), "^scales 4 2: takes 3"), (dict(scales=(16, 8, 4)), "the stem is a factor"),
    (dict(scales=(16, 16, 16), residual=False), "the pixel head"), (dict(codes=(8, 8, 8)), "^codes 8 8 8: takes 4"),
    (dict(depths=(0, 2, 4)), "^depths 0 2 4: takes 4"), (dict(depth=2), "^depth 2: each of early, mid, late"),
    (dict(decoder_stages=("top",)), "^decoder_stages top: there are early, mid, late"), (dict(model="pot"), "pot"),
    (dict(decoder_stages=("latent",)), "^decoder_stages latent: there are early, mid, late"),
    (dict(heads=5), "^heads 5 does not divide"), (dict(hs_heads=7), "^hs_heads 7 does not divide the width 96"),
    (dict(decoder_heads=3), "^decoder_heads 3 does not divide the width 64"),
    (dict(align="tight"), "^align tight: there are scale-free, literal, none"),
    (dict(kernels="torch"), "^kernels torch: there are plain, auto, triton"),
    (dict(points=0), "^points 0: takes a whole number from 1"), (dict(crf_samples=0), "^crf_samples 0: takes a whole number from 1"),
    (dict(model="san", mixer=False), "model san has no number called mixer: that number is PAT's")], ids=str)
def test_numbers_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(InputError, match=says) as error:
        world(**changes)
    assert "\n" not in str(error.value)


def test_a_pat_wants_one_map_of_clip_a_stage():
    """Built past `check`, as somebody who adds a stage would find out."""
    with pytest.raises(InputError, match="^depths: CLIP gives 3 maps; give 4 numbers"):
        PAT(changed(tiny().run, depths=(0, 2, 4)).net)


# --- the loss ---


def test_the_terms_and_their_weights():
    """SAN's six, then L_VQ of all four stages, CRF and TV of the pyramid's three with keys of their own, L1 and L2 against
    the image in [0,1]; where there is padding, none of PAT's own terms looks."""
    model, keys = world(points=64, crf_samples=32, w_vq=2.0, w_align=3.0, w_rec=5.0), [(0, 4), (0, 6)]
    model.load_state_dict({n: v + 0.01 * torch.randn_like(v) if v.is_floating_point() else v for n, v in model.state_dict().items()})
    labels, x = torch.randint(0, 5, (2, 64, 64)), images()
    out, inside = model(x, TEXT), torch.ones(2, 64, 64, dtype=torch.bool)
    inside[0, 40:] = False                                    # five of eight rows of patches
    batch = Batch(x, labels, inside, keys, model.totals(labels), 1)
    terms, stages = model.terms(out, batch), out["tokens"]
    weights = {name: weight for name, (weight, _) in terms.items()}
    assert weights == dict(ce_1=2.0, mask_1=5.0, dice_1=5.0, ce_2=2.0, mask_2=5.0, dice_2=5.0,
                           vq=2.0, crf=3.0, tv=3.0, l1=0.5, l2=5.0)
    sans = SAN.terms(model, out, batch)
    rows = {stage: 40 * t.index.shape[1] // 64 for stage, t in stages.items()}            # of image 0, that are image
    seen = {stage: inside[:, ::64 // t.index.shape[1], ::64 // t.index.shape[2]] for stage, t in stages.items()}
    aligned = [losses.alignment(stages[stage].zq, x, seen[stage], [(*key, 3 + i) for key in keys], "scale-free", 32)
               for i, stage in enumerate(("early", "mid", "late"))]
    error = out["image"] - to_unit(x)
    expected = {**{name: value for name, (_, value) in sans.items()},
                "vq": sum((t.loss[0, :rows[stage]].mean() + t.loss[1].mean()) / 2 for stage, t in stages.items()),
                "crf": sum(a["crf"] for a in aligned), "tv": sum(a["tv"] for a in aligned),
                "l1": (error[0, :, :40].abs().mean() + error[1].abs().mean()) / 2,
                "l2": (error[0, :, :40].square().mean() + error[1].square().mean()) / 2}
    assert len(stages) == 4 and list(rows.values()) == [20, 10, 5, 5]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name][1], value, msg=name)


def terms_of(model, out=None):
    """The terms of two images without padding."""
    labels = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    batch = Batch(images(), labels, torch.ones(2, 64, 64, dtype=torch.bool), [(0, 1), (0, 2)], model.totals(labels), 1)
    return model.terms(out or model(images(), TEXT), batch)


def test_alignment_on_the_latent_is_a_switch():
    """It adds the fourth stage's own two terms, with the fourth key, and nothing else."""
    model = world(points=64, crf_samples=32)
    out = model(images(), TEXT)
    without = terms_of(model, out)
    model.config.align_latent = True
    with_it = terms_of(model, out)
    added = losses.alignment(out["tokens"]["latent"].zq, images(), torch.ones(2, 8, 8, dtype=torch.bool),
                             [(0, 1, 6), (0, 2, 6)], "scale-free", 32)
    for name, (_, value) in without.items():
        torch.testing.assert_close(with_it[name][1], value + added.get(name, 0), msg=name)


@pytest.mark.parametrize("name", ["coco", "world"])
@torch.no_grad()
def test_the_terms_of_a_preset_in_numbers(name, monkeypatch):
    """A batch of zeros is a picture of CLIP's mean colour: what is .25 brighter is .25 off in L1 and .0625 in L2."""
    model, labels, given, net = world(), torch.randint(0, 5, (2, 64, 64)), [], preset(name).net
    lpips = lambda *pictures: given.append(pictures) or torch.tensor([0.5, 0.7])          # noqa: E731
    monkeypatch.setattr(pat, "perceptual", lambda *_: lpips)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1).expand(2, 3, 64, 64)
    out, model.config = {**model(images(), TEXT), "image": mean + 0.25}, net              # of `net` the loss's numbers
    batch = Batch(torch.zeros(2, 3, 64, 64), labels, torch.ones_like(labels).bool(), [(0, 1), (0, 2)], model.totals(labels), 1)
    terms = model.terms(out, batch)
    vq, align, rec = (0.1, 0.1, 1.0) if name == "coco" else (5.0, 0.1, 120.0)
    weights = {"ce_1": 2, "mask_1": 5, "dice_1": 5, "ce_2": 2, "mask_2": 5, "dice_2": 5,
               "vq": vq, "crf": align, "tv": align, "l1": 0.1 * rec, "l2": 1.0 * rec}
    weights |= {"lpips": 0.1} if name == "coco" else {}       # the world does without
    assert {term: terms[term][0] for term in weights} == pytest.approx(weights)
    assert all(weight == 0 for term, (weight, _) in terms.items() if term not in weights)   # at most logged
    values = dict(l1=0.25, l2=0.0625, **({"lpips": 0.6} if name == "coco" else {}))
    assert {term: terms[term][1].item() for term in values} == pytest.approx(values, rel=1e-5)
    for theirs, truth in given:                                                           # LPIPS takes -1..1
        torch.testing.assert_close(truth, 2 * mean - 1)
        torch.testing.assert_close(theirs, 2 * mean - 0.5)
    assert len(given) == (name == "coco")


def test_alignment_none_drops_both_its_terms_and_literal_is_passed_on():
    out, terms = None, {}
    for align in ("scale-free", "literal", "none"):
        model = world(points=64, crf_samples=32, align=align)
        out = out or model(images(), TEXT)
        terms[align] = terms_of(model, out)
    assert "crf" not in terms["none"] and "tv" not in terms["none"] and "vq" in terms["none"]
    assert terms["literal"]["crf"][1] != terms["scale-free"]["crf"][1]


def test_lpips_weighs_a_tenth_of_the_reconstruction(monkeypatch):
    monkeypatch.setattr(pat, "perceptual", lambda device: lambda a, b: torch.ones(2, 1, 1, 1))
    assert terms_of(world(points=64, crf_samples=32, w_rec=5.0, perceptual=True))["lpips"] == (pytest.approx(0.5), 1)
    assert "lpips" not in terms_of(world(points=64, crf_samples=32, w_rec=5.0))           # the world does without


def test_the_papers_recipe_without_vgg_stops_before_the_first_step_and_says_what_to_do(monkeypatch, tmp_path):
    """Where the loss has no backbone nothing is trained quietly without it, and nothing is written."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    load_lpips.cache_clear()
    config = tiny(out=str(tmp_path / "run"), perceptual=True)
    with pytest.raises(InputError, match="vgg16.*--set perceptual=false"):
        train.train(config)
    load_lpips.cache_clear()
    assert not (tmp_path / "run").exists() and pat.PATConfig().perceptual
    assert all(preset(name).net.perceptual == (name != "world") for name in pat.PAT.PRESETS)


# --- dead codes, and what is logged of the others ---


def one_step(config, rank=0, processes=1, step=0):
    """The model, after the forward passes and `after_step` of one step, in float64; the optimiser does not step."""
    torch.manual_seed(config.run.seed)
    model = build(config.run).double().train()
    text = model.vlm.embed_text(World.train_names)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    _, remembered = gradients(wrapped, text, micro_batches(config, rank, processes, step), config, processes)
    model.after_step(remembered, step, config)
    return model, remembered


def codes_and_counters(config, rank=0, processes=1):
    """Every codebook and counter after a step in which all codes start and one in which the unused ones restart, and what
    is logged of them."""
    model, _ = one_step(config, rank, processes)
    text, parts = model.vlm.embed_text(World.train_names), micro_batches(config, rank, processes, step=1)
    _, remembered = gradients(model, text, parts, config, processes)
    model.after_step(remembered, 1, config)
    logged = model.log()
    assert sum(line["restarted"] for line in logged.values()) > 0
    state = {n: p.detach().clone() for n, p in model.state_dict().items() if "codebook" in n or "idle" in n}
    counted = {f"{stage}.{name}": torch.tensor(line[name], dtype=torch.float64) for stage, line in logged.items()
               for name in ("perplexity", "used", "cosine", "restarted")}
    return {**state, **counted}


def process(rank, processes, config, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    torch.save(codes_and_counters(config, rank, processes), f"{path}{rank}")
    dist.destroy_process_group()


def same(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < tolerance, name


def test_dead_codes_restart_alike_on_any_number_of_processes(tmp_path):
    """Four images at once, in two passes, or two and two on two processes: the same codes, counters and logged numbers."""
    config = tiny(restart_after=1)
    alone, split = codes_and_counters(config), codes_and_counters(tiny(restart_after=1, accumulate=2))
    same(alone, split)
    mp.spawn(process, (2, config, 29000 + os.getpid() % 1000, tmp_path / "c"), nprocs=2)
    for rank in range(2):
        same(alone, torch.load(f"{tmp_path / 'c'}{rank}", weights_only=True))


def test_a_dead_code_becomes_a_feature_of_the_batch():
    """Each of the codes nobody chose lies on the feature that its own draw of (seed, step, stage) points to."""
    config, step = tiny(restart_after=1, batch=2), 3
    config.recipe.steps = 100
    model, remembered = one_step(config, step=step)
    (numbers, kept), = remembered
    assert numbers.tolist() == [6, 7]
    for which, (stage, vq) in enumerate(model.quantisers().items()):
        counts, features, inside = kept[stage]
        K, P = len(vq.codebook), features[0, 0].numel()
        drawn = rng_for(config.run.seed, step, which, RESTART).choice(2 * P, K, replace=False)
        assert inside.all() and inside.shape == features[:, 0].shape and counts.sum() == 2 * P
        for k in range(K):                                                                # none has begun: all are put
            x = features[drawn[k] // P].flatten(1)[:, drawn[k] % P]                       # (D)
            assert (vq.codebook[k] - g(x)).abs().max() < 1e-12
        assert vq.idle.tolist() == [0] * K and len(vq.codebook.unique(dim=0)) == K        # no feature twice


def test_codes_that_started_stay_until_they_are_dead():
    """After the first step no code is new: in the second only those move that nobody chose, two images behind now."""
    config = tiny(restart_after=2, batch=2)
    config.recipe.steps = 100
    model, _ = one_step(config)
    text, before = model.vlm.embed_text(World.train_names), model.latent.codebook.detach().clone()
    _, remembered = gradients(model, text, micro_batches(config, step=1), config)
    counts = remembered[0][1]["latent"][0]                    # a tenth of an even share is .2 uses an image: one makes up
    put = model.after_step(remembered, 1, config)[model.latent.codebook]
    assert torch.equal(put, counts == 0) and 0 < put.sum() < 32
    assert torch.equal((model.latent.codebook != before).any(1), put)


def test_a_restarted_code_has_no_moments_and_its_neighbours_keep_theirs():
    """The loop clears Adam's two moments of the rows that after_step names, and no others."""
    config = tiny(restart_after=0, batch=2)
    model = build(config.run)
    optimizers, codebook = model.optimizers(train.parameter_groups(model, config.recipe), config.recipe), model.latent.codebook
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizers[0].step()
    state = optimizers[0].state[codebook]
    before = {key: value.clone() for key, value in state.items()}
    rows = torch.arange(32) % 5 == 0
    train.forget(optimizers, {codebook: rows, torch.nn.Parameter(torch.zeros(3)): torch.ones(3).bool()})
    for kind in ("exp_avg", "exp_avg_sq"):
        assert (state[kind][rows] == 0).all() and torch.equal(state[kind][~rows], before[kind][~rows])
        assert (before[kind] != 0).all()
    assert state["step"] == before["step"] == 1


def furthest(codebook, features):
    """The distance of a code to its nearest feature, of the code that is furthest from any."""
    return torch.cdist(codebook, features, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max()


def test_no_code_starts_on_padding():
    """Labels say that only the first row of patches is image: every code of every stage is one of its features."""
    config = tiny(batch=2)
    config.recipe.steps = 100
    model = build(config.run).train()
    (images_, labels, numbers), = micro_batches(config)
    labels[:, 8:] = PADDING
    text = model.vlm.embed_text(World.train_names)
    _, remembered = gradients(model, text, [(images_, labels, numbers)], config)
    model.after_step(remembered, 0, config)
    for stage, vq in model.quantisers().items():
        counts, x, inside = remembered[0][1][stage]
        assert inside.sum() == inside.numel() // 8 == counts.sum()
        features = g(x.movedim(1, -1)[inside])                                            # (n,D)
        assert furthest(vq.codebook, features) < 1e-6


def remembered_of(counts, step):
    """What is remembered of a step of two images in which each stage counts `counts` (K of that stage)."""
    x, inside = torch.randn(2, 32, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    return torch.tensor([2 * step, 2 * step + 1]), {stage: (counts[stage], x, inside) for stage in STAGES}


def begun(model):
    """The model as if each of its codes had begun just now."""
    for vq in model.quantisers().values():
        vq.idle.zero_()
    return model


def test_idle_images_are_counted_and_a_restart_begins_anew():
    """Codes 0 and 1 used, then only 0: after three steps of two images all but these are six behind and restart, one step
    later code 1 does."""
    config = tiny(restart_after=6, batch=2)
    config.recipe.steps = 100
    model = begun(build(config.run))
    before = model.latent.codebook.detach().clone()
    both, one = ({stage: torch.zeros(len(vq.codebook), dtype=torch.int64) for stage, vq in model.quantisers().items()}
                 for _ in range(2))
    for stage in STAGES:
        both[stage][:2], one[stage][:1] = 48, 96
    found = []
    for step, counts in enumerate((both, one, one, one)):
        model.after_step([remembered_of(counts, step)], step, config)
        found.append((model.latent.idle[:3].tolist(), model.log()["latent"]["restarted"]))
    assert found == [([0, 0, 2], 0), ([0, 2, 4], 0), ([0, 4, 0], 30), ([0, 0, 2], 1)]
    moved = (model.latent.codebook != before).any(1)
    assert not moved[0] and moved[1:].all()
    torch.testing.assert_close(model.latent.codebook[1:].norm(dim=1), torch.ones(31))     # onto the sphere


@pytest.mark.parametrize("numbers, step, restarts", [
    (dict(), 84, True), (dict(), 85, False), (dict(restart_after=0), 0, False), (dict(metric="dot"), 0, False),
    (dict(metric="euclidean"), 0, True), (dict(unified=True), 0, False)], ids=str)
def test_codes_restart_only_where_that_helps(numbers, step, restarts):
    """Not in the last 15 % of the steps, by dot product, or in a codebook that is the queries; uses count all the same."""
    config = tiny(**{"restart_after": 1, "batch": 2, **numbers})
    config.recipe.steps = 100
    model = begun(build(config.run))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    counts = {stage: torch.eye(len(model.codebook(stage)), dtype=torch.int64)[0] for stage in STAGES}
    model.after_step([remembered_of(counts, step)], step, config)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n]) and not n.endswith("idle")}
    assert changed == ({n for n in before if n.endswith("codebook")} if restarts else set())
    lines = model.log()
    assert all((line["restarted"] > 0) == restarts and line["used"] == 1 for line in lines.values())


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_off_the_sphere_codes_start_on_features_of_their_own_length(metric):
    """By dot product never again; by distance those that nobody chose, again on features as long as they are."""
    config = tiny(restart_after=1, metric=metric)
    model = build(config.run)
    text = model.vlm.embed_text(World.train_names)
    _, remembered = gradients(model, text, micro_batches(config), config)
    model.after_step(remembered, 0, config)
    assert [line["restarted"] for line in model.log().values()] == [32, 16, 8, 32]
    features = remembered[0][1]["latent"][1].movedim(1, -1).flatten(0, 2)
    assert furthest(model.latent.codebook, features) < 1e-6
    assert (model.latent.codebook.norm(dim=1) - 1).abs().min() > 1e-3
    before = {n: p.clone() for n, p in model.named_parameters() if "codebook" in n}
    _, remembered = gradients(model, text, micro_batches(config, step=1), config)
    model.after_step(remembered, 1, config)
    restarted = [line["restarted"] for line in model.log().values()]
    if metric == "dot":
        assert restarted == [0] * 4
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if "codebook" in n)
    else:
        moved = (before["latent.codebook"] != model.latent.codebook).any(1)
        assert sum(restarted) > 0 and moved.sum() == restarted[-1]
        features = remembered[0][1]["latent"][1].movedim(1, -1).flatten(0, 2)
        assert not moved.any() or furthest(model.latent.codebook[moved], features) < 1e-6


def codebook_lines(model, seen, found, restarted):
    """train.codebook_lines of before, on one process: stage -> what was logged of it."""
    lines = {}
    for stage, counts in seen.items():
        x = found[0][1][stage][1].movedim(1, -1).flatten(0, 2)                            # (b*h*w,D) features
        lines[stage] = codebook_health(counts, model.codebook(stage), x, model.quantisers()[stage].choose)
        lines[stage]["restarted"] = restarted.get(stage, 0)
    return lines


@pytest.mark.parametrize("numbers", [{}, dict(metric="dot"), dict(metric="euclidean"), dict(unified=True), dict(accumulate=2)], ids=str)
def test_what_is_logged_of_the_codebooks_is_what_always_was(numbers, monkeypatch):
    """Counts of every step and micro-batch since the last line, features of the last step's first; then it begins anew."""
    config, restarted = tiny(**{"restart_after": 2, **numbers}), {}
    model = build(config.run)
    text, right, log = model.vlm.embed_text(World.train_names), pat.restart_dead_codes, []
    monkeypatch.setattr(pat, "restart_dead_codes", lambda *a: log.append(right(*a)) or log[-1])
    for line in range(2):
        seen = {}
        for step in (2 * line, 2 * line + 1):
            _, remembered = gradients(model, text, micro_batches(config, step=step), config)
            log.clear()
            model.after_step(remembered, step, config)
            restarted = {stage: int(put.sum()) for stage, put in zip(STAGES, log)}
            for _, kept in remembered:
                for stage, (counts, *_) in kept.items():
                    seen[stage] = seen.get(stage, 0) + counts
        expected = codebook_lines(model, seen, remembered, restarted)
        assert repr(model.log()) == repr(expected) and list(expected) == list(STAGES)     # repr: nan is not nan
    if not numbers:
        assert sum(restarted.values()) > 0


# --- run directories ---


def test_a_run_loads_as_it_was_saved(run):
    path, model = run
    loaded, config = load_run(path)
    assert config.preset == "world" and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_the_readmes_snippet_names_the_pixels_of_a_photo(run, tmp_path, monkeypatch):
    """The lines themselves, on a run and a photo where they look for them."""
    readme = (Path(pat.__file__).parent / "README.md").read_text()
    snippet = readme.split("```python\n")[1].split("```")[0]
    assert len(snippet.splitlines()) <= 4
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run[0], "runs/world-pat-0", ignore=lambda *_: ["runs"])
    Image.new("RGB", (90, 70), "red").save("photo.jpg")
    exec(snippet, names := {})
    assert names["labels"].shape == (70, 90) and set(names["labels"].unique().tolist()) <= {0, 1, 2}
