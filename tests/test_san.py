"""SAN here is the published SAN: the same numbers from the same weights, the same size; and its loss, worked by hand."""

import math

import pytest
import torch

import clip
import losses
from cli import InputError
from data import IGNORE, MEAN, STD
from runs import build, preset
from san import MLP, SAN, MaskHead, SANConfig, trainable
from segmenter import Batch
from tests.helpers import TEXT, images, smaller, world


def image_of(tensors, which):
    scale = lambda x: 255 * torch.tensor(x).view(3, 1, 1)                                 # noqa: E731
    return (tensors[f"{which}.image_0_255"] - scale(MEAN)) / scale(STD)


@pytest.mark.parametrize("which", ["square", "wide"])
def test_the_published_numbers_come_out(san_small, san_of_small, which):
    """Features, masks and class logits of both supervised blocks, on a square and on a wide image."""
    tensors, _, _ = san_small
    image, model = image_of(tensors, which), san_of_small
    out, pyramid = model.train()(image, tensors[f"{which}.text_embeddings"]), model.vlm.features(image)
    for i, map_ in enumerate(pyramid.maps):
        assert (map_ - tensors[f"{which}.clip_feature_{i}"]).abs().max() < 1e-4
    for i, block in enumerate((7, 8)):
        assert (out["masks"][i] - tensors[f"{which}.block{block}.mask_logits"]).abs().max() < 1e-4
        assert (out["classes"][i] - tensors[f"{which}.block{block}.class_logits"]).abs().max() < 1e-4


def test_the_published_segmentation_comes_out(san_small, san_of_small):
    """Class probabilities without the background times sigmoid of the up-sampled masks, summed over queries."""
    tensors, _, _ = san_small
    image = image_of(tensors, "wide")
    with torch.no_grad():
        out = san_of_small.eval()(image, tensors["wide.text_embeddings"])
    masks = torch.nn.functional.interpolate(out["masks"][-1], size=image.shape[-2:], mode="bilinear").sigmoid()
    found = torch.einsum("bqk,bqhw->bkhw", out["classes"][-1].softmax(-1)[..., :-1], masks)[0]
    assert (found - tensors["wide.sem_seg"]).abs().max() < 1e-4


def test_its_answer_is_the_published_segmentation(san_small, san_of_small):
    """The same scores from what `answer` hands to eval.py: maps, mix without its last column, gate."""
    tensors, _, _ = san_small
    image = image_of(tensors, "wide")
    with torch.no_grad():
        maps, mix, none, gate, floor = san_of_small.eval().answer(san_of_small(image, tensors["wide.text_embeddings"]), 0)
    masks = gate(torch.nn.functional.interpolate(maps[None], size=image.shape[-2:], mode="bilinear")[0])
    assert none and floor == float("-inf") and mix.shape[1] == len(tensors["wide.text_embeddings"]) + 1
    assert (torch.einsum("ck,chw->khw", mix[:, :-1], masks) - tensors["wide.sem_seg"]).abs().max() < 1e-4


@torch.no_grad()
def test_every_image_of_a_batch_gets_its_own_answer():
    """The last masks and classes of image b: in training, where there are two of each, and at test time."""
    model = world("san")
    for mode in (True, False):
        out = model.train(mode)(images(), TEXT)
        for b in (0, 1):
            answer = model.answer(out, b)
            assert torch.equal(answer.maps, out["masks"][-1][b])
            assert torch.equal(answer.mix, out["classes"][-1][b].softmax(-1))


def test_inputs_are_multiples_of_the_patch_but_of_32_where_that_is_16():
    """As published: SAN pads to 32 for its patches of 16."""
    assert world("san").stride == 8 and world("san", patch=16).stride == 32


@pytest.mark.parametrize("row, column", [(0, 0), (0, -1), (3, -2), (-1, 0), (-1, -2), (-1, 5)])
def test_a_wrong_entry_of_the_recognition_mask_shows(san_small, san_of_small, row, column, monkeypatch):
    """Flip one entry between open and closed: cls-cls, cls-copy, patch-copy, copy-cls, copy-copy, copy-patch."""
    tensors, _, _ = san_small
    right = clip.recognition_mask

    def wrong(bias, grid):
        mask = right(bias, grid)
        mask[..., row, column] = 0.0 if row != 0 or column != 0 else -5.0
        if column == 5:
            mask[..., row, column] = float("-inf")
        return mask

    monkeypatch.setattr(clip, "recognition_mask", wrong)
    with torch.no_grad():
        out = san_of_small.eval()(image_of(tensors, "square"), tensors["square.text_embeddings"])
    assert (out["classes"][-1] - tensors["square.block8.class_logits"]).abs().max() > 1e-4


def test_eva_large_trains_as_many_numbers(monkeypatch):
    """Counted with 4 of its 24 frozen blocks and a small vocabulary: nothing of those is trained."""
    smaller(monkeypatch, {}, {"layers": 1, "vocab_size": 8}, 4)
    assert trainable(build(preset("coco-eva-large", model="san", pretrained="none"))) == 9_321_650


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


def test_the_bias_is_scaled_and_shifted_by_two_learned_numbers():
    """Fresh: by 1 and 0."""
    head, q, y = MaskHead(6, 5, 4, 2), torch.randn(1, 3, 6), torch.randn(1, 2, 2, 5)
    masks, bias = head(q, y)
    assert head.bias_scaling.weight.item() == 1 and head.bias_scaling.bias.item() == 0
    with torch.no_grad():
        head.bias_scaling.weight.fill_(3), head.bias_scaling.bias.fill_(-2)
    scaled = head(q, y)
    torch.testing.assert_close(scaled[1], 3 * bias - 2)
    assert torch.equal(scaled[0], masks)


def test_the_bias_may_read_other_pixels_than_the_masks():
    """PAT's reads a coarser map: the bias has its grid, and its numbers depend on no pixel of the masks."""
    head, q, y, z = MaskHead(6, 5, 4, 2), torch.randn(1, 3, 6), torch.randn(1, 4, 4, 5), torch.randn(1, 2, 2, 5)
    masks, bias = head(q, y, z)
    assert torch.equal(masks, head(q, y)[0]) and torch.equal(bias, head(q, z)[1])


def test_training_supervises_the_last_two_blocks_and_inference_one():
    model = SAN(preset("world", pretrained="none", model="san").net)
    text = torch.nn.functional.normalize(torch.randn(5, 64), dim=-1)
    image = torch.randn(2, 3, 64, 96)
    out = model(image, text)
    assert [m.shape for m in out["masks"]] == [(2, 20, 8, 12)] * 2 and [c.shape for c in out["classes"]] == [(2, 20, 6)] * 2
    last = model.eval()(image, text)
    assert len(last["masks"]) == 1
    torch.testing.assert_close(last["masks"][0], out["masks"][1], rtol=1e-4, atol=1e-4)


def test_every_trained_parameter_gets_a_gradient():
    model = SAN(preset("world", pretrained="none", model="san").net)
    out = model(torch.randn(2, 3, 64, 64), torch.nn.functional.normalize(torch.randn(5, 64), dim=-1))
    sum((x * torch.randn_like(x)).sum() for x in out["masks"] + out["classes"]).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


def test_the_config_has_its_parts():
    """The reference size stands in the dataclasses; the parts are made anew for each config."""
    config = SANConfig()
    assert (config.clip.vlm, config.clip.short_side, config.side.width, config.side.queries) == ("ViT-B-16", 640, 240, 100)
    config.side.width = 3
    assert SANConfig().side.width == 240


@pytest.mark.parametrize("changes, says", [
    (dict(heads=5), "heads 5 does not divide the width 96"), (dict(depths=(0, 2, 4)), "depths 0 2 4: takes 4 numbers"),
    (dict(depths=(0, 2, 3, -1)), "depths 0 2 3 -1: takes some whole"), (dict(points=0), "points 0: takes a whole number from 1"),
    (dict(mixer=False), "model san has no number called mixer: that number is PAT's"),
    (dict(widht=3), "no number called widht; did you mean width")], ids=str)
def test_numbers_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(InputError, match=says) as error:
        world("san", **changes)
    assert "\n" not in str(error.value)


# --- the loss: two queries, four pixels, every one of them a point ---


@pytest.fixture
def every_pixel(monkeypatch):
    """The random points of the losses become the pixels themselves, once each; the keys they were drawn by are kept."""
    keys, right = [], losses.generator
    monkeypatch.setattr(losses, "generator", lambda *key: keys.append(key) or right(*key))
    monkeypatch.setattr(losses, "sample_at", lambda maps, points: maps.flatten(1)[:, :points.shape[1]])
    return keys


LABELS = torch.tensor([[[0, 0], [1, IGNORE]], [[1, 1], [1, 1]]])                          # two names, then one


def by_hand():
    """(out, names and values of its terms) for LABELS; see `test_the_terms_by_hand`."""
    on = torch.tensor([2.0, 2, -2, -2])
    masks = [torch.stack([torch.stack([on, -on]), torch.zeros(2, 4)]).view(2, 2, 2, 2), torch.zeros(2, 2, 2, 2)]
    # first image: query 0 says name 1, query 1 name 0; second image: query 1 says name 1, query 0 nothing it is sure of
    classes = [torch.zeros(2, 2, 3), torch.tensor([[[0.0, 4, 0], [4, 0, 0]], [[0, 0, 0], [0, 4, 0]]])]
    classes[0][1, 1, 1] = 1e-3                                # or both queries would fit the second image alike
    out = dict(masks=masks, classes=classes)
    s, sure = 1 / (1 + math.exp(-2)), -math.log(math.exp(4) / (math.exp(4) + 2))
    # Dice is 1 - (2 Σ p t + 1) / (Σ p + Σ t + 1).  With p = 1/2 everywhere: name 0 on two pixels, 1 on one, 1 on four.
    half = {2: 1 - 3 / 5, 1: 1 - 2 / 4, 4: 1 - 5 / 7}
    clear = (1 - (4 * s + 1) / (2 * s + 2 * (1 - s) + 2 + 1)) + (1 - (2 * s + 1) / (2 * s + 2 * (1 - s) + 1 + 1))
    weight = 1 + 1 + 1 + 0.1                                  # three queries matched, one that matches nothing
    return out, {
        "ce_1": (2.0, math.log(3)),                           # every query: three names, equally likely, whatever weights
        # query 0 is right four times (its mask of name 0), query 1 errs on the last pixel, which has no label: 0 in its mask
        "mask_1": (5.0, (math.log1p(math.exp(-2)) + (3 * math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 4
                         + math.log(2)) / 3),
        "dice_1": (5.0, (clear + half[4]) / 3),
        "ce_2": (2.0, (3 * sure + 0.1 * math.log(3)) / weight),
        "mask_2": (5.0, math.log(2)),
        "dice_2": (5.0, (half[1] + half[2] + half[4]) / 3)}


def test_the_terms_by_hand(every_pixel):
    """Names, weights and values of L_seg: the first output matches by its masks, the second by its names."""
    model, (out, expected) = world("san", queries=2, points=4), by_hand()
    totals = model.totals(LABELS)
    assert totals.tolist() == pytest.approx([3, 3.1])
    terms = model.terms(out, Batch(images(2), LABELS, None, [(7, 5), (7, 9)], totals, 1))
    assert {name: weight for name, (weight, _) in terms.items()} == {name: weight for name, (weight, _) in expected.items()}
    for name, (_, value) in expected.items():
        assert terms[name][1].item() == pytest.approx(value, rel=1e-3), name
    assert every_pixel == [(7, 5, 1), (7, 9, 1), (7, 5, 2), (7, 9, 2)]                    # each output draws its own points


def test_a_part_of_a_batch_divides_by_its_share_of_the_totals(every_pixel):
    """One of two micro-batches, all labels in it: sums over half the totals, so that the mean of the parts is the whole."""
    model, (out, expected) = world("san", queries=2, points=4), by_hand()
    terms = model.terms(out, Batch(images(2), LABELS, None, [(7, 5), (7, 9)], model.totals(LABELS), 2))
    for name, (_, value) in expected.items():
        assert terms[name][1].item() == pytest.approx(2 * value, rel=1e-3), name


def test_a_batch_without_a_label_still_has_its_no_object_loss():
    """No true mask in it: the count of masks is taken for 1, not for 0."""
    model = world("san", points=16)
    void = torch.full((2, 64, 64), IGNORE)
    terms = model.terms(model(images(), TEXT), Batch(images(), void, None, [(0, 1), (0, 2)], model.totals(void), 1))
    assert all(term.isfinite() for _, term in terms.values()) and terms["ce_2"][1] > 0 and terms["dice_2"][1] == 0
