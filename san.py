"""Side Adapter Network: a small ViT beside the frozen CLIP proposes masks and tells CLIP where to look.

    image ── patch ──> z (B,P,S) ─┐                        ┌─> masks = q' · z'            (B,Q,h,w)
    frozen CLIP ── F0,F3,F6,F9 ───┼─> side ViT ──> z, q ───┤
    Q learned queries ────────────┘  (z += f before block 1 └─> bias = q' · z" per head   (B,heads,Q,h,w)
                                      and after 1, 2, 3)          │
                              CLIP's remaining blocks, Q biased cls copies  ──>  class logits (B,Q,L+1)

    f_i = bilinear( Conv1x1( LN_channels(F_i) ) ) on the side grid

ViT-B/16 at 640: z (B,1600,240), q (B,100,240), masks (B,100,40,40), 8,370,866 trainable parameters.
This is the complete baseline of the paper, numerically the published one (tests/test_san.py checks it against numbers
that the published code computed); published/san_checkpoints.py loads the published weights by their own key names.

# paper: SAN is the baseline.  Everything here is SAN's: sizes, fusion depths, heads, supervision of the last two blocks.
# differs: the two heads are plain linears on tokens where SAN writes 1x1 convolutions: same function, same weights.

Tests: tests/test_san.py.  Read next: losses.py.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from clip import CLIPConfig, load_vlm
from cli import InputError, number
from data import IGNORE
from losses import BCE, CE, DICE, class_weight, segmentation, targets
from segmenter import VLMS, Answer, Segmenter


@dataclass
class SideConfig:
    """The side ViT; defaults are the reference size."""

    width: int = number(240, 1, 16384)          # S
    depth: int = number(8, 1, 256)              # blocks
    heads: int = number(6, 1, 256)
    patch: int = number(16, 1, 256)             # pixels
    grid: int = number(40, 1, 1024)             # g, the side grid the position embedding is learned on
    queries: int = number(100, 1, 4096)         # Q


@dataclass
class SANConfig:
    """Every number of the SAN model; defaults are the reference size."""

    clip: CLIPConfig = field(default_factory=CLIPConfig)
    side: SideConfig = field(default_factory=SideConfig)
    head_width: int = number(256, 1, 16384)     # hidden and output width of the mask head's MLPs
    points: int = number(12544, 1, 10**6)       # for matching and for the mask losses, an image


SMALL_SIDE = dict(width=96, depth=4, heads=6, patch=8, grid=8, queries=20)               # the world's: 8x8 patches of 8
WORLD_POINTS = 1024                    # a scene has 4,096 pixels


def check_heads(heads, width, name="heads"):
    """Raises InputError unless `heads` divide `width`."""
    if heads < 1 or width % heads:
        raise InputError(f"{name} {heads} does not divide the width {width}")


class MLP(nn.Module):
    """Linears with an activation between them, along the last axis."""

    def __init__(self, *widths, act=F.relu):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.act = act

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else self.act(x))
        return x


class SelfAttn(nn.Module):
    """Multi-head self-attention with one fused qkv linear."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        """(B,T,S) -> (B,T,S)"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # each (B,heads,T,d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The transformer's two-layer MLP."""

    def __init__(self, width, ratio=4):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), SelfAttn(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), FeedForward(width)

    def forward(self, x):
        """(B,T,S) -> (B,T,S)"""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Fusion(nn.Module):
    """f = bilinear(Conv1x1(LN(F))): one of CLIP's maps on the side grid."""

    def __init__(self, clip_width, width):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(clip_width, eps=1e-6), nn.Linear(clip_width, width)

    def forward(self, clip_map, grid):
        """(B,C,hc,wc) -> (B,S,h,w)"""
        f = self.proj(self.norm(clip_map.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)        # (B,S,hc,wc)
        return F.interpolate(f, size=grid, mode="bilinear", align_corners=False)


def tokens(x):
    """A map (B,S,h,w) as tokens (B,h*w,S)."""
    return x.flatten(2).transpose(1, 2)


class SideViT(nn.Module):
    """Queries and patches through the side blocks, with CLIP's maps added on the way."""

    def __init__(self, *, width, depth, heads, patch, grid, queries):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, grid * grid, width))
        self.query_embed = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.query_pos_embed = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.grid, self.queries = grid, queries
        for module in self.blocks.modules():                  # timm's ViT initialisation, as SAN starts from
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions(self, grid):
        """Positions of queries and patches (1,Q+P,S) on a grid (h,w), resized bicubically from the learned one."""
        pos = self.pos_embed
        if grid != (self.grid, self.grid):
            pos = pos.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            pos = tokens(F.interpolate(pos, size=grid, mode="bicubic", align_corners=False))
        return torch.cat([self.query_pos_embed, pos], 1)

    def start(self, image, f0):
        """image (B,3,H,W), f0 (B,S,h,w) -> queries q (B,Q,S) and patches z (B,P,S), positions (1,Q+P,S)."""
        z = self.patch_embed(image)                                                       # (B,S,h,w)
        pos = self.positions(tuple(z.shape[-2:]))
        q = self.query_embed.expand(z.shape[0], -1, -1)
        q, z = self.parted(torch.cat([q, tokens(z)], 1) + pos)
        return q, z + tokens(f0), pos

    def step(self, i, q, z, pos):
        """Side block i, from 0.  Positions are added again before every block but the first."""
        if i:
            q, z = q + pos[:, :self.queries], z + pos[:, self.queries:]
        return self.parted(self.blocks[i](torch.cat([q, z], 1)))

    def parted(self, x):
        """(B,Q+P,S) -> q (B,Q,S), z (B,P,S)"""
        return x[:, :self.queries], x[:, self.queries:]


class MaskHead(nn.Module):
    """Masks and CLIP's attention bias from queries and pixels: three MLPs and two dot products."""

    def __init__(self, query_width, pixel_width, width, clip_heads):
        super().__init__()
        self.query_mlp = MLP(query_width, width, width, width)
        self.pix_mlp = MLP(pixel_width, width, width, width)
        self.attn_mlp = MLP(pixel_width, width, width, width * clip_heads)
        self.bias_scaling = nn.Linear(1, 1)
        nn.init.ones_(self.bias_scaling.weight)
        nn.init.zeros_(self.bias_scaling.bias)
        self.clip_heads = clip_heads

    def forward(self, q, y, z=None):
        """q (B,Q,·), y (B,h,w,·) pixels of the masks, z (B,hb,wb,·) of the bias (default y)
        -> mask logits (B,Q,h,w), bias (B,clip_heads,Q,hb,wb)"""
        q = self.query_mlp(q)                                                             # (B,Q,c)
        masks = torch.einsum("bqc,bhwc->bqhw", q, self.pix_mlp(y))
        features = self.attn_mlp(y if z is None else z).unflatten(-1, (self.clip_heads, -1))
        bias = torch.einsum("bqc,bhwnc->bnqhw", q, features)
        return masks, self.bias_scaling(bias[..., None])[..., 0]


class SAN(Segmenter):
    """The whole baseline.  `model(image, text)` -> dict(masks=[...], classes=[...]); the last entries predict."""

    Config = SANConfig
    PRESETS = {name: {**vlm, **(dict(SMALL_SIDE, head_width=96, points=WORLD_POINTS) if name == "world" else {})}
               for name, vlm in VLMS.items()}
    RECIPES = {"world": dict(           # 10,400 scenes: what two cores can do in ten minutes
        steps=1300, batch=8, lr=4e-3, muon=True, warmup=100, grad_clip=1.0, weight_decay=0.01, save_every=200,
        log_every=20, val_images=1000, workers=0)}            # a scene is drawn in a millisecond
    watch = ("ce_2", "mask_2", "dice_2")
    curves = {"segmentation losses": {"class (ce)": "ce_2", "mask": "mask_2", "dice": "dice_2"}}

    @classmethod
    def check(cls, c):
        check_heads(c.side.heads, c.side.width)
        if len(c.clip.depths) not in (0, 4):
            raise InputError(f"depths {' '.join(map(str, c.clip.depths))}: takes 4 numbers, or none")

    def __init__(self, config):
        super().__init__()
        self.config, clip, side = config, config.clip, config.side
        self.vlm = load_vlm(clip.vlm, clip.pretrained, scale=clip.clip_scale, depths=clip.depths)
        self.side = SideViT(width=side.width, depth=side.depth, heads=side.heads, patch=side.patch, grid=side.grid,
                            queries=side.queries)
        self.fusion = nn.ModuleList(Fusion(self.vlm.width, side.width) for _ in self.vlm.depths)
        self.background = nn.Parameter(torch.randn(1, self.vlm.text_width) * self.vlm.text_width ** -0.5)
        self.stride = 32 if side.patch == 16 else side.patch  # inputs are padded to a multiple; 32 as in SAN
        self.build()

    def build(self):
        """What stands on the side ViT: here SAN's mask head, in PAT the pyramid and its decoder."""
        c = self.config
        self.head = MaskHead(c.side.width, c.side.width, c.head_width, self.vlm.heads)

    def fuse(self, image):
        """image (B,3,H,W) -> CLIP's Pyramid, and its four maps on the side grid, each (B,S,h,w)."""
        pyramid, patch = self.vlm.features(image), self.config.side.patch
        grid = (image.shape[-2] // patch, image.shape[-1] // patch)
        return pyramid, [fuse(m, grid) for fuse, m in zip(self.fusion, pyramid.maps)]

    def classify(self, pyramid, biases, text):
        """Class logits (B,Q,L+1) of what CLIP sees through each of `biases`; the last column is the learned background."""
        names = torch.cat([text, F.normalize(self.background, dim=-1)])                   # (L+1,E)
        regions = self.vlm.recognise(pyramid, torch.cat(biases, 2)).to(names.dtype)       # one pass of CLIP for all
        with torch.autocast(regions.device.type, enabled=False):                             # bf16 logits step by 1/8
            return [self.vlm.logit_scale * part @ names.T for part in regions.chunk(len(biases), 1)]      # (B,Q,E) each

    def forward(self, image, text):
        """image (B,3,H,W) CLIP-normalised, H and W multiples of the patch; text (L,E) unit -> dict of lists of
        masks (B,Q,h,w) and classes (B,Q,L+1); in training two of each (deep supervision), else one."""
        pyramid, f = self.fuse(image)
        q, z, pos = self.side.start(image, f[0])
        outputs = []
        for i in range(len(self.side.blocks)):
            q, z = self.side.step(i, q, z, pos)
            if i + 1 < len(f):
                z = z + tokens(f[i + 1])
            outputs.append((q, z))
        heads = [self.head(q, z.unflatten(1, f[0].shape[-2:])) for q, z in outputs[-2 if self.training else -1:]]
        masks, biases = zip(*heads)
        masks = [m.to(image.dtype) for m in masks]            # autocast ends here: losses and scores are fp32
        return dict(masks=masks, classes=self.classify(pyramid, biases, text))

    def answer(self, out, b=0):
        return Answer(out["masks"][-1][b], mix=out["classes"][-1][b].float().softmax(-1), none=True)

    def totals(self, labels):
        """How many true masks there are, and the sum of all class weights."""
        classes = [label[label != IGNORE].unique() for label in labels]
        return torch.tensor([sum(map(len, classes)), class_weight(classes, self.config.side.queries)],
                            dtype=torch.float64, device=labels.device)

    def terms(self, out, batch):
        """L_seg of both supervised outputs: ce, mask and dice, numbered 1 and 2."""
        truth, terms = [targets(label) for label in batch.labels], {}
        masks_here, weight_here = max(batch.totals[0].item(), 1.0) / batch.parts, batch.totals[1].item() / batch.parts
        for i, (masks, classes) in enumerate(zip(out["masks"], out["classes"]), 1):
            losses = segmentation(masks, classes, truth, [(*key, i) for key in batch.keys], points=self.config.points,
                                 num_masks=masks_here, weight=weight_here)
            for (name, loss), factor in zip(losses.items(), (CE, BCE, DICE)):
                terms[f"{name}_{i}"] = factor, loss
        return terms

    def parts(self):
        return {"side ViT + semantic": [self.side], "fusion": list(self.fusion), "mask head": [self.head]}


def trainable(model):
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
