"""What Triton's compiler makes of every kernel, for GPUs that need not be here.

    python -m kernels.compile_report                  all launches, for sm_80, sm_86 and sm_90
    python -m kernels.compile_report --json FILE      the same figures as JSON

A launch is planned exactly as for a run (`plan_*` of the kernel's file), then compiled instead of run.  Of the result:

    regs, stack    registers and bytes of stack a thread; a stack means registers were spilled to memory
    shared         bytes of shared memory a program; 99 KiB is what every one of these GPUs can give
    128-bit        loads of 16 bytes a thread from global memory, the widest there are; 0 at D = 30, the
                   model's heads, whose rows of 60 or 120 bytes are not aligned for them
    tensor         tensor-core instructions (HMMA, or HGMMA on sm_90)
    atomics        RED, REDG, ATOM and ATOMG on global memory: none, or sums would depend on the order in which programs finish

No GPU and no CUDA toolkit are needed: Triton brings its assembler and disassembler.  Tests: tests/kernels/test_kernels.py.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)                      # interpreted kernels cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")        # a * b + c in one rounding; 3.10 changes the default

import torch  # noqa: E402
import triton  # noqa: E402
from tqdm import tqdm  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cli import InputError, parse_flags, run_cli, write_files  # noqa: E402
from kernels import mean_shift, vmf_assign  # noqa: E402

TARGETS = (80, 86, 90)
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
           torch.int32: "*i32", torch.uint8: "*u8"}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def launches():
    """{name: Launch} of every kernel at the paper's sizes, planned on tensors without memory."""
    meta, found = torch.device("meta"), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        label = str(dtype).removeprefix("torch.")
        row = torch.empty(307200, device=meta)
        for D, K in ((32, 128),) if dtype == torch.float16 else ((32, 128), (32, 256), (64, 128)):
            x, e = torch.empty(307200, D, dtype=dtype, device=meta), torch.empty(K, D, dtype=dtype, device=meta)
            size = f"{label} D={D} K={K}"
            found[f"assign {size}"], (_, index, *_) = vmf_assign.plan_forward(x, e)
            found[f"quantise backward {size}"], _ = vmf_assign.plan_backward(x, e.float(), index, x, row, None, row)
        for D in {torch.float16: (32,), torch.bfloat16: (30, 32, 64)}.get(dtype, (32, 64)):
            q, k = (torch.empty(12, 8, n, D, dtype=dtype, device=meta) for n in (128, 1600))
            mask = torch.empty(12, 1600, dtype=torch.uint8, device=meta) if D == 64 else None
            size = f"{label} D={D}" + (" masked" if D == 64 else "")
            (part, total), out = mean_shift.plan_forward(q, k, k, mask, 30.0)
            (keys, queries, project), _ = mean_shift.plan_backward(q, k, k, mask, 30.0, *out, out[0])
            found.update({f"attention {size}": part, f"attention dk dv {size}": keys, f"attention dq {size}": queries})
            if dtype == torch.float32:                        # these two only add up
                found.update({f"combine D={D}": total, f"project D={D}": project})
    return found


def compile_for(launch, capability):
    """The launch compiled for one GPU: dict of the header's figures."""
    names = launch.kernel.arg_names
    constants = {name: launch.constants[name] for name in names if name in launch.constants}
    signature, attrs = dict.fromkeys(names, "constexpr"), {}
    for i, (name, value) in enumerate(zip((n for n in names if n not in constants), launch.args)):
        i = names.index(name)
        if isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:                                      # Triton makes an argument of 1 a constant
            constants[name] = 1
        else:
            signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attrs)
    options = {key: launch.constants[key] for key in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([TOOL, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return {"regs": registers, "stack": stack, "shared": compiled.metadata.shared,
            "128-bit": len(re.findall(r"LDG\S*\.128|LDGSTS\S*\.128", sass)),
            "tensor": len(re.findall(r"\bHG?MMA", sass)), "atomics": len(re.findall(r"\b(?:REDG?|ATOMG?)\b", sass))}


def report_one(job):
    """One row: job = (name of a launch, compute capability)"""
    return {"kernel": job[0], "sm": job[1], **compile_for(launches()[job[0]], job[1])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sm", type=int, nargs="+", default=TARGETS, help="compute capabilities, such as 80 90")
    parser.add_argument("--json", metavar="FILE")
    args = parse_flags(parser)
    if not TOOL.exists():
        raise InputError(f"{TOOL}: not there; this report needs Triton's own copy of cuobjdump")
    jobs = [(name, sm) for name in launches() for sm in args.sm]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        rows = list(tqdm(pool.map(report_one, jobs), desc="compiling", total=len(jobs), unit="kernel"))
    print(f"triton {triton.__version__}")
    columns = list(rows[0])[2:]
    print(f"{'kernel':36}{'sm':>4}" + "".join(f"{column:>9}" for column in columns))
    for row in rows:
        print(f"{row['kernel']:36}{row['sm']:4}" + "".join(f"{row[column]:9}" for column in columns))
    if args.json:
        write_files({args.json: json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n"})


if __name__ == "__main__":
    run_cli(main)
