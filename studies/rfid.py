"""rFID: how far the repainted images are from the originals, as two clouds of Inception's features.

    rFID = |m - m'|² + Tr(S + S' - 2 (S S')^½)          m, S: mean and covariance of the originals' features; m', S': of
                                                        the repainted images'

The Frechet distance of two Gaussians.  Its sums over images are exact, so their order and the number of processes
change nothing.  It has one name and one set of weights; without them it is not measured.

    python -m studies.benchmark RUN --data DIR --rfid weights-inception-2015-12-05-6726825d.pth

# paper: rFID, of how many images it does not say.
# ours: rFID at test resolution, originals as the network gets them; features in multiples of 2**-14.

Tests: tests/studies/test_rfid.py.  Read next: benchmark.py.  n images; F features of Inception.
"""

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path

import torch

from cli import InputError

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"       # FID's: TensorFlow's of 2015 in torch-fidelity's layout
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|m - m'|² + Tr(S + S' - 2 (S S')^½) of two Gaussians: means (F), covariances (F,F), float64; may be singular.

    Tr (S S')^½ is the sum of the singular values of S^½ S'^½: the root of a product is never taken, which for singular
    covariances (fewer images than features) nobody computes reliably.
    """
    def root(cov):
        values, vectors = torch.linalg.eigh(cov)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    overlap = torch.linalg.svdvals(root(cov_a) @ root(cov_b)).sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap).clamp(min=0).item()


def rfid(n, sums, products):
    """rFID of n images from the sums (2,F) and the sums of products (2,F,F) of their features, originals first.

    None for fewer than two images.  Covariances are divided by n - 1.
    """
    if n < 2:
        return None
    means = sums / n                                                                          # (2,F)
    covs = (products - n * means[:, :, None] * means[:, None]) / (n - 1)                      # (2,F,F)
    return frechet_distance(means[0], covs[0], means[1], covs[1])


class Inception:
    """FID's features of one picture.  `network`: torch-fidelity's extractor, which resizes and scales as FID does."""

    size = 2048                            # F
    distance = staticmethod(rfid)          # of the sums that eval.Tally keeps

    def __init__(self, network):
        self.network = network

    @torch.no_grad()
    def __call__(self, image):
        """(3,h,w) in [0,1], rounded to bytes and resized bilinearly to 299x299 as TensorFlow 1 does -> (2048) float64.

        Multiples of 2**-14, a thousandth of what they vary by: float64 adds up their products without rounding as long
        as the sum stays below 2**25, which is a hundred thousand images and more.
        """
        features = self.network((image.clamp(0, 1) * 255).round().byte()[None])[0][0]
        return (features.double() * 2**14).round().cpu() / 2**14


def load_inception(path, device="cpu"):
    """The Inception of the weights at `path`, or None where the package of requirements-rfid.txt is not installed.

    Raises InputError unless the file is FID's, to the last byte: other weights give another number.  Never downloads.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"--rfid {path}: cannot be read ({error.strerror}); it takes {INCEPTION}, which is in "
                         "torch-fidelity's release v0.2.0") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != INCEPTION_SHA256:
        raise InputError(f"--rfid {path}: is not {INCEPTION} (sha256 {digest[:8]}..., not {INCEPTION_SHA256[:8]}...); "
                         "with other weights the number would not be rFID")
    if find_spec("torch_fidelity") is None:
        return None
    from torch_fidelity import FeatureExtractorInceptionV3    # an optional package

    return Inception(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], io.BytesIO(content)).to(device))
