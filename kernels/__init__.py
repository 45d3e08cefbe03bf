"""Faster twins of the plain functions of hsattn.py and vq.py, and the one switch that chooses between them.

    vmf_assign.py    assign, quantise                        Triton; the plain ones are in vq.py
    mean_shift.py    hypersphere_attention, mean_shift       Triton; the plain ones are in hsattn.py
    tile.py          what both stand on: products of tiles, a launch as a value
    cpu.py           hypersphere_attention, assign, quantise, nearest: few images, few features at a time
    muon.py          torch.optim.Muon, whose bf16 a CPU has to emulate
    bench.py         python -m kernels.bench: right first, then how fast against what else there is
    compile_report.py    what the compiler makes of every launch, for GPUs that are not here

Same names, arguments and returns as the plain functions, which stay the definition.  `--kernels plain` takes those, `auto`
Triton on a GPU where it is defined, cpu.py on a CPU, else those; `triton` Triton, or an error.  Nothing falls back quietly.
"""

import os

CHOICES = ("plain", "auto", "triton")
DTYPES = ("float32", "bfloat16", "float16")
MAX_D = 64                                 # numbers a row; with 128 or 240 the tiles that were tried spill registers
MAX_KAPPA = 43.0                           # exp(-2 * 43) is about the smallest normal fp32; the shift is fixed


def path(choice, device, dtype, D, kappa=None):
    """"plain", "cpu" or "triton", for tensors of this device and dtype with D numbers a row (kappa: for attention).

    Triton is defined on a GPU for fp32, bf16 or fp16, D <= 64, and in attention 0 < kappa <= 43.  "triton" raises
    ValueError where it is not defined.
    """
    if choice not in CHOICES:
        raise ValueError(f"kernels {choice!r}: there are {', '.join(CHOICES)}")
    if choice == "plain":
        return "plain"
    if choice == "auto" and device.type != "cuda":
        return "cpu" if device.type == "cpu" else "plain"
    reason = limits(device, dtype, D, kappa)
    if reason and choice == "triton":
        raise ValueError(reason)
    return "plain" if reason else "triton"


def kernel(plain, choice, x, kappa=None):
    """The function that computes what `plain` does on tensors like x (...,D): itself, or its twin of the same name."""
    way = path(choice, x.device, x.dtype, x.shape[-1], kappa)
    if way == "plain":
        return plain
    if way == "cpu":
        from kernels import cpu as twins
    elif plain.__name__ == "hypersphere_attention":           # Triton exists on Linux only: imported where it runs
        from kernels import mean_shift as twins
    else:
        from kernels import vmf_assign as twins
    return getattr(twins, plain.__name__)


def limits(device, dtype, D, kappa=None):
    """Why a Triton kernel does not take such inputs, in words; "" if it does."""
    name = str(dtype).removeprefix("torch.")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
        return (f"the Triton kernels run on a GPU, not on {device.type}: use kernels auto, or set TRITON_INTERPRET=1 "
                "before Python starts, to try them slowly")
    if name not in DTYPES:
        return f"the Triton kernels take {', '.join(DTYPES)}, not {name}: use kernels auto"
    if not 1 <= D <= MAX_D:
        return f"the Triton kernels take rows of 1 to {MAX_D} numbers, not {D}: use kernels auto"
    if kappa is not None and not 0 < kappa <= MAX_KAPPA:
        return f"kappa {kappa:g}: the Triton kernel is safe for 0 < kappa <= {MAX_KAPPA:g}, use kernels auto"
    return ""
