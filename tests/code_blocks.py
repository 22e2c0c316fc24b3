"""The blocks of code of the README, of CONTRIBUTING.md and of all pages of the documentation."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=fence)$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """One block: what it is written in, from which line on."""

    page: str
    line: int
    language: str
    code: str

    @property
    def padded(self) -> str:
        """The code with empty lines before it, so that a traceback has the page's lines."""
        return "\n" * (self.line - 1) + self.code


def blocks(page: str, *languages: str) -> Iterator[Block]:
    """All blocks of a page, by its path in the repository, or those in some languages."""
    text = (ROOT / page).read_text()
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        if not languages or found["language"] in languages:
            yield Block(page, line, found["language"], found["code"])
