"""Stage 4: a budget of tokens for each step; prompts are cut in chunks, beside the rows that decode."""
