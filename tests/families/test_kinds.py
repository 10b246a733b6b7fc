"""Speech and text are two interfaces: each family is of one kind, has its methods alone, and names its classes."""

import inspect
import sys

import pytest
from transformers import (
    BertConfig,
    ElectraConfig,
    Gemma2Config,
    HieraConfig,
    ParakeetTDTConfig,
    PretrainedConfig,
    SEWDConfig,
    Wav2Vec2Config,
)

from cald_speech.conversion import converted_class
from cald_speech.errors import UserError
from cald_speech.families import Family, SpeechFamily, TextFamily, families, family_of
from cald_speech.families.nearest import RELATIVES

every_family = pytest.mark.parametrize("family", families().values(), ids=families())


@every_family
def test_a_family_is_of_one_kind(family):
    kinds = [kind for kind in (SpeechFamily, TextFamily) if isinstance(family, kind)]
    (kind,), (other,) = kinds, {SpeechFamily, TextFamily} - set(kinds)
    assert family_of(family.config_class()) is family_of(family.config_class(), kind) is family
    own = {name for name in vars(other) if name not in vars(Family) and not name.startswith("_")}
    assert not {name for name in own if callable(getattr(other, name)) and hasattr(family, name)}


@every_family
def test_a_familys_file_names_the_converted_classes(family):
    text = inspect.getdoc(sys.modules[type(family).__module__])
    assert [
        name for base in family.classes.values() if (name := converted_class(family, base).__name__) not in text
    ] == []


def test_the_other_kind_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"expected a model that hears audio, got BertConfig: .* Give a speech encoder"):
        family_of(BertConfig(), SpeechFamily)
    with pytest.raises(UserError, match="wav2vec2 models hear audio: expected one that reads text"):
        family_of(Wav2Vec2Config(), TextFamily)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (SEWDConfig(), "'sew-d' is not known: .* The nearest is sew: its attention is DeBERTa's: positions are part"),
        (
            ParakeetTDTConfig(),
            "'parakeet_tdt' is not known: .* The nearest is parakeet_ctc: its decoder is a transducer",
        ),
        (ElectraConfig(), "'electra' is not known: .* The nearest is bert"),
        (Gemma2Config(), "'gemma2' is not known: .* The nearest is llama"),
        (
            HieraConfig(),
            "'hiera' is not known: expected one of .* A family is one file beside .*CONTRIBUTING",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_an_architecture_that_is_not_known_is_told_the_nearest(config, told):
    with pytest.raises(UserError, match=told):
        family_of(config)


def test_an_architecture_of_nearly_the_same_name():
    config = Wav2Vec2Config()
    config.__class__ = type("Other", (PretrainedConfig,), {"model_type": "wav2vec2s"})
    with pytest.raises(UserError, match=r"The nearest is wav2vec2\. "):
        family_of(config)


def test_the_nearest_is_known():
    assert {relative for relative, _ in RELATIVES.values()} <= families().keys()
