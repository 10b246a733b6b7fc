"""Recognisers with random weights that say much, in folders of their own; the fixtures are those of two conftests."""

import json

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.families import families
from cald_speech.mixers import Bidirectional, Mamba2
from tests.helpers import tiny_model

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]


def save(folder, model):
    """The model and a processor for it in a folder."""
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(TOKENS)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), word_delimiter_token="|")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=True), tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def talkative(mixer=Bidirectional):
    """A converted model with random weights that says something else every few frames, delimiters among it."""
    model = tiny_model(families()["wav2vec2"])
    convert(model, LayerMap(mixer), initialise="random")
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
        # seven tokens are left, so that the delimiter comes often: <pad>, | and A to E
        model.lm_head.bias[[1, 2, 3, *range(10, len(TOKENS))]] = -1e4
    return model.eval()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """The folder of a bidirectional student."""
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("model"), talkative())


@pytest.fixture(scope="session")
def causal(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("causal"), talkative(Mamba2))


@pytest.fixture(scope="session")
def kept(tmp_path_factory) -> str:
    """The folder of a model that kept its attention."""
    return save(tmp_path_factory.mktemp("kept"), tiny_model(families()["wav2vec2"]))


@pytest.fixture
def talk(tmp_path):
    """Twelve seconds of noise."""
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / "talk.wav", 0.1 * generator.standard_normal(12 * 16_000), 16_000)
    return tmp_path / "talk.wav"


def whole_text(folder, samples: torch.Tensor) -> str:
    """What the model's own forward pass over the whole says."""
    processor = Wav2Vec2Processor.from_pretrained(folder)
    inputs = processor(samples.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        tokens = from_pretrained(folder)(inputs).logits[0].argmax(-1)
    return " ".join(processor.tokenizer.decode(tokens.tolist()).split())
