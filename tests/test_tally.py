"""What tally.py promises: every image once; stopped or not, on one process or two, the same numbers."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tally
from images import checksum, to_tensor, to_unit
from tally import Pass, evaluate
from vq import Tokens

QUIET = Pass(progress=False)

# --- a tiny run: bright is name 0, dark is name 1 -------------------------------------------------------------------


@dataclass
class Config:
    model: str = "pat"
    preset: str = "world"
    seed: int = 7
    short_side: int = 32
    long_side: int = 128
    data: str = ""
    vmf: bool = True
    vlm: str = "fake"
    pretrained: str = "none"
    clip_scale: float = 1.0
    depths: tuple = ()


class FakeVLM(nn.Module):
    """Names are rows of an identity matrix; a patch points to name 0 when bright, to name 1 when dark."""

    def __init__(self, *args, scale=1.0, **kwargs):
        super().__init__()
        self.scale = scale

    def embed_text(self, names):
        return torch.eye(len(names))

    def dense(self, image):
        bright = F.avg_pool2d(to_unit(image).mean(1, keepdim=True), 8)                    # (B,1,h,w)
        return torch.cat([bright, 1 - bright], 1)


class FakeModel(nn.Module):
    """Two queries, bright and dark, sure of their names; PAT repaints its input and numbers its tokens 0, 1, 2, ..."""

    def __init__(self, pat=True):
        super().__init__()
        self.vlm, self.stride, self.pat, self.config = FakeVLM(), 8, pat, Config(model="pat" if pat else "san")

    def codebook(self, stage):
        return F.normalize(torch.randn(64, 4, generator=torch.Generator().manual_seed(3)), dim=-1)

    def forward(self, image, text):
        assert image.shape[-2] % 8 == image.shape[-1] % 8 == 0 and not self.training
        bright = 20 * (F.avg_pool2d(to_unit(image).mean(1, keepdim=True), 8) - 0.5)       # (B,1,h,w)
        classes = 12 * torch.eye(2, text.shape[0] + 1)[None]
        out = {"masks": [torch.cat([bright, -bright], 1)], "classes": [classes]}
        if self.pat:
            h, w = bright.shape[-2:]
            index = torch.arange(h * w).view(1, h, w) % 64
            code = self.codebook("early")[index].permute(0, 3, 1, 2)
            out["image"] = to_unit(image)
            out["tokens"] = {stage: Tokens(code, index, code, None, None) for stage in ("early", "mid", "late", "latent")}
        return out


class TwoHalves:
    """Two pictures, bright above and dark below, with one ignored column; every size differs."""

    names, groups = ("day", "night"), {"seen": (0,), "stuff": (1,)}
    checksum, route, key = checksum(names), "by hand", "two halves"

    def __len__(self):
        return 2

    def __getitem__(self, i):
        size = (32, 40) if i == 0 else (48, 44)
        original = np.zeros((*size, 3), np.uint8)
        original[:size[0] // 2] = 255
        label = torch.ones(size, dtype=torch.int64)
        label[:size[0] // 2], label[:, 3] = 0, -1
        return {"image": to_tensor(original), "label": label, "name": str(i), "original": original}


def test_a_model_that_knows_everything_scores_one():
    """Exactly: the border between bright and dark falls between patches, so upsampling keeps every pixel right."""
    model = FakeModel().train()
    row = evaluate(model, TwoHalves(), how=QUIET)
    assert model.training                                     # as it was found
    assert row["segmentation"]["mIoU"] == row["segmentation"]["foreground_accuracy"] == 1
    assert row["reconstruction"]["PSNR"] > 99 and row["reconstruction"]["SSIM"] == pytest.approx(1)
    assert set(row["codebooks"]) == {"early", "mid", "late", "latent"}
    early = row["codebooks"]["early"]
    assert early["share_used"] == 36 / 64                     # 6x6 tokens in the second picture, the first has fewer
    assert early["bf16"] == 1


def test_names_may_be_swapped_and_images_limited():
    row = evaluate(FakeModel(False), TwoHalves(), ("light", "dark", "fog"), how=QUIET._replace(images=1))
    assert row["images"] == 1 and len(row["segmentation"]["IoU"]) == 3
    assert row["reconstruction"] is None and row["codebooks"] == {}


