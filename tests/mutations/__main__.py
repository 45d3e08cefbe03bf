"""Put in one bug after the other and see which test notices.

    python -m tests.mutations [--only FILE ...] [--processes N]      all lists of this package: hours
    python -m tests.mutations --short                                one bug in each quick file, under a minute

A line a bug: caught, by which test, or SURVIVED.  Exit 1 if fewer than 97 % of those without a `survives` are caught.
Nothing is changed here: each worker has a copy of the working tree.  The tests of a file are run once without a bug, then
with each of its bugs the quickest first, up to the first that fails.
"""

import argparse
import importlib
import os
import pkgutil
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from tests import mutations

ROOT = Path(__file__).parents[2]
SHORT = ("hsattn.py", "vq.py", "decoder.py", "losses.py", "predict.py", "eval.py")       # of each, its list's first
ENOUGH = 0.97


def lists():
    """{name: MUTATIONS} of every file of this package."""
    names = [module.name for module in pkgutil.iter_modules(mutations.__path__) if module.name != "__main__"]
    return {name: importlib.import_module(f"{mutations.__name__}.{name}").MUTATIONS for name in names}


def given(mutation):
    """What pytest is given: `tests`, or the file that mirrors the bug's."""
    file = Path(mutation.file)
    return mutation.tests or str(Path("tests") / file.parent / f"test_{file.name}")


def files_of(root):
    """The working tree, relative: what git tracks or would; where there is no git, what is not hidden and no cache."""
    listing = ["git", "ls-files", "-coz", "--exclude-standard"]
    done = subprocess.run(listing, cwd=root, capture_output=True, text=True)
    if done.returncode == 0:
        return [name for name in done.stdout.split("\0") if (root / name).is_file()]
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return [str(path) for path in found if not any(part.startswith((".", "__pycache__")) for part in path.parts)]


def copied(root, to):
    for name in files_of(root):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, to / name)
    return to


def failing(tree, tests, limit):
    """(the first test that fails, None where all pass, "hangs" past `limit` seconds; seconds) of words given to pytest."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}          # no bug is read from a cache
    command = [sys.executable, "-m", "pytest", "-xq", "-n0", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)                                        # and whom it started
            return "hangs", time.monotonic() - start
    first = re.search(r"^(?:FAILED|ERROR) (?:\S+::)?(.+?)(?: - .*)?$", said, re.M)
    name = first[1] if first else f"pytest ended with status {process.returncode}"
    return (name if process.returncode else None), time.monotonic() - start


def sound(tree, tests):
    """`failing` of a tree without a bug, and its tests one by one, the quickest first."""
    report = tree / "tests.xml"
    fate = failing(tree, [*shlex.split(tests), f"--junitxml={report}"], 3600)
    cases = sorted(ElementTree.parse(report).iter("testcase"), key=lambda case: float(case.get("time")))
    return *fate, [f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}" for case in cases]


def mutated(tree, mutation, tests, limit):
    """`failing` of a tree with the bug in it; the tree is then as it was."""
    path = tree / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}: {mutation.what}: its `old` occurs {text.count(mutation.old)} times")
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        return failing(tree, tests, limit)
    finally:
        path.write_text(text)


def each(jobs, work, trees, title):
    """(job, work(tree, job)) as they are done, each tree in one pair of hands at a time."""
    free = queue.Queue()
    for tree in trees:
        free.put(tree)

    def alone(job):
        tree = free.get()
        try:
            return work(tree, job)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        futures = {pool.submit(alone, job): job for job in jobs}
        for future in tqdm(as_completed(futures), title, len(futures), unit="run"):
            yield futures[future], future.result()


def run(root, chosen, processes=1, short=False):
    """Prints a line each and the summary -> the share caught of those that a test must notice."""
    fates = {}

    def tell(m, fate, name, seconds):
        fates[m] = fate
        tqdm.write(f"{fate:9} {seconds:4.0f} s  {m.file}: {m.what}" + f"  <- {name}" * bool(name))

    with tempfile.TemporaryDirectory() as folder:
        trees = [copied(root, Path(folder) / str(k)) for k in range(processes)]
        alone = {tests: (None, 54, shlex.split(tests)) for tests in map(given, chosen)}       # in short: ten minutes each
        if not short:
            alone = dict(each(alone, sound, trees, "without a bug"))
        for m in chosen:
            if alone[given(m)][0]:
                tell(m, "tests fail already", *alone[given(m)][:2])

        def work(tree, m):
            _, seconds, tests = alone[given(m)]
            return mutated(tree, m, tests, 10 * seconds + 60)

        for m, (name, seconds) in each([m for m in chosen if m not in fates], work, trees, "with a bug"):
            tell(m, "caught" if name else "survives" if m.survives else "SURVIVED", name or m.survives, seconds)
    for file in (*sorted({m.file for m in chosen}), "total"):
        counts = Counter(fate for m, fate in fates.items() if file in (m.file, "total"))
        print(f"{file:20}", ", ".join(f"{n} {fate}" for fate, n in sorted(counts.items(), reverse=True)))
    asked = [fate for fate in fates.values() if fate != "survives"]
    return asked.count("caught") / max(1, len(asked))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FILE", help="bugs of these files only, such as vq.py")
    parser.add_argument("--short", action="store_true", help="the first bug of each quick file, without a first run")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="test runs at the same time (1)")
    args = parser.parse_args(argv)
    everything = [m for found in lists().values() for m in found]
    chosen = [m for m in everything if not args.only or m.file in args.only]
    if args.short:
        chosen = [next(m for m in chosen if m.file == file) for file in SHORT if file in {m.file for m in chosen}]
    if not chosen:
        parser.error(f"no bug is listed for {', '.join(args.only)}")
    return run(ROOT, chosen, args.processes, args.short) < ENOUGH


if __name__ == "__main__":
    sys.exit(main())
