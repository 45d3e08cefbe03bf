"""The world's CLIP: captions are true, its loss is right, training moves both towers, and the shipped one can see."""

import open_clip
import pytest
import torch

from clip import load_vlm
from world.clip import world_clip
from world.pretrain import captions, multi_positive, pretrain_stage, zero_shot


def test_captions_are_true_of_the_scene_and_never_empty():
    things, grounds = [(3, 1), (9, 0)], ["grass"]
    assert captions(things, grounds, "names") == ["red star", "orange square", "grass"]
    assert captions(things, grounds, "textured") == ["striped red star", "plain orange square"]
    assert captions(things, grounds, "shapes") == ["star", "square"]
    assert captions([], grounds, "colours") == ["grass"]


def test_multi_positive_loss_by_hand():
    """Two equal logits, both true: log 2 whatever their level; a third, false and far below, changes nothing."""
    loss = multi_positive(torch.tensor([[5.0, 5.0, -100.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert loss.item() == pytest.approx(0.6931472)


def test_pretraining_learns():
    """Three steps of the first stage move the text and the image tower."""
    model, tokenizer = world_clip(32), open_clip.SimpleTokenizer(context_length=24)
    before = {n: p.clone() for n, p in model.named_parameters()}
    pretrain_stage(model, tokenizer, 32, 3, 16, 2e-3, seed=0)
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters()
               if n.endswith(("attn.in_proj_weight", "proj", "conv1.weight", "token_embedding.weight")))


def test_the_shipped_weights_name_single_objects():
    """64 names, 200 scenes: the README states the accuracy over 2,048; here it must merely be far above chance (1/64)."""
    vlm = load_vlm("world", "world", scale=1.0, depths=(0, 2, 3, 4))
    assert zero_shot(vlm, 200)[0] > 0.9
