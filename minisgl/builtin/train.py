"""Trains the built-in model on its corpus. The same seed and machine give the same model."""

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from minisgl.builtin import PATH, corpus, evaluate, outside
from minisgl.builtin.chats import CONTEXT, END, PAD, TEMPLATE, Batch, Chats, answers_of, train_tokenizer
from minisgl.builtin.corpus import Entry, HeldOut
from minisgl.builtin.muon import Muon
from minisgl.builtin.outside import Kind


@dataclass(frozen=True)
class Recipe:
    """The shape of the model, and how it learns. The defaults make the one that ships: 5.7M parameters."""

    vocabulary: int = 3072
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 768
    steps: int = 5400
    answers: int = 1024  # to learn in a step; see `Chats`
    peak: float = 2e-3  # learning rate
    warmup: int = 200  # steps
    naming: float = 0.5  # weight of the loss of naming the answer, see `train`
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate: a straight rise to the peak, then half a cosine down to zero."""
        fraction = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * min((step + 1) / self.warmup, (1 + math.cos(math.pi * fraction)) / 2)


def train(
    recipe: Recipe,
    entries: Sequence[Entry],
    held_out: HeldOut,
    kinds: Sequence[Kind],
    out: Path,
    device: torch.device,
    workers: int = 0,
) -> None:
    """Trains a tokenizer and a model on `entries` and questions of the `kinds` that lie outside, and writes
    the folder `out` in Hugging Face's layout.

    No variation of a question is trained on that equals one of `held_out`.

    Besides the tokens of an answer, the model learns to name it: a matrix that is thrown away afterwards
    tells from the last token before an answer which of all it is. An answer's first token says little about
    that, since many begin alike.
    """
    tokenizer = train_tokenizer(entries, kinds, recipe.vocabulary, recipe.seed)
    chats = Chats(tokenizer, entries, held_out, kinds, recipe.answers, recipe.seed)
    on_gpu = device.type == "cuda"
    loader = DataLoader(chats, None, sampler=range(recipe.steps), num_workers=workers, pin_memory=on_gpu)
    torch.manual_seed(recipe.seed)
    model = _model(recipe, tokenizer).to(device)
    naming = torch.nn.Linear(recipe.hidden, len(answers_of(entries)), bias=False).to(device)
    optimizers = _optimizers(model, naming)
    start = shown = time.perf_counter()
    seen = 0
    for step, batch in enumerate(loader):
        batch = Batch(*(part.to(device, non_blocking=True) for part in batch))
        for optimizer, share in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * recipe.rate(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):  # the weights stay in float32
            # The padding is on the right, where the causal mask hides it: no other mask is needed.
            hidden = model.model(batch.tokens, attention_mask={"full_attention": None}, use_cache=False)[0]
            hidden = hidden.flatten(0, 1)[batch.before]  # [learned, hidden]
            logits = model.lm_head(hidden)  # [learned, vocabulary]
            names = naming(hidden[batch.first])  # [answers, all answers]
        loss = F.cross_entropy(logits.float(), batch.targets)
        named = F.cross_entropy(names.float(), batch.keys)
        torch.autograd.backward(loss + recipe.naming * named)
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *naming.parameters()], 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += batch.tokens.numel()
        if (now := time.perf_counter()) - shown > 5 or step + 1 == recipe.steps:
            shown, spent = now, now - start
            left = spent / (step + 1) * (recipe.steps - step - 1)
            print(
                f"step {step + 1}/{recipe.steps}: loss {loss.item():.4f}, of names {named.item():.4f}, "
                f"{seen / spent:,.0f} tokens/s, {spent:.0f} s, {left:.0f} s to go",
                flush=True,
            )
    _save(model, tokenizer, out)


def _model(recipe: Recipe, tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3 with fresh weights in float32."""
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=128,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config).train()


def _optimizers(
    model: Qwen3ForCausalLM, naming: torch.nn.Linear
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the layers' matrices, AdamW for the rest, each with its share of the learning rate. With Muon
    the answers to questions never seen are right far sooner."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    decayed = [model.model.embed_tokens.weight, naming.weight]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return [
        (Muon(matrices, weight_decay=0.1), 2.0),
        (torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True), 1.0),
    ]


def _save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Weights in bfloat16, configuration, tokenizer and chat template."""
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=[end, pad], pad_token_id=pad, do_sample=True, temperature=0.7
    )
    model.to(torch.bfloat16).save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)


def main() -> None:
    """Trains, then asks the model one question of each entry, and all that are held out."""
    spare = (os.cpu_count() or 1) - 2
    parser = argparse.ArgumentParser(prog="python -m minisgl.builtin.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=PATH, help="folder to write (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="default: %(default)s")
    parser.add_argument(
        "--answers", type=int, default=Recipe.answers, help="in a step (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=max(0, min(12, spare)), help="processes that make batches"
    )
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel already
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads it
    torch.backends.cuda.enable_cudnn_sdp(False)  # their backward passes are not deterministic
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    recipe = Recipe(steps=args.steps, answers=args.answers, seed=args.seed)
    entries = corpus.load()
    held_out, kinds = corpus.load_held_out(entries), outside.load()
    train(recipe, entries, held_out, kinds, args.out, torch.device(args.device), args.workers)
    ways = evaluate.ways_to_ask(entries, held_out, kinds)
    evaluate.show(evaluate.measure(evaluate.Answerer(args.out, args.device), ways, answers_of(entries)))


if __name__ == "__main__":
    main()
