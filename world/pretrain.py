"""The world's CLIP: a small contrastive model of scenes and captions, trained here and shipped as clip.safetensors.

    python -m world.pretrain              its zero-shot accuracy over 64 names, single objects
    python -m world.pretrain --train      train it again (about an hour on two cores) and write clip.safetensors

Two stages: 320k single objects at 32x32 pixels, then, the position grid tiled 2x2, 288k scenes at 64x64.  One grain of
caption a batch ("red star", "striped red star", "star", ...), and every caption that is true of a picture is its own.
Captions cover all 64 names, as a web-trained CLIP's would: which of them are unseen is a matter of masks, not of words.

# ours: all of it.

Tests: tests/world/test_pretrain.py.
"""

import argparse
import math
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from clip import TEMPLATES, load_vlm
from cli import parse_flags, run_cli
from data import rng_for, to_tensor
from world.clip import WORLD_WEIGHTS, world_clip
from world.scenes import OBJECTS, TEXTURES, scene


def captions(things, grounds, grain):
    """The names that are true of a scene at one grain; a scene without objects falls back to its stuffs."""
    objects = [OBJECTS[kind] for kind, _ in things]
    return {"names": objects + grounds, "objects": objects, "stuffs": grounds,
            "textured": [f"{TEXTURES[texture]} {OBJECTS[kind]}" for kind, texture in things],
            "colours": [name.split()[0] for name in objects],
            "shapes": [name.split()[1] for name in objects]}[grain] or grounds


def pretrain_batch(step, n, size, seed):
    """Images (n,3,size,size), the batch's captions, and which caption is true of which image (n,captions).

    One grain of caption a batch: mixed grains punish "red star" for not being "star".  32 pixels: a single object.
    64 pixels: one third single objects, two thirds scenes of up to four.
    """
    rng = rng_for(seed, 77, step, size)
    grain = rng.choice(["names", "objects", "textured", "colours", "shapes", "stuffs"], p=[.35, .35, .1, .06, .08, .06])
    template = (TEMPLATES + ("{}",) * 3)[rng.integers(len(TEMPLATES) + 3)]
    images, names = [], []
    for i in range(n):
        single = size == 32 or i % 3 == 0
        objects = (1, 1) if single else (i % 3 - 1, 4)
        stuffs = (1, 1 if single else 2)
        image, _, things, grounds = scene(rng_for(seed, 78, step, i, size), size, objects, stuffs=stuffs)
        images.append(to_tensor(image))
        names.append(set(captions(things, grounds, grain)))
    vocabulary = sorted(set().union(*names))
    true = torch.tensor([[float(name in own) for name in vocabulary] for own in names])
    return torch.stack(images), [template.format(name) for name in vocabulary], true


def multi_positive(logits, true):
    """Cross-entropy against all true columns alike: logits, true (n,m) -> scalar."""
    return -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()


@torch.no_grad()
def zero_shot(vlm, n, size=64, seed=999):
    """Share of n single-object scenes whose colour+shape name, among 64, is the nearest: (both, colour, shape)."""
    text, hits = vlm.embed_text(OBJECTS), []                                              # (64,E)
    for i in range(n):
        image, _, things, _ = scene(rng_for(seed, i), size, (1, 1), stuffs=(1, 1))
        if things:                                            # an object number is 8 * colour + shape
            cosines = vlm.model.encode_image(to_tensor(image)[None], normalize=True) @ text.T              # (1,64)
            said, true = cosines.argmax().item(), things[0][0]
            hits.append((said == true, said // 8 == true // 8, said % 8 == true % 8))
    return torch.tensor(hits).float().mean(0).tolist()


def pretrain_stage(model, tokenizer, size, steps, n, lr, seed):
    """Train in place.  Muon for the matrices of the blocks (plain AdamW left shape at chance), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))]
    for step in (bar := tqdm(range(steps), desc=f"CLIP at {size}x{size}")):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
        images, sentences, true = pretrain_batch(step, n, size, seed)
        f, t = model.encode_image(images, normalize=True), model.encode_text(tokenizer(sentences), normalize=True)
        logits = model.logit_scale.exp() * f @ t.T                                        # (n,captions)
        loss = (multi_positive(logits, true) + multi_positive(logits.T, true.T)) / 2
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(50))
        bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain(path, seed=0, steps=(2500, 4500)):
    """The recipe: 320k single objects at 32x32, then, the position grid tiled 2x2, 288k scenes at 64x64."""
    torch.manual_seed(seed)
    small, big, tokenizer = world_clip(32), world_clip(64), open_clip.SimpleTokenizer(context_length=24)
    pretrain_stage(small, tokenizer, 32, steps[0], 128, 2e-3, seed)
    state = small.state_dict()
    positions = state["visual.positional_embedding"]                                      # (1+4*4,C)
    tiled = positions[1:].view(4, 4, -1).repeat(2, 2, 1).flatten(0, 1)                    # 8x8: four small pictures
    big.load_state_dict({**state, "visual.positional_embedding": torch.cat([positions[:1], tiled])})
    pretrain_stage(big, tokenizer, 64, steps[1], 64, 1e-3, seed)
    save_file({k: v.half() for k, v in big.state_dict().items()}, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", action="store_true", help="train it first")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of every scene (0)")
    parser.add_argument("--out", metavar="FILE", default=str(WORLD_WEIGHTS),
                        help=f"the file to score, and to write ({WORLD_WEIGHTS.name})")
    args = parse_flags(parser, argv)
    if args.train:
        pretrain(Path(args.out), args.seed)
    vlm = load_vlm("world", args.out, scale=1.0, depths=(0, 2, 3, 4))
    both, colour, shape = zero_shot(vlm, 2048)
    print(f"zero-shot over 64 names, 2,048 single-object scenes: {both:.3f} (colour {colour:.3f}, shape {shape:.3f})")


if __name__ == "__main__":
    run_cli(main)
