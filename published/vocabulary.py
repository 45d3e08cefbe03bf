"""The names of six published datasets: in which order, written how in their label files, and seen in training or not.

A segmentation score means nothing without its list of names: lists in circulation differ in spelling, in order and in
synonyms, and labels of one order scored with the names of another give near zero.  So the six lists are tables of this
project, `names/NAME.csv`, one class a line:

    id     0..L-1, the class id everywhere in this project
    raw    what the published label files hold there, see labels.py for how
    name   the whole string that goes into a prompt, commas and synonyms included

    coco-stuff 171, the training names    voc20 20    pc59 59    pc459 459    ade150 150    ade847 847

The lists are SAN's, whose scores the paper compares with, odd spellings included (`casette recorder`).  Every list has
a checksum; a score file records it, so two scores can be compared only if they may be.

Open vocabulary: `overlap` parts a list into names that are, letter by letter, a training name ("seen") and the rest.
# ours: the strictest of the rules in use.  "aeroplane" counts as unseen although "airplane" is a training name.

Demo: `python -m published.vocabulary` prints the six.  Tests: tests/published/test_vocabulary.py.
Read next: archives.py.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import InputError, run_cli
from data import IGNORE, names_checksum

FOLDER = Path(__file__).parent / "names"
DATASETS = ("coco-stuff", "voc20", "pc59", "pc459", "ade150", "ade847")
FOREIGN = -2                                           # in a lookup table: no label file of this dataset holds that


@dataclass(frozen=True)
class Vocabulary:
    """The classes of one published dataset: class k is called names[k] and written as raw[k] in the label files."""

    names: tuple                                       # L str
    raw: tuple                                         # L int

    @property
    def checksum(self):
        """16 hex digits over names and raw values in order."""
        return names_checksum(self.names, self.raw)

    def lookup(self, void=()):
        """Table (n,) int64 from raw value to class id: IGNORE for the values of `void`, FOREIGN for all others."""
        table = np.full(1 + max(*self.raw, *void), FOREIGN)
        table[list(void)] = IGNORE
        table[list(self.raw)] = np.arange(len(self.raw))
        return table

    def same_order(self, given, where):
        """Raises InputError unless the list `given` can name these classes: as many, none of ours out of place."""
        if len(given) != len(self.names):
            raise InputError(f"{where}: has {len(given)} names, but these labels have {len(self.names)} classes")
        for k, name in enumerate(given):
            if name in self.names and name != self.names[k]:
                raise InputError(f"{where}: class {k} is {name!r}, which is class {self.names.index(name)} of these "
                                 "labels; bring both into the order of this project's table in published/names/")


def load_vocabulary(name):
    """The Vocabulary of one of DATASETS.  Raises InputError for another name."""
    if name not in DATASETS:
        raise InputError(f"no dataset {name!r}; there are {', '.join(DATASETS)}")
    with open(FOLDER / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = sorted((int(row["id"]), int(row["raw"]), row["name"]) for row in csv.DictReader(file))
    return Vocabulary(names=tuple(name for *_, name in rows), raw=tuple(raw for _, raw, _ in rows))


def overlap(names, training=None):
    """{"seen": ids, "unseen": ids} of a list of names: whole strings that are `training` names too, and the rest.

    `training`: what a model was trained with; None means COCO-Stuff's 171.  A group nobody is in is left out, so the
    training names themselves are all "seen".
    """
    training = set(load_vocabulary("coco-stuff").names if training is None else training)
    groups = {"seen": tuple(i for i, name in enumerate(names) if name in training),
              "unseen": tuple(i for i, name in enumerate(names) if name not in training)}
    return {group: ids for group, ids in groups.items() if ids}


def pascal_context_val():
    """The 5,104 image ids of Pascal Context's validation split, such as "2008_000002", sorted."""
    return tuple((FOLDER / "pascal-context-val.txt").read_text(encoding="utf-8").split())


def main():
    """Print the six vocabularies: how many names, how many of them seen in training, and the checksum."""
    for name in DATASETS:
        vocabulary = load_vocabulary(name)
        seen = len(overlap(vocabulary.names).get("seen", ()))
        print(f"{name:11}{len(vocabulary.names):4} names, {seen:3} seen in training   {vocabulary.checksum}   "
              f"{vocabulary.names[0]} ... {vocabulary.names[-1]}")


if __name__ == "__main__":
    run_cli(main)
