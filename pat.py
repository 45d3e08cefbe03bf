"""PAT: a pyramid of tokens over a frozen CLIP, decoded into pixels and into masks (Eq. 2, Fig. 3 and 4).

image ──┬─> frozen CLIP ──> F0, F3, F6, F9 ──fusion──> f0, f3, f6, f9 (B,240,40,40)
        └─> side ViT: patches z (B,1600,240), global tokens q (B,100,240)

 pixel branch, for f3, f6, f9 = early, mid, late (bottom-up, knows nothing of q or of the side blocks):
    x  = stem(image) if early else Down(x before)       (B,240,40s,40s)   s = 4, 2, 1
    u  = Up_s(f) + x                                    (B,240,40s,40s)
    zq = vMFVQ(E, W_pre u)                              (B,32,40s,40s)    128, 64, 32 codes: the detachable tokenizer
 semantic branch, after side blocks 1, 2, 3:
    z  = z + f                                          (B,1600,240)      SAN's fusion
    t  = W_tok g(E) [+ Mix(t before)]                   (B,N,240)         one local token a code
    t  = LN(t + HSAttn(t, z, z))                        (B,N,240)         moved by mean shift over this image
    q  = LN(q + Attn(q + Mix(t), z, z))                 (B,100,240)       global tokens, on into the next side block
 latent: zq = vMFVQ(256 codes, W_pre z8) (B,32,40,40).  All four zq and q8 go to the decoder (decoder.py); its masks are
 named by CLIP exactly as SAN's are.  The branches share f, the fusion and the codebooks E; pyramid zq uses E itself,
 the semantic branch the moved copy t.  That is what makes the tokenizer detachable.

# paper: Eq. 2; scales 4, 2, 1; codebooks 128, 64, 32, 256; the pixel residual; TokenMixer; all switches of Table II.
# ours: residual and LN around HSAttn and Attn; stem and Down as 3x3 stride-2 convolutions; TokenMixer as a 3-layer GELU
#       MLP along the token axis; "unified" gives all four stages one codebook through one linear.

Tests: tests/test_pat.py.  Read next: runs.py.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from clip import CLIPConfig
from cli import InputError, choice, number
from data import rng_for, to_unit
from decoder import Decoder, Up, log2
from hsattn import Attn, HSAttn, g
from kernels import CHOICES, path
from losses import alignment, cells, means, perceptual, reconstruction
from san import MLP, SAN, SMALL_SIDE, WORLD_POINTS, SideConfig, check_heads, tokens
from segmenter import VLMS, summed
from vq import METRICS, codebook_health, features_at, restart_dead_codes, vMFVQ

PYRAMID = ("early", "mid", "late")         # the finest first; the one place where stages are counted and named
STAGES = PYRAMID + ("latent",)
RESTART = 99                               # the word of the random keys of a restart


@dataclass
class PATConfig:
    """Every number and every switch of the model; defaults are the paper's where it states them."""

    clip: CLIPConfig = field(default_factory=CLIPConfig)
    side: SideConfig = field(default_factory=SideConfig)
    codes: tuple = number((128, 64, 32, 256), 1, 65536, 4)  # K of early, mid, late, latent
    code_dim: int = number(32, 1, 4096)         # D
    kappa: float = number(30.0, 1e-3, 1e4)      # concentration of HSAttn (Mean Shift Mask Transformer's)
    hs_heads: int = number(8, 1, 256)           # heads of HSAttn and of the global tokens' Attn
    mixer_hidden: int = number(256, 1, 16384)   # TokenMixer
    decoder_width: int = number(256, 1, 16384)
    decoder_heads: int = number(8, 1, 256)
    spade_hidden: int = number(128, 1, 16384)
    scales: tuple = number((4, 2, 1), 1, 64, 3)  # of early, mid, late: how many times finer than the side grid
    metric: str = choice(*METRICS)              # dot, euclidean: VQ off the sphere, and plain attention
    mixer: bool = True                          # False: no token flow between stages and to the global tokens
    residual: bool = True                       # False: no pixels in the pyramid
    unified: bool = False                       # one embedding is queries and every codebook
    separate_decoders: bool = False             # one for pixels, one for masks
    decoder_stages: tuple = choice(*PYRAMID, default=PYRAMID)  # those that keep their SPADE block and cross-attention
    recompute: bool = False                     # less memory in training, more time: see decoder.py
    kernels: str = choice(*CHOICES, default="auto")  # plain, triton, or auto: Triton on a GPU, kernels/cpu.py on a CPU
    points: int = number(12544, 1, 10**6)       # for matching and for the mask losses, an image
    w_vq: float = number(0.1, 0, 1e6)           # weights of L_VQ, L_align, L_rec
    w_align: float = number(0.1, 0, 1e6)
    w_rec: float = number(1.0, 0, 1e6)
    align: str = choice("scale-free", "literal", "none")  # literal: the paper's; none drops it
    align_latent: bool = False                  # L_align on the latent too, not only on the pyramid
    perceptual: bool = True                     # LPIPS-VGG in L_rec; its backbone is a file to be had once
    crf_samples: int = number(1000, 1, 10**5)   # pixels an image and stage
    restart_after: int = number(240, 0, 10**9)  # images that a code may fall behind before it restarts; 0 = never
    restart_share: float = number(0.1, 0, 1)    # what is expected of a code: this fraction of an even share of the features


class TokenMixer(nn.Module):
    """N tokens become M by a 3-layer MLP along the token axis, the same for every channel."""

    def __init__(self, tokens_in, tokens_out, hidden):
        super().__init__()
        self.mlp = MLP(tokens_in, hidden, hidden, tokens_out, act=F.gelu)

    def forward(self, t):
        """(B,N,S) -> (B,M,S)"""
        return self.mlp(t.transpose(1, 2)).transpose(1, 2)


def halvings(first, width, times):
    """The stem: `times` 3x3 stride-2 convolutions with GELU between, 64 channels inside, first -> width."""
    widths = [first] + [64] * (times - 1) + [width]
    if times == 0:                                            # tokens as fine as pixels: nothing to halve
        return nn.Sequential(nn.Conv2d(first, width, 3, 1, 1))
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class PixelBranch(nn.Module):
    """The detachable tokenizer: image and three fused maps -> tokens of early, mid, late.

    `quantiser(K)` makes the quantiser of a stage of K codes; see vq.py for what one is.
    """

    def __init__(self, *, width, codes, scales, patch, residual, quantiser):
        super().__init__()
        self.up = nn.ModuleDict({s: Up(width, scale) for s, scale in zip(PYRAMID, scales)})
        self.vq = nn.ModuleDict({s: quantiser(k) for s, k in zip(PYRAMID, codes)})
        self.down = None
        if residual:
            steps = dict(zip(PYRAMID, (a / b for a, b in zip((patch, *scales), scales))))
            first, *others = PYRAMID
            self.down = nn.ModuleDict({first: halvings(3, width, log2(steps[first], "the stem"))})
            for stage in others:
                if steps[stage] not in (1, 2):
                    raise InputError(f"scales {' '.join(map(str, scales))}: each is the one before it, or half of it")
                self.down[stage] = nn.Conv2d(width, width, 3, int(steps[stage]), 1)

    def stage(self, stage, x, f, codes):
        """One stage: x the image or the x before, f a map (B,S,g,g), codes (K,D) or None -> Tokens, x (B,S,g*s,g*s)."""
        u = self.up[stage](f)                                                             # (B,S,g*s,g*s)
        if self.down is not None:
            x = self.down[stage](x)                                                       # (B,S,g*s,g*s)
            u = u + x
        return self.vq[stage](u, codes), x

    def forward(self, image, f, codes):
        """image (B,3,H,W), f a map (B,S,g,g) a stage, codes (K,D) or None -> stage -> Tokens: the detached tokenizer."""
        tokens, x = {}, image
        for stage, map_ in zip(PYRAMID, f):
            tokens[stage], x = self.stage(stage, x, map_, codes)
        return tokens


class SemanticStage(nn.Module):
    """Local tokens t from the codes and this image, global tokens q from t and this image."""

    def __init__(self, *, width, code_dim, tokens, tokens_before, queries, heads, kappa, hidden, vmf, mixer, unified,
                 kernels):
        super().__init__()
        self.mixer = mixer                                    # without it t reaches nothing, so there is no t
        if mixer:
            self.tok = None if unified else nn.Linear(code_dim, width)                    # W_tok
            self.mix_before = TokenMixer(tokens_before, tokens, hidden) if tokens_before else None
            self.hsattn = HSAttn(width, heads, kappa, kernels) if vmf else Attn(width, heads)
            self.norm_t, self.mix = nn.LayerNorm(width), TokenMixer(tokens, queries, hidden)
        self.attn, self.norm_q = Attn(width, heads), nn.LayerNorm(width)

    def forward(self, codes, q, z, t_before):
        """codes (K,D), q (B,Q,S), z (B,P,S), t_before (B,N',S) or None -> t (B,N,S) or None, q (B,Q,S)"""
        if not self.mixer:
            return None, self.norm_q(q + self.attn(q, z, z))
        t = q if self.tok is None else self.tok(codes).expand(q.shape[0], -1, -1)         # (B,N,S)
        if self.mix_before is not None:
            t = t + self.mix_before(t_before)
        t = self.norm_t(t + self.hsattn(t, z, z))
        return t, self.norm_q(q + self.attn(q + self.mix(t), z, z))


class TokenPyramid:
    """What PAT and the tokenizer on its own (tokenizer.py) share: the paper's Fig. 3 from the fused maps to the tokens.

    Stands on `self.side`, `pixels`, `semantic`, `latent`, and on `given`, the unified codebook or None.
    """

    def quantisers(self):
        return dict([*self.pixels.vq.items(), *([] if self.latent is None else [("latent", self.latent)])])

    def codebook(self, stage):
        """The codes of a stage as they are used, (K,D)."""
        return self.quantisers()[stage].codes(self.given())

    def walk(self, image, f):
        """image (B,3,H,W), f four (B,S,h,w) -> Tokens by stage, global tokens q (B,Q,S) after the last side block."""
        given, tokenized, x, t = self.given(), {}, image, None
        q, z, pos = self.side.start(image, f[0])
        for i, stage in enumerate(PYRAMID):
            tokenized[stage], x = self.pixels.stage(stage, x, f[i + 1], given)            # pixel branch
            q, z = self.side.step(i, q, z, pos)
            z = z + tokens(f[i + 1])                                                      # (B,P,S), SAN's fusion
            t, q = self.semantic[i](self.codebook(stage), q, z, t)                        # semantic branch
        for i in range(len(PYRAMID), len(self.side.blocks)):
            q, z = self.side.step(i, q, z, pos)
        z = z.transpose(1, 2).unflatten(2, f[0].shape[-2:])                               # (B,S,h,w)
        tokenized["latent"] = self.latent(z, given)
        return tokenized, q


class PAT(TokenPyramid, SAN):
    """The whole model.  `model(image, text)` -> SAN's dict plus image (B,3,H,W) in [0,1] units and tokens per stage."""

    Config = PATConfig
    PRESETS = {name: dict(vlm) for name, vlm in VLMS.items()}
    PRESETS["world"].update(
        SMALL_SIDE, hs_heads=6, mixer_hidden=96, decoder_width=64, decoder_heads=4, spade_hidden=32,
        points=WORLD_POINTS, crf_samples=128,
        w_vq=5.0, w_rec=120.0,             # 0.1 and 1 in the paper, which trains 140 times longer and adds LPIPS
        perceptual=False, restart_after=80)
    ABLATIONS = {                          # the rows of the paper's Table II
        "no-vmf": dict(metric="euclidean"), "no-vmf-dot": dict(metric="dot"), "scales-4-4-4": dict(scales=(4, 4, 4)),
        "scales-1-1-1": dict(scales=(1, 1, 1)), "no-align": dict(align="none"), "no-mixer": dict(mixer=False),
        "no-residual": dict(residual=False), "unified": dict(unified=True), "separate-decoders": dict(separate_decoders=True),
        "one-stage-removed": dict(decoder_stages=("mid", "late")), "two-stages-removed": dict(decoder_stages=("late",)),
        "three-stages-removed": dict(decoder_stages=()), "only-early-mid": dict(decoder_stages=("early", "mid")),
        "only-early": dict(decoder_stages=("early",))}
    stages = STAGES
    watch = ("ce_2", "dice_2", "l2", "vq")
    curves = {**SAN.curves, "token and pixel losses": {"VQ": "vq", "CRF": "crf", "TV": "tv", "L1": "l1", "L2": "l2",
                                                       "LPIPS": "lpips"}}

    @classmethod
    def check(cls, c):
        if len(c.clip.depths) not in (0, len(STAGES)):
            raise InputError(f"depths {' '.join(map(str, c.clip.depths))}: takes {len(STAGES)} numbers, or none")
        check_heads(c.side.heads, c.side.width)
        check_heads(c.hs_heads, c.side.width, "hs_heads")
        check_heads(c.decoder_heads, c.decoder_width, "decoder_heads")
        if c.side.depth < len(PYRAMID):
            raise InputError(f"depth {c.side.depth}: each of {', '.join(PYRAMID)} follows a block; give {len(PYRAMID)} or more")

    def build(self):
        c, width = self.config, self.config.side.width
        if len(self.vlm.depths) != len(STAGES):
            raise InputError(f"depths: CLIP gives {len(self.vlm.depths)} maps; give {len(STAGES)} numbers, 0 and one "
                             f"for each of {', '.join(PYRAMID)}")
        *pyramid_codes, latent_codes = c.codes
        sizes = [c.side.queries] * len(PYRAMID) if c.unified else pyramid_codes

        def quantiser(codes):                                 # of every stage: the place to put another kind in
            return vMFVQ(width, 0 if c.unified else codes, c.code_dim, c.metric, kernels=c.kernels)

        def decoder(*tasks):
            return Decoder(code_dim=c.code_dim, query_width=width, width=c.decoder_width, heads=c.decoder_heads,
                           spade_hidden=c.spade_hidden, scales=dict(zip(PYRAMID, c.scales)), patch=c.side.patch,
                           clip_heads=self.vlm.heads, stages=c.decoder_stages, tasks=tasks, recompute=c.recompute)

        self.pixels = PixelBranch(width=width, codes=pyramid_codes, scales=c.scales, patch=c.side.patch,
                                  residual=c.residual, quantiser=quantiser)
        self.latent = quantiser(latent_codes)
        self.to_code = nn.Linear(width, c.code_dim) if c.unified else None
        self.semantic = nn.ModuleList(
            SemanticStage(width=width, code_dim=c.code_dim, tokens=n, tokens_before=before, queries=c.side.queries,
                          heads=c.hs_heads, kappa=c.kappa, hidden=c.mixer_hidden, vmf=c.metric == "cosine", mixer=c.mixer,
                          unified=c.unified, kernels=c.kernels)
            for n, before in zip(sizes, [0, *sizes]))
        self.decoder = decoder("masks") if c.separate_decoders else decoder("masks", "pixels")
        self.pixel_decoder = decoder("pixels") if c.separate_decoders else None
        for stage, vq in self.quantisers().items():           # how many images each code is behind; inf: has not begun
            vq.register_buffer("idle", torch.full([len(self.codebook(stage))], torch.inf))
        self.uses, self.last = {}, {}      # stage -> uses of each code since the last logged line; the last step's features

    def given(self):
        """The one codebook of the "unified" ablation, (Q,D), or None."""
        return None if self.to_code is None else self.to_code(self.side.query_embed[0])

    def forward(self, image, text):
        """image (B,3,H,W) CLIP-normalised, text (L,E) unit -> dict(masks, classes, image, tokens); see SAN.forward."""
        pyramid, f = self.fuse(image)                         # CLIP, frozen, and its maps on the side grid
        tokenized, q = self.walk(image, f)                        # early, mid, late, latent: the tokens
        zq = {stage: tokens.zq for stage, tokens in tokenized.items()}
        out = self.decoder(zq, q)                             # masks, where CLIP has to look, pixels
        if self.pixel_decoder is not None:
            out["image"] = self.pixel_decoder(zq)["image"]
        classes = self.classify(pyramid, out["bias"], text)   # CLIP says what it sees there
        masks = [m.to(image.dtype) for m in out["masks"]]     # autocast ends here: losses and scores are fp32
        return dict(masks=masks, classes=classes, image=out["image"].to(image.dtype), tokens=tokenized)

    # ---- what the contract asks for (segmenter.py) ----

    def terms(self, out, batch):
        """L_seg + w_vq L_VQ + w_align L_align + w_rec L_rec."""
        c, terms, tokenized = self.config, super().terms(out, batch), out["tokens"]
        inside = {stage: cells(batch.inside, tokens.index.shape[1:]) for stage, tokens in tokenized.items()}
        terms["vq"] = c.w_vq, sum(means(tokens.loss, inside[stage]).mean() for stage, tokens in tokenized.items())
        if c.align != "none":
            aligned = [alignment(tokens.zq, batch.images, inside[stage], [(*key, 3 + i) for key in batch.keys], c.align,
                                 c.crf_samples)
                       for i, (stage, tokens) in enumerate(tokenized.items()) if stage in PYRAMID or c.align_latent]
            terms["crf"] = c.w_align, sum(a["crf"] for a in aligned)
            terms["tv"] = c.w_align, sum(a["tv"] for a in aligned)
        lpips = perceptual(batch.images.device) if c.perceptual else None
        factors = dict(l1=0.1 * c.w_rec, l2=1.0 * c.w_rec, lpips=0.1 * c.w_rec)
        for name, loss in reconstruction(out["image"], to_unit(batch.images), batch.inside, lpips).items():
            terms[name] = factors[name], loss
        return terms

    def notes(self, device):
        """Which path the two operations with a kernel take.  Raises InputError also where LPIPS is not at hand."""
        c, ways = self.config, {}
        if c.perceptual:
            perceptual(device)
        try:                                                  # every precision that autocast may choose goes the same way
            if c.metric == "cosine":
                ways["assignment"] = path(c.kernels, torch.device(device), torch.float32, c.code_dim)
            if c.metric == "cosine" and c.mixer:
                head = c.side.width // c.hs_heads
                ways["mean shift"] = path(c.kernels, torch.device(device), torch.float32, head, c.kappa)
        except ValueError as error:
            raise InputError(f"--kernels {c.kernels}: {error}") from error
        return ", ".join(f"{name} by {way}" for name, way in ways.items()) or "no operation with a kernel"

    def remember(self, out, batch):
        """stage -> uses of each code (K), the features as W_pre gave them (b,D,h,w), which of them are inside (b,h,w)"""
        kept = {}
        for stage, found in out["tokens"].items():
            inside = cells(batch.inside, found.index.shape[1:])
            counts = torch.bincount(found.index[inside], minlength=len(self.codebook(stage)))
            kept[stage] = counts, found.x.detach(), inside
        return kept

    def after_step(self, remembered, step, config):
        """Count uses; codes start, and dead ones start again, on features of this step's batch, alike on all processes.

        No restart in the last 15 % of the steps, which keep the codes there are; none of a codebook that is somebody
        else's (the unified one belongs to the queries); and none by dot product, where a code on a long feature wins
        features of half the space and draws them to its length: the next lands on a longer one (L_VQ: 45,000 in 160 steps).
        """
        c, batch, new = self.config, config.recipe.batch, {}
        numbers = torch.cat([numbers for numbers, _ in remembered])                       # (b) the images of this process
        for which, (stage, vq) in enumerate(self.quantisers().items()):
            counts, restarted = sum(kept[stage][0] for _, kept in remembered), 0          # (K)
            if vq.codebook is not None:
                x, inside = (torch.cat([kept[stage][i] for _, kept in remembered]) for i in (1, 2))   # (b,D,h,w), (b,h,w)
                rng, K, P = rng_for(config.run.seed, step, which, RESTART), len(counts), inside[0].numel()
                image, place = divmod(rng.choice(batch * P, K, replace=batch * P < K), P)     # one feature drawn a code
                candidates = summed(features_at(x, inside, numbers, step * batch + image, (place + 0.5) / P))     # (K,D)
                after = c.restart_after if vq.metric != "dot" and step < 0.85 * config.recipe.steps else 0
                candidates = g(candidates) if vq.metric == "cosine" else candidates
                put = restart_dead_codes(vq.codebook, vq.idle, summed(counts), candidates, batch, after, c.restart_share)
                new[vq.codebook], restarted = put, int(put.sum())
            self.uses[stage] = self.uses.get(stage, torch.zeros_like(counts)).to(counts) + summed(counts)
            self.last[stage] = remembered[0][1][stage][1], restarted
        return new

    def log(self):
        """The health of each codebook since the last logged line, and how many of its codes restarted in this step."""
        lines = {}
        for stage, vq in self.quantisers().items():
            x, restarted = self.last[stage]
            health = codebook_health(self.uses[stage], self.codebook(stage), x.movedim(1, -1).flatten(0, 2),
                                     vq.choose)
            lines[stage] = {**health, "restarted": restarted}
        self.uses = {}
        return lines

    def unlogged(self):
        return self.uses

    def parts(self):
        return {"side ViT + semantic": [self.side, *self.semantic], "fusion": list(self.fusion), "pixel branch": [self.pixels],
                "latent": [self.latent], "decoder": [self.decoder]}
