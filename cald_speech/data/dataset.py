"""From a manifest to what a batch is made of."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from transformers import SequenceFeatureExtractor, Wav2Vec2Processor

from cald_speech.data.audio import SAMPLE_RATE, read_entry
from cald_speech.data.manifests import Entry, read_manifest
from cald_speech.data.text import encode, normalise
from cald_speech.errors import UserError
from cald_speech.families.features import beyond_window, heard, window_of
from cald_speech.families.vocabulary import Vocabulary

OUTPUT_KEYS = ("id", "wav", "labels", "text", "duration_s")


def make_dataset(
    manifest_path: str | Path,
    processor: Wav2Vec2Processor,
    *,
    normaliser: str = "librispeech",
    unknown: str = "error",
    needs_labels: bool = False,
    num_outputs: int | None = None,
) -> DynamicItemDataset:
    """Open a manifest as a SpeechBrain data set, for `PaddedBatch`.

    Each item has "id" (str), "wav" ((N,) float32, 16 kHz, normalised by the processor's feature extractor for this
    utterance alone, so that padding never changes it), "labels" ((L,) int64, no padding), "text" (str, normalised; what
    `unknown="drop"` drops from the labels stays here, so that it counts in the WER) and "duration_s" (float).

    No label is one that a head of ``num_outputs`` lacks. Transcripts are all checked here, before training starts;
    audio is read when an item is asked for.

    Raises: UserError, with the utterance id, for a transcript that the tokenizer cannot write or audio that cannot be
    read; with `needs_labels` where nothing is left of any transcript; for a processor whose rate is not 16 kHz; and as
    `read_manifest`.

    Example
    -------
    >>> import tempfile
    >>> from cald_speech.data.audio import write_audio
    >>> from cald_speech.data.manifests import write_manifest
    >>> from cald_speech.data.text import make_processor
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_audio(folder / "a.flac", torch.rand(16_000) - 0.5)
    >>> write_manifest(folder / "a.json", {"a": {"audio": folder / "a.flac", "duration_s": 1.0, "text": "no"}})
    >>> item = make_dataset(folder / "a.json", make_processor(folder, ["NO"]))[0]
    >>> item["wav"].shape, item["labels"].tolist(), item["text"]
    (torch.Size([16000]), [5, 6], 'NO')
    """
    vocabulary = Vocabulary.of(processor.tokenizer, num_outputs)

    # The normalised text replaces the manifest's here, because a dynamic item may not have the name of a stored one.
    entries, num_labels = read_manifest(manifest_path), 0
    for utterance, entry in entries.items():
        entry["text"] = normalise(entry["text"], normaliser)
        if not vocabulary.writes_spaces:
            # Such a model writes no spaces, and cannot be wrong about them.
            entry["text"] = "".join(entry["text"].split())
        num_labels += len(encode(entry["text"], vocabulary, utterance_id=utterance, unknown=unknown))
    texts = [entry["text"] for entry in entries.values() if entry["text"]]
    if needs_labels and texts and not num_labels:
        raise UserError(
            f"{manifest_path}: expected transcripts that the tokenizer can write, but nothing is left of any of the "
            f"{len(texts)}, such as {texts[0]!r:.80}, written by the normaliser {normaliser!r}. Choose one that fits "
            "the tokenizer's letters, or give another tokenizer with --processor"
        )

    def labels(utterance: str, text: str) -> torch.Tensor:
        return torch.tensor(encode(text, vocabulary, utterance_id=utterance, unknown=unknown), dtype=torch.int64)

    return labelled_dataset(entries, processor.feature_extractor, labels)


def labelled_dataset(
    entries: Mapping[str, Entry],
    extractor: SequenceFeatureExtractor,
    labels: Callable[[str, str], torch.Tensor],
) -> DynamicItemDataset:
    """The same of a manifest's ``entries``, where ``labels`` makes an utterance's labels of its id and text.

    Raises UserError, before any audio is read, for utterances that are longer than the window that the model hears.
    """
    if extractor.sampling_rate != SAMPLE_RATE:
        raise UserError(f"expected a processor for 16000 Hz, but came one for {extractor.sampling_rate} Hz.")
    window_s = window_of(extractor)
    if window_s is not None:
        longer = {utterance: e["duration_s"] for utterance, e in entries.items() if e["duration_s"] > window_s + 1e-3}
        if longer:
            utterance, duration_s = max(longer.items(), key=lambda item: item[1])
            raise UserError(
                f"utterance {utterance} ({len(longer)} such utterances): {beyond_window(window_s, duration_s)}"
            )
        entries = {utterance: {**entry, "window_s": window_s} for utterance, entry in entries.items()}

    def wav(utterance: str) -> torch.Tensor:
        try:
            return heard(extractor, read_entry(entries[utterance]))
        except UserError as error:
            raise UserError(f"utterance {utterance}: {error}") from error

    dataset = DynamicItemDataset(entries)
    dataset.add_dynamic_item(wav, takes=("id",), provides="wav")
    dataset.add_dynamic_item(labels, takes=("id", "text"), provides="labels")
    dataset.set_output_keys(OUTPUT_KEYS)
    return dataset
