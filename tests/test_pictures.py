"""What pictures.py promises: names and tokens where they belong, in colours that never change."""

import numpy as np
import torch

import pictures
from images import palette


def test_the_overlay_tints_names_and_leaves_unnamed_pixels_alone():
    image, colours = np.full((3, 3, 3), 100, np.uint8), palette(2)
    tinted = pictures.overlay(image, torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0]]), colours, strength=0.5)
    assert np.abs(tinted[0, 0] - (100 + colours[0].astype(float)) / 2).max() <= 0.5
    assert (pictures.overlay(image, torch.full((3, 3), -1), colours) == image).all()


def test_a_token_keeps_its_square_and_its_colour():
    """A 2x2 token grid over an 8x8 input of which 8x6 is image, drawn at twice the size: columns 0-7 | 8-11."""
    index = torch.tensor([[0, 1], [2, 3]])
    drawn = pictures.token_map(index, 4, (8, 6), (8, 8), (16, 12))
    colours = palette(4)
    assert drawn.shape == (16, 12, 3)
    assert (drawn[:8, :8] == colours[0]).all() and (drawn[:8, 8:] == colours[1]).all() and (drawn[8:, 8:] == colours[3]).all()
