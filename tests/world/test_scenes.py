"""What world/scenes.py promises: scenes that never change, exact labels, and classes that training never shows."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from data import TRAIN, rng_for
from world.scenes import COLOURS, NOUNS, OBJECTS, PARTS, RADIUS, SEEN, TEXTURES, UNSEEN, World, is_dark, scene

GOLDEN = ((0, [16, 48, 68], 126.25), (1, [44, 64, 67], 105.04), (2, [27, 68], 133.55),
          (3, [33, 45, 67, 68], 119.67))             # scene, class ids, mean of all its bytes


# ---- the world ----
def test_a_scene_depends_on_its_key_alone():
    """The same key gives the same picture and label; another number, another picture."""
    first, again, other = (scene(rng_for(*key)) for key in ((3, 0, 5), (3, 0, 5), (3, 0, 6)))
    for one, two in zip(first, again):
        assert np.array_equal(one, two)
    assert (first.image != other.image).any()


def test_the_world_is_the_one_its_clip_was_trained_on():
    """Four scenes as they were when this repository's CLIP was pretrained on them: class ids, mean colour."""
    for n, ids, mean in GOLDEN:
        drawn = scene(rng_for(0, 0, n))
        assert np.unique(drawn.label).tolist() == ids
        assert drawn.image.mean() == pytest.approx(mean, abs=0.05)  # a last bit of sin() may differ elsewhere


def test_43_of_64_objects_are_seen_and_every_noun_and_texture_is_among_them():
    """So an unseen class is a new combination of what was seen: 43 + 21 = 64."""
    assert (len(SEEN), len(UNSEEN), len(OBJECTS), len(NOUNS)) == (43, 21, 64, 16)
    assert sorted(SEEN + UNSEEN) == list(range(64))
    textures, nouns = (Counter(words) for words in zip(*(OBJECTS[i].split() for i in SEEN)))
    assert [*nouns] == [*NOUNS] and sorted(nouns.values()) == [2] * 5 + [3] * 11
    assert set(textures) == set(TEXTURES) and min(textures.values()) >= 10
    assert {OBJECTS[i].split()[0] for i in UNSEEN} == set(TEXTURES)
    assert [OBJECTS[i] for i in UNSEEN[:4]] == ["plain house", "dotted house", "striped boat", "checked boat"]
    assert OBJECTS[0] == "plain house" and OBJECTS[63] == "checked butterfly"
    assert World.names[64:] == ("grass", "sky", "sand", "water", "brick", "gravel")
    assert World.groups == {"seen": SEEN, "unseen": UNSEEN, "stuff": (64, 65, 66, 67, 68, 69)}


def test_training_scenes_hold_no_unseen_class_and_test_scenes_do():
    """150 training scenes show seen classes and stuff only; 150 test scenes show nearly all 70."""
    drawn = {i for n in range(150) for i in scene(rng_for(0, TRAIN, n), classes=SEEN).label.flatten().tolist()}
    tested = {i for sample in World("val", length=150) for i in sample["label"].unique().tolist()}
    assert not drawn & set(UNSEEN) and len(drawn & set(SEEN)) >= 40 and set(range(64, 70)) <= drawn
    assert len(tested & set(UNSEEN)) >= 18 and len(tested & set(SEEN)) >= 38


def test_training_labels_count_through_the_training_names():
    """49 names in training: 43 seen objects, 6 stuffs; id k of a drawn label is the k-th of them, in their order."""
    world = World("train")
    assert len(world.train_names) == 49 and not set(world.train_names) & {OBJECTS[i] for i in UNSEEN}
    for n in range(5):
        stored, drawn = scene(rng_for(3, TRAIN, n), classes=SEEN).label, world.draw(3, n)[1].numpy()
        assert [world.train_names[i] for i in drawn.flatten()] == [World.names[i] for i in stored.flatten()]


def test_test_scenes_are_never_training_scenes():
    """Their keys differ in the middle word, so no picture of one stream is a picture of the other."""
    train = {World("train", seed=s)[i]["original"].tobytes() for s in range(3) for i in range(20)}
    val = {World("val", seed=s)[i]["original"].tobytes() for s in range(3) for i in range(20)}
    assert len(train) == len(val) == 60 and not train & val


def test_labels_agree_with_the_picture():
    """The pixels of a plain object's part are of the part's colour, up to light and noise, and the ground is not."""
    for n in range(40):
        drawn = scene(rng_for(0, 9, n), objects=(1, 1), classes=range(0, 64, 4))
        colours = {}
        for part in np.unique(drawn.part[drawn.part >= 0]):
            where = drawn.part == part
            (colour,) = np.unique(drawn.colour[where])                              # a part has one
            want = np.array([*COLOURS.values()][colour])
            assert abs(drawn.image[where].mean(0) - want).max() < 40                # light .92..1.06, three sigma of 5
            colours[PARTS[part]] = colour
        assert len(set(colours.values())) == len(colours)                           # and another part another
        ((kind, name),) = drawn.things
        assert colours[next(iter([*NOUNS.values()][kind // 4]))] == [*COLOURS].index(name)      # named by its body's


def test_part_and_colour_are_of_objects_only_and_an_object_has_the_parts_of_its_noun():
    """Stuff has neither, -1; every part of every noun is visible somewhere, and none of another noun."""
    seen = {noun: set() for noun in NOUNS}
    for n in range(64):
        drawn = scene(rng_for(0, 9, n), objects=(1, 1), classes=[n])
        assert ((drawn.part == -1) == (drawn.label >= 64)).all() and ((drawn.colour == -1) == (drawn.label >= 64)).all()
        seen[OBJECTS[n].split()[1]] |= {PARTS[part] for part in np.unique(drawn.part[drawn.part >= 0])}
    assert {noun: set(parts) for noun, parts in NOUNS.items()} == seen


def test_only_the_body_wears_the_texture():
    """Of the body of a striped, dotted or checked object some pixels are at half the brightness of others, of other
    parts none: their spread is that of light and noise."""
    for n, kind in enumerate(i for i in range(64) if i % 4):
        drawn = scene(rng_for(1, 9, n), objects=(1, 1), classes=[kind])
        body = next(iter([*NOUNS.values()][kind // 4]))
        for part in np.unique(drawn.part[drawn.part >= 0]):
            pixels = drawn.image[drawn.part == part].astype(float).sum(1)
            share = (pixels < 0.75 * np.quantile(pixels, 0.9)).mean()
            assert 0.08 < share < 0.7 if PARTS[part] == body else share < 0.01, (OBJECTS[kind], PARTS[part])


def test_textures_by_hand():
    """Stripes run along u + v = constant, six pixels apart; checks change every four; dots sit every five."""
    u, v = np.meshgrid(np.arange(24.0), np.arange(24.0))
    assert not is_dark("plain", u, v).any()
    stripes, dots, checks = (is_dark(texture, u + 0.1, v + 0.1) for texture in TEXTURES[1:])
    assert np.array_equal(stripes[1:, :-1], stripes[:-1, 1:])                              # the same along u + v
    assert np.array_equal(stripes[:, 6:], stripes[:, :-6]) and not np.array_equal(stripes[:, 3:], stripes[:, :-3])
    assert not checks[:4, :4].any() and checks[:4, 4:8].all() and checks[4:8, :4].all() and not checks[4:8, 4:8].any()
    assert np.array_equal(dots[:, 5:], dots[:, :-5]) and 0.1 < dots.mean() < 0.4
    with pytest.raises(ValueError, match="tartan.*plain"):
        is_dark("tartan", u, v)


def test_objects_are_as_large_as_promised_and_do_not_hide_one_another():
    """Of 12 to 18 pixels radius, so every one shows 100 pixels or more; one, two and three a scene occur."""
    counts = Counter()
    for n in range(200):
        drawn = scene(rng_for(2, 9, n))
        counts[len(drawn.things)] += 1
        for kind, _ in drawn.things:
            assert (drawn.label == kind).sum() >= 100
    assert RADIUS == (12, 18) and set(counts) == {1, 2, 3} and min(counts.values()) >= 20


def test_every_pixel_of_the_world_is_labelled():
    """The world has no ignored pixels, and 64x64 scenes of two stuffs and three objects fit its 70 names."""
    for sample in World("val", length=30):
        assert sample["label"].shape == (64, 64) and sample["label"].dtype == torch.int64
        assert 0 <= sample["label"].min() and sample["label"].max() < len(World.names) == 70


def test_the_key_tells_split_and_seed_apart():
    """Scores are kept by it: other scenes, another key."""
    worlds = [World(split, seed=seed) for split in ("train", "val") for seed in (0, 1)]
    assert [world.key for world in worlds] == ["train 0", "train 1", "val 0", "val 1"]


def test_test_scenes_tell_part_and_colour_and_training_samples_do_not():
    """Studies may ask; what is trained gets an image and a label."""
    sample = World("val")[3]
    assert sample["part"].shape == sample["colour"].shape == (64, 64) and sample["part"].max() >= 0
    assert len(World("train").draw(0, 3)) == 2


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
