"""Small random checkpoints, one of each model family, written by `transformers` as real ones are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 320  # 256 bytes, and some ids without a token
EOS = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "initializer_range": 0.3,  # wide, so that attention is not flat and a wrong position shows
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    config: Any
    model: Any
    settings: dict[str, Any]


FAMILIES = {
    "llama": Family(LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama3-rope": Family(
        LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}
    ),
    "qwen2": Family(Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": Family(MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
}


def write_checkpoint(
    path: Path, family: str, *, seed: int = 0, shards: bool = False, **settings: Any
) -> Path:
    """A random model and a byte tokenizer in `path`; `settings` override the shape. Returns `path`."""
    torch.manual_seed(seed)
    kind = FAMILIES[family]
    model = kind.model(kind.config(**{**_SHAPE, **kind.settings, **settings}))
    with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(path, max_shard_size="100KB" if shards else "1GB")
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; id 256 is the end, 257 a special token without text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|mark|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
