"""The simplest baseline, worked by hand, and a stranger's way through the house: every command takes it as it is."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval
import predict
import train
from data import IGNORE
from runs import build, preset
from san import trainable
from segmenter import Batch
from tests.test_segmenter import small


@pytest.fixture
def net():
    return build(small("dense").run)


def test_the_size_of_the_world_is_pinned():
    """Four fusions of 2*128 + 128*96 + 96, a head of 96*64 + 64, and CLIP's position embedding of 65*128."""
    assert trainable(build(preset("world", "dense", pretrained="none"))) == 4 * 12_640 + 6_208 + 8_320 == 65_088


def test_logits_are_cosines_times_clips_scale(net):
    """No logit exceeds the scale; a name and its opposite get opposite logits."""
    text = torch.nn.functional.normalize(torch.randn(1, 64), dim=-1)
    logits = net(torch.randn(1, 3, 64, 64), torch.cat([text, -text]))["logits"]
    assert logits.shape == (1, 2, 32, 32) and logits.abs().max() <= net.vlm.logit_scale * (1 + 1e-5)
    assert torch.allclose(logits[:, 0], -logits[:, 1], atol=1e-4)


def test_logits_by_hand(net):
    """Of two pictures wider than high: four maps normed, projected, up-sampled, added; GELU, linear, cosine, CLIP's scale."""
    image, text = torch.randn(2, 3, 64, 128), F.normalize(torch.randn(7, 64), dim=-1)
    f = 0
    for fuse, m in zip(net.fusion, net.vlm.features(image).maps, strict=True):
        x = F.layer_norm(m.movedim(1, -1), m.shape[1:2], fuse.norm.weight, fuse.norm.bias, 1e-6)
        f = f + F.interpolate((x @ fuse.proj.weight.T + fuse.proj.bias).movedim(-1, 1), (32, 64), mode="bilinear")
    u = F.gelu(f).movedim(1, -1) @ net.head.weight.T + net.head.bias
    want = net.vlm.logit_scale * (u / u.norm(dim=-1, keepdim=True)) @ text.T
    out = net(image, text)
    assert len(net.fusion) == 4 and out["logits"].shape == (2, 7, 32, 64) and net.vlm.logit_scale > 1
    torch.testing.assert_close(out["logits"].movedim(1, -1), want, rtol=1e-4, atol=1e-4)
    answer = net.answer(out, 1)
    assert torch.equal(answer.maps, out["logits"][1]) and answer.mix is None and not answer.none
    assert torch.equal(answer.gate(answer.maps), answer.maps)               # scores already: nothing is bent


def test_images_without_a_label_cost_nothing(net):
    """No pixel to divide by: a loss of 0, not NaN."""
    labels = torch.full((1, 1, 3), IGNORE)
    (_, loss), = net.terms(dict(logits=torch.zeros(1, 2, 1, 3)), Batch(None, labels, None, [], net.totals(labels), 1)).values()
    assert loss == 0


def test_the_loss_by_hand(net):
    """Two pixels with a label of three; logits (0, log 3): p = (1/4, 3/4), so the mean is (log 4 + log 4/3) / 2."""
    logits = torch.tensor([0.0, 3.0]).clamp(min=1).log().view(1, 2, 1, 1).expand(1, 2, 1, 3)
    labels = torch.tensor([[[0, 1, IGNORE]]])
    totals = net.totals(labels)
    (weight, loss), = net.terms(dict(logits=logits), Batch(None, labels, None, [], totals, 1)).values()
    assert totals.tolist() == [2] and weight == 1
    assert loss.item() == pytest.approx((torch.tensor(4.0).log() + torch.tensor(4 / 3).log()).item() / 2)


def test_a_share_counts_for_its_part_of_all_labelled_pixels(net):
    """The same image as one of two micro-batches that hold 8 labelled pixels in all: 2 pixels' sum / 8 * 2 parts."""
    logits, labels = torch.zeros(1, 2, 1, 3), torch.tensor([[[0, 1, IGNORE]]])
    (_, loss), = net.terms(dict(logits=logits), Batch(None, labels, None, [], torch.tensor([8.0]), 2)).values()
    assert loss.item() == pytest.approx(2 * torch.tensor(2.0).log().item() / 8 * 2)


def test_it_learns_and_every_command_takes_it(tmp_path, capsys):
    """Forty steps lower the loss; scored beside another run, a photo named, the page drawn: by no code of its own."""
    run, other = (train.train(small("dense", steps=40, lr=3e-3, warmup=5, pretrained="world", seed=seed,
                                    out=str(tmp_path / f"run{seed}"))) for seed in (0, 1))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert sum(line["ce"] for line in lines[-8:]) / 8 < 0.7 * sum(line["ce"] for line in lines[:4]) / 4
    assert {"scores.txt", "scores.json", "samples.png", "report.html", "pictures"} <= {path.name for path in run.iterdir()}
    assert {path.name for path in (run / "pictures").iterdir()} == {"masks.png", "curves.png"}
    eval.main([str(run), "--compare", str(other), "--images", "2"])
    assert {f"Dense {run}", f"Dense {other}", "chance"} <= json.loads((run / "scores.json").read_text())["rows"].keys()
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (90, 60), "green").save(photo)
    capsys.readouterr()
    predict.main([str(run), str(photo), "--labels", "grass, red star", "--out", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (90, 60) and "Dense has no tokens" in capsys.readouterr().out
