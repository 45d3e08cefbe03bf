"""Eight pictures: what Eq. 1 does, what the tokens of a run mean, how it was trained.  One command each.

    python gallery.py eq1                  Eq. 1: one score matrix; softmax along the features, argmax along the codes
    python gallery.py modes                mean shift: points on a circle move to their modes, kappa 1, 10, 100
    python gallery.py stages RUN           raw features clustered, above the token maps of each stage (Fig. 1)
    python gallery.py clustering RUN       mean shift over raw features against tokenization (Fig. 6)
    python gallery.py pyramid RUN          repainted from the latent tokens alone, + late, + mid, + early
    python gallery.py masks RUN            masks with their names on them, beside the ground truth
    python gallery.py patches RUN          for each code, the image patches that chose it most: what the code means
    python gallery.py curves RUN           the training curves of log.jsonl

A picture goes to RUN/pictures/NAME.png or where --out says.  The images are the first that the run is scored on,
never chosen by hand; --image FILE takes one of yours instead (masks then also needs --labels "red star, grass").

A code has one colour, images.palette's, in every picture.  A cluster has no number of its own, so it wears the colour
of the code it shares most cells with, one to one: where clusters and tokens agree, they look the same.

# paper: Fig. 1 and Fig. 6 are our models for `stages` and `clustering`.
# ours: raw features of "latent", which has no depth of its own: what leaves CLIP's last block.

Tests: tests/test_gallery.py.  Read next: eval.py.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from data import scored_on
from hsattn import g, hypersphere_attention, mean_shift
from images import (InputError, palette, parse_flags, parse_names, read_image, resize_short, rng_for, run_cli,
                    to_tensor, to_unit, write_files)
from inference import pad, segment, unpad
from metrics import psnr
from pat import STAGES, load_config, load_run
from pictures import (GREY, INK, Figure, contact_sheet, overlay, paint, plot, resize, spread, to_image,
                      write_names)
from tally import make_folder
from vq import assign

# B batch; C CLIP width; D code width; K codes of a stage; a, b a stage's grid over the padded input.

PALE = (205, 208, 214)


# --- Eq. 1 ----------------------------------------------------------------------------------------------------------


def on_circle(degrees):
    """Angles in degrees -> unit vectors (n,2)."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], -1)


def blend(colour, share):
    """White turned into `colour` (3) by `share` in 0..1 -> a tuple of three ints."""
    return tuple(int(round(255 + (float(c) - 255) * min(max(float(share), 0), 1))) for c in colour)


FEATURES = (8, 18, 30, 56, 95, 108, 118, 128, 215, 232, 240, 250)        # degrees; three bunches and one between
CODES = (42, 80, 268, 297)                                               # the last is nearest to no feature


def matrix(figure, x, y, values, colour, text, cell=(42, 34), gaps=(0, 0)):
    """A table of (n,m) boxes, `gaps` pixels apart down and across; colour(i,j) fills, text(i,j) -> (str, fill)."""
    (w, h), (down, across) = cell, gaps
    for i, row in enumerate(values):
        for j in range(len(row)):
            left, top = x + j * w + across / 2, y + i * h + down / 2
            figure.box(left, top, left + w - across, top + h - down, colour(i, j), PALE, 0.7)
            word, fill = text(i, j)
            figure.text(x + (j + 0.5) * w, y + (i + 0.5) * h, word, 13, fill, "mm")


def two_readings(codes, features, kappa):
    """Eq. 1: codes (n,D), features (m,D) -> scores (n,m); along rows: weights (n,m), where each code moves (n,D); down
    columns: the code each feature takes (m)."""
    scores = kappa * g(codes) @ g(features).T
    moved, (index, _, _) = hypersphere_attention(codes, features, features, kappa), assign(features, codes)
    return scores, scores.softmax(1), moved, index


def eq1(kappa=10.0):
    """Eq. 1 in one image: 4 codes and 12 features on a circle, their scores, the two ways to read them. PIL image"""
    codes, features = on_circle(CODES), on_circle(FEATURES)
    scores, weights, moved, index = two_readings(codes, features, kappa)
    n, m, r, top, height, x0 = *scores.shape, 84, 70, 262, 352
    figure, w, h = Figure(900, 70 + 3 * 262), 40, 36
    figure.text(20, 14, "Eq. 1: one score matrix, read along its two axes", 22)
    figure.text(20, 44, "g(x) = x / |x| puts codes and features on the unit sphere (here a circle); their cosine is "
                        "all that counts.", 13, GREY)
    names = "abcdefghijkl"

    def circle(y, dots, caption):
        cx, cy = 140, y + 112
        figure.disc(cx, cy, r, None, PALE, 1.2)
        for j, ((px, py), fill) in enumerate(zip(features.tolist(), dots)):
            figure.disc(cx + r * px, cy - r * py, 5, fill, "white", 0.8)
            figure.text(cx + (r + 14) * px, cy - (r + 14) * py, names[j], 12, GREY, "mm")
        for k, line in enumerate(caption):
            figure.text(cx, y + 224 + 15 * k, line, 12, GREY, "mm")
        return lambda p, length=r - 9: (cx + length * p[0], cy - length * p[1])

    def heading(y, left, right):
        figure.line([(20, y), (880, y)], PALE, 1)
        figure.text(x0 - 48, y + 10, left, 16)
        figure.text(x0 - 48, y + 32, right, 13, GREY)
        for j in range(m):
            figure.text(x0 + (j + 0.5) * w, y + 64, names[j], 13, GREY, "mm")
        for i in range(n):
            figure.text(x0 - 12, y + 74 + (i + 0.5) * h, f"code {i + 1}", 13, INK[i], "rm")

    # 1. the scores
    y = top
    heading(y, f"the scores: kappa · cos(code, feature), kappa = {kappa:g}",
            "4 codes (arrows, rows) x 12 features (dots, columns)")
    at = circle(y, [(60, 60, 60)] * m, ["codes 1 to 4, features a to l"])
    for i, code in enumerate(codes.tolist()):
        figure.arrow(at(code, 0), at(code), INK[i], 2.4)
    warm, cold = (222, 120, 40), (70, 120, 190)
    matrix(figure, x0, y + 74, scores,
           lambda i, j: blend(warm if scores[i, j] > 0 else cold, abs(scores[i, j]) / kappa),
           lambda i, j: (f"{scores[i, j]:.1f}", "black"), (w, h))

    # 2. along a row
    y += height
    heading(y, "hypersphere attention: softmax along each ROW, over the features",
            "A code looks at all features; its weights sum to 1. It moves to their mean: one step of mean shift.")
    at = circle(y, [(60, 60, 60)] * m, ["each code moves towards", "the features around it"])
    for i, (old, new) in enumerate(zip(codes.tolist(), moved.tolist())):
        figure.line([at(old, 0), at(old, r - 14)], blend(INK[i], 0.35), 2)
        figure.arrow(at(new, 0), at(new), INK[i], 2.6)
    matrix(figure, x0, y + 74, weights, lambda i, j: blend(INK[i], weights[i, j] * 1.6),
           lambda i, j: (f"{weights[i, j]:.2f}"[1:] if weights[i, j] >= 0.005 else "",
                         "white" if weights[i, j] > 0.3 else "black"), (w, h), (10, 0))
    for i in range(n):
        figure.text(x0 + m * w + 8, y + 74 + (i + 0.5) * h, f"= {weights[i].sum():.0f}", 13, INK[i], "lm")

    # 3. down a column
    y += height
    heading(y, "vector quantisation: argmax down each COLUMN, over the codes",
            "A feature takes the one code it points to most. kappa does not matter.")
    at = circle(y, [INK[k] for k in index.tolist()], ["each feature takes one code;", "code 4 gets none: it is dead"])
    for i, code in enumerate(codes.tolist()):
        figure.arrow(at(code, 0), at(code), INK[i], 2.4)
    matrix(figure, x0, y + 74, scores, lambda i, j: INK[i] if index[j] == i else (246, 246, 248),
           lambda i, j: (f"{scores[i, j]:.1f}", "white" if index[j] == i else (170, 170, 175)), (w, h), (0, 10))
    for j in range(m):
        figure.text(x0 + (j + 0.5) * w, y + 74 + n * h + 12, str(int(index[j]) + 1), 14, INK[index[j]], "mm")
    figure.text(x0 - 12, y + 74 + n * h + 12, "takes", 13, GREY, "rm")
    return figure.image()



def merged(modes, cosine=0.999):
    """Which row stands for each: modes (N,D) unit, those closer than `cosine` are one -> (N) int64, 0, 1, 2, ..."""
    first = (modes @ modes.T > cosine).int().argmax(1)        # the lowest row that is near
    return first.unique(return_inverse=True)[1]


def bunches():
    """72 points on a circle, (72,2), in three bunches; those of hsattn.py's demo."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.cat([torch.randn(24, generator=generator) * 0.3 + a for a in (0.2, 1.7, 3.4)])
    return torch.stack([angles.cos(), angles.sin()], -1)


def modes(kappas=(1, 10, 100), steps=200):
    """Points on a circle moving to their modes: outside where they start, inwards step by step.  PIL image"""
    points = bunches()
    figure, outer, inner = Figure(900, 384), 122, 40
    figure.text(20, 14, "Mean shift: each point moves to a mode of the density of all points", 22)
    figure.text(20, 44, "Rim: 72 points. Inwards: hypersphere attention, step after step (the first take the most "
                        "room), until they rest on the modes.", 13, GREY)
    for column, kappa in enumerate(kappas):
        cx, cy = 150 + 300 * column, 212
        path = [points]
        for _ in range(steps):
            path.append(hypersphere_attention(path[-1], points, points, kappa))
        cluster = merged(path[-1])
        times = torch.arange(steps + 1)
        radius = outer - (outer - inner) * (1 + times).log() / (1 + times[-1]).log()      # px
        figure.disc(cx, cy, outer, None, PALE)
        tracks = torch.stack(path, 1) * radius[:, None]                                   # (72,T,2)
        for track, k in zip(tracks.tolist(), cluster.tolist()):
            figure.line([(cx + x, cy - y) for x, y in track], blend(INK[k % len(INK)], 0.45), 0.7)
        for (x, y), k in zip(points.tolist(), cluster.tolist()):
            figure.disc(cx + outer * x, cy - outer * y, 3, INK[k % len(INK)])
        for k, size in enumerate(cluster.bincount().tolist()):
            x, y = path[-1][cluster == k][0].tolist()
            figure.disc(cx + inner * x, cy - inner * y, 3 + size**0.5 / 3, INK[k % len(INK)], "white")
        n = len(cluster.unique())
        figure.text(cx, 362, f"kappa = {kappa}: {n} mode{'s' * (n > 1)}", 17, "black", "mm")
    return figure.image()



# --- one image, stage by stage --------------------------------------------------------------------------------------


class Stages(NamedTuple):
    """What `stage_maps` found in one image; {stage: ...} for early, mid, late, latent."""

    picture: np.ndarray        # (h,w,3) uint8, what the network saw, without padding
    raw: dict                  # (C,a,b) CLIP's features: after its blocks `depths[1:]`, and for latent after its last
    index: dict                # (a,b) int64, the code of each cell
    zq: dict                   # (1,D,a,b) the codes themselves, as the decoder reads them
    painted: torch.Tensor      # (3,h,w) in 0..1, the reconstruction
    crop: tuple                # (h,w)
    padded: tuple              # rows and columns that raw, index and zq cover: the image and its padding


@torch.no_grad()
def forward(model, image):
    """PAT's output dict for one image (3,h,w), padded; tokens and pixels need no names, so it is given a blank one."""
    blank = image.new_zeros(1, model.vlm.text_width)
    return model(pad(image, model.stride), blank)


@torch.no_grad()
def stage_maps(model, image):
    """image (3,h,w) CLIP-normalised, on the model's device; a PAT in eval mode -> Stages."""
    out, vlm = forward(model, image), model.vlm
    crop, padded = tuple(image.shape[-2:]), tuple(pad(image, model.stride).shape[-2:])
    pyramid = vlm.features(pad(image, model.stride))
    last = vlm.run(vlm.blocks[vlm.depths[-1]:], pyramid.tokens, pyramid.grid)             # (1,1+P,C)
    maps = [*pyramid.maps[1:], last[:, 1:].mT.unflatten(2, pyramid.grid)]
    tokens = out["tokens"]
    return Stages(to_image(to_unit(image)), {stage: m[0] for stage, m in zip(STAGES, maps)},
                  {stage: t.index[0] for stage, t in tokens.items()}, {stage: t.zq for stage, t in tokens.items()},
                  unpad(out["image"][0], crop, padded).clamp(0, 1), crop, padded)


def spherical_kmeans(x, K, seed, steps=20):             # TODO merge: meaning.spherical_kmeans
    """x (n,D), K <= n -> index (n) int64, centres (K,D) unit."""
    x = g(x)
    centres = x[rng_for(seed).permutation(len(x))[:K]]
    for _ in range(steps):
        index, _, _ = assign(x, centres)
        sums = torch.zeros_like(centres).index_add_(0, index, x)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, g(sums), centres)
    return assign(x, centres)[0], centres


def features(f, stage):
    """The raw features of a Stages without those of its padding, (n,C)."""
    return unpad(f.raw[stage], f.crop, f.padded).flatten(1).T


def nearest_centre(f, stage, centres):
    """centres (n,C) -> which of them each raw feature of a Stages is nearest to, padding and all, (a,b)."""
    raw = f.raw[stage]
    return assign(raw.flatten(1).T, centres)[0].view(raw.shape[1:])


def wear(clusters, tokens, n, K):
    """Colours (n,3) for n clusters: each wears that of the code it shares most pixels with, one to one.

    clusters and tokens are equally long lists of maps (H,W) int64, in 0..n-1 and 0..K-1; a cluster left over when the
    codes run out takes the palette's next colour.
    """
    shared = sum(torch.bincount((c * K + t).flatten(), minlength=n * K) for c, t in zip(clusters, tokens)).view(n, K)
    row, column = linear_sum_assignment(-shared.cpu().numpy())
    worn = np.arange(K, K + n)
    worn[row] = column
    return palette(K + n)[worn]


def counted(f, index, what, of=None):
    """A caption: how many different numbers a map (a,b) of a Stages holds, padding left out."""
    index = unpad(index, f.crop, f.padded)
    n = len(index.unique())
    return f"{index.shape[0]}x{index.shape[1]}: {n} {what}" + (f" of {of}" if of else "s" * (n != 1))


# --- Fig. 1 and Fig. 6 ----------------------------------------------------------------------------------------------


FIT = 32                               # images whose features are clustered together
SHARE = 8                              # features there are at least for each cluster


def stages(model, shown, fit=(), cell=176):
    """The paper's Fig. 1, for each image: raw CLIP features clustered, stage by stage, above its token maps.

    shown, fit: lists of images (3,h,w); the features of both are clustered together by spherical k-means, into as many
    clusters as the stage has codes, or as many as there are eighths of the features.  -> PIL image
    """
    found = [stage_maps(model, image) for image in shown]
    x = {stage: [features(f, stage) for f in found] for stage in STAGES}
    for f in (stage_maps(model, image) for image in fit):
        for stage in STAGES:
            x[stage].append(features(f, stage))
    rows, captions = [], []
    for f in found:
        rows += [[f.picture], [to_image(f.painted)]]
        captions += [["the image"], ["repainted from the tokens"]]
    for stage in STAGES:
        K = len(model.codebook(stage))
        together = torch.cat(x[stage])                                                    # (n,C)
        n = min(K, max(2, len(together) // SHARE))
        _, centres = spherical_kmeans(together, n, 0)
        clusters = [nearest_centre(f, stage, centres) for f in found]                     # (a,b) each
        maps = [[spread(c, f.crop, f.padded, f.crop) for c, f in zip(clusters, found)],
                [spread(f.index[stage], f.crop, f.padded, f.crop) for f in found]]
        colours = wear(*maps, n, K)
        for i, f in enumerate(found):
            rows[2 * i].append(paint(maps[0][i], colours))
            rows[2 * i + 1].append(paint(maps[1][i], palette(K)))
            captions[2 * i].append("CLIP " + counted(f, clusters[i], "clusters", n))
            captions[2 * i + 1].append("tokens " + counted(f, f.index[stage], "codes", K))
    depths = [f"CLIP block {d}" for d in model.vlm.depths[1:]] + ["CLIP's last block"]
    return contact_sheet(rows, ["", *(f"{s}: {d}" for s, d in zip(STAGES, depths))], cell, captions)


def clustering(model, shown, kappas=(5, 10, 30), stage="late", cell=176):
    """The paper's Fig. 6: mean shift over the raw features of a stage against the stage's tokens.  -> PIL image

    Every feature of the image is a seed; those that end on the same mode are one cluster.
    """
    rows, captions, K = [], [], len(model.codebook(stage))
    for f in (stage_maps(model, image) for image in shown):
        x, token = features(f, stage), spread(f.index[stage], f.crop, f.padded, f.crop)
        rows.append([f.picture])
        captions.append([""])
        for kappa in kappas:
            ends, _ = mean_shift(x, x[thinned(len(x))], kappa, 100)
            cluster = merged(ends)[nearest_centre(f, stage, ends)]                        # (a,b)
            drawn = spread(cluster, f.crop, f.padded, f.crop)
            rows[-1].append(paint(drawn, wear([drawn], [token], int(cluster.max()) + 1, K)))
            captions[-1].append(counted(f, cluster, "cluster"))
        rows[-1].append(paint(token, palette(K)))
        captions[-1].append(counted(f, f.index[stage], "code"))
    titles = ["the image", *(f"mean shift, kappa {kappa}" for kappa in kappas), f"{stage} tokens"]
    return contact_sheet(rows, titles, cell, captions)


def thinned(n, most=1024):
    """At most about `most` of the numbers 0..n-1, evenly spaced: the seeds of mean shift on a large map."""
    return torch.arange(0, n, math.ceil(n / most))


# --- what the pyramid adds, and what the masks say ------------------------------------------------------------------


@torch.no_grad()
def repaint(model, zq):
    """{stage: (1,D,a,b)}, latent among them -> the image decoded from those stages alone, (3,H,W) with its padding.

    A missing stage is a zero condition.  The queries steer masks, never pixels, so it does not matter which are given.
    """
    if model.pixel_decoder is not None:
        return model.pixel_decoder(zq)["image"][0]
    return model.decoder(zq, model.side.query_embed)["image"][0]


def pyramid(model, shown, cell=176):
    """Each image, and what the decoder paints from latent alone, + late, + mid, + early, with its PSNR.  PIL image"""
    rows, captions = [], []
    for image, f in ((image, stage_maps(model, image)) for image in shown):
        rows.append([f.picture])
        captions.append([""])
        for n in range(1, 5):
            some = {stage: f.zq[stage] for stage in STAGES[::-1][:n]}
            painted = unpad(repaint(model, some), f.crop, f.padded).clamp(0, 1)
            rows[-1].append(to_image(painted))
            captions[-1].append(f"PSNR {psnr(painted, to_unit(image)):.1f} dB")
    return contact_sheet(rows, ["the image", "latent only", "+ late", "+ mid", "+ early: all tokens"], cell, captions)


def named(picture, prediction, names, width=448):
    """The picture (H,W,3) `width` wide, tinted by name (H,W), with the names written on it."""
    size = max(1, round(picture.shape[0] * width / picture.shape[1])), width
    shrinks = picture.shape[1] > width
    picture, prediction = resize(picture, size, smooth=shrinks), np.asarray(prediction)
    prediction = np.asarray(Image.fromarray(prediction.astype(np.int32)).resize(size[::-1], Image.Resampling.NEAREST))
    return write_names(overlay(picture, prediction, palette(len(names)), 0.5), prediction, names)


def masks(model, samples, names, width=900):
    """samples: dicts of image (3,h,w), original (H,W,3), label (H,W) or None -> rows of input, truth, said.  PIL"""
    text, rows = model.vlm.embed_text(names), []
    for sample in samples:
        said, _ = segment(model, sample["image"], text, sample["original"].shape[:2])         # (H,W)
        both = [said] if sample["label"] is None else [sample["label"], said]
        cell = width // (1 + len(both)) - 4                                               # pixels
        rows.append([sample["original"], *(named(sample["original"], ids, names, cell) for ids in both)])
    titles = ["the image", *["ground truth"] * (len(rows[0]) == 3), "named by the model"]
    return contact_sheet(rows, titles, cell)


# --- what a code means ----------------------------------------------------------------------------------------------

LARGEST = 48                           # pixels of a stored patch; two times 8 patches of 480 codes then take 53 MB


class Best:
    """The `each` best of what was offered for each of K codes: bounded memory, however much is offered."""

    def __init__(self, K, each, s):
        self.cosine = np.full((K, each), -np.inf)
        self.patch = np.full((K, each, s, s, 3), 255, np.uint8)

    def offer(self, k, cosine, patch):
        """`patch` is a function: most offers are refused, and need no picture.  On a tie the earlier one stays."""
        slot = self.cosine[k].argmin()
        if cosine > self.cosine[k, slot]:
            self.cosine[k, slot], self.patch[k, slot] = cosine, patch()


def window(picture, y, x, side, s):
    """The square of `side` pixels around (y,x) of (h,w,3) uint8, pale grey outside it -> (s,s,3)."""
    top, left = round(y - side / 2), round(x - side / 2)
    rows, columns = (slice(max(0, low), min(most, low + side)) for low, most in zip((top, left), picture.shape))
    patch = np.full((side, side, 3), 232, np.uint8)
    patch[rows.start - top:rows.stop - top, columns.start - left:columns.stop - left] = picture[rows, columns]
    return patch if side == s else resize(patch, (s, s), smooth=True)


def patch_size(model):
    """(pixels of the network's input a patch shows: a quarter of the short side; pixels it is stored with)."""
    side = model.config.short_side // 4
    return side, min(side, LARGEST)


def patches_of(model, dataset, images, each=8, device="cpu"):
    """What each code means: the patches whose middle cell chose it with the highest cosine, best first.

    One pass over the first `images` of `dataset` -> {stage: (patches (K,each,s,s,3) uint8, counts (K) int64)}; counts:
    how often a code was chosen, padding left out.  A patch shows a quarter of the input's short side (`patch_size`),
    pale grey beyond the image.  A code's are from different images where enough have it; unused slots are white.
    """
    was_training = model.training
    model.eval().to(device)
    side, s = patch_size(model)
    sizes = {stage: len(model.codebook(stage)) for stage in STAGES}
    counts = {stage: torch.zeros(K, dtype=torch.int64) for stage, K in sizes.items()}
    firsts = {stage: Best(K, each, s) for stage, K in sizes.items()}                      # the best of each image
    others = {stage: Best(K, each, s) for stage, K in sizes.items()}                      # the second, the third, ...
    for i in tqdm(range(min(images, len(dataset))), "patches", unit="image", leave=False):
        image = dataset[i]["image"].to(device)
        picture, padded = to_image(to_unit(image)), pad(image, model.stride).shape[-2:]
        for stage, t in forward(model, image)["tokens"].items():
            cosine = torch.cosine_similarity(t.x[0], t.zq[0], dim=0)                      # (a,b)
            y, x = ((torch.arange(n) + 0.5) * whole / n for n, whole in zip(cosine.shape, padded))    # cells' middles
            inside = (y < image.shape[1])[:, None] & (x < image.shape[2])                 # (a,b): not padding
            cells = inside.nonzero()                                                      # (n,2)
            index, cosine = t.index[0].cpu()[inside], cosine.cpu()[inside]                # (n)
            counts[stage] += torch.bincount(index, minlength=sizes[stage])
            rank = {}                                                                     # code -> cells seen of it
            for n in cosine.argsort(descending=True, stable=True).tolist():
                k = int(index[n])
                rank[k] = rank.get(k, 0) + 1
                if rank[k] <= each:
                    row, column = cells[n].tolist()
                    (firsts if rank[k] == 1 else others)[stage].offer(
                        k, cosine[n].item(), lambda: window(picture, y[row].item(), x[column].item(), side, s))
    model.train(was_training)
    return {stage: (filled(firsts[stage], others[stage], each), counts[stage]) for stage in STAGES}


def filled(firsts, others, each):
    """The patches of `firsts`, and in the slots it left unused the best of `others`; best first  -> (K,each,s,s,3)"""
    cosine = np.concatenate([np.where(np.isinf(firsts.cosine), -np.inf, firsts.cosine + 10), others.cosine], 1)
    chosen = np.argsort(-cosine, 1, kind="stable")[:, :each]                              # firsts win by 10 ...
    best = np.take_along_axis(np.concatenate([firsts.cosine, others.cosine], 1), chosen, 1)
    chosen = np.take_along_axis(chosen, np.argsort(-best, 1, kind="stable"), 1)           # ... and stand in true order
    everything = np.concatenate([firsts.patch, others.patch], 1)
    return np.take_along_axis(everything, chosen[..., None, None, None], 1)


def patches(model, found, rows=8, size=42):
    """`found` of patches_of drawn: per stage `rows` of its used codes, from the most used to the least.  PIL image

    A thin frame in the middle of a patch marks the token's own cell; around it lies what the patch shows besides.
    """
    each, s = next(iter(found.values()))[0].shape[1:3]
    panel, height = 92 + each * (size + 3), 34 + rows * (size + 3) + 14
    figure = Figure(4 + 2 * panel, 8 + 2 * height)
    pasted, cells = [], dict(zip(STAGES, (*(model.config.patch / scale for scale in model.config.scales),
                                          model.config.patch)))                           # a token's side, input pixels
    for p, (stage, (book, counts)) in enumerate(found.items()):
        left, top = 6 + p % 2 * panel, 8 + p // 2 * height
        used = [int(k) for k in counts.argsort(descending=True, stable=True) if counts[k] > 0]
        chosen = [used[i] for i in np.unique(np.linspace(0, len(used) - 1, min(rows, len(used))).round().astype(int))]
        figure.text(left, top, stage, 17)
        said = f"{len(chosen)} of the {len(used)} used codes (of {len(counts)}), most used first"
        figure.text(left + 62, top + 3, said, 12, GREY)
        for r, k in enumerate(chosen):
            y = top + 30 + r * (size + 3)
            figure.box(left, y, left + 20, y + size, palette(k + 1)[k])
            figure.text(left + 26, y + 14, f"code {k}", 12, "black", "lm")
            figure.text(left + 26, y + 30, f"{counts[k] / counts.sum():.1%}", 12, GREY, "lm")
            half = size * cells[stage] / patch_size(model)[0] / 2
            pasted += [(left + 84 + j * (size + 3), y, book[k, j], half) for j in range(min(each, int(counts[k])))]
    sheet = figure.image()
    for x, y, patch, half in pasted:
        sheet.paste(Image.fromarray(resize(patch, (size, size), smooth=s > size)), (x, y))
        low, high = round(size / 2 - half) - 1, round(size / 2 + half)
        ImageDraw.Draw(sheet).rectangle((x + low, y + low, x + high, y + high), outline=(255, 255, 255))
    return sheet


# --- the training curves --------------------------------------------------------------------------------------------


def curves(lines):
    """The lines of log.jsonl (dicts, one a logged step) -> training curves, PIL image.  Codebooks' only for PAT."""
    steps = max(line["step"] for line in lines) + 1

    def series(**keys):
        return {name: [(line["step"] + 1, line[key]) for line in lines if line.get(key) is not None]
                for name, key in keys.items()}

    naming = series(**{"class (ce)": "ce_2", "mask": "mask_2", "dice": "dice_2"})
    tokens = series(**{"VQ": "vq", "CRF": "crf", "TV": "tv", "L1": "l1", "L2": "l2", "LPIPS": "lpips"})
    books = {stage: [(line["step"] + 1, line[stage]["perplexity"]) for line in lines if stage in line]
             for stage in STAGES}
    rate = {"rate": [(line["step"] + 1, 1e4 * line["lr"]) for line in lines]}
    panels = [("segmentation losses, unweighted (log)", naming, True),
              ("learning rate, in units of 0.0001", rate, False)]
    if any(books.values()):
        panels[1:1] = [("token and pixel losses, unweighted (log)", tokens, True),
                       ("perplexity: how many codes are in use", books, False)]
    figure = Figure(900, 12 + 250 * (len(panels) // 2))
    for p, (title, content, log) in enumerate(panels):
        x, y = 48 + 450 * (p % 2), 40 + 250 * (p // 2)
        plot(figure, (x, y, x + 318, y + 182), title, content, log, steps)
        figure.text(x + 318, y + 206, "step", 11, GREY, "rm")
    return figure.image()


# --- commands -------------------------------------------------------------------------------------------------------

NAMES = ("eq1", "modes", "stages", "clustering", "pyramid", "masks", "patches", "curves")
NEED_TOKENS = ("stages", "clustering", "pyramid", "patches")


def read_log(run):
    """The lines of RUN/log.jsonl.  Raises InputError if there are none."""
    path = Path(run) / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a training log ({error}); train.py writes one") from error
    if not lines:
        raise InputError(f"{path}: has no lines yet; training logs its first after --log-every steps")
    return lines


def draw(name, model, samples, images, device="cpu"):
    """The picture `name` of a model in eval mode -> PIL image.

    samples: a dataset, of whose first `images` `patches` looks at each, the others at the first few; or a list of one
    sample, a dict of image (3,h,w), original (H,W,3) uint8, label (H,W) or None; it then has `names` only for masks.
    """
    if name == "patches":
        return patches(model, patches_of(model, samples, images, device=device))
    first = [samples[i] for i in range(min(len(samples), 4))]
    shown = [sample["image"].to(device) for sample in first]
    if name == "masks":
        return masks(model, first[:3], samples.names)
    if name == "stages":
        fit = (samples[i]["image"].to(device) for i in range(2, min(len(samples), FIT)))
        return stages(model, shown[:2], fit)
    return {"clustering": clustering, "pyramid": pyramid}[name](model, shown)


def run_pictures(run, model, dataset, images, device="cpu"):
    """{path below RUN/pictures: PIL image} of everything that can be drawn of a run; the folder is made."""
    names = ("stages", "clustering", "pyramid", "masks", "patches") if model.config.model == "pat" else ("masks",)
    training, folder = model.training, Path(run) / "pictures"
    model.eval()
    drawn = {folder / f"{name}.png": draw(name, model, dataset, images, device) for name in names}
    model.train(training)
    make_folder(folder)
    return {**drawn, folder / "curves.png": curves(read_log(run))}


class Photo(list):
    """One picture of the user's, as the list of samples that `draw` takes."""

    def __init__(self, path, config, names):
        picture = read_image(path)
        small = resize_short(picture, config.short_side, config.long_side)
        super().__init__([dict(image=to_tensor(small), original=picture, label=None)])
        self.names = names


def check_flags(args):
    """Raises InputError, naming the flag, for flags that do not go together."""
    alone, one = args.name in ("eq1", "modes"), args.name in ("stages", "clustering", "pyramid", "masks")
    if alone and args.run is not None:
        raise InputError(f"{args.name} is about no run: leave {args.run} out")
    if not alone and args.run is None:
        raise InputError(f"give the run directory that train.py left, such as: python gallery.py {args.name} runs/pat")
    if args.image is not None and (not one or args.data):
        raise InputError("--image is for stages, clustering, pyramid and masks, and goes without --data")
    if (args.name == "masks" and args.image is not None) != (args.labels is not None):
        raise InputError('masks of a picture of yours need both: --image FILE --labels "red star, grass"')
    if args.data is not None and (alone or args.name == "curves"):
        raise InputError(f"{args.name} shows no images: leave --data out")
    if args.images is not None and (args.name != "patches" or args.images < 1):
        raise InputError("--images N is how many images patches looks at, at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is visible here; leave it out to use the CPU")
    if args.out is not None:
        out = Path(args.out)
        if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE or not out.parent.is_dir():
            raise InputError(f"--out {out}: needs an existing folder and a picture's ending, such as out.png")
        if args.image is not None and out.exists() and out.samefile(args.image):
            raise InputError(f"--out {out}: would overwrite the input; choose another name")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory that train.py left; none for eq1, modes")
    parser.add_argument("--out", metavar="FILE", help="where it goes (RUN/pictures/NAME.png, or NAME.png)")
    parser.add_argument("--image", metavar="FILE", help="a picture of yours in place of the run's images")
    parser.add_argument("--labels", metavar="NAMES", help='masks: its names, separated by commas: "red star, grass"')
    parser.add_argument("--data", metavar="DIR", help="images from here: a folder of yours, or COCO-Stuff")
    parser.add_argument("--images", type=int, metavar="N", help="patches: from the first N images (300)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parse_flags(parser, argv)
    check_flags(args)
    tail = "" if args.image is None else f"-{Path(args.image).stem}"
    out = Path(args.out or Path("" if args.run is None else Path(args.run) / "pictures") / f"{args.name}{tail}.png")
    if args.run is None:
        picture = {"eq1": eq1, "modes": modes}[args.name]()
    elif args.name == "curves":
        picture = curves(read_log(args.run))
    else:
        if args.name in NEED_TOKENS and load_config(args.run).model != "pat":
            raise InputError(f"{args.run}: SAN has no tokens, so {args.name} has nothing to show; masks and curves do")
        model, config = load_run(args.run, args.device)
        if args.image is None:
            samples, _ = scored_on(replace(config, val_data=args.data or config.val_data))
        else:
            samples = Photo(args.image, config, args.labels and parse_names(args.labels))
        picture = draw(args.name, model, samples, args.images or 300, args.device)
    if args.out is None:
        make_folder(out.parent)
    write_files({out: picture})
    print(f"written: {out}")


if __name__ == "__main__":
    run_cli(main)
