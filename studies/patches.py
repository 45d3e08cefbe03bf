"""What a code means: the image patches that chose it most.

    patches_of   one pass over a dataset: per code the patches whose middle cell took it with the highest cosine, no
                 two of one image as long as there are others
    patches      these drawn, some codes of each stage, a thin frame around the token's own cell

    K codes, 8 patches each of 16x16 pixels  ->  (K,8,16,16,3) uint8; memory does not grow with the dataset

# ours: all of it.  The paper says of its codes that they go from colour and edge to part to object; here one can look.

Demo: `python -m studies.gallery patches RUN`.  Tests: tests/studies/test_patches.py.  Read next: meaning.py.
K codes of a stage; a, b a stage's grid over the padded input.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import palette, to_unit
from predict import resize, to_image, tokenize
from studies.pictures import GREY, Figure

PATCH_IMAGES = 300                     # are looked at, unless somebody asks for more
LARGEST = 48                           # pixels of a stored patch; two times 8 patches of 480 codes then take 53 MB


class Best:
    """The `each` best of what was offered for each of K codes: bounded memory, however much is offered."""

    def __init__(self, K, each, s):
        self.cosine = np.full((K, each), -np.inf)
        self.patch = np.full((K, each, s, s, 3), 255, np.uint8)

    def offer(self, k, cosine, patch):
        """`patch` is a function: most offers are refused, and need no picture.  On a tie the earlier one stays."""
        slot = self.cosine[k].argmin()
        if cosine > self.cosine[k, slot]:
            self.cosine[k, slot], self.patch[k, slot] = cosine, patch()


def window(picture, y, x, side, s):
    """The square of `side` pixels around (y,x) of (h,w,3) uint8, pale grey outside it -> (s,s,3)."""
    top, left = round(y - side / 2), round(x - side / 2)
    rows, columns = (slice(max(0, low), min(most, low + side)) for low, most in zip((top, left), picture.shape))
    patch = np.full((side, side, 3), 232, np.uint8)
    patch[rows.start - top:rows.stop - top, columns.start - left:columns.stop - left] = picture[rows, columns]
    return patch if side == s else resize(patch, (s, s), smooth=True)


def patch_size(model):
    """(pixels of the network's input a patch shows: a quarter of the short side; pixels it is stored with)"""
    side = model.config.clip.short_side // 4
    return side, min(side, LARGEST)


def visible_cells(tokens, padded, image):
    """The cells of one stage whose middle is not padding -> middles y (n) and x (n) in pixels of the input, codes (n)
    int64, and the cosine (n) of each feature to its code.

    tokens: vq.Tokens of a single image (3,h,w); padded: rows and columns of the padded input.
    """
    cosine = torch.cosine_similarity(tokens.x[0], tokens.zq[0], dim=0).cpu()              # (a,b)
    y, x = ((torch.arange(n) + 0.5) * whole / n for n, whole in zip(cosine.shape, padded))
    inside = (y < image.shape[1])[:, None] & (x < image.shape[2])                         # (a,b)
    row, column = inside.nonzero().T                                                      # (n) each
    return y[row], x[column], tokens.index[0].cpu()[inside], cosine[inside]


def patches_of(model, dataset, images, each=8, device="cpu"):
    """What each code means: the patches whose middle cell chose it with the highest cosine, best first.

    One pass over the first `images` of `dataset` -> {stage: (patches (K,each,s,s,3) uint8, counts (K) int64)}; counts:
    how often a code was chosen, padding left out.  A patch shows a quarter of the input's short side (`patch_size`),
    pale grey beyond the image.  A code's are from different images where enough have it; unused slots are white.
    """
    was_training = model.training
    model.eval().to(device)
    side, s = patch_size(model)
    sizes = {stage: len(model.codebook(stage)) for stage in model.stages}
    counts = {stage: torch.zeros(K, dtype=torch.int64) for stage, K in sizes.items()}
    firsts = {stage: Best(K, each, s) for stage, K in sizes.items()}                      # the best of each image
    others = {stage: Best(K, each, s) for stage, K in sizes.items()}                      # the second, the third, ...
    for i in tqdm(range(min(images, len(dataset))), "patches", unit="image", leave=False):
        image = dataset[i]["image"]
        picture, extras = to_image(to_unit(image)), tokenize(model, image)
        for stage, tokens in extras["tokens"].items():
            y, x, codes, cosine = visible_cells(tokens, extras["padded"], image)
            counts[stage] += torch.bincount(codes, minlength=sizes[stage])
            ranks = {}                                        # code -> how many of its cells came before in this image
            for n in cosine.argsort(descending=True, stable=True).tolist():
                k = int(codes[n])
                rank = ranks[k] = ranks.get(k, -1) + 1
                if rank < each:
                    best = firsts[stage] if rank == 0 else others[stage]
                    best.offer(k, cosine[n].item(), lambda: window(picture, y[n].item(), x[n].item(), side, s))
    model.train(was_training)
    return {stage: (filled(firsts[stage], others[stage], each), counts[stage]) for stage in model.stages}


def filled(firsts, others, each):
    """The patches of `firsts`, and in the slots it left unused the best of `others`; best first  -> (K,each,s,s,3)"""
    ahead = np.where(np.isinf(firsts.cosine), -np.inf, firsts.cosine + 10)                # firsts win by 10 ...
    chosen = np.argsort(-np.concatenate([ahead, others.cosine], 1), 1, kind="stable")[:, :each]           # (K,each)
    cosine = np.take_along_axis(np.concatenate([firsts.cosine, others.cosine], 1), chosen, 1)
    chosen = np.take_along_axis(chosen, np.argsort(-cosine, 1, kind="stable"), 1)         # ... and stand in true order
    everything = np.concatenate([firsts.patch, others.patch], 1)
    return np.take_along_axis(everything, chosen[..., None, None, None], 1)


def cell_sides(model):
    """{stage: the side of one of its cells, in pixels of the network's input}"""
    side = model.config.clip.short_side
    extras = tokenize(model, torch.zeros(3, side, side))
    return {stage: extras["padded"][0] / tokens.index.shape[1] for stage, tokens in extras["tokens"].items()}


def patches(model, examples, rows=8, size=42):
    """`examples` of patches_of drawn: per stage `rows` of its used codes, from the most used to the least.  PIL image

    A thin frame in the middle of a patch marks the token's own cell; around it lies what the patch shows besides.
    """
    each, s = next(iter(examples.values()))[0].shape[1:3]
    panel, height = 92 + each * (size + 3), 34 + rows * (size + 3) + 14
    figure = Figure(4 + 2 * panel, 8 + (len(examples) + 1) // 2 * height)
    pasted, cells = [], cell_sides(model)                     # pasted: corner, patch, half the side of its frame
    for p, (stage, (book, counts)) in enumerate(examples.items()):
        left, top = 6 + p % 2 * panel, 8 + p // 2 * height
        used = [int(k) for k in counts.argsort(descending=True, stable=True) if counts[k] > 0]
        shown = [used[i] for i in np.unique(np.linspace(0, len(used) - 1, min(rows, len(used))).round().astype(int))]
        half = size * cells[stage] / patch_size(model)[0] / 2
        figure.text(left, top, stage, 17)
        said = f"{len(shown)} of the {len(used)} used codes (of {len(counts)}), most used first"
        figure.text(left + 62, top + 3, said, 12, GREY)
        for r, k in enumerate(shown):
            y = top + 30 + r * (size + 3)
            figure.box(left, y, left + 20, y + size, palette(k + 1)[k])
            figure.text(left + 26, y + 14, f"code {k}", 12, "black", "lm")
            figure.text(left + 26, y + 30, f"{counts[k] / counts.sum():.1%}", 12, GREY, "lm")
            pasted += [(left + 84 + j * (size + 3), y, book[k, j], half) for j in range(min(each, int(counts[k])))]
    sheet = figure.image()
    for x, y, patch, half in pasted:
        sheet.paste(Image.fromarray(resize(patch, (size, size), smooth=s > size)), (x, y))
        low, high = round(size / 2 - half) - 1, round(size / 2 + half)
        ImageDraw.Draw(sheet).rectangle((x + low, y + low, x + high, y + high), outline=(255, 255, 255))
    return sheet
