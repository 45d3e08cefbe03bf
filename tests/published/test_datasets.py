"""What published/datasets.py promises: six datasets, in every form they come in, give the same arrays or say why not.

Each dataset is built tiny, two images, with the real names of files and folders and the real encodings; WANTED holds
what its labels mean, worked by hand with the tables of published/names/.
"""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cli import InputError
from data import IGNORE, names_checksum
from published.archives import Shelf
from published.datasets import MERGED, SETS, NotFound, find, open_dataset
from published.vocabulary import DATASETS, load_vocabulary
from tests.helpers import (CONVERTED, NAMES, STEMS, WANTED, archives, codes, converted, cut, encoded, merged, noise,
                           pack, packed, picture, unpacked)


# ---- one dataset, three forms ----
@pytest.mark.parametrize("form", [packed, unpacked, converted])
@pytest.mark.parametrize("name", NAMES)
def test_every_form_gives_the_same_arrays(tmp_path, monkeypatch, name, form):
    """Archives, the folders they unpack to, converted folders: the labels worked by hand, the images byte for byte."""
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(name, form(tmp_path, name))
    assert [dataset[i]["name"] for i in range(len(dataset))] == list(STEMS[name])
    for i, label in enumerate((WANTED[name], WANTED[name][::-1])):
        image, ids = dataset.read(i)
        assert ids.tolist() == label and ids.dtype == np.int64
        assert (image == np.array(Image.open(io.BytesIO(picture(i + 1))))).all()
    assert not (tmp_path / "unpickled").exists()                                # the index pickle was left alone


@pytest.mark.parametrize("name, route", [
    ("coco-stuff", "stuffthingmaps"), ("voc20", "SegmentationClassAug"), ("pc59", "route B, the 459 labels through the "
     "id map"), ("pc459", "LabelMap of the .mat files"), ("ade150", "annotations"), ("ade847", "_seg.png codes, shrunk "
                                                                                               "to 512")])
def test_published_labels_go_before_converted_ones(tmp_path, name, route):
    """With both there, the route says that the published ones were read; with one, which it is."""
    converted(tmp_path, name)
    assert open_dataset(name, tmp_path).route == "converted folder"
    packed(tmp_path, name)
    assert open_dataset(name, tmp_path).route == route


@pytest.mark.parametrize("name", ["voc20", "pc459"])
def test_the_folder_may_be_vocdevkit_itself(tmp_path, name):
    """DIR/VOC2012 and DIR/VOC2010 stand for DIR/VOCdevkit/VOC2012 and so on."""
    unpacked(tmp_path, name)
    if name == "pc459":
        (tmp_path / "trainval").rename(tmp_path / "VOCdevkit/VOC2010/trainval")
    assert open_dataset(name, tmp_path / "VOCdevkit").read(0)[1].tolist() == WANTED[name]


def test_voc_without_the_augmented_labels_reads_its_own_palette_files(tmp_path):
    """The SegmentationClass inside the tar, whose pixels are palette indices."""
    packed(tmp_path, "voc20")
    (tmp_path / "SegmentationClassAug.zip").unlink()
    dataset = open_dataset("voc20", tmp_path)
    assert dataset.route == "SegmentationClass" and dataset.read(0)[1].tolist() == WANTED["voc20"]
    assert dataset.found.where == "VOCtrainval_11-May-2012.tar"


def test_coco_train_has_archives_of_its_own(tmp_path):
    """train2017.zip and the other half of stuffthingmaps; labels unpacked among the images are told by their suffix."""
    (tmp_path / "a/train2017").mkdir(parents=True)
    (tmp_path / "a/train2017/1.jpg").write_bytes(picture(1))
    (tmp_path / "a/train2017/1.png").write_bytes(encoded(np.uint8([[5, 0, 255]] * 2)))
    assert open_dataset("coco-stuff", tmp_path, "train").read(0)[1][0].tolist() == [5, 0, IGNORE]
    with pytest.raises(NotFound, match=r"COCO-Stuff-171 val is not there; it needs val2017.zip .*stuffthingmaps"):
        open_dataset("coco-stuff", tmp_path)


# ---- Pascal Context 59, route A ----
def test_route_a_paints_masks_in_order_down_the_columns(tmp_path):
    """2 everywhere; 458 on the second and third pixel counted down the columns; 258 on the last column, over the 2.

    Ids 2, 458, 258 and 18 are classes 0, 58, 33 and 2; what no mask covers is void.
    """
    packed(tmp_path, "pc59")
    dataset = open_dataset("pc59", merged(tmp_path))
    assert dataset.route == "route A, trainval_merged.json" and dataset.found.where.endswith("trainval_merged.json")
    assert dataset.read(0)[1].tolist() == [[0, 58, 33], [58, 0, 33]]
    assert dataset.read(1)[1].tolist() == [[-1, 2, -1], [-1, -1, -1]]
    assert len(dataset) == 2 and dataset[1]["name"] == "2008_000003"


@pytest.mark.parametrize("text, why", [
    ('{"images": [{"image_id": 7, "file_na', "'images' breaks off"), ('{"images": []}', "no array 'annos_segm"),
    ("<html>", "no array 'images'"), ('{"images": [{"id": 7}]}', "not Pascal Context's .KeyError"),
    ('{"images": [3]}', "not Pascal Context's .TypeError"), (b"\xff\xfe\xfa", "not Pascal Context's .Unicode")])
def test_a_broken_json_is_refused(tmp_path, text, why):
    packed(tmp_path, "pc59")
    (tmp_path / MERGED[0]).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"trainval_merged.json: .*{why}.*download") as caught:
        open_dataset("pc59", tmp_path)
    assert "\n" not in str(caught.value)


# ---- ADE-847 ----
def test_ade847_is_read_at_a_short_side_of_512(tmp_path):
    """520 high, 780 wide: 512 x 768, row i from row floor(i * 520 / 512); what is smaller stays."""
    members = archives("ade847")["anna_c0ffee12.zip"]
    rows = np.repeat(np.arange(520)[:, None] % 2 * (312 - 2978) + 2978, 780, 1)          # building and wall in turn
    for stem in STEMS["ade847"]:
        members[f"ADE20K_2021_17_01/images/ADE/validation/urban/street/{stem}_seg.png"] = codes(rows)
        members[f"ADE20K_2021_17_01/images/ADE/validation/urban/street/{stem}.jpg"] = encoded(noise(520, 780), "jpeg")
    pack(tmp_path / "b.zip", members)
    image, label = open_dataset("ade847", tmp_path).read(0)
    assert image.shape == (512, 768, 3) and label.shape == (512, 768)
    assert label[:, 5].tolist() == [int(i * 520 / 512) % 2 for i in range(512)]


def test_a_converted_ade847_keeps_its_size(tmp_path):
    """Whoever converted it has shrunk it already: 520 high stays 520."""
    converted(tmp_path, "ade847")
    images, labels, _ = CONVERTED["ade847"]
    for stem in STEMS["ade847"]:
        (tmp_path / images / f"{stem}.jpg").write_bytes(encoded(noise(520, 530), "jpeg"))
        (tmp_path / labels / f"{stem}.tif").write_bytes(encoded(np.full((520, 530), 7, np.uint16), "tiff"))
    image, label = open_dataset("ade847", tmp_path).read(0)
    assert image.shape == (520, 530, 3) and label.shape == (520, 530)


def test_seen_is_what_the_model_was_trained_with(tmp_path):
    """A model of two names has seen those two, whatever COCO-Stuff names."""
    dataset = open_dataset("voc20", packed(tmp_path, "voc20"), training=("bicycle", "moon"))
    assert dataset.groups["seen"] == (1,) and len(dataset.groups["unseen"]) == 19


# ---- as a dataset ----
@pytest.mark.parametrize("name", NAMES)
def test_a_published_dataset_has_the_face_of_a_folder(tmp_path, name):
    """Names, checksum and groups of its vocabulary; test pairs at 12 x 18; training pairs of 8 x 8."""
    dataset, vocabulary = open_dataset(name, packed(tmp_path, name), crop=8, short_side=12), load_vocabulary(name)
    assert dataset.names == dataset.train_names == vocabulary.names and dataset.checksum == vocabulary.checksum
    assert sum(map(len, dataset.groups.values())) == len(dataset.names) and dataset.crop == 8 and len(dataset) == 2
    sample = dataset[1]
    assert sample["image"].shape == (3, 12, 18) and sample["original"].shape == (2, 3, 3)
    assert sample["name"] == STEMS[name][1] and sample["label"].tolist() == WANTED[name][::-1]
    image, label = dataset.draw(5, 0)
    assert image.shape == (3, 8, 8) and label.shape == (8, 8) and label.dtype == torch.int64
    assert set(label.unique().tolist()) <= {IGNORE, *np.unique(WANTED[name]).tolist()}


@pytest.mark.parametrize("name", NAMES)
def test_worker_processes_read_archives_as_one_process_does(tmp_path, name):
    """Two workers, and a copy that travelled by pickle, give the samples of this process, in order."""
    dataset = open_dataset(name, packed(tmp_path, name), crop=8, short_side=12)
    alone = [dataset[i] for i in range(2)]
    copy = pickle.loads(pickle.dumps(dataset))
    for there in ([copy[i] for i in range(2)], list(DataLoader(dataset, None, num_workers=2))):
        assert [s["name"] for s in there] == list(STEMS[name])
        assert all(torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
                   for a, b in zip(alone, there))


def test_other_names_replace_the_published_ones_class_by_class(tmp_path):
    """"tvmonitor" for "tv", as other lists have it: another checksum, other groups; labels stay what they are."""
    names = load_vocabulary("voc20").names
    assert names[19] == "tv"
    dataset = open_dataset("voc20", packed(tmp_path, "voc20"), names=[*names[:19], "tvmonitor"])
    assert dataset.names[19] == "tvmonitor" and 19 in dataset.groups["unseen"]
    assert dataset.checksum == names_checksum(dataset.names, range(1, 21)) != load_vocabulary("voc20").checksum
    with pytest.raises(InputError, match="--names: has 19 names, but these labels have 20 classes"):
        open_dataset("voc20", tmp_path, names=names[:19])
    with pytest.raises(InputError, match="--names: class 0 is 'bicycle', which is class 1 of these labels"):
        open_dataset("voc20", tmp_path, names=(names[1], names[0], *names[2:]))


def test_a_label_of_another_size_is_refused(tmp_path):
    """Both files are named; here the label is 4 wide and 2 high."""
    dataset = open_dataset("ade150", packed(tmp_path, "ade150", [[1, 2, 3, 4]] * 2))
    with pytest.raises(InputError, match=r"validation/ADE_val_00000001.png: is 4x2, but .*00000001.jpg is 3x2"):
        dataset[0]


# ---- what is wrong, and what to do ----
def remove(root, archive, member):
    """Write the archive again without one member."""
    with zipfile.ZipFile(root / archive) as old:
        kept = {name: old.read(name) for name in old.namelist() if not name.endswith(member)}
    pack(root / archive, kept)


def other_year(root, how):
    """ADE20K of 2016, as a folder or as a zip."""
    top = "ADE20K_2016_07_26/images/validation/a/abbey"
    if how == "folder":
        (root / top).mkdir(parents=True)
    else:
        pack(root / how, {f"{top}/ADE_val_00000001.jpg": picture(1), f"{top}/ADE_val_00000001_seg.png": codes([[0]])})


SPOILED = {            # what is wrong: (dataset, how to get there, what the line must say)
    "corrupt zip": ("coco-stuff", lambda r: cut(r / "val2017.zip"), r"val2017.zip: cannot be read .*download it again"),
    "corrupt label zip": ("ade150", lambda r: cut(r / "ADEChallengeData2016.zip"), "Data2016.zip: cannot be read"),
    "corrupt tar": ("voc20", lambda r: cut(r / "VOCtrainval_11-May-2012.tar", 0.12), "11-May-2012.tar: cannot be read"),
    "image missing": ("coco-stuff", lambda r: remove(r, "val2017.zip", "285.jpg"),
                      "val2017.zip: lacks the image of 000000000285; download"),
    "label missing": ("ade150", lambda r: remove(r, "ADEChallengeData2016.zip", "ADE_val_00000002.png"),
                      "ADEChallengeData2016.zip: lacks the label of ADE_val_00000002"),
    "listed label missing": ("voc20", lambda r: remove(r, "SegmentationClassAug.zip", "2007_000042.png"),
                             "SegmentationClassAug.zip: lacks the label of 2007_000042"),
    "seg missing": ("ade847", lambda r: remove(r, "anna_c0ffee12.zip", "00000002_seg.png"),
                    "anna_c0ffee12.zip: lacks the label of ADE_val_00000002"),
    "2016 in a zip": ("ade847", lambda r: (r / "anna_c0ffee12.zip").unlink() or other_year(r, "bob_1.zip"),
                      r"bob_1.zip: is another release of ADE20K.*get ADE20K_2021_17_01"),
    "2016 unpacked": ("ade847", lambda r: (r / "anna_c0ffee12.zip").unlink() or other_year(r, "folder"),
                      r"ADE20K_2016_07_26: is another release of ADE20K.*get ADE20K_2021_17_01"),
    "gzipped tar": ("pc459", lambda r: (r / "trainval.tar").rename(r / "trainval.tar.gz"),
                    "trainval.tar.gz: is a gzipped tar.*run: tar xzf .*trainval.tar.gz -C"),
    "only labels": ("pc459", lambda r: (r / "VOCtrainval_03-May-2010.tar").unlink(),
                    r"Context 459 val is not there; it needs VOCtrainval_03-May-2010.tar \(the [A-Z 0-9a-z]*\)$"),
    "no val.txt": ("voc20", lambda r: pack(r / "VOCtrainval_11-May-2012.tar",
                                           {"VOCdevkit/VOC2012/JPEGImages/a.jpg": b""}),
                   "11-May-2012.tar: comes without ImageSets/Segmentation/val.txt"),
    "training labels only": ("pc459", lambda r: pack(r / "trainval.tar", {"trainval/2008_000001.mat": b""}),
                             "trainval.tar: holds no label of the validation images"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_archive_is_refused_when_opened(tmp_path, what):
    """In one line: which file, what is wrong, what to do."""
    name, spoil, message = SPOILED[what]
    packed(tmp_path, name)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, value, fits", [
    ("coco-stuff", 182, 181), ("coco-stuff", 254, 255), ("voc20", 21, 20), ("pc459", 460, 459), ("pc59", 460, 459),
    ("ade150", 151, 150)])
def test_labels_of_another_dataset_are_refused(tmp_path, name, value, fits):
    """The first value that no label of this dataset can hold names the file; the last that can is read."""
    assert open_dataset(name, packed(tmp_path, name, [[fits, 0, 0]] * 2)).read(0)[1].shape == (2, 3)
    dataset = open_dataset(name, packed(tmp_path, name, [[value, 0, 0]] * 2))
    with pytest.raises(InputError, match=rf"{STEMS[name][0]}.*: holds the value {value}, which no label of ") as caught:
        dataset.read(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_label_beyond_the_names_is_refused(tmp_path, name):
    """As many names as there are is one too many for an id; so is a label that was never converted."""
    L = {"coco-stuff": 171, "voc20": 20, "pc59": 59, "pc459": 459, "ade150": 150, "ade847": 847}[name]
    dataset = open_dataset(name, converted(tmp_path, name, [[0, L - 1, L]] * 2))
    with pytest.raises(InputError, match=f"holds the value {L}, which no label of .*converted folder.*converted once"):
        dataset.read(0)


@pytest.mark.parametrize("name", ["pc459", "ade847"])
def test_a_converted_label_of_8_bits_is_refused(tmp_path, name):
    """255 of 8 bits may have been anything above it."""
    converted(tmp_path, name)
    path = tmp_path / CONVERTED[name][1] / f"{STEMS[name][0]}.tif"
    path.write_bytes(encoded(np.full((2, 3), 9, np.uint8), "tiff"))
    with pytest.raises(InputError, match=rf"{STEMS[name][0]}.tif: holds L pixels of 8 bits.*16-bit TIFF"):
        open_dataset(name, tmp_path).read(0)


def test_a_converted_folder_in_another_class_order_is_refused(tmp_path):
    """Pascal Context's official list puts VOC's classes first, aeroplane, bicycle, ...; a classes.txt tells."""
    names, converted_root = load_vocabulary("pc59").names, converted(tmp_path, "pc59")
    for folder in ("label", "."):
        classes = converted_root / "pcontext/val" / folder / "classes.txt"
        classes.write_text("\n".join(names))
        assert len(open_dataset("pc59", tmp_path)) == 2
        swapped = (names[0], "bicycle", *(name for name in names[1:] if name != "bicycle"))
        classes.write_text("\n".join(swapped))
        with pytest.raises(InputError, match="classes.txt: class 1 is 'bicycle', which is class 5 of these labels"):
            open_dataset("pc59", tmp_path)
        classes.write_text("\n".join(names[:-1]))
        with pytest.raises(InputError, match="classes.txt: has 58 names, but these labels have 59 classes"):
            open_dataset("pc59", tmp_path)
        classes.unlink()


def test_only_coco_has_a_training_split(tmp_path):
    with pytest.raises(InputError, match="voc20 has no split 'train' here; there is val"):
        find("voc20", Shelf(tmp_path), "train")


def test_every_list_of_names_has_its_class():
    """In one order everywhere: the tables of names, the classes, the messages; and each is tested here."""
    assert tuple(SETS) == DATASETS and set(DATASETS) == set(NAMES)


def test_published_counts_are_those_of_the_papers():
    assert SETS["coco-stuff"].counts == {"train": 118287, "val": 5000}
    assert [SETS[name].counts["val"] for name in NAMES[1:]] == [1449, 5104, 5104, 2000, 2000]
