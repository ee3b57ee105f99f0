"""What people read: README and the pages of docs/, their fenced blocks, shown commands and links. No tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("accelerate", "alignment", "python", "torchrun")


def read(page: str) -> str:
    """The text of a page, by its path in the checkout."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks of these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[str]:
    """The lines of a page's shell blocks, continued lines joined."""
    return [
        line.strip()
        for block in blocks(text, "sh", "bash")
        for line in re.sub(r"\\\n", " ", block).splitlines()
    ]  # fmt: skip


def commands(lines: list[str]) -> list[list[str]]:
    """The words of every command of ours; one within quotes (srun's) counts as one of its own."""
    found = []
    for line in lines:
        inner = re.search(r"'(accelerate launch .*)'", line)
        words = shlex.split(inner[1] if inner else line, comments=True)
        if words and words[0] in PROGRAMS:
            found.append(words)
    return found


def mentioned(text: str) -> list[list[str]]:
    """The commands in a page's running text, without the brackets around what may be left out."""
    spans = re.findall(rf"`((?:{'|'.join(PROGRAMS)})\s[^`]+)`", prose(text))
    return [shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", span)) for span in spans]


def links(text: str) -> list[str]:
    """Where a page's links lead, those to other sites left out."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
