"""The error of things a user can cause and mend, and how a program ends on one."""

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """What was expected, what came and the way out, in one paragraph.

    Recipes and the command line print the message alone, without a traceback. Everything else that is raised is a fault
    of the program and keeps its traceback.

    Example
    -------
    >>> try:
    ...     raise UserError("expected a folder, but data/ is a file: give --data_folder")
    ... except UserError as error:
    ...     print(error)
    expected a folder, but data/ is a file: give --data_folder
    """


def some_of(names: Sequence[str], *, most: int = 5, separator: str = "; ") -> str:
    """The first few of many names, for a message that stays one paragraph.

    Example
    -------
    >>> some_of(["a", "b", "c", "d"], most=2)
    'a; b and 2 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def on_one_line(text: str) -> str:
    """What files, names and other programs say, as one paragraph in which a terminal obeys nothing.

    Example
    -------
    >>> on_one_line("a\\n  b\\x1b[31mc")
    'a b\\\\x1b[31mc'
    """
    lines = " ".join(line.strip() for line in text.strip().splitlines())
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in lines)


@contextmanager
def error_epilogue() -> Iterator[None]:
    """How every program of this package ends where it cannot go on; what the ``with`` block raises is handled so.

    A UserError is printed on the standard error as ``error: ...``, and the exit status is 2. After Ctrl-C it is 130.

    Example
    -------
    >>> with error_epilogue():  # doctest: +SKIP
    ...     raise UserError("expected a folder")
    error: expected a folder
    """
    try:
        yield
    except UserError as error:
        print(f"error: {on_one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def moved(command: str) -> NoReturn:
    """What ``python -m`` of a module does that became a command: it says the new name, and the exit status is 2."""
    print(f"error: this is now `{command}`", file=sys.stderr)
    raise SystemExit(2)
