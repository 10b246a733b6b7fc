"""The error of things a user can cause and mend."""


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
