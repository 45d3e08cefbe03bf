"""Eight pictures: what Eq. 1 does, what the tokens of a run mean, how it was trained.  One command each.

    python -m studies.gallery eq1                  Eq. 1: one score matrix; softmax along features, argmax along codes, both
    python -m studies.gallery modes                mean shift: points on a circle move to their modes, kappa 1, 10, 100
    python -m studies.gallery stages RUN           raw features clustered, above the token maps of each stage (Fig. 1)
    python -m studies.gallery clustering RUN       mean shift over features against tokenization (Fig. 6)
    python -m studies.gallery pyramid RUN          repainted from the latent tokens alone, + late, + mid, + early
    python -m studies.gallery masks RUN            masks with their names on them, beside the ground truth
    python -m studies.gallery patches RUN          for each code, the image patches that chose it most: what it means
    python -m studies.gallery curves RUN           the training curves of log.jsonl: those that its model names

A picture goes to RUN/pictures/NAME.png or where --out says.  The images are the first that the run is scored on,
never chosen by hand; --image FILE takes one of yours instead (masks then also needs --labels "striped boat, grass").

A code has one colour, data.palette's, in every picture.  A cluster has no number of its own, so it wears the colour
of the code it shares most cells with, one to one: where clusters and tokens agree, they look the same.

# paper: Fig. 1 and Fig. 6 are our models for `stages` and `clustering`.
# ours: raw features of "latent", which has no depth of its own: what leaves CLIP's last block.

Tests: tests/studies/test_gallery.py.  Read next: report.py.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from cli import InputError, check_device, parse_flags, parse_names, run_cli, write_files
from data import IGNORE, palette, read_image, resize_short, to_tensor, to_unit
from eval import psnr
from hsattn import mean_shift
from kernels.cpu import nearest
from predict import check_picture, fitting, overlay, paint, resize, segment, spread, to_image, tokenize, unpad
from published.images_of import scored_on
from runs import changed, load_config, load_run, model_class
from studies.circle import eq1, modes, number_modes
from studies.meaning import raw_maps, spherical_kmeans
from studies.patches import PATCH_IMAGES, patches, patches_of
from studies.pictures import GREY, Figure, contact_sheet, make_folder, plot, write_names

# B batch; C CLIP width; D code width; K codes of a stage; a, b a stage's grid over the padded input.

# --- one image, stage by stage --------------------------------------------------------------------------------------


class Stages(NamedTuple):
    """One image and its tokens; {stage: ...} for early, mid, late, latent."""

    picture: np.ndarray        # (h,w,3) uint8, what the network saw, without padding
    raw: dict                  # (C,a,b) CLIP's features: after its blocks `depths[1:]`, and for latent after its last
    index: dict                # (a,b) int64, the code of each cell
    x: dict                    # (D,a,b) what the quantiser saw of each cell
    zq: dict                   # (1,D,a,b) the codes themselves, as the decoder reads them
    painted: torch.Tensor      # (3,h,w) in 0..1, the reconstruction
    crop: tuple                # (h,w)
    padded: tuple              # rows and columns that raw, index, x and zq cover: the image and its padding


@torch.no_grad()
def stage_maps(model, image):
    """image (3,h,w) CLIP-normalised; a PAT in eval mode -> Stages."""
    extras = tokenize(model, image)
    raw = {stage: clip_map[0] for stage, clip_map in raw_maps(model, image).items()}
    index = {stage: tokens.index[0] for stage, tokens in extras["tokens"].items()}
    zq = {stage: tokens.zq for stage, tokens in extras["tokens"].items()}
    x = {stage: tokens.x[0] for stage, tokens in extras["tokens"].items()}
    return Stages(to_image(to_unit(image)), raw, index, x, zq, extras["image"], extras["crop"], extras["padded"])


def features(f, map_):
    """The features (C,a,b) of a Stages without those of its padding, (n,C)."""
    return unpad(map_, f.crop, f.padded).flatten(1).T


def nearest_centre(map_, centres):
    """centres (n,C) unit -> which of them each feature of a map (C,a,b) is nearest to, padding and all, (a,b)."""
    return nearest(map_.flatten(1).T, centres).view(map_.shape[1:])


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
    views = [stage_maps(model, image) for image in shown]
    x = {stage: [features(f, f.raw[stage]) for f in views] for stage in model.stages}
    for f in (stage_maps(model, image) for image in fit):     # one at a time: only their features stay
        for stage in model.stages:
            x[stage].append(features(f, f.raw[stage]))
    rows, captions = [], []
    for f in views:
        rows += [[f.picture], [to_image(f.painted)]]
        captions += [["the image"], ["repainted from the tokens"]]
    for stage in model.stages:
        K, together = len(model.codebook(stage)), torch.cat(x[stage])                     # (m,C)
        n = min(K, max(2, len(together) // SHARE))
        _, centres = spherical_kmeans(together, n, 0)
        clusters = [nearest_centre(f.raw[stage], centres) for f in views]                  # (a,b) each
        drawn = [spread(cluster, f.crop, f.padded, f.crop) for cluster, f in zip(clusters, views)]         # (h,w) each
        tokens = [spread(f.index[stage], f.crop, f.padded, f.crop) for f in views]
        colours = wear(drawn, tokens, n, K)
        for i, f in enumerate(views):
            above, below = 2 * i, 2 * i + 1                   # the two rows of this image
            rows[above].append(paint(drawn[i], colours))
            rows[below].append(paint(tokens[i], palette(K)))
            captions[above].append("CLIP " + counted(f, clusters[i], "clusters", n))
            captions[below].append("tokens " + counted(f, f.index[stage], "codes", K))
    depths = [f"CLIP block {d}" for d in model.vlm.depths[1:]] + ["CLIP's last block"]
    return contact_sheet(rows, ["", *(f"{s}: {d}" for s, d in zip(model.stages, depths))], cell, captions)


def scenarios(samples):
    """The first image with one object on one ground, with one object over several, with several: three of `samples`.

    Objects are names that are no stuff.  The first three images where nobody says what is stuff, or what they show.
    """
    stuff, found = getattr(samples, "groups", {}).get("stuff"), {}
    for i in range(len(samples) if stuff else 0):
        label = samples[i]["label"]
        names = set(label[label != IGNORE].unique().tolist())
        grounds, things = len(names & set(stuff)), len(names - set(stuff))
        kind = "several" if things > 1 else {1: "one on one", 2: "one over two"}.get(grounds) if things else None
        if kind:
            found.setdefault(kind, samples[i]["image"])
        if len(found) == 3:
            return [found[kind] for kind in ("one on one", "one over two", "several")]
    return [samples[i]["image"] for i in range(min(3, len(samples)))]


def clustering(model, shown, kappa=10, stage="latent", cell=176):
    """The paper's Fig. 6: mean shift over CLIP's last features, and over what PAT made of them for its latent stage,
    against that stage's tokens.  -> PIL image

    Every feature of the image is a seed; those that end on the same mode are one cluster.
    """
    rows, captions, K = [], [], len(model.codebook(stage))
    for f in (stage_maps(model, image) for image in shown):
        token = spread(f.index[stage], f.crop, f.padded, f.crop)
        rows.append([f.picture])
        captions.append([""])
        for map_ in (f.raw[stage], f.x[stage]):
            x = features(f, map_)                                                         # (n,C)
            ends, _ = mean_shift(x, x[thinned(len(x))], kappa, 100)                       # (seeds,C)
            cluster = number_modes(ends)[nearest_centre(map_, ends)]                      # (a,b)
            drawn = spread(cluster, f.crop, f.padded, f.crop)                             # (h,w)
            rows[-1].append(paint(drawn, wear([drawn], [token], int(cluster.max()) + 1, K)))
            captions[-1].append(counted(f, cluster, "cluster"))
        rows[-1].append(paint(token, palette(K)))
        captions[-1].append(counted(f, f.index[stage], "code"))
    return contact_sheet(rows, ["the image", "CLIP's features", f"PAT's {stage} features", f"{stage} tokens"], cell, captions)


def thinned(n, most=1024):
    """At most about `most` of the numbers 0..n-1, evenly spaced: the seeds of mean shift on a large map."""
    return torch.arange(0, n, math.ceil(n / most))


# --- what the pyramid adds, and what the masks say ------------------------------------------------------------------


@torch.no_grad()
def repaint(model, zq):
    """{stage: (1,D,a,b)}, latent among them -> the image decoded from those stages alone, (3,H,W) with its padding.

    A missing stage is a zero condition.  The queries steer masks, never pixels, so it does not matter which are given.
    """
    decoder = model.pixel_decoder or model.decoder
    return decoder(zq, model.side.query_embed)["image"][0]


def pyramid(model, shown, cell=176):
    """Each image, and what the decoder paints from latent alone, + late, + mid, + early, with its PSNR.  PIL image"""
    rows, captions, coarse_first = [], [], model.stages[::-1]
    for image, f in ((image, stage_maps(model, image)) for image in shown):
        rows.append([f.picture])
        captions.append([""])
        for n in range(1, 1 + len(coarse_first)):
            some = {stage: f.zq[stage] for stage in coarse_first[:n]}
            painted = unpad(repaint(model, some), f.crop, f.padded).clamp(0, 1)
            rows[-1].append(to_image(painted))
            captions[-1].append(f"PSNR {psnr(painted, to_unit(image)):.1f} dB")
    titles = ["the image", f"{coarse_first[0]} only", *(f"+ {stage}" for stage in coarse_first[1:])]
    return contact_sheet(rows, titles, cell, captions)


def named(picture, prediction, names, width=448):
    """The picture (H,W,3) `width` wide, tinted by name (H,W), with the names written on it."""
    size = fitting(picture, width)
    shrinks = picture.shape[1] > size[1]
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


# --- the training curves --------------------------------------------------------------------------------------------


def curves(lines, kind):
    """The lines of log.jsonl (dicts, one a logged step) of a model of class `kind` -> training curves, PIL image.

    Panels: those of `kind.curves`; all other terms that were logged, so that a new loss is never missing; the perplexity
    of each codebook where it has stages; the learning rate.
    """
    steps = max(line["step"] for line in lines) + 1

    def series(value):                                        # value: line -> number, None where it has none
        points = ((line["step"] + 1, value(line)) for line in lines)
        return [(x, y) for x, y in points if y is not None]

    known = {"step", "lr", "grad_norm", "ms_per_step", "memory_gb", *(key for keys in kind.curves.values() for key in keys.values())}
    others = {key: key for line in lines for key, value in line.items() if key not in known and not isinstance(value, dict)}
    panels = []                                               # title, {label: points}, whether the axis is logarithmic
    for title, keys in (kind.curves | ({"other terms": others} if others else {})).items():
        losses = {label: series(lambda line: line.get(key)) for label, key in keys.items()}
        panels.append((f"{title}, unweighted (log)", losses, True))
    if kind.stages:
        books = {stage: series(lambda line: line.get(stage, {}).get("perplexity")) for stage in kind.stages}
        panels.append(("perplexity: how many codes are in use", books, False))
    panels.append(("learning rate, in units of 0.0001", {"rate": series(lambda line: 1e4 * line["lr"])}, False))
    figure = Figure(900, 12 + 250 * math.ceil(len(panels) / 2))
    for p, (title, content, log) in enumerate(panels):
        x, y = 48 + 450 * (p % 2), 40 + 250 * (p // 2)
        plot(figure, (x, y, x + 318, y + 182), title, content, log, steps)
        figure.text(x + 318, y + 206, "step", 11, GREY, "rm")
    return figure.image()


# --- commands -------------------------------------------------------------------------------------------------------

NAMES = {"eq1": "Eq. 1: one score matrix, read along its two axes, and along both",
         "modes": "mean shift: points on a circle move to their modes",
         "stages": "raw features of CLIP, clustered, above the tokens of each stage (the paper's Fig. 1)",
         "clustering": "mean shift over raw features beside the late tokens (Fig. 6)",
         "pyramid": "repainted from the latent tokens alone, and with each further stage",
         "masks": "names on masks, beside the ground truth",
         "patches": "what a code means: the patches that chose it with the highest cosine",
         "curves": "the training curves"}
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


def draw(name, model, samples, device="cpu"):
    """The picture `name` of a model in eval mode, one of those that show images -> PIL image.

    samples: a dataset, whose first few are shown; or a list of one sample, a dict of image (3,h,w), original (H,W,3)
    uint8, label (H,W) or None; it then has `names` only for masks.
    """
    first = [samples[i] for i in range(min(len(samples), 4))]
    shown = [sample["image"].to(device) for sample in first]
    if name == "masks":
        return masks(model, first[:3], samples.names)
    if name == "stages":
        fit = (samples[i]["image"].to(device) for i in range(2, min(len(samples), FIT)))
        return stages(model, shown[:2], fit)
    if name == "clustering":
        return clustering(model, [image.to(device) for image in scenarios(samples)])
    return pyramid(model, shown)


def run_pictures(run, model, dataset, examples, device="cpu"):
    """{name: PIL image} of everything that can be drawn of a run.  `examples`: patches_of's, {} without tokens.

    An imported run was not trained here: no training curves.
    """
    names = ("stages", "clustering", "pyramid", "masks") if examples else ("masks",)
    was_training = model.training
    model.eval()
    drawn = {name: draw(name, model, dataset, device) for name in names}
    if examples:
        drawn["patches"] = patches(model, examples)
    model.train(was_training)
    if (Path(run) / "log.jsonl").exists():
        drawn["curves"] = curves(read_log(run), type(model))
    return drawn


class Photo(list):
    """One picture of the user's, as the list of samples that `draw` takes; clip: sizes, a CLIPConfig."""

    def __init__(self, path, clip, names):
        picture = read_image(path)
        small = resize_short(picture, clip.short_side, clip.long_side)
        super().__init__([dict(image=to_tensor(small), original=picture, label=None)])
        self.names = names


def check_flags(args):
    """Raises InputError, naming the flag, for flags that do not go together."""
    alone, one = args.name in ("eq1", "modes"), args.name in ("stages", "clustering", "pyramid", "masks")
    if alone and args.run is not None:
        raise InputError(f"{args.name} is about no run: leave {args.run} out")
    if not alone and args.run is None:
        raise InputError(f"give the run directory that train.py left, such as: python -m studies.gallery {args.name} "
                         "runs/pat")
    if args.image is not None and (not one or args.data):
        raise InputError("--image is for stages, clustering, pyramid and masks, and goes without --data")
    if (args.name == "masks" and args.image is not None) != (args.labels is not None):
        raise InputError('masks of a picture of yours need both: --image FILE --labels "striped boat, grass"')
    if args.data is not None and (alone or args.name == "curves"):
        raise InputError(f"{args.name} shows no images: leave --data out")
    if args.images is not None and (args.name != "patches" or args.images < 1):
        raise InputError("--images N is how many images patches looks at, at least 1")
    check_device(args.device)
    if args.out is not None:
        check_picture(args.out, instead_of=args.image)


def picture_of_run(args):
    """One of the pictures that show images -> PIL image."""
    kind = model_class(load_config(args.run).model)           # no weights are needed to refuse
    if args.name in NEED_TOKENS and not kind.stages:
        raise InputError(f"{args.run}: {kind.__name__} has no tokens, so {args.name} has nothing to show; masks and "
                         "curves do")
    model, config = load_run(args.run, args.device)
    if args.image is None:
        samples, _ = scored_on(changed(config, val_data=args.data or config.val_data))
    else:
        samples = Photo(args.image, config.net.clip, args.labels and parse_names(args.labels))
    if args.name == "patches":
        return patches(model, patches_of(model, samples, args.images or PATCH_IMAGES, device=args.device))
    return draw(args.name, model, samples, args.device)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory that train.py left; none for eq1, modes")
    parser.add_argument("--out", metavar="FILE", help="where it goes (RUN/pictures/NAME.png, or NAME.png)")
    parser.add_argument("--image", metavar="FILE", help="a picture of yours in place of the run's images")
    parser.add_argument("--labels", metavar="NAMES", help='masks: its names, separated by commas: "striped boat, grass"')
    parser.add_argument("--data", metavar="DIR", help="images from here: a folder of yours, or COCO-Stuff")
    parser.add_argument("--images", type=int, metavar="N", help=f"patches: from the first N images ({PATCH_IMAGES})")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parse_flags(parser, argv)
    check_flags(args)
    tail = "" if args.image is None else f"-{Path(args.image).stem}"
    folder = Path() if args.run is None else Path(args.run) / "pictures"
    out = Path(args.out or folder / f"{args.name}{tail}.png")
    if args.run is None:
        picture = {"eq1": eq1, "modes": modes}[args.name]()
    elif args.name == "curves":
        lines = read_log(args.run)
        picture = curves(lines, model_class(load_config(args.run).model))
    else:
        picture = picture_of_run(args)
    if args.out is None:
        make_folder(out.parent)
    write_files({out: picture})
    print(f"written: {out}")


if __name__ == "__main__":
    run_cli(main)
