"""Any picture, any words: from what a model answers to a name for every pixel.  SAN's protocol, single scale.

    python predict.py runs/world-pat-0 photo.jpg --labels "striped boat, grass, something else" --out out.png

Every model answers with maps a_c on a grid of its own and with what each map says of each name (segmenter.Answer);

    a       bilinear to the padded input, padding cropped away, bilinear to the original size          (C,H,W)
    s_lp    = Σ_c mix_cl gate(a_cp)                     l over the L names
    name_p  = argmax_l s_lp                             --none-of-these: unnamed (-1) where max_l s_lp < s_none,p

For SAN and PAT a are the mask logits of Q queries, gate is the sigmoid, mix the softmax over the names and the learned
background, which is dropped AFTER the softmax and is "none of these".

    a 480x640 photo: resized to 640x853, padded to 640x864, a (100,40,54) -> (100,640,864) -> (100,480,640)

One picture at a time: padded to the size of another, to share a batch, it is named otherwise, since CLIP sees the padding
(one trial by hand, 60 scenes made 8, 32 and 64 columns wider: 9, 11 and 15 % of the pixels change, no scene stays as it was).

Nothing of the size L x H x W is ever held: the answer is worked out a band of rows at a time.  Beside the overlay come
its legend and, of a model that repaints and quantises, the reconstruction and the token map of each stage.

# paper: the protocol of the compared scores is SAN's.
# ours: the rule of --none-of-these; `DenseCLIP`, a row for comparison that needs no training.

Tests: tests/test_predict.py.  Read next: eval.py.  H, W original size; h, w network input without padding.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from cli import InputError, check_device, parse_flags, parse_names, run_cli, write_files
from data import palette, read_image, resize_short, to_tensor
from runs import load_run
from segmenter import Answer, identity

UNNAMED = -1
BAND = 2**25                                                  # floats held per band of rows: 128 MiB whatever the image


# --- from an answer to names ----------------------------------------------------------------------------------------


def two_steps(x, padded, crop, size):
    """Both upsamplings of the protocol along the last axis: x (...,n,w) on a grid over `padded` -> (...,n,size)"""
    x = F.interpolate(x, size=padded, mode="linear", align_corners=False)[..., :crop]
    return x if crop == size else F.interpolate(x, size=size, mode="linear", align_corners=False)


def two_step_bands(x, padded, crop, size, held):
    """Both upsamplings, a band of rows at a time: 847 names on a 12-megapixel photo would not fit.

    x (C,hm,wm) logits; sizes (rows, columns) of the padded input, of the input without padding, and of the original;
    `held`: how many floats a pixel costs the caller.  Yields rows (r) and their values (C,r,W); bands cover (H,W).
    """
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    down = two_steps(eye[None], padded[0], crop[0], size[0])[0].T                             # (H,hm): linear, so a matrix
    for rows in torch.arange(size[0], device=x.device).split(max(1, BAND // (held * max(padded[1], size[1])))):
        yield rows, two_steps(down[rows] @ x, padded[1], crop[1], size[1])                    # (C,r,W)


def semantic_scores(answer, padded, crop, size):
    """The header's s, band by band: yields rows (r), scores (L,r,W) and what "none of these" scores (r,W) or ().

    Sizes as in `two_step_bands`.
    """
    maps, mix = answer.maps.float(), answer.mix
    held = 2 * len(maps) if mix is None else sum(mix.shape)                                   # floats a pixel
    for rows, band in two_step_bands(maps, padded, crop, size, held):
        weights = answer.gate(band)                                                           # (C,r,W)
        if mix is None:
            yield rows, weights, weights.new_tensor(answer.floor)
            continue
        s = torch.einsum("lc,crw->lrw", mix.T, weights)                                       # (L or L+1,r,W)
        yield (rows, s[:-1], s[-1]) if answer.none else (rows, s, s.new_tensor(answer.floor))


def name_pixels(answer, padded, crop, size, none_of_these=False):
    """The protocol's prediction (H,W) int64 in 0..L-1, on the CPU; UNNAMED only with `none_of_these`."""
    prediction = torch.empty(size, dtype=torch.int64)
    for rows, scores, none in semantic_scores(answer, padded, crop, size):
        best, index = scores.max(0)
        if none_of_these:
            index[best < none] = UNNAMED
        prediction[rows.cpu()] = index.cpu()
    return prediction


def pad(image, stride):
    """image (3,h,w), normalised -> (1,3,Hp,Wp): zeros right and below up to multiples of `stride`."""
    h, w = image.shape[-2:]
    return F.pad(image, (0, -w % stride, 0, -h % stride))[None]


def unpad(x, crop, padded):
    """Drop what only covers padding: x (...,a,b), any grid over the padded input -> (...,a',b')."""
    a, b = x.shape[-2:]
    return x[..., :math.ceil(a * crop[0] / padded[0]), :math.ceil(b * crop[1] / padded[1])]


def shown(out, crop, padded):
    """What an output dict shows of one image besides names, see `segment`; {} where the model repaints nothing."""
    if "image" not in out:
        return {}
    image = unpad(out["image"][0], crop, padded).clamp(0, 1)
    return {"image": image, "tokens": out["tokens"], "crop": crop, "padded": padded}


def device_of(model):
    return next(model.parameters()).device


@torch.no_grad()
def tokenize(model, image):
    """One image (3,h,w) normalised through a PAT without any names -> the second value of `segment`."""
    padded_image = pad(image.to(device_of(model)), model.stride)
    out = model(padded_image, padded_image.new_zeros(0, model.vlm.text_width))
    return shown(out, tuple(image.shape[-2:]), tuple(padded_image.shape[-2:]))


@torch.no_grad()
def segment(model, image, text, size, none_of_these=False):
    """One image through the whole protocol: image (3,h,w) normalised, text (L,E), size (H,W) to answer at.

    -> prediction (H,W) int64, and what else the model shows: {}, or "image" (3,h,w) in [0,1], "tokens" {stage: Tokens
    over the padded input}, and the two sizes "crop" (h,w) and "padded" that say what is padding.
    """
    padded_image = pad(image.to(text.device), model.stride)
    crop, padded = tuple(image.shape[-2:]), tuple(padded_image.shape[-2:])
    out = model(padded_image, text)
    prediction = name_pixels(model.answer(out, 0), padded, crop, tuple(size), none_of_these)
    return prediction, shown(out, crop, padded)


def segment_photo(model, picture, names, none_of_these=False):
    """Any picture (H,W,3) uint8 and any names, for a model in eval mode -> as `segment`, at the picture's own size."""
    clip = model.config.clip
    small = resize_short(picture, clip.short_side, clip.long_side)                            # (h,w,3)
    return segment(model, to_tensor(small), model.vlm.embed_text(names), picture.shape[:2], none_of_these)


class DenseCLIP:
    """MaskCLIP (dense): each patch's own CLIP feature against the names.  As a model, without any training."""

    def __init__(self, vlm, stride):
        self.vlm, self.stride = vlm, stride

    def __call__(self, image, text):
        """image (B,3,H,W), text (L,E) unit -> dict(cosines (B,L,h,w))"""
        return dict(cosines=torch.einsum("le,behw->blhw", text, self.vlm.dense(image)))

    def answer(self, out, b=0):
        return Answer(out["cosines"][b], gate=identity)


# --- what it looks like ---------------------------------------------------------------------------------------------


def to_image(unit):
    """(3,h,w) in [0,1] -> (h,w,3) uint8."""
    return (unit.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def paint(index, colours):
    """index (H,W) integer, colours (n,3) uint8 -> (H,W,3) uint8; black where it is -1."""
    return np.concatenate([colours, np.zeros((1, 3), np.uint8)])[np.asarray(index)]


def fitting(picture, width, tallest=3):
    """(h,w) at which a picture is drawn: `width` wide, or narrower where it would be over `tallest` times as high."""
    h, w = picture.shape[:2]
    return (max(1, h * width // w), width) if h <= tallest * w else (tallest * width, max(1, tallest * width * w // h))


def resize(picture, size, smooth=False):
    """picture (h,w,3) uint8 -> (H,W,3) uint8, size (H,W): nearest, so that every token stays one flat square."""
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), how))


def overlay(image, prediction, colours, strength=0.6):
    """The image (H,W,3) uint8 tinted by each pixel's name (H,W), borders white, unnamed pixels untinted -> (H,W,3)."""
    prediction = np.asarray(prediction)
    tint = np.where(prediction[..., None] == UNNAMED, 0, strength)
    mixed = image * (1 - tint) + paint(prediction, colours) * tint
    border = np.zeros(prediction.shape, bool)
    border[:, 1:] |= prediction[:, 1:] != prediction[:, :-1]
    border[1:] |= prediction[1:] != prediction[:-1]
    mixed[border] = 255
    return mixed.round().astype(np.uint8)


def legend(prediction, names, colours):
    """One line per name: its colour, the name, its share of the pixels; unnamed pixels last, if any.  -> PIL image"""
    prediction, font = np.asarray(prediction), ImageFont.load_default(16)
    rows = [(tuple(int(c) for c in colours[i]), name, (prediction == i).mean()) for i, name in enumerate(names)]
    if (prediction == UNNAMED).any():
        rows.append(((255, 255, 255), "(none of these)", (prediction == UNNAMED).mean()))
    lines = [f"{name}   {share:.1%}" for _, name, share in rows]
    sheet = Image.new("RGB", (48 + int(max(map(font.getlength, lines))), 8 + 24 * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, ((colour, _, _), line) in enumerate(zip(rows, lines)):
        draw.rectangle((8, 8 + 24 * y, 26, 24 + 24 * y), fill=colour, outline="black")
        draw.text((36, 6 + 24 * y), line, fill="black", font=font)
    return sheet


def spread(index, crop, padded, size):
    """index (a,b) over the padded input -> (H,W) int64: the token under each pixel of the picture.

    crop (h,w), padded and size (H,W) as in `two_step_bands`.
    """
    rows, columns = (((torch.arange(big) + 0.5) * h / big * cells / whole).long()             # pixel -> input -> token
                     for big, h, cells, whole in zip(size, crop, index.shape, padded))
    return index.cpu()[rows][:, columns]


def token_map(index, codes, crop, padded, size):
    """`spread` in colours: index (a,b) of a book of `codes` -> (H,W,3) uint8.  A code looks the same everywhere."""
    return paint(spread(index, crop, padded, size), palette(codes))


# --- the command ----------------------------------------------------------------------------------------------------


def check_picture(out, instead_of=None):
    """Raises InputError unless `out` can be written as a picture, and is not the picture `instead_of`."""
    out = Path(out)
    kind = Image.registered_extensions().get(out.suffix.lower())
    if kind not in Image.SAVE or not out.parent.is_dir():
        raise InputError(f"--out {out}: needs an existing folder and a picture's ending, such as out.png")
    if instead_of is not None and out.exists() and out.samefile(instead_of):
        raise InputError(f"--out {out}: would overwrite the input; choose another name")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory that train.py left")
    parser.add_argument("image", metavar="FILE", help="any picture")
    parser.add_argument("--labels", metavar="NAMES", required=True, help='separated by commas: "striped boat, grass"')
    parser.add_argument("--out", metavar="OUT", default="out.png", help="the overlay; the others go beside it (out.png)")
    parser.add_argument("--none-of-these", action="store_true",
                        help="pixels whose best name loses to the learned background stay unnamed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parse_flags(parser, argv)
    check_device(args.device)
    check_picture(args.out)
    names, picture, out = parse_names(args.labels), read_image(args.image), Path(args.out)    # (H,W,3) uint8
    model, _ = load_run(args.run, args.device)
    prediction, extras = segment_photo(model, picture, names, args.none_of_these)
    colours, size = palette(len(names)), picture.shape[:2]
    files = {"": overlay(picture, prediction, colours), "_legend": legend(prediction, names, colours)}
    if extras:
        files["_reconstruction"] = resize(to_image(extras["image"]), size, smooth=True)
        for stage, tokens in extras["tokens"].items():
            codes = len(model.codebook(stage))
            files[f"_tokens_{stage}"] = token_map(tokens.index[0], codes, extras["crop"], extras["padded"], size)
    files = {out.with_name(f"{out.stem}{part}{out.suffix}"): content for part, content in files.items()}
    if any(path.exists() and path.samefile(args.image) for path in files):
        raise InputError(f"--out {out}: would overwrite the input; choose another name")
    write_files(files)
    print("written: " + ", ".join(str(path) for path in files))
    if not extras:
        print(f"{type(model).__name__} has no tokens and repaints nothing: no token maps, no reconstruction")


if __name__ == "__main__":
    run_cli(main)
