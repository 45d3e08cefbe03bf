"""The frozen vision-language model: what PAT and SAN stand on.

A contrastive model puts an image and a sentence on one sphere.  Four things are asked of it here, for two families
(OpenAI's ViT through open_clip, EVA-02 through timm), behind one small class, `VLM`:

    features(image)        block by block, keep the maps at depths 0, 1/4, 1/2, 3/4 and all tokens at 3/4
    recognise(pyramid, bias)   Q copies of the cls token run through the remaining blocks; each sees the patches through
                           its own additive attention bias, so each names its own region          -> (B,Q,E) unit
    embed_text(names)      14 templates a name, averaged on the sphere, kept on disk              -> (L,E) unit
    dense(image)           MaskCLIP: the last block's values, a name for every patch, no training -> (B,E,h,w)

Who attends to whom in `recognise` (rows attend to columns; additive, 0 = freely, -inf = never):

                     cls      patches    copies
        cls           0          0        -inf
        patches       0          0        -inf
        copies      -100       bias       -inf, but 0 on the diagonal

Reference size: ViT-B/16, image (B,3,640,640), CLIP sees 320 -> maps (B,768,20,20) at depths 0,3,6,9;
bias (B,12,100,40,40).
Everything is frozen but the visual position embedding (151,296 numbers for ViT-B/16), as SAN has it.
CLIP's grid follows the image.  Absolute positions are resized bicubically; EVA's rotary positions are angles, computed
anew: row i of h stands at 16 i / h, whatever h is.  open_clip itself takes one size of image only.

# paper: frozen CLIP ViT-B/16 or EVA02-B/16.  Recognition with biased cls copies: SAN.
# ours: the world's tiny CLIP, which world/pretrain.py trained and world/clip.safetensors holds.

Demo: `python clip.py` names a drawn scene.  Tests: tests/test_clip.py.  Read next: segmenter.py.
B, H, W, C, Q, L: see hsattn.py; h, w CLIP's grid, P = h*w patches; E the width of the joint space.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from cli import InputError, number, tensors_checksum

SMALL_TOWER = 10_000_000               # parameters; a smaller text tower, such as the world's, is not worth a file
KEPT = 32                              # lists of names whose rows stay in memory
CLS_BLOCK = -100.0                                            # copy -> cls: as good as -inf, and finite like SAN's
TEMPLATES = (                                          # SAN's 14 sentences (`vild`), punctuation as published
    "a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene", "There is the {} in the scene",
    "a photo of a {} in the scene", "a photo of a small {}.", "a photo of a medium {}.", "a photo of a large {}.",
    "This is a photo of a small {}.", "This is a photo of a medium {}.", "This is a photo of a large {}.",
    "There is a small {} in the scene.", "There is a medium {} in the scene.", "There is a large {} in the scene.")


@dataclass
class CLIPConfig:
    """Which frozen CLIP, and at what size it is shown images; defaults are the reference size."""

    vlm: str = "ViT-B-16"                       # open_clip name, or "world"; published/weights.py: what -gelu, -quickgelu add
    pretrained: str = "openai"                  # open_clip tag, a local file, or "none" for random weights
    clip_scale: float = number(0.5, 0.05, 4)    # CLIP sees the image at this fraction (SAN: 0.7 for ViT-L-14-336)
    depths: tuple = number((), 0, 1000)         # blocks after which CLIP's maps are taken; () = quarters of its depth
    short_side: int = number(640, 1, 8192)     # pixels of the shorter side at test time, and of a training crop (SAN)
    long_side: int = number(2560, 1, 65536)    # pixels; the longer side is at most this (SAN)


def resize_positions(positions, old, new):
    """Position embedding (1+old², C), cls first, bicubically on a new grid (h,w) -> (1+h*w, C)."""
    if (old, old) == tuple(new):
        return positions
    grid = positions[1:].unflatten(0, (old, old)).permute(2, 0, 1)[None]                  # (1,C,old,old)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


def recognition_mask(bias, grid):
    """The mask drawn in the header: bias (B,heads,Q,hb,wb), max-pooled to grid (h,w) -> (B,heads,1+P+Q,1+P+Q)."""
    B, heads, Q = bias.shape[:3]
    P = grid[0] * grid[1]
    mask = bias.new_zeros(B, heads, 1 + P + Q, 1 + P + Q)
    mask[..., 1 + P:] = float("-inf")                         # nobody attends to a copy ...
    copies = torch.arange(1 + P, 1 + P + Q, device=bias.device)
    mask[..., copies, copies] = 0                             # ... but the copy itself
    mask[..., 1 + P:, 0] = CLS_BLOCK
    pooled = F.adaptive_max_pool2d(bias.flatten(0, 1), grid)                              # (B*heads,Q,h,w)
    mask[..., 1 + P:, 1:1 + P] = pooled.view(B, heads, Q, P)
    return mask


@dataclass
class Pyramid:
    maps: list                         # four (B,C,h,w), at depths 0, 1/4, 1/2, 3/4
    tokens: torch.Tensor               # (B,1+P,C) at depth 3/4, cls first
    grid: tuple                        # (h,w)


class VLM(nn.Module):
    """What both families do alike; `wrap` picks the family.

    `scale`: CLIP sees the image at this fraction of its size, rounded down.  `depths`: after how many blocks to keep a
    map, four numbers starting with 0; by default quarters of the number of blocks.  A family answers:

        patch, cls, positions, old_grid    its convolution, its cls token, what is added, and for which side of grid
        start(x), blocks, run(...)         what precedes the first block; its blocks; tokens through some of them
        values(block, x), head(x), text    attention's value path alone; into the joint space; who holds the text tower
    """

    def __init__(self, model, tokenizer, scale, depths=None):
        super().__init__()
        self.model, self.tokenizer, self.scale, self.cache, self.marks = model, tokenizer, scale, {}, None
        self.width = self.positions.shape[-1]                                             # C
        self.heads = self.blocks[0].attn.num_heads
        projection = self.text.text_projection                # a matrix, or a linear
        self.text_width = projection.shape[-1] if torch.is_tensor(projection) else projection.out_features
        quarter = len(self.blocks) // 4
        self.depths = tuple(depths) if depths else (0, quarter, 2 * quarter, 3 * quarter)
        if sorted(self.depths) != list(self.depths) or self.depths[-1] >= len(self.blocks):
            raise InputError(f"depths {' '.join(map(str, self.depths))}: takes rising numbers below {len(self.blocks)}, "
                             "CLIP's blocks")
        self.requires_grad_(False)
        self.positions.requires_grad_(True)                   # the one part of CLIP that is trained

    logit_scale = property(lambda self: self.model.logit_scale.exp())

    def embed(self, image):
        """image (B,3,H,W), CLIP-normalised, at full size -> tokens (B,1+P,C) before the first block, and grid (h,w)."""
        if self.scale != 1:
            image = F.interpolate(image, scale_factor=self.scale, mode="bilinear", align_corners=False)
        patches = self.patch(image)                                                       # (B,C,h,w)
        grid = tuple(patches.shape[-2:])
        patches = patches.flatten(2).transpose(1, 2)                                      # (B,P,C)
        cls = self.cls.view(1, 1, -1).expand(patches.shape[0], -1, -1)                    # (B,1,C)
        positions = resize_positions(self.positions.view(-1, self.width), self.old_grid, grid)
        return self.start(torch.cat([cls, patches], 1) + positions), grid                 # (B,1+P,C)

    def features(self, image):
        """image (B,3,H,W), CLIP-normalised, at full size -> Pyramid."""
        x, grid = self.embed(image)
        maps = []
        for start, stop in zip((0,) + self.depths, self.depths):
            x = self.run(self.blocks[start:stop], x, grid)
            patches = x[:, 1:]                                                            # (B,P,C)
            maps.append(patches.transpose(1, 2).unflatten(2, grid))                       # (B,C,h,w)
        return Pyramid(maps, x, grid)

    def project(self, x):
        """Tokens (B,T,C) after the last block -> the joint space (B,T,E), unit length."""
        return F.normalize(self.head(x), dim=-1)

    def recognise(self, pyramid, bias):
        """bias (B,heads,Q,hb,wb) on any grid -> (B,Q,E) unit: what each copy of the cls token saw through its bias."""
        Q = bias.shape[2]
        copies = pyramid.tokens[:, :1].expand(-1, Q, -1)                                  # (B,Q,C)
        x = torch.cat([pyramid.tokens, copies], 1)                                        # (B,1+P+Q,C)
        mask = recognition_mask(bias, pyramid.grid).to(x.dtype)
        x = self.run(self.blocks[self.depths[-1]:], x, pyramid.grid, mask)
        return self.project(x[:, -Q:])

    def dense(self, image):
        """MaskCLIP: every patch named by the last block's value path alone. image (B,3,H,W) -> (B,E,h,w) unit."""
        pyramid = self.features(image)
        x = self.run(self.blocks[self.depths[-1]:-1], pyramid.tokens, pyramid.grid)
        values = self.values(self.blocks[-1], x)                                          # (B,1+P,C)
        named = self.project(values[:, 1:])                                               # (B,P,E)
        return named.transpose(1, 2).unflatten(2, pyramid.grid)

    def tower(self):
        """The text tower's parameters, name -> tensor."""
        return {name: p for name, p in self.model.named_parameters() if not name.startswith(("visual.", "logit_"))}

    def text_key(self, names):
        """A checksum of all the embeddings of `names` depend on: weights, what modules tell beside them, templates."""
        blocks, marks = self.text.transformer.resblocks, [(p.data_ptr(), p._version) for p in self.tower().values()]
        if marks != self.marks:                               # once for each state of its weights: .15 s of ViT-B/16's
            self.marks, self.checksum = marks, tensors_checksum(self.tower())
        told = [repr(blocks), blocks[0].attn.num_heads, type(self.tokenizer).__name__, self.tokenizer.context_length]
        return hashlib.sha256(json.dumps([self.checksum, told, TEMPLATES, names]).encode()).hexdigest()

    def text_rows(self, names, bar=False):
        """names (L strings) -> (L,E) unit: per name the mean over the templates of unit embeddings, renormalised."""
        rows = []                                             # a name at a time: 847 names * 14 do not fit in one batch
        for name in tqdm(names, desc="embedding names", unit="name", leave=False, disable=not bar):
            tokens = self.tokenizer([template.format(name) for template in TEMPLATES])
            sentences = self.model.encode_text(tokens.to(self.positions.device), normalize=True)          # (14,E)
            rows.append(sentences.mean(0))
        return F.normalize(torch.stack(rows), dim=-1)

    @torch.no_grad()
    def embed_text(self, names):
        """names (L strings) -> (L,E) unit: `text_rows`, the last KEPT lists in memory, all on disk unless the tower is small."""
        names, device = tuple(names), self.positions.device
        key = self.text_key(names)
        if (key, device) not in self.cache:
            for oldest in list(self.cache)[:1 - KEPT]:        # whoever asks for other words all day
                del self.cache[oldest]
            if sum(p.numel() for p in self.tower().values()) < SMALL_TOWER:
                rows = self.text_rows(names)
            else:
                from published.text_cache import kept
                rows = kept(key, (len(names), self.text_width), lambda: self.text_rows(names, bar=True))
            self.cache[key, device] = rows.to(device)
        return self.cache[key, device]


class OpenAIViT(VLM):
    """OpenAI's ViT as open_clip builds it, the world's CLIP among them: learned positions, a norm before block 1."""

    patch = property(lambda self: self.model.visual.conv1)
    start = property(lambda self: self.model.visual.ln_pre)
    cls = property(lambda self: self.model.visual.class_embedding)
    positions = property(lambda self: self.model.visual.positional_embedding)             # (1+P,C)
    old_grid = property(lambda self: self.model.visual.grid_size[0])
    blocks = property(lambda self: self.model.visual.transformer.resblocks)
    text = property(lambda self: self.model)

    def run(self, blocks, x, grid, mask=None):
        """Run tokens (B,1+P[+Q],C) through blocks; `mask` (B,heads,T,T) is additive."""
        for block in blocks:
            x = block(x, attn_mask=None if mask is None else mask.flatten(0, 1))
        return x

    def values(self, block, x):
        attn = block.attn                                     # queries, keys and values are the thirds of one matrix
        weight, bias = attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]
        return attn.out_proj(F.linear(block.ln_1(x), weight, bias))

    def head(self, x):
        return self.model.visual.ln_post(x) @ self.model.visual.proj


class EVA(VLM):
    """EVA-02 as timm builds it: learned positions, and rotary ones too: every block turns queries and keys by them."""

    def __init__(self, model, tokenizer, scale, depths=None):
        super().__init__(model, tokenizer, scale, depths)
        theirs = self.trunk.rope                              # knows the size it was made for, no other
        with torch.device("cpu"):                             # computed, never loaded: not even then on "meta"
            self.rope = type(theirs)(theirs.dim, in_pixels=False, ref_feat_shape=theirs.ref_feat_shape)

    trunk = property(lambda self: self.model.visual.trunk)
    patch = property(lambda self: self.trunk.patch_embed.proj)
    start = property(lambda self: self.trunk.norm_pre)                                    # nothing, in EVA-02
    cls = property(lambda self: self.trunk.cls_token)
    positions = property(lambda self: self.trunk.pos_embed)                               # (1,1+P,C)
    old_grid = property(lambda self: self.trunk.patch_embed.grid_size[0])
    blocks = property(lambda self: self.trunk.blocks)
    text = property(lambda self: self.model.text)

    def rotation(self, grid, copies):
        """Sines, then cosines, of patches and copies (P+Q,2d).  Copies come last, are not rotated: sin 0, cos 1."""
        patches = self.rope.get_embed(shape=grid)                                         # (P,2d)
        zeros = patches.new_zeros(copies, patches.shape[1] // 2)
        still = torch.cat([zeros, zeros + 1], 1)                                          # (Q,2d)
        return torch.cat([patches, still])

    def run(self, blocks, x, grid, mask=None):
        copies = x.shape[1] - 1 - grid[0] * grid[1]
        rotation = self.rotation(grid, copies)                # cls has none: timm leaves the first token as it is
        for block in blocks:
            x = block(x, rope=rotation, attn_mask=mask)
        return x

    def values(self, block, x):
        values = block.attn.v_proj(block.norm1(x))
        return block.attn.proj(block.attn.norm(values))

    def head(self, x):
        return self.trunk.head(self.trunk.fc_norm(self.trunk.norm(x)))


def wrap(model, tokenizer, scale, depths=None):
    """The VLM of its family around a model of open_clip's."""
    family = EVA if hasattr(model.visual, "trunk") else OpenAIViT
    return family(model, tokenizer, scale, depths)


def load_vlm(name, pretrained, *, scale, depths=None):
    """The CLIP called `name`, "world" or one of open_clip's; weights from a tag, a local file, or "none": random."""
    if name == "world":
        from world.clip import open_model
    else:
        from published.weights import open_model
    return wrap(*open_model(name, pretrained), scale, depths)


if __name__ == "__main__":
    from data import rng_for, to_tensor
    from world.scenes import OBJECTS, scene
    vlm = load_vlm("world", "world", scale=1.0, depths=(0, 1, 2, 3))
    drawn = scene(rng_for(0, 0), objects=(1, 1), stuffs=(1, 1))
    pyramid, anywhere = vlm.features(to_tensor(drawn.image)[None]), torch.zeros(1, vlm.heads, 1, 8, 8)
    cosines = vlm.embed_text(OBJECTS) @ vlm.recognise(pyramid, anywhere)[0, 0]        # (L)
    shown, said = OBJECTS[drawn.things[0][0]], OBJECTS[cosines.argmax()]
    print(f"drawn: {shown} on {drawn.grounds[0]}; of {len(OBJECTS)} names: {said}")
