"""Command-line flags made from the fields of a stage's `EngineConfig`; shared by all commands."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, cast, get_args, get_type_hints

from minisgl import builtin
from stages import LATEST, load_stage
from stages.interface import EngineConfig

_STAGE: dict[str, Any] = {"type": int, "default": LATEST, "metavar": "N"}


def add_engine_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """Add MODEL, `--stage`, and one flag for each other field of that stage's `EngineConfig`.

    `--stage` is read from `argv` (None: the process's own) beforehand, so that each stage's `--help`
    shows its own flags. This imports the stage's engine, and torch with it: the fields live there, and
    the tokenizer's library would import torch anyway. A GPU is not touched by that.
    """
    parser.allow_abbrev = False  # `--sta 2` would be read by the parser below only, or not
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--stage", **_STAGE)
    number: int = first.parse_known_args(argv)[0].stage
    try:
        config_type = load_stage(number).EngineConfig
    except ValueError as error:
        parser.error(str(error))
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder in Hugging Face format, or a hub name such as Qwen/Qwen3-0.6B "
        "(default: the small built-in model, which needs neither a network nor a GPU)",
    )
    group = parser.add_argument_group("engine")
    group.add_argument("--stage", **_STAGE, help=f"the engine to run, 1 to {LATEST} (default: {LATEST})")
    types = get_type_hints(config_type, include_extras=True)
    for field in fields(config_type):
        if field.name != "model":
            kind, text = get_args(types[field.name])  # Annotated[kind, text]
            _add_flag(group, field.name, kind, field.default, text)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The chosen stage's `EngineConfig`, from flags that `add_engine_arguments` added.

    Raises:
        ValueError: a value that the configuration itself refuses.
    """
    config_type = load_stage(args.stage).EngineConfig
    values = {field.name: getattr(args, field.name) for field in fields(config_type)}
    values["model"] = args.model or str(builtin.PATH)
    return cast(EngineConfig, config_type(**values))


def _add_flag(group: Any, name: str, kind: Any, default: object, text: str) -> None:
    """One field as a flag; its type is bool, int, float or str, or one of them or None."""
    flag = "--" + name.replace("_", "-")
    text = text.replace("%", "%%")
    if default is not MISSING:
        text += f" (default: {'none' if default is None else default})"
    alternatives = [one for one in get_args(kind) or (kind,) if one is not NoneType]
    options: dict[str, Any] = {"default": default, "required": default is MISSING, "help": text}
    if alternatives == [bool]:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    else:
        group.add_argument(flag, type=alternatives[0], metavar=alternatives[0].__name__.upper(), **options)
