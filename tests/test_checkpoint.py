"""Checkpoints: what is in the file, what it refuses to join, and starting one run from another."""

import pytest
import torch
from test_pat import published, run, world  # noqa: F401

import checkpoint
import train
from checkpoint import fingerprint, layers, load_weights, trained_state, warm_start
from images import InputError
from pat import build, import_published, load_config, load_run, preset


def test_a_checkpoint_holds_what_training_changes_and_not_the_frozen_clip(run):
    names = set(trained_state(run[1]))
    assert "vlm.model.visual.positional_embedding" in names and "latent.idle" in names
    assert not any("resblocks" in name for name in names)


def test_other_clip_weights_have_another_fingerprint():
    a, b = world(), world()
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        b.vlm.model.visual.ln_post.bias[0] += 1e-3
    assert fingerprint(a) != fingerprint(b)


def test_damaged_and_foreign_checkpoints_are_refused(run, tmp_path):
    path, model = run
    file = path / "checkpoint.safetensors"
    with pytest.raises(InputError, match="another preset or other switches"):
        load_weights(world(mixer=False), file)
    other = world()
    with torch.no_grad():
        other.vlm.model.visual.proj.add_(1)
    with pytest.raises(InputError, match="other CLIP weights"):
        load_weights(other, file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="checkpoint.safetensors: not a readable checkpoint"):
        load_run(path)
    file.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_run(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="no run directory"):
        load_run(path)


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
    said = warm_start(model, tmp_path / "san", load_config)
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
    assert warm_start(model, tmp_path / "san", load_config).endswith("of another shape or another CLIP: vlm")
    assert torch.equal(model.vlm.positions, own) and torch.equal(model.side.query_embed, theirs.side.query_embed)


def test_a_warm_start_names_what_it_cannot_start_from(published, run, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    for where, says in [(published[0], "python pat.py import"), (tmp_path / "nowhere", "no run directory"),
                        (tmp_path / "broken", "not a readable checkpoint")]:
        with pytest.raises(InputError, match=says) as error:
            warm_start(world(), where, load_config)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(checkpoint, "trained_state", lambda model: {"background": torch.zeros(1, 63), "other": torch.ones(1)})
    with pytest.raises(InputError, match="nothing in its checkpoint fits"):
        warm_start(world(), run[0], load_config)


def test_a_warm_started_run_resumes_bit_for_bit_and_brings_its_clip(published, tmp_path, capsys):
    """Two steps at once, and one, a stop, one more, from the command line; the second start needs no first run."""
    path, _, config = published
    import_published(path, tmp_path / "san", config)
    flags = ["--model", "san", "--init", str(tmp_path / "san"), "--steps", "2", "--batch", "2", "--points", "64",
             "--val-images", "1"]
    for more, starts in ((["--out", str(tmp_path / "whole")], True), (["--out", str(tmp_path / "broken"), "--stop-at", "1"], True),
                         (["--resume", str(tmp_path / "broken")], False)):
        if not starts:
            (tmp_path / "san" / "checkpoint.safetensors").unlink()
        train.train(*train.parse(flags * starts + more)[:2])
        assert ("started from" in "".join(capsys.readouterr())) == starts
    (a, config), (b, _) = (load_run(tmp_path / name) for name in ("whole", "broken"))
    assert config.pretrained == str(tmp_path / "san" / "clip.safetensors")
    a, b = a.state_dict(), b.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
