"""What processes of test_remote.py do; they import no more than this."""

import numpy as np

from data.shards.cache import Cache
from data.shards.reader import Shards

SHARDS, SAMPLES = 12, 10
ALL = np.arange(SHARDS * SAMPLES)


def read_all(source: str, cache: str, limit: int, seed: int) -> list[bytes]:
    """Every sample, in an order of its own, some at a time."""
    shards, order = Shards(source, cache=Cache(cache, limit)), np.random.default_rng(seed).permutation(ALL)
    found = {}
    for part in np.array_split(order, 40):
        found |= dict(zip(part.tolist(), shards.images(part)[0], strict=True))
    return [found[i] for i in ALL.tolist()]
