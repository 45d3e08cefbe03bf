"""Text embeddings on disk: a vocabulary is embedded once, and kept under a checksum of all it depends on.

    $PAT_CACHE or ~/.cache/pat / text-KEY.safetensors      embeddings (L,E), and their own checksum
    kept(key, shape, compute)      from there, or computed and put there; a damaged file is said and computed again

# ours: all of it.

Tests: tests/published/test_text_cache.py.  Read next: san_checkpoints.py.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from cli import tensors_checksum
from published.weights import reason


def cached_file(key):
    """Where the embeddings with this checksum are kept: below $PAT_CACHE, or ~/.cache/pat."""
    return Path(os.environ.get("PAT_CACHE") or Path.home() / ".cache" / "pat") / f"text-{key}.safetensors"


def read_cached(path, shape):
    """The embeddings at `path`, or None if there are none, or, saying so, if they are damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            rows, stored = file.get_tensor("embeddings"), (file.metadata() or {}).get("sha256")
        if tuple(rows.shape) == shape and stored == tensors_checksum({"embeddings": rows}):
            return rows
        why = "its content is not what was written"
    except Exception as error:                                # safetensors and the file system each have their own
        why = reason(error)
    print(f"{path}: damaged ({why}); the names are embedded again", file=sys.stderr)
    return None


def write_cached(path, rows):
    """Keep embeddings at `path`, atomically; where that cannot be done, say so and go on."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": rows}, temporary, {"sha256": tensors_checksum({"embeddings": rows})})
        os.replace(temporary, path)
    except Exception as error:                                # safetensors wraps the file system's
        with suppress(OSError):
            temporary.unlink()
        print(f"{path.parent}: cannot be written ({reason(error)}); the names' embeddings are not "
              "kept: set PAT_CACHE to a folder that can", file=sys.stderr)


def kept(key, shape, compute):
    """The embeddings (L,E) called `key`: from disk, or else computed, by `compute()`, and written there."""
    path = cached_file(key)
    rows = read_cached(path, shape)
    if rows is None:
        rows = compute()
        write_cached(path, rows.cpu())
    return rows
