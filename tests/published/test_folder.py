"""A folder of your own is read as it is, or refused before training starts."""

import numpy as np
import pytest
import torch
from PIL import Image

import published.folder
from cli import InputError
from data import AUGMENT, IGNORE, ORDER, names_checksum, rng_for
from published.folder import Folder, layout
from tests.helpers import filled, noise


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
    assert folder.checksum == names_checksum(("sky", "tree", "road")) and folder.route == "a folder with classes.txt"
    assert [s["name"] for s in folder] == ["a", "b", "c.1"]
    sample = folder[0]
    assert sample["image"].shape == (3, 16, 12) and sample["image"].dtype == torch.float32
    assert (sample["original"] == noise(seed=1)).all() and sample["label"].shape == (8, 6)
    assert sample["label"][0, 0] == IGNORE and sample["label"].dtype == torch.int64
    for sample, k in zip(folder, (1, 0, 2)):                        # each with the label of its own stem
        label = np.random.default_rng(k).integers(0, 3, (8, 6), dtype=np.uint8).astype(int)
        label[0, 0] = IGNORE
        assert sample["label"].tolist() == label.tolist() and (sample["original"] == noise(seed=k)).all()


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


def test_order_and_augmentation_have_keys_of_their_own(root, monkeypatch):
    """Which image: by (seed, epoch).  How it is cut out: by (seed, n), so that an image looks different in every epoch."""
    visited, drawn, folder = [], [], Folder(root)
    monkeypatch.setattr(published.folder, "augment", lambda image, label, rng, *_: (drawn.append(rng.random()), (image, label))[1])
    folder.read = lambda i: (visited.append(i), (noise(), np.zeros((8, 6), np.int64)))[1]
    keys = [(seed, n) for seed in (5, 6) for n in range(12)]
    for seed, n in keys:
        folder.draw(seed, n)
    assert visited == [rng_for(seed, ORDER, n // 3).permutation(3)[n % 3] for seed, n in keys]
    assert drawn == [rng_for(seed, AUGMENT, n).random() for seed, n in keys]


def test_the_key_tells_other_pairs_and_sizes_apart(root):
    """Scores are kept by it: one more pair, another short or long side, another key."""
    folders = [Folder(root), Folder(root, short_side=12), Folder(root, long_side=99)]
    for part in ("images", "labels"):
        Image.fromarray(np.zeros((8, 6), np.uint8)).save(root / part / "d.png")
    folders.append(Folder(root))
    assert len({folder.key for folder in folders}) == 4 and folders[-1].key == Folder(root, crop=7).key


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
    """Class 200 of 3, and 3 of 3: the message names the id, the file and the remedy; 2 is the last that has a name."""
    Image.fromarray(np.full((8, 6), 200, np.uint8)).save(root / "labels" / "b.png")
    folder = Folder(root)
    folder[0]
    with pytest.raises(InputError, match=r"b.png: has class id 200, but the 3 names are ids 0 to 2; .*ignore value"):
        folder[1]
    for top in (2, 3):
        Image.fromarray(np.full((8, 6), top, np.uint8)).save(root / "labels" / "b.png")
        if top == 2:
            assert folder[1]["label"].unique().tolist() == [2]
    with pytest.raises(InputError, match="has class id 3, but"):
        folder[1]
