"""Stage 1: a correct engine with no cache. It reads the whole sequence again for every token."""
