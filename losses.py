"""What PAT is trained on: L = L_seg + 0.1 L_VQ + 0.1 L_align + 1.0 L_rec.

    L_seg    queries and true masks are matched one to one (Hungarian), then 2 cross-entropy + 5 mask BCE + 5 dice on a
             few thousand points, for each of the two supervised outputs
    L_VQ     codes and features to each other, four codebooks (vq.py)
    L_align  neighbours that look alike should get alike tokens: CRF + total variation on the straight-through zq
    L_rec    0.1 L1 + 1.0 L2 + 0.1 LPIPS between image^ and the image
Padding is in none of the last three (in L_seg a pixel without a label is outside of every mask, as in SAN).

# paper: the four weights; CRF and TV are FeatUp's.  L_seg is SAN's, number for number; L_rec has ViT-VQGAN's weights.
# differs: the literal alignment, mean(K d) + TV, is smallest when all codes sit on one point, and training finds that
#          point while perplexity and PSNR still look healthy.  Ours divides by the mean distance, so moving all codes
#          together changes nothing.  `--set align=literal` keeps the paper's; docs/results.md shows what each does.

Every random draw (points, pixels) comes from a generator keyed by the image's number in the training stream, and sums
are divided by counts over all processes, so splitting a batch over processes or steps does not change the gradient.

Demo: `python losses.py` shows the collapse in one number.  Tests: tests/test_losses.py.  Read next: decoder.py.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from data import IGNORE

NO_OBJECT = 0.1                        # class weight of a query that matches nothing
CE, BCE, DICE = 2.0, 5.0, 5.0


def generator(*key):
    """A torch generator (CPU) that depends on nothing but the integers of `key`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)


def targets(label):
    """label (H,W) int64 with IGNORE -> classes (M) present, in ascending order, and their masks (M,H,W) float.

    A pixel without a label is 0 in every mask, as in SAN.
    """
    classes = label.unique()
    classes = classes[classes != IGNORE]
    return classes, (label == classes[:, None, None]).float()


def sample_at(maps, points):
    """Bilinear values of maps (M,h,w) at points (M,n,2), x and y in [0,1] -> (M,n); zero outside."""
    return F.grid_sample(maps[:, None], 2 * points[:, None].to(maps.dtype) - 1, align_corners=False)[:, 0, 0]


def pairwise_costs(logits, truth):
    """Mean BCE and dice of every query (Q,n logits) with every true mask (M,n in [0,1]) -> two (Q,M)."""
    n, p = logits.shape[1], logits.sigmoid()
    bce = (F.softplus(-logits) @ truth.T + F.softplus(logits) @ (1 - truth).T) / n
    dice = 1 - (2 * p @ truth.T + 1) / (p.sum(1)[:, None] + truth.sum(1)[None] + 1)
    return bce, dice


@torch.no_grad()
def match(masks, class_logits, classes, truth, points):
    """One image: masks (Q,h,w), class_logits (Q,L+1), classes (M), truth (M,H,W), points (n,2)
    -> indices of queries and of true masks, two (min(Q,M)), in SAN's cost 2 class + 5 BCE + 5 dice."""
    if not len(classes):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    logits = sample_at(masks, points.expand(len(masks), -1, -1))
    bce, dice = pairwise_costs(logits, sample_at(truth, points.expand(len(truth), -1, -1)).to(logits.dtype))
    cost = BCE * bce + DICE * dice - CE * class_logits.softmax(-1)[:, classes]
    if not cost.isfinite().all():
        raise FloatingPointError("the matching cost is not finite")
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def uncertain_points(masks, n, oversample, importance, gen):
    """Points for the losses of one image: of oversample*n random ones the importance*n least certain, the rest fresh.
    masks (M,h,w) logits -> (M,n,2) in [0,1]"""
    M, sure = len(masks), int(importance * n)
    points = torch.rand(M, int(oversample * n), 2, generator=gen).to(masks.device)
    chosen = sample_at(masks.detach(), points).abs().topk(sure, largest=False).indices
    points = points.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([points, torch.rand(M, n - sure, 2, generator=gen).to(masks.device)], 1)


def class_weight(classes_per_image, queries):
    """Sum of cross-entropy weights of a batch, known from the labels alone: 1 a matched query, 0.1 any other."""
    matched = sum(min(len(c), queries) for c in classes_per_image)
    return matched + NO_OBJECT * (len(classes_per_image) * queries - matched)


def segmentation(masks, class_logits, truths, keys, *, num_masks, weight, points=12544, oversample=3.0, importance=0.75):
    """L_seg of one supervised output: dict(ce, mask, dice), before their weights 2, 5, 5.

    masks (B,Q,h,w), class_logits (B,Q,L+1), truths: per image (classes (M), truth (M,H,W)), keys: per image a tuple of
    integers that fixes its random points.  `num_masks` and `weight` are this batch's shares of the mask count and of
    the class weights over all processes and accumulation steps (their totals / number of shares).
    """
    device, L = masks.device, class_logits.shape[-1] - 1
    ce = bce = dice = masks.sum() * 0.0                       # an image without a label still reaches every parameter
    for b, ((classes, truth), key) in enumerate(zip(truths, keys)):
        gen = generator(*key)
        shared = torch.rand(points, 2, generator=gen).to(device)
        q, m = match(masks[b], class_logits[b], classes, truth, shared)
        said = torch.full((len(masks[b]),), L, device=device)
        said[q.to(device)] = classes[m.to(device)]
        weights = torch.where(said == L, NO_OBJECT, 1.0)
        ce = ce + (weights * F.cross_entropy(class_logits[b], said, reduction="none")).sum()
        if len(q):
            where = uncertain_points(masks[b][q], points, oversample, importance, gen)
            logits = sample_at(masks[b][q], where)                                        # (M,n)
            true = sample_at(truth[m.to(device)], where).to(logits.dtype)
            bce = bce + F.binary_cross_entropy_with_logits(logits, true, reduction="none").mean(1).sum()
            p = logits.sigmoid()
            dice = dice + (1 - (2 * (p * true).sum(1) + 1) / (p.sum(1) + true.sum(1) + 1)).sum()
    return dict(ce=ce / weight, mask=bce / num_masks, dice=dice / num_masks)


def kernel(points, colours):
    """The CRF's affinity K (..,n,n) of pixels at points (..,n,2) in [0,1) with colours (..,n,3), CLIP-normalised."""
    near, alike = torch.cdist(points, points) ** 2, torch.cdist(colours, colours) ** 2
    return 10 * torch.exp(-near / (2 * 0.1) - alike / (2 * 0.15)) + 3 * torch.exp(-near / (2 * 0.005))


def squared_distances(z):
    """|z_i - z_j|² (B,n,n), never negative, of z (B,n,D) by the Gram matrix, so that no (n,n,D) is built.

    `2 - 2 z_i·z_j` has the same value on the sphere but not the same straight-through gradient.  The mean is taken off
    first: where z is far longer than its distances (off the sphere), the three terms would cancel to noise.
    """
    z = z - z.mean(-2, keepdim=True)
    square = z.square().sum(-1)
    return (square[..., :, None] + square[..., None, :] - 2 * z @ z.transpose(-1, -2)).clamp(min=0)


def cells(inside, grid):
    """Which cells of a grid (h,w) show image, at least half of their pixels: inside (B,H,W) bool -> (B,h,w) bool"""
    return F.adaptive_avg_pool2d(inside[:, None].float(), grid)[:, 0] >= 0.5


def means(x, inside):
    """The mean of each x (B,...) over what is inside (B,...) bool of it -> (B)"""
    inside = inside.to(x.dtype)
    return (x * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)


def alignment(zq, image, inside, keys, form="scale-free", samples=1000):
    """CRF and total variation of one stage: dict(crf, tv), means over the images.

    zq (B,D,h,w) straight-through, image (B,3,H,W) CLIP-normalised, inside (B,h,w) bool: not padding, keys as in
    `segmentation`.  `form`: "scale-free" divides both by the mean distance of the sampled pixels, "literal" does not.
    """
    B, _, h, w = zq.shape
    n, here = min(samples, h * w), inside.flatten(1)
    pixels = torch.stack([torch.randperm(h * w, generator=generator(*key)) for key in keys]).to(zq.device)       # (B,P)
    padding_last = (~here.gather(1, pixels)).to(torch.uint8).argsort(dim=1, stable=True)
    pixels = pixels.gather(1, padding_last)[:, :n]                                        # (B,n)
    here = here.gather(1, pixels)
    pairs = here[:, :, None] & here[:, None]                                              # (B,n,n)
    colours = F.adaptive_avg_pool2d(image, (h, w)).flatten(2)                             # (B,3,P)
    colours = colours.gather(2, pixels[:, None].expand(-1, 3, -1)).transpose(1, 2)        # (B,n,3)
    z = zq.flatten(2).gather(2, pixels[:, None].expand(-1, zq.shape[1], -1)).transpose(1, 2)      # (B,n,D)
    z = z.masked_fill(~here[..., None], 0)
    points = torch.stack([pixels // w / h, pixels % w / w], -1).float()
    K, d = kernel(points, colours), squared_distances(z)
    crf = means(K * d, pairs)                                                             # (B)
    tv = (means(zq.diff(dim=2).square().sum(1), inside[:, 1:] & inside[:, :-1]) +
          means(zq.diff(dim=3).square().sum(1), inside[:, :, 1:] & inside[:, :, :-1]))
    if form == "scale-free":
        mean = means(d, pairs).clamp(min=1e-6 * z.detach().square().sum(-1).mean(1))      # one code everywhere: d is noise
        crf, tv = crf / (means(K, pairs) * mean), tv / mean
    return dict(crf=crf.mean(), tv=tv.mean())


def perceptual(device):
    """LPIPS-VGG on a device.  Raises InputError where its backbone is not at hand."""
    from published.perceptual import needed                   # somebody else's file, opened where it is needed
    return needed(str(device))


def reconstruction(image_hat, image, inside, lpips=None):
    """dict(l1, l2[, lpips]) of images (B,3,H,W) in [0,1], inside (B,H,W) bool: not padding; before 0.1, 1.0, 0.1."""
    error = image_hat - image
    terms = dict(l1=means(error.abs().mean(1), inside).mean(), l2=means(error.square().mean(1), inside).mean())
    if lpips is not None:
        whole = torch.where(inside[:, None], image_hat, image)                            # no error where there is padding
        shares = inside.float().mean((1, 2)).clamp(min=1e-6)
        terms["lpips"] = (lpips(2 * whole - 1, 2 * image - 1).flatten() / shares).mean()
    return terms


if __name__ == "__main__":
    torch.manual_seed(0)
    image, inside, keys = torch.randn(1, 3, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool), [(0,)]
    codes = F.normalize(torch.randn(1, 32, 16, 16), dim=1)
    together = F.normalize(codes + 3 * F.normalize(torch.ones(1, 32, 1, 1), dim=1), dim=1)   # the same map, huddled
    for form in ("literal", "scale-free"):
        apart, huddled = (sum(alignment(z, image, inside, keys, form).values()).item() for z in (codes, together))
        print(f"{form}: codes apart {apart:.3f}, codes huddled together {huddled:.3f}")
