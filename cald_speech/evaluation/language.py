"""How well a language model predicts held-out text, whether what it generates can be trusted, and zero-shot tasks.

A likelihood can be right and generation wrong (arXiv 2603.26556), where a state is carried on wrongly or a text runs
into a loop. The tasks are those of lm-eval-harness (Gao et al., 10.5281/zenodo.12608602), through its own Hugging Face
interface.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from cald_speech.conversion import from_pretrained, load_config
from cald_speech.conversion.model_card import add_figure
from cald_speech.data.tokens import TokenBlocks
from cald_speech.errors import UserError, moved
from cald_speech.evaluation.forward import batches, naming
from cald_speech.families import family_of
from cald_speech.tasks.bootstrap import bootstrap_interval
from cald_speech.tasks.language_modelling import CausalLM, LanguageModelling, MaskedLM
from cald_speech.tasks.processors import tokenizer_of

TASKS: Mapping[str, type[LanguageModelling]] = {"lm": CausalLM, "masked_lm": MaskedLM}
NGRAM = 4
# Of He & Garner (arXiv 2410.06846), by lm-eval's names.
PAPER_TASKS = (
    "lambada_openai",
    "piqa",
    "winogrande",
    "wsc273",
    "arc_easy",
    "arc_challenge",
    "sciq",
    "logiqa",
)


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
    found: dict[int, tuple[float, int]] = {}
    bar = tqdm(total=len(blocks), unit="block", desc="perplexity", disable=None, leave=False)
    with bar, torch.inference_mode():
        for batch in batches(blocks, model, max_batch_tokens, modality=task.modality, whole_items=True):
            highest = int(batch.arguments["input_ids"].max())
            if highest >= model.config.vocab_size:
                raise UserError(
                    f"{blocks.set.file} holds the token {highest}, and the model knows {model.config.vocab_size}: "
                    "expected tokens of the model's own tokenizer. Prepare the text with it"
                )
            with naming(batch.ids, task.modality.batch_limit):
                outputs = task.outputs(model(**batch.arguments))
                results = task.results(outputs, None, batch.lengths, batch.items, None)
            found.update(zip(batch.places, results, strict=True))
            bar.update(len(batch.ids))
    nats, counts = zip(*(found[place] for place in sorted(found)), strict=True)
    return Perplexity(list(nats), list(counts))


def perplexity_of(
    source: str, tokens: str | Path, *, device: str = "cpu", max_batch_tokens: int = 8192
) -> tuple[Perplexity, PreTrainedModel, TokenBlocks]:
    """Of a model folder (or hub id) on a token set, with the model and the blocks.

    Raises UserError for a model or set that cannot be used.
    """
    head = family_of(load_config(source)).default_head
    model, task = from_pretrained(source, head=head, device=device, new_head=False), TASKS[head]()
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


def check_generation(
    model: PreTrainedModel, blocks: TokenBlocks, *, num_prompts: int = 16, new_tokens: int = 48
) -> dict[str, Any]:
    """Continue the beginnings of held-out blocks greedily, and compare with the whole forward pass and the text itself.

    Of short blocks, no more than half is generated.

    Returns
    -------
    step_error : the largest difference of a logit, token by token with the state carried on, from the forward pass
        over the whole, over the largest logit; float32 rounding is some 1e-6.
    same_padded : share of prompts that are continued alike alone and in a batch padded on the left.
    repeated, repeated_text : share in percent of 4-grams that occurred before, in the continuations and in what
        really follows; far more of them than in the text is a loop.
    agreement : share in percent of continuations' first tokens that are the text's.

    Raises
    ------
    UserError
        for blocks of fewer than 24 tokens.
    """
    length = blocks.set.block_tokens
    if length < 24:
        raise UserError(f"block_tokens: expected at least 24, for a prompt and its continuation, got {length}")
    new_tokens = min(new_tokens, length // 2)
    places = range(min(num_prompts, len(blocks)))
    rows = torch.stack([blocks.tokens(place) for place in places]).to(model.device)
    prompts = [row[place % 7 : length - new_tokens] for place, row in enumerate(rows)]  # of seven lengths
    alone = [_continued(model, prompt[None], None, new_tokens)[0] for prompt in prompts]
    batch, mask = _left_padded(prompts, model.generation_config.pad_token_id or 0)
    together = _continued(model, batch, mask, new_tokens)
    follows = rows[:, length - new_tokens :]
    same = [torch.equal(one, other) for one, other in zip(alone, together, strict=True)]
    first = [int(one[0] == true[0]) for one, true in zip(alone, follows, strict=True)]
    return {
        "prompts": len(prompts),
        "step_error": step_error(model, rows[:4]),
        "same_padded": sum(same) / len(same),
        "repeated": repeated_ngrams(alone),
        "repeated_text": repeated_ngrams(follows),
        "agreement": 100 * sum(first) / len(first),
    }


@torch.inference_mode()
def step_error(model: PreTrainedModel, rows: Tensor) -> float:
    """The largest difference between logits (B, T, V) step by step and as a whole, relative to the largest logit."""
    whole = model(rows, use_cache=False).logits.float()
    half = rows.size(1) // 2
    output = model(rows[:, :half], use_cache=True)
    steps = [output.logits.float()]
    for place in range(half, rows.size(1)):
        output = model(rows[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits.float())
    return float((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max())


def repeated_ngrams(texts: Sequence[Tensor], n: int = NGRAM) -> float:
    """Share in percent of the n-grams of each text (T,) that occurred in it before.

    Example
    -------
    >>> repeated_ngrams([torch.tensor([1, 2, 1, 2, 1, 2])], n=2)
    60.0
    """
    total = repeated = 0
    for text in texts:
        grams = [tuple(gram) for gram in text.unfold(0, n, 1).tolist()]
        total, repeated = total + len(grams), repeated + len(grams) - len(set(grams))
    return 100 * repeated / max(1, total)


@torch.inference_mode()
def _continued(model: PreTrainedModel, prompts: Tensor, mask: Tensor | None, new_tokens: int) -> Tensor:
    """(B, new_tokens) greedy tokens; no end of text ends them, so that all are as long."""
    mask = torch.ones_like(prompts) if mask is None else mask
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    pad = model.generation_config.pad_token_id or 0
    return model.generate(prompts, attention_mask=mask, pad_token_id=pad, **options)[:, prompts.size(1) :]


def _left_padded(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    batch = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0), value=pad) for p in prompts])
    mask = torch.stack([torch.arange(longest, device=p.device) >= longest - len(p) for p in prompts])
    return batch, mask.long()


# --- zero-shot tasks


def run_tasks(
    source: str,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row {task, metric, value, stderr, version} for each metric of each task, and the mean accuracy last.

    Arguments
    ---------
    source : folder or hub id of a causal model, converted or not.
    tasks : lm-eval's names.
    include_path : a folder with task files beside lm-eval's own.
    limit : documents of each task; the figures are then no benchmark's.

    Raises
    ------
    UserError
        where lm-eval is not installed, or a task is not known or cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"the tasks need lm-eval, which cannot be imported ({error}): install it with `pip install "
            "'cald-speech[text]'`, or leave them out with --tasks none"
        ) from error
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"include_path: expected a folder of task files, but there is no {include_path}")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"tasks: lm-eval knows no {', '.join(unknown)}: expected names from `lm-eval ls tasks`, or files in "
            "--include_path"
        )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    model = from_pretrained(source, head="lm", device=device, new_head=False)
    harness = HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer_of([source], None),
        batch_size=batch_size,
        device=device,
    )
    try:
        found = lm_eval.simple_evaluate(
            harness, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"tasks: the data of {', '.join(tasks)} cannot be had: {error}. They come from the hub: without a network, "
            "give files of your own with --include_path"
        ) from error
    return _task_rows(found)


def _task_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = metrics.get(f"{metric}_stderr,{kind}")
                version = found["versions"].get(task)
                rows.append({"task": task, "metric": metric, "value": value, "stderr": stderr, "version": version})
    accuracies = [row["value"] for row in rows if row["metric"] == "acc"]
    if len(accuracies) > 1:
        mean = sum(accuracies) / len(accuracies)
        rows.append({"task": "mean", "metric": "acc", "value": mean, "stderr": None, "version": None})
    return rows


if __name__ == "__main__":
    moved("cald-speech perplexity")
