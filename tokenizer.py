"""The tokenizer on its own: an image as four maps of small integers, and back, without words, masks or recognition.

    pyramid:  image ──> CLIP's blocks up to the last depth ──fusion──> f3, f6, f9 ──PixelBranch──> early, mid, late
    latent:   + f0, side ViT, semantic stages ──> z8 ──> latent        and back: codes ──decoder──> image

    640x640, ViT-B/16:   early 160x160 of 128   mid 80x80 of 64   late 40x40 of 32   latent 40x40 of 256
    bits per pixel = Σ tokens log2 K / pixels = (25600*7 + 6400*6 + 1600*5 + 1600*8) / 409600 = 0.582

`Tokenizer.of(model)` copies the three pyramid stages out of a PAT: nothing flows into them from the queries or from the
side ViT (pat.py), which therefore stay behind.  `latent=True` brings these along, and a decoder for pixels only.  What
it gives is, bit for bit, what the whole PAT gives.  One file holds it, its part of CLIP included.

    python tokenizer.py encode a.jpg b.png --out tokens.npz      any size and kind of picture; tokens, bits, bytes of each
    python tokenizer.py decode tokens.npz --out pictures         a PNG each, at the picture's own size
    python tokenizer.py save runs/world-pat-0 --out tokenizer.safetensors     then `--run tokenizer.safetensors`

# paper: the three pyramid codebooks can be detached.   # ours: everything about files; what `latent` brings along.

Tests: tests/test_tokenizer.py.  Read next: published/datasets.py.  B, H, W, h, w, D, K: see hsattn.py.
"""

import argparse
import hashlib
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from cli import InputError, check_device, parse_flags, run_cli, tensors_checksum, write_files
from data import bounded, read_image, resize_short, to_tensor
from pat import PAT, PYRAMID, STAGES, PATConfig, TokenPyramid
from runs import changed, filled, flat, load_run
from vq import codebook_health


UNSIGNED = {"seed": 0, "preset": ""}       # what files of before November 2026 tell too, and how their fingerprint took it


def keep_features(vlm):
    """Drop of a CLIP, for good, what `features` does not use: text tower, blocks after the last depth, projections."""
    visual = vlm.model.visual
    vlm.model, vlm.tokenizer = nn.Module(), None
    vlm.model.visual = visual
    del vlm.blocks[vlm.depths[-1]:]
    if hasattr(visual, "trunk"):                              # EVA
        trunk = visual.trunk
        trunk.rope = trunk.norm = trunk.fc_norm = trunk.head = visual.head = None
    else:
        visual.ln_post = visual.proj = None


class Tokenizer(TokenPyramid, nn.Module):
    """See the header.  `Tokenizer.of(model)` or `Tokenizer.load` make one; by itself this builds shapes without numbers.

    `stages`: early, mid, late, and latent if it has that.  `stride`: `forward` takes sides that are multiples of it.
    """

    def __init__(self, config, latent=False):
        super().__init__()
        with torch.device("meta"):                            # PAT's own parts, before they take any memory
            model = PAT(changed(config, pretrained="none"))
        self.config, self.stride, self.stages = config, model.stride, STAGES if latent else PYRAMID
        self.vlm, self.pixels = model.vlm, model.pixels
        keep_features(self.vlm)
        self.fusion = nn.ModuleDict({str(i): model.fusion[i] for i in range(0 if latent else 1, len(STAGES))})
        self.register_buffer("unified", model.given())           # the one codebook of that ablation, or None
        self.side = self.semantic = self.latent = self.decoder = None
        if latent:
            self.side, self.semantic, self.latent = model.side, model.semantic, model.latent
            self.decoder = model.pixel_decoder or model.decoder
            self.decoder.query = self.decoder.cross = self.decoder.head = None            # those of the masks
        for vq in self.quantisers().values():
            del vq.idle                                       # a count that training keeps
        self.counts = {stage: torch.zeros(len(self.codebook(stage)), dtype=torch.int64) for stage in self.stages}
        self.requires_grad_(False).eval()

    @classmethod
    def of(cls, model, latent=False):
        """A copy of a PAT's tokenizer, on its device."""
        from published.weights import with_activation         # not needed by whoever only encodes

        vlm = with_activation(model.config.clip.vlm, model.vlm)
        config = changed(model.config, vlm=vlm, pretrained="none", kernels="auto")
        tokenizer, state = cls(config, latent), {**model.state_dict(), "unified": model.given()}
        if model.pixel_decoder is not None:
            state.update({f"decoder.{name}": value for name, value in model.pixel_decoder.state_dict().items()})
        own = {name: state[name].detach().clone() for name in tokenizer.state_dict()}
        tokenizer.load_state_dict(own, assign=True)
        return tokenizer

    def given(self):
        return self.unified

    # ---- sizes ----

    def grids(self, height, width):
        """stage -> (h,w), the token grid of an image of this many pixels: padded up to the stride, over patches."""
        h, w = (-(-side // self.stride) * self.stride // self.config.side.patch for side in (height, width))
        scales = dict(zip(STAGES, (*self.config.scales, 1)))
        return {stage: (h * scales[stage], w * scales[stage]) for stage in self.stages}

    def bits_per_pixel(self, height, width):
        """Σ tokens log2 K over the pixels of the image; the tokens of the padding count, its pixels do not."""
        grids = self.grids(height, width)
        return sum(h * w * math.log2(len(self.counts[stage])) for stage, (h, w) in grids.items()) / (height * width)

    # ---- image -> indices ----

    def forward(self, image):
        """image (B,3,H,W) CLIP-normalised, H and W multiples of the stride -> stage -> index (B,h,w) int64.

        A graph and nothing else: torch.compile and torch.export take it.
        """
        grid = (image.shape[-2] // self.config.side.patch, image.shape[-1] // self.config.side.patch)
        maps = self.vlm.features(image).maps                                              # four (B,C,hc,wc)
        f = [fuse(maps[int(i)], grid) for i, fuse in self.fusion.items()]                 # each (B,S,g,g)
        found = self.pixels(image, f, self.unified) if self.latent is None else self.walk(image, f)[0]
        return {stage: tokens.index for stage, tokens in found.items()}

    @torch.no_grad()
    def encode(self, image):
        """image (B,3,H,W) CLIP-normalised, of any size -> stage -> index (B,h,w) int64; counts for `usage`.

        Padded with zeros (CLIP's mean colour) right and below to multiples of the stride, so the grid is that of
        `grids(H, W)`: its last rows and columns may show nothing but padding.
        """
        H, W = image.shape[-2:]
        indices = self(F.pad(image, (0, -W % self.stride, 0, -H % self.stride)))
        for stage, index in indices.items():
            self.counts[stage] += torch.bincount(index.flatten(), minlength=len(self.counts[stage])).cpu()
        return indices

    def usage(self):
        """stage -> dict: counts (K) of all that `encode` gave, and vq.codebook_health of them: perplexity, used, cosine."""
        return {stage: {"counts": counts.clone(), **codebook_health(counts, self.codebook(stage).cpu())}
                for stage, counts in self.counts.items()}

    # ---- indices -> codes, image ----

    def check(self, indices):
        """Raises InputError unless `indices` are stages of this tokenizer on grids that fit together."""
        scales, sides = dict(zip(STAGES, (*self.config.scales, 1))), {}
        for stage, index in indices.items():
            if stage not in self.stages:
                raise InputError(f"tokens of {stage!r}: this tokenizer has {', '.join(self.stages)}")
            if index.dtype in (torch.bool, torch.complex64, torch.complex128) or index.is_floating_point():
                raise InputError(f"{stage} tokens are {str(index.dtype)[6:]}: indices are whole numbers, such as int64")
            K, s = len(self.counts[stage]), scales[stage]
            if index.dim() != 3 or not index.numel() or index.shape[1] % s or index.shape[2] % s:
                raise InputError(f"{stage} tokens are {tuple(index.shape)}: needs (B,h,w), h and w multiples of {s}")
            low, high = (int(n) for n in index.aminmax())
            if low < 0 or high >= K:
                raise InputError(f"{stage} tokens run from {low} to {high}: this tokenizer has the codes 0 to {K - 1}")
            sides[stage] = (index.shape[0], index.shape[1] // s, index.shape[2] // s)
        if len(set(sides.values())) > 1:
            said = ", ".join(f"{stage} {tuple(indices[stage].shape)}" for stage in sides)
            asked = ":".join(str(scales[stage]) for stage in sides)
            raise InputError(f"tokens of different images: {said}; sides must be as {asked}, their number the same")

    def codes(self, indices):
        """stage -> index (B,h,w) of any integer type -> stage -> the codes themselves (B,D,h,w)."""
        self.check(indices)
        return {stage: F.embedding(index.long(), self.codebook(stage)).permute(0, 3, 1, 2)
                for stage, index in indices.items()}

    @torch.no_grad()
    def decode(self, indices):
        """stage -> index (B,h,w) -> image (B,3,H,W) in [0,1], padding included.

        A missing pyramid stage is a zero condition.  PAT's own image differs by rounding: its straight-through zq is
        x + (code - x).  Raises InputError without latent tokens or if this is no tokenizer with `latent=True`.
        """
        if self.decoder is None:
            raise InputError("this tokenizer has no latent stage, no decoder: make it by Tokenizer.of(model, latent=True)")
        if "latent" not in indices:
            raise InputError("decoding starts from the latent tokens, which are missing; only others may be left out")
        return self.decoder(self.codes(indices))["image"].clamp(0, 1)

    # ---- one file ----

    def fingerprint(self, numbers=None):
        """16 hex digits of all that the meaning of a token depends on: every number and every size.

        `numbers`: those of the config as a file tells them, where that file is checked.
        """
        told = [tensors_checksum(self.state_dict()), self.stages, numbers or flat(self.config)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def save(self, path):
        """Write all of it to one safetensors file, atomically.  Raises InputError where that cannot be done."""
        told = dict(config=flat(self.config), latent=self.latent is not None, fingerprint=self.fingerprint())
        state = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        write_files({path: save(state, {"pat_tokenizer": json.dumps(told)})})

    @classmethod
    def load(cls, path, device="cpu"):
        """What `save` wrote.  Raises InputError, one line, for any other file and for a damaged one."""
        from published.weights import differences

        try:
            with safe_open(path, "pt") as file:
                told, state = (file.metadata() or {}).get("pat_tokenizer"), {k: file.get_tensor(k) for k in file.keys()}
        except Exception as error:                            # safetensors and the file system each have their own
            raise InputError(f"{path}: not a readable tokenizer ({str(error).splitlines()[0]}); it may be truncated: "
                             "copy it again") from error
        if told is None:
            raise InputError(f"{path}: holds no tokenizer; make one with python tokenizer.py save RUN --out {path}")
        try:
            told = json.loads(told)
            config = filled(PATConfig(), told["config"])
            PAT.check(config)
            tokenizer = cls(config, told["latent"])
        except (ValueError, TypeError, KeyError, AttributeError, InputError) as error:
            raise InputError(f"{path}: its description of the tokenizer cannot be used ({error}); copy it again") from error
        wrong = differences(tokenizer.state_dict(), state, most=5)
        if wrong:
            raise InputError(f"{path}: its tensors are not those of the tokenizer it describes: {wrong}")
        tokenizer.load_state_dict(state, assign=True)
        numbers = {name: UNSIGNED.get(name, value) for name, value in told["config"].items()}
        if tokenizer.fingerprint(numbers) != told.get("fingerprint"):
            raise InputError(f"{path}: damaged: its numbers are not those that were written; copy it again")
        return tokenizer.to(device)


def from_run(run, device="cpu"):
    """The PAT of a run directory.  Raises InputError for one of SAN."""
    model, _ = load_run(run, device)
    if not isinstance(model, PAT):
        raise InputError(f"{run}: a run of {type(model).__name__}, which has no tokens; give one of PAT")
    return model


def open_tokenizer(run, device="cpu"):
    """The tokenizer of a run directory, latent included, or of a file that `Tokenizer.save` wrote."""
    return Tokenizer.load(run, device) if Path(run).is_file() else Tokenizer.of(from_run(run, device), latent=True)


# --- the commands: photos <-> tokens.npz ------------------------------------------------------------------------------
# names (n) str    sizes (n,2) height, width of the photo    crops (n,2) the same as it was encoded, without padding
# fingerprint str  of the tokenizer                          STEM.STAGE (h,w) smallest unsigned type that holds K - 1


MOST_ENCODED = 4096**2                 # pixels of an image as it is encoded: CLIP and the side ViT look at all of it at once
MOST_SIDE = 4096                       # pixels of --short-side
MOST_BYTES = 2**28                     # of all tokens in one file, unpacked; eight times as many in memory


def encodable(where, h, w):
    """Raises InputError for more than MOST_ENCODED pixels."""
    if h * w > MOST_ENCODED:
        raise InputError(f"{where}: {h}x{w} pixels are more than can be encoded at once, {MOST_ENCODED / 1e6:.1f} megapixels "
                         "(tokenizer.MOST_ENCODED); give a smaller --short-side")


def same_file(a, b):
    return os.path.realpath(a) == os.path.realpath(b)


def encode_files(paths, out, tokenizer, short_side=None):
    """Encode photos into `out` (.npz); prints a line each.  `short_side`: encoded at this many pixels, 0 = as they are.

    Default: the size at which its run scores photos.  Raises InputError, and then nothing is written.
    """
    paths, out, c = [Path(path) for path in paths], Path(out), tokenizer.config
    by_stem = {}
    for path in paths:
        if by_stem.setdefault(path.stem, path) is not path:
            raise InputError(f"{path} and {by_stem[path.stem]}: tokens go by the name before the ending; rename one")
        if same_file(path, out):
            raise InputError(f"--out {out}: would overwrite the input; choose another name")
        if path.name != path.name.encode(errors="replace").decode():
            raise InputError(f"{str(path)!r}: its name is no UTF-8; rename it")
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise InputError(f"--out {out}: give a name ending in .npz in an existing folder")
    short = c.clip.short_side if short_side is None else short_side
    if not 0 <= short <= MOST_SIDE:
        raise InputError(f"--short-side {short}: takes a number of pixels up to {MOST_SIDE}, or 0 for each photo's own size")
    arrays = {"fingerprint": np.array(tokenizer.fingerprint()), "names": np.array([path.name for path in paths])}
    sizes, crops, device = [], [], tokenizer.vlm.positions.device
    for path in paths:
        picture = read_image(path)                                                        # (H,W,3) uint8
        small = resize_short(picture, short, c.clip.long_side * short // c.clip.short_side) if short else picture
        (H, W), (h, w) = picture.shape[:2], small.shape[:2]
        encodable(path, h, w)
        tokens = 0
        for stage, index in tokenizer.encode(to_tensor(small)[None].to(device)).items():
            smallest = np.min_scalar_type(len(tokenizer.counts[stage]) - 1)
            arrays[f"{path.stem}.{stage}"] = index[0].cpu().numpy().astype(smallest)
            tokens += index.numel()
        sizes.append((H, W))
        crops.append((h, w))
        grids = ", ".join(f"{stage} {a}x{b}" for stage, (a, b) in tokenizer.grids(h, w).items())
        bits = tokenizer.bits_per_pixel(h, w)
        print(f"{path.name}: {H}x{W}, encoded at {h}x{w}: {grids} = {tokens:,} tokens, {bits:.3f} bits per pixel, "
              f"{math.ceil(bits * h * w / 8):,} bytes; the photo's file has {path.stat().st_size:,}")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, sizes=np.array(sizes), crops=np.array(crops), **arrays)
    write_files({out: buffer.getvalue()})
    print(f"written: {out}, {len(paths)} image{'s' * (len(paths) > 1)}, {buffer.tell():,} bytes")


def read_tokens(path, tokenizer):
    """[(stem, size (H,W), crop (h,w), stage -> index (1,h,w) int64)] of a file that `encode_files` wrote.

    Raises InputError for a damaged or foreign file, for another tokenizer's, and for one that would write elsewhere.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            size = sum(member.file_size for member in file.zip.infolist())
            if size > MOST_BYTES:
                raise ValueError(f"it unpacks to {size:,} bytes, and MOST_BYTES are {MOST_BYTES:,}: encode into several")
            if file.zip.testzip():                            # numpy reads as much as an array's header says, no checksum
                raise ValueError("a checksum is wrong")
            arrays = {key: file[key] for key in file.files}
        names, sizes, crops = (arrays[key].astype(kind).tolist()
                               for key, kind in (("names", str), ("sizes", np.int64), ("crops", np.int64)))
        found = [(Path(name).stem, *map(tuple, both)) for name, *both in zip(names, sizes, crops, strict=True)]
        if any("/" in name or "\0" in name or not Path(name).stem for name in names):
            raise ValueError("a name with a folder in it")
        if any(len(size) != 2 or min(size) < 1 for _, *both in found for size in both):
            raise ValueError("sizes that are none")
        images = [{stage: torch.from_numpy(arrays[f"{stem}.{stage}"].astype(np.int64))[None]
                   for stage in STAGES if f"{stem}.{stage}" in arrays} for stem, _, _ in found]
        fingerprint = str(arrays["fingerprint"])
        used = {"fingerprint", "names", "sizes", "crops", *(f"{stem}.{stage}" for stem, *_ in found for stage in STAGES)}
        if arrays.keys() - used:
            raise ValueError(f"{min(arrays.keys() - used)!r} belongs to no image of it")
    except Exception as error:                                # zip, zlib, numpy and the file system each have their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a readable file of tokens ({reason}); if truncated, encode again") from error
    if fingerprint != tokenizer.fingerprint():
        raise InputError(f"{path}: was encoded by another tokenizer; give its run or its file with --run")
    for (stem, size, crop), indices in zip(found, images):
        bounded(f"{path}: {stem}", *size)
        encodable(f"{path}: {stem}", *crop)
        tokenizer.check(indices)
        shapes = {stage: tuple(index.shape[1:]) for stage, index in indices.items()}
        if shapes != tokenizer.grids(*crop):
            h, w = crop
            raise InputError(f"{path}: {stem}: its token grids are not those of {h}x{w} pixels; encode again")
    return [(*about, indices) for about, indices in zip(found, images)]


def decode_file(path, out, tokenizer):
    """Decode every image of a file of tokens to `out`/STEM.png at the photo's own size; overwrites nothing.

    Raises InputError; a bad file of tokens or a name that is taken is found before anything is written.
    """
    images, out = read_tokens(path, tokenizer), Path(out)
    if tokenizer.decoder is None:
        raise InputError("this tokenizer only encodes: it was saved with --pyramid-only")
    for stem, *_ in images:
        if (out / f"{stem}.png").exists():
            raise InputError(f"{out / stem}.png: exists already; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made a directory ({error.strerror})") from error
    device = tokenizer.vlm.positions.device
    for stem, (H, W), (h, w), indices in images:
        image = tokenizer.decode({stage: index.to(device) for stage, index in indices.items()})[0, :, :h, :w]
        picture = Image.fromarray((255 * image).round().byte().permute(1, 2, 0).cpu().numpy())
        write_files({out / f"{stem}.png": picture if (h, w) == (H, W) else picture.resize((W, H), Image.BILINEAR)})
        print(f"written: {out / stem}.png, {H}x{W}, decoded at {h}x{w}")


def save_tokenizer(run, out, latent):
    """The tokenizer of a run directory into one file.  Raises InputError; `out` is then as it was."""
    if Path(run).is_file():
        raise InputError(f"{run}: takes a run directory" + (
            ", and this is one already saved alone" if run.endswith(".safetensors") else ""))
    if Path(out).suffix != ".safetensors":
        raise InputError(f"--out {out}: give a name ending in .safetensors")
    found = Tokenizer.of(from_run(run), latent)
    found.save(out)
    print(f"written: {out}, {Path(out).stat().st_size:,} bytes, {', '.join(found.stages)}")


RUN = "runs/world-pat-0"                # where the default run leaves PAT


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="photos to tokens", allow_abbrev=False)
    encode.add_argument("images", nargs="+", metavar="IMAGE")
    encode.add_argument("--out", metavar="TOKENS.npz", required=True)
    encode.add_argument("--short-side", type=int, metavar="N",
                        help="encode at this many pixels, 0: each photo's own size (default: as the run scores photos)")
    decode = commands.add_parser("decode", help="tokens to pictures, at the photos' own sizes", allow_abbrev=False)
    decode.add_argument("tokens", metavar="TOKENS.npz")
    decode.add_argument("--out", metavar="DIR", required=True, help="where STEM.png of each photo goes")
    for command in (encode, decode):
        command.add_argument("--run", default=RUN, metavar="RUN", help=f"a run, or a tokenizer saved alone ({RUN})")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    save = commands.add_parser("save", help="a run's tokenizer alone, one file that needs no other", allow_abbrev=False)
    save.add_argument("run", metavar="RUN")
    save.add_argument("--out", metavar="FILE.safetensors", required=True)
    save.add_argument("--pyramid-only", action="store_true", help="early, mid, late: half the size, cannot decode")
    args = parse_flags(parser, argv)
    if args.command == "save":
        return save_tokenizer(args.run, args.out, not args.pyramid_only)
    check_device(args.device)
    found = open_tokenizer(args.run, args.device)
    if args.command == "encode":
        encode_files(args.images, args.out, found, args.short_side)
    else:
        decode_file(args.tokens, args.out, found)


if __name__ == "__main__":
    run_cli(main)
