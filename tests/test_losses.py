"""The losses: values worked by hand, gradients against the naive forms, and draws that depend on their key alone."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cli import InputError
from losses import (NO_OBJECT, alignment, cells, class_weight, generator, kernel, match, means, pairwise_costs, perceptual,
                    reconstruction, sample_at, segmentation, squared_distances, targets, uncertain_points)
from published.perceptual import load_lpips
from vq import straight_through


def all_of(h, w, n=1):
    """Nothing is padding."""
    return torch.ones(n, h, w, dtype=torch.bool)


def test_targets_are_one_mask_a_class_and_void_is_in_none():
    classes, masks = targets(torch.tensor([[4, 4, -1], [2, -1, 4]]))
    assert classes.tolist() == [2, 4]
    assert masks.tolist() == [[[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 1]]]


def test_an_all_void_label_has_no_targets():
    classes, masks = targets(torch.full((3, 3), -1))
    assert classes.shape == (0,) and masks.shape == (0, 3, 3)


def test_points_sample_bilinearly_at_pixel_centres():
    """Pixel centres of a 2x2 map lie at .25 and .75; halfway between two of them is their mean."""
    map_ = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.25], [0.5, 0.5]]])
    assert sample_at(map_, points)[0].tolist() == pytest.approx([1, 3, 2, 4])


def test_costs_are_mean_bce_and_dice():
    logits, truth = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    bce, dice = pairwise_costs(logits, truth)
    s = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    assert bce.item() == pytest.approx(-(math.log(s[0]) + math.log(1 - s[1])) / 2, rel=1e-5)
    assert dice.item() == pytest.approx(1 - (2 * s[0] + 1) / (s[0] + s[1] + 1 + 1), rel=1e-5)


def test_matching_finds_the_permutation():
    """Queries drawn as the true masks in another order, with the right class each, match exactly that order."""
    truth = torch.zeros(3, 8, 8)
    truth[0, :3], truth[1, 3:6], truth[2, 6:] = 1, 1, 1
    order = torch.tensor([2, 0, 1])
    logits = torch.full((4, 5), -3.0)
    logits[torch.arange(3), order] = 3.0
    masks = torch.cat([20 * truth[order] - 10, torch.full((1, 8, 8), -10.0)])
    q, m = match(masks, logits, torch.tensor([0, 1, 2]), truth, torch.rand(200, 2))
    assert q.tolist() == [0, 1, 2] and m.tolist() == order.tolist()


def test_matching_weighs_names_bce_and_dice_as_san_does():
    """2 class + 5 BCE + 5 dice, the best of all six permutations; another factor would choose another somewhere."""
    def best(class_factor, bce_factor, dice_factor):
        costs = [sum(-class_factor * p[q, m] + bce_factor * bce[q, m] + dice_factor * dice[q, m] for m, q in enumerate(order))
                 for order in itertools.permutations(range(3))]
        return list(itertools.permutations(range(3)))[int(np.argmin(costs))]

    gen, others = torch.Generator().manual_seed(0), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (5, 2, 5), (-2, 5, 5), (4, 5, 5)]
    differ = dict.fromkeys(others, 0)
    for _ in range(60):
        masks, logits = 0.3 * torch.randn(3, 4, 4, generator=gen), torch.randn(3, 4, generator=gen)
        truth = (torch.rand(3, 4, 4, generator=gen) < torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1)).float()
        points = torch.rand(40, 2, generator=gen)
        q, m = match(masks, logits, torch.tensor([0, 1, 2]), truth, points)
        x, t = (sample_at(maps, points.expand(3, -1, -1)) for maps in (masks, truth))             # (3,40) both
        p, s = logits.softmax(-1), x.sigmoid()
        bce = torch.stack([F.binary_cross_entropy_with_logits(x, row.expand_as(x), reduction="none").mean(1) for row in t], 1)
        dice = torch.stack([1 - (2 * (s * row).sum(1) + 1) / (s.sum(1) + row.sum() + 1) for row in t], 1)
        assert q[m.argsort()].tolist() == list(best(2, 5, 5))
        for other in others:
            differ[other] += best(*other) != best(2, 5, 5)
    assert min(differ.values()) > 0, differ


def test_uncertain_points_prefer_logits_near_zero():
    """Sure on the left (|10|), unsure on the right (0): three quarters of the points lie on the right by choice."""
    masks = torch.full((1, 4, 4), 10.0)
    masks[..., 2:] = 0
    points = uncertain_points(masks, 400, 3.0, 0.75, generator(1))
    assert points.shape == (1, 400, 2)
    assert (points[0, :300, 0] > 0.5).all() and 0.35 < (points[0, 300:, 0] > 0.5).float().mean() < 0.65


def test_each_mask_has_points_of_its_own():
    """Those chosen, and those that are not: no two masks share one."""
    points = uncertain_points(torch.zeros(2, 4, 4), 100, 3.0, 0.75, generator(1))
    assert (torch.cdist(points[0], points[1]) > 0).all()


def test_class_weights_are_known_before_the_forward_pass():
    """Images with 2 and 30 classes, 20 queries: 22 matched at 1, 18 others at .1."""
    assert class_weight([range(2), range(30)], 20) == pytest.approx(22 + 0.1 * 18)


def test_segmentation_by_hand():
    """One query, one true mask over everything, constant logit 0: BCE log 2, dice 1 - (n+1)/(n/2+n+1), CE log 2."""
    label = torch.zeros(4, 4, dtype=torch.int64)
    terms = segmentation(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2), [targets(label)], [(0,)], num_masks=1.0,
                         weight=1.0, points=100)
    # points near the border read zeros beyond it: bilinear sampling of the true mask fades there, of logit 0 does not
    assert terms["ce"].item() == pytest.approx(math.log(2))
    assert terms["mask"].item() == pytest.approx(math.log(2))
    assert terms["dice"].item() == pytest.approx(1 - 101 / 151, abs=0.06)


def test_segmentation_is_its_formula_on_the_points_of_each_images_own_key():
    """Two images, five queries, written out: the points drawn anew from each key, sums over the queries and masks, each
    divided by its own share; so many points in all, three times as many looked at, three quarters of them by choice."""
    masks, logits = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 4)
    found = [targets(torch.randint(0, 3, (16, 16))) for _ in range(2)]
    terms = segmentation(masks, logits, found, [(0, 7), (0, 8)], num_masks=3.0, weight=11.0, points=40)
    ce = mask = dice = 0.0
    for b, key in enumerate([(0, 7), (0, 8)]):
        gen, (classes, truth) = generator(*key), found[b]
        q, m = match(masks[b], logits[b], classes, truth, torch.rand(40, 2, generator=gen))
        said = {int(i): int(classes[j]) for i, j in zip(q, m)}
        for i in range(5):
            ce -= (1.0 if i in said else 0.1) * logits[b, i].log_softmax(-1)[said.get(i, 3)].item()
        where = uncertain_points(masks[b][q], 40, 3.0, 0.75, gen)
        assert where.shape == (len(q), 40, 2)
        for x, t in zip(sample_at(masks[b][q], where).tolist(), sample_at(truth[m], where).tolist()):
            p = [1 / (1 + math.exp(-v)) for v in x]
            mask -= sum(tv * math.log(pv) + (1 - tv) * math.log(1 - pv) for pv, tv in zip(p, t)) / 40
            dice += 1 - (2 * sum(pv * tv for pv, tv in zip(p, t)) + 1) / (sum(p) + sum(t) + 1)
    assert terms["ce"].item() == pytest.approx(ce / 11, rel=1e-5)
    assert terms["mask"].item() == pytest.approx(mask / 3, rel=1e-5) and terms["dice"].item() == pytest.approx(dice / 3, rel=1e-5)


def test_an_image_without_labels_costs_only_its_no_object_queries():
    terms = segmentation(torch.randn(1, 3, 4, 4), torch.zeros(1, 3, 2), [targets(torch.full((4, 4), -1))], [(0,)],
                         num_masks=1.0, weight=3 * NO_OBJECT, points=10)
    assert terms["ce"].item() == pytest.approx(math.log(2)) and terms["mask"] == 0 and terms["dice"] == 0


def test_an_images_loss_does_not_depend_on_its_neighbours():
    """Two images together, with shares of the whole, weigh as the sum of both alone."""
    masks, logits = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 4)
    found = [targets(torch.randint(0, 3, (16, 16))) for _ in range(2)]
    keys, shares = [(0, 7), (0, 8)], dict(num_masks=6.0, weight=6.4, points=50)
    both = segmentation(masks, logits, found, keys, **shares)
    alone = [segmentation(masks[i:i + 1], logits[i:i + 1], found[i:i + 1], keys[i:i + 1], **shares) for i in range(2)]
    for name in both:
        torch.testing.assert_close(both[name], alone[0][name] + alone[1][name])


def test_a_key_fixes_the_draw():
    assert torch.equal(torch.rand(5, generator=generator(3, 4)), torch.rand(5, generator=generator(3, 4)))
    assert not torch.equal(torch.rand(5, generator=generator(3, 4)), torch.rand(5, generator=generator(3, 5)))


def test_the_kernel_by_hand():
    """Same place and colour: 10 + 3.  One unit of colour and .1 of space apart: both exponentials, written out."""
    points, colours = torch.tensor([[0.0, 0.0], [0.1, 0.0]]), torch.tensor([[0.0, 0, 0], [1.0, 0, 0]])
    K = kernel(points, colours)
    assert K[0, 0].item() == pytest.approx(13)
    assert K[0, 1].item() == pytest.approx(10 * math.exp(-0.01 / 0.2 - 1 / 0.3) + 3 * math.exp(-0.01 / 0.01), rel=1e-4)


def test_gram_distances_equal_naive_ones_in_value_and_straight_through_gradient():
    x = F.normalize(torch.randn(1, 6, 4, dtype=torch.float64), dim=-1).requires_grad_()
    code, up = F.normalize(torch.randn(1, 6, 4, dtype=torch.float64), dim=-1), torch.randn(1, 6, 6, dtype=torch.float64)

    def both(distances):
        z = straight_through(x, code)
        d = distances(z)
        return d, torch.autograd.grad((d * up).sum(), x)[0]

    gram, naive = both(squared_distances), both(lambda z: (z[:, :, None] - z[:, None]).square().sum(-1))
    short = both(lambda z: 2 - 2 * z @ z.transpose(1, 2))
    torch.testing.assert_close(gram, naive)
    torch.testing.assert_close(short[0], naive[0])                            # the tempting form: right value ...
    assert (short[1] - naive[1]).abs().max() > 0.1                            # ... wrong gradient


def test_far_from_the_origin_distances_are_still_distances():
    """Off the sphere (--ablate no-vmf) codes may be long and close together: the Gram form must not cancel to noise."""
    z = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    true = torch.cdist(z.double(), z.double()).square()
    far = squared_distances(z + 3000)
    assert (far >= 0).all()
    torch.testing.assert_close(far.double(), true, rtol=1e-2, atol=1e-3)                  # z + 3000 is rounded to 1e-4


def test_one_long_code_everywhere_pulls_at_nothing():
    """All features on one code is where training off the sphere may end: what is left there is rounding, and must not be divided by."""
    code = 1000 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    noise = 1e-4 * torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    zq = (code.view(1, 32, 1, 1) + noise).requires_grad_()
    terms = alignment(zq, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2)), all_of(8, 8), [(0,)])
    sum(terms.values()).backward()
    assert zq.grad.abs().max() < 1e-4 and all(term < 1e-4 for term in terms.values())


def test_total_variation_of_a_constant_is_zero_and_of_a_step_is_its_square():
    """Left half one code, right half a code at distance² 2: of 4x3 horizontal neighbours 4 differ; the channels add up."""
    zq = torch.zeros(1, 2, 4, 4)
    zq[:, 0] = 1
    image = torch.randn(1, 3, 4, 4)
    assert alignment(zq, image, all_of(*zq.shape[2:]), [(0,)], "literal")["tv"] == 0 and alignment(zq, image, all_of(*zq.shape[2:]), [(0,)])["tv"] == 0
    zq[:, 0, :, 2:], zq[:, 1, :, 2:] = 0, 1
    assert alignment(zq, image, all_of(*zq.shape[2:]), [(0,)], "literal")["tv"].item() == pytest.approx(4 * 2 / 12)


def test_total_variation_looks_down_and_to_the_right():
    """A step down the rows costs what the same step along the columns does."""
    zq = torch.zeros(1, 2, 4, 6)
    zq[:, 0, :, :3], zq[:, 1, :, 3:] = 1, 1
    across, down = (alignment(z, torch.randn(1, 3, *z.shape[2:]), all_of(*z.shape[2:]), [(0,)], "literal")["tv"].item()
                    for z in (zq, zq.transpose(2, 3)))
    assert across == down == pytest.approx(4 * 2 / 20)


def test_scale_free_is_the_literal_one_over_the_mean_distance_and_crf_over_the_mean_affinity_too():
    zq, image = F.normalize(torch.randn(2, 5, 3, 4), dim=1), torch.randn(2, 3, 3, 4)
    parts = []
    for z, colours in zip(zq.flatten(2).transpose(1, 2), image.flatten(2).transpose(1, 2)):
        points = torch.tensor([[y / 3, x / 4] for y in range(3) for x in range(4)])
        parts.append((kernel(points, colours).mean(), torch.cdist(z, z).square().mean()))
    literal = [alignment(zq[b:b + 1], image[b:b + 1], all_of(3, 4), [(0,)], "literal") for b in range(2)]
    found = alignment(zq, image, all_of(3, 4, 2), [(0,), (1,)])
    torch.testing.assert_close(found["crf"], sum(one["crf"] / (K * d) for one, (K, d) in zip(literal, parts)) / 2)
    torch.testing.assert_close(found["tv"], sum(one["tv"] / d for one, (_, d) in zip(literal, parts)) / 2)


def test_a_cells_colour_is_the_mean_of_its_pixels():
    """An image of four times the cells, and the same image made small by hand: the same CRF."""
    zq, image = F.normalize(torch.randn(1, 5, 3, 4), dim=1), torch.randn(1, 3, 6, 8)
    small = sum(image[:, :, y::2, x::2] for y in range(2) for x in range(2)) / 4
    large, little = (alignment(zq, x, all_of(3, 4), [(0,)])["crf"] for x in (image, small))
    torch.testing.assert_close(large, little)


def test_crf_equals_the_naive_sum():
    zq, image = F.normalize(torch.randn(1, 5, 3, 4), dim=1), torch.randn(1, 3, 3, 4)
    total, n = 0.0, 12
    for i in range(n):
        for j in range(n):
            (a, b), (c, d) = divmod(i, 4), divmod(j, 4)
            p = ((a - c) / 3) ** 2 + ((b - d) / 4) ** 2
            colour = (image[0, :, a, b] - image[0, :, c, d]).square().sum().item()
            K = 10 * math.exp(-p / 0.2 - colour / 0.3) + 3 * math.exp(-p / 0.01)
            total += K * (zq[0, :, a, b] - zq[0, :, c, d]).square().sum().item()
    assert alignment(zq, image, all_of(*zq.shape[2:]), [(0,)], "literal")["crf"].item() == pytest.approx(total / n**2, rel=1e-4)


def test_moving_all_codes_together_leaves_the_scale_free_loss_alone_and_feeds_the_literal_one():
    """Shrinking every difference to a tenth: the literal loss falls a hundredfold, ours not at all."""
    zq, image = F.normalize(torch.randn(1, 8, 6, 6), dim=1), torch.randn(1, 3, 6, 6)
    huddled = zq.mean((2, 3), keepdim=True) + 0.1 * (zq - zq.mean((2, 3), keepdim=True))
    for form, ratio in (("scale-free", 1.0), ("literal", 0.01)):
        before, after = alignment(zq, image, all_of(*zq.shape[2:]), [(0,)], form), alignment(huddled, image, all_of(6, 6), [(0,)], form)
        for name in before:
            assert (after[name] / before[name]).item() == pytest.approx(ratio, rel=1e-3)


def test_reconstruction_by_hand():
    terms = reconstruction(torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), 0.3), all_of(2, 2))
    assert terms["l1"].item() == pytest.approx(0.2) and terms["l2"].item() == pytest.approx(0.04) and "lpips" not in terms


def test_training_without_lpips_weights_says_where_they_belong_and_what_does_without(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    load_lpips.cache_clear()
    with pytest.raises(InputError, match="vgg16-397923af.pth: no such file.* put https://.* --set perceptual=false$") as error:
        perceptual("cpu")
    assert str(tmp_path / "checkpoints") in str(error.value) and "\n" not in str(error.value)
    load_lpips.cache_clear()


def test_lpips_sees_images_in_minus_one_to_one():
    seen = []
    terms = reconstruction(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2), all_of(2, 2),
                           lambda a, b: seen.append((a, b)) or torch.ones(1, 1, 1, 1))
    assert terms["lpips"] == 1 and seen[0][0].unique().tolist() == [-1] and seen[0][1].unique().tolist() == [1]


# --- padding ---


def test_a_cell_shows_image_where_at_least_half_of_it_does():
    """4x6 pixels of which the first 3 columns of the first 3 rows are image, in cells of 2x3 and of 4x6."""
    inside = torch.zeros(1, 4, 6, dtype=torch.bool)
    inside[:, :3, :3] = True
    assert cells(inside, (2, 2)).tolist() == [[[True, False], [True, False]]] and cells(inside, (4, 6)).equal(inside)
    assert not cells(inside, (1, 1)).any()                                    # 9 of 24


def test_each_images_mean_is_over_its_own_pixels_and_an_image_of_nothing_but_padding_is_zero():
    x, inside = torch.tensor([[1.0, 3, 100], [5, 100, 100], [9, 9, 9]]), torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert means(x, inside).tolist() == [2, 5, 0]


def test_what_stands_in_padding_changes_no_loss_and_gets_no_gradient():
    """The same image and map with other numbers where there is padding: the same terms, and zero gradient there.  The
    samples are as many as cells, so that some are drawn in the padding."""
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[0, :5], inside[1, :, :3] = True, True
    image, hat, zq = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), F.normalize(torch.randn(2, 4, 8, 8), dim=1)
    far = ~inside[:, None]
    metric = lambda a, b: (a - b).square().mean((1, 2, 3), keepdim=True)  # noqa: E731
    found = []
    for other in (0.0, 50.0):
        image2, hat2, zq2 = (torch.where(far, x + other, x).requires_grad_() for x in (image, hat, zq))
        terms = reconstruction(hat2, image2, inside, metric)
        for form in ("scale-free", "literal"):
            terms.update({f"{form} {name}": value for name, value in
                          alignment(zq2, image2, inside, [(0, 1), (0, 2)], form, 64).items()})
        found.append(terms)
        grads = torch.autograd.grad(sum(terms.values()), (hat2, zq2))
        assert all((grad * far == 0).all() and (grad * ~far != 0).any() for grad in grads)
    assert len(found[0]) == 7
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


def test_a_padded_image_costs_what_it_costs_alone():
    """3x4 pixels in a corner of 6x4: every mean is over the twelve, as if the padding were not there."""
    image, hat, zq = torch.rand(1, 3, 3, 4), torch.rand(1, 3, 3, 4), F.normalize(torch.randn(1, 5, 3, 4), dim=1)
    metric = lambda a, b: (a - b).square().mean((1, 2, 3), keepdim=True)  # noqa: E731
    alone = {**reconstruction(hat, image, all_of(3, 4), metric), **alignment(zq, image, all_of(3, 4), [(0,)], "scale-free")}
    image2, hat2, zq2 = (F.pad(x, (0, 0, 0, 3), value=7.0) for x in (image, hat, zq))
    inside = F.pad(all_of(3, 4), (0, 0, 0, 3))
    padded = {**reconstruction(hat2, image2, inside, metric), **alignment(zq2, image2, inside, [(0,)], "scale-free")}
    del alone["crf"], padded["crf"]                           # positions are fractions of the whole map: other distances
    for name, value in alone.items():
        torch.testing.assert_close(value, padded[name], msg=name)


def test_no_sample_is_spent_on_padding_where_there_is_image_left():
    """Twelve of 64 cells are image, and twelve are sampled: all of them, whatever is drawn."""
    zq, image = F.normalize(torch.randn(1, 4, 8, 8), dim=1), torch.randn(1, 3, 8, 8)
    inside = F.pad(all_of(3, 4), (0, 4, 0, 5))
    some, every = (alignment(zq, image, inside, [(key,)], "literal", samples)["crf"] for key, samples in ((5, 12), (6, 64)))
    torch.testing.assert_close(some, every)
