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
# ours: the world's tiny CLIP, trained by `python clip.py --pretrain` and shipped as world_clip.safetensors;
#       `python clip.py` prints its zero-shot accuracy.

Tests: tests/test_clip.py.  Read next: san.py.  B, H, W, C, Q, L: see hsattn.py; E the width of the joint space.
"""

import difflib
import hashlib
import json
import math
import os
import pickle
import sys
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_to_custom_text_state_dict
from open_clip.transformer import QuickGELU
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import RotaryEmbeddingCat
from torch import nn
from tqdm import tqdm

from images import MEAN, STD, InputError, rng_for, run_cli
from world import OBJECTS, TEXTURES, scene

WORLD_WEIGHTS = Path(__file__).parent / "world_clip.safetensors"
TESTED = ("ViT-B-16", "ViT-L-14-336", "EVA02-B-16", "EVA02-L-14-336")
TEMPLATES = (                                          # SAN's 14 sentences (`vild`), punctuation as published
    "a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene", "There is the {} in the scene",
    "a photo of a {} in the scene", "a photo of a small {}.", "a photo of a medium {}.", "a photo of a large {}.",
    "This is a photo of a small {}.", "This is a photo of a medium {}.", "This is a photo of a large {}.",
    "There is a small {} in the scene.", "There is a medium {} in the scene.", "There is a large {} in the scene.")
CLS_BLOCK = -100.0                                            # copy -> cls: as good as -inf, and finite like SAN's


def world_clip(image_size=64):
    """The world's CLIP: patch 8, width 128, 6 blocks; text width 64, 2 blocks, 24 words; joint space 64."""
    return open_clip.CLIP(64, CLIPVisionCfg(image_size=image_size, patch_size=8, width=128, layers=6, head_width=32),
                          CLIPTextCfg(context_length=24, width=64, heads=2, layers=2))


def resize_positions(positions, old, new):
    """Position embedding (1+old², C), cls first, bicubically on a new grid (h,w) -> (1+h*w, C)."""
    if (old, old) == tuple(new):
        return positions
    grid = positions[1:].unflatten(0, (old, old)).permute(2, 0, 1)[None]                  # (1,C,old,old)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


def recognition_mask(bias, grid):
    """The additive mask of `recognise`, drawn in the header.

    bias (B,heads,Q,hb,wb) is adaptively max-pooled to CLIP's grid (h,w) -> (B,heads,1+P+Q,1+P+Q), order cls, patches,
    copies.
    """
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
    """maps: four (B,C,h,w) at depths 0, 1/4, 1/2, 3/4; tokens (B,1+P,C) at depth 3/4, cls first; grid (h,w)."""

    maps: list
    tokens: torch.Tensor
    grid: tuple


class VLM(nn.Module):
    """One interface over open_clip's ViT and timm's EVA; see the header.

    `scale`: CLIP sees the image at this fraction of its size.  `depths`: after how many blocks to keep a map, four
    numbers starting with 0; by default quarters of the number of blocks.
    """

    def __init__(self, model, tokenizer, scale, depths=None):
        super().__init__()
        self.model, self.tokenizer, self.scale, self.cache = model, tokenizer, scale, {}
        visual = self.model.visual
        self.eva = hasattr(visual, "trunk")
        self.width = self.positions.shape[-1]
        self.heads = self.blocks[0].attn.num_heads
        self.old_grid = (visual.trunk.patch_embed if self.eva else visual).grid_size[0]
        self.rope = None
        if self.eva:                                          # timm's own knows the size it was made for, no other
            rope = visual.trunk.rope
            with torch.device("cpu"):                         # computed, never loaded: not even then on "meta"
                self.rope = RotaryEmbeddingCat(rope.dim, in_pixels=False, ref_feat_shape=rope.ref_feat_shape)
        projection = self.text.text_projection
        self.text_width = projection.shape[-1] if torch.is_tensor(projection) else projection.out_features
        quarter = len(self.blocks) // 4
        self.depths = tuple(depths) if depths else (0, quarter, 2 * quarter, 3 * quarter)
        self.requires_grad_(False)
        self.positions.requires_grad_(True)

    @property
    def blocks(self):
        return self.model.visual.trunk.blocks if self.eva else self.model.visual.transformer.resblocks

    @property
    def positions(self):
        """The one part of CLIP that is trained: (1+P,C), with EVA (1,1+P,C)."""
        return self.model.visual.trunk.pos_embed if self.eva else self.model.visual.positional_embedding

    @property
    def text(self):
        """The module that holds the text tower: EVA keeps it apart."""
        return getattr(self.model, "text", self.model)

    @property
    def logit_scale(self):
        return self.model.logit_scale.exp()

    def run(self, blocks, x, grid, mask=None):
        """Run tokens (B,1+P[+Q],C) through blocks; `mask` (B,heads,T,T) is additive."""
        if not self.eva:
            for block in blocks:
                x = block(x, attn_mask=None if mask is None else mask.flatten(0, 1))
            return x
        rope = self.rope.get_embed(shape=grid)                # (P,2d): sines, then cosines
        extra = x.shape[1] - 1 - len(rope)                    # the copies come last and are not rotated: sin 0, cos 1
        still = torch.cat([rope.new_zeros(extra, rope.shape[1] // 2), rope.new_ones(extra, rope.shape[1] // 2)], 1)
        rope = torch.cat([rope, still])
        for block in blocks:
            x = block(x, rope=rope, attn_mask=mask)
        return x

    def features(self, image):
        """image (B,3,H,W), CLIP-normalised, at full size -> Pyramid.  H and W times `scale` are rounded down."""
        if self.scale != 1:
            image = F.interpolate(image, scale_factor=self.scale, mode="bilinear", align_corners=False)
        visual = self.model.visual
        x = visual.trunk.patch_embed.proj(image) if self.eva else visual.conv1(image)     # (B,C,h,w)
        grid = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        cls = visual.trunk.cls_token if self.eva else visual.class_embedding
        x = torch.cat([cls.view(1, 1, -1).expand(x.shape[0], -1, -1), x], 1)              # (B,1+P,C)
        x = x + resize_positions(self.positions.view(-1, self.width), self.old_grid, grid)
        if not self.eva:
            x = visual.ln_pre(x)
        maps = []
        for start, stop in zip((0,) + self.depths, self.depths):
            x = self.run(self.blocks[start:stop], x, grid)
            maps.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))                      # (B,C,h,w)
        return Pyramid(maps, x, grid)

    def keep_features(self):
        """Drop, for good, what `features` does not use: the text tower, all blocks after the last depth, projections."""
        visual, self.model, self.tokenizer = self.model.visual, nn.Module(), None
        self.model.visual = visual
        if self.eva:
            trunk = visual.trunk
            trunk.blocks = trunk.blocks[:self.depths[-1]]
            trunk.rope, trunk.norm, trunk.fc_norm, trunk.head, visual.head = None, None, None, None, None
        else:
            visual.transformer.resblocks = visual.transformer.resblocks[:self.depths[-1]]
            visual.ln_post, visual.proj = None, None

    def project(self, x):
        """Tokens (B,T,C) after the last block -> the joint space (B,T,E), unit length."""
        if self.eva:
            trunk = self.model.visual.trunk
            x = trunk.head(trunk.fc_norm(trunk.norm(x)))
        else:
            x = self.model.visual.ln_post(x) @ self.model.visual.proj
        return F.normalize(x, dim=-1)

    def recognise(self, pyramid, bias):
        """bias (B,heads,Q,hb,wb) on any grid -> (B,Q,E) unit: what each copy of the cls token saw through its bias."""
        Q = bias.shape[2]
        copies = pyramid.tokens[:, :1].expand(-1, Q, -1)                                  # (B,Q,C)
        x = torch.cat([pyramid.tokens, copies], 1)
        mask = recognition_mask(bias, pyramid.grid).to(x.dtype)
        x = self.run(self.blocks[self.depths[-1]:], x, pyramid.grid, mask)
        return self.project(x[:, -Q:])

    def dense(self, image):
        """MaskCLIP: every patch named by the last block's value path alone. image (B,3,H,W) -> (B,E,h,w) unit."""
        pyramid = self.features(image)
        x = self.run(self.blocks[self.depths[-1]:-1], pyramid.tokens, pyramid.grid)
        last = self.blocks[-1]
        if self.eva:
            attn, y = last.attn, last.norm1(x)
            v = attn.v_proj(y) if attn.qkv is None else F.linear(y, attn.qkv.weight.chunk(3)[2], attn.v_bias)
            x = attn.proj(attn.norm(v))
        else:
            attn = last.attn
            v = F.linear(last.ln_1(x), attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2])
            x = attn.out_proj(v)
        return self.project(x[:, 1:]).transpose(1, 2).unflatten(2, pyramid.grid)

    def tower(self):
        """The text tower's parameters, name -> tensor."""
        return {name: p for name, p in self.model.named_parameters() if not name.startswith(("visual.", "logit_"))}

    def text_key(self, names):
        """A checksum of all that the embeddings of `names`, in this order, depend on.

        The text tower's weights, what is not in them (activation, heads, sentence length) as the modules tell it, and
        the templates.
        """
        blocks = self.text.transformer.resblocks
        told = [repr(blocks), blocks[0].attn.num_heads, type(self.tokenizer).__name__, self.tokenizer.context_length]
        return hashlib.sha256(json.dumps([checksum(self.tower()), told, TEMPLATES, names]).encode()).hexdigest()

    @torch.no_grad()
    def embed_text(self, names):
        """names (L strings) -> (L,E) unit: per name the mean over the templates of unit embeddings, renormalised.

        Embedded once: kept in memory, and on disk unless the tower is small, under `text_key`.
        """
        names, device = tuple(names), self.positions.device
        key = self.text_key(names)
        if (key, device) not in self.cache:
            keep = sum(p.numel() for p in self.tower().values()) >= SMALL_TOWER
            rows = read_cached(cached_file(key), (len(names), self.text_width)) if keep else None
            if rows is None:
                rows = []                                     # a name at a time: 847 names * 14 do not fit in one batch
                for name in tqdm(names, desc="embedding names", unit="name", leave=False, disable=not keep):
                    tokens = self.tokenizer([template.format(name) for template in TEMPLATES])
                    rows.append(self.model.encode_text(tokens.to(device), normalize=True).mean(0))
                rows = F.normalize(torch.stack(rows), dim=-1)
                if keep:
                    write_cached(cached_file(key), rows.cpu())
            self.cache[key, device] = rows.to(device)
        return self.cache[key, device]


def reason(error):
    """An exception in a few words: its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


# --- text embeddings on disk ----------------------------------------------------------------------------------------

SMALL_TOWER = 10_000_000               # parameters; a smaller text tower, such as the world's, is not worth a file


def checksum(tensors):
    """sha256 over names, dtypes, shapes and bytes of a dict of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def cached_file(key):
    """Where the embeddings with this checksum are kept: below $PAT_CACHE, or ~/.cache/pat."""
    return Path(os.environ.get("PAT_CACHE") or Path.home() / ".cache" / "pat") / f"text-{key}.safetensors"


def read_cached(path, shape):
    """The embeddings at `path`, or None if there are none, or, saying so, if they are damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            rows, stored = file.get_tensor("embeddings"), (file.metadata() or {}).get("sha256")
        if tuple(rows.shape) == shape and stored == checksum({"embeddings": rows}):
            return rows
        why = "its content is not what was written"
    except Exception as error:                                # safetensors and the file system each have their own
        why = reason(error)
    print(f"{path}: damaged ({why}); the names are embedded again", file=sys.stderr)
    return None


def write_cached(path, rows):
    """Keep embeddings at `path`, atomically; where that cannot be done, say so and go on."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": rows}, temporary, {"sha256": checksum({"embeddings": rows})})
        os.replace(temporary, path)
    except Exception as error:                                # safetensors wraps the file system's
        with suppress(OSError):
            temporary.unlink()
        print(f"{path.parent}: cannot be written ({reason(error)}); the names' embeddings are not "
              "kept: set PAT_CACHE to a folder that can", file=sys.stderr)


# --- weights from tags and files --------------------------------------------------------------------------------------


def load_pickle(path):
    """What torch.save wrote to `path`, on the CPU.  Raises InputError; never runs code that the file may carry."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: is no checkpoint, or holds Python objects beside tensors, whose loading could run "
                         "code; if you trust it, save its tensors alone with torch.save or safetensors") from error
    except Exception as error:                                # zip, legacy tar and file system each have their own
        raise InputError(f"{path}: cannot be read ({reason(error)}); it may be truncated: "
                         "copy it again") from error


def read_weights(path):
    """A CLIP's state dict, name -> tensor, from .safetensors, from a pickled one, or from OpenAI's TorchScript archive.

    Raises InputError when the file is none of these, is damaged, or holds code.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif zipfile.is_zipfile(path) and any("/constants.pkl" in name for name in zipfile.ZipFile(path).namelist()):
            with warnings.catch_warnings(action="ignore"):    # torch would rather we used torch.export
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = load_pickle(path)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); it may be truncated: "
                         "copy it again") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{path}: holds no state dict; give the weights in open_clip's layout, name by name")
    numbers = ("input_resolution", "context_length", "vocab_size")                        # of OpenAI's archives
    return {name.removeprefix("module."): value for name, value in state.items() if name not in numbers}


def differences(own, given, most=30):
    """What keeps the state dict `given` from fitting `own`: the first `most` entries of each kind; "" if it fits."""
    wrong = {"missing": own.keys() - given.keys(), "unknown": given.keys() - own.keys(),
             "of another shape": [f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
                                  for name in own.keys() & given.keys() if own[name].shape != given[name].shape]}
    return "; ".join(f"{len(names)} {what}: {', '.join(sorted(names)[:most])}" +
                     (f" and {len(names) - most} more" if len(names) > most else "")
                     for what, names in wrong.items() if names)


def is_ours(config):
    """Whether an open_clip config is a plain ViT with a cls token or a EVA-02, beside CLIP's own text tower."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    plain = set(vision) <= {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
    eva = vision.get("timm_model_name", "").startswith(("eva02_base", "eva02_large"))
    own_text = not any(key.startswith("hf_") for key in text) and "multimodal_cfg" not in config
    return own_text and (eva or plain and isinstance(vision["layers"], int))


def find_weights(name, pretrained, tags):
    """(state dict or None, whether it wants quick-GELU, or None if nobody knows) of what `open_model` is given."""
    if pretrained == "none":
        return None, "openai" in tags
    if Path(pretrained).suffix or os.sep in pretrained or Path(pretrained).is_file():
        if not Path(pretrained).is_file():
            raise InputError(f"{pretrained}: no such file; give a checkpoint of {name}, an open_clip tag, or none")
        state = read_weights(Path(pretrained))
        proj = state.get("visual.proj", torch.empty(0))
        theirs = torch.equal(proj.half().to(proj.dtype), proj)
        return state, (True if theirs else None) if "openai" in tags else False
    if not open_clip.is_pretrained_cfg(name, pretrained):
        close = difflib.get_close_matches(pretrained, [*tags, "none"], 1, cutoff=0)[0]
        raise InputError(f"{name} has no weights called {pretrained!r}; did you mean {close!r}? There are "
                         f"{', '.join(tags)}, a local file, and none")
    weights = open_clip.get_pretrained_cfg(name, pretrained)
    try:
        path = open_clip.download_pretrained(weights)
    except Exception as error:                                # whatever the network raised
        raise InputError(f"weights {pretrained!r} of {name} are neither here nor can they be downloaded "
                         f"({reason(error)}); where there is no network, give a file: "
                         "--pretrained FILE") from error
    return read_weights(Path(path)), weights.get("quick_gelu", False)


def open_model(name, pretrained):
    """(model, tokenizer) of an open_clip name and a tag, a local file, or "none" (random weights).

    The activation is not in the weights.  A tag knows its own; a file or "none" is taken for OpenAI's, quick-GELU,
    where OpenAI published that model, and NAME-gelu or NAME-quickgelu says otherwise.  OpenAI's matrices are half
    precision, so a file whose projection does not survive fp16 is not theirs, and then the name must say it.  With a
    file nothing asks for a network.  Raises InputError: unknown name or tag, weights that cannot be had or do not fit.
    """
    if name == "world":
        model, tokenizer = world_clip(), open_clip.SimpleTokenizer(context_length=24)
        if pretrained != "none":
            path = WORLD_WEIGHTS if pretrained == "world" else Path(pretrained)
            try:
                model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
            except Exception as error:
                raise InputError(f"{path}: not the weights of the world's CLIP ({str(error).splitlines()[0]}); "
                                 "train them with `python clip.py --pretrain`") from error
        return model, tokenizer
    base = name.removesuffix("-quickgelu").removesuffix("-gelu")
    config = open_clip.get_model_config(base)
    if config is None:
        close = difflib.get_close_matches(base, open_clip.list_models(), 1)
        raise InputError(f"no VLM is called {name!r}; " + (f"did you mean {close[0]}?" if close else
                                                           f"try world, {', '.join(TESTED)}"))
    if not is_ours(config):
        raise InputError(f"{name}: only ViTs with a cls token and EVA02 base or large work here, with CLIP's own text "
                         f"tower; try {', '.join(TESTED)}")
    tags = open_clip.list_pretrained_tags_by_model(base)
    state, quick = find_weights(base, pretrained, tags)
    quick = name.endswith("-quickgelu") if base != name else quick
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = kind(**{**config, "quick_gelu": bool(quick)})
    if state is not None:
        own = model.state_dict()
        if "positional_embedding" in state and "positional_embedding" not in own:
            state = convert_to_custom_text_state_dict(state)  # an older layout of models with a text tower apart
        wrong = differences(own, state, most=5)
        if wrong:
            raise InputError(f"{pretrained}: not weights of {name} in open_clip's layout: {wrong}")
        if quick is None:
            raise InputError(f"{pretrained}: not OpenAI's weights, and a file does not say which activation it was "
                             f"trained with; name it: --vlm {name}-gelu or --vlm {name}-quickgelu")
        model.load_state_dict(state)
    return model, open_clip.get_tokenizer(base)


def with_activation(name, vlm):
    """The name by which `open_model` needs no weights to know the activation: ViT-B-16 -> ViT-B-16-quickgelu."""
    if name == "world" or vlm.eva:                            # these come with one only
        return name
    base = name.removesuffix("-quickgelu").removesuffix("-gelu")
    return base + ("-quickgelu" if isinstance(vlm.blocks[0].mlp.gelu, QuickGELU) else "-gelu")


# --- training the world's CLIP: `python clip.py --pretrain` --------------------------------------------------------


def captions(things, grounds, grain):
    """The names that are true of a scene at one grain; a scene without objects falls back to its stuffs."""
    objects = [OBJECTS[kind] for kind, _ in things]
    return {"names": objects + grounds, "objects": objects, "stuffs": grounds,
            "textured": [f"{TEXTURES[texture]} {OBJECTS[kind]}" for kind, texture in things],
            "colours": [name.split()[0] for name in objects],
            "shapes": [name.split()[1] for name in objects]}[grain] or grounds


def pretrain_batch(step, n, size, seed):
    """Images (n,3,size,size), the batch's captions, and which caption is true of which image (n,captions).

    One grain of caption a batch: mixed grains punish "red star" for not being "star".  32 pixels: a single object.
    64 pixels: one third single objects, two thirds scenes of up to four.
    """
    rng = rng_for(seed, 77, step, size)
    grain = rng.choice(["names", "objects", "textured", "colours", "shapes", "stuffs"], p=[.35, .35, .1, .06, .08, .06])
    template = (TEMPLATES + ("{}",) * 3)[rng.integers(len(TEMPLATES) + 3)]
    images, names = [], []
    for i in range(n):
        single = size == 32 or i % 3 == 0
        objects = (1, 1) if single else (i % 3 - 1, 4)
        stuffs = (1, 1 if single else 2)
        image, _, things, grounds = scene(rng_for(seed, 78, step, i, size), size, objects, stuffs=stuffs)
        images.append(torch.from_numpy(image))
        names.append(set(captions(things, grounds, grain)))
    vocabulary = sorted(set().union(*names))
    true = torch.tensor([[float(name in own) for name in vocabulary] for own in names])
    images = torch.stack(images).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return images, [template.format(name) for name in vocabulary], true


def multi_positive(logits, true):
    """Cross-entropy against all true columns alike: logits, true (n,m) -> scalar."""
    return -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()


@torch.no_grad()
def zero_shot(vlm, n, size=64, seed=999):
    """Share of n single-object scenes whose colour+shape name, among 64, is the nearest: (both, colour, shape)."""
    text, hits = vlm.embed_text(OBJECTS), []
    for i in range(n):
        image, _, things, _ = scene(rng_for(seed, i), size, (1, 1), stuffs=(1, 1))
        if things:
            x = (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - torch.tensor(MEAN).view(3, 1, 1))
            x = (x / torch.tensor(STD).view(3, 1, 1))[None]
            said, true = (vlm.model.encode_image(x, normalize=True) @ text.T).argmax().item(), things[0][0]
            hits.append((said == true, said // 8 == true // 8, said % 8 == true % 8))
    return torch.tensor(hits).float().mean(0).tolist()


def pretrain_stage(model, tokenizer, size, steps, n, lr, seed):
    """Train in place.  Muon for the matrices of the blocks (plain AdamW left shape at chance), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))]
    for step in (bar := tqdm(range(steps), desc=f"CLIP at {size}x{size}")):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
        images, sentences, true = pretrain_batch(step, n, size, seed)
        f, t = model.encode_image(images, normalize=True), model.encode_text(tokenizer(sentences), normalize=True)
        logits = model.logit_scale.exp() * f @ t.T                                        # (n,captions)
        loss = (multi_positive(logits, true) + multi_positive(logits.T, true.T)) / 2
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(50))
        bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain(path, seed=0, steps=(2500, 4500)):
    """The recipe: 320k single objects at 32x32, then, the position grid tiled 2x2, 288k scenes at 64x64."""
    torch.manual_seed(seed)
    small, big, tokenizer = world_clip(32), world_clip(64), open_clip.SimpleTokenizer(context_length=24)
    pretrain_stage(small, tokenizer, 32, steps[0], 128, 2e-3, seed)
    state = small.state_dict()
    positions = state["visual.positional_embedding"]                                      # (1+4*4,C)
    tiled = positions[1:].view(4, 4, -1).repeat(2, 2, 1).flatten(0, 1)                    # 8x8: four small pictures
    big.load_state_dict({**state, "visual.positional_embedding": torch.cat([positions[:1], tiled])})
    pretrain_stage(big, tokenizer, 64, steps[1], 64, 1e-3, seed)
    save_file({k: v.half() for k, v in big.state_dict().items()}, path)


def main():
    import argparse

    parser = argparse.ArgumentParser(description="the world's CLIP: zero-shot accuracy, or training it")
    parser.add_argument("--pretrain", action="store_true", help=f"train it and write {WORLD_WEIGHTS.name}")
    if parser.parse_args().pretrain:
        pretrain(WORLD_WEIGHTS)
    both, colour, shape = zero_shot(VLM(*open_model("world", "world"), scale=1.0, depths=(0, 2, 3, 4)), 2048)
    print(f"zero-shot over 64 names, 2,048 single-object scenes: {both:.3f} (colour {colour:.3f}, shape {shape:.3f})")


if __name__ == "__main__":
    run_cli(main)
