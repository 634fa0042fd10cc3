"""Errors of the data."""

from data.redact import redacted


class DataError(RuntimeError):
    """The data is missing or damaged; the message says where, what was found and what to do, without credentials."""

    def __str__(self) -> str:
        return redacted(super().__str__())
