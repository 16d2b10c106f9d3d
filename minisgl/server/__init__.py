"""The OpenAI-compatible server: an API process that speaks text, an engine process that speaks tokens."""
