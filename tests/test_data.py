"""What data.py promises: datasets are read whole or refused in one line, their streams are keyed, check tells all."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import Folder, label_sheet, layout, open_dataset, scored_on
from images import IGNORE, InputError, checksum, palette
from test_images import noise
from test_published import NAMES, STEMS, WANTED, merged, packed
from pat import preset
from vocabulary import load_vocabulary
from world import World


def filled(path):
    """A folder of three pictures 6 wide and 8 high; classes sky, tree, road; 255 is unlabelled."""
    for sub in ("images", "labels"):
        (path / sub).mkdir()
    for k, stem in enumerate(("b", "a", "c.1")):
        Image.fromarray(noise(seed=k)).save(path / "images" / f"{stem}.png")
        label = np.random.default_rng(k).integers(0, 3, (8, 6), dtype=np.uint8)
        label[0, 0] = 255
        Image.fromarray(label).save(path / "labels" / f"{stem}.png")
    (path / "classes.txt").write_text("sky\ntree\nroad\n")
    return path


# ---- what every dataset promises: a new class gets a line in this table ----
SIZES = dict(crop=8, short_side=12)
DATASETS = {"a folder": lambda path: layout(filled(path))(path, **SIZES),
            "voc20": lambda path: open_dataset("voc20", packed(path, "voc20"), **SIZES),
            "the world's training scenes": lambda path: World("train", length=3),
            "the world's test scenes": lambda path: World("val", length=3)}


@pytest.fixture(params=DATASETS)
def dataset(request, tmp_path):
    return DATASETS[request.param](tmp_path)


def test_a_dataset_says_what_it_is(dataset):
    """Names once each, groups of their ids, the size of a crop; checksum, route and key are text: score files hold them."""
    for names in (dataset.names, dataset.train_names):
        assert len(set(names)) == len(names) > 0 and all(type(name) is str for name in names)
    assert all(0 <= i < len(dataset.names) for ids in dataset.groups.values() for i in ids)
    assert dataset.crop > 0 and all(type(text) is str and text for text in (dataset.checksum, dataset.route, dataset.key))


def test_a_training_sample_is_a_function_of_seed_and_number(dataset):
    """Drawn again, in another order, by a copy as worker processes hold it: the same bits; another number, others."""
    first = [dataset.draw(5, n) for n in range(7)]            # more than an epoch of any of these
    copy = pickle.loads(pickle.dumps(dataset))
    again = [copy.draw(5, n) for n in reversed(range(7))][::-1]
    assert all(torch.equal(a, b) for one, two in zip(first, again) for a, b in zip(one, two))
    assert any(not torch.equal(first[0][0], image) for image, _ in first[1:])
    assert any(not torch.equal(first[n][0], dataset.draw(6, n)[0]) for n in range(7))


def test_a_training_sample_is_a_square_crop_with_ids_of_the_training_names(dataset):
    S = dataset.crop
    for n in range(7):
        image, label = dataset.draw(5, n)
        assert image.shape == (3, S, S) and image.dtype == torch.float32 and -3 < image.min() <= image.max() < 3
        assert label.shape == (S, S) and label.dtype == torch.int64
        assert set(label.unique().tolist()) <= {IGNORE, *range(len(dataset.train_names))}


def test_a_test_sample_keeps_the_labels_size_and_iterating_ends(dataset):
    """The image at test resolution, the label and the original at theirs, ids of the names, something labelled."""
    samples = list(dataset)
    assert len(samples) == len(dataset) and len({s["name"] for s in samples}) == len(samples)
    for s in samples:
        assert s["image"].ndim == 3 and len(s["image"]) == 3 and s["image"].dtype == torch.float32
        assert s["label"].dtype == torch.int64 and s["original"].shape == (*s["label"].shape, 3)
        assert s["original"].dtype == np.uint8 and (s["label"] != IGNORE).any()
        assert set(s["label"].unique().tolist()) <= {IGNORE, *range(len(dataset.names))}


# ---- folders ----
@pytest.fixture
def root(tmp_path):
    return filled(tmp_path)


def test_a_folder_without_a_known_layout_has_no_class(root):
    """What tells a layout is a file in it; training then looks for COCO-Stuff there."""
    assert layout(root) is Folder
    (root / "classes.txt").unlink()
    assert layout(root) is None and layout(root / "gone") is None


def test_a_folder_reads_its_pairs_in_order_of_their_names(root):
    """Test images are resized (short side 12 here), labels and originals keep the file's size; 255 becomes IGNORE."""
    (root / "images" / ".DS_Store").write_text("clutter")
    folder = Folder(root, short_side=12)
    assert folder.names == ("sky", "tree", "road") and folder.groups == {} and len(folder) == 3
    assert folder.checksum == checksum(("sky", "tree", "road")) and folder.route == "a folder with classes.txt"
    assert [s["name"] for s in folder] == ["a", "b", "c.1"]
    sample = folder[0]
    assert sample["image"].shape == (3, 16, 12) and sample["image"].dtype == torch.float32
    assert (sample["original"] == noise(seed=1)).all() and sample["label"].shape == (8, 6)
    assert sample["label"][0, 0] == IGNORE and sample["label"].dtype == torch.int64
    assert (sample["label"].flatten()[1:] >= 0).all()


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


def test_given_names_replace_the_file(root):
    """With names= there need be no classes.txt."""
    (root / "classes.txt").unlink()
    assert Folder(root, names=["x", "y", "z"]).names == ("x", "y", "z")


def test_a_folder_with_more_than_255_classes(root):
    """300 classes in 16-bit labels: id 255 is a class like any other and 65535 is unlabelled."""
    (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(300)))
    for path in (root / "labels").iterdir():
        Image.fromarray(np.array([[299, 255, 65535]] * 8, np.uint16).repeat(2, 1)).save(path)
    label = Folder(root, ignore=65535)[0]["label"]
    assert label[0].tolist() == [299, 299, 255, 255, IGNORE, IGNORE]
    with pytest.raises(InputError, match="255.*'class 255'"):
        Folder(root)                                                # 255 cannot be both a class and unlabelled


def test_a_rotated_photo_needs_an_upright_label(root):
    """EXIF turns the 6x8 picture to 8x6; a label of 6x8 does not fit, one of 8x6 does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise()).save(root / "images" / "a.png", exif=exif)
    with pytest.raises(InputError, match=r"a.png: is 6x8, but .*a.png is 8x6 \(after EXIF"):
        Folder(root)[0]
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(root / "labels" / "a.png")
    assert Folder(root)[0]["original"].shape == (6, 8, 3)


def test_a_folders_stream_is_keyed_and_every_epoch_visits_every_image(root):
    """Sample n is a function of (seed, n) alone; three samples are an epoch; another seed or epoch, another order."""
    one, two = Folder(root, crop=8), Folder(root, crop=8)
    forward = [one.draw(5, n) for n in range(6)]
    backward = [two.draw(5, n) for n in reversed(range(6))][::-1]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(forward, backward))
    assert forward[0][0].shape == (3, 8, 8) and forward[0][1].shape == (8, 8) and forward[0][1].dtype == torch.int64
    assert not torch.equal(one.draw(5, 0)[0], one.draw(6, 0)[0])
    visited = []
    one.read = lambda i: visited.append(int(i)) or (noise(), np.zeros((8, 6), np.int64))
    for n in range(30):
        one.draw(5, n)
    epochs = [tuple(visited[k:k + 3]) for k in range(0, 30, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len(set(epochs)) > 1


def unpair(root):
    """Five images that have no label."""
    for k in range(5):
        Image.fromarray(noise()).save(root / "images" / f"lone{k}.jpg")


SPOILED = {                                       # what went wrong: (how to get there, what the message must say)
    "no images folder": (lambda r: [p.unlink() for p in (r / "images").iterdir()] and (r / "images").rmdir(),
                         "images: no such folder"),
    "empty images folder": (lambda r: [p.unlink() for p in (r / "images").iterdir()], "images: holds no files"),
    "sub-folder": (lambda r: (r / "images" / "train").mkdir(), "train: is a folder"),
    "image without label": (unpair, r"no label for lone0.jpg, lone1.jpg, lone2.jpg and 2 more"),
    "label without image": (lambda r: (r / "images" / "b.png").unlink(), "no image for b.png"),
    "stem twice": (lambda r: Image.fromarray(noise()).save(r / "images" / "a.jpg"), "a.png: has the stem of a.jpg"),
    "no classes": (lambda r: (r / "classes.txt").unlink(), "classes.txt: cannot be read"),
    "classes not text": (lambda r: (r / "classes.txt").write_bytes(b"\xff\xfe\xfa"), "classes.txt: cannot be read"),
    "classes empty": (lambda r: (r / "classes.txt").write_text(""), "classes.txt: holds no class names"),
    "classes blank": (lambda r: (r / "classes.txt").write_text("sky\n\nroad\n"), "classes.txt: line 2 is blank"),
    "classes doubled": (lambda r: (r / "classes.txt").write_text("sky\ntree\nsky\n"),
                        "classes.txt: line 3 repeats line 1, 'sky'"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_folder_is_refused_before_training_starts(root, what):
    """At construction, in one line, naming the file and the line."""
    spoil, message = SPOILED[what]
    spoil(root)
    with pytest.raises(InputError, match=message) as caught:
        Folder(root)
    assert "\n" not in str(caught.value)


def test_an_id_without_a_name_is_refused_when_read(root):
    """Class 200 of 3: the message names the id, the file and the remedy."""
    Image.fromarray(np.full((8, 6), 200, np.uint8)).save(root / "labels" / "b.png")
    folder = Folder(root)
    folder[0]
    with pytest.raises(InputError, match=r"b.png: has class id 200, but the 3 names are ids 0 to 2; .*ignore value"):
        folder[1]


# ---- published datasets ----
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
    assert dataset.checksum == checksum(dataset.names, range(1, 21)) != load_vocabulary("voc20").checksum
    with pytest.raises(InputError, match="--names: has 19 names, but these labels have 20 classes"):
        open_dataset("voc20", tmp_path, names=names[:19])
    with pytest.raises(InputError, match="--names: class 0 is 'bicycle', which is class 1 of these labels"):
        open_dataset("voc20", tmp_path, names=(names[1], names[0], *names[2:]))


def test_a_label_of_another_size_is_refused(tmp_path):
    """Both files are named; here the label is 4 wide and 2 high."""
    dataset = open_dataset("ade150", packed(tmp_path, "ade150", [[1, 2, 3, 4]] * 2))
    with pytest.raises(InputError, match=r"validation/ADE_val_00000001.png: is 4x2, but .*00000001.jpg is 3x2"):
        dataset[0]


# ---- check and show ----
def test_check_tells_what_is_there_and_what_is_missing(tmp_path, capsys):
    """Six sets in archives, PC-59 by its masks, no COCO train: counts, ids, void, places, routes, where to get it."""
    for name in NAMES:
        packed(tmp_path, name)
    data.check(merged(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "coco-stuff train: not there; it needs train2017.zip (images.cocodataset.org/zips)"
    # six pixels twice: ids 0, 170 and 11 once each; three of six are void
    assert lines[1] == "coco-stuff val: 2 of 5,000 images; 2 labels read: 3 of 171 ids from 0 to 170, void 50.0%"
    assert lines[2] == "    val2017.zip + stuffthingmaps_trainval2017.zip (stuffthingmaps), names 2dbb74408f35141f"
    assert "pc59 val: 2 of 5,104 images; 2 labels read: 4 of 59 ids from 0 to 58, void 41.7%" in lines     # 5 of 12
    assert "    VOCtrainval_03-May-2010.tar + trainval_merged.json (route A, trainval_merged.json), names " \
           "7c52724d4e9d646f" in lines
    assert "ade847 val: 2 of 2,000 images; 2 labels read: 4 of 847 ids from 0 to 846, void 33.3%" in lines
    assert len(lines) == 13


def test_check_of_the_first_labels_only(tmp_path, capsys):
    """--images 1 reads one label of each set, and says so."""
    data.main(["check", str(packed(tmp_path, "voc20")), "--images", "1"])
    assert "voc20 val: 2 of 1,449 images; 1 labels read: 4 of 20 ids from 0 to 19, void 33" in capsys.readouterr().out


def test_check_goes_on_after_a_broken_set_and_ends_with_status_2(tmp_path):
    """The line of the broken set says what to do; the others are still told."""
    packed(tmp_path, "voc20")
    packed(tmp_path, "ade150", [[200, 0, 0]] * 2)
    done = subprocess.run([sys.executable, data.__file__, "check", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "1 of the datasets above cannot be used" in done.stderr.splitlines()[-1]
    assert "ade150 val: UNUSABLE\n" in done.stdout and "holds the value 200" in done.stdout
    assert "voc20 val: 2 of 1,449 images" in done.stdout and "Traceback" not in done.stderr


def test_check_of_a_folder_of_your_own(root, capsys):
    data.main(["check", str(root)])
    assert capsys.readouterr().out.startswith("folder: 3 images; 3 labels read: 3 of 3 ids from 0 to 2, void 2.1%\n")


def test_show_draws_images_beside_their_labels_with_a_legend(tmp_path):
    """Half red, half green image of 200x100, its label sky above tree: the colours of class 0 and 1 beside it."""
    for sub in ("images", "labels"):
        (tmp_path / sub).mkdir()
    picture, label = np.zeros((100, 200, 3), np.uint8), np.zeros((100, 200), np.uint8)
    picture[:, :100], picture[:, 100:], label[50:], label[:, 190:] = (255, 0, 0), (0, 255, 0), 1, 255
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    Image.fromarray(label).save(tmp_path / "labels" / "a.png")
    (tmp_path / "classes.txt").write_text("sky\ntree\nroad\n")
    sheet = np.array(label_sheet(Folder(tmp_path), width=320))
    assert sheet.shape[1] == 4 * 320 + 8
    for (x, y), colour in {(80, 80): (255, 0, 0), (240, 80): (0, 255, 0), (400, 20): palette(2)[0],
                           (400, 140): palette(2)[1], (635, 80): (0, 0, 0)}.items():
        assert (sheet[y, x] == colour).all(), (x, y)
    swatches = [tuple(sheet[171, 11 + 250 * k]) for k in range(4)]                # sky and tree were seen, road was not
    assert swatches == [tuple(palette(2)[0]), tuple(palette(2)[1]), (0, 0, 0), (255, 255, 255)]


def test_show_writes_the_sheet_of_a_published_set(tmp_path, monkeypatch, capsys):
    """NAME.png, or --out; the line says how many images, the route and the checksum of the names."""
    monkeypatch.chdir(packed(tmp_path, "pc459"))
    data.main(["show", ".", "pc459"])
    assert capsys.readouterr().out == "pc459.png: 2 of 2 images, LabelMap of the .mat files, names 459be945e89c4612\n"
    assert Image.open("pc459.png").size[0] == 1288
    names = load_vocabulary("pc459").names
    (tmp_path / "names.txt").write_text("\n".join((*names[:-1], "woollen things")))
    data.main(["show", ".", "pc459", "--out", "b.png", "--names", "names.txt"])
    assert "459be945e89c4612" not in capsys.readouterr().out and (tmp_path / "b.png").exists()


@pytest.mark.parametrize("arguments, words", [
    ([], "usage: python data.py check DIR"), (["check"], "usage:"), (["show", "."], "say which, coco-stuff"),
    (["show", ".", "ade"], "no dataset 'ade'"), (["check", "gone"], "gone: no such folder"),
    (["check", ".", "--images", "0"], "--images 0: at least 1"), (["paint", "."], "invalid choice"),
    (["show", ".", "pc59"], "Pascal Context 59 val is not there")])
def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        data.main(arguments)
    assert "\n" not in str(caught.value)
