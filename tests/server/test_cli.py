import argparse
from dataclasses import dataclass
from typing import Annotated

import pytest

from minisgl import builtin, cli, launch
from stages.interface import EngineConfig


@dataclass(frozen=True, kw_only=True)
class WideConfig(EngineConfig):
    page_size: Annotated[int, "tokens a page, 100% of them"] = 16
    memory_fraction: Annotated[float, ""] = 0.9
    prefix_cache: Annotated[bool, ""] = True
    eager: Annotated[bool, ""] = False
    backend: Annotated[str | None, ""] = None


@dataclass
class FakeStage:
    EngineConfig: type[EngineConfig]


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    narrow, wide = FakeStage(EngineConfig), FakeStage(WideConfig)
    monkeypatch.setattr(cli, "load_stage", lambda number: narrow if number == 1 else wide)
    return argparse.ArgumentParser()


def parse(parser: argparse.ArgumentParser, *argv: str) -> EngineConfig:
    cli.add_engine_arguments(parser, argv)
    return cli.engine_config(parser.parse_args(argv))


def test_defaults(parser: argparse.ArgumentParser) -> None:
    assert parse(parser, "--stage", "2") == WideConfig(model=str(builtin.PATH))


def test_each_type_of_field(parser: argparse.ArgumentParser) -> None:
    flags = "--page-size 64 --memory-fraction 0.5 --no-prefix-cache --eager --backend torch --max-context 9"
    assert parse(parser, "some/model", "--stage=2", *flags.split()) == WideConfig(
        model="some/model", page_size=64, memory_fraction=0.5, prefix_cache=False, eager=True,
        backend="torch", max_context=9,
    )  # fmt: skip


def test_help_has_the_flags_of_the_chosen_stage(parser: argparse.ArgumentParser) -> None:
    cli.add_engine_arguments(parser, ["--help", "--stage", "2"])
    text = " ".join(parser.format_help().split())
    assert "--page-size INT tokens a page, 100% of them (default: 16)" in text
    assert "--max-context INT" in text
    assert "(default: none)" in text


@pytest.mark.parametrize("flags", ["--stage 1 --page-size 4", "--sta 2", "--max-context many", "--stage x"])
def test_mistakes(parser: argparse.ArgumentParser, flags: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(parser, *flags.split())
    assert caught.value.code == 2


def test_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.add_engine_arguments(argparse.ArgumentParser(), ["--stage", "99"])
    assert "there is no stage 99" in capsys.readouterr().err


def test_launch_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "Qwen/Qwen3-0.6B", "--port", "1919", "--dtype"):
        assert word in text
