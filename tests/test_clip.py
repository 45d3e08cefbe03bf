"""Our block-by-block path computes what open_clip computes, and the recognition mask is right entry by entry."""

import math
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

import clip
from cli import InputError
from clip import (CLS_BLOCK, EVA, TEMPLATES, OpenAIViT, load_vlm, recognition_mask, resize_positions)
from tests.helpers import smaller
from tokenizer import keep_features
from world.clip import world_clip

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    return load_vlm("world", "none", scale=1.0, depths=(0, 2, 3, 4)).eval()


def test_there_are_14_templates_with_one_place_for_the_name():
    """SAN's `vild` set, the published order."""
    assert len(set(TEMPLATES)) == 14 and all(t.count("{}") == 1 for t in TEMPLATES)
    assert TEMPLATES[0].format("red star") == "a photo of a red star."
    assert TEMPLATES[13].format("red star") == "There is a large red star in the scene."


def ordinary(vlm, pyramid):
    """The image embedding from the tokens at depth 3/4 on, the ordinary way."""
    return vlm.project(vlm.run(vlm.blocks[vlm.depths[-1]:], pyramid.tokens, pyramid.grid))[:, 0]


def test_block_by_block_is_encode_image(vlm):
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ordinary(vlm, vlm.features(image)), vlm.model.encode_image(image, normalize=True),
                               rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_maps_are_the_patches_after_0_2_3_and_4_blocks_row_by_row(vlm):
    """An oblong image of 6x9 patches; the cls token, which stands first, is in no map."""
    pyramid, (x, grid) = vlm.features(image := torch.randn(2, 3, 48, 72)), vlm.embed(image)
    assert pyramid.grid == grid == (6, 9)
    for found, blocks in zip(pyramid.maps, (vlm.blocks[:0], vlm.blocks[:2], vlm.blocks[2:3], vlm.blocks[3:4])):
        x = vlm.run(blocks, x, grid)
        assert torch.equal(found[:, :, 4, 7], x[:, 1 + 4 * 9 + 7]) and torch.equal(found[:, :, 0, 0], x[:, 1])
    assert torch.equal(pyramid.tokens, x)


# ---- the four real models, random weights ----
@pytest.fixture(scope="module", params=[("ViT-B-16", 12), ("EVA02-B-16", 12), ("ViT-L-14-336", 2), ("EVA02-L-14-336", 2)],
                ids=lambda param: param[0])
def real(request):
    """(name, VLM, how to make its image tower for another image size); the large ones have 2 blocks of their 24.

    Queries and keys are scaled up: fresh weights attend to everything alike, and would not notice wrong positions.
    """
    name, depth = request.param
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        smaller(patch, {"layers": depth}, {"layers": 1, "width": 8, "heads": 1, "vocab_size": 8}, depth)
        vlm = load_vlm(name, "none", scale=1.0, depths=(0, 1, 1, 1) if depth == 2 else None).eval()
        config = open_clip.get_model_config(name)
    with torch.no_grad():
        vlm.positions.mul_(10)
        for block in vlm.blocks:
            if isinstance(vlm, EVA):
                block.attn.q_proj.weight.mul_(8), block.attn.k_proj.weight.mul_(8)
            else:
                block.attn.in_proj_weight[:2 * vlm.width].mul_(3)

    def created(size):
        if isinstance(vlm, EVA):
            return timm.create_model(config["vision_cfg"]["timm_model_name"], img_size=size, global_pool="token",
                                     num_classes=config["embed_dim"], depth=depth).eval()
        vision = {**config["vision_cfg"], "image_size": size}
        return open_clip.CLIP(config["embed_dim"], vision, config["text_cfg"], quick_gelu=True).visual.eval()

    return name, vlm, created


def apart(a, b):
    """The largest difference of unit vectors, whose largest entries are about 0.1."""
    return (a - b).abs().max().item()


@torch.no_grad()
def test_block_by_block_is_encode_image_of_the_four_models(real):
    """At the model's own size; and a mask over the whole image with zero bias gives the ordinary cls embedding.

    A copy starts as cls and sees itself where cls sees itself; the share of cls in what it sees is exp(-100) = 4e-44.
    """
    name, vlm, _ = real
    size = 224 if "B" in name else 336
    image = torch.randn(1, 3, size, size)
    pyramid, theirs = vlm.features(image), vlm.model.encode_image(image, normalize=True)
    assert apart(ordinary(vlm, pyramid), theirs) < 5e-6
    assert apart(vlm.recognise(pyramid, torch.zeros(1, vlm.heads, 2, 5, 5)), theirs[:, None]) < 5e-6
    width, grid = (768, 14) if "B" in name else (1024, 24)
    assert vlm.depths == ((0, 3, 6, 9) if "B" in name else (0, 1, 1, 1))
    assert [m.shape[1:] for m in pyramid.maps] == [(width, grid, grid)] * 4


@pytest.mark.parametrize("grid", ["SAN's", (6, 9)], ids=str)
@torch.no_grad()
def test_on_another_grid_the_four_are_models_made_at_that_size(real, grid):
    """SAN's grid and an oblong one: timm's and open_clip's own towers of that size, with our positions copied in."""
    name, vlm, created = real
    patch, san = (16, (20, 20)) if "B" in name else (14, (32, 32))
    grid = san if grid == "SAN's" else grid
    size = (grid[0] * patch, grid[1] * patch)
    tower, ours = created(size), vlm.model.visual.trunk if isinstance(vlm, EVA) else vlm.model.visual
    positions = resize_positions(vlm.positions.view(-1, vlm.width), vlm.old_grid, grid)
    key, positions = ("pos_embed", positions[None]) if isinstance(vlm, EVA) else ("positional_embedding", positions)
    tower.load_state_dict({**ours.state_dict(), key: positions})
    image = torch.randn(1, 3, *size)
    pyramid = vlm.features(image)
    assert pyramid.grid == grid
    theirs = F.normalize(tower(image), dim=-1)
    assert apart(ordinary(vlm, pyramid), theirs) < 5e-6
    assert apart(vlm.recognise(pyramid, torch.zeros(1, vlm.heads, 2, 5, 5)), theirs[:, None]) < 5e-6


def test_clip_large_sees_448_of_640_pixels():
    vlm = load_vlm("world", "none", scale=0.7)
    assert vlm.features(torch.zeros(1, 3, 640, 640)).grid == (448 // 8, 448 // 8)


# ---- what each family does that the other does not ----
@pytest.fixture(params=["ViT-B-16", "EVA02-B-16"])
def family(request, monkeypatch):
    """One VLM of each family, three blocks; maps after 0, 1, 2 and 2 of them."""
    smaller(monkeypatch, dict(width=64, layers=3), dict(width=8, heads=1, layers=1), depth=3)
    return load_vlm(request.param, "none", scale=1.0, depths=(0, 1, 2, 2)).eval()


def only_self(T):
    return torch.full((T, T), float("-inf")).fill_diagonal_(0)


@torch.no_grad()
def test_a_vit_normalises_its_tokens_before_the_first_block_and_eva_does_not(family):
    """Fresh norms leave mean 0 and variance 1; EVA's tokens are patches plus positions, and nothing else."""
    x, grid = family.embed(torch.randn(1, 3, 224, 224))
    assert grid == (14, 14) and x.shape == (1, 197, family.width)
    if isinstance(family, OpenAIViT):
        assert x.mean(-1).abs().max() < 1e-5 and (x.var(-1, unbiased=False) - 1).abs().max() < 1e-2
    else:
        trunk = family.model.visual.trunk
        assert torch.equal(x[:, :1], trunk.cls_token + trunk.pos_embed[:, :1])
        assert x.var(-1, unbiased=False).max() < 0.9


def test_only_eva_has_rotary_positions_and_a_copy_of_cls_has_none(family):
    """Grid 2x2, two copies: their angle is 0, and so is the first patch's; row 1 of 2 is turned like row 2 of 4."""
    assert isinstance(family, EVA) == hasattr(family, "rotation")
    if isinstance(family, EVA):
        sin, cos = family.rotation((2, 2), copies=2).chunk(2, dim=1)
        assert (sin[4:] == 0).all() and (cos[4:] == 1).all()
        assert (sin[0] == 0).all() and (sin[1:4] != 0).any(1).all()
        torch.testing.assert_close(sin.square() + cos.square(), torch.ones_like(sin))
        assert torch.equal(sin[2], family.rotation((4, 4), copies=0).chunk(2, dim=1)[0][8])


@torch.no_grad()
def test_dense_features_of_both_families_are_the_value_path_alone(family):
    """Against the last block's own attention where every token attends only to itself, and turning changes nothing."""
    image = torch.randn(1, 3, 96, 64)
    pyramid, last = family.features(image), family.blocks[-1]
    x, mask = pyramid.tokens, only_self(25)
    if isinstance(family, EVA):
        y = last.attn(last.norm1(x), rope=family.rotation((6, 4), copies=0), attn_mask=mask)
    else:
        y = last.attn(*[last.ln_1(x)] * 3, need_weights=False, attn_mask=mask)[0]
    assert apart(family.dense(image), family.project(y[:, 1:]).transpose(1, 2).unflatten(2, (6, 4))) < 1e-5


@torch.no_grad()
def test_project_is_the_head_at_unit_length(family):
    x = torch.randn(2, 5, family.width)
    assert torch.equal(family.project(x), F.normalize(family.head(x), dim=-1))
    assert (family.head(x).norm(dim=-1) - 1).abs().min() > 1e-3


@torch.no_grad()
def test_keep_features_keeps_the_features_and_nothing_else(family):
    """Bit for bit the same pyramid; no text tower, two of three blocks, no norm or matrix behind them."""
    image = torch.randn(1, 3, 64, 96)
    before = family.features(image)
    keep_features(family)
    after = family.features(image)
    assert torch.equal(before.tokens, after.tokens) and all(map(torch.equal, before.maps, after.maps))
    assert len(family.blocks) == 2 and family.tower() == {} and family.tokenizer is None
    rest = {name for name, _ in family.named_parameters() if ".blocks." not in name and ".resblocks." not in name}
    eva = ("trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.bias")
    vit = ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
    assert rest == {f"model.visual.{name}" for name in (eva if isinstance(family, EVA) else vit)}


# ---- on any grid, with the world's CLIP ----
def test_on_another_grid_it_is_a_model_made_at_that_size(vlm):
    """96x96 is a 12x12 grid; a model created so, with our resized positions copied in, must agree."""
    other = world_clip(96).eval()
    state = vlm.model.state_dict()
    state["visual.positional_embedding"] = resize_positions(vlm.positions, 8, (12, 12))
    other.load_state_dict(state)
    image = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(ordinary(vlm, vlm.features(image)), other.encode_image(image, normalize=True),
                               rtol=1e-4, atol=1e-5)


def test_resizing_keeps_the_cls_position_and_constant_grids(vlm):
    positions = torch.cat([torch.randn(1, 6), torch.ones(64, 6) * 3])
    new = resize_positions(positions, 8, (5, 9))
    assert new.shape == (46, 6)
    torch.testing.assert_close(new, torch.cat([positions[:1], torch.full((45, 6), 3.0)]))


def cubic(old, new):
    """(new,old) weights of Keys' cubic with a = -3/4, as torch has it; the border is repeated."""
    a, weights = -0.75, torch.zeros(new, old)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - j)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), old - 1)] += near if x <= 1 else far
    return weights


def test_positions_are_resized_bicubically_rows_by_rows():
    """4x4 onto 3 high and 6 wide, with the cubic's weights worked out here."""
    positions = torch.randn(17, 2)
    new = resize_positions(positions, 4, (3, 6))
    grid = torch.einsum("ih,jw,hwc->ijc", cubic(4, 3), cubic(4, 6), positions[1:].view(4, 4, 2))
    torch.testing.assert_close(new, torch.cat([positions[:1], grid.flatten(0, 1)]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_the_image_is_the_mean_of_2x2_pixels():
    """What CLIP sees at scale 1/2; its own way of seeing then changes nothing."""
    image, half, whole = torch.randn(1, 3, 128, 96), *(load_vlm("world", "none", scale=s) for s in (0.5, 1.0))
    whole.load_state_dict(half.state_dict())
    assert apart(half.features(image).tokens, whole.features(F.avg_pool2d(image, 2)).tokens) < 1e-4


def test_the_recognition_mask_entry_by_entry():
    """Grid 1x2, two copies, one head; the bias on a 2x4 grid is max-pooled to (3, 4) and (7, 8)."""
    bias = torch.tensor([[[[0.0, 1, 2, 3], [3, 0, 4, 0]], [[7.0, 0, 8, 0], [0, 0, 0, 0]]]])[None].view(1, 1, 2, 2, 4)
    no = float("-inf")
    assert recognition_mask(bias, (1, 2))[0, 0].tolist() == [
        # cls       patches   copies
        [0.0, 0.0, 0.0, no, no],
        [0.0, 0.0, 0.0, no, no],
        [0.0, 0.0, 0.0, no, no],
        [CLS_BLOCK, 3.0, 4.0, 0.0, no],
        [CLS_BLOCK, 7.0, 8.0, no, 0.0]]


def test_a_mask_over_the_whole_image_gives_the_ordinary_embedding(vlm):
    image = torch.randn(2, 3, 64, 64)
    pyramid = vlm.features(image)
    copies = vlm.recognise(pyramid, torch.zeros(2, vlm.heads, 3, 8, 8))
    torch.testing.assert_close(copies, ordinary(vlm, pyramid)[:, None].expand(-1, 3, -1), rtol=1e-4, atol=1e-4)


def test_a_copy_sees_only_where_its_bias_lets_it(vlm):
    """Forbidding the right half is -inf there in the copy's row, 0 on the left, and changes what the copy says."""
    bias = torch.zeros(1, vlm.heads, 1, 8, 8)
    bias[..., 4:] = float("-inf")
    image = torch.randn(1, 3, 64, 64)
    pyramid = vlm.features(image)
    mask = recognition_mask(bias, (8, 8))
    assert torch.isinf(mask[0, 0, -1, 1:65].view(8, 8)[:, 4:]).all() and (mask[0, 0, -1, 1:65].view(8, 8)[:, :4] == 0).all()
    whole = vlm.recognise(pyramid, torch.zeros_like(bias))
    assert (vlm.recognise(pyramid, bias) - whole).abs().max() > 1e-3


def test_copies_do_not_change_each_other(vlm):
    pyramid, bias = vlm.features(torch.randn(1, 3, 64, 64)), torch.randn(1, vlm.heads, 4, 8, 8)
    torch.testing.assert_close(vlm.recognise(pyramid, bias)[:, :2], vlm.recognise(pyramid, bias[:, :, :2]),
                               rtol=1e-4, atol=1e-5)


def test_dense_features_of_maskclip_are_the_value_path_alone(vlm):
    """Against the last block run by hand with every patch attending only to itself, without residual and MLP."""
    image = torch.randn(1, 3, 64, 64)
    pyramid = vlm.features(image)
    x = vlm.run(vlm.blocks[vlm.depths[-1]:-1], pyramid.tokens, pyramid.grid)
    last, T = vlm.blocks[-1], x.shape[1]
    only_self = torch.full((T, T), float("-inf")).fill_diagonal_(0)
    y = last.attn(*[last.ln_1(x)] * 3, need_weights=False, attn_mask=only_self)[0]
    torch.testing.assert_close(vlm.dense(image), vlm.project(y[:, 1:]).transpose(1, 2).unflatten(2, (8, 8)),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depths", [(0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 2, 6), (0, 1, 2, 60)])
def test_maps_are_taken_after_rising_numbers_of_blocks_of_which_there_are_six(depths):
    """After the last block nothing would be left that could recognise."""
    with pytest.raises(InputError, match="^depths [0-9 ]+: takes rising numbers below 6, CLIP's blocks$"):
        load_vlm("world", "none", scale=1.0, depths=depths)


def test_only_the_visual_positions_are_trained(vlm):
    assert [n for n, p in vlm.named_parameters() if p.requires_grad] == ["model.visual.positional_embedding"]


def test_text_is_the_renormalised_mean_over_templates(vlm):
    tokens = vlm.tokenizer([template.format("red star") for template in TEMPLATES])
    mean = F.normalize(F.normalize(vlm.model.encode_text(tokens), dim=-1).mean(0), dim=0)
    torch.testing.assert_close(vlm.embed_text(["grass", "red star"])[1], mean)


def test_other_names_have_other_embeddings_whatever_was_asked_before(vlm):
    """Rows of unit length in the order of the names; what was kept for as many others is not taken."""
    one, two = vlm.embed_text(["grass", "red star"]), vlm.embed_text(["red star", "grass"])
    assert torch.equal(one, two.flip(0)) and not torch.equal(one, vlm.embed_text(["grass", "sand"]))
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(2))


def test_the_text_tower_is_read_once_for_each_state_of_its_weights(vlm, monkeypatch):
    """A quarter of a gigabyte for ViT-B/16: not at every photo, but whenever a weight was changed or put in another's place."""
    reads, vlm.marks = [], None
    monkeypatch.setattr(clip, "tensors_checksum", lambda tower: reads.append(1) or str(len(reads)))
    first = vlm.text_key(("grass",))
    assert vlm.text_key(("grass",)) == first != vlm.text_key(("sand",)) and len(reads) == 1
    weight = vlm.model.token_embedding.weight
    for change in (lambda: weight[0, 0].add_(0), lambda: setattr(weight, "data", weight.data.clone())):
        with torch.no_grad():
            change()
        assert vlm.text_key(("grass",)) != first
    assert len(reads) == 3
    vlm.marks = None


def test_logits_are_cosines_times_the_exponential_of_a_learned_number(vlm):
    """CLIP's own start: 1 / 0.07."""
    assert vlm.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)


# ---- the world's CLIP as a file, and the demo ----
def test_a_file_that_is_not_the_worlds_clip_says_how_to_train_it(tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"x" * 99)
    for file in ("torn", "missing"):
        with pytest.raises(InputError, match=f"{file}.safetensors: not the weights of the world's CLIP .*"
                                             "`python -m world.pretrain --train`$") as error:
            load_vlm("world", str(tmp_path / f"{file}.safetensors"), scale=1.0)
        assert "\n" not in str(error.value)


def test_the_worlds_clip_asks_nothing_of_published():
    """Neither opening it nor embedding names imports a file of that folder."""
    code = ("import sys, clip; clip.load_vlm('world', 'world', scale=1.0).embed_text(['grass']); "
            "print([name for name in sys.modules if name.split('.')[0] == 'published'])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "[]\n"


def test_the_demo_names_what_it_drew():
    run = subprocess.run([sys.executable, str(ROOT / "clip.py")], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("drawn: dotted snowman on brick") and run.stdout.endswith(": dotted snowman\n")
