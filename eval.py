"""What the names are worth: one matrix over the whole set, two rules for its mean, the worth of a repainted image.

    python eval.py RUN [--compare RUN ...]         one table over the run's test images
    python eval.py RUN --data DIR                  the same over a folder with images/, labels/ and classes.txt
    (pictures, report.html: studies/report.py; published sets, many processes, hours, rFID: studies/benchmark.py)

One integer matrix, (L+1,L+1), row = said, column = true; the last row holds unnamed pixels (wrong wherever there is a
true name), the last column ignored ones (dropped from every sum).  With G = true pixels, P = said pixels, T = both:
IoU = T/(G+P-T).  Two rules for the mean are in circulation:

    mIoU             mean over the names with G > 0            today's detectron2; what we mean by mIoU
    mIoU_old_rule    the same sum divided by the names with G+P > 0: one stray pixel of an absent name counts as a zero

Worked: G = (4,6,0), T = (4,2,0), P = (6,3,1) -> IoU = (4/6, 2/7, 0/1): new (.667+.286)/2 = .476, old .../3 = .317.
All scores are fractions 0..1, in the tables and in the JSON; PSNR is in dB.  Perplexity counts codes.

"seen" names are, letter by letter, among those the run was trained with; a score file says by which list, and holds
the checksums of the names it used and of the labels' source.

# paper: mIoU as SAN evaluates it.
# ours: PSNR, SSIM, L1 and LPIPS of the reconstruction, each averaged over images; chance in closed form; foreground
#       accuracy (object or stuff?) in the world.

Tests: tests/test_eval.py.  Read next: tokenizer.py.  L names; n images; K codes of a stage.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from clip import load_vlm
from cli import InputError, check_device, parse_flags, run_cli, tensors_checksum, write_files
from data import names_checksum, read_classes, to_unit
from predict import DenseCLIP, segment, unpad
from runs import flat, load_run
from vq import codebook_health

METRICS = {                                # key of a row -> title, decimals: whoever prints a score asks here
    "mIoU": ("mIoU", 3), "mIoU_old_rule": ("old rule", 3), "mIoU_seen": ("seen", 3), "mIoU_unseen": ("unseen", 3),
    "mIoU_stuff": ("stuff", 3), "foreground_accuracy": ("fg/bg", 3), "pixel_accuracy": ("pixel acc", 3),
    "mean_accuracy": ("mean acc", 3), "fwIoU": ("fwIoU", 3), "PSNR": ("PSNR dB", 2), "SSIM": ("SSIM", 3), "L1": ("L1", 3),
    "LPIPS": ("LPIPS", 3), "rFID": ("rFID", 2)}
PAINTED = ("PSNR", "SSIM", "L1", "LPIPS")
RULES = ("mIoU: the mean IoU of the names with ground truth (detectron2 since July 2022).  old rule (its release 0.6): "
         "the same sum, but names without ground truth that were predicted are counted, as zeros.")


# --- named pixels ---------------------------------------------------------------------------------------------------


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


# --- repainted pixels, and codebooks --------------------------------------------------------------------------------


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


def count_tokens(extras, model):
    """What `segment` saw -> {stage: (K+1,) int64 on the CPU}: uses of each code, and indices that survive bf16."""
    result = {}
    for stage, tokens in extras["tokens"].items():
        index, x = (unpad(t[0], extras["crop"], extras["padded"]) for t in (tokens.index, tokens.x))  # (a,b), (D,a,b)
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


# --- a pass over a dataset ------------------------------------------------------------------------------------------


class Tally:
    """What adds up over the images of one process."""

    def __init__(self, n, L, codebooks, features=0):
        """n images, L names; codebooks {stage: K}, empty for a model that repaints nothing; F for rFID, else 0."""
        self.done = 0                                         # images of this process
        self.tensors = {"matrix": torch.zeros(L + 1, L + 1, dtype=torch.int64),
                        "painted": torch.zeros(n, len(PAINTED), dtype=torch.float64),
                        **{f"codes.{stage}": torch.zeros(K + 1, dtype=torch.int64) for stage, K in codebooks.items()}}
        if features:
            self.tensors["rfid.sums"] = torch.zeros(2, features, dtype=torch.float64)
            self.tensors["rfid.products"] = torch.zeros(2, features, features, dtype=torch.float64)

    def add(self, i, matrix, painted, codes, features):
        """Image i: its confusion matrix, reconstruction_scores or None, {stage: counts}, features (2,F) or None."""
        self.tensors["matrix"] += matrix
        for stage, counts in codes.items():
            self.tensors[f"codes.{stage}"] += counts
        if painted is not None:                               # NaN: not measured
            self.tensors["painted"][i] = torch.tensor([float("nan") if painted[key] is None else painted[key]
                                                       for key in PAINTED], dtype=torch.float64)
        if features is not None:                              # of the original and of the repainted image
            self.tensors["rfid.sums"] += features
            self.tensors["rfid.products"].baddbmm_(features[:, :, None], features[:, None])
        self.done += 1

    def codes(self):
        """{stage: counts}"""
        return {key.removeprefix("codes."): value for key, value in self.tensors.items() if key.startswith("codes.")}


def image_and_label(sample):
    """What a worker sends: the original picture stays behind."""
    return sample["image"], sample["label"]


@dataclass(frozen=True)
class Pass:
    """How a dataset is gone through: here from its first image to its last; studies/benchmark.py knows a longer way."""

    images: int | None = None          # only the first ones; None: all
    workers: int = 0                   # processes that read images
    title: str = "scoring"             # of the progress bar
    progress: bool = True

    def sweep(self, predict, dataset, tally, ids):
        """Every image of `ids` through `predict`: image (3,h,w), size -> prediction (H,W), then what Tally.add takes."""
        loader = DataLoader(Subset(dataset, ids), None, collate_fn=image_and_label, num_workers=self.workers)
        bar = tqdm(loader, self.title, tally.done + len(ids), initial=tally.done, unit="image", disable=not self.progress)
        for (image, label), i in zip(bar, ids):
            prediction, *shown = predict(image, label.shape)
            tally.add(i, confusion(prediction, label, len(tally.tensors["matrix"]) - 1), *shown)
            yield tally

    def run(self, predict, dataset, tally, whose):
        """The whole pass -> Tally.  `whose`: a function that gives what identifies the pass, for those who keep it."""
        for _ in self.sweep(predict, dataset, tally, range(len(tally.tensors["painted"]))):
            pass
        return tally


@torch.no_grad()
def evaluate(model, dataset, names=None, device="cpu", how=Pass(), inception=None):
    """One row of a table: the model over a dataset, one image at a time, fp32; with a studies.rfid.Inception, rFID too.

    -> dict: images, segmentation (see `scores`), reconstruction (means over images) and codebooks (see there); the last
    two are None and {} for a model that neither repaints nor quantises.
    """
    from published.perceptual import load_lpips               # somebody else's file, opened where it is needed
    names, was_training, stages = names or dataset.names, model.training, model.stages
    model.eval().to(device)
    text = model.vlm.embed_text(names)

    def predict(image, size):
        prediction, extras = segment(model, image, text, size)
        if not extras:
            return prediction, None, {}, None
        original, repainted = to_unit(image).to(device), extras["image"]
        painted = reconstruction_scores(repainted, original, load_lpips(str(device)))
        features = inception and torch.stack([inception(original), inception(repainted)])     # (2,F)
        return prediction, painted, count_tokens(extras, model), features

    def whose():
        settings = {**flat(model.config), "pretrained": ""}   # the weights say what they are, not where they lie
        return {"checkpoint": tensors_checksum(model.state_dict()), "settings": json.dumps(settings),
                "names": names_checksum(names), "rFID": str(inception is not None)}

    n = min(how.images or len(dataset), len(dataset))
    features = inception.size if inception and stages else 0
    tally = Tally(n, len(names), {stage: len(model.codebook(stage)) for stage in stages}, features)
    tally = how.run(predict, dataset, tally, whose)
    model.train(was_training)
    painted = {key: mean(column.tolist()) for key, column in zip(PAINTED, tally.tensors["painted"].T)}
    painted["rFID"] = inception.distance(n, tally.tensors["rfid.sums"], tally.tensors["rfid.products"]) if features else None
    return {"images": n, "segmentation": scores(tally.tensors["matrix"], dataset.groups),
            "reconstruction": painted if stages else None, "codebooks": codebook_scores(tally.codes(), model)}


def evaluate_dense(vlm, stride, dataset, names=None, device="cpu", how=Pass()):
    """The MaskCLIP (dense) row, for an untrained `vlm`; the same images, sizes and rules as `evaluate`."""
    names = names or dataset.names
    text, model = vlm.eval().to(device).embed_text(names), DenseCLIP(vlm, stride)

    def predict(image, size):
        return *segment(model, image, text, size)[:1], None, {}, None

    def whose():
        settings = f"MaskCLIP {vlm.scale} {stride}"
        return {"checkpoint": tensors_checksum(vlm.state_dict()), "settings": settings, "names": names_checksum(names)}

    tally = how.run(predict, dataset, Tally(min(how.images or len(dataset), len(dataset)), len(names), {}), whose)
    return {"images": len(tally.tensors["painted"]), "segmentation": scores(tally.tensors["matrix"], dataset.groups),
            "reconstruction": None, "codebooks": {}}


# --- tables ---------------------------------------------------------------------------------------------------------


def cell(key, values):
    """A score as text: a dash: not applicable, "n/m": not measured, "same": both rules agree."""
    if key not in values:
        return "-"
    if key == "mIoU_old_rule" and not values["absent_predicted"]:
        return "same"
    return "n/m" if values[key] is None else f"{values[key]:.{METRICS[key][1]}f}"


def cells(rows):
    """Rows of `evaluate` by label -> titles of the columns in use, and {label: one text a column}."""
    values = {label: {**row["segmentation"], **(row["reconstruction"] or {})} for label, row in rows.items()}
    keys = [key for key in METRICS if any(key in scores for scores in values.values())]
    return [METRICS[key][0] for key in keys], {label: [cell(key, scores) for key in keys]
                                               for label, scores in values.items()}


def format_rows(rows):
    """Rows of `evaluate` by label -> lines of text."""
    width, (titles, texts) = max(map(len, rows)), cells(rows)
    lines = [" ".join([" " * width] + [f"{title:>8}" for title in titles])]
    return lines + [" ".join([f"{label:{width}}"] + [f"{text:>{max(8, len(title))}}" for title, text in zip(titles, row)])
                    for label, row in texts.items()]


def codebook_cells(book):
    """A codebook's scores as {title: text}."""
    return {"codes": f"{book['codes']}", "perplexity": f"{book['perplexity']:.1f}", "share used": f"{book['share_used']:.3f}",
            "mean cosine": "-" if book["cosine"] is None else f"{book['cosine']:.3f}",
            "unchanged by bf16": f"{book['bf16']:.4f}"}


def rfid_missing(rows):
    """What rFID takes, where a row repaints and has none."""
    if any(row["reconstruction"] and row["reconstruction"]["rFID"] is None for row in rows.values()):
        return ["rFID n/m: not measured; it takes python -m studies.benchmark --rfid WEIGHTS and at least two images."]
    return []


def format_codebooks(rows):
    """What the codebooks did, a line per row and stage, and why LPIPS is missing where it is."""
    lines = []
    if any(row["reconstruction"] and row["reconstruction"]["LPIPS"] is None for row in rows.values()):
        lines.append("LPIPS n/m: not measured, its backbone vgg16-397923af.pth is not in the torch hub cache.")
    for label, row in rows.items():
        for stage, book in row["codebooks"].items():
            text = codebook_cells(book)
            lines.append(f"{label}: {stage:6} codebook of {text['codes']:>4}: perplexity {text['perplexity']:>6}, "
                         f"used {text['share used']}, mean cosine {text['mean cosine']}, unchanged by bf16 "
                         f"{text['unchanged by bf16']}")
    return lines


def absences(rows):
    """Which rows have names without ground truth, and what that does to the two rules, a line each."""
    lines = []
    for label, row in rows.items():
        s = row["segmentation"]
        if s["absent"]:
            lines.append(f"{label}: {s['absent']} of {len(s['IoU'])} names have no ground truth in these images, "
                         f"{s['absent_predicted']} of them were predicted" +
                         (": the two rules differ" if s["absent_predicted"] else ""))
    return lines and [RULES, *lines]


def format_table(table):
    """The table of `score_table` as text."""
    lines = [f"{table['data']}: {table['images']} images, {len(table['names'])} names.  Fractions 0..1; PSNR in dB."]
    for part in (format_rows, rfid_missing, format_codebooks, absences):
        lines += part(table["rows"])
    return "\n".join(lines + table["notes"]) + "\n"


def table_of(run, dataset, data, rows, notes, names_file=None):
    """What every score file holds besides its rows: which data, which names, which model (a RunConfig)."""
    return {"data": str(data), "images": next(iter(rows.values()))["images"], "route": dataset.route,
            "checksum": dataset.checksum, "names_file": names_file, "names": list(dataset.names),
            "groups": {key: list(ids) for key, ids in dataset.groups.items()}, "torch": torch.__version__,
            "config": flat(run), "rows": rows, "notes": notes}


def write_scores(path_stem, table):
    """`path_stem`.txt and `path_stem`.json, both or neither."""
    text = json.dumps(table, indent=1, allow_nan=False)
    write_files({f"{path_stem}.txt": format_table(table), f"{path_stem}.json": text})


def score_table(runs, device="cpu", how=Pass(), data="the world's test scenes", names_file=None, inception=None):
    """The whole table: one row per run, then MaskCLIP (dense), then chance.

    runs {label: (model, RunConfig, dataset)}: the first is the run in question, and the same pixels must be behind all.
    The MaskCLIP row uses the first run's VLM as it was before training, which tunes its position embedding.
    """
    model, run, dataset = next(iter(runs.values()))
    rows = {label: evaluate(m, d, device=device, how=replace(how, title=f"{how.title}-{k}"), inception=inception)
            for k, (label, (m, _, d)) in enumerate(runs.items())}
    first, notes, clip = next(iter(rows.values())), [], model.config.clip
    try:
        vlm = load_vlm(clip.vlm, clip.pretrained, scale=clip.clip_scale, depths=clip.depths)
        rows["MaskCLIP, no training"] = evaluate_dense(vlm, model.stride, dataset, None, device,
                                                       replace(how, title=f"{how.title}-maskclip"))
    except InputError as error:
        notes.append(f"MaskCLIP row not measured: {error}")
    guess = chance(first["segmentation"]["pixels"], dataset.groups)
    rows["chance"] = {"images": first["images"], "segmentation": guess, "reconstruction": None, "codebooks": {}}
    return table_of(run, dataset, data, rows, notes, names_file)


def label_of(model, path):
    return f"{type(model).__name__} {path}"


# --- the command ----------------------------------------------------------------------------------------------------


def open_runs(args):
    """{label: (model, RunConfig, dataset)} of args.run and args.compare, on the images that the flags say."""
    from published.images_of import val_set                  # where files are asked for

    runs, names = {}, read_classes(Path(args.names)) if args.names else None
    for path in [args.run, *args.compare]:
        model, config = load_run(path, args.device)
        if label_of(model, path) in runs:
            raise InputError(f"{path} is named twice")
        ignore = 255 if args.ignore is None else args.ignore
        runs[label_of(model, path)] = model, config, val_set(config, args.data, ignore, args.images, names)
    return runs


def where_of(args):
    """What is scored, in words."""
    return args.data or "the world's test scenes"


def parser_of(description):
    """The flags that scoring has, here and in studies/benchmark.py."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory that train.py left")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="further runs for the same table")
    parser.add_argument("--data", metavar="DIR", help="score on a folder with images/, labels/ and classes.txt")
    parser.add_argument("--names", metavar="FILE", help="other names for the same classes, one a line in order of ids")
    parser.add_argument("--ignore", type=int, help="label value of your own DIR that means unlabelled (255)")
    parser.add_argument("--images", type=int, metavar="N", help="score on the first N images only")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def check_flags(args):
    """Raises InputError, naming the flag, for numbers out of range and flags that lack their --data."""
    for name, least in (("images", 1), ("workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: at least {least}")
    for name in ("names", "ignore"):
        if getattr(args, name) is not None and args.data is None:
            raise InputError(f"--{name} is about the labels of a folder: give --data DIR with it")
    check_device(args.device)


MOVED = {"--image": "python predict.py RUN FILE --labels NAMES", "--dataset": "python -m studies.benchmark RUN --dataset",
         "--rfid": "python -m studies.benchmark RUN --rfid"}                              # flags of before November 2026


def main(argv=None):
    for word in sys.argv[1:] if argv is None else argv:
        if (flag := word.split("=")[0]) in MOVED:
            raise InputError(f"{flag} is now {MOVED[flag]}")
    args = parse_flags(parser_of(__doc__.split("\n")[0]), argv)
    check_flags(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("eval.py is one process; on several: torchrun -m studies.benchmark RUN")
    table = score_table(open_runs(args), args.device, Pass(args.images, args.workers), where_of(args), args.names)
    write_scores(Path(args.run) / "scores", table)
    print(format_table(table), end="")
    print(f"written: scores.txt and scores.json in {args.run}; pictures and a page: python -m studies.report {args.run}")


if __name__ == "__main__":
    run_cli(main)
