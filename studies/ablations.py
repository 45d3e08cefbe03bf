"""The paper's Table II on whatever you train on: switch one idea off at a time and see what breaks.

    python -m studies.ablations --seeds 3                                     the world, 16 rows x 3 seeds
    torchrun --nproc_per_node=2 -m studies.ablations --seeds 3 --out DIR      the same, two runs at a time
    python -m studies.ablations --rows                                        the rows and the paper's changes

Any flag of train.py may follow, but those that the rows and the seeds decide.
Each row is the default PAT with one change; the last is SAN, which has no tokens and no pixels.  Every run is an
ordinary one, DIR/ROW-SEED, made by `train`, so eval.py reads it too.  The command can be stopped at any time and given
again: finished runs are skipped, a half-done one goes on from its checkpoint.  Seed 0 of all rows comes first.

The budget is the same number of images for every row, steps * batch, the same ones in the same order for one seed.
It is not the same time: in the world a step of 8 scenes takes 0.3 s in SAN, 1.0 in PAT, 1.7 at scale (4,4,4) (two runs
at a time on two cores, one thread each), 15 s for the 16 rows together.  BUDGET is 300 steps, 2,400 scenes a run against
10,400 in the default run, and 300 test scenes, since (300 * 3 seeds * 15 s + 48 * 50 s of scoring and drawing) / 2 =
8,000 s: two and a quarter hours.  The schedule fits itself to the steps: warm-up 100, then poly decay to 0.

What is compared.  One row's change is its mean over seeds minus the default's, beside the change of the same row in the
paper (EVA-CLIP ViT-B/16; mIoU on Pascal Context 59 and ADE20K 150 in points, rFID).  The numbers cannot be compared:
other data, another CLIP, 600 times fewer images, and PSNR measures pixels where rFID measures statistics of Inception
features.  Directions can, `verdict` says when; masks by mIoU over all names against the mean of PC59 and A150, pixels
by PSNR (higher is better) against rFID (lower is better).

DIR/table.txt, table.md and table.json are written anew after each run, from all runs that are finished by then.

# paper: the rows (PAT.ABLATIONS says what each changes) and their numbers.
# ours: which stages "one, two, three removed" are (early first), the verdict, the budget.

Tests: tests/studies/test_ablations.py.  Read next: speed.py.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr

from cli import InputError, parse_flags, run_cli, write_files
from eval import METRICS, mean
from guards.starting import same_run
from runs import CHECKPOINTS, changed, closest, filled, flat, model_class
from train import load_training, parse, parser_of, recipe, train

BUDGET = dict(steps=300, val_images=300)                      # of a run in the world, unless flags say otherwise


@dataclass(frozen=True)
class Row:
    """One row of Table II."""

    name: str                                                 # its runs are DIR/NAME-SEED
    label: str
    paper: tuple                                              # mIoU on PC59 and A150 in percent, rFID; None = not given
    changes: dict                                             # numbers of the config that differ from the default


CHANGES = {"pat": {}, **model_class("pat").ABLATIONS, "san": {"model": "san"}}
TOLD = {                                                      # label, and the paper's numbers
    "pat": ("PAT", (57.9, 31.6, 13.8)),
    "no-vmf": ("no vMF mean-shift", (53.0, 27.6, 21.6)),
    "scales-4-4-4": ("scale (4,4,4)", (57.1, 30.9, 12.4)),
    "scales-1-1-1": ("scale (1,1,1)", (54.5, 28.7, 14.4)),
    "no-align": ("no spatial alignment", (57.1, 31.0, 15.2)),
    "no-mixer": ("no TokenMixer", (55.4, 29.6, 12.9)),
    "no-residual": ("no pixel residual", (53.9, 27.1, 33.6)),
    "unified": ("unified tokens", (47.4, 26.0, 52.4)),
    "separate-decoders": ("separate decoding", (57.5, 31.2, 13.7)),
    "one-stage-removed": ("one stage removed", (56.6, 30.8, 25.1)),
    "two-stages-removed": ("two stages removed", (56.2, 29.1, 31.2)),
    "three-stages-removed": ("three stages removed", (55.8, 28.5, 45.8)),
    "san": ("SAN, the baseline", (55.1, 30.4, None))}
AGAIN = {                              # a second reading of a row that the paper only names, and which one it reads
    "no-vmf-dot": ("no vMF: dot product", "no-vmf"), "only-early-mid": ("late stage removed", "one-stage-removed"),
    "only-early": ("mid, late removed", "two-stages-removed")}
TOLD.update({name: (label, TOLD[row][1]) for name, (label, row) in AGAIN.items()})
OURS = (None, None, None)                                     # a row that the paper does not have
ROWS = tuple(Row(name, *TOLD.get(name, (name, OURS)), changes) for name, changes in CHANGES.items())
PAPER = ("PC59", "A150", "rFID")
MEASURES = {key: METRICS[key] for key in ("mIoU_seen", "mIoU_unseen", "mIoU", "PSNR", "L1")}      # title, decimals


def difference(a, b):
    return None if a is None or b is None else a - b


def paper_change(row):
    """{"PC59", "A150", "rFID"}: the row minus the paper's PAT, to its one decimal; None where it gives none."""
    changes = (difference(value, default) for value, default in zip(row.paper, ROWS[0].paper))
    return {title: None if change is None else round(change, 1) for title, change in zip(PAPER, changes)}


def paper_direction(row):
    """Of "masks" and "pixels" the paper's change, > 0 is better; None where it gives none."""
    change = paper_change(row)
    masks = None if None in (change["PC59"], change["A150"]) else change["PC59"] + change["A150"]
    return {"masks": masks, "pixels": difference(0, change["rFID"])}                          # a lower rFID is better


def verdict(values, default, paper):
    """Does a change go the paper's way?  "agree", "disagree", "within the spread", or "-" if it cannot be said.

    values, default: one number a seed, of the row and of PAT, higher is better; paper: its change, > 0 is better.
    The ranges from lowest to highest seed must not overlap or touch, else the change is within the spread.  Two equal
    models with three seeds each separate by chance one time in ten (2 of the 20 orders of six numbers), with two seeds
    each one time in three; with one seed there is no spread, so nothing is said.
    """
    if paper is None or min(len(values), len(default)) < 2:
        return "-"
    if min(values) > max(default):
        return "agree" if paper > 0 else "disagree"
    if max(values) < min(default):
        return "agree" if paper < 0 else "disagree"
    return "within the spread"


def correlation(rows, part):
    """Spearman's rank correlation of our changes with the paper's, of "masks" or "pixels", PAT's 0 among them.

    rows {name: dict} of `tabulate`.  -> with the rows as the paper's are read first, with the readings of AGAIN instead;
    None for fewer than three rows that have both, or equal ones.  1: the same order, 0: none, -1: the opposite.
    """
    key, found = {"masks": "mIoU", "pixels": "PSNR"}[part], []
    instead = {row: name for name, (_, row) in AGAIN.items()}
    for read in ({}, instead):
        pairs = [(rows[read.get(row.name, row.name)]["change"][key], paper_direction(row)[part])
                 for row in ROWS if row.name not in AGAIN and read.get(row.name, row.name) in rows]
        columns = [*zip(*(pair for pair in pairs if None not in pair))]
        told = columns and len(columns[0]) > 2 and all(len(set(column)) > 1 for column in columns)
        found.append(float(spearmanr(*columns).statistic) if told else None)
    return found


# --- the runs -------------------------------------------------------------------------------------------------------


def jobs(seeds, rank=0, processes=1, only=()):
    """What process `rank` of `processes` trains, [(row, seed)]: all rows of seed 0 first, dealt out in turn.

    only: names of rows; () for all.
    """
    return [(row, seed) for seed in range(seeds) for row in ROWS if not only or row.name in only][rank::processes]


def run_path(base, row, seed):
    return Path(base.recipe.out or f"runs/{base.run.preset}-ablations") / f"{row.name}-{seed}"


def run_config(base, row, seed):
    """The Training of one run: the numbers of `base` that its model has, and this row's changes."""
    numbers = {**flat(base), **row.changes}
    config = filled(recipe(base.run.preset, numbers["model"]), numbers)
    return changed(config, seed=seed, out=str(run_path(base, row, seed)))


def check_run(config):
    """Raises InputError if the run directory holds a run of other settings; what has no checkpoint yet is no run."""
    run = Path(config.recipe.out)
    kept = any((run / name).exists() for name in (CHECKPOINTS[0], "scores.json", "failed.txt"))
    if not kept or not (run / "config.json").exists():        # a run that failed before its first step has no settings
        return
    same_run(run, load_training(run), config)


def result(run, measures=MEASURES):
    """What a run came to: {measure: value} if finished, its error as a str if it failed, None if neither yet.

    Raises InputError if scores.json is damaged.
    """
    path = run / "scores.json"
    if (run / "failed.txt").exists():
        return (run / "failed.txt").read_text(encoding="utf-8").strip()
    if not path.exists():
        return None
    try:
        row = next(iter(json.loads(path.read_text(encoding="utf-8"))["rows"].values()))       # the run itself is first
        scores = {**row["segmentation"], **(row["reconstruction"] or {})}
    except (ValueError, KeyError, StopIteration, TypeError) as error:
        raise InputError(f"{path}: not the scores of a run; remove it, and the run is scored again") from error
    return {key: scores[key] for key in measures if scores.get(key) is not None}


def own_device(device):
    """(rank, processes, device) of this process, if torchrun started several that each train runs of their own."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":                                      # several processes may share a GPU
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    elif processes > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    return rank, processes, device


def ablate(base, seeds, train, device="cpu", only=()):
    """Train every row, or those called `only`, with seeds 0..seeds-1, and write the table; of many processes that torchrun
    started, this one's share.

    base: the Training of the default row; train(config, resume, device): trains one run and leaves scores.json.  Each run
    has one process to itself, no process group is made.  Raises InputError for runs of other settings in the same
    place, before anything is trained.  A run whose loss is no longer finite is marked failed, and the rest goes on.
    """
    rank, processes, device = own_device(device)
    for row, seed in jobs(seeds, only=only):
        check_run(run_config(base, row, seed))
    mine, trained = jobs(seeds, rank, processes, only), 0
    if not mine:                                              # more processes than runs
        return
    for i, (row, seed) in enumerate(mine, 1):
        config = run_config(base, row, seed)
        run = Path(config.recipe.out)
        if result(run) is not None:
            continue
        print(f"process {rank}: run {i} of its {len(mine)} ({len(jobs(seeds, only=only))} in all): {row.label}, seed {seed}",
              flush=True)
        try:
            train(config, (run / "checkpoint.safetensors").exists(), device)
        except InputError as error:
            if not isinstance(error.__cause__, FloatingPointError):                           # the user's to mend
                raise
            run.mkdir(parents=True, exist_ok=True)            # it may have failed before there was anything to write
            write_files({run / "failed.txt": f"{error}\n"})
            print(f"failed: {error}", flush=True)
        trained += 1
        table = write_table(base, seeds)
    if not trained:
        table = write_table(base, seeds)
    complete = all(row["finished"] + len(row["failed"]) == seeds for row in table["rows"].values())
    if rank == 0 or trained and complete:                     # or the last one to finish
        print(format_text(table) + f"written: table.txt, table.md and table.json in {run.parent}")


# --- the table ------------------------------------------------------------------------------------------------------


def tabulate(base, seeds):
    """The table as numbers, from whatever runs are there, ready for JSON.

    -> dict: the budget, and rows {name: dict}: finished (how many seeds), failed {seed: error}, values {measure: one a
    seed}, their mean, lowest, highest and change against PAT {measure: number or None}, the paper's numbers and its
    changes, and the two verdicts masks and pixels.
    """
    rows = {}
    for row in ROWS:
        results = {seed: result(run_path(base, row, seed)) for seed in range(seeds)}
        done = [scores for scores in results.values() if isinstance(scores, dict)]
        values = {key: [scores[key] for scores in done if key in scores] for key in MEASURES}
        rows[row.name] = {
            "label": row.label, "changes": row.changes, "finished": len(done), "values": values,
            "failed": {seed: error for seed, error in results.items() if isinstance(error, str)},
            "mean": {key: mean(of) for key, of in values.items()},
            "lowest": {key: min(of, default=None) for key, of in values.items()},
            "highest": {key: max(of, default=None) for key, of in values.items()},
            "paper": dict(zip(PAPER, row.paper)), "paper_change": paper_change(row)}
    default = rows[ROWS[0].name]
    for row in ROWS:
        told, paper = rows[row.name], paper_direction(row)
        told["change"] = {key: difference(told["mean"][key], default["mean"][key]) for key in MEASURES}
        for name, key in (("masks", "mIoU"), ("pixels", "PSNR")):
            said = verdict(told["values"][key], default["values"][key], paper[name])
            told[name] = "-" if told is default else said
    r = base.recipe
    return {"steps": r.steps, "batch": r.batch, "seeds": seeds, "test_images": r.val_images, "rows": rows,
            "rank_correlation": {part: correlation(rows, part) for part in ("masks", "pixels")}}


def short(value, decimals, sign=""):
    """.644 rather than 0.644, with `sign` "+" a sign before it; a dash for None."""
    if value is None:
        return "-"
    text = f"{value:{sign}.{decimals}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and decimals > 2 else text


def texts_of(row, seeds):
    """A row's parts as lists of str: label and seeds, measured, changes, the paper's changes, verdicts."""
    counted = f"{row['finished']}/{seeds}" + (f", {len(row['failed'])} failed" if row["failed"] else "")
    measured, changes, default = [], [], row["label"] == ROWS[0].label
    for key, (_, n) in MEASURES.items():
        middle, low, high = (short(row[part][key], n) for part in ("mean", "lowest", "highest"))
        measured.append("-" if middle == "-" else f"{middle} ({low}-{high})")
        changes.append("-" if default else short(row["change"][key], n, "+"))
    paper = ["-" if default else short(change, 1, "+") for change in row["paper_change"].values()]
    return [row["label"], counted], measured, changes, paper, [row["masks"], row["pixels"]]


TITLES = [title for title, _ in MEASURES.values()]


def notes(table):
    """The lines that belong under the table."""
    images = table["steps"] * table["batch"]
    lines = [f"Every run saw {images:,} images ({table['steps']:,} steps of {table['batch']}) and was scored on up to "
             f"{table['test_images']}.  Mean (lowest-highest) over seeds.",
             "Changes are against PAT; the paper's in points of mIoU and in rFID, where lower is better.",
             "Masks (mIoU against PC59 and A150), pixels (PSNR against rFID): do the two changes have one direction?",
             "\"Within the spread\": the seeds of the row and of PAT overlap."]
    for part, (first, again) in table["rank_correlation"].items():
        if first is not None:
            lines.append(f"Rank correlation with the paper's changes, {part}: {first:+.2f}" +
                         (f"; with the second readings {again:+.2f}" if again not in (None, first) else ""))
    return lines + [f"Failed: {name}, seed {seed}: {error}" for name, row in table["rows"].items()
                    for seed, error in row["failed"].items()]


def format_text(table):
    """The table in two parts, each 120 wide unless a run failed: what was measured, and the changes."""
    parts = [["", "seeds", *TITLES]], [["change against PAT", *TITLES, *PAPER, "masks", "pixels"]]
    for row in table["rows"].values():
        head, measured, changes, paper, verdicts = texts_of(row, table["seeds"])
        parts[0].append([*head, *measured])
        parts[1].append([head[0], *changes, *paper, *verdicts])
    lines = []
    for part in parts:
        widths = [max(map(len, column)) for column in zip(*part)]
        lines += ["  ".join(f"{cell:{'<' if k == 0 else '>'}{w}}" for k, (cell, w) in enumerate(zip(line, widths)))
                  for line in part] + [""]
    return "\n".join(line.rstrip() for line in lines + notes(table)) + "\n"


def format_markdown(table):
    """The whole in one table; behind a mean and its range stands the change."""
    lines = [["", "seeds", *TITLES, *(f"paper's {title}" for title in PAPER), "masks", "pixels"]]
    lines.append(["---"] * len(lines[0]))
    for row in table["rows"].values():
        head, measured, changes, paper, verdicts = texts_of(row, table["seeds"])
        behind = ["" if change == "-" else f" {change}" for change in changes]
        lines.append([*head, *(m + c for m, c in zip(measured, behind)), *paper, *verdicts])
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + ["", *notes(table)]) + "\n"


def write_table(base, seeds):
    """table.txt, table.md and table.json from all runs there are; returns the table."""
    place, written = run_path(base, ROWS[0], 0).parent, None
    # Another process may finish a run between our reading and our writing, and our older table replace its newer one:
    # so look again after writing, until what stands there is what there is.
    while (table := tabulate(base, seeds)) != written:
        write_files({place / "table.txt": format_text(table), place / "table.md": format_markdown(table),
                     place / "table.json": json.dumps(table, indent=1, allow_nan=False) + "\n"})
        written = table
    return table


# --- the command ----------------------------------------------------------------------------------------------------


def print_rows():
    """The rows, the paper's changes, and what differs."""
    for row in ROWS:
        moved = "  ".join(f"{key} {short(value, 1, '+'):>5}" for key, value in paper_change(row).items())
        print(f"{row.label:20}  {moved}  {row.changes or ''}")


def check_flags(named, config):
    """Raises InputError for a flag of train.py that the rows or the seeds of an ablation decide.

    named: which numbers the command line names; config: the Training that it makes.
    """
    numbers = flat(config)
    decided = [name for name in ("seed", "stop_at") if name in named]
    decided += [name for row in ROWS for name, value in row.changes.items() if numbers.get(name) == value]
    if config.run.model != ROWS[0].name:                      # which has none of these numbers
        decided = ["model"]
    if decided:
        raise InputError(f"studies.ablations sets {decided[0].replace('_', ' ')} itself; leave that flag out")


def parse_ablations(argv=None):
    """(Training of the default row, device, number of seeds, whether --rows is asked for, which rows) from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, exit_on_error=False,
                                     epilog="Any flag of train.py may follow.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 of each row (3)")
    parser.add_argument("--only", metavar="ROWS", default="", help="names of rows, separated by commas; the others stay as they are")
    parser.add_argument("--rows", action="store_true", help="print the rows and the paper's changes, train nothing")
    try:
        args, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; see --help") from error
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: takes a positive number")
    only = tuple(filter(None, args.only.split(",")))
    for name in only:
        if name not in CHANGES:
            raise InputError(f"--only {name}: there are {', '.join(CHANGES)}{closest(name, CHANGES)}")
    if any(word.split("=")[0] == "--resume" for word in rest):
        raise InputError("studies.ablations goes on by itself where it stopped; leave out --resume")
    config, _, device = parse(rest)
    given = vars(parse_flags(parser_of(), rest))              # train.py's flags; None: was not typed
    named = {name for name, text in given.items() if text is not None}
    named |= {pair.partition("=")[0].strip().replace("-", "_") for pair in given["set"]}
    check_flags(named, config)
    if config.run.preset == "world":
        config = changed(config, **{name: number for name, number in BUDGET.items() if name not in named})
    return config, device, args.seeds, args.rows, only


def main(argv=None):
    config, device, seeds, rows_only, only = parse_ablations(argv)
    if rows_only:
        return print_rows()
    ablate(config, seeds, train, device, only)


if __name__ == "__main__":
    run_cli(main)
