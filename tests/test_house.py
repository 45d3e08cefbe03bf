"""The house stays small: what a reader of train.py must own, which way imports go, which room knows which model."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "world", "published", "siblings", "studies")
FILES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]


def file_of(module):
    """The file of a module of ours, or None."""
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


def is_main(node):
    return isinstance(node, ast.If) and "__main__" in ast.dump(node.test)


def imported(path, everywhere=False):
    """Our files that `path` imports: at the top of the file, or `everywhere` but in its demo."""
    found, todo = set(), [node for node in ast.parse(path.read_text()).body if not is_main(node)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif everywhere or isinstance(node, (ast.If, ast.Try)):
            todo += ast.iter_child_nodes(node)
    return {file_of(name) for name in found} - {None, path}


def reach(start):
    seen, todo = set(), [start]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imported(path)
    return seen


def test_the_walk_sees_imports_at_the_top_and_no_others(tmp_path):
    """Under try and if, yes; in a function and in the demo, no, unless it is asked for every one."""
    file = tmp_path / "a.py"
    file.write_text("import vq\ntry:\n    from clip import VLM\nexcept E:\n    pass\ndef f():\n    from studies import report\n"
                    "if __name__ == '__main__':\n    import train\n")
    assert imported(file) == {ROOT / "vq.py", ROOT / "clip.py"}
    assert imported(file, everywhere=True) == imported(file) | {ROOT / "studies/__init__.py", ROOT / "studies/report.py"}


def test_whoever_reads_train_py_must_own_at_most_fourteen_files_and_3000_lines():
    """2,900 before every number had its range beside it and every checkpoint its checksum."""
    files = reach(ROOT / "train.py")
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert len(files) <= 14 and lines <= 3000, (len(files), lines, sorted(path.name for path in files))


def test_the_top_level_holds_at_most_fifteen_files_the_users_seven_among_them():
    names = {path.name for path in ROOT.glob("*.py")}
    assert len(names) <= 15
    assert {"pat.py", "vq.py", "hsattn.py", "decoder.py", "data.py", "train.py", "eval.py"} <= names


def test_imports_make_no_circle():
    """Not even one that is closed inside a function: every file can be read after those it stands on.  (Only a folder's
    own face, kernels/__init__.py, may open its rooms when one of them is asked for.)"""
    left = {path: {needed for needed in imported(path, everywhere=True)
                   if not (path.name == "__init__.py" and needed.parent == path.parent)} for path in FILES}
    while free := [path for path, needs in left.items() if not needs & left.keys()]:
        for path in free:
            del left[path]
    assert not left, sorted(str(path.relative_to(ROOT)) for path in left)


def test_nothing_stands_on_studies_or_siblings():
    """At the top of a file only their own rooms import them; data and the method never reach into published or world."""
    for path in FILES:
        rooms = {needed.parent.name for needed in imported(path)}
        if path.parent.name not in ("studies", "siblings"):
            assert not rooms & {"studies", "siblings"}, path
        if path.parent == ROOT:
            assert not rooms & {"published", "world"}, path


def test_no_room_knows_a_model_by_its_name_but_the_registry():
    for path in FILES:
        assert path.name == "runs.py" or not re.search(r"model *(==|!=|in) *[\"'(]", path.read_text()), path


def test_no_file_edits_the_search_path():
    for path in FILES:
        assert "sys.path" not in path.read_text(), path


def test_a_wrong_flag_is_answered_before_any_library_of_models_is_loaded():
    """open_clip, timm and torchvision take as long to load as torch: they wait until a model is built."""
    program = ("import sys, eval, predict, tokenizer, train\ntry:\n    train.parse(['--stepz', '1'])\nexcept train.InputError:\n"
               "    print({'open_clip', 'timm', 'torchvision'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stdout + done.stderr
