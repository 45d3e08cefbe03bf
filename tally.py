"""One pass over a dataset, hours long perhaps: every image once, on any number of processes, stopped and gone on with.

What adds up over images is small and mostly whole numbers, so a pass can be cut anywhere and put together again:

    matrix   (L+1,L+1) int64   the confusion matrix, see metrics.py        847 names: 5.5 MiB, however many images
    codes    (K+1) int64       per stage, see metrics.count_tokens
    painted  (n,4) float64     PSNR, SSIM, L1, LPIPS of each image in its own row, so their order is always the same
    rfid.*   float64           sums of Inception's features (2,F) and of their products (2,F,F), exact; 64 MiB, if asked

Process r of R takes images r, r + R, r + 2R, ...  At the end the tallies are added up: the same integers, and the same
means of the same floats, as on one process (if each computes with as many threads: the model rounds by their number).

Every SAVE_EVERY images a process replaces its file DIR/TITLE.r.safetensors, which also says whose tally it is: weights,
settings, names, dataset, number of images and of processes.  A pass that finds its own file goes on after the images in
it; where any of this has changed it says what, and starts anew.

# ours: all of it.  SAN's evaluator counts the same matrix, in one go.

Tests: tests/test_tally.py.  Read next: meaning.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import clip
from images import InputError, checksum, to_unit, write_files
from inference import segment, segment_dense
from losses import load_lpips
from metrics import codebook_scores, confusion, count_tokens, mean, reconstruction_scores, rfid, scores
from pat import STAGES

SAVE_EVERY = 50                                               # images of one process
PAINTED = ("PSNR", "SSIM", "L1", "LPIPS")

# L names; n images; K codes of a stage; F of Inception's features.


class Pass(NamedTuple):
    """How a dataset is gone through."""

    images: int | None = None          # only the first ones; None: all
    workers: int = 0                   # processes that read images, for each process that scores
    rank: int = 0                      # this process is number `rank` ...
    processes: int = 1                 # ... of so many; above one, torch.distributed must be up, with gloo
    folder: Path | None = None         # where unfinished tallies are kept; None: nowhere
    title: str = "scoring"             # of the progress bar, and of the files
    progress: bool = True


class Tally:
    """What adds up over the images of one process."""

    def __init__(self, n, L, codebooks, features=0):
        """n images, L names; codebooks {stage: K}, empty for a model that repaints nothing; F for rFID, else 0."""
        self.done = 0                                         # images of this process
        self.tensors = {"matrix": torch.zeros(L + 1, L + 1, dtype=torch.int64),
                        "painted": torch.zeros(n, len(PAINTED), dtype=torch.float64),
                        **{f"codes.{stage}": torch.zeros(K + 1, dtype=torch.int64) for stage, K in codebooks.items()}}
        if features:
            self.tensors["rfid.sums"] = torch.zeros(2, features, dtype=torch.float64)
            self.tensors["rfid.products"] = torch.zeros(2, features, features, dtype=torch.float64)

    def add(self, i, matrix, painted, codes, features):
        """Image i: its confusion matrix, reconstruction_scores or None, {stage: counts}, features (2,F) or None."""
        self.tensors["matrix"] += matrix
        for stage, counts in codes.items():
            self.tensors[f"codes.{stage}"] += counts
        if painted is not None:                               # NaN: not measured
            self.tensors["painted"][i] = torch.tensor([float("nan") if painted[key] is None else painted[key]
                                                       for key in PAINTED], dtype=torch.float64)
        if features is not None:                              # of the original and of the repainted image
            self.tensors["rfid.sums"] += features
            self.tensors["rfid.products"].baddbmm_(features[:, :, None], features[:, None])
        self.done += 1

    def save(self, path, whose):
        """Replace the file at once; `whose` is a dict of str."""
        content = safetensors.torch.save(self.tensors, {"whose": json.dumps(whose), "done": str(self.done)})
        write_files({path: content})

    def load(self, path, whose):
        """Take over what the file at `path` holds -> "", or in words why it cannot be taken over."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                before, done = json.loads(metadata["whose"]), int(metadata["done"])
                changed = ", ".join(key for key in whose if before.get(key) != whose[key])
                if not changed:
                    self.tensors, self.done = {key: file.get_tensor(key) for key in self.tensors}, done
                return changed and f"{changed} changed since it was stopped"
        except Exception as error:                            # whatever the damage led safetensors or json to
            return f"its file is damaged ({type(error).__name__})"

    def codes(self):
        """{stage: counts}"""
        return {key.removeprefix("codes."): value for key, value in self.tensors.items() if key.startswith("codes.")}


def make_folder(path):
    """The folder at `path`; raises InputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror})") from error


def image_and_label(sample):
    """What a worker sends: the original picture stays behind."""
    return sample["image"], sample["label"]


def run(predict, dataset, L, codebooks, whose, how, features=0):
    """The whole pass -> Tally of all processes.

    `predict`: image (3,h,w), size -> prediction (H,W), then what Tally.add takes: painted, codes, features.
    `whose`: a function that gives what identifies the pass; it is asked only where tallies are kept.
    """
    n = min(how.images or len(dataset), len(dataset))
    mine, tally = range(how.rank, n, how.processes), Tally(n, L, codebooks, features)
    if how.folder is not None:
        make_folder(how.folder)
        path = how.folder / f"{how.title}.{how.rank}.safetensors"
        whose = {**whose(), "dataset": dataset.key, "images": str(n), "processes": str(how.processes)}
        refused = tally.load(path, whose) if path.exists() else ""
        if how.rank == 0 and (refused or tally.done):
            tqdm.write(f"{how.title}: " + (f"starts anew: {refused}" if refused else
                                           f"goes on after {tally.done} of {len(mine)} images"))
    left = mine[tally.done:]
    loader = DataLoader(Subset(dataset, left), None, collate_fn=image_and_label, num_workers=how.workers)
    title = how.title + (f", process 1 of {how.processes}" if how.processes > 1 else "")
    bar = tqdm(loader, title, len(mine), initial=tally.done, unit="image", disable=not how.progress or how.rank > 0)
    for (image, label), i in zip(bar, left):
        prediction, *shown = predict(image, label.shape)
        tally.add(i, confusion(prediction, label, L), *shown)
        if how.folder is not None and tally.done % SAVE_EVERY == 0:
            tally.save(path, whose)
    if how.folder is not None:
        tally.save(path, whose)
    if how.processes > 1:
        for tensor in tally.tensors.values():
            dist.all_reduce(tensor)
    return tally


def forget(folder, title):
    """Remove the tallies of a finished pass, and their folder if nothing else is in it."""
    for path in folder.glob(f"{title}.*.safetensors"):
        path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


@torch.no_grad()
def evaluate(model, dataset, names=None, device="cpu", how=Pass(), inception=None):
    """One row of a table: the model over a dataset, one image at a time, fp32; with a metrics.Inception, rFID too.

    -> dict: images, segmentation (see `scores`), reconstruction (means over images) and codebooks (see there); the last
    two are None and {} for SAN.
    """
    names, was_training = names or dataset.names, model.training
    model.eval().to(device)
    text = model.vlm.embed_text(names)

    def predict(image, size):
        prediction, seen = segment(model, image, text, size)
        if not seen:
            return prediction, None, {}, None
        original, repainted = to_unit(image).to(device), seen["image"]
        painted = reconstruction_scores(repainted, original, load_lpips(str(device)))
        features = inception and torch.stack([inception(original), inception(repainted)])     # (2,F)
        return prediction, painted, count_tokens(seen, model), features

    def whose():
        settings = str(replace(model.config, pretrained=""))  # the weights say what they are, not where they lie
        return {"checkpoint": clip.checksum(model.state_dict()), "settings": settings, "names": checksum(names),
                "rFID": str(inception is not None)}

    stages = STAGES if model.config.model == "pat" else ()
    codebooks = {stage: len(model.codebook(stage)) for stage in stages}
    features = inception.size if inception and stages else 0
    tally = run(predict, dataset, len(names), codebooks, whose, how, features)
    model.train(was_training)
    n = len(tally.tensors["painted"])
    painted = {key: mean(column.tolist()) for key, column in zip(PAINTED, tally.tensors["painted"].T)}
    painted["rFID"] = rfid(n, tally.tensors["rfid.sums"], tally.tensors["rfid.products"]) if features else None
    return {"images": n, "segmentation": scores(tally.tensors["matrix"], dataset.groups),
            "reconstruction": painted if stages else None, "codebooks": codebook_scores(tally.codes(), model)}


def evaluate_dense(vlm, stride, dataset, names=None, device="cpu", how=Pass()):
    """The MaskCLIP-style row, for an untrained `vlm`; the same images, sizes and rules as `evaluate`."""
    names = names or dataset.names
    text = vlm.eval().to(device).embed_text(names)

    def predict(image, size):
        return segment_dense(vlm, stride, image, text, size), None, {}, None

    def whose():
        settings = f"MaskCLIP {vlm.scale} {stride}"
        return {"checkpoint": clip.checksum(vlm.state_dict()), "settings": settings, "names": checksum(names)}

    tally = run(predict, dataset, len(names), {}, whose, how)
    return {"images": len(tally.tensors["painted"]), "segmentation": scores(tally.tensors["matrix"], dataset.groups),
            "reconstruction": None, "codebooks": {}}
