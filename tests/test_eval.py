"""What eval.py promises: both mIoU rules by hand, honest numbers for a repainted image, one table of a run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

import eval as E
from cli import InputError
from eval import Pass, evaluate
from tests.helpers import FakeModel, Noisy, TwoHalves, fake_runs
from vq import Tokens

QUIET = Pass(progress=False)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    return fake_runs(monkeypatch, tmp_path)


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
    assert s["pixels"] == [4, 6, 0] and (s["absent"], s["absent_predicted"]) == (1, 1)


def test_both_rules_agree_when_no_absent_name_is_predicted():
    matrix = MATRIX.clone()
    matrix[2] = 0
    s = E.scores(matrix, {})
    assert s["mIoU"] == s["mIoU_old_rule"] and (s["absent"], s["absent_predicted"]) == (1, 0)


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


def test_one_stuff_for_another_keeps_the_foreground_right():
    """Name 0 is an object, 1 and 2 are stuff: of eight pixels two of stuff change their name, one becomes 0."""
    matrix = torch.tensor([[3, 1, 0, 0], [0, 2, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    s = E.scores(matrix, {"stuff": (1, 2)})
    assert s["foreground_accuracy"] == pytest.approx(7 / 8) and s["pixel_accuracy"] == pytest.approx(5 / 8)


def test_a_group_counts_its_names_with_ground_truth_only():
    """Name 2 never occurs but was said once: the group of 1 and 2 has the IoU of name 1, one of 2 alone has none."""
    s = E.scores(MATRIX, {"seen": (1, 2), "unseen": (2,)})
    assert s["mIoU_seen"] == pytest.approx(2 / 6) and s["mIoU_unseen"] is None


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


def test_lpips_is_told_that_values_run_from_0_to_1():
    """Its network wants -1..1, and turns them itself when it is told."""
    asked = {}
    row = E.reconstruction_scores(torch.zeros(3, 16, 16), torch.ones(3, 16, 16),
                                  lambda a, b, **how: asked.update(how, shape=a.shape) or torch.tensor(0.25))
    assert row["LPIPS"] == 0.25 and asked == {"normalize": True, "shape": (1, 3, 16, 16)}


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


# --- a pass over a dataset --------------------------------------------------------------------------------------------


def test_a_model_that_knows_everything_scores_one():
    """Exactly: the border between bright and dark falls between patches, so upsampling keeps every pixel right."""
    model = FakeModel().train()
    row = evaluate(model, TwoHalves(), how=QUIET)
    assert model.training                                     # as it was found
    assert row["segmentation"]["mIoU"] == row["segmentation"]["foreground_accuracy"] == 1
    assert row["reconstruction"]["PSNR"] > 99 and row["reconstruction"]["SSIM"] == pytest.approx(1)
    assert set(row["codebooks"]) == {"early", "mid", "late", "latent"}
    early = row["codebooks"]["early"]
    assert early["share_used"] == 36 / 64                     # 6x6 tokens in the second picture, the first has fewer
    assert early["bf16"] == 1


def test_a_token_that_shows_nothing_but_padding_is_not_counted():
    """8x20 pixels padded to 8x32, four tokens: the third shows 4 pixels, the fourth none."""
    model, index = FakeModel(), torch.tensor([[[5, 9, 5, 30]]])
    code = model.codebook("early")[index].permute(0, 3, 1, 2)
    counts = E.count_tokens(dict(tokens={"early": Tokens(code, index, code, None)}, crop=(8, 20), padded=(8, 32)),
                            model)["early"]
    assert {k: n for k, n in enumerate(counts[:-1].tolist()) if n} == {5: 2, 9: 1} and counts[-1] == 3


def test_names_may_be_swapped_and_images_limited():
    row = evaluate(FakeModel(False), TwoHalves(), ("light", "dark", "fog"), how=replace(QUIET, images=1))
    assert row["images"] == 1 and len(row["segmentation"]["IoU"]) == 3
    assert row["reconstruction"] is None and row["codebooks"] == {}


def test_workers_change_nothing():
    assert evaluate(FakeModel(), Noisy(), how=replace(QUIET, workers=2)) == evaluate(FakeModel(), Noisy(), how=QUIET)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_score_command_writes_the_table_and_its_json(runs, capsys):
    E.main(["pat", "--compare", "san"])
    table = json.loads((runs / "pat/scores.json").read_text())
    assert list(table["rows"]) == ["FakeModel pat", "FakeModel san", "MaskCLIP, no training", "chance"]
    assert table["config"]["seed"] == 7 and table["config"]["preset"] == "world" and table["torch"] == torch.__version__
    text = (runs / "pat/scores.txt").read_text()
    assert text in capsys.readouterr().out
    assert "old rule" in text and "PSNR dB" in text and "latent" in text
    if table["rows"]["FakeModel pat"]["reconstruction"]["LPIPS"] is None:
        assert "n/m" in text and "not measured" in text
    assert table["rows"]["chance"]["segmentation"]["pixel_accuracy"] == 0.5
    assert sorted(path.name for path in (runs / "pat").iterdir()) == ["scores.json", "scores.txt"]


def test_maskclip_that_cannot_be_loaded_is_left_out_and_said(runs, monkeypatch):
    def gone(*args, **kwargs):
        raise InputError("no weights here")

    monkeypatch.setattr(E, "load_vlm", gone)
    E.main(["san"])
    assert "MaskCLIP row not measured: no weights here" in (runs / "san/scores.txt").read_text()


@pytest.mark.parametrize("argv, words", [
    ([], "arguments are required: RUN"),
    (["pat", "--comparr", "san"], "did you mean --compare"),
    (["pat", "--images", "0"], "at least 1"),
    (["pat", "--images", "many"], "invalid int"),
    (["pat", "--compare", "pat"], "named twice"),
    (["pat", "--labels", "a, b"], "unknown argument --labels"),
    (["pat", "--image", "a.png", "--labels", "a, b"], "--image is now python predict.py RUN FILE --labels"),
    (["pat", "--dataset", "all", "--data", "d"], "--dataset is now python -m studies.benchmark RUN --dataset"),
    (["pat", "--rfid=w"], "--rfid is now python -m studies.benchmark RUN --rfid"),
    (["pat", "--names", "n.txt"], "give --data DIR with it"),
    (["pat", "--ignore", "0"], "give --data DIR with it"),
    (["pat", "--workers", "-1"], "--workers -1: at least 0"),
])
def test_bad_input_is_one_line_and_writes_nothing(runs, argv, words):
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


def test_many_processes_are_sent_to_the_command_that_takes_them(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process; on several: torchrun -m studies.benchmark RUN"):
        E.main(["pat"])


def test_a_measured_zero_is_not_the_same_as_none_and_absent_is_neither():
    """What stands in a cell: a number in its decimals, "n/m" for None, a dash where it does not apply, "same"."""
    row = {"mIoU": 0.0, "mIoU_old_rule": 0.25, "absent_predicted": 1, "PSNR": 20.126, "LPIPS": None}
    assert [E.cell(key, row) for key in ("mIoU", "mIoU_old_rule", "PSNR", "LPIPS", "rFID")] == [
        "0.000", "0.250", "20.13", "n/m", "-"]
    assert E.cell("mIoU_old_rule", {**row, "absent_predicted": 0}) == "same"
    titles, texts = E.cells({"a": {"segmentation": row, "reconstruction": None}, "b": {"segmentation": row, "reconstruction":
                                                                                         {"rFID": 3.14159}}})
    assert titles == ["mIoU", "old rule", "PSNR dB", "LPIPS", "rFID"] and texts["b"][-1] == "3.14" != texts["a"][-1]
