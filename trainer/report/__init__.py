"""One page about runs: how they differ, what they logged, scored and drew, and whether they look healthy."""
