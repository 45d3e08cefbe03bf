"""Scores and pictures of a trained run: how well it names pixels, repaints the image and uses its codebooks.

    python eval.py runs/pat --compare runs/san        one table over the test set: text, JSON and a contact sheet
    python eval.py runs/pat --image photo.jpg --labels "red star, grass, something else" --out out.png

From queries to pixels (SAN's protocol, single scale).  Q queries give mask logits m (Q,hm,wm) and class logits
c (Q,L+1), whose last column is the learned background:

    m       bilinear to the padded input, padding cropped away, bilinear to the original size          (Q,H,W)
    s_lp    = Σ_q softmax(c_q)_l sigmoid(m_qp)       l over the L names; the background goes AFTER the softmax
    name_p  = argmax_l s_lp                             --none-of-these: unnamed (-1) where max_l s_lp < s_background,p

From pixels to scores: one integer matrix over the whole set, (L+1,L+1), row = said, column = true; the last row holds
unnamed pixels (wrong wherever there is a true name), the last column ignored ones (dropped from every sum).  With
G = true pixels, P = said pixels, T = both:  IoU = T/(G+P-T).  Two rules for the mean are in circulation:

    mIoU             mean over the names with G > 0            today's detectron2; what we mean by mIoU
    mIoU_old_rule    the same sum divided by the names with G+P > 0: one stray pixel of an absent name counts as a zero

Worked: G = (4,6,0), T = (4,2,0), P = (6,3,1) -> IoU = (4/6, 2/7, 0/1): new (.667+.286)/2 = .476, old .../3 = .317.
All scores are fractions 0..1, in the table and in the JSON; PSNR is in dB.  Perplexity counts codes.

# paper: mIoU as SAN evaluates it.  The paper's rFID needs real photos and Inception weights and is not computed here.
# ours: PSNR, SSIM, L1 and LPIPS of the reconstruction, each averaged over images; chance in closed form; the rule of
#       --none-of-these; foreground accuracy (object or stuff?) in the world.

Tests: tests/test_eval.py.  Read next: train.py.  H, W original size; h, w network input without padding; see hsattn.py.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from clip import VLM, open_model
from data import Folder
from images import (InputError, palette, parse_flags, parse_names, read_image, resize_short, run_cli, to_tensor, to_unit,
                    write_files)
from losses import VGG, load_lpips
from pat import load_run
from vq import codebook_health
from world import World

UNNAMED = -1
BAND = 2**25                                                  # floats held per band of rows: 128 MiB whatever the image

# --- from queries to pixels -----------------------------------------------------------------------------------------


def neighbours(rows, small, big):
    """Bilinear, align_corners=False: rows (r) of `big` lie between rows upper and lower (r) of `small`, at t (r,1)."""
    y = ((rows + 0.5) * (small / big) - 0.5).clamp(min=0)
    upper = y.long()
    return upper, (upper + 1).clamp(max=small - 1), (y - upper)[:, None]


def upsample_rows(x, size, rows):
    """Only the rows `rows` of bilinear F.interpolate(x, size): x (C,h,w), size (H,W), rows (r) -> (C,r,W)."""
    upper, lower, t = neighbours(rows, x.shape[1], size[0])
    return F.interpolate(torch.lerp(x[:, upper], x[:, lower], t), size=size[1], mode="linear", align_corners=False)


def two_step_bands(x, padded, crop, size, held):
    """Both upsamplings of the protocol, a band of rows at a time: 847 names on a 12-megapixel photo would not fit.

    x (C,hm,wm) logits; sizes (rows, columns) of the padded input, of the input without padding, and of the original;
    `held`: how many floats a pixel costs the caller.  Yields rows (r) and their values (C,r,W); bands cover (H,W).
    """
    for rows in torch.arange(size[0], device=x.device).split(max(1, BAND // (held * max(padded[1], size[1])))):
        if crop == size:                                      # the second step would be the identity
            yield rows, upsample_rows(x, padded, rows)[..., :crop[1]]
            continue
        upper, lower, t = neighbours(rows, crop[0], size[0])
        band = torch.lerp(upsample_rows(x, padded, upper)[..., :crop[1]],
                          upsample_rows(x, padded, lower)[..., :crop[1]], t)                  # (C,r,w)
        yield rows, F.interpolate(band, size=size[1], mode="linear", align_corners=False)     # (C,r,W)


def semantic_scores(mask_logits, class_logits, padded, crop, size):
    """The header's s, band by band: yields rows (r), scores (L,r,W) and the background's share (r,W), all >= 0.

    mask_logits (Q,hm,wm), class_logits (Q,L+1), background last; sizes as in `two_step_bands`.
    """
    share = class_logits.float().softmax(-1).T                                                # (L+1,Q)
    for rows, band in two_step_bands(mask_logits.float(), padded, crop, size, sum(share.shape)):
        s = torch.einsum("lq,qrw->lrw", share, band.sigmoid())                                # (L+1,r,W)
        yield rows, s[:-1], s[-1]


def name_pixels(mask_logits, class_logits, padded, crop, size, none_of_these=False):
    """The protocol's prediction (H,W) int64 in 0..L-1, on the CPU; UNNAMED only with `none_of_these`."""
    prediction = torch.empty(size, dtype=torch.int64)
    for rows, scores, background in semantic_scores(mask_logits, class_logits, padded, crop, size):
        best, index = scores.max(0)
        if none_of_these:
            index[best < background] = UNNAMED
        prediction[rows.cpu()] = index.cpu()
    return prediction


def pad(image, stride):
    """image (3,h,w), normalised -> (1,3,Hp,Wp): zeros right and below up to multiples of `stride`."""
    h, w = image.shape[-2:]
    return F.pad(image, (0, -w % stride, 0, -h % stride))[None]


def unpad(x, crop, padded):
    """Drop what only covers padding: x (...,a,b), any grid over the padded input -> (...,a',b')."""
    a, b = x.shape[-2:]
    return x[..., :math.ceil(a * crop[0] / padded[0]), :math.ceil(b * crop[1] / padded[1])]


@torch.no_grad()
def segment(model, image, text, size, none_of_these=False):
    """One image through the whole protocol: image (3,h,w) normalised, text (L,E), size (H,W) to answer at.

    -> prediction (H,W) int64, and what else the model shows: {} for SAN; for PAT "image" (3,h,w) in [0,1], "tokens"
    {stage: Tokens over the padded input}, and the two sizes "crop" (h,w) and "padded" that say what is padding.
    """
    padded_image = pad(image.to(text.device), model.stride)
    crop, padded = tuple(image.shape[-2:]), tuple(padded_image.shape[-2:])
    out = model(padded_image, text)
    prediction = name_pixels(out["masks"][-1][0], out["classes"][-1][0], padded, crop, tuple(size), none_of_these)
    if "image" not in out:
        return prediction, {}
    image = unpad(out["image"][0], crop, padded).clamp(0, 1)
    return prediction, {"image": image, "tokens": out["tokens"], "crop": crop, "padded": padded}


def segment_photo(model, picture, names, none_of_these=False):
    """Any picture (H,W,3) uint8 and any names, for a model in eval mode -> as `segment`, at the picture's own size."""
    small = resize_short(picture, model.config.short_side, model.config.long_side)            # (h,w,3)
    return segment(model, to_tensor(small), model.vlm.embed_text(names), picture.shape[:2], none_of_these)


@torch.no_grad()
def segment_dense(vlm, stride, image, text, size):
    """Training-free, MaskCLIP-style: each patch's own CLIP feature against the names -> prediction (H,W) int64."""
    padded_image = pad(image.to(text.device), stride)
    cosine = torch.einsum("le,ehw->lhw", text, vlm.dense(padded_image)[0])                    # (L,h,w)
    prediction, sizes = torch.empty(size, dtype=torch.int64), (tuple(padded_image.shape[-2:]), tuple(image.shape[-2:]))
    for rows, band in two_step_bands(cosine, *sizes, tuple(size), 2 * len(text)):
        prediction[rows.cpu()] = band.argmax(0).cpu()
    return prediction


# --- from pixels to scores ------------------------------------------------------------------------------------------


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

    Besides: IoU, a list of L with None for names without ground truth, and pixels, the ground truth's pixels per name.
    """
    m = matrix.double()[:, :-1]                                                               # ignored pixels go
    true, said, correct = m.sum(0), m[:-1].sum(1), m.diagonal()                               # (L) each: G, P, T
    present, touched = true > 0, true + said > 0
    iou = (correct / (true + said - correct)).nan_to_num(0)
    result = {"mIoU": number(iou[present].mean()), "mIoU_old_rule": number(iou.sum() / touched.sum()),
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


def tally_tokens(tally, seen, model):
    """Add what `segment` saw to tally {stage: [counts (K), features n, features whose index survives bf16]}."""
    for stage, tokens in seen["tokens"].items():
        index, x = (unpad(t[0], seen["crop"], seen["padded"]) for t in (tokens.index, tokens.x))  # (a,b), (D,a,b)
        counts = torch.bincount(index.flatten(), minlength=len(model.codebook(stage)))
        health = codebook_health(counts, model.codebook(stage), x.flatten(1).T, model.config.vmf)
        total = tally.setdefault(stage, [torch.zeros_like(counts), 0, 0.0])
        total[:] = total[0] + counts, total[1] + index.numel(), total[2] + health["bf16"] * index.numel()


def codebook_scores(tally, model):
    """{stage: dict codes, perplexity, share_used, cosine, bf16} over everything tallied."""
    result = {}
    for stage, (counts, n, stable) in tally.items():
        health = codebook_health(counts, model.codebook(stage))
        result[stage] = {"codes": len(counts), "perplexity": number(health["perplexity"]),
                         "share_used": int((counts > 0).sum()) / len(counts), "cosine": number(health["cosine"]),
                         "bf16": number(stable / n)}
    return result


def mean(values):
    """Mean of the numbers in a list, leaving out None and NaN; None if nothing is left."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    return sum(values) / len(values) if values else None


def evaluate(model, dataset, names=None, device="cpu", progress=True, images=None):
    """One row of the table: the model over the first `images` (default all) of a dataset, one at a time, fp32.

    -> dict: images, segmentation (see `scores`), reconstruction (means over images) and codebooks (see there); the last
    two are None and {} for SAN.
    """
    names, was_training = names or dataset.names, model.training
    model.eval().to(device)
    text, matrix, painted, tally = model.vlm.embed_text(names), 0, [], {}
    n = min(images or len(dataset), len(dataset))
    for i in tqdm(range(n), desc="scoring", unit="image", disable=not progress):
        sample = dataset[i]
        prediction, seen = segment(model, sample["image"], text, sample["label"].shape)
        matrix = matrix + confusion(prediction, sample["label"], len(names))
        if seen:
            target = to_unit(sample["image"]).to(device)
            painted.append(reconstruction_scores(seen["image"], target, load_lpips(str(device))))
            tally_tokens(tally, seen, model)
    model.train(was_training)
    repainted = {key: mean([row[key] for row in painted]) for key in painted[0]} if painted else None
    return {"images": n, "segmentation": scores(matrix, dataset.groups), "reconstruction": repainted,
            "codebooks": codebook_scores(tally, model)}


def evaluate_dense(vlm, stride, dataset, names=None, device="cpu", progress=True, images=None):
    """The MaskCLIP-style row, for an untrained `vlm`; the same images, sizes and rules as `evaluate`."""
    names = names or dataset.names
    text, matrix = vlm.eval().to(device).embed_text(names), 0
    n = min(images or len(dataset), len(dataset))
    for i in tqdm(range(n), desc="MaskCLIP", unit="image", disable=not progress):
        sample = dataset[i]
        prediction = segment_dense(vlm, stride, sample["image"], text, sample["label"].shape)
        matrix = matrix + confusion(prediction, sample["label"], len(names))
    return {"images": n, "segmentation": scores(matrix, dataset.groups), "reconstruction": None, "codebooks": {}}


# --- pictures -------------------------------------------------------------------------------------------------------


def to_image(unit):
    """(3,h,w) in [0,1] -> (h,w,3) uint8."""
    return (unit.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def paint(index, colours):
    """index (H,W) integer, colours (n,3) uint8 -> (H,W,3) uint8; black where it is -1."""
    return np.concatenate([colours, np.zeros((1, 3), np.uint8)])[np.asarray(index)]


def resize(picture, size, smooth=False):
    """picture (h,w,3) uint8 -> (H,W,3) uint8, size (H,W): nearest, so that every token stays one flat square."""
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), how))


def overlay(image, prediction, colours, strength=0.6):
    """The image (H,W,3) uint8 tinted by each pixel's name (H,W), borders white, unnamed pixels untinted -> (H,W,3)."""
    prediction = np.asarray(prediction)
    tint = np.where(prediction[..., None] == UNNAMED, 0, strength)
    mixed = image * (1 - tint) + paint(prediction, colours) * tint
    border = np.zeros(prediction.shape, bool)
    border[:, 1:] |= prediction[:, 1:] != prediction[:, :-1]
    border[1:] |= prediction[1:] != prediction[:-1]
    mixed[border] = 255
    return mixed.round().astype(np.uint8)


def legend(prediction, names, colours):
    """One line per name: its colour, the name, its share of the pixels; unnamed pixels last, if any.  -> PIL image"""
    prediction, font = np.asarray(prediction), ImageFont.load_default(16)
    rows = [(tuple(int(c) for c in colours[i]), name, (prediction == i).mean()) for i, name in enumerate(names)]
    if (prediction == UNNAMED).any():
        rows.append(((255, 255, 255), "(none of these)", (prediction == UNNAMED).mean()))
    lines = [f"{name}   {share:.1%}" for _, name, share in rows]
    sheet = Image.new("RGB", (48 + int(max(map(font.getlength, lines))), 8 + 24 * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, ((colour, _, _), line) in enumerate(zip(rows, lines)):
        draw.rectangle((8, 8 + 24 * y, 26, 24 + 24 * y), fill=colour, outline="black")
        draw.text((36, 6 + 24 * y), line, fill="black", font=font)
    return sheet


def token_map(index, codes, crop, padded, size):
    """index (a,b) over the padded input, of a book of `codes` -> (H,W,3) uint8: each pixel in the colour of its token.

    A code has the same colour in every picture.  crop (h,w), padded and size (H,W) as in `two_step_bands`.
    """
    rows, columns = (((torch.arange(big) + 0.5) * h / big * cells / whole).long()             # pixel -> input -> token
                     for big, h, cells, whole in zip(size, crop, index.shape, padded))
    return paint(index.cpu()[rows][:, columns], palette(codes))


def contact_sheet(rows, titles, cell=192):
    """rows: lists of (H,W,3) uint8, one per title, drawn `cell` pixels wide (enlarged nearest) -> PIL image."""
    heights = [max(picture.shape[0] * cell // picture.shape[1] for picture in row) for row in rows]
    sheet = Image.new("RGB", (4 + len(titles) * (cell + 4), 24 + sum(heights) + 4 * len(rows)), "white")
    for x, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((6 + x * (cell + 4), 4), title, fill="black", font=ImageFont.load_default(14))
    y = 24
    for row, height in zip(rows, heights):
        for x, picture in enumerate(row):
            size = max(1, picture.shape[0] * cell // picture.shape[1]), cell
            shrinks = picture.shape[1] > cell
            sheet.paste(Image.fromarray(resize(picture, size, smooth=shrinks)), (4 + x * (cell + 4), y))
        y += height + 4
    return sheet


def sample_sheet(model, dataset, names=None, device="cpu", scenes=6):
    """The first scenes of a dataset, one a row: input, ground truth, prediction, for PAT reconstruction -> PIL image"""
    names, was_training = names or dataset.names, model.training
    model.eval().to(device)
    text, colours, rows = model.vlm.embed_text(names), palette(len(names)), []
    for i in range(min(scenes, len(dataset))):
        sample = dataset[i]
        prediction, seen = segment(model, sample["image"], text, sample["label"].shape)
        rows.append([sample["original"], paint(sample["label"], colours), paint(prediction, colours)])
        if seen:
            rows[-1].append(resize(to_image(seen["image"]), prediction.shape, smooth=True))
    model.train(was_training)
    return contact_sheet(rows, ["input", "ground truth", "prediction", "reconstruction"][:len(rows[0])])


# --- writing --------------------------------------------------------------------------------------------------------


COLUMNS = {"mIoU": "mIoU", "mIoU_old_rule": "old rule", "mIoU_seen": "seen", "mIoU_unseen": "unseen",
           "mIoU_stuff": "stuff", "foreground_accuracy": "fg/bg", "pixel_accuracy": "pixel acc",
           "mean_accuracy": "mean acc", "fwIoU": "fwIoU",
           "PSNR": "PSNR dB", "SSIM": "SSIM", "L1": "L1", "LPIPS": "LPIPS"}


def format_table(table):
    """The table of `score_table` as text; a dash is "not applicable", "n/m" is "not measured"."""
    rows, width = table["rows"], max(map(len, table["rows"]))
    columns = {key: title for key, title in COLUMNS.items()
               if any(key in row["segmentation"] or key in (row["reconstruction"] or {}) for row in rows.values())}
    lines = [f"{table['data']}: {table['images']} images, {len(table['names'])} names.  Fractions 0..1; PSNR in dB.",
             " ".join([" " * width] + [f"{title:>8}" for title in columns.values()])]
    for label, row in rows.items():
        values = {**row["segmentation"], **(row["reconstruction"] or {})}
        cells = ["-" if key not in values else "n/m" if values[key] is None else
                 f"{values[key]:.2f}" if key == "PSNR" else f"{values[key]:.3f}" for key in columns]
        lines.append(" ".join([f"{label:{width}}"] + [f"{cell:>8}" for cell in cells]))
    if any((row["reconstruction"] or {}).get("LPIPS", 0) is None for row in rows.values()):
        lines.append(f"LPIPS n/m: not measured, its backbone {VGG} is not in the torch hub cache.")
    for label, row in rows.items():
        for stage, code in row["codebooks"].items():
            cosine = "-" if code["cosine"] is None else f"{code['cosine']:.3f}"
            lines.append(f"{label}: {stage:6} codebook of {code['codes']:4}: perplexity {code['perplexity']:6.1f}, "
                         f"used {code['share_used']:.3f}, mean cosine {cosine}, unchanged by bf16 {code['bf16']:.4f}")
    return "\n".join(lines + table["notes"]) + "\n"


def write_scores(path_stem, table):
    """`path_stem`.txt and `path_stem`.json, both or neither."""
    text = json.dumps(table, indent=1, allow_nan=False)
    write_files({f"{path_stem}.txt": format_table(table), f"{path_stem}.json": text})


# --- the two commands -----------------------------------------------------------------------------------------------


def test_set(config, data=None, ignore=255, images=None):
    """What a run is scored on: the folder `data`, or the world's test scenes for a run of the world."""
    if data is not None:
        return Folder(data, ignore=ignore, short_side=config.short_side, long_side=config.long_side)
    if config.preset != "world" or config.data:
        raise InputError("a run that was trained on a folder is scored on one: give --data DIR")
    return World("val", **({} if images is None else {"length": images}))


def score_table(runs, device="cpu", progress=True, images=None, data="the world's test scenes"):
    """The whole table: one row per run, then MaskCLIP-style, then chance.

    runs {label: (model, config, dataset)}: the first is the run in question, and the same pixels must be behind all.
    The MaskCLIP row uses the first run's VLM as it was before training, which tunes its position embedding.
    """
    model, config, dataset = next(iter(runs.values()))
    rows = {label: evaluate(m, d, device=device, progress=progress, images=images) for label, (m, _, d) in runs.items()}
    first, notes = next(iter(rows.values())), []
    try:
        c = model.config
        vlm = VLM(*open_model(c.vlm, c.pretrained), scale=c.clip_scale, depths=c.depths)
        rows["MaskCLIP, no training"] = evaluate_dense(vlm, model.stride, dataset, None, device, progress, images)
    except InputError as error:
        notes.append(f"MaskCLIP row not measured: {error}")
    guess = chance(first["segmentation"]["pixels"], dataset.groups)
    rows["chance"] = {"images": first["images"], "segmentation": guess, "reconstruction": None, "codebooks": {}}
    return {"data": str(data), "images": first["images"], "names": list(dataset.names),
            "groups": {key: list(ids) for key, ids in dataset.groups.items()}, "torch": torch.__version__,
            "config": dataclasses.asdict(config), "rows": rows, "notes": notes}


def score_command(args):
    """`eval.py RUN [--compare RUN ...]`: print the table, write scores.txt, scores.json and samples.png into RUN."""
    runs = {}
    for path in [args.run, *args.compare]:
        model, config = load_run(path, args.device)
        label = f"{config.model.upper()} {path}"
        if label in runs:
            raise InputError(f"{path} is named twice")
        runs[label] = model, config, test_set(config, args.data, args.ignore, args.images)
    table = score_table(runs, args.device, images=args.images, data=args.data or "the world's test scenes")
    model, _, dataset = next(iter(runs.values()))
    sheet = sample_sheet(model, dataset, device=args.device)
    write_scores(Path(args.run) / "scores", table)
    write_files({Path(args.run) / "samples.png": sheet})
    print(format_table(table), end="")
    print(f"written: scores.txt, scores.json and samples.png in {args.run}")


def photo_command(args):
    """`eval.py RUN --image FILE --labels "a, b" --out OUT`: any picture, any words, drawn at its own size."""
    out = Path(args.out)
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE or not out.parent.is_dir():
        raise InputError(f"--out {out}: needs an existing folder and a picture's ending, such as out.png")
    names, picture = parse_names(args.labels), read_image(args.image)                         # (H,W,3) uint8
    model, _ = load_run(args.run, args.device)
    prediction, seen = segment_photo(model.eval(), picture, names, args.none_of_these)
    colours, size = palette(len(names)), picture.shape[:2]
    files = {"": overlay(picture, prediction, colours), "_legend": legend(prediction, names, colours)}
    if seen:
        files["_reconstruction"] = resize(to_image(seen["image"]), size, smooth=True)
        for stage, tokens in seen["tokens"].items():
            codes = len(model.codebook(stage))
            files[f"_tokens_{stage}"] = token_map(tokens.index[0], codes, seen["crop"], seen["padded"], size)
    files = {out.with_name(f"{out.stem}{part}{out.suffix}"): content for part, content in files.items()}
    if any(path.exists() and path.samefile(args.image) for path in files):
        raise InputError(f"--out {out}: would overwrite the input; choose another name")
    write_files(files)
    print("written: " + ", ".join(str(path) for path in files))
    if not seen:
        print("SAN has no tokens and repaints nothing: no token maps, no reconstruction")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory that train.py left")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="further runs for the same table")
    parser.add_argument("--data", metavar="DIR", help="score on a folder with images/, labels/ and classes.txt")
    parser.add_argument("--ignore", type=int, default=255, help="label value of DIR that means unlabelled (255)")
    parser.add_argument("--images", type=int, metavar="N", help="score on the first N images only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--image", metavar="FILE", help="segment this picture instead of scoring")
    parser.add_argument("--labels", metavar="NAMES", help='its names, separated by commas: "red star, grass"')
    parser.add_argument("--out", metavar="OUT", help="where its overlay goes; the other pictures go beside it")
    parser.add_argument("--none-of-these", action="store_true",
                        help="pixels whose best name loses to the learned background stay unnamed")
    args = parse_flags(parser, argv)
    if args.run is None:
        raise InputError("give the run directory that train.py left, such as: python eval.py runs/pat")
    if args.images is not None and args.images < 1:
        raise InputError(f"--images {args.images}: at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is visible here; leave it out to use the CPU")
    if args.image is not None and (args.compare or args.data or args.images):
        raise InputError("--image segments one picture: leave --compare, --data and --images out")
    photo = {"--labels": args.labels, "--out": args.out, "--none-of-these": args.none_of_these or None}
    if args.image is None and any(value is not None for value in photo.values()):
        raise InputError(f"{', '.join(k for k, v in photo.items() if v is not None)}: only together with --image FILE")
    if args.image is not None and (args.labels is None or args.out is None):
        raise InputError('--image also needs --labels "name, name" and --out out.png')
    (score_command if args.image is None else photo_command)(args)


if __name__ == "__main__":
    run_cli(main)
