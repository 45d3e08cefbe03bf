"""Several seeds of one run: ordinary runs, trained once, and a table that is their mean."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train
from cli import InputError
from runs import changed
from studies import seeds
from studies.seeds import format_seeds, tabulate, train_seeds
from tests.helpers import tiny


def fake(scores, trained):
    """A train() that leaves scores.json: scores {seed: {score: value}}; `trained` collects (seed, resume)."""
    def run(config, resume, device):
        path = config.recipe.out
        trained.append((config.run.seed, resume))
        values = scores[config.run.seed]
        painted = {key: values[key] for key in values if key == "PSNR"} or None
        row = {"segmentation": {key: values[key] for key in values if key != "PSNR"}, "reconstruction": painted}
        seeds.Path(path).mkdir(parents=True, exist_ok=True)
        train.open_log(seeds.Path(path), config, ["a"], 0).close()
        (seeds.Path(path) / "scores.json").write_text(json.dumps({"rows": {"it": row, "chance": row}}))
    return run


SCORES = {4: {"mIoU": 0.5, "PSNR": 20.0}, 5: {"mIoU": 0.7, "PSNR": 22.0}, 6: {"mIoU": 0.6}}


def test_the_table_is_every_seed_the_mean_and_the_range():
    """A score that one seed lacks is the mean of the others."""
    table = tabulate(SCORES)
    assert table["mIoU"] == {"values": {4: 0.5, 5: 0.7, 6: 0.6}, "mean": pytest.approx(0.6), "lowest": 0.5, "highest": 0.7}
    assert table["PSNR"]["mean"] == 21.0 and list(table) == ["mIoU", "PSNR"]
    head, miou, psnr = format_seeds(table).splitlines()
    assert head.split() == ["seed", "4", "seed", "5", "seed", "6", "mean", "lowest", "highest"]
    assert miou.split() == ["mIoU", "0.500", "0.700", "0.600", "0.600", "0.500", "0.700"]
    assert psnr.split() == ["PSNR", "dB", "20.00", "22.00", "-", "21.00", "20.00", "22.00"]


def test_runs_are_trained_once_from_the_seed_on_and_a_half_done_one_goes_on(tmp_path, capsys):
    config, trained = tiny(out=str(tmp_path / "it"), seed=4), []
    train_seeds(config, 2, fake(SCORES, trained))
    assert trained == [(4, False), (5, False)] and "0.700" in (tmp_path / "it-seeds.txt").read_text()
    fake(SCORES, [])(changed(config, seed=6, out=str(tmp_path / "it-6")), False, "cpu")
    (tmp_path / "it-6/scores.json").unlink()
    (tmp_path / "it-6/checkpoint.safetensors").write_bytes(b"half done")
    train_seeds(config, 3, fake(SCORES, trained))
    assert trained[2:] == [(6, True)]
    table = json.loads((tmp_path / "it-seeds.json").read_text())
    assert table["mIoU"]["mean"] == pytest.approx(0.6) and "3 of 3 finished" in capsys.readouterr().out


def test_runs_of_other_settings_in_the_same_place_are_refused_before_anything_is_trained(tmp_path):
    trained, config = [], tiny(out=str(tmp_path / "it"), seed=4)
    train_seeds(config, 1, fake(SCORES, trained))
    with pytest.raises(InputError, match="it-4: was trained with lr"):
        train_seeds(changed(config, lr=0.5), 2, fake(SCORES, trained))
    assert trained == [(4, False)]


def test_processes_share_the_seeds(tmp_path, monkeypatch):
    """The second of two trains the second and the fourth, and its table is of whatever is finished."""
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    trained = []
    train_seeds(tiny(out=str(tmp_path / "it"), seed=3), 4, fake({**SCORES, 3: {"mIoU": 0.1}}, trained))
    assert trained == [(4, False), (6, False)]
    assert [*json.loads((tmp_path / "it-seeds.json").read_text())["mIoU"]["values"]] == ["4", "6"]


def test_from_the_command_line(tmp_path):
    """Real runs, as the same flags with --seed make them."""
    flags = ["--model", "san", "--steps", "1", "--batch", "1", "--val-images", "1", "--set", "points=16"]
    seeds.main([*flags, "--seeds", "2", "--out", str(tmp_path / "it")])
    assert (tmp_path / "it-seeds.txt").is_file() and (tmp_path / "it-0/report.html").is_file()
    train.train(train.parse([*flags, "--seed", "1", "--out", str(tmp_path / "alone")])[0])
    one, other = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("it-1", "alone"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("flags, says", [
    (["--seeds", "0"], "--seeds 0: takes a positive"), (["--seeds", "two"], "invalid int"),
    (["--stop-at", "2"], "leave out --resume and --stop-at"), (["--sedes", "2"], "unknown argument --sedes; did you mean")])
def test_what_it_cannot_do_is_one_line(flags, says):
    with pytest.raises(InputError, match=says) as error:
        seeds.main(flags)
    assert "\n" not in str(error.value)
