"""What world/scenes.py promises: scenes that never change, exact labels, and classes that training never shows."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data import TRAIN, rng_for
from world.scenes import COLOURS, OBJECTS, SEEN, SHAPES, TEXTURES, UNSEEN, World, inside, scene

GOLDEN = ((0, [3, 16, 18, 68], 137.76), (1, [1, 6, 44, 45, 64, 67], 95.96), (2, [21, 27, 68], 122.28),
          (3, [17, 33, 40, 67, 68], 109.01))         # scene, class ids, mean of all its bytes


# ---- the world ----
def test_a_scene_depends_on_its_key_alone():
    """The same key gives the same picture and label; another number, another picture."""
    first, again, other = (scene(rng_for(*key)) for key in ((3, 0, 5), (3, 0, 5), (3, 0, 6)))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all() and first[2:] == again[2:]
    assert (first[0] != other[0]).any()


def test_the_world_is_the_one_its_clip_was_trained_on():
    """Four scenes as they were when this repository's CLIP was pretrained on them: class ids, mean colour."""
    for n, ids, mean in GOLDEN:
        image, label, _, _ = scene(rng_for(0, 0, n))
        assert np.unique(label).tolist() == ids
        assert image.mean() == pytest.approx(mean, abs=0.05)        # a last bit of sin() may differ between machines


def test_43_of_64_objects_are_seen_and_every_colour_and_shape_is_among_them():
    """So an unseen class is a new combination of parts that were seen: 43 + 21 = 64."""
    assert (len(SEEN), len(UNSEEN), len(OBJECTS)) == (43, 21, 64)
    assert sorted(SEEN + UNSEEN) == list(range(64))
    seen, unseen = ([OBJECTS[i].split() for i in ids] for ids in (SEEN, UNSEEN))
    assert {c for c, _ in seen} == set(COLOURS) and {s for _, s in seen} == set(SHAPES)
    assert {c for c, _ in unseen} == set(COLOURS)
    assert [OBJECTS[i] for i in UNSEEN[:4]] == ["red circle", "red star", "red ring", "orange square"]
    assert OBJECTS[0] == "red circle" and OBJECTS[63] == "white moon"
    assert World.names[64:] == ("grass", "sky", "sand", "water", "brick", "gravel")
    assert World.groups == {"seen": SEEN, "unseen": UNSEEN, "stuff": (64, 65, 66, 67, 68, 69)}


def test_training_scenes_hold_no_unseen_class_and_test_scenes_do():
    """150 training scenes show seen classes and stuff only; 150 test scenes show nearly all 70."""
    drawn = {i for n in range(150) for i in scene(rng_for(0, TRAIN, n), classes=SEEN)[1].flatten().tolist()}
    tested = {i for sample in World("val", length=150) for i in sample["label"].unique().tolist()}
    assert not drawn & set(UNSEEN) and len(drawn & set(SEEN)) >= 40 and set(range(64, 70)) <= drawn
    assert len(tested & set(UNSEEN)) >= 18 and len(tested & set(SEEN)) >= 38


def test_training_labels_count_through_the_training_names():
    """49 names in training: 43 seen objects, 6 stuffs; id k of a drawn label is the k-th of them, in their order."""
    world = World("train")
    assert len(world.train_names) == 49 and not set(world.train_names) & {OBJECTS[i] for i in UNSEEN}
    for n in range(5):
        stored, drawn = scene(rng_for(3, TRAIN, n), classes=SEEN)[1], world.draw(3, n)[1].numpy()
        assert [world.train_names[i] for i in drawn.flatten()] == [World.names[i] for i in stored.flatten()]


def test_test_scenes_are_never_training_scenes():
    """Their keys differ in the middle word, so no picture of one stream is a picture of the other."""
    train = {World("train", seed=s)[i]["original"].tobytes() for s in range(3) for i in range(20)}
    val = {World("val", seed=s)[i]["original"].tobytes() for s in range(3) for i in range(20)}
    assert len(train) == len(val) == 60 and not train & val


def test_labels_agree_with_the_picture():
    """The pixels labelled "red star" of a plain red star are red: close to the class colour, up to light and noise."""
    checked = 0
    for n in range(60):
        image, label, things, _ = scene(rng_for(0, 9, n), objects=(1, 1))
        for kind, texture in things:
            if TEXTURES[texture] == "plain":
                want = np.array(list(COLOURS.values())[kind // 8])
                assert abs(image[label == kind].mean(0) - want).max() < 35      # light 0.92..1.06, colour sigma 5
                assert abs(image[label >= 64].mean(0) - want).max() > 35        # and the ground is not
                checked += 1
    assert checked > 8


def test_every_pixel_of_the_world_is_labelled():
    """The world has no ignored pixels, and 64x64 scenes of two stuffs and four objects fit its 70 names."""
    for sample in World("val", length=30):
        assert sample["label"].shape == (64, 64) and sample["label"].dtype == torch.int64
        assert 0 <= sample["label"].min() and sample["label"].max() < len(World.names) == 70


def test_the_key_tells_split_and_seed_apart():
    """Scores are kept by it: other scenes, another key."""
    worlds = [World(split, seed=seed) for split in ("train", "val") for seed in (0, 1)]
    assert [world.key for world in worlds] == ["train 0", "train 1", "val 0", "val 1"]


def test_an_unknown_shape_is_named():
    """A typing error in a shape says which shapes there are."""
    with pytest.raises(ValueError, match="hexagon.*circle"):
        inside("hexagon", np.zeros((1, 1)), np.zeros((1, 1)))


# ---- one endless stream, however many read it ----
def test_the_training_stream_is_the_same_for_one_process_and_for_three():
    """Rank r of three takes n = r, r + 3, ...; dealt back together that is the stream of a single process."""
    world = World("train")
    alone = [world.draw(7, n) for n in range(9)]
    ranks = [[World("train").draw(7, n) for n in range(r, 9, 3)] for r in (2, 0, 1)]             # in any order of work
    dealt = [ranks[(1, 2, 0)[n % 3]][n // 3] for n in range(9)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, dealt))


def test_iterating_a_dataset_ends():
    """`for sample in dataset` visits len(dataset) samples: past the end is an IndexError, not scene number 500."""
    assert len(list(World("val", length=3))) == len(World("val", length=3)) == 3
    assert [s["name"] for s in World("val", length=2)] == ["val_00000", "val_00001"]


# ---- demo ----
def test_the_demo_draws_the_contact_sheet(tmp_path):
    """`python -m world.scenes` writes world.png, 8 pairs of 64x64 across and 5 down, doubled, with a frame of 2."""
    command = [sys.executable, "-m", "world.scenes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("world.png: 40 scenes") and done.stdout.endswith(" ms each\n")
    assert Image.open(tmp_path / "world.png").size == (2 * 8 * 132, 2 * 5 * 68)
