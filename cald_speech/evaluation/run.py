"""Transcribe a data set with a model, and score what came out."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, Wav2Vec2Processor

import cald_speech
from cald_speech.conversion.model_card import add_result
from cald_speech.data.batching import batches_by_length
from cald_speech.data.dataset import make_dataset
from cald_speech.data.manifests import manifest_hash
from cald_speech.data.text import normalise
from cald_speech.errors import UserError
from cald_speech.evaluation.report import run_facts, write_report
from cald_speech.families.lengths import frame_lengths
from cald_speech.ops.lengths import valid_frames
from cald_speech.tasks.decoding import BeamSearch, Decoder, greedy
from cald_speech.tasks.reading import load_processor
from cald_speech.tasks.wer import EvaluationResult, score


def evaluate_folder(
    source: str | Path,
    manifest: str | Path,
    output_folder: str | Path,
    *,
    split: str,
    beam_size: int | None = None,
    kenlm_path: str | Path | None = None,
    normaliser: str = "librispeech",
    max_batch_s: float = 60.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model folder (or hub id) on a manifest, write the report and update the model's card.

    Returns the report's summary. Decoding is greedy unless `beam_size` or `kenlm_path` is given (a beam of 100 where
    only the latter is). Other arguments as in `evaluate`; the files as in `write_report`.

    Raises: UserError, for whatever is wrong with the folder, the manifest, the audio, the device or the disk.
    """
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch {torch.__version__} sees no CUDA device here. Use --device cpu.")
    model = cald_speech.from_pretrained(source, dtype=dtype).eval()
    processor = load_processor(source)
    decoder, decoder_name = partial(greedy, tokenizer=processor.tokenizer), "greedy"
    if beam_size is not None or kenlm_path is not None:
        beam_size = 100 if beam_size is None else beam_size
        decoder = BeamSearch(processor.tokenizer, beam_size=beam_size, kenlm_path=kenlm_path)
        decoder_name = repr(decoder)
    # What the vocabulary cannot write stays in the reference, where it counts as an error of the model.
    dataset = make_dataset(manifest, processor, normaliser=normaliser, unknown="drop")
    options = {"normaliser": normaliser, "max_batch_s": max_batch_s, "device": device, "progress": progress}
    start = perf_counter()
    result = evaluate(model, processor, dataset, decoder=decoder, **options)
    summary = write_report(
        output_folder,
        result,
        manifest_hash=manifest_hash(manifest),
        normaliser=normaliser,
        model=str(source),
        decoder=decoder_name,
        split=split,
        extra=run_facts(model, device, dtype, perf_counter() - start),
    )
    add_result(Path(source), split, summary)
    return summary


def evaluate(
    model: PreTrainedModel,
    processor: Wav2Vec2Processor,
    dataset: DynamicItemDataset,
    *,
    decoder: Decoder | None = None,
    normaliser: str | None = None,
    max_batch_s: float = 60.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Transcribe every utterance with a ...ForCTC model in eval mode, which moves to `device`, and score the texts.

    The data set gives "id", "wav" ((N,) float32, normalised), "text" (the normalised reference) and "duration_s".
    Batches hold utterances of like length, at most `max_batch_s` seconds with padding (a longer utterance is a batch of
    its own; 0 takes all one by one). The decoder is greedy by default; hypotheses go through `normaliser`, if given, as
    the references did. `dtype`: that of the audio fed in, by default the model's own.

    Raises: UserError, for an empty data set, audio shorter than one frame, or memory that runs out; RuntimeError, for
    anything that fails in the model or the decoder, logits that are not finite included. Both name the utterances of
    the batch: an evaluation is whole or an error.
    """
    if model.training:
        raise ValueError("model: expected one in eval mode, since dropout changes transcripts: call model.eval()")
    decoder = decoder or partial(greedy, tokenizer=processor.tokenizer)
    model.to(device)
    with dataset.output_keys_as(["id", "text", "duration_s"]):  # no audio is read for these
        items = [dataset[place] for place in range(len(dataset))]
    if not items:
        raise UserError("expected at least one utterance to evaluate, but the data set is empty: check the split.")
    durations_s = {item["id"]: float(item["duration_s"]) for item in items}
    hypotheses: dict[str, str] = {}
    bar = tqdm(total=len(items), unit="utt", desc="evaluating", disable=not progress)
    with bar, dataset.output_keys_as(["wav"]), torch.inference_mode():
        for places in batches_by_length([item["duration_s"] for item in items], max_batch_s):
            ids = [items[place]["id"] for place in places]
            with _naming(ids):
                waves = [dataset[place]["wav"] for place in places]
                logits, lengths = _forward(model, ids, waves, dtype or model.dtype)
                hypotheses.update(zip(ids, decoder(logits, lengths), strict=True))
            bar.update(len(ids))
    if normaliser is not None:
        hypotheses = {key: normalise(text, normaliser) for key, text in hypotheses.items()}
    return score({item["id"]: item["text"] for item in items}, hypotheses, durations_s=durations_s)


def _forward(model: PreTrainedModel, ids: list[str], waves: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) on the model's device, and lengths (B,) in frames on the CPU."""
    num_samples = torch.tensor([len(wave) for wave in waves])
    lengths = frame_lengths(num_samples, model.config)
    short = [key for key, length in zip(ids, lengths.tolist(), strict=True) if length < 1]
    if short:
        raise UserError(
            f"utterances {', '.join(short)}: the audio is shorter than one frame. Leave them out of the data."
        )
    padded = pad_sequence(waves, batch_first=True).to(model.device, dtype)
    mask = valid_frames(num_samples, padded.size(1)).long().to(model.device)
    logits = model(padded, attention_mask=mask).logits
    finite = logits.isfinite().all(-1).cpu() | ~valid_frames(lengths, logits.size(1))
    if not finite.all():
        bad = [key for key, row in zip(ids, finite.all(1).tolist(), strict=True) if not row]
        raise RuntimeError(f"the logits of {', '.join(bad)} are not finite")
    return logits, lengths


@contextmanager
def _naming(ids: list[str]) -> Iterator[None]:
    """Errors inside name the utterances of the batch."""
    names = f"{len(ids)} utterances ({', '.join(ids)})"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device ran out of memory on a batch of {names}: take smaller batches with --max_batch_s (0 takes "
            f"utterances one by one), or another device."
        ) from error
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise RuntimeError(f"evaluation failed on a batch of {names}: {error}") from error
