"""From named pixels to scores: one matrix over the whole set, two rules for its mean, the worth of a repainted image.

One integer matrix, (L+1,L+1), row = said, column = true; the last row holds unnamed pixels (wrong wherever there is a
true name), the last column ignored ones (dropped from every sum).  With G = true pixels, P = said pixels, T = both:
IoU = T/(G+P-T).  Two rules for the mean are in circulation:

    mIoU             mean over the names with G > 0            today's detectron2; what we mean by mIoU
    mIoU_old_rule    the same sum divided by the names with G+P > 0: one stray pixel of an absent name counts as a zero

Worked: G = (4,6,0), T = (4,2,0), P = (6,3,1) -> IoU = (4/6, 2/7, 0/1): new (.667+.286)/2 = .476, old .../3 = .317.
All scores are fractions 0..1; PSNR is in dB.  Perplexity counts codes.

rFID is the Frechet distance of two Gaussians, fitted to Inception's features of all originals and of all repainted
images: |m - m'|² + Tr(S + S' - 2 (S S')^½).  Its sums over images are exact, so their order and the number of processes
change nothing.  It has one name and one set of weights; without them it is not measured.

# paper: mIoU as SAN evaluates it; rFID, of how many images it does not say.
# ours: PSNR, SSIM, L1 and LPIPS of the reconstruction, each averaged over images; chance in closed form; foreground
#       accuracy (object or stuff?) in the world; rFID at test resolution, originals as the network gets them.

Tests: tests/test_metrics.py.  Read next: pictures.py.
"""

import hashlib
import io
import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

from images import InputError
from inference import unpad
from vq import codebook_health

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"       # FID's: TensorFlow's of 2015 in torch-fidelity's layout
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def confusion(prediction, label, L):
    """prediction, label (H,W) int64, -1 = unnamed / ignored -> (L+1,L+1) int64, row = said, column = true.

    The last row and column stand for -1.  Matrices of different images add up.  Raises InputError for an id beyond L.
    """
    if prediction.shape != label.shape:
        raise InputError(f"the prediction is {tuple(prediction.shape)} but its label {tuple(label.shape)}")
    top = max(int(prediction.max()), int(label.max()))
    if top >= L:
        raise InputError(f"pixel id {top} but only {L} names (0..{L - 1}); are names and labels of one data set?")
    said, true = prediction.flatten() % (L + 1), label.flatten() % (L + 1)                    # -1 becomes L
    return torch.bincount(said * (L + 1) + true, minlength=(L + 1) ** 2).view(L + 1, L + 1)


def number(x):
    """A float for JSON: None where there was nothing to average."""
    return float(x) if math.isfinite(x) else None


def scores(matrix, groups):
    """matrix (L+1,L+1) of `confusion`, groups {name: ids} -> dict of fractions; None = nothing to average.

    Besides: IoU, a list of L with None for names without ground truth; pixels, the ground truth's pixels per name;
    absent, how many names have none, and absent_predicted, how many of these were said: if any, the two rules differ.
    """
    m = matrix.double()[:, :-1]                                                               # ignored pixels go
    true, said, correct = m.sum(0), m[:-1].sum(1), m.diagonal()                               # (L) each: G, P, T
    present, touched = true > 0, true + said > 0
    iou = (correct / (true + said - correct)).nan_to_num(0)
    result = {"mIoU": number(iou.sum() / present.sum()), "mIoU_old_rule": number(iou.sum() / touched.sum()),
              "absent": int((~present).sum()), "absent_predicted": int((touched & ~present).sum()),
              "pixel_accuracy": number(correct.sum() / true.sum()),
              "mean_accuracy": number((correct / true)[present].mean()),
              "fwIoU": number((iou * true).sum() / true.sum())}
    for group, ids in groups.items():
        chosen = torch.zeros_like(present)
        chosen[list(ids)] = True
        result[f"mIoU_{group}"] = number(iou[chosen & present].mean())
        if group == "stuff":                                  # right if object is called object, and stuff stuff
            same = m[:-1][chosen][:, chosen].sum() + m[:-1][~chosen][:, ~chosen].sum()
            result["foreground_accuracy"] = number(same / true.sum())
    result["IoU"] = [value if here else None for value, here in zip(iou.tolist(), present.tolist())]
    result["pixels"] = true.round().long().tolist()
    return result


def chance(pixels, groups):
    """The scores of a guess uniform over the L names, in closed form: each true pixel is spread evenly over the rows.

    pixels (L): ground truth per name.  So IoU_l = (G_l/L) / (G_l + N/L - G_l/L), N pixels in all.
    """
    L = len(pixels)
    matrix = torch.zeros(L + 1, L + 1, dtype=torch.float64)
    matrix[:L, :L] = torch.tensor(pixels, dtype=torch.float64) / L
    return scores(matrix, groups)


def psnr(image, target):
    """Peak signal-to-noise ratio in dB of two (3,h,w) in [0,1]; 100 for equal images, where it would be infinite."""
    return -10 * (image.double() - target.double()).square().mean().clamp(min=1e-10).log10().item()


def ssim(image, target):
    """Structural similarity of two (3,h,w) in [0,1], mean over channels and positions; NaN if a side is under 11.

    Wang et al. 2004: Gaussian window 11x11 of sigma 1.5, only where it fits, K1 = .01, K2 = .03; 1 = equal.
    """
    if min(image.shape[-2:]) < 11:
        return float("nan")
    window = torch.exp(-(torch.arange(11, dtype=torch.float64, device=image.device) - 5) ** 2 / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 11, 1)

    def blur(x):                                              # (3,h,w) -> (3,1,h-10,w-10); the window is separable
        return F.conv2d(F.conv2d(x[:, None], window), window.mT)

    a, b = image.double(), target.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + 0.01**2) * (2 * cov + 0.03**2)
    return (top / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))).mean().item()


@torch.no_grad()
def reconstruction_scores(image, target, metric=None):
    """image, target (3,h,w) in [0,1] -> dict PSNR (dB), SSIM, L1, LPIPS (None without `metric`)."""
    distance = None if metric is None else metric(image[None], target[None], normalize=True).item()       # to [-1,1]
    return {"PSNR": psnr(image, target), "SSIM": ssim(image, target), "L1": (image - target).abs().mean().item(),
            "LPIPS": distance}


class Inception:
    """FID's features of one picture.  `network`: torch-fidelity's extractor, which resizes and scales as FID does."""

    size = 2048

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
    found = hashlib.sha256(content).hexdigest()
    if found != INCEPTION_SHA256:
        raise InputError(f"--rfid {path}: is not {INCEPTION} (sha256 {found[:8]}..., not {INCEPTION_SHA256[:8]}...); "
                         "with other weights the number would not be rFID")
    if find_spec("torch_fidelity") is None:
        return None
    from torch_fidelity import FeatureExtractorInceptionV3

    return Inception(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], io.BytesIO(content)).to(device))


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


def count_tokens(seen, model):
    """What `segment` saw -> {stage: (K+1,) int64 on the CPU}: uses of each code, and indices that survive bf16."""
    result = {}
    for stage, tokens in seen["tokens"].items():
        index, x = (unpad(t[0], seen["crop"], seen["padded"]) for t in (tokens.index, tokens.x))  # (a,b), (D,a,b)
        counts = torch.bincount(index.flatten(), minlength=len(model.codebook(stage)))
        health = codebook_health(counts, model.codebook(stage), x.flatten(1).T, model.quantisers()[stage].choose)
        result[stage] = torch.tensor([*counts.tolist(), round(health["bf16"] * index.numel())])
    return result


def codebook_scores(counted, model):
    """{stage: dict codes, perplexity, share_used, cosine, bf16} of the sum of `count_tokens` over images."""
    result = {}
    for stage, counts in counted.items():
        counts, stable = counts[:-1], int(counts[-1])
        health = codebook_health(counts, model.codebook(stage).cpu())
        result[stage] = {"codes": len(counts), "perplexity": number(health["perplexity"]),
                         "share_used": int((counts > 0).sum()) / len(counts), "cosine": number(health["cosine"]),
                         "bf16": number(stable / int(counts.sum()))}
    return result


def mean(values):
    """Mean of the numbers in a list, leaving out None and NaN; None if nothing is left."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    return sum(values) / len(values) if values else None
