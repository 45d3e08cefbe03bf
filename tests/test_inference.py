"""What inference.py promises: SAN's protocol pixel by pixel, in bands or in one piece."""

import pytest
import torch
import torch.nn.functional as F

import inference
from pat import build, preset


def protocol_in_full(masks, classes, padded, crop, size):
    """The protocol in the obvious way, all of it in memory: (L+1,H,W), the background last."""
    m = F.interpolate(masks[None], size=padded, mode="bilinear", align_corners=False)[..., :crop[0], :crop[1]]
    m = F.interpolate(m, size=size, mode="bilinear", align_corners=False)[0]
    scores = torch.zeros(classes.shape[1], *size)
    for q in range(len(m)):
        for name in range(classes.shape[1]):
            scores[name] += classes[q].softmax(0)[name] * m[q].sigmoid()
    return scores


@pytest.mark.parametrize("crop, size", [((24, 40), (24, 40)), ((17, 35), (50, 31)), ((17, 35), (9, 80)), ((24, 40), (7, 5))])
@pytest.mark.parametrize("band", [inference.BAND, 3000])
def test_banded_scores_equal_the_plain_protocol(monkeypatch, crop, size, band):
    """Upsample, crop, upsample, softmax over L+1, sum over queries: one band of rows or many, enlarging or shrinking."""
    monkeypatch.setattr(inference, "BAND", band)
    g = torch.Generator().manual_seed(1)
    masks, classes = 4 * torch.randn(5, 3, 5, generator=g), 3 * torch.randn(5, 8, generator=g)
    want = protocol_in_full(masks, classes, (24, 40), crop, size)
    bands = list(inference.semantic_scores(masks, classes, (24, 40), crop, size))
    assert (len(bands) > 1) == (band == 3000)                 # the small budget really cuts the image into bands
    assert torch.equal(torch.cat([rows for rows, _, _ in bands]), torch.arange(size[0]))
    torch.testing.assert_close(torch.cat([s for _, s, _ in bands], 1), want[:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([b for _, _, b in bands]), want[-1], rtol=1e-5, atol=1e-5)
    named = inference.name_pixels(masks, classes, (24, 40), crop, size)
    margin = want[:-1].topk(2, 0).values.diff(dim=0)[0].abs() > 1e-4
    assert torch.equal(named[margin], want[:-1].argmax(0)[margin]) and named.min() >= 0


def test_the_background_is_dropped_after_the_softmax():
    """Query 0 says half name 0, half background; query 1 is .6 name 1.  Renormalised without background, 0 would win."""
    classes = torch.tensor([[0.5, 1e-9, 0.5], [0.4, 0.6, 1e-9]]).log()
    masks = torch.tensor([[[0.0]], [[9.0]]])
    (_, s, background), = inference.semantic_scores(masks, classes, (1, 1), (1, 1), (1, 1))
    half, full = 0.5, torch.tensor(9.0).sigmoid().item()
    assert s.flatten().tolist() == pytest.approx([0.5 * half + 0.4 * full, 0.6 * full])
    assert background.item() == pytest.approx(0.5 * half, abs=1e-6)
    assert inference.name_pixels(masks, classes, (1, 1), (1, 1), (1, 1)).item() == 0


def test_none_of_these_worked_by_hand():
    """Two pixels, one query, background share .5.  Name 0 has .3: unnamed, but only when asked.  With .6 it is named."""
    masks = torch.tensor([[[3.0, -3.0]]])
    for shares, unnamed in (([0.3, 0.2, 0.5], True), ([0.6, 0.1, 0.3], False)):
        classes = torch.tensor([shares]).log()
        args = masks, classes, (1, 2), (1, 2), (1, 2)
        assert inference.name_pixels(*args).tolist() == [[0, 0]]
        assert inference.name_pixels(*args, none_of_these=True).tolist() == ([[-1, -1]] if unnamed else [[0, 0]])


def test_none_of_these_is_decided_pixel_by_pixel():
    """Left the naming query is on, right the background one."""
    masks, classes = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]]), torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]).log()
    assert inference.name_pixels(masks, classes, (1, 2), (1, 2), (1, 2), none_of_these=True).tolist() == [[0, -1]]


def test_the_side_net_with_patches_of_16_sees_multiples_of_32():
    """As published: 40x30 becomes 64x32, normalised zeros around, although 48x32 would do for the patches."""
    model = build(preset("world", model="san", pretrained="none", patch=16, width=48)).eval()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inference.segment(model, torch.ones(3, 40, 30), model.vlm.embed_text(["a", "b"]), (40, 30))
    assert seen[0].shape == (1, 3, 64, 32) and seen[0].sum() == 3 * 40 * 30 and seen[0][..., :40, :30].min() == 1


def test_padding_goes_right_and_below_and_comes_off_again():
    image = torch.ones(3, 17, 30)
    padded = inference.pad(image, 8)
    assert padded.shape == (1, 3, 24, 32) and padded[..., :17, :30].min() == 1 and padded.sum() == image.sum()
    assert torch.equal(inference.unpad(padded[0], (17, 30), (24, 32)), image)
    assert inference.unpad(torch.ones(6, 8), (17, 30), (24, 32)).shape == (5, 8)       # 17/4 pixels a token: 4.25 rows, so five
