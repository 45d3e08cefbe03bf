"""What published/vocabulary.py promises: the six published lists, name by name, and who was seen in training."""

import hashlib

import numpy as np
import pytest

from cli import InputError
from data import IGNORE, names_checksum
from published.vocabulary import (DATASETS, FOREIGN, Vocabulary, load_vocabulary, main, overlap,
                                  pascal_context_val)

# names, checksum, seen by rule a (identical string)
PUBLISHED = {"coco-stuff": (171, "2dbb74408f35141f", 171), "voc20": (20, "a388ecfc6100fd0e", 15),
             "pc59": (59, "7c52724d4e9d646f", 35), "pc459": (459, "459be945e89c4612", 74),
             "ade150": (150, "3229e236ef934170", 40), "ade847": (847, "a127879e7ede65d1", 52)}


@pytest.mark.parametrize("name", DATASETS)
def test_the_six_lists_are_the_published_ones(name):
    """Pinned: a changed letter, raw value or place in any list changes its checksum, and so would its scores."""
    vocabulary, (length, digits, seen) = load_vocabulary(name), PUBLISHED[name]
    assert len(vocabulary.names) == len(vocabulary.raw) == length and vocabulary.checksum == digits
    assert len(set(vocabulary.names)) == len(set(vocabulary.raw)) == length
    groups = overlap(vocabulary.names)
    assert len(groups["seen"]) == seen and len(groups.get("unseen", ())) == length - seen
    assert sorted(groups["seen"] + groups.get("unseen", ())) == list(range(length))


def test_a_checksum_by_hand():
    """sha256 of "3<tab>sky<newline>7<tab>tree<newline>"; the order of names and of raw values both count."""
    want = hashlib.sha256(b"3\tsky\n7\ttree\n").hexdigest()[:16]
    assert names_checksum(("sky", "tree"), (3, 7)) == want == Vocabulary(("sky", "tree"), (3, 7)).checksum
    others = (names_checksum(("tree", "sky"), (3, 7)), names_checksum(("sky", "tree"), (7, 3)),
              names_checksum(("sky", "tree")))
    assert len({want, *others}) == 4
    assert names_checksum(("sky", "tree")) == names_checksum(["sky", "tree"], [0, 1])


def test_raw_values_where_they_surprise():
    """COCO's 0 is person, not void; 11 is never used, so 12 is class 11; Pascal Context and ADE codes are their own."""
    coco, pc59, ade = (load_vocabulary(name) for name in ("coco-stuff", "pc59", "ade847"))
    assert coco.names[0] == "person" and coco.raw[0] == 0 and coco.raw[10:12] == (10, 12)
    assert coco.names[170] == "wood" and coco.raw[170] == 181
    assert pc59.names[0] == "aeroplane" and pc59.raw[0] == 2 and pc59.raw == tuple(sorted(pc59.raw))
    assert ade.names[0] == "wall" and ade.raw[0] == 2978 and max(ade.raw) == 3156
    by_id = dict(zip(load_vocabulary("pc459").raw, load_vocabulary("pc459").names))
    differ = [name for name, raw in zip(pc59.names, pc59.raw) if by_id[raw] != name]
    assert differ == ["diningtable"] and by_id[397] == "table"


def test_a_lookup_table_by_hand():
    """Classes written as 3 and 1, void 0 and 5: the values 0..5 are void, class 1, foreign, class 0, foreign, void."""
    table = Vocabulary(("sky", "tree"), (3, 1)).lookup(void=(0, 5))
    assert table.tolist() == [IGNORE, 1, FOREIGN, 0, FOREIGN, IGNORE] and table.dtype == np.int64


def test_seen_is_the_whole_string():
    """"building, edifice" is no training name although ..."building-other" is near; "wall-brick" is one."""
    assert overlap(("wall-brick", "building, edifice", "person", "Person")) == {"seen": (0, 2), "unseen": (1, 3)}
    assert overlap(("person",)) == {"seen": (0,)}


def test_the_validation_images_of_pascal_context():
    """5,104 different ids: 2,221 from 2008, 1,360 from 2009, 1,523 from 2010."""
    ids = pascal_context_val()
    assert len(set(ids)) == len(ids) == 5104 and list(ids) == sorted(ids)
    assert [sum(i.startswith(year) for i in ids) for year in ("2008_", "2009_", "2010_")] == [2221, 1360, 1523]


def test_an_unknown_dataset_is_named_with_those_there_are():
    with pytest.raises(InputError, match="no dataset 'ade'; there are coco-stuff, .*ade847"):
        load_vocabulary("ade")


def test_the_demo_prints_the_six(capsys):
    """One line each: the name, how many classes, how many of them seen, the checksum."""
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(DATASETS)
    assert lines[3].startswith("pc459       459 names,  74 seen in training   459be945e89c4612   accordion")


def test_seen_is_relative_to_what_a_model_was_trained_with():
    """Trained with sky and sea: of sky, Sky and dog only the first was seen, although dog is a name of COCO-Stuff's."""
    assert overlap(("sky", "Sky", "dog"), ("sky", "sea")) == {"seen": (0,), "unseen": (1, 2)}
    assert overlap(("dog", "Sky"))["seen"] == (0,)
