"""What every speech family promises, of the one that hears windows and classifies them."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import (
    AutoModelForAudioClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    pipeline,
)

import cald_speech
from cald_speech import LayerMap, convert
from cald_speech.commands import main
from cald_speech.data.audio import write_audio
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.families.features import heard
from cald_speech.mixers import Bidirectional, Mamba2, WindowedAttention
from cald_speech.training.run import run
from tests.families.contract import captured_layers, check_checkpointing, check_opened_layers
from tests.helpers import TOLERANCE, gradients, relative_error, worst_gradient

FAMILY = families()["whisper"]
PARTIAL = LayerMap(Bidirectional, {1: None, 2: WindowedAttention})
POSITIONS = 50  # a window of one second
EXTRACTOR = WhisperFeatureExtractor(chunk_length=1)
SMALL = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
SMALL |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_target_positions": 20}
SMALL |= {"max_source_positions": POSITIONS, "classifier_proj_size": 16, "vocab_size": 20, "num_labels": 3}
SMALL |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)


def tiny(**options):
    torch.manual_seed(0)
    return FAMILY.load(WhisperConfig(**(SMALL | options))).eval()


def converted(layer_map=PARTIAL, **options):
    model = tiny(**options)
    convert(model, layer_map)
    return model.eval()


def windows(seconds=(0.2, 1.0, 0.73)):
    """Features (B, C, 2 * POSITIONS) of noises, and where they are audio."""
    generator = torch.Generator().manual_seed(0)
    noises = [0.1 * torch.randn(round(16_000 * s), generator=generator).numpy() for s in seconds]
    made = EXTRACTOR(noises, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    return made.input_features, made.attention_mask


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_without_mixers_it_is_hugging_faces(attention):
    model = tiny()
    twin = FAMILY.classes["classification"](copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    convert(model, LayerMap())
    for one in (model, twin):
        one.set_attn_implementation(attention)
    features, mask = windows()
    assert torch.equal(model(features).logits, twin(features).logits)
    assert torch.equal(model(features, attention_mask=mask).logits, twin(features).logits)
    with captured_layers(model, FAMILY) as states:
        logits = model(features).logits
    check_opened_layers(model, FAMILY, LayerMap(), states)
    pooled = model.projector(FAMILY.final_norm(model)(states[-1][1])).mean(1)
    assert torch.equal(model.classifier(pooled), logits)


def test_neither_batch_nor_mask_nor_silence_changes_a_result():
    model = converted()
    features, mask = windows()
    with captured_layers(model, FAMILY) as states:
        together = model(features, attention_mask=mask).logits
    assert FAMILY.context(model).frames is None
    assert FAMILY.frame_lengths(torch.tensor([features.size(2)]), model.config).tolist() == [POSITIONS]
    assert all(x.shape == (3, POSITIONS, 32) for x, _ in states)
    check_opened_layers(model, FAMILY, PARTIAL, states)
    together.square().sum().backward()
    expected = gradients(model)
    assert expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"encoder.embed_positions.weight"}
    model.zero_grad()
    alone = torch.cat([model(row[None]).logits for row in features])
    assert relative_error(alone, together) <= TOLERANCE["rounding"]
    alone.square().sum().backward()
    error, name = worst_gradient(gradients(model), expected)
    assert error <= TOLERANCE["gradient"], name
    samples = 0.1 * torch.randn(5_000)
    assert torch.equal(heard(EXTRACTOR, samples), heard(EXTRACTOR, torch.cat([samples, torch.zeros(4_000)])))


def test_gradient_checkpointing_gives_the_same_gradients():
    model = converted(LayerMap(Bidirectional, {1: None}))
    features, _ = windows()
    slot, _ = FAMILY.slot_ends(FAMILY.layers(model)[0])
    check_checkpointing(model, slot, lambda: list(model(features).logits), use_reentrant=False)


@torch.no_grad()
def test_attention_weights_and_blocks_are_the_layers_own():
    model = tiny()
    layer = FAMILY.layers(model)[1]
    weights = FAMILY.attention_weights(model, layer)
    assert weights.q.shape == weights.k.shape == (2, 16, 32) and weights.k_bias is None
    assert torch.equal(weights.v_bias.flatten(), layer.self_attn.v_proj.bias)
    x = torch.randn(1, 23, 32)
    expected = FAMILY.open(layer).slot(x, **FAMILY.layer_arguments(model, x, None))
    attention = FAMILY.block_attention(model, layer)
    blocks = torch.cat([attention.attend(x[:, a : a + 9], *attention.keys_values(x, 0), a) for a in (0, 9, 18)], 1)
    assert relative_error(blocks, expected) <= TOLERANCE["rounding"]
    window = WindowedAttention(32, 2, window=23)
    window.init_from_attention(weights)
    assert relative_error(window(x), expected) <= TOLERANCE["rounding"]


@torch.no_grad()
def test_saved_and_loaded_and_in_the_pipeline(tmp_path):
    model = converted(LayerMap(Mamba2, {1: None}))
    model.save_pretrained(tmp_path)
    cald_speech.conversion.save_processor(EXTRACTOR, model, tmp_path)
    features, _ = windows()
    expected = model(features).logits
    for loaded in (
        AutoModelForAudioClassification.from_pretrained(tmp_path).eval(),
        cald_speech.from_pretrained(tmp_path, head="classification"),
    ):
        assert type(loaded).__name__ == "CaldWhisperForAudioClassification"
        assert torch.equal(loaded(features).logits, expected)
    run = pipeline("audio-classification", str(tmp_path))
    noise = (0.1 * torch.randn(7_000)).numpy()
    (said,) = run([noise], top_k=1)
    scores = model(heard(EXTRACTOR, torch.from_numpy(noise)).t()[None]).logits.softmax(-1)
    assert np.isclose(said[0]["score"], scores.max(), atol=1e-6)


def test_an_encoder_that_transcribed_becomes_a_classifier(tmp_path):
    whole = WhisperForConditionalGeneration(WhisperConfig(**SMALL))
    for name, model in (("whole", whole), ("without a head", whole.model)):
        model.save_pretrained(tmp_path / name)
        loaded = cald_speech.from_pretrained(tmp_path / name, head="classification", num_labels=5)
        state = loaded.encoder.state_dict()
        assert all(torch.equal(v, state[key]) for key, v in whole.model.encoder.state_dict().items())
        assert loaded.classifier.weight.shape == (5, 16)
    with pytest.raises(UserError, match="head: expected one of classification"):
        cald_speech.from_pretrained(tmp_path / "whole")


def test_what_is_no_window_is_refused():
    model, twice = converted(), torch.cat(2 * [windows()[0]], dim=2)
    with pytest.raises(UserError, match=r"windows of 1 s, 80 channels of 100 frames, got 80 x 200.*hears no more"):
        model(twice)
    with pytest.raises(UserError, match=r"got 16000\. The model's own feature extractor"):
        model(torch.zeros(1, 16_000))
    with pytest.raises(UserError, match="hears windows of 1 s"):
        FAMILY.front_end(model)
    with pytest.raises(UserError, match=r"expected up to 1 s, the window that this model hears, got 1\.5 s"):
        heard(EXTRACTOR, torch.zeros(24_000))


def test_a_share_to_mask_turns_specaugment_on(tmp_path):
    tiny().save_pretrained(tmp_path)
    features, mask = windows()
    asked = cald_speech.from_pretrained(tmp_path, head="classification", mask_time_prob=0.5)
    assert asked.config.apply_spec_augment and not tiny().config.apply_spec_augment
    heard_by = []
    asked.encoder.conv1.register_forward_pre_hook(lambda _, args: heard_by.append(args[0]))
    untouched = features.clone()
    for training in (False, True):
        asked.train(training)(features, attention_mask=mask)
    assert torch.equal(features, untouched) and torch.equal(heard_by[0], features)
    changed = (heard_by[1] != features).any(1)
    assert changed.any() and not changed[mask == 0].any()


@pytest.fixture
def corpus(tmp_path):
    """Six tones of up to a second, by two singers."""
    folder = tmp_path / "corpus"
    with (folder.mkdir() or folder / "all.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "path", "singer"])
        for number in range(6):
            times = torch.arange(6_000 + 1_500 * number) / 16_000
            write_audio(folder / f"{number}.wav", 0.3 * torch.sin(times * (1_000 + 2_000 * (number % 2))))
            rows.writerow([number, f"{number}.wav", "low" if number % 2 else "high"])
    return folder / "all.csv"


def test_trained_and_evaluated_from_the_command_line(corpus, tmp_path):
    """A teacher of what transcribed, a student of the teacher, and the labels that it gives."""
    whisper, teacher, out = tmp_path / "whisper", tmp_path / "teacher", tmp_path / "out"
    WhisperForConditionalGeneration(WhisperConfig(**SMALL)).save_pretrained(whisper)
    EXTRACTOR.save_pretrained(whisper)
    words = ["hparams/asr/labels.yaml", f"--train={corpus}", f"--valid={corpus}", "--columns={text: singer}"]
    words += ["--max_batch_s=3", "--noprogressbar"]
    unguided = ["--guidance=unguided", f"--source={whisper}", "--num_steps=1", "--layer_map={default: null}"]
    run([*words, *unguided, f"--output_folder={teacher}"])
    assert json.loads((teacher / "model" / "config.json").read_text())["model_type"] == "whisper"
    guided = ["--guidance=hybrid", "--switch_step=2", "--align_steps=1", "--num_steps=4", "--teacher_mask=student"]
    brain = run([*words, *guided, f"--teacher={teacher / 'model'}", f"--output_folder={out}"])
    assert brain.optimizer_step == 4 and brain.skipped.count == 0
    model = out / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == "cald_whisper"
    done = CliRunner().invoke(main, ["labels", str(model), str(out / "manifests" / "valid.json")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["of"] == 6


def test_utterances_beyond_the_window_are_named(corpus, tmp_path):
    write_audio(corpus.parent / "3.wav", torch.zeros(24_000))
    WhisperForConditionalGeneration(WhisperConfig(**SMALL)).save_pretrained(tmp_path / "model")
    EXTRACTOR.save_pretrained(tmp_path / "model")
    words = ["hparams/asr/labels.yaml", f"--train={corpus}", f"--valid={corpus}", "--columns={text: singer}"]
    words += ["--guidance=unguided", f"--source={tmp_path / 'model'}", f"--output_folder={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"utterance 3 \(1 such utterances\): expected up to 1 s.*got 1\.5 s"):
        run(words)


def test_converted_by_the_command(tmp_path):
    model = tmp_path / "model"
    tiny().save_pretrained(model)
    EXTRACTOR.save_pretrained(model)
    # As published classifiers have it: a processor is named whose tokenizer is not there.
    place = model / "preprocessor_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"processor_class": "WhisperProcessor"}))
    done = CliRunner().invoke(main, ["convert", str(model), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert pipeline("audio-classification", str(tmp_path / "out"))(np.zeros(8_000, np.float32))
