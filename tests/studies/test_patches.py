"""What patches.py promises: the patches that point at a code most, each with its cell in the middle."""

from types import SimpleNamespace

import numpy as np
import torch

from data import to_tensor, to_unit
from pat import STAGES
from studies import patches as P
from tests.helpers import world
from vq import Tokens

ANGLES = {60: 0.0, 100: 0.1, 140: 0.2, 200: 1.5}             # grey value of a cell -> direction of its feature


class GreyModel:
    """Cells of 8x8 pixels; a cell's grey value decides its feature.  Codes at 0 rad, 1.5 rad, and one behind."""

    stride, training, stages = 8, False, STAGES
    vlm, config = SimpleNamespace(text_width=4), SimpleNamespace(clip=SimpleNamespace(short_side=32))

    def parameters(self):
        return iter([torch.zeros(1)])

    def eval(self):
        return self

    to = train = lambda self, *_: self

    def codebook(self, stage):
        angles = torch.tensor([0.0, 1.5, 4.0])
        return torch.stack([angles.cos(), angles.sin()], 1)

    def __call__(self, image, text):
        grey = (255 * to_unit(image)).round()[0, 0, 4::8, 4::8]
        angles = torch.tensor([[ANGLES.get(int(v), 4.0) for v in row] for row in grey.tolist()])
        x = torch.stack([angles.cos(), angles.sin()])[None]                               # (1,2,a,b)
        index = torch.einsum("kd,bdhw->bkhw", self.codebook(""), x).argmax(1)
        zq = self.codebook("")[index].permute(0, 3, 1, 2)
        return {"image": image, "tokens": {stage: Tokens(zq, index, x, None) for stage in STAGES}}


def grey_image(cells, width=None):
    picture = np.repeat(np.repeat(np.array(cells, np.uint8), 8, 0), 8, 1)[..., None].repeat(3, 2)
    return {"image": to_tensor(picture[:, :width])}


def test_patches_of_a_code_are_those_that_point_at_it_most_one_image_each_first():
    """Code 0 lies at 0 rad: grey 60 matches exactly, 100 is 0.1 off, 140 is 0.2 off.

    Image A has 60, 60 and 100, image B 140: with two slots, A gives one and B the other although A has three better.
    With four, A's others follow, in the order of their cosines.
    """
    data = [grey_image([[60, 60], [100, 200]]), grey_image([[140, 200], [200, 200]])]
    two, counts = P.patches_of(GreyModel(), data, 2, each=2)["late"]
    assert two.shape == (3, 2, 8, 8, 3) and two.dtype == np.uint8 and counts.tolist() == [4, 4, 0]
    assert two[0, :, 4, 4, 0].tolist() == [60, 140]
    four = P.patches_of(GreyModel(), data, 2, each=4)["late"][0]
    assert four[0, :, 4, 4, 0].tolist() == [60, 60, 100, 140]
    five = P.patches_of(GreyModel(), data, 2, each=5)["late"][0]
    assert (five[0, 4] == 255).all() and (five[2] == 255).all()                           # unused slots are white
    assert P.patches_of(GreyModel(), data, 1)["late"][1].tolist() == [3, 1, 0]            # only the first image


def test_a_patch_has_its_cell_in_the_middle_and_grey_beyond_the_image():
    """A patch shows 8 pixels here, the cell itself; with a short side of 64 it shows 16, so 4 beyond on each side."""
    model, data = GreyModel(), [grey_image([[60, 200], [200, 200]])]
    model.config = SimpleNamespace(clip=SimpleNamespace(short_side=64))
    patch = P.patches_of(model, data, 1, each=1)["mid"][0][0, 0, ..., 0]                  # (16,16)
    assert (patch[:4] == 232).all() and (patch[:, :4] == 232).all()
    assert (patch[4:12, 4:12] == 60).all() and (patch[12:, 4:] == 200).all()


def test_cells_whose_middle_is_padding_are_not_counted():
    """12 pixels wide, padded to 16: the middle of the second column is at 12, just outside; at 13 wide it is inside."""
    cells = [[60, 200], [60, 200]]
    assert P.patches_of(GreyModel(), [grey_image(cells, 12)], 1)["early"][1].tolist() == [2, 0, 0]
    assert P.patches_of(GreyModel(), [grey_image(cells, 13)], 1)["early"][1].tolist() == [2, 2, 0]


def test_the_frame_of_a_token_has_the_side_of_its_cell():
    """Read off the token maps, whatever the model: the world's are 32x32, 16x16, 8x8 and 8x8 over 64 pixels."""
    assert P.cell_sides(GreyModel()) == dict.fromkeys(STAGES, 8)
    assert P.cell_sides(world().eval()) == dict(early=2, mid=4, late=8, latent=8)
