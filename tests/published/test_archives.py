"""What published/archives.py promises: members read in place, by any process, or refused in one line."""

import os
import pickle
import zipfile

import pytest

from cli import InputError
from published.archives import Member, Shelf
from tests.helpers import cut, pack

FILES = {"box/a.txt": b"first", "box/b.txt": b"second " * 50, "box/in/c.txt": b"third", "other/a.txt": b"fourth",
         "boxes/d.txt": b"fifth"}


def read(sources):
    return {stem: source.open("rb").read() for stem, source in sources.items()}


@pytest.mark.parametrize("name, how", [("x.zip", dict(method=zipfile.ZIP_STORED)), ("x.zip", {}), ("x.tar", {}),
                                       ("x.tar", dict(prefix="./"))])
def test_an_archive_reads_like_the_folder_it_unpacks_to(tmp_path, name, how):
    """Stored, deflated, tar, tar with names that begin with a dot: the same stems, the same bytes."""
    pack(tmp_path / name, FILES, **how)
    found = Shelf(tmp_path).find([(name, "box")], (".txt",))
    assert found.place == tmp_path / name
    assert read(found.files) == {"a": b"first", "b": b"second " * 50, "c": b"third"}
    assert str(found.files["a"]).endswith("box/a.txt") and str(tmp_path / name) in str(found.files["a"])
    for path, content in FILES.items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(content)
    unpacked = Shelf(tmp_path / "out").find([(None, "box")], (".txt",))
    assert read(unpacked.files) == read(found.files) and unpacked.place == tmp_path / "out" / "box"


def test_a_member_travels_to_another_process(tmp_path):
    """It holds a place, not an open file: pickled and unpickled it reads the same."""
    pack(tmp_path / "x.zip", FILES)
    member = Shelf(tmp_path).members(tmp_path / "x.zip")["box/b.txt"]
    assert isinstance(member, Member) and pickle.loads(pickle.dumps(member)).open().read() == b"second " * 50


def test_places_in_order_and_one_level_down(tmp_path):
    """The first place that holds such files wins, an archive before the folder; a sub-folder counts as the folder."""
    (tmp_path / "deep" / "box").mkdir(parents=True)
    (tmp_path / "deep" / "box" / "z.txt").write_bytes(b"unpacked")
    places = [("x.zip", "box"), (None, "box")]
    assert list(Shelf(tmp_path).find(places, (".txt",)).files) == ["z"]
    assert Shelf(tmp_path).find(places, (".jpg",)) is None and Shelf(tmp_path).find([], (".txt",)) is None
    pack(tmp_path / "deep" / "x.zip", FILES)
    assert sorted(Shelf(tmp_path).find(places, (".txt",)).files) == ["a", "b", "c"]
    assert Shelf(tmp_path).path("none", "box/z.txt") == tmp_path / "deep" / "box" / "z.txt"
    assert Shelf(tmp_path).path("none") is None


def test_a_pattern_skips_the_known(tmp_path):
    """*.zip finds the archive whatever its name, and does not look into those that are something else."""
    pack(tmp_path / "zoe_0a1b.zip", FILES)
    (tmp_path / "huge.zip").write_bytes(b"never opened")
    assert sorted(Shelf(tmp_path, known=("huge.zip",)).find([("*.zip", "box")], (".txt",)).files) == ["a", "b", "c"]
    with pytest.raises(InputError, match="huge.zip: cannot be read"):
        Shelf(tmp_path).find([("*.zip", "nothing")], (".txt",))


def test_files_come_in_order_of_their_names(tmp_path, monkeypatch):
    """Whatever the order in which the disk gives folders and files: so the first of two at odds is the same anywhere."""
    for name in ("b/y.txt", "b/x.txt", "a/w.txt", "v.txt"):
        (tmp_path / "box" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "box" / name).write_bytes(b"")
    scan = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = iter(sorted(scan(path), key=lambda entry: entry.name, reverse=True))

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        close = __exit__

    shelf = Shelf(tmp_path)
    monkeypatch.setattr(os, "scandir", Backwards)
    assert list(shelf.find([(None, "box")], (".txt",)).files) == ["v", "w", "x", "y"]


def test_what_the_system_leaves_behind_is_no_file_of_the_dataset(tmp_path):
    """macOS writes ._a.txt beside a.txt, in folders and in archives."""
    pack(tmp_path / "x.zip", {"box/a.txt": b"1", "box/._a.txt": b"clutter", "__MACOSX/box/._a.txt": b"clutter"})
    assert list(Shelf(tmp_path).find([("x.zip", "box")], (".txt",)).files) == ["a"]


def test_two_files_of_one_stem_are_refused(tmp_path):
    pack(tmp_path / "x.zip", {"box/1/a.txt": b"1", "box/2/a.txt": b"2"})
    with pytest.raises(InputError, match="box/2/a.txt: has the name of .*box/1/a.txt"):
        Shelf(tmp_path).find([("x.zip", "box")], (".txt",))


def flip(path, where):
    """Change the byte at the first occurrence of `where`."""
    data = bytearray(path.read_bytes())
    data[data.index(where)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["x.zip", "x.tar"])
def test_half_a_download_is_refused(tmp_path, name):
    """A zip loses its table of contents; a tar breaks off in some member."""
    pack(tmp_path / name, {**FILES, "box/long.txt": b"long" * 5000})
    cut(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}.*download") as caught:
        read(Shelf(tmp_path).find([(name, "box")], (".txt",)).files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method, where, why", [
    (zipfile.ZIP_STORED, b"second", "the checksum is wrong"), (zipfile.ZIP_STORED, b"PK\3\4", "no readable member"),
    (zipfile.ZIP_BZIP2, b"none", "no readable member")])
def test_damaged_bytes_are_refused(tmp_path, method, where, why):
    """One bit in the bytes, or in the member's header; a compression nobody uses for these sets."""
    pack(tmp_path / "x.zip", {"box/b.txt": b"second " * 50}, method)
    if where != b"none":
        flip(tmp_path / "x.zip", where)
    with pytest.raises(InputError, match=f"x.zip/box/b.txt: is damaged .{why}.*download x.zip again"):
        read(Shelf(tmp_path).find([("x.zip", "box")], (".txt",)).files)


def test_a_shrunk_tar_is_noticed_when_read(tmp_path):
    """The table was read before the file was cut: fewer bytes than promised are an error, not a short file."""
    pack(tmp_path / "x.tar", FILES)
    found = Shelf(tmp_path).find([("x.tar", "other")], (".txt",))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:found.files["a"].offset + 2])
    with pytest.raises(InputError, match="x.tar/other/a.txt: is damaged .the archive is cut short"):
        read(found.files)


def test_no_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="gone: no such folder"):
        Shelf(tmp_path / "gone")


def test_what_a_zip_says_beside_a_members_name_is_skipped(tmp_path):
    """An extra field of four bytes, as other programs than Python's write them, stands between the name and the bytes."""
    told = zipfile.ZipInfo("images/a.jpg")
    told.extra = b"\x99\x99\x04\x00abcd"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(told, b"the bytes")
    assert Shelf(tmp_path).find([("a.zip", "images")], (".jpg",)).files["a"].open().read() == b"the bytes"
