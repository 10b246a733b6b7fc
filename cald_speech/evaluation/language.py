"""How well a language model predicts held-out text, and whether what it generates can be trusted.

    python -m cald_speech.evaluation.language results/stdlib/teacher/model results/stdlib/data/manifests/test.json

Prints one JSON line: perplexity with its 95 % bootstrap interval over blocks and, for a causal model, the check of
:mod:`cald_speech.evaluation.generation`.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from tqdm import tqdm
from transformers import PreTrainedModel

from cald_speech.conversion import load_config
from cald_speech.conversion.model_card import add_figure
from cald_speech.data.batching import batches_by_length
from cald_speech.data.tokens import TokenBlocks
from cald_speech.errors import UserError
from cald_speech.evaluation.forward import load
from cald_speech.evaluation.generation import check_generation
from cald_speech.families import family_of
from cald_speech.tasks.bootstrap import bootstrap_interval
from cald_speech.tasks.language_modelling import CausalLM, LanguageModelling, MaskedLM
from cald_speech.tasks.processors import tokenizer_of

TASKS: Mapping[str, type[LanguageModelling]] = {"lm": CausalLM, "masked_lm": MaskedLM}


@dataclass(frozen=True)
class Perplexity:
    """The loss on each block, ``nats`` summed over its ``counts`` predicted tokens, in the order of the blocks."""

    nats: list[float]
    counts: list[int]

    @property
    def loss(self) -> float:
        """Mean nats of a predicted token."""
        return sum(self.nats) / sum(self.counts)

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(self.loss)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of the perplexity, over blocks; None for a single block."""
        if len(self.nats) < 2:
            return None
        low, high = bootstrap_interval(self.nats, self.counts)  # in percent
        return math.exp(low / 100), math.exp(high / 100)


def perplexity(
    model: PreTrainedModel, blocks: TokenBlocks, task: LanguageModelling, *, max_batch_tokens: int = 8192
) -> Perplexity:
    """Of ``model`` (in evaluation mode) on every block, by the loss that the task trains with.

    Blocks do not see each other: a block's first tokens have little before them, which makes the figure higher than
    that of a sliding window. Raises UserError for ids that the model has no embedding for.
    """
    sizes = task.modality.sizes(blocks)
    found: dict[int, tuple[float, int]] = {}
    for places in tqdm(batches_by_length(sizes, max_batch_tokens), desc="perplexity", disable=None, leave=False):
        batch = PaddedBatch([blocks[place] for place in places])
        arguments, lengths = task.modality.arguments(batch, model)
        highest = int(arguments["input_ids"].max())
        if highest >= model.config.vocab_size:
            raise UserError(
                f"{blocks.set.file} holds the token {highest}, and the model knows {model.config.vocab_size}: expected "
                "tokens of the model's own tokenizer. Prepare the text with it"
            )
        with torch.inference_mode():
            outputs = task.outputs(model(**arguments))
            results = task.results(outputs, None, lengths, batch, None)
        found.update(zip(places, results, strict=True))
    nats, counts = zip(*(found[place] for place in sorted(found)), strict=True)
    return Perplexity(list(nats), list(counts))


def perplexity_of(
    source: str, tokens: str | Path, *, device: str = "cpu", max_batch_tokens: int = 8192
) -> tuple[Perplexity, PreTrainedModel, TokenBlocks]:
    """Of a model folder (or hub id) on a token set, with the model and the blocks.

    Raises UserError for a model or set that cannot be used.
    """
    head = family_of(load_config(source)).default_head
    model, task = load(source, device, head=head), TASKS[head]()
    blocks = task.dataset(Path(tokens), tokenizer_of([source], None), normaliser="none", unknown="error")
    return perplexity(model, blocks, task, max_batch_tokens=max_batch_tokens), model, blocks


def evaluate_language(
    source: str, tokens: str | Path, *, device: str = "cpu", max_batch_tokens: int = 8192, num_prompts: int = 16
) -> dict[str, Any]:
    """The figures of a model on a token set, added to the model's card; arguments and errors of `perplexity_of`."""
    of, model, blocks = perplexity_of(source, tokens, device=device, max_batch_tokens=max_batch_tokens)
    figure = {"metric": "perplexity", "value": of.value, "interval": of.interval, "count": sum(of.counts)}
    add_figure(Path(source), Path(tokens).stem, **figure, manifest_hash=blocks.set.fingerprint())
    summary = {"model": source, "tokens": str(tokens), "manifest_hash": blocks.set.fingerprint()} | figure
    summary |= {"nats": of.loss}
    if family_of(model).causal:
        summary["generation"] = check_generation(model, blocks, num_prompts=num_prompts)
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a language model, causal or masked")
    parser.add_argument("tokens", type=Path, help="JSON file of a token set, as recipes/pile prepares them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max_batch_tokens", type=int, default=8192)
    args = parser.parse_args(argv)
    try:
        summary = evaluate_language(args.model, args.tokens, device=args.device, max_batch_tokens=args.max_batch_tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
