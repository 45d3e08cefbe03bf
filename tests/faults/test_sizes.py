"""What a file claims is bounded before memory is taken: one line, the limit by its name.  What one keeps is bounded too."""

import io
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import clip
import data
import tokenizer as program
from cli import MOST_NAMES, InputError, parse_names
from data import MOST_PIXELS, read_classes, read_image
from predict import fitting
from published import archives
from published.archives import Member
from published.browse import label_sheet
from published.folder import Folder
from published.labels import Masks, paint, read_codes, read_label, read_mat
from studies.gallery import masks, named
from studies.pictures import contact_sheet
from tests.helpers import filled, noise, pack, world
from tokenizer import Tokenizer, decode_file, encode_files, read_tokens


def claims(path, width, height, mode="RGB"):
    """A PNG of 2x3 pixels whose header says otherwise."""
    buffer = io.BytesIO()
    Image.new(mode, (2, 3)).save(buffer, "PNG")
    told = bytearray(buffer.getvalue())
    told[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    told[29:33] = zlib.crc32(told[12:29]).to_bytes(4, "big")
    path.write_bytes(told)
    return path


# --- pictures and labels ---


@pytest.mark.parametrize("read, mode", [(read_image, "RGB"), (read_label, "L"), (read_codes, "RGB")])
@pytest.mark.parametrize("width, height", [(10_001, 10_000), (60_000, 60_000), (2**31 - 1, 1), (1, MOST_PIXELS + 1)])
def test_a_header_that_claims_more_than_100_megapixels_is_refused_unread(tmp_path, read, mode, width, height):
    with pytest.raises(InputError, match=rf"a\.png: says it has {width}x{height} pixels.*100 megapixels \(data.MOST_PIXELS\)"):
        read(claims(tmp_path / "a.png", width, height, mode))


def test_100_megapixels_are_not_too_many(tmp_path, recwarn):
    """It is broken, and that is what is said; and PIL, whose own bound is lower, does not warn beside it."""
    with pytest.raises(InputError, match="cannot be read"):
        read_image(claims(tmp_path / "a.png", 10_000, 10_000))
    assert not recwarn.list


def test_a_mat_file_that_unpacks_to_more_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_PIXELS", 5)
    for name, key in (("a", "LabelMap"), ("b", "Other")):
        savemat(tmp_path / f"{name}.mat", {key: np.zeros((2, 3), np.uint16)}, do_compression=True)
        with pytest.raises(InputError, match=rf"{name}\.mat \({key}\): says it has 6x1 pixels"):
            read_mat(tmp_path / f"{name}.mat")


def test_a_mask_of_a_million_by_a_million_pixels_takes_no_memory(tmp_path):
    with pytest.raises(InputError, match="image a: says it has 1000000x1000000 pixels"):
        paint(Masks(tmp_path / "all.json", "a", 10**6, 10**6, []))


def test_an_archive_may_not_claim_nor_unpack_to_more_than_a_gigabyte(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="it says it has 1,099,511,627,776 bytes"):
        Member(tmp_path / "a.tar", "a", 0, 2**40).open()
    monkeypatch.setattr(archives, "MOST_BYTES", 1000)
    pack(tmp_path / "a.zip", {"fits": bytes(1000), "bomb": bytes(10**6)})
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        fits, bomb = (Member(tmp_path / "a.zip", i.filename, i.header_offset, i.compress_size, i.compress_type, i.CRC)
                      for i in archive.infolist())
    assert fits.open().read() == bytes(1000)
    with pytest.raises(InputError, match="unpacks to more than 1,000 bytes"):
        bomb.open()


# --- sheets ---


@pytest.mark.parametrize("h, w, width, size", [(480, 640, 320, (240, 320)), (640, 480, 300, (400, 300)), (3, 1, 100, (300, 100)),
                                               (5000, 1, 100, (300, 1)), (4000, 1000, 100, (300, 75)), (1, 5000, 100, (1, 100))])
def test_a_picture_is_drawn_as_wide_as_asked_or_three_times_as_high(h, w, width, size):
    assert fitting(np.zeros((h, w, 3), np.uint8), width) == size


def test_no_sheet_grows_with_the_shape_of_a_picture(tmp_path):
    """One pixel wide and 5,000 high: it was a sheet of 242 megapixels, 20 GB on the way there."""
    thin = noise(5000, 1)
    assert max(contact_sheet([[thin, None], [thin, thin]], ["a", "b"]).size) < 1300
    assert max(named(thin, np.zeros((5000, 1), int), ["sky"]).shape) == 3 * 448
    root = tmp_path / "thin"
    root.mkdir()
    dataset = filled(root)
    for place, picture in (("images", thin), ("labels", np.zeros((5000, 1), np.uint8))):
        Image.fromarray(picture).save(dataset / place / "a.png")
    assert max(label_sheet(Folder(dataset)).size) < 2100
    model = world().eval()
    sample = dict(image=torch.zeros(3, 64, 16), original=thin, label=None)
    assert max(masks(model, [sample], ["sky", "grass"]).size) < 1500


# --- tokens ---


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A folder with a photo and its tokens, and the tokenizer."""
    here, model = tmp_path_factory.mktemp("tokens"), world().eval()
    tokenizer = Tokenizer.of(model, latent=True)
    Image.fromarray(noise(40, 60)).save(here / "a.png")
    encode_files([here / "a.png"], here / "a.npz", tokenizer)
    return here, tokenizer


def changed(here, to, **arrays):
    with np.load(here / "a.npz") as file:
        np.savez_compressed(here / to, **{**file, **arrays})
    return here / to


@pytest.mark.parametrize("change, says", [
    (dict(sizes=np.array([[10**6, 10**6]])), r"a: says it has 1000000x1000000 pixels.*data.MOST_PIXELS"),
    (dict(crops=np.array([[10**6, 10**6]])), r"a: 1000000x1000000 pixels are more than can be encoded at once.*MOST_ENCODED"),
    (dict(padding=np.zeros(9)), "'padding' belongs to no image of it"), ({"b.mid": np.zeros((8, 8))}, "'b.mid' belongs to no image of it")], ids=str)
def test_tokens_that_claim_more_than_there_is_are_refused_before_anything_is_drawn(tokens, change, says):
    here, tokenizer = tokens
    with pytest.raises(InputError, match=says):
        decode_file(changed(here, "other.npz", **change), here / "out", tokenizer)
    assert not (here / "out").exists()


def test_a_file_of_tokens_that_unpacks_to_more_is_refused_by_its_table(tokens, monkeypatch):
    here, tokenizer = tokens
    bomb = changed(here, "bomb.npz", bomb=np.zeros(10**6, np.uint8))
    monkeypatch.setattr(program, "MOST_BYTES", 10**6)
    monkeypatch.setattr(np.lib.format, "read_array", None)                                # whoever unpacks fails otherwise
    with pytest.raises(InputError, match=r"it unpacks to 1,\d+,\d+ bytes, and MOST_BYTES are 1,000,000"):
        read_tokens(bomb, tokenizer)


def test_what_is_encoded_at_once_is_bounded_and_nothing_is_written(tokens, monkeypatch):
    here, tokenizer = tokens
    for side in (-1, 4097, 10**6):
        with pytest.raises(InputError, match=rf"--short-side {side}: takes a number of pixels up to 4096"):
            encode_files([here / "a.png"], here / "b.npz", tokenizer, side)
    monkeypatch.setattr(program, "MOST_ENCODED", 40 * 60 - 1)
    with pytest.raises(InputError, match=r"a\.png: 40x60 pixels are more than can be encoded at once.*--short-side"):
        encode_files([here / "a.png"], here / "b.npz", tokenizer, 0)
    assert not (here / "b.npz").exists()


# --- names ---


def test_a_list_of_names_has_an_end(tmp_path):
    assert len(parse_names([f"thing {k}" for k in range(MOST_NAMES)])) == MOST_NAMES
    with pytest.raises(InputError, match=r"--labels: holds 30,001 names; at most 30,000 \(cli.MOST_NAMES\)"):
        parse_names([f"thing {k}" for k in range(MOST_NAMES + 1)])
    with open(tmp_path / "classes.txt", "wb") as file:
        file.truncate(2**33)                                                              # 8 GiB of nothing, which take no disk
    with pytest.raises(InputError, match=r"classes\.txt: 8,589,934,592 bytes are no list"):
        read_classes(tmp_path / "classes.txt")


def test_the_rows_of_32_lists_of_names_are_kept_and_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(clip, "KEPT", 3)
    vlm, asked = world().vlm, [(f"thing {k}",) for k in range(5)]
    vlm.cache.clear()
    rows = [vlm.embed_text(names) for names in asked]
    assert len(vlm.cache) == 3
    assert [any(kept is row for kept in vlm.cache.values()) for row in rows] == [False, False, True, True, True]
    assert vlm.embed_text(asked[-1]) is rows[-1] and torch.equal(vlm.embed_text(asked[0]), rows[0]) and len(vlm.cache) == 3
