"""What gallery.py promises: a code looks the same everywhere, and every picture has its command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cli import InputError
from data import palette
from pat import PAT, STAGES
from runs import build
from san import SAN
from studies import gallery as G
from studies.patches import patches, patches_of
from tests.helpers import tiny
from world.scenes import World


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(tiny().run).eval()


@pytest.fixture(scope="module")
def scenes():
    return [World("val")[i]["image"] for i in range(2)]


def pixel(picture, x, y):
    return np.asarray(picture)[round(y), round(x)]


# ---- colours ----
def test_a_cluster_wears_the_colour_of_the_code_it_shares_most_with():
    """Cluster 0 is code 2, cluster 2 is code 0; cluster 1, for which no code is left over, gets a colour of its own."""
    token = torch.tensor([[2, 2, 2, 0], [2, 2, 0, 0]])
    cluster = torch.tensor([[0, 0, 0, 2], [1, 0, 2, 2]])
    colours = G.wear([cluster], [token], 3, 2 + 1)
    assert (colours[[0, 2]] == palette(3)[[2, 0]]).all()
    lone = G.wear([torch.tensor([[0, 1]])], [torch.tensor([[0, 0]])], 2, 1)
    assert (lone[0] == palette(1)[0]).all() and (lone[1] != palette(1)[0]).any()


def test_a_code_has_one_colour_in_every_picture(model, scenes):
    """The upper left and lower right token of "late", as the token map, Fig. 1, Fig. 6 and the patches' key show it."""
    f, cell = G.stage_maps(model, scenes[0]), 80
    index = f.index["late"]
    fig1, fig6 = G.stages(model, scenes[:1], cell=cell), G.clustering(model, scenes[:1], stage="late", cell=cell)
    below = 24 + cell + 4 + 18                                # under the first row of pictures and its captions
    for at, code in ((2, index[0, 0]), (cell - 3, index[-1, -1])):
        colour = palette(int(code) + 1)[code]
        assert (pixel(fig1, 4 + 3 * 84 + at, below + at) == colour).all()
        assert (pixel(fig6, 4 + 3 * 84 + at, 24 + at) == colour).all()
    examples = {stage: (np.zeros((4, 2, 16, 16, 3), np.uint8), torch.tensor([0, 0, 5, 1])) for stage in STAGES}
    drawn = np.asarray(patches(model, examples)).reshape(-1, 3).tolist()
    assert palette(3)[2].tolist() in drawn and palette(1)[0].tolist() not in drawn        # code 0 was never used


# ---- one image ----
def test_figure_six_shows_three_scenarios_in_their_order():
    """One object on one ground, one over two, several: the first of each, whatever comes first; without, the first three."""
    class Labelled(list):
        groups = {"stuff": (8, 9)}

    labels = ([8], [0, 1, 8], [0, 8, 9], [0, 8], [1, 9], [0, 1, 2, 9])
    images = [dict(image=i, label=torch.tensor([*names, -1])) for i, names in enumerate(labels)]
    assert G.scenarios(Labelled(images)) == [3, 2, 1]
    assert G.scenarios(Labelled(images[:3])) == [0, 1, 2] == G.scenarios(images)
    assert G.scenarios(images[:1]) == [0]


def test_what_figure_six_clusters_is_what_the_quantiser_saw(model, scenes):
    """Assigned again, it has the codes of the picture's last column."""
    f = G.stage_maps(model, scenes[0])
    assert f.x["latent"].shape[1:] == f.index["latent"].shape
    codes = model.codebook("latent")
    again = model.latent.choose(f.x["latent"].flatten(1).T, codes)
    assert torch.equal(again, f.index["latent"].flatten())


def test_stage_maps_are_what_the_model_computed(model, scenes):
    """Raw maps are CLIP's own; codes and picture those of an ordinary forward with names."""
    f, image = G.stage_maps(model, scenes[0]), scenes[0]
    with torch.no_grad():
        out = model(image[None], model.vlm.embed_text(["red star", "grass"]))
        clip_maps = model.vlm.features(image[None]).maps
    for stage, raw in zip(STAGES[:3], clip_maps[1:]):
        assert torch.equal(f.raw[stage], raw[0])
    assert all(torch.equal(f.index[stage], out["tokens"][stage].index[0]) for stage in STAGES)
    assert torch.equal(f.painted, out["image"][0].clamp(0, 1))
    assert torch.allclose(model.vlm.project(f.raw["latent"].flatten(1).T[None]).norm(dim=-1), torch.ones(1, 64))


def test_all_stages_repaint_the_reconstruction_and_fewer_do_not(model, scenes):
    f = G.stage_maps(model, scenes[0])
    assert torch.allclose(G.repaint(model, f.zq).clamp(0, 1), f.painted, atol=1e-6)
    latent = G.repaint(model, {"latent": f.zq["latent"]})
    zeros = {stage: zq if stage == "latent" else torch.zeros_like(zq) for stage, zq in f.zq.items()}
    assert torch.equal(latent, G.repaint(model, zeros))       # a missing stage is a zero condition
    assert not torch.allclose(latent.clamp(0, 1), f.painted, atol=1e-5)                   # a new pixel head hardly speaks


# ---- curves ----
def test_curves_draw_codebooks_only_where_there_are_any():
    line = {"lr": 1e-3, "ce_2": 2.0, "mask_2": 0.5, "dice_2": 0.6}
    san = G.curves([{"step": s, **line} for s in (9, 19)], SAN)
    pat = G.curves([{"step": s, **line, "vq": 0.1, "l1": 0.2, "late": {"perplexity": 5.0}} for s in (9, 19)], PAT)
    assert san.width == pat.width == 900 and pat.height > 1.7 * san.height


def test_a_model_with_a_loss_of_its_own_draws_it(monkeypatch):
    """Panels and lines are those its class names, from the log's keys; a key that the log lacks is no line; a term that no
    panel names is drawn all the same, in one of its own."""
    class Sibling(SAN):
        curves, stages = {"grouping": {"entropy": "h", "gone": "never logged"}, "names": {"ce": "ce"}}, ("groups",)

    drawn = {}
    monkeypatch.setattr(G, "plot", lambda figure, box, title, lines, log, steps: drawn.update({title: (lines, log)}))
    lines = [{"step": s, "lr": 1e-3, "grad_norm": 9.0, "h": 2.0 + s, "ce": 0.5, "ms_per_step": 3.0, "memory_gb": None,
              "groups": {"perplexity": 7.0}} for s in (4, 9)]
    picture = G.curves(lines, Sibling)
    assert drawn == {"grouping, unweighted (log)": ({"entropy": [(5, 6.0), (10, 11.0)], "gone": []}, True),
                     "names, unweighted (log)": ({"ce": [(5, 0.5), (10, 0.5)]}, True),
                     "perplexity: how many codes are in use": ({"groups": [(5, 7.0), (10, 7.0)]}, False),
                     "learning rate, in units of 0.0001": ({"rate": [(5, 10.0), (10, 10.0)]}, False)}
    assert picture.height == G.curves([{"step": 0, "lr": 1e-3}], PAT).height              # four panels both
    G.curves([{**line, "new": 0.1} for line in lines], Sibling)
    assert drawn["other terms, unweighted (log)"] == ({"new": [(5, 0.1), (10, 0.1)]}, True)
    Sibling.stages = ()
    assert G.curves([{"step": 0, "lr": 1e-3}], Sibling).height == picture.height          # three: two rows as well


def test_the_command_finds_the_curves_of_its_runs_model_without_weights(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model": "san"}))
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "lr": 1e-3}) + "\n")
    kinds = []
    monkeypatch.setattr(G, "curves", lambda lines, kind: kinds.append(kind) or Image.new("RGB", (8, 8)))
    G.main(["curves", str(tmp_path)])
    assert kinds == [SAN] and (tmp_path / "pictures/curves.png").is_file()


# ---- sheets and commands ----
def test_a_run_gets_every_picture_it_can_have(model, tmp_path):
    line = {"step": 0, "lr": 1e-3, "ce_2": 2.0, "mask_2": 0.5, "dice_2": 0.6}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    drawn = G.run_pictures(tmp_path, model, World("val", 3), patches_of(model, World("val", 3), 3))
    assert set(drawn) == {"stages", "clustering", "pyramid", "masks", "patches", "curves"} == set(G.NAMES) - {"eq1", "modes"}
    assert all(isinstance(picture, Image.Image) for picture in drawn.values()) and not model.training
    san = build(tiny("san").run).train()
    assert set(G.run_pictures(tmp_path, san, World("val", 3), {})) == {"masks", "curves"}
    assert san.training                                       # as it was found
    (tmp_path / "log.jsonl").unlink()                         # an imported run
    assert set(G.run_pictures(tmp_path, san, World("val", 3), {})) == {"masks"}


def test_a_photo_of_any_size_with_words_of_its_own(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(G, "load_run", lambda run, device="cpu": (model, tiny().run))
    monkeypatch.setattr(G, "load_config", lambda run: tiny().run)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 131, 3), np.uint8)).save(tmp_path / "photo.png")
    image = str(tmp_path / "photo.png")
    G.main(["masks", str(tmp_path), "--image", image, "--labels", "fog, a very long name"])
    G.main(["pyramid", str(tmp_path), "--image", image])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"masks-photo.png", "pyramid-photo.png"}
    assert "written: " in capsys.readouterr().out
    assert Image.open(tmp_path / "pictures/masks-photo.png").width == 4 + 2 * 450         # no ground truth, no column


@pytest.mark.parametrize("argv, part", [
    (["eq1", "runs/a"], "leave runs/a out"), (["stages"], "give the run directory"), (["colours"], "invalid choice"),
    (["patches", "r", "--image", "a.png"], "--image is for"), (["masks", "r", "--image", "a.png"], "--labels"),
    (["stages", "r", "--labels", "a"], "--labels"), (["stages", "r", "--images", "3"], "--images"),
    (["curves", "r", "--data", "d"], "leave --data out"), (["eq1", "--out", "no/such/place.png"], "existing folder"),
    (["curves", "no-such-run"], "log.jsonl"), (["stages", "no-such-run"], "config.json"),
    (["stages", "r", "--kappa", "3"], "unknown argument --kappa")], ids=lambda v: v if isinstance(v, str) else None)
def test_wrong_commands_end_in_one_line(argv, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=part) as error:
        G.main(argv)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_san_has_no_tokens_to_show(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "san"}))
    with pytest.raises(InputError, match="SAN has no tokens, so stages has nothing to show"):
        G.main(["stages", str(tmp_path)])


def test_captions_count_what_is_drawn_and_not_the_padding():
    """2x2 cells over 16x16 of which 16x8 is picture: two cells, both 5."""
    f = SimpleNamespace(crop=(16, 8), padded=(16, 16))
    assert G.counted(f, torch.tensor([[5, 1], [5, 2]]), "code") == "2x1: 1 code"
    assert G.counted(f, torch.tensor([[5, 1], [6, 2]]), "codes", 9) == "2x1: 2 codes of 9"
