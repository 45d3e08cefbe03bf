"""What both kernels stand on: products of tiles at the precision of their inputs, and a launch as a value.

**Products.**  A GPU's tensor cores multiply bf16 (8 bits of mantissa) or TF32 (11 bits) and add in fp32.  A true fp32
product needs 24 bits, so it is put together from three TF32 products of hand-split operands:

    x = hi + lo,  hi = x with its last 13 bits cut off (exact in TF32),  lo = x - hi (exact in fp32)
    a b = hi hi + hi lo + lo hi  (+ lo lo, below the last bit)                      relative error about 2^-22

    MODE      operands      used for
    "fp32"    3 x TF32      fp32 inputs
    "tf32"    TF32          fp16 inputs (TF32 has fp16's mantissa and fp32's exponent: exp(-60) is no fp16 number), and
                            fp32 inputs where torch.set_float32_matmul_precision says "high" or "medium"
    "bf16"    bf16          bf16 inputs

Triton's own `input_precision="ieee"` would run on the ordinary cores and spill kilobytes of stack a thread.

**A launch** is a kernel, its grid, its arguments and its constants, made by a plain function that tests and the compile
report can look at without a GPU: what they see is what runs.

# ours: all of it; the paper has no kernels.

Tests: tests/kernels/test_kernels.py.  Read next: vmf_assign.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, MODE: tl.constexpr):
    """acc (m,n) + a (m,k) @ b (k,n), added in fp32."""
    if MODE == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    if MODE == "tf32":
        return tl.dot(a, b, acc, input_precision="tf32")
    a_hi = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)            # -8192 = ~0x1fff
    b_hi = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    acc = tl.dot(a - a_hi, b_hi, acc, input_precision="tf32")                             # the small terms first
    acc = tl.dot(a_hi, b - b_hi, acc, input_precision="tf32")
    return tl.dot(a_hi, b_hi, acc, input_precision="tf32")


@triton.jit
def unit(x):
    """Rows (m,D) fp32 -> rows on the sphere, and their lengths (m) kept off zero.  A zero row stays zero."""
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
    return x / length[:, None], length


@triton.jit
def through_unit(grad, x_unit, length):
    """The gradient of `unit`: what of grad (m,D) is tangent to the sphere at x_unit, divided by the length."""
    along = tl.where(length > 1e-12, tl.sum(grad * x_unit, 1), 0.0)                       # below it, unit is linear
    return (grad - x_unit * along[:, None]) / length[:, None]


@dataclass
class Launch:
    """kernel[grid](*args, **constants), not yet run."""

    kernel: object
    grid: tuple
    args: tuple
    constants: dict

    def run(self):
        if 0 not in self.grid:
            self.kernel[self.grid](*self.args, **self.constants)


def mode(dtype):
    """How tiles of this dtype are multiplied; see the header."""
    if dtype == torch.float32:
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {torch.bfloat16: "bf16", torch.float16: "tf32"}[dtype]


def rounds(blocks, programs):
    """How many blocks each program takes so that about `programs` of them share `blocks`: few different numbers.

    A loop's length is a constant of the compiled kernel (loops of constant length are pipelined), and every length is
    compiled once; so it is rounded up to four leading bits, at most an eighth too long: 1..16, 18, 20, ... 32, 36, ...
    """
    exact = max(1, -(-blocks // max(1, programs)))
    step = 1 << max(0, exact.bit_length() - 4)
    return -(-exact // step) * step


def multiprocessors(device):
    """How many the GPU has; two under the interpreter, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def power_of_two(n, least=16):
    """The smallest power of two >= n and >= least; tensor cores want 16."""
    return max(least, triton.next_power_of_2(n))


def check_together(*tensors):
    """ValueError unless all tensors are on one device."""
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors on {tensors[0].device} and on {tensor.device}: move them to one device")
