"""Lessons: their files, the blocks they show code with, and the pages they become."""

import re
from pathlib import Path
from typing import Any

import jupytext
import pytest
from mkdocs.exceptions import PluginError

from docs import lesson
from docs.build_lessons import execute, to_markdown
from stages.stage1_naive.engine import NaiveEngine

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "docs/stages").glob("*.py"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_begins_with_its_title(path: Path) -> None:
    cells = jupytext.read(path).cells
    assert re.match(r"# \w", cells[0].source)
    assert any(cell.cell_type == "code" for cell in cells)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_footnote_of_a_lesson_is_cited_and_explained(path: Path) -> None:
    text = path.read_text()
    explained = set(re.findall(r"^# (\[\^\w+\]):", text, re.MULTILINE))
    assert explained == set(re.findall(r"(\[\^\w+\])(?!:)", text))


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    shown: list[Any] = []
    monkeypatch.setattr(lesson, "display", shown.append)
    return shown


def test_show_prints_the_source_as_it_stands_in_its_file(displayed: list[Any]) -> None:
    lesson.show(NaiveEngine._next_token)  # decorated: it is the function inside that is shown
    block = displayed[0].data
    path, first, last = re.search(r'title="(\S+), lines (\d+) to (\d+)" linenums="\2"', block).groups()  # type: ignore[union-attr]
    lines = (ROOT / path).read_text().splitlines()[int(first) - 1 : int(last)]
    assert path == "stages/stage1_naive/engine.py"
    assert [line.strip() for line in block.splitlines()[1:-1]] == [line.strip() for line in lines]
    assert "def _next_token(" in block


def test_a_table_keeps_its_columns(displayed: list[Any]) -> None:
    lesson.table(["a", "b"], [("x|y", 1), (lesson.code("<|end|>"), 2)], "lr")
    assert displayed[0].data.splitlines() == [
        "| a | b |",
        "| :-- | --: |",
        "| x&#124;y | 1 |",
        "| <code>&lt;&#124;end&#124;&gt;</code> | 2 |",
    ]


def test_a_figure_takes_the_colour_of_the_page(displayed: list[Any]) -> None:
    figure, axis = lesson.canvas(3, 2)
    axis.plot([1, 2], [3, 4], color=lesson.BLUE)
    axis.set_title("a title")
    lesson.publish(figure, "what it shows", "A caption.")
    html = displayed[0].data
    assert "currentColor" in html
    assert lesson.BLUE in html
    assert 'aria-label="what it shows"' in html
    assert "\n" not in html
    assert "#000000" not in html


def test_the_machine_is_described_without_its_paths() -> None:
    assert str(ROOT) not in str(lesson.machine())


def test_a_lesson_becomes_a_page(tmp_path: Path) -> None:
    source = tmp_path / "lesson.py"
    source.write_text(
        "# %% [markdown]\n# # Title\n\n"
        "# %%\nimport sys\nprint('one')\nprint('progress', file=sys.stderr)\nprint('two')\n1 + 1\n\n"
        "# %% tags=['hide-input']\nfrom IPython.display import Markdown\nMarkdown('**bold**')\n"
    )
    page = to_markdown(execute(source, ROOT))
    assert page.startswith("# Title\n\n~~~~ { .python }\nimport sys")
    assert "~~~~ { .text .output }\none\ntwo\n~~~~" in page
    assert "~~~~ { .text .output }\n2\n~~~~" in page
    assert page.endswith("~~~~\n\n**bold**\n")
    assert "\nprogress" not in page


def test_a_cell_that_raises_fails_the_build(tmp_path: Path) -> None:
    source = tmp_path / "broken.py"
    source.write_text("# %%\nraise KeyError('what went wrong')\n")
    with pytest.raises(PluginError, match=r"broken\.py failed(.|\n)*what went wrong"):
        execute(source, ROOT)
