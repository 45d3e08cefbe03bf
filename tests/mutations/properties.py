"""Bugs that one input in many tells: of equations, scores, archives, tokens and labels; each names the property it breaks."""

from tests.mutations import Mutation

VQ, CPU, HSATTN, EVAL, TOKENIZER, DATA = "vq.py", "kernels/cpu.py", "hsattn.py", "eval.py", "tokenizer.py", "data.py"
ARCHIVES, LABELS = "published/archives.py", "published/labels.py"


def of(words):
    """The property whose name holds these words."""
    return f"tests/faults/test_properties.py -k {words.replace(' ', '_')}"


MUTATIONS = [
    # ---- the quantiser ----
    Mutation(CPU, "scores of eight bits", "codes.T, out=memory[:len(part)])",
             "codes.T, out=memory[:len(part)]).bfloat16().to(x.dtype)", tests=of("the greatest cosine")),
    Mutation(VQ, "a later code is a little better", "return scores.argmax(1)",
             "return (scores + torch.arange(len(codes)) / 99).argmax(1)", tests=of("codes in another order")),
    Mutation(CPU, "codes get zeros through zq", "return through_g(dzq, x, length), None, None",
             "return through_g(dzq, x, length), torch.zeros_like(codes), None", tests=of("what goes on is the code")),
    Mutation(CPU, "a feature of zeros has no loss", "length = x.norm(dim=1, keepdim=True).clamp(min=1e-12)",
             "length = x.norm(dim=1, keepdim=True)", tests=of("finite numbers stay finite")),
    Mutation(VQ, "perplexity of shares of an even use", "counts.sum().clamp(min=1)", "counts.double().mean().clamp(min=1)",
             tests=of("the health of a codebook")),

    # ---- attention ----
    Mutation(CPU, "a query that looks away from all keys sees none", ".clamp(min=-kappa)).exp_()", ".clamp(min=0)).exp_()",
             tests=of("are equation one")),
    Mutation(HSATTN, "a later key weighs a little more", "weights = scores.softmax(-1)",
             "weights = scores.softmax(-1) * (1 + torch.arange(k.shape[-2]) / 99)", tests=of("are equation one")),
    Mutation(HSATTN, "away from the features", "modes = hypersphere_attention(modes, x, x, kappa)",
             "modes = hypersphere_attention(modes, x, x, -kappa)", tests=of("never goes down")),
    Mutation(CPU, "a mean of zeros is divided by its length", "length = out.norm(dim=-1, keepdim=True).clamp(min=1e-12)",
             "length = out.norm(dim=-1, keepdim=True)", tests=of("whatever kappa")),

    # ---- scores ----
    Mutation(EVAL, "the old rule forgets names that nobody said", "true + said > 0", "said > 0", tests=of("what counting gives")),
    Mutation(EVAL, "the last image is the tally", 'self.tensors["matrix"] += matrix', 'self.tensors["matrix"] = matrix',
             tests=of("what counting gives")),
    Mutation(EVAL, "unnamed is the first name", "said, true = prediction.flatten() % (L + 1)",
             "said, true = prediction.flatten().clamp(min=0)", tests=of("names keep their scores")),

    # ---- archives ----
    Mutation(ARCHIVES, "names lose every dot they begin with", '.removeprefix("./")', '.lstrip("./")', tests=of("byte for byte")),
    Mutation(ARCHIVES, "a version that no zip has is a traceback", "EOFError, NotImplementedError,", "EOFError,",
             tests=of("an archive that is cut")),
    Mutation(ARCHIVES, "a damaged header is the end of a tar", "file.fileobj.seek(file.offset) ",
             "file.fileobj.seek(-1024, os.SEEK_END) ", tests=of("an archive that is cut")),
    Mutation(ARCHIVES, "what is stored has no checksum", "if self.method is not None and zlib.crc32",
             "if self.method == 8 and zlib.crc32", tests=of("an archive that is cut")),

    # ---- tokens ----
    Mutation(TOKENIZER, "width before height", "sizes.append((H, W))", "sizes.append((W, H))",
             tests=of("come back as they were written")),
    Mutation(TOKENIZER, "a photo whose name is two dots cannot be read", "or not Path(name).stem for",
             'or Path(name).stem in ("", "..") for', tests=of("come back as they were written")),
    Mutation(TOKENIZER, "numpy is believed", "if file.zip.testzip():", "if False:", tests=of("tokens that are cut")),
    Mutation(TOKENIZER, "damaged zips are tracebacks", "    except Exception as error:                                # zip",
             "    except (OSError, ValueError) as error:  # zip", tests=of("tokens that are cut")),

    # ---- labels ----
    Mutation(LABELS, "what scipy stumbles over is a traceback", "except Exception as error: ", "except ValueError as error: ",
             tests=of("bytes of any kind")),
    Mutation(LABELS, "PIL is believed", "        file.verify()\n", "        pass\n", tests=of("a png that is cut")),
    Mutation(DATA, "a broken PNG is a traceback", "    except Exception as error:", "    except (OSError, ValueError) as error:",
             tests=of("a png that is cut")),
    Mutation(LABELS, "any size of an image", "if not all(type(item[side]) is int and",
             "if False and not all(type(item[side]) is int and", tests=of("masks of any kind")),
    Mutation(LABELS, "numbers that no mask holds are tracebacks", "IndexError, OverflowError)", "IndexError)",
             tests=of("masks of any kind")),
    Mutation("tokenizer.py", "a photo by any name", 'if path.name != path.name.encode(errors="replace").decode():', "if False:", tests="tests/test_tokenizer.py -k no_text"),
]
