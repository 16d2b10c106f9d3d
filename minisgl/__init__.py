"""Mini-SGLang, the product: the newest stage's engine behind an OpenAI-compatible server and a Python API."""

from minisgl.llm import LLM, Completion
from stages import load_stage
from stages.interface import Request, RequestRefused, SamplingParams

__all__ = ["LLM", "Completion", "Request", "RequestRefused", "SamplingParams", "load_stage"]
