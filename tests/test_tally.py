"""What tally.py promises: every image once; stopped or not, on one process or two, the same numbers."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tally
from images import InputError, checksum, to_tensor, to_unit
from pat import STAGES
from tally import Pass, evaluate
from vq import Tokens, vMFVQ

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

    def quantisers(self):
        return dict.fromkeys(STAGES, vMFVQ(1, 0, 4))          # for their rule alone: the codes are `codebook`'s

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
            out["tokens"] = {stage: Tokens(code, index, code, None, None) for stage in STAGES}
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




# --- stopped, gone on with, shared out ------------------------------------------------------------------------------


class Noisy:
    """Seven pictures of their own size and noise, labels at random, some of it void: no score is round."""

    names, groups, checksum, route, key = ("day", "night", "dusk"), {}, "3", "drawn", "noisy"

    def __init__(self, stop_at=None):
        self.stop_at, self.asked = stop_at, []

    def __len__(self):
        return 7

    def __getitem__(self, i):
        self.asked.append(i)
        if i == self.stop_at:
            raise KeyboardInterrupt
        rng = np.random.default_rng(i)
        original = rng.integers(0, 256, (24 + 8 * i, 40, 3), np.uint8)
        original[:16] //= 3
        label = torch.from_numpy(rng.integers(-1, 3, original.shape[:2]))
        return {"image": to_tensor(original), "label": label, "name": str(i), "original": original}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A Pass that keeps its tally, every two images."""
    monkeypatch.setattr(tally, "SAVE_EVERY", 2)
    return QUIET._replace(folder=tmp_path / "scores", title="noisy")


def stopped(how, model=None):
    """A pass that is killed while it reads image 5, so that its file holds four."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(model or FakeModel(), Noisy(stop_at=5), how=how)


def test_stopped_and_gone_on_with_equals_never_stopped(kept, capsys):
    """Killed at image 5 with four on disk: the rest is read, and every number of the row is the same."""
    whole, second = evaluate(FakeModel(), Noisy(), how=QUIET), Noisy()
    stopped(kept)
    row = evaluate(FakeModel(), second, how=kept)
    assert second.asked == [4, 5, 6] and row == whole and row["images"] == 7
    assert capsys.readouterr().out == "noisy: goes on after 4 of 7 images\n"
    assert 0 < row["reconstruction"]["SSIM"] < 1.1 and 0 < row["segmentation"]["mIoU"] < 1
    third = Noisy()
    assert evaluate(FakeModel(), third, how=kept) == whole and third.asked == []              # finished, nothing left
    tally.forget(kept.folder, "noisy")
    assert not kept.folder.exists()


@pytest.mark.parametrize("what", ["checkpoint", "settings", "names", "dataset", "images", "processes"])
def test_what_changed_starts_anew_and_is_said(kept, capsys, what):
    """Other weights, another size, other names, other data, fewer images, another number of processes: all are read."""
    stopped(kept)
    model, dataset, names, how = FakeModel(), Noisy(), None, kept
    if what == "checkpoint":
        model.register_buffer("weight", torch.ones(1))
    if what == "settings":
        model.config.short_side = 48
    if what == "names":
        names = ("day", "night", "dawn")
    if what == "dataset":
        dataset.key = "another"
    if what == "images":
        how = kept._replace(images=6)
    if what == "processes":
        how = kept._replace(processes=2)
    if what == "processes":                                   # nobody to add up with: only what was read counts here
        with pytest.raises(ValueError, match="process group"):
            evaluate(model, dataset, names, how=how)
        assert dataset.asked == [0, 2, 4, 6]
    else:
        row = evaluate(model, dataset, names, how=how)
        assert dataset.asked == list(range(row["images"]))
        assert row == evaluate(model, Noisy(), names, how=QUIET._replace(images=how.images))
    assert capsys.readouterr().out == f"noisy: starts anew: {what} changed since it was stopped\n"


def test_where_the_weights_lie_does_not_matter(kept, capsys):
    """A run that was moved goes on: its config names another file, with the same weights in it."""
    stopped(kept)
    model = FakeModel()
    model.config.pretrained = "elsewhere/clip.safetensors"
    evaluate(model, Noisy(), how=kept)
    assert "goes on after 4" in capsys.readouterr().out


def test_a_damaged_tally_is_said_and_not_used(kept, capsys):
    stopped(kept)
    path = kept.folder / "noisy.0.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert evaluate(FakeModel(), Noisy(), how=kept) == evaluate(FakeModel(), Noisy(), how=QUIET)
    assert "noisy: starts anew: its file is damaged" in capsys.readouterr().out


def test_two_shares_add_up_to_the_whole(kept, monkeypatch):
    """Processes 0 and 1 of 2 read 0 2 4 6 and 1 3 5; added up, their tensors are those of one process, bit for bit."""
    monkeypatch.setattr(tally.dist, "all_reduce", lambda tensor: None)
    found = []
    original = tally.run
    monkeypatch.setattr(tally, "run", lambda *args: found.append(original(*args)) or found[-1])
    sets = [Noisy() for _ in range(3)]
    for rank, dataset in enumerate(sets):
        evaluate(FakeModel(), dataset, how=QUIET._replace(rank=rank % 2, processes=1 + (rank < 2)))
    assert [dataset.asked for dataset in sets] == [[0, 2, 4, 6], [1, 3, 5], [0, 1, 2, 3, 4, 5, 6]]
    a, b, whole = (t.tensors for t in found)
    assert len(whole) == 6                                    # matrix, painted, four stages
    for key in whole:
        assert torch.equal((a[key] + b[key]).nan_to_num(), whole[key].nan_to_num()), key
    assert whole["matrix"].sum() == sum(40 * (24 + 8 * i) for i in range(7))


class FakeInception:
    """Twelve features of a picture, rounded as the real ones: sums of its corner."""

    size = 12

    def __call__(self, image):
        return (image[:, :2, :2].flatten().double() * 2**14).round() / 2**14


def test_rfid_of_two_processes_and_of_a_stopped_pass_is_rfid(kept, monkeypatch):
    """Its sums are those of numpy over all seven images, bit for bit, whoever counted them in whatever order."""
    monkeypatch.setattr(tally.dist, "all_reduce", lambda tensor: None)
    inception, found, original = FakeInception(), [], tally.run
    monkeypatch.setattr(tally, "run", lambda *args: found.append(original(*args)) or found[-1])
    whole = evaluate(FakeModel(), Noisy(), how=QUIET, inception=inception)
    for rank in (0, 1):
        evaluate(FakeModel(), Noisy(), how=QUIET._replace(rank=rank, processes=2), inception=inception)
    one, *two = (t.tensors for t in found)
    for key in ("rfid.sums", "rfid.products"):
        assert torch.equal(two[0][key] + two[1][key], one[key]), key
    features = np.stack([inception(to_unit(Noisy()[i]["image"])).numpy() for i in range(7)])
    assert (one["rfid.sums"][0].numpy() == features.sum(0)).all()
    assert (one["rfid.products"][0].numpy() == features.T @ features).all()
    with pytest.raises(KeyboardInterrupt):
        evaluate(FakeModel(), Noisy(stop_at=5), how=kept, inception=inception)
    again = Noisy()
    assert evaluate(FakeModel(), again, how=kept, inception=inception) == whole and again.asked == [4, 5, 6]
    assert whole["reconstruction"]["rFID"] < 1e-3             # this model repaints its input, to float rounding


def test_rfid_asked_for_later_reads_everything_again(kept, capsys):
    stopped(kept)
    again = Noisy()
    row = evaluate(FakeModel(), again, how=kept, inception=FakeInception())
    assert again.asked == list(range(7)) and row["reconstruction"]["rFID"] is not None
    assert capsys.readouterr().out == "noisy: starts anew: rFID changed since it was stopped\n"
    assert evaluate(FakeModel(), Noisy(), how=QUIET)["reconstruction"]["rFID"] is None
    assert evaluate(FakeModel(False), Noisy(), how=QUIET, inception=FakeInception())["reconstruction"] is None


def test_more_processes_than_images(monkeypatch):
    """The last of eight has none of the seven, and still everything to add to the others'."""
    monkeypatch.setattr(tally.dist, "all_reduce", lambda tensor: None)
    found = tally.run(None, Noisy(), 3, {"early": 8}, None, QUIET._replace(rank=7, processes=8))
    assert {key: tuple(tensor.shape) for key, tensor in found.tensors.items()} == {
        "matrix": (4, 4), "painted": (7, 4), "codes.early": (9,)}


def test_workers_change_nothing():
    assert evaluate(FakeModel(), Noisy(), how=QUIET._replace(workers=2)) == evaluate(FakeModel(), Noisy(), how=QUIET)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "scores").write_text("a file")
    with pytest.raises(InputError, match="scores: cannot be made a folder"):
        evaluate(FakeModel(), Noisy(), how=QUIET._replace(folder=tmp_path / "scores"))
