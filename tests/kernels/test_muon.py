"""Muon in fp32, many matrices at once: torch.optim.Muon's steps but for the rounding of bf16, and its state."""

import pytest
import torch
from torch.optim import _muon as theirs

from kernels.muon import Muon, orthogonal

TORCHS = 3.4445, -4.7750, 2.0315       # torch.optim.Muon's coefficients, a, b, c
SHAPES = [(6, 6), (4, 9), (9, 4), (4, 9), (1, 5), (7, 2)]


def matrices(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def trained(make, steps=3):
    """The matrices after some steps on the same gradients, and what the optimiser remembers of each."""
    params = matrices()
    optimizer = make(params)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + p.shape[0]))
        optimizer.step()
    return params, [optimizer.state[p]["momentum_buffer"] for p in params]


def in_fp32(monkeypatch):
    """torch's own Newton-Schulz without its one cast to bf16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())


def test_it_takes_torchs_steps(monkeypatch):
    """Lying, standing, square, single rows, two of a shape with gradients alike; decay, momentum, three steps."""
    ours, our_momenta = trained(lambda params: Muon(params, lr=0.1, weight_decay=0.3))
    in_fp32(monkeypatch)
    reference, momenta = trained(lambda params: torch.optim.Muon(params, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"))
    for mine, theirs_ in zip([*ours, *our_momenta], [*reference, *momenta], strict=True):
        torch.testing.assert_close(mine, theirs_, rtol=1e-4, atol=1e-6)                   # fp32, in another order


def test_torch_itself_is_as_far_from_exact_as_bf16_rounds_and_ours_is_not():
    X = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    exact = orthogonal(X.double(), TORCHS, 5).float()
    bf16 = theirs._zeropower_via_newtonschulz(X[0], TORCHS, 5, 1e-7).float()
    assert (orthogonal(X, TORCHS, 5) - exact).norm() / exact.norm() < 1e-5
    assert 1e-3 < (bf16 - exact[0]).norm() / exact.norm() < 5e-2


def test_the_polynomial_by_hand():
    """Of diag(3, 4), of length 5: singular values .6, .8; one step makes them a s + b s³ + c s⁵."""
    a, b, c = TORCHS
    X = orthogonal(torch.diag(torch.tensor([3.0, 4.0]))[None], TORCHS, 1)[0]
    assert X.diagonal().tolist() == pytest.approx([a * s + b * s**3 + c * s**5 for s in (0.6, 0.8)], rel=1e-5)
    assert X[0, 1] == X[1, 0] == 0


def test_all_directions_come_out_alike_and_where_they_were():
    """Singular values from 1 to 100 end between .7 and 1.2; the directions U and V stay."""
    U, _, Vh = torch.linalg.svd(torch.randn(5, 9, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    X = orthogonal((U @ torch.diag(torch.logspace(0, 2, 5)) @ Vh)[None], TORCHS, 5)[0]
    turned = U.T @ X @ Vh.T
    assert 0.65 < turned.diagonal().min() and turned.diagonal().max() < 1.25
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-4


def test_a_matrix_alone_and_among_others_and_a_gradient_of_zeros():
    """No row of a batch knows of another; zeros stay zeros, not NaN."""
    X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    X[1] = 0
    together = orthogonal(X, TORCHS, 5)
    assert together[1].eq(0).all()
    for i in (0, 2):
        torch.testing.assert_close(together[i], orthogonal(X[i:i + 1], TORCHS, 5)[0])


def test_a_parameter_without_a_gradient_stays_and_has_no_momentum():
    still, moving = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([still, moving], lr=0.1, weight_decay=0.5)
    moving.grad = torch.ones(2, 3)
    optimizer.step()
    assert still.eq(1).all() and still not in optimizer.state and not moving.eq(1).any()


def test_groups_have_rates_and_decays_of_their_own():
    """Zero gradients: only decay moves, by 1 - lr wd of each group's."""
    a, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([dict(params=[a], lr=0.1, weight_decay=0.5), dict(params=[b], lr=0.2, weight_decay=0.0)], lr=1.0)
    a.grad = b.grad = torch.zeros(2, 2)
    optimizer.step()
    assert a.flatten().tolist() == pytest.approx([0.95] * 4) and b.eq(1).all()
