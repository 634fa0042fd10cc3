"""What a user is told of data."""


class DataError(RuntimeError):
    """The data is missing or damaged; the message says where, what was found and what to do."""
