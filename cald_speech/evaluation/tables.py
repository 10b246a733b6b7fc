"""What a classifier says of each row of a table of text; see ``evaluation/labels.py`` for audio."""

from pathlib import Path

import torch

from cald_speech.conversion import from_pretrained
from cald_speech.evaluation.labels import classify, write_guesses
from cald_speech.tasks.processors import tokenizer_of
from cald_speech.tasks.text_classification import TextClassification


def classify_table(
    source: str | Path,
    table: str | Path,
    report: str | Path,
    *,
    max_tokens: int = 512,
    max_batch_tokens: int = 16384,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[str, str]]:
    """(label, guess) of each row, by its place, also written to ``report`` as JSON.

    Arguments
    ---------
    source : folder or hub id of a model with a classification head, whose ``id2label`` names the classes, and with its
        tokenizer.
    max_tokens : longer rows are cut, and counted in the log.
    max_batch_tokens : in a batch, padding counted.

    Raises: UserError, for a model or table that cannot be used, labels that the model does not know, or more tokens
    than it has positions or a mixer weights for.
    """
    model = from_pretrained(source, head="classification", dtype=dtype).eval().to(device)
    names = [model.config.id2label[place] for place in sorted(model.config.id2label)]
    task, tokenizer = TextClassification(names, max_tokens), tokenizer_of([str(source)], None)
    task.head_options(str(source), model.config, tokenizer)
    dataset = task.dataset(Path(table), tokenizer, normaliser="none", unknown="error")
    found = classify(model, task, dataset, tokenizer, max_batch=max_batch_tokens)
    write_guesses(report, found)
    return found
