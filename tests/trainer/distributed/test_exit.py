"""How a command ends with an error: a code that says whether to try again."""

import errno

import pytest

from data.errors import DataError, UnreachableError
from trainer.distributed.exit import user_errors
from trainer.errors import RunError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a setting"), 2),
        (DataError("a damaged shard"), 2),
        (FileNotFoundError(errno.ENOENT, "no such file"), 2),
        (PermissionError(errno.EACCES, "not yours"), 2),
        (UnreachableError("a server"), 1),
        (ConnectionError("a bucket"), 1),
        (TimeoutError("a server"), 1),
        (OSError(errno.ESTALE, "a file handle"), 1),
        (OSError(errno.ENOSPC, "a full disk"), 1),
        (RunError("another run"), 1),
    ],
)
def test_what_may_pass_has_another_code_than_what_is_refused(error, code, capsys):
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise error
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_what_caused_an_error_says_whether_it_may_pass():
    error = DataError("data.train: a shard cannot be read")
    error.__cause__ = OSError(errno.EIO, "a failing disk")
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise error
    assert stopped.value.code == 1
