"""What circle.py promises: Eq. 1 read along its axes, and mean shift, on points one can check by hand."""

import numpy as np
import pytest
import torch

from hsattn import g, mean_shift
from siblings.grouping import mean
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


def test_the_third_reading_is_softmax_over_the_codes_and_then_a_mean_of_what_a_code_won():
    """Columns sum to 1, e² and 1 to e² and 1 at the first feature; it is the grouping layer's mean, on the sphere."""
    codes, features = C.on_circle((0, 90)), C.on_circle((0, 60, 90, 120, 180, 240, 270, 300))
    scores, *_ = C.two_readings(codes, features, 2.0)
    up, won, centre = C.third_reading(scores, features)
    e = torch.tensor(2.0).exp()
    assert torch.allclose(up.sum(0), torch.ones(8)) and torch.allclose(up[:, 0], torch.stack([e, e * 0 + 1]) / (e + 1))
    assert torch.allclose(won, up.sum(1, keepdim=True)) and won.sum().item() == pytest.approx(8)
    grouped = mean(up.T[None], features.view(1, 2, 4, 2))                                 # 8 inputs, 2 groups
    assert torch.allclose(centre, g(grouped.view(2, 2)), atol=1e-6)


def test_the_picture_of_eq1_paints_each_feature_by_its_shares_in_the_last_panel():
    scores, *_ = C.two_readings(C.on_circle(C.CODES), C.on_circle(C.FEATURES), 10.0)
    up, won, _ = C.third_reading(scores, C.on_circle(C.FEATURES))
    drawn = np.asarray(C.eq1())
    assert drawn.shape == (70 + 4 * 262, 900, 3) and won[3] < 0.2 < 3 < won[0]
    for i in range(4):
        for j in range(12):
            at = drawn[70 + 3 * 262 + 74 + 36 * i + 6, 352 + 40 * j + 9]
            assert np.abs(at.astype(int) - C.blend(INK[i], up[i, j])).max() <= 1


def test_a_wider_kernel_finds_fewer_modes():
    """kappa 1 sees one bunch, 10 the three that were made, 100 splits them."""
    points = C.bunches()
    assert [int(C.number_modes(mean_shift(points, points, kappa, 200)[0]).max()) + 1 for kappa in (1, 10, 100)] == [1, 3, 6]


def test_modes_on_one_spot_are_one():
    assert C.number_modes(C.on_circle((0, 120, 0.5, 240, 119.5))).tolist() == [0, 1, 0, 2, 1]
