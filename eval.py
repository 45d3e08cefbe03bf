"""Scores and pictures of a trained run: how well it names pixels, repaints the image and uses its codebooks.

    python eval.py runs/pat --compare runs/san        one table over the test set: text, JSON and a contact sheet
    python eval.py runs/pat --image photo.jpg --labels "red star, grass, something else" --out out.png

How a picture becomes names is inference.py, what the names are worth is metrics.py; here are the tables and the commands.
All scores are fractions 0..1, in the table and in the JSON; PSNR is in dB.

Tests: tests/test_eval.py.  Read next: train.py.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from clip import VLM, open_model
from data import Folder
from images import InputError, palette, parse_flags, parse_names, read_image, run_cli, to_unit, write_files
from inference import segment, segment_dense, segment_photo
from losses import VGG, load_lpips
from metrics import chance, codebook_scores, confusion, mean, reconstruction_scores, scores, tally_tokens
from pat import load_run
from pictures import legend, overlay, resize, sample_sheet, to_image, token_map
from world import World


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
