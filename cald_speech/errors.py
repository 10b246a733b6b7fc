"""The error of things a user can cause and mend."""

from collections.abc import Sequence


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
