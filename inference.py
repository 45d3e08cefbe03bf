"""From a picture and any words to a name for every pixel: SAN's protocol, single scale.

Q queries give mask logits m (Q,hm,wm) and class logits c (Q,L+1), whose last column is the learned background:

    m       bilinear to the padded input, padding cropped away, bilinear to the original size          (Q,H,W)
    s_lp    = Σ_q softmax(c_q)_l sigmoid(m_qp)       l over the L names; the background goes AFTER the softmax
    name_p  = argmax_l s_lp                             --none-of-these: unnamed (-1) where max_l s_lp < s_background,p

    a 480x640 photo: resized to 640x853, padded to 640x864, m (100,40,54) -> (100,640,864) -> (100,480,640)

Nothing of the size L x H x W is ever held: the answer is worked out a band of rows at a time.

# paper: the protocol of the compared scores is SAN's.
# ours: the rule of --none-of-these; `segment_dense`, a row for comparison that needs no training.

Tests: tests/test_inference.py.  Read next: metrics.py.  H, W original size; h, w network input without padding; see
hsattn.py.
"""

import math

import torch
import torch.nn.functional as F

from images import resize_short, to_tensor

UNNAMED = -1
BAND = 2**25                                                  # floats held per band of rows: 128 MiB whatever the image


def neighbours(rows, small, big):
    """Bilinear, align_corners=False: rows (r) of `big` lie between rows upper and lower (r) of `small`, at t (r,1)."""
    y = ((rows + 0.5) * (small / big) - 0.5).clamp(min=0)
    upper = y.long()
    return upper, (upper + 1).clamp(max=small - 1), (y - upper)[:, None]


def upsample_rows(x, size, rows):
    """Only the rows `rows` of bilinear F.interpolate(x, size): x (C,h,w), size (H,W), rows (r) -> (C,r,W)."""
    upper, lower, t = neighbours(rows, x.shape[1], size[0])
    return F.interpolate(torch.lerp(x[:, upper], x[:, lower], t), size=size[1], mode="linear", align_corners=False)


def two_step_bands(x, padded, crop, size, held):
    """Both upsamplings of the protocol, a band of rows at a time: 847 names on a 12-megapixel photo would not fit.

    x (C,hm,wm) logits; sizes (rows, columns) of the padded input, of the input without padding, and of the original;
    `held`: how many floats a pixel costs the caller.  Yields rows (r) and their values (C,r,W); bands cover (H,W).
    """
    for rows in torch.arange(size[0], device=x.device).split(max(1, BAND // (held * max(padded[1], size[1])))):
        if crop == size:                                      # the second step would be the identity
            yield rows, upsample_rows(x, padded, rows)[..., :crop[1]]
            continue
        upper, lower, t = neighbours(rows, crop[0], size[0])
        band = torch.lerp(upsample_rows(x, padded, upper)[..., :crop[1]],
                          upsample_rows(x, padded, lower)[..., :crop[1]], t)                  # (C,r,w)
        yield rows, F.interpolate(band, size=size[1], mode="linear", align_corners=False)     # (C,r,W)


def semantic_scores(mask_logits, class_logits, padded, crop, size):
    """The header's s, band by band: yields rows (r), scores (L,r,W) and the background's share (r,W), all >= 0.

    mask_logits (Q,hm,wm), class_logits (Q,L+1), background last; sizes as in `two_step_bands`.
    """
    share = class_logits.float().softmax(-1).T                                                # (L+1,Q)
    for rows, band in two_step_bands(mask_logits.float(), padded, crop, size, sum(share.shape)):
        s = torch.einsum("lq,qrw->lrw", share, band.sigmoid())                                # (L+1,r,W)
        yield rows, s[:-1], s[-1]


def name_pixels(mask_logits, class_logits, padded, crop, size, none_of_these=False):
    """The protocol's prediction (H,W) int64 in 0..L-1, on the CPU; UNNAMED only with `none_of_these`."""
    prediction = torch.empty(size, dtype=torch.int64)
    for rows, scores, background in semantic_scores(mask_logits, class_logits, padded, crop, size):
        best, index = scores.max(0)
        if none_of_these:
            index[best < background] = UNNAMED
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
    """What PAT's output dict shows of one image, see `segment`; {} for SAN's."""
    if "image" not in out:
        return {}
    image = unpad(out["image"][0], crop, padded).clamp(0, 1)
    return {"image": image, "tokens": out["tokens"], "crop": crop, "padded": padded}


@torch.no_grad()
def tokenize(model, image):
    """One image (3,h,w) normalised through a PAT without any names -> the second value of `segment`."""
    padded_image = pad(image.to(model.background.device), model.stride)
    out = model(padded_image, padded_image.new_zeros(0, model.vlm.text_width))
    return shown(out, tuple(image.shape[-2:]), tuple(padded_image.shape[-2:]))


@torch.no_grad()
def segment(model, image, text, size, none_of_these=False):
    """One image through the whole protocol: image (3,h,w) normalised, text (L,E), size (H,W) to answer at.

    -> prediction (H,W) int64, and what else the model shows: {} for SAN; for PAT "image" (3,h,w) in [0,1], "tokens"
    {stage: Tokens over the padded input}, and the two sizes "crop" (h,w) and "padded" that say what is padding.
    """
    padded_image = pad(image.to(text.device), model.stride)
    crop, padded = tuple(image.shape[-2:]), tuple(padded_image.shape[-2:])
    out = model(padded_image, text)
    prediction = name_pixels(out["masks"][-1][0], out["classes"][-1][0], padded, crop, tuple(size), none_of_these)
    return prediction, shown(out, crop, padded)


def segment_photo(model, picture, names, none_of_these=False):
    """Any picture (H,W,3) uint8 and any names, for a model in eval mode -> as `segment`, at the picture's own size."""
    small = resize_short(picture, model.config.short_side, model.config.long_side)            # (h,w,3)
    return segment(model, to_tensor(small), model.vlm.embed_text(names), picture.shape[:2], none_of_these)


@torch.no_grad()
def segment_dense(vlm, stride, image, text, size):
    """Training-free, MaskCLIP-style: each patch's own CLIP feature against the names -> prediction (H,W) int64."""
    padded_image = pad(image.to(text.device), stride)
    cosine = torch.einsum("le,ehw->lhw", text, vlm.dense(padded_image)[0])                    # (L,h,w)
    prediction, sizes = torch.empty(size, dtype=torch.int64), (tuple(padded_image.shape[-2:]), tuple(image.shape[-2:]))
    for rows, band in two_step_bands(cosine, *sizes, tuple(size), 2 * len(text)):
        prediction[rows.cpu()] = band.argmax(0).cpu()
    return prediction
