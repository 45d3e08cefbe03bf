"""The README's table: each model over the same scenes and in the same seconds, trained once, and never mixed up."""

import json
from pathlib import Path

import pytest

import train
from cli import InputError
from studies import models
from studies.models import configs, format_models, seconds, tabulate_models, train_models
from tests.helpers import tiny

MS = {"pat": 500.0, "san": 100.0, "dense": 50.0}              # a step


@pytest.fixture
def fake(monkeypatch):
    """A train() that leaves a log, a config and scores.json; what it was asked for, [(name, seed, steps, resume)]."""
    asked = []

    def run(config, resume, device):
        path, model, seed = Path(config.recipe.out), config.run.model, config.run.seed
        asked.append((path.name, seed, config.recipe.steps, resume))
        path.mkdir(parents=True, exist_ok=True)
        train.open_log(path, config, ["a"], 0).close()
        step = config.recipe.steps - 1
        lines = [{"step": step // 2, "ms_per_step": 9 * MS[model]}, *[{"step": step, "ms_per_step": MS[model]}] * 2]
        (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        row = {"segmentation": {"mIoU": 0.5, "mIoU_seen": 0.5 + seed / 10}, "reconstruction": None}
        rows = {"it": row, "MaskCLIP, no training": {"segmentation": {"mIoU_seen": 0.25}}, "chance": {"segmentation": {"mIoU_seen": 0.0}}}
        (path / "scores.json").write_text(json.dumps({"rows": rows}))

    run.asked = asked
    monkeypatch.setattr(models, "true_names", lambda path: None if "dense" in str(path) else 0.75)
    return run


def base(tmp_path, **numbers):
    return tiny(**{"steps": 12, "batch": 4, "out": str(tmp_path / "all"), **numbers})


def test_the_same_scenes_then_the_same_seconds_by_hand(tmp_path, fake, capsys):
    """PAT: 12 steps of .5 s are 6 s, by the median, which an outlier does not move; SAN's steps take .1 s: 60 of them."""
    train_models(base(tmp_path), ("pat", "san", "dense"), 2, fake)
    assert fake.asked == [("pat-0", 0, 12, False), ("san-0", 0, 12, False), ("dense-0", 0, 12, False), ("pat-1", 1, 12, False),
                          ("san-1", 1, 12, False), ("dense-1", 1, 12, False), ("san-seconds-0", 0, 60, False),
                          ("dense-seconds-0", 0, 120, False), ("san-seconds-1", 1, 60, False), ("dense-seconds-1", 1, 120, False)]
    assert seconds(tmp_path / "all/pat-0") == 6.0 == seconds(tmp_path / "all/dense-seconds-1")
    table = json.loads((tmp_path / "all/table.json").read_text())
    assert list(table["rows"]) == ["pat", "san", "dense", "san-seconds", "dense-seconds"]
    assert table["rows"]["san-seconds"]["scores"]["mIoU_seen"]["mean"] == pytest.approx(0.55)
    lines = {line.split()[0]: line.split() for line in (tmp_path / "all/table.txt").read_text().splitlines() if line}
    assert lines["pat"][:8] == ["pat", "2/2", "12", "6", ".550", "(.500-.600)", ".750", "(.750-.750)"]
    assert lines["dense-seconds"][1:7] == ["2/2", "120", "6", ".550", "(.500-.600)", "-"]
    assert lines["MaskCLIP,"][3] == ".250" and "written: table.txt" in capsys.readouterr().out


def test_what_is_there_is_not_trained_again_and_keeps_its_own_seconds(tmp_path, fake):
    """A slower PAT would ask SAN for more steps, but its run in those seconds is there, and holds for later seeds."""
    train_models(base(tmp_path), ("pat", "san"), 1, fake)
    first = tmp_path / "all/pat-0/log.jsonl"
    first.write_text(first.read_text().replace("500.0", "900.0"))
    before = len(fake.asked)
    train_models(base(tmp_path), ("pat", "san"), 2, fake)
    assert fake.asked[before:] == [("pat-1", 1, 12, False), ("san-1", 1, 12, False), ("san-seconds-1", 1, 60, False)]


def test_a_model_has_its_own_recipe_and_the_numbers_it_was_asked_for(tmp_path):
    """--batch and --lr reach every model, kappa PAT alone; as many scenes whatever the batch."""
    asked = base(tmp_path, lr=0.5, kappa=9.0)
    config = configs(asked, "san", 1, tmp_path / "all", None)
    assert (config.run.model, config.run.seed, config.recipe.lr, config.recipe.batch, config.recipe.steps) == ("san", 1, 0.5, 4, 12)
    assert config.recipe.out == str(tmp_path / "all/san-1") and not hasattr(config.run.net, "kappa")


def test_a_run_of_other_settings_is_refused(tmp_path, fake):
    train_models(base(tmp_path), ("pat",), 1, fake)
    with pytest.raises(InputError, match="pat-0: was trained with lr"):
        train_models(base(tmp_path, lr=0.5), ("pat",), 1, fake)


def test_two_processes_share_the_runs_and_seconds_wait_for_what_they_measure(tmp_path, fake, monkeypatch, capsys):
    """The second of two has SAN's run of seed 0; PAT's is not there yet, so SAN in PAT's seconds waits."""
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    train_models(base(tmp_path), ("pat", "dense", "san"), 1, fake)
    assert [name for name, *_ in fake.asked] == ["dense-0"]
    assert "dense in the same seconds, seed 0: waits for" in capsys.readouterr().out


def test_nothing_finished_is_an_empty_table(tmp_path):
    table = tabulate_models(tmp_path, ("pat", "san"), 2)
    assert table == {"rows": {}, "untrained": {}} and "seconds" in format_models(table, 2)


@pytest.mark.parametrize("flags, says", [
    (["--models", "pat,sam"], "--models sam: there are pat, san, .*; did you mean san"), (["--seeds", "0"], "--seeds takes"),
    (["--models", "pat,pat"], "each name once"), (["--models", ","], "each name once"), (["--seeds", "x"], "--seeds"),
    (["--seed", "3"], "leave out"), (["--stepz", "3"], "did you mean --steps")])
def test_wrong_flags_end_in_one_line(flags, says):
    with pytest.raises(InputError, match=says) as error:
        models.main(flags)
    assert "\n" not in str(error.value)


def test_real_runs(tmp_path, monkeypatch):
    """SAN and dense, two steps each; masks are asked for their true names, dense has none to ask."""
    flags = ["--steps", "2", "--batch", "1", "--val-images", "1", "--set", "points=16", "--out", str(tmp_path / "all")]
    monkeypatch.setattr(models, "ORACLE", 1)
    models.main(["--models", "san,dense", "--seeds", "1", *flags])
    table = json.loads((tmp_path / "all/table.json").read_text())
    assert 0 < table["rows"]["san"]["scores"]["oracle"]["mean"] <= 1 and "oracle" not in table["rows"]["dense"]["scores"]
    assert (tmp_path / "all/dense-seconds-0/report.html").exists() and table["untrained"].keys() == {"MaskCLIP, no training", "chance"}
