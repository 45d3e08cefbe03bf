"""What predict.py promises: SAN's protocol pixel by pixel, in bands or in one piece; any picture, any words."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import predict
from cli import InputError
from predict import UNNAMED, DenseCLIP, check_picture, name_pixels, segment, semantic_scores
from segmenter import Answer, identity
from tests.helpers import FakeModel, FakeVLM, TwoHalves, fake_runs, half_bright, noise, world


@pytest.fixture
def runs(monkeypatch, tmp_path):
    return fake_runs(monkeypatch, tmp_path)


def masks_and_classes(masks, classes):
    """The Answer of SAN and PAT: mask logits (Q,h,w), class logits (Q,L+1), background last."""
    return Answer(masks, mix=classes.softmax(-1), none=True)


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
@pytest.mark.parametrize("band", [predict.BAND, 3000])
def test_banded_scores_equal_the_plain_protocol(monkeypatch, crop, size, band):
    """Upsample, crop, upsample, softmax over L+1, sum over queries: one band of rows or many, enlarging or shrinking."""
    monkeypatch.setattr(predict, "BAND", band)
    g = torch.Generator().manual_seed(1)
    masks, classes = 4 * torch.randn(5, 3, 5, generator=g), 3 * torch.randn(5, 8, generator=g)
    want = protocol_in_full(masks, classes, (24, 40), crop, size)
    bands = list(semantic_scores(masks_and_classes(masks, classes), (24, 40), crop, size))
    assert (len(bands) > 1) == (band == 3000)                 # the small budget really cuts the image into bands
    assert torch.equal(torch.cat([rows for rows, _, _ in bands]), torch.arange(size[0]))
    torch.testing.assert_close(torch.cat([s for _, s, _ in bands], 1), want[:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([b for _, _, b in bands]), want[-1], rtol=1e-5, atol=1e-5)
    named = name_pixels(masks_and_classes(masks, classes), (24, 40), crop, size)
    margin = want[:-1].topk(2, 0).values.diff(dim=0)[0].abs() > 1e-4
    assert torch.equal(named[margin], want[:-1].argmax(0)[margin]) and named.min() >= 0


@pytest.mark.parametrize("model", ["san", "pat"])
@torch.no_grad()
def test_a_photo_through_a_whole_model_is_named_by_the_plain_protocol(model):
    """Its own last masks and classes, softmax over L+1, cropped; 50x81 in, 33x47 out, with and without "none of these"."""
    net, image = world(model).eval(), torch.randn(3, 50, 81)
    text = net.vlm.embed_text(["grass", "red star", "sand"])
    out = net(predict.pad(image, net.stride), text)
    want = protocol_in_full(out["masks"][-1][0], out["classes"][-1][0], (56, 88), (50, 81), (33, 47))
    answer = net.answer(out, 0)
    (_, s, none), = semantic_scores(answer, (56, 88), (50, 81), (33, 47))
    torch.testing.assert_close(torch.cat([s, none[None]]), want, rtol=1e-4, atol=1e-5)
    for none_of_these in (False, True):
        named, _ = segment(net, image, text, (33, 47), none_of_these)
        best = want[:-1].argmax(0)
        best[(want[:-1].amax(0) < want[-1]) & none_of_these] = UNNAMED
        assert (named == best).float().mean() > 0.99          # ties of rounding apart


def test_the_background_is_dropped_after_the_softmax():
    """Query 0 says half name 0, half background; query 1 is .6 name 1.  Renormalised without background, 0 would win."""
    classes = torch.tensor([[0.5, 1e-9, 0.5], [0.4, 0.6, 1e-9]]).log()
    masks = torch.tensor([[[0.0]], [[9.0]]])
    (_, s, background), = semantic_scores(masks_and_classes(masks, classes), (1, 1), (1, 1), (1, 1))
    half, full = 0.5, torch.tensor(9.0).sigmoid().item()
    assert s.flatten().tolist() == pytest.approx([0.5 * half + 0.4 * full, 0.6 * full])
    assert background.item() == pytest.approx(0.5 * half, abs=1e-6)
    assert name_pixels(masks_and_classes(masks, classes), (1, 1), (1, 1), (1, 1)).item() == 0


def test_none_of_these_worked_by_hand():
    """Two pixels, one query, background share .5.  Name 0 has .3: unnamed, but only when asked.  With .6 it is named."""
    masks = torch.tensor([[[3.0, -3.0]]])
    for shares, unnamed in (([0.3, 0.2, 0.5], True), ([0.6, 0.1, 0.3], False)):
        classes = torch.tensor([shares]).log()
        args = masks_and_classes(masks, classes), (1, 2), (1, 2), (1, 2)
        assert name_pixels(*args).tolist() == [[0, 0]]
        assert name_pixels(*args, none_of_these=True).tolist() == ([[-1, -1]] if unnamed else [[0, 0]])


def test_none_of_these_is_decided_pixel_by_pixel():
    """Left the naming query is on, right the background one."""
    masks, classes = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]]), torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]).log()
    assert name_pixels(masks_and_classes(masks, classes), (1, 2), (1, 2), (1, 2), none_of_these=True).tolist() == [[0, -1]]


def test_the_side_net_with_patches_of_16_sees_multiples_of_32():
    """As published: 40x30 becomes 64x32, normalised zeros around, although 48x32 would do for the patches."""
    model = world("san", patch=16, width=48).eval()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    segment(model, torch.ones(3, 40, 30), model.vlm.embed_text(["a", "b"]), (40, 30))
    assert seen[0].shape == (1, 3, 64, 32) and seen[0].sum() == 3 * 40 * 30 and seen[0][..., :40, :30].min() == 1


def test_padding_goes_right_and_below_and_comes_off_again():
    image = torch.ones(3, 17, 30)
    padded = predict.pad(image, 8)
    assert padded.shape == (1, 3, 24, 32) and padded[..., :17, :30].min() == 1 and padded.sum() == image.sum()
    assert torch.equal(predict.unpad(padded[0], (17, 30), (24, 32)), image)
    assert predict.unpad(torch.ones(6, 8), (17, 30), (24, 32)).shape == (5, 8)       # 17/4 pixels a token: 4.25 rows, so five


# --- the command ------------------------------------------------------------------------------------------------------


def upside_down(path):
    exif = Image.Exif()
    exif[0x0112] = 6                                          # stored lying down: turn 90 degrees clockwise to view
    Image.fromarray(half_bright(30, 50)).save(path, exif=exif)


@pytest.mark.parametrize("name, save, size", [
    ("rgb.png", lambda p: Image.fromarray(half_bright(30, 50)).convert("RGB").save(p), (50, 30)),
    ("rgba.png", lambda p: Image.fromarray(half_bright(37, 21)).convert("RGBA").save(p), (21, 37)),
    ("grey.jpg", lambda p: Image.fromarray(half_bright(64, 64)).save(p), (64, 64)),
    ("palette.png", lambda p: Image.fromarray(half_bright(30, 50)).convert("P").save(p), (50, 30)),
    ("rotated.jpg", upside_down, (30, 50)),
    ("deep.png", lambda p: Image.fromarray(half_bright(30, 50).astype(np.uint16) * 257).save(p), (50, 30)),
    ("thin.png", lambda p: Image.fromarray(half_bright(2, 300)).save(p), (300, 2)),
    ("dot.png", lambda p: Image.fromarray(half_bright(1, 1)).save(p), (1, 1)),
])
def test_every_kind_of_picture_comes_back_at_its_own_size(runs, name, save, size):
    save(runs / name)
    predict.main(["pat", name, "--labels", "bright, dark", "--out", "out.png"])
    for part in ("", "_reconstruction", "_tokens_early", "_tokens_mid", "_tokens_late", "_tokens_latent"):
        assert Image.open(runs / f"out{part}.png").size == size, part
    assert Image.open(runs / "out_legend.png").width > 50


def test_san_says_what_it_does_not_have(runs, capsys):
    Image.fromarray(half_bright(30, 50)).save("a.png")
    predict.main(["san", "a.png", "--labels", "bright, dark", "--out", "out.png", "--none-of-these"])
    assert "no token maps, no reconstruction" in capsys.readouterr().out
    assert sorted(path.name for path in runs.glob("out*")) == ["out.png", "out_legend.png"]


@pytest.mark.parametrize("argv, words", [
    ([], "arguments are required: RUN, FILE, --labels"),
    (["pat", "a.png", "--label", "a"], "arguments are required: --labels"),
    (["pat", "a.png", "--labels", "a, b", "--none-of-thes"], "did you mean --none-of-these"),
    (["pat", "a.png", "--out", "b.png"], "arguments are required: --labels"),
    (["pat", "--labels", "a, b", "--out", "b.png"], "arguments are required: FILE"),
    (["pat", "a.png", "--labels", "a, a", "--out", "b.png"], "--labels: name 2"),
    (["pat", "gone.png", "--labels", "a, b", "--out", "b.png"], "gone.png"),
    (["pat", "a.png", "--labels", "a, b", "--out", "nowhere/b.png"], "existing folder"),
    (["pat", "a.png", "--labels", "a, b", "--out", "b.txt"], "picture's ending"),
    (["pat", "a.png", "--labels", "a, b", "--out", "a.png"], "overwrite the input"),
    (["pat", "a.png", "--labels", "a, b", "--out", "b.png", "--data", "d"], "unknown argument --data"),
    (["pat", "a.png", "--labels", "a, b", "--out", "b.png", "--rfid", "w"], "unknown argument --rfid"),
])
def test_bad_input_is_one_line_and_writes_nothing(runs, argv, words):
    Image.fromarray(half_bright(30, 50)).save("a.png")
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=words) as error:
        predict.main(argv)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_from_the_shell_bad_input_ends_with_status_2(tmp_path):
    """The real program, from a folder of its own: one line on stderr, no traceback."""
    Image.fromarray(half_bright(30, 50)).save(tmp_path / "a.png")
    done = subprocess.run([sys.executable, Path(predict.__file__), "no/such/run", "a.png", "--labels", "a, b"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no/such/run") and done.stderr.count("\n") == 1, done.stderr


# --- every kind of Answer, by hand --------------------------------------------------------------------------------------


def scored(answer, padded=(1, 2), crop=None, size=None):
    """Scores (L,H,W) and what "none of these" scores, of an answer whose picture is one band."""
    (_, s, none), = semantic_scores(answer, padded, crop or padded, size or crop or padded)
    return s, none


def test_masks_times_classes_with_none_by_hand():
    """Gates 1/2 and 3/4; shares (.2 .3 .5) and (.6 .4 0): s = (.55, .45), none of these .25."""
    answer = Answer(torch.logit(torch.tensor([[[0.5]], [[0.75]]])), none=True,
                    mix=torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]]))
    s, none = scored(answer, (1, 1))
    assert s.flatten().tolist() == pytest.approx([0.1 + 0.45, 0.15 + 0.3]) and none.item() == pytest.approx(0.25)
    assert name_pixels(answer, (1, 1), (1, 1), (1, 1), none_of_these=True).item() == 0


def test_masks_times_classes_without_none_keep_every_column():
    """The same mix, `none` False: its last column is a name like the others, and only `floor` leaves a pixel unnamed."""
    answer = Answer(torch.zeros(2, 1, 2), mix=torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]))
    s, none = scored(answer)
    assert s[:, 0, 0].tolist() == pytest.approx([0.15, 0.2, 0.65]) and none == float("-inf")
    assert name_pixels(answer, (1, 2), (1, 2), (1, 2), none_of_these=True).tolist() == [[2, 2]]
    assert name_pixels(answer._replace(floor=0.7), (1, 2), (1, 2), (1, 2), none_of_these=True).tolist() == [[-1, -1]]


def test_maps_that_are_names_are_their_scores():
    """mix None: map c is name c.  The gate still applies; what falls below `floor` is unnamed, but only when asked."""
    maps = torch.tensor([[[0.9, -0.2]], [[0.1, -0.1]]])
    answer = Answer(maps, gate=identity, floor=0.0)
    s, none = scored(answer)
    assert torch.equal(s, maps) and none == 0
    assert name_pixels(answer, (1, 2), (1, 2), (1, 2)).tolist() == [[0, 1]]
    assert name_pixels(answer, (1, 2), (1, 2), (1, 2), none_of_these=True).tolist() == [[0, UNNAMED]]
    assert torch.equal(scored(answer._replace(gate=torch.sigmoid))[0], maps.sigmoid())


def test_groups_share_names_by_identity():
    """Three groups, two names, mix (C,L): s_lp = sum_c mix_cl maps_cp, no sigmoid, no background."""
    maps = torch.tensor([[[0.7, 0.0]], [[0.2, 0.5]], [[0.1, 0.5]]])
    mix = torch.tensor([[1.0, -1.0], [0.0, 2.0], [3.0, 0.5]])
    s, _ = scored(Answer(maps, mix=mix, gate=identity))
    assert s[:, 0].T.tolist() == [pytest.approx([1.0, -0.25]), pytest.approx([1.5, 1.25])]
    answer = Answer(maps, mix=torch.cat([mix, torch.ones(3, 1)], 1), none=True, gate=identity)
    assert name_pixels(answer, (1, 2), (1, 2), (1, 2), none_of_these=True).tolist() == [[0, 0]]
    assert name_pixels(answer._replace(mix=torch.cat([mix, 2 * torch.ones(3, 1)], 1)), (1, 2), (1, 2), (1, 2),
                       none_of_these=True).tolist() == [[UNNAMED, UNNAMED]]


@pytest.mark.parametrize("crop, size", [((24, 40), (24, 40)), ((17, 35), (50, 31)), ((17, 35), (9, 80))])
def test_without_a_gate_mixing_before_or_after_interpolation_is_the_same(crop, size):
    """Both are linear, so groups with a mix equal the L maps they make; behind a sigmoid they do not."""
    maps, mix = torch.randn(5, 3, 5), torch.randn(5, 7)
    mixed = torch.einsum("cl,chw->lhw", mix, maps)
    late, _ = scored(Answer(maps, mix=mix, gate=identity), (24, 40), crop, size)
    early, _ = scored(Answer(mixed, gate=identity), (24, 40), crop, size)
    torch.testing.assert_close(late, early, rtol=1e-5, atol=1e-5)
    gated, _ = scored(Answer(maps, mix=mix), (24, 40), crop, size)
    assert (gated - torch.einsum("cl,chw->lhw", mix, maps.sigmoid()).amax()).abs().max() > 0.1
    swapped = Answer(maps.sigmoid(), mix=mix, gate=identity)                                  # the gate before interpolation
    assert (gated - scored(swapped, (24, 40), crop, size)[0]).abs().max() > 0.01


def test_the_dense_row_is_each_patchs_own_name():
    """MaskCLIP as a model: its cosines are the scores; bright above, dark below, and the padding is cropped away."""
    sample = TwoHalves()[1]                                   # 48x44: padded to 48x48
    vlm = FakeVLM()
    prediction, more = segment(DenseCLIP(vlm, 8), sample["image"], vlm.embed_text(("day", "night")), (48, 44))
    assert more == {} and prediction.shape == (48, 44)
    assert (prediction[:20] == 0).all() and (prediction[28:] == 1).all()


def test_the_dense_rows_scores_are_the_cosines_themselves():
    """No sigmoid: at one patch, cos = (.3, -.2)."""
    answer = DenseCLIP(FakeVLM(), 8).answer(dict(cosines=torch.tensor([0.3, -0.2]).view(1, 2, 1, 1)))
    s, none = scored(answer, (1, 1))
    assert s.flatten().tolist() == pytest.approx([0.3, -0.2]) and none == float("-inf")


def test_a_picture_rounds_to_the_nearest_level():
    """.5 is 127.5, to even 128; .4999 is 127.47; beyond 0 and 1 it stops."""
    picture = predict.to_image(torch.tensor([0.5, 0.4999, 1.2, -1.0, 254.9 / 255]).expand(3, 1, 5))
    assert picture.shape == (1, 5, 3) and picture[0, :, 0].tolist() == [128, 127, 255, 0, 255]


def test_a_pixel_of_a_token_map_shows_the_token_under_its_centre():
    """5 pixels over 2 tokens: centres .5, 1.5, 2.5 | 3.5, 4.5 of 5, the third by half a token; padding has no pixel."""
    index = torch.tensor([[1, 2, 3]])
    assert predict.spread(index, (8, 16), (8, 24), (1, 5)).tolist() == [[1, 1, 2, 2, 2]]
    assert predict.spread(index, (8, 20), (8, 24), (1, 5)).tolist() == [[1, 1, 2, 2, 3]]


def test_an_overlay_tints_what_has_a_name_and_nothing_else():
    """Grey 100 under colour 200 at .6: 100 * .4 + 200 * .6 = 160; unnamed pixels as they were; borders white."""
    prediction = np.array([[0, 0, 0, UNNAMED, UNNAMED]])
    found = predict.overlay(np.full((1, 5, 3), 100, np.uint8), prediction, np.full((1, 3), 200, np.uint8))
    assert found[0, :, 0].tolist() == [160, 160, 160, 255, 100]


def test_a_photo_is_shown_to_the_model_at_the_size_it_was_trained_for(monkeypatch):
    """Short side 32, long side at most 128: 16x100 would be 32x200 and is 20x128; the answer has the photo's size."""
    seen, model = [], FakeModel().eval()
    monkeypatch.setattr(predict, "segment", lambda model, image, text, size, none: seen.append((image.shape, size)))
    for h, w in ((64, 100), (16, 100)):
        predict.segment_photo(model, noise(h, w), ("day", "night"))
    assert seen == [((3, 32, 50), (64, 100)), ((3, 20, 128), (16, 100))]


class LeftAndRight:
    """Two maps over the padded input: name 0 on its left half, name 1 on its right half."""

    stride = 16

    def __call__(self, image, text):
        return dict(maps=torch.eye(2).view(2, 1, 2))

    def answer(self, out, b):
        return Answer(out["maps"], gate=identity)


def test_maps_cover_the_padded_input_and_not_the_picture():
    """12 pixels wide, padded to 16: the halves meet at pixel 8, and at 16 in the picture of twice the size."""
    model, image, text = LeftAndRight(), torch.zeros(3, 16, 12), torch.zeros(2, 4)
    assert segment(model, image, text, (16, 12))[0].tolist() == [[0] * 8 + [1] * 4] * 16
    assert segment(model, image, text, (32, 24))[0].tolist() == [[0] * 16 + [1] * 8] * 32


def test_what_lies_under_the_padding_reaches_no_pixel():
    """A 16x16 picture padded to 16x24: the third column of maps is under the padding alone; whatever it says, the same."""
    maps = torch.randn(3, 2, 3)
    other = maps.clone()
    other[..., 2] += 100
    one, two = (scored(Answer(m, gate=identity), (16, 24), (16, 12), (16, 12))[0] for m in (maps, other))
    assert torch.equal(one, two)
    full = F.interpolate(maps[None], (16, 24), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(one, full[..., :12], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out, why", [("a.txt", "a picture's ending"), ("a", "a picture's ending"),
                                      ("gone/a.png", "existing folder"), ("photo.png", "overwrite the input"),
                                      ("link.png", "overwrite the input")])
def test_a_place_for_a_picture_is_checked_before_the_work(tmp_path, out, why):
    """A picture's ending, in any case, in a folder that is there, and not the photo itself by whatever name."""
    photo = tmp_path / "photo.png"
    Image.fromarray(noise()).save(photo)
    (tmp_path / "link.png").symlink_to(photo)
    for fine in ("a.png", "A.JPG", "b.webp"):
        check_picture(tmp_path / fine, photo)
    check_picture(photo)                                            # nothing to be mistaken for
    with pytest.raises(InputError, match=f"--out .*{out}: .*{why}"):
        check_picture(str(tmp_path / out), photo)
