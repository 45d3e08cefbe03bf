"""Published SAN checkpoints: read by their own key names, and made a run directory like any other.

    python -m published.san_checkpoints san_vit_b_16.pth --out RUN       or san_vit_large_14.pth
    python -m published.san_checkpoints mine.pth --out RUN --vlm ViT-B-16-gelu      SAN trained over a CLIP not OpenAI's

The run is complete: the CLIP inside the file is written beside the checkpoint, so it needs no other file and no network.
The key layout was checked name by name for ViT-B/16; for ViT-L/14 it is the same rule.

# paper: SAN is the baseline; these are the weights its authors published.

Tests: tests/published/test_san_checkpoints.py.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from cli import InputError, parse_flags, run_cli
from published.weights import differences, load_pickle
from runs import build, changed, flat, load_run, preset, save_checkpoint

NOT_PARAMETERS = ("criterion.empty_weight", "ov_classifier.attn_mask")                    # of the published layout
RENAMED = (("vit_model.patch_embed.proj.", "side.patch_embed."), ("vit_model.", "side."), ("query_", "side.query_"),
           ("mask_decoder.", "head."))


def our_key(key, rec_start):
    """The name in this file of a key of the published layout; recognition blocks count on from `rec_start`."""
    part, _, rest = key.partition(".")
    if part == "clip_rec_head" and rest.startswith("resblocks."):
        _, i, rest = rest.split(".", 2)
        return f"vlm.model.visual.transformer.resblocks.{int(i) + rec_start}.{rest}"
    if part in ("clip_visual_extractor", "clip_rec_head"):
        return "vlm.model.visual." + ("transformer." if rest.startswith("resblocks.") else "") + rest
    if part == "ov_classifier":
        return {"bg_embed": "background", "logit_scale": "vlm.model.logit_scale"}.get(rest, f"vlm.model.{rest}")
    for theirs, ours in RENAMED:
        if rest.startswith(theirs):
            return ours + rest[len(theirs):]
    if rest.startswith("fusion_layers.layer_"):
        i, _, part, kind = rest.removeprefix("fusion_layers.layer_").split(".")
        return f"fusion.{i}.{('norm', 'proj')[int(part)]}.{kind}"
    return key


TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def read_published(path):
    """The state dict of a published checkpoint: its "model" entry, or the whole of it.  name -> tensor

    Raises InputError for a file that is damaged, holds code, or holds no tensors by name.
    """
    published = load_pickle(path)
    published = published.get("model", published) if isinstance(published, dict) else {}
    if not published or not all(torch.is_tensor(value) for value in published.values()):
        raise InputError(f"{path}: holds no state dict, neither at its top nor under 'model'; is it a SAN checkpoint?")
    return published


def from_published(model, published):
    """Load a state dict in the layout of the published SAN checkpoints into `model`, CLIP included.

    The text tower may be absent as a whole (it stays as it is).  Raises InputError listing missing and unknown entries
    and wrong shapes; the model is then unchanged.
    """
    state, loaded = model.state_dict(), {}
    for key, value in published.items():
        if key not in NOT_PARAMETERS:
            ours = our_key(key, model.vlm.depths[-1])
            ours = key if ours in loaded else ours            # two entries for one place: the second is unknown
            if value.shape[2:] == (1, 1) and ours in state and state[ours].ndim == 2:
                value = value.flatten(1)                      # 1x1 convolutions are linears here
            loaded[ours] = value
    text = tuple(f"vlm.model.{name}" for name in TEXT)
    if not any(key.startswith(text) for key in loaded):
        loaded.update({key: value for key, value in state.items() if key.startswith(text)})
    wrong = differences(state, loaded)
    if wrong:
        raise InputError(f"not a SAN checkpoint of this size: {wrong}")
    model.load_state_dict(loaded)


PUBLISHED = {768: "coco", 1024: "coco-large"}                 # width of CLIP -> the preset of the published SAN over it


def import_published(path, out, config=None, vlm=""):
    """Make a run directory of a published SAN checkpoint, complete: it needs no other file and no network.

    clip.safetensors: the CLIP inside, frozen but for its trained position embedding, in open_clip's layout;
    checkpoint.safetensors: what SAN trains; config.json: `config`, a RunConfig, by default of the published size found.
    `vlm` names the CLIP inside where the weights do not tell its activation: see published/weights.py.
    Raises InputError if the file is damaged or not such a checkpoint, if that name is needed, or if `out` exists;
    nothing is then written: a run that stands there is a run that loads.
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
    config = changed(config, vlm=vlm) if vlm else config
    model = build(changed(config, pretrained="none"))
    try:
        from_published(model, published)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    temporary = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        temporary.mkdir(parents=True)
        save_file(model.vlm.model.state_dict(), temporary / "clip.safetensors")
        save_checkpoint(temporary, model, [], step=0)
        config = json.dumps(flat(changed(config, pretrained="clip.safetensors")), indent=1)
        (temporary / "config.json").write_text(config + "\n")
        load_run(temporary)
        os.rename(temporary, out)
    except InputError as error:
        raise InputError(f"{path}: {error}".replace(f"{temporary}{os.sep}", "its ")) from error
    except Exception as error:                                # safetensors wraps the file system's
        raise InputError(f"--out {out}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", help="san_vit_b_16.pth or san_vit_large_14.pth")
    parser.add_argument("--out", metavar="RUN", required=True, help="the run directory to make")
    parser.add_argument("--vlm", metavar="NAME", default="", help="ViT-B-16-gelu or -quickgelu: of a CLIP not OpenAI's")
    args = parse_flags(parser, argv)
    import_published(args.file, args.out, vlm=args.vlm)
    print(f"written: config.json, checkpoint.safetensors, clip.safetensors in {args.out}")


if __name__ == "__main__":
    run_cli(main)
