"""SAN here is the published SAN: the same numbers from the same weights, the same size, the same key names."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors import safe_open

import clip
import san
from images import MEAN, STD
from pat import preset
from san import MLP, SAN, MaskHead, SANConfig, from_published, our_key, trainable

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
    from_published(model, {"model": {key[8:]: value for key, value in tensors.items() if key.startswith("weights.")}})
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
    with pytest.raises(KeyError, match="side.query_embed"):
        from_published(model, weights)
    with pytest.raises(KeyError, match="side_adapter_network.extra"):
        from_published(model, {**weights, "side_adapter_network.query_embed": lost, "side_adapter_network.extra": lost})
    with pytest.raises(ValueError, match="side.query_embed"):
        from_published(model, {**weights, "side_adapter_network.query_embed": lost[:, :3]})
    assert torch.equal(before, model.background)


def test_the_entries_that_are_no_parameters_are_skipped(published, model):
    tensors, _, _ = published
    weights = {key[8:]: value for key, value in tensors.items() if key.startswith("weights.")}
    from_published(model, {**weights, "criterion.empty_weight": torch.ones(172), "ov_classifier.attn_mask": torch.ones(2, 2)})


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
