"""FISA, reconstructed: somebody's masks, frozen; all that is trained is how CLIP names them.

Known are an abstract, captions and two module names: SEVE tells CLIP's image encoder early which names are in question,
SIMO tunes a small part of CLIP.  No equation, layer, recipe or code.  THIS IS A RECONSTRUCTION: what it scores says
nothing of the paper.

    m = generator(image)                        (B,Q,hm,wm)  mask logits of a finished run of SAN or PAT, no gradient
    x = ln_pre([cls; patches] + positions)      (B,1+P,C)    CLIP's own start;  u = Q copies of x's cls (B,Q,C)
    each block of CLIP, over z = [x; u]:
        SEVE   z = z + γ W_o softmax((W_q LN z) (W_k T)ᵀ / √d) W_v T         the first third; T (L,E): the names
        SIMO   q = [W_img LN1 x; W_mask LN1 u];   k, v: CLIP's own, of LN1 x alone
               z = z + W_out softmax(q kᵀ/√d + M) v;   z = z + MLP(LN2 z)
    classes = exp(logit_scale) g(proj(ln_post u)) [T; g(background)]ᵀ       (B,Q,L+1)
    loss    = 2/(BQ) Σ_q w_q CE(classes_q, name_q)      w = 1, or 0.1 where name_q is the background

M is 0 or -inf: the image sees the image, a mask token sees cls and the cells its mask touches, nobody sees a mask token.
So with CLIP's own W and γ = 0 the token of a mask of everything IS CLIP's embedding of the image.  name_q: of the true
region with the smallest dice cost, if below NEAR; masks are settled, so many may show one thing.  With SEVE what is seen
depends on the list of names that is asked for.

World: image (8,3,64,64), x (8,65,128), u (8,20,128), classes (8,20,50); 224,000 trained numbers.

# paper: arXiv 2409.16278: a frozen pre-trained generator; SEVE and SIMO by name.
# ours: all else.  From its kin: mask tokens from block 1 on (Ding et al. 2023, whose MaskCLIP is another than the tables'
#       row, Zhou et al. 2022), queries of their own and many masks to one name (MasQCLIP).

The generator's weights travel in the checkpoint, its shape in config.json: a run stays whole where its generator's is gone.

Tests: tests/siblings/test_fisa.py, and tests/test_segmenter.py as for every model.  What it does: docs/fisa.md.
"""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from clip import CLIPConfig, OpenAIViT, load_vlm, wrap
from cli import InputError, choice, number, tensors_checksum
from losses import CE, NO_OBJECT, generator, match, pairwise_costs, targets
from runs import (CHECKPOINTS, RunConfig, build, changed, filled, fingerprint, flat, load_config, load_weights, model_class, part,
                  read_checkpoint, read_config, trained_state)
from san import SAN, check_heads
from segmenter import VLMS, Segmenter

NEAR = 0.4                             # dice cost below which a mask shows a true region
GAMMA = 0.01                           # what SEVE begins with
POINTS = 12544                         # of an image, at most, where masks are matched one to one
SIMO, ASSIGN = ("image-mask", "image", "mask", "none"), ("dice", "hungarian")


@dataclass
class FISAConfig:
    """Every number and every switch of the model; defaults are for ViT-B/16."""

    clip: CLIPConfig = field(default_factory=CLIPConfig)
    generator: str = ""                         # the finished run, SAN's or PAT's, whose masks are named
    generator_is: str = ""                      # what that run was, as JSON: written when it is opened, never by hand
    seve: bool = True                           # False: CLIP does not know what it is asked for
    seve_blocks: int = number(4, 1, 256)        # the first of CLIP's blocks: a third
    seve_heads: int = number(4, 1, 256)
    simo: str = choice(*SIMO)                   # whose queries are trained
    assign: str = choice(*ASSIGN)               # many masks to one name; hungarian: one to one


# --- the generator ---------------------------------------------------------------------------------------------------


def opened(run):
    """What the finished `run` is: its numbers, flat, its place, and checksums of its weights and of its CLIP.

    Raises InputError for what is no finished run of a model whose masks CLIP names by their attention: SAN, and PAT.
    """
    if not run or not (Path(run) / CHECKPOINTS[0]).is_file():
        raise InputError(f"generator {run or '(none)'}: no finished run there; `python train.py` makes runs/world-pat-0, "
                         "`python train.py --model san` makes runs/world-san-0: give one by --set generator=RUN")
    theirs = load_config(run)
    kind = model_class(theirs.model)
    if not issubclass(kind, SAN):
        raise InputError(f"generator {run}: is a run of {kind.__name__}; FISA takes the masks of SAN or of PAT")
    tensors, metadata = read_checkpoint(run)
    step, steps = int(metadata.get("step", 0)), read_config(run).get("steps", 0)
    if step < steps:
        raise InputError(f"generator {run}: stopped after {step} of {steps} steps; finish it with "
                         f"`python train.py --resume {run}`")
    return {**flat(theirs), "run": str(run), "weights": tensors_checksum(part(tensors, "model."))[:8], "over": metadata.get("vlm")}


def told(config):
    """`generator_is` as `opened` gave it, {} where it is empty or of another run.  Raises InputError if it is no such text."""
    try:
        what = json.loads(config.generator_is or "{}")
        return what if what.get("run") == config.generator else {}
    except (ValueError, AttributeError) as error:
        raise InputError("generator_is: is written by the training itself; leave it out, and give generator=RUN") from error


def network_of(what, vlm):
    """The network of a generator, its numbers still random, over the CLIP `vlm`: the same weights, not a second copy.

    Only the position embedding, which SAN and PAT train, is its own.
    """
    theirs = changed(filled(RunConfig(model_class(what["model"]).Config()), what), pretrained="none")
    if hasattr(theirs.net, "kernels"):
        theirs.net.kernels = "auto"                           # how it was trained binds nobody who only uses it
    model, clip = build(theirs), theirs.net.clip
    shared = {id(p): p for p in vlm.model.parameters() if p is not vlm.positions}
    model.vlm = wrap(deepcopy(vlm.model, shared), vlm.tokenizer, clip.clip_scale, clip.depths)
    return model


def frozen(model):
    """The same model with buffers for trained parameters: no optimiser sees them, and a checkpoint of ours holds them."""
    for name, p in [(name, p) for name, p in model.named_parameters() if p.requires_grad]:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        delattr(module, leaf)
        module.register_buffer(leaf, p.detach())
    return model.eval()


# --- the network -----------------------------------------------------------------------------------------------------


def split(x, heads):
    """(B,T,heads*d) -> (B,heads,T,d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SEVE(nn.Module):
    """Semantics early: every token looks at the names that are asked for, and takes a little of them along."""

    def __init__(self, width, text_width, heads):
        super().__init__()
        inner = width // 4
        check_heads(heads, inner, "seve_heads")
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(text_width, inner), nn.Linear(text_width, inner)
        self.out, self.gamma = nn.Linear(inner, width), nn.Parameter(torch.full((width,), GAMMA))

    def forward(self, z, text):
        """z (B,T,C), text (L,E) -> (B,T,C)"""
        q = split(self.q(self.norm(z)), self.heads)                                       # (B,heads,T,d)
        k, v = (split(linear(text).expand(len(z), -1, -1), self.heads) for linear in (self.k, self.v))    # (B,heads,L,d)
        read = F.scaled_dot_product_attention(q, k, v)                                    # (B,heads,T,d)
        return z + self.gamma * self.out(read.transpose(1, 2).flatten(2))


def visible(masks, grid):
    """Where a mask token may look: masks (B,Q,hm,wm) logits, CLIP's grid (h,w) -> (B,Q,1+P) bool.

    At cls, so that an empty mask sees something, and at every cell in which its mask is above a half somewhere.
    """
    cells = F.adaptive_max_pool2d(masks, grid).flatten(2) > 0                             # (B,Q,P)
    return F.pad(cells, (1, 0), value=True)


@torch.no_grad()
def names_of(masks, label, none, assign, key):
    """Which name each mask of one image shows: masks (Q,h,w) logits, label (H,W) -> (Q) int64, `none` where it shows none.

    key: integers that fix the random points of "hungarian".
    """
    classes, truth = targets(label)                                                       # (M), (M,H,W)
    names = torch.full((len(masks),), none, device=label.device)
    if not len(classes):
        return names
    if assign == "hungarian":                                 # what CLIP says of them is constant: it costs nothing
        points = torch.rand(min(POINTS, label.numel()), 2, generator=generator(*key)).to(masks.device)
        q, m = match(masks, masks.new_zeros(len(masks), none + 1), classes, truth, points)
        names[q.to(names.device)] = classes[m.to(names.device)]
        return names
    logits = F.interpolate(masks[None].float(), size=label.shape, mode="bilinear", align_corners=False)[0]    # (Q,H,W)
    _, dice = pairwise_costs(logits.flatten(1), truth.flatten(1))                         # (Q,M)
    cost, best = dice.min(1)                                                              # (Q)
    return torch.where(cost < NEAR, classes[best], names)


class FISA(Segmenter):
    """`model(image, text)` -> dict(masks=[(B,Q,h,w)], classes=[(B,Q,L+1)]): the generator's masks, and our names."""

    Config = FISAConfig
    PRESETS = {name: {**vlm, "generator": f"runs/{name}-pat-0", "seve_blocks": 8 if "large" in name else 4}
               for name, vlm in VLMS.items()}
    PRESETS["world"]["seve_blocks"] = 2
    RECIPES = {name: dict(steps=10_000, batch=8, weight_decay=0.05) for name in VLMS}     # MasQCLIP's length
    RECIPES["world"] = {**SAN.RECIPES["world"], "lr": 3e-4, "muon": False, "warmup": 50}
    ABLATIONS = {
        "no-seve": dict(seve=False), "seve-1-block": dict(seve_blocks=1), "simo-mask": dict(simo="mask"),
        "simo-image": dict(simo="image"), "no-simo": dict(simo="none"), "hungarian": dict(assign="hungarian"),
        "untrained": dict(seve=False, simo="none")}           # CLIP as it is: only the background is trained
    watch = ("ce", "named")
    curves = {"names of the masks": {"cross-entropy": "ce", "share with a name": "named"}}

    @classmethod
    def check(cls, c):
        told(c)

    def __init__(self, config):
        super().__init__()
        self.config, clip = config, config.clip
        self.vlm = load_vlm(clip.vlm, clip.pretrained, scale=clip.clip_scale, depths=clip.depths)
        if not isinstance(self.vlm, OpenAIViT):
            raise InputError(f"vlm {clip.vlm}: FISA reads the blocks of OpenAI's ViTs; EVA's have other parts")
        blocks, width, E = self.vlm.blocks, self.vlm.width, self.vlm.text_width
        if config.seve and config.seve_blocks > len(blocks):
            raise InputError(f"seve_blocks {config.seve_blocks}: {clip.vlm} has {len(blocks)} blocks")
        what, generator = self.find_generator()
        self.generators = nn.ModuleDict({what["weights"]: generator})     # so that no other's numbers fit a checkpoint
        config.generator_is = json.dumps(what)                # and config.json says what the checkpoint holds
        self.stride = generator.stride                        # inputs are padded to a multiple, as the generator's
        self.vlm.requires_grad_(False)                        # its positions too
        self.seve = nn.ModuleList(SEVE(width, E, config.seve_heads) for _ in range(config.seve_blocks * config.seve))
        self.queries = nn.ModuleDict({kind: nn.ModuleList(nn.Linear(width, width) for _ in blocks)        # SIMO's W
                                      for kind in config.simo.split("-") if kind != "none"})
        self.background = nn.Parameter(torch.randn(1, E) * E ** -0.5)
        self.reset(GAMMA)

    generator = property(lambda self: next(iter(self.generators.values())))

    def find_generator(self):
        """(what the generator is, its frozen network).  Raises InputError, one line, where it cannot be had.

        Where its run is gone, or was trained anew, its numbers are NaN until a checkpoint of ours brings them.
        """
        known = told(self.config)
        try:
            what = opened(self.config.generator)
        except InputError:
            if not known:
                raise
            what = {}
        if known and what.get("weights") != known["weights"]:
            generator = network_of(known, self.vlm)
            for value in trained_state(generator).values():
                value.data.fill_(torch.nan)
            return known, frozen(generator)
        if what["over"] != fingerprint(self):
            raise InputError(f"generator {what['run']}: sees through another CLIP than {self.config.clip.vlm}, "
                             f"{self.config.clip.pretrained!r}; give --vlm {what['vlm']} --pretrained {what['pretrained']}")
        generator = network_of(what, self.vlm)
        load_weights(generator, read_checkpoint(what["run"]), what["run"])
        return what, frozen(generator)

    def train(self, mode=True):
        super().train(mode)
        self.generator.eval()                                 # it gives the masks that it gave when it was scored
        return self

    @torch.no_grad()
    def reset(self, gamma=0.0):
        """Every W is CLIP's own again and every γ is `gamma`: with 0, CLIP itself.  Masks and background stay."""
        for linears in self.queries.values():
            for linear, block in zip(linears, self.vlm.blocks):
                linear.weight.copy_(block.attn.in_proj_weight.chunk(3)[0])
                linear.bias.copy_(block.attn.in_proj_bias.chunk(3)[0])
        for seve in self.seve:
            seve.gamma.fill_(gamma)

    def start(self, image, masks):
        """image (B,3,H,W), masks (B,Q,h,w) -> tokens z (B,1+P+Q,C), image first; where mask tokens look (B,Q,1+P)."""
        x, grid = self.vlm.embed(image)                                                   # (B,1+P,C)
        u = x[:, :1].expand(-1, masks.shape[1], -1)                                       # (B,Q,C)
        return torch.cat([x, u], 1), visible(masks, grid)

    def attention(self, l, z, n):
        """Block l's queries of all tokens z (B,n+Q,C), and keys and values of the first n, the image's: (B,heads,·,d)."""
        attn, y = self.vlm.blocks[l].attn, self.vlm.blocks[l].ln_1(z)
        (W_q, W_k, W_v), (b_q, b_k, b_v) = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        x, u = y[:, :n], y[:, n:]
        q = torch.cat([self.queries[kind][l](part) if kind in self.queries else F.linear(part, W_q, b_q)
                       for kind, part in (("image", x), ("mask", u))], 1)                 # (B,n+Q,C)
        return [split(part, self.vlm.heads) for part in (q, F.linear(x, W_k, b_k), F.linear(x, W_v, b_v))]

    def step(self, l, z, sees, text):
        """Block l, from 0: z (B,1+P+Q,C) -> the same.  (Nobody reads the last block's x: its W_img has gradient 0.)"""
        block, n = self.vlm.blocks[l], sees.shape[-1]
        if l < len(self.seve):
            z = self.seve[l](z, text)
        q, k, v = self.attention(l, z, n)
        everywhere = sees.new_ones(len(sees), n, n)                                       # the image sees the image
        mask = torch.cat([everywhere, sees], 1)[:, None]                                  # (B,1,n+Q,n)
        seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)   # (B,n+Q,C)
        z = z + block.ls_1(block.attn.out_proj(seen))
        return z + block.ls_2(block.mlp(block.ln_2(z)))

    def forward(self, image, text, masks=None):
        """image (B,3,H,W) CLIP-normalised, text (L,E) unit; masks (B,Q,h,w) logits: instead of the generator's."""
        if masks is None:
            with torch.no_grad():
                masks = self.generator(image, text[:0])["masks"][-1].to(image.dtype)
        z, sees = self.start(image, masks)
        for l in range(len(self.vlm.blocks)):
            z = self.step(l, z, sees, text)
        names = torch.cat([text, F.normalize(self.background, dim=-1)])                   # (L+1,E)
        regions = self.vlm.project(z[:, sees.shape[-1]:]).to(names.dtype)                 # (B,Q,E)
        with torch.autocast(regions.device.type, enabled=False):                          # bf16 logits step by 1/8
            return dict(masks=[masks], classes=[self.vlm.logit_scale * regions @ names.T])

    # ---- what the contract asks for (segmenter.py) ----

    answer = SAN.answer

    def terms(self, out, batch):
        """ce, and, only logged, the share of masks that show a name."""
        masks, classes = out["masks"][-1], out["classes"][-1]
        none = classes.shape[-1] - 1
        names = torch.stack([names_of(*each, none, self.config.assign, key)
                             for *each, key in zip(masks, batch.labels, batch.keys)])     # (B,Q)
        weights = torch.where(names == none, NO_OBJECT, 1.0)
        ce = weights * F.cross_entropy(classes.transpose(1, 2), names, reduction="none")  # (B,Q)
        return dict(ce=(CE, ce.mean()), named=(0.0, (names != none).double().mean()))

    def notes(self, device):
        what = told(self.config)
        return f"masks of {what['run']}, {type(self.generator).__name__}, frozen"

    def parts(self):
        return {"generator": [self.generator], "SEVE": list(self.seve)}
