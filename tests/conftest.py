"""Tests run from anywhere, on the files of this folder, with one fixed seed each; kernels without a GPU interpreted."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")     # for the commands we start

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                      # has to be set before the first `import triton`


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or writes the text embeddings of whoever runs it."""
    os.environ["PAT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
