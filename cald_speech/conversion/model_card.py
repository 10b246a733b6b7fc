"""The model card of a converted model, written from facts that are kept beside it in ``cald.json``.

Its metadata are what a hub shows and searches: licence, base model, metrics and results.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from cald_speech.errors import UserError
from cald_speech.families.folder import read_json
from cald_speech.files import clear, locked, whole_file

logger = logging.getLogger(__name__)
FACTS = "cald.json"
MOST_CHARACTERS = 500
PREFIX = "Cald"  # of the names of converted classes
# What the rows of the tables hold; what is measured, and an interval, may be none.
KINDS = {
    "results": {
        **{"wer": "measured", "wer_interval": "interval", "longest_audio_s": "measured", "words": "count"},
        **{"manifest_hash": "text", "decoder": "text"},
    },
    "figures": {
        **{"metric": "text", "value": "number", "interval": "interval", "count": "count", "manifest_hash": "text"},
    },
}
USUAL = "float32"  # of the weights that a figure was measured with; rows of older cards do not name theirs
HUB_ID = r"[\w.-]+(/[\w.-]+)?"
RESULT_KEYS = ("wer", "wer_interval", "longest_audio_s", "manifest_hash", "decoder")
CARD = """---
{metadata}
---

# {name}

A {model}{method}, written by `cald_speech` {version}.

| | |
|---|---|
| teacher | {teacher} |
| layers | {layers} |
| guidance | {guidance} |
| optimiser steps | {steps} |
| training data | {data} |
| parameters | {parameters} |
| licence | {licence} |
{phases}
## Results

{results}

## Use

{use}
"""
METHOD = " by [CALD](https://arxiv.org/abs/2410.06846)"
USE = """```python
{first}from transformers import pipeline

run = pipeline("{pipeline}", model="{name}")
```"""
FIRST = "import cald_speech  # registers the model class, with kernels for CPUs and GPUs\n"
ALONE = """

Without `cald_speech`, transformers loads it by this folder's own `modeling_cald.py`, in torch alone:
`pipeline("{pipeline}", model="{name}", trust_remote_code=True)`."""


def update_facts(folder: Path, **facts: Any) -> None:
    """Add facts to a model folder's ``cald.json`` and write its README.md anew; each file whole or not at all."""
    with locked(folder, FACTS, wait=True):  # two evaluations of one model may end at once
        known = read_facts(folder) | facts
        texts = {FACTS: json.dumps(known, indent=1, sort_keys=True) + "\n", "README.md": render(folder.name, known)}
        for name, text in texts.items():
            clear(folder / name)
            with whole_file(folder / name) as unfinished:
                unfinished.write_text(text)


def add_result(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Add (or replace) an evaluation by its name and dtype; ``result`` is the summary that an evaluation writes.

    A folder that was not written by cald_speech (a plain teacher's) is left alone.
    """
    kept = {key: result[key] for key in RESULT_KEYS}
    _add(folder, "results", name, {**kept, "words": result["words"]["count"]}, result.get("dtype", USUAL))


def add_figure(
    folder: Path,
    name: str,
    *,
    metric: str,
    value: float,
    interval: tuple[float, float] | None,
    count: int,
    manifest_hash: str,
    dtype: str = USUAL,
) -> None:
    """The same for a figure of another kind: accuracy in percent, perplexity; ``count`` is what it was counted over."""
    kept = {"metric": metric, "value": value, "interval": interval, "count": count, "manifest_hash": manifest_hash}
    _add(folder, "figures", name, kept, dtype)


def _add(folder: Path, table: str, name: str, row: Mapping[str, Any], dtype: str) -> None:
    name, row = name if dtype == USUAL else f"{name}, {dtype}", {**row, "dtype": dtype}
    if not read_facts(folder):
        return
    try:
        with locked(folder, FACTS, wait=True):
            update_facts(folder, **{table: read_facts(folder).get(table, {}) | {name: row}})
    except OSError as error:
        logger.warning("%s: its card cannot be written (%s), and does not have %s", folder, error.strerror, name)


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of a model folder; nothing for one that was not written here."""
    path = folder / FACTS
    facts = read_json(path) if path.is_file() else {}
    for key, kinds in KINDS.items():
        of = facts.get(key, {})
        if not isinstance(of, dict) or not all(isinstance(row, dict) for row in of.values()):
            raise UserError(f"{path}: {key}: expected figures by the names of their sets, got {of!s:.60}")
        for name, row in of.items():
            kinds = kinds | ({"dtype": "text"} if "dtype" in row else {})
            if wrong := [k for k, kind in kinds.items() if k not in row or not _is_of(kind, row[k])]:
                raise UserError(f"{path}: {key}: {name:.60}: {wrong[0]}: got {row.get(wrong[0])!s:.60}")
    return facts


def _is_of(kind: str, value: Any) -> bool:
    if value is None:
        return kind in ("measured", "interval")
    if kind == "interval":
        return isinstance(value, list) and len(value) == 2 and all(_is_of("number", v) for v in value)
    if kind == "text":
        return isinstance(value, str)
    return isinstance(value, int if kind == "count" else int | float) and not isinstance(value, bool)


def as_text(value: Any) -> str:
    """What a folder says of itself, as text that Markdown shows and does not obey: on one line, and not too long.

    Example
    -------
    >>> as_text("a|b <img src=x>")
    'a\\\\|b &lt;img src=x&gt;'
    """
    text = " ".join(str(value).split())[:MOST_CHARACTERS]
    for plain, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(plain, shown)
    return "".join("\\" + c if c in "\\`|[]*#!" else c for c in text)


def render(name: str, facts: Mapping[str, Any]) -> str:
    """The card as Markdown. What was not measured is called so."""
    unknown = "not recorded"
    keys = ("model", "version", "teacher", "layers", "guidance", "steps", "data", "parameters", "licence")
    phases = facts.get("phases")
    phases = "".join(f"- {as_text(phase)}\n" for phase in phases) if isinstance(phases, list) else ""
    names = {"name": as_text(name), "pipeline": _pipeline(facts)}
    is_converted = _is_converted(facts)
    use = USE.format(first=FIRST, **names) + ALONE.format(**names) if is_converted else USE.format(first="", **names)
    return CARD.format(
        metadata=_metadata(name, facts),
        name=names["name"],
        method=METHOD if is_converted else "",
        use=use,
        phases=f"\nIt was trained under changing settings:\n\n{phases}" if phases else "",
        results=_results(facts.get("results", {}), facts.get("figures", {})),
        **{key: as_text(facts.get(key, unknown)) for key in keys},
    )


def base_model_of(source: str) -> str | None:
    """The hub's model that ``source`` is, or, where that is a folder, was made of; None where that is not known.

    Example
    -------
    >>> base_model_of("facebook/wav2vec2-base-960h")
    'facebook/wav2vec2-base-960h'
    """
    if Path(source).exists():
        return read_facts(Path(source)).get("base_model")
    return source if re.fullmatch(HUB_ID, source) else None


def _metadata(name: str, facts: Mapping[str, Any]) -> str:
    """The card's head as yaml, without the lines around it."""
    pipeline, base, results = _pipeline(facts), facts.get("base_model") or "", []
    rates = [(of, "wer", r["wer"], r) for of, r in facts.get("results", {}).items()]
    figures = [(of, _slug(f["metric"]), f["value"], f) for of, f in facts.get("figures", {}).items()]
    for name_of_row, metric, value, row in sorted([*rates, *figures], key=lambda found: found[:2]):
        if value is not None:
            of, dtype = _set_and_dtype(name_of_row, row)
            shown = " ".join(of.split())[:MOST_CHARACTERS]
            how = {} if dtype == USUAL else {"metric_name": f"{metric}, {dtype}", "metric_args": {"dtype": dtype}}
            results.append(EvalResult(pipeline, _slug(of), shown, metric, round(value, 4), **how))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["cald", "linear-time"] if _is_converted(facts) else ["cald"],
        base_model=base if re.fullmatch(HUB_ID, str(base)) else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name,
        eval_results=results or None,
        **_licence(facts.get("licence")),
    ).to_dict()
    if not results:
        data.pop("model_name", None)
    return ModelCardData(**data).to_yaml()


def _is_converted(facts: Mapping[str, Any]) -> bool:
    """Whether transformers alone has no such class: a recipe's teacher keeps its own."""
    return str(facts.get("model", PREFIX)).startswith(PREFIX)


def _pipeline(facts: Mapping[str, Any]) -> str:
    pipeline = str(facts.get("pipeline", ""))
    return pipeline if re.fullmatch(r"[a-z-]{1,60}", pipeline) else "feature-extraction"


def _licence(licence: str | None) -> dict[str, str]:
    """As the hub has it: an id, or ``other`` with a name."""
    if licence is None:
        return {}
    licence = str(licence)
    if re.fullmatch(r"[a-z0-9.-]{1,60}", licence):
        return {"license": licence}
    return {"license": "other", "license_name": _slug(licence)}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def _results(results: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Mapping[str, Any]]) -> str:
    tables = [table(of) for table, of in ((_error_rates, results), (_figures, figures)) if of]
    return "\n\n".join(tables) or "Not evaluated yet."


def _set_and_dtype(name: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """The set of a row, and the dtype of the weights that read it."""
    dtype = " ".join(row.get("dtype", USUAL).split())[:MOST_CHARACTERS]
    return name.removesuffix(f", {dtype}"), dtype


def _figures(figures: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| set | metric | value | 95 % interval | of | manifest | dtype |", "|---" * 7 + "|"]
    for key, f in sorted(figures.items()):
        name, dtype = _set_and_dtype(key, f)
        interval = "none" if f["interval"] is None else "{:.2f} to {:.2f}".format(*f["interval"])
        rows.append(
            f"| {as_text(name)} | {as_text(f['metric'])} | {f['value']:.2f} | {interval} | {f['count']:,} | "
            f"`{as_text(f['manifest_hash'][:12])}` | {as_text(dtype)} |"
        )
    return "\n".join(rows)


def _error_rates(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| set | WER % | 95 % interval | words | longest audio s | manifest | decoder | dtype |", "|---" * 8 + "|"]
    for key, r in sorted(results.items()):
        name, dtype = _set_and_dtype(key, r)
        # A set of one utterance, or without a word or durations, has no interval, no rate or no longest.
        wer = "none" if r["wer"] is None else f"{r['wer']:.2f}"
        interval = "none" if r["wer_interval"] is None else "{:.2f} to {:.2f}".format(*r["wer_interval"])
        longest = "none" if r["longest_audio_s"] is None else f"{r['longest_audio_s']:.1f}"
        rows.append(
            f"| {as_text(name)} | {wer} | {interval} | {r['words']:,} | {longest} | "
            f"`{as_text(r['manifest_hash'][:12])}` | {as_text(r['decoder'])} | {as_text(dtype)} |"
        )
    return "\n".join(rows)
