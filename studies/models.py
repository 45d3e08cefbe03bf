"""The README's table of models: every model with several seeds, over the same scenes and in the same seconds.

    python -m studies.models --seeds 3                            PAT, SAN and dense in runs/world-models
    python -m studies.models --seeds 3 --models pat,fgaseg        others; rows that are there already stay
    torchrun --nproc_per_node=2 -m studies.models --seeds 3       the same, two runs at a time

The first model is the measure.  "Same scenes": each model in its own recipe, with as many steps as makes as many scenes as
the first sees.  "Same seconds": the other models again, with as many steps as fit into the time the first one took, by
the median ms_per_step of the logs of seed 0; once such a run exists, its own steps hold.  Any flag of train.py may follow.

Each run is an ordinary one, made by train.py, in DIR/MODEL-SEED or DIR/MODEL-seconds-SEED.  The command can be stopped at
any time and given again: finished runs are skipped, a half-done one goes on from its checkpoint.  After each run table.txt
and table.json are written anew: mean and range of each score, mIoU with the true names on a model's masks (oracle.py)
where it has masks, MaskCLIP and chance from the first run's table.  Call a difference one where the ranges do not touch.

Tests: tests/studies/test_models.py.  Read next: seeds.py.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from cli import InputError, run_cli, write_files
from eval import METRICS
from published.images_of import scored_on
from runs import MODELS, changed, closest, filled, flat, load_run, read_config
from studies.ablations import check_run, own_device, result, short
from studies.oracle import oracle
from studies.seeds import tabulate
from train import Recipe, parse, recipe, train

COLUMNS = ("mIoU_seen", "mIoU_unseen", "mIoU_stuff", "foreground_accuracy", "PSNR")
ORACLE = 300                                                  # scenes asked for true names
BASELINES = ("MaskCLIP, no training", "chance")               # of the first run's table


def log_of(run):
    """The lines of log.jsonl of a finished run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def seconds(run):
    """How long the steps of a finished run took: its steps times the median ms_per_step, in seconds."""
    lines = log_of(run)
    return (lines[-1]["step"] + 1) * median(line["ms_per_step"] for line in lines) / 1000


def configs(base, name, seed, place, timed):
    """The Training of one run of a model: the flags' numbers where it has them, its own recipe else.

    timed: None for the same scenes, or (the first model's run, this model's run) of seed 0: then the same seconds.
    """
    numbers = {key: value for key, value in flat(base).items() if value != flat(recipe(base.run.preset, base.run.model))[key]}
    config = recipe(base.run.preset, name)
    have = flat(config)
    config = changed(config, **{key: value for key, value in numbers.items() if key in have and key != "model"})
    scenes, batch = base.recipe.steps * base.recipe.batch, config.recipe.batch
    out = place / f"{name}{'-seconds' * (timed is not None)}-{seed}"
    if timed is None:
        steps = max(1, round(scenes / batch))
    else:
        first = place / f"{name}-seconds-0"
        if (first / "config.json").exists():
            steps = filled(Recipe(), read_config(first)).steps
        else:
            measure, own = timed
            steps = max(1, round(seconds(measure) / seconds(own) * (log_of(own)[-1]["step"] + 1)))
    return changed(config, steps=steps, seed=seed, out=str(out))


def true_names(run):
    """mIoU with the true names on the masks of a finished run, kept in its oracle.json; None for a model without masks."""
    path = run / "oracle.json"
    if not path.exists():
        model, config = load_run(run)
        try:
            found = oracle(model, scored_on(config, ORACLE)[0], ORACLE, progress=False)
        except InputError:                                    # it scores every name at every pixel
            return None
        write_files({path: json.dumps({str(run): found}, indent=1, allow_nan=False) + "\n"})
    return next(iter(json.loads(path.read_text()).values()))["oracle names"]["mIoU"]


def row_of(place, name, seeds):
    """{score: dict} of `seeds.tabulate` over the finished seeds of a row, with "oracle" among them; {} without any."""
    runs = {seed: place / f"{name}-{seed}" for seed in range(seeds)}
    found = {seed: result(run, METRICS) for seed, run in runs.items()}
    found = {seed: scores for seed, scores in found.items() if scores}
    table = tabulate(found)
    masks = {seed: value for seed in found if (value := true_names(runs[seed])) is not None}
    if masks:
        table["oracle"] = {"values": masks, "mean": sum(masks.values()) / len(masks), "lowest": min(masks.values()),
                           "highest": max(masks.values())}
    return table


def tabulate_models(place, names, seeds):
    """{row: {"scores", "steps", "seconds"}}, and {baseline: scores} of the first model's first run."""
    rows = {}
    for name in [*names, *(f"{name}-seconds" for name in names[1:])]:
        scores, first = row_of(place, name, seeds), place / f"{name}-0"
        if scores:
            done = next(place / f"{name}-{seed}" for seed in next(iter(scores.values()))["values"])
            rows[name] = {"scores": scores, "steps": filled(Recipe(), read_config(done)).steps, "seconds": seconds(done)}
    first, untrained = place / f"{names[0]}-0" / "scores.json", {}
    if first.exists():
        told = json.loads(first.read_text())["rows"]
        untrained = {name: told[name]["segmentation"] for name in BASELINES if name in told}
    return {"rows": rows, "untrained": untrained}


def format_models(table, seeds):
    """The table as text: mean (lowest-highest) over the seeds that are finished."""
    titles = [METRICS[key][0] for key in COLUMNS]
    titles.insert(1, "true names")
    lines = [f"{'':24}{'seeds':>6}{'steps':>7}{'seconds':>9}  " + " ".join(f"{title:>18}" for title in titles)]
    keys = [COLUMNS[0], "oracle", *COLUMNS[1:]]
    for name, row in table["rows"].items():
        texts = []
        for key in keys:
            one, n = row["scores"].get(key), 3 if key == "oracle" else METRICS[key][1]
            texts.append("-" if one is None else "{} ({}-{})".format(*(short(one[part], n)
                                                                       for part in ("mean", "lowest", "highest"))))
        counted = len(next(iter(row["scores"].values()))["values"])
        lines.append(f"{name:24}{f'{counted}/{seeds}':>6}{row['steps']:>7}{row['seconds']:>9.0f}  "
                     + " ".join(f"{text:>18}" for text in texts))
    for name, scores in table["untrained"].items():
        texts = [short(scores.get(key), 3) for key in keys]
        lines.append(f"{name:46}  " + " ".join(f"{text:>18}" for text in texts))
    lines += ["", f"true names: mIoU over all names of the first {ORACLE} images, the model's masks under their true names.",
              "NAME-seconds: as long as the first model trains; the others see the same scenes."]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def train_models(base, names, seeds, train, device="cpu"):
    """Train every row with seeds 0..seeds-1, this process's share of them, and write the table after each run.

    train(config, resume, device) trains one run and leaves scores.json.  A row in the same seconds waits for the first
    model's and its own run of seed 0.  Raises InputError for runs of other settings in the same places.
    """
    rank, processes, device = own_device(device)
    place = Path(base.recipe.out or f"runs/{base.run.preset}-models")
    jobs = [(name, seed, False) for seed in range(seeds) for name in names]
    jobs += [(name, seed, True) for seed in range(seeds) for name in names[1:]]
    for name, seed, in_seconds in jobs[rank::processes]:
        timed = (place / f"{names[0]}-0", place / f"{name}-0") if in_seconds else None
        if timed and not all((run / "scores.json").exists() for run in timed):
            print(f"{name} in the same seconds, seed {seed}: waits for {timed[0]} and {timed[1]}; give the command again")
            continue
        config = configs(base, name, seed, place, timed)
        check_run(config)
        run = Path(config.recipe.out)
        if result(run, METRICS) is None:
            train(config, (run / "checkpoint.safetensors").exists(), device)
        table = tabulate_models(place, names, seeds)
        write_files({place / "table.txt": format_models(table, seeds), place / "table.json": json.dumps(table, indent=1) + "\n"})
    print(f"{format_models(tabulate_models(place, names, seeds), seeds)}written: table.txt and table.json in {place}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, exit_on_error=False,
                                     epilog="Any flag of train.py may follow.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 of each row (3)")
    parser.add_argument("--models", default="pat,san,dense", metavar="NAMES", help="the first is the measure (pat,san,dense)")
    try:
        args, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; see --help") from error
    names = tuple(filter(None, args.models.split(",")))
    for name in names:
        if name not in MODELS:
            raise InputError(f"--models {name}: there are {', '.join(MODELS)}{closest(name, MODELS)}")
    config, resume, device = parse([*rest, "--model", names[0]] if names else rest)
    if args.seeds < 1 or not names or len(set(names)) < len(names):
        raise InputError("--seeds takes a positive number, and --models each name once")
    if resume or config.recipe.stop_at or config.run.seed:
        raise InputError("studies.models goes on by itself and counts seeds itself; leave out --resume, --stop-at, --seed")
    train_models(config, names, args.seeds, train, device)


if __name__ == "__main__":
    run_cli(main)
