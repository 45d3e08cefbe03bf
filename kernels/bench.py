"""Right first, then how fast: the two operations against what else computes them, on whatever machine this is.

    python -m kernels.bench                    correctness, then one table an operation; on a CPU the CPU rows only
    python -m kernels.bench --json FILE        the same figures as JSON
    python -m kernels.bench --tune             on a GPU: try tiles, print the entries of TILES for it
    pip install vector-quantize-pytorch        for the row of that name; nothing else needs it

Rows are at the paper's sizes (640x640): assignment of B times 25,600, 6,400, 1,600 and 1,600 features to 128, 64, 32 and
256 codes of 32 numbers; attention of 128 queries in 8 heads of 30 to 1,600 features, and the clustering's one head of 32
numbers over 25,600.  `forward` makes index, code and cosine, or the attended rows; `+ backward` is a training step's
share: quantise with its loss, or attention, and all gradients under a random upstream gradient.

    vs ours     time over the time of the project's own row above it: more than 1 is slower than ours
    floor       what the bytes that must be read and written would take at this machine's measured copy speed, or the
                products at its measured matmul speed in that dtype, whichever is longer;  / floor: time over it
    extra MiB   the most memory it needed beyond its inputs

Ratios hold within one call.  Times are medians, on a GPU over four sets of inputs in turn (one set of an early batch
would fit the cache) and, where B = 1, replayed from a CUDA graph too, because there the launches cost more than the work.

Tests: tests/kernels/test_kernels.py.  What the compiler makes of the kernels: compile_report.py.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product as every
from pathlib import Path

import torch
import torch.nn.functional as F

import hsattn
import vq
from cli import InputError, parse_flags, run_cli, write_files
from hsattn import g
from kernels import cpu, limits

STAGES = {"early": (25600, 128), "mid": (6400, 64), "late": (1600, 32), "latent": (1600, 256)}      # N an image, K
D, HEADS, HEAD, KAPPA, BETA = 32, 8, 30, 30.0, 0.25
GPU = torch.cuda.is_available()
KERNELS = not limits(torch.device("cuda" if GPU else "cpu"), torch.float32, D)           # here, or under the interpreter
REPEATS = 100 if GPU else 2            # more calls, whose bits must be the first one's


# --- the contenders -------------------------------------------------------------------------------------------------


def literal_quantise(x, codes):
    zq, _, loss = vq.quantise(x, codes, BETA)
    return zq, loss.mean()


def lean_assign(x, codes):
    """What costs nothing to write: x is not normalised, only the winner's cosine."""
    codes = g(codes)
    score, index = (x @ codes.T).max(1)
    return index, F.embedding(index, codes), score / x.norm(dim=1).clamp(min=1e-12)


def lean_quantise(x, codes):
    index, code, _ = lean_assign(x, codes)
    x = g(x)
    return vq.straight_through(x, code), vq.commitment_loss(x, code, BETA).mean()


def literal_attention(q, k, v):
    return hsattn.hypersphere_attention(q, k, v, KAPPA)


def sdpa_attention(q, k, v):
    """torch's fused attention between two normalisations."""
    return g(F.scaled_dot_product_attention(g(q), g(k), v, scale=KAPPA))


def ours(operation):
    """The project's own path on this machine: the kernels on a GPU, kernels/cpu.py on a CPU."""
    assigning = attending = cpu
    if GPU:
        from kernels import mean_shift as attending, vmf_assign as assigning

    def quantise(x, codes):
        zq, _, loss = assigning.quantise(x, codes, BETA)
        return zq, loss.mean()

    return {"assign": assigning.assign, "quantise": quantise,
            "attention": lambda q, k, v: attending.hypersphere_attention(q, k, v, KAPPA)}[operation]


LIBRARY = "vector-quantize-pytorch"


def library_quantiser(training):
    """The library set to the same task: cosine similarity.  It moves its codes by running means, not by gradient."""
    def maker(K, device):
        from vector_quantize_pytorch import VectorQuantize
        model = VectorQuantize(dim=D, codebook_size=K, use_cosine_sim=True, commitment_weight=BETA)
        model.to(device).train(training)
        return lambda x, codes: model(x[None])[::2]                                       # quantised, loss
    return maker


def contenders(operation, backward):
    """{name: function (K, device) that makes the function of the inputs}, ours first.  "literal" is hsattn.py's, vq.py's."""
    def fixed(function):
        return lambda K, device: function

    def compiled(function):
        return lambda K, device: torch.compile(function, dynamic=False)

    if operation == "attention":
        return {"ours": lambda K, device: ours("attention"), "literal eager": fixed(literal_attention),
                "torch.compile": compiled(literal_attention), "SDPA": fixed(sdpa_attention)}
    if backward:
        return {"ours": lambda K, device: ours("quantise"), "literal eager": fixed(literal_quantise),
                "lean eager": fixed(lean_quantise), "torch.compile": compiled(lean_quantise),
                LIBRARY: library_quantiser(True)}
    return {"ours": lambda K, device: ours("assign"), "literal eager": fixed(vq.assign),
            "lean eager": fixed(lean_assign), "torch.compile": compiled(lean_assign),
            LIBRARY: library_quantiser(False)}


def once(function, inputs, ups, backward):
    """Compute it once, with all gradients if asked."""
    if not backward:
        with torch.no_grad():
            return function(*inputs)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad([o for o in outputs], inputs, [up.to(o.dtype).view(o.shape) for o, up in zip(outputs, ups)],
                               allow_unused=True)             # the library keeps codes of its own


def make(operation, size, dtype, device):
    """(inputs, upstream gradients) of one row."""
    if operation == "assign":
        N, K = size
        x, codes = torch.randn(N, D, device=device).to(dtype), torch.randn(K, D, device=device)
        return [x.requires_grad_(), codes.requires_grad_()], [torch.randn(N, D, device=device), torch.ones((), device=device)]
    B, heads, M, P, width = size

    def split(n):                                                                         # (B,heads,n,width), as in HSAttn
        return torch.randn(B, n, heads * width, device=device).to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)

    return [split(n).requires_grad_() for n in (M, P, P)], [torch.randn(B, heads, M, width, device=device)]


def cost(operation, size, dtype, backward):
    """(bytes that must move, multiply-adds times two)"""
    bytes_ = torch.tensor([], dtype=dtype).element_size()
    if operation == "assign":
        N, K = size
        forward = N * (2 * D * bytes_ + 16), 2 * N * K * D    # x, code; index, cosine, distance
        return (forward[0] + N * (3 * D * bytes_ + 8), forward[1] + 2 * N * D) if backward else forward
    B, heads, M, P, width = size
    forward = B * heads * width * (2 * M + 2 * P) * bytes_, 4 * B * heads * M * P * width
    return (forward[0] * 2 + B * heads * width * (2 * M + 2 * P) * bytes_, forward[1] * 3.5) if backward else forward


# --- measuring ------------------------------------------------------------------------------------------------------


def memory():
    """Bytes held now, and the most held since `forget_peak`: of the GPU, or of this process (Linux)."""
    if GPU:
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return tuple(1024 * int(re.search(rf"{word}:\s+(\d+)", status)[1]) for word in ("VmRSS", "VmHWM"))


def forget_peak():
    torch.cuda.reset_peak_memory_stats() if GPU else Path("/proc/self/clear_refs").write_text("5")


def median_seconds(function, sets, rounds):
    """Median seconds of function(*set), the sets in turn, after one round over them that is not counted."""
    seconds = []
    for i in range(rounds + len(sets)):
        chosen = sets[i % len(sets)]
        if GPU:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(*chosen)
            stop.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(stop) / 1000)
        else:
            begin = time.perf_counter()
            function(*chosen)
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[len(sets):])


def graph_seconds(function, rounds):
    """Median seconds of one replay of `function` recorded as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_seconds(graph.replay, [()], rounds)


def speeds(dtype):
    """(bytes a second of a large copy, FLOP a second of a large product in this dtype), measured."""
    device, n = ("cuda", 8192) if GPU else ("cpu", 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = median_seconds(lambda: a @ b, [()], 10)
    source = torch.empty(2**28 if GPU else 2**25, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), [()], 10)
    return 2 * source.numel() * source.element_size() / copy, 2 * n**3 / product


def measure(operation, size, dtype, backward, name, rounds):
    """dict(seconds, graph (seconds, B = 1 on a GPU), extra (bytes)) of one row; on a CPU run in a fresh process."""
    torch.manual_seed(0)
    device = "cuda" if GPU else "cpu"
    sets = [make(operation, size, dtype, device) for _ in range(4 if GPU else 1)]
    function = contenders(operation, backward)[name](size[1], device)

    def run(inputs, ups):
        return once(function, inputs, ups, backward)

    run(*sets[0])                                             # compiles, too
    forget_peak()
    before = memory()[0]
    run(*sets[0])
    found = {"extra": memory()[1] - before, "seconds": median_seconds(run, sets, rounds)}
    batch = size[0] == 1 if operation == "attention" else size[0] in (1600, 6400, 25600)
    if GPU and batch:
        found["graph"] = graph_seconds(lambda: run(*sets[0]), rounds)
    return found


def rows():
    """(operation, label, size, dtype, backward) of every table row; on a CPU the few that a laptop has the time for."""
    attention = {"B=1": (1, HEADS, 128, 1600, HEAD), "B=12": (12, HEADS, 128, 1600, HEAD),
                 "clustering B=1": (1, 1, 128, 25600, D), "clustering B=12": (12, 1, 128, 25600, D)}
    dtypes = (torch.float32, torch.bfloat16) if GPU else (torch.float32,)
    for dtype in dtypes:
        for backward in (False, True):
            for batch in (1, 12):
                for stage, (N, K) in STAGES.items():
                    if GPU or (stage == "early" and batch == 12):
                        yield "assign", f"{stage} B={batch}", (batch * N, K), dtype, backward
            for label, size in attention.items():
                if GPU or label in ("B=1", "B=12", "clustering B=1"):
                    yield "attention", label, size, dtype, backward


# --- right first ----------------------------------------------------------------------------------------------------


def error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


def steady(function, inputs, ups, backward):
    """Do REPEATS more calls give the bits of the first: of its outputs, or of its gradients?"""
    def call():
        found = once(function, inputs, ups, backward)
        return found if isinstance(found, tuple) else (found,)

    first = call()
    return all(torch.equal(a, b) for _ in range(REPEATS) for a, b in zip(call(), first))


def correctness(only=None, dtypes=None):
    """[(what, figure, what is accepted)] of the project's paths on this machine, at the paper's sizes or, interpreted, small.

    only: names of paths, dtypes: which ones; None: all that this machine has.
    """
    paths = {"plain": (vq, hsattn)} if GPU else {"plain": (vq, hsattn), "cpu": (cpu, cpu)}
    if KERNELS:
        from kernels import mean_shift, vmf_assign
        paths["triton"] = vmf_assign, mean_shift
    found, device = [], "cuda" if GPU else "cpu"
    for path in only or paths:
        (assigning, attending), small = paths[path], path == "triton" and not GPU

        def quantise(x, codes):
            zq, _, loss = assigning.quantise(x, codes, BETA)
            return zq, loss.mean()

        def attend(q, k, v):
            return attending.hypersphere_attention(q, k, v, KAPPA)

        for dtype in dtypes or ((torch.float32, torch.bfloat16) if GPU else (torch.float32,)):
            torch.manual_seed(0)
            label = f"{path} {str(dtype).removeprefix('torch.')}"
            (x, codes), ups = make("assign", (600, 128) if small else (307200, 128), dtype, device)
            index, code, _ = assigning.assign(x, codes)
            unit, unit_codes = g(x.detach().double()), g(codes.detach().double())
            best = torch.cat([(part @ unit_codes.T).max(1)[0] for part in unit.split(65536)])
            lost = best - (unit * unit_codes[index]).sum(1)
            accepted, most = ("<= 1e-05", 2e-6) if dtype == torch.float32 else ("<= 0.02", 4e-3)
            if path == "plain" and dtype == torch.bfloat16:   # it scores g(x), which is rounded once more than x
                most = 8e-3
            found.append((f"{label}: share of features that lose any cosine", (lost > 1e-12).double().mean().item(), accepted))
            found.append((f"{label}: most cosine lost", max(lost.max().item(), 0.0), f"<= {most}"))
            same = torch.equal(code, F.normalize(codes, dim=-1).to(dtype)[index])
            found.append((f"{label}: code == g(E)[index], bitwise", same, "True"))
            grads = once(quantise, (x, codes), ups, True)
            x64, codes64 = x.detach().double().requires_grad_(), codes.detach().double().requires_grad_()
            unit, code64 = g(x64), g(codes64)[index]
            reference = torch.autograd.grad([vq.straight_through(unit, code64), vq.commitment_loss(unit, code64, BETA).mean()],
                                            (x64, codes64), [ups[0].double(), ups[1].double()])
            for name, mine, theirs in zip(("features'", "codebook"), grads, reference):
                accept = "<= 1e-06" if name == "codebook" and label == "triton float32" else "-"
                found.append((f"{label}: {name} gradient, relative error", error(mine, theirs), accept))

            qkv, up = make("attention", (1, 2, 40, 150, HEAD) if small else (2, HEADS, 128, 1600, HEAD), dtype, device)
            out = attend(*qkv)
            wide = [t.detach().double().requires_grad_() for t in qkv]
            reference = literal_attention(*wide)
            accept = "<= 5e-06" if dtype == torch.float32 else "no worse than SDPA"
            found.append((f"{label}: attention, relative error", error(out, reference), accept))
            if dtype == torch.bfloat16:
                found.append((f"SDPA {label}: attention, relative error", error(sdpa_attention(*qkv), reference), "-"))
            grads = torch.autograd.grad(out, qkv, up[0].to(out.dtype))
            for name, mine, theirs in zip("qkv", grads, torch.autograd.grad(reference, wide, up[0].double())):
                found.append((f"{label}: gradient of {name}, relative error", error(mine, theirs), accept))
            calls = {"assign forward": (assigning.assign, (x, codes), ups, False),
                     "assign backward": (quantise, (x, codes), ups, True),
                     "attention forward": (attend, qkv, up, False), "attention backward": (attend, qkv, up, True)}
            for name, call in calls.items():
                found.append((f"{label}: {name}, {REPEATS} repeats, bitwise equal", steady(*call),
                              "True" if path == "triton" else "-"))
    return found


def tune(operation, dtype, seconds=float("inf")):
    """Time the tiles that compile and leave the fastest in TILES; -> (key, entry) of TILES.

    Those nearest to what TILES holds come first; each kernel has its share of `seconds`, and tries one in any case.
    """
    from kernels import mean_shift, vmf_assign
    attention = operation == "attention"
    module, size = (mean_shift, (12, HEADS, 128, 1600, D)) if attention else (vmf_assign, (307200, 128))
    key = torch.cuda.get_device_capability(), module.mode(dtype), 32
    inputs, ups = make(operation, size, dtype, "cuda" if GPU else "cpu")
    function = ours("attention" if attention else "quantise")
    entry = dict(module.TILES[None, *key[1:]])
    for kernel, given in entry.items():
        best, end = None, time.monotonic() + seconds / len(entry)
        tiles = sorted(every((32, 64, 128), (32, 64, 128), (4, 8)),
                       key=lambda tile: sum(abs(math.log2(a / b)) for a, b in zip(tile, given)))
        for tile in tiles:
            if time.monotonic() > end and tile != tiles[0]:
                break
            module.TILES[key] = {**entry, kernel: tile}
            try:
                took = median_seconds(lambda: once(function, inputs, ups, True), [()], 20)
            except Exception as failure:                      # tiles that do not fit the GPU: said, and left out
                print(f"  {module.__name__} {kernel} {tile}: {type(failure).__name__}")
                continue
            best = min(best or (took, tile), (took, tile))
        entry[kernel] = best[1] if best else given
        print(f"  {module.__name__} {key[1]} {kernel}: {entry[kernel]}" + (f" at {best[0] * 1e6:.0f} us a step" if best else ""),
              flush=True)
    module.TILES[key] = entry
    return key, entry


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--tune", action="store_true")
    args = parse_flags(parser)
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds}: takes a positive number")
    if args.tune:
        if not GPU:
            raise InputError("--tune times kernels on a GPU; there is none here")
        for operation in ("assign", "attention"):
            for dtype in (torch.float32, torch.bfloat16):
                key, entry = tune(operation, dtype)
                print(f"    {key}: dict({', '.join(f'{k}={v}' for k, v in entry.items())}),", flush=True)
        return
    chip = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}" + (f", triton {__import__('triton').__version__}" if KERNELS else "")
    print(f"{chip}; {versions}; median of {args.rounds}")

    report = {"chip": chip, "versions": versions, "correctness": [], "rows": []}
    print(f"\n{'correctness, against float64':66}{'measured':>12}   accepted")
    for what, figure, accepted in correctness():
        print(f"{what:66}{str(figure) if isinstance(figure, bool) else f'{figure:.1e}':>12}   {accepted}", flush=True)
        report["correctness"].append({"what": what, "measured": figure, "accepted": accepted})

    moved = {}
    spawn, previous = multiprocessing.get_context("spawn"), None
    for operation, label, size, dtype, backward in sorted(rows(), key=lambda row: row[0] == "attention"):
        if operation != previous:
            print(f"\n{operation:44}{'ms':>9}{'vs ours':>9}{'/ floor':>9}{'GB/s':>8}{'extra MiB':>11}"
                  + (f"{'graph ms':>10}" if GPU else ""))
            previous = operation
        if dtype not in moved:
            moved[dtype] = speeds(dtype)
        bytes_, flops = cost(operation, size, dtype, backward)
        floor = max(bytes_ / moved[dtype][0], flops / moved[dtype][1])
        title, base = f"{label} {str(dtype).removeprefix('torch.')} forward{' + backward' if backward else ''}", None
        print(title)
        for name in contenders(operation, backward):
            if name == LIBRARY and importlib.util.find_spec("vector_quantize_pytorch") is None:
                print(f"    {name:40} not measured: pip install {LIBRARY}")
                continue
            if GPU:
                found = measure(operation, size, dtype, backward, name, args.rounds)
                torch.cuda.empty_cache()
            else:
                with ProcessPoolExecutor(1, spawn) as fresh:  # so that its peak memory is its own
                    found = fresh.submit(measure, operation, size, dtype, backward, name, args.rounds).result()
            seconds = found["seconds"]
            base = base or seconds
            print(f"    {name:40}{1000 * seconds:9.3f}{seconds / base:9.2f}{seconds / floor:9.1f}{bytes_ / seconds / 1e9:8.1f}"
                  f"{found['extra'] / 2**20:11.1f}" + (f"{1000 * found['graph']:10.3f}" if "graph" in found else ""), flush=True)
            report["rows"].append({"operation": operation, "row": title, "name": name, "floor": floor, "bytes": bytes_, **found})
    if not GPU:
        print("\nThe GPU rows are not measured: no GPU is visible here.")
    if args.json:
        write_files({args.json: json.dumps(report, indent=1) + "\n"})


if __name__ == "__main__":
    run_cli(main)
