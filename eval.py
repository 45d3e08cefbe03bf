"""Scores and pictures of a trained run: how well it names pixels, repaints the image and uses its codebooks.

    python eval.py runs/pat --compare runs/san        one table over the test set, and report.html
    python eval.py runs/pat --data DIR                the same over a folder with images/, labels/ and classes.txt
    python eval.py runs/pat --dataset all --data DIR  the six published datasets, as far as their archives are in DIR
    python eval.py runs/pat --data DIR --rfid FILE    the reconstructions' rFID too, see metrics.load_inception
    python eval.py runs/pat --image photo.jpg --labels "red star, grass, something else" --out out.png
    torchrun --nproc_per_node=2 eval.py ...           the same scores, from as many processes

How a picture becomes names is inference.py, what the names are worth metrics.py, how a long pass is cut into pieces
tally.py; here are the tables and the commands.  A command that was stopped goes on when it is given again; finished, it
starts anew.  All scores are fractions 0..1, in the tables and in the JSON; PSNR is in dB.

"seen" names are, letter by letter, among those the run was trained with (RUN/names.txt, or COCO-Stuff's 171 where a run
has none); a score file says by which list, and holds the checksums of the names it used and of the labels' source.

Tests: tests/test_eval.py.  Read next: train.py.
"""

import argparse
import dataclasses
import json
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from clip import VLM, open_model
from data import open_dataset, test_set
from gallery import NAMES, run_pictures
from images import InputError, checksum, palette, parse_flags, parse_names, read_image, run_cli, write_files
from inference import segment_photo
from losses import VGG
from metrics import INCEPTION, chance, load_inception
from pat import load_run
from patches import PATCH_IMAGES, patches_of
from pictures import legend, overlay, resize, sample_sheet, to_image, token_map
from published import COUNTS, NotFound
from report import report
from tally import Pass, evaluate, evaluate_dense, forget, make_folder
from vocabulary import DATASETS, load_vocabulary, read_classes

# --- tables ---------------------------------------------------------------------------------------------------------


COLUMNS = {"mIoU": "mIoU", "mIoU_old_rule": "old rule", "mIoU_seen": "seen", "mIoU_unseen": "unseen",
           "mIoU_stuff": "stuff", "foreground_accuracy": "fg/bg", "pixel_accuracy": "pixel acc",
           "mean_accuracy": "mean acc", "fwIoU": "fwIoU",
           "PSNR": "PSNR dB", "SSIM": "SSIM", "L1": "L1", "LPIPS": "LPIPS", "rFID": "rFID"}
RFID_IMAGES = 10_000                                          # what FID's authors recommend at the least
RULES = ("mIoU: the mean IoU of the names with ground truth (detectron2 since July 2022).  old rule (its release 0.6): "
         "the same sum, but names without ground truth that were predicted are counted, as zeros.")


def format_rows(rows):
    """Rows of `evaluate` by label -> lines; a dash: not applicable, "n/m": not measured, "same": both rules agree."""
    width = max(map(len, rows))
    columns = {key: title for key, title in COLUMNS.items()
               if any(key in row["segmentation"] or key in (row["reconstruction"] or {}) for row in rows.values())}
    lines = [" ".join([" " * width] + [f"{title:>8}" for title in columns.values()])]
    for label, row in rows.items():
        values = {**row["segmentation"], **(row["reconstruction"] or {})}
        cells = {key: "-" if key not in values else "n/m" if values[key] is None else
                 f"{values[key]:.2f}" if key in ("PSNR", "rFID") else f"{values[key]:.3f}" for key in columns}
        if not values["absent_predicted"]:
            cells["mIoU_old_rule"] = "same"
        lines.append(" ".join([f"{label:{width}}"] + [f"{cells[key]:>{max(8, len(columns[key]))}}" for key in columns]))
    return lines


def rfid_lines(rows):
    """Why rFID is not measured, or of how many images it is and what that means; [] where nothing was repainted."""
    images = {row["images"]: row["reconstruction"]["rFID"] for row in rows.values() if row["reconstruction"]}
    if not images:
        return []
    if None in images.values():
        return [f"rFID n/m: not measured; it takes --rfid {INCEPTION}, the package of requirements-rfid.txt and at "
                "least two images."]
    n = min(images)
    worth = f"rFID: {n} images against their reconstructions, at the size the network gets them."
    if n < RFID_IMAGES:
        worth += f"  Fewer than {RFID_IMAGES:,}: it comes out too high; compare it only with rFID of as many images."
    if n <= 2048:
        worth += "  No more than its 2,048 features: the covariances are singular."
    return [worth]


def format_codebooks(rows):
    """What PAT's codebooks did, a line per row and stage, and why LPIPS is missing where it is."""
    lines = []
    if any((row["reconstruction"] or {}).get("LPIPS", 0) is None for row in rows.values()):
        lines.append(f"LPIPS n/m: not measured, its backbone {VGG} is not in the torch hub cache.")
    for label, row in rows.items():
        for stage, code in row["codebooks"].items():
            cosine = "-" if code["cosine"] is None else f"{code['cosine']:.3f}"
            lines.append(f"{label}: {stage:6} codebook of {code['codes']:4}: perplexity {code['perplexity']:6.1f}, "
                         f"used {code['share_used']:.3f}, mean cosine {cosine}, unchanged by bf16 {code['bf16']:.4f}")
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
    for part in (format_rows, rfid_lines, format_codebooks, absences):
        lines += part(table["rows"])
    return "\n".join(lines + table["notes"]) + "\n"


def format_published(tables, missing):
    """{dataset: table of `published_table`} and {dataset: what it needs} as one text."""
    rows = {name: next(iter(table["rows"].values())) for name, table in tables.items()}
    first = next(iter(tables.values()))
    head, *body = format_rows(rows)
    lines = [f"{next(iter(first['rows']))} on the published datasets in {first['data']}.  Fractions 0..1; PSNR in dB.",
             f"{head}      images  names             labels"]
    for line, table in zip(body, tables.values()):
        counts = f"{table['images']}/{table['published_images']}"
        names = table["checksum"] + ("" if table["names_file"] is None else f" (--names {table['names_file']})")
        lines.append(f"{line} {counts:>11}  {names:16}  {table['route']}")
    lines += [f"{name}: not there: {needs}" for name, needs in missing.items()]
    lines += rfid_lines(rows) + absences(rows)
    lines += dict.fromkeys(note for table in tables.values() for note in table["notes"])
    return "\n".join(lines) + "\n"


def table_of(model, dataset, data, rows, notes, names_file=None):
    """What every score file holds besides its rows: which data, which names, which model."""
    return {"data": str(data), "images": next(iter(rows.values()))["images"], "route": dataset.route,
            "checksum": dataset.checksum, "names_file": names_file, "names": list(dataset.names),
            "groups": {key: list(ids) for key, ids in dataset.groups.items()}, "torch": torch.__version__,
            "config": dataclasses.asdict(model.config), "rows": rows, "notes": notes}


def write_scores(path_stem, table):
    """`path_stem`.txt and `path_stem`.json, both or neither."""
    text = json.dumps(table, indent=1, allow_nan=False)
    write_files({f"{path_stem}.txt": format_table(table), f"{path_stem}.json": text})


# --- the world, or a folder of your own -----------------------------------------------------------------------------


def score_table(runs, device="cpu", how=Pass(), data="the world's test scenes", names_file=None, inception=None):
    """The whole table: one row per run, then MaskCLIP-style, then chance.

    runs {label: (model, dataset)}: the first is the run in question, and the same pixels must be behind all.
    The MaskCLIP row uses the first run's VLM as it was before training, which tunes its position embedding.
    """
    model, dataset = next(iter(runs.values()))
    rows = {label: evaluate(m, d, device=device, how=how._replace(title=f"{how.title}-{k}"), inception=inception)
            for k, (label, (m, d)) in enumerate(runs.items())}
    first, notes = next(iter(rows.values())), []
    try:
        c = model.config
        vlm = VLM(*open_model(c.vlm, c.pretrained), scale=c.clip_scale, depths=c.depths)
        rows["MaskCLIP, no training"] = evaluate_dense(vlm, model.stride, dataset, None, device,
                                                       how._replace(title=f"{how.title}-maskclip"))
    except InputError as error:
        notes.append(f"MaskCLIP row not measured: {error}")
    guess = chance(first["segmentation"]["pixels"], dataset.groups)
    rows["chance"] = {"images": first["images"], "segmentation": guess, "reconstruction": None, "codebooks": {}}
    return table_of(model, dataset, data, rows, notes, names_file)


def inception_of(args, how):
    """What --rfid asks for, or None without it; without its package too, which is said now, not hours later."""
    inception = args.rfid and load_inception(args.rfid, args.device)
    if args.rfid and inception is None and how.rank == 0:
        print("rFID will not be measured: pip install -r requirements-rfid.txt", file=sys.stderr)
    return inception


def write_run(run, model, dataset, table, images, device="cpu"):
    """All that shows a scored run: scores.txt and .json, samples.png, the pictures, and report.html that holds them.

    table: `score_table`'s; images: how many of the dataset's first are searched for patches.  -> what was written.  The
    scores are on disk before anything is drawn: they took longest.
    """
    run, pat = Path(run), model.config.model == "pat"
    write_scores(run / "scores", table)
    found = patches_of(model, dataset, images, device=device) if pat else {}
    drawn = run_pictures(run, model, dataset, found, device)
    meaning, checkpoint = run / "meaning.txt", run / "checkpoint.safetensors"
    current = meaning.is_file() and meaning.stat().st_mtime >= checkpoint.stat().st_mtime     # of these weights
    page = report(model, dataset, table, COLUMNS, {NAMES[name]: picture for name, picture in drawn.items()}, found,
                  meaning.read_text(encoding="utf-8") if current else None, device)
    make_folder(run / "pictures")
    write_files({run / "samples.png": sample_sheet(model, dataset, device=device), run / "report.html": page,
                 **{run / "pictures" / f"{name}.png": picture for name, picture in drawn.items()}})
    return (f"scores.txt, scores.json, samples.png, pictures ({', '.join(drawn)}) and report.html, which shows them all, "
            f"in {run}")


def score_command(args, how):
    """`eval.py RUN [--compare RUN ...]`: print the table, write it, the pictures and report.html into RUN."""
    runs, names = {}, read_classes(Path(args.names)) if args.names else None
    for path in [args.run, *args.compare]:
        model, config = load_run(path, args.device)
        label = f"{config.model.upper()} {path}"
        if label in runs:
            raise InputError(f"{path} is named twice")
        ignore = 255 if args.ignore is None else args.ignore
        runs[label] = model, test_set(config, args.data, ignore, args.images, names)
    tail = f"-first-{args.images}" if args.images else ""
    how = how._replace(title=("world" if args.data is None else "folder") + tail)
    inception = inception_of(args, how)
    table = score_table(runs, args.device, how, args.data or "the world's test scenes", args.names, inception)
    if how.rank > 0:
        return
    model, dataset = next(iter(runs.values()))
    written = write_run(args.run, model, dataset, table, min(args.images or PATCH_IMAGES, PATCH_IMAGES), args.device)
    for row in (*range(len(runs)), "maskclip"):
        forget(how.folder, f"{how.title}-{row}")
    print(format_table(table), end="")
    print(f"written: {written}")


# --- the published datasets -----------------------------------------------------------------------------------------


def training_names(run):
    """(names, where they are from) of what a run was trained with: its names.txt, or COCO-Stuff's 171."""
    path = Path(run) / "names.txt"
    if path.is_file():
        names = read_classes(path)
        return names, f"the {len(names)} names of {path} ({checksum(names)})"
    names = load_vocabulary("coco-stuff").names
    return names, f"COCO-Stuff's {len(names)} ({path.parent} does not say which names it was trained with)"


def open_published(args, config, training):
    """({name: dataset}, {name: what it needs}) of the datasets asked for.

    Raises InputError where one that was asked for by name, or every one, is not there, and where one is broken.
    """
    every = "all" in args.dataset
    if args.names and (every or len(args.dataset) > 1):
        raise InputError("--names replaces the names of one dataset: give one --dataset with it")
    names = read_classes(Path(args.names)) if args.names else None
    found, missing = {}, {}
    for name in DATASETS if every else dict.fromkeys(args.dataset):
        try:
            found[name] = open_dataset(name, args.data, short_side=config.short_side, long_side=config.long_side,
                                       names=names, training=training)
        except NotFound as error:
            if not every:
                raise
            missing[name] = error.missing
    if not found:
        raise InputError(f"{args.data}: none of the published datasets is there; python data.py check {args.data} says "
                         "what each needs")
    return found, missing


def published_table(label, model, dataset, row, args, origin):
    """The table of one published dataset; see `table_of`."""
    c, name = model.config, dataset.name
    notes = [f"seen: names that are, letter by letter, among {origin}.  unseen: the others."]
    if (c.short_side, c.long_side) != (640, 2560):
        notes.append(f"Images: short side {c.short_side}, long side at most {c.long_side}; the benchmarks': 640, 2560.")
    return {**table_of(model, dataset, args.data, {label: row}, notes, args.names), "dataset": name,
            "published_images": COUNTS[name]["val"], "published_checksum": load_vocabulary(name).checksum,
            "where": dataset.found.where, "training_names": origin}


def published_command(args, how):
    """`eval.py RUN --dataset all --data DIR`: a row per dataset, printed, and written into RUN/scores as it is done.

    NAME.txt and NAME.json hold one, published.txt all of `--dataset all`; with --images N, names end in -first-N.
    """
    model, config = load_run(args.run, args.device)
    training, origin = training_names(args.run)
    found, missing = open_published(args, config, training)
    inception = inception_of(args, how)
    label, tail, tables = f"{config.model.upper()} {args.run}", f"-first-{args.images}" if args.images else "", {}
    for name, dataset in found.items():
        row = evaluate(model, dataset, device=args.device, how=how._replace(title=name + tail), inception=inception)
        tables[name] = published_table(label, model, dataset, row, args, origin)
        if how.rank == 0:
            text = json.dumps(tables[name], indent=1, allow_nan=False)
            alone = format_published({name: tables[name]}, {}) + "\n".join(format_codebooks({name: row})) + "\n"
            write_files({how.folder / f"{name}{tail}.json": text, how.folder / f"{name}{tail}.txt": alone})
    if how.rank > 0:
        return
    text, files = format_published(tables, missing), [f"{name}{tail}.json and .txt" for name in tables]
    if "all" in args.dataset:
        write_files({how.folder / f"published{tail}.txt": text})
        files.append(f"published{tail}.txt")
    for name in tables:                                       # only now: stopped before, nothing is scored twice
        forget(how.folder, name + tail)
    print(text, end="")
    print(f"written: {', '.join(files)} in {how.folder}")


# --- any picture ----------------------------------------------------------------------------------------------------


def photo_command(args, how):
    """`eval.py RUN --image FILE --labels "a, b" --out OUT`: any picture, any words, drawn at its own size."""
    out = Path(args.out)
    if how.processes > 1:
        raise InputError("--image segments one picture, on one process: leave torchrun out")
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


# --- the command line -----------------------------------------------------------------------------------------------


@contextmanager
def process_group(device):
    """(rank, processes, device) while what torchrun started is joined, by gloo; (0, 1, device) without torchrun."""
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    # Only tallies travel, from the CPU; a process may wait for the slowest one's whole share of a dataset.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        if device == "cuda":
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
            torch.cuda.set_device(device)
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


def check_flags(args):
    """Raises InputError, naming the flag, for flags that do not go together."""
    if args.run is None:
        raise InputError("give the run directory that train.py left, such as: python eval.py runs/pat")
    if args.images is not None and args.images < 1:
        raise InputError(f"--images {args.images}: at least 1")
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is visible here; leave it out to use the CPU")
    scored = {"--compare": args.compare, "--data": args.data, "--dataset": args.dataset, "--names": args.names,
              "--images": args.images, "--rfid": args.rfid}
    if args.image is not None and any(scored.values()):
        raise InputError(f"--image segments one picture: leave {', '.join(scored)} out")
    photo = {"--labels": args.labels, "--out": args.out, "--none-of-these": args.none_of_these or None}
    if args.image is None and any(value is not None for value in photo.values()):
        raise InputError(f"{', '.join(k for k, v in photo.items() if v is not None)}: only together with --image FILE")
    if args.image is not None and (args.labels is None or args.out is None):
        raise InputError('--image also needs --labels "name, name" and --out out.png')
    if args.names and args.data is None:
        raise InputError("--names replaces the names of a dataset: give --data DIR with it")
    if args.ignore is not None and (args.data is None or args.dataset):
        raise InputError("--ignore is for a folder of your own: give it with --data DIR and without --dataset")
    if args.dataset:
        for name in args.dataset:
            if name != "all":
                load_vocabulary(name)
        if args.data is None:
            raise InputError("--dataset reads what you downloaded: give --data DIR with the archives")
        if args.compare:
            raise InputError("--dataset scores one run at a time: leave --compare out")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory that train.py left")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="further runs for the same table")
    parser.add_argument("--data", metavar="DIR", help="score on a folder with images/, labels/ and classes.txt")
    parser.add_argument("--dataset", nargs="+", metavar="NAME",
                        help=f"score on published datasets found in DIR instead: all, or some of {', '.join(DATASETS)}")
    parser.add_argument("--names", metavar="FILE", help="other names for the same classes, one a line in order of ids")
    parser.add_argument("--ignore", type=int, help="label value of your own DIR that means unlabelled (255)")
    parser.add_argument("--images", type=int, metavar="N", help="score on the first N images only")
    parser.add_argument("--rfid", metavar="WEIGHTS", help=f"also the rFID of the reconstructions, with {INCEPTION}")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--image", metavar="FILE", help="segment this picture instead of scoring")
    parser.add_argument("--labels", metavar="NAMES", help='its names, separated by commas: "red star, grass"')
    parser.add_argument("--out", metavar="OUT", help="where its overlay goes; the other pictures go beside it")
    parser.add_argument("--none-of-these", action="store_true",
                        help="pixels whose best name loses to the learned background stay unnamed")
    args = parse_flags(parser, argv)
    check_flags(args)
    with process_group(args.device) as (rank, processes, args.device):
        how = Pass(args.images, args.workers, rank, processes, Path(args.run) / "scores")
        (photo_command if args.image else published_command if args.dataset else score_command)(args, how)


if __name__ == "__main__":
    run_cli(main)
