"""Words that a model reads of a data set, scored: utterance by utterance, or whole talks in one pass each."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from tqdm import tqdm
from transformers import PreTrainedModel, Wav2Vec2Processor

from cald_speech.conversion import from_pretrained
from cald_speech.conversion.model_card import add_result, read_facts
from cald_speech.data.audio import audio_info
from cald_speech.data.dataset import make_dataset
from cald_speech.data.manifests import Entry, manifest_hash, read_manifest
from cald_speech.data.text import NORMALISERS, normalise
from cald_speech.errors import UserError
from cald_speech.evaluation.forward import batches, check_finite, naming
from cald_speech.evaluation.report import run_facts, write_report
from cald_speech.families.hub import load_processor
from cald_speech.families.vocabulary import Vocabulary
from cald_speech.longform import AudioSource, transcribe
from cald_speech.longform.words import Word
from cald_speech.output import held
from cald_speech.tasks.decoding import BeamSearch, Decoder, greedy
from cald_speech.tasks.wer import EvaluationResult, score


def evaluate_folder(
    source: str | Path,
    manifest: str | Path,
    output_folder: str | Path,
    *,
    split: str,
    beam_size: int | None = None,
    kenlm_path: str | Path | None = None,
    normaliser: str | None = None,
    target_lang: str | None = None,
    max_batch_s: float = 60.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model folder (or hub id) on a manifest, write the report and update the model's card.

    Returns the report's summary. Decoding is greedy unless `beam_size` or `kenlm_path` is given (a beam of 100 where
    only the latter is). `normaliser` is that of the model's training, unless it is given. `target_lang` is as in
    `from_pretrained`, other arguments as in `evaluate`; the files as in `write_report`.

    Raises
    ------
    UserError
        for whatever is wrong with the folder, the manifest, the audio, the device or the disk.
    """
    with held(output_folder, split):
        normaliser = normaliser or normaliser_of(source)
        options = {"dtype": dtype, "device": device, "target_lang": target_lang}
        model = from_pretrained(source, head="ctc", new_head=False, **options)
        processor = load_processor(source, target_lang)
        decoder, decoder_name = partial(greedy, tokenizer=processor.tokenizer), "greedy"
        if beam_size is not None or kenlm_path is not None:
            beam_size = 100 if beam_size is None else beam_size
            decoder = BeamSearch(processor.tokenizer, beam_size=beam_size, kenlm_path=kenlm_path)
            decoder_name = repr(decoder)
        # What the vocabulary cannot write stays in the reference, where it counts as an error of the model.
        dataset = make_dataset(manifest, processor, normaliser=normaliser, unknown="drop")
        start = perf_counter()
        options = {"normaliser": normaliser, "max_batch_s": max_batch_s, "progress": progress}
        result = evaluate(model, processor, dataset, decoder=decoder, **options)
        summary = write_report(
            output_folder,
            result,
            manifest_hash=manifest_hash(manifest),
            normaliser=normaliser,
            model=str(source),
            decoder=decoder_name,
            split=split,
            extra={
                "manifest": str(Path(manifest).absolute()),
                **run_facts(model, device, dtype, perf_counter() - start),
            },
        )
        add_result(Path(source), split, summary)
    return summary


def normaliser_of(source: str | Path) -> str:
    """How the texts were written that a model of ours was trained on, as its folder says; else LibriSpeech's way.

    Example
    -------
    >>> normaliser_of("facebook/wav2vec2-base-960h")
    'librispeech'
    """
    known = read_facts(Path(source)).get("normaliser")
    return known if known in NORMALISERS else "librispeech"


def evaluate(
    model: PreTrainedModel,
    processor: Wav2Vec2Processor,
    dataset: DynamicItemDataset,
    *,
    decoder: Decoder | None = None,
    normaliser: str | None = None,
    max_batch_s: float = 60.0,
    progress: bool = True,
) -> EvaluationResult:
    """Transcribe every utterance with a ...ForCTC model in eval mode, and score the texts.

    The data set gives "id", "wav" ((N,) float32, normalised), "text" (the normalised reference) and "duration_s".
    Batches hold utterances of like length, at most `max_batch_s` seconds with padding (a longer utterance is a batch of
    its own; 0 takes all one by one). The decoder is greedy by default; hypotheses go through `normaliser`, if given, as
    the references did.

    Raises
    ------
    UserError
        for an empty data set, audio shorter than one frame, or memory that runs out.
    RuntimeError
        for anything that fails in the model or the decoder, logits that are not finite included. Both name the
        utterances of the batch: an evaluation is whole or an error.
    """
    if model.training:
        raise ValueError("model: expected one in eval mode, since dropout changes transcripts: call model.eval()")
    Vocabulary.of(processor.tokenizer, model.config.vocab_size)  # the blank is among the outputs
    decoder = decoder or partial(greedy, tokenizer=processor.tokenizer)
    with dataset.output_keys_as(["id", "text", "duration_s"]):  # no audio is read for these
        items = [dataset[place] for place in range(len(dataset))]
    if not items:
        raise UserError("expected at least one utterance to evaluate, but the data set is empty: check the split.")
    hypotheses: dict[str, str] = {}
    bar = tqdm(total=len(items), unit="utt", desc="evaluating", disable=not progress)
    with bar, dataset.output_keys_as(["id", "wav"]), torch.inference_mode():
        for batch in batches(dataset, model, max_batch_s):
            with naming(batch.ids):
                logits = model(**batch.arguments).logits
                check_finite("logits", logits, batch)
                hypotheses.update(zip(batch.ids, decoder(logits, batch.lengths.cpu()), strict=True))
            bar.update(len(batch.ids))
    if normaliser is not None:
        hypotheses = {key: normalise(text, normaliser) for key, text in hypotheses.items()}
    durations_s = {item["id"]: float(item["duration_s"]) for item in items}
    return score({item["id"]: item["text"] for item in items}, hypotheses, durations_s=durations_s)


def evaluate_talks(
    source: str | Path,
    manifest: str | Path,
    output_folder: str | Path,
    *,
    split: str,
    normaliser: str = "librispeech",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> dict[str, Any]:
    """Evaluate a model folder (or hub id) on whole recordings, each in one pass, scored within a manifest's segments.

    A talk's reference are the texts of its segments, in the order of time. What the model says elsewhere, over applause
    or what nobody transcribed, is not scored: a word counts where its middle lies within a segment.

    Returns the report's summary, which has the number of words outside of the segments too. The arguments are those of
    `evaluate_folder`, decoding is greedy, memory is bounded; `force` runs models whose every layer kept attention.

    Raises
    ------
    UserError
        for whatever is wrong with the folder, the manifest, the audio, the device or the disk.
    """
    with held(output_folder, split):
        model, processor = (
            from_pretrained(source, head="ctc", dtype=dtype, device=device, new_head=False),
            load_processor(source),
        )
        talks: dict[str, list[Entry]] = {}
        for entry in read_manifest(manifest).values():
            talks.setdefault(entry["audio"], []).append(entry)
        names = {path: Path(path).stem for path in talks}
        if len(set(names.values())) < len(names):
            names = {path: path for path in talks}
        references, hypotheses, durations_s, outside, start = {}, {}, {}, 0, perf_counter()
        for path, entries in talks.items():
            audio_info(path)  # long form reads what there is of a damaged file; here it is whole or an error
            audio = AudioSource.open(path)
            words = list(transcribe(model, audio, processor=processor, dtype=dtype, force=force))
            if audio.fault is not None:
                raise UserError(f"{path}: only the first {audio.fault.time_s:.2f} s can be read: {audio.fault.message}")
            entries = sorted(entries, key=lambda entry: entry.get("start_s", 0.0))
            inside = words_within(words, [_extent(entry) for entry in entries])
            references[names[path]] = normalise(" ".join(entry["text"] for entry in entries), normaliser)
            hypotheses[names[path]] = normalise(" ".join(word.text for word in inside), normaliser)
            durations_s[names[path]] = audio.duration_s
            outside += len(words) - len(inside)
        summary = write_report(
            output_folder,
            score(references, hypotheses, durations_s=durations_s),
            manifest_hash=manifest_hash(manifest),
            normaliser=normaliser,
            model=str(source),
            decoder="greedy, whole recordings",
            split=split,
            extra={"words_outside": outside, **run_facts(model, device, dtype, perf_counter() - start)},
        )
        add_result(Path(source), split, summary)
    return summary


def words_within(words: Iterable[Word], segments: Sequence[tuple[float, float]]) -> list[Word]:
    """The words whose middle lies within one of the ``segments``, (start, end) in seconds; they may overlap.

    Example
    -------
    >>> said = [Word("yes", 1.0, 1.4, 1.0, ()), Word("uh", 2.0, 2.2, 1.0, ()), Word("no", 2.9, 3.3, 1.0, ())]
    >>> [word.text for word in words_within(said, [(3.0, 5.0), (0.5, 2.0)])]
    ['yes', 'no']
    """
    merged: list[list[float]] = []
    for start_s, end_s in sorted(segments):
        if merged and start_s <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end_s)
        else:
            merged.append([start_s, end_s])
    starts = [start_s for start_s, _ in merged]

    def is_inside(word: Word) -> bool:
        middle_s = (word.start_s + word.end_s) / 2
        place = bisect_right(starts, middle_s) - 1
        return place >= 0 and middle_s <= merged[place][1]

    return [word for word in words if is_inside(word)]


def _extent(entry: Entry) -> tuple[float, float]:
    start_s = entry.get("start_s", 0.0)
    return start_s, start_s + entry["duration_s"]
