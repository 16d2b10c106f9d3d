"""A MkDocs hook: executes every lesson in docs/stages and adds the page that it makes to the site.

A lesson is a Python file in jupytext's percent format. Nothing is cached: a page always shows what the
code of this checkout does on the machine that builds the site. A cell that raises fails the build.
"""

import logging
import time
from pathlib import Path
from typing import Any

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets.config import Config

_log = logging.getLogger("mkdocs.hooks.lessons")
_TIMEOUT = 1800  # seconds a cell may take, on a busy machine


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs when it has listed docs/: add one generated page a lesson."""
    for lesson in sorted((Path(config.docs_dir) / "stages").glob("*.py")):
        _log.info("Executing lesson %s ...", lesson.name)
        start = time.perf_counter()
        page = to_markdown(execute(lesson, Path(config.docs_dir).parent))
        _log.info("Executed lesson %s in %.0f s", lesson.name, time.perf_counter() - start)
        files.append(File.generated(config, f"stages/{lesson.stem}.md", content=page))
    return files


def execute(lesson: Path, root: Path) -> Any:
    """The lesson as a notebook with its outputs, run by a fresh kernel in the repository's root."""
    notebook = jupytext.read(lesson)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        config=Config(KernelManager={"transport": "ipc"}),  # no TCP port for other users to connect to
        timeout=_TIMEOUT,
        coalesce_streams=True,  # what a cell prints is one block
        resources={"metadata": {"path": str(root)}},
    )
    try:
        return client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise PluginError(f"lesson {lesson.name} failed:\n{error}") from error


def to_markdown(notebook: Any) -> str:
    """One page of Markdown: code and printed text become fenced blocks, rich outputs stay what they are."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        if "hide-input" not in cell.metadata.get("tags", []):
            parts.append(_fence(cell.source, "python"))
        parts += filter(None, map(_output, cell.outputs))
    return "\n\n".join(parts) + "\n"


def _output(output: Any) -> str:
    if output.output_type == "stream":  # stderr is progress bars: not for the page
        return _fence(output.text, "text .output") if output.name == "stdout" else ""
    for kind in ("text/markdown", "text/html"):
        if kind in output.data:
            return str(output.data[kind])
    return _fence(output.data["text/plain"], "text .output")


def _fence(text: str, classes: str) -> str:
    return f"~~~~ {{ .{classes} }}\n{text.rstrip()}\n~~~~"
