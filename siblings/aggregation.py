"""Cost aggregation: the likeness of every place to a name is a map of one channel, and maps are made masks together.

One network for all names, so that there may be any number of them, in any order, and new ones: a name's map is treated as
an image of a batch.  One layer of aggregation looks first along the map, then across the names:

    x_l, every name l by itself    two Swin blocks; q, k = W [LN(x); appearance], v = W LN(x)          over places
    x_p, every place p by itself   linear attention; q, k = W [LN(X); name], v = W LN(X), X = pool(x)  over names
                                   x + up(X)

Softmax over the names would compare every pair of them at every place.  With phi(q)·phi(k) for exp(q·k), phi = elu + 1,
the sums over j in  out_i = Σ_j phi(q_i)·phi(k_j) v_j / Σ_j phi(q_i)·phi(k_j)  are made once, for all i.

Up(y, r) then makes maps twice as fine, guided by r, what CLIP saw there.

    x (8,49,32,8,8), appearance (8,8,8,32), names (8,49,32) -> x (8,49,32,8,8)

# paper: CAT-Seg (arXiv 2303.11797), as FGAseg's code has it: places before names, no relative positions, no linear behind
#        the attention over names; X holds the pooled x already, so that x comes in twice.  Pooled in training only.
# ours: the start of the padding token; the last places of an odd side are pooled too.

Tests: tests/siblings/test_aggregation.py.  Read next: fgaseg.py.

B, L, h, w, P as everywhere; N = B*L maps; K the width of a map, G of what guides it; T places of a window, d of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from san import MLP, FeedForward
from siblings.windows import from_windows, to_windows


# --- functions ------------------------------------------------------------------------------------------------------
def linear_attention(q, k, v):
    """Σ_j phi(q_i)·phi(k_j) v_j / Σ_j phi(q_i)·phi(k_j), phi = elu + 1; all (...,L,d): L rows cost L d², not L² d."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    total = q @ k.sum(-2, keepdim=True).transpose(-1, -2)                                 # (...,L,1)
    return q @ (k.transpose(-1, -2) @ v) / (total + 1e-6)


def each(module, x):
    """A module of one map on the maps of all names: x (B,L,c,h,w) -> (B,L,c',h',w')"""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def shared(x, L):
    """What all L names of an image have in common: x (B,...) -> (B*L,...)"""
    return x[:, None].expand(-1, L, *x.shape[1:]).flatten(0, 1)


def conv(c, width):
    """3x3, norm, ReLU, as a list; a group of 16 channels each where they divide."""
    groups = math.gcd(width, max(1, width // 16))
    return [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width), nn.ReLU()]


# --- modules --------------------------------------------------------------------------------------------------------
class SwinBlock(nn.Module):
    """Attention within the windows of one name's map.  Queries and keys see the appearance too, values do not."""

    def __init__(self, width, heads, guide, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), FeedForward(width)
        self.qk, self.v, self.out = nn.Linear(width + guide, 2 * width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, guide):
        """x (N,h,w,K), guide (N,h,w,G) -> (N,h,w,K)"""
        n = torch.cat([self.norm1(x), guide], -1)
        n, mask = to_windows(n, self.window, self.shift)                                  # (windows,T,K+G)
        q, k = self.qk(n).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)       # each (windows,heads,T,d)
        v = self.v(n[..., :x.shape[-1]]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + from_windows(self.out(a), x.shape[1:3], self.window, self.shift)
        return x + self.mlp(self.norm2(x))


class ClassBlock(nn.Module):
    """Linear attention over the names at each place.  Queries and keys see the name too, values do not."""

    def __init__(self, width, heads, guide, pool, pad):
        super().__init__()
        self.heads, self.pool, self.pad = heads, pool, pad
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), MLP(width, 4 * width, width)
        self.qk, self.v = nn.Linear(width + guide, 2 * width), nn.Linear(width, width)
        if pad:
            self.pad_token, self.pad_guide = (nn.Parameter(0.02 * torch.randn(n)) for n in (width, guide))

    def attend(self, x, guide):
        """x (B,P,L,K), guide (B,P,L,G) -> (B,P,L,K)"""
        q, k = self.qk(torch.cat([x, guide], -1)).unflatten(-1, (2, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)                   # (B,P,heads,L,d), as q and k
        return linear_attention(q, k, v).transpose(-2, -3).flatten(-2)

    def forward(self, x, guide):
        """x (B,L,K,h,w), guide (B,L,G) -> (B,L,K,h,w)"""
        (B, L), pool = x.shape[:2], self.pool if self.training else 1
        X = F.avg_pool2d(x.flatten(0, 1), pool, ceil_mode=True)                           # (B*L,K,h',w')
        grid = X.shape[-2:]
        X = X.view(B, L, -1, grid.numel()).permute(0, 3, 1, 2)                            # (B,P',L,K)
        if self.pad:
            more = max(0, self.pad - L)
            X = torch.cat([X, self.pad_token.expand(*X.shape[:2], more, -1)], 2)
            guide = torch.cat([guide, self.pad_guide.expand(B, more, -1)], 1)
        X = X + self.attend(self.norm1(X), guide[:, None].expand(-1, X.shape[1], -1, -1))
        X = (X + self.mlp(self.norm2(X)))[:, :, :L]
        X = X.permute(0, 2, 3, 1).unflatten(-1, grid)                                     # (B,L,K,h',w')
        return x + each(lambda maps: F.interpolate(maps, x.shape[-2:], mode="bilinear", align_corners=True), X)


class Aggregation(nn.Module):
    """One layer: each name's map by itself, then the names at each place."""

    def __init__(self, width, heads, guide, window, pool, pad):
        super().__init__()
        self.norm = nn.LayerNorm(guide)
        self.spatial = nn.ModuleList(SwinBlock(width, heads, guide, window, shift) for shift in (0, window // 2))
        self.names = ClassBlock(width, heads, guide, pool, pad)

    def forward(self, x, appearance, names):
        """x (B,L,K,h,w), appearance (B,h,w,G), names (B,L,G) -> (B,L,K,h,w)"""
        maps, guide = x.flatten(0, 1).permute(0, 2, 3, 1), shared(self.norm(appearance), x.shape[1])
        for block in self.spatial:
            maps = block(maps, guide)                                                     # (B*L,h,w,K)
        return self.names(maps.permute(0, 3, 1, 2).unflatten(0, x.shape[:2]), names)


class Up(nn.Module):
    """Twice as fine: the map, and what CLIP saw there, the same for all names."""

    def __init__(self, c, width, guide):
        super().__init__()
        self.up, self.convs = nn.ConvTranspose2d(c, c - guide, 2, 2), nn.Sequential(*conv(c, width), *conv(width, width))

    def forward(self, y, guide):
        """y (B,L,c,h,w), guide (B,e,2h,2w) -> (B,L,width,2h,2w)"""
        return each(self.convs, torch.cat([each(self.up, y), guide[:, None].expand(-1, y.shape[1], -1, -1, -1)], 2))
