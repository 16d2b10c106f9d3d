"""`python -m minisgl.shell [MODEL]`: chat in the terminal. The engine runs in this very process."""

import argparse
import secrets
import sys
from collections.abc import Generator, Mapping
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML

from minisgl.cli import add_engine_arguments, engine_config
from minisgl.llm import uninterrupted
from minisgl.requests import make_request, sampling_params
from minisgl.server.text import Choice
from stages import load_stage
from stages.interface import Engine, EngineConfig, EngineFailed, SamplingParams
from stages.stage1_naive.config import ModelConfig, find_model
from stages.stage1_naive.tokenizer import Message, Tokenizer

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves; Ctrl-C stops an answer."


class Chat:
    """One conversation with an engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._params = params
        self._messages: list[Message] = []

    def reset(self) -> None:
        self._messages.clear()

    def ask(self, question: str) -> Generator[str]:
        """The answer in pieces, as they are generated. Closing the iterator aborts it; what was said so
        far stays part of the conversation.

        Raises:
            ValueError: the conversation cannot be continued; the question is not part of it then.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        prompt = self._tokenizer.chat(messages)
        request = make_request(secrets.token_hex(8), prompt, self._params, self._tokenizer)
        with uninterrupted():
            self._engine.add(request)
        answer, said = Choice(0, request, self._tokenizer), ""
        try:
            while self._engine.has_work:
                with uninterrupted():
                    outputs = self._engine.step()
                for output in outputs:
                    answer.push(output)
                    if piece := answer.take():
                        said += piece.text
                        yield piece.text
        finally:
            with uninterrupted():
                self._engine.abort(request.id)
            self._messages = [*messages, {"role": "assistant", "content": said}]


def chat(config: EngineConfig, stage: int, given: Mapping[str, Any]) -> None:
    """Talk until /exit. What of `SamplingParams` is not `given` is the model's default.

    Raises:
        ValueError: the model cannot be served, or has no chat template.
    """
    path = find_model(config.model)
    params = sampling_params(ModelConfig.load(path).sampling_defaults, given)
    tokenizer = Tokenizer(path)
    if not tokenizer.has_chat_template:
        raise ValueError(f"{config.model} has no chat template: it completes texts, but does not chat")
    conversation = Chat(load_stage(stage).build(config), tokenizer, params)
    print(_HELP)
    session: PromptSession[str] = PromptSession()
    while True:
        try:
            question = session.prompt(HTML("<b>you&gt;</b> ")).strip()
        except KeyboardInterrupt:  # at the prompt: clear the line, as a shell does
            continue
        except EOFError:
            return
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
            print("(a new conversation)")
        elif question.startswith("/"):
            print(_HELP)
        elif question:
            _answer(conversation, question)


def _answer(conversation: Chat, question: str) -> None:
    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except ValueError as error:  # the context is full, or the template refuses
        print(f"({error}; /reset begins anew)", end="")
    finally:
        pieces.close()
    print()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minisgl.shell", description=f"Chat with a model. {_HELP}"
    )
    add_engine_arguments(parser, argv)
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the model's own, else 1)")
    parser.add_argument("--max-tokens", type=int, help="of one answer (default: until the context is full)")
    args = parser.parse_args(argv)
    try:
        given = {"temperature": args.temperature, "max_tokens": args.max_tokens}
        chat(engine_config(args), args.stage, given)
    except (ValueError, EngineFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # while it loads
        sys.exit(0)


if __name__ == "__main__":
    main()
