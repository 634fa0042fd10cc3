"""Times as text, and what the name of a source stands for."""

import pytest

from data.dataset import held_out_of
from data.errors import DataError
from data.files import near
from data.tables import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (4940, "1 h 22 min"),
        (86399, "23 h 59 min"),
        (7200, "2 h"),
        (270000, "3 d 3 h"),
    ],
)
def test_a_time_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_a_missing_folder_names_the_one_that_is_like_it(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "cats").mkdir()
    assert near(tmp_path / "photo") == f" (did you mean {tmp_path / 'photos'}?)"
    assert near(tmp_path / "photos") == ""
    assert near(tmp_path / "zebras") == near(tmp_path / "no" / "photos") == ""


def test_a_prepared_folder_stands_for_its_held_out_images(tmp_path):
    source = str(tmp_path)
    assert held_out_of(source) == source
    assert held_out_of("s3://bucket//images") == "s3://bucket//images"
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"has no held-out images: name a split, such as .*train$"):
        held_out_of(source)
    for split in ("validation", "test"):
        (tmp_path / split).mkdir()
        assert held_out_of(source) == str(tmp_path / split)
    assert held_out_of(f"{source}/train") == f"{source}/train"
