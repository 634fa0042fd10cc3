"""The model card: what it states, and that no text of a run's folder becomes markup."""

import json
import re
import shutil

import pytest
import yaml
from conftest import reseal
from markdown_it import MarkdownIt

from models.load import checkpoint_of
from trainer.export.card import plain, score_rows
from trainer.export.command import main

HOSTILE = [
    *("<script>alert(1)</script>", "[here](javascript:alert)", "![](https://evil.example/x.png)", "`code` **bold**"),
    *(
        "www.evil.example",
        "https://evil.example",
        "me@evil.example",
        "| a | b |",
        "# head",
        "&lt;b&gt;",
        "$x$",
        "~~a~~",
    ),
    *("a\n\n# head\n\n<img src=x>", "```\n</details><img src=x>", "\x1b[2J", "---\nlicense: mit", "<!-- ", "\\"),
]


def rendered(card: str) -> str:
    """A card's body as HTML, by a renderer that lets HTML through and links addresses, as the hub's may."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(card.split("---\n", 2)[2])


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_shown_as_it_is(text):
    shown = rendered(f"---\n---\n\na {plain(text)} z\n\n| a |\n|---|\n| {plain(text)} z |\n")
    assert not {*re.findall(r"<(\w+)", shown)} - {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert not re.search(r"https?://|www\.|\w@\w", plain(text)), "renderers link addresses"
    assert "\n" not in plain(text)


def test_the_scores_say_by_what_and_on_how_many_images_they_were_measured():
    scores = {"eval/fid2k/demo-cnn-v1": 1.234, "eval/psnr359": 21.06, "eval/fid50/a2b/inception-v3": 9.0}
    scores |= {"eval/seconds": 3.0, "<b>": 1.0, "eval/fid2k/<b>": float("nan"), "eval/density2k/x/y": 0.5}
    scores |= {"eval/kid2k/a": 0.1, "eval/kid_std2k/a": 0.02, "eval/unheard5": 1.0, "eval/z_recovered64": -0.2}
    rows = [tuple(row.values()) for row in score_rows(scores)]
    assert rows == [
        ("FID ↓", "1.23", "2,000", "demo-cnn-v1"),
        ("PSNR ↑", "21.1", "359", ""),
        ("FID ↓ (a2b)", "9.00", "50", "inception-v3"),
        ("FID ↓", "nan", "2,000", "<b>"),
        ("density ↑", "0.50", "2,000", "x/y"),
        ("KID ↓", "0.1000 ± 0.0200", "2,000", "a"),
        ("unheard", "1", "5", ""),
        ("z recovered (R²) ↑", "-0.20", "64", ""),
    ]


@pytest.mark.parametrize("place", ["scores", "manifest"])
def test_no_text_of_a_strangers_run_becomes_markup(tiny_run, tmp_path, place, capsys):
    checkpoint = shutil.copytree(checkpoint_of(tiny_run("VAEGAN")), tmp_path / "checkpoint")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    if place == "scores":
        scores = {"scores": {f"eval/fid2k/{text}": 1.0 for text in HOSTILE}, "evaluation": {"held_out_images": "<b>"}}
        (checkpoint / "scores.json").write_text(json.dumps(scores))
    else:
        for text in HOSTILE:
            manifest["configuration"]["trainer"][text] = text
        manifest["configuration"]["data"]["train"] = f"s3://{HOSTILE[0]}{HOSTILE[1]}/x/train"
        manifest["data"] = [one | {"fingerprint": "\n\n".join(HOSTILE)} for one in manifest["data"]]
        reseal(checkpoint, configuration=manifest["configuration"], data=manifest["data"])
    main([str(checkpoint), str(tmp_path / "out"), "--num", "0", "--license", "mit\ntags: [x]"])
    assert "names no licence" not in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    shown = rendered(card)
    known = {"p", "table", "thead", "tbody", "tr", "th", "td", "h1", "h2", "pre", "code", "details", "summary", "img"}
    assert not {*re.findall(r"<(\w+)", shown)} - known
    assert re.findall(r"<img.*?>", shown) == ['<img src="pictures.png" alt="generated" />']
    assert shown.count("<details>") == shown.count("</details>") == 1
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "mit\ntags: [x]"
    assert metadata["tags"] == ["vaegan-trainer", "safetensors", "vaegan"]


@pytest.mark.parametrize(("held_out", "warned"), [(99, True), (100, False)])
def test_scores_by_few_images_are_warned_of(tiny_run, tmp_path, held_out, warned, capsys):
    checkpoint = shutil.copytree(checkpoint_of(tiny_run("VAEGAN")), tmp_path / "checkpoint")
    evaluation, scores = {"held_out_images": held_out}, dict.fromkeys(["eval/fid2k/a", "eval/coverage2k/a"], 1.0)
    (checkpoint / "scores.json").write_text(json.dumps({"scores": scores, "evaluation": evaluation}))
    main([str(checkpoint), str(tmp_path / "out"), "--num", "0"])
    assert "the model card names no licence, which --license NAME adds" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| FID ↓ | 1.00 |" in card
    assert ("| coverage ↑ | 1.00 |" in card) != warned
    assert ("**Warning: only 99 images are held out, and scores by fewer than 100 say" in card) == warned
    assert "vaegan-trainer (in a clone of its repository: `pip install .`)" in card


def test_settings_that_are_nested_too_deeply_are_refused(tiny_run, tmp_path, capsys):
    checkpoint = shutil.copytree(checkpoint_of(tiny_run("VAEGAN")), tmp_path / "checkpoint")
    configuration = json.loads((checkpoint / "manifest.json").read_text())["configuration"]
    deep: list = []
    for _ in range(400):
        deep = [deep]
    configuration["trainer"]["unheard"] = deep
    reseal(checkpoint, configuration=configuration)
    with pytest.raises(SystemExit) as stopped:
        main([str(checkpoint), str(tmp_path / "out"), "--num", "0"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: the settings in {checkpoint} are nested too deeply\n"
    assert not (tmp_path / "out").exists()


def test_a_card_has_no_credentials_and_no_folders_of_this_machine(tiny_run, tmp_path):
    checkpoint = shutil.copytree(checkpoint_of(tiny_run("VAEGAN")), tmp_path / "checkpoint")
    configuration = json.loads((checkpoint / "manifest.json").read_text())["configuration"]
    configuration["data"]["test"] = "https://user:secret@host/set/test?signature=secret"
    reseal(checkpoint, configuration=configuration)
    main([str(checkpoint), str(tmp_path / "out"), "--num", "0", "--full"])
    written = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".md", ".yaml")}
    assert written.keys() == {"README.md", "config.yaml"}
    assert "secret" not in "".join(written.values()) + (tmp_path / "out" / "manifest.json").read_text()
    assert "https://***@host/set/test?***" in written["README.md"]
    assert configuration["data"]["train"] not in written["README.md"]
    assert "digits: 1,438 images" in written["README.md"]
