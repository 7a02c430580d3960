"""The parts of STYLE.md that a machine can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_PROSE_COLUMNS = 120
PAGES = sorted(
    path
    for folder in (".", "charts", "crds", "epp", "hack", "operator", "tests")
    for path in ((ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*.md"))
)
SUFFIXES = {"", ".py", ".proto", ".sh", ".tpl", ".txt", ".yaml"}
SOURCES = [
    path
    for folder in ("charts", "crds", "epp", "hack", "operator", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES and path.is_file() and path != Path(__file__)
]
TICS = re.compile(
    r"\b(anew|nobody|somebody|anybody|for ever|by lot|is there twice|are there twice|has to go)\b"
    r"|\b(mend|mends|mended|mending)\b|'s business\b",
    re.IGNORECASE,
)

NEXT_SENTENCE = re.compile(r"[a-z0-9`)]\. [A-Z`*]")

LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)).lower().replace(" ", "-")
        for _, line in prose(page.read_text())
        for title in re.findall(r"^#+ (.*)", line)
    }


def prose(text: str) -> list[tuple[int, str]]:
    """Return the lines of a Markdown page that are neither code nor table, with their numbers."""
    found = []
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not (fenced or line.startswith(("    ", "|"))):
            found.append((number, line))
    return found


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_line_of_prose_is_too_long(page):
    """A sentence that needs more than 120 characters is broken after a comma, or is two."""
    long = [number for number, line in prose(page.read_text()) if len(line) > MAX_PROSE_COLUMNS]

    assert not long


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "STYLE.md"], ids=ids)
def test_no_page_has_the_words_to_avoid(page):
    """STYLE.md lists them, and what to write instead."""
    assert [found[0] for found in TICS.finditer(page.read_text())] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_line_has_one_sentence(page):
    """A change of one sentence is then a change of one line."""
    found = [number for number, line in prose(page.read_text()) if NEXT_SENTENCE.search(line, 4)]

    assert not found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    """To a file or folder of the repository, and to a heading that the page has."""
    dead = []
    for target, anchor in LINK.findall(page.read_text()):
        goal = page.parent / target if target else page
        if not goal.exists() or (anchor and anchor not in headings(goal)):
            dead.append(f"{target}#{anchor}")

    assert dead == []


def test_no_source_has_the_words_to_avoid():
    """Nor do docstrings, comments and messages."""
    found = [
        f"{ids(path)}: {match[0]}"
        for path in SOURCES
        for match in TICS.finditer(path.read_text(errors="replace"))
    ]

    assert found == []


def test_code_and_tables_may_be_wide():
    """Only prose is measured."""
    page = "a\n```sh\nb\n```\n    c\n| d |\ne\n"

    assert prose(page) == [(1, "a"), (7, "e")]


@pytest.mark.parametrize("text", ["planned anew", "Nobody reads it", "the core's business"])
def test_a_word_to_avoid_is_found(text):
    """In any case, but not inside another word."""
    assert TICS.search(text)
    assert not TICS.search("recommend an amendment to a businesslike body")
