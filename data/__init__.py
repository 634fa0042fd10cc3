"""What a run sees: shards, their order, images, batches. Knows neither models nor trainer."""
