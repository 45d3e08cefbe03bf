"""A run on one page: `report.html`, which opens anywhere, on a phone too, and needs no server and no network.

    scores      the score table, and the table of meaning.py where it was measured
    tokens      some test images with the token map of every stage; pointing at a token (mouse, finger or arrow keys)
                lights up the region of its code in all pictures, and shows the patches that chose that code most
    pictures    what studies/gallery.py draws of the run

    python -m studies.report RUN [--compare RUN ...]      scores as eval.py does, with its flags, then draws

The end of `python train.py` does the same.  Scores are written first, then what is drawn.

Everything is inside the file: pictures as data URIs, each with a text that says what it shows; the token maps as bytes.
A code has one colour on the whole page.  Where the script does not run, the page still shows every picture.

    index (h,w) of one image and stage  ->  bytes in base64, one or two a token  ->  the script's Uint8 or Uint16Array

# ours: all of it.

Tests: tests/studies/test_report.py.  Read next: ablations.py.
"""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from cli import parse_flags, run_cli, write_files
from data import IGNORE, palette
from eval import (Pass, cells, check_flags, codebook_cells, format_table, label_of, open_runs, parser_of, score_table,
                  where_of, write_scores)
from predict import overlay, resize, segment, to_image, token_map
from published.images_of import scored_on
from studies.gallery import NAMES, run_pictures
from studies.patches import PATCH_IMAGES, patches_of
from studies.pictures import make_folder, sample_sheet

LONGEST = 512                          # pixels of a picture's longer side

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; color: #1a1a1a;
       background: #fff }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin-bottom: 1rem }} caption {{ text-align: left; color: #555 }}
th, td {{ padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }}
th:first-child {{ text-align: left; position: sticky; left: 0; background: #fff }}
pre {{ font-size: .8rem }}
.panels {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; margin: 1rem 0 2rem }}
@media (max-width: 40rem) {{ .panels {{ grid-template-columns: repeat(2, 1fr) }} }}
figure {{ margin: 0 }} figcaption {{ font-size: .85rem; color: #555 }}
.panel div {{ position: relative }}
.panel img, .picture img {{ width: 100%; height: auto; display: block }}
.panel img {{ image-rendering: pixelated }}
.panel canvas {{ position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none }}
[data-stage] div {{ cursor: crosshair; touch-action: manipulation }}
[data-stage] div:focus {{ outline: 3px solid #06c; outline-offset: 2px }}
#said {{ position: sticky; bottom: 0; background: #fff; border-top: 1px solid #ddd; padding: .5rem 0; min-height: 6.5rem }}
#said p {{ margin: 0 0 .3rem }} #patches {{ image-rendering: pixelated; max-width: 100%; height: 64px }}
.picture {{ margin: 1.5rem 0 }} .picture img {{ width: auto; max-width: 100% }}
</style>
</head>
<body>
{body}
</body>
</html>
"""

SCRIPT = """
const data = JSON.parse(document.getElementById('tokens').textContent);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
for (const image of data.images)
  for (const map of Object.values(image.maps)) {
    const raw = bytes(map.index);                                      // two bytes a token where a book needs them
    map.index = map.wide ? new Uint16Array(raw.buffer) : raw;
  }
const said = document.getElementById('words'), sheet = document.getElementById('patches');

function light(group, stage, row, column) {
  const image = data.images[group.dataset.image], map = image.maps[stage], book = data.stages[stage];
  const code = map.index[row * map.columns + column];
  const veil = document.createElement('canvas');                       // one pixel a token: clear where the code is
  veil.width = map.columns; veil.height = map.rows;
  const pixels = new ImageData(map.columns, map.rows);
  let cells = 0;
  map.index.forEach((k, i) => {
    if (k === code) cells++;
    else pixels.data.set([255, 255, 255, 200], 4 * i);
  });
  veil.getContext('2d').putImageData(pixels, 0, 0);
  document.querySelectorAll('.panels canvas').forEach(canvas => canvas.width = canvas.width);    // wipes it
  group.querySelectorAll('canvas').forEach(canvas => {
    canvas.width = canvas.clientWidth; canvas.height = canvas.clientHeight;
    const brush = canvas.getContext('2d');
    brush.imageSmoothingEnabled = false;
    brush.drawImage(veil, 0, 0, map.columns * map.shown[1], map.rows * map.shown[0], 0, 0, canvas.width, canvas.height);
  });
  const share = (100 * book.counts[code] / book.counts.reduce((a, b) => a + b)).toFixed(1);
  said.textContent = `${stage} code ${code}: ${cells} of the ${map.index.length} tokens of this image, ${share} % of all; ` +
                     `here mostly ${map.names[code]}`;
  const brush = sheet.getContext('2d'), size = book.size;
  sheet.width = book.each * size; sheet.height = size;
  brush.drawImage(book.picture, 0, code * size, book.each * size, size, 0, 0, book.each * size, size);
  sheet.setAttribute('aria-label', `patches that chose ${stage} code ${code} most`);
}

for (const [stage, book] of Object.entries(data.stages)) book.picture = document.getElementById('patches-' + stage);
document.querySelectorAll('[data-stage]').forEach(panel => {
  const group = panel.closest('.panels'), stage = panel.dataset.stage, area = panel.querySelector('div');
  const map = data.images[group.dataset.image].maps[stage];
  const bounds = [Math.ceil(map.rows * map.shown[0]), Math.ceil(map.columns * map.shown[1])];
  let at = [0, 0];
  const go = (row, column) => {
    at = [Math.min(Math.max(row, 0), bounds[0] - 1), Math.min(Math.max(column, 0), bounds[1] - 1)];
    light(group, stage, ...at);
  };
  const point = event => {
    const box = area.getBoundingClientRect();
    go(Math.floor((event.clientY - box.top) / box.height * map.shown[0] * map.rows),
       Math.floor((event.clientX - box.left) / box.width * map.shown[1] * map.columns));
  };
  area.addEventListener('pointermove', point);
  area.addEventListener('pointerdown', point);
  area.addEventListener('focus', () => go(...at));
  const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  area.addEventListener('keydown', event => {
    const step = steps[event.key];
    if (step) { event.preventDefault(); go(at[0] + step[0], at[1] + step[1]); }
  });
});
"""


def data_uri(picture, photo=False):
    """A PIL image or (H,W,3) uint8 as text for `src`: PNG, or JPEG for photos."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))
    file = io.BytesIO()
    if photo:
        picture.save(file, "JPEG", quality=90, subsampling=0)
    else:
        picture.save(file, "PNG", optimize=True)
    kind = "jpeg" if photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def img(picture, alt, photo=False):
    return f'<img src="{data_uri(picture, photo)}" alt="{html.escape(alt)}">'


# --- tables ---------------------------------------------------------------------------------------------------------


def row_of(title, texts, tag="td"):
    """A line of an HTML table."""
    return f"<tr><th>{html.escape(title)}</th>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


def score_section(table):
    """The scores with a line per measure, so that a phone shows them: eval.cells, turned on their side."""
    titles, rows = cells(table["rows"])
    lines = [row_of("", rows, "th")]
    lines += [row_of(title, texts) for title, *texts in zip(titles, *rows.values())]
    caption = (f"{table['data']}: {table['images']} images, {len(table['names'])} names.  Fractions 0..1, PSNR in dB; "
               "n/m: not measured; same: as mIoU.")
    books = {stage: codebook_cells(book) for stage, book in next(iter(table["rows"].values()))["codebooks"].items()}
    if books:
        lines.append("</table><table><caption>Codebooks; mean cosine: between used codes; bf16: indices that survive "
                     "its rounding</caption>" + row_of("", next(iter(books.values())), "th"))
        lines += [row_of(stage, texts.values()) for stage, texts in books.items()]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table["notes"])
    return (f"<h2>Scores</h2><div class=wide><table><caption>{html.escape(caption)}</caption>{''.join(lines)}</table>"
            f"</div>{notes}")


# --- tokens you can point at ----------------------------------------------------------------------------------------


def most_common_names(index, label, names, codes):
    """What lies under each code of one image: index (a,b), label (a,b) with names' ids -> one text per code."""
    texts = []
    for code in range(codes):
        under = label[index == code]
        known = np.bincount(under[under != IGNORE], minlength=len(names))
        share = known.max() / max(under.size, 1)
        texts.append(f"{names[known.argmax()]} ({share:.0%})" if known.any() else "nothing with a name")
    return texts


def shrunk(label, picture):
    """label (H,W) and picture (H,W,3) uint8, both with the longer side at most LONGEST: what a page can hold."""
    size = [max(1, round(n * min(1, LONGEST / max(label.shape)))) for n in label.shape]
    rows, columns = (((np.arange(n) + 0.5) / n * full).astype(int) for n, full in zip(size, label.shape))
    return label[rows][:, columns], resize(picture, size, smooth=True) if max(label.shape) > LONGEST else picture


def token_data(extras, label, names, books):
    """One image for the script: stage -> its tokens, how much of the map the image covers, and the names under them.

    extras: `segment`'s second value; label (H,W) int64 numpy; books: stage -> K.
    """
    maps = {}
    for stage, tokens in extras["tokens"].items():
        index, wide = tokens.index[0].cpu().numpy(), books[stage] > 256
        shown = [c / p for c, p in zip(extras["crop"], extras["padded"])]
        rows, columns = (((np.arange(n) + 0.5) / n * part * tokens).astype(int)               # of each pixel's token
                         for n, part, tokens in zip(label.shape, shown, index.shape))
        maps[stage] = dict(rows=index.shape[0], columns=index.shape[1], shown=shown, wide=wide,
                           index=base64.b64encode(index.astype("<u2" if wide else "u1").tobytes()).decode(),
                           names=most_common_names(index[rows][:, columns], label, names, books[stage]))
    return maps


def panels_of(model, dataset, sample, number, books, text):
    """One image's panels, [(stage or "", caption, <img>)], and the data of the script about it.

    books: stage -> K; text: the embedded names of the dataset.
    """
    names, colours = dataset.names, palette(len(dataset.names))
    label, picture = shrunk(np.asarray(sample["label"]), sample["original"])
    size = label.shape
    prediction, extras = segment(model, sample["image"], text, size)
    present = ", ".join(names[i] for i in np.unique(label) if i != IGNORE)
    said = ", ".join(names[i] for i in np.unique(prediction))
    named = f"{type(model).__name__}'s names: {said}"
    repainted = resize(to_image(extras["image"]), size, smooth=True)
    panels = [("", f"input {number}", img(picture, f"test image {number}", photo=True)),
              ("", f"ground truth: {present}", img(overlay(picture, label, colours), f"its labels: {present}")),
              ("", f"prediction: {said}", img(overlay(picture, prediction, colours), named)),
              ("", "reconstruction", img(repainted, "the image painted again from its tokens", photo=True))]
    for stage, K in books.items():
        index = extras["tokens"][stage].index[0]
        alt = f"{stage} tokens, one colour a code: {len(index.unique())} of {K} codes"
        panels.append((stage, stage, img(token_map(index, K, extras["crop"], extras["padded"], size), alt)))
    return panels, dict(maps=token_data(extras, label, names, books))


def panel(stage, caption, picture):
    """One picture of a row; with a stage, one that can be pointed at."""
    stage, focus = (f" data-stage={stage}", " tabindex=0") if stage else ("", "")
    return (f"<figure class=panel{stage}><div{focus}>{picture}<canvas aria-hidden=true></canvas></div>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def token_section(model, dataset, examples, images):
    """Panels, patches and the data of the script; `examples`: patches_of's stage -> (patches, counts)."""
    text = model.vlm.embed_text(dataset.names)
    books = {stage: len(model.codebook(stage)) for stage in examples}
    groups, data, stages, sheets = [], [], {}, []
    for number in range(min(images, len(dataset))):
        panels, maps = panels_of(model, dataset, dataset[number], number, books, text)
        groups.append(f'<div class=panels data-image="{number}">{"".join(panel(*parts) for parts in panels)}</div>')
        data.append(maps)
    for stage, (patches, counts) in examples.items():
        K, each, size = patches.shape[:3]
        sheet = patches.transpose(0, 2, 1, 3, 4).reshape(K * size, each * size, 3)           # a row of patches per code
        alt = f"the {each} patches that chose each of the {K} {stage} codes most, a row per code"
        sheets.append(f'<figure class=picture><img id="patches-{stage}" src="{data_uri(sheet, photo=True)}" '
                      f'alt="{alt}"><figcaption>{stage}, code 0 to {K - 1} from top to bottom</figcaption></figure>')
        stages[stage] = dict(counts=[int(n) for n in counts], each=each, size=size)
    blob = json.dumps(dict(stages=stages, images=data)).replace("<", "\\u003c")           # no </script> in a name
    return ("<h2>Tokens</h2><p>Point at a token in the last four pictures of a row, or give one of them the focus and use "
            "the arrow keys: the region of its code lights up in every picture of the row.  Below: the patches of the test "
            "images that chose this code most, the best first.</p>" + "".join(groups) +
            '<div id=said><p id=words aria-live=polite>No token chosen yet.</p>'
            '<canvas id=patches width=0 height=64 role=img aria-label="no token chosen yet"></canvas></div>'
            f"<details><summary>All codes and their patches</summary>{''.join(sheets)}</details>"
            f'<script type="application/json" id=tokens>{blob}</script><script>{SCRIPT}</script>')


# --- the page -------------------------------------------------------------------------------------------------------


def report(model, dataset, table, pictures, examples, meaning=None, device="cpu", images=4):
    """The whole page as text.

    table: eval.score_table's; pictures: what it shows in words -> PIL image; examples: stage -> (patches (K,each,s,s,3)
    uint8, counts (K)), {} for a model without tokens; meaning: the text of meaning.txt, or None if it was not measured;
    images: how many of the dataset's first to show.
    """
    config, label = table["config"], next(iter(table["rows"]))
    body = [f"<h1>{html.escape(label)}</h1><p>preset {html.escape(config['preset'])}, seed {config['seed']}, over "
            f"{html.escape(config['vlm'])}.  Written by <code>python -m studies.report</code>.</p>", score_section(table)]
    if examples:
        body.append("<h2>Is it semantic?</h2>" + (
            f"<div class=wide><pre>{html.escape(meaning)}</pre></div>" if meaning else
            "<p>Not measured for this run yet: <code>python -m studies.meaning RUN</code>, then eval.py again.</p>"))
        body.append(token_section(model.eval().to(device), dataset, examples, images))
    figures = [f"<figure class=picture>{img(picture, title)}<figcaption>{html.escape(title)}</figcaption></figure>"
               for title, picture in pictures.items()]
    if figures:
        body.append("<h2>Pictures</h2>" + "".join(figures))
    return PAGE.format(title=html.escape(label), body="\n".join(body))


# --- what a scored run leaves ---------------------------------------------------------------------------------------


def meaning_of(run):
    """The text of RUN/meaning.txt, or None where there is none of these weights."""
    text, checkpoint = run / "meaning.txt", run / "checkpoint.safetensors"
    if not text.is_file() or text.stat().st_mtime < checkpoint.stat().st_mtime:
        return None
    return text.read_text(encoding="utf-8")


def leave(run, model, dataset, table, images=None, device="cpu"):
    """All that shows a scored run: scores.txt and .json, samples.png, the pictures, and report.html that holds them.

    table: eval.score_table's; images: how many of the dataset's first are searched for patches, PATCH_IMAGES at most.
    -> what was written, in words.  The scores are on disk before anything is drawn: they took longest.
    """
    run = Path(run)
    write_scores(run / "scores", table)
    examples = {}
    if model.stages:
        examples = patches_of(model, dataset, min(images or PATCH_IMAGES, PATCH_IMAGES), device=device)
    drawn = run_pictures(run, model, dataset, examples, device)
    titled = {NAMES[name]: picture for name, picture in drawn.items()}
    page = report(model, dataset, table, titled, examples, meaning_of(run), device)
    make_folder(run / "pictures")
    write_files({run / "samples.png": sample_sheet(model, dataset, device=device), run / "report.html": page,
                 **{run / "pictures" / f"{name}.png": picture for name, picture in drawn.items()}})
    return (f"scores.txt, scores.json, samples.png, pictures ({', '.join(drawn)}) and report.html, which shows them all, "
            f"in {run}")


def score_and_draw(run, model, config, device="cpu"):
    """The end of a training: the table and the pictures of what it is scored on; config: a train.Training."""
    dataset, where = scored_on(config.run, config.recipe.val_images)
    how = Pass(config.recipe.val_images, config.recipe.workers)
    table = score_table({label_of(model, run): (model, config.run, dataset)}, device, how, where)
    written = leave(run, model, dataset, table, config.recipe.val_images, device)
    print(format_table(table), end="")
    print(f"written: config.json, names.txt, log.jsonl, checkpoint.safetensors, {written}")


def main(argv=None):
    args = parse_flags(parser_of(__doc__.split("\n")[0]), argv)
    check_flags(args)
    runs = open_runs(args)
    table = score_table(runs, args.device, Pass(args.images, args.workers), where_of(args), args.names)
    model, _, dataset = next(iter(runs.values()))
    written = leave(args.run, model, dataset, table, args.images, args.device)
    print(format_table(table), end="")
    print(f"written: {written}")


if __name__ == "__main__":
    run_cli(main)
