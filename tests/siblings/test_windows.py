"""What windows.py promises: every place comes back, and sees its neighbours in the window and nobody else."""

import pytest
import torch
import torch.nn.functional as F

from siblings.windows import from_windows, to_windows

GRIDS = [(8, 8, 4, 2), (8, 8, 4, 0), (7, 5, 4, 2), (6, 4, 4, 2), (3, 9, 4, 1), (2, 3, 4, 2), (5, 5, 1, 0), (12, 6, 3, 1)]


def numbered(h, w, B=1):
    """A map (B,h,w,1) whose places are called 1, 2, 3 ... row by row: 0 is padding."""
    return torch.arange(1, B * h * w + 1.0).view(B, h, w, 1)


def attend(x, size, shift):
    """Attention of a map over itself, within windows."""
    windows, mask = to_windows(x, size, shift)
    q = windows[:, None]                                      # one head
    return from_windows(F.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0], x.shape[1:3], size, shift)


def test_four_windows_by_hand():
    """1 2 3 4 / 5 6 7 8 / ...: the upper right window of two by two is 3 4 7 8, the third is the lower left one."""
    windows, mask = to_windows(numbered(4, 4), 2)
    assert windows[..., 0].tolist() == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]] and mask is None


def test_shifted_windows_by_hand():
    """Shifted by one, the first window is the middle; the last holds the four corners, each for itself."""
    windows, mask = to_windows(numbered(4, 4), 2, 1)
    assert windows[..., 0].tolist() == [[6, 7, 10, 11], [8, 5, 12, 9], [14, 15, 2, 3], [16, 13, 4, 1]]
    assert mask.shape == (4, 1, 4, 4) and mask[0].all() and torch.equal(mask[3, 0], torch.eye(4, dtype=torch.bool))
    assert mask[1, 0].tolist() == [[True, False, True, False], [False, True, False, True]] * 2             # 8 12, 5 9
    assert mask[2, 0].tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2      # 14 15, 2 3


def test_padding_by_hand():
    """A map of 1x3 in windows of two: zeros below and right, which no place sees and which see themselves."""
    windows, mask = to_windows(numbered(1, 3), 2)
    assert windows[..., 0].tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert mask[0, 0].tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert mask[1, 0].tolist() == [[True, False, False, False]] + [[False, True, True, True]] * 3


def test_both_ends_of_a_side_and_its_padding_are_three_regions():
    """The header's second example, a column of six: the last window is padding, padding, 0, 1."""
    _, mask = to_windows(numbered(6, 1), 4, 2)
    last = mask[1, 0].unflatten(0, (4, 4)).unflatten(2, (4, 4))[:, 0, :, 0]                # the first column: the others pad
    assert last.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2


@pytest.mark.parametrize("h, w, size, shift", GRIDS)
def test_every_place_comes_back_to_where_it_was(h, w, size, shift):
    x = torch.randn(3, h, w, 5)
    windows, mask = to_windows(x, size, shift)
    n = -(-h // size) * -(-w // size)
    assert windows.shape == (3 * n, size * size, 5) and (mask is None or mask.shape == (3 * n, 1, size**2, size**2))
    assert torch.equal(from_windows(windows, (h, w), size, shift), x)


@pytest.mark.parametrize("h, w, size, shift", GRIDS)
def test_a_place_sees_those_of_its_window_that_are_near_it_and_no_padding(h, w, size, shift):
    """Place (y, x) and (y', x') see one another if they lie in the same square of the shifted lattice on the unrolled map."""
    windows, mask = to_windows(numbered(h, w, 2), size, shift)
    ids = windows[..., 0].long()
    mask = torch.ones(len(ids), 1, size**2, size**2, dtype=torch.bool) if mask is None else mask
    pairs = ids[:, :, None].expand_as(mask[:, 0])[mask[:, 0]], ids[:, None].expand_as(mask[:, 0])[mask[:, 0]]
    seen = {(i, j) for i, j in zip(pairs[0].tolist(), pairs[1].tolist())}
    assert not any((i == 0) != (j == 0) for i, j in seen) and mask.any(-1).all()           # nobody looks at nothing

    def square(i):
        b, y, x = (i - 1) // (h * w), (i - 1) % (h * w) // w, (i - 1) % w
        return b, (y - shift * (h > size)) // size, (x - shift * (w > size)) // size

    places = range(1, 2 * h * w + 1)
    assert seen - {(0, 0)} == {(i, j) for i in places for j in places if square(i) == square(j)}


def test_a_window_as_large_as_the_grid_is_full_attention():
    """On any shorter grid too: padding changes nothing, and no shift cuts what one window covers."""
    x = torch.randn(2, 3, 5, 8)
    q = x.flatten(1, 2)
    full = F.scaled_dot_product_attention(q, q, q).unflatten(1, (3, 5))
    for size, shift in ((5, 0), (5, 2), (7, 3)):
        assert torch.allclose(attend(x, size, shift), full, atol=1e-6)


def test_a_corner_speaks_to_its_own_corner_only():
    """Shifted, all four corners share the last window: changing one leaves the others as they were."""
    x = torch.randn(1, 8, 8, 6)
    other = x.clone()
    other[0, 0, 0] += 5
    moved = (attend(x, 4, 2) != attend(other, 4, 2)).any(-1)[0]
    assert moved[:2, :2].all() and moved.sum() == 4


def test_one_image_is_cut_as_in_a_batch():
    x = torch.randn(3, 7, 6, 4)
    assert torch.allclose(attend(x, 4, 2)[1:2], attend(x[1:2], 4, 2), atol=1e-6)


def test_gradients_flow_through_both_ways():
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attend(x, 2, 1), x)
