"""A transcript depends on the utterance alone, and an evaluation is whole or an error that names the utterances."""

import json
from functools import partial

import pytest
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from cald_speech.data.audio import write_audio
from cald_speech.data.batching import batches_by_length
from cald_speech.data.manifests import manifest_hash, write_manifest
from cald_speech.data.text import make_processor
from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate, evaluate_folder
from cald_speech.tasks.decoding import greedy

DURATIONS_S = {"a": 1.0, "b": 0.31, "c": 0.5, "d": 0.3, "e": 0.77, "f": 0.1}
quiet = partial(evaluate, progress=False)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"), ["ABCDE"])


@pytest.fixture
def model(processor):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    model = Wav2Vec2ForCTC(config).eval()
    model.lm_head.weight.data *= 50  # so that the transcripts hold many letters, and ties are out of reach
    return model


@pytest.fixture
def make(model):
    def make(ids=tuple(DURATIONS_S), **changed) -> DynamicItemDataset:
        generator = torch.Generator().manual_seed(1)
        waves = {key: torch.randn(int(16_000 * seconds), generator=generator) for key, seconds in DURATIONS_S.items()}
        waves |= changed
        data = {key: {"wav": waves[key], "text": "AB C", "duration_s": len(waves[key]) / 16_000} for key in ids}
        return DynamicItemDataset(data, output_keys=["id", "wav", "text", "duration_s"])

    return make


def texts(result) -> dict[str, str]:
    return {utterance.id: utterance.hypothesis for utterance in result.utterances}


def test_batch_size_and_order_change_nothing(model, processor, make):
    alone = texts(quiet(model, processor, make(), max_batch_s=0))
    assert list(alone) == sorted(DURATIONS_S) and all(alone.values()) and len(set(alone.values())) > 3
    assert texts(quiet(model, processor, make(), max_batch_s=60.0)) == alone
    assert texts(quiet(model, processor, make(), max_batch_s=1.2)) == alone
    assert texts(quiet(model, processor, make(ids="fdbeca"), max_batch_s=60.0)) == alone


def test_alone_is_what_transformers_gives(model, processor, make):
    dataset = make()
    result = texts(quiet(model, processor, dataset))
    for item in (dataset[place] for place in range(len(dataset))):
        with torch.inference_mode():
            best = model(item["wav"][None]).logits[0].argmax(-1).tolist()
        assert result[item["id"]] == " ".join(processor.tokenizer.decode(best).split())


def test_decoder_normaliser_and_durations(model, processor, make):
    def decoder(logits, lengths):
        assert logits.shape[:2] == (len(lengths), lengths.max())
        return ["ab  c"] * len(lengths)

    plain = quiet(model, processor, make(), decoder=decoder)
    assert plain.words.rate == 100.0 and plain.utterances[0].duration_s == 1.0
    assert quiet(model, processor, make(), decoder=decoder, normaliser="librispeech").words.rate == 0.0


def test_batches_hold_every_utterance_once_within_the_limit():
    durations = torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist()
    groups = batches_by_length(durations, 3.0)
    assert sorted(place for group in groups for place in group) == list(range(100))
    assert all(len(group) * max(durations[place] for place in group) <= 3.0 for group in groups)
    assert len(batches_by_length(durations, 0)) == 100


def test_a_failing_batch_names_its_utterances(model, processor, make):
    def decoder(logits, lengths):
        if len(lengths) == 2:
            raise ValueError("no way")
        return greedy(logits, lengths, processor.tokenizer)

    with pytest.raises(RuntimeError, match=r"2 utterances \(a, e\): no way"):
        quiet(model, processor, make(), decoder=decoder, max_batch_s=2.0)


def test_logits_that_are_not_finite_are_an_error(model, processor, make):
    with pytest.raises(RuntimeError, match="logits of c are not finite"):
        quiet(model, processor, make(c=torch.full((8000,), torch.nan)))


def test_audio_shorter_than_a_frame_is_named_in_any_batch(model, processor, make):
    with pytest.raises(UserError, match="utterances f: the audio is shorter than one frame"):
        quiet(model, processor, make(f=torch.zeros(399)))


def test_training_mode_and_too_few_hypotheses_are_refused(model, processor, make):
    with pytest.raises(RuntimeError, match="evaluation failed on a batch of 6 utterances"):
        quiet(model, processor, make(), decoder=lambda logits, lengths: ["A"])
    with pytest.raises(ValueError, match="eval mode"):
        quiet(model.train(), processor, make())


@pytest.fixture
def folder_and_manifest(model, processor, make, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    dataset, entries = make(), {}
    for item in (dataset[place] for place in range(len(dataset))):
        path = tmp_path / f"{item['id']}.flac"
        write_audio(path, item["wav"] / 8)
        entries[item["id"]] = {"audio": path, "duration_s": item["duration_s"], "text": "ab é"}
    write_manifest(tmp_path / "test.json", entries)
    return tmp_path / "model", tmp_path / "test.json"


def test_a_folder_is_evaluated_and_reported(folder_and_manifest, tmp_path):
    folder, manifest = folder_and_manifest
    summary = evaluate_folder(folder, manifest, tmp_path / "out", split="test", progress=False)
    assert summary["decoder"] == "greedy" and summary["model"] == str(folder) and summary["dtype"] == "float32"
    assert summary["manifest_hash"] == manifest_hash(manifest)
    assert summary["words"]["count"] == 12 and summary["num_utterances"] == 6
    line = json.loads((tmp_path / "out/test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    # a letter that the vocabulary lacks stays in the reference
    assert line["reference"] == "AB É"
    beam = evaluate_folder(folder, manifest, tmp_path / "beam", split="test", beam_size=2, progress=False)
    assert beam["decoder"] == "BeamSearch(beam_size=2)"


def test_bfloat16_is_evaluated(folder_and_manifest, tmp_path):
    summary = evaluate_folder(*folder_and_manifest, tmp_path, split="t", dtype=torch.bfloat16, progress=False)
    assert summary["dtype"] == "bfloat16" and summary["num_utterances"] == 6


def test_a_folder_without_processor_files_says_so(folder_and_manifest, tmp_path):
    folder, manifest = folder_and_manifest
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(UserError, match="expected the processor's files"):
        evaluate_folder(folder, manifest, tmp_path / "out", split="test", progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_user_error(folder_and_manifest, tmp_path):
    with pytest.raises(UserError, match="no CUDA device"):
        evaluate_folder(*folder_and_manifest, tmp_path, split="test", device="cuda", progress=False)
