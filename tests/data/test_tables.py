"""Tables, times and amounts as text."""

import pytest

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
    assert near(tmp_path / "zebras") == near(tmp_path / "no" / "photos") == ""
