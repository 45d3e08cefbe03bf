"""Claims about every input of a kind, each tried on many: quantiser, attention, scores, archives, tokens, labels.

U is the rounding of float32.  A cosine of two rows of D numbers is off by (2D + 6) U at most: by (D/2 + 3) U for either
row that is brought to length 1, by D U for the sum of products.
"""

import contextlib
import io
import json
import math
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.extra.numpy import arrays
from PIL import Image

import eval as E
import hsattn
import vq
from cli import InputError
from data import IGNORE
from kernels import cpu
from published.archives import Shelf
from published.labels import merged_masks, paint, read_16_bit, read_codes, read_label, read_mat
from tests import helpers
from tests.helpers import encoded, indexed, pack
from tokenizer import Tokenizer, encode_files, read_tokens

NOTES = TemporaryDirectory()
set_hypothesis_home_dir(NOTES.name)                           # it writes some; none are left where the tests are
U = 2**-24
FORMS = (vq, cpu)
ATTENTION = (hsattn.hypersphere_attention, cpu.hypersphere_attention)
FEW, COUNT = st.integers(1, 4), st.integers(1, 9)
KAPPA = st.sampled_from((1e-3, 1.0, 9.0, 30.0, 300.0))


def tried(times, *strategies):
    """On `times` inputs, drawn without chance."""
    return lambda test: settings(derandomize=True, deadline=None, database=None, max_examples=times)(given(*strategies)(test))


def rows(*shape, low=-9):
    """float32 rows of whole numbers, so that ties and zeros are common, each of its own length, 1e-6 to 1e6 times these."""
    whole, power = arrays(np.int8, shape, elements=st.integers(low, 9)), arrays(np.int8, shape[:-1], elements=st.integers(-6, 6))
    return st.tuples(whole, power).map(lambda both: torch.from_numpy(both[0] * 10.0**both[1][..., None]).float())


def unit(x):
    return F.normalize(x.double(), dim=-1)


# --- the quantiser ----------------------------------------------------------------------------------------------------

FEATURES = st.tuples(COUNT, COUNT, COUNT).flatmap(lambda s: st.tuples(rows(s[0], s[2]), rows(s[1], s[2])))     # and codes


@tried(150, FEATURES, COUNT)
def test_the_code_that_is_chosen_has_the_greatest_cosine_within_rounding(drawn, chunk):
    x, codes = drawn
    exact, off = unit(x) @ unit(codes).T, (2 * x.shape[1] + 6) * U
    with patch.object(cpu, "CHUNK", chunk):
        for form in FORMS:
            index, code, cosine = form.assign(x, codes)
            for chosen in (index, form.quantise(x, codes)[1]):
                assert (exact.gather(1, chosen[:, None])[:, 0] >= exact.amax(1) - 2 * off).all()
                assert (chosen[(x == 0).all(1)] == 0).all()
            assert (cosine - exact.gather(1, index[:, None])[:, 0]).abs().max() <= off
            assert torch.equal(code, F.normalize(codes, dim=-1)[index])


@tried(100, FEATURES, st.data())
def test_lengths_change_not_a_bit_and_codes_in_another_order_are_chosen_as_before(drawn, data):
    """Lengths: by powers of two.  Order: of the features to which no two codes are equally near within rounding."""
    lengths = [2.0 ** torch.from_numpy(data.draw(arrays(np.int64, (len(a), 1), elements=st.integers(-9, 9)))) for a in drawn]
    order = torch.tensor(data.draw(st.permutations(range(len(drawn[1])))))
    best = F.pad(unit(drawn[0]) @ unit(drawn[1]).T, (0, 1), value=-2).topk(2)[0]
    clear = best[:, 0] - best[:, 1] > 2 * (2 * drawn[0].shape[1] + 6) * U
    for form in FORMS:
        found, longer = form.assign(*drawn), form.assign(*(a * length for a, length in zip(drawn, lengths)))
        assert all(map(torch.equal, found, longer))
        assert torch.equal(order[form.assign(drawn[0], drawn[1][order])[0]][clear], found[0][clear])


@tried(100, FEATURES)
def test_what_goes_on_is_the_code_in_value_and_the_unit_feature_in_gradient(drawn):
    """x + (code - x) is rounded twice, at 2 and at 1 at most.  By this way the codes have no gradient."""
    x, codes = (a.requires_grad_() for a in drawn)
    up = torch.linspace(-1, 2, x.numel()).view_as(x)
    expected, = torch.autograd.grad(F.normalize(x, dim=-1), x, up)
    for form in FORMS:
        zq, index, loss = form.quantise(x, codes)
        assert (zq - F.normalize(codes, dim=-1)[index]).abs().max() <= 4 * U
        to_x, to_codes = torch.autograd.grad(zq, (x, codes), up, retain_graph=True, allow_unused=True)
        off = (to_x - expected) * x.norm(dim=1, keepdim=True).clamp(min=1e-12)             # written by hand in cpu.py
        assert (off.abs().amax(1) <= 4 * U * up.abs().sum(1)).all() and to_codes is None
        torch.testing.assert_close(loss.double(), 1.25 * (unit(x) - unit(codes)[index]).square().mean(1), rtol=0, atol=1e-5)


WILD = st.floats(width=32) | st.sampled_from((0, 1, 3e38))


@tried(150, st.tuples(COUNT, COUNT, COUNT).flatmap(lambda s: st.tuples(*(
    arrays(np.float32, (n, s[2]), elements=WILD) for n in s[:2]))))
def test_whatever_the_numbers_indices_are_in_range_and_finite_numbers_stay_finite(drawn):
    x, codes = map(torch.from_numpy, drawn)
    for form in FORMS:
        (index, code, _), (zq, again, loss) = form.assign(x, codes), form.quantise(x, codes)
        assert all(0 <= chosen.min() and chosen.max() < len(codes) for chosen in (index, again))
        assert not (x.isfinite().all() and codes.isfinite().all()) or all(a.isfinite().all() for a in (code, zq, loss))


@tried(150, COUNT.flatmap(lambda K: st.tuples(
    arrays(np.int64, K, elements=st.integers(0, 3) | st.integers(0, 10**15)), rows(K, 3, low=1), rows(4, 3))))
def test_the_health_of_a_codebook_keeps_to_its_ranges_and_to_its_definitions(drawn):
    counts, codes, x = torch.from_numpy(drawn[0]), *drawn[1:]
    health, used, p = vq.codebook_health(counts, codes, x), unit(codes)[counts > 0], counts.double()[counts > 0] / counts.sum()
    assert health["used"] == len(used) and 0 <= health["bf16"] <= 1
    assert 1 - 1e-9 <= health["perplexity"] <= max(1, len(used)) + 1e-9
    assert health["perplexity"] == pytest.approx(math.exp(-(p * p.log()).sum()))
    assert vq.codebook_health((counts > 0) * 7, codes)["perplexity"] == pytest.approx(max(1, len(used)))
    if len(used) > 1:
        others = ~torch.eye(len(used), dtype=torch.bool)
        assert health["cosine"] == pytest.approx((used @ used.T)[others].mean().item(), abs=1e-9)


# --- attention --------------------------------------------------------------------------------------------------------

SIZES = st.tuples(FEW, FEW, FEW, FEW, COUNT)                  # images, heads, queries, numbers a row, keys


def attended(B, heads, N, D, P):
    """q, k, v, a mask or None; an order of the queries, one of the keys."""
    return st.tuples(rows(B, heads, N, D), rows(B, heads, P, D), rows(B, heads, P, D), st.none() | arrays(bool, (B, P)).map(
        torch.from_numpy), st.permutations(range(N)), st.permutations(range(P)))


def equation(q, k, v, mask, kappa):
    """Eq. 1 in float64, and how far float32 may be from it, row by row.

    kappa times a difference of cosines is off by 2 kappa (2D + 8) U, a weight by as much of itself, their sum by P U more: the
    mean by that part of Σ w|v|, its direction by at most twice that part of Σ w|v| / |Σ w v|.  Of a mean that g, which divides
    by 1e-12 at least, leaves shorter than 1, nothing is said: inf.
    """
    cosines = unit(q) @ unit(k).mT if mask is None else (unit(q) @ unit(k).mT).masked_fill(~mask[:, None, None], -torch.inf)
    w = (kappa * cosines).softmax(-1).nan_to_num(0)
    u, total = w @ v.double(), w @ v.double().norm(dim=-1, keepdim=True)
    D, length = q.shape[-1], u.norm(dim=-1, keepdim=True)
    off = 2 * (2 * kappa * (2 * D + 8) + k.shape[-2] + 8) * total / length + D + 3
    return F.normalize(u, dim=-1), torch.where(length > 1e-11, off * U, torch.where(total > 0, torch.inf, 0.0))[..., 0]


@tried(200, SIZES.flatmap(lambda sizes: attended(*sizes)), KAPPA, st.integers(1, 200))
def test_both_forms_of_attention_are_equation_one_within_rounding_in_any_order_at_any_lengths(drawn, kappa, cached):
    q, k, v, mask, queries, keys = drawn
    expected, off = equation(q, k, v, mask, kappa)
    with patch.object(cpu, "CACHED", cached):
        for attention in ATTENTION:
            out = attention(q, k, v, kappa, mask)
            assert ((out - expected).norm(dim=-1) <= off).all() and (out.norm(dim=-1) <= 1 + 9 * U).all()
            other = attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], kappa, None if mask is None else mask[:, keys])
            assert ((other - out[:, :, queries]).norm(dim=-1) <= 2 * off[:, :, queries]).all()
            assert torch.equal(attention(q / 2, k * 8, v * 4, kappa, mask)[off < torch.inf], out[off < torch.inf])
            assert (attention(q, k, v.abs(), kappa, mask) >= 0).all()                     # the weights are positive


@tried(100, FEW.flatmap(lambda D: st.tuples(rows(5, D), rows(3, D))), KAPPA, st.integers(0, 3))
def test_a_step_of_mean_shift_never_goes_down_the_density(drawn, kappa, steps):
    """Σ exp(kappa xᵀs) is convex in s, and a step takes the unit s that is farthest along its gradient."""
    x, seeds = (a.double() for a in drawn)
    (before, _), (after, cluster) = (hsattn.mean_shift(x, seeds, kappa, n) for n in (steps, steps + 1))
    density = [(kappa * modes @ unit(x).T).logsumexp(-1) for modes in (before, after)]
    near = unit(x) @ after.T
    assert (density[1] >= density[0] - 1e-9 * (1 + kappa)).all()
    assert (near.gather(1, cluster[:, None])[:, 0] >= near.amax(1) - 1e-12).all()


@tried(100, st.tuples(FEW, FEW, FEW).flatmap(lambda s: st.tuples(*(
    arrays(np.float32, (1, n, s[2]), elements=st.floats(-2.0**50, 2.0**50, width=32)) for n in (s[0], s[1], s[1])))),
       st.sampled_from((1e-30, 1.0, 1e6, 1e38)))
def test_attention_is_finite_whatever_kappa_and_the_lengths(drawn, kappa):
    for attention in ATTENTION:
        out = attention(*map(torch.from_numpy, drawn), kappa)
        assert out.isfinite().all() and (out.norm(dim=-1) <= 1 + 9 * U).all()


# --- scores -----------------------------------------------------------------------------------------------------------

IMAGES = COUNT.flatmap(lambda L: st.tuples(st.just(L), st.lists(st.tuples(FEW, FEW).flatmap(lambda size: arrays(
    np.int64, (2, *size), elements=st.integers(IGNORE, L - 1)).map(torch.from_numpy)), min_size=1, max_size=4)))   # said, true


def scored(L, images):
    return E.scores(sum(E.confusion(*image, L) for image in images), {})


@tried(150, IMAGES, st.data())
def test_both_rules_are_what_counting_gives_in_whatever_order_by_whichever_process_images_are_added(drawn, data):
    L, images = drawn
    tallies = [E.Tally(len(images), L, {}) for _ in range(3)]
    for i in data.draw(st.permutations(range(len(images)))):
        tallies[data.draw(st.integers(0, 2))].add(i, E.confusion(*images[i], L), None, {}, None)
    found = E.scores(sum(tally.tensors["matrix"] for tally in tallies), {})
    said, true = torch.cat([image.flatten(1) for image in images], 1).numpy()
    G, P, T = np.array([[(true == c).sum(), ((said == c) & (true != IGNORE)).sum(), ((said == c) & (true == c)).sum()]
                        for c in range(L)]).T
    iou = T / np.maximum(G + P - T, 1)
    assert found["IoU"] == pytest.approx([value if g else None for value, g in zip(iou, G)]) and found["pixels"] == G.tolist()
    expected = [iou.sum() / (G > 0).sum(), iou.sum() / (G + P > 0).sum(), T.sum() / G.sum()] if G.any() else [None] * 3
    assert [found[key] for key in ("mIoU", "mIoU_old_rule", "pixel_accuracy")] == pytest.approx(expected)


@tried(100, IMAGES, st.data())
def test_names_keep_their_scores_in_any_order_ignored_pixels_have_none_and_all_right_is_one(drawn, data):
    L, images = drawn
    order, wild = data.draw(st.permutations(range(L))), data.draw(st.integers(IGNORE, L - 1))
    found, other = scored(*drawn), scored(L, [torch.tensor([*order, IGNORE])[image] for image in images])       # c -> order[c]
    assert [other["IoU"][c] for c in order] == found["IoU"]
    assert all(other[key] == pytest.approx(found[key]) for key in ("mIoU", "mIoU_old_rule", "mean_accuracy", "fwIoU"))
    assert scored(L, [torch.stack([said.masked_fill(true == IGNORE, wild), true]) for said, true in images]) == found
    right = scored(L, [true.expand(2, -1, -1) for _, true in images])
    assert right["mIoU"] == right["mIoU_old_rule"] == right["fwIoU"] == (1 if any(found["pixels"]) else None)


# --- archives ---------------------------------------------------------------------------------------------------------

NAME = st.text(st.sampled_from("ab. _-'\"\\\n\u00fc\u6f22\U0001f600"), min_size=1, max_size=6)
PLACE = st.lists(NAME, min_size=1, max_size=4).map("/".join)
SMALL = st.dictionaries(st.text("ab", min_size=1), st.binary(max_size=9) | st.just(b"c" * 30), min_size=1, max_size=3)
WAYS = st.sampled_from((("x.zip", zipfile.ZIP_STORED), ("x.zip", zipfile.ZIP_DEFLATED), ("x.tar", None)))
MASK = st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128, 255))                                # what a byte is changed by


def contents(path):
    """{name: bytes, or None where they are refused}"""
    found = dict.fromkeys(members := Shelf(path.parent).members(path))
    for name in found:
        with contextlib.suppress(InputError):
            found[name] = members[name].open().read()
    return found


def damaged(path, mask, *places):
    """Cut the file at each of these places (start, stop, step), and change it there; says where, and whether it is whole."""
    data = path.read_bytes()
    for at in range(len(data))[slice(*places)]:
        for bad in (data[:at], data[:at] + bytes([data[at] ^ mask]) + data[at + 1:]):
            path.unlink()                                     # to write over a file takes some disks longer
            path.write_bytes(bad)
            yield at, len(bad) == len(data)


@tried(100, WAYS, st.dictionaries(PLACE, st.binary(max_size=40) | COUNT.map(b"more ".__mul__)), st.sampled_from(("", "./")))
def test_any_files_come_back_byte_for_byte_under_their_names(way, files, prefix):
    with TemporaryDirectory() as folder:
        pack(path := Path(folder, way[0]), {prefix + name: content for name, content in files.items()}, way[1])
        assert contents(path) == {(prefix + name).removeprefix("./"): content for name, content in files.items()}


@tried(20, WAYS, SMALL, MASK, st.integers(0, 10))
def test_an_archive_that_is_cut_or_changed_anywhere_is_refused_or_gives_the_very_bytes(way, files, mask, start):
    """A zip's table of contents has no checksum, so a damaged name is another name; whatever a file is called, it is as it was.
    In a tar, names and sizes have one, bytes have none: all files are there, and but for the changed byte they are the same."""
    with TemporaryDirectory() as folder:
        pack(path := Path(folder, way[0]), files, way[1])
        if way[1] is None:                                    # all that counts, and two empty blocks more
            path.write_bytes(path.read_bytes()[:1024 * len(files) + 2048])
        for at, whole in damaged(path, mask, start, None, 1 if way[1] is not None else 11):
            with contextlib.suppress(InputError):
                found = contents(path)
                if way[1] is None:
                    assert [(name, len(c)) for name, c in found.items()] == [(name, len(c)) for name, c in files.items()], at
                    assert sum(a != b for name, c in files.items() for a, b in zip(c, found[name])) <= whole, at
                else:
                    assert whole and {*found.values()} <= {None, *files.values()}, at
                    assert all(found.get(name) in (None, content) for name, content in files.items()), at


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Of 300 mid codes: some indices need two bytes.  It remembers its fingerprint, which takes a while."""
    alone = Tokenizer.of(helpers.world(codes=(256, 300, 32, 256)).eval(), latent=True)
    alone.fingerprint = lambda told=alone.fingerprint(): told
    return alone


def written(tokenizer, path, sizes, draw=lambda shape, K: np.random.default_rng(K).integers(0, K, shape)):
    """Photos of names and sizes {name: (height, width)}, their indices by `draw`, as tokens at `path` -> what was written."""
    for name, size in sizes.items():
        (path.parent / name).write_bytes(encoded(np.zeros((*size, 3), np.uint8)))
    said = [(name[:-4], size, size, {stage: draw((1, *grid), len(tokenizer.counts[stage]))
                                     for stage, grid in tokenizer.grids(*size).items()}) for name, size in sizes.items()]
    indices = iter([{stage: torch.from_numpy(index) for stage, index in image[3].items()} for image in said])
    with patch.object(tokenizer, "encode", lambda image: next(indices)), contextlib.redirect_stdout(io.StringIO()):
        encode_files([path.parent / name for name in sizes], path, tokenizer, 0)
    return plain(said)


def plain(images):
    return [(*about, {stage: index.tolist() for stage, index in indices.items()}) for *about, indices in images]


@tried(60, st.dictionaries(NAME, st.tuples(*[st.integers(1, 20)] * 2), min_size=1, max_size=3), st.data())
def test_any_tokens_of_any_photos_come_back_as_they_were_written(tokenizer, sizes, data):
    def draw(shape, K):
        return data.draw(arrays(np.int64, shape, elements=st.integers(0, K - 1), fill=st.sampled_from((0, K - 1))))

    with TemporaryDirectory() as folder:
        said = written(tokenizer, path := Path(folder, "tokens.npz"), {f"{name}.png": size for name, size in sizes.items()}, draw)
        assert plain(read_tokens(path, tokenizer)) == said


@tried(16, st.booleans(), MASK, COUNT)
def test_tokens_that_are_cut_or_changed_anywhere_are_refused_or_the_very_same(tokenizer, long, mask, start):
    """As they are written; and, not compressed, in what an array says of itself: of a long one numpy may read less than there
    is, and not come to its checksum."""
    with TemporaryDirectory() as folder:
        said = written(tokenizer, path := Path(folder, "tokens.npz"), {"a.png": (200, 200) if long else (8, 9)})
        if long:
            arrays_of = dict(np.load(path))
            np.savez(path, **{"a.early": arrays_of.pop("a.early"), **arrays_of})
        first = path.read_bytes().index(b"\x93NUMPY") if long else start
        for at, whole in damaged(path, mask, first, first + 128 if long else None, 1 if long else 9):
            with contextlib.suppress(InputError):
                assert plain(read_tokens(path, tokenizer)) == said and whole, at


# --- labels -----------------------------------------------------------------------------------------------------------

HEADS = (b"", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"II*\0", b"MM\0*", b"GIF89a", b"BM", b"\xff\xd8\xff", b"P5 2 2 255\n")
WRITERS = ((read_label, encoded), (read_label, indexed), (read_label, lambda ids: encoded(Image.fromarray(ids > 1))),
           (read_16_bit, lambda ids: encoded(ids.astype(np.uint16) * 99)), (read_codes, lambda ids: helpers.codes(ids * 999)))
FIELDS = st.sampled_from("height width file_name image_id phase category_id size counts segmentation".split())
ODD = st.sampled_from((None, True, -1, 0, 4, 0.5, 10**30, math.inf, "6", ""))
ANYTHING = ODD | st.lists(ODD, max_size=3) | st.dictionaries(FIELDS, ODD, max_size=2)


@tried(150, st.sampled_from((read_label, read_16_bit, read_codes, read_mat)), st.sampled_from(HEADS), st.binary(max_size=60))
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_bytes_of_any_kind_are_a_label_or_one_line(read, head, rest):
    with TemporaryDirectory() as folder:
        (path := Path(folder, "a.png")).write_bytes(head + rest)
        try:
            label = read(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert label.dtype == np.int64 and label.ndim == 2


@tried(30, st.sampled_from(WRITERS), arrays(np.int64, (5, 4), elements=st.integers(0, 6)), MASK, st.integers(0, 2))
def test_a_png_that_is_cut_or_changed_anywhere_is_refused_or_the_very_same_label(way, ids, mask, start):
    read, write = way
    with TemporaryDirectory() as folder:
        (path := Path(folder, "a.png")).write_bytes(write(ids if read is read_codes else ids.astype(np.uint8)))
        label = read(path)
        for at, _ in damaged(path, mask, start, None, 3):
            with contextlib.suppress(InputError):
                assert np.array_equal(read(path), label), at


@tried(300, st.dictionaries(FIELDS, ANYTHING, max_size=2))
def test_masks_of_any_kind_are_a_label_or_one_line(wrong):
    image = {"image_id": 7, "file_name": "a.jpg", "height": 2, "width": 3, "phase": "val", **wrong}
    mask = {"image_id": 7, "category_id": 5, "segmentation": {"size": [2, 3], "counts": [1, 2, 3], **wrong}, **wrong}
    with TemporaryDirectory() as folder:
        (path := Path(folder, "merged.json")).write_text(json.dumps({"images": [image], "annos_segmentation": [mask]}))
        try:
            labels = [paint(masks) for masks in merged_masks(path).values()]
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert all(label.dtype == np.int64 and label.shape == (image["height"], image["width"]) for label in labels)
