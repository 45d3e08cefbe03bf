"""Side Adapter Network: a small ViT beside the frozen CLIP proposes masks and tells CLIP where to look.

    image ── patch ──> z (B,P,S) ─┐                        ┌─> masks = q' · z'            (B,Q,h,w)
    frozen CLIP ── F0,F3,F6,F9 ───┼─> side ViT ──> z, q ───┤
    Q learned queries ────────────┘  (z += f before block 1 └─> bias = q' · z" per head   (B,heads,Q,h,w)
                                      and after 1, 2, 3)          │
                              CLIP's remaining blocks, Q biased cls copies  ──>  class logits (B,Q,L+1)

    f_i = bilinear( Conv1x1( LN_channels(F_i) ) ) on the side grid

ViT-B/16 at 640: z (B,1600,240), q (B,100,240), masks (B,100,40,40), 8,370,866 trainable parameters.
This is the complete baseline of the paper, numerically the published one (tests/test_san.py checks it against numbers
that the published code computed), and it loads the published checkpoints by their own key names.

# paper: SAN is the baseline.  Everything here is SAN's: sizes, fusion depths, heads, supervision of the last two blocks.
# differs: the two heads are plain linears on tokens where SAN writes 1x1 convolutions: same function, same weights.

Demo: `python san.py` counts the parameters of the reference size.  Tests: tests/test_san.py.  Read next: decoder.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from clip import VLM, differences, load_pickle, open_model
from images import InputError


@dataclass
class SANConfig:
    """Every number of the SAN model; defaults are the reference size."""

    vlm: str = "ViT-B-16"              # open_clip name, or "world"; clip.open_model says what -gelu, -quickgelu add
    pretrained: str = "openai"         # open_clip tag, a local file, or "none" for random weights
    clip_scale: float = 0.5            # CLIP sees the image at this fraction (0.7 for ViT-L-14-336)
    depths: tuple = ()                 # blocks after which CLIP's maps are taken; () = quarters of its depth
    width: int = 240                   # S, side ViT
    depth: int = 8                     # side blocks
    heads: int = 6                     # side heads
    patch: int = 16                    # side patch, pixels
    grid: int = 40                     # g, the side grid the position embedding is learned on
    queries: int = 100                 # Q
    head_width: int = 256              # hidden and output width of the mask head's MLPs


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


class Mlp(nn.Module):
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
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width)

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

    def forward(self, image, f, update=None, query=None):
        """image (B,3,H,W), f four (B,S,h,w) -> [(q (B,Q,S), z (B,P,S)) after each block].

        `update(i, q, z) -> q` runs after block i = 1, 2, 3 and its fusion, before positions are added again; this is
        where PAT sits.  `query` replaces the learned queries.
        """
        z = self.patch_embed(image)                                                       # (B,S,h,w)
        pos, Q = self.positions(tuple(z.shape[-2:])), self.queries
        query = self.query_embed if query is None else query
        x = torch.cat([query.expand(z.shape[0], -1, -1), tokens(z)], 1) + pos             # (B,Q+P,S)
        q, z = x[:, :Q], x[:, Q:] + tokens(f[0])
        outputs = []
        for i, block in enumerate(self.blocks, 1):
            x = block(torch.cat([q, z], 1))
            q, z = x[:, :Q], x[:, Q:]
            if i < len(f):
                z = z + tokens(f[i])
                if update is not None:
                    q = update(i, q, z)
            outputs.append((q, z))
            q, z = q + pos[:, :Q], z + pos[:, Q:]
        return outputs


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


class SAN(nn.Module):
    """The whole baseline.  `model(image, text)` -> dict(masks=[...], classes=[...]); the last entries predict."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.vlm = VLM(*open_model(c.vlm, c.pretrained), scale=c.clip_scale, depths=c.depths)
        self.side = SideViT(width=c.width, depth=c.depth, heads=c.heads, patch=c.patch, grid=c.grid, queries=c.queries)
        self.fusion = nn.ModuleList(Fusion(self.vlm.width, c.width) for _ in self.vlm.depths)
        self.background = nn.Parameter(torch.randn(1, self.vlm.text_width) * self.vlm.text_width ** -0.5)
        self.stride = 32 if c.patch == 16 else c.patch        # inputs are padded to a multiple; 32 as in SAN
        self.build()

    def build(self):
        self.head = MaskHead(self.config.width, self.config.width, self.config.head_width, self.vlm.heads)

    def fuse(self, image):
        """image (B,3,H,W) -> CLIP's Pyramid, and its four maps on the side grid, each (B,S,h,w)."""
        pyramid = self.vlm.features(image)
        grid = (image.shape[-2] // self.config.patch, image.shape[-1] // self.config.patch)
        return pyramid, [fuse(m, grid) for fuse, m in zip(self.fusion, pyramid.maps)]

    def classify(self, pyramid, bias, text):
        """Class logits (B,Q,L+1) of what CLIP sees through `bias`; the last column is the learned background."""
        names = torch.cat([text, F.normalize(self.background, dim=-1)])                   # (L+1,E)
        seen = self.vlm.recognise(pyramid, bias).to(names.dtype)                          # (B,Q,E)
        with torch.autocast(seen.device.type, enabled=False):                             # bf16 logits step by 1/8
            return self.vlm.logit_scale * seen @ names.T

    def forward(self, image, text):
        """image (B,3,H,W) CLIP-normalised, H and W multiples of the patch; text (L,E) unit -> dict of lists of
        masks (B,Q,h,w) and classes (B,Q,L+1); in training two of each (deep supervision), else one."""
        pyramid, f = self.fuse(image)
        outputs = self.side(image, f)[-2 if self.training else -1:]
        masks, classes = [], []
        for q, z in outputs:
            m, bias = self.head(q, z.unflatten(1, f[0].shape[-2:]))
            masks.append(m.to(image.dtype))                    # autocast ends here: losses and scores are fp32
            classes.append(self.classify(pyramid, bias, text))
        return dict(masks=masks, classes=classes)


# --- published checkpoints -----------------------------------------------------------------------------------------

NOT_PARAMETERS = ("criterion.empty_weight", "ov_classifier.attn_mask")                    # of the published layout
RENAMED = (("vit_model.patch_embed.proj.", "side.patch_embed."), ("vit_model.", "side."), ("query_", "side.query_"),
           ("mask_decoder.", "head."))


def our_key(key, rec_start):
    """The name in this file of a key of the published layout; recognition blocks count on from `rec_start`."""
    part, _, rest = key.partition(".")
    if part == "clip_rec_head" and rest.startswith("resblocks."):
        _, i, rest = rest.split(".", 2)
        return f"vlm.model.visual.transformer.resblocks.{int(i) + rec_start}.{rest}"
    if part in ("clip_visual_extractor", "clip_rec_head"):
        return "vlm.model.visual." + ("transformer." if rest.startswith("resblocks.") else "") + rest
    if part == "ov_classifier":
        return {"bg_embed": "background", "logit_scale": "vlm.model.logit_scale"}.get(rest, f"vlm.model.{rest}")
    for theirs, ours in RENAMED:
        if rest.startswith(theirs):
            return ours + rest[len(theirs):]
    if rest.startswith("fusion_layers.layer_"):
        i, _, part, kind = rest.removeprefix("fusion_layers.layer_").split(".")
        return f"fusion.{i}.{('norm', 'proj')[int(part)]}.{kind}"
    return key


TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def read_published(path):
    """The state dict of a published checkpoint: its "model" entry, or the whole of it.  name -> tensor

    Raises InputError for a file that is damaged, holds code, or holds no tensors by name.
    """
    published = load_pickle(path)
    published = published.get("model", published) if isinstance(published, dict) else {}
    if not published or not all(torch.is_tensor(value) for value in published.values()):
        raise InputError(f"{path}: holds no state dict, neither at its top nor under 'model'; is it a SAN checkpoint?")
    return published


def from_published(model, published):
    """Load a state dict in the layout of the published SAN checkpoints into `model`, CLIP included.

    The text tower may be absent as a whole (it stays as it is).  Raises InputError listing missing and unknown entries
    and wrong shapes; the model is then unchanged.
    """
    state, loaded = model.state_dict(), {}
    for key, value in published.items():
        if key not in NOT_PARAMETERS:
            ours = our_key(key, model.vlm.depths[-1])
            ours = key if ours in loaded else ours            # two entries for one place: the second is unknown
            if value.shape[2:] == (1, 1) and ours in state and state[ours].ndim == 2:
                value = value.flatten(1)                      # 1x1 convolutions are linears here
            loaded[ours] = value
    text = tuple(f"vlm.model.{name}" for name in TEXT)
    if not any(key.startswith(text) for key in loaded):
        loaded.update({key: value for key, value in state.items() if key.startswith(text)})
    wrong = differences(state, loaded)
    if wrong:
        raise InputError(f"not a SAN checkpoint of this size: {wrong}")
    model.load_state_dict(loaded)


def trainable(model):
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    print(f"SAN with ViT-B/16: {trainable(SAN(SANConfig(pretrained='none'))):,} trainable parameters")
