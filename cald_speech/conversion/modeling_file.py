"""The Python file of a converted model's folder, by which transformers loads it where cald_speech is not installed.

It is made of the package's own sources when the model is saved, and holds what this model needs: its classes, its
mixers, and the ops by torch alone. cald_speech itself never runs it, but its own classes.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from cald_speech.conversion.bundle import Bundle, CannotBundle
from cald_speech.conversion.converted import config_name, model_name
from cald_speech.errors import UserError
from cald_speech.families import Family, family_of
from cald_speech.files import clear, whole_file
from cald_speech.mixers import factory_classes, factory_from

logger = logging.getLogger(__name__)
NAME = "modeling_cald"
PACKAGE = "cald_speech"
ABOUT = '''"""{classes}: a converted model, for transformers alone.

Written by cald_speech {version} of its own sources when this folder was saved, under the Apache License 2.0. It holds
what this model needs, runs on torch alone, and is read with ``trust_remote_code=True``:

    {auto}.from_pretrained(folder, trust_remote_code=True)

Where cald_speech is installed, ``import cald_speech`` registers the same classes, with kernels for CPUs and GPUs, and
this file is not run. Documentation is in the package.
"""

'''


def modeling_file(family: Family, layer_map: Mapping[str, Any]) -> str:
    """The file of a family's converted models with these mixers.

    Arguments
    ---------
    layer_map : as in config.json.

    Raises
    ------
    CannotBundle
        for a mixer whose source cannot be had or taken apart: a user's own, from a notebook.

    Example
    -------
    >>> from cald_speech.conversion import LayerMap
    >>> from cald_speech.families import families
    >>> from cald_speech.mixers import Mamba2
    >>> text = modeling_file(families()["llama"], LayerMap(Mamba2).to_dict())
    >>> "class Mamba2(" in text, "class Hydra(" in text, "from cald_speech" in text
    (True, False, False)
    """
    descriptions = [layer_map["default"], *layer_map["overrides"].values()]
    mixers = {cls for one in descriptions if one is not None for cls in factory_classes(factory_from(one))}
    return _modeling_file(family, tuple(sorted(mixers, key=lambda cls: cls.__name__)))


@cache
def _modeling_file(family: Family, mixers: tuple[type, ...]) -> str:
    classes = {model_name(base): head for head, base in family.classes.items()}
    config = config_name(family)
    main = [f"from {type(family).__module__} import FAMILY"]
    main += ["from cald_speech.conversion.converted import make_config_class, make_model_class"]
    main += [f"from {cls.__module__} import {cls.__name__}" for cls in mixers]
    main += [f"MIXERS = ({', '.join(cls.__name__ for cls in mixers)},)"]
    main += [f"{config} = make_config_class(FAMILY, __name__)"]
    for name, head in classes.items():
        main += [f'{name} = make_model_class(FAMILY, FAMILY.classes["{head}"], {config}, __name__)']
    ours = (PACKAGE, *sorted({cls.__module__ for cls in mixers if not cls.__module__.startswith(f"{PACKAGE}.")}))
    instead = {"cald_speech.ops": "cald_speech.ops.torch_only"}
    text = Bundle("\n".join(main), ours=ours, instead=instead).text()
    auto = family.auto_classes[family.default_head].__name__
    about = ABOUT.format(classes=", ".join(classes), version=metadata.version("cald-speech"), auto=auto)
    compile(text, f"{NAME}.py", "exec")
    return about + text


def auto_map(family: Family) -> dict[str, str]:
    """By transformers' Auto classes, where a folder's config.json says that they find its own."""
    models = {family.auto_classes[head].__name__: model_name(base) for head, base in family.classes.items()}
    return {auto: f"{NAME}.{name}" for auto, name in {"AutoConfig": config_name(family), **models}.items()}


class Pushed:
    """What converted models and their configs say where the hub cannot be had."""

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        with pushing():
            return super().push_to_hub(repo_id, *args, **kwargs)


class ConvertedModel(Pushed):
    """What the package adds to a converted model's class."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        with pushing():
            return super().save_pretrained(save_directory, *args, **kwargs)


class ConvertedConfig(Pushed):
    """What it adds to its config's: where that is saved, it brings its modeling file, and says so in ``auto_map``."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("auto_map", None)  # what a folder said that this model was made from
        if self.layer_map is not None:
            self._bring_file(Path(save_directory))
        with pushing():
            return super().save_pretrained(save_directory, *args, **kwargs)

    def _bring_file(self, folder: Path) -> None:
        family = family_of(self)
        try:
            text = modeling_file(family, self.layer_map)
        except (CannotBundle, SyntaxError) as error:
            logger.warning("%s gets no %s.py, and needs cald_speech to be loaded: %s", folder, NAME, error)
            clear(folder / f"{NAME}.py")
            return
        with whole_file(folder / f"{NAME}.py", durable=False) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        self.auto_map = auto_map(family)


@contextmanager
def pushing() -> Iterator[None]:
    """What keeps a model from the hub, as a UserError: no network, no token, no right to write."""
    # The library behind the hub's client has changed its name before; its errors are no OSErrors.
    http = import_module(type(get_session()).__module__.partition(".")[0])
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, http.HTTPError, ConnectionError) as error:
        raise UserError(
            f"the model cannot be pushed to the Hugging Face hub: {str(error).strip().splitlines()[0]:.300} Expected a "
            "network, a repository (owner/name) and a token that may write to it (`hf auth login`). Without, save it "
            "with save_pretrained(folder), and where there is a network run `hf upload owner/name folder`"
        ) from error
