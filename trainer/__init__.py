"""How a run goes: the only package that knows accelerate."""

import os

# On a CPU, torch's threads wait for each other by asking again and again, for milliseconds, which takes the cores from
# other programs and from the threads they wait for. After 10,000 turns, a fraction of a millisecond, they sleep: this
# costs nothing on an idle machine. GNU's OpenMP library reads the variable when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
