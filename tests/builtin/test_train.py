"""A small training run on the CPU learns its entries and writes a folder that transformers loads."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from minisgl.builtin import chats, outside
from minisgl.builtin.corpus import Entry, HeldOut
from minisgl.builtin.evaluate import Answerer, measure, ways_to_ask
from minisgl.builtin.outside import Kind
from minisgl.builtin.train import Recipe, train

ENTRIES = [
    Entry(
        "radix",
        ("What is a radix cache?", "Explain the radix cache."),
        "A cache of prefixes.",
        {"why": "Prompts begin alike."},
    ),
    Entry("seed", ("What does the seed do?", "seed?"), "It makes an answer repeatable."),
    Entry("port", ("How do I change the port?", "which port"), "Use `--port 8000`."),
    Entry("hello", ("Hello", "Good morning"), "Hello! Ask me something."),
]
KINDS = [Kind("food", ("how do I cook {dish}?", "{dish} recipe"), {"dish": ["rice", "soup"]})]
HELD_OUT = HeldOut((("port", "how to get another port"),), (("why", "and the reason?"),), ("rice please",))
SHAPE = {"vocabulary": 400, "hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 128}
RECIPE = Recipe(**SHAPE, steps=200, answers=24, warmup=10)


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    """So that a small run learns them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "ANSWER", "I do not know.")
        patch.setattr(chats, "NOTHING_MORE", "That is all.")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    train(RECIPE, ENTRIES, HeldOut(), KINDS, path, torch.device("cpu"))
    return path


def test_it_learns_every_question(folder: Path) -> None:
    ways = ways_to_ask(ENTRIES, HELD_OUT, KINDS, each=None)
    scores = measure(Answerer(folder, "cpu"), ways, chats.answers_of(ENTRIES))
    assert scores["as it stands"].failures == []
    assert scores["system prompt"].failures == []
    assert scores["third question"].failures == []
    assert scores["varied"].ended == scores["varied"].asked == 8
    assert scores["outside"].failures == []
    for way in ("held out", "held-out follow-up", "held-out outside"):
        assert scores[way].asked == 1
    assert scores["at temperature 0.7"].asked == 8


def test_the_folder_is_complete(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "qwen3"
    assert config.dtype == torch.bfloat16
    assert config.head_dim == 128
    assert config.tie_word_embeddings


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=3)
    for name in ("one", "two"):
        train(recipe, ENTRIES, HeldOut(), KINDS, tmp_path / name, torch.device("cpu"))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_answer_that_does_not_end_is_none(folder: Path) -> None:
    assert Answerer(folder, "cpu")([[{"role": "user", "content": "Hello"}]], max_tokens=2) == [None]


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [Recipe().rate(step) for step in range(Recipe.steps + 1)]
    assert max(rates) == rates[Recipe.warmup] == Recipe.peak
    assert rates[0] == Recipe.peak / Recipe.warmup
    assert rates[-1] == pytest.approx(0, abs=1e-9)
