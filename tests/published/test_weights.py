"""CLIP weights from tags and files: they are read exactly, get their own activation, and run no code of others."""

import pickle
import socket
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cli import InputError
from clip import load_vlm
from published.weights import open_model, reason, with_activation
from tests.helpers import smaller

TINY = dict(vision=dict(width=64, layers=2), text=dict(width=8, heads=1, layers=1), depth=1)


def activation(model):
    return type(model.visual.transformer.resblocks[0].mlp.gelu).__name__


@pytest.fixture
def tiny(monkeypatch):
    smaller(monkeypatch, **TINY)


@pytest.fixture
def no_network(monkeypatch):
    """A list of the attempts to reach one; each of them fails."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network is off in this test")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return attempts


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "ViT-L-14-336-quickgelu", "EVA02-B-16", "EVA02-L-14-336"])
def test_a_local_file_is_the_model_and_asks_for_no_network(tiny, no_network, tmp_path, name):
    """Safetensors, and pickled as open_clip saves while training: bit for bit, and its tokenizer works."""
    model, _ = open_model(name, "none")
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "clip.bin")
    for file in ("clip.safetensors", "clip.bin"):
        torch.manual_seed(1)
        read, tokenizer = open_model(name, str(tmp_path / file))
        assert same_weights(model, read)
        assert tokenizer(["a red star"])[0, :5].tolist() == [49406, 320, 736, 1565, 49407]
    assert no_network == []


def test_openais_own_archive_is_read(tiny, tmp_path):
    """TorchScript, half precision, three numbers among the weights; no code of it is unpickled."""
    model, _ = open_model("ViT-B-16", "none")
    model.half().float()
    for key, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        model.__dict__.pop(key, None)
        model.register_buffer(key, torch.tensor(value))
    model.attn_mask = model._buffers.pop("attn_mask")        # there it is no buffer
    image, text = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int64)
    torch.jit.save(torch.jit.trace_module(model.eval(), {"forward": (image, text)}), tmp_path / "ViT-B-16.pt")
    read, _ = open_model("ViT-B-16", str(tmp_path / "ViT-B-16.pt"))
    own = read.state_dict()
    assert activation(read) == "QuickGELU" and all(torch.equal(own[key], model.state_dict()[key]) for key in own)


def test_weights_get_the_activation_they_were_trained_with(tiny, tmp_path, monkeypatch):
    """A tag knows; a file of half-precision matrices is OpenAI's; any other must be named, and is then believed."""
    model, _ = open_model("ViT-B-16", "none")
    assert activation(model) == "QuickGELU" and activation(open_model("ViT-B-16-gelu", "none")[0]) == "GELU"
    assert activation(open_model("ViT-B-32-quickgelu", "none")[0]) == "QuickGELU"
    theirs, others = str(tmp_path / "openai.pt"), str(tmp_path / "others.pt")
    torch.save(model.state_dict(), others)
    torch.save(model.half().state_dict(), theirs)
    assert activation(open_model("ViT-B-16", theirs)[0]) == "QuickGELU"
    with pytest.raises(InputError, match="others.pt: not OpenAI's weights.*--vlm ViT-B-16-gelu or --vlm ViT-B-16-quickgelu"):
        open_model("ViT-B-16", others)
    assert activation(open_model("ViT-B-16-gelu", others)[0]) == "GELU"
    assert activation(open_model("ViT-B-16-quickgelu", others)[0]) == "QuickGELU"
    monkeypatch.setattr(open_clip, "download_pretrained", lambda weights: others)
    assert activation(open_model("ViT-B-16", "openai")[0]) == "QuickGELU"
    assert activation(open_model("ViT-B-16", "laion2b_s34b_b88k")[0]) == "GELU"
    assert activation(open_model("ViT-B-16", "LAION2B-s34B-b88K")[0]) == "GELU"


def test_unknown_models_and_tags_name_the_closest(monkeypatch):
    for name, pretrained, says in [
            ("ViT-X", "none", "no VLM is called 'ViT-X'; "), ("ViT-B/16", "none", "did you mean ViT-B-16?"),
            ("RN50", "openai", "RN50: only ViTs with a cls token"), ("ViT-B-16-SigLIP", "webli", "only ViTs"),
            ("roberta-ViT-B-32", "none", "only ViTs"), ("coca_ViT-B-32", "none", "only ViTs"),
            ("ViT-B-16", "openia", "ViT-B-16 has no weights called 'openia'; did you mean 'openai'"),
            ("EVA02-L-14-336", "merged2b", "did you mean 'merged2b_s6b_b61k'"), ("ViT-B-16", "nothere.pt", "nothere.pt: no such"),
            ("world", "nothere.safetensors", "nothere.safetensors")]:
        with pytest.raises(InputError, match=says) as error:
            load_vlm(name, pretrained, scale=1.0)
        assert "\n" not in str(error.value)


def test_a_tag_without_a_network_says_to_give_a_file(tiny, monkeypatch):
    def unreachable(weights):
        raise OSError("Name or service not known\nand a traceback")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(InputError, match="'openai' of ViT-B-16 are neither here.*not known.*give a file: --pretrained") as error:
        open_model("ViT-B-16", "openai")
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_bad_weight_files_end_in_one_line(tiny, tmp_path, monkeypatch):
    """Another architecture, a lost and an extra entry, other sizes, truncation, other content, code: each is said."""
    monkeypatch.chdir(tmp_path)
    model, _ = open_model("ViT-B-16", "none")
    state = model.half().state_dict()
    torch.save(open_model("EVA02-B-16", "none")[0].state_dict(), "eva.pt")
    torch.save({key.replace("visual.proj", "visual.prjo"): value for key, value in state.items()}, "typo.pt")
    torch.save({**state, "visual.positional_embedding": torch.zeros(257, 64)}, "grid.pt")
    torch.save(state, "whole.pt")
    save_file(state, "whole.safetensors")
    for name in ("pt", "safetensors"):
        Path(f"half.{name}").write_bytes(Path(f"whole.{name}").read_bytes()[:100_000])
    torch.save([1, 2], "list.pt")
    Path("text.pt").write_text("hello")
    Path("code.pt").write_bytes(pickle.dumps({"visual.proj": Evil()}))
    torch.save({"visual.proj": Evil()}, "zip.pt")
    for file, says in [("eva.pt", "eva.pt: not weights of ViT-B-16 in open_clip's layout: 49 missing: ln_final.bias, .*"
                                  "44 more; 46 unknown: text"),
                       ("typo.pt", "1 missing: visual.proj; 1 unknown: visual.prjo$"),
                       ("grid.pt", r"1 of another shape: visual.positional_embedding \(257, 64\) for \(197, 64\)"),
                       ("half.pt", "half.pt: cannot be read"), ("half.safetensors", "half.safetensors: cannot be read"),
                       ("list.pt", "holds no state dict"), ("text.pt", "text.pt: cannot be read"),
                       ("code.pt", "code.pt: is no checkpoint, or holds Python objects"), ("zip.pt", "could run code")]:
        with pytest.raises(InputError, match=says) as error:
            open_model("ViT-B-16", file)
        assert "\n" not in str(error.value), file
    assert zipfile.is_zipfile("zip.pt") and not Path("ran").exists()


def test_the_name_with_its_activation_needs_no_weights_to_know_it(tiny):
    """A ViT's name says which; EVA and the world's CLIP come with one only."""
    for name, said in [("ViT-B-16", "ViT-B-16-quickgelu"), ("ViT-B-16-gelu", "ViT-B-16-gelu"), ("world", "world"),
                       ("ViT-L-14-336-quickgelu", "ViT-L-14-336-quickgelu"), ("EVA02-B-16", "EVA02-B-16")]:
        vlm = load_vlm(name, "none", scale=1.0)
        assert with_activation(name, vlm) == said


def test_a_reason_is_one_short_line():
    """The kind and the first line, at most 150 letters of it; an empty message is no error of its own."""
    assert reason(ValueError("first\nsecond")) == "ValueError: first" and reason(KeyError()) == "KeyError: "
    assert reason(OSError("x" * 200)) == "OSError: " + "x" * 150
