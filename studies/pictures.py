"""What a finished run's pictures are drawn with: sheets of pictures, names written on masks, dots, lines and curves.

    write_names  each name written inside its regions, as large as they allow
    contact_sheet, sample_sheet    pictures in rows; the first images of a dataset with what a model made of them
    Figure, plot a white sheet for dots, lines and text, all smooth; curves with axes on it

A photo tinted by name, a token map and their colours are predict.py's: a name, and a code, has the same colour in every
picture (data.palette).  Text is in Pillow's own font, which knows Latin letters only.

    region (H,W) bool, "orange circle"  ->  place: text with line breaks, font, box (left, top, right, bottom)

# ours: all of it.

Tests: tests/studies/test_pictures.py.  Read next: circle.py.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from cli import InputError
from data import palette
from predict import UNNAMED, fitting, paint, resize, segment, to_image

INK = palette(27)[[6, 26, 7, 8, 17, 24, 15, 25, 16]]          # the palette's dark colours, for lines and text on white
GREY = (110, 110, 110)


def make_folder(path):
    """The folder at `path`; raises InputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror})") from error


# --- text -----------------------------------------------------------------------------------------------------------


def fitted(text, width, size):
    """(text, font): the text at font size `size`, or smaller (8 at least), or cut with dots, to be `width` wide."""
    while size > 8 and ImageFont.load_default(size).getlength(text) > width:
        size -= 1
    font = ImageFont.load_default(size)
    if font.getlength(text) > width:
        text = next((text[:n] + ".." for n in range(len(text), 0, -1) if font.getlength(text[:n] + "..") <= width), "")
    return text, font


def layouts(text):
    """A name on one line, on two at each of its blanks, and a line for each word."""
    words = text.split()
    return dict.fromkeys([text, *(" ".join(words[:n]) + "\n" + " ".join(words[n:]) for n in range(1, len(words))),
                          "\n".join(words)])


def extent(layout, font, edge):
    """(left, top, width, height) of a text's box around its anchor, whole pixels, outline `edge` included."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    box = draw.multiline_textbbox((0, 0), layout, font, spacing=1, stroke_width=edge, align="center")
    left, top, right, bottom = box
    return left, top, int(np.ceil(right - left)), int(np.ceil(bottom - top))


def place(region, text, sizes=range(18, 8, -1), edge=2):
    """Where a name goes in its region (H,W) bool: as large as fits, as far from the border as it can be.

    -> (text with line breaks, font, box (left, top, right, bottom)); the box, outline `edge` included, lies in the
    region.  Where nothing fits, the smallest of `sizes` around the region's innermost pixel, inside the picture.
    """
    H, W = region.shape
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]                     # pixels to the border
    sums = np.pad(region, ((1, 0), (1, 0))).cumsum(0).cumsum(1)                               # (H+1,W+1)
    for size in sizes:
        font, sides = ImageFont.load_default(size), {}
        for layout in layouts(text):
            *_, w, h = extent(layout, font, edge)
            sides[layout] = w, h
            if w > W or h > H:
                continue
            # By the upper left corner of a box (h,w): are all its pixels in the region, and how deep is its middle?
            inside = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w] == w * h
            middle = depth[h // 2:h // 2 + inside.shape[0], w // 2:w // 2 + inside.shape[1]]
            if inside.any():
                y, x = np.unravel_index(np.where(inside, middle, -1).argmax(), inside.shape)
                return layout, font, (int(x), int(y), int(x) + w, int(y) + h)
    layout, (w, h) = min(sides.items(), key=lambda item: item[1][0])                          # the narrowest
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    left, top = max(0, min(int(x) - w // 2, W - w)), max(0, min(int(y) - h // 2, H - h))
    return layout, font, (left, top, left + w, top + h)


def write_names(picture, prediction, names, least=0.008):
    """The names written, white with a dark outline, into each connected region of (H,W) of a `least` share of pixels.

    picture (H,W,3) uint8 -> a new one.  Unnamed pixels stay without text.
    """
    sheet, prediction, edge = Image.fromarray(picture), np.asarray(prediction), 2
    draw = ImageDraw.Draw(sheet)
    for i in np.unique(prediction[prediction != UNNAMED]):
        regions, n = ndimage.label(prediction == i)
        for region in (regions == k for k in range(1, n + 1)):
            if region.mean() < least:
                continue
            text, font, (left, top, _, _) = place(region, names[i], edge=edge)
            dx, dy, *_ = extent(text, font, edge)
            draw.multiline_text((left - dx, top - dy), text, "white", font, spacing=1, align="center",
                                stroke_width=edge, stroke_fill=(20, 20, 20))
    return np.asarray(sheet)


# --- sheets ---------------------------------------------------------------------------------------------------------


def contact_sheet(rows, titles, cell=192, captions=None, gap=4):
    """rows: lists of (H,W,3) uint8 or None, one per title, drawn `cell` pixels wide (enlarged nearest) -> PIL image.

    captions: a list of str for each row, one under each picture, "" for none.
    """
    heights = [max(fitting(picture, cell)[0] for picture in row if picture is not None) for row in rows]
    below = 0 if captions is None else 18
    sheet = Image.new("RGB", (gap + len(titles) * (cell + gap), 24 + sum(heights) + (gap + below) * len(rows)), "white")
    draw, y = ImageDraw.Draw(sheet), 24
    for column, title in enumerate(titles):
        text, font = fitted(title, cell - 2, 14)
        draw.text((gap + 2 + column * (cell + gap), 4), text, fill="black", font=font)
    for r, (row, height) in enumerate(zip(rows, heights)):
        for column, picture in enumerate(row):
            x = gap + column * (cell + gap)
            if picture is not None:
                size = fitting(picture, cell)
                sheet.paste(Image.fromarray(resize(picture, size, smooth=picture.shape[1] > size[1])), (x, y))
            if captions is not None:
                text, font = fitted(captions[r][column], cell - 2, 12)
                draw.text((x + 1, y + height + 1), text, fill=(70, 70, 70), font=font)
        y += height + gap + below
    return sheet


class Figure:
    """A white sheet.  Lines, discs and boxes are drawn `FINE` times as large and shrunk; text comes on top, unshrunk.

    Coordinates are pixels from the upper left corner; colours are anything PIL takes, or a row of a palette.
    """

    FINE = 3

    def __init__(self, width, height):
        self.sheet, self.words = Image.new("RGB", (width * self.FINE, height * self.FINE), "white"), []
        self.draw = ImageDraw.Draw(self.sheet)

    @staticmethod
    def colour(given):
        return given if given is None or isinstance(given, str) else tuple(int(c) for c in given)

    def line(self, points, colour="black", width=1.0):
        """Through points [(x,y), ...]."""
        fine = [(x * self.FINE, y * self.FINE) for x, y in points]
        self.draw.line(fine, self.colour(colour), round(width * self.FINE), joint="curve")

    def arrow(self, start, end, colour="black", width=2.0, head=9):
        """A line that ends in a point; `head` is the length of its tip in pixels."""
        start, end = np.array(start, float), np.array(end, float)
        along = (end - start) / max(np.hypot(*(end - start)), 1e-9)
        across, back = np.array([-along[1], along[0]]), end - head * along
        self.line([start, back], colour, width)
        tip = [tuple(p * self.FINE) for p in (end, back + 0.45 * head * across, back - 0.45 * head * across)]
        self.draw.polygon(tip, fill=self.colour(colour))

    def disc(self, x, y, r, fill, edge=None, width=1.0):
        box = [(v - r) * self.FINE for v in (x, y)] + [(v + r) * self.FINE for v in (x, y)]
        self.draw.ellipse(box, self.colour(fill), self.colour(edge), round(width * self.FINE))

    def box(self, left, top, right, bottom, fill=None, edge=None, width=1.0):
        box = [v * self.FINE for v in (left, top, right, bottom)]
        self.draw.rectangle(box, self.colour(fill), self.colour(edge), round(width * self.FINE))

    def text(self, x, y, text, size=13, fill="black", anchor="la"):
        """`anchor` is PIL's: where in the text (x,y) is, such as "mm" for its middle."""
        self.words.append(((x, y), text, self.colour(fill), ImageFont.load_default(size), anchor))

    def image(self):
        """The sheet, PIL image of the size asked for."""
        sheet = self.sheet.reduce(self.FINE)
        for xy, text, fill, font, anchor in self.words:
            ImageDraw.Draw(sheet).text(xy, text, fill, font, anchor)
        return sheet


def sample_sheet(model, dataset, names=None, device="cpu", scenes=6):
    """The first scenes of a dataset, one a row: input, ground truth, prediction, and what was repainted -> PIL image"""
    names, was_training = names or dataset.names, model.training
    model.eval().to(device)
    text, colours, rows = model.vlm.embed_text(names), palette(len(names)), []
    for i in range(min(scenes, len(dataset))):
        sample = dataset[i]
        prediction, extras = segment(model, sample["image"], text, sample["label"].shape)
        rows.append([sample["original"], paint(sample["label"], colours), paint(prediction, colours)])
        if extras:
            rows[-1].append(resize(to_image(extras["image"]), prediction.shape, smooth=True))
    model.train(was_training)
    return contact_sheet(rows, ["input", "ground truth", "prediction", "reconstruction"][:len(rows[0])])


class Axis:
    """Values low..high along pixels start..end; `log`: in powers of ten.  `axis(value)` -> pixel, float."""

    def __init__(self, low, high, start, end, log=False):
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value):
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self):
        """Round numbers in the range: 1, 2, 5 times a power of ten."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if self.high / self.low < 100 else (1,)
            return [f * 10.0**d for d in decades for f in factors if self.low <= f * 10.0**d <= self.high]
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = min((f * unit for f in (1, 2, 5, 10)), key=lambda candidate: abs(candidate - rough))
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def plot(figure, box, title, lines, log=False, steps=None):
    """One panel: lines {name: [(step, value), ...]} in the box (left, top, right, bottom) of a Figure -> its two axes.

    A line is named at its end; on a log axis values that are not positive are left out.
    """
    left, top, right, bottom = box
    lines = {name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
             for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    values = [y for points in lines.values() for _, y in points] or [1.0]
    low, high = (min(values) / 1.15, max(values) * 1.15) if log else (min(0.0, *values), max(values) * 1.05 or 1.0)
    across = Axis(0, max(steps or 1, 1), left, right)
    up = Axis(low, high if high > low else low + 1, bottom, top, log)
    figure.text(left, top - 26, title, 15)
    for value in up.ticks():
        figure.line([(left, up(value)), (right, up(value))], (228, 228, 232), 0.7)
        figure.text(left - 6, up(value), f"{value:g}", 11, GREY, "rm")
    for value in across.ticks():
        figure.line([(across(value), bottom), (across(value), bottom + 4)], GREY, 0.7)
        figure.text(across(value), bottom + 12, f"{value:g}", 11, GREY, "mm")
    figure.line([(left, bottom), (right, bottom)], GREY, 0.8)
    ends = []
    for (name, points), colour in zip(lines.items(), INK):
        at = [(across(x), up(y)) for x, y in points]
        figure.line(at, colour, 1.6)
        figure.disc(*at[-1], 2.2, colour)
        ends.append((at[-1][1], name, colour))
    y = -math.inf
    for wanted, name, colour in sorted(ends, key=lambda end: end[0]):                         # from the top down
        y = max(wanted, y + 14)                               # names keep 14 pixels apart
        figure.text(right + 8, y, name, 12, colour, "lm")
    return across, up
