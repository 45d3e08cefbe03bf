"""The model: what flows where, what each switch of Table II changes, how large it is."""

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_san import published_layout
from torch.func import functional_call

import pat
from checkpoint import fingerprint, save_checkpoint
from images import InputError
from pat import PYRAMID, STAGES, TokenMixer, build, import_published, load_run, preset
from san import trainable
from train import recipe

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
    assert model.fusion[1].proj.weight.grad.abs().sum() > 0 and model.pixels.down[PYRAMID[0]][0].weight.grad.abs().sum() > 0


def test_local_tokens_listen_to_the_image_and_the_stage_before_but_not_to_global_ones():
    """The paper's flow is bottom-up: other queries, the same t to the last bit; another image or stage before, another t."""
    stage, codes = world().semantic[1], torch.randn(64, 32)
    q, z, before = torch.randn(2, 20, 96), torch.randn(2, 64, 96), torch.randn(2, 128, 96)
    t, q_out = stage(codes, q, z, before)
    assert torch.equal(stage(codes, -q, z, before)[0], t)
    assert not torch.equal(stage(codes, q, -z, before)[0], t) and not torch.equal(stage(codes, q, z, -before)[0], t)
    assert not torch.equal(stage(codes, q, z, -before)[1], q_out)             # while q does listen to t


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
    (dict(depths=(0, 2, 4)), "--depths 0 2 4: takes 4"), (dict(depth=2), "--depth 2: each of early, mid, late"),
    (dict(decoder_stages=("top",)), "top"), (dict(model="pot"), "pot"), (dict(heads=5), "--heads 5 does not divide"),
    (dict(hs_heads=7), "--hs-heads 7"), (dict(decoder_attention="ful"), "--decoder-attention ful"),
    (dict(model="san", mixer=False), "--model san has no mixer")], ids=str)
def test_numbers_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        world(**changes)


# --- run directories ---


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


# --- published SAN checkpoints ---


def randomised(config):
    """A model none of whose numbers is what its initialisation gives, nor equal to another."""
    model = build(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


@pytest.fixture
def published(tmp_path):
    """(file in the published layout, the SAN that is in it, its config): the world's sizes."""
    config = preset("world", model="san", pretrained="none")
    model = randomised(config)
    torch.save({"model": published_layout(model)}, tmp_path / "san.pth")
    return tmp_path / "san.pth", model, config


def test_a_published_checkpoint_becomes_a_run_bit_for_bit_and_needs_nothing_else(published, tmp_path, monkeypatch):
    """CLIP included: the file deleted, the directory moved, the network off, every weight and every answer is the same."""
    path, model, config = published
    import_published(path, tmp_path / "runs" / "san", config)
    path.unlink()
    shutil.move(tmp_path / "runs" / "san", tmp_path / "moved")
    monkeypatch.setattr(socket, "socket", None)
    loaded, found = load_run(tmp_path / "moved")
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert found == replace(config, pretrained=str(tmp_path / "moved" / "clip.safetensors"))
    assert torch.equal(model(images(), TEXT)["masks"][0], loaded(images(), TEXT)["masks"][0])
    assert torch.equal(model.vlm.embed_text(["grass"]), loaded.vlm.embed_text(["grass"]))
    assert fingerprint(model) == fingerprint(loaded)


def test_the_clip_of_an_imported_run_cannot_be_swapped(published, tmp_path):
    path, _, config = published
    import_published(path, tmp_path / "san", config)
    torch.manual_seed(9)
    torch.save({"model": published_layout(randomised(config))}, path)
    import_published(path, tmp_path / "other", config)
    shutil.copy(tmp_path / "other" / "clip.safetensors", tmp_path / "san")
    with pytest.raises(InputError, match="trained over other CLIP weights"):
        load_run(tmp_path / "san")


@pytest.mark.parametrize("change, says", [
    (lambda state: state.pop("side_adapter_network.query_embed"), "san.pth: not a SAN.*1 missing: side.query_embed$"),
    (lambda state: state.update({"backbone.0.weight": torch.ones(1)}), "san.pth: not a SAN.*1 unknown: backbone.0.weight$"),
    (lambda state: state.update({"ov_classifier.bg_embed": torch.ones(1, 7)}), r"background \(1, 7\) for \(1, 64\)"),
    (lambda state: [state.pop(key) for key in list(state) if "ov_classifier.t" in key], "san.pth: CLIP's text tower"),
    (lambda state: [state.pop(key) for key in list(state) if "ov_classifier.tr" in key], "24 missing: vlm.model.transformer")],
    ids=["missing", "unknown", "shape", "no text", "half a text"])
def test_what_is_no_published_checkpoint_leaves_nothing_behind(published, tmp_path, change, says):
    path, _, config = published
    state = torch.load(path, weights_only=True)["model"]
    change(state)
    torch.save({"model": state}, path)
    with pytest.raises(InputError, match=says) as error:
        import_published(path, tmp_path / "run", config)
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["san.pth"]


def test_an_import_overwrites_nothing_and_leaves_nothing_half_done(published, tmp_path, monkeypatch):
    """The disk fills up after clip.safetensors; then the name is taken, or cannot be."""
    def full(model):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="cannot be written .No space"):
        patch.setattr(pat, "fingerprint", full)
        import_published(published[0], tmp_path / "run", published[2])
    assert [path.name for path in tmp_path.iterdir()] == ["san.pth"]
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="exists already"):
        import_published(published[0], tmp_path / "run", published[2])
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="cannot be written"):
        import_published(published[0], tmp_path / "file" / "run", published[2])
    assert (tmp_path / "file").read_text() == "precious"


def test_the_import_command_knows_b_from_large_by_its_clip(published, tmp_path, monkeypatch, capsys):
    """Width 768 is ViT-B/16, 1024 is ViT-L/14-336; another, as the world's 128 here, is refused by name."""
    path, _, config = published
    with pytest.raises(InputError, match=r"neither SAN with ViT-B/16.*conv1.weight is \(128, 3, 8, 8\)"):
        pat.main(["import", str(path), "--out", str(tmp_path / "run")])
    with pytest.raises(InputError, match="--out; see --help"):
        pat.main(["import", str(path)])
    asked = []
    monkeypatch.setitem(pat.PUBLISHED, 128, "coco-large")
    monkeypatch.setattr(pat, "preset", lambda name, model: asked.append((name, model)) or config)
    pat.main(["import", str(path), "--out", str(tmp_path / "run")])
    assert asked == [("coco-large", "san")] and "clip.safetensors in" in capsys.readouterr().out
    assert pat.PUBLISHED[768] == "coco" and preset("coco").vlm == "ViT-B-16"
    large = preset("coco-large")
    assert (pat.PUBLISHED[1024], large.vlm, large.clip_scale, large.patch, large.grid) == ("coco-large", "ViT-L-14-336", 0.7, 16, 40)


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
