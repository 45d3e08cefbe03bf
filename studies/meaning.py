"""Do tokens mean something?  Each stage's tokens against clusters of other features: same grid, same number of codes.

A token map parts an image into regions, and so does any clustering.  Counting how often code k falls on label l, n_kl
over all labelled pixels, tells how much of the labels such a map knows; nothing of it was trained on these images:

    purity    Σ_k max_l n_kl / n                               each code is named by its commonest label
    NMI       I(code; label) / mean(H(code), H(label))         1: each tells the other, 0: neither tells anything
    recall    label borders with a code border near them       near: within `tolerance` pixels in both directions
    precision code borders with a label border near them

The rows of a stage, all on its own grid and with its own number of codes K:

    PAT's tokens              the index of its quantiser
    raw features, clustered   CLIP's map that feeds the stage (latent: after its last block), bilinear onto the grid
    the same, mean removed    CLIP's features have a large common part, which hides what differs from its cosines
    VQ's input, clustered     the features the quantiser saw (Tokens.x): what learning a codebook costs or brings
    mean colours, clustered   the mean colour of each cell's pixels: what no network is needed for
    random                    codes drawn as often as the tokens use them: the chance level, which grows with K
    labels on this grid       every cell is its commonest label: what the grid's coarseness alone allows

What makes it fair, and what does not.  Clusters are fitted by `spherical_kmeans` to the second half of the images, and
all rows are scored on the first.  PAT's codes were learned on the training scenes, which hold no unseen name, so
k-means has the better matched images.  Indices go to the label's size by nearest cell, so a coarse grid pays for each
pixel it misses: compare rows within a stage, not stages with each other, for K differs too, and purity rises with K.
Raw maps are CLIP's 8x8 in the world and early cells are 2x2 pixels: raw borders cannot be as fine as PAT's, who also
looks at the pixels.  In the world each pixel of an object also has a colour, a part, and the texture and the noun of its
name: the NMI with each alone says what a stage's codes follow.  NMI falls as K grows past what is asked: compare rows
within a stage, and a stage's four answers with those of its raw features.

    tokens (h,w) of 32x32, 16x16, 8x8, 8x8 for a 64x64 scene  ->  table (K,L) int64, four counts of border pixels

# paper: Fig. 1 and 6, tokens are cleaner than clusters of raw features; from colour and edge to part to object.
# ours: every number of it; the tolerance is .75 % of the diagonal, as in BSDS.

Demo: `python -m studies.meaning RUN`.  Tests: tests/studies/test_meaning.py.  Read next: gallery.py.
K codes; L names; H, W: the label's size; a, b: a grid without what is padding.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import InputError, parse_flags, run_cli, write_files
from data import IGNORE, to_unit
from hsattn import g
from kernels.cpu import nearest
from predict import device_of, pad, tokenize, unpad
from published.images_of import scored_on
from runs import changed, load_run
from vq import codebook_health
from world.scenes import COLOURS, NOUNS, OBJECTS, PARTS, TEXTURES

IMAGES = 400                                                  # of the world, unless --images says another number
CELLS = 40_000                                                # features a clustering is fitted to, at most
STEPS = 30                                                    # of k-means, at most
TOKENS, RAW, CENTRED, INPUT, COLOUR, RANDOM, LABELS = ROWS = (
    "PAT's tokens", "raw features, clustered", "the same, mean removed", "VQ's input, clustered",
    "mean colours, clustered", "random", "labels on this grid")
CLUSTERED = (RAW, CENTRED, INPUT, COLOUR)


# --- clusters on the sphere -----------------------------------------------------------------------------------------


def spread_seeds(x, K, generator):
    """K of the unit rows x (n,D) as in k-means++: drawn in proportion to 1 - cosine to the nearest one so far.

    1 - cosine is half the squared distance on the sphere.  Where every row has been met, any row.
    """
    chosen = [torch.randint(len(x), (1,), generator=generator).item()]
    far = torch.full((len(x),), torch.inf)
    while len(chosen) < K:
        far = torch.minimum(far, (1 - x @ x[chosen[-1]]).clamp(min=0))                    # (n)
        weight = far if far.sum() > 0 else torch.ones_like(far)
        chosen.append(torch.multinomial(weight, 1, generator=generator).item())
    return x[chosen]


def spherical_kmeans(x, K, seed, steps=STEPS):
    """K clusters of directions: x (n,D) of any length -> index (n) int64, centres (K,D) unit.

    A step gives each feature to the centre of largest cosine, and moves each centre to the mean direction of its
    features; neither can lower the sum of cosines.  A centre without features moves to the feature that is worst off.
    Ends when nothing changes, or after `steps`.  The same seed, the same clusters.  Raises ValueError for n < K.
    """
    if len(x) < K:
        raise ValueError(f"{len(x)} features for {K} clusters")
    x = g(x)
    centres = spread_seeds(x, K, torch.Generator().manual_seed(seed))
    index = nearest(x, centres)
    for _ in range(steps):
        centres = g(torch.zeros_like(centres).index_add_(0, index, x))                    # (K,D)
        empty = torch.bincount(index, minlength=K) == 0
        worst = torch.einsum("nd,nd->n", x, centres[index]).topk(int(empty.sum()), largest=False).indices
        centres[empty] = x[worst]
        before, index = index, nearest(x, centres)
        if torch.equal(before, index):
            break
    return index, centres


# --- a map against the labels ---------------------------------------------------------------------------------------


def count_pairs(said, label, K, L):
    """said (H,W) in 0..K-1, label (H,W) in 0..L-1 or IGNORE -> (K,L) int64: pixels with that code and that label."""
    known = label != IGNORE
    return torch.bincount(said[known] * L + label[known], minlength=K * L).view(K, L)


def purity(table):
    """table (K,L) of counts -> the share of pixels that have their code's commonest label; NaN without pixels."""
    return (table.amax(1).sum() / table.sum()).item()


def entropy(p):
    """In nats, of probabilities p of any shape that sum to 1."""
    return -torch.special.xlogy(p, p).sum()


def nmi(table):
    """Normalised mutual information of code and label, by the arithmetic mean of the entropies; table (K,L) of counts.

    Without any pixel NaN; 0 where one of the two never changes.
    """
    p = table.double() / table.sum()
    code, label = entropy(p.sum(1)), entropy(p.sum(0))
    return (torch.nan_to_num((code + label - entropy(p)) / ((code + label) / 2), 0).clamp(min=0).item()
            if table.sum() else float("nan"))


def borders(ids):
    """ids (H,W) -> (H,W) bool: the pixels on either side of a change to the right or below, none beside an IGNORE."""
    border = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    for axis in (0, 1):
        a, b = ids.narrow(axis, 0, ids.shape[axis] - 1), ids.narrow(axis, 1, ids.shape[axis] - 1)
        change = (a != b) & (a != IGNORE) & (b != IGNORE)
        border.narrow(axis, 0, ids.shape[axis] - 1).logical_or_(change)
        border.narrow(axis, 1, ids.shape[axis] - 1).logical_or_(change)
    return border


def near(border, tolerance):
    """border (H,W) bool -> (H,W) bool: a border pixel is at most `tolerance` rows and columns away."""
    return F.max_pool2d(border[None].float(), 2 * tolerance + 1, 1, tolerance)[0] > 0


def count_borders(said, label, tolerance):
    """said and label (H,W) -> (4) int64: label borders, those with a code border near; code borders, those with a label
    border near.  Unlabelled pixels count nowhere."""
    true, drawn = borders(label), borders(said) & (label != IGNORE)
    hit, right = true & near(drawn, tolerance), drawn & near(true, tolerance)
    return torch.stack([pixels.sum() for pixels in (true, hit, drawn, right)])


def tolerance_of(size):
    """.75 % of the diagonal of (H,W), at least 1: 1 pixel for 64x64, 7 for 640x640."""
    return max(1, round(0.0075 * math.hypot(*size)))


# --- what a model says of an image ----------------------------------------------------------------------------------


def cells_of(size, grid, crop, padded):
    """Which cell each pixel lies in: -> rows (H), columns (W).  Sizes as in predict.two_step_bands, grid (a,b)."""
    return [((torch.arange(n) + 0.5) * small / n * cells / whole).long()
            for n, small, cells, whole in zip(size, crop, grid, padded)]


def commonest(label, rows, columns, grid, L):
    """The commonest label of each cell, the lowest on a tie, 0 where all is IGNORE: label (H,W) -> (a,b) int64."""
    cell = rows[:, None] * grid[1] + columns                                              # (H,W)
    return count_pairs(cell, label, grid[0] * grid[1], L).argmax(1).view(grid)


@torch.no_grad()
def raw_maps(model, image):
    """What CLIP itself makes of an image (3,h,w): {stage: (1,C,a,b) the map that feeds the stage, padding included}.

    The latent stage has no depth of its own: its map is what leaves CLIP's last block.
    """
    vlm = model.vlm
    pyramid = vlm.features(pad(image.to(device_of(model)), model.stride))
    last = vlm.run(vlm.blocks[vlm.depths[-1]:], pyramid.tokens, pyramid.grid)[:, 1:]              # (1,P,C)
    return dict(zip(model.stages, [*pyramid.maps[1:], last.mT.unflatten(2, pyramid.grid)]))


@torch.no_grad()
def look(model, image):
    """image (3,h,w) normalised -> sizes (crop, padded), {stage: (grid, index (a,b), {row: features (D,a,b)})}.

    On the CPU.  The rows are RAW, INPUT and COLOUR, this one as (r-½, g-½, b-½, 1), so that brightness is a direction
    too.  `grid` is over the padded input; cells that only cover padding are dropped from what follows it.
    """
    shown, stages = tokenize(model, image), {}
    sizes = shown["crop"], shown["padded"]
    pixels = to_unit(pad(image, model.stride))                                                    # (1,3,H,W)
    for stage, clip_map in raw_maps(model, image).items():
        tokens = shown["tokens"][stage]
        index, x = tokens.index[0], tokens.x[0]                                                   # (a,b), (D,a,b)
        raw = F.interpolate(clip_map, size=index.shape, mode="bilinear", align_corners=False)[0]  # (C,a,b)
        colour = F.adaptive_avg_pool2d(pixels, index.shape)[0].to(x) - 0.5                        # (3,a,b)
        features = {RAW: raw, INPUT: x, COLOUR: torch.cat([colour, torch.ones_like(colour[:1])])}
        features = {row: unpad(value, *sizes).cpu() for row, value in features.items()}
        stages[stage] = tuple(index.shape), unpad(index, *sizes).cpu(), features
    return sizes, stages


# --- the whole comparison -------------------------------------------------------------------------------------------


def fit(model, dataset, ids, seed, progress=True):
    """Cluster the images `ids` -> {stage: dict counts (K) of tokens, mean (C) of raw features, centres {row: (K,D)}}.

    Of each image equally many cells are drawn, CELLS in all.  Raises InputError where they are fewer than codes.
    """
    generator, fitted, share = torch.Generator().manual_seed(seed), {}, -(-CELLS // len(ids))
    pool = {stage: {row: [] for row in (TOKENS, RAW, INPUT, COLOUR)} for stage in model.stages}
    for i in tqdm(ids, "looking", unit="image", leave=False, disable=not progress):
        _, stages = look(model, dataset[i]["image"])
        for stage, (_, index, features) in stages.items():
            cells = torch.randperm(index.numel(), generator=generator)[:share]
            pool[stage][TOKENS].append(index.flatten()[cells])
            for row, value in features.items():
                pool[stage][row].append(value.flatten(1)[:, cells].T)                     # (n,D)
    for stage, lists in pool.items():
        K, rows = len(model.codebook(stage)), {row: torch.cat(values) for row, values in lists.items()}
        if len(rows[TOKENS]) < K:
            raise InputError(f"{len(ids)} images to cluster have {len(rows[TOKENS])} {stage} cells, fewer than its {K} "
                             "codes: more images are needed, see --images")
        mean = rows[RAW].mean(0)
        rows[CENTRED] = rows[RAW] - mean
        fitted[stage] = {"counts": torch.bincount(rows[TOKENS], minlength=K), "mean": mean,
                         "centres": {row: spherical_kmeans(rows[row], K, seed)[1] for row in CLUSTERED}}
    return fitted


def assign_all(index, features, fitted, generator):
    """{row: codes (a,b)} of one image's stage, all rows but LABELS."""
    features = {**features, CENTRED: features[RAW] - fitted["mean"][:, None, None]}
    codes = {row: nearest(features[row].flatten(1).T.contiguous(), fitted["centres"][row]) for row in CLUSTERED}
    codes[RANDOM] = torch.multinomial(fitted["counts"].double(), index.numel(), True, generator=generator)
    return {TOKENS: index, **{row: value.view(index.shape) for row, value in codes.items()}}


def finite(x):
    """For JSON: None where there is no number."""
    return x if math.isfinite(x) else None


def summary(table, edges, used, centres, answers):
    """A row as numbers.  table (K,L); edges (4) of `count_borders`; used (K) cells per code; centres (K,D) or None;
    answers {question: table (K,n)}."""
    label_borders, hit, code_borders, right = edges.double()
    health = codebook_health(used, torch.zeros(len(used), 1) if centres is None else centres)
    row = {"purity": purity(table), "NMI": nmi(table), "recall": (hit / label_borders).item(),
           "precision": (right / code_borders).item(), "perplexity": health["perplexity"], "used": health["used"],
           "cosine": float("nan") if centres is None else health["cosine"],
           **{f"NMI {question}": nmi(answer) for question, answer in answers.items()}}
    return {key: finite(value) for key, value in row.items()}


QUESTIONS = {"colour": len(COLOURS), "texture": len(TEXTURES), "part": len(PARTS), "noun": len(NOUNS)}


def ask(sample):
    """{question: (H,W) int64, IGNORE on stuff}: what else the pixels of a test scene are.  Only the world knows."""
    if "part" not in sample:
        return {}
    label, ground = sample["label"], sample["label"] >= len(OBJECTS)
    answers = {"colour": sample["colour"], "texture": label % len(TEXTURES), "part": sample["part"],
               "noun": label // len(TEXTURES)}
    return {question: answer.masked_fill(ground, IGNORE) for question, answer in answers.items()}


def compare(model, dataset, images=None, seed=0, progress=True):
    """The whole table of a model with tokens over the first `images` of a dataset: the first half is scored,
    the second clustered.

    -> dict: images, fitted, seed, stages {stage: dict codes, grid, tolerance, rows {row: dict}}; see `summary`.
    """
    n = min(images or len(dataset), len(dataset))
    if n < 2:
        raise InputError(f"{n} image: half of them are clustered and half scored, so give at least 2")
    was_training, scored, L = model.training, n - n // 2, len(dataset.names)
    model.eval()
    fitted = fit(model, dataset, range(scored, n), seed, progress)
    K = {(stage, row): L if row == LABELS else len(model.codebook(stage)) for stage in model.stages for row in ROWS}
    tables = {key: torch.zeros(k, L, dtype=torch.int64) for key, k in K.items()}
    asked = {key: {q: torch.zeros(k, n, dtype=torch.int64) for q, n in QUESTIONS.items()} for key, k in K.items()}
    edges = {key: torch.zeros(4, dtype=torch.int64) for key in K}
    used = {key: torch.zeros(k, dtype=torch.int64) for key, k in K.items()}
    generator, grids = torch.Generator().manual_seed(seed), {}
    for i in tqdm(range(scored), "scoring", unit="image", leave=False, disable=not progress):
        sample = dataset[i]
        label, answers, tolerance = sample["label"], ask(sample), tolerance_of(sample["label"].shape)
        (crop, padded), stages = look(model, sample["image"])
        for stage, (grid, index, features) in stages.items():
            rows, columns = cells_of(label.shape, grid, crop, padded)
            codes = assign_all(index, features, fitted[stage], generator)
            codes[LABELS] = commonest(label, rows, columns, tuple(index.shape), L)
            grids[stage] = list(index.shape)
            for row, cells in codes.items():
                said = cells[rows][:, columns]                                            # (H,W)
                tables[stage, row] += count_pairs(said, label, K[stage, row], L)
                for question, answer in answers.items():
                    asked[stage, row][question] += count_pairs(said, answer, K[stage, row], QUESTIONS[question])
                edges[stage, row] += count_borders(said, label, tolerance)
                used[stage, row] += torch.bincount(cells.flatten(), minlength=K[stage, row])
    model.train(was_training)
    result = {"images": scored, "fitted": n // 2, "names": L, "seed": seed, "stages": {}}
    for stage in model.stages:
        centres = {TOKENS: model.codebook(stage).detach().cpu(), **fitted[stage]["centres"]}
        rows = {row: summary(tables[stage, row], edges[stage, row], used[stage, row], centres.get(row),
                             asked[stage, row] if answers else {}) for row in ROWS}
        result["stages"][stage] = {"codes": K[stage, TOKENS], "grid": grids[stage], "rows": rows}
    return result


# --- the command ----------------------------------------------------------------------------------------------------


RIVALS = {"raw, better of two": (RAW, CENTRED), "mean colours": (COLOUR,), "VQ's input": (INPUT,), "random": (RANDOM,)}


def margins(stages):
    """How much higher the tokens' purity and NMI are than those of each rival, as lines of text."""
    lines = [f"{'purity and NMI: tokens minus':30}" + "".join(f"{name:>20}" for name in RIVALS)]
    for stage, measured in stages.items():
        rows, line = measured["rows"], f"{stage:30}"
        for rivals in RIVALS.values():
            more = (rows[TOKENS][key] - max(rows[row][key] for row in rivals) for key in ("purity", "NMI"))
            line += f"{' '.join(f'{difference:+.3f}' for difference in more):>20}"
        lines.append(line)
    return lines


def cell(column, value):
    """A score as text."""
    if value is None:
        return "-"
    return {"perplexity": f"{value:.1f}", "used": f"{value}"}.get(column, f"{value:.3f}")


def format_meaning(result, title):
    """The dict of `compare` as text."""
    lines = [f"{title}: scored on {result['images']} images with {result['names']} names, clusters fitted to "
             f"{result['fitted']} others (seed {result['seed']})"]
    for stage, measured in result["stages"].items():
        columns = list(measured["rows"][TOKENS])
        width = [max(9, len(column)) for column in columns]
        heading = f"{stage}: {measured['codes']} codes, {'x'.join(map(str, measured['grid']))} cells"
        table = {heading: columns,
                 **{name: [cell(column, row[column]) for column in columns] for name, row in measured["rows"].items()}}
        lines += ["", *(" ".join([f"{name:30}"] + [f"{text:>{w}}" for text, w in zip(texts, width)])
                        for name, texts in table.items())]
    lines += ["", "NMI: 2 I / (H + H).  recall, precision: of borders, within .75 % of the diagonal, at least 1 pixel."
              "  cosine: mean, between used codes."]
    if "NMI colour" in columns:
        lines.append("NMI colour, texture, part, noun: with that alone, on the pixels of objects.")
    return "\n".join([*lines, "", *margins(result["stages"])]) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory that train.py left, of a model with tokens")
    parser.add_argument("--images", type=int, metavar="N", help=f"the first N only; half are clustered, half scored "
                        f"(all of a folder; {IMAGES} of the world)")
    parser.add_argument("--data", metavar="DIR", help="images from here: a folder of yours, or COCO-Stuff")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    args = parse_flags(parser, argv)
    if args.images is not None and args.images < 2:
        raise InputError(f"--images {args.images}: at least 2, one to cluster and one to score")
    model, config = load_run(args.run)
    if not model.stages:
        raise InputError(f"{args.run}: is a run of {type(model).__name__}, which has no tokens; give a run of PAT")
    dataset, _ = scored_on(changed(config, val_data=args.data or config.val_data), args.images or IMAGES)
    result = compare(model, dataset, args.images)
    text, as_json = format_meaning(result, args.run), json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_files({Path(args.run) / "meaning.txt": text, Path(args.run) / "meaning.json": as_json})
    print(as_json if args.json else text, end="")


if __name__ == "__main__":
    run_cli(main)
