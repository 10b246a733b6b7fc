"""Data sets: items as the Brain expects them, batches that padding does not change, errors with the utterance's id."""

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch.utils.data import DataLoader

from cald_speech.data.audio import read_audio, write_audio
from cald_speech.data.dataset import make_dataset
from cald_speech.data.manifests import read_manifest, write_manifest
from cald_speech.data.text import make_processor
from cald_speech.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for name, num_samples, text in (("a", 8_000, "one {two}"), ("b", 5_000, "two")):
        write_audio(tmp_path / f"{name}.flac", 0.1 + 0.2 * torch.rand(num_samples, generator=generator))
        entries[name] = {"audio": tmp_path / f"{name}.flac", "duration_s": num_samples / 16_000, "text": text}
    write_manifest(tmp_path / "a.json", entries)
    return tmp_path


@pytest.fixture
def processor(tmp_path):
    return make_processor(tmp_path / "processor", ["ONE {TWO}"])


def test_items(corpus, processor):
    item = make_dataset(corpus / "a.json", processor)[1]
    assert (item["id"], item["text"], item["duration_s"]) == ("b", "TWO", 0.3125)
    assert item["labels"].dtype == torch.int64
    assert item["labels"].tolist() == processor.tokenizer("TWO").input_ids
    assert item["wav"].dtype == torch.float32 and item["wav"].shape == (5_000,)
    assert item["wav"].mean().abs() < 1e-5 and item["wav"].std() == pytest.approx(1, abs=1e-3)


def test_a_segment_is_read_out_of_its_recording(corpus, processor):
    whole = read_manifest(corpus / "a.json")["a"]
    write_manifest(corpus / "b.json", {"c": whole | {"start_s": 0.25, "duration_s": 0.125}})
    item = make_dataset(corpus / "b.json", processor)[0]
    audio = read_audio(corpus / "a.flac")[4_000:6_000]
    torch.testing.assert_close(item["wav"], (audio - audio.mean()) / audio.std(correction=0), atol=1e-3, rtol=0)


def test_padding_changes_nothing(corpus, processor):
    dataset = make_dataset(corpus / "a.json", processor)
    (batch,) = DataLoader(dataset, batch_size=2, collate_fn=PaddedBatch)
    assert batch.id == ["a", "b"] and batch.text == ["ONE {TWO}", "TWO"]
    assert batch.wav.lengths.tolist() == [1.0, 0.625]
    assert torch.equal(batch.wav.data[1, :5_000], dataset[1]["wav"])
    assert not batch.wav.data[1, 5_000:].any()
    assert batch.labels.data.shape == (2, 9)


def test_normalisation_is_the_processors(corpus, tmp_path):
    raw = make_processor(tmp_path / "raw", ["ONE {TWO}"], do_normalize=False)
    assert make_dataset(corpus / "a.json", raw)[0]["wav"].mean() > 0.15


def test_text_is_refused_before_any_audio_is_read(corpus, tmp_path):
    narrow = make_processor(tmp_path / "narrow", ["ONE TWO"])
    with pytest.raises(UserError, match=r"utterance a: .*'\{'"):
        make_dataset(corpus / "a.json", narrow)
    assert len(make_dataset(corpus / "a.json", narrow, unknown="drop")[0]["labels"]) == 7


@pytest.mark.parametrize("num_workers", [0, 1])
def test_audio_errors_name_the_utterance(corpus, processor, num_workers):
    (corpus / "b.flac").unlink()
    dataset = make_dataset(corpus / "a.json", processor)
    with pytest.raises(UserError, match=r"utterance b: .*b\.flac"):
        list(DataLoader(dataset, batch_size=2, collate_fn=PaddedBatch, num_workers=num_workers))


def test_other_rates_are_refused(corpus, processor):
    processor.feature_extractor.sampling_rate = 8_000
    with pytest.raises(UserError, match="8000 Hz"):
        make_dataset(corpus / "a.json", processor)
