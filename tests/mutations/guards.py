"""Bugs in what keeps a run of days: checkpoints, signals, locks, ranges, what is tried before the first step."""

from tests.mutations import Mutation

RUNS, CLI, TRAIN, CLIP = "runs.py", "cli.py", "train.py", "clip.py"
STOPPING, LOCKING, STARTING = (f"guards/{name}.py" for name in ("stopping", "locking", "starting"))

RANGE = "tests/test_runs.py -k out_of_range"
SIZES, SOAK = "tests/faults/test_sizes.py", "tests/faults/soak.py"

MUTATIONS = [
    # ---- a checkpoint ----
    Mutation(RUNS, "the checksum is not looked at", "if said is not None and said != digest(tensors, told):", "if False:"),
    Mutation(RUNS, "the checksum leaves the step out", "{tensors_checksum(tensors)} {sorted(told.items())}", "{tensors_checksum(tensors)}"),
    Mutation(RUNS, "any format is read", "if told.get(\"format\", FORMAT) != FORMAT:", "if False:"),
    Mutation(RUNS, "one checkpoint is kept", "            os.replace(old, before)\n", "            old.unlink()\n"),
    Mutation(RUNS, "a damaged one ends it all", "            errors.append(error)\n", "            raise\n"),
    Mutation(RUNS, "the last error is told, not the newest file's", "raise errors[0]", "raise errors[-1]"),
    Mutation(RUNS, "a full disk leaves a half file", "            file.unlink(missing_ok=True)\n", "            pass\n"),
    Mutation(RUNS, "NaN is saved", "if not p.isfinite().all():", "if False:"),
    Mutation(RUNS, "not on the disk when it takes its name", "            os.fsync(file.fileno())\n", ""),
    Mutation(RUNS, "counts that no line has told are lost", "    model.unlogged().update(part(tensors, \"log.\"))\n", ""),
    Mutation(RUNS, "counts that no line has told are not saved", "for name, value in model.unlogged().items()", "for name, value in ()"),

    Mutation(RUNS, "a checkpoint is opened twice", "tensors, told = load(data),", "tensors, told = load(Path(path).read_bytes()),",
             tests="tests/test_runs.py -k replaced_while"),

    # ---- files ----
    Mutation(CLI, "what a killed process left stays", "                    left.unlink(missing_ok=True)\n", "                    pass\n"),
    Mutation(CLI, "what a living process writes is removed", 'if not Path("/proc", left.name.split(".")[1]).exists():', "if True:"),
    Mutation(CLI, "any error of the disk is one line", "if error.errno not in (errno.ENOSPC,", "if error.errno in (errno.ENOENT,"),
    Mutation(CLI, "Ctrl-C is a traceback", "    except KeyboardInterrupt:\n        sys.exit(130)\n", ""),

    # ---- ranges ----
    Mutation(CLI, "too small passes", "not low <= part <= high", "not part <= high",
             tests=RANGE),
    Mutation(CLI, "too large and NaN pass", "not low <= part <= high", "part < low",
             tests=RANGE),
    Mutation(CLI, "true is a number", "type(part) is not one", "not isinstance(part, one)",
             tests=RANGE),
    Mutation(CLI, "any number of numbers", "n not in (None, len(each))", "False",
             tests=RANGE),
    Mutation(CLI, "one number for a tuple", "    fits = many == (kind is tuple)\n", "    fits = True\n",
             tests=RANGE),
    Mutation(CLI, "any word", "any(part not in limits[\"allowed\"] for part in each)", "False",
             tests=RANGE),
    Mutation(CLI, "1 is no number where 1.0 is", "if one is float and type(value) is int:", "if False:",
             tests=RANGE),
    Mutation(RUNS, "what config.json says is not looked at", "checked(name, value, spec))", "value)"),
    Mutation(CLIP, "CLIP's blocks in any order", "if sorted(self.depths) != list(self.depths) or", "if"),

    # ---- signals ----
    Mutation(STOPPING, "the second signal is not heard", "        if self.came:  ", "        if False:  "),
    Mutation(STOPPING, "afterwards nobody can interrupt", "            signal.signal(signum, handler)\n", "            pass\n"),
    Mutation(STOPPING, "the status is the signal", "super().__init__(128 + signum)", "super().__init__(signum)"),
    Mutation(TRAIN, "asked to stop, it goes on", "        if stopped:\n", "        if False:\n"),
    Mutation(TRAIN, "asked to stop, it does not save", "or due or stopped):", "or due):"),
    Mutation(TRAIN, "the clock saves nothing", "step + 1 == stop or due or", "step + 1 == stop or"),
    Mutation(TRAIN, "the clock runs from the start", "            saved = time.monotonic()\n", ""),
    Mutation(TRAIN, "a gradient that is not finite is stepped along", "        if not norm.isfinite():\n", "        if False:\n"),

    # ---- the same command again ----
    Mutation(LOCKING, "anybody may write", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    Mutation(LOCKING, "who failed never comes back", "    if run in HELD:\n        HELD.pop(run).close()\n", ""),
    Mutation(TRAIN, "restarted workers begin anew", 'again = resume or own and "TORCHELASTIC_RUN_ID" in os.environ', "again = resume"),
    Mutation(TRAIN, "it goes on with another run", "        same_run(run, load_training(run), config, CHANGEABLE)\n", "        pass\n"),
    Mutation(TRAIN, "a finished run is gone on with", ' and not (run / "scores.json").exists()', ""),
    Mutation(TRAIN, "anything may change on the way", "- {*CHANGEABLE})", "- set(leaves(config)))"),
    Mutation(TRAIN, "changes are not written down", "if new else [])", "if False else [])"),
    Mutation(STARTING, "another place is another run", '{"out", "stop_at", *but}', '{"stop_at", *but}'),

    # ---- everything once ----
    Mutation(STARTING, "a rehearsal leaves gradients", "            model.zero_grad(set_to_none=True)\n", ""),
    Mutation(STARTING, "after a rehearsal dropout is off", "    model.train()\n", "    pass\n"),
    Mutation(STARTING, "nothing is scored in a rehearsal", "            segment(model.eval(), ", "            (lambda *_: None)(model.eval(), "),
    Mutation(STARTING, "memory that does not suffice is a traceback", "(torch.OutOfMemoryError, MemoryError)", "torch.OutOfMemoryError"),

    # ---- sizes ----
    Mutation("data.py", "a picture of any size", "if width * height > MOST_PIXELS:", "if False:", tests=SIZES),
    Mutation("data.py", "PIL warns below our bound", "Image.MAX_IMAGE_PIXELS = None", "Image.MAX_IMAGE_PIXELS = 89478485", tests=SIZES),
    Mutation("data.py", "a list of names of any length is read", "if path.stat().st_size > 100 * MOST_NAMES:", "if False:", tests=SIZES),
    Mutation(CLI, "any number of names", "if len(names) > MOST_NAMES:", "if False:", tests=SIZES),
    Mutation(CLIP, "every list of names is kept", "list(self.cache)[:1 - KEPT]", "()", tests=SIZES),
    Mutation(CLIP, "the newest list goes", "list(self.cache)[:1 - KEPT]", "list(self.cache)[KEPT - 1:]", tests=SIZES),
    Mutation("published/labels.py", "a .mat of any size is unpacked", 'bounded(f"{source} ({name})", math.prod(shape), 1)', "pass", tests=SIZES),
    Mutation("published/labels.py", "masks of any size are painted", "    bounded(source, source.width, source.height)\n", "", tests=SIZES),
    Mutation("published/archives.py", "a member of any size is read", "if self.size > MOST_BYTES:", "if False:", tests=SIZES),
    Mutation("published/archives.py", "a member of any size is unpacked", "stream.decompress(data, MOST_BYTES)", "stream.decompress(data)", tests=SIZES),
    Mutation("predict.py", "a picture is as high as it is", "if h <= tallest * w else", "if True else", tests=SIZES),
    Mutation("tokenizer.py", "tokens of any number are unpacked", "if size > MOST_BYTES:", "if False:", tests=SIZES),
    Mutation("tokenizer.py", "what no image has is kept", "if arrays.keys() - used:", "if False:", tests=SIZES),
    Mutation("tokenizer.py", "a picture of any size is drawn", '        bounded(f"{path}: {stem}", *size)\n', "", tests=SIZES),
    Mutation("tokenizer.py", "an image of any size is decoded", '        encodable(f"{path}: {stem}", *crop)\n', "", tests=SIZES),
    Mutation("tokenizer.py", "an image of any size is encoded", "        encodable(path, h, w)\n", "", tests=SIZES),
    Mutation("tokenizer.py", "any short side", "if not 0 <= short <= MOST_SIDE:", "if short < 0:", tests=SIZES),

    # ---- the soak ----
    Mutation(SOAK, "the start counts as growth", "samples[fifth:2 * fifth]", "samples[:fifth]", tests="tests/faults/test_soak.py"),
    Mutation(SOAK, "children are not counted", "for one in family(pid):", "for one in [pid]:", tests="tests/faults/test_soak.py"),
    Mutation(SOAK, "whoever ends is watched on", "if process.poll() is not None:", "if False:", tests="tests/faults/test_soak.py"),
]
