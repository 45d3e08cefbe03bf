"""Windows: a map cut into squares, so that attention inside them costs P size² instead of P².

    x (B,h,w,c) -> zeros below and right up to multiples of `size`, rolled up and left by `shift`, cut
                -> windows (B*n,size*size,c), n of an image row by row, places row by row
                   mask (B*n,1,size*size,size*size), True where a place may look at another; None where all may

Every second block is shifted by half a window, so that what was a border lies inside.  Rolled, the last window of a side
holds both ends of the map, which are no neighbours, and padding, which is nothing:

    8 rows, size 4, shift 2      2 3 4 5 | 6 7 0 1         6 and 7 see one another, so do 0 and 1
    6 rows, size 4, shift 2      2 3 4 5 | . . 0 1         padding sees padding: no row of a softmax is empty

Rows and columns alike: two places see one another if they are of the same region, and padding is a region of its own.
A side that one window covers is not shifted: all its places are in one window already.

    x (392,8,8,32), size 4, shift 2 -> windows (1568,16,32), mask (1568,1,16,16)

# paper: Swin's windows (arXiv 2103.14030), as in the spatial half of cost aggregation (CAT-Seg, FGAseg).
# differs: a mask of True and False in place of 0 and -100; maps of any size in place of multiples of a window.

Tests: tests/siblings/test_windows.py.  Read next: fgaseg.py.
"""

import torch
import torch.nn.functional as F

# B batch, c channels, h, w a grid; n windows of an image, T = size*size places of a window.


def moves(grid, size, shift):
    """By how much the sides of a grid (h,w) are rolled."""
    return tuple(shift if side > size else 0 for side in grid)


def cut(x, size, moved):
    """x (B,h,w,c), padded with zeros and rolled -> (B*n,T,c)"""
    h, w = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
    x = x.roll((-moved[0], -moved[1]), (1, 2))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))                               # (B,rows,size,columns,size,c)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def visible(grid, size, moved, device=None):
    """Which places of a window (n,T,T) may look at which: those of the same region."""
    rows, columns = (torch.arange(side, device=device) >= move for side, move in zip(grid, moved))
    region = 1 + 2 * rows[:, None] + columns.long()                                       # (h,w) 1..4, and 0 is padding
    region = cut(region[None, ..., None], size, moved)[..., 0]                            # (n,T)
    return region[:, :, None] == region[:, None]


def to_windows(x, size, shift=0):
    """x (B,h,w,c) -> windows (B*n,size*size,c), mask (B*n,1,size*size,size*size) bool or None; 0 <= shift < size."""
    grid = tuple(x.shape[1:3])
    moved, mask = moves(grid, size, shift), None
    if any(moved) or any(side % size for side in grid):
        mask = visible(grid, size, moved, x.device).repeat(len(x), 1, 1)[:, None]
    return cut(x, size, moved), mask


def from_windows(windows, grid, size, shift=0):
    """The inverse: windows (B*n,size*size,c) of maps of a grid (h,w) -> (B,h,w,c), without the padding."""
    down, right = moves(grid, size, shift)
    rows, columns = (-(-side // size) for side in grid)
    x = windows.unflatten(0, (-1, rows, columns)).unflatten(3, (size, size))              # (B,rows,columns,size,size,c)
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((down, right), (1, 2))
    return x[:, :grid[0], :grid[1]]
