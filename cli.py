"""What a command owes whoever types it: one line when something is wrong, and no file half-written.

    run_cli(main)        an InputError ends the program with one line on stderr and status 2, no traceback
    parse_flags(parser)  an unknown flag names the closest one there is
    write_files({...})   files are replaced only when all of them stand whole beside their places
    number, choice       a field of a config with its range beside it: `lr: float = number(1e-4, 1e-9, 10)`

Every file of the project raises `InputError` for what a user gave and cannot be used: where, what is wrong, what to do.

# ours: all of it.

Tests: tests/test_cli.py.  Read next: data.py.
"""

import argparse
import difflib
import errno
import glob
import hashlib
import os
import sys
import time
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
from PIL import Image


MOST_NAMES = 30_000                    # in one list of class names: ImageNet has 21,841


class InputError(Exception):
    """Something the user gave cannot be used.  The message is one line: where, what is wrong, what to do."""


def run_cli(main):
    """Run `main()`; an InputError ends the program with one line on stderr and status 2, Ctrl-C with 130; no traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        if isinstance(error, OSError):                        # a full disk, a name too long: met where nobody looked
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG):
                raise
            error = InputError(f"{error.filename or 'the disk'}: {error.strerror}; what was written before is whole")
        if int(os.environ.get("RANK", 0)):                    # if process 0 says the same, torchrun ends the rest first
            time.sleep(3)
        # A DataLoader worker hands its error over as a whole traceback whose last line is ours.
        line = str(error).rstrip().splitlines()[-1]
        print("error: " + line.split("InputError: ")[-1], file=sys.stderr)
        sys.exit(2)


def parse_flags(parser, argv=None):
    """parser.parse_args that raises InputError, one line, and names the closest flag to an unknown one.

    Build `parser` with `allow_abbrev=False`, or argparse takes a shortened flag for the full one.
    """
    def fail(message):
        raise InputError(f"{message}; see --help")

    commands = [command for action in parser._actions if isinstance(action, argparse._SubParsersAction)
                for command in action.choices.values()]
    for each in (parser, *commands):
        each.error = fail
    known = [flag for each in (parser, *commands) for action in each._actions for flag in action.option_strings]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
        close = difflib.get_close_matches(flag, known, 1, cutoff=0.4)
        advice = f"did you mean {close[0]}?" if close else "see --help"
        raise InputError(f"unknown argument {flag}; {advice}")
    return args


def number(default, low, high, n=None):
    """A field of a config: a number of the default's kind, or a tuple of such (n of them, if given), each from low to high."""
    return field(default=default, metadata=dict(low=low, high=high, n=n))


def choice(*allowed, default=None):
    """A field of a config: one word of `allowed`, by default the first; where the default is a tuple, any of them."""
    return field(default=allowed[0] if default is None else default, metadata=dict(allowed=allowed))


def checked(name, value, spec):
    """`value` for the field `spec` of a config, of its default's kind.  Raises InputError for another kind, or out of range."""
    kind, limits, many = type(spec.default), spec.metadata, isinstance(value, tuple)
    shown, each = (" ".join(map(str, value)), value) if many else (value, (value,))
    fits = many == (kind is tuple)
    if "allowed" in limits:
        if not fits or any(part not in limits["allowed"] for part in each):
            raise InputError(f"{name} {shown}: there are {', '.join(limits['allowed'])}")
    elif "low" in limits:
        low, high, n, one = limits["low"], limits["high"], limits["n"], int if kind is tuple else kind
        if one is float and type(value) is int:               # 1 for 1.0, as JSON and people write it
            value, each = float(value), (float(value),)
        if not fits or n not in (None, len(each)) or any(type(part) is not one or not low <= part <= high for part in each):
            what = f"{n or 'some'} whole numbers, each" if kind is tuple else "a whole number" if one is int else "a number"
            raise InputError(f"{name} {shown}: takes {what} from {low:g} to {high:g}")
    elif type(value) is not kind:
        raise InputError(f"{name} {shown}: takes {'true or false' if kind is bool else 'a text'}")
    return value


def check_device(device):
    """Raises InputError for "cuda" where no GPU is visible."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is visible here; leave it out to use the CPU")


def write_files(files):
    """Write {path: str, bytes, PIL image or (H,W,3) uint8}, under temporary names first, so a failure changes nothing.

    Raises InputError, one line, when a place cannot be written or its ending names no picture format.
    """
    written = {}                                       # place -> where its content stands until all of them do
    try:
        for path, content in files.items():
            path = Path(path)
            for left in path.parent.glob(f".[0-9]*.{glob.escape(path.name)}"):                # by a process that was killed
                if not Path("/proc", left.name.split(".")[1]).exists():
                    left.unlink(missing_ok=True)
            temporary = written[path] = path.with_name(f".{os.getpid()}.{path.name}")
            if isinstance(content, str):
                temporary.write_text(content, encoding="utf-8")
            elif isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                picture = Image.fromarray(content) if isinstance(content, np.ndarray) else content
                picture.save(temporary)
        for path, temporary in written.items():
            os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error})") from error
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def parse_names(given, where="--labels", item="name"):
    """Class names from "striped boat, grass" or from a list -> tuple of str, stripped; item k of it is class k.

    Raises InputError if there is none, or one is blank or occurs twice; `where` and `item` word its message.
    """
    parts = given.split(",") if isinstance(given, str) else given
    names = tuple(name.strip() for name in parts)
    if not any(names):
        raise InputError(f"{where}: holds no class names; give at least one, such as: striped boat, grass")
    if len(names) > MOST_NAMES:
        raise InputError(f"{where}: holds {len(names):,} names; at most {MOST_NAMES:,} (cli.MOST_NAMES)")
    known = {}
    for k, name in enumerate(names, 1):
        if not name:
            raise InputError(f"{where}: {item} {k} is blank; remove it, or write the class name that belongs there")
        first = known.setdefault(name, k)
        if first < k:
            raise InputError(f"{where}: {item} {k} repeats {item} {first}, {name!r}; remove either")
    return names


def tensors_checksum(tensors):
    """sha256 over names, dtypes, shapes and bytes of a dict of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
