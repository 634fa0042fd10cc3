"""The files that a run logs to."""
