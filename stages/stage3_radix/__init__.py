"""Stage 3: a radix tree over the pages, so that a prefix is computed once and shared by everyone."""
