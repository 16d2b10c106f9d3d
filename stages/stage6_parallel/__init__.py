"""Stage 6: weights in shards, one process for each, and the collectives that make them one model."""
