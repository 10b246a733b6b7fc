"""A folder that a command writes to: made, and held against other processes, in the words that a user reads."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cald_speech.errors import UserError
from cald_speech.files import InUse, clear, locked


@contextmanager
def held(folder: str | Path, name: str = "") -> Iterator[None]:
    """Hold ``folder``, or what is called ``name`` in it, until the ``with`` block ends; strays of it are removed.

    Raises: UserError, where another process holds it, or it cannot be written.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with held(folder, "test"):
    ...     [path.name for path in folder.iterdir()]
    ['.test.lock']
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, name))
            if name:
                clear(Path(folder) / name)
        except InUse as error:
            raise UserError(str(error)) from error
        except OSError as error:
            raise unwritable(Path(folder), error) from error
        yield


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"--output_folder {folder}: expected a folder to write to, but it cannot be written ({error.strerror}). Give "
        "another"
    )
