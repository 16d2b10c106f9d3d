"""Mini-SGLang, the product: the newest stage's engine behind an OpenAI-compatible server and a Python API."""
