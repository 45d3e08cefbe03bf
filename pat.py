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

Demo: `python pat.py` counts the parameters of the reference size; `python pat.py import san_vit_b_16.pth --out RUN`
makes a run directory of a published SAN checkpoint; `encode`, `decode` and `tokenizer` are told in tokenizer.py.
Tests: tests/test_pat.py.  Read next: tokenizer.py.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from checkpoint import fingerprint, load_weights, trained_state
from decoder import Decoder, Up, log2
from hsattn import Attn, HSAttn
from images import InputError, run_cli
from kernels import CHOICES
from san import MLP, SAN, SANConfig, from_published, read_published, trainable
from vq import vMFVQ

PYRAMID = ("early", "mid", "late")         # the finest first; the one place where stages are counted and named
STAGES = PYRAMID + ("latent",)


@dataclass
class PATConfig(SANConfig):
    """Every number and every switch of the model; defaults are the paper's where it states them."""

    model: str = "pat"                 # pat or san
    preset: str = "coco"               # which preset these numbers started from
    seed: int = 0                      # of the weights and of every draw in training
    short_side: int = 640              # pixels of the shorter image side at test time, and of the training crop
    long_side: int = 2560              # the longer side is at most this
    data: str = ""                     # the folder it is trained on; the world needs none
    val_data: str = ""                 # what it is scored on: a folder, or COCO-Stuff val; "" = first images of `data`
    ignore: int = 255                  # value in the folders' label files that means unlabelled
    codes: tuple = (128, 64, 32, 256)  # K of early, mid, late, latent
    code_dim: int = 32                 # D
    kappa: float = 30.0                # concentration of HSAttn (Mean Shift Mask Transformer's)
    hs_heads: int = 8                  # heads of HSAttn and of the global tokens' Attn
    mixer_hidden: int = 256            # TokenMixer
    decoder_width: int = 256
    decoder_heads: int = 8
    spade_hidden: int = 128
    decoder_attention: str = "pooled"  # or "full": keys and values at full resolution
    scales: tuple = (4, 2, 1)          # Table II: 4 4 4 and 1 1 1
    vmf: bool = True                   # Table II: --no-vmf, dot-product VQ and plain attention
    mixer: bool = True                 # Table II: --no-mixer, no token flow between stages and to the global tokens
    residual: bool = True              # Table II: --no-residual, no pixels in the pyramid
    unified: bool = False              # Table II: --unified, one embedding is queries and every codebook
    separate_decoders: bool = False    # Table II: --separate-decoders, one for pixels, one for masks
    decoder_stages: tuple = PYRAMID    # Table II: --decoder-stages mid late | late | (nothing)
    kernels: str = "auto"              # torch, triton, or auto: Triton on a GPU (kernels/__init__.py)


def preset(name, **changes):
    """The model of a preset: "world" (default run), "coco" (the paper's, CLIP ViT-B/16), "coco-eva" (EVA02-B/16).

    "coco-large" is the published SAN-L's: ViT-L/14-336 sees 0.7 of the image, 448 pixels of 640, as a 32x32 grid.
    "coco-eva-large" puts EVA02-L/14-336 in its place, which nobody published.
    """
    large = dict(clip_scale=0.7)
    if name == "world":
        numbers = dict(vlm="world", pretrained="world", clip_scale=1.0, depths=(0, 2, 3, 4), width=96, depth=4, heads=6,
                       patch=8, grid=8, queries=20, head_width=96, short_side=64, long_side=256, hs_heads=6,
                       mixer_hidden=96, decoder_width=64, decoder_heads=4, spade_hidden=32)
    elif name == "coco":
        numbers = {}
    elif name == "coco-eva":
        numbers = dict(vlm="EVA02-B-16", pretrained="merged2b_s8b_b131k")
    elif name == "coco-large":
        numbers = dict(vlm="ViT-L-14-336", **large)
    elif name == "coco-eva-large":
        numbers = dict(vlm="EVA02-L-14-336", pretrained="merged2b_s6b_b61k", **large)
    else:
        raise InputError(f"no preset is called {name!r}; there are world, coco, coco-eva, coco-large, coco-eva-large")
    return PATConfig(**{"preset": name, **numbers, **changes})


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
                    raise InputError(f"--scales {' '.join(map(str, scales))}: each is the one before it, or half of it")
                self.down[stage] = nn.Conv2d(width, width, 3, int(steps[stage]), 1)

    def forward(self, image, f, codes):
        """image (B,3,H,W), f a map (B,S,g,g) a stage, codes: stage -> (K,D) or None -> stage -> Tokens"""
        found, x = {}, image
        for stage, map_ in zip(PYRAMID, f):
            u = self.up[stage](map_)                                                      # (B,S,g*s,g*s)
            if self.down is not None:
                x = self.down[stage](x)                                                   # (B,S,g*s,g*s)
                u = u + x
            found[stage] = self.vq[stage](u, codes[stage])
        return found


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


def semantic_branch(side, semantic, codebook, image, f):
    """The side ViT with a SemanticStage between its blocks: `codebook(stage)` (K,D), image (B,3,H,W), f four (B,S,h,w)
    -> q (B,Q,S), z (B,S,h,w) after the last block."""
    t = None

    def update(i, q, z):                                      # what happens between two side blocks
        nonlocal t
        t, q = semantic[i - 1](codebook(PYRAMID[i - 1]), q, z, t)
        return q

    q, z = side(image, f, update)[-1]
    return q, z.transpose(1, 2).unflatten(2, f[0].shape[-2:])


class PAT(SAN):
    """The whole model.  `model(image, text)` -> SAN's dict plus image (B,3,H,W) in [0,1] units and tokens per stage."""

    def build(self):
        c = self.config
        if len(self.vlm.depths) != len(STAGES):
            raise InputError(f"--depths: CLIP gives {len(self.vlm.depths)} maps; give {len(STAGES)} numbers, 0 and one "
                             f"for each of {', '.join(PYRAMID)}")
        *pyramid_codes, latent_codes = c.codes
        sizes = [c.queries] * len(PYRAMID) if c.unified else pyramid_codes

        def quantiser(codes):                                 # of every stage: the place to put another kind in
            return vMFVQ(c.width, 0 if c.unified else codes, c.code_dim, c.vmf, kernels=c.kernels)

        self.pixels = PixelBranch(width=c.width, codes=pyramid_codes, scales=c.scales, patch=c.patch,
                                  residual=c.residual, quantiser=quantiser)
        self.latent = quantiser(latent_codes)
        self.to_code = nn.Linear(c.width, c.code_dim) if c.unified else None
        self.semantic = nn.ModuleList(
            SemanticStage(width=c.width, code_dim=c.code_dim, tokens=n, tokens_before=before, queries=c.queries,
                          heads=c.hs_heads, kappa=c.kappa, hidden=c.mixer_hidden, vmf=c.vmf, mixer=c.mixer,
                          unified=c.unified, kernels=c.kernels)
            for n, before in zip(sizes, [0, *sizes]))

        def decoder(*tasks):
            return Decoder(code_dim=c.code_dim, query_width=c.width, width=c.decoder_width, heads=c.decoder_heads,
                           spade_hidden=c.spade_hidden, scales=dict(zip(PYRAMID, c.scales)), patch=c.patch,
                           clip_heads=self.vlm.heads, stages=c.decoder_stages, tasks=tasks,
                           full_attention=c.decoder_attention == "full")

        self.decoder = decoder("masks") if c.separate_decoders else decoder("masks", "pixels")
        self.pixel_decoder = decoder("pixels") if c.separate_decoders else None
        for stage, vq in self.quantisers().items():           # steps since each code's last use, for restarts
            vq.register_buffer("idle", torch.zeros(len(self.codebook(stage)), dtype=torch.int64))

    def quantisers(self):
        return dict([*self.pixels.vq.items(), ("latent", self.latent)])

    def unified_codes(self):
        """The one codebook of the "unified" ablation, (Q,D), or None."""
        return None if self.to_code is None else self.to_code(self.side.query_embed[0])

    def codebook(self, stage):
        """The codes of a stage as they are used, (K,D)."""
        return self.quantisers()[stage].codes(self.unified_codes())

    def tokenizer(self, latent=False):
        """A frozen copy of the tokenizer alone: tokenizer.Tokenizer.  `latent`: with the fourth stage, and `decode`."""
        from tokenizer import Tokenizer                       # here, because that file stands on this one

        return Tokenizer.of(self, latent)

    def forward(self, image, text):
        """image (B,3,H,W) CLIP-normalised, text (L,E) unit -> dict(masks, classes, image, tokens); see SAN.forward."""
        pyramid, f = self.fuse(image)
        given = dict.fromkeys(STAGES, self.unified_codes())
        tokens = self.pixels(image, f[1:], given)
        q, z = semantic_branch(self.side, self.semantic, self.codebook, image, f)
        tokens["latent"] = self.latent(z, given["latent"])
        zq = {stage: found.zq for stage, found in tokens.items()}
        out = self.decoder(zq, q)
        if self.pixel_decoder is not None:
            out["image"] = self.pixel_decoder(zq)["image"]
        classes = [self.classify(pyramid, bias, text) for bias in out.pop("bias")]
        masks = [m.to(image.dtype) for m in out["masks"]]     # autocast ends here: losses and scores are fp32
        return dict(masks=masks, classes=classes, image=out["image"].to(image.dtype), tokens=tokens)


SWITCHES = ("vmf", "mixer", "residual", "unified", "separate_decoders", "decoder_stages", "scales", "decoder_attention",
            "kernels")


def check(c):
    """Raises InputError, naming the flag, for numbers of a config that do not fit together."""
    choices = dict(model=("pat", "san"), decoder_attention=("pooled", "full"), kernels=CHOICES)
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            raise InputError(f"--{name.replace('_', '-')} {getattr(c, name)}: there are {', '.join(allowed)}")
    for stage in c.decoder_stages:
        if stage not in PYRAMID:
            raise InputError(f"--decoder-stages {stage}: there are {', '.join(PYRAMID)}")
    for name, lengths in dict(scales=[len(PYRAMID)], codes=[len(STAGES)], depths=[0, len(STAGES)]).items():
        if len(getattr(c, name)) not in lengths or any(n < (name != "depths") for n in getattr(c, name)):
            raise InputError(f"--{name} {' '.join(map(str, getattr(c, name)))}: takes {lengths[-1]} positive numbers")
    for heads, width in (("heads", "width"), ("hs_heads", "width"), ("decoder_heads", "decoder_width")):
        if getattr(c, heads) < 1 or getattr(c, width) % getattr(c, heads):
            flag = heads.replace("_", "-")
            raise InputError(f"--{flag} {getattr(c, heads)} does not divide the width {getattr(c, width)}")
    if c.model == "pat" and c.depth < len(PYRAMID):
        raise InputError(f"--depth {c.depth}: each of {', '.join(PYRAMID)} follows a side block; give at least "
                         f"{len(PYRAMID)}")
    changed = [name for name in SWITCHES if getattr(c, name) != getattr(PATConfig, name)]
    if c.model == "san" and changed:
        raise InputError(f"--model san has no {changed[0].replace('_', ' ')} to switch: that flag is PAT's")


def build(config):
    """SAN or PAT, as `config.model` says.  Raises InputError for numbers that do not fit together."""
    check(config)
    return (PAT if config.model == "pat" else SAN)(config)


# --- run directories: config.json beside checkpoint.safetensors -----------------------------------------------------


def config_from(stored, config_class=PATConfig):
    """The config that `asdict` and JSON made a dict of; entries it does not know are left out."""
    known = {field.name for field in fields(config_class)}
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known})


def load_config(run, config_class=PATConfig):
    """The config of a run directory; CLIP weights beside it are found wherever the directory lies.

    Raises InputError if config.json is missing or damaged.
    """
    try:
        stored = json.loads((Path(run) / "config.json").read_text())
        config = config_from(stored, config_class)
        beside = Path(run) / config.pretrained
        return replace(config, pretrained=str(beside)) if beside.is_file() else config
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{run}: no run directory (config.json: {error}); make one with `python train.py`") from error


def load_run(run, device="cpu"):
    """(model in eval mode, config) of a run directory with config.json and checkpoint.safetensors.

    Raises InputError, naming the file, when one is missing, damaged or belongs to another model.
    """
    config, path = load_config(run), Path(run) / "checkpoint.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the run has not written a checkpoint yet")
    config.kernels = "auto"                                   # how it was trained binds nobody who only uses it
    torch.manual_seed(config.seed)                            # with pretrained "none", CLIP comes from the seed
    model = build(config)
    load_weights(model, path)
    return model.to(device).eval(), config


PUBLISHED = {768: "coco", 1024: "coco-large"}                 # width of CLIP -> the preset of the published SAN over it


def import_published(path, out, config=None):
    """Make a run directory of a published SAN checkpoint, complete: it needs no other file and no network.

    clip.safetensors: the CLIP inside, frozen but for its trained position embedding, in open_clip's layout;
    checkpoint.safetensors: what SAN trains; config.json: `config`, by default that of the published size found.
    Raises InputError if the file is damaged or not such a checkpoint, or if `out` exists; nothing is then written.
    """
    published, out = read_published(path), Path(out)
    if config is None:
        conv = published.get("clip_visual_extractor.conv1.weight", torch.empty(0))
        if len(conv) not in PUBLISHED:
            raise InputError(f"{path}: neither SAN with ViT-B/16 nor with ViT-L/14-336: clip_visual_extractor."
                             f"conv1.weight is {tuple(conv.shape) if len(conv) else 'missing'}")
        config = preset(PUBLISHED[len(conv)], model="san")
    if "ov_classifier.token_embedding.weight" not in published:
        raise InputError(f"{path}: CLIP's text tower is not in it (ov_classifier.token_embedding.weight and others)")
    if out.exists():
        raise InputError(f"--out {out}: exists already; choose another name")
    model = build(replace(config, pretrained="none"))
    try:
        from_published(model, published)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    temporary = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        temporary.mkdir(parents=True)
        save_file(model.vlm.model.state_dict(), temporary / "clip.safetensors")
        trained = {f"model.{name}": value.detach() for name, value in trained_state(model).items()}
        metadata = {"step": "0", "vlm": fingerprint(model), "scaler": "{}"}
        save_file(trained, temporary / "checkpoint.safetensors", metadata)
        config = json.dumps(asdict(replace(config, pretrained="clip.safetensors")), indent=1)
        (temporary / "config.json").write_text(config + "\n")
        os.rename(temporary, out)
    except Exception as error:                                # safetensors wraps the file system's
        raise InputError(f"--out {out}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


RUN = "runs/world-pat-0"                # where the default run leaves PAT


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def main(argv=None):
    parser = OneLineParser(description="PAT's parameters; the tokenizer on its own; a run from a published checkpoint")
    commands = parser.add_subparsers(dest="command")
    encode = commands.add_parser("encode", help="photos to tokens")
    encode.add_argument("images", nargs="+", metavar="IMAGE")
    encode.add_argument("--out", metavar="TOKENS.npz", required=True)
    encode.add_argument("--short-side", type=int, metavar="N",
                        help="encode at this many pixels, 0: each photo's own size (default: as the run scores photos)")
    decode = commands.add_parser("decode", help="tokens to pictures, at the photos' own sizes")
    decode.add_argument("tokens", metavar="TOKENS.npz")
    decode.add_argument("--out", metavar="DIR", required=True, help="where STEM.png of each photo goes")
    for command in (encode, decode):
        command.add_argument("--run", default=RUN, metavar="RUN", help=f"a run, or a tokenizer saved alone ({RUN})")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command = commands.add_parser("tokenizer", help="save a run's tokenizer alone, one file that needs no other")
    command.add_argument("run", metavar="RUN")
    command.add_argument("--out", metavar="FILE.safetensors", required=True)
    command.add_argument("--pyramid-only", action="store_true", help="early, mid, late: half the size, cannot decode")
    command = commands.add_parser("import", help="make a run directory of a published SAN checkpoint")
    command.add_argument("file", metavar="FILE", help="san_vit_b_16.pth or san_vit_large_14.pth")
    command.add_argument("--out", metavar="RUN", required=True, help="the run directory to make")
    args = parser.parse_args(argv)
    if args.command == "import":
        import_published(args.file, args.out)
        print(f"written: config.json, checkpoint.safetensors, clip.safetensors in {args.out}")
        return
    if args.command:
        from tokenizer import run_command                     # here, because that file stands on this one

        return run_command(args)
    for name in ("world", "coco"):
        print(f"PAT, {name}: {trainable(build(preset(name, pretrained='none'))):,} trainable parameters")


if __name__ == "__main__":
    run_cli(main)
