"""The grouping layer: a map is halved by clustering it.  Whoever goes with whom is a matrix, and matrices multiply.

The outputs are cluster centres, *groups*.  They start as what a strided convolution sees, and move three times to the
mean of the inputs that go to them (Algorithm 1 of SeNaTra):

    S      = tau k qᵀ + B_rel + M_loc       k, v of the 4P inputs, q of the P groups                     (4P,P)
    A_ups  = softmax of S over the GROUPS   each row sums to 1: where an input goes
    A_down = A_ups / sum over the inputs    each column sums to 1: whom a group is the mean of
    x      = x + LN(A_downᵀ v);   x = x + LN(MLP(x))

This is the third reading of Eq. 1's score matrix.  hsattn.py: softmax over the features, every code moves by itself;
vq.py: argmax over the codes, every feature takes one; here: softmax over the codes, so that they compete for features,
*then* what a code won is made to sum to 1 over the features, so that it moves to a mean.  That is Slot Attention.

M_loc: an input sees the 3x3 groups around its own cell, and no others; the last layer is dense, there it sees all.  As
rows sum to 1, the A_ups of several layers are a Markov chain from pixels to groups.  It is applied, and never built:

    A_2 A_3 A_4 z = up(A_2, up(A_3, up(A_4, z)))        z (B,4,4,c) on the groups -> (B,32,32,c) on the pixels

Of z = identity, column j is the mask of group j.  `Uniform` is what others do: the convolution alone, whose outputs
belong to places; its A is what bilinear up-sampling assigns, and all the rest stays the same.

    x (B,32,32,24) -> groups (B,16,16,48), A (B,16,16,4,9): the 4 inputs of a cell x the 9 groups around it
    x (B,8,8,96)   -> groups (B,4,4,192),  A (B,64,16), dense

# paper: the two matrices, their order, three rounds, skip connections, local then dense (arXiv 2505.16993).  It has no
# code: from others' summaries of it.   # ours: a 3x3 convolution, fewer groups at the border, no bias in q, k, v; 36
# numbers for B_rel where it is local, a small MLP of the offset where dense, near first; an MLP of ratio 2; seeds of an
# embedding.

Tests: tests/siblings/test_grouping.py.  Read next: senatra.py.  h, w: the grid of the groups; d, d' width in and out.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from san import MLP, FeedForward


# --- an assignment, and what is done with it ------------------------------------------------------------------------
# A says where the inputs on (2h,2w) go.  Local: (B,h,w,4,9), the 4 inputs of a cell to the 3x3 groups around it, 0
# where there is none.  Dense: (B,4hw,hw), all to all.  Rows sum to 1.
def children(x):
    """(B,2h,2w,c) -> (B,h,w,4,c): the inputs of each cell."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4)


def unfolded(x):
    """The inverse of `children`: (B,h,w,4,c) -> (B,2h,2w,c)."""
    return x.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class Neighbours(torch.autograd.Function):
    """`neighbours`, whose gradient is `returned`: autograd would fill a map of zeros for each of the nine."""

    @staticmethod
    def forward(ctx, z):
        h, w = z.shape[1:3]
        z = F.pad(z, (0, 0, 1, 1, 1, 1))
        return torch.stack([z[:, i:i + h, j:j + w] for i in range(3) for j in range(3)], 3)

    @staticmethod
    def backward(ctx, d):
        return returned(d)


class Returned(torch.autograd.Function):
    """`returned`, whose gradient is `neighbours`."""

    @staticmethod
    def forward(ctx, y):
        B, h, w, _, c = y.shape
        z = y.new_zeros(B, h + 2, w + 2, c)
        for n in range(9):
            z[:, n // 3:n // 3 + h, n % 3:n % 3 + w] += y[..., n, :]
        return z[:, 1:-1, 1:-1].contiguous()

    @staticmethod
    def backward(ctx, d):
        return neighbours(d)


def neighbours(z):
    """(B,h,w,c) -> (B,h,w,9,c): the 3x3 groups around each cell, row by row; zeros outside the map."""
    return Neighbours.apply(z)


def returned(y):
    """The transpose of `neighbours`: (B,h,w,9,c) -> (B,h,w,c), each group adds up what the cells around have for it."""
    return Returned.apply(y)


def up(A, z):
    """A_ups z: each input gets the mean of its groups.  z (B,h,w,c) -> (B,2h,2w,c)"""
    if A.dim() == 5:
        return unfolded(A @ neighbours(z))
    h, w = z.shape[1:3]
    return (A @ z.flatten(1, 2)).unflatten(1, (2 * h, 2 * w))


def mean(A, x):
    """A_downᵀ x: each group gets the mean of its inputs, weighted by A.  x (B,2h,2w,c) -> (B,h,w,c)"""
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)       # the last channel adds up the weights
    if A.dim() == 5:
        total = returned(A.mT @ children(x))
    else:
        total = (A.mT @ x.flatten(1, 2)).unflatten(1, (x.shape[1] // 2, x.shape[2] // 2))
    return total[..., :-1] / total[..., -1:].clamp(min=1e-6)


def compose(chain, z):
    """A_2 A_3 A_4 z, from the right: z (B,h,w,c) on the last groups -> (B,h1,w1,c) on the first grid."""
    for A in reversed(chain):
        z = up(A, z)
    return z


def shares(chain, grid):
    """The product of a chain: how much of each pixel each of the N groups on `grid` (h,w) has.  -> (B,h1,w1,N)"""
    N = grid[0] * grid[1]
    z = torch.eye(N, dtype=chain[0].dtype, device=chain[0].device).view(1, *grid, N)
    return compose(chain, z.expand(len(chain[0]), -1, -1, -1))


def bilinear(h, w):
    """What up-sampling by 2 assigns: (1,h,w,4,9), 9/16 to one's own cell, 3/16, 3/16 and 1/16 to the three nearest."""
    def line(n):                                              # (n,2,3): a cell's two halves, to it and its neighbours
        share = torch.tensor([[0.25, 0.75, 0], [0, 0.75, 0.25]]).repeat(n, 1, 1)
        share[0, 0] = share[-1, 1] = torch.tensor([0.0, 1, 0])                            # none beyond the border
        return share
    return torch.einsum("hai,wbj->hwabij", line(h), line(w)).flatten(4).flatten(2, 3)[None]


# --- the layers -----------------------------------------------------------------------------------------------------
class Seeds(nn.Module):
    """Where groups start: what a strided convolution sees, or rows learned on a `grid` (h,w), whatever the image."""

    def __init__(self, width, out, grid=None):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, 2, 1, bias=False) if grid is None else None
        self.query_embed = None if grid is None else nn.Parameter(torch.randn(1, out, *grid))
        self.norm = nn.LayerNorm(out)

    def forward(self, x):
        """x (B,2h,2w,d) -> (B,h,w,d')"""
        if self.conv:
            seeds = self.conv(x.permute(0, 3, 1, 2))                                      # (B,d',h,w)
        else:
            grid = x.shape[1] // 2, x.shape[2] // 2
            seeds = F.interpolate(self.query_embed, size=grid, mode="bilinear").expand(len(x), -1, -1, -1)
        return self.norm(seeds.permute(0, 2, 3, 1))


class Uniform(nn.Module):
    """Down-sampling that does not look: the twin of `Grouping` in Table 3a."""

    def __init__(self, width, out):
        super().__init__()
        self.seeds = Seeds(width, out)

    def forward(self, x):
        groups, wide = self.seeds(x), torch.promote_types(x.dtype, torch.float32)
        return groups, bilinear(*groups.shape[1:3]).to(x.device, wide).expand(len(x), -1, -1, -1, -1)


def nearness():
    """B_rel of a dense layer, an MLP of the offset: at first -2 (s(dy) + s(dx)), s(t) = gelu(t) + gelu(-t), nearly |t|.

    Groups begin where they lie, as the local layers' do.  Where no place is preferred at first, names alone leave nearly
    all pixels to one group (docs/senatra.md).
    """
    mlp = MLP(2, 16, 1, act=F.gelu)
    (first, last), both = mlp.layers, torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    for p in mlp.parameters():
        nn.init.trunc_normal_(p, std=0.02)
    with torch.no_grad():
        first.weight[:4], first.bias[:4], last.weight[0, :4] = both, 0, -2
    return mlp


def places():
    """B_rel of a local layer: a number for each of a cell's 4 inputs and 9 groups, no place preferred at first."""
    table = nn.Embedding(4, 9)
    nn.init.trunc_normal_(table.weight, std=0.02)
    return table


class Grouping(nn.Module):
    """Down-sampling by clustering: the header's four lines, `rounds` times.

    dense: every input sees all groups.  gru: Slot Attention's update in place of the skip connection.  grid: of learned
    seeds, None for the convolution's.
    """

    def __init__(self, width, out, *, dense=False, rounds=3, rel_bias=True, gru=False, grid=None):
        super().__init__()
        self.rounds, self.dense, self.seeds = rounds, dense, Seeds(width, out, grid)
        self.norm_in, self.norm_q = nn.LayerNorm(width), nn.LayerNorm(out)
        self.k, self.v = nn.Linear(width, out, bias=False), nn.Linear(width, out, bias=False)
        self.q = nn.Linear(out, out, bias=False)              # one head: there must be one matrix to compose
        self.log_tau = nn.Parameter(torch.tensor(-0.5 * math.log(out)))
        self.rel = (nearness() if dense else places()) if rel_bias else None
        self.gru = nn.GRUCell(out, out) if gru else None
        self.norm_mean, self.mlp, self.norm_mlp = nn.LayerNorm(out), FeedForward(out, 2), nn.LayerNorm(out)

    def bias(self, h, w):
        """B_rel + M_loc by where an input lies from a group: (h,w,4,9) local, (4hw,hw) dense; 0 without `rel_bias`."""
        like = self.log_tau.detach()
        if not self.dense:
            there = neighbours(like.new_ones(1, h, w, 1))[0].mT > 0                       # (h,w,1,9)
            rel = self.rel.weight if self.rel else like.new_zeros(4, 9)
            return rel.masked_fill(~there, float("-inf"))
        if not self.rel:
            return like.new_zeros(())
        inputs, groups = (torch.cartesian_prod(*((torch.arange(n).to(like) + 0.5) * step for n in sides))
                          for sides, step in (((2 * h, 2 * w), 0.5), ((h, w), 1.0)))      # in groups: (4hw,2), (hw,2)
        return self.rel(inputs[:, None] - groups)[..., 0]

    def assign(self, k, q):
        """k (B,2h,2w,d') of the inputs, q (B,h,w,d') of the groups -> A_ups, never in half precision."""
        wide = torch.promote_types(k.dtype, torch.float32)
        with torch.autocast(k.device.type, enabled=False):
            k, q, bias = k.to(wide), q.to(wide) * self.log_tau.exp(), self.bias(*q.shape[1:3])
            if self.dense:
                return (k.flatten(1, 2) @ q.flatten(1, 2).mT + bias).softmax(-1)          # over the GROUPS (B,4hw,hw)
            return (children(k) @ neighbours(q).mT + bias).softmax(-1)                    # over the GROUPS (B,h,w,4,9)

    def moved(self, groups, A, v):
        """One step of every group (B,h,w,d') towards the mean of its inputs."""
        with torch.autocast(v.device.type, enabled=False):
            centre = mean(A, v.to(A.dtype))
        step = self.norm_mean(centre)
        if self.gru:
            return self.gru(step.flatten(0, 2), groups.flatten(0, 2)).view(groups.shape)
        return groups + step

    def forward(self, x):
        """Inputs x (B,2h,2w,d) -> groups (B,h,w,d'), and the A_ups of the last round."""
        groups, x = self.seeds(x), self.norm_in(x)
        k, v = self.k(x), self.v(x)                                                       # (B,2h,2w,d')
        for _ in range(self.rounds):
            A = self.assign(k, self.q(self.norm_q(groups)))
            groups = self.moved(groups, A, v)
            groups = groups + self.norm_mlp(self.mlp(groups))
        return groups, A
