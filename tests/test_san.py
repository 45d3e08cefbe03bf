"""SAN here is the published SAN: the same numbers from the same weights, the same size, the same key names."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors import safe_open
from test_clip import smaller

import clip
import san
from images import MEAN, STD, InputError
from pat import build, preset
from san import MLP, SAN, MaskHead, SANConfig, from_published, our_key, read_published, trainable

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def published():
    """What the published code (open_clip 2.16, fp32, CPU) computed from random weights; see the file's metadata."""
    with safe_open(HERE / "san_small.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    return tensors, json.loads(metadata["side"]), json.loads(metadata["clip"])


@pytest.fixture(scope="module")
def model(published):
    tensors, side, c = published
    small = open_clip.CLIP(c["embed_dim"], CLIPVisionCfg(image_size=c["image_size"], patch_size=c["patch"], width=c["width"],
                                                         layers=c["layers"], head_width=c["width"] // c["heads"]),
                           CLIPTextCfg(context_length=8, vocab_size=16, width=32, heads=1, layers=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(san, "open_model", lambda name, pretrained: (small, None))
        model = SAN(SANConfig(clip_scale=c["scale"], depths=(0, 1, 2, 3), width=side["width"], depth=side["depth"],
                              heads=side["heads"], patch=side["patch"], grid=side["image_size"] // side["patch"],
                              queries=side["queries"], head_width=side["mlp_channels"]))
    from_published(model, {key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    return model


def image_of(tensors, which):
    scale = lambda x: 255 * torch.tensor(x).view(3, 1, 1)                                 # noqa: E731
    return (tensors[f"{which}.image_0_255"] - scale(MEAN)) / scale(STD)


@pytest.mark.parametrize("which", ["square", "wide"])
def test_the_published_numbers_come_out(published, model, which):
    """Features, masks and class logits of both supervised blocks, on a square and on a wide image."""
    tensors, _, _ = published
    image = image_of(tensors, which)
    out, pyramid = model.train()(image, tensors[f"{which}.text_embeddings"]), model.vlm.features(image)
    for i, map_ in enumerate(pyramid.maps):
        assert (map_ - tensors[f"{which}.clip_feature_{i}"]).abs().max() < 1e-4
    for i, block in enumerate((7, 8)):
        assert (out["masks"][i] - tensors[f"{which}.block{block}.mask_logits"]).abs().max() < 1e-4
        assert (out["classes"][i] - tensors[f"{which}.block{block}.class_logits"]).abs().max() < 1e-4


def test_the_published_segmentation_comes_out(published, model):
    """Class probabilities without the background times sigmoid of the up-sampled masks, summed over queries."""
    tensors, _, _ = published
    image = image_of(tensors, "wide")
    with torch.no_grad():
        out = model.eval()(image, tensors["wide.text_embeddings"])
    masks = torch.nn.functional.interpolate(out["masks"][-1], size=image.shape[-2:], mode="bilinear").sigmoid()
    found = torch.einsum("bqk,bqhw->bkhw", out["classes"][-1].softmax(-1)[..., :-1], masks)[0]
    assert (found - tensors["wide.sem_seg"]).abs().max() < 1e-4


@pytest.mark.parametrize("row, column", [(0, 0), (0, -1), (3, -2), (-1, 0), (-1, -2), (-1, 5)])
def test_a_wrong_entry_of_the_recognition_mask_shows(published, model, row, column, monkeypatch):
    """Flip one entry between open and closed: cls-cls, cls-copy, patch-copy, copy-cls, copy-copy, copy-patch."""
    tensors, _, _ = published
    right = clip.recognition_mask

    def wrong(bias, grid):
        mask = right(bias, grid)
        mask[..., row, column] = 0.0 if row != 0 or column != 0 else -5.0
        if column == 5:
            mask[..., row, column] = float("-inf")
        return mask

    monkeypatch.setattr(clip, "recognition_mask", wrong)
    with torch.no_grad():
        out = model.eval()(image_of(tensors, "square"), tensors["square.text_embeddings"])
    assert (out["classes"][-1] - tensors["square.block8.class_logits"]).abs().max() > 1e-4


def test_the_reference_size_has_the_published_parameters_and_keys():
    """8,370,866 trainable numbers; every key of the published ViT-B/16 layout has its place and shape here, and back."""
    model = SAN(SANConfig(pretrained="none"))
    assert trainable(model) == 8_370_866
    state, reached = model.state_dict(), set()
    for line in (HERE / "san_vit_b_16_keys.txt").read_text().splitlines():
        if not line.startswith("#"):
            key, shape = line.split(" ", 1)
            if key not in san.NOT_PARAMETERS:
                ours, shape = our_key(key, 9), tuple(int(n) for n in shape.strip("(),").split(",") if n.strip())
                reached.add(ours)
                theirs = shape[:2] if len(shape) == 4 and state[ours].ndim == 2 else shape
                assert tuple(state[ours].shape) == theirs, key
    assert reached == set(state)


def test_missing_and_unknown_keys_are_listed_and_nothing_is_loaded(published, model):
    tensors, _, _ = published
    weights = {key[8:]: value + 1 for key, value in tensors.items() if key.startswith("weights.")}
    before = model.background.clone()
    lost = weights.pop("side_adapter_network.query_embed")
    whole = {**weights, "side_adapter_network.query_embed": lost}
    for wrong, says in [
            (weights, "1 missing: side.query_embed$"),
            ({**whole, "side_adapter_network.extra": lost}, "1 unknown: side_adapter_network.extra$"),
            ({**whole, "ov_classifier.bg_embed2": lost}, "1 unknown: vlm.model.bg_embed2$"),
            ({**whole, "clip_visual_extractor.resblocks.3.ln_1.bias": lost}, "1 unknown: clip_visual_extractor.resblocks.3.ln_1.bias$"),
            ({**whole, "ov_classifier.ln_final.bias": lost}, "missing: .*vlm.model.token_embedding.weight"),
            ({**whole, "side_adapter_network.query_embed": lost[:, :3]},
             r"1 of another shape: side.query_embed \(1, 3, .*\) for \(1, "),
            ({**weights, "side_adapter_network.query_ember": lost}, "1 missing: side.query_embed; 1 unknown: side.query_ember")]:
        with pytest.raises(InputError, match=says) as error:
            from_published(model, wrong)
        assert "\n" not in str(error.value)
    assert torch.equal(before, model.background)


def test_the_entries_that_are_no_parameters_are_skipped(published, model):
    tensors, _, _ = published
    weights = {key[8:]: value for key, value in tensors.items() if key.startswith("weights.")}
    from_published(model, {**weights, "criterion.empty_weight": torch.ones(172), "ov_classifier.attn_mask": torch.ones(2, 2)})


def published_key(ours, rec_start):
    """The inverse of `our_key`, written apart from it."""
    parts = ours.split(".")
    if ours == "background":
        return "ov_classifier.bg_embed"
    if ours.startswith("vlm.model.visual.transformer."):
        i = int(parts[5])
        owner, i = ("clip_visual_extractor", i) if i < rec_start else ("clip_rec_head", i - rec_start)
        return ".".join([owner, "resblocks", str(i), *parts[6:]])
    if ours.startswith("vlm.model.visual."):
        return ("clip_rec_head." if parts[3] in ("proj", "ln_post") else "clip_visual_extractor.") + ".".join(parts[3:])
    if ours.startswith("vlm.model."):
        return "ov_classifier." + ".".join(parts[2:])
    if parts[0] == "fusion":
        return f"side_adapter_network.fusion_layers.layer_{parts[1]}.input_proj.{int(parts[2] == 'proj')}.{parts[3]}"
    if parts[0] == "head":
        return "side_adapter_network.mask_decoder." + ".".join(parts[1:])
    if parts[1] == "patch_embed":
        return f"side_adapter_network.vit_model.patch_embed.proj.{parts[2]}"
    return "side_adapter_network." + ("" if parts[1].startswith("query") else "vit_model.") + ".".join(parts[1:])


def published_layout(model):
    """A SAN's state dict as the published code would have saved it, with the entries that are no parameters."""
    state = {}
    for key, value in model.state_dict().items():
        theirs = published_key(key, model.vlm.depths[-1])
        convolution = ("input_proj.1.weight", ".pix_mlp.", ".attn_mlp.")
        is_map = value.ndim == 2 and any(part in theirs for part in convolution)
        state[theirs] = value[..., None, None] if is_map else value
    return {**state, "criterion.empty_weight": torch.ones(172), "ov_classifier.attn_mask": torch.zeros(77, 77)}


def of_size(name):
    """SAN of a preset, without its numbers: shapes and names alone."""
    with torch.device("meta"):
        return build(preset(name, model="san", pretrained="none"))


def test_the_inverse_layout_is_the_published_one():
    """Names and shapes of all 442 entries of the ViT-B/16 checkpoint, so the round trips below are in its layout."""
    lines = [line.split(" ", 1) for line in (HERE / "san_vit_b_16_keys.txt").read_text().splitlines() if line[0] != "#"]
    theirs = {key: tuple(int(n) for n in shape.strip("(),").split(",") if n.strip()) for key, shape in lines}
    assert {key: tuple(value.shape) for key, value in published_layout(of_size("coco")).items()} == theirs
    assert len(theirs) == 442


def test_san_large_has_the_published_parameters_and_the_same_layout():
    """9.32 million trained numbers, as its log says; blocks 18 to 23 recognise.  No real file of it was at hand."""
    model = of_size("coco-large")
    assert trainable(model) == 9_321_650 and model.vlm.depths == (0, 6, 12, 18)
    state = published_layout(model)
    assert {our_key(key, 18) for key in state if key not in san.NOT_PARAMETERS} == set(model.state_dict())
    assert {key.split(".")[2] for key in state if key.startswith("clip_rec_head.resblocks")} == set("012345")
    from_published(model, state)


def test_eva_large_trains_as_many_numbers(monkeypatch):
    """Counted with 4 of its 24 frozen blocks and a small vocabulary: nothing of those is trained."""
    smaller(monkeypatch, {}, {"layers": 1, "vocab_size": 8}, 4)
    assert trainable(build(preset("coco-eva-large", model="san", pretrained="none"))) == 9_321_650


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_published_files_are_read_without_running_code(tmp_path, monkeypatch):
    """Under "model" or bare, beside whatever a trainer saved; code, truncation and other content are one line each."""
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    torch.save({"model": state, "iteration": 60_000, "optimizer": {"param_groups": [{"lr": 1e-4}]}}, "whole.pth")
    torch.save(state, "bare.pth")
    for name in ("whole.pth", "bare.pth"):
        assert all(torch.equal(value, state[key]) for key, value in read_published(name).items())
    torch.save({"model": state, "scheduler": Evil()}, "code.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:500])
    torch.save({"model": {"a": 3}}, "numbers.pth")
    torch.save([state], "list.pth")
    for name, says in [("code.pth", "code.pth: is no checkpoint, or holds Python objects"), ("cut.pth", "cut.pth: cannot be read"),
                       ("numbers.pth", "numbers.pth: holds no state dict"), ("list.pth", "is it a SAN checkpoint"),
                       ("none.pth", "none.pth: cannot be read .FileNotFoundError")]:
        with pytest.raises(InputError, match=says) as error:
            read_published(name)
        assert "\n" not in str(error.value)
    assert not Path("ran").exists()


def test_mask_head_is_a_dot_product_of_mlps():
    head = MaskHead(6, 5, 4, 2)
    q, y = torch.randn(1, 3, 6), torch.randn(1, 2, 2, 5)
    masks, bias = head(q, y)
    a, b, c = head.query_mlp(q)[0], head.pix_mlp(y)[0], head.attn_mlp(y)[0].view(2, 2, 2, 4)
    assert masks[0, 1, 0, 1].item() == pytest.approx((a[1] @ b[0, 1]).item(), abs=1e-5)
    assert bias[0, 1, 2, 1, 0].item() == pytest.approx((a[2] @ c[1, 0, 1]).item(), abs=1e-5)


def test_mlp_has_its_activation_between_linears_only():
    mlp = MLP(2, 2, 2)
    with torch.no_grad():
        for layer in mlp.layers:
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    assert mlp(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    with torch.no_grad():
        mlp.layers[1].weight.copy_(-torch.eye(2))
    assert mlp(torch.tensor([-1.0, 2.0])).tolist() == [0.0, -2.0]


def test_training_supervises_the_last_two_blocks_and_inference_one():
    model = SAN(preset("world", pretrained="none", model="san"))
    text = torch.nn.functional.normalize(torch.randn(5, 64), dim=-1)
    image = torch.randn(2, 3, 64, 96)
    out = model(image, text)
    assert [m.shape for m in out["masks"]] == [(2, 20, 8, 12)] * 2 and [c.shape for c in out["classes"]] == [(2, 20, 6)] * 2
    last = model.eval()(image, text)
    assert len(last["masks"]) == 1
    torch.testing.assert_close(last["masks"][0], out["masks"][1], rtol=1e-4, atol=1e-4)


def test_every_trained_parameter_gets_a_gradient():
    model = SAN(preset("world", pretrained="none", model="san"))
    out = model(torch.randn(2, 3, 64, 64), torch.nn.functional.normalize(torch.randn(5, 64), dim=-1))
    sum((x * torch.randn_like(x)).sum() for x in out["masks"] + out["classes"]).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
