"""What gallery.py promises: a code looks the same everywhere, names lie in their regions, curves tell the numbers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import gallery as G
from hsattn import g, mean_shift
from images import InputError, palette, to_tensor, to_unit
from pat import STAGES, build
from pictures import INK, Axis, Figure, contact_sheet, place, plot, spread, write_names
from test_train import tiny
from vq import Tokens
from world import World


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(tiny()).eval()


@pytest.fixture(scope="module")
def scenes():
    return [World("val")[i]["image"] for i in range(2)]


def pixel(picture, x, y):
    return np.asarray(picture)[round(y), round(x)]


# ---- Eq. 1 and mean shift ----
def test_rows_are_softmax_over_the_features_and_columns_argmax_over_the_codes():
    """Two codes, three features at 0, 60 and 90 degrees: every cosine is known."""
    codes, features = G.on_circle((0, 90)), G.on_circle((0, 60, 90))
    scores, weights, moved, index = G.two_readings(codes, features, 2.0)
    half, root = 0.5, 3**0.5 / 2
    assert torch.allclose(scores, 2 * torch.tensor([[1, half, 0], [0, root, 1]]), atol=1e-6)
    e = torch.tensor([[2.0, 1.0, 0.0]]).exp()
    assert torch.allclose(weights[:1], e / e.sum(), atol=1e-6)
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert not torch.allclose(weights.sum(0), torch.ones(3), atol=0.05)
    assert torch.allclose(moved, g(weights @ features), atol=1e-6)
    assert index.tolist() == [0, 1, 1]


def test_the_picture_of_eq1_paints_each_feature_in_the_colour_of_the_code_it_takes():
    """Features a-d take code 1, e-h code 2, i-l code 3; code 4, which none takes, is the lesson about dead codes."""
    *_, index = G.two_readings(G.on_circle(G.CODES), G.on_circle(G.FEATURES), 10.0)
    assert index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    drawn = np.asarray(G.eq1())
    column = 352 + 40 * np.arange(12) + 8                     # a place in each column, left of its number
    row = 70 + 2 * 262 + 74 + 36 * np.arange(4) + 6
    for j in range(12):
        assert [(drawn[row[i], column[j]] == INK[i]).all() for i in range(4)] == [i == index[j] for i in range(4)]


def test_a_wider_kernel_finds_fewer_modes():
    """kappa 1 sees one bunch, 10 the three that were made, 100 splits them."""
    points = G.bunches()
    assert [int(G.merged(mean_shift(points, points, kappa, 200)[0]).max()) + 1 for kappa in (1, 10, 100)] == [1, 3, 6]


def test_modes_on_one_spot_are_one():
    assert G.merged(G.on_circle((0, 120, 0.5, 240, 119.5))).tolist() == [0, 1, 0, 2, 1]


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
    fig1, fig6 = G.stages(model, scenes[:1], cell=cell), G.clustering(model, scenes[:1], (5,), cell=cell)
    below = 24 + cell + 4 + 18                                # under the first row of pictures and its captions
    for at, code in ((2, index[0, 0]), (cell - 3, index[-1, -1])):
        colour = palette(int(code) + 1)[code]
        assert (pixel(fig1, 4 + 3 * 84 + at, below + at) == colour).all()
        assert (pixel(fig6, 4 + 2 * 84 + at, 24 + at) == colour).all()
    found = {stage: (np.zeros((4, 2, 16, 16, 3), np.uint8), torch.tensor([0, 0, 5, 1])) for stage in STAGES}
    drawn = np.asarray(G.patches(model, found)).reshape(-1, 3).tolist()
    assert palette(3)[2].tolist() in drawn and palette(1)[0].tolist() not in drawn        # code 0 was never used


# ---- one image ----
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
    assert not torch.allclose(latent.clamp(0, 1), f.painted, atol=1e-3)


def test_padding_is_not_drawn():
    """A token map of 2x2 over 16x16, of which 16x8 is picture: only its left column shows."""
    index = torch.tensor([[0, 1], [2, 3]])
    assert spread(index, (16, 8), (16, 16), (4, 2)).tolist() == [[0, 0], [0, 0], [2, 2], [2, 2]]


# ---- names on masks ----
def ellipse(h, w, y, x, a, b):
    yy, xx = np.mgrid[:h, :w]
    return ((yy - y) / a) ** 2 + ((xx - x) / b) ** 2 < 1


@pytest.mark.parametrize("region, lines", [
    (ellipse(120, 160, 60, 50, 40, 45), 2), (ellipse(120, 160, 30, 100, 20, 55), 1),
    (ellipse(200, 160, 100, 80, 95, 30), 2)], ids=["round", "flat", "tall"])
def test_a_name_is_written_inside_its_region(region, lines):
    """Nothing outside the region changes, and something inside does; only the flat one has the name on one line."""
    picture = np.full((*region.shape, 3), 128, np.uint8)
    written = write_names(picture, np.where(region, 0, -1), ["orange circle"])
    changed = (written != picture).any(-1)
    assert changed.any() and not changed[~region].any()
    assert (written == 255).all(-1).any() and (written == 20).all(-1).any()               # white, outlined
    text, _, box = place(region, "orange circle")
    assert text.split("\n") == (["orange circle"] if lines == 1 else ["orange", "circle"])
    assert region[box[1]:box[3], box[0]:box[2]].all()


def test_a_region_too_small_for_its_name_is_named_around_its_middle_within_the_picture():
    region = np.zeros((40, 160), bool)
    region[10:14, 2:8] = True
    _, _, (left, top, right, bottom) = place(region, "orange circle")
    assert left == 0 and 0 <= top <= 11 < bottom <= 40 and right <= 160


def test_each_region_of_a_name_is_named_and_specks_are_not():
    prediction = np.full((60, 300), -1)
    prediction[:, :100], prediction[:, 200:], prediction[30, 150] = 0, 0, 0
    written = write_names(np.zeros((60, 300, 3), np.uint8), prediction, ["sky"]).any(-1)
    assert written[:, :100].any() and written[:, 200:].any() and not written[:, 100:200].any()


# ---- what a code means ----
ANGLES = {60: 0.0, 100: 0.1, 140: 0.2, 200: 1.5}             # grey value of a cell -> direction of its feature


class GreyModel:
    """Cells of 8x8 pixels; a cell's grey value decides its feature.  Codes at 0 rad, 1.5 rad, and one behind."""

    stride, training, config = 8, False, SimpleNamespace(short_side=32, model="pat")
    vlm = SimpleNamespace(text_width=4)

    def eval(self):
        return self

    to = train = lambda self, *_: self

    def codebook(self, stage):
        angles = torch.tensor([0.0, 1.5, 4.0])
        return torch.stack([angles.cos(), angles.sin()], 1)

    def __call__(self, image, text):
        grey = (255 * to_unit(image)).round()[0, 0, 4::8, 4::8]
        angles = torch.tensor([[ANGLES.get(int(v), 4.0) for v in row] for row in grey.tolist()])
        x = torch.stack([angles.cos(), angles.sin()])[None]                               # (1,2,a,b)
        index = torch.einsum("kd,bdhw->bkhw", self.codebook(""), x).argmax(1)
        zq = self.codebook("")[index].permute(0, 3, 1, 2)
        return {"tokens": {stage: Tokens(zq, index, x, None, None) for stage in STAGES}}


def grey_image(cells, width=None):
    picture = np.repeat(np.repeat(np.array(cells, np.uint8), 8, 0), 8, 1)[..., None].repeat(3, 2)
    return {"image": to_tensor(picture[:, :width])}


def test_patches_of_a_code_are_those_that_point_at_it_most_one_image_each_first():
    """Code 0 lies at 0 rad: grey 60 matches exactly, 100 is 0.1 off, 140 is 0.2 off.

    Image A has 60, 60 and 100, image B 140: with two slots, A gives one and B the other although A has three better.
    With four, A's others follow, in the order of their cosines.
    """
    data = [grey_image([[60, 60], [100, 200]]), grey_image([[140, 200], [200, 200]])]
    two, counts = G.patches_of(GreyModel(), data, 2, each=2)["late"]
    assert two.shape == (3, 2, 8, 8, 3) and two.dtype == np.uint8 and counts.tolist() == [4, 4, 0]
    assert two[0, :, 4, 4, 0].tolist() == [60, 140]
    four = G.patches_of(GreyModel(), data, 2, each=4)["late"][0]
    assert four[0, :, 4, 4, 0].tolist() == [60, 60, 100, 140]
    five = G.patches_of(GreyModel(), data, 2, each=5)["late"][0]
    assert (five[0, 4] == 255).all() and (five[2] == 255).all()                           # unused slots are white
    assert G.patches_of(GreyModel(), data, 1)["late"][1].tolist() == [3, 1, 0]            # only the first image


def test_a_patch_has_its_cell_in_the_middle_and_grey_beyond_the_image():
    """A patch shows 8 pixels here, the cell itself; with a short side of 64 it shows 16, so 4 beyond on each side."""
    model, data = GreyModel(), [grey_image([[60, 200], [200, 200]])]
    model.config = SimpleNamespace(short_side=64, model="pat")
    patch = G.patches_of(model, data, 1, each=1)["mid"][0][0, 0, ..., 0]                  # (16,16)
    assert (patch[:4] == 232).all() and (patch[:, :4] == 232).all()
    assert (patch[4:12, 4:12] == 60).all() and (patch[12:, 4:] == 200).all()


def test_cells_whose_middle_is_padding_are_not_counted():
    """12 pixels wide, padded to 16: the middle of the second column is at 12, just outside; at 13 wide it is inside."""
    cells = [[60, 200], [60, 200]]
    assert G.patches_of(GreyModel(), [grey_image(cells, 12)], 1)["early"][1].tolist() == [2, 0, 0]
    assert G.patches_of(GreyModel(), [grey_image(cells, 13)], 1)["early"][1].tolist() == [2, 2, 0]


# ---- curves ----
def test_axes_put_values_at_their_pixels_and_have_round_ticks():
    across, up = Axis(0, 1000, 50, 250), Axis(0.01, 1, 200, 100, log=True)
    assert across(0) == 50 and across(250) == 100 and across(1000) == 250
    assert up(0.1) == pytest.approx(150) and up(1) == pytest.approx(100)                  # a decade is half the height
    assert across.ticks() == [0, 200, 400, 600, 800, 1000]
    assert up.ticks() == pytest.approx([0.01, 0.1, 1]) and Axis(1, 6, 0, 1, log=True).ticks() == [1, 2, 5]


def test_a_known_point_is_drawn_at_its_pixel():
    """A line from (0,1) to (100,100) on a log axis passes (50,10) and not (50,50)."""
    figure = Figure(300, 200)
    across, up = plot(figure, (40, 30, 240, 180), "", {"a": [(0, 1.0), (100, 100.0)]}, log=True, steps=100)
    drawn = figure.image()
    assert (pixel(drawn, across(100), up(100)) == INK[0]).all()                           # the end, a dot
    assert np.abs(pixel(drawn, across(50), up(10)).astype(int) - INK[0]).max() < 90       # on the line, half covered
    assert (pixel(drawn, across(50), up(50)) == 255).all()


def test_curves_draw_codebooks_only_where_there_are_any():
    line = {"lr": 1e-3, "ce_2": 2.0, "mask_2": 0.5, "dice_2": 0.6}
    san = G.curves([{"step": s, **line} for s in (9, 19)])
    pat = G.curves([{"step": s, **line, "vq": 0.1, "l1": 0.2, "late": {"perplexity": 5.0}} for s in (9, 19)])
    assert san.width == pat.width == 900 and pat.height > 1.7 * san.height


# ---- sheets and commands ----
def test_captions_stay_under_their_pictures():
    """A caption too long is set smaller and then cut: nothing is drawn in the gap beside its cell."""
    cell = np.full((50, 50, 3), 200, np.uint8)
    sheet = np.asarray(contact_sheet([[cell, cell]], ["a", "b"], 50, [["x" * 60, ""]]))
    strip = sheet[24 + 50:, :, 0]
    assert (strip[:, 4:54] < 200).any() and (strip[:, 54:] == 255).all()


def test_a_run_gets_every_picture_it_can_have(model, tmp_path):
    line = {"step": 0, "lr": 1e-3, "ce_2": 2.0, "mask_2": 0.5, "dice_2": 0.6}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    drawn = G.run_pictures(tmp_path, model, World("val", 3), 3)
    assert {path.relative_to(tmp_path).as_posix() for path in drawn} == {
        f"pictures/{name}.png" for name in ("stages", "clustering", "pyramid", "masks", "patches", "curves")}
    assert all(isinstance(picture, Image.Image) for picture in drawn.values()) and not model.training
    san = build(tiny(model="san")).train()
    assert {path.stem for path in G.run_pictures(tmp_path, san, World("val", 3), 3)} == {"masks", "curves"}
    assert san.training                                       # as it was found


def test_a_photo_of_any_size_with_words_of_its_own(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(G, "load_run", lambda run, device="cpu": (model, model.config))
    monkeypatch.setattr(G, "load_config", lambda run: model.config)
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
