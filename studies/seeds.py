"""One run says little: N that differ in nothing but their seed, and their mean.

    python -m studies.seeds --seeds 3 --model san                  runs/world-san-0, -1 and -2, and what they come to
    python -m studies.seeds --seeds 3 --ablate no-mixer --out runs/no-mixer        runs/no-mixer-0, -1 and -2
    torchrun --nproc_per_node=2 -m studies.seeds --seeds 4         the same, two runs at a time

Any flag of train.py may follow.  Seeds count on from --seed.  Each run is an ordinary one, made by train.py, so
everything else reads it too.  The command can be stopped at any time and given again: finished runs are skipped, a
half-done one goes on from its checkpoint.  At the end, and after each run, the table is printed and left as
runs/world-san-seeds.txt and .json: every score of every seed, the mean, the lowest and the highest.  Compare means, and
call a difference one where the ranges do not touch.

Tests: tests/studies/test_seeds.py.  Read next: ablations.py, which does the same for every row of Table II.
"""

import argparse
import json
from pathlib import Path

from cli import InputError, run_cli, write_files
from eval import METRICS, mean
from runs import changed
from studies.ablations import check_run, own_device, result
from train import parse, train


def stem_of(config):
    """The place of the runs, to which a dash and the seed are added."""
    return config.recipe.out or f"runs/{config.run.preset}-{config.run.model}"


def tabulate(found):
    """{seed: {score: value}} -> {score: {"values": {seed: value}, "mean", "lowest", "highest"}}, in eval.py's order."""
    table = {}
    for key in METRICS:
        values = {seed: scores[key] for seed, scores in found.items() if key in scores}
        if values:
            table[key] = {"values": values, "mean": mean(list(values.values())), "lowest": min(values.values()),
                          "highest": max(values.values())}
    return table


def format_seeds(table):
    """The table as text: a line a score."""
    seeds = list(dict.fromkeys(seed for line in table.values() for seed in line["values"]))
    titles = [*(f"seed {seed}" for seed in seeds), "mean", "lowest", "highest"]
    lines = [" " * 14 + " ".join(f"{title:>9}" for title in titles)]
    for key, line in table.items():
        title, decimals = METRICS[key]
        numbers = [*(line["values"].get(seed) for seed in seeds), line["mean"], line["lowest"], line["highest"]]
        texts = ["-" if number is None else f"{number:.{decimals}f}" for number in numbers]
        lines.append(f"{title:14}" + " ".join(f"{text:>9}" for text in texts))
    return "\n".join(lines) + "\n"


def train_seeds(config, seeds, train, device="cpu"):
    """Train `config` with `seeds` seeds from its own on, this process's share of them; leaves the table after each.

    train(config, resume, device) trains one run and leaves scores.json.  Raises InputError for runs of other settings in
    the same places, before anything is trained.
    """
    rank, processes, device = own_device(device)
    stem, first = stem_of(config), config.run.seed
    configs = {seed: changed(config, seed=seed, out=f"{stem}-{seed}") for seed in range(first, first + seeds)}
    for one in configs.values():
        check_run(one)
    for seed in [*configs][rank::processes]:
        run = Path(configs[seed].recipe.out)
        if result(run) is None:
            train(configs[seed], (run / "checkpoint.safetensors").exists(), device)
        results = {seed: result(Path(one.recipe.out), METRICS) for seed, one in configs.items()}
        table = tabulate({seed: scores for seed, scores in results.items() if scores})
        write_files({f"{stem}-seeds.txt": format_seeds(table), f"{stem}-seeds.json": json.dumps(table, indent=1) + "\n"})
        print(f"{stem}-{first} to -{first + seeds - 1}, {sum(map(bool, results.values()))} of {seeds} finished\n"
              f"{format_seeds(table)}written: {stem}-seeds.txt and .json", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, exit_on_error=False,
                                     epilog="Any flag of train.py may follow.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many, from --seed on (3)")
    try:
        args, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; see --help") from error
    config, resume, device = parse(rest)
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: takes a positive number")
    if resume or config.recipe.stop_at:
        raise InputError("studies.seeds goes on by itself where it stopped; leave out --resume and --stop-at")
    train_seeds(config, args.seeds, train, device)


if __name__ == "__main__":
    run_cli(main)
