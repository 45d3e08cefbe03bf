"""What report.py promises: one file, complete in itself, whose tokens are the model's tokens."""

import base64
import io
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import eval
import studies.report
from cli import InputError
from data import IGNORE, palette, to_tensor
from pat import STAGES
from predict import segment
from studies.report import data_uri, meaning_of, most_common_names, report, score_section, shrunk, token_data
from tests.helpers import fake_runs, world

NAMES = ["grass", 'a <b>"bold"</b> name</script>']


class Photos:
    """One photo of 44x60, which no stride divides; its left third is name 0, its last row unlabelled."""

    names, label = NAMES, np.repeat([[0] * 20 + [1] * 40], 44, 0)

    def __len__(self):
        return 1

    def __getitem__(self, i):
        picture = np.random.default_rng(0).integers(0, 256, (44, 60, 3), dtype=np.uint8)
        label = torch.from_numpy(self.label).clone()
        label[-1] = IGNORE
        return dict(image=to_tensor(picture), label=label, original=picture)


class Page(HTMLParser):
    """Every tag, and the text inside each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts[-1] += data


TABLE = {"data": "a folder", "images": 1, "names": NAMES, "notes": ["MaskCLIP row not measured: why"],
         "config": {"preset": "world", "seed": 3, "vlm": "<a CLIP>"},
         "rows": {"PAT runs/<x>": {"segmentation": {"mIoU": 0.5}, "reconstruction": {"PSNR": 21.234, "LPIPS": None},
                                "codebooks": {"early": {"codes": 128, "perplexity": 82.64, "share_used": 1.0,
                                                        "cosine": None, "bf16": 0.9991}}},
                  "chance": {"segmentation": {"mIoU": 0.01}, "reconstruction": None, "codebooks": {}}}}


@pytest.fixture(scope="module")
def model():
    return world().eval()


@pytest.fixture(scope="module")
def page(model):
    patches = {stage: (np.zeros((len(model.codebook(stage)), 3, 8, 8, 3), np.uint8),
                       np.arange(len(model.codebook(stage)))) for stage in STAGES}
    curve = Image.new("RGB", (30, 20), "red")
    return report(model, Photos(), TABLE, {"losses over steps": curve}, patches, "purity < 1")


def test_nothing_is_fetched_and_every_picture_says_what_it_shows(page):
    """Whatever could be loaded is inside the file, and a reader who sees no picture still gets its text."""
    tags = Page(page).tags
    loaded = [value for _, attributes in tags for key, value in attributes.items() if key in ("src", "href", "srcset")]
    assert len(loaded) == 4 + 4 + 4 + 1 and all(value.startswith("data:image/") for value in loaded)
    assert "url(" not in page and "http" not in page
    assert all(attributes["alt"] for tag, attributes in tags if tag == "img")
    assert any(attributes.get("name") == "viewport" for tag, attributes in tags if tag == "meta")


def test_the_script_gets_the_models_own_tokens(model, page):
    """What lights up is the index map, token by token, and only the part of it that shows the photo can be pointed at."""
    data = json.loads(Page(page).scripts[0])
    sample = Photos()[0]
    _, seen = segment(model, sample["image"], model.vlm.embed_text(NAMES), (44, 60))
    for stage in STAGES:
        there, index = data["images"][0]["maps"][stage], seen["tokens"][stage].index[0].numpy()
        assert (there["rows"], there["columns"]) == index.shape
        kept = np.frombuffer(base64.b64decode(there["index"]), "<u2" if there["wide"] else "u1").reshape(index.shape)
        assert (kept == index).all()
        assert there["shown"] == [44 / 48, 60 / 64]
        assert data["stages"][stage]["counts"] == list(range(model.config.codes[STAGES.index(stage)]))


def test_a_large_photo_is_shrunk_with_its_labels():
    """1024x600 becomes 512x300; the right half, and only it, stays name 1."""
    label, picture = np.repeat([[0] * 300 + [1] * 300], 1024, 0), np.zeros((1024, 600, 3), np.uint8)
    small, drawn = shrunk(label, picture)
    assert small.shape == drawn.shape[:2] == (512, 300) and (small[:, :150] == 0).all() and (small[:, 150:] == 1).all()
    assert shrunk(label[:44, :60], picture[:44, :60])[1].shape == (44, 60, 3)


def test_a_book_of_more_than_256_codes_takes_two_bytes_a_token(model):
    sample = Photos()[0]
    _, seen = segment(model, sample["image"], model.vlm.embed_text(NAMES), (44, 60))
    seen["tokens"]["late"].index[0, 0, 0] = 300
    maps = token_data(seen, np.asarray(sample["label"]), NAMES, {**dict.fromkeys(STAGES, 256), "late": 301})
    assert maps["late"]["wide"] and not maps["mid"]["wide"]
    assert np.frombuffer(base64.b64decode(maps["late"]["index"]), "<u2")[0] == 300


def test_the_name_under_a_code_is_the_one_most_of_its_pixels_have():
    """Code 0 covers one pixel of name 0 and two of name 1, code 1 one unlabelled pixel, code 2 nothing."""
    index, label = np.array([[0, 0], [0, 1]]), np.array([[0, 1], [1, IGNORE]])
    assert most_common_names(index, label, ["a", "b"], 3) == ["b (67%)", "nothing with a name", "nothing with a name"]


def test_names_cannot_break_the_page(page):
    """A class name is anybody's text: it is shown, not run."""
    tags = Page(page).tags
    assert page.count("</script>") == 2 and ("b", {}) not in tags and "runs/&lt;x&gt;" in page and "<x>" not in page
    assert "purity &lt; 1" in page


def test_the_table_has_a_line_a_measure_and_says_what_was_not_measured():
    text = score_section(TABLE)
    assert "<tr><th>mIoU</th><td>0.500</td><td>0.010</td></tr>" in text
    assert "<tr><th>PSNR dB</th><td>21.23</td><td>-</td></tr>" in text
    assert "<tr><th>LPIPS</th><td>n/m</td><td>-</td></tr>" in text
    assert "<th>early</th><td>128</td><td>82.6</td><td>1.000</td><td>-</td><td>0.9991</td>" in text
    assert "fwIoU" not in text and "MaskCLIP row not measured: why" in text


def test_the_page_and_the_printed_table_say_every_score_alike():
    """One formatting: rFID with two decimals, "same" where both rules agree, and the codebooks' line."""
    table = json.loads(json.dumps(TABLE))
    run = next(iter(table["rows"].values()))
    run["segmentation"].update(mIoU_old_rule=0.5, absent_predicted=0)
    run["reconstruction"]["rFID"] = 12.3456
    titles, rows = eval.cells(table["rows"])
    text = score_section(table)
    for title, *texts in zip(titles, *rows.values()):
        assert f"<tr><th>{title}</th>{''.join(f'<td>{cell}</td>' for cell in texts)}</tr>" in text
    assert "<th>rFID</th><td>12.35</td>" in text and "<th>old rule</th><td>same</td>" in text
    said = "\n".join(eval.format_rows(table["rows"]))
    assert all(cell in said for cell in ("12.35", "same", "21.23", "n/m"))


def test_a_table_of_meaning_is_shown_only_beside_the_weights_it_was_measured_on(tmp_path):
    assert meaning_of(tmp_path) is None
    for k, name in enumerate(("checkpoint.safetensors", "meaning.txt")):
        (tmp_path / name).write_text("purity")
        os.utime(tmp_path / name, (1000 + k, 1000 + k))
    assert meaning_of(tmp_path) == "purity"
    os.utime(tmp_path / "checkpoint.safetensors", (2000, 2000))                           # trained on
    assert meaning_of(tmp_path) is None


def test_a_token_map_is_drawn_without_loss():
    """PNG keeps a code's colour to the last bit; JPEG is for photos."""
    drawn = palette(4)[np.array([[0, 1], [2, 3]])]
    kind, blob = data_uri(drawn).split(";base64,")
    assert kind == "data:image/png"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(blob)))) == drawn).all()


def test_san_has_scores_and_pictures_and_no_tokens(model):
    text = report(model, Photos(), TABLE, {}, {})
    assert "<h2>Scores</h2>" in text and "<h2>Tokens</h2>" not in text and "<script" not in text


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch, tmp_path):
    return fake_runs(monkeypatch, tmp_path)


def test_the_command_scores_as_eval_does_and_draws(runs, capsys):
    studies.report.main(["pat", "--compare", "san"])
    table = json.loads((runs / "pat/scores.json").read_text())
    assert list(table["rows"]) == ["FakeModel pat", "FakeModel san", "MaskCLIP, no training", "chance"]
    assert (runs / "pat/scores.txt").read_text() in capsys.readouterr().out
    assert Image.open(runs / "pat/samples.png").width == 4 + 4 * 196
    assert sorted(path.name for path in (runs / "pat").iterdir()) == [
        "pictures", "report.html", "samples.png", "scores.json", "scores.txt"]
    page = (runs / "pat/report.html").read_text()
    assert "FakeModel pat" in page and "names on masks" in page and (runs / "pat/pictures/masks.png").is_file()


def test_scores_are_kept_when_the_drawing_fails(runs, monkeypatch):
    """Scoring took the hours; a picture that cannot be drawn must not take the table with it."""
    def fail(*args, **kwargs):
        raise InputError("log.jsonl: cannot be read")
    monkeypatch.setattr(studies.report, "run_pictures", fail)
    with pytest.raises(InputError, match="log.jsonl"):
        studies.report.main(["pat"])
    assert json.loads((runs / "pat/scores.json").read_text())["rows"] and not (runs / "pat/report.html").exists()
