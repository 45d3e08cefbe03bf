"""Table II: its thirteen rows, what each changes, when a direction agrees, and that no run is trained twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from cli import InputError
from pat import PAT
from runs import build, flat
from san import trainable
from studies import ablations
from studies.ablations import (AGAIN, OURS, ROWS, Row, ablate, check_run, format_markdown, format_text, jobs,
                               paper_change, parse_ablations, run_config, tabulate, verdict)
from tests.helpers import tiny
from train import Training, parse, recipe

ROOT = Path(__file__).parent.parent.parent
ROW = {row.name: row for row in ROWS}


def base(out, **changes):
    return tiny(**{"steps": 2, "batch": 2, "out": str(out), **changes})


def finished(config, **scores):
    """The files a finished run leaves that the table reads; `scores` by eval.py's keys."""
    run = Path(config.recipe.out)
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(flat(config)))
    painted = {key: scores.pop(key) for key in ("PSNR", "L1") if key in scores}
    row = {"segmentation": scores, "reconstruction": painted or None}
    chance = {"segmentation": {"mIoU": 0.0}, "reconstruction": None}
    (run / "scores.json").write_text(json.dumps({"rows": {"PAT somewhere": row, "chance": chance}}))


def refuse(config, resume, device):
    raise AssertionError(f"{config.recipe.out} is trained again")


# --- the rows ---


def test_the_rows_are_the_thirteen_of_table_two_and_three_read_again():
    assert [row.name for row in ROWS] == [
        "pat", "no-vmf", "no-vmf-dot", "scales-4-4-4", "scales-1-1-1", "no-align", "no-mixer", "no-residual", "unified",
        "separate-decoders", "one-stage-removed", "two-stages-removed", "three-stages-removed",
        "only-early-mid", "only-early", "san"]
    assert len({str(row.changes) for row in ROWS}) == len({row.label for row in ROWS}) == 16
    assert all(ROW[name].paper == ROW[row].paper for name, (_, row) in AGAIN.items()) and len(AGAIN) == 3
    assert {row.name: row.changes for row in ROWS[1:-1]} == PAT.ABLATIONS                 # told there, and only there
    assert OURS not in {row.paper for row in ROWS}


@pytest.mark.parametrize("name, flags", [
    ("pat", []), ("no-vmf", ["--set", "metric=euclidean"]), ("no-vmf-dot", ["--set", "metric=dot"]),
    ("scales-4-4-4", ["--set", "scales=4,4,4"]),
    ("scales-1-1-1", ["--set", "scales=1,1,1"]), ("no-align", ["--set", "align=none"]),
    ("no-mixer", ["--set", "mixer=false"]), ("no-residual", ["--set", "residual=false"]),
    ("unified", ["--set", "unified=true"]), ("separate-decoders", ["--set", "separate_decoders=true"]),
    ("one-stage-removed", ["--set", "decoder_stages=mid,late"]), ("two-stages-removed", ["--set", "decoder_stages=late"]),
    ("three-stages-removed", ["--set", "decoder_stages="]), ("only-early-mid", ["--set", "decoder_stages=early,mid"]),
    ("only-early", ["--set", "decoder_stages=early"]), ("san", ["--model", "san"])])
def test_a_row_is_the_run_of_its_one_flag(name, flags, tmp_path):
    """The config of a row's run equals the one parsed from the flag, and from --ablate, every field of it."""
    default, *_ = parse(["--out", str(tmp_path)])
    for given in [flags, ["--ablate", name]] if name in PAT.ABLATIONS else [flags]:
        alone, *_ = parse([*given, "--out", str(tmp_path / f"{name}-7"), "--seed", "7"])
        assert run_config(default, ROW[name], 7) == alone


def test_a_row_keeps_the_numbers_that_were_asked_for_and_that_its_model_has(tmp_path):
    """--lr and --set points reach all rows, --set kappa all that have one."""
    default, *_ = parse(["--out", str(tmp_path), "--lr", "0.5", "--set", "points=7", "--set", "kappa=9"])
    for row in ROWS:
        numbers = flat(run_config(default, row, 1))
        assert (numbers["lr"], numbers["points"], numbers.get("kappa")) == (0.5, 7, None if row.name == "san" else 9.0)


def test_a_row_that_the_paper_does_not_have_is_drawn_without_its_numbers(tmp_path, monkeypatch):
    """An ablation of your own in PAT.ABLATIONS: measured, changes against PAT, dashes for the paper's and no verdict."""
    own = Row("half-kappa", "half-kappa", OURS, {"kappa": 15.0})
    monkeypatch.setattr(ablations, "ROWS", (ROW["pat"], own))
    for row, seed in ((row, seed) for row in ablations.ROWS for seed in range(2)):
        finished(run_config(base(tmp_path), row, seed), mIoU=0.5 + seed / 9, PSNR=20.0)
    told = tabulate(base(tmp_path), 2)["rows"]["half-kappa"]
    assert (told["masks"], told["pixels"], told["change"]["mIoU"]) == ("-", "-", 0)
    assert set(told["paper_change"].values()) == {None}
    assert "half-kappa" in format_text(tabulate(base(tmp_path), 2))


def claims(model):
    """What a model of the world is made of, each number named by what it tells."""
    c = model.config
    names = [name for name, _ in model.named_parameters()]
    scales = c.scales if model.stages else ()
    return {"vmf attention": any("hsattn" in n for n in names) and type(model.semantic[0].hsattn).__name__ == "HSAttn",
            "grids": tuple(c.side.grid * s for s in scales) or None,
            "alignment": "align" in vars(c) and c.align != "none",
            "mixers": any(".mix" in n for n in names), "stem": any("pixels.down" in n for n in names),
            "codebooks": sum("codebook" in n for n in names),
            "codes": tuple(len(model.codebook(s)) for s in model.stages) or None,
            "decoders": sum(any(n.startswith(d) for n in names) for d in ("decoder.", "pixel_decoder.")),
            "spade blocks": len(model.decoder.spade) if model.stages else 0}


@pytest.mark.parametrize("name, differs", [
    ("pat", {}), ("no-vmf", {"vmf attention": False}), ("no-vmf-dot", {"vmf attention": False}),
    ("scales-4-4-4", {"grids": (32, 32, 32)}),
    ("scales-1-1-1", {"grids": (8, 8, 8)}), ("no-align", {"alignment": False}),
    ("no-mixer", {"mixers": False, "vmf attention": False}), ("no-residual", {"stem": False}),
    ("unified", {"codebooks": 0, "codes": (20, 20, 20, 20)}), ("separate-decoders", {"decoders": 2}),
    ("one-stage-removed", {"spade blocks": 2}), ("two-stages-removed", {"spade blocks": 1}),
    ("three-stages-removed", {"spade blocks": 0}), ("only-early-mid", {"spade blocks": 2}),
    ("only-early", {"spade blocks": 1}),
    ("san", {"vmf attention": False, "grids": None, "alignment": False, "mixers": False, "stem": False, "codebooks": 0,
             "codes": None, "decoders": 0, "spade blocks": 0})])
def test_a_rows_model_differs_from_the_default_in_what_its_name_says_and_in_nothing_else(name, differs, tmp_path):
    default = {"vmf attention": True, "grids": (32, 16, 8), "alignment": True, "mixers": True, "stem": True,
               "codebooks": 4, "codes": (128, 64, 32, 256), "decoders": 1, "spade blocks": 3}
    model = build(run_config(recipe("world", pretrained="none"), ROW[name], 0).run)
    assert claims(model) == {**default, **differs}
    assert (trainable(model) == 1_878_401) == (name in ("pat", "no-vmf", "no-vmf-dot", "no-align"))


def test_the_papers_changes_worked_by_hand():
    """No vMF: 53.0-57.9, 27.6-31.6, 21.6-13.8.  (4,4,4): masks lose .8 and .7, rFID 12.4-13.8.  SAN paints nothing."""
    assert paper_change(ROW["no-vmf"]) == {"PC59": -4.9, "A150": -4.0, "rFID": 7.8}
    assert paper_change(ROW["scales-4-4-4"]) == {"PC59": -0.8, "A150": -0.7, "rFID": -1.4}
    assert paper_change(ROW["san"]) == {"PC59": -2.8, "A150": -1.2, "rFID": None}


# --- directions ---


@pytest.mark.parametrize("values, default, paper, says", [
    ([0.50, 0.52], [0.55, 0.60], -4.9, "agree"),              # all seeds below, the paper too
    ([0.50, 0.52], [0.55, 0.60], 1.4, "disagree"),
    ([0.61, 0.70], [0.55, 0.60], 1.4, "agree"),
    ([0.61, 0.70], [0.55, 0.60], -4.9, "disagree"),
    ([0.50, 0.56], [0.55, 0.60], -4.9, "within the spread"),  # a lower mean, but one seed beats one of the default
    ([0.57, 0.58], [0.55, 0.60], -4.9, "within the spread"),
    ([0.50, 0.55], [0.55, 0.60], -4.9, "within the spread"),  # touching
    ([0.50], [0.55, 0.60], -4.9, "-"), ([0.50, 0.52], [0.55], -4.9, "-"), ([], [0.5, 0.6], -4.9, "-"),
    ([0.50, 0.52], [0.55, 0.60], None, "-")])
def test_a_direction_is_told_only_where_the_seeds_separate(values, default, paper, says):
    assert verdict(values, default, paper) == says


@pytest.fixture
def partial(tmp_path):
    """PAT with two seeds, (4,4,4) with two, no vMF with one finished and one failed, SAN with one; the rest missing."""
    config = base(tmp_path, steps=800, batch=8)
    runs = {("pat", 0): (0.60, 0.56, 20.0), ("pat", 1): (0.70, 0.66, 22.0), ("scales-4-4-4", 0): (0.50, 0.45, 23.0),
            ("scales-4-4-4", 1): (0.54, 0.47, 25.0), ("no-vmf", 0): (0.40, 0.30, 15.0), ("san", 1): (0.52, 0.50, None)}
    for (name, seed), (seen, unseen, psnr) in runs.items():
        painted = {} if psnr is None else {"PSNR": psnr, "L1": psnr / 1000}
        masks = dict(mIoU=(seen + unseen) / 2, mIoU_seen=seen, mIoU_unseen=unseen)
        finished(run_config(config, ROW[name], seed), **masks, **painted)
    failed = Path(run_config(config, ROW["no-vmf"], 1).recipe.out)
    failed.mkdir()
    (failed / "config.json").write_text(json.dumps(flat(run_config(config, ROW["no-vmf"], 1))))
    (failed / "failed.txt").write_text("step 12: loss term l2 is nan\n")
    return config


def test_means_ranges_and_changes_worked_by_hand(partial):
    """Seen: PAT (.60 + .70) / 2 = .65, (4,4,4) (.50 + .54) / 2 = .52, so -.13; PSNR 21 against 24, so +3."""
    row = tabulate(partial, 2)["rows"]["scales-4-4-4"]
    assert row["mean"]["mIoU_seen"] == pytest.approx(0.52)
    assert (row["lowest"]["mIoU_seen"], row["highest"]["mIoU_seen"]) == (0.50, 0.54)
    assert row["change"]["mIoU_seen"] == pytest.approx(-0.13) and row["change"]["PSNR"] == pytest.approx(3.0)


def test_masks_and_pixels_are_judged_apart_and_a_lower_rfid_is_better(partial):
    """(4,4,4) costs masks and improves pixels, here (23 and 25 dB against 20 and 22) as in the paper (rFID -1.4)."""
    rows = tabulate(partial, 2)["rows"]
    assert (rows["scales-4-4-4"]["masks"], rows["scales-4-4-4"]["pixels"]) == ("agree", "agree")
    assert {name for name, row in rows.items() if row["masks"] != "-"} == {"scales-4-4-4"}
    for seed, psnr in enumerate((30.0, 31.0)):                # the paper: worse without residual; here better
        finished(run_config(partial, ROW["no-residual"], seed), mIoU=0.65, PSNR=psnr)
    row = tabulate(partial, 2)["rows"]["no-residual"]
    assert (row["masks"], row["pixels"]) == ("within the spread", "disagree")


def test_the_rank_correlation_by_hand(tmp_path):
    """Masks: PAT 0, mixer -.3, residual -.2, (1,1,1) -.1; the paper's sums 0, -4.5, -8.5, -6.3: ranks 4 1 2 3 and 4 3 1 2,
    squared distances 0 4 1 1, so 1 - 6 * 6 / (4 * 15) = .4.  Pixels: two rows and PAT, in the paper's order: 1."""
    config = base(tmp_path)
    for name, fall, psnr in (("pat", 0, 20.0), ("no-mixer", 0.3, None), ("no-residual", 0.2, 10.0), ("scales-1-1-1", 0.1, 19.0)):
        finished(run_config(config, ROW[name], 0), mIoU=0.6 - fall, **({} if psnr is None else {"PSNR": psnr}))
    table = tabulate(config, 1)
    assert table["rank_correlation"]["masks"][0] == pytest.approx(0.4)
    assert table["rank_correlation"]["pixels"] == [pytest.approx(1), pytest.approx(1)]
    assert "Rank correlation with the paper's changes, masks: +0.40\n" in format_text(table)
    finished(run_config(config, ROW["only-early"], 0), mIoU=0.7)                          # two readings of -4.2, PAT's next
    finished(run_config(config, ROW["two-stages-removed"], 0), mIoU=0.1)
    assert tabulate(config, 1)["rank_correlation"]["masks"] == [pytest.approx(0.1), pytest.approx(0.6)]      # 18, 8 of 20


def test_only_some_rows_are_trained_on_request():
    assert [(row.name, seed) for row, seed in jobs(2, only=("san", "pat"))] == [
        ("pat", 0), ("san", 0), ("pat", 1), ("san", 1)]
    assert [row.name for row, _ in jobs(1, 1, 2, ("san", "pat"))] == ["san"]


def test_missing_is_a_dash_and_failed_is_told(partial):
    table = tabulate(partial, 2)
    text = format_text(table)
    lines = {line[:20].strip(): line.split() for line in text.split("\n\n")[0].splitlines()[1:]}
    assert len(lines) == 16
    assert lines["PAT"] == ("PAT 2/2 .650 (.600-.700) .610 (.560-.660) .630 (.580-.680) "
                            "21.00 (20.00-22.00) .021 (.020-.022)").split()
    assert lines["unified tokens"][2:] == "0/2 - - - - -".split()
    assert lines["SAN, the baseline"][3] == "1/2" and lines["SAN, the baseline"][-2:] == ["-", "-"]
    assert lines["no vMF mean-shift"][3:6] == "1/2, 1 failed".split()
    assert "Failed: no-vmf, seed 1: step 12: loss term l2 is nan" in text
    assert "6,400 images (800 steps of 8)" in text


def test_the_printed_table_fits_120_columns(tmp_path):
    config = base(tmp_path)
    for row, seed in jobs(2):
        changes = dict(mIoU=0.5 + seed / 9, mIoU_seen=0.1 + seed / 9, mIoU_unseen=0.2, PSNR=23.4 + seed, L1=0.05)
        finished(run_config(config, row, seed), **changes)
    table = format_text(tabulate(config, 2))
    assert "within the spread" in table and max(map(len, table.splitlines())) <= 120


def test_markdown_is_one_table_with_the_change_behind_the_range(partial):
    lines = format_markdown(tabulate(partial, 2)).splitlines()
    assert lines[0] == ("|  | seeds | seen | unseen | mIoU | PSNR dB | L1 "
                        "| paper's PC59 | paper's A150 | paper's rFID | masks | pixels |")
    assert lines[5] == ("| scale (4,4,4) | 2/2 "
                        "| .520 (.500-.540) -.130 | .460 (.450-.470) -.150 | .490 (.475-.505) -.140 "
                        "| 24.00 (23.00-25.00) +3.00 | .024 (.023-.025) +.003 | -0.8 | -0.7 | -1.4 | agree | agree |")
    assert {line.count("|") for line in lines[:18]} == {13}


# --- the runs ---


def test_all_rows_of_seed_0_come_first_and_processes_share_every_job_once():
    assert [seed for _, seed in jobs(3)] == [0] * 16 + [1] * 16 + [2] * 16
    for processes in (2, 3, 50):
        shares = [jobs(3, rank, processes) for rank in range(processes)]
        names = [(row.name, seed) for share in shares for row, seed in share]
        assert len(names) == 48 and set(names) == {(row.name, seed) for row, seed in jobs(3)}
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture
def two_rows(monkeypatch):
    monkeypatch.setattr(ablations, "ROWS", (ROW["pat"], ROW["san"]))


def test_a_half_done_run_goes_on_and_a_finished_one_is_not_trained_again(tmp_path, two_rows, capsys):
    """SAN stopped after one of its two steps; the command ends it, trains PAT, and then nothing is left to train."""
    config = base(tmp_path)
    half = run_config(config, ROW["san"], 0)
    half.recipe.stop_at = 1
    train.train(half)
    started = []
    ablate(config, 1, lambda c, resume, device: (started.append((c.run.model, resume)), train.train(c, resume, device)))
    assert started == [("pat", False), ("san", True)]
    log = (tmp_path / "san-0" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1]
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    scores = next(iter(json.loads((tmp_path / "pat-0" / "scores.json").read_text())["rows"].values()))
    assert table["pat"]["mean"]["mIoU"] == scores["segmentation"]["mIoU"]
    assert table["pat"]["mean"]["PSNR"] == scores["reconstruction"]["PSNR"] and table["san"]["mean"]["PSNR"] is None
    before = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").unlink()
    capsys.readouterr()
    ablate(config, 1, refuse)
    assert (tmp_path / "table.md").read_text() == before and "1/1" in capsys.readouterr().out


def test_a_run_of_other_settings_is_refused_before_anything_is_trained(tmp_path, two_rows):
    config = base(tmp_path)
    finished(run_config(config, ROW["san"], 0), mIoU=0.5)
    with pytest.raises(InputError, match="san-0: was trained with steps 2, not 3") as error:
        ablate(base(tmp_path, steps=3), 1, refuse)
    assert "\n" not in str(error.value) and not (tmp_path / "table.txt").exists()


def test_a_failed_run_is_reported_and_stops_nobody_and_is_not_tried_again(tmp_path, two_rows, monkeypatch):
    """PAT's pixel loss is not finite; SAN, which has none, is trained all the same."""
    monkeypatch.setattr("pat.reconstruction", lambda *a: dict(l1=torch.tensor(0.0), l2=torch.tensor(float("nan"))))
    ablate(base(tmp_path), 1, train.train)
    text = (tmp_path / "table.txt").read_text()
    assert "0/1, 1 failed" in text and "Failed: pat, seed 0: before the first step: loss term l2 is nan" in text and "1/1" in text
    ablate(base(tmp_path), 1, refuse)


def test_what_is_the_users_to_mend_stops_the_command(tmp_path, two_rows):
    """A recipe that cannot run is no failed run."""
    with pytest.raises(InputError, match="crf_samples 0"):
        ablate(base(tmp_path, crf_samples=0), 1, train.train)
    assert not list(tmp_path.iterdir())


def test_a_damaged_score_file_is_named(tmp_path, two_rows):
    finished(run_config(base(tmp_path), ROW["pat"], 0), mIoU=0.5)
    (tmp_path / "pat-0" / "scores.json").write_text("{")
    with pytest.raises(InputError, match="scores.json: not the scores of a run"):
        ablate(base(tmp_path), 1, refuse)


def test_a_run_that_another_process_finishes_meanwhile_is_not_lost(tmp_path, two_rows, monkeypatch):
    """SAN's scores arrive between reading and writing: the table is written once more."""
    config, write = base(tmp_path), ablations.write_files
    finished(run_config(config, ROW["pat"], 0), mIoU=0.5)

    def late(files):
        if not (tmp_path / "san-0").exists():
            finished(run_config(config, ROW["san"], 0), mIoU=0.4)
        write(files)

    monkeypatch.setattr(ablations, "write_files", late)
    ablations.write_table(config, 1)
    assert json.loads((tmp_path / "table.json").read_text())["rows"]["san"]["mean"]["mIoU"] == 0.4


def test_processes_take_their_share_without_a_process_group(tmp_path, monkeypatch):
    """RANK and WORLD_SIZE alone decide; the second of two trains every other run, each as if it were alone."""
    trained = []

    def record(config, resume, device):
        assert not torch.distributed.is_initialized()
        trained.append(Path(config.recipe.out).name)
        finished(config, mIoU=0.5)

    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "64")):      # so: one thread, as now
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        ablate(base(tmp_path), 1, record)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert trained == [f"{row.name}-0" for row in ROWS[1::2]]


# --- the command line ---


def test_an_ablation_of_the_world_has_its_own_steps_and_three_seeds():
    config, _, seeds, rows, only = parse_ablations([])
    assert (config, seeds, rows, only) == (recipe("world", steps=300, val_images=300), 3, False, ())
    assert parse_ablations(["--only", "pat,no-mixer"])[-1] == ("pat", "no-mixer")
    config, _, seeds, *_ = parse_ablations(["--seeds", "2", "--steps", "9", "--set", "align=literal"])
    assert (config.recipe.steps, config.run.net.align, seeds) == (9, "literal", 2)
    assert parse_ablations(["--set", "steps=9"])[0].recipe.steps == 9
    assert parse_ablations(["--val-images", "7"])[0].recipe.val_images == 7
    assert parse_ablations(["--preset", "coco", "--data", "d"])[0].recipe.steps == 120_000
    config, *_ = parse([])
    assert (type(config), config.recipe.steps) == (Training, 1300)


@pytest.mark.parametrize("flags, says", [
    (["--only", "no-mixr"], "--only no-mixr: there are pat, .*; did you mean no-mixer"), (["--seeds", "0"], "--seeds 0"), (["--seeds", "two"], "--seeds.*'two'"),
    (["--seed", "1"], "sets seed itself"), (["--set", "seed=0"], "sets seed itself"),
    (["--set", "mixer=false"], "sets mixer itself"), (["--ablate", "no-mixer"], "sets mixer itself"),
    (["--model", "san"], "sets model itself"), (["--model", "dense"], "sets model itself"),
    (["--stop-at", "5"], "sets stop at"), (["--set", "scales=1,1,1"], "sets scales itself"),
    (["--resume", "x"], "out --resume"), (["--no-mixer"], "--ablate no-mixer"), (["--stepz", "3"], "did you mean --steps")])
def test_flags_that_an_ablation_decides_are_refused_in_one_line(flags, says):
    with pytest.raises(InputError, match=says) as error:
        parse_ablations(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, says", [
    (["--seeds", "2"], "python -m studies.seeds --seeds"), (["--ablations"], "python -m studies.ablations"),
    (["--from-scratch"], "python -m world.pretrain")])
def test_train_sends_whoever_wants_an_ablation_here(flags, says):
    """These flags were train.py's; each names what replaced it, in one line."""
    with pytest.raises(InputError, match=says) as error:
        parse(flags)
    assert "\n" not in str(error.value)


def test_a_row_of_the_old_house_still_counts(tmp_path, two_rows):
    """Its config.json is the old one: SAN with PAT's numbers, `clip` for the gradient's norm, kernels "torch"."""
    for row in (ROW["pat"], ROW["san"]):
        config = run_config(base(tmp_path), row, 0)
        finished(config, mIoU=0.5)
        pat, recipe_ = flat(run_config(base(tmp_path), ROW["pat"], 0)), flat(config.recipe)
        old = {**pat, **flat(config), "decoder_attention": "pooled", "head_width": flat(config).get("head_width", 96),
               "kernels": "torch", "clip": recipe_["grad_clip"]}
        del old["grad_clip"]
        (Path(config.recipe.out) / "config.json").write_text(json.dumps(old))
        check_run(config)
    ablate(base(tmp_path), 1, refuse)
    (Path(config.recipe.out) / "config.json").write_text(json.dumps({**old, "clip": 0.5}))
    with pytest.raises(InputError, match="san-0: was trained with grad_clip 0.5, not 1.0"):
        ablate(base(tmp_path), 1, refuse)


def test_a_run_of_another_model_is_named_as_that(tmp_path):
    config = run_config(base(tmp_path), ROW["san"], 0)
    finished(config, mIoU=0.5)
    config.recipe.out, other = "", run_config(base(tmp_path), ROW["pat"], 0)
    other.recipe.out = str(tmp_path / "san-0")
    with pytest.raises(InputError, match="was trained with model 'san', not 'pat'"):
        check_run(other)


def test_the_command_reaches_the_table(tmp_path):
    """All runs are there already: `python -m studies.ablations` reads them, trains nothing and prints."""
    flags = ["--seeds", "1", "--out", str(tmp_path / "all")]
    config, *_ = parse_ablations(flags)
    for row, seed in jobs(1):
        finished(run_config(config, row, seed), mIoU=0.25)
    done = subprocess.run([sys.executable, "-m", "studies.ablations", *flags, "--device", "cpu"], capture_output=True,
                          text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60)  # it trains nothing
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1/1") == 16 and (tmp_path / "all" / "table.txt").read_text() in done.stdout


def test_the_rows_can_be_read_without_training(capsys):
    ablations.main(["--rows"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and lines[0].split() == "PAT PC59 +0.0 A150 +0.0 rFID +0.0".split()
    assert lines[3].split() == "scale (4,4,4) PC59 -0.8 A150 -0.7 rFID -1.4 {'scales': (4, 4, 4)}".split()
    assert lines[-1].split()[-3:] == ["-", "{'model':", "'san'}"]
