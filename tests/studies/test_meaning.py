"""What meaning.py promises: scores worked by hand, clusters that earn their name, and every row on the same pixels."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import maximum_filter

from cli import InputError
from pat import STAGES
from runs import build
from studies import meaning as M
from tests.helpers import save_run, tiny
from vq import nearest
from world.scenes import NOUNS, PARTS, TEXTURES, WORLD_NAMES, World

# --- a map against the labels ---------------------------------------------------------------------------------------

#                      label:  0  1
HALF_RIGHT = torch.tensor([[3, 1],                            # code 0
                           [0, 4]])                           # code 1


def test_purity_by_hand():
    """Code 0 is named label 0 (3 of 4 right), code 1 label 1 (4 of 4): 7 of 8."""
    assert M.purity(HALF_RIGHT) == 7 / 8


def test_nmi_by_hand():
    """p = 3/8, 1/8, 4/8: I = H(code) + H(label) - H(both), over the mean of the first two."""
    code, label = math.log(2), -(3 / 8 * math.log(3 / 8) + 5 / 8 * math.log(5 / 8))
    both = -(3 / 8 * math.log(3 / 8) + 1 / 8 * math.log(1 / 8) + 1 / 2 * math.log(1 / 2))
    assert M.nmi(HALF_RIGHT) == pytest.approx(2 * (code + label - both) / (code + label))
    assert M.nmi(HALF_RIGHT.T) == pytest.approx(M.nmi(HALF_RIGHT))
    assert M.nmi(1000 * HALF_RIGHT) == pytest.approx(M.nmi(HALF_RIGHT))


def test_nmi_is_the_divergence_from_independence():
    """I = Σ p log(p / (p_k p_l)), summed term by term, on a table with empty cells and an unused code."""
    table = torch.tensor([[5, 0, 2], [0, 0, 0], [1, 7, 3], [0, 4, 0]])
    p = table.numpy() / 22
    k, l = p.sum(1), p.sum(0)
    mutual = sum(p[i, j] * math.log(p[i, j] / (k[i] * l[j])) for i in range(4) for j in range(3) if p[i, j])
    mean = -sum(x * math.log(x) for q in (k, l) for x in q if x) / 2
    assert M.nmi(table) == pytest.approx(mutual / mean)


def test_maps_that_are_the_same_or_have_nothing_to_do_with_each_other():
    """A renamed map tells everything, every code on every label equally often nothing, a single code nothing."""
    assert M.nmi(torch.tensor([[0, 5, 0], [2, 0, 0], [0, 0, 9]])) == pytest.approx(1)
    assert M.nmi(torch.outer(torch.tensor([1, 2, 3]), torch.tensor([4, 5]))) == pytest.approx(0, abs=1e-12)
    assert M.nmi(torch.tensor([[3, 4], [0, 0]])) == 0
    assert math.isnan(M.nmi(torch.zeros(2, 2))) and math.isnan(M.purity(torch.zeros(2, 2)))


def test_unlabelled_pixels_are_not_counted():
    said, label = torch.tensor([[0, 1, 1], [2, 2, 0]]), torch.tensor([[1, 1, -1], [0, 0, -1]])
    assert M.count_pairs(said, label, 3, 2).tolist() == [[0, 1], [0, 1], [2, 0]]


# --- borders --------------------------------------------------------------------------------------------------------

LABEL = torch.tensor([[0, 0, 1, 1]] * 4)                      # one border, columns 1 | 2


def test_borders_are_the_pixels_on_both_sides_of_a_change():
    assert M.borders(LABEL).tolist() == [[False, True, True, False]] * 4
    corner = torch.tensor([[5, 5, 5], [5, 5, 7]])
    assert M.borders(corner).int().tolist() == [[0, 0, 1], [0, 1, 1]]


def test_border_recall_and_precision_by_hand():
    """Codes change between columns 0 | 1 in the two upper rows only.

    The label's border pixels are columns 1, 2 of four rows: 8.  Code borders are columns 0, 1 of rows 0, 1, and row 1 |
    row 2 in column 0: (0,0) (0,1) (1,0) (1,1) (2,0), 5.  With no tolerance (0,1) and (1,1) hit: 2 of 8, 2 of 5.  Within
    one pixel also (0,2) (1,2) (2,1) (2,2) of the labels are found, by (1,1), and (3,1), by (2,0): 7 of 8; and all
    of the codes' are right.
    """
    said = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert M.count_borders(said, LABEL, 0).tolist() == [8, 2, 5, 2]
    assert M.count_borders(said, LABEL, 1).tolist() == [8, 7, 5, 5]
    assert M.count_borders(LABEL + 4, LABEL, 0).tolist() == [8, 8, 8, 8]
    assert M.count_borders(torch.zeros_like(LABEL), LABEL, 1).tolist() == [8, 0, 0, 0]


def test_a_border_to_the_unknown_is_none():
    """Column 2 is unlabelled: no label border, and code borders on it are neither right nor wrong."""
    label, said = LABEL.clone(), torch.tensor([[0, 0, 1, 0]] * 4)
    label[:, 2] = -1
    assert M.count_borders(said, label, 0).tolist() == [0, 0, 8, 0]       # columns 1 and 3 of 1, 2, 3


def test_near_is_a_square_of_the_tolerance():
    border = torch.rand(9, 13) < 0.05
    assert (M.near(border, 2).numpy() == maximum_filter(border.numpy(), size=5, mode="constant")).all()


def test_the_tolerance_grows_with_the_image():
    assert [M.tolerance_of(size) for size in ((64, 64), (640, 640), (4, 4))] == [1, 7, 1]


# --- spherical k-means ----------------------------------------------------------------------------------------------


def bunches(n=50, seed=0):
    """Three tight bunches around the axes, lengths of all kinds -> (3n,3), which bunch (3n)."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(3).repeat(n)
    x = torch.eye(3)[which] + 0.1 * torch.randn(3 * n, 3, generator=generator)
    return x * (0.1 + 10 * torch.rand(3 * n, 1, generator=generator)), which


def test_kmeans_finds_separated_bunches_whatever_their_lengths():
    for seed in range(5):
        x, which = bunches(seed=seed)
        index, centres = M.spherical_kmeans(x, 3, seed)
        assert M.nmi(M.count_pairs(index, which, 3, 3)) == pytest.approx(1)
        assert torch.allclose(centres.norm(dim=1), torch.ones(3))
        assert F.cosine_similarity(centres[index], torch.eye(3)[which]).min() > 0.99


def test_the_cost_of_kmeans_never_rises():
    """With structureless features and many clusters, step by step; and it ends where nothing changes any more."""
    x = torch.randn(400, 6)
    cost = []
    for steps in range(25):
        index, centres = M.spherical_kmeans(x, 40, 3, steps)
        cost.append((1 - F.cosine_similarity(x.double(), centres[index].double())).mean().item())
    assert all(b <= a + 1e-9 for a, b in zip(cost, cost[1:])) and cost[-1] < 0.9 * cost[0]
    index, centres = M.spherical_kmeans(x, 40, 3, 200)
    assert torch.equal(index, nearest(F.normalize(x), centres))
    means = torch.stack([F.normalize(x)[index == k].mean(0) for k in range(40)])
    assert torch.allclose(F.normalize(means), centres, atol=1e-5)


def test_one_step_of_kmeans_is_the_loop_one_would_write(monkeypatch):
    """From given centres: argmax of the cosine, mean direction per cluster, argmax again, in numpy."""
    x, start = torch.randn(30, 4), F.normalize(torch.randn(5, 4))
    monkeypatch.setattr(M, "spread_seeds", lambda x, K, generator: start)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    first = [int(np.argmax([row @ c for c in start.numpy()])) for row in unit]
    assert set(first) == set(range(5))
    moved = np.stack([np.sum([row for row, k in zip(unit, first) if k == j], 0) for j in range(5)])
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    index, centres = M.spherical_kmeans(x, 5, 0, steps=1)
    assert np.allclose(centres, moved, atol=1e-6) and index.tolist() == np.argmax(unit @ moved.T, 1).tolist()


def test_a_centre_without_features_moves_to_the_worst_off(monkeypatch):
    """Nobody chooses the third centre: in one step it goes to the lone feature, which is far from the other two."""
    x = torch.tensor([[1.0, 0, 0]] * 6 + [[0.9, 0.1, 0]] * 6 + [[0, 0, 1.0]])
    start = F.normalize(torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [-1.0, -1, -1]]))
    monkeypatch.setattr(M, "spread_seeds", lambda x, K, generator: start)
    index, centres = M.spherical_kmeans(x, 3, 0, steps=1)
    assert index[-1] == 2 and (index[:-1] < 2).all() and centres[2].tolist() == [0, 0, 1]


def test_the_same_seed_gives_the_same_clusters():
    x = torch.randn(300, 5)
    a, b, other = (M.spherical_kmeans(x, 10, seed) for seed in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], other[0])


def test_seeds_are_spread_and_repeat_only_where_there_is_no_choice():
    x = F.normalize(torch.eye(4).repeat(20, 1))
    seeds = M.spread_seeds(x, 4, torch.Generator().manual_seed(0))
    assert seeds.sum(0).tolist() == [1, 1, 1, 1]              # one of each direction, however it is drawn
    assert len(M.spread_seeds(x, 9, torch.Generator().manual_seed(0))) == 9
    with pytest.raises(ValueError, match="3 features for 4 clusters"):
        M.spherical_kmeans(torch.randn(3, 2), 4, 0)


# --- the grids ------------------------------------------------------------------------------------------------------


def test_every_pixel_lies_in_its_cell_and_a_cell_has_its_commonest_label():
    """8x8 of which 8x6 is image, cells of 4 pixels, drawn twice as large: columns 0-7 | 8-11."""
    rows, columns = M.cells_of((16, 12), (2, 2), (8, 6), (8, 8))
    assert rows.tolist() == [0] * 8 + [1] * 8 and columns.tolist() == [0] * 8 + [1] * 4
    label = torch.zeros(16, 12, dtype=torch.int64)
    label[:5, :8], label[8:, 8:], label[:8, 8:] = 2, 1, -1
    assert M.commonest(label, rows, columns, (2, 2), 3).tolist() == [[2, 0], [0, 1]]


def test_every_pixel_of_an_object_has_a_colour_a_texture_a_part_and_a_noun():
    """As its name says; a pixel of stuff has none of the four, and a dataset that does not know is not asked."""
    for sample in World(length=5):
        label, answers = sample["label"], M.ask(sample)
        assert list(answers) == list(M.QUESTIONS) == ["colour", "texture", "part", "noun"]
        assert all(bool((answer[label >= 64] == -1).all()) for answer in answers.values())
        for y, x in (label < 64).nonzero()[::97].tolist():
            texture, noun = WORLD_NAMES[label[y, x]].split()
            assert TEXTURES[answers["texture"][y, x]] == texture and [*NOUNS][answers["noun"][y, x]] == noun
            assert PARTS[answers["part"][y, x]] in NOUNS[noun] and 0 <= answers["colour"][y, x] < 8
    assert M.ask({"label": label}) == {}


def test_codes_that_are_colours_tell_all_of_the_colour_and_little_of_the_rest():
    """NMI with colour 1, with texture, part and noun far below: colours are drawn at random."""
    tables = {question: torch.zeros(8, n, dtype=torch.int64) for question, n in M.QUESTIONS.items()}
    for sample in World(length=200):
        answers = M.ask(sample)
        for question, n in M.QUESTIONS.items():
            tables[question] += M.count_pairs(answers["colour"].clamp(min=0), answers[question], 8, n)
    assert M.nmi(tables["colour"]) == pytest.approx(1)
    assert max(M.nmi(tables[question]) for question in ("texture", "part", "noun")) < 0.1        # of 400 objects, by chance


# --- the whole table ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """An untrained PAT over a random CLIP in a run directory, and its model."""
    torch.manual_seed(0)
    model = build(tiny().run)
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", model, tiny()), model.eval()


def test_the_command_writes_what_it_prints(tiny_run, capsys):
    run, model = tiny_run
    M.main([str(run), "--images", "12"])
    text = (run / "meaning.txt").read_text()
    assert capsys.readouterr().out == text
    M.main([str(run), "--images", "12", "--json"])
    printed = capsys.readouterr().out
    assert printed == (run / "meaning.json").read_text() and (run / "meaning.txt").read_text() == text
    table = json.loads(printed)
    assert (table["images"], table["fitted"], list(table["stages"])) == (6, 6, list(STAGES))
    for stage, found in table["stages"].items():
        assert list(found["rows"]) == list(M.ROWS) and found["codes"] == len(model.codebook(stage))
        for name, row in found["rows"].items():
            assert 0 <= row["NMI"] <= 1 and 0 < row["purity"] <= 1 and 0 <= row["precision"] <= 1, (stage, name)
            assert row["perplexity"] <= row["used"] + 1e-9
            assert (row["cosine"] is None) == (name in (M.RANDOM, M.LABELS))
        assert found["rows"][M.LABELS]["purity"] > found["rows"][M.RANDOM]["purity"]
    assert table["stages"]["early"]["grid"] == [32, 32] and "NMI noun" in text
    rows = table["stages"]["latent"]["rows"]
    more = [rows[M.TOKENS][key] - max(rows[M.RAW][key], rows[M.CENTRED][key]) for key in ("purity", "NMI")]
    assert text.splitlines()[-1].split()[:3] == ["latent", *(f"{difference:+.3f}" for difference in more)]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.safetensors", "config.json", "meaning.json",
                                                           "meaning.txt"]


def test_the_tokens_row_is_counted_as_one_would_by_hand(tiny_run):
    """Every pixel of the scored scenes, one by one, against the code of its cell."""
    _, model = tiny_run
    model.train()
    result, dataset = M.compare(model, World("val", 8), seed=1, progress=False), World("val", 8)
    assert model.training
    model.eval()
    counts = {}
    for i in range(4):
        image, label = dataset[i]["image"], dataset[i]["label"].tolist()
        with torch.no_grad():
            index = model(image[None], torch.randn(3, model.vlm.text_width))["tokens"]["mid"].index[0].tolist()
        for y in range(64):
            for x in range(64):
                key = index[y // 4][x // 4], label[y][x]
                counts[key] = counts.get(key, 0) + 1
    best = {}
    for (code, _), n in counts.items():
        best[code] = max(best.get(code, 0), n)
    assert result["stages"]["mid"]["rows"][M.TOKENS]["purity"] == pytest.approx(sum(best.values()) / (4 * 4096))
    assert result["stages"]["mid"]["rows"][M.TOKENS]["used"] == len(best)


def test_clusters_never_see_the_images_they_are_scored_on(tiny_run, monkeypatch):
    asked, original = [], World.__getitem__
    monkeypatch.setattr(World, "__getitem__", lambda self, i: asked.append(i) or original(self, i))
    M.compare(tiny_run[1], World("val", 9), images=7, progress=False)
    assert asked == [4, 5, 6, 0, 1, 2, 3]


def test_raw_features_are_clips_and_brought_to_the_stages_grid(tiny_run):
    """Early, mid, late: CLIP's maps at depths 1/4, 1/2, 3/4; latent: all of its blocks, as open_clip runs them."""
    _, model = tiny_run
    image = World("val", 1)[0]["image"]
    _, seen = M.look(model, image)
    pyramid = model.vlm.features(image[None])
    for stage, clip_map in zip(STAGES, pyramid.maps[1:]):
        want = F.interpolate(clip_map, size=seen[stage][0], mode="bilinear")[0]
        assert torch.allclose(seen[stage][2][M.RAW], want, atol=1e-5)
    visual = model.vlm.model.visual
    visual.output_tokens = True
    patches = visual(image[None])[1][0]                       # (64,C), after CLIP's last norm
    visual.output_tokens = False
    found = visual.ln_post(seen["latent"][2][M.RAW].flatten(1).T)
    assert torch.allclose(found, patches, atol=1e-4)
    colour = seen["mid"][2][M.COLOUR]
    block = World("val", 1)[0]["original"][4:8, 8:12].reshape(-1, 3).mean(0) / 255
    assert torch.allclose(colour[:, 1, 2], torch.tensor([*(block - 0.5), 1.0]).float(), atol=1e-5)


def test_a_folder_of_ones_own_of_any_size(tiny_run, tmp_path):
    """Two pictures of 30x50 and of 37x70 with unlabelled pixels; no colour or part is known there, and padding is no cell."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for name, (h, w) in {"a": (30, 50), "b": (37, 70), "c": (64, 64), "d": (40, 40)}.items():
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(tmp_path / f"images/{name}.png")
        label = rng.integers(0, 2, (h, w)).astype(np.uint8)
        label[0] = 255
        Image.fromarray(label).save(tmp_path / f"labels/{name}.png")
    (tmp_path / "classes.txt").write_text("day\nnight")
    M.main([str(tiny_run[0]), "--data", str(tmp_path)])
    table = json.loads((tiny_run[0] / "meaning.json").read_text())
    assert (table["images"], table["fitted"], table["names"]) == (2, 2, 2)
    assert "NMI colour" not in (tiny_run[0] / "meaning.txt").read_text()
    assert table["stages"]["late"]["grid"] == [8, 16]          # 37x70 at short side 64 is 64x121, padded to 64x128
    assert 0.5 <= table["stages"]["early"]["rows"][M.RANDOM]["purity"] < 0.6


def test_what_cannot_be_compared_is_one_line(tiny_run, tmp_path):
    run, model = tiny_run
    san = save_run(tmp_path / "san", build(tiny("san").run), tiny("san"))
    for argv, words in (([str(san)], "san: is a run of SAN, which has no tokens"),
                        ([str(run), "--images", "1"], "--images 1: at least 2"),
                        ([str(run), "--imags", "4"], "did you mean --images"),
                        ([str(tmp_path / "gone")], "no run directory"),
                        ([str(run), "--data", str(tmp_path / "gone")], "no such folder")):
        with pytest.raises(InputError, match=words) as error:
            M.main(argv)
        assert "\n" not in str(error.value)
    assert not (san / "meaning.txt").exists()
    with pytest.raises(InputError, match="1 images to cluster have 3 late cells, fewer than its 4 codes"):
        features = {row: torch.ones(2, 1, 3) for row in (M.RAW, M.INPUT, M.COLOUR)}
        few = {"late": ((1, 4), torch.zeros(1, 3, dtype=torch.int64), features)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(M, "look", lambda *a: (None, few))
            patch.setattr(model, "stages", ("late",))
            patch.setattr(model, "codebook", lambda stage: torch.ones(4, 2))
            M.fit(model, World("val", 2), [0], 0, progress=False)
