"""What several test files build: pictures, archives, the published datasets in miniature, small models.

Everything stands under the test file it belongs to.  A test imports it as `from tests.helpers import noise`.
"""

import io
import json
import pickle
import tarfile
import zipfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat
from torch import nn

from clip import CLIPConfig
from data import names_checksum, to_tensor, to_unit
from pat import STAGES
from segmenter import Answer
from studies.rfid import rfid
from vq import Tokens, vMFVQ


# ---- pictures and folders of files (of tests/test_data.py) ----
def noise(h=8, w=6, seed=0):
    """A picture of uniform noise (h,w,3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def filled(path):
    """A folder of three pictures 6 wide and 8 high; classes sky, tree, road; 255 is unlabelled."""
    for sub in ("images", "labels"):
        (path / sub).mkdir()
    for k, stem in enumerate(("b", "a", "c.1")):
        Image.fromarray(noise(seed=k)).save(path / "images" / f"{stem}.png")
        label = np.random.default_rng(k).integers(0, 3, (8, 6), dtype=np.uint8)
        label[0, 0] = 255
        Image.fromarray(label).save(path / "labels" / f"{stem}.png")
    (path / "classes.txt").write_text("sky\ntree\nroad\n")
    return path


# ---- archives (of tests/published/test_archives.py) ----
def pack(path, files, method=zipfile.ZIP_DEFLATED, prefix=""):
    """Write {name: bytes} as a zip or tar at `path`."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(prefix + name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def cut(path, part=0.5):
    """As if the download had stopped."""
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * part)])


# ---- six published datasets, two images each (of tests/published/test_datasets.py) ----
# What the label files hold, 2 rows and 3 columns, and the class ids they stand for; -1 is void.
RAW = {"coco-stuff": [[0, 181, 255], [11, 12, 90]],    # 0 is person, 181 the last; 11 and 90 are never annotated
       "voc20": [[0, 1, 20], [255, 6, 2]],             # 0 background, 255 boundary
       "pc459": [[2, 258, 458], [0, 258, 459]],
       "pc59": [[2, 258, 458], [0, 258, 459]],         # the same labels: 2, 258 and 458 are among the 59, 459 is not
       "ade150": [[0, 1, 150], [2, 3, 149]],
       "ade847": [[2978, 312, 0], [3148, 1, 2420]]}    # wall, building, unlabelled, adding machine, no class, sky
WANTED = {"coco-stuff": [[0, 170, -1], [-1, 11, -1]], "voc20": [[-1, 0, 19], [-1, 5, 1]],
          "pc459": [[1, 257, 457], [-1, 257, 458]], "pc59": [[0, 33, 58], [-1, 33, -1]],
          "ade150": [[-1, 0, 149], [1, 2, 148]], "ade847": [[0, 1, -1], [846, -1, 2]]}
STEMS = {"coco-stuff": ("000000000139", "000000000285"), "voc20": ("2007_000033", "2007_000042"),
         "pc459": ("2008_000002", "2008_000003"), "pc59": ("2008_000002", "2008_000003"),
         "ade150": ("ADE_val_00000001", "ADE_val_00000002"), "ade847": ("ADE_val_00000001", "ADE_val_00000002")}
NAMES = tuple(STEMS)


def encoded(array, kind="png", **how):
    """An array as the bytes of an image file, without a change of its mode."""
    stream = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))).save(stream, kind, **how)
    return stream.getvalue()


def picture(seed):
    """A JPEG 3 wide and 2 high."""
    return encoded(noise(2, 3, seed), "jpeg")


def mat(label, dtype=np.uint16, name="LabelMap"):
    stream = io.BytesIO()
    savemat(stream, {name: np.array(label, dtype)})
    return stream.getvalue()


def indexed(label):
    """A palette PNG: VOC's labels are class ids that are shown in colours."""
    image = Image.fromarray(np.array(label, np.uint8))
    image.putpalette([value * 83 % 256 for value in range(768)])
    return encoded(image)


def codes(label):
    """ADE20K's RGB code of class indices: R = 10 * (index // 256), G = index % 256, B the instance."""
    label = np.array(label)
    return encoded(np.stack([label // 256 * 10, label % 256, label * 0 + 7], -1).astype(np.uint8))


class Bomb:
    def __reduce__(self):
        return open, ("unpickled", "w")


def archives(name, raw=None):
    """{archive: {member: bytes}} of a published dataset; both images show `raw`, the second one upside down."""
    raw, (one, two), grey = np.array(RAW[name] if raw is None else raw), STEMS[name], np.uint8
    both = ((one, raw, 1), (two, raw[::-1], 2))
    if name == "coco-stuff":
        return {"val2017.zip": {f"val2017/{stem}.jpg": picture(k) for stem, _, k in both},
                "stuffthingmaps_trainval2017.zip": {
                    "train2017/000000000009.png": encoded(raw.astype(grey)),
                    **{f"val2017/{stem}.png": encoded(label.astype(grey)) for stem, label, _ in both}}}
    if name == "voc20":
        return {"VOCtrainval_11-May-2012.tar": {
                    "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": f"{one}\n{two}\n".encode(),
                    "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": b"2007_000999\n",
                    **{f"VOCdevkit/VOC2012/JPEGImages/{stem}.jpg": picture(k) for stem, _, k in both},
                    "VOCdevkit/VOC2012/JPEGImages/2007_000999.jpg": picture(3),           # a training image
                    **{f"VOCdevkit/VOC2012/SegmentationClass/{stem}.png": indexed(label) for stem, label, _ in both}},
                "SegmentationClassAug.zip": {
                    "SegmentationClassAug/2007_000999.png": encoded(raw.astype(grey)),
                    **{f"SegmentationClassAug/{stem}.png": encoded(label.astype(grey)) for stem, label, _ in both}}}
    if name in ("pc59", "pc459"):
        return {"VOCtrainval_03-May-2010.tar": {f"VOCdevkit/VOC2010/JPEGImages/{stem}.jpg": picture(k)
                                                for stem, k in ((one, 1), (two, 2), ("2008_000001", 3))},
                "trainval.tar": {f"trainval/{stem}.mat": mat(label) for stem, label, _ in
                                 (*both, ("2008_000001", raw, 3))}}                       # the last is of training
    if name == "ade150":
        top = "ADEChallengeData2016"
        return {f"{top}.zip": {**{f"{top}/images/validation/{stem}.jpg": picture(k) for stem, _, k in both},
                               **{f"{top}/annotations/validation/{stem}.png": encoded(label.astype(grey))
                                  for stem, label, _ in both},
                               f"{top}/images/training/ADE_train_00000001.jpg": picture(3)}}
    top, members = "ADE20K_2021_17_01", {}
    for stem, label, k in both:
        members[f"{top}/images/ADE/validation/urban/street/{stem}.jpg"] = picture(k)
        members[f"{top}/images/ADE/validation/urban/street/{stem}_seg.png"] = codes(label)
        members[f"{top}/images/ADE/validation/urban/street/{stem}_parts_1.png"] = codes(label * 0)
        members[f"{top}/images/ADE/validation/urban/street/{stem}/instance_000_{stem}.png"] = codes(label * 0)
    members[f"{top}/index_ade20k.pkl"] = pickle.dumps(
        {"filename": [f"{stem}.jpg" for stem, _, _ in both], "bomb": Bomb(),
         "folder": [f"{top}/images/ADE/validation/urban/street"] * 2})
    return {"anna_c0ffee12.zip": members}


def packed(root, name, raw=None):
    """The dataset as downloaded."""
    for archive, members in archives(name, raw).items():
        pack(root / archive, members)
    return root


def unpacked(root, name, raw=None):
    """The dataset unpacked, where COCO's label folders need a folder of their own not to fall into the images'."""
    for archive, members in archives(name, raw).items():
        for member, content in members.items():
            path = root / ("stuffthingmaps" if archive.startswith("stuff") else "") / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


CONVERTED = {"coco-stuff": ("coco/val2017", "coco/stuffthingmaps_detectron2/val2017", "png"),
             "voc20": ("VOC2012/JPEGImages", "VOC2012/annotations_detectron2/val", "png"),
             "pc59": ("pcontext/val/image", "pcontext/val/label", "png"),
             "pc459": ("pcontext_full/val/image", "pcontext_full/val/label", "tif"),
             "ade150": ("ADEChallengeData2016/images/validation",
                        "ADEChallengeData2016/annotations_detectron2/validation", "png"),
             "ade847": ("ADE20K_2021_17_01/images_detectron2/validation",
                        "ADE20K_2021_17_01/annotations_detectron2/validation", "tif")}


def converted(root, name, label=None):
    """The dataset as detectron2's users convert it: ids from 0, void 255, or 65535 in 16-bit TIFF."""
    images, labels, kind = CONVERTED[name]
    ids = np.array(WANTED[name] if label is None else label)
    ids = ids.astype(np.uint8 if kind == "png" else np.uint16)                  # -1 wraps to 255 or 65535
    for folder in (images, labels):
        (root / folder).mkdir(parents=True)
    for k, (stem, label) in enumerate(zip(STEMS[name], (ids, ids[::-1])), 1):
        (root / images / f"{stem}.jpg").write_bytes(picture(k))
        (root / labels / f"{stem}.{kind}").write_bytes(encoded(label, "tiff" if kind == "tif" else kind))
    return root


# Two validation images and one of training, as trainval_merged.json holds them.
MASKS = [dict(image_id=7, category_id=2, segmentation=dict(size=[2, 3], counts=[0, 6])),         # everywhere
         dict(image_id=9, category_id=9, segmentation=dict(size=[2, 3], counts=[6])),            # nowhere, and training
         dict(image_id=7, category_id=458, segmentation=dict(size=[2, 3], counts=[1, 2, 3])),    # pixels 1, 2
         dict(image_id=7, category_id=258, segmentation=dict(size=[2, 3], counts="42")),         # COCO's text: 4, 2
         dict(image_id=8, category_id=18, segmentation=dict(size=[2, 3], counts=[2, 1, 3]))]     # and void elsewhere
IMAGES = [dict(image_id=7, file_name="2008_000002.jpg", height=2, width=3, phase="val"),
          dict(image_id=9, file_name="2008_000001.jpg", height=2, width=3, phase="train"),
          dict(image_id=8, file_name="2008_000003.jpg", height=2, width=3, phase="val")]


def merged(root, images=IMAGES, masks=MASKS):
    text = json.dumps({"info": {"images": 3}, "annos_occlusion": [], "images": images, "annos_segmentation": masks})
    (root / "trainval_merged.json").write_text(text)
    return root


# ---- open_clip's models, smaller (of tests/test_clip.py) ----
def smaller(patch, vision, text, depth):
    """open_clip's models with these sizes in place of theirs, and EVA02 with `depth` blocks."""
    import open_clip
    import timm

    config_of, create = open_clip.get_model_config, timm.create_model

    def config(name):
        found = config_of(name)
        if found:
            found["vision_cfg"].update(vision if "layers" in found["vision_cfg"] else {})
            found["text_cfg"].update(text)
        return found

    patch.setattr(open_clip, "get_model_config", config)
    patch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **{"depth": depth, **kwargs}))


# ---- small models and run directories (of tests/test_pat.py, tests/test_san.py and tests/test_train.py) ----
def world(model="pat", **numbers):
    """A model of the world's sizes, the same numbers every time, over a CLIP of random weights."""
    from runs import build, preset

    torch.manual_seed(0)
    return build(preset("world", model, **{"pretrained": "none", **numbers}))


def images(n=2, height=64, width=64):
    """The same n images of noise every time."""
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(2))


TEXT = F.normalize(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), dim=-1)          # five names


def save_run(path, model, config, step=0):
    """A run directory of `model`; config: its RunConfig, or a Training."""
    from runs import flat, save_checkpoint

    path.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model, [torch.optim.AdamW(model.parameters())], step)
    (path / "config.json").write_text(json.dumps(flat(config)))
    return path


TINY = dict(batch=4, points=64, width=48, val_images=4, log_every=1, pretrained="none")
TINY_OF = {"san": dict(head_width=32), "pat": dict(crf_samples=64, hs_heads=4, decoder_width=32, spade_hidden=16,
                                                   mixer_hidden=32, codes=(32, 16, 8, 32))}


def tiny(model="pat", **numbers):
    """A Training of the world made small."""
    from train import recipe

    return recipe("world", model, **{**TINY, **TINY_OF[model], **numbers})


KEPT = []                              # folders that go with the process


@cache
def generator(model="san", seed=0):
    """A finished run directory of a tiny SAN or PAT over a CLIP of random weights: masks for FISA to name.  Made once."""
    from runs import build

    KEPT.append(TemporaryDirectory())
    config = tiny(model, seed=seed)
    with torch.random.fork_rng(devices=[]):                   # whoever asks for it draws on as before
        torch.manual_seed(0)                                  # the same CLIP for every seed
        net = build(config.run)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in (p for p in net.parameters() if p.requires_grad):
                p.add_(0.05 * torch.randn_like(p))            # no mask like another's
    return str(save_run(Path(KEPT[-1].name) / model, net, config, config.recipe.steps))


def micro_batches(config, rank=0, processes=1, step=0):
    """What process `rank` of `processes` is given in a step of `config`, a Training: [(images, labels, numbers)]."""
    from train import Stream
    from world.scenes import World

    local, dataset = config.recipe.batch // (processes * config.recipe.accumulate), World("train")
    stream = Stream(dataset, config, step, rank, processes)
    samples = [stream[i] for i in range(local * config.recipe.accumulate)]
    return [(torch.stack([s[0] for s in part]), torch.stack([s[1] for s in part]), torch.tensor([s[2] for s in part]))
            for part in (samples[k * local:(k + 1) * local] for k in range(config.recipe.accumulate))]


# ---- published SAN checkpoints (of tests/test_san.py and tests/test_pat.py) ----
def published_key(ours, rec_start):
    """The inverse of `published.san_checkpoints.our_key`, written apart from it."""
    parts = ours.split(".")
    if ours == "background":
        return "ov_classifier.bg_embed"
    if ours.startswith("vlm.model.visual.transformer."):
        i = int(parts[5])
        owner, i = ("clip_visual_extractor", i) if i < rec_start else ("clip_rec_head", i - rec_start)
        return ".".join([owner, "resblocks", str(i), *parts[6:]])
    if ours.startswith("vlm.model.visual."):
        return ("clip_rec_head." if parts[3] in ("proj", "ln_post") else "clip_visual_extractor.") + ".".join(parts[3:])
    if ours.startswith("vlm.model."):
        return "ov_classifier." + ".".join(parts[2:])
    if parts[0] == "fusion":
        return f"side_adapter_network.fusion_layers.layer_{parts[1]}.input_proj.{int(parts[2] == 'proj')}.{parts[3]}"
    if parts[0] == "head":
        return "side_adapter_network.mask_decoder." + ".".join(parts[1:])
    if parts[1] == "patch_embed":
        return f"side_adapter_network.vit_model.patch_embed.proj.{parts[2]}"
    return "side_adapter_network." + ("" if parts[1].startswith("query") else "vit_model.") + ".".join(parts[1:])


def published_layout(model):
    """A SAN's state dict as the published code would have saved it, with the entries that are no parameters."""
    state = {}
    for key, value in model.state_dict().items():
        theirs = published_key(key, model.vlm.depths[-1])
        convolution = ("input_proj.1.weight", ".pix_mlp.", ".attn_mlp.")
        is_map = value.ndim == 2 and any(part in theirs for part in convolution)
        state[theirs] = value[..., None, None] if is_map else value
    return {**state, "criterion.empty_weight": torch.ones(172), "ov_classifier.attn_mask": torch.zeros(77, 77)}


def randomised(model):
    """A model none of whose numbers is what its initialisation gives, nor equal to another."""
    with torch.no_grad():
        for p in model.eval().parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


# ---- two names, bright and dark: a model that knows them, and its pictures (of tests/test_eval.py) ----
@dataclass
class FakeConfig:
    """The parts of a model's numbers that scoring asks for, and one of its own."""

    clip: CLIPConfig = field(default_factory=lambda: CLIPConfig(vlm="fake", pretrained="none", clip_scale=1.0, depths=(),
                                                                short_side=32, long_side=128))
    vmf: bool = True


class FakeVLM(nn.Module):
    """Names are rows of an identity matrix; a patch points to name 0 when bright, to name 1 when dark."""

    def __init__(self, *args, scale=1.0, **kwargs):
        super().__init__()
        self.scale = scale

    def embed_text(self, names):
        return torch.eye(len(names))

    def dense(self, image):
        bright = F.avg_pool2d(to_unit(image).mean(1, keepdim=True), 8)                    # (B,1,h,w)
        return torch.cat([bright, 1 - bright], 1)


class FakeModel(nn.Module):
    """Two queries, bright and dark, sure of their names; as PAT it repaints its input and numbers its tokens 0, 1, 2 ...

    Asked for more names than these two, it says never of the others.
    """

    def __init__(self, pat=True):
        super().__init__()
        self.vlm, self.stride, self.config, self.stages = FakeVLM(), 8, FakeConfig(), STAGES if pat else ()

    def codebook(self, stage):
        return F.normalize(torch.randn(64, 4, generator=torch.Generator().manual_seed(3)), dim=-1)

    def quantisers(self):
        return dict.fromkeys(self.stages, vMFVQ(1, 0, 4))     # for their rule alone: the codes are `codebook`'s

    def forward(self, image, text):
        assert image.shape[-2] % 8 == image.shape[-1] % 8 == 0 and not self.training
        bright = 20 * (F.avg_pool2d(to_unit(image).mean(1, keepdim=True), 8) - 0.5)       # (B,1,h,w)
        out = dict(masks=torch.cat([bright, -bright], 1), classes=12 * torch.eye(2, text.shape[0] + 1)[None])
        if self.stages:
            h, w = bright.shape[-2:]
            index = torch.arange(h * w).view(1, h, w) % 64
            code = self.codebook("early")[index].permute(0, 3, 1, 2)
            out.update(image=to_unit(image), tokens={stage: Tokens(code, index, code, None) for stage in self.stages})
        return out

    def answer(self, out, b):
        return Answer(out["masks"][b], mix=out["classes"][b].softmax(-1), none=True)


class FakeInception:
    """Twelve features of a picture, rounded as the real ones: sums of its corner."""

    size, distance = 12, staticmethod(rfid)

    def __call__(self, image):
        return (image[:, :2, :2].flatten().double() * 2**14).round() / 2**14


class TwoHalves:
    """Two pictures, bright above and dark below, with one ignored column; every size differs."""

    names, groups = ("day", "night"), {"seen": (0,), "stuff": (1,)}
    checksum, route, key = names_checksum(names), "by hand", "two halves"

    def __len__(self):
        return 2

    def __getitem__(self, i):
        size = (32, 40) if i == 0 else (48, 44)
        original = np.zeros((*size, 3), np.uint8)
        original[:size[0] // 2] = 255
        label = torch.ones(size, dtype=torch.int64)
        label[:size[0] // 2], label[:, 3] = 0, -1
        return {"image": to_tensor(original), "label": label, "name": str(i), "original": original}


class Noisy:
    """Seven pictures of their own size and noise, labels at random, some of it void: no score is round."""

    names, groups, checksum, route, key = ("day", "night", "dusk"), {}, "3", "drawn", "noisy"

    def __init__(self, stop_at=None):
        self.stop_at, self.asked = stop_at, []

    def __len__(self):
        return 7

    def __getitem__(self, i):
        self.asked.append(i)
        if i == self.stop_at:
            raise KeyboardInterrupt
        rng = np.random.default_rng(i)
        original = rng.integers(0, 256, (24 + 8 * i, 40, 3), np.uint8)
        original[:16] //= 3
        label = torch.from_numpy(rng.integers(-1, 3, original.shape[:2]))
        return {"image": to_tensor(original), "label": label, "name": str(i), "original": original}


def half_bright(h, w):
    """A grey picture (h,w) uint8, white above and black below."""
    picture = np.zeros((h, w), np.uint8)
    picture[:h // 2] = 255
    return picture


def fake_runs(monkeypatch, tmp_path):
    """Folders `pat` and `san` that load as the fake models, an empty folder `data`, and the world as TwoHalves."""
    import eval
    import predict
    import studies.benchmark
    import studies.report
    from runs import RunConfig

    def load_run(run, device="cpu"):
        name = Path(run).name
        model = FakeModel(name == "pat").eval()
        return model, RunConfig(model.config, name, "world", 7)

    for name in ("pat", "san", "data"):
        (tmp_path / name).mkdir()
    for module in (eval, predict, studies.benchmark):
        monkeypatch.setattr(module, "load_run", load_run)
    monkeypatch.setattr(eval, "load_vlm", FakeVLM)
    monkeypatch.setattr("published.images_of.World", lambda *args: TwoHalves())
    monkeypatch.setattr(studies.report, "patches_of", lambda *args, **kwargs: {})
    monkeypatch.setattr(studies.report, "run_pictures", lambda *args, **kwargs: {"masks": Image.new("RGB", (8, 8))})
    monkeypatch.chdir(tmp_path)
    return tmp_path
