"""Encode, chat templates, decode: the folder that is loaded, and what of it may fail."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.stage1_naive.tokenizer import Tokenizer
from tests.checkpoints import EOS, VOCAB_SIZE, byte_tokenizer
from tests.vocabularies import KINDS, save

MARK = EOS + 1
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture
def edited(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """A folder whose tokenizer.json is changed by what is given."""

    def edit(changes: dict[str, Any]) -> Path:
        byte_tokenizer().save_pretrained(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return tmp_path

    return edit


@given(st.text())
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_read_and_not_written(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|mark|>b<|end|>")
    assert [i for i in ids if i >= 256] == [MARK, EOS]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.token(MARK) == "<|mark|>"
    assert tokenizer.token(ids[0]) == "a"


def test_ids_without_a_token_are_left_out(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab")
    assert tokenizer.decode([a, VOCAB_SIZE - 1, b, 10**6]) == "ab"
    assert tokenizer.token(VOCAB_SIZE - 1) == ""


def test_decode_takes_any_sequence_and_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tuple(tokenizer.encode("ab"))) == "ab"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("") == []


def test_the_models_prefix_is_added_once(edited: Callable[[dict[str, Any]], Path]) -> None:
    """As Llama's BOS: `encode` adds it, and a chat template writes its own."""
    bos = {"SpecialToken": {"id": "<|mark|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<|mark|>": {"id": "<|mark|>", "ids": [MARK], "tokens": ["<|mark|>"]}}
    processor = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, bos, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }
    tokenizer = Tokenizer(edited({"post_processor": processor}))
    assert tokenizer.encode("a")[0] == MARK
    assert MARK not in tokenizer.encode("a", add_special_tokens=False)
    assert MARK not in tokenizer.chat(CHAT)


def test_a_stored_truncation_or_padding_is_ignored(edited: Callable[[dict[str, Any]], Path]) -> None:
    """Fine-tuned models are saved with their training's; a prompt is never cut or padded in silence."""
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": EOS, "pad_type_id": 0, "pad_token": "<|end|>"}
    tokenizer = Tokenizer(edited({"truncation": truncation, "padding": padding}))
    assert len(tokenizer.encode("ab")) == 2
    assert len(tokenizer.encode("a long prompt")) == 13


def test_a_lone_surrogate_is_the_callers_mistake(tokenizer: Tokenizer) -> None:
    r"""JSON may hold "\ud800"; Python reads it as a string that UTF-8 cannot write."""
    with pytest.raises(ValueError, match=r"surrogate|Unicode|UTF-8"):
        tokenizer.encode("a\ud800b")


def test_chat_follows_the_template(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi <|end|>"},
        {"role": "assistant", "content": "Hé!"},
        {"role": "user", "content": "Why?"},
    ]
    text = "<system>Be kind.\n<user>Hi <|end|>\n<assistant>Hé!\n<user>Why?\n<assistant>"
    assert tokenizer.has_chat_template
    assert tokenizer.chat(messages) == tokenizer.encode(text)


def test_chat_passes_arguments_to_the_template(tmp_path: Path) -> None:
    fast = byte_tokenizer()
    fast.chat_template = "{{ 'thinking' if enable_thinking else 'plain' }}"
    fast.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.chat(CHAT)) == "plain"
    assert tokenizer.decode(tokenizer.chat(CHAT, enable_thinking=True)) == "thinking"


def test_chat_without_a_template(tmp_path: Path) -> None:
    fast = byte_tokenizer()
    fast.chat_template = None
    fast.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match=r"no chat template.*plain completions"):
        tokenizer.chat(CHAT)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "no element 5|has no"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_refuses(template: str, reason: str, tmp_path: Path) -> None:
    fast = byte_tokenizer()
    fast.chat_template = template
    fast.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"chat template refuses these messages: .*({reason})"):
        Tokenizer(tmp_path).chat(CHAT)


def test_no_tokenizer_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"could be loaded from {tmp_path}"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "Unheard"}}'])
def test_a_broken_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"could be loaded from {tmp_path}"):
        Tokenizer(tmp_path)


def test_many_threads_may_encode_and_chat(tokenizer: Tokenizer) -> None:
    texts = [f"thread {n} writes é and 漢字 {'x' * (n % 50)}" for n in range(400)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        encoded, chatted = pool.map(tokenizer.encode, texts), pool.map(tokenizer.chat, chats)
        decoded = list(pool.map(tokenizer.decode, encoded))
        written = list(pool.map(tokenizer.decode, chatted))
    assert decoded == texts
    assert written == [f"<user>{text}\n<assistant>" for text in texts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["LlamaTokenizerFast", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", None]
)
def test_the_file_decides_and_not_the_class_it_names(kind: str, name: str | None, tmp_path: Path) -> None:
    """Folders name classes of other models; `transformers` would change normalizers for them."""
    backend = KINDS[kind]()
    save(backend, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    for text in (" Paris is  the capital", "true</s> true", "café\nx = (true)"):
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == backend.decode(ids)


def test_chat_may_continue_its_last_message(tokenizer: Tokenizer) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "Sure,"}]
    going_on = tokenizer.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert going_on == "<user>Hi\n<assistant>Sure,"
    assert tokenizer.render(messages, add_generation_prompt=False) == f"{going_on}\n"
    assert tokenizer.render(messages) == f"{going_on}\n<assistant>"


def test_the_tokenizers_own_end_is_known(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.eos_token_ids == (EOS,)
    fast = byte_tokenizer()
    fast.eos_token = None
    fast.save_pretrained(tmp_path)
    assert Tokenizer(tmp_path).eos_token_ids == ()


def test_no_text_has_fewer_tokens_than_its_length_allows(tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        tokenizer = Tokenizer(save(make(), tmp_path / kind))
        longest = max((tokenizer.token(i) for i in tokenizer._known), key=len)
        assert tokenizer.longest_token >= len(longest)


def test_bad_words_are_found_where_a_text_begins_and_after_a_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(KINDS["byte level"](), tmp_path))
    begins, follows = (tokenizer.encode(text) for text in ("true", " true"))
    assert tokenizer.bad_words_ids(["true", " true"]) == [begins, follows]
    assert tokenizer.bad_words_ids([]) == []
    with pytest.raises(ValueError, match="must not be empty"):
        tokenizer.bad_words_ids(["true", ""])


def test_the_bytes_of_the_parts_of_a_character(tmp_path: Path) -> None:
    for kind in ("byte level", "sentencepiece"):
        tokenizer = Tokenizer(save(KINDS[kind](), tmp_path / kind))
        ids = tokenizer.encode("👍", add_special_tokens=False)
        data = b"".join(tokenizer.bytes_of(i, "") for i in ids if not tokenizer.token(i).isspace())
        assert data.endswith("👍".encode())


def test_encoding_lets_go_of_the_interpreter(tokenizer: Tokenizer) -> None:
    """The server's event loop goes on beside it: this thread is not asleep, it must be let run."""
    done = threading.Event()
    text = "a long text without an end " * 40_000

    def encode() -> None:
        tokenizer.encode(text)
        done.set()

    rounds, interval = 0, sys.getswitchinterval()
    sys.setswitchinterval(1000)  # from now on a thread that holds the interpreter keeps it
    try:
        threading.Thread(target=encode).start()
        while not done.wait(0.001):
            rounds += 1
    finally:
        sys.setswitchinterval(interval)
    assert rounds > 5
