"""What lessons show things with: source from the repository, tables, figures and this machine."""

import __future__

import ast
import inspect
import io
import logging
import os
import platform
import re
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import torch
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure

from minisgl.bench.record import commit, cpu

ROOT = Path(__file__).resolve().parent.parent

# Colours that stand out on white and on the dark palette alike.
BLUE, ORANGE, GREY = "#3d8bd4", "#dd7a2b", "#8b929b"
GREEN, RED, PURPLE, TEAL = "#4d9e58", "#d0505c", "#9a6fc4", "#2f9c9c"
_INK = "#010203"  # what is drawn in this takes the colour of the page's text, light or dark
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "mini-sglang",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": _INK for part in ("edgecolor", "labelcolor", "titlecolor")},
}
matplotlib.rcParams.update(_STYLE)


def show(thing: Callable[..., Any] | type) -> None:
    """The source of a function, method or class, titled with its file and numbered as it is there."""
    lines, first = inspect.getsourcelines(inspect.unwrap(thing))
    path = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "").resolve().relative_to(ROOT)
    code = textwrap.dedent("".join(lines)).rstrip()
    last = first + len(lines) - 1
    title = f"{path.as_posix()}, lines {first} to {last}"
    display(Markdown(f'~~~~ {{ .python title="{title}" linenums="{first}" }}\n{code}\n~~~~'))


def kernels(file: str) -> SimpleNamespace:
    """What a file of Triton kernels below `stages/` defines, without its imports: to look at, and to call
    what is plain Python."""
    path = ROOT / "stages" / file
    body = [
        node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names: dict[str, Any] = {
        "logging": logging,
        "triton": SimpleNamespace(jit=lambda f=None, **_: f or (lambda g: g)),
        "tl": SimpleNamespace(constexpr=lambda x: x),
    }
    module = compile(ast.Module(body, []), str(path), "exec", __future__.annotations.compiler_flag)
    exec(module, names)
    return SimpleNamespace(**names)


def table(header: Sequence[str], rows: Sequence[Sequence[object]], align: str = "") -> None:
    """A table; `align` has one letter a column: l, c or r (left where it is empty)."""
    rules = {"l": ":--", "c": ":-:", "r": "--:"}
    lines = [list(header), [rules[letter] for letter in align or "l" * len(header)], *rows]
    cells = (" | ".join(str(cell).replace("|", "&#124;") for cell in line) for line in lines)
    display(Markdown("\n".join(f"| {line} |" for line in cells)))


def token(text: str) -> str:
    """A token for a table or an axis: blanks and line ends made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def code(text: str) -> str:
    """`text` as inline code in a cell of a table."""
    return f"<code>{escape(text)}</code>"


def canvas(width: float, height: float, columns: int = 1, rows: int = 1, **axes: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes (an array of them where there are several)."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **axes)


def publish(figure: Figure, alt: str, caption: str) -> None:
    """Put the figure into the page as SVG that follows its palette; `alt` is for who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # a hundredth of a point is enough
    svg = " ".join(svg.replace(_INK, "currentColor").split())  # no blank line: Markdown ends its HTML there
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
    # the search should not find the numbers on the axes
    figure_html = f'<figure class="plot" data-search-exclude>{svg}<figcaption>{caption}</figcaption></figure>'
    display(HTML(figure_html))


def machine() -> list[tuple[str, str]]:
    """What the numbers of a page were measured on: rows for a table."""
    return [
        ("CPU", f"{cpu()}, {os.cpu_count()} logical cores"),
        ("threads of PyTorch", str(torch.get_num_threads())),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("commit", commit() or "none (not a git checkout)"),
    ]
