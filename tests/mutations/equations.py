"""Bugs in the equations: Eq. 1 as attention, Eq. 3."""

from tests.mutations import Mutation

READ_LATE = """                y = self.run(self.spade[stage], y, y.shape[1] // g[0], self.lift[stage](c))
                if self.head:
                    q = self.cross[stage](q, y)
"""
READ_EARLY = """                if self.head:
                    q = self.cross[stage](q, y)
                y = self.run(self.spade[stage], y, y.shape[1] // g[0], self.lift[stage](c))
"""
FIRST_THEN_BLOCKS = """        if self.head and self.training:
            self.predict(q, self.norm(y), g, out)
        for block in self.plain:
            y = self.run(block, y, y.shape[1] // g[0])
"""
BLOCKS_THEN_FIRST = """        for block in self.plain:
            y = self.run(block, y, y.shape[1] // g[0])
        if self.head and self.training:
            self.predict(q, self.norm(y), g, out)
"""

MUTATIONS = [
    # --- hsattn.py, Eq. 1 along a row ---
    Mutation("hsattn.py", "the softmax runs over the codes, not the features", "weights = scores.softmax(-1)",
             "weights = scores.softmax(-2)"),
    Mutation("hsattn.py", "queries are not normalised", "kappa * g(q) @ g(k)", "kappa * q @ g(k)"),
    Mutation("hsattn.py", "keys are not normalised", "kappa * g(q) @ g(k)", "kappa * g(q) @ k"),
    Mutation("hsattn.py", "the output leaves the sphere", "return g(weights @ v).to(dtype)",
             "return (weights @ v).to(dtype)"),
    Mutation("hsattn.py", "values are normalised", "return g(weights @ v).to(dtype)",
             "return g(weights @ g(v)).to(dtype)"),
    Mutation("hsattn.py", "kappa is a temperature", "scores = kappa * g(q)", "scores = 1 / kappa * g(q)"),
    Mutation("hsattn.py", "kappa is squared", "scores = kappa * g(q)", "scores = kappa ** 2 * g(q)"),
    Mutation("hsattn.py", "half precision inside", "torch.promote_types(q.dtype, torch.float32)", "q.dtype"),
    Mutation("hsattn.py", "autocast reaches the scores", "torch.autocast(q.device.type, enabled=False)",
             "torch.autocast(q.device.type, enabled=torch.is_autocast_enabled(q.device.type))"),
    Mutation("hsattn.py", "a query that may look at nothing gets the mean",
             "v = v.masked_fill(~mask.transpose(-1, -2), 0)", "v = v"),
    Mutation("hsattn.py", "the mask hides what counts", "scores.masked_fill(~mask,", "scores.masked_fill(mask,"),
    Mutation("hsattn.py", "mean shift does not iterate", "modes = hypersphere_attention(modes, x, x, kappa)",
             "modes = hypersphere_attention(g(seeds), x, x, kappa)"),
    Mutation("hsattn.py", "mean shift moves the points too", "modes = hypersphere_attention(modes, x, x, kappa)",
             "modes = x = hypersphere_attention(x, x, x, kappa)"),
    Mutation("hsattn.py", "the model's kappa is not used", "return attention(q, k, v, self.kappa)",
             "return attention(q, k, v, 30.0)"),
    Mutation("hsattn.py", "heads are interleaved", "(self.heads, -1)).transpose(1, 2)",
             "(-1, self.heads)).transpose(-1, -2).transpose(1, 2)"),
    Mutation("hsattn.py", "plain attention forgets 1/sqrt(d)", "F.scaled_dot_product_attention(q, k, v)",
             "F.scaled_dot_product_attention(q, k, v, scale=1.0)"),
    # --- decoder.py, Eq. 3 ---
    Mutation("decoder.py", "nothing is recomputed", "if self.recompute and self.training else", "if False else"),
    Mutation("decoder.py", "scoring recomputes too", "if self.recompute and self.training else", "if self.recompute else"),
    Mutation("decoder.py", "the SPADE blocks keep all", "self.run(self.spade[stage],", "self.spade[stage]("),
    Mutation("decoder.py", "the plain blocks keep all", "self.run(block,", "block("),
    Mutation("pat.py", "recompute reaches no decoder", ", recompute=c.recompute)", ")"),
    Mutation("decoder.py", "SPADE scales by gamma, not 1 + gamma", "* (1 + gamma) + beta", "* gamma + beta"),
    Mutation("decoder.py", "gamma and beta swapped", "gamma, beta = on_map", "beta, gamma = on_map"),
    Mutation("decoder.py", "SPADE without its activation", "F.leaky_relu(on_map(self.shared, c), 0.2)",
             "on_map(self.shared, c)"),
    Mutation("decoder.py", "SPADE's own ReLU, which dies", "F.leaky_relu(on_map(self.shared, c), 0.2)",
             "F.relu(on_map(self.shared, c))"),
    Mutation("decoder.py", "SPADE's norm over the whole map", "F.layer_norm(x, x.shape[-1:])",
             "F.layer_norm(x, x.shape[1:])"),
    Mutation("decoder.py", "DySample's offsets twice as long", "0.25 * self.offset(x)", "0.5 * self.offset(x)"),
    Mutation("decoder.py", "DySample's x and y swapped", ".permute(0, 2, 3, 1)        # (B*groups,2h,2w,2)",
             ".permute(0, 2, 3, 1).flip(-1)"),
    Mutation("decoder.py", "DySample measures rows by the width", "where.new_tensor([w, h])",
             "where.new_tensor([h, w])"),
    Mutation("decoder.py", "DySample reads zeros beyond the border", 'padding_mode="border"', 'padding_mode="zeros"'),
    Mutation("decoder.py", "DySample aligns corners", "align_corners=False", "align_corners=True"),
    Mutation("decoder.py", "DySample looks from pixels' corners",
             "xs = (torch.arange(2 * w, device=x.device) + 0.5) / 2",
             "xs = torch.arange(2 * w, device=x.device) / 2"),
    Mutation("decoder.py", "DySample gives groups each other's offsets",
             "offset = offset.reshape(B * self.groups, 2, 2 * h",
             "offset = offset.view(B, 2, self.groups, 2 * h, 2 * w).transpose(1, 2).reshape(B * self.groups, 2, 2 * h"),
    Mutation("decoder.py", "DySample starts far from bilinear", "self.offset.weight, std=0.001", "self.offset.weight, std=0.1"),
    Mutation("decoder.py", "keys and values max-pooled", "F.avg_pool2d(x, pool)", "F.max_pool2d(x, pool)"),
    Mutation("decoder.py", "the map looks at itself pooled only in training", "if pool > 1 else y",
             "if pool > 1 and self.training else y"),
    Mutation("decoder.py", "a block without its first residual", "y = y + self.attn(self.norm1(y, c), pool)",
             "y = self.attn(self.norm1(y, c), pool)"),
    Mutation("decoder.py", "both SPADEs of a block are the first", "self.mlp(self.norm2(y, c))",
             "self.mlp(self.norm1(y, c))"),
    Mutation("decoder.py", "queries normalised before they look", "q = self.norm1(q + self.attn(q, y, y))",
             "q = q + self.attn(self.norm1(q), y, y)"),
    Mutation("decoder.py", "every stage through the latent's W_post", "self.lift[stage](c))",
             'self.lift["latent"](c))'),
    Mutation("decoder.py", "the latent codes condition every stage",
             "c = zq.get(stage, y.new_zeros(1, self.code_dim, *y.shape[1:3]))",
             'c = F.interpolate(zq["latent"], size=y.shape[1:3])'),
    Mutation("decoder.py", "a missing stage is not zero", "y.new_zeros(1, self.code_dim",
             "y.new_ones(1, self.code_dim"),
    Mutation("decoder.py", "a missing stage skips its block", "if stage in self.spade:",
             "if stage in self.spade and stage in zq:"),
    Mutation("decoder.py", "the decoder pools always by 2", "y = self.run(self.spade[stage], y, y.shape[1] // g[0],",
             "y = self.run(self.spade[stage], y, 2,"),
    Mutation("decoder.py", "the plain blocks pool always by 2", "y = self.run(block, y, y.shape[1] // g[0])",
             "y = block(y, 2)"),
    Mutation("decoder.py", "queries read y before SPADE", READ_LATE, READ_EARLY),
    Mutation("decoder.py", "queries start anew at each stage", "q = self.cross[stage](q, y)",
             "q = self.cross[stage](q if stage == self.order[0] else 0 * q, y)"),
    Mutation("decoder.py", "first supervised output after the plain blocks", FIRST_THEN_BLOCKS, BLOCKS_THEN_FIRST),
    Mutation("decoder.py", "the first supervised output sees y unnormalised", "self.predict(q, self.norm(y), g, out)",
             "self.predict(q, y, g, out)"),
    Mutation("decoder.py", "heads without the norm before them", "        y = self.norm(y)\n", ""),
    Mutation("decoder.py", "the bias from a max pool", "F.avg_pool2d(x, y.shape[1] // g[0])",
             "F.max_pool2d(x, y.shape[1] // g[0])"),
    Mutation("decoder.py", "two outputs at test time too", "if self.head and self.training:", "if self.head:"),
    Mutation("decoder.py", "a removed stage takes its Up along", "y = on_map(self.up[stage], y)",
             "y = on_map(self.up[stage], y) if stage in self.spade else y"),
]
