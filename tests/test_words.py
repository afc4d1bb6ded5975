"""Plain English, as far as a program can check it: openings of docstrings, private words, and long sentences.

The test reads README, CONTRIBUTING, the pages of docs/ and csrc/, and the docstrings and comments of Python files. In
the package, the tools and the examples it also reads every string of several words: these are help and error lines.
"""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/*.md")])
FOLDERS = ("caco_fast", "tools", "examples", "tests")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))
CODE.append(ROOT / "setup.py")

# A docstring begins with a noun phrase or a verb: these words refer to something that the reader has not met yet.
OPENING = re.compile(r"(it|its|they|them|their|theirs|this|these|those|that|of|as|by)\b", re.I)
# Word to a better one, for readers whose second language is English.
PRIVATE = {
    r"wants?|wanted|wanting": "requires, expects, needs",
    r"go(?:es)? on|gone on|going on|went on": "continues",
    r"stands?(?! for\b|-in)|stood": "is, lies",
    r"one[ _]voice|SaidElsewhere": "how ranks report errors",
    r"flights?|PatientFile|torture|planted fault": "the standard term of the field",
    r"methods\.md": "docs/method.md",
}
LONG, LONG_SENTENCES = 40, 2


class Text(NamedTuple):
    """A piece of prose and where it is."""

    path: Path
    line: int
    kind: str  # page, docstring, comment or line (of help or error)
    words: str

    def at(self, what: str) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {what}"


def paragraphs(page: Path) -> Iterator[Text]:
    """The prose of a page: paragraphs, list items and table cells, without code and generated tables."""
    text = page.read_text()
    # Blanked and not cut, so that the lines keep their numbers.
    for hidden in (r"```.*?```", r"<!-- table:.*?<!-- end table -->", r"^ {4}\S.*?$"):
        text = re.sub(hidden, lambda match: "\n" * match[0].count("\n"), text, flags=re.S | re.M)
    for match in re.finditer(r"(?:.+(?:\n|$))+", text):
        first = text.count("\n", 0, match.start()) + 1
        for offset, part in split_items(match[0]):
            yield Text(page, first + offset, "page", re.sub(r"`[^`]*`", "CODE", part))


def split_items(block: str) -> Iterator[tuple[int, str]]:
    """List items and table cells of a block with the lines that they begin at; a plain paragraph is one item."""
    lines = block.splitlines()
    starts = [at for at, line in enumerate(lines) if at == 0 or re.match(r"\s*(- |\d+\. |\||#)", line)]
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        joined = " ".join(lines[start:end])
        for part in joined.strip("| ").split(" | ") if joined.startswith("|") else [joined]:
            yield start, part


def python_texts(path: Path, source: str) -> Iterator[Text]:
    """Docstrings, comments, and the help and error lines of a file."""
    docstrings = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.add(id(first.value))
                yield Text(path, first.lineno, "docstring", first.value.value.strip())
    if path.is_relative_to(ROOT / "tests"):
        shown = []
    else:
        shown = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for node in shown:
        if id(node) not in docstrings and node.value.count(" ") > 1:
            yield Text(path, node.lineno, "line", node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(path, token.start[0], "comment", token.string.lstrip("# "))


def bad_opening(text: Text) -> list[str]:
    found = OPENING.match(text.words) if text.kind == "docstring" else None
    return [text.at(f"a docstring begins with {found[0]!r}")] if found else []


def private_words(text: Text) -> list[str]:
    return [
        text.at(f"{found[0]!r}; better: {better}")
        for pattern, better in PRIVATE.items()
        for found in re.finditer(rf"\b(?:{pattern})\b", text.words)
    ]


def long_sentences(texts: list[Text]) -> list[str]:
    """The sentences of a page that are too long, if they are too many."""
    found = [
        text.at(f"a sentence of {len(sentence.split())} words: {' '.join(sentence.split()[:8])} ...")
        for text in texts
        for sentence in re.split(r"(?<=[.!?;:])\s", text.words)
        if len(sentence.split()) > LONG
    ]
    return found if len(found) > LONG_SENTENCES else []


@functools.cache
def texts_of(path: Path) -> list[Text]:
    return list(paragraphs(path) if path.suffix == ".md" else python_texts(path, path.read_text()))


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    found = [line for path in CODE for text in texts_of(path) for line in bad_opening(text)]
    assert not found, "\n" + "\n".join(found)


def test_no_private_words() -> None:
    found = [line for path in [*PAGES, *CODE] for text in texts_of(path) for line in private_words(text)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_sentences_of_a_page_are_short(page: Path) -> None:
    found = long_sentences(texts_of(page))
    assert not found, "\n" + "\n".join(found)


def test_the_checks_find_what_they_look_for() -> None:
    source = '"""Of the bank."""\n\n# It wants a row.\nhelp = "goes on with a row"\n'
    texts = list(python_texts(ROOT / "examples" / "made_up.py", source))
    assert [line for text in texts for line in bad_opening(text)] == [
        "examples/made_up.py:1: a docstring begins with 'Of'"
    ]
    found = [line for text in texts for line in private_words(text)]
    assert [line.split(":")[1] for line in sorted(found)] == ["3", "4"]
    words = " ".join(["word"] * (LONG + 1))
    page = ROOT / "docs" / "made_up.md"
    assert len(long_sentences([Text(page, line, "page", f"{words}. Short.") for line in range(3)])) == 3
    assert long_sentences([Text(page, 1, "page", f"{words}. Short.")]) == []
