"""What a model saw, drawn: names over a photo, a legend, token maps, and the contact sheet of a run.

    overlay      (H,W,3) uint8 and names (H,W) -> the photo tinted by name, white borders between names
    token_map    the tokens of one stage as flat squares over the picture they were taken from
    sample_sheet the first images of a dataset, one a row: input, ground truth, prediction, reconstruction

A name, and a code, has the same colour in every picture (images.palette).

Tests: tests/test_pictures.py.  Read next: tally.py.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from images import palette
from inference import UNNAMED, segment


def to_image(unit):
    """(3,h,w) in [0,1] -> (h,w,3) uint8."""
    return (unit.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def paint(index, colours):
    """index (H,W) integer, colours (n,3) uint8 -> (H,W,3) uint8; black where it is -1."""
    return np.concatenate([colours, np.zeros((1, 3), np.uint8)])[np.asarray(index)]


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


def token_map(index, codes, crop, padded, size):
    """index (a,b) over the padded input, of a book of `codes` -> (H,W,3) uint8: each pixel in the colour of its token.

    A code has the same colour in every picture.  crop (h,w), padded and size (H,W) as in `two_step_bands`.
    """
    rows, columns = (((torch.arange(big) + 0.5) * h / big * cells / whole).long()             # pixel -> input -> token
                     for big, h, cells, whole in zip(size, crop, index.shape, padded))
    return paint(index.cpu()[rows][:, columns], palette(codes))


def contact_sheet(rows, titles, cell=192):
    """rows: lists of (H,W,3) uint8, one per title, drawn `cell` pixels wide (enlarged nearest) -> PIL image."""
    heights = [max(picture.shape[0] * cell // picture.shape[1] for picture in row) for row in rows]
    sheet = Image.new("RGB", (4 + len(titles) * (cell + 4), 24 + sum(heights) + 4 * len(rows)), "white")
    for x, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((6 + x * (cell + 4), 4), title, fill="black", font=ImageFont.load_default(14))
    y = 24
    for row, height in zip(rows, heights):
        for x, picture in enumerate(row):
            size = max(1, picture.shape[0] * cell // picture.shape[1]), cell
            shrinks = picture.shape[1] > cell
            sheet.paste(Image.fromarray(resize(picture, size, smooth=shrinks)), (4 + x * (cell + 4), y))
        y += height + 4
    return sheet


def sample_sheet(model, dataset, names=None, device="cpu", scenes=6):
    """The first scenes of a dataset, one a row: input, ground truth, prediction, for PAT reconstruction -> PIL image"""
    names, was_training = names or dataset.names, model.training
    model.eval().to(device)
    text, colours, rows = model.vlm.embed_text(names), palette(len(names)), []
    for i in range(min(scenes, len(dataset))):
        sample = dataset[i]
        prediction, seen = segment(model, sample["image"], text, sample["label"].shape)
        rows.append([sample["original"], paint(sample["label"], colours), paint(prediction, colours)])
        if seen:
            rows[-1].append(resize(to_image(seen["image"]), prediction.shape, smooth=True))
    model.train(was_training)
    return contact_sheet(rows, ["input", "ground truth", "prediction", "reconstruction"][:len(rows[0])])
