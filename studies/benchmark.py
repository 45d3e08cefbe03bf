"""The long way through a dataset: the published sets, hours perhaps, on many processes, stopped and gone on with.

    python -m studies.benchmark RUN --dataset all --data DIR       the six published sets, as far as DIR holds them
    python -m studies.benchmark RUN --dataset voc20 --data DIR --images 100       a quick look at one
    python -m studies.benchmark RUN [--compare RUN ...] [--data DIR]              what eval.py does, the long way
    ... --rfid WEIGHTS                                             the reconstructions' rFID too, see rfid.py
    torchrun --nproc_per_node=2 -m studies.benchmark RUN ...       the same scores, from as many processes

What adds up over images (eval.Tally) is small and mostly whole numbers, so a pass can be cut anywhere and put together:

    matrix   (L+1,L+1) int64   the confusion matrix                        847 names: 5.5 MiB, however many images
    codes    (K+1) int64       per stage, see eval.count_tokens
    painted  (n,4) float64     PSNR, SSIM, L1, LPIPS of each image in its own row, so their order is always the same
    rfid.*   float64           sums of Inception's features (2,F) and of their products (2,F,F), exact; 64 MiB, if asked

Process r of R takes images r, r + R, r + 2R, ...  At the end the tallies are added up: the same integers, and the same
means of the same floats, as on one process (if each computes with as many threads: the model rounds by their number).

Every SAVE_EVERY images a process replaces its file RUN/scores/TITLE.r.safetensors, which also says whose tally it is:
weights, settings, names, dataset, number of images and of processes.  A pass that finds its own file goes on after the
images in it; where any of this has changed it says what, and starts anew.  Finished, a command forgets its tallies.

# ours: all of it.  SAN's evaluator counts the same matrix, in one go.

Tests: tests/studies/test_benchmark.py.  Read next: meaning.py.
"""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import safe_open
from tqdm import tqdm

from cli import InputError, parse_flags, run_cli, write_files
from data import names_checksum, read_classes
from eval import (Pass, absences, check_flags, evaluate, format_codebooks, format_rows, format_table, label_of,
                  open_runs, parser_of, rfid_missing, score_table, table_of, where_of)
from published.datasets import SETS, NotFound, open_dataset
from published.vocabulary import load_vocabulary
from runs import load_run
from studies.pictures import make_folder
from studies.report import leave
from studies.rfid import INCEPTION, Inception, load_inception

SAVE_EVERY = 50                                               # images of one process
RFID_IMAGES = 10_000                                          # what FID's authors recommend at the least


# --- a pass that can be shared out, stopped and gone on with --------------------------------------------------------


def save(tally, path, whose):
    """Replace the tally's file at once; `whose` is a dict of str."""
    content = safetensors.torch.save(tally.tensors, {"whose": json.dumps(whose), "done": str(tally.done)})
    write_files({path: content})


def load(tally, path, whose):
    """Take over into `tally` what the file at `path` holds -> "", or in words why it cannot be taken over."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            before, done = json.loads(metadata["whose"]), int(metadata["done"])
            changed = ", ".join(key for key in whose if before.get(key) != whose[key])
            if not changed:
                tally.tensors, tally.done = {key: file.get_tensor(key) for key in tally.tensors}, done
            return changed and f"{changed} changed since it was stopped"
    except Exception as error:                                # whatever the damage led safetensors or json to
        return f"its file is damaged ({type(error).__name__})"


def forget(folder, title):
    """Remove the tallies of a finished pass, and their folder if nothing else is in it."""
    for path in folder.glob(f"{title}.*.safetensors"):
        path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


@dataclass(frozen=True)
class SharedPass(Pass):
    """A pass of which this process does its share, and which keeps what it has; see the header."""

    rank: int = 0                      # this process is number `rank` ...
    processes: int = 1                 # ... of so many; above one, torch.distributed must be up, with gloo
    folder: Path | None = None         # where unfinished tallies are kept; None: nowhere

    def run(self, predict, dataset, tally, whose):
        n = len(tally.tensors["painted"])
        mine = range(self.rank, n, self.processes)
        if self.folder is not None:
            make_folder(self.folder)
            path = self.folder / f"{self.title}.{self.rank}.safetensors"
            whose = {**whose(), "dataset": dataset.key, "images": str(n), "processes": str(self.processes)}
            refused = load(tally, path, whose) if path.exists() else ""
            if self.rank == 0 and (refused or tally.done):
                tqdm.write(f"{self.title}: " + (f"starts anew: {refused}" if refused else
                                                f"goes on after {tally.done} of {len(mine)} images"))
        title = self.title + (f", process 1 of {self.processes}" if self.processes > 1 else "")
        share = replace(self, title=title, progress=self.progress and self.rank == 0)
        for _ in share.sweep(predict, dataset, tally, mine[tally.done:]):
            if self.folder is not None and tally.done % SAVE_EVERY == 0:
                save(tally, path, whose)
        if self.folder is not None:
            save(tally, path, whose)
        if self.processes > 1:
            for tensor in tally.tensors.values():
                dist.all_reduce(tensor)
        return tally


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


# --- rFID -----------------------------------------------------------------------------------------------------------


def inception_of(args, rank):
    """What --rfid asks for, or None without it; without its package too, which is said now, not hours later."""
    inception = args.rfid and load_inception(args.rfid, args.device)
    if args.rfid and inception is None and rank == 0:
        print("rFID will not be measured: pip install -r requirements-rfid.txt", file=sys.stderr)
    return inception


def rfid_lines(rows):
    """Of how many images a measured rFID is, and what that means; [] where none was measured."""
    images = [row["images"] for row in rows.values() if (row["reconstruction"] or {}).get("rFID") is not None]
    if not images:
        return []
    n = min(images)
    worth = f"rFID: {n} images against their reconstructions, at the size the network gets them."
    if n < RFID_IMAGES:
        worth += f"  Fewer than {RFID_IMAGES:,}: it comes out too high; compare it only with rFID of as many images."
    if n <= Inception.size:
        worth += f"  No more than its {Inception.size:,} features: the covariances are singular."
    return [worth]


# --- the world, or a folder of your own -----------------------------------------------------------------------------


def score_command(args, how):
    """`RUN [--compare RUN ...]`: eval.py's table and pictures, from a pass that can be stopped and shared out."""
    runs, tail = open_runs(args), f"-first-{args.images}" if args.images else ""
    how = replace(how, title=("world" if args.data is None else "folder") + tail)
    inception = inception_of(args, how.rank)
    table = score_table(runs, args.device, how, where_of(args), args.names, inception)
    table["notes"] += rfid_lines(table["rows"])
    if how.rank > 0:
        return
    model, _, dataset = next(iter(runs.values()))
    written = leave(args.run, model, dataset, table, args.images, args.device)
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
        return names, f"the {len(names)} names of {path} ({names_checksum(names)})"
    names = load_vocabulary("coco-stuff").names
    return names, f"COCO-Stuff's {len(names)} ({path.parent} does not say which names it was trained with)"


def open_published(args, clip, training):
    """({name: dataset}, {name: what it needs}) of the datasets asked for, at the sizes of `clip` (a CLIPConfig).

    Raises InputError where one that was asked for by name, or every one, is not there, and where one is broken.
    """
    every = "all" in args.dataset
    if args.names and (every or len(args.dataset) > 1):
        raise InputError("--names replaces the names of one dataset: give one --dataset with it")
    names = read_classes(Path(args.names)) if args.names else None
    opened, missing = {}, {}
    for name in SETS if every else dict.fromkeys(args.dataset):
        try:
            opened[name] = open_dataset(name, args.data, short_side=clip.short_side, long_side=clip.long_side,
                                        names=names, training=training)
        except NotFound as error:
            if not every:
                raise
            missing[name] = error.missing
    if not opened:
        raise InputError(f"{args.data}: none of the published datasets is there; python -m published.browse check "
                         f"{args.data} says what each needs")
    return opened, missing


def published_table(label, run, dataset, row, args, origin):
    """The table of one published dataset; see eval.table_of."""
    clip, name = run.net.clip, dataset.name
    notes = [f"seen: names that are, letter by letter, among {origin}.  unseen: the others."]
    if (clip.short_side, clip.long_side) != (640, 2560):
        notes.append(f"Images: short side {clip.short_side}, long side at most {clip.long_side}; the benchmarks': 640, "
                     "2560.")
    return {**table_of(run, dataset, args.data, {label: row}, notes, args.names), "dataset": name,
            "published_images": SETS[name].counts["val"], "published_checksum": load_vocabulary(name).checksum,
            "where": dataset.found.where, "training_names": origin}


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
    lines += rfid_missing(rows) + rfid_lines(rows) + absences(rows)
    lines += dict.fromkeys(note for table in tables.values() for note in table["notes"])
    return "\n".join(lines) + "\n"


def published_command(args, how):
    """`RUN --dataset all --data DIR`: a row per dataset, printed, and written into RUN/scores as it is done.

    NAME.txt and NAME.json hold one, published.txt all of `--dataset all`; with --images N, names end in -first-N.
    """
    model, run = load_run(args.run, args.device)
    training, origin = training_names(args.run)
    datasets, missing = open_published(args, run.net.clip, training)
    inception = inception_of(args, how.rank)
    label, tail, tables = label_of(model, args.run), f"-first-{args.images}" if args.images else "", {}
    for name, dataset in datasets.items():
        row = evaluate(model, dataset, device=args.device, how=replace(how, title=name + tail), inception=inception)
        table = tables[name] = published_table(label, run, dataset, row, args, origin)
        if how.rank == 0:
            text = json.dumps(table, indent=1, allow_nan=False)
            alone = format_published({name: table}, {}) + "".join(line + "\n" for line in format_codebooks({name: row}))
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


# --- the command line -----------------------------------------------------------------------------------------------


def check_dataset(args):
    """Raises InputError, naming the flag, for flags that do not go with --dataset."""
    if not args.dataset:
        return
    for name in args.dataset:
        if name != "all":
            load_vocabulary(name)
    if args.data is None:
        raise InputError("--dataset reads what you downloaded: give --data DIR with the archives")
    if args.compare:
        raise InputError("--dataset scores one run at a time: leave --compare out")
    if args.ignore is not None:
        raise InputError("--ignore is for a folder of your own: leave --dataset out")


def main(argv=None):
    parser = parser_of(__doc__.split("\n")[0])
    parser.add_argument("--dataset", nargs="+", metavar="NAME",
                        help=f"score on published datasets found in DIR: all, or some of {', '.join(SETS)}")
    parser.add_argument("--rfid", metavar="WEIGHTS", help=f"also the rFID of the reconstructions, with {INCEPTION}")
    args = parse_flags(parser, argv)
    check_dataset(args)
    check_flags(args)
    with process_group(args.device) as (rank, processes, args.device):
        how = SharedPass(args.images, args.workers, rank=rank, processes=processes, folder=Path(args.run) / "scores")
        (published_command if args.dataset else score_command)(args, how)


if __name__ == "__main__":
    run_cli(main)
