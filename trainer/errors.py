"""Errors that end a run."""


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do. Its last checkpoint is intact."""


class DivergedError(RunError):
    """A loss or gradient is not finite: started again as it is, the run would come to the same step."""
