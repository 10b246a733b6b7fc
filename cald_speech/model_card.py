"""The model card of a converted model, written from facts that are kept beside it in ``cald.json``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FACTS = "cald.json"
CARD = """---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [cald, linear-time, speech]
---

# {name}

A {model} by [CALD](https://arxiv.org/abs/2410.06846), written by `cald_speech` {version}.

| | |
|---|---|
| teacher | {teacher} |
| layers | {layers} |
| guidance | {guidance} |
| optimiser steps | {steps} |
| training data | {data} |
| parameters | {parameters} |
| licence | {licence} |

## Results

{results}

## Use

```python
import cald_speech  # registers the model class; transformers alone refuses this folder
from transformers import pipeline

transcribe = pipeline("automatic-speech-recognition", model="{name}")
```
"""


def update_facts(folder: Path, **facts: Any) -> None:
    """Add facts to a model folder's ``cald.json`` and write its README.md anew; each file whole or not at all."""
    known = read_facts(folder) | facts
    _write(folder / FACTS, json.dumps(known, indent=1, sort_keys=True) + "\n")
    _write(folder / "README.md", render(folder.name, known))


def add_result(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Add (or replace) an evaluation by its name: ``wer``, ``interval``, ``manifest_hash``, ``longest_s``, ..."""
    update_facts(folder, results=read_facts(folder).get("results", {}) | {name: dict(result)})


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of a model folder; nothing for one that was not written here."""
    path = folder / FACTS
    return json.loads(path.read_text()) if path.is_file() else {}


def render(name: str, facts: Mapping[str, Any]) -> str:
    """The card as Markdown. What was not measured is called so."""
    unknown = "not recorded"
    keys = ("model", "version", "teacher", "layers", "guidance", "steps", "data", "parameters", "licence")
    return CARD.format(
        name=name, results=_results(facts.get("results", {})), **{key: facts.get(key, unknown) for key in keys}
    )


def _results(results: Mapping[str, Mapping[str, Any]]) -> str:
    if not results:
        return "Not evaluated yet."
    rows = ["| set | WER % | 95 % interval | words | longest audio s | manifest | decoder |", "|---" * 7 + "|"]
    for name, r in sorted(results.items()):
        low, high = r["interval"]
        rows.append(
            f"| {name} | {r['wer']:.2f} | {low:.2f} to {high:.2f} | {r['words']:,} | {r['longest_s']:.1f} | "
            f"`{r['manifest_hash'][:12]}` | {r['decoder']} |"
        )
    return "\n".join(rows)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)
