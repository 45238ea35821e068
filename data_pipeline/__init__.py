"""Raw images -> shards and a manifest -> a deterministic stream of batches. Knows no model."""
