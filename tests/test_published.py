"""What published.py promises: six datasets in every form they come in give the same arrays, or one line says why not.

Each dataset is built tiny, two images, with the real names of files and folders and the real encodings; WANTED holds
what its labels mean, worked by hand with the tables of vocab/.
"""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from archives import Shelf
from data import open_dataset
from images import IGNORE, InputError
from published import COUNTS, MERGED, Masks, NotFound, find, json_array, paint, read_codes, read_mat, runs, shrink
from test_archives import cut, pack
from test_images import noise
from vocabulary import load_vocabulary

# What the label files hold, 2 rows and 3 columns, and the class ids they stand for; -1 is void.
RAW = {"coco-stuff": [[0, 181, 255], [11, 12, 90]],    # 0 is person, 181 the last; 11 and 90 are never annotated
       "voc20": [[0, 1, 20], [255, 6, 2]],             # 0 background, 255 boundary
       "pc459": [[2, 258, 458], [0, 258, 459]],
       "pc59": [[2, 258, 458], [0, 258, 459]],         # the same labels: 2, 258 and 458 are among the 59, 459 is not
       "ade150": [[0, 1, 150], [2, 3, 149]],
       "ade847": [[2978, 312, 0], [3148, 1, 2420]]}    # wall, building, unlabelled, adding machine, no class, sky
WANTED = {"coco-stuff": [[0, 170, -1], [-1, 11, -1]], "voc20": [[-1, 0, 19], [-1, 5, 1]],
          "pc459": [[1, 257, 457], [-1, 257, 458]], "pc59": [[0, 33, 58], [-1, 33, -1]],
          "ade150": [[-1, 0, 149], [1, 2, 148]], "ade847": [[0, 1, -1], [846, -1, 2]]}
STEMS = {"coco-stuff": ("000000000139", "000000000285"), "voc20": ("2007_000033", "2007_000042"),
         "pc459": ("2008_000002", "2008_000003"), "pc59": ("2008_000002", "2008_000003"),
         "ade150": ("ADE_val_00000001", "ADE_val_00000002"), "ade847": ("ADE_val_00000001", "ADE_val_00000002")}
NAMES = tuple(STEMS)


def encoded(array, kind="png", **how):
    """An array as the bytes of an image file, without a change of its mode."""
    stream = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))).save(stream, kind, **how)
    return stream.getvalue()


def picture(seed):
    """A JPEG 3 wide and 2 high."""
    return encoded(noise(2, 3, seed), "jpeg")


def mat(label, dtype=np.uint16, name="LabelMap"):
    stream = io.BytesIO()
    savemat(stream, {name: np.array(label, dtype)})
    return stream.getvalue()


def indexed(label):
    """A palette PNG: VOC's labels are class ids that are shown in colours."""
    image = Image.fromarray(np.array(label, np.uint8))
    image.putpalette([value * 83 % 256 for value in range(768)])
    return encoded(image)


def codes(label):
    """ADE20K's RGB code of class indices: R = 10 * (index // 256), G = index % 256, B the instance."""
    label = np.array(label)
    return encoded(np.stack([label // 256 * 10, label % 256, label * 0 + 7], -1).astype(np.uint8))


class Bomb:
    def __reduce__(self):
        return open, ("unpickled", "w")


def archives(name, raw=None):
    """{archive: {member: bytes}} of a published dataset; both images show `raw`, the second one upside down."""
    raw, (one, two), grey = np.array(RAW[name] if raw is None else raw), STEMS[name], np.uint8
    both = ((one, raw, 1), (two, raw[::-1], 2))
    if name == "coco-stuff":
        return {"val2017.zip": {f"val2017/{stem}.jpg": picture(k) for stem, _, k in both},
                "stuffthingmaps_trainval2017.zip": {
                    "train2017/000000000009.png": encoded(raw.astype(grey)),
                    **{f"val2017/{stem}.png": encoded(label.astype(grey)) for stem, label, _ in both}}}
    if name == "voc20":
        return {"VOCtrainval_11-May-2012.tar": {
                    "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": f"{one}\n{two}\n".encode(),
                    "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": b"2007_000999\n",
                    **{f"VOCdevkit/VOC2012/JPEGImages/{stem}.jpg": picture(k) for stem, _, k in both},
                    "VOCdevkit/VOC2012/JPEGImages/2007_000999.jpg": picture(3),           # a training image
                    **{f"VOCdevkit/VOC2012/SegmentationClass/{stem}.png": indexed(label) for stem, label, _ in both}},
                "SegmentationClassAug.zip": {
                    "SegmentationClassAug/2007_000999.png": encoded(raw.astype(grey)),
                    **{f"SegmentationClassAug/{stem}.png": encoded(label.astype(grey)) for stem, label, _ in both}}}
    if name in ("pc59", "pc459"):
        return {"VOCtrainval_03-May-2010.tar": {f"VOCdevkit/VOC2010/JPEGImages/{stem}.jpg": picture(k)
                                                for stem, k in ((one, 1), (two, 2), ("2008_000001", 3))},
                "trainval.tar": {f"trainval/{stem}.mat": mat(label) for stem, label, _ in
                                 (*both, ("2008_000001", raw, 3))}}                       # the last is of training
    if name == "ade150":
        top = "ADEChallengeData2016"
        return {f"{top}.zip": {**{f"{top}/images/validation/{stem}.jpg": picture(k) for stem, _, k in both},
                               **{f"{top}/annotations/validation/{stem}.png": encoded(label.astype(grey))
                                  for stem, label, _ in both},
                               f"{top}/images/training/ADE_train_00000001.jpg": picture(3)}}
    top, members = "ADE20K_2021_17_01", {}
    for stem, label, k in both:
        members[f"{top}/images/ADE/validation/urban/street/{stem}.jpg"] = picture(k)
        members[f"{top}/images/ADE/validation/urban/street/{stem}_seg.png"] = codes(label)
        members[f"{top}/images/ADE/validation/urban/street/{stem}_parts_1.png"] = codes(label * 0)
        members[f"{top}/images/ADE/validation/urban/street/{stem}/instance_000_{stem}.png"] = codes(label * 0)
    members[f"{top}/index_ade20k.pkl"] = pickle.dumps(
        {"filename": [f"{stem}.jpg" for stem, _, _ in both], "bomb": Bomb(),
         "folder": [f"{top}/images/ADE/validation/urban/street"] * 2})
    return {"anna_c0ffee12.zip": members}


def packed(root, name, raw=None):
    """The dataset as downloaded."""
    for archive, members in archives(name, raw).items():
        pack(root / archive, members)
    return root


def unpacked(root, name, raw=None):
    """The dataset unpacked, where COCO's label folders need a folder of their own not to fall into the images'."""
    for archive, members in archives(name, raw).items():
        for member, content in members.items():
            path = root / ("stuffthingmaps" if archive.startswith("stuff") else "") / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


CONVERTED = {"coco-stuff": ("coco/val2017", "coco/stuffthingmaps_detectron2/val2017", "png"),
             "voc20": ("VOC2012/JPEGImages", "VOC2012/annotations_detectron2/val", "png"),
             "pc59": ("pcontext/val/image", "pcontext/val/label", "png"),
             "pc459": ("pcontext_full/val/image", "pcontext_full/val/label", "tif"),
             "ade150": ("ADEChallengeData2016/images/validation",
                        "ADEChallengeData2016/annotations_detectron2/validation", "png"),
             "ade847": ("ADE20K_2021_17_01/images_detectron2/validation",
                        "ADE20K_2021_17_01/annotations_detectron2/validation", "tif")}


def converted(root, name, label=None):
    """The dataset as detectron2's users convert it: ids from 0, void 255, or 65535 in 16-bit TIFF."""
    images, labels, kind = CONVERTED[name]
    ids = np.array(WANTED[name] if label is None else label)
    ids = ids.astype(np.uint8 if kind == "png" else np.uint16)                  # -1 wraps to 255 or 65535
    for folder in (images, labels):
        (root / folder).mkdir(parents=True)
    for k, (stem, label) in enumerate(zip(STEMS[name], (ids, ids[::-1])), 1):
        (root / images / f"{stem}.jpg").write_bytes(picture(k))
        (root / labels / f"{stem}.{kind}").write_bytes(encoded(label, "tiff" if kind == "tif" else kind))
    return root


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
MASKS = [dict(image_id=7, category_id=2, segmentation=dict(size=[2, 3], counts=[0, 6])),         # everywhere
         dict(image_id=9, category_id=9, segmentation=dict(size=[2, 3], counts=[6])),            # nowhere, and training
         dict(image_id=7, category_id=458, segmentation=dict(size=[2, 3], counts=[1, 2, 3])),    # pixels 1, 2
         dict(image_id=7, category_id=258, segmentation=dict(size=[2, 3], counts="42")),         # COCO's text: 4, 2
         dict(image_id=8, category_id=18, segmentation=dict(size=[2, 3], counts=[2, 1, 3]))]     # and void elsewhere
IMAGES = [dict(image_id=7, file_name="2008_000002.jpg", height=2, width=3, phase="val"),
          dict(image_id=9, file_name="2008_000001.jpg", height=2, width=3, phase="train"),
          dict(image_id=8, file_name="2008_000003.jpg", height=2, width=3, phase="val")]


def merged(root, images=IMAGES, masks=MASKS):
    text = json.dumps({"info": {"images": 3}, "annos_occlusion": [], "images": images, "annos_segmentation": masks})
    (root / MERGED[0]).write_text(text)
    return root


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


def test_later_masks_cover_earlier_ones():
    """The same two masks in both orders."""
    full, left = (2, dict(size=[1, 2], counts=[0, 2])), (9, dict(size=[1, 2], counts=[0, 1, 1]))
    assert paint(Masks("x", "y", 1, 2, [full, left])).tolist() == [[9, 2]]
    assert paint(Masks("x", "y", 1, 2, [left, full])).tolist() == [[2, 2]]


def test_cocos_text_by_hand():
    """"5" is 5; "R1": 82-48 = 34 = 2 and more follows, 49-48 = 1, so 2 + 1*32 = 34; "O" is 31 with the sign bit: -1.

    From the fourth on, numbers are differences to the one before the last: 5, 6, 7, then 6 + 1, then 7 - 1.
    """
    assert runs("5") == [5] and runs("R1") == [34]
    assert runs("5671O") == [5, 6, 7, 7, 6] and runs([1, 2]) == [1, 2] and runs("") == []


def text_of(numbers):
    """The inverse of `runs`, written from COCO's description of its format."""
    text = ""
    for k, number in enumerate(numbers):
        number -= numbers[k - 2] if k > 2 else 0
        while True:
            five, number = number & 31, number >> 5
            more = number != (-1 if five & 16 else 0)
            text += chr(48 + five + 32 * more)
            if not more:
                break
    return text


def test_cocos_text_and_back():
    """Run lengths of any size survive the text, with differences of both signs."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        numbers = [int(n) for n in rng.integers(0, 10 ** rng.integers(1, 7), rng.integers(1, 12))]
        assert runs(text_of(numbers)) == numbers


@pytest.mark.parametrize("segmentation", [
    dict(size=[2, 3], counts=[1, 2]), dict(size=[3, 2], counts=[6]), dict(size=[2, 3]),
    dict(size=[2, 3], counts=[-1, 7]), dict(size=[2, 3], counts="4"),
    dict(size=[2, 3], counts=[10**14]), dict(size=[2, 3], counts=None), [[1.0, 2.0]]])
def test_a_mask_of_another_size_is_refused(segmentation):
    """Too few pixels, rows and columns exchanged, no counts, a negative run, far too many, a polygon."""
    with pytest.raises(InputError, match="x.json: image y: a mask of category 5 is no run-length code of 3x2 pixels"):
        paint(Masks("x.json", "y", 2, 3, [(5, segmentation)]))


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


def test_a_json_array_comes_one_object_at_a_time():
    """Blanks, commas and line ends between objects; other arrays are passed over; it stops at the bracket."""
    text = '{"a": [1, 2], "b" : [ {"x": [3]} ,\n {"x": 4}\n], "c": [5]}'
    assert list(json_array("f", text, "b")) == [{"x": [3]}, {"x": 4}] and list(json_array("f", text, "a")) == [1, 2]
    assert next(json_array("f", '[{"b": [7, ', "b")) == 7


# ---- ADE-847 ----
def test_an_ade_code_by_hand(tmp_path):
    """wall: R = 110, G = 162 -> 11 * 256 + 162 = 2978, whatever B; 256 needs more than 8 bits: R = 10, G = 0."""
    rgb = np.array([[[110, 162, 3], [110, 162, 250], [0, 0, 9], [10, 0, 0]]], np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a_seg.png")
    assert read_codes(tmp_path / "a_seg.png").tolist() == [[2978, 2978, 0, 256]]


@pytest.mark.parametrize("pixels, why", [(np.full((1, 2, 3), 111, np.uint8), "red value of 111"),
                                         (np.zeros((1, 2), np.uint8), "holds L pixels, not ADE20K's RGB")])
def test_what_is_no_ade_code_is_refused(tmp_path, pixels, why):
    """The challenge's index maps, and any other picture."""
    Image.fromarray(pixels).save(tmp_path / "a_seg.png")
    with pytest.raises(InputError, match=f"a_seg.png: .*{why}.*ADE20K_2021_17_01"):
        read_codes(tmp_path / "a_seg.png")


def test_shrinking_by_hand():
    """5x10 to a short side of 2: scale 2.5, rows 0, floor(2.5) = 2; columns 0, 2, 5, 7.

    Bilinear without a filter: output column j lies at (j + .5) * 2.5 - .5 = .75, 3.25, 5.75, 8.25 of a ramp 0, 20, ...
    """
    label = np.arange(50).reshape(5, 10)
    image = np.repeat((np.arange(10) * 20)[None, :, None], 5, 0).repeat(3, 2).astype(np.uint8)
    small, ids = shrink(image, label, short=2)
    assert ids.tolist() == [[0, 2, 5, 7], [20, 22, 25, 27]]
    assert small.shape == (2, 4, 3) and small.dtype == np.uint8 and small[0, :, 0].tolist() == [15, 65, 115, 165]
    tall, turned = shrink(image.transpose(1, 0, 2).copy(), label.T, short=2)
    assert (turned == ids.T).all() and (tall == small.transpose(1, 0, 2)).all()
    assert shrink(image, label, short=5)[1] is label                            # small enough already


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


@pytest.mark.parametrize("content, why", [
    (mat([[1, 2, 3]] * 2, np.uint8), "LabelMap is 2-D uint8, not 2-D uint16"), (mat([[1]], name="Labels"), "KeyError"),
    (b"not a mat file" * 40, "holds no LabelMap"), (mat([[1, 2, 3]] * 2)[:150], "holds no LabelMap"),
    (mat([[1, 2, 3]] * 2, np.float64), "2-D float64")])
def test_a_mat_that_may_have_lost_ids_is_refused(tmp_path, content, why):
    """8 bits cannot hold 459 ids; another variable, another file, half a file."""
    (tmp_path / "2008_000002.mat").write_bytes(content)
    with pytest.raises(InputError, match=f"2008_000002.mat: .*{why}.*trainval.tar.gz again") as caught:
        read_mat(tmp_path / "2008_000002.mat")
    assert "\n" not in str(caught.value)


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


def test_published_counts_are_those_of_the_papers():
    assert COUNTS["coco-stuff"] == {"train": 118287, "val": 5000}
    assert [COUNTS[name]["val"] for name in NAMES[1:]] == [1449, 5104, 5104, 2000, 2000]
