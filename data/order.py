"""Which samples a step sees: arithmetic on (seed, step), the same for any world size, worker count and history."""

import functools

import numpy as np

from data.shards import DataError


@functools.lru_cache(maxsize=4)
def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), a pure function of n and key.

    From a bit generator's raw output: numpy keeps that stable between versions, `Generator.permutation` it does not.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n).argsort(kind="stable")


class Order:
    """Epochs over n samples in global batches; every sample at most once an epoch.

    The n % batch samples that fill no batch are left out; each epoch's permutation leaves out others.

    Args:
        n: samples
        batch: global batch size
        seed: of the permutations

    Raises:
        DataError: there are fewer samples than one batch.
    """

    def __init__(self, n: int, batch: int, seed: int):
        if n < batch:
            raise DataError(f"{n} training images fill no batch of trainer.batch_size {batch}: lower it, or bring more")
        self.n, self.batch, self.seed = n, batch, seed
        self.steps_per_epoch = n // batch

    def __getitem__(self, step: int) -> np.ndarray:
        """int64 [batch]: positions of the samples of a global step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return permutation(self.n, self.seed, epoch)[within * self.batch : (within + 1) * self.batch]
