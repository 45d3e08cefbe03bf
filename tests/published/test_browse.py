"""What published/browse.py promises: check tells all there is and what is missing, show draws it."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cli import InputError
from data import palette
from published import browse
from published.browse import label_sheet
from published.folder import Folder
from published.vocabulary import load_vocabulary
from tests.helpers import NAMES, filled, merged, packed


def test_check_tells_what_is_there_and_what_is_missing(tmp_path, capsys):
    """Six sets in archives, PC-59 by its masks, no COCO train: counts, ids, void, places, routes, where to get it."""
    for name in NAMES:
        packed(tmp_path, name)
    browse.check(merged(tmp_path))
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
    browse.main(["check", str(packed(tmp_path, "voc20")), "--images", "1"])
    assert "voc20 val: 2 of 1,449 images; 1 labels read: 4 of 20 ids from 0 to 19, void 33" in capsys.readouterr().out


def test_check_goes_on_after_a_broken_set_and_ends_with_status_2(tmp_path):
    """The line of the broken set says what to do; the others are still told."""
    packed(tmp_path, "voc20")
    packed(tmp_path, "ade150", [[200, 0, 0]] * 2)
    done = subprocess.run([sys.executable, "-m", "published.browse", "check", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "1 of the datasets above cannot be used" in done.stderr.splitlines()[-1]
    assert "ade150 val: UNUSABLE\n" in done.stdout and "holds the value 200" in done.stdout
    assert "voc20 val: 2 of 1,449 images" in done.stdout and "Traceback" not in done.stderr


def test_check_of_a_folder_of_your_own(tmp_path, capsys):
    browse.main(["check", str(filled(tmp_path))])
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
    browse.main(["show", ".", "pc459"])
    assert capsys.readouterr().out == "pc459.png: 2 of 2 images, LabelMap of the .mat files, names 459be945e89c4612\n"
    assert Image.open("pc459.png").size[0] == 1288
    names = load_vocabulary("pc459").names
    (tmp_path / "names.txt").write_text("\n".join((*names[:-1], "woollen things")))
    browse.main(["show", ".", "pc459", "--out", "b.png", "--names", "names.txt"])
    assert "459be945e89c4612" not in capsys.readouterr().out and (tmp_path / "b.png").exists()


@pytest.mark.parametrize("arguments, words", [
    ([], "usage: python -m published.browse check DIR"), (["check"], "usage:"),
    (["show", "."], "say which, coco-stuff"), (["show", ".", "ade"], "no dataset 'ade'"),
    (["check", "gone"], "gone: no such folder"), (["check", ".", "--images", "0"], "--images 0: at least 1"),
    (["paint", "."], "invalid choice"), (["show", ".", "pc59"], "Pascal Context 59 val is not there")])
def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        browse.main(arguments)
    assert "\n" not in str(caught.value)
