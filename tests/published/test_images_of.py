"""Which images a run is trained on, and which it is scored on."""

import pytest

from cli import InputError
from data import IGNORE
from published.folder import Folder
from published.images_of import dataset_in, scored_on, training_set, val_set
from runs import preset
from tests.helpers import filled, noise, packed
from world.scenes import World


@pytest.fixture
def root(tmp_path):
    return filled(tmp_path)


def test_a_run_is_scored_on_its_validation_folder_else_on_its_training_folder_else_on_the_world(root):
    """An imported run says of none of them, and is told what to give."""
    dataset, where = scored_on(preset("world", data="nowhere", val_data=str(root)))
    assert isinstance(dataset, Folder) and len(dataset) == 3 and where == str(root)
    dataset, where = scored_on(preset("world", data=str(root), ignore=254, short_side=12))
    assert isinstance(dataset, Folder) and (dataset.ignore, dataset.short_side) == (254, 12) and "training" in where
    dataset, _ = scored_on(preset("world"), 7)
    assert isinstance(dataset, World) and dataset.split == "val" and len(dataset) == 7
    with pytest.raises(InputError, match="--data DIR"):
        scored_on(preset("coco"))


def test_a_runs_folder_is_read_at_the_runs_sizes(root):
    """Crop and short side are its CLIP's short side, the long side CLIP's too; its ignore value is the folder's."""
    dataset = dataset_in(preset("world", short_side=12, long_side=40, ignore=254), root, "train")
    assert isinstance(dataset, Folder) and dataset.ignore == 254
    assert (dataset.crop, dataset.short_side, dataset.long_side) == (12, 12, 40)


def test_a_folder_without_classes_is_looked_through_for_coco_stuff(tmp_path):
    """Its archives, as downloaded; without them the message says what COCO-Stuff and what a folder of yours needs."""
    dataset = dataset_in(preset("world", short_side=12), packed(tmp_path, "coco-stuff"), "val")
    assert (dataset.name, len(dataset), dataset.crop, dataset.short_side) == ("coco-stuff", 2, 12, 12)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="COCO-Stuff-171 val is not there.*images/, labels/ and classes.txt") as caught:
        dataset_in(preset("world"), tmp_path / "empty", "val")
    assert "\n" not in str(caught.value)


def test_a_run_is_trained_on_its_folder_else_on_the_world(root):
    """A run of another preset has to be given one."""
    assert isinstance(training_set(preset("world", data=str(root))), Folder)
    dataset = training_set(preset("world"))
    assert isinstance(dataset, World) and dataset.split == "train"
    with pytest.raises(InputError, match="--data DIR"):
        training_set(preset("coco"))


def test_a_test_set_is_the_given_folder_else_the_worlds_scenes(root):
    """Read at the sizes of the run, with other names if they are given; a run of a folder is not scored on scenes."""
    dataset = val_set(preset("coco", data="nowhere"), root, ignore=254)
    assert isinstance(dataset, Folder) and dataset.ignore == 254 and dataset.names == ("sky", "tree", "road")
    assert (dataset.short_side, dataset.long_side) == (640, 2560)
    (root / "classes.txt").unlink()                                 # `names` stands in for it
    assert val_set(preset("world"), root, names=["x", "y", "z"]).names == ("x", "y", "z")
    with pytest.raises(InputError, match="classes.txt"):
        val_set(preset("world"), root)
    assert len(val_set(preset("world"))) == 1000 and len(val_set(preset("world"), images=7)) == 7
    for run in (preset("world", data=str(root)), preset("coco")):
        with pytest.raises(InputError, match="give --data DIR"):
            val_set(run)


def test_a_runs_samples_are_those_of_its_folder(root):
    """The photo as it is stored, 255 as IGNORE: nothing is lost on the way through the run."""
    dataset, _ = scored_on(preset("world", val_data=str(root), short_side=12))
    sample = dataset[0]
    assert sample["name"] == "a" and (sample["original"] == noise(seed=1)).all() and sample["label"][0, 0] == IGNORE
