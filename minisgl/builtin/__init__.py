"""The built-in model: a few million parameters that answer questions about LLM serving and this project."""

from pathlib import Path

NAME = "mini-sglang"
PATH: Path = Path(__file__).parent / "model"
