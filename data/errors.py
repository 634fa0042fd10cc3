"""Errors of the data."""

from data.redact import redacted


class DataError(RuntimeError):
    """The data is missing or damaged; the message says where, what was found and what to do, without credentials."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class UnreachableError(DataError):
    """Remote data could not be fetched for a reason that may be temporary, such as a server that is down."""
