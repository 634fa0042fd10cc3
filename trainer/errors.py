"""Errors that end a run."""


class RunError(RuntimeError):
    """The run cannot continue; the message says why and what to do. Its last checkpoint is intact."""


class DivergedError(RunError):
    """A loss or gradient is not finite: the same run would come to the same step again."""
