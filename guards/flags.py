"""Flags that there were: a word typed from memory, or from an old script, is answered with what does its work now.

    replaced("--no-mixer", configs)     "--ablate no-mixer"        configs: {model: its Training with default numbers}
    replaced("--w-rec", configs)        "--set w_rec=..."
    replaced("--seeds", configs)        "python -m studies.seeds --seeds"

# ours: all of it.

Tests: tests/test_train.py.  Read next: the flags that there are, train.FLAGS.
"""

from runs import RENAMED, leaves, model_class

GONE = {"from-scratch": "python -m world.pretrain --train, then --pretrained FILE",      # flags of before November 2026
        "ablations": "python -m studies.ablations", "seeds": "python -m studies.seeds --seeds"}


def replaced(flag, configs):
    """What does the work of a flag that there was, but is no more: an ablation, a number; "" for any other."""
    word = flag.removeprefix("--")
    name = RENAMED.get(word, word).replace("-", "_")
    for model, config in configs.items():
        if word in model_class(model).ABLATIONS:
            return f"--ablate {word}"
        if name in leaves(config):
            return f"--set {name}=..."
    return GONE.get(word, "")
