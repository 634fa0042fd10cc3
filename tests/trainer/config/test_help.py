"""The help of settings: types, defaults and values in plain words."""

import re
from typing import Literal

import pytest
from jsonargparse.typing import PositiveInt

from trainer.config.parser import configure
from trainer.config.words import type_in_words, value_in_words

PYTHON = re.compile(r"\b(Union|Optional|Literal|class|None|True|False|\w+Int|\w+Float|Location|tuple)\b[\[' ,;)]")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--system.help", "VAEGAN"], ["--system.help", "VAEGAN", "--system.binary.help"]],
    ids=" ".join,
)
def test_help_speaks_of_types_and_defaults_in_plain_words(capsys, words):
    with pytest.raises(SystemExit) as left:
        configure(words)
    assert left.value.code == 0
    brackets = re.findall(r"\(([^()]*; default: [^()]*)\)", " ".join(capsys.readouterr().out.split()))
    assert len(brackets) >= 14
    assert not [text for text in brackets if PYTHON.search(f"{text})")]


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ("--system VAEGAN --system.ternary.help", "--system.ternary.r1_weight"),
        ("--system=VAEGAN --system GAN --system.binary.help", "--system.binary.r1_weight"),
        ("--system AE --system.autoencoder.help", "--system.autoencoder.lr"),
    ],
)
def test_a_player_has_help_with_or_without_its_system(capsys, words, setting):
    with pytest.raises(SystemExit) as left:
        configure(words.split())
    assert left.value.code == 0
    assert f"\n  {setting} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--system.binary.help", "error: --system.binary.help needs the system's name: --system NAME"),
        ("--config recipe.yaml --system.binary.help", "error: --system.binary.help needs the system's name"),
        (
            "--system VAE --system.binary.help",
            "error: --system.binary.help: VAE has no binary; it has networks, auto",
        ),
        ("--system NO --system.binary.help", "error: system must be one of AE, CycleGAN"),
    ],
)
def test_help_that_there_is_not_is_an_error_that_says_what_there_is(capsys, words, message):
    with pytest.raises(SystemExit) as left:
        configure(words.split())
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_help_leaves_out_what_follows_from_the_data_and_names_the_help_of_players(capsys):
    with pytest.raises(SystemExit):
        configure(["--system.help", "VAEGAN"])
    said = " ".join(capsys.readouterr().out.split())
    assert "image_size" not in said
    assert "(settings, which --system.ternary.help lists; default: null)" in said
    assert said.startswith("usage: main.py --system NAME [--system.SETTING VALUE ...] ")


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (PositiveInt, "whole number above 0"),
        (PositiveInt | None, "whole number above 0, or null"),
        (Literal["real", "not_own"], "real or not_own"),
        (tuple[float, int], "[number, whole number]"),
        (tuple[int, ...], "[whole number, ...]"),
        (list[str] | bool, "[text, ...], or true or false"),
    ],
)
def test_types_in_words(hint, words):
    assert type_in_words(hint) == words


@pytest.mark.parametrize(
    ("value", "words"), [(None, "null"), (False, "false"), (0, "0"), ((0.5, True), "[0.5, true]"), ([], "[]")]
)
def test_values_in_words(value, words):
    assert value_in_words(value) == words
