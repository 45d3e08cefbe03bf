"""Bugs of the training loop, of its recipe, and of the world's."""

from tests.mutations import Mutation

TRAIN, SAN = "train.py", "san.py"

MUTATIONS = [
    # ---- the step ----
    Mutation(TRAIN, "no clipping", "clip_grad_norm_(model.parameters(), recipe.grad_clip)",
             'clip_grad_norm_(model.parameters(), float("inf"))'),
    Mutation(TRAIN, "every number of a gradient clipped for itself", "norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)",
             "norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)\n"
             "        torch.nn.utils.clip_grad_value_(model.parameters(), recipe.grad_clip)"),
    Mutation(TRAIN, "the schedule is never applied", 'group["lr"] = learning_rate(recipe, step) * group["rate"]', "pass"),
    Mutation(TRAIN, "the group's rate is forgotten", 'learning_rate(recipe, step) * group["rate"]', "learning_rate(recipe, step)"),
    Mutation(TRAIN, "gradients of all steps add up", "optimizer.zero_grad(set_to_none=True)", "pass"),
    Mutation(TRAIN, "only the first optimiser steps", "        for optimizer in optimizers:\n            optimizer.step()\n",
             "        optimizers[0].step()\n"),
    Mutation(TRAIN, "one pass a step, however many were asked for", "[next(samples) for _ in range(recipe.accumulate)]", "[next(samples)]"),
    Mutation(TRAIN, "a pass is as large as a batch", "rank, processes), recipe.batch // (processes * recipe.accumulate),",
             "rank, processes), recipe.batch // processes,"),
    Mutation(TRAIN, "training knows the unseen names", "text = model.vlm.embed_text(dataset.train_names)",
             "text = model.vlm.embed_text(dataset.names)"),
    Mutation(TRAIN, "the model is scored, not trained", "build(config.run).to(device).train()", "build(config.run).to(device).eval()"),
    Mutation(TRAIN, "every seed begins with the same weights", "    torch.manual_seed(config.run.seed)\n", "    torch.manual_seed(0)\n"),

    # ---- gradients ----
    Mutation(TRAIN, "totals of this process alone", "totals = summed(sum(bare.totals(labels) for _, labels, _ in micro_batches))",
             "totals = sum(bare.totals(labels) for _, labels, _ in micro_batches)"),
    Mutation(TRAIN, "totals of the first pass alone", "summed(sum(bare.totals(labels) for _, labels, _ in micro_batches))",
             "summed(bare.totals(micro_batches[0][1]))"),
    Mutation(TRAIN, "the loss is a sum over passes", "for weight, term in terms.values()) / n\n", "for weight, term in terms.values())\n"),
    Mutation(TRAIN, "the weights of the terms are forgotten", "sum(weight * term for weight, term", "sum(term for weight, term"),
    Mutation(TRAIN, "a logged term is a sum over passes", "term.detach().double() / n", "term.detach().double()"),
    Mutation(TRAIN, "draws are keyed by the place in a pass", "[(config.run.seed, int(number)) for number in numbers]",
             "[(config.run.seed, j) for j, number in enumerate(numbers)]"),
    Mutation(TRAIN, "draws are keyed by the image alone, not by the seed", "[(config.run.seed, int(number))", "[(0, int(number))"),
    Mutation(TRAIN, "processes exchange after the first pass", "model.require_backward_grad_sync = k == n - 1",
             "model.require_backward_grad_sync = k == 0"),
    Mutation(TRAIN, "processes exchange after every pass", "model.require_backward_grad_sync = k == n - 1",
             "model.require_backward_grad_sync = True", survives="the mean of means is the same gradient: only slower"),
    Mutation(TRAIN, "infinite terms pass", "if not torch.isfinite(term):", "if torch.isnan(term):"),
    Mutation(TRAIN, "bf16 on a CPU too", 'enabled=device.type == "cuda" and config', "enabled=config"),

    # ---- the schedule ----
    Mutation(TRAIN, "no warm-up", "min(1.0, (step + 1) / max(recipe.warmup, 1)) * ", ""),
    Mutation(TRAIN, "warm-up begins at 0", "min(1.0, (step + 1) / max", "min(1.0, step / max"),
    Mutation(TRAIN, "warm-up goes on for ever", "min(1.0, (step + 1) / max(recipe.warmup, 1))", "((step + 1) / max(recipe.warmup, 1))"),
    Mutation(TRAIN, "no decay", " * (1 - step / recipe.steps) ** 0.9", ""),
    Mutation(TRAIN, "linear decay", "(1 - step / recipe.steps) ** 0.9", "(1 - step / recipe.steps)"),
    Mutation(TRAIN, "decay of power 0.5", "(1 - step / recipe.steps) ** 0.9", "(1 - step / recipe.steps) ** 0.5"),
    Mutation(TRAIN, "decay begins after warm-up", "(1 - step / recipe.steps) ** 0.9",
             "(1 - max(0, step - recipe.warmup) / (recipe.steps - recipe.warmup)) ** 0.9"),
    Mutation(TRAIN, "decay ends where the run stops", "(1 - step / recipe.steps) ** 0.9",
             "(1 - step / (recipe.stop_at or recipe.steps)) ** 0.9"),

    # ---- parameter groups ----
    Mutation(TRAIN, "norms decay", "isinstance(m, (torch.nn.LayerNorm, torch.nn.GroupNorm))", "isinstance(m, torch.nn.GroupNorm)"),
    Mutation(TRAIN, "everything decays", "weight_decay=0.0 if plain else recipe.weight_decay", "weight_decay=recipe.weight_decay"),
    Mutation(TRAIN, "nothing decays", "weight_decay=0.0 if plain else recipe.weight_decay", "weight_decay=0.0"),
    Mutation(TRAIN, "frozen parameters are trained", "        if p.requires_grad:\n", "        if True:\n"),
    Mutation(TRAIN, "the last prefix says the rate", "for prefix, factor in model.rates.items() if", "for prefix, factor in reversed(model.rates.items()) if"),

    # ---- the stream ----
    Mutation(TRAIN, "every process draws the same images", "(a * processes + rank) * local", "(a * processes) * local"),
    Mutation(TRAIN, "passes of two processes overlap", "(a * processes + rank) * local", "(a + rank) * local"),
    Mutation(TRAIN, "a step goes on by one pass", "[step * recipe.batch + (a", "[step * local + (a"),
    Mutation(TRAIN, "one image less a pass", "for j in range(local)]", "for j in range(max(1, local - 1))]"),
    Mutation(TRAIN, "the stream starts at 0 on resuming", "for step in range(start, recipe.steps)", "for step in range(recipe.steps)"),
    Mutation(TRAIN, "the loop's stream starts at 0 on resuming", "Stream(dataset, config, start, rank", "Stream(dataset, config, 0, rank"),
    Mutation(TRAIN, "every process reads as the first", "Stream(dataset, config, start, rank", "Stream(dataset, config, start, 0"),
    Mutation(TRAIN, "images of every seed", "recipe, dataset, config.run.seed\n", "recipe, dataset, 0\n"),
    Mutation(TRAIN, "images are numbered from where it started", "self.dataset.draw(self.seed, self.numbers[i])", "self.dataset.draw(self.seed, i)"),
    Mutation(TRAIN, "draws are numbered from where it started", "self.numbers[i]), self.numbers[i])", "self.numbers[i]), i)"),

    # ---- the run ----
    Mutation(TRAIN, "stop_at is ignored", "stop = min(recipe.steps, recipe.stop_at or recipe.steps)", "stop = recipe.steps"),
    Mutation(TRAIN, "it trains past its steps", "stop = min(recipe.steps, recipe.stop_at or recipe.steps)", "stop = recipe.stop_at or recipe.steps"),
    Mutation(TRAIN, "a checkpoint counts one step too few", "model, optimizers, step + 1)", "model, optimizers, step)"),
    Mutation(TRAIN, "no checkpoint on the way", "((step + 1) % recipe.save_every == 0 or step + 1 == stop)", "step + 1 == stop"),
    Mutation(TRAIN, "no checkpoint at the end", "((step + 1) % recipe.save_every == 0 or step + 1 == stop)", "((step + 1) % recipe.save_every == 0)"),
    Mutation(TRAIN, "log lines after the checkpoint are kept", 'json.loads(line)["step"] < start]', 'json.loads(line)["step"] <= start]'),
    Mutation(TRAIN, "resuming empties the log", "kept = path.read_text().splitlines() if start and path.exists() else []", "kept = []"),
    Mutation(TRAIN, "a line cut short is kept", 'if line.endswith("}") and json', "if json"),
    Mutation(TRAIN, "the first of every fifty steps is logged", "if (step + 1) % recipe.log_every == 0 or", "if step % recipe.log_every == 0 or"),
    Mutation(TRAIN, "the last step is not logged", "if (step + 1) % recipe.log_every == 0 or step + 1 == stop:", "if (step + 1) % recipe.log_every == 0:"),
    Mutation(TRAIN, "the log's rate is the recipe's", '"lr": learning_rate(recipe, step), ', '"lr": recipe.lr, '),
    Mutation(TRAIN, "logged terms are sums over processes", "summed(value).item() / processes", "summed(value).item()"),
    Mutation(TRAIN, "logged terms are the first process's", "summed(value).item() / processes", "value.item()"),
    Mutation(TRAIN, "a step takes as long as all since the last line", "/ (step + 1 - before)", "/ 1"),
    Mutation(TRAIN, "names.txt holds names that were not trained", "open_log(run, config, dataset.train_names, start)",
             "open_log(run, config, dataset.names, start)"),
    Mutation(TRAIN, "a run is overwritten", 'if not resume and (run / "checkpoint.safetensors").exists():', "if False:"),
    Mutation(TRAIN, "a run without a checkpoint is resumed", 'if resume and not (run / "checkpoint.safetensors").exists():', "if False:"),
    Mutation(TRAIN, "a run starts before its data were read", "    dataset.draw(config.run.seed, 0)   ", "    pass   "),
    Mutation(TRAIN, "processes are no part of a batch", "parts = processes * recipe.accumulate", "parts = recipe.accumulate"),
    Mutation(TRAIN, "the batch that fits is the next smaller", "max(1, round(recipe.batch / parts)) * parts", "recipe.batch // parts * parts"),
    Mutation(TRAIN, "seeds past 32 bits", "config.run.seed < 2**32:", "config.run.seed < 2**64:"),

    # ---- the command line ----
    Mutation(TRAIN, "resuming takes the paper's recipe", "filled(Recipe(), read_config(resume))", "Recipe()"),
    Mutation(TRAIN, "resuming stops where it stopped", "config = Training(load_config(resume), filled(Recipe(), read_config(resume)))\n        stop = settings(config, [f\"stop_at={args.get('stop_at', 0)}\"])",
             "config = Training(load_config(resume), filled(Recipe(), read_config(resume)))\n        stop = {}"),
    Mutation(TRAIN, "--ablate switches nothing off", "        config = changed(config, **rows[row])\n", ""),
    Mutation(TRAIN, "--init keeps its own CLIP", "            config = changed(config, pretrained=began.pretrained)\n", "            pass\n"),
    Mutation(TRAIN, "--init wins over --pretrained", ' and "pretrained" not in numbers:', ":"),

    # ---- the paper's numbers ----
    Mutation(TRAIN, "60,000 steps", "steps: int = 120_000", "steps: int = 60_000"),
    Mutation(TRAIN, "batches of 16", "batch: int = 12 ", "batch: int = 16 "),
    Mutation(TRAIN, "two passes a step", "accumulate: int = 1 ", "accumulate: int = 2 "),
    Mutation(TRAIN, "a rate of 1e-3", "lr: float = 1e-4\n", "lr: float = 1e-3\n"),
    Mutation(TRAIN, "a warm-up nobody wrote of", "warmup: int = 0 ", "warmup: int = 1500 "),
    Mutation(TRAIN, "AdamW's own decay", "weight_decay: float = 1e-4 ", "weight_decay: float = 1e-2 "),
    Mutation(TRAIN, "gradients clipped at 1", "grad_clip: float = 0.01 ", "grad_clip: float = 1.0 "),
    Mutation(TRAIN, "full precision", 'precision: str = "bf16" ', 'precision: str = "fp32" '),
    Mutation(TRAIN, "no worker", "workers: int = 4 ", "workers: int = 0 "),
    Mutation(TRAIN, "every step is logged", "log_every: int = 50 ", "log_every: int = 1 "),
    Mutation(TRAIN, "a checkpoint every 10,000 steps", "save_every: int = 1000\n", "save_every: int = 10000\n"),
    Mutation(TRAIN, "thirty images are scored", "val_images: int = 300 ", "val_images: int = 30 "),

    # ---- the world's numbers ----
    *(Mutation(SAN, what, old, new, "tests/test_train.py") for what, old, new in [
        ("half the steps in the world", "steps=1300, batch=8", "steps=650, batch=8"),
        ("half the batch in the world", "steps=1300, batch=8", "steps=1300, batch=4"),
        ("the paper's rate in the world", "lr=8e-4, warmup=100", "lr=1e-4, warmup=100"),
        ("no warm-up in the world", "lr=8e-4, warmup=100", "lr=8e-4, warmup=0"),
        ("the paper's clipping in the world", "grad_clip=1.0, weight_decay=0.01", "grad_clip=0.01, weight_decay=0.01"),
        ("the paper's decay in the world", "grad_clip=1.0, weight_decay=0.01", "grad_clip=1.0, weight_decay=1e-4"),
        ("rare checkpoints in the world", "save_every=200, log_every=20", "save_every=2000, log_every=20"),
        ("few lines in the world", "save_every=200, log_every=20", "save_every=200, log_every=50"),
        ("workers for scenes of a millisecond", "        workers=0)}", "        workers=4)}")]),
]
