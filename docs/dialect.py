"""The docstrings of this project as Markdown, for the API pages: an extension of griffe, which reads them.

The dialect is that of cald_speech/ops/ssd/__init__.py: sections Arguments, Returns, Yields, Raises and Example,
underlined with dashes; an argument is a line ``name : text``, and what belongs to it is indented.
"""

import re

import griffe

SECTIONS = ("Arguments", "Returns", "Yields", "Raises", "Example", "Examples")
_HEADING = re.compile(rf"^({'|'.join(SECTIONS)})\n-+$", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_ITEM = re.compile(r"^(\S.*?)(?: : (.*))?$")


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
        body = _items(body) if name in ("Arguments", "Raises") else _fenced(body)
        parts.append(f"**{name}**\n\n{body.strip()}")
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _items(body: str) -> str:
    """``name : text`` or ``Error`` and its indented lines, as a list."""
    items: list[str] = []
    for line in body.strip().splitlines():
        if line.startswith(" ") and items:
            items[-1] += f" {line.strip()}"
        elif line.strip():
            name, told = _ITEM.match(line).groups()
            names = ", ".join(f"**`{one}`**" for one in name.split(", "))
            items.append(f"- {names}:" + (f" {told}" if told else ""))
    return "\n".join(items)


def _fenced(body: str) -> str:
    """Doctests in fences; the rest as it stands."""
    blocks = re.split(r"\n\s*\n", body.strip("\n"))
    return "\n\n".join(f"```pycon\n{block}\n```" if block.lstrip().startswith(">>>") else block for block in blocks)
