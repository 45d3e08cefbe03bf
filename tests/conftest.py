"""Tests run from anywhere, on the files of this folder, with one fixed seed and one thread each; kernels without a GPU
interpreted."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"                           # before torch is imported; and for the commands we start
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


# ---- run directories and published SAN checkpoints (of tests/test_pat.py and tests/test_san.py) ----
@pytest.fixture
def run(tmp_path):
    """(a run directory of PAT, the model in it), of the world's sizes over a CLIP of random weights."""
    from runs import build
    from tests.helpers import save_run
    from train import recipe

    config = recipe("world", pretrained="none")
    torch.manual_seed(config.run.seed)
    model = build(config.run)
    with torch.no_grad():
        model.background.add_(1)
    return save_run(tmp_path, model, config, 7), model


@pytest.fixture
def published(tmp_path):
    """(file in the published layout, the SAN that is in it, its RunConfig): the world's sizes."""
    from runs import build, preset
    from tests.helpers import published_layout, randomised

    config = preset("world", model="san", pretrained="none")
    model = randomised(build(config))
    torch.save({"model": published_layout(model)}, tmp_path / "san.pth")
    return tmp_path / "san.pth", model, config


@pytest.fixture(scope="module")
def san_small():
    """What the published code (open_clip 2.16, fp32, CPU) computed from random weights; see the file's metadata.

    (tensors by name, sizes of the side network, sizes of CLIP)
    """
    import json

    from safetensors import safe_open

    with safe_open(ROOT / "tests" / "san_small.safetensors", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    return tensors, json.loads(metadata["side"]), json.loads(metadata["clip"])


@pytest.fixture(scope="module")
def san_of_small(san_small):
    """Our SAN with the weights of that file."""
    import open_clip

    import san
    from clip import CLIPConfig, wrap
    from published.san_checkpoints import from_published

    tensors, side, c = san_small
    vision = open_clip.CLIPVisionCfg(image_size=c["image_size"], patch_size=c["patch"], width=c["width"],
                                     layers=c["layers"], head_width=c["width"] // c["heads"])
    small = open_clip.CLIP(c["embed_dim"], vision,
                           open_clip.CLIPTextCfg(context_length=8, vocab_size=16, width=32, heads=1, layers=1))
    sizes = san.SideConfig(width=side["width"], depth=side["depth"], heads=side["heads"], patch=side["patch"],
                           grid=side["image_size"] // side["patch"], queries=side["queries"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(san, "load_vlm", lambda name, pretrained, *, scale, depths: wrap(small, None, scale, depths))
        model = san.SAN(san.SANConfig(CLIPConfig(clip_scale=c["scale"], depths=(0, 1, 2, 3)), sizes, side["mlp_channels"]))
    from_published(model, {key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    return model
