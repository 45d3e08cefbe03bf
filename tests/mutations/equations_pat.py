"""pat.py with one line wrong: its numbers, the pyramid of Eq. 2, what is built of them and what Table II switches."""

from tests.mutations import Mutation

BUGS = [
    # the paper's numbers
    ("codes of the stages in the other order", "codes: tuple = number((128, 64, 32, 256),",
     "codes: tuple = number((32, 64, 128, 256),"),
    ("codes of 64 dimensions", "code_dim: int = number(32,", "code_dim: int = number(64,"),
    ("another concentration", "kappa: float = number(30.0,", "kappa: float = number(10.0,"),
    ("as many heads as the side ViT's", "hs_heads: int = number(8,", "hs_heads: int = number(6,"),
    ("a mixer half as wide", "mixer_hidden: int = number(256,", "mixer_hidden: int = number(128,"),
    ("the decoder's heads", "decoder_heads: int = number(8,", "decoder_heads: int = number(4,"),
    ("early no finer than mid", "scales: tuple = number((4, 2, 1),", "scales: tuple = number((2, 2, 1),"),
    ("the world's points are everybody's", "points: int = number(12544,", "points: int = number(1024,"),
    ("L_VQ weighs one", "w_vq: float = number(0.1,", "w_vq: float = number(1.0,"),
    ("L_align weighs one", "w_align: float = number(0.1,", "w_align: float = number(1.0,"),
    ("L_rec weighs a tenth", "w_rec: float = number(1.0,", "w_rec: float = number(0.1,"),
    ("CRF on a hundred pixels", "crf_samples: int = number(1000,", "crf_samples: int = number(100,"),
    ("early out of the decoder by default", "choice(*PYRAMID, default=PYRAMID)", "choice(*PYRAMID, default=PYRAMID[1:])"),
    # the token mixer
    ("ReLU in the mixer", "tokens_out, act=F.gelu)", "tokens_out)"),
    ("a mixer of two layers", "MLP(tokens_in, hidden, hidden, tokens_out", "MLP(tokens_in, hidden, tokens_out"),
    # the stem
    ("the stem is as wide inside as outside", "[64] * (times - 1)", "[width] * (times - 1)"),
    ("GELU after the last convolution of the stem too", "nn.Sequential(*layers[:-1])", "nn.Sequential(*layers)"),
    ("ReLU in the stem", "nn.Conv2d(a, b, 3, 2, 1), nn.GELU()", "nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()"),
    ("a stem that halves nothing sees single pixels", "nn.Conv2d(first, width, 3, 1, 1)", "nn.Conv2d(first, width, 1)"),
    # the pixel branch
    ("pixels in place of f", "            u = u + x\n", "            u = x\n"),
    ("the residual before Up", """\
        u = self.up[stage](f)                                                             # (B,S,g*s,g*s)
        if self.down is not None:
            x = self.down[stage](x)                                                       # (B,S,g*s,g*s)
            u = u + x
""", """        if self.down is not None:
            x = self.down[stage](x)
            f = f + F.adaptive_avg_pool2d(x, f.shape[-2:])
        u = self.up[stage](f)
"""),
    ("Down reads u in place of x", "return self.vq[stage](u, codes), x", "return self.vq[stage](u, codes), u"),
    ("GELU after every Down", "x = self.down[stage](x) ", "x = F.gelu(self.down[stage](x)) "),
    ("Up without DySample", "nn.ModuleDict({s: Up(width, scale) for",
     'nn.ModuleDict({s: nn.Upsample(scale_factor=scale, mode="bilinear") for'),
    ("Down may halve twice at once", "if steps[stage] not in (1, 2):", "if steps[stage] not in (1, 2, 4):"),
    ("a repeated scale is halved", "int(steps[stage]), 1)", "2, 1)"),
    ("the codebooks' sizes in the other order", "for s, k in zip(PYRAMID, codes)}",
     "for s, k in zip(PYRAMID, codes[::-1])}"),
    ("the detached tokenizer forgets the pixels after early", "tokens[stage], x = self.stage(stage, x, map_, codes)",
     "tokens[stage], x = self.stage(stage, x if stage == PYRAMID[0] else 0 * x, map_, codes)"),
    ("the detached tokenizer ignores the codes it is given", "self.stage(stage, x, map_, codes)",
     "self.stage(stage, x, map_, self.vq[stage].codebook)"),
    # the semantic branch
    ("without a mixer q reads no image", "return None, self.norm_q(q + self.attn(q, z, z))",
     "return None, self.norm_q(q)"),
    ("without a mixer q has no residual", "self.norm_q(q + self.attn(q, z, z))", "self.norm_q(self.attn(q, z, z))"),
    ("Mix(t before) dropped", "            t = t + self.mix_before(t_before)\n", "            pass\n"),
    ("Mix(t before) in place of the codes", "t = t + self.mix_before(t_before)", "t = self.mix_before(t_before)"),
    ("the residual of t dropped", "self.norm_t(t + self.hsattn(t, z, z))", "self.norm_t(self.hsattn(t, z, z))"),
    ("LN before the residual of t", "self.norm_t(t + self.hsattn(t, z, z))", "t + self.norm_t(self.hsattn(t, z, z))"),
    ("the codes, not t, ask HSAttn", "t + self.hsattn(t, z, z))",
     "t + self.hsattn((q if self.tok is None else self.tok(codes).expand(q.shape[0], -1, -1)), z, z))"),
    ("the residual of q dropped", "self.norm_q(q + self.attn(q + self.mix(t), z, z))",
     "self.norm_q(self.attn(q + self.mix(t), z, z))"),
    ("Mix(t) in the residual of q too", "self.norm_q(q + self.attn(q + self.mix(t), z, z))",
     "self.norm_q(q + self.mix(t) + self.attn(q + self.mix(t), z, z))"),
    ("Attn asks without q, the global tokens", "self.attn(q + self.mix(t), z, z)", "self.attn(self.mix(t), z, z)"),
    ("Attn asks without Mix(t)", "self.attn(q + self.mix(t), z, z)", "self.attn(q, z, z)"),
    ("the stage after reads t of before mean shift", """        t = self.norm_t(t + self.hsattn(t, z, z))
        return t, self.norm_q(q + self.attn(q + self.mix(t), z, z))
""", """        moved = self.norm_t(t + self.hsattn(t, z, z))
        return t, self.norm_q(q + self.attn(q + self.mix(moved), z, z))
"""),
    ("HSAttn keeps its own kappa", "HSAttn(width, heads, kappa, kernels)", "HSAttn(width, heads, kernels=kernels)"),
    ("HSAttn keeps its own kernel", "HSAttn(width, heads, kappa, kernels)", "HSAttn(width, heads, kappa)"),
    ("one head for the global tokens", "self.attn, self.norm_q = Attn(width, heads),",
     "self.attn, self.norm_q = Attn(width, 1),"),
    ("the mixer to q has the hidden width of q", "TokenMixer(tokens, queries, hidden)",
     "TokenMixer(tokens, queries, queries)"),
    # the walk
    ("early, mid, late read the f of a depth before", "self.pixels.stage(stage, x, f[i + 1], given)",
     "self.pixels.stage(stage, x, f[i], given)"),
    ("the tokenizer does not train the fusion", "self.pixels.stage(stage, x, f[i + 1], given)",
     "self.pixels.stage(stage, x, f[i + 1].detach(), given)"),
    ("z is fused with the f of a depth before", "z = z + tokens(f[i + 1])", "z = z + tokens(f[i])"),
    ("no f in z", "            z = z + tokens(f[i + 1]) ", "            z = z + 0 "),
    ("fused after the semantic stage", """\
            z = z + tokens(f[i + 1])                                                      # (B,P,S), SAN's fusion
            t, q = self.semantic[i](self.codebook(stage), q, z, t)                        # semantic branch
""", """            t, q = self.semantic[i](self.codebook(stage), q, z, t)
            z = z + tokens(f[i + 1])
"""),
    ("the semantic stage before the side block", """            q, z = self.side.step(i, q, z, pos)
            z = z + tokens(f[i + 1])                                                      # (B,P,S), SAN's fusion
            t, q = self.semantic[i](self.codebook(stage), q, z, t)                        # semantic branch
""", """            z = z + tokens(f[i + 1])
            t, q = self.semantic[i](self.codebook(stage), q, z, t)
            q, z = self.side.step(i, q, z, pos)
"""),
    ("t starts from the raw codes", "t, q = self.semantic[i](self.codebook(stage), q, z, t)",
     "t, q = self.semantic[i](given if given is not None else self.pixels.vq[stage].codebook, q, z, t)"),
    ("the semantic branch does not train the codes", "t, q = self.semantic[i](self.codebook(stage), q, z, t)",
     "t, q = self.semantic[i](self.codebook(stage).detach(), q, z, t)"),
    ("local tokens read positions", "t, q = self.semantic[i](self.codebook(stage), q, z, t)",
     "t, q = self.semantic[i](self.codebook(stage), q, z + pos[:, q.shape[1]:], t)"),
    ("f of early before block 1", "self.side.start(image, f[0])", "self.side.start(image, f[1])"),
    ("the last side block is left out", "range(len(PYRAMID), len(self.side.blocks))",
     "range(len(PYRAMID), len(self.side.blocks) - 1)"),
    ("the block after the stages is left out", "range(len(PYRAMID), len(self.side.blocks))",
     "range(len(STAGES), len(self.side.blocks))"),
    ("positions in the latent", "        z = z.transpose(1, 2).unflatten(2,",
     "        z = (z + pos[:, q.shape[1]:]).transpose(1, 2).unflatten(2,"),
    ("latent of the z of before the last block", "        for i in range(len(PYRAMID), len(self.side.blocks)):\n"
     "            q, z = self.side.step(i, q, z, pos)\n",
     "        for i in range(len(PYRAMID), len(self.side.blocks)):\n"
     "            last, (q, z) = z, self.side.step(i, q, z, pos)\n"
     "        z = last if len(self.side.blocks) > len(PYRAMID) else z\n"),
    ("latent lies on its side", "unflatten(2, f[0].shape[-2:])", "unflatten(2, f[0].shape[:-3:-1])"),
    ("latent of CLIP's late map", "self.latent(z, given)", "self.latent(f[3], given)"),
    ("one unified codebook, but positions in it", "self.to_code(self.side.query_embed[0])",
     "self.to_code((self.side.query_embed + self.side.query_pos_embed)[0])"),
    ("the unified codebook does not train the queries", "self.to_code(self.side.query_embed[0])",
     "self.to_code(self.side.query_embed[0].detach())"),
    # what is built
    ("latent has late's codes", "self.latent = quantiser(latent_codes)", "self.latent = quantiser(pyramid_codes[-1])"),
    ("codebooks that nobody asks", "vMFVQ(width, 0 if c.unified else codes,", "vMFVQ(width, codes,"),
    ("quantisers on the sphere without vMF", "c.code_dim, c.metric, kernels=c.kernels)\n",
     "c.code_dim, kernels=c.kernels)\n"),
    ("quantisers keep their own kernel", "c.code_dim, c.metric, kernels=c.kernels)\n", "c.code_dim, c.metric)\n"),
    ("hs_heads is the side ViT's", "heads=c.hs_heads, kappa", "heads=c.side.heads, kappa"),
    ("the mixer's hidden width is the decoder's", "hidden=c.mixer_hidden", "hidden=c.decoder_width"),
    ("spade_hidden is forgotten", "spade_hidden=c.spade_hidden", "spade_hidden=c.decoder_width"),
    ("decoder_heads is forgotten", "heads=c.decoder_heads,", "heads=8,"),
    ("no residual switch", "residual=c.residual", "residual=True"),
    ("no mixer switch", "mixer=c.mixer,", "mixer=True,"),
    ("no unified switch in the stages", "unified=c.unified,", "unified=False,"),
    ("no vmf switch in the stages", 'vmf=c.metric == "cosine",', "vmf=True,"),
    ("the decoder keeps every stage", "stages=c.decoder_stages, tasks", "stages=PYRAMID, tasks"),
    ("the decoder ends as fine as the paper's", "scales=dict(zip(PYRAMID, c.scales))",
     "scales=dict(zip(PYRAMID, (4, 2, 1)))"),
    ("the shared decoder paints too when decoders are separate", 'decoder("masks") if c.sep',
     'decoder("masks", "pixels") if c.sep'),
    ("the pixel decoder has a mask head", 'decoder("pixels") if c.sep', 'decoder("masks", "pixels") if c.sep'),
    ("any number of CLIP's maps will do", "if len(self.vlm.depths) != len(STAGES):", "if False:"),
    ("a mixer before early", "zip(sizes, [0, *sizes])", "zip(sizes, [sizes[-1], *sizes])"),
    # the whole model
    ("the decoder reads features, not codes", "zq = {stage: tokens.zq for", "zq = {stage: tokens.x for"),
    ("the decoder sends no gradient into the tokens", "zq = {stage: tokens.zq for",
     "zq = {stage: tokens.zq.detach() for"),
    ("two decoders, the shared image", "if self.pixel_decoder is not None:", "if False:"),
    ("CLIP names the last biases only", 'self.classify(pyramid, out["bias"], text)',
     'self.classify(pyramid, out["bias"][-1:] * len(out["bias"]), text)'),
    ("masks leave in half precision", 'masks = [m.to(image.dtype) for m in out["masks"]]', 'masks = out["masks"]'),
    ("the image leaves in half precision", 'image=out["image"].to(image.dtype)', 'image=out["image"]'),
    ("CLIP's maps are read unfused by the walk", "tokenized, q = self.walk(image, f)",
     "tokenized, q = self.walk(image, f[::-1])"),
    # what is refused
    ("literal is no way to align", 'choice("scale-free", "literal", "none")', 'choice("scale-free", "none")'),
    ("any stage may stay in the decoder", "choice(*PYRAMID, default=PYRAMID)", "choice(*STAGES, default=PYRAMID)"),
    ("an empty codebook", "256), 1, 65536, 4)", "256), 0, 65536, 4)"),
    ("three codebooks", "256), 1, 65536, 4)", "256), 1, 65536)"),
    ("a scale of nothing", "(4, 2, 1), 1, 64, 3)", "(4, 2, 1), 0, 64, 3)"),
    ("two maps of CLIP", "if len(c.clip.depths) not in (0, len(STAGES)):", "if False:"),
    ("side heads unchecked", "        check_heads(c.side.heads, c.side.width)\n", ""),
    ("hs_heads are checked against the decoder", 'check_heads(c.hs_heads, c.side.width, "hs_heads")',
     'check_heads(c.hs_heads, c.decoder_width, "hs_heads")'),
    ("decoder_heads are checked against the side ViT", "check_heads(c.decoder_heads, c.decoder_width,",
     "check_heads(c.decoder_heads, c.side.width,"),
    ("a side ViT of three blocks is refused", "if c.side.depth < len(PYRAMID):", "if c.side.depth <= len(PYRAMID):"),
    ("no pixels for the CRF pass", "number(1000, 1, 10**5)", "number(1000, 0, 10**5)"),
    # Table II: each row something else
    ("no-vmf drops the mixer", '"no-vmf": dict(metric="euclidean")', '"no-vmf": dict(mixer=False)'),
    ("4 4 4 is the default", "dict(scales=(4, 4, 4))", "dict(scales=(4, 2, 1))"),
    ("1 1 1 is 2 2 2", "dict(scales=(1, 1, 1))", "dict(scales=(2, 2, 2))"),
    ("no alignment is the literal one", 'dict(align="none")', 'dict(align="literal")'),
    ("no-mixer drops the pixels", '"no-mixer": dict(mixer=False)', '"no-mixer": dict(residual=False)'),
    ("no-residual changes nothing", '"no-residual": dict(residual=False)', '"no-residual": dict(residual=True)'),
    ("unified is no-mixer", '"unified": dict(unified=True)', '"unified": dict(mixer=False)'),
    ("separate decoders are one", "dict(separate_decoders=True)", "dict(separate_decoders=False)"),
    ("late is removed first", 'dict(decoder_stages=("mid", "late"))', 'dict(decoder_stages=("early", "mid"))'),
    ("early stays where late should", 'dict(decoder_stages=("late",))', 'dict(decoder_stages=("early",))'),
    ("three stages removed leave one", "dict(decoder_stages=())", 'dict(decoder_stages=("late",))'),
]
MUTATIONS = [Mutation(file="pat.py", what=what, old=old, new=new) for what, old, new in BUGS]
