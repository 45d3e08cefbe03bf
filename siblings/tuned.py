"""CLIP with queries and values of its own: what a model may tune of a VLM whose weights must stay as they are.

In each block  q = W'q LN1(x) + b_q,  k = W_k LN1(x) + b_k,  v = W'v LN1(x) + b_v:  W'q and W'v are copies, trained, all
else is CLIP's.  To say of every patch what it shows, the last block is read as

    y = W_o (W'v LN1(x) + b_v) + b_o + x_cls        its values, unmixed: each patch keeps to itself; the residual is cls
    F = head( y + MLP(LN2(y)) )                     not of unit length                                (B,E,h,w)

where MaskCLIP (clip.VLM.dense) has neither residual nor MLP.  CLIP itself is not touched, so that a run's checksum of it
stays; the copies are trained parameters, and a checkpoint holds them.

    image (B,3,64,64) -> F (B,64,8,8), and the maps (B,128,8,8) after two of the blocks, as guidance

# paper: FGAseg (arXiv 2501.00877) and CAT-Seg tune the weights, not the biases, of q and v of every block.  The residual
#        from cls is in FGAseg's code.
# differs: their text tower is tuned too.  Here names are embedded once, by CLIP as it is.
# ours: all copies in two tensors (n,C,C), n blocks.  Nothing asks for the last W'q: its gradient is 0.

Tests: tests/siblings/test_fgaseg.py.  Read next: windows.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from cli import InputError


class Tuned(nn.Module):
    """`tuned(vlm, image)` -> F, [maps]: a CLIP of OpenAI's family (clip.OpenAIViT) seen through q and v of our own."""

    def __init__(self, vlm):
        super().__init__()
        q, _, v = torch.stack([block.attn.in_proj_weight.detach() for block in vlm.blocks]).chunk(3, 1)   # (n,C,C) each
        self.q, self.v = nn.Parameter(q.clone()), nn.Parameter(v.clone())
        if not all(0 < depth < len(vlm.blocks) for depth in vlm.depths[1:3]):
            raise InputError(f"depths {' '.join(map(str, vlm.depths))}: the second and the third take numbers from 1 to "
                             f"{len(vlm.blocks) - 1}, blocks before the last")

    def drift(self, vlm):
        """Mean distance of the copies from what they were copied from: of q, of v."""
        with torch.no_grad():
            q, _, v = torch.stack([block.attn.in_proj_weight for block in vlm.blocks]).chunk(3, 1)
            return (self.q - q).abs().mean().item(), (self.v - v).abs().mean().item()

    def forward(self, vlm, image):
        """image (B,3,H,W), CLIP-normalised -> F (B,E,h,w), and the maps (B,C,h,w) after blocks depths[1] and depths[2]"""
        x, grid = vlm.embed(image)                                                        # (B,1+P,C)
        *firsts, last = zip(vlm.blocks, self.q.unbind(), self.v.unbind())
        maps = {}
        for i, (block, q, v) in enumerate(firsts, 1):
            k = block.attn.in_proj_weight.chunk(3)[1]
            x = functional_call(block, {"attn.in_proj_weight": torch.cat([q, k, v])}, (x,))
            maps[i] = x[:, 1:].transpose(1, 2).unflatten(2, grid)                         # (B,C,h,w)
        block, _, v = last
        values = F.linear(block.ln_1(x), v, block.attn.in_proj_bias.chunk(3)[2])
        y = block.attn.out_proj(values) + x[:, :1]                                        # cls beside every patch
        f = vlm.head(y + block.mlp(block.ln_2(y)))[:, 1:]                                 # (B,P,E)
        return f.transpose(1, 2).unflatten(2, grid), [maps[depth] for depth in vlm.depths[1:3]]
