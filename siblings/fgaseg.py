"""FGAseg: how much every place of an image is like a name is a picture by itself, which a small network can clean up.

CLIP was taught which sentence goes with which image; segmentation asks which word goes with which place.  So compare
every place with every name, and take the result, one map a name, for the input: a network that is the same for all names
turns each map into a mask (cost aggregation, CAT-Seg).  FGAseg lets the names look at the image first (P2Tformer), adds a
second, convolutional likeness (LCS), and asks of the names alone that they find their pixels (T2P).

    image ── CLIP, q and v tuned ──> F (B,E,h,w) ───┬──────────────┬────────────────────┐
    text (L,E) ── P2Tformer(F) ──> T' (B,L,E) ──> S^g, S^l ──> [each name by itself, then names at each place] x 2
                                                (B,L,h,w)         └─> decoder, guided by CLIP's maps ──> (B,L,4h,4w)

    t   = LN( T + W Attn(T, F + pos, F) ),          T' = T + gamma t                       only the names move, F does not
    S^g = g(T') · g(F)                                                                     GCS
    S^l = b_t + Σ_c Σ_tap ŵ_tc,tap g(F)_c,p+tap     [ŵ_t, b_t] = W g(T'_t) + b, softmax over the taps of a channel   LCS
    L   = BCE(o, Y) + .2 Σ_i BCE(o_i, Y) + .02 BCE(A, Y)      o_i: three auxiliary heads;  A = a_t * up(F) + c_t     T2P

A name's own kernel sums to 1 in each channel, so on a flat map every name has S^l = b_t + Σ_c x_c: what S^l says of
names is b_t, and where the map changes (docs/fgaseg.md).  `--set lcs=linear` leaves the softmax out.

ViT-B/16 at 384: F (B,512,24,24) -> logits (B,171,96,96).  World: F (B,64,8,8) -> logits (B,49,32,32).

# paper: arXiv 2501.00877 and its authors' code (MIT), from which the equations, the sizes and the recipe are.
# differs: CLIP's text tower is frozen: names are embedded once, and unseen ones must not drift.  GroupNorm for BatchNorm
#        in T2P: a batch split over processes must give the same gradient.  Poly 0.9 for its cosine.  One pass over the
#        image for its four windows and whole.  A name that is given up is at -100, where its code has 0 under a sigmoid.
# ours: the world's sizes; one weight for all three auxiliary losses (its code, by precedence, has it for one).

Tests: tests/siblings/test_fgaseg.py, and tests/test_segmenter.py as for every model.  Pictures: studies/costs.py.

B, H, W, C, E, L, h, w, P as everywhere; K the width of a name's map, G of what guides it, k*k taps of a kernel.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from cli import InputError, choice, number
from clip import CLIPConfig, load_vlm
from hsattn import Attn, g
from san import check_heads, tokens
from segmenter import VLMS, Answer, Segmenter, identity
from siblings.aggregation import Aggregation, Up, conv, each
from siblings.tuned import Tuned

DROPPED = -100.0                           # the logit of a name that was given up on the way


@dataclass
class FGASegConfig:
    """Every number of the model; defaults are the paper's for ViT-B/16."""

    clip: CLIPConfig = field(default_factory=lambda: CLIPConfig(clip_scale=1.0, depths=(0, 4, 8, 11), short_side=384,
                                                                long_side=1536))
    clip_lr: float = number(0.01, 0, 10)        # factor of the learning rate of CLIP's q and v; 0: CLIP stays as it is
    p2t: bool = True                            # names look at the image
    p2t_layers: int = number(1, 1, 64)
    p2t_heads: int = number(8, 1, 256)
    lcs: str = choice("softmax", "linear", "none")  # over the taps of a kernel; linear: none; none: no LCS
    lcs_kernel: int = number(3, 1, 31)          # k
    fusion: str = choice("cat", "add")          # of the two paths: cat and a linear, or add
    t2p: bool = True                            # the loss of the names alone, and its projector
    hidden: int = number(128, 2, 16384)         # K
    guide: int = number(128, 1, 16384)          # G: appearance for the spatial blocks, names for those over names
    agg_layers: int = number(2, 1, 64)          # of aggregation
    agg_heads: int = number(4, 1, 256)
    window: int = number(12, 1, 256)            # places a side; every second block is shifted by half
    pool: int = number(2, 1, 64)                # blocks over names see a map so many times coarser, in training
    pad: int = number(256, 0, 65536)            # blocks over names see at least so many, the rest one learned token; 0: none
    most_names: int = number(256, 1, 65536)     # the others, by their best S^g, get no map
    guidance: tuple = number((256, 128), 1, 16384, 2)  # width of CLIP's two maps, on grids twice and four times as fine
    guidance_proj: tuple = number((32, 16), 1, 16384, 2)  # of which the decoder sees so many numbers
    decoder_widths: tuple = number((64, 32), 1, 16384, 2)  # twice and four times as fine
    fast: bool = True                           # auxiliary heads
    topk: int = number(0, 0, 65536)             # at test: a name that is nowhere among the k best is given up; 0: none is
    prior: int = number(0, 0, 65536)            # logits start where one of so many names is present; 0: anywhere
    w_aux: float = number(0.2, 0, 1e6)
    w_t2p: float = number(0.02, 0, 1e6)


# --- functions ------------------------------------------------------------------------------------------------------
def sine_positions(grid, like):
    """DETR's: (h*w,E), E as `like` (...,E) has.  The first half of the numbers says the row, the second the column."""
    half = like.shape[-1] // 2
    rates = 10000 ** (torch.arange(0, half, 2, dtype=torch.float64) / half)               # (E/4)

    def code(n):
        u = 2 * math.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1e-6)
        angles = u[:, None] / rates
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)                   # (n,E/2)

    rows, columns = code(grid[0])[:, None].expand(-1, grid[1], -1), code(grid[1])[None].expand(grid[0], -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1).to(like)


def cosines(names, f):
    """S^g: names (B,L,E), F (B,E,h,w) -> (B,L,h,w) in -1..1"""
    return torch.einsum("ble,behw->blhw", g(names), F.normalize(f, dim=1))


def as_kernels(numbers, k):
    """Rows of a linear, (B,L,c*k*k+1) -> kernels (B,L,c,k,k), biases (B,L)"""
    return numbers[..., :-1].unflatten(-1, (-1, k, k)), numbers[..., -1]


def correlate(maps, kernels, biases):
    """Each image's maps (B,c,h,w) under the kernels (B,L,c,k,k) of its own names, with zeros around -> (B,L,h,w)"""
    B, L, *_, k = kernels.shape
    out = F.conv2d(maps.flatten(0, 1)[None], kernels.flatten(0, 1), biases.flatten(), padding=k // 2, groups=B)
    return out[0].unflatten(0, (B, L))


def pick(x, kept):
    """Of each image the names `kept` (B,n): x (B,L,...) -> (B,n,...)"""
    return x[torch.arange(len(x), device=x.device)[:, None], kept]


def restored(x, ids, L):
    """Logits x (B,n,h,w) of the names `ids` (B,n) among all L, where the others are DROPPED -> (B,L,h,w)"""
    if x.shape[1] == L:
        return x
    every = x.new_full((len(x), L, *x.shape[2:]), DROPPED)
    every[torch.arange(len(x), device=x.device)[:, None], ids] = x
    return every


def survivors(o, k):
    """Which names are among the k best at any place: o (1,L,h,w) -> (1,n), in their order"""
    return o[0].topk(min(k, o.shape[1]), 0).indices.unique()[None]


# --- modules --------------------------------------------------------------------------------------------------------
class P2Tformer(nn.Module):
    """T' = T + gamma t: what a name is in this image.  No name sees another."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.attn = nn.ModuleList(Attn(width, heads) for _ in range(layers))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.gamma = nn.Parameter(torch.full((width,), 0.1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, text, f):
        """text (B,L,E), F (B,E,h,w) -> T' (B,L,E)"""
        places, t = tokens(f), text                                                       # (B,P,E)
        keys = places + sine_positions(f.shape[-2:], places)
        for attn, mix, norm in zip(self.attn, self.mix, self.norm):
            t = norm(t + mix(attn(t, keys, places)))
        return text + self.gamma * t                          # the first text, however many layers


class LocalSimilarity(nn.Module):
    """S^l: every name is a convolution kernel over the directions of F."""

    def __init__(self, width, k, softmax):
        super().__init__()
        self.kernel, self.k, self.softmax = nn.Linear(width, width * k * k + 1), k, softmax

    def kernels(self, names):
        """names (B,L,E) -> ŵ (B,L,E,k,k), b (B,L)"""
        taps, biases = as_kernels(self.kernel(g(names)), self.k)
        return taps.flatten(-2).softmax(-1).view_as(taps) if self.softmax else taps, biases

    def forward(self, names, f):
        """names (B,L,E), F (B,E,h,w) -> (B,L,h,w)"""
        return correlate(F.normalize(f, dim=1), *self.kernels(names))


class T2P(nn.Module):
    """A: every name is a convolution kernel over a finer F.  For a loss only: nothing of it is there at test."""

    def __init__(self, width):
        super().__init__()
        up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.refine = nn.Sequential(up, *conv(width, width), up, *conv(width, width // 2),
                                    nn.Conv2d(width // 2, width // 2, 1))
        self.kernel = nn.Linear(width, width // 2 * 9 + 1)

    def forward(self, names, f):
        """names (B,L,E), F (B,E,h,w) -> (B,L,4h,4w)"""
        return correlate(self.refine(f), *as_kernels(self.kernel(names), 3))


class Fuse(nn.Module):
    """Two maps of each name as one: `cat` and a linear, or `add`."""

    def __init__(self, width, other, how):
        super().__init__()
        self.linear = nn.Conv2d(width + other, width, 1) if how == "cat" else None

    def forward(self, a, b):
        """a (B,L,c,h,w), b (B,L,c',h,w) -> (B,L,c,h,w)"""
        return a + b if self.linear is None else each(self.linear, torch.cat([a, b], 2))


# --- the model ------------------------------------------------------------------------------------------------------
class FGASeg(Segmenter):
    """`model(image, text)` -> dict(logits (B,L,4h,4w), gcs and lcs (B,L,h,w)); in training also aux, three maps, and t2p."""

    Config = FGASegConfig
    PRESETS = {"world": dict(VLMS["world"], depths=(0, 2, 4, 5), clip_lr=0.1, p2t_heads=4, hidden=32, guide=32,
                             agg_heads=2, window=4, pad=0, guidance=(32, 16), guidance_proj=(8, 4), decoder_widths=(16, 8),
                             prior=49),
               "coco": {},
               "coco-large": dict(vlm="ViT-L-14-336", clip_scale=0.875, depths=(0, 8, 16, 23))}          # 336 of 384
    RECIPES = {"world": dict(steps=600, batch=8, lr=1e-3, warmup=50, grad_clip=1.0, weight_decay=0.01, save_every=100,
                             log_every=20, val_images=1000, workers=0),
               **dict.fromkeys(("coco", "coco-large"), dict(steps=80_000, batch=8, lr=2e-4))}
    ABLATIONS = {"no-p2t": dict(p2t=False), "no-t2p": dict(t2p=False), "no-lcs": dict(lcs="none"),
                 "blank": dict(p2t=False, t2p=False, lcs="none"),              # CAT-Seg, what all of it stands on
                 "lcs-linear": dict(lcs="linear"), "fusion-add": dict(fusion="add"), "frozen": dict(clip_lr=0.0)}
    watch = ("bce", "aux")
    curves = {"segmentation losses": {"BCE": "bce", "auxiliary": "aux"}, "names alone": {"T2P": "t2p"}}

    @classmethod
    def check(cls, c):
        if c.clip.vlm.upper().startswith("EVA"):
            raise InputError(f"vlm {c.clip.vlm}: FGAseg reads the last block of OpenAI's family; take ViT-B-16")
        check_heads(c.agg_heads, c.hidden, "agg_heads")
        if c.hidden % 2 or not c.lcs_kernel % 2:
            raise InputError(f"hidden {c.hidden}: takes an even number" if c.hidden % 2 else
                             f"lcs_kernel {c.lcs_kernel}: takes an odd number")
        widths = {"hidden": c.hidden, "the first of decoder_widths": c.decoder_widths[0]}
        for (name, width), guide in zip(widths.items(), c.guidance_proj):
            if width <= guide:
                raise InputError(f"{name} {width}: takes more than the {guide} of guidance_proj that stand beside it")
        if c.fusion == "add" and c.lcs != "none" and c.decoder_widths[0] != c.hidden // 2:
            raise InputError(f"fusion add: takes decoder_widths that begin with {c.hidden // 2}, half of hidden")
        if len(c.clip.depths) not in (0, 4):
            raise InputError(f"depths {' '.join(map(str, c.clip.depths))}: takes 4 numbers, or none")
        if c.topk and not c.fast:
            raise InputError(f"topk {c.topk}: takes fast=true, whose heads say which names go on")
        if c.prior == 1:
            raise InputError(f"prior {c.prior}: takes 2 or more names, or 0")

    def __init__(self, c):
        super().__init__()
        self.config, self.rates = c, {"vlm.tuned.": c.clip_lr}
        self.vlm = load_vlm(c.clip.vlm, c.clip.pretrained, scale=c.clip.clip_scale, depths=c.clip.depths)
        self.vlm.requires_grad_(False)                        # not even the positions
        self.stride = round(self.vlm.patch.stride[0] / c.clip.clip_scale)                # pixels of a patch
        E, C, K, G, half = self.vlm.text_width, self.vlm.width, c.hidden, c.guide, c.hidden // 2
        check_heads(c.p2t_heads, E, "p2t_heads")
        fine, finest = c.decoder_widths
        self.vlm.tuned = Tuned(self.vlm)                      # CLIP's, so that --init leaves them where CLIP is another
        self.p2t = P2Tformer(E, c.p2t_heads, c.p2t_layers) if c.p2t else None
        self.t2p = T2P(E) if c.t2p else None
        self.embed = nn.Conv2d(1, K, 7, padding=3)
        self.appearance, self.words = nn.Conv2d(E, G, 3, padding=1), nn.Linear(E, G)
        self.aggregation = nn.ModuleList(Aggregation(K, c.agg_heads, G, c.window, c.pool, c.pad)
                                         for _ in range(c.agg_layers))
        self.guidance = nn.ModuleList(nn.ConvTranspose2d(C, r, n, n) for r, n in zip(c.guidance, (2, 4)))
        self.project = nn.ModuleList(nn.Conv2d(r, e, 3, padding=1) for r, e in zip(c.guidance, c.guidance_proj))
        self.ups = nn.ModuleList([Up(K, fine, c.guidance_proj[0]), Up(fine, finest, c.guidance_proj[1])])
        self.head = nn.Conv2d(finest, 1, 3, padding=1)
        self.aux = nn.ModuleList(nn.Conv2d(n, 1, 3, padding=1) for n in (K, K, fine)) if c.fast else None
        self.lcs = None
        if c.lcs != "none":
            self.lcs = LocalSimilarity(E, c.lcs_kernel, c.lcs == "softmax")
            self.embed_local = nn.Conv2d(1, K, 7, padding=3)
            self.fuse = nn.ModuleList([Fuse(K, K, c.fusion), Fuse(K, K, c.fusion), Fuse(fine, half, c.fusion)])
            self.local_up = nn.Sequential(nn.ConvTranspose2d(K, half, 2, 2), *conv(half, half), *conv(half, half))
        if c.prior:                                           # else the first hundred steps learn that names are rare
            for head in (self.head, *(self.aux or ())):
                nn.init.constant_(head.bias, -math.log(c.prior - 1))
        self.to(memory_format=torch.channels_last)            # narrow convolutions of many maps: 1.2 times as fast on a CPU

    def look(self, image):
        """image (B,3,H,W) -> F (B,E,h,w), and two maps (B,C,h,w) from before: CLIP with the model's own q and v"""
        return self.vlm.tuned(self.vlm, image)

    def guides(self, maps):
        """CLIP's two maps (B,C,h,w) for the decoder: (B,e1,2h,2w) and (B,e2,4h,4w)"""
        return [F.relu(project(up(m))) for project, up, m in zip(self.project, self.guidance, maps)]

    def narrow(self, i, aux, x, *beside):
        """Head i reads x (B,L,·,h,w): in training its map goes to `aux`; with topk the names that win nowhere are left
        out of x and of what stands beside it, each (B,L,...) or None, for one image."""
        topk = 0 if self.training else self.config.topk
        if self.aux is None or not (self.training or topk):
            return x, *beside
        o = each(self.aux[i], x)[:, :, 0]                                                 # (B,L,h,w)
        aux.append(o)
        if not topk:
            return x, *beside
        kept = survivors(o, topk)
        return tuple(None if rows is None else pick(rows, kept) for rows in (x, *beside))

    def forward(self, image, text):
        """image (B,3,H,W) CLIP-normalised, sides multiples of `stride`; text (L,E) unit -> dict, see the class."""
        B, L = len(image), len(text)
        if self.config.topk and not self.training and B > 1:  # each image gives up names of its own
            alone = [self(one, text) for one in image.split(1)]
            return {name: torch.cat([out[name] for out in alone]) for name in alone[0]}
        f, maps = self.look(image)                                                        # F (B,E,h,w), 2 x (B,C,h,w)
        names, aux, out = text.expand(B, -1, -1), [], {}                                  # T (B,L,E)
        if self.p2t is not None:
            names = self.p2t(names, f)                                                    # T'
        if self.t2p is not None and self.training:
            out["t2p"] = self.t2p(names, f).to(text.dtype)                                # A (B,L,4h,4w)
        gcs = out["gcs"] = cosines(names, f)                                              # S^g (B,L,h,w)
        ids = torch.arange(L, device=text.device).expand(B, -1)                           # (B,L): which names go on
        if L > self.config.most_names:
            kept = gcs.amax((2, 3)).topk(self.config.most_names).indices
            names, gcs, ids = (pick(rows, kept) for rows in (names, gcs, ids))
        e, local = each(self.embed, gcs[:, :, None]), None                                # (B,L,K,h,w)
        if self.lcs is not None:
            out["lcs"] = self.lcs(names, f)                                               # S^l (B,L,h,w)
            local = each(self.embed_local, out["lcs"][:, :, None])                        # (B,L,K,h,w)
            e = self.fuse[0](e, local)
        x, local, names, ids = self.narrow(0, aux, e, local, names, ids)
        appearance, words = F.relu(self.appearance(f)).permute(0, 2, 3, 1), F.relu(self.words(g(names)))
        for layer in self.aggregation:
            x = layer(x, appearance, words)                                               # (B,L,K,h,w)
        y, (fine, finest) = x if local is None else self.fuse[1](x, local), self.guides(maps)
        y, local, ids = self.narrow(1, aux, y, local, ids)
        y = self.ups[0](y, fine)                                                          # (B,L,d1,2h,2w)
        if local is not None:
            y = self.fuse[2](y, each(self.local_up, local))
        y, ids = self.narrow(2, aux, y, ids)
        y = self.ups[1](y, finest)                                                        # (B,L,d2,4h,4w)
        out["logits"] = restored(each(self.head, y)[:, :, 0].to(text.dtype), ids, L)      # losses and scores are fp32
        if self.training and aux:
            out["aux"] = [restored(o.to(text.dtype), ids, L) for o in aux]
        return out

    def answer(self, out, b=0):
        return Answer(out["logits"][b], gate=identity, floor=0.0)                         # of none: below probability 1/2

    def terms(self, out, batch):
        """Each name by itself, present or not; a pixel without a label shows none."""
        L, size = out["logits"].shape[1], batch.labels.shape[-2:]
        names = torch.arange(L, device=batch.labels.device).view(-1, 1, 1)
        truth = (batch.labels[:, None] == names).to(out["logits"].dtype)                  # Y (B,L,H,W)

        def bce(logits):
            return F.binary_cross_entropy_with_logits(F.interpolate(logits, size, mode="bilinear"), truth)

        terms = dict(bce=(1.0, bce(out["logits"])))
        if "aux" in out:
            terms["aux"] = self.config.w_aux, sum(map(bce, out["aux"]))
        if "t2p" in out:
            coarse = F.interpolate(truth, out["t2p"].shape[-2:])                          # nearest
            terms["t2p"] = self.config.w_t2p, F.binary_cross_entropy_with_logits(out["t2p"], coarse)
        return terms

    def log(self):
        """How far CLIP's copies have moved, and how much of t a name takes."""
        q, v = self.vlm.tuned.drift(self.vlm)
        return {"q moved": q, "v moved": v, **({} if self.p2t is None else {"gamma": self.p2t.gamma.mean().item()})}

    def parts(self):
        parts = {"CLIP features": [self.vlm.tuned], "P2Tformer": [self.p2t], "LCS": [self.lcs], "T2P": [self.t2p],
                 "aggregation": list(self.aggregation), "decoder": [*self.ups, self.head]}
        return {title: modules for title, modules in parts.items() if modules[0] is not None}
