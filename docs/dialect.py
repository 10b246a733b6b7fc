"""The docstrings of this project as Markdown, for the API pages: an extension of griffe, which reads them.

The dialect is that of cald_speech/ops/ssd/__init__.py: sections Arguments, Returns, Yields, Raises and Example,
underlined with dashes; an argument is a line ``name : text``, and what belongs to it is indented.
"""

import re

import griffe

SECTIONS = ("Arguments", "Returns", "Yields", "Raises", "Warns", "Example", "Examples")
_HEADING = re.compile(rf"^({'|'.join(SECTIONS)})\n-+$", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


class Dialect(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The docstring in Markdown.

    Example
    -------
    >>> print(markdown("Doubles.\\n\\nArguments\\n---------\\nx : a number,\\n    any at all.\\n"))
    Doubles.
    <BLANKLINE>
    **Arguments**
    <BLANKLINE>
    - **`x`**: a number, any at all.
    """
    first, *rest = _HEADING.split(_ROLE.sub(r"`\1`", text))
    parts = [_fenced(first)]
    for name, body in zip(rest[::2], rest[1::2], strict=True):
        body = _items(body, name == "Arguments") if name in ("Arguments", "Raises", "Warns") else _fenced(body)
        parts.append(f"**{name}**\n\n{body.strip()}")
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _items(body: str, named: bool) -> str:
    """``name : text`` (where ``named``) or ``Error``, and the indented lines of each, as a list; then any prose."""
    paragraphs = re.split(r"\n\s*\n", body.strip("\n"))
    parts = []
    for paragraph in paragraphs:
        first, *more = re.split(r"\n(?=\S)", paragraph)
        if named and " : " not in first.splitlines()[0]:
            parts.append(_fenced(paragraph))
            continue
        items = [" ".join(line.strip() for line in item.splitlines()) for item in (first, *more)]
        told = [item.partition(" : " if named else " ") for item in items]
        bold = [", ".join(f"**`{one}`**" for one in names.split(", ")) for names, _, _ in told]
        parts.append("\n".join(f"- {name}: {text}" for name, (_, _, text) in zip(bold, told, strict=True)))
    return "\n\n".join(parts)


def _fenced(body: str) -> str:
    """Doctests in fences; the rest as it stands."""
    blocks = re.split(r"\n\s*\n", body.strip("\n"))
    return "\n\n".join(f"```pycon\n{block}\n```" if block.lstrip().startswith(">>>") else block for block in blocks)
