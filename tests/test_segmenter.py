"""What every model of the registry owes the loop, the scores and the pictures: the same tests for each."""

import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import segmenter
import train
from cli import InputError
from data import IGNORE
from kernels.muon import Muon
from predict import name_pixels, segment
from runs import MODELS, build, changed, leaves, load_run, model_class, preset
from segmenter import VLMS, Answer, Segmenter, identity
from tests.helpers import generator
from train import Stream, gradients, recipe
from world.scenes import World

SMALL = dict(batch=4, points=64, crf_samples=64, width=48, hs_heads=4, decoder_width=32, spade_hidden=16, head_width=32,
             mixer_hidden=32, codes=(32, 16, 8, 32), dense_width=32, hidden=16, guide=16, guidance=(8, 8), guidance_proj=(4, 4),
             decoder_widths=(8, 4), agg_layers=1, widths=(8, 16, 32, 64), head_dim=8, val_images=4, log_every=1,
             pretrained="none")
every_model = pytest.mark.parametrize("model", MODELS)


def small(model, **numbers):
    """A Training of the world, cut down by those of SMALL's numbers that the model has; over a small SAN, if over one."""
    config = recipe("world", model)
    cut = {name: value for name, value in SMALL.items() if name in leaves(config)}
    if "generator" in leaves(config):
        cut["generator"] = generator()
    return changed(config, **{**cut, **numbers})


def samples(config):
    """What it is trained on: the world, unless its model brings samples of its own."""
    return model_class(config.run.model).dataset(config.run) or World("train")


def micro_batches(config, rank=0, processes=1):
    """What process `rank` draws in the first step."""
    stream, n = Stream(samples(config), config, 0, rank, processes), config.recipe.batch // processes
    drawn, local = [stream[i] for i in range(n)], n // config.recipe.accumulate
    return [(torch.stack([s[0] for s in part]), torch.stack([s[1] for s in part]), torch.tensor([s[2] for s in part]))
            for part in (drawn[k:k + local] for k in range(0, n, local))]


def first_gradients(config, rank=0, processes=1):
    """In float64, name -> tensor."""
    torch.manual_seed(config.run.seed)
    model = build(config.run).double().train()
    text = model.vlm.embed_text(samples(config).train_names)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    gradients(wrapped, text, micro_batches(config, rank, processes), config, processes)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def process(rank, configs, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for model, config in configs.items():
        found = first_gradients(config, rank, 2)
        if rank == 0:
            torch.save(found, folder / model)
    dist.destroy_process_group()


def same(whole, split, model):
    """Every gradient is there, in both, in float64 to 1e-9."""
    assert all(gradient is not None for gradient in whole.values()) and split.keys() == whole.keys(), model
    for name, gradient in whole.items():
        assert (gradient - split[name]).abs().max() < 1e-9, (model, name)


@every_model
def test_two_micro_batches_compute_the_gradient_of_one_batch(model):
    """A batch of 4, as 2 + 2 one after the other."""
    config = small(model)
    same(first_gradients(config), first_gradients(changed(config, accumulate=2)), model)


def test_two_processes_compute_the_gradient_of_one_batch_of_every_model(tmp_path):
    """A batch of 4, as 2 + 2 on two processes, which take the models in turn: to start them costs more than the gradients."""
    configs = {model: small(model) for model in MODELS}
    mp.spawn(process, (configs, 29000 + os.getpid() % 1000, tmp_path), nprocs=2)
    for model, config in configs.items():
        same(first_gradients(config), torch.load(tmp_path / model, weights_only=True), model)


@every_model
def test_padding_and_unlabelled_pixels_are_no_class(model):
    """Labels that are all IGNORE: every term is finite, and no gradient says anything of names."""
    config = small(model)
    net = build(config.run).train()
    images, labels, numbers = micro_batches(config)[0]
    text = net.vlm.embed_text(samples(config).train_names)
    terms, _ = gradients(net, text, [(images, torch.full_like(labels, IGNORE), numbers)], config)
    assert all(torch.isfinite(term) for term in terms.values())


@every_model
def test_resuming_equals_never_having_stopped(model, tmp_path):
    """Four steps at once, and two, a stop, two more: every weight bit for bit, and every line of the log."""
    for name, stops in (("whole", [4]), ("broken", [2, 4])):  # of five: nothing is scored
        for k, stop in enumerate(stops):
            train.train(small(model, steps=5, stop_at=stop, out=str(tmp_path / name)), resume=k > 0)
    a, b = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    logs = [[{**json.loads(line), "ms_per_step": 0} for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "broken")]
    assert logs[0] == logs[1]


@every_model
def test_terms_that_are_watched_and_drawn_are_logged(model):
    config = small(model)
    net = build(config.run).train()
    terms, _ = gradients(net, net.vlm.embed_text(samples(config).train_names), micro_batches(config), config)
    assert net.watch and set(net.watch) <= terms.keys()
    drawn = {term for panel in net.curves.values() for term in panel.values()}
    assert terms.keys() <= drawn | {"ce_1", "mask_1", "dice_1"} and drawn <= terms.keys() | {"lpips"}


@every_model
def test_names_in_another_order_get_the_same_answer_in_that_order(model):
    net = build(small(model).run).eval()
    image, order = World("val", 1)[0]["image"], torch.tensor([2, 0, 3, 1])
    text = net.vlm.embed_text(World.names[:4])
    said, other = (segment(net, image, rows, (64, 64))[0] for rows in (text, text[order]))
    assert (order[other] == said).float().mean() > 0.999                                  # ties of rounding apart


@every_model
@torch.no_grad()
def test_an_image_is_answered_alike_alone_and_in_a_batch_and_at_any_size(model):
    net = build(small(model).run).eval()
    images, text = torch.randn(2, 3, 64, 96), net.vlm.embed_text(World.names[:5])
    assert images.shape[-1] % net.stride == 0
    both, alone = net.answer(net(images, text), 1), net.answer(net(images[1:], text), 0)
    assert both.maps.shape == alone.maps.shape and (both.maps - alone.maps).abs().max() < 1e-3 * alone.maps.abs().max()
    assert segment(net, torch.randn(3, 50, 81), text, (33, 47))[0].shape == (33, 47)


@every_model
def test_every_preset_names_numbers_that_exist_and_passes_its_own_check(model):
    kind = model_class(model)
    assert issubclass(kind, Segmenter) and {"world", "coco", "coco-large"} <= kind.PRESETS.keys() <= VLMS.keys()
    for name in VLMS.keys() - kind.PRESETS.keys():            # a CLIP it cannot stand on: one line that says which it can
        with pytest.raises(InputError, match="there are world, coco"):
            preset(name, model)
    for name in kind.PRESETS:
        config = recipe(name, model)
        kind.check(config.run.net)
        assert config.run == preset(name, model)
    for row, numbers in kind.ABLATIONS.items():
        kind.check(changed(preset("world", model), **numbers).net)


# --- what the contract gives to all ----------------------------------------------------------------------------------


def test_a_sum_over_processes_leaves_what_it_sums_alone(monkeypatch):
    """Three processes that all hold (1, 2): the sum is (3, 6), its own numbers are still (1, 2).  Alone: itself."""
    value = torch.tensor([1.0, 2.0])
    assert segmenter.summed(value) is value
    fake = dict(is_initialized=lambda: True, get_world_size=lambda: 3, get_backend=lambda: "gloo",
                all_reduce=lambda total: total.mul_(3))
    for name, instead in fake.items():
        monkeypatch.setattr(segmenter.dist, name, instead)
    assert segmenter.summed(value).tolist() == [3, 6] and value.tolist() == [1, 2]


def test_weight_decay_is_apart_from_the_gradient():
    """AdamW: where the gradient is 0, a step of rate .1 and decay .5 leaves 1 - .05 of a weight; Adam would leave .9."""
    p = torch.nn.Parameter(torch.ones(1))
    optimizer, = Segmenter().optimizers([dict(params=[p], lr=0.1, weight_decay=0.5, muon=False)], recipe("world").recipe)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == pytest.approx(0.95)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    """A step of Muon turns all directions of a matrix alike: of a gradient diag(3, 1) its step has the ratio of about 1,
    AdamW's too, but of [[3, 1], [1, 3]], with singular values 4 and 2, only Muon's step is a multiple of the identity."""
    W, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    groups = [dict(params=[b], weight_decay=0.0, muon=False), dict(params=[W], weight_decay=0.0, muon=True)]
    optimizers = Segmenter().optimizers(groups, changed(recipe("world").recipe, lr=0.1))
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, Muon]
    W.grad, b.grad = torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.ones(2)
    for optimizer in optimizers:
        optimizer.step()
    assert -0.04 < W[0, 0] < -0.015 and (W[0, 1] / W[0, 0]).abs() < 0.25 and b.tolist() == pytest.approx([-0.1, -0.1])


# --- one formula for three kinds of answer ---------------------------------------------------------------------------


def names_of(answer, none_of_these=False):
    """An answer on the 1x2 grid of a 1x2 picture: no interpolation."""
    return name_pixels(answer, (1, 2), (1, 2), (1, 2), none_of_these).tolist()[0]


def test_masks_times_classes_by_hand():
    """Two masks, sigmoid .5 and .9 at the first pixel; s = (.5 .8 + .9 .1, .5 .1 + .9 .3) = (.49, .32), none .05 + .54."""
    maps = torch.logit(torch.tensor([[[0.5, 0.9]], [[0.9, 0.1]]]))
    answer = Answer(maps, mix=torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.3, 0.6]]), none=True)
    assert names_of(answer) == [0, 0]
    assert names_of(answer, none_of_these=True) == [-1, 0]                                # .49 < .59; .73 > .15


def test_maps_that_are_names_by_hand():
    answer = Answer(torch.tensor([[[0.2, -0.3]], [[0.1, -0.1]]]), gate=identity, floor=0.0)
    assert names_of(answer) == [0, 1] and names_of(answer, none_of_these=True) == [0, -1]


def test_groups_that_share_names_by_hand():
    """Pixel 1 belongs .7 to group 0, whose scores are (1, 3): s = .7 (1, 3) + .3 (5, 0) = (2.2, 2.1)."""
    answer = Answer(torch.tensor([[[0.7, 0.9]], [[0.3, 0.1]]]), mix=torch.tensor([[1.0, 3.0], [5.0, 0.0]]), gate=identity)
    assert names_of(answer) == [0, 1] == names_of(answer, none_of_these=True)
