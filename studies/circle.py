"""Eq. 1 drawn on a circle, where a unit vector is a dot: its score matrix read three ways, and mean shift to the end.

    python -m studies.gallery eq1      4 codes, 12 features: kappa cos(code, feature); softmax along a row moves a
                                       code, argmax down a column gives a feature its code; softmax down a column,
                                       then rows divided by their sums, is siblings/grouping.py's
    python -m studies.gallery modes    72 points move to the modes of their density, for kappa 1, 10, 100

    codes (4,2), features (12,2)  ->  scores, weights (4,12), index (12), moved codes (4,2)

# paper: Eq. 1; the third reading is SeNaTra's.   # ours: the points.

Tests: tests/studies/test_circle.py.  Read next: patches.py.
"""

import torch

from hsattn import g, hypersphere_attention
from studies.pictures import GREY, INK, Figure
from vq import assign

PALE = (205, 208, 214)


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
    scores = kappa * g(codes) @ g(features).T                                             # (n,m)
    moved = hypersphere_attention(codes, features, features, kappa)                       # (n,D)
    index, _, _ = assign(features, codes)                                                 # (m)
    return scores, scores.softmax(1), moved, index


def third_reading(scores, features):
    """Down columns, then along rows: scores (n,m), features (m,D) -> how each feature shares itself out among the codes
    (n,m), columns sum to 1; what each code won in all (n,1); the mean direction of what it won (n,D)."""
    up = scores.softmax(0)                                                                # over the CODES
    won = up.sum(1, keepdim=True)
    return up, won, g(up / won @ features)


def eq1(kappa=10.0):
    """Eq. 1 in one image: 4 codes and 12 features on a circle, their scores, the three ways to read them. PIL image"""
    codes, features = on_circle(CODES), on_circle(FEATURES)
    scores, weights, moved, index = two_readings(codes, features, kappa)
    n, m, r, top, height, x0 = *scores.shape, 84, 70, 262, 352
    figure, w, h = Figure(900, 70 + 4 * 262), 40, 36
    figure.text(20, 14, "Eq. 1: one score matrix, read along its two axes, and along both", 22)
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

    # 4. down a column, then along a row
    y += height
    up, won, centre = third_reading(scores, features)
    heading(y, "grouping: softmax down each COLUMN, then each row divided by its sum",
            "Codes compete for a feature, which shares itself out; each moves to the mean of what it won.")
    at = circle(y, [INK[k] for k in index.tolist()], ["codes that share features", "push each other apart"])
    for i, (old, new) in enumerate(zip(codes.tolist(), centre.tolist())):
        figure.line([at(old, 0), at(old, r - 14)], blend(INK[i], 0.35), 2)
        figure.arrow(at(new, 0), at(new), INK[i], 2.6)
    matrix(figure, x0, y + 74, up, lambda i, j: blend(INK[i], up[i, j]),
           lambda i, j: (f"{up[i, j]:.2f}".lstrip("0") if up[i, j] >= 0.005 else "",
                         "white" if up[i, j] > 0.5 else "black"), (w, h), (0, 10))
    for i in range(n):
        figure.text(x0 + m * w + 8, y + 74 + (i + 0.5) * h, f"/ {won[i].item():.1f}", 13, INK[i], "lm")
    for j in range(m):
        figure.text(x0 + (j + 0.5) * w, y + 74 + n * h + 12, f"= {up[:, j].sum():.0f}", 13, GREY, "mm")
    return figure.image()


def number_modes(ends, cosine=0.999):
    """Which mode each point ended on: ends (N,D) unit, those closer than `cosine` are one -> (N) int64, 0, 1, 2, ..."""
    first = (ends @ ends.T > cosine).int().argmax(1)          # the lowest row that is near
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
        path = [points]                                       # where they are after each step, each (72,2)
        for _ in range(steps):
            path.append(hypersphere_attention(path[-1], points, points, kappa))
        cluster = number_modes(path[-1])                                                  # (72)
        times = torch.arange(steps + 1)                                                   # (T)
        radius = outer - (outer - inner) * (1 + times).log() / (1 + times[-1]).log()      # (T) px
        tracks = torch.stack(path, 1) * radius[:, None]                                   # (72,T,2)
        figure.disc(cx, cy, outer, None, PALE)
        for track, k in zip(tracks.tolist(), cluster.tolist()):
            figure.line([(cx + x, cy - y) for x, y in track], blend(INK[k % len(INK)], 0.45), 0.7)
        for (x, y), k in zip(points.tolist(), cluster.tolist()):
            figure.disc(cx + outer * x, cy - outer * y, 3, INK[k % len(INK)])
        for k, size in enumerate(cluster.bincount().tolist()):
            x, y = path[-1][cluster == k][0].tolist()
            figure.disc(cx + inner * x, cy - inner * y, 3 + size**0.5 / 3, INK[k % len(INK)], "white")
        n = int(cluster.max()) + 1
        figure.text(cx, 362, f"kappa = {kappa}: {n} mode{'s' * (n > 1)}", 17, "black", "mm")
    return figure.image()
