"""Benchmarks of the trainer; `python -m benchmarks` runs them."""

import os

# Before torch starts its threads: those that wait must not count as CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
