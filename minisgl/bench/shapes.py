"""Shapes of known models, and folders that name one: the engine makes its weights, nothing is downloaded."""

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from minisgl import builtin

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,  # the models' own 40,960, and what their YaRN files stretch it to
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
}
_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3 | _sizes(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _QWEN3 | _sizes(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _QWEN3 | _sizes(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _QWEN3 | _sizes(4096, 12_288, 36, 32),
    "qwen3-14b": _QWEN3 | _sizes(5120, 17_408, 40, 40),
    "qwen3-32b": _QWEN3 | _sizes(5120, 25_600, 64, 64),
    "llama-3.2-1b": _LLAMA3 | _sizes(2048, 8192, 16, 32, tied=True),
    "llama-3.1-8b": _LLAMA3 | _sizes(4096, 14_336, 32, 32),
    "llama-3.1-70b": _LLAMA3 | _sizes(8192, 28_672, 80, 64),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="a new one, or one without a config.json")


def run(args: argparse.Namespace) -> None:
    """Write a folder that can be served, to put load on a server without a download."""
    args.folder.mkdir(parents=True, exist_ok=True)
    if (args.folder / "config.json").exists():
        raise ValueError(f"{args.folder} holds a model already: name a new folder")
    write_config(args.folder, args.shape)
    write_tokenizer(args.folder, SHAPES[args.shape]["vocab_size"])
    print(f"serve it with: python -m minisgl.launch {shlex.quote(str(args.folder))} --random-weights")


def write_config(folder: Path, name: str) -> None:
    """All that an engine with random weights reads."""
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """The built-in model's tokenizer and chat template; each further token is its own number as text."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(builtin.PATH / name, folder)
    tokenizer = json.loads((builtin.PATH / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    known = {*vocab.values(), *(added["id"] for added in tokenizer["added_tokens"])}
    vocab |= {f"<{i}>": i for i in range(vocab_size) if i not in known}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
