"""The site's pages: all are there, and what they say about the server is what the server does."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from minisgl.server.bodies import ChatBody, CompletionBody

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


class _Loader(yaml.SafeLoader):
    """Also reads MkDocs' `!ENV` and `!!python/name` tags, should there be any."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def _config() -> Any:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(item)]


def _sources() -> set[str]:
    """Every page that there is: Markdown as it stands, and what the lessons become."""
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    return written | {f"stages/{path.stem}.md" for path in (DOCS / "stages").glob("*.py")}


def test_the_navigation_has_every_page_once() -> None:
    pages = _pages(_config()["nav"])
    assert len(pages) == len(set(pages))
    assert set(pages) == _sources()


def test_links_are_checked_by_the_strict_build() -> None:
    validation = _config()["validation"]
    assert {"not_found", "anchors"} <= validation["links"].keys()
    assert {level for part in validation.values() for level in part.values()} == {"warn"}


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_the_api_page_has_every_field(body: type[msgspec.Struct]) -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert {field.name for field in msgspec.structs.fields(body)} <= named


def test_the_glossary_has_a_term_and_an_anchor_once() -> None:
    anchors = re.findall(r"^\S.* \{ #([\w-]+) \}\n:   \S", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len(anchors) == len(set(anchors)) >= 30
