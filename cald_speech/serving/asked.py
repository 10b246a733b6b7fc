"""What a request for a transcript asks for. A field acts, or is refused with one sentence in OpenAI's error shape."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cald_speech.errors import UserError, some_of

FORMS = ("json", "text", "srt", "vtt", "verbose_json")
GRANULARITIES = ("segment", "word")
FIELDS = ("file", "model", "language", "prompt", "response_format", "temperature", "timestamp_granularities", "stream")


class Refused(UserError):
    """A request that is answered by an error: its HTTP status, and the field that was at fault, if it was one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Asked(NamedTuple):
    """The form of the answer, and which times a verbose one has."""

    form: str
    granularities: tuple[str, ...]


def read_fields(fields: Mapping[str, Sequence[str]], model: str, language: str | None) -> Asked:
    """What the fields of a form ask for.

    Arguments
    ---------
    fields : the values of each field but the file.
    model : the name that clients give for the model.
    language : what the model writes, where that is known.

    Raises
    ------
    Refused
        for what is unknown, or cannot be done.

    Example
    -------
    >>> read_fields({"model": ["mine"], "temperature": ["0"]}, "mine", None)
    Asked(form='json', granularities=('segment',))
    """
    known = {name.removesuffix("[]"): values for name, values in fields.items()}
    unknown = sorted(known.keys() - set(FIELDS))
    if unknown:
        names = some_of([repr(name[:40]) for name in unknown], separator=", ")
        raise _wrong(unknown[0][:40], f"expected the fields {', '.join(FIELDS)}, got {names} too")
    if "file" in known:
        raise _wrong("file", "file: expected a file with a name, got a text")
    for name, values in known.items():
        if len(values) > 1 and name != "timestamp_granularities":
            raise _wrong(name, f"{name}: expected it once, got it {len(values)} times")
    first = {name: values[0] for name, values in known.items()}
    check_model(first.get("model", ""), model)
    _refuse_what_no_ctc_model_does(first, language)
    form = first.get("response_format", "") or "json"
    if form not in FORMS:
        raise _wrong("response_format", f"response_format: expected one of {', '.join(FORMS)}, got {form[:40]!r}")
    granularities = known.get("timestamp_granularities", ())
    for one in granularities:
        if one not in GRANULARITIES:
            raise _wrong(
                "timestamp_granularities", f"timestamp_granularities: expected word, segment, got {one[:40]!r}"
            )
    if granularities and form != "verbose_json":
        raise _wrong(
            "timestamp_granularities",
            f"timestamp_granularities: act with response_format verbose_json alone, which was {form}: leave them out",
        )
    return Asked(form, tuple(dict.fromkeys(granularities)) or ("segment",))


def check_model(name: str, served: str) -> None:
    """Raise Refused for the name of another model than the one that is served, or for none."""
    if not name:
        raise _wrong("model", f"model: expected {served!r}, got none")
    if name != served:
        message = f"model: expected {served!r}, which alone is served here, got {name[:80]!r}"
        raise Refused(404, message, param="model", code="model_not_found")


def _refuse_what_no_ctc_model_does(first: Mapping[str, str], language: str | None) -> None:
    wanted = first.get("language", "")
    if wanted and language is None:
        raise _wrong(
            "language",
            "language: expected none, since the model writes the one it was trained on, and this server was not told "
            "which (--language)",
        )
    if wanted and wanted.lower() != language.lower():
        raise _wrong("language", f"language: expected {language!r}, which alone the model writes, got {wanted[:40]!r}")
    if first.get("prompt"):
        raise _wrong("prompt", "prompt: expected none, since a CTC model writes what it hears and follows no text")
    try:
        temperature = float(first.get("temperature") or 0)
    except ValueError:
        temperature = math.nan
    if temperature:
        raise _wrong(
            "temperature",
            f"temperature: expected 0, since nothing is drawn at random, got {first['temperature'][:40]!r}",
        )
    if first.get("stream", "").lower() not in ("", "false", "0"):
        raise _wrong("stream", "stream: expected false: a recording is answered whole, and /v1/live is for live audio")


def _wrong(param: str, message: str) -> Refused:
    return Refused(400, message, param=param)
