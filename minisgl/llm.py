"""`LLM`: many prompts in, many answers out, in this process, without a server."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from tqdm import tqdm

from minisgl import builtin
from minisgl.requests import make_request, sampling_params
from stages import LATEST, load_stage
from stages.interface import EngineFailed, FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from stages.stage1_naive.config import ModelConfig, find_model
from stages.stage1_naive.detokenizer import Detokenizer
from stages.stage1_naive.tokenizer import Message, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]  # text, token ids, or a chat
Params = SamplingParams | Mapping[str, Any]  # a mapping leaves the rest to the model's own defaults


@dataclass
class Completion:
    """The answer to one prompt."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # the stop token too, if one ended it
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a token, if they were asked for
    prompt_logprobs: Sequence[
        TokenLogprobs
    ] = ()  # of all prompt tokens but the first, if they were asked for
    finish_reason: FinishReason | None = None  # "error": no token could be drawn, see `TokenOutput`


class LLM:
    """A model and its tokenizer, ready to generate.

    `model` is a folder in Hugging Face format or a hub name; without one it is the built-in model.
    `stage` chooses the engine, and `options` are fields of that stage's `EngineConfig`.

    Raises:
        ValueError: the model or an option cannot be served; the message says why.
    """

    def __init__(self, model: str | None = None, *, stage: int = LATEST, **options: Any) -> None:
        path = find_model(model or str(builtin.PATH))
        self._defaults = ModelConfig.load(path).sampling_defaults  # or names what is wrong with the folder
        self.tokenizer = Tokenizer(path)
        engine = load_stage(stage)
        try:
            config = engine.EngineConfig(model=str(path), **options)
        except TypeError as error:
            raise ValueError(f"stage {stage} cannot have these options: {error}") from error
        self._engine = engine.build(config)
        self._failure: Exception | None = None  # of a step: pages that it left in the cache may be empty

    def get_default_sampling_params(self) -> SamplingParams:
        """How the model's generation_config.json wants it sampled: what `generate` does without `params`."""
        return sampling_params(self._defaults, {})

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        params: Params | Sequence[Params] | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts.

        `params` are for all prompts, or one for each; `progress` shows a bar. What a mapping such as
        {"max_tokens": 20} leaves out is the model's default; a `SamplingParams` says everything.

        Raises:
            ValueError: a prompt cannot be served, or `params` are not as many as `prompts`; nothing was
                generated then.
            EngineFailed: the engine failed, now or before.
        """
        if self._failure is not None:
            raise EngineFailed(f"a step failed before ({self._failure!r}): make a new LLM") from self._failure
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts are a text, or a list of prompts, not {prompts!r}")
        params = {} if params is None else params
        each = [params] * len(prompts) if isinstance(params, SamplingParams | Mapping) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts were given, but params for {len(each)}")
        completions = {str(i): Completion(self._token_ids(prompt)) for i, prompt in enumerate(prompts)}
        try:
            for (name, completion), one in zip(completions.items(), each, strict=True):
                params = one if isinstance(one, SamplingParams) else sampling_params(self._defaults, one)
                request = make_request(name, completion.prompt_token_ids, params, self.tokenizer)
                with uninterrupted():
                    self._engine.add(request)
            self._run(completions, progress)
        finally:  # refused or interrupted: leave an idle engine behind
            with uninterrupted():
                for name in completions:
                    self._engine.abort(name)
        return list(completions.values())

    def close(self) -> None:
        """End the processes of an engine that has some (`tp`); nothing can be generated afterwards."""
        self._engine.close()

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence):
            if len(ids := [item for item in prompt if isinstance(item, int)]) == len(prompt):
                return ids
            if len(messages := [item for item in prompt if _is_message(item)]) == len(prompt):
                return self.tokenizer.chat(messages)
        raise ValueError(
            "a prompt is a text, a list of token ids or a list of messages, each with a role and a content "
            f"in text, not {prompt!r}"
        )

    def _run(self, completions: Mapping[str, Completion], progress: bool) -> None:
        with tqdm(total=len(completions), unit="prompt", disable=not progress) as bar:
            tokens = 0
            while self._engine.has_work:
                for output in self._step():
                    tokens += 1
                    self._append(completions[output.request_id], output)
                    bar.update(output.finish_reason is not None)
                bar.set_postfix(tokens=tokens, refresh=False)
        for completion in completions.values():
            shown = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
            text = Detokenizer(self.tokenizer, completion.prompt_token_ids)
            completion.text = "".join(map(text.push, shown)) + text.flush()

    def _step(self) -> list[TokenOutput]:
        try:
            with uninterrupted():
                return self._engine.step()
        except Exception as error:
            self._failure = error
            raise

    @staticmethod
    def _append(completion: Completion, output: TokenOutput) -> None:
        completion.finish_reason = output.finish_reason
        if output.finish_reason == "error":
            return
        completion.token_ids.append(output.token_id)
        if output.logprobs is not None:
            completion.logprobs.append(output.logprobs)
        completion.prompt_logprobs = output.prompt_logprobs or completion.prompt_logprobs


def _is_message(item: object) -> TypeGuard[Message]:
    return isinstance(item, Mapping) and type(item.get("role")) is type(item.get("content")) is str


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. An engine that was left in the middle of a step would have pages
    in its cache that were never computed."""
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted
        yield
        return
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed.is_set():
        signal.raise_signal(signal.SIGINT)
