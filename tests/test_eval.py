"""What eval.py promises: SAN's protocol pixel by pixel, both mIoU rules, honest numbers, and no half-written files."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from torch import nn

import eval as E
from images import InputError, palette, to_tensor, to_unit
from vq import Tokens

# --- both mIoU rules, by hand ---------------------------------------------------------------------------------------

#                        true:  0  1  2  ignored
MATRIX = torch.tensor([[4, 2, 0, 3],                          # said 0   G = (4, 6, 0): name 2 never occurs,
                       [0, 2, 0, 0],                          # said 1   P = (6, 2, 1): but one pixel was given to it,
                       [0, 1, 0, 0],                          # said 2   T = (4, 2, 0): and one pixel stayed unnamed
                       [0, 1, 0, 5]])                         # unnamed  the ignored column must change nothing


def test_both_miou_rules_worked_by_hand():
    """IoU = 4/(4+6-4), 2/(6+2-2), 0/(0+1-0): the new rule averages the first two, the old one divides by three."""
    s = E.scores(MATRIX, {})
    assert s["IoU"] == pytest.approx([4 / 6, 2 / 6, None])
    assert s["mIoU"] == pytest.approx((4 / 6 + 2 / 6) / 2)
    assert s["mIoU_old_rule"] == pytest.approx((4 / 6 + 2 / 6) / 3)
    assert s["pixel_accuracy"] == pytest.approx(6 / 10)
    assert s["mean_accuracy"] == pytest.approx((4 / 4 + 2 / 6) / 2)
    assert s["fwIoU"] == pytest.approx(0.4 * 4 / 6 + 0.6 * 2 / 6)
    assert s["pixels"] == [4, 6, 0]


def test_both_rules_agree_when_no_absent_name_is_predicted():
    matrix = MATRIX.clone()
    matrix[2] = 0
    s = E.scores(matrix, {})
    assert s["mIoU"] == s["mIoU_old_rule"]


def test_an_unnamed_pixel_is_a_miss_of_its_true_name():
    named, unnamed = torch.zeros(3, 3), torch.zeros(3, 3)
    named[0, 0], unnamed[0, 0], unnamed[2, 0] = 2, 1, 1
    assert E.scores(named, {})["IoU"][0] == 1 and E.scores(unnamed, {})["IoU"][0] == 0.5


def test_groups_and_foreground_accuracy_by_hand():
    """Names 0, 1 are objects, 2 is stuff.  Calling object 1 object 0 keeps the foreground right; calling it stuff does not."""
    matrix = torch.tensor([[4, 2, 1, 0], [0, 2, 0, 0], [0, 1, 9, 0], [0, 1, 0, 0]])
    s = E.scores(matrix, {"seen": (0,), "unseen": (1,), "stuff": (2,)})
    assert s["mIoU_seen"] == pytest.approx(4 / 7)
    assert s["mIoU_unseen"] == pytest.approx(2 / 6)
    assert s["mIoU_stuff"] == pytest.approx(9 / 11)
    assert s["foreground_accuracy"] == pytest.approx((4 + 2 + 2 + 9) / 20)


def test_confusion_counts_pairs_and_sets_ignored_pixels_aside():
    prediction, label = torch.tensor([[0, 1, 1], [-1, 0, -1]]), torch.tensor([[0, 0, -1], [1, -1, -1]])
    assert E.confusion(prediction, label, 2).tolist() == [[1, 0, 1],       # said 0: once right, once where nobody knows
                                                          [1, 0, 1],       # said 1: once instead of 0, once unknown
                                                          [0, 1, 1]]       # unnamed


def test_a_prediction_on_ignored_pixels_changes_no_score():
    label = torch.tensor([[0, 1, -1, -1]])
    right, wild = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[0, 1, 2, 1]])
    assert E.scores(E.confusion(right, label, 3), {}) == E.scores(E.confusion(wild, label, 3), {})


def test_one_matrix_over_the_set_is_not_the_mean_over_images():
    """A tiny image counts by its pixels: 1 of 1 right and 0 of 3 right make 1/4, not 1/2."""
    good = E.confusion(torch.tensor([[0]]), torch.tensor([[0]]), 2)
    bad = E.confusion(torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]]), 2)
    assert E.scores(good + bad, {})["mIoU"] == 0.25


@pytest.mark.parametrize("label, words", [([[0, 2]], "id 2 but only 2 names"), ([[0, 1, 1]], "its label")])
def test_labels_that_do_not_fit_are_refused(label, words):
    with pytest.raises(InputError, match=words):
        E.confusion(torch.tensor([[0, 1]]), torch.tensor(label), 2)


def test_an_empty_ground_truth_has_no_score_instead_of_nan():
    assert E.scores(torch.zeros(3, 3), {})["mIoU"] is None


def test_chance_in_closed_form_is_what_guessing_gives():
    """Closed form by hand for G = (30, 10) and L = 2, and a million real guesses on three names."""
    by_hand = E.chance([30, 10], {})
    assert by_hand["IoU"] == pytest.approx([15 / (30 + 20 - 15), 5 / (10 + 20 - 5)])
    g = torch.Generator().manual_seed(0)
    label = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), 10**6, True, generator=g)[None]
    guessed = E.scores(E.confusion(torch.randint(3, label.shape, generator=g), label, 3), {"stuff": (2,)})
    closed = E.chance(guessed["pixels"], {"stuff": (2,)})
    for key in ("mIoU", "pixel_accuracy", "mean_accuracy", "fwIoU", "mIoU_stuff", "foreground_accuracy"):
        assert guessed[key] == pytest.approx(closed[key], abs=3e-3)


# --- from queries to pixels -----------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("band", [E.BAND, 3000])
def test_banded_scores_equal_the_plain_protocol(monkeypatch, crop, size, band):
    """Upsample, crop, upsample, softmax over L+1, sum over queries: one band of rows or many, enlarging or shrinking."""
    monkeypatch.setattr(E, "BAND", band)
    g = torch.Generator().manual_seed(1)
    masks, classes = 4 * torch.randn(5, 3, 5, generator=g), 3 * torch.randn(5, 8, generator=g)
    want = protocol_in_full(masks, classes, (24, 40), crop, size)
    bands = list(E.semantic_scores(masks, classes, (24, 40), crop, size))
    assert (len(bands) > 1) == (band == 3000)                 # the small budget really cuts the image into bands
    assert torch.equal(torch.cat([rows for rows, _, _ in bands]), torch.arange(size[0]))
    torch.testing.assert_close(torch.cat([s for _, s, _ in bands], 1), want[:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([b for _, _, b in bands]), want[-1], rtol=1e-5, atol=1e-5)
    named = E.name_pixels(masks, classes, (24, 40), crop, size)
    margin = want[:-1].topk(2, 0).values.diff(dim=0)[0].abs() > 1e-4
    assert torch.equal(named[margin], want[:-1].argmax(0)[margin]) and named.min() >= 0


def test_the_background_is_dropped_after_the_softmax():
    """Query 0 says half name 0, half background; query 1 is .6 name 1.  Renormalised without background, 0 would win."""
    classes = torch.tensor([[0.5, 1e-9, 0.5], [0.4, 0.6, 1e-9]]).log()
    masks = torch.tensor([[[0.0]], [[9.0]]])
    (_, s, background), = E.semantic_scores(masks, classes, (1, 1), (1, 1), (1, 1))
    half, full = 0.5, torch.tensor(9.0).sigmoid().item()
    assert s.flatten().tolist() == pytest.approx([0.5 * half + 0.4 * full, 0.6 * full])
    assert background.item() == pytest.approx(0.5 * half, abs=1e-6)
    assert E.name_pixels(masks, classes, (1, 1), (1, 1), (1, 1)).item() == 0


def test_none_of_these_worked_by_hand():
    """Two pixels, one query, background share .5.  Name 0 has .3: unnamed, but only when asked.  With .6 it is named."""
    masks = torch.tensor([[[3.0, -3.0]]])
    for shares, unnamed in (([0.3, 0.2, 0.5], True), ([0.6, 0.1, 0.3], False)):
        classes = torch.tensor([shares]).log()
        args = masks, classes, (1, 2), (1, 2), (1, 2)
        assert E.name_pixels(*args).tolist() == [[0, 0]]
        assert E.name_pixels(*args, none_of_these=True).tolist() == ([[-1, -1]] if unnamed else [[0, 0]])


def test_none_of_these_is_decided_pixel_by_pixel():
    """Left the naming query is on, right the background one."""
    masks, classes = torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]]), torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]).log()
    assert E.name_pixels(masks, classes, (1, 2), (1, 2), (1, 2), none_of_these=True).tolist() == [[0, -1]]


def test_padding_goes_right_and_below_and_comes_off_again():
    image = torch.ones(3, 17, 30)
    padded = E.pad(image, 8)
    assert padded.shape == (1, 3, 24, 32) and padded[..., :17, :30].min() == 1 and padded.sum() == image.sum()
    assert torch.equal(E.unpad(padded[0], (17, 30), (24, 32)), image)
    assert E.unpad(torch.ones(6, 8), (17, 30), (24, 32)).shape == (5, 8)       # 17/4 pixels a token: 4.25 rows, so five


# --- the repainted image --------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    """An error of .1 everywhere: mean square .01, so 20 dB; of .01: 40 dB."""
    target = torch.full((3, 4, 5), 0.5)
    assert E.psnr(target + 0.1, target) == pytest.approx(20, abs=1e-4)
    assert E.psnr(target - 0.01, target) == pytest.approx(40, abs=1e-3)
    assert E.psnr(target, target) == pytest.approx(100)


def test_l1_of_a_known_error_and_lpips_never_invented():
    row = E.reconstruction_scores(torch.full((3, 16, 16), 0.75), torch.full((3, 16, 16), 0.5))
    assert row["L1"] == 0.25 and row["LPIPS"] is None


def test_ssim_equals_an_independent_implementation():
    """scipy's Gaussian filter in place of our convolution, at the positions where the 11x11 window fits."""
    rng = np.random.default_rng(0)
    a = rng.random((3, 20, 31))
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1)

    def blur(x):                                              # radius 5 = truncate 3.3 at sigma 1.5
        for axis in (1, 2):
            x = gaussian_filter1d(x, 1.5, axis, truncate=3.3)
        return x[:, 5:-5, 5:-5]

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    want = ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4))).mean()
    assert E.ssim(torch.tensor(a), torch.tensor(b)) == pytest.approx(want, abs=1e-9)
    assert E.ssim(torch.tensor(a), torch.tensor(a)) == pytest.approx(1)
    assert np.isnan(E.ssim(torch.ones(3, 10, 40), torch.ones(3, 10, 40)))


def test_a_mean_leaves_out_what_was_not_measured():
    assert E.mean([1.0, None, float("nan"), 3.0]) == 2 and E.mean([None]) is None


def test_lpips_without_its_backbone_is_not_measured_and_opens_no_connection(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("network"))
    E.load_lpips.cache_clear()
    assert E.load_lpips() is None
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / E.VGG).write_bytes(b"half a file")
    E.load_lpips.cache_clear()
    with pytest.raises(InputError, match="not torchvision's VGG-16"):
        E.load_lpips()
    E.load_lpips.cache_clear()


# --- a tiny run: bright is name 0, dark is name 1 -------------------------------------------------------------------


@dataclass
class Config:
    model: str = "pat"
    preset: str = "world"
    seed: int = 7
    short_side: int = 32
    long_side: int = 128
    data: str = ""
    vmf: bool = True
    vlm: str = "fake"
    pretrained: str = "none"
    clip_scale: float = 1.0
    depths: tuple = ()


class FakeVLM(nn.Module):
    """Names are rows of an identity matrix; a patch points to name 0 when bright, to name 1 when dark."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def embed_text(self, names):
        return torch.eye(len(names))

    def dense(self, image):
        bright = F.avg_pool2d(to_unit(image).mean(1, keepdim=True), 8)                    # (B,1,h,w)
        return torch.cat([bright, 1 - bright], 1)


class FakeModel(nn.Module):
    """Two queries, bright and dark, sure of their names; PAT repaints its input and numbers its tokens 0, 1, 2, ..."""

    def __init__(self, pat=True):
        super().__init__()
        self.vlm, self.stride, self.pat, self.config = FakeVLM(), 8, pat, Config(model="pat" if pat else "san")

    def codebook(self, stage):
        return F.normalize(torch.randn(64, 4, generator=torch.Generator().manual_seed(3)), dim=-1)

    def forward(self, image, text):
        assert image.shape[-2] % 8 == image.shape[-1] % 8 == 0 and not self.training
        bright = 20 * (F.avg_pool2d(to_unit(image).mean(1, keepdim=True), 8) - 0.5)       # (B,1,h,w)
        classes = 12 * torch.eye(2, text.shape[0] + 1)[None]
        out = {"masks": [torch.cat([bright, -bright], 1)], "classes": [classes]}
        if self.pat:
            h, w = bright.shape[-2:]
            index = torch.arange(h * w).view(1, h, w) % 64
            code = self.codebook("early")[index].permute(0, 3, 1, 2)
            out["image"] = to_unit(image)
            out["tokens"] = {stage: Tokens(code, index, code, None, None) for stage in ("early", "mid", "late", "latent")}
        return out


class TwoHalves:
    """Two pictures, bright above and dark below, with one ignored column; every size differs."""

    names, groups = ("day", "night"), {"seen": (0,), "stuff": (1,)}

    def __len__(self):
        return 2

    def __getitem__(self, i):
        size = (32, 40) if i == 0 else (48, 44)
        original = np.zeros((*size, 3), np.uint8)
        original[:size[0] // 2] = 255
        label = torch.ones(size, dtype=torch.int64)
        label[:size[0] // 2], label[:, 3] = 0, -1
        return {"image": to_tensor(original), "label": label, "name": str(i), "original": original}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Folders `pat` and `san` that load as the fake models."""
    for name in ("pat", "san"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(E, "load_run", lambda run, device="cpu": (m := FakeModel(Path(run).name == "pat"), m.config))
    monkeypatch.setattr(E, "VLM", FakeVLM)
    monkeypatch.setattr(E, "open_model", lambda name, pretrained: (None, None))
    monkeypatch.setattr(E, "World", lambda *args, **kwargs: TwoHalves())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_that_knows_everything_scores_one(runs):
    """Exactly: the border between bright and dark falls between patches, so upsampling keeps every pixel right."""
    model = FakeModel().train()
    row = E.evaluate(model, TwoHalves(), progress=False)
    assert model.training                                     # as it was found
    assert row["segmentation"]["mIoU"] == row["segmentation"]["foreground_accuracy"] == 1
    assert row["reconstruction"]["PSNR"] > 99 and row["reconstruction"]["SSIM"] == pytest.approx(1)
    assert set(row["codebooks"]) == {"early", "mid", "late", "latent"}
    early = row["codebooks"]["early"]
    assert early["share_used"] == 36 / 64                     # 6x6 tokens in the second picture, the first has fewer
    assert early["bf16"] == 1


def test_names_may_be_swapped_and_images_limited():
    row = E.evaluate(FakeModel(False), TwoHalves(), names=("light", "dark", "fog"), progress=False, images=1)
    assert row["images"] == 1 and len(row["segmentation"]["IoU"]) == 3
    assert row["reconstruction"] is None and row["codebooks"] == {}


def test_the_score_command_writes_table_json_and_pictures(runs, capsys):
    E.main(["pat", "--compare", "san"])
    table = json.loads((runs / "pat/scores.json").read_text())
    assert list(table["rows"]) == ["PAT pat", "SAN san", "MaskCLIP, no training", "chance"]
    assert table["config"]["seed"] == 7 and table["config"]["preset"] == "world" and table["torch"] == torch.__version__
    text = (runs / "pat/scores.txt").read_text()
    assert text in capsys.readouterr().out
    assert "old rule" in text and "PSNR dB" in text and "latent" in text
    if table["rows"]["PAT pat"]["reconstruction"]["LPIPS"] is None:
        assert "n/m" in text and "not measured" in text
    assert table["rows"]["chance"]["segmentation"]["pixel_accuracy"] == 0.5
    assert Image.open(runs / "pat/samples.png").width == 4 + 4 * 196
    assert sorted(path.name for path in (runs / "pat").iterdir()) == ["samples.png", "scores.json", "scores.txt"]


def test_maskclip_that_cannot_be_loaded_is_left_out_and_said(runs, monkeypatch):
    def gone(name, pretrained):
        raise InputError("no weights here")

    monkeypatch.setattr(E, "open_model", gone)
    E.main(["san"])
    assert "MaskCLIP row not measured: no weights here" in (runs / "san/scores.txt").read_text()


def half_bright(h, w):
    picture = np.zeros((h, w), np.uint8)
    picture[:h // 2] = 255
    return picture


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
    E.main(["pat", "--image", name, "--labels", "bright, dark", "--out", "out.png"])
    for part in ("", "_reconstruction", "_tokens_early", "_tokens_mid", "_tokens_late", "_tokens_latent"):
        assert Image.open(runs / f"out{part}.png").size == size, part
    assert Image.open(runs / "out_legend.png").width > 50


def test_the_overlay_tints_names_and_leaves_unnamed_pixels_alone():
    image, colours = np.full((3, 3, 3), 100, np.uint8), palette(2)
    tinted = E.overlay(image, torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0]]), colours, strength=0.5)
    assert np.abs(tinted[0, 0] - (100 + colours[0].astype(float)) / 2).max() <= 0.5
    assert (E.overlay(image, torch.full((3, 3), -1), colours) == image).all()


def test_a_token_keeps_its_square_and_its_colour():
    """A 2x2 token grid over an 8x8 input of which 8x6 is image, drawn at twice the size: columns 0-7 | 8-11."""
    index = torch.tensor([[0, 1], [2, 3]])
    drawn = E.token_map(index, 4, (8, 6), (8, 8), (16, 12))
    colours = palette(4)
    assert drawn.shape == (16, 12, 3)
    assert (drawn[:8, :8] == colours[0]).all() and (drawn[:8, 8:] == colours[1]).all() and (drawn[8:, 8:] == colours[3]).all()


def test_san_says_what_it_does_not_have(runs, capsys):
    Image.fromarray(half_bright(30, 50)).save("a.png")
    E.main(["san", "--image", "a.png", "--labels", "bright, dark", "--out", "out.png", "--none-of-these"])
    assert "no token maps, no reconstruction" in capsys.readouterr().out
    assert sorted(path.name for path in runs.glob("out*")) == ["out.png", "out_legend.png"]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    ([], "give the run directory"),
    (["pat", "--comparr", "san"], "did you mean --compare"),
    (["pat", "--label", "a"], "did you mean --labels"),
    (["pat", "--images", "0"], "at least 1"),
    (["pat", "--images", "many"], "invalid int"),
    (["pat", "--compare", "pat"], "named twice"),
    (["pat", "--labels", "a, b"], "only together with --image"),
    (["pat", "--image", "a.png", "--out", "b.png"], "needs --labels"),
    (["pat", "--image", "a.png", "--labels", "a, a", "--out", "b.png"], "--labels: name 2"),
    (["pat", "--image", "gone.png", "--labels", "a, b", "--out", "b.png"], "gone.png"),
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "nowhere/b.png"], "existing folder"),
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "b.txt"], "picture's ending"),
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "a.png"], "overwrite the input"),
    (["pat", "--image", "a.png", "--labels", "a, b", "--out", "b.png", "--data", "d"], "leave --compare"),
])
def test_bad_input_is_one_line_and_writes_nothing(runs, argv, words):
    Image.fromarray(half_bright(30, 50)).save("a.png")
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=words) as error:
        E.main(argv)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_from_the_shell_bad_input_ends_with_status_2():
    """The real program: one line on stderr, no traceback."""
    script = Path(E.__file__)
    done = subprocess.run([sys.executable, script, "no/such/run"], capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
