"""What a run sees: shards, their order, images, batches. Knows neither models nor trainer."""

from data.shards import DataError

__all__ = ["DataError"]
