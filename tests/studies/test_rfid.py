"""What rfid.py promises: the Frechet distance of two Gaussians, and one set of weights that gives it its name."""

import hashlib

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from cli import InputError
from studies import rfid


def gaussian(F, n, seed):
    """Mean (F) and covariance (F,F) of n correlated samples, float64; singular for n <= F."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((n, F)) @ rng.standard_normal((F, F)) + rng.standard_normal(F)
    return torch.tensor(samples.mean(0)), torch.tensor(np.cov(samples, rowvar=False))


def test_the_frechet_distance_of_diagonal_gaussians_in_closed_form():
    """Means 3 and 4 apart, deviations (1, 2) and (4, 2): 9 + 16 + (1 - 4)² + 0 = 34."""
    a, b = torch.tensor([0.0, 1.0]).double(), torch.tensor([3.0, 5.0]).double()
    cov_a, cov_b = torch.diag(torch.tensor([1.0, 4.0])).double(), torch.diag(torch.tensor([16.0, 4.0])).double()
    assert rfid.frechet_distance(a, cov_a, b, cov_b) == pytest.approx(34)
    turn = torch.linalg.qr(torch.randn(2, 2).double())[0]     # turning everything changes no distance
    turned = (turn @ a, turn @ cov_a @ turn.T, turn @ b, turn @ cov_b @ turn.T)
    assert rfid.frechet_distance(*turned) == pytest.approx(34)


def test_the_frechet_distance_equals_scipys_matrix_root():
    """Two full covariances that do not commute."""
    (a, A), (b, B) = gaussian(7, 50, 0), gaussian(7, 50, 1)
    root = sqrtm(A.numpy() @ B.numpy()).real
    want = ((a - b) ** 2).sum().item() + np.trace(A.numpy() + B.numpy() - 2 * root)
    assert rfid.frechet_distance(a, A, b, B) == pytest.approx(want, rel=1e-9)
    assert rfid.frechet_distance(b, B, a, A) == pytest.approx(want, rel=1e-9)


def test_the_frechet_distance_of_singular_gaussians():
    """Fewer samples than features: to itself 0, to itself moved by d, |d|², to itself scaled by 2, Tr S."""
    mean, cov = gaussian(30, 5, 0)
    assert torch.linalg.matrix_rank(cov) == 4
    assert rfid.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-6)
    assert rfid.frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(4 * 30, rel=1e-9)
    assert rfid.frechet_distance(mean, cov, mean, 4 * cov) == pytest.approx(cov.trace().item(), rel=1e-9)


def test_the_frechet_distance_of_few_samples_by_their_own_products():
    """n centred samples X, Y as rows: Tr (S S')^½ is also the sum of singular values of X Yᵀ / (n - 1), which is n x n."""
    X, Y = (np.random.default_rng(seed).random((6, 40)) * (1 + seed) for seed in (0, 1))
    x, y = X - X.mean(0), Y - Y.mean(0)
    want = ((X.mean(0) - Y.mean(0)) ** 2).sum() + (x**2).sum() / 5 + (y**2).sum() / 5
    want -= 2 * np.linalg.svd(x @ y.T / 5, compute_uv=False).sum()
    moments = [torch.tensor(z) for f in (X, Y) for z in (f.mean(0), np.cov(f, rowvar=False))]
    assert rfid.frechet_distance(*moments) == pytest.approx(want, rel=1e-6)


def test_rfid_from_sums_is_the_distance_of_numpys_moments():
    features = np.random.default_rng(0).random((2, 40, 6))
    features[1] *= 2
    sums, products = torch.tensor(features.sum(1)), torch.tensor(np.einsum("gni,gnj->gij", features, features))
    moments = [torch.tensor(x) for f in features for x in (f.mean(0), np.cov(f, rowvar=False))]
    assert rfid.rfid(40, sums, products) == pytest.approx(rfid.frechet_distance(*moments), rel=1e-9) != 0
    assert rfid.rfid(1, sums, products) is None
    assert rfid.Inception.distance is rfid.rfid               # what eval.evaluate asks for


def test_features_see_bytes_and_add_up_exactly_in_any_order():
    """What Inception gets is rounded and clipped; and of a thousand features every order has the same sum."""
    got = []
    inception = rfid.Inception(lambda pixels: got.append(pixels) or (pixels.flatten(1).float() * 0.7391,))
    features = inception(torch.tensor([-0.2, 0.5, 1.7]).view(3, 1, 1))
    assert got[0].dtype == torch.uint8 and got[0].flatten().tolist() == [0, 128, 255]
    assert (features - torch.tensor([0, 128, 255]) * 0.7391).abs().max() < 2**-14
    many = torch.stack([inception(torch.rand(3, 1, 1)) for _ in range(1000)])
    products, shuffled = many[:, 0] * many[:, 1], torch.randperm(1000)
    assert products.cumsum(0)[-1] == products[shuffled].cumsum(0)[-1]


def test_rfid_takes_one_file_and_no_other(tmp_path, monkeypatch):
    """Gone, or any other weights: one line.  The right ones without the package: not measured, never another number."""
    with pytest.raises(InputError, match="gone.pth: cannot be read .No such file or directory.; it takes weights-inc"):
        rfid.load_inception(tmp_path / "gone.pth")
    other = tmp_path / "other.pth"
    other.write_bytes(b"weights")
    with pytest.raises(InputError, match="other.pth: is not weights-inception.*with other weights the number would"):
        rfid.load_inception(other)
    monkeypatch.setattr(rfid, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(rfid, "find_spec", lambda name: None)
    assert rfid.load_inception(other) is None


def test_the_packages_inception_with_weights_of_its_own_layout(tmp_path, monkeypatch):
    """torch-fidelity builds its network from our file alone, and gives 2,048 numbers a picture."""
    fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity (requirements-rfid.txt) is not installed")
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("network"))
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: state["mark"])
    torch.save({"mark": torch.ones(1)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    monkeypatch.setattr(rfid, "INCEPTION_SHA256", hashlib.sha256(content).hexdigest())
    features = rfid.load_inception(tmp_path / "w.pth")(torch.rand(3, 20, 30))
    assert features.shape == (rfid.Inception.size,) and features.dtype == torch.float64 and features.isfinite().all()
