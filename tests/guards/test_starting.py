"""Starting from another run, trying a step, going on without being told: guards/starting.py."""

import pytest
import torch

import guards.starting
import train
from cli import InputError
from guards.starting import layers, rehearse, same_run, warm_start
from published.san_checkpoints import import_published
from runs import CHECKPOINTS, build, changed, load_run, preset, trained_state
from tests.helpers import save_run, tiny, world


# --- starting from another run ---


def test_a_layer_stands_for_its_entries_only_if_all_are_there():
    everything = ["a.x", "a.y", "b.c.x", "b.c.y", "b.d", "e"]
    assert layers({"a.x", "a.y", "b.c.x", "b.c.y", "e"}, everything) == ["a", "b.c", "e"]
    assert layers({"a.x", "b.d", "b.c.x", "b.c.y"}, everything) == ["a.x", "b"]


def test_a_warm_start_takes_what_fits_and_lists_exactly_what_does_not(published, tmp_path):
    """PAT from SAN, with 12 queries instead of 20: the mask head has no place, the queries have another shape."""
    path, theirs, config = published
    import_published(path, tmp_path / "san", config)
    clip = str(tmp_path / "san" / "clip.safetensors")
    model = build(preset("world", pretrained=clip, queries=12))
    before = {name: value.clone() for name, value in trained_state(model).items()}
    said = warm_start(model, tmp_path / "san")
    after, state = trained_state(model), trained_state(theirs)
    taken = {name for name in after if not torch.equal(after[name], before[name])}
    shapes = {"side.query_embed", "side.query_pos_embed"}
    positions = "vlm.model.visual.positional_embedding"       # equal before and after: the imported CLIP brings its own
    assert taken == {name for name in state if not name.startswith("head.")} - shapes - {positions}
    assert all(torch.equal(after[name], state[name]) for name in taken | {positions})
    head = sum(name.startswith("head.") for name in state)
    assert said == (f"started from {tmp_path / 'san'}: {len(state) - head - 2} of its {len(state)} entries taken; "
                    "without a place here: head; not in it: decoder, latent, pixels, semantic; "
                    "of another shape or another CLIP: side.query_embed, side.query_pos_embed")


def test_over_another_clip_its_position_embedding_stays(published, tmp_path):
    path, theirs, config = published
    import_published(path, tmp_path / "san", config)
    model = build(preset("world", pretrained="world", model="san"))
    own = model.vlm.positions.clone()
    assert warm_start(model, tmp_path / "san").endswith("of another shape or another CLIP: vlm")
    assert torch.equal(model.vlm.positions, own) and torch.equal(model.side.query_embed, theirs.side.query_embed)


def test_as_many_numbers_in_another_shape_are_not_taken(run, monkeypatch):
    """(64,1) is not (1,64)."""
    own = {"background": torch.zeros(64, 1), "side.query_embed": torch.zeros(1, 20, 96)}
    monkeypatch.setattr(guards.starting, "trained_state", lambda model: own)
    assert warm_start(*run[::-1]).endswith("of another shape or another CLIP: background")
    assert not own["background"].any() and own["side.query_embed"].any()


def test_a_warm_start_names_what_it_cannot_start_from(published, run, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    for where, says in [(published[0], "python -m published.san_checkpoints"), (tmp_path / "nowhere", "no run directory"),
                        (tmp_path / "broken", "broken/checkpoint.safetensors: no such file")]:
        with pytest.raises(InputError, match=says) as error:
            warm_start(world(), where)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(guards.starting, "trained_state", lambda model: {"background": torch.zeros(1, 63), "other": torch.ones(1)})
    with pytest.raises(InputError, match="nothing in its checkpoint fits"):
        warm_start(world(), run[0])


def test_a_warm_started_run_resumes_bit_for_bit_and_brings_its_clip(published, tmp_path, capsys):
    """Two steps at once, and one, a stop, one more, from the command line; the second start needs no first run."""
    path, _, config = published
    import_published(path, tmp_path / "san", config)
    flags = ["--model", "san", "--init", str(tmp_path / "san"), "--steps", "2", "--batch", "2", "--set", "points=64",
             "--val-images", "1"]
    for more, starts in ((["--out", str(tmp_path / "whole")], True), (["--out", str(tmp_path / "broken"), "--stop-at", "1"], True),
                         (["--resume", str(tmp_path / "broken")], False)):
        if not starts:
            (tmp_path / "san" / "checkpoint.safetensors").unlink()
        train.train(*train.parse(flags * starts + more)[:2])
        assert ("started from" in "".join(capsys.readouterr())) == starts
    (a, config), (b, _) = (load_run(tmp_path / name) for name in ("whole", "broken"))
    assert config.net.clip.pretrained == str(tmp_path / "san" / "clip.safetensors")
    a, b = a.state_dict(), b.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


# --- everything once, before the first step --------------------------------------------------------------------------


def test_a_rehearsal_leaves_nothing_behind():
    """Weights, gradients, the random state, the codebooks' counts and the mode are what they were."""
    config = tiny("pat")
    torch.manual_seed(3)
    model = build(config.run).train()
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    text = model.vlm.embed_text(["house", "boat"])
    batch = (torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64)), torch.arange(2))
    drawn = torch.get_rng_state()
    rehearse(model, config, lambda: train.gradients(model, text, [batch], config))
    assert torch.equal(torch.get_rng_state(), drawn) and model.training and model.uses == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error, says", [(MemoryError(), "does not fit into memory; take a smaller one, or --accumulate"),
                                         (torch.OutOfMemoryError(), "--batch 4: a step does not fit"),
                                         (FloatingPointError("loss term vq is nan"), "before the first step: loss term vq is nan")])
def test_what_fails_in_a_rehearsal_is_one_line(error, says):
    def step():
        raise error

    config = tiny("san")
    with pytest.raises(InputError, match=says):
        rehearse(build(config.run), config, step)


def test_scores_that_cannot_be_had_are_missed_before_the_first_step(tmp_path):
    """120,000 steps are not spent on a --val-data that is not there; and nothing was written."""
    config = tiny("san", val_data=str(tmp_path / "nope"), out=str(tmp_path / "run"), steps=2)
    with pytest.raises(InputError, match="nope"):
        train.train(config)
    assert not (tmp_path / "run").exists()


def test_an_answer_that_does_not_fit_into_memory_is_missed_before_the_first_step():
    """The step is fine; what names the pixels is not."""
    config = tiny("san")
    model = build(config.run).train()

    def answer(out, b=0):
        raise MemoryError
    model.answer = answer
    with pytest.raises(InputError, match="does not fit into memory"):
        rehearse(model, config, lambda: None)


# --- the same run, and going on with other numbers -------------------------------------------------------------------


def test_the_same_run_may_lie_elsewhere_and_be_stopped_early_but_has_the_same_numbers(tmp_path):
    config = tiny("san")
    same_run("x", config, changed(config, out="elsewhere", stop_at=3))
    with pytest.raises(InputError, match="x: was trained with lr 0.004, not 1.0; ask for that, or choose another --out"):
        same_run("x", config, changed(config, width=32, lr=1.0))                # the first in the alphabet
    same_run("x", config, changed(config, lr=1.0), but=("lr",))


def test_the_same_command_under_torchrun_goes_on_and_alone_only_when_told(tmp_path, monkeypatch):
    """`--resume auto`: what torchrun does when it starts a killed worker again.  A finished run is left alone."""
    run = save_run(tmp_path / "run", build(tiny("san").run), tiny("san", out=str(tmp_path / "run")), 1)
    flags = [f"--set={name}={value}".replace("False", "false") for name, value in dict(points=64, width=48, head_width=32).items()]
    flags += ["--model", "san", "--batch", "4", "--val-images", "4", "--pretrained", "none", "--set", "log_every=1", "--out", str(run)]
    assert train.parse(flags)[1] is False and train.parse([*flags, "--resume", "auto"])[1] is True
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    assert train.parse()[1] is True and train.parse(flags)[1] is False                     # studies ask for flags of their own
    with pytest.raises(InputError, match="was trained with width 48, not 96"):
        train.parse([*flags, "--resume", "auto", "--set", "width=96"])
    (run / "scores.json").write_text("{}")
    assert train.parse()[1] is False
    (run / CHECKPOINTS[0]).unlink()
    assert train.parse([*flags, "--resume", "auto"])[1] is False                          # nothing there: it begins


def test_a_run_goes_on_with_another_rate_and_says_since_when(tmp_path):
    """`--resume RUN --set lr=...` is the advice after a divergence: it is taken, kept in config.json, and refused for the rest."""
    import json

    config = tiny("san", out=str(tmp_path / "run"), steps=3, stop_at=1)
    train.train(config)
    config, resume, device = train.parse(["--resume", str(tmp_path / "run"), "--set", "lr=0.0005", "--steps", "2"])
    train.train(config, resume, device)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["lr"] == 0.0005 and stored["changes"] == [{"step": 1, "steps": 2, "lr": 0.0005}]
    for flag, name in (("--batch=2", "batch"), ("--seed=1", "seed"), ("--set=width=32", "width"), ("--ablate=x", "ablate")):
        with pytest.raises(InputError, match=f"leave out {name}: only steps, accumulate, lr"):
            train.parse(["--resume", str(tmp_path / "run"), flag])
