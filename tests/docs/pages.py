"""The pages that users read, and what stands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("README.md")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
_FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str | None, str]]:
    """(language, title, body) of every fenced block."""
    return [(m[2], m[3], m[4]) for m in _FENCE.finditer(text)]


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def command_lines(text: str) -> list[str]:
    """Every line of a shell block, with its continuations, and every span, which may be a command."""
    lines = []
    for language, _, body in blocks(text):
        if language in ("bash", "console"):
            lines += re.sub(r"\\\n\s*", " ", body).splitlines()
    return lines + spans(text)
