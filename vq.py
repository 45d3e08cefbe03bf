"""Vector quantisation on the sphere: each feature takes the one code it points to most.

A codebook of K unit vectors e_k is read as K von Mises-Fisher components of equal weight and equal concentration kappa.
The posterior of a feature x is softmax_k(kappa e_kᵀx) and its mode does not depend on kappa > 0 or on |x|:

    index = argmax_k  g(e_k)ᵀ g(x)          over the CODES, for each feature (HSAttn's softmax runs over the features)
    zq    = g(e_index)                      forward; the gradient goes straight through to g(x)
    L_VQ  = mean |sg(g(x)) - zq|² + 0.25 mean |g(x) - sg(zq)|²          codes to features + features to codes

    u (B,S,h,w) = (2,240,160,160)  ->  zq (B,32,h,w), index (B,h,w) in 0..K-1

# paper: Eq. 1 (hard assignment), codebooks of 128, 64, 32 and 256 codes of 32 dimensions.
# ours: L2-normalised codes with ViT-VQGAN's losses and factorised code width; codes are plain parameters, trained by
#       gradient, because the semantic branch moves and trains them too; they start as features of the first batch, and
#       one that nobody chooses starts again.  (From N(0,1), the usual start, a short run cannot turn them: they are six
#       times longer than a feature, and Adam's step does not grow with them.)

These formulas are the definition; kernels/cpu.py and kernels/vmf_assign.py hold faster twins, which `vMFVQ` takes.

A healthy codebook is three numbers, never perplexity alone: codes that all sit on one point can be used evenly.

A quantiser, to the rest of the model, is a module with five things; vMFVQ is the one here:
    forward(u, given=None)   features of a stage -> Tokens; `given` is somebody else's codebook, or None
    codes(given=None)        the codes as they are used, (K,D): what the semantic branch starts its local tokens from
    choose(x, codes)         the index of each feature x (n,D), as Tokens.x holds them; for codebook_health's bf16
    codebook, metric         the parameter whose codes start on features, and restart unless the metric is "dot"; or None

Demo: `python vq.py` quantises the colours of a world scene.  Tests: tests/test_vq.py.  Read next: clip.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hsattn import g
from kernels import kernel


def nearest(x, codes):
    """The index of the largest dot product, the lowest on a tie: x (n,D), codes (K,D) -> (n) int64"""
    scores = x @ codes.T                                                                  # (n,K)
    return scores.argmax(1)                                                               # over the CODES


def closest(x, codes):
    """The index of the smallest distance |x - e|² = |x|² - 2 xᵀe + |e|², as in VQ-VAE: x (n,D), codes (K,D) -> (n) int64"""
    return (x @ codes.T - codes.square().sum(1) / 2).argmax(1)


RULES = {"dot": nearest, "euclidean": closest}                # off the sphere (Table II, "no vMF")
METRICS = ("cosine", *RULES)


def assign(x, codes):
    """Each feature's code by largest cosine, ties to the lowest index.

    x (n,D) of any length, codes (K,D) of any length -> index (n) int64, code (n,D) unit, cosine (n) in [-1,1].  A zero
    feature has index 0 and cosine 0; one with NaN has index 0 and cosine NaN.
    """
    x, codes = g(x), g(codes).to(x.dtype)
    index = nearest(x, codes)
    code = F.embedding(index, codes)                          # not codes[index]: its gradient sums in a random order
    return index, code, (x * code).sum(1)


def straight_through(x, code):
    """The value of `code` with the gradient of `x`."""
    return x + (code - x).detach()


def commitment_loss(x, code, beta):
    """The header's L_VQ of each feature: codes to features, plus `beta` times features to codes.  x, code (n,D) -> (n)"""
    return (code - x.detach()).square().mean(1) + beta * (x - code.detach()).square().mean(1)


def quantise(x, codes, beta=0.25):
    """The whole step: x (n,D), codes (K,D), of any length -> zq (n,D), index (n) int64, loss (n) of each feature.

    zq has the value of the chosen unit codes and the gradient of g(x); `beta` is the 0.25 of the header's loss.
    """
    x = g(x)
    return quantise_raw(x, g(codes).to(x.dtype), beta)


def quantise_raw(x, codes, beta=0.25, rule=nearest):
    """`quantise` off the sphere, of raw vectors, by one of RULES."""
    index = rule(x, codes)
    code = F.embedding(index, codes)
    return straight_through(x, code), index, commitment_loss(x, code, beta)


@dataclass
class Tokens:
    """What one quantiser returns: zq and, as W_pre gave them, the features x (B,D,h,w both); index and loss (B,h,w)."""

    zq: torch.Tensor
    index: torch.Tensor
    x: torch.Tensor
    loss: torch.Tensor


torch.export.register_dataclass(Tokens)                       # without it torch.export lets none out of a model


class vMFVQ(nn.Module):
    """W_pre, a codebook, and the hard assignment.

    `codes=None` builds no codebook of its own: the caller passes one (the "unified tokens" ablation).
    `metric`: "cosine", or one of RULES: Eq. 1's VQ without the sphere, raw vectors throughout.
    `kernels` chooses between `assign` and `quantise` above and their twins: see kernels/__init__.py.
    """

    def __init__(self, width, codes, dim=32, metric="cosine", commitment=0.25, kernels="auto"):
        super().__init__()
        self.pre = nn.Conv2d(width, dim, 1)
        self.codebook = nn.Parameter(torch.randn(codes, dim)) if codes else None
        self.metric, self.commitment, self.kernels = metric, commitment, kernels

    def codes(self, given=None):
        """The codes as they are used, (K,D): on the sphere if the metric is the cosine."""
        codes = self.codebook if given is None else given
        return g(codes) if self.metric == "cosine" else codes

    def choose(self, x, codes):
        """The index of each feature by the module's metric, x (n,D), codes (K,D) -> (n) int64"""
        return kernel(assign, self.kernels, x)(x, codes)[0] if self.metric == "cosine" else RULES[self.metric](x, codes)

    def quantise(self, x, codes):
        """x (n,D), codes (K,D) -> zq, index, loss, by the rule this module is set to."""
        if self.metric == "cosine":
            return kernel(quantise, self.kernels, x)(x, codes, self.commitment)
        return quantise_raw(x, codes, self.commitment, RULES[self.metric])

    def forward(self, u, given=None):
        """u (B,S,h,w) [, a codebook (K,D)] -> Tokens.  Nothing after W_pre runs in half precision."""
        x = self.pre(u).permute(0, 2, 3, 1).to(self.pre.weight.dtype)                     # (B,h,w,D)
        with torch.autocast(u.device.type, enabled=False):
            codes = (self.codebook if given is None else given).to(x.dtype)               # (K,D)
            zq, index, loss = self.quantise(x.flatten(0, 2), codes)
        index, loss = (rows.view(x.shape[:3]) for rows in (index, loss))                  # (B,h,w)
        zq, x = (rows.view(x.shape).permute(0, 3, 1, 2) for rows in (zq, x))              # (B,D,h,w)
        return Tokens(zq, index, x, loss)


def codebook_health(counts, codes, x=None, choose=None):
    """The numbers that tell a living codebook from a dead one.

    counts (K) uses of each code, codes (K,D), x (n,D) some features ->
    dict: `perplexity` exp(entropy of use), 1..K; `used` codes chosen at least once; `cosine` mean cosine between
    different used codes (1 = all on one point); `bf16` share of indices that survive rounding x to bf16 and back
    (only when x is given; `choose(x, codes)`, a quantiser's, assigns them, by default by cosine).
    """
    p = counts.double() / counts.sum().clamp(min=1)
    used = g(codes.detach().double())[counts > 0]
    n = len(used)
    health = dict(perplexity=torch.exp(-(p * p.clamp(min=1e-300).log()).sum()).item(), used=n,
                  cosine=((used.sum(0).square().sum() - n) / (n * (n - 1))).item() if n > 1 else float("nan"))
    if x is not None:
        choose = choose or (lambda *both: assign(*both)[0])
        stable = choose(x, codes) == choose(x.bfloat16().to(x.dtype), codes)
        health["bf16"] = stable.float().mean().item()
    return health


def features_at(x, inside, numbers, images, places):
    """What the holders of some images offer to codes: of image images[k] the feature at places[k] of what is inside.

    x (b,D,h,w) the features here, inside (b,h,w) bool, numbers (b) of their images; images (K) int, places (K) in [0,1)
    -> (K,D), zero rows where the image is somebody else's: the sum over processes is the same whoever holds what.
    """
    offered, inside = x.new_zeros(len(images), x.shape[1]), inside.flatten(1)
    b, k = (numbers[:, None] == torch.as_tensor(images)).nonzero(as_tuple=True)
    order = (~inside).to(torch.uint8).argsort(dim=1, stable=True)                             # (b,P) what is inside first
    p = (torch.as_tensor(places)[k] * inside.sum(1).cpu()[b]).long()
    offered[k] = x.flatten(2)[b, :, order[b, p]]
    return offered


@torch.no_grad()
def restart_dead_codes(codebook, idle, counts, candidates, images, restart_after, share):
    """Put codes onto features of this batch, in place: those that have not begun, and those that hardly anybody chooses.

    codebook (K,D); idle (K): how many images each code is behind, inf for one that has not begun; counts (K) of this
    step's `images`, over all processes; candidates (K,D) one feature a code, the same on every process.  Expected is
    `share` of an even share: images without a use set a code back by as many, uses make up for as many as they would be
    expected in; at `restart_after` it is dead (0: never).  -> which codes (K) bool were put.
    """
    put, expected = idle.isinf(), (share * counts.sum() / len(counts) / images).clamp(min=1e-9)       # uses an image
    idle += images - counts / expected
    idle.clamp_(min=0)
    if restart_after:
        put |= idle >= restart_after
    codebook[put] = candidates[put].to(codebook)
    idle[put] = 0
    return put


if __name__ == "__main__":
    import numpy as np
    from PIL import Image

    from data import rng_for
    from world.scenes import scene

    torch.manual_seed(0)
    image = torch.from_numpy(scene(rng_for(5)).image).float() / 255                          # (64,64,3)
    codes = g(image.reshape(-1, 3)[torch.randperm(64 * 64)[:8]] - 0.5)                    # 8 directions of colour
    index, code, cosine = assign(image.reshape(-1, 3) - 0.5, codes)
    picture = torch.cat([image, (code * 0.5 + 0.5).view_as(image)], 1)
    Image.fromarray((picture.numpy() * 255).astype(np.uint8)).resize((1024, 512), 0).save("vq.png")
    print(f"8 codes, mean cosine of a pixel's colour to its code: {cosine.mean():.3f}")
