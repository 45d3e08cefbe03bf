"""SeNaTra: a backbone that shrinks its maps by clustering them; the clusters are masks, and no head has to find them.

    image ─ patch ─> 32x32 ─ blocks, group ─> 16x16 ─ blocks, group ─> 8x8 ─ blocks, group ─> 4x4 ─ blocks ─> x
                               A_2                     A_3                    A_4                         (B,4,4,C)

Other backbones halve a grid by a fixed stride, whatever the picture shows, and a head then repairs what was lost.  Here
grouping.py halves it, and says of every input to which groups it went: A_2 A_3 A_4 leads from pixels to the 16 final
groups.  So there are masks even after a training that never saw one, and two trainings:

    supervision=names   z̄ = g(mean_j W x_j),  softmax over all names of s z̄ Tᵀ, true ones alike, a grain at a time
                        test: group j takes the name of largest cosine with g(W x_j); A_2 A_3 A_4 tells its pixels
    supervision=masks   l_j = s g(MLP(x_j)) Tᵀ,  o = A_2 A_3 A_4 l on the pixels, cross-entropy with the label
                        test: the same o.  `--init` starts from a run of names

T is CLIP's text (L,E), frozen, s its scale; CLIP is never shown the image.  What supervision=names may know is
`Captions`: images and the words that are true of them, "striped boat", "striped", "boat", "water"; no label map.

64x64 world: patch 2, widths 24..192, 16 groups, 1,576,788 parameters.   T at 640: patch 4, 64..512, 400 groups, 29.7 M.

# paper: four stages, local and then global attention, RoPE, both trainings and how each is read (arXiv 2505.16993).  It
# has no code: all this from others' summaries of it, widths and depths of T, B, L from unofficial tables that agree.
# ours: windows of 8x8 (the world: 4x4), shifted in every second block, for neighbourhood attention; the text frozen, so
# no in-batch negatives; the world's sizes; a native head that scores text, where the paper's has a list of classes.

Demo: `python -m siblings.senatra` counts parameters, `--pretrain` trains for an hour.  Pictures: studies/groups.py.
Tests: tests/siblings/test_senatra.py, and tests/test_segmenter.py as for every model.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cli import InputError, check_device, choice, number, parse_flags, run_cli, write_files
from clip import CLIPConfig, load_vlm
from data import IGNORE, rng_for, to_tensor
from san import MLP, FeedForward, SelfAttn, check_heads, trainable
from segmenter import VLMS, Answer, Segmenter, identity
from siblings.grouping import Grouping, Uniform, compose, shares
from siblings.windows import from_windows, to_windows
from world.scenes import NOUNS, OBJECTS, RADIUS, SEEN, TEXTURES, WORLD_NAMES, World, scene

CAPTION = 79                           # the word in a key of Captions: see data.py's, and 77, 78 of world/pretrain.py
TERMS = dict(names=("names", "textures", "nouns"), masks=("pixels",))                     # of each supervision
WATCHED = dict(groups="groups", **{f"sharp {k}": f"sharp_{k}" for k in (2, 3, 4)})        # logged, weight 0
SIZES = dict(                          # the paper's three, its depths from unofficial tables, and the world's
    T=dict(widths=(64, 128, 256, 512), mlp_ratio=3), B=dict(widths=(128, 256, 512, 1024), mlp_ratio=2),
    L=dict(widths=(192, 384, 768, 1536), mlp_ratio=2),
    world=dict(widths=(24, 48, 96, 192), blocks=(1, 1, 3, 2), head_dim=24, patch=2, window=4, native_hidden=192,
               supervision="names", switch=25_600))           # window: the paper's 7 of 56, 28, 14 is 4 of 32, 16, 8
SIZE_OF = {"world": "world", "coco": "T", "coco-eva": "B", "coco-large": "L", "coco-eva-large": "L"}
HOUR = 6                               # how often ten minutes are in what `--pretrain` takes


@dataclass
class SeNaTraConfig:
    """Every number of the model; defaults are T at 640 pixels."""

    clip: CLIPConfig = field(default_factory=CLIPConfig)  # of which only the text tower is used
    widths: tuple = number((64, 128, 256, 512), 1, 16384, 4)  # of the four stages
    blocks: tuple = number((3, 4, 18, 5), 1, 256, 4)  # in each stage
    head_dim: int = number(32, 4, 1024)         # of attention, a multiple of 4: rows and columns, sines and cosines
    mlp_ratio: int = number(3, 1, 64)           # of the blocks; B and L: 2
    patch: int = number(4, 1, 256)              # pixels
    window: int = number(8, 1, 256)             # cells a side; the last stage is global
    rounds: int = number(3, 1, 64)              # of a grouping layer (paper)
    uniform: tuple = number((), 2, 4)           # which groupings, of 2, 3 and 4, are bilinear instead (Table 3a)
    dense_last: bool = True                     # the last grouping sees all groups, else 3x3 as the others
    rel_bias: bool = True                       # B_rel
    group_init: str = choice("conv", "embedding")  # embedding: learned seeds, which do not look at the image
    group_update: str = choice("skip", "gru")   # gru: Slot Attention's
    supervision: str = choice("masks", "names")  # names: of whole images, no mask is ever seen
    captions: str = choice("all", "seen")       # names that supervision=names reads of; seen: those with masks
    switch: int = number(0, 0, 10**9)           # its first sample of 64x64, those before are 32x32; a multiple of the batch
    native_hidden: int = number(512, 1, 16384)  # of the head of supervision=masks
    soft: bool = False                          # supervision=names: a group votes for all names by softmax, not for its best


# --- image-level names ----------------------------------------------------------------------------------------------
class Captions:
    """Scenes and the words that are true of them, all that supervision=names may know: no label map leaves this class.

    `grains`: whole names, textures, nouns.  Scenes show all 64 objects, as a model trained on the web has read of all,
    or those that training has masks of.  The first `switch` are 32x32, one object on one stuff; every third of the others
    shows no more, the rest as many as World's.
    """

    def __init__(self, captions, switch=0):
        ids = range(len(WORLD_NAMES)) if captions == "all" else World.train_ids
        self.classes, self.switch = range(len(OBJECTS)) if captions == "all" else SEEN, switch
        self.grains = tuple(WORLD_NAMES[i] for i in ids), TEXTURES, tuple(NOUNS)
        self.train_names = sum(self.grains, ())                                           # 70 + 4 + 16 strings

    def draw(self, seed, n):
        """Sample n of `seed`: image (3,S,S) normalised, true (90) int64, 1 for those of `train_names` that are true."""
        small = n < self.switch
        single = small or n % 3 == 0
        size, radius = (32, (11, 16)) if small else (64, RADIUS)
        drawn = scene(rng_for(seed, CAPTION, n), size, (1, 1) if single else (n % 3, 3), classes=self.classes,
                      stuffs=(1, 1 if single else 2), radius=radius)
        objects = [OBJECTS[kind] for kind, _ in drawn.things]
        said = {*objects, *drawn.grounds, *(word for name in objects for word in name.split())}
        return to_tensor(drawn.image), torch.tensor([int(name in said) for name in self.train_names])


def name_loss(logits, true):
    """Cross-entropy against all true names alike, mean over images; without a true name it is 0.  (b,n) twice -> ()"""
    weights = true / true.sum(1, keepdim=True).clamp(min=1)
    return -(weights * logits.log_softmax(1)).sum(1).mean()


# --- the blocks between them ----------------------------------------------------------------------------------------
class Attn(SelfAttn):
    """Self-attention that knows how far apart two cells are: queries and keys are turned by their places (RoPE)."""

    def forward(self, x, grid, mask=None):
        """x (B,T,S), the T cells of a grid -> (B,T,S)"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # each (B,heads,T,d)
        from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed               # here: it loads as long as torch
        turn = build_rotary_pos_embed(grid, dim=q.shape[-1], in_pixels=False, device=x.device)
        q, k = (apply_rot_embed_cat(x, torch.cat(turn, -1)) for x in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class WindowBlock(nn.Module):
    """Pre-norm transformer block on a map; attention within windows; global on maps no larger than one, and for 0."""

    def __init__(self, width, heads, ratio, window, shift):
        super().__init__()
        self.norm1, self.attn, self.window, self.shift = nn.LayerNorm(width), Attn(width, heads), window, shift
        self.norm2, self.mlp = nn.LayerNorm(width), FeedForward(width, ratio)

    def attend(self, x):
        """(B,h,w,S) -> (B,h,w,S)"""
        grid = tuple(x.shape[1:3])
        if not self.window or max(grid) <= self.window:
            return self.attn(x.flatten(1, 2), grid).unflatten(1, grid)
        windows, mask = to_windows(x, self.window, self.shift)                            # (B*n,T,S)
        windows = self.attn(windows, (self.window, self.window), mask)
        return from_windows(windows, grid, self.window, self.shift)

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def watched(chain, grid):
    """Is anything grouped?  How many groups have over 1 % of an image's pixels, mean over images: one is a collapse.
    And per grouping the mean over inputs of max A_ups, from 1/9 or 1/hw, where nobody chooses, to 1."""
    held = shares(chain, grid).argmax(-1).flatten(1)                                      # (b,h1*w1), whose a pixel is
    sizes = torch.stack([index.bincount(minlength=grid[0] * grid[1]) for index in held])  # (b,N) pixels
    used = (sizes > 0.01 * held.shape[1]).sum(1).double().mean()
    return dict(groups=used, **{f"sharp_{k}": A.amax(-1).mean() for k, A in enumerate(chain, 2)})


# --- the model ------------------------------------------------------------------------------------------------------
class SeNaTra(Segmenter):
    """`model(image, text)` -> dict(chain [A_2, A_3, A_4], scores (B,h,w,L) of the groups, whole (B,L) of the image)."""

    Config = SeNaTraConfig
    PRESETS = {name: {**vlm, **SIZES[SIZE_OF[name]]} for name, vlm in VLMS.items()}
    RECIPES = {"world": dict(           # 25,600 scenes of 32x32 and 22,400 of 64x64
        steps=1500, batch=32, lr=2e-3, warmup=100, grad_clip=1.0, weight_decay=0.01, muon=True, save_every=200,
        log_every=20, val_images=1000, workers=0)}            # supervision=masks: steps=2000, batch=8
    ABLATIONS = {"uniform": dict(uniform=(2, 3, 4)), "uniform-2": dict(uniform=(2,)), "uniform-3": dict(uniform=(3,)),
                 "uniform-4": dict(uniform=(4,)), "one-round": dict(rounds=1), "local-last": dict(dense_last=False),
                 "no-rel-bias": dict(rel_bias=False), "embedding-init": dict(group_init="embedding"),
                 "gru": dict(group_update="gru"), "masks": dict(supervision="masks"), "soft": dict(soft=True),
                 "seen-captions": dict(captions="seen")}
    curves = {"cross-entropy": {term: term for terms in TERMS.values() for term in terms},
              "groups in use; mean of max A_ups": WATCHED}

    @classmethod
    def check(cls, c):
        if c.head_dim % 4:
            raise InputError(f"head_dim {c.head_dim}: takes a multiple of 4")
        for width in c.widths:
            check_heads(c.head_dim, width, "head_dim")

    def __init__(self, config):
        super().__init__()
        self.config, c, clip = config, config, config.clip
        self.vlm = load_vlm(clip.vlm, clip.pretrained, scale=clip.clip_scale, depths=clip.depths)
        self.vlm.requires_grad_(False)                        # not even its positions: it never sees an image here
        self.stride, E = 8 * c.patch, self.vlm.text_width
        self.patch, self.norm_patch = nn.Conv2d(3, c.widths[0], c.patch, c.patch), nn.LayerNorm(c.widths[0])
        self.levels = nn.ModuleList(self.level(k) for k in (1, 2, 3, 4))
        self.groupings = nn.ModuleList(self.grouping(k) for k in (2, 3, 4))
        self.norm = nn.LayerNorm(c.widths[-1])
        if c.supervision == "names":
            self.project = nn.Linear(c.widths[-1], E)
        else:
            self.native = MLP(c.widths[-1], c.native_hidden, E, act=F.gelu)
        mine = TERMS[c.supervision]
        self.watch, self.curves = mine[:1], {**self.curves, "cross-entropy": {term: term for term in mine}}

    def level(self, k):
        """The blocks of stage k, 1 to 4: windows, every second block's shifted by half; the last stage global."""
        c, width, window = self.config, self.config.widths[k - 1], self.config.window if k < 4 else 0
        return nn.Sequential(*(WindowBlock(width, width // c.head_dim, c.mlp_ratio, window, window // 2 * (i % 2))
                               for i in range(c.blocks[k - 1])))

    def grouping(self, k):
        """The layer in front of stage k, 2 to 4."""
        c, (width, out) = self.config, self.config.widths[k - 2:k]
        if k in c.uniform:
            return Uniform(width, out)
        side = max(1, c.clip.short_side // (c.patch * 2 ** (k - 1)))
        return Grouping(width, out, dense=k == 4 and c.dense_last, rounds=c.rounds, rel_bias=c.rel_bias,
                        gru=c.group_update == "gru", grid=(side, side) if c.group_init == "embedding" else None)

    def backbone(self, image):
        """image (B,3,H,W) -> the final groups x (B,h,w,C), and the chain [A_2, A_3, A_4]"""
        x, chain = self.norm_patch(self.patch(image).permute(0, 2, 3, 1)), []             # (B,h1,w1,C1)
        for k, blocks in enumerate(self.levels):
            if k:
                x, A = self.groupings[k - 1](x)
                chain.append(A)
            x = blocks(x)
        return self.norm(x), chain

    def forward(self, image, text):
        """image (B,3,H,W) CLIP-normalised, sides multiples of `stride`; text (L,E) unit -> see the class."""
        x, chain = self.backbone(image)
        z = (self.project if self.config.supervision == "names" else self.native)(x).to(text.dtype)       # (B,h,w,E)
        with torch.autocast(z.device.type, enabled=False):                                # bf16 logits step by 1/8
            s = self.vlm.logit_scale
            scores = s * F.normalize(z, dim=-1) @ text.T                                  # (B,h,w,L)
            whole = s * F.normalize(z.flatten(1, 2).mean(1), dim=-1) @ text.T             # (B,L)
        return dict(chain=chain, scores=scores, whole=whole)

    def answer(self, out, b=0):
        """The groups are maps; each has a say on the names: of supervision=names its best name alone, unless `soft`."""
        chain, scores = [A[b:b + 1].float() for A in out["chain"]], out["scores"][b].float()      # (h,w,L)
        maps, mix = shares(chain, scores.shape[:2])[0].permute(2, 0, 1), scores.flatten(0, 1)     # (N,h1,w1), (N,L)
        if self.config.supervision == "names":
            mix = mix.softmax(-1) if self.config.soft else F.one_hot(mix.argmax(-1), mix.shape[-1]).float()
        return Answer(maps, mix=mix, gate=identity)

    @classmethod
    def dataset(cls, run):
        """Captions for supervision=names; masks are the run's own labels."""
        c = run.net
        if c.supervision != "names":
            return None
        if run.data or run.preset != "world":
            raise InputError("supervision names: has captions of the built-in world alone; on a folder, and at another "
                             "preset, --set supervision=masks")
        return Captions(c.captions, c.switch)

    def optimizers(self, groups, recipe):
        """Segmenter's.  Raises InputError for a batch with images of both sizes."""
        if self.config.supervision == "names" and self.config.switch % recipe.batch:
            raise InputError(f"switch {self.config.switch} is no multiple of --batch {recipe.batch}: images of a step "
                             "have one size")
        return super().optimizers(groups, recipe)

    def totals(self, labels):
        """supervision=masks: how many pixels have a label."""
        masks = self.config.supervision == "masks"
        return (labels != IGNORE).sum().double()[None] if masks else super().totals(labels)

    def terms(self, out, batch):
        """What TERMS and WATCHED say.  batch.labels: (b,H,W) of masks, of names the (b,90) of Captions."""
        chain, scores = out["chain"], out["scores"]                                       # (b,h,w,L)
        if self.config.supervision == "names":
            grains = [len(names) for names in Captions(self.config.captions).grains]
            parts = zip(TERMS["names"], out["whole"].split(grains, 1), (batch.labels > 0).split(grains, 1))
            terms = {grain: (1 / len(grains), name_loss(logits, true)) for grain, logits, true in parts}
        else:
            logits = compose(chain, scores.to(chain[0].dtype)).permute(0, 3, 1, 2)                        # (b,L,h1,w1)
            logits = F.interpolate(logits, size=batch.labels.shape[-2:], mode="bilinear")                 # (b,L,H,W)
            ce = F.cross_entropy(logits, batch.labels, ignore_index=IGNORE, reduction="sum")
            terms = dict(pixels=(1.0, ce * batch.parts / batch.totals[0].clamp(min=1)))
        with torch.no_grad():
            return {**terms, **{name: (0.0, value) for name, value in watched(chain, scores.shape[1:3]).items()}}

    def parts(self):
        return {"blocks": list(self.levels), "grouping": list(self.groupings)}


# --- the command ----------------------------------------------------------------------------------------------------
def small_run(run, place):
    """A run directory as small as can be: the weights in fp16, 3.2 MB in the world; no moments, no log."""
    from runs import read_checkpoint, write_checkpoint
    tensors, told = read_checkpoint(run)
    write_files({place / name: (run / name).read_text() for name in ("config.json", "names.txt")})
    half = {name: value.half() for name, value in tensors.items() if name.startswith("model.")}
    write_checkpoint(place, half, step=told["step"], vlm=told["vlm"])


def pretrain(place, seed, device):
    """The hour: HOUR times the world's steps beside `place`, its weights go in it.  Stopped, the command goes on."""
    from train import changed, recipe, train
    if (place / "checkpoint.safetensors").exists():
        raise InputError(f"--out {place}: holds a run already; choose another")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {place}: cannot be made a directory ({error.strerror})") from error
    config, run = recipe("world", "senatra", seed=seed), place.with_name(place.name + "-training")
    steps, switch = HOUR * config.recipe.steps, HOUR * config.run.net.switch
    train(changed(config, steps=steps, switch=switch, out=str(run)), (run / "checkpoint.safetensors").exists(), device)
    small_run(run, place)
    print(f"written: {place / 'checkpoint.safetensors'}; --init {place} starts from it")


def count():
    """Print the parameters of all sizes, over ViT-B/16's text and the world's."""
    from runs import build, preset
    for size, numbers in SIZES.items():
        with torch.device("meta"):
            model = build(preset("world" if size == "world" else "coco", "senatra", pretrained="none", **numbers))
        head = model.project if model.config.supervision == "names" else model.native
        parts = {"patch, blocks": [model.patch, model.norm_patch, model.levels], "grouping": [model.groupings],
                 f"norm, head for {model.config.supervision}": [model.norm, head], "all": [model]}
        print(f"{size:5}  " + ", ".join(f"{part} {sum(map(trainable, modules)):,}" for part, modules in parts.items()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pretrain", action="store_true", help="train in the world for an hour, from names alone")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/senatra-names"),
                        help="run directory of its weights in fp16, for --init (runs/senatra-names)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of every scene (0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parse_flags(parser, argv)
    check_device(args.device)
    if args.pretrain:
        pretrain(args.out, args.seed, args.device)
    else:
        count()


if __name__ == "__main__":
    run_cli(main)
