"""Muon, torch's, with its one costly line written again: on a CPU in fp32, and all matrices of a shape at once.

    m  = momentum of the gradient G                          (Nesterov's: m looks one step ahead)
    W -= lr .2 sqrt(longer side)  NS(m)                      NS(m) is near U Vᵀ of m = U S Vᵀ: all directions alike

NS is five Newton-Schulz steps of a quintic, X = aX + (b XXᵀ + c (XXᵀ)²) X, matrix products only.  torch.optim.Muon takes
them in bf16, matrix by matrix.  That is right on a GPU.  A CPU without bf16 in hardware, as most laptops' are, takes 20
times as long for it as for fp32: of PAT's step in the world, 124 matrices of at most 96x384, more than half (docs/speed.md).

# ours: fp32 on a CPU, bf16 on a GPU as torch has it; the same numbers but for rounding, the same state in a checkpoint.

Tests: tests/kernels/test_muon.py.  Read next: bench.py.
"""

import torch


def orthogonal(X, coefficients, steps):
    """Each of n matrices with its singular values moved towards 1: X (n,a,b), any length -> (n,a,b), of X's kind."""
    a, b, c = coefficients
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)                              # no singular value above 1
    for _ in range(steps):
        S = X @ X.mT                                                                      # (n,a,a)
        X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=b, alpha=c), X, beta=a)
    return X


class Muon(torch.optim.Muon):
    """torch.optim.Muon with `match_rms_adamw`: steps as large as AdamW's, so that one rate does for both."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, grads, momenta = [], [], []
            self._init_group(group, params, grads, momenta)
            if not params:
                continue
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            shapes = {}                                       # (shorter, longer) -> [(parameter, what it moves by)]
            for p, update in zip(params, ahead):
                lying = update if p.shape[0] <= p.shape[1] else update.T                  # XXᵀ is the small one
                shapes.setdefault(lying.shape, []).append((p, lying))
            for (_, longer), pairs in shapes.items():
                X = torch.stack([lying for _, lying in pairs])                            # (n,a,b), a <= b
                X = orthogonal(X.bfloat16() if X.is_cuda else X, group["ns_coefficients"], group["ns_steps"])
                for (p, _), update in zip(pairs, X.to(pairs[0][0].dtype)):
                    p.add_(update if p.shape[0] <= p.shape[1] else update.T, alpha=-0.2 * longer**0.5 * group["lr"])
