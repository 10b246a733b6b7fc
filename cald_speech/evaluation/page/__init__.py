"""One HTML file of training runs, evaluations and layer-wise figures, which needs nothing beside it.

``found.py`` says what lies in folders, ``contents.py`` brings it into the form that ``page.js`` draws, and ``audio.py``
puts sound into it. The page has no network, no other file and no code but its own: texts, names and paths come from
users, so all of them travel as JSON that no HTML parser sees into, the script sets them as text alone, and the page's
own Content-Security-Policy lets no other script, style or address in.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cald_speech.errors import UserError
from cald_speech.evaluation.page.audio import embed_audio
from cald_speech.evaluation.page.contents import contents_of
from cald_speech.evaluation.page.found import find
from cald_speech.files import whole_file

__all__ = ["write_page"]
MIB = 2**20


def write_page(
    folders: Sequence[str | Path],
    path: str | Path,
    *,
    split: str | None = None,
    utterances: int = 2000,
    audio_mib: float = 8.0,
) -> dict[str, Any]:
    """Write the page of what lies in ``folders``; returns what is in it, and its size in bytes.

    Arguments
    ---------
    folders : runs (train_log.jsonl), evaluations (<split>.json and <split>.jsonl), what `cald-speech drift`, `layers`,
        `by-length` and `lookahead` write, or folders around such. The first evaluation is the one that others are
        compared with at first.
    split : only the evaluations of that name.
    utterances : of each set at most, the worst; rates and intervals are of all.
    audio_mib : of the file, for the sound of the worst utterances.

    Raises
    ------
    UserError
        where a folder holds nothing of the kind, a file in it is damaged, or the page cannot be written.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "train_log.jsonl").write_text('{"step": 0, "loss/task": 3.5}\\n')
    >>> write_page([folder], folder / "report.html")["runs"]
    1
    """
    found = find(folders, split)
    contents = contents_of(found, most_utterances=utterances)
    embedded = embed_audio(contents["sets"], int(audio_mib * MIB))
    text = render(contents | embedded)
    try:
        with whole_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written ({error.strerror}). Give another --html") from error
    return {
        "html": str(path),
        "bytes": len(text.encode()),
        "runs": len(found.runs),
        "evaluations": len(found.evaluations),
        "figures": len(found.figures),
        "audio": {key: embedded["audio_facts"][key] for key in ("embedded", "left_out", "unreadable")},
    }


def render(contents: dict[str, Any]) -> str:
    """The page around its data.

    Example
    -------
    >>> "</script><b>" in render({"title": "</script><b>"})
    False
    """
    parts = {name: (files(__package__) / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")}
    policy = (
        f"default-src 'none'; script-src {_hash(parts['page.js'])}; style-src {_hash(parts['page.css'])}; "
        "media-src data:; base-uri 'none'; form-action 'none'"
    )
    # A string of JSON may hold what ends a script element or begins a comment; its escapes may not.
    data = json.dumps(contents, allow_nan=False, separators=(",", ":"))
    data = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    template = (files(__package__) / "page.html").read_text(encoding="utf-8")
    places = {"policy": html.escape(policy), "title": html.escape(str(contents["title"])), "data": data}
    places |= {"style": parts["page.css"], "script": parts["page.js"]}
    first, *rest = template.split("{{")
    pieces = [first]
    for piece in rest:
        name, _, after = piece.partition("}}")
        pieces += [places[name], after]
    return "".join(pieces)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
