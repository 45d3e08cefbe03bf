"""What studies/focus.py promises: where mask tokens look, by hand, and by how much a fifth name moves the other four."""

import numpy as np
import pytest
import torch
from PIL import Image

import studies.focus as F
from cli import InputError
from runs import build
from tests.helpers import TEXT, generator, images, save_run, tiny, world
from tests.test_segmenter import small
from world.scenes import World


@pytest.fixture(scope="module")
def net():
    """Every W and γ its own."""
    model = world("fisa", generator=generator()).eval()
    with torch.no_grad():
        for p in (*model.queries.parameters(), *model.seve.parameters()):
            p.add_(0.05 * torch.randn_like(p))
    return model


@torch.no_grad()
def test_where_a_mask_token_looks_by_hand(net):
    """In block 6 on what blocks 1 to 5 give: softmax of W_mask u · W_k x / √32 over cls and the mask's two cells, the mean of
    four heads; an empty mask looks at cls alone."""
    masks = torch.full((1, 2, 8, 8), -1.0)
    masks[0, 0, 0, 1:3] = 1
    looks = F.looks(net, images(1), TEXT, masks)
    z, sees = net.start(images(1), masks)
    for l in range(5):
        z = net.step(l, z, sees, TEXT)
    block = net.vlm.blocks[5]
    y = block.ln_1(z)[0]
    k = y[[0, 2, 3]] @ block.attn.in_proj_weight[128:256].T + block.attn.in_proj_bias[128:256]            # (3,128)
    q = net.queries["mask"][5](y[65])
    want = sum((k[:, 32 * h:32 * h + 32] @ q[32 * h:32 * h + 32] / 32 ** 0.5).softmax(0) / 4 for h in range(4))
    assert looks.shape == (2, 65) and looks[0, [0, 2, 3]].tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert looks[0].sum().item() == pytest.approx(1) and looks[0, 4:].sum() == 0
    assert looks[1, 0] == 1 and looks[1, 1:].sum() == 0


@torch.no_grad()
def test_names_are_told_in_the_last_block_too_where_all_blocks_are_told():
    model = world("fisa", generator=generator(), seve_blocks=6).eval()
    masks = torch.ones(1, 1, 8, 8)
    for l, seve in enumerate(model.seve):
        seve.gamma.fill_(10.0 if l == 5 else 0.0)
    assert not torch.allclose(*(F.looks(model, images(1), text, masks) for text in (TEXT, TEXT.flip(1))), atol=1e-6)


def test_weights_are_drawn_white_to_dark_by_hand():
    """Nothing is white, the largest is dark red, half of it half-way."""
    assert F.heat(torch.tensor([[0.0, 0.2], [0.1, 0.0]])).tolist() == [[[255] * 3, [140, 0, 20]], [[198, 128, 138], [255] * 3]]
    assert (F.heat(torch.zeros(2, 2)) == 255).all()


class Table:
    """A model that answers the same whatever it sees; with a fifth name two of its logits move by `other`, up and down."""

    stride, other = 8, 0.0

    def __init__(self):
        self.vlm, self.asked = self, []

    def embed_text(self, names):
        return torch.arange(len(names)).float()[:, None]

    def __call__(self, image, text):
        self.asked.append(text[:, 0].int().tolist())
        logits = torch.zeros(1, 2, len(text) + 1)
        logits[0, 0, 0] = logits[0, 1, 1] = 1                 # mask 0 is the first of the names, mask 1 the second
        if len(text) == 5:
            logits[0, 0, 3] += self.other
            logits[0, 1, 3] -= self.other
        return dict(classes=[logits])


class Two:
    """Two pictures, of names 7 and 9, and of 2 alone, among twelve."""

    names = tuple("abcdefghijkl")

    def __len__(self):
        return 2

    def __getitem__(self, i):
        label = torch.tensor([[7, 9]] if i == 0 else [[2, -1]])
        return dict(image=torch.zeros(3, 8, 8), label=label)


def test_what_a_fifth_name_moves_by_hand():
    """Of 2 masks x 4 names one logit moves up by 4, one down: 1 on average; the best name of one of the two masks changes."""
    model = Table()
    assert F.fifth_name(model, Two(), 9) == (0, 0)
    model.other = 4.0
    assert F.fifth_name(model, Two(), 1) == (1, 0.5)


def test_the_four_names_are_those_shown_and_others_drawn_alike_every_time():
    """The fifth comes last; no name twice; the second picture is asked for others than the first."""
    model, again = Table(), Table()
    F.fifth_name(model, Two(), 2)
    F.fifth_name(again, Two(), 2)
    four, five, four2, five2 = model.asked
    assert again.asked == model.asked and five[:4] == four and five2[:4] == four2 and len({*five}) == len({*five2}) == 5
    assert {*four[:2]} == {7, 9} and four2[0] == 2 and {*four[2:]} != {*four2[2:]}


def test_the_picture_shows_a_mask_before_training_and_after(net):
    """Three rows of four; "before" is not "after", and the model stays as it is."""
    kept = [p.clone() for p in net.parameters()]
    sheet = np.asarray(F.focus(net, World("val"), cell=64))
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters()))
    assert sheet.shape == (24 + 3 * (64 + 4 + 18), 4 + 4 * 68, 3)
    before, after = (sheet[24:88, 4 + k * 68:68 + k * 68] for k in (2, 3))
    assert (before != after).any() and (before == [140, 0, 20]).all(-1).any() and (after == [140, 0, 20]).all(-1).any()


def test_the_command(tmp_path, capsys):
    config = small("fisa")
    torch.manual_seed(0)
    run = save_run(tmp_path / "run", build(config.run), config)
    F.main([str(run), "--images", "2"])
    said = capsys.readouterr().out
    assert f"written: {run}/pictures/focus.png" in said and "a fifth name moves the logits of the other four by 0.0" in said
    assert Image.open(run / "pictures" / "focus.png").size[0] == 4 + 4 * 180


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--images 0: at least 1"):
        F.main(["RUN", "--images", "0"])
    torch.manual_seed(0)
    san = save_run(tmp_path / "san", build(tiny("san").run), tiny("san"))
    with pytest.raises(InputError, match="is a run of SAN; only FISA has mask tokens to follow"):
        F.main([str(san)])
