"""What circle.py promises: Eq. 1 read along its two axes, and mean shift, on points one can check by hand."""

import numpy as np
import torch

from hsattn import g, mean_shift
from studies import circle as C
from studies.pictures import INK


def test_rows_are_softmax_over_the_features_and_columns_argmax_over_the_codes():
    """Two codes, three features at 0, 60 and 90 degrees: every cosine is known."""
    codes, features = C.on_circle((0, 90)), C.on_circle((0, 60, 90))
    scores, weights, moved, index = C.two_readings(codes, features, 2.0)
    half, root = 0.5, 3**0.5 / 2
    assert torch.allclose(scores, 2 * torch.tensor([[1, half, 0], [0, root, 1]]), atol=1e-6)
    e = torch.tensor([[2.0, 1.0, 0.0]]).exp()
    assert torch.allclose(weights[:1], e / e.sum(), atol=1e-6)
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert not torch.allclose(weights.sum(0), torch.ones(3), atol=0.05)
    assert torch.allclose(moved, g(weights @ features), atol=1e-6)
    assert index.tolist() == [0, 1, 1]


def test_the_picture_of_eq1_paints_each_feature_in_the_colour_of_the_code_it_takes():
    """Features a-d take code 1, e-h code 2, i-l code 3; code 4, which none takes, is the lesson about dead codes."""
    *_, index = C.two_readings(C.on_circle(C.CODES), C.on_circle(C.FEATURES), 10.0)
    assert index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    drawn = np.asarray(C.eq1())
    column = 352 + 40 * np.arange(12) + 8                     # a place in each column, left of its number
    row = 70 + 2 * 262 + 74 + 36 * np.arange(4) + 6
    for j in range(12):
        assert [(drawn[row[i], column[j]] == INK[i]).all() for i in range(4)] == [i == index[j] for i in range(4)]


def test_a_wider_kernel_finds_fewer_modes():
    """kappa 1 sees one bunch, 10 the three that were made, 100 splits them."""
    points = C.bunches()
    assert [int(C.number_modes(mean_shift(points, points, kappa, 200)[0]).max()) + 1 for kappa in (1, 10, 100)] == [1, 3, 6]


def test_modes_on_one_spot_are_one():
    assert C.number_modes(C.on_circle((0, 120, 0.5, 240, 119.5))).tolist() == [0, 1, 0, 2, 1]
