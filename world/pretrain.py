"""The world's CLIP: a small contrastive model of scenes and captions, trained here and shipped as clip.safetensors.

    python -m world.pretrain              its zero-shot accuracy over 64 names, single objects
    python -m world.pretrain --train      train it again (about an hour on two cores) and write clip.safetensors

Two stages: 512k single objects at 32x32 pixels, then, the position grid tiled 2x2, 384k scenes at 64x64.  One grain of
caption a batch ("striped boat", "red striped boat", "boat", ...); every caption true of a picture is its own.
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
from kernels.muon import Muon
from world.clip import WORLD_WEIGHTS, world_clip
from world.scenes import OBJECTS, RADIUS, scene


GRAINS = {"names": .3, "objects": .3, "coloured": .1, "nouns": .12, "textures": .1, "stuffs": .08}      # how often


def captions(things, grounds, grain):
    """The names that are true of a scene at one grain; where it has none, whatever is true of it."""
    objects = [OBJECTS[kind] for kind, _ in things]
    return {"names": objects + grounds, "objects": objects, "stuffs": grounds,
            "coloured": [f"{colour} {OBJECTS[kind]}" for kind, colour in things],
            "textures": [name.split()[0] for name in objects],
            "nouns": [name.split()[1] for name in objects]}[grain] or objects or grounds


def pretrain_batch(step, n, size, seed):
    """Images (n,3,size,size), the batch's captions, and which caption is true of which image (n,captions).

    One grain of caption a batch: mixed grains punish "striped boat" for not being "boat".  32 pixels: a single object.
    64 pixels: one third single objects, two thirds scenes of up to three.  Of the single objects each third stands on
    one flat colour, as in a catalogue, so that a cut-out is nothing new.
    """
    rng = rng_for(seed, 77, step, size)
    grain = rng.choice(list(GRAINS), p=list(GRAINS.values()))
    template = (TEMPLATES + ("{}",) * 3)[rng.integers(len(TEMPLATES) + 3)]
    images, names = [], []
    for i in range(n):
        single = size == 32 or i % 3 == 0
        radius = (11, 16) if size == 32 else RADIUS
        rng = rng_for(seed, 78, step, i, size)
        drawn = scene(rng, size, (1, 1) if single else (i % 3, 3), stuffs=(1, 1 if single else 2), radius=radius)
        flat = single and i % 9 < 3
        if flat:
            drawn.image[drawn.label >= len(OBJECTS)] = rng.integers(0, 256, 3)
        images.append(to_tensor(drawn.image))
        names.append(set(captions(drawn.things, [] if flat else drawn.grounds, grain)))
    vocabulary = sorted(set().union(*names))
    true = torch.tensor([[float(name in own) for name in vocabulary] for own in names])
    return torch.stack(images), [template.format(name) for name in vocabulary], true


def multi_positive(logits, true):
    """Cross-entropy against all true columns alike: logits, true (n,m) -> scalar."""
    return -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()


@torch.no_grad()
def zero_shot(vlm, n, size=64, seed=999, cut_out=False):
    """Share of n objects whose name, among 64, is the nearest: (both, texture, noun).

    One object on one stuff; `cut_out`: each object of full scenes by its true mask, on the mean colour of CLIP's input.
    """
    text, hits = vlm.embed_text(OBJECTS), []                                              # (64,E)
    for i in range(n):
        drawn = scene(rng_for(seed, i), size) if cut_out else scene(rng_for(seed, i), size, (1, 1), stuffs=(1, 1))
        for kind, _ in drawn.things:                          # an object number is 4 * noun + texture
            image = to_tensor(drawn.image)
            if cut_out:
                image = image * torch.from_numpy(drawn.label == kind)
            said = (vlm.model.encode_image(image[None], normalize=True) @ text.T).argmax().item()          # (1,64)
            hits.append((said == kind, said % 4 == kind % 4, said // 4 == kind // 4))
    return torch.tensor(hits).float().mean(0).tolist()


def pretrain_stage(model, tokenizer, size, steps, n, lr, seed):
    """Train in place.  Muon for the matrices of the blocks (plain AdamW left shape at chance), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [Muon(matrices, lr=lr, weight_decay=0.01),
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


def pretrain(path, seed=0, steps=(4000, 6000)):
    """The recipe: 512k single objects at 32x32, then, the position grid tiled 2x2, 384k scenes at 64x64."""
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
    vlm = load_vlm("world", args.out, scale=1.0, depths=(0, 1, 2, 3))
    for title, cut_out in (("2,048 objects on one stuff", False), ("objects of 1,000 scenes, cut out", True)):
        both, texture, noun = zero_shot(vlm, 1000 if cut_out else 2048, cut_out=cut_out)
        print(f"zero-shot over 64 names, {title}: {both:.3f} (texture {texture:.3f}, noun {noun:.3f})")


if __name__ == "__main__":
    run_cli(main)
