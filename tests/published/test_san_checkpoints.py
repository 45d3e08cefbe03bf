"""Published SAN checkpoints: every key has its place, a file becomes a run that needs nothing else, or nothing at all."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip.transformer import QuickGELU

import train
from cli import InputError
from clip import CLIPConfig
from published import san_checkpoints
from published.san_checkpoints import NOT_PARAMETERS, PUBLISHED, from_published, import_published, main, our_key, read_published
from runs import build, changed, fingerprint, load_run, preset
from san import SAN, SANConfig, trainable
from tests.helpers import TEXT, images, published_layout, randomised, smaller

KEYS = Path(__file__).parent.parent / "san_vit_b_16_keys.txt"


def test_the_reference_size_has_the_published_parameters_and_keys():
    """8,370,866 trainable numbers; every key of the published ViT-B/16 layout has its place and shape here, and back."""
    model = SAN(SANConfig(clip=CLIPConfig(pretrained="none")))
    assert trainable(model) == 8_370_866
    state, reached = model.state_dict(), set()
    for line in KEYS.read_text().splitlines():
        if not line.startswith("#"):
            key, shape = line.split(" ", 1)
            if key not in NOT_PARAMETERS:
                ours, shape = our_key(key, 9), tuple(int(n) for n in shape.strip("(),").split(",") if n.strip())
                reached.add(ours)
                theirs = shape[:2] if len(shape) == 4 and state[ours].ndim == 2 else shape
                assert tuple(state[ours].shape) == theirs, key
    assert reached == set(state)


def test_missing_and_unknown_keys_are_listed_and_nothing_is_loaded(san_small, san_of_small):
    tensors, model = san_small[0], san_of_small
    weights = {key[8:]: value + 1 for key, value in tensors.items() if key.startswith("weights.")}
    before = model.background.clone()
    lost = weights.pop("side_adapter_network.query_embed")
    whole = {**weights, "side_adapter_network.query_embed": lost}
    for wrong, says in [
            (weights, "1 missing: side.query_embed$"),
            ({**whole, "side_adapter_network.extra": lost}, "1 unknown: side_adapter_network.extra$"),
            ({**whole, "ov_classifier.bg_embed2": lost}, "1 unknown: vlm.model.bg_embed2$"),
            ({**whole, "clip_visual_extractor.resblocks.3.ln_1.bias": lost}, "1 unknown: clip_visual_extractor.resblocks.3.ln_1.bias$"),
            ({**whole, "ov_classifier.ln_final.bias": lost}, "missing: .*vlm.model.token_embedding.weight"),
            ({**whole, "side_adapter_network.query_embed": lost[:, :3]},
             r"1 of another shape: side.query_embed \(1, 3, .*\) for \(1, "),
            ({**weights, "side_adapter_network.query_ember": lost}, "1 missing: side.query_embed; 1 unknown: side.query_ember")]:
        with pytest.raises(InputError, match=says) as error:
            from_published(model, wrong)
        assert "\n" not in str(error.value)
    assert torch.equal(before, model.background)


def test_the_entries_that_are_no_parameters_are_skipped(san_small, san_of_small):
    weights = {key[8:]: value for key, value in san_small[0].items() if key.startswith("weights.")}
    from_published(san_of_small, {**weights, "criterion.empty_weight": torch.ones(172), "ov_classifier.attn_mask": torch.ones(2, 2)})


def of_size(name):
    """SAN of a preset, without its numbers: shapes and names alone."""
    with torch.device("meta"):
        return build(preset(name, model="san", pretrained="none"))


def test_the_inverse_layout_is_the_published_one():
    """Names and shapes of all 442 entries of the ViT-B/16 checkpoint, so the round trips below are in its layout."""
    lines = [line.split(" ", 1) for line in KEYS.read_text().splitlines() if line[0] != "#"]
    theirs = {key: tuple(int(n) for n in shape.strip("(),").split(",") if n.strip()) for key, shape in lines}
    assert {key: tuple(value.shape) for key, value in published_layout(of_size("coco")).items()} == theirs
    assert len(theirs) == 442


def test_san_large_has_the_published_parameters_and_the_same_layout():
    """9.32 million trained numbers, as its log says; blocks 18 to 23 recognise.  No real file of it was at hand."""
    model = of_size("coco-large")
    assert trainable(model) == 9_321_650 and model.vlm.depths == (0, 6, 12, 18)
    state = published_layout(model)
    assert {our_key(key, 18) for key in state if key not in NOT_PARAMETERS} == set(model.state_dict())
    assert {key.split(".")[2] for key in state if key.startswith("clip_rec_head.resblocks")} == set("012345")
    from_published(model, state)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_published_files_are_read_without_running_code(tmp_path, monkeypatch):
    """Under "model" or bare, beside whatever a trainer saved; code, truncation and other content are one line each."""
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    torch.save({"model": state, "iteration": 60_000, "optimizer": {"param_groups": [{"lr": 1e-4}]}}, "whole.pth")
    torch.save(state, "bare.pth")
    for name in ("whole.pth", "bare.pth"):
        assert all(torch.equal(value, state[key]) for key, value in read_published(name).items())
    torch.save({"model": state, "scheduler": Evil()}, "code.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:500])
    torch.save({"model": {"a": 3}}, "numbers.pth")
    torch.save([state], "list.pth")
    for name, says in [("code.pth", "code.pth: is no checkpoint, or holds Python objects"), ("cut.pth", "cut.pth: cannot be read"),
                       ("numbers.pth", "numbers.pth: holds no state dict"), ("list.pth", "is it a SAN checkpoint"),
                       ("none.pth", "none.pth: cannot be read .FileNotFoundError")]:
        with pytest.raises(InputError, match=says) as error:
            read_published(name)
        assert "\n" not in str(error.value)
    assert not Path("ran").exists()


# --- a file becomes a run directory ---


def test_a_published_checkpoint_becomes_a_run_bit_for_bit_and_needs_nothing_else(published, tmp_path, monkeypatch):
    """CLIP included: the file deleted, the directory moved, the network off, every weight and every answer is the same."""
    path, model, config = published
    import_published(path, tmp_path / "runs" / "san", config)
    path.unlink()
    shutil.move(tmp_path / "runs" / "san", tmp_path / "moved")
    monkeypatch.setattr(socket, "socket", None)
    loaded, found = load_run(tmp_path / "moved")
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert found == changed(config, pretrained=str(tmp_path / "moved" / "clip.safetensors"))
    assert torch.equal(model(images(), TEXT)["masks"][0], loaded(images(), TEXT)["masks"][0])
    assert torch.equal(model.vlm.embed_text(["grass"]), loaded.vlm.embed_text(["grass"]))
    assert fingerprint(model) == fingerprint(loaded)


def test_the_run_holds_three_files_and_nothing_but_numbers(published, tmp_path):
    """config.json is flat and names its CLIP by the file beside it."""
    import_published(published[0], tmp_path / "san", published[2])
    assert sorted(p.name for p in (tmp_path / "san").iterdir()) == ["checkpoint.safetensors", "clip.safetensors", "config.json"]
    told = json.loads((tmp_path / "san" / "config.json").read_text())
    assert (told["model"], told["pretrained"], told["width"]) == ("san", "clip.safetensors", 96)


def test_the_clip_of_an_imported_run_cannot_be_swapped(published, tmp_path):
    path, _, config = published
    import_published(path, tmp_path / "san", config)
    torch.manual_seed(9)
    torch.save({"model": published_layout(randomised(build(config)))}, path)
    import_published(path, tmp_path / "other", config)
    shutil.copy(tmp_path / "other" / "clip.safetensors", tmp_path / "san")
    with pytest.raises(InputError, match="trained over other CLIP weights"):
        load_run(tmp_path / "san")


@pytest.mark.parametrize("change, says", [
    (lambda state: state.pop("side_adapter_network.query_embed"), "san.pth: not a SAN.*1 missing: side.query_embed$"),
    (lambda state: state.update({"backbone.0.weight": torch.ones(1)}), "san.pth: not a SAN.*1 unknown: backbone.0.weight$"),
    (lambda state: state.update({"ov_classifier.bg_embed": torch.ones(1, 7)}), r"background \(1, 7\) for \(1, 64\)"),
    (lambda state: [state.pop(key) for key in list(state) if "ov_classifier.t" in key], "san.pth: CLIP's text tower"),
    (lambda state: [state.pop(key) for key in list(state) if "ov_classifier.tr" in key], "24 missing: vlm.model.transformer")],
    ids=["missing", "unknown", "shape", "no text", "half a text"])
def test_what_is_no_published_checkpoint_leaves_nothing_behind(published, tmp_path, change, says):
    path, _, config = published
    state = torch.load(path, weights_only=True)["model"]
    change(state)
    torch.save({"model": state}, path)
    with pytest.raises(InputError, match=says) as error:
        import_published(path, tmp_path / "run", config)
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["san.pth"]


def test_an_import_overwrites_nothing_and_leaves_nothing_half_done(published, tmp_path, monkeypatch):
    """The disk fills up after clip.safetensors; then the name is taken, or cannot be."""
    def full(*_, **__):
        assert any(tmp_path.glob(".*/clip.safetensors"))
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="cannot be written .No space"):
        patch.setattr(san_checkpoints, "save_checkpoint", full)
        import_published(published[0], tmp_path / "run", published[2])
    assert [path.name for path in tmp_path.iterdir()] == ["san.pth"]
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="exists already"):
        import_published(published[0], tmp_path / "run", published[2])
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="cannot be written"):
        import_published(published[0], tmp_path / "file" / "run", published[2])
    assert (tmp_path / "file").read_text() == "precious"


def test_the_import_command_knows_b_from_large_by_its_clip(published, tmp_path, monkeypatch, capsys):
    """Width 768 is ViT-B/16, 1024 is ViT-L/14-336; another, as the world's 128 here, is refused by name."""
    path, _, config = published
    with pytest.raises(InputError, match=r"neither SAN with ViT-B/16.*conv1.weight is \(128, 3, 8, 8\)"):
        main([str(path), "--out", str(tmp_path / "run")])
    with pytest.raises(InputError, match="--out; see --help"):
        main([str(path)])
    asked = []
    monkeypatch.setitem(san_checkpoints.PUBLISHED, 128, "coco-large")
    monkeypatch.setattr(san_checkpoints, "preset", lambda name, model: asked.append((name, model)) or config)
    main([str(path), "--out", str(tmp_path / "run")])
    assert asked == [("coco-large", "san")] and "clip.safetensors in" in capsys.readouterr().out
    assert PUBLISHED[768] == "coco" and preset("coco").net.clip.vlm == "ViT-B-16"
    large = preset("coco-large").net
    assert (PUBLISHED[1024], large.clip.vlm, large.clip.clip_scale, large.side.patch, large.side.grid) == (
        "coco-large", "ViT-L-14-336", 0.7, 16, 40)


def test_from_the_shell_a_failure_ends_with_status_2(tmp_path):
    """The real program: one line on stderr, no traceback, no directory."""
    done = subprocess.run([sys.executable, "-m", "published.san_checkpoints", "gone.pth", "--out", tmp_path / "run"],
                          capture_output=True, text=True, cwd=Path(san_checkpoints.__file__).parent.parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr.startswith("error: gone.pth: cannot be read"), done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.fixture
def small_vit(monkeypatch):
    """open_clip's ViT-B/16 made small, at its own width, which is what the import knows it by."""
    smaller(monkeypatch, {"layers": 4}, {"layers": 1, "width": 8, "heads": 1, "vocab_size": 8}, 4)


SMALL = dict(width=24, depth=4, heads=2, queries=5, head_width=16, depths=(0, 1, 2, 3))


@pytest.mark.parametrize("name, quick", [("ViT-B-16-gelu", False), ("ViT-B-16-quickgelu", True)])
@torch.no_grad()
def test_a_san_over_a_clip_not_openais_says_its_activation_and_then_loads(small_vit, tmp_path, name, quick):
    """Weights that no half precision holds are not OpenAI's.  Without a name: one line, and nothing is left; with it the
    run loads, answers as the model did, and PAT that starts from it stands on the same CLIP."""
    model = randomised(build(preset("coco", "san", vlm=name, pretrained="none", **SMALL)))
    torch.save({"model": published_layout(model)}, tmp_path / "san.pth")
    config = preset("coco", "san", **SMALL)
    with pytest.raises(InputError, match="san.pth: its clip.safetensors: not OpenAI's.*--vlm ViT-B-16-gelu") as error:
        import_published(tmp_path / "san.pth", tmp_path / "run", config)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["san.pth"]
    import_published(tmp_path / "san.pth", tmp_path / "run", config, vlm=name)
    loaded, found = load_run(tmp_path / "run")
    assert found.net.clip.vlm == name and isinstance(loaded.vlm.blocks[0].mlp.gelu, QuickGELU) == quick
    image = images(1, 64, 64)
    assert torch.equal(model.eval()(image, torch.ones(1, 512))["masks"][0], loaded(image, torch.ones(1, 512))["masks"][0])
    clip = train.parse(["--preset", "coco", "--init", str(tmp_path / "run")])[0].run.net.clip
    assert (clip.vlm, clip.pretrained) == (name, str(tmp_path / "run" / "clip.safetensors"))


@torch.no_grad()
def test_a_san_over_openais_clip_needs_no_name(small_vit, tmp_path):
    """Half-precision matrices are OpenAI's, and so is quick-GELU."""
    model = randomised(build(preset("coco", "san", pretrained="none", **SMALL)))
    proj = model.vlm.model.visual.proj
    proj.copy_(proj.half())
    torch.save({"model": published_layout(model)}, tmp_path / "san.pth")
    import_published(tmp_path / "san.pth", tmp_path / "run", preset("coco", "san", **SMALL))
    loaded, found = load_run(tmp_path / "run")
    assert found.net.clip.vlm == "ViT-B-16" and isinstance(loaded.vlm.blocks[0].mlp.gelu, QuickGELU)
