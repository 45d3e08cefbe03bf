"""What metrics.py promises: both mIoU rules by hand, chance in closed form, honest numbers for a repainted image."""

import hashlib

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter1d

import losses
import metrics
from images import InputError

# --- both mIoU rules, by hand ---------------------------------------------------------------------------------------

#                        true:  0  1  2  ignored
MATRIX = torch.tensor([[4, 2, 0, 3],                          # said 0   G = (4, 6, 0): name 2 never occurs,
                       [0, 2, 0, 0],                          # said 1   P = (6, 2, 1): but one pixel was given to it,
                       [0, 1, 0, 0],                          # said 2   T = (4, 2, 0): and one pixel stayed unnamed
                       [0, 1, 0, 5]])                         # unnamed  the ignored column must change nothing


def test_both_miou_rules_worked_by_hand():
    """IoU = 4/(4+6-4), 2/(6+2-2), 0/(0+1-0): the new rule averages the first two, the old one divides by three."""
    s = metrics.scores(MATRIX, {})
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
    s = metrics.scores(matrix, {})
    assert s["mIoU"] == s["mIoU_old_rule"] and (s["absent"], s["absent_predicted"]) == (1, 0)


def test_an_unnamed_pixel_is_a_miss_of_its_true_name():
    named, unnamed = torch.zeros(3, 3), torch.zeros(3, 3)
    named[0, 0], unnamed[0, 0], unnamed[2, 0] = 2, 1, 1
    assert metrics.scores(named, {})["IoU"][0] == 1 and metrics.scores(unnamed, {})["IoU"][0] == 0.5


def test_groups_and_foreground_accuracy_by_hand():
    """Names 0, 1 are objects, 2 is stuff.  Calling object 1 object 0 keeps the foreground right; calling it stuff does not."""
    matrix = torch.tensor([[4, 2, 1, 0], [0, 2, 0, 0], [0, 1, 9, 0], [0, 1, 0, 0]])
    s = metrics.scores(matrix, {"seen": (0,), "unseen": (1,), "stuff": (2,)})
    assert s["mIoU_seen"] == pytest.approx(4 / 7)
    assert s["mIoU_unseen"] == pytest.approx(2 / 6)
    assert s["mIoU_stuff"] == pytest.approx(9 / 11)
    assert s["foreground_accuracy"] == pytest.approx((4 + 2 + 2 + 9) / 20)


def test_confusion_counts_pairs_and_sets_ignored_pixels_aside():
    prediction, label = torch.tensor([[0, 1, 1], [-1, 0, -1]]), torch.tensor([[0, 0, -1], [1, -1, -1]])
    assert metrics.confusion(prediction, label, 2).tolist() == [[1, 0, 1],       # said 0: once right, once where nobody knows
                                                          [1, 0, 1],       # said 1: once instead of 0, once unknown
                                                          [0, 1, 1]]       # unnamed


def test_a_prediction_on_ignored_pixels_changes_no_score():
    label = torch.tensor([[0, 1, -1, -1]])
    right, wild = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[0, 1, 2, 1]])
    assert metrics.scores(metrics.confusion(right, label, 3), {}) == metrics.scores(metrics.confusion(wild, label, 3), {})


def test_one_matrix_over_the_set_is_not_the_mean_over_images():
    """A tiny image counts by its pixels: 1 of 1 right and 0 of 3 right make 1/4, not 1/2."""
    good = metrics.confusion(torch.tensor([[0]]), torch.tensor([[0]]), 2)
    bad = metrics.confusion(torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]]), 2)
    assert metrics.scores(good + bad, {})["mIoU"] == 0.25


@pytest.mark.parametrize("label, words", [([[0, 2]], "id 2 but only 2 names"), ([[0, 1, 1]], "its label")])
def test_labels_that_do_not_fit_are_refused(label, words):
    with pytest.raises(InputError, match=words):
        metrics.confusion(torch.tensor([[0, 1]]), torch.tensor(label), 2)


def test_an_empty_ground_truth_has_no_score_instead_of_nan():
    assert metrics.scores(torch.zeros(3, 3), {})["mIoU"] is None


def test_chance_in_closed_form_is_what_guessing_gives():
    """Closed form by hand for G = (30, 10) and L = 2, and a million real guesses on three names."""
    by_hand = metrics.chance([30, 10], {})
    assert by_hand["IoU"] == pytest.approx([15 / (30 + 20 - 15), 5 / (10 + 20 - 5)])
    g = torch.Generator().manual_seed(0)
    label = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), 10**6, True, generator=g)[None]
    guessed = metrics.scores(metrics.confusion(torch.randint(3, label.shape, generator=g), label, 3), {"stuff": (2,)})
    closed = metrics.chance(guessed["pixels"], {"stuff": (2,)})
    for key in ("mIoU", "pixel_accuracy", "mean_accuracy", "fwIoU", "mIoU_stuff", "foreground_accuracy"):
        assert guessed[key] == pytest.approx(closed[key], abs=3e-3)


# --- the repainted image --------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    """An error of .1 everywhere: mean square .01, so 20 dB; of .01: 40 dB."""
    target = torch.full((3, 4, 5), 0.5)
    assert metrics.psnr(target + 0.1, target) == pytest.approx(20, abs=1e-4)
    assert metrics.psnr(target - 0.01, target) == pytest.approx(40, abs=1e-3)
    assert metrics.psnr(target, target) == pytest.approx(100)


def test_l1_of_a_known_error_and_lpips_never_invented():
    row = metrics.reconstruction_scores(torch.full((3, 16, 16), 0.75), torch.full((3, 16, 16), 0.5))
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
    assert metrics.ssim(torch.tensor(a), torch.tensor(b)) == pytest.approx(want, abs=1e-9)
    assert metrics.ssim(torch.tensor(a), torch.tensor(a)) == pytest.approx(1)
    assert np.isnan(metrics.ssim(torch.ones(3, 10, 40), torch.ones(3, 10, 40)))


def test_a_mean_leaves_out_what_was_not_measured():
    assert metrics.mean([1.0, None, float("nan"), 3.0]) == 2 and metrics.mean([None]) is None


def test_lpips_without_its_backbone_is_not_measured_and_opens_no_connection(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("network"))
    losses.load_lpips.cache_clear()
    assert losses.load_lpips() is None
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / losses.VGG).write_bytes(b"half a file")
    losses.load_lpips.cache_clear()
    with pytest.raises(InputError, match="not torchvision's VGG-16"):
        losses.load_lpips()
    losses.load_lpips.cache_clear()


# --- rFID -----------------------------------------------------------------------------------------------------------


def gaussian(F, n, seed):
    """Mean (F) and covariance (F,F) of n correlated samples, float64; singular for n <= F."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((n, F)) @ rng.standard_normal((F, F)) + rng.standard_normal(F)
    return torch.tensor(samples.mean(0)), torch.tensor(np.cov(samples, rowvar=False))


def test_the_frechet_distance_of_diagonal_gaussians_in_closed_form():
    """Means 3 and 4 apart, deviations (1, 2) and (4, 2): 9 + 16 + (1 - 4)² + 0 = 34."""
    a, b = torch.tensor([0.0, 1.0]).double(), torch.tensor([3.0, 5.0]).double()
    cov_a, cov_b = torch.diag(torch.tensor([1.0, 4.0])).double(), torch.diag(torch.tensor([16.0, 4.0])).double()
    assert metrics.frechet_distance(a, cov_a, b, cov_b) == pytest.approx(34)
    turn = torch.linalg.qr(torch.randn(2, 2).double())[0]     # turning everything changes no distance
    turned = (turn @ a, turn @ cov_a @ turn.T, turn @ b, turn @ cov_b @ turn.T)
    assert metrics.frechet_distance(*turned) == pytest.approx(34)


def test_the_frechet_distance_equals_scipys_matrix_root():
    """Two full covariances that do not commute."""
    (a, A), (b, B) = gaussian(7, 50, 0), gaussian(7, 50, 1)
    root = sqrtm(A.numpy() @ B.numpy()).real
    want = ((a - b) ** 2).sum().item() + np.trace(A.numpy() + B.numpy() - 2 * root)
    assert metrics.frechet_distance(a, A, b, B) == pytest.approx(want, rel=1e-9)
    assert metrics.frechet_distance(b, B, a, A) == pytest.approx(want, rel=1e-9)


def test_the_frechet_distance_of_singular_gaussians():
    """Fewer samples than features: to itself 0, to itself moved by d, |d|², to itself scaled by 2, Tr S."""
    mean, cov = gaussian(30, 5, 0)
    assert torch.linalg.matrix_rank(cov) == 4
    assert metrics.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(4 * 30, rel=1e-9)
    assert metrics.frechet_distance(mean, cov, mean, 4 * cov) == pytest.approx(cov.trace().item(), rel=1e-9)


def test_the_frechet_distance_of_few_samples_by_their_own_products():
    """n centred samples X, Y as rows: Tr (S S')^½ is also the sum of singular values of X Yᵀ / (n - 1), which is n x n."""
    X, Y = (np.random.default_rng(seed).random((6, 40)) * (1 + seed) for seed in (0, 1))
    x, y = X - X.mean(0), Y - Y.mean(0)
    want = ((X.mean(0) - Y.mean(0)) ** 2).sum() + (x**2).sum() / 5 + (y**2).sum() / 5
    want -= 2 * np.linalg.svd(x @ y.T / 5, compute_uv=False).sum()
    moments = [torch.tensor(z) for f in (X, Y) for z in (f.mean(0), np.cov(f, rowvar=False))]
    assert metrics.frechet_distance(*moments) == pytest.approx(want, rel=1e-6)


def test_rfid_from_sums_is_the_distance_of_numpys_moments():
    features = np.random.default_rng(0).random((2, 40, 6))
    features[1] *= 2
    sums, products = torch.tensor(features.sum(1)), torch.tensor(np.einsum("gni,gnj->gij", features, features))
    moments = [torch.tensor(x) for f in features for x in (f.mean(0), np.cov(f, rowvar=False))]
    assert metrics.rfid(40, sums, products) == pytest.approx(metrics.frechet_distance(*moments), rel=1e-9) != 0
    assert metrics.rfid(1, sums, products) is None


def test_features_see_bytes_and_add_up_exactly_in_any_order():
    """What Inception gets is rounded and clipped; and of a thousand features every order has the same sum."""
    got = []
    inception = metrics.Inception(lambda pixels: got.append(pixels) or (pixels.flatten(1).float() * 0.7391,))
    features = inception(torch.tensor([-0.2, 0.5, 1.7]).view(3, 1, 1))
    assert got[0].dtype == torch.uint8 and got[0].flatten().tolist() == [0, 128, 255]
    assert (features - torch.tensor([0, 128, 255]) * 0.7391).abs().max() < 2**-14
    many = torch.stack([inception(torch.rand(3, 1, 1)) for _ in range(1000)])
    products, shuffled = many[:, 0] * many[:, 1], torch.randperm(1000)
    assert products.cumsum(0)[-1] == products[shuffled].cumsum(0)[-1]


def test_rfid_takes_one_file_and_no_other(tmp_path, monkeypatch):
    """Gone, or any other weights: one line.  The right ones without the package: not measured, never another number."""
    with pytest.raises(InputError, match="gone.pth: cannot be read .No such file or directory.; it takes weights-inc"):
        metrics.load_inception(tmp_path / "gone.pth")
    other = tmp_path / "other.pth"
    other.write_bytes(b"weights")
    with pytest.raises(InputError, match="other.pth: is not weights-inception.*with other weights the number would"):
        metrics.load_inception(other)
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert metrics.load_inception(other) is None


def test_the_packages_inception_with_weights_of_its_own_layout(tmp_path, monkeypatch):
    """torch-fidelity builds its network from our file alone, and gives 2,048 numbers a picture."""
    fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity (requirements-rfid.txt) is not installed")
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("network"))
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: state["mark"])
    torch.save({"mark": torch.ones(1)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256(content).hexdigest())
    features = metrics.load_inception(tmp_path / "w.pth")(torch.rand(3, 20, 30))
    assert features.shape == (metrics.Inception.size,) and features.dtype == torch.float64 and features.isfinite().all()
