"""Classes of images: which are refused, and which every image of a grid has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_images import flat
from systems_under_test import vaegan

from data.errors import DataError
from data.shards.reader import Shards, write
from trainer.classes import check_labels, in_turn, shuffled_labels
from trainer.config.settings import DataConfig, Location
from trainer.evaluate.command import main as evaluate
from trainer.log.pictures import grid_inputs, panels

SYSTEM = vaegan("ternary", classes=3)


def test_a_label_that_is_no_class_is_named_with_its_image_and_the_setting(numbered):
    check_labels(numbered, 3, numbered.labels)
    check_labels(numbered, 0, numbered.labels - 1)
    with pytest.raises(DataError, match=r"002.* has label 2, but system\.classes is 2, so every .* from 0 to 1 "):
        shuffled_labels(vaegan(classes=2), numbered, 0)
    with pytest.raises(DataError, match=r"044.* has no label, but system\.classes is 3, so every image needs a label"):
        check_labels(numbered, 3, np.array([0, 2, -1]), np.array([40, 43, 44]))


@pytest.fixture
def named(tmp_path):
    """Shards of two classes, whose names a dataset.json has."""

    def make(*classes: str) -> Path:
        folder = tmp_path / "-".join(classes)
        write(folder / "all", ({"__key__": f"{i:02d}", "png": flat(i), "cls": str(i % 2)} for i in range(24)))
        (folder / "dataset.json").write_text(json.dumps({"classes": classes, "by": "another program"}))
        return folder / "all"

    return make


def test_held_out_images_whose_labels_name_other_classes_are_refused(here, named, tmp_path):
    command = ["--system", "VAEGAN", "--trainer.steps", "1", "--trainer.run_dir", tmp_path / "run"]
    command += ["--data.train", named("ant", "bee", "cat"), "--data.test"]
    done = here(*command, named("bee", "cat"), "--system.classes", "3")
    assert done.returncode == 2
    assert "error: data.test: label 0 is the class bee, but ant in data.train, and system.classes" in done.stderr
    assert here(*command, named("ant", "bee"), "--system.classes", "3").returncode == 0, "labels name the same classes"
    done = here(*command, named("bee", "cat"), "--trainer.run_dir", tmp_path / "other")
    assert done.returncode == 0, "the system is not told the labels"


def test_images_to_score_against_whose_labels_name_other_classes_are_refused(tiny_run, named, capsys):
    for against in (named("1", "0"), named("1", "0").parent / "all" / "00000.tar"):
        with pytest.raises(SystemExit, match="2"):
            evaluate([str(tiny_run("GAN")), "--against", str(against)])
        told = f"error: --against {against}: label 0 is the class 1, but 0 in data.train"
        assert told in capsys.readouterr().err


def test_shuffled_labels_have_the_shares_of_the_images(numbered):
    labels = shuffled_labels(SYSTEM, numbered, 7)
    assert sorted(labels) == sorted(numbered.labels)
    assert labels.tolist() != numbered.labels.tolist()
    (shown,) = in_turn(SYSTEM, torch.arange(150), labels)
    assert torch.bincount(shown).tolist() == [51, 51, 48]
    assert torch.equal(*in_turn(SYSTEM, torch.tensor([100, 3]), labels), shown[[100, 3]])
    assert not in_turn(vaegan(), torch.arange(3), None)
    assert shuffled_labels(vaegan(), numbered, 7) is None


@pytest.mark.parametrize(
    ("classes", "row", "column"), [(3, 12, [0, 1, 2] * 4), (10, 10, range(10)), (40, 12, range(12))]
)
def test_each_column_of_a_grid_is_of_one_class(tmp_path, classes, row, column):
    write(tmp_path / "set", ({"__key__": f"{i:02d}", "png": flat(i), "cls": str(i)} for i in range(classes)))
    system, seen = vaegan(classes=classes), []
    system.decoder.register_forward_hook(lambda _, given, made: seen.append(given[1]))
    data = DataConfig(Location(""), None, 32, 1)
    inputs = grid_inputs([Shards(tmp_path / "set")], data, 0, system, torch.device("cpu"), draws=True)
    made = panels(system, inputs)
    reconstructed, generated = seen
    assert torch.equal(reconstructed, inputs.real[0][:, 0, 0, 0].long()), "with their own labels"
    assert generated.unflatten(0, (-1, row)).unique(dim=0).tolist() == [[*column]]
    assert len(made["generated"]) == 48 // row * row
