"""Two Triton kernels beside the plain functions they equal, and the one switch that chooses between them.

    vmf_assign.py    assign, quantise                        the plain ones are in vq.py
    mean_shift.py    hypersphere_attention, mean_shift       the plain ones are in hsattn.py
    tile.py          what both stand on: products of tiles, a launch as a value
    bench.py         python kernels/bench.py: right first, then how fast against what else there is
    compile_report.py    what the compiler makes of every launch, for GPUs that are not here

Same names, arguments and returns as the plain functions, which stay the definition and the path of the CPU.  The switch
is `--kernels auto | torch | triton`.  A kernel that breaks raises; nothing falls back quietly.
"""

import os

CHOICES = ("auto", "torch", "triton")
DTYPES = ("float32", "bfloat16", "float16")
MAX_D = 64                                 # numbers a row; with 128 or 240 the tiles that were tried spill registers
MAX_KAPPA = 43.0                           # exp(-2 * 43) is about the smallest normal fp32; the shift is fixed


def path(choice, device, dtype, D, kappa=None):
    """"triton" or "torch", for tensors of this device and dtype with D numbers a row (kappa: for attention).

    "auto" takes the kernel on a GPU where it is defined: fp32, bf16 or fp16, D <= 64, and in attention
    0 < kappa <= 43.  "triton" raises ValueError where it is not defined.
    """
    if choice not in CHOICES:
        raise ValueError(f"kernels {choice!r}: there are {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return "torch"
    reason = limits(device, dtype, D, kappa)
    if reason and choice == "triton":
        raise ValueError(reason)
    return "torch" if reason else "triton"


def limits(device, dtype, D, kappa=None):
    """Why a kernel does not take such inputs, in words; "" if it does."""
    name = str(dtype).removeprefix("torch.")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
        return (f"the Triton kernels run on a GPU, not on {device.type}: use kernels torch, or set TRITON_INTERPRET=1 "
                "before Python starts, to try them slowly")
    if name not in DTYPES:
        return f"the Triton kernels take {', '.join(DTYPES)}, not {name}: use kernels torch"
    if not 1 <= D <= MAX_D:
        return f"the Triton kernels take rows of 1 to {MAX_D} numbers, not {D}: use kernels torch"
    if kappa is not None and not 0 < kappa <= MAX_KAPPA:
        return f"kappa {kappa:g}: the Triton kernel is safe for 0 < kappa <= {MAX_KAPPA:g}, use kernels torch"
    return ""
