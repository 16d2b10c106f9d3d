"""Stage 2: a paged KV cache and continuous batching. Many requests at once, memory without holes."""
