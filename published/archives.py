"""Files inside archives, read in place: what a folder holds, whether or not it was unpacked.

A zip or tar is one long file with a table of contents: at the end of a zip, one entry before every file of a tar.
`Shelf.members` reads that table once and notes where each member lies; `Member.open` seeks there.  So 18 GB of images
need no second 18 GB of disk, nothing stays open, and any process may read, in any order.

    Shelf(DIR).find([("val2017.zip", "val2017"), (None, "val2017")], (".jpg",)).files  ->  {"000000000139": source, ...}

A source is a Path or a Member: both have open() and print as the place they are.  A gzipped tar has no offsets, only a
beginning, and cannot be read so.

Tests: tests/published/test_archives.py.  Read next: labels.py.
"""

import os
import struct
import tarfile
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from cli import InputError

MOST_BYTES = 2**30                     # of one image or label, packed or unpacked


class Member(NamedTuple):
    """A file inside a zip or tar; open(), name and str() are those of a Path."""

    archive: Path
    name: str
    offset: int                        # a tar: of the bytes; a zip: of the member's own header, the bytes follow
    size: int                          # bytes as stored
    method: int | None = None          # a zip: 0 stored, 8 deflated
    crc: int = 0                       # a zip: checksum of the bytes

    def __str__(self):
        return f"{self.archive}/{self.name}"

    def open(self, mode="rb"):
        """The bytes as a stream.  Raises InputError if the archive is not what its table of contents says."""
        try:
            if self.size > MOST_BYTES:
                raise ValueError(f"it says it has {self.size:,} bytes")
            with open(self.archive, "rb") as file:
                file.seek(self.offset)
                if self.method is not None:
                    header = file.read(30)
                    if header[:4] != b"PK\3\4" or self.method not in (0, 8):
                        raise ValueError("no readable member at its place")
                    file.seek(sum(struct.unpack("<HH", header[26:])), 1)                # its name, its extra field
                data = file.read(self.size)
            if len(data) < self.size:
                raise ValueError("the archive is cut short")
            if self.method == 8:
                stream = zlib.decompressobj(-15)                                        # a bare deflate stream
                data = stream.decompress(data, MOST_BYTES)
                if not stream.eof:
                    raise ValueError(f"it breaks off, or unpacks to more than {MOST_BYTES:,} bytes")
            if self.method is not None and zlib.crc32(data) != self.crc:
                raise ValueError("the checksum is wrong")
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise InputError(f"{self}: is damaged ({error}); download {self.archive.name} again") from error
        return BytesIO(data)


class Listing(NamedTuple):
    """Files of one kind from one place."""

    place: Path                        # the archive or the folder
    files: dict                        # stem -> source


class Shelf:
    """What lies under a folder, or in its folders one level down; an archive is looked into as if it were unpacked.

    `known`: names of archives that are never looked into when a pattern such as *.zip asks for others.
    """

    def __init__(self, root, known=()):
        self.root, self.known = Path(root), known
        if not self.root.is_dir():
            raise InputError(f"{root}: no such folder; give the one that holds the datasets' archives or folders")
        inner = sorted(path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.bases, self.tables = [self.root, *inner], {}

    def members(self, archive):
        """{name: Member} of every file in a zip or tar.  Raises InputError for one that is broken."""
        if archive not in self.tables:
            try:
                if archive.suffix == ".zip":
                    with zipfile.ZipFile(archive) as file:
                        members = [Member(archive, i.filename, i.header_offset, i.compress_size, i.compress_type, i.CRC)
                                   for i in file.infolist() if not i.is_dir()]
                else:
                    with tarfile.open(archive, "r:") as file:
                        members = [Member(archive, i.name, i.offset_data, i.size) for i in file if i.isfile()]
                        file.fileobj.seek(file.offset)             # tarfile ends at a damaged header as at the last member
                        rest = file.fileobj.read(2**20)
                        if len(rest) < 1024 or rest.strip(b"\0"):  # a whole tar ends in two empty blocks
                            raise ValueError("no end of the archive")
            except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, tarfile.TarError,
                    struct.error) as error:                        # not implemented: a version no zip has
                raise InputError(f"{archive}: cannot be read ({error}), as if the download had stopped; download it "
                                 "again, or move it away") from error
            self.tables[archive] = {member.name.removeprefix("./"): member for member in members}
        return self.tables[archive]

    def path(self, *names):
        """The first of these files or folders that is there, or None."""
        return next((base / name for name in names for base in self.bases if (base / name).exists()), None)

    def find(self, places, suffixes):
        """The Listing of the first of `places` that holds files of these suffixes, or None.

        A place is (archive, folder inside it), archive a name or pattern, or (None, folder).
        Archives come first: one is whole or is refused, a folder may be half unpacked.
        """
        for archive, folder in places:
            for base in self.bases:
                for place in sorted(base.glob(archive)) if archive else [base / folder]:
                    if archive and place.name != archive and place.name in self.known:
                        continue
                    files = self.files(place, folder, suffixes)
                    if files:
                        return Listing(place, files)
        return None

    def files(self, place, folder, suffixes):
        """{stem: source} of one folder, `place` itself or inside the archive `place`, and of the folders below it."""
        sources, packed = {}, place.is_file()
        for name, source in self.members(place).items() if packed else walk(place):
            suffix = next((s for s in suffixes if name.endswith(s)), None)
            if suffix is None or (packed and not name.startswith(folder + "/")):
                continue
            stem = name[:-len(suffix)].rsplit("/")[-1]
            if stem in sources:
                raise InputError(f"{source}: has the name of {sources[stem]}; remove one of them")
            if not stem.startswith("."):                           # ._a.jpg is macOS's, not the dataset's
                sources[stem] = source
        return sources


def walk(folder):
    """(name, Path) of every file in a folder and below it, in order of names."""
    for path, inner, names in os.walk(folder):
        inner.sort()
        yield from ((name, Path(path, name)) for name in sorted(names))
