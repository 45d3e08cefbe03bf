"""The images of a run: the built-in scenes, a folder of yours, or a published dataset.

    training_set(run)   what it is trained on         val_set(run, data)   what eval.py scores it on
    scored_on(run)      what its own scores and pictures are of, and where that is from, in words

run: a runs.RunConfig, for its sizes, its ignore value and the folders it names.

# ours: all of it.

Tests: tests/published/test_images_of.py.
"""

from cli import InputError
from published.datasets import NotFound, open_dataset
from published.folder import Folder, layout
from world.scenes import World


def dataset_in(run, root, split):
    """The dataset in `root`: a folder of your own if folder.layout knows it, else that split of COCO-Stuff.

    run: a RunConfig, for its sizes and its ignore value.  Raises InputError if it is neither.
    """
    clip = run.net.clip
    sizes = dict(crop=clip.short_side, short_side=clip.short_side, long_side=clip.long_side)
    if kind := layout(root):
        return kind(root, ignore=run.ignore, **sizes)
    try:
        return open_dataset("coco-stuff", root, split, **sizes)
    except NotFound as error:
        raise InputError(f"{error}; a folder of your own needs images/, labels/ and classes.txt") from error


def training_set(run):
    """What a run is trained on: the world's scenes, a folder of yours, or COCO-Stuff."""
    if run.data:
        return dataset_in(run, run.data, "train")
    if run.preset != "world":
        raise InputError(f"preset {run.preset} trains on COCO-Stuff or on a folder of yours: give --data DIR with its "
                         "archives, or with images/, labels/, classes.txt")
    return World("train")


def val_set(run, data=None, ignore=255, images=None, names=None):
    """What eval.py scores a run on: the folder `data`, or (`images` of) the world's test scenes for a run of the world."""
    if data is not None:
        kind = layout(data) or Folder                         # which says what is missing, or takes `names` instead
        clip = run.net.clip
        return kind(data, ignore=ignore, short_side=clip.short_side, long_side=clip.long_side, names=names)
    if run.preset != "world" or run.data:
        raise InputError("a run that was trained on a folder is scored on one: give --data DIR")
    return World("val", *([] if images is None else [images]))


def scored_on(run, scenes=1000):
    """(dataset, where it is from in words) of a run's scores and pictures.

    `val_data` if it was given, else the images it was trained on, else the world's test scenes (`scenes` of them).
    Raises InputError for a run that says of none where they are, such as an imported one.
    """
    if run.val_data:
        return dataset_in(run, run.val_data, "val"), run.val_data
    if run.data:
        return dataset_in(run, run.data, "train"), f"training images of {run.data}"
    if run.preset == "world":
        return World("val", scenes), "the world's test scenes"
    raise InputError("the run does not say which images it is scored on: give --data DIR, or a picture: "
                     "python predict.py RUN FILE")
