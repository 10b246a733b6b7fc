"""Whether a model can be had at all, asked once and quickly: transformers would try every file of it five times."""

from importlib import import_module
from pathlib import Path

from huggingface_hub import HfApi, get_session, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from cald_speech.errors import UserError

TIMEOUT_S = 10


def check_source(source: str | Path) -> None:
    """Raise UserError unless ``source`` is a folder, a model in the local cache, or one the hub has.

    Example
    -------
    >>> import tempfile
    >>> check_source(tempfile.mkdtemp())
    """
    source = str(source)
    if Path(source).is_dir():
        return
    # The library behind the hub's client has changed its name before; its errors are no OSErrors.
    http = import_module(type(get_session()).__module__.partition(".")[0])
    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=TIMEOUT_S)
    except HFValidationError as error:
        raise UserError(
            f"there is no folder {source!r}, and it is no Hugging Face hub id (owner/name) either: give a folder with "
            "config.json and model.safetensors, or a hub id"
        ) from error
    except (OSError, HfHubHTTPError, http.HTTPError) as error:
        raise UserError(
            f"there is no folder {source!r}, and the Hugging Face hub cannot be asked for it: "
            f"{str(error).strip().splitlines()[0]}. Without a network, download the model elsewhere (`hf download "
            f"{source}`) and give its folder; `make demo` needs neither"
        ) from error
