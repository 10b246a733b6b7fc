"""Text: our labels are what the Hugging Face tokenizer gives, and never <unk>."""

import json

import pytest
from transformers import AutoProcessor, Wav2Vec2CTCTokenizer

from cald_speech.data.text import character_vocabulary, encode, make_processor, normalise
from cald_speech.errors import UserError
from cald_speech.families.vocabulary import Vocabulary

TEXTS = ["HELLO WORLD", "IT'S ME"]


@pytest.fixture
def tokenizer(tmp_path):
    return make_processor(tmp_path, TEXTS).tokenizer


@pytest.mark.parametrize(
    ("name", "expected"), [("librispeech", "IT'S ME"), ("lower", "it's me"), ("none", " It's  me")]
)
def test_normalisers(name, expected):
    assert normalise(" It's  me", name) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it 's what they 're saying i 'll bet don 't you", "IT'S WHAT THEY'RE SAYING I'LL BET DON'T YOU"),
        ("five o 'clock y 'all i 've i 'd i 'm", "FIVE O'CLOCK Y'ALL I'VE I'D I'M"),
        ("get 'em 'cause it 's already joined isn't it", "GET 'EM 'CAUSE IT'S ALREADY JOINED ISN'T IT"),
        ("the 'same and the 'sand", "THE 'SAME AND THE 'SAND"),
        ("with <unk> and <UNK> 's book <sil> it <sil> 's", "WITH AND BOOK IT'S"),
        ("{BREATH} a {SMACK} word(2) [NOISE] and(3) {UH}", "A WORD AND"),
        ("<unk>", ""),
        ("", ""),
        (" THE  SAME ", "THE SAME"),
    ],
)
def test_tedlium(text, expected):
    assert normalise(text, "tedlium") == expected
    assert normalise(expected, "tedlium") == expected


def test_unknown_normaliser_lists_the_known():
    with pytest.raises(UserError, match=r"librispeech, tedlium, lower.*none.*'whisper'"):
        normalise("a", "whisper")


def test_vocabulary_has_wav2vec2_order():
    vocabulary = character_vocabulary(TEXTS)
    assert list(vocabulary)[:6] == ["<pad>", "<s>", "</s>", "<unk>", "|", "'"]
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    assert " " not in vocabulary


def test_processor_comes_back_from_its_folder(tmp_path):
    processor = make_processor(tmp_path, TEXTS, do_normalize=False, return_attention_mask=False)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab() == character_vocabulary(TEXTS)
    assert len(again.tokenizer) == len(character_vocabulary(TEXTS))
    assert (again.feature_extractor.do_normalize, again.feature_extractor.return_attention_mask) == (False, False)
    assert again.feature_extractor.sampling_rate == 16_000
    assert again.tokenizer.pad_token_id == 0


@pytest.mark.parametrize("text", [*TEXTS, "ME", "OLD MELLOW WELL"])
def test_labels_are_the_tokenizers_own(tokenizer, text):
    labels = encode(text, Vocabulary.of(tokenizer), utterance_id="a")
    assert labels == tokenizer(text).input_ids
    assert tokenizer.decode(labels, group_tokens=False) == text


def test_do_lower_case_means_upper_case_labels(tmp_path, tokenizer):
    tolerant = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), do_lower_case=True)
    labels = encode("hello", Vocabulary.of(tolerant), utterance_id="a")
    assert labels == encode("HELLO", Vocabulary.of(tokenizer), utterance_id="a")
    assert labels == tolerant("hello").input_ids


def test_the_delimiter_of_the_tokenizer_counts(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "_": 2, "A": 3}))
    other = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), word_delimiter_token="_")
    assert encode("A A", Vocabulary.of(other), utterance_id="a") == [3, 2, 3]


@pytest.mark.parametrize("text", ["hello", "HELLO, WORLD!", "HE|LO", "HELLÖ"])
def test_characters_outside_the_vocabulary_are_refused(tokenizer, text):
    with pytest.raises(UserError, match=r"utterance 1-2-3.*normaliser.*unknown_characters: drop") as caught:
        encode(text, Vocabulary.of(tokenizer), utterance_id="1-2-3")
    assert tokenizer.unk_token_id not in encode(text, Vocabulary.of(tokenizer), utterance_id="a", unknown="drop")
    assert repr(sorted(set(text) - set("".join(TEXTS)))[0]) in str(caught.value)


def test_dropping_leaves_single_spaces(tokenizer):
    labels = encode("HELLO - WORLD !", Vocabulary.of(tokenizer), utterance_id="a", unknown="drop")
    assert labels == encode("HELLO WORLD", Vocabulary.of(tokenizer), utterance_id="a")


def test_unknown_takes_two_values(tokenizer):
    with pytest.raises(UserError, match="'ignore'"):
        encode("ME", Vocabulary.of(tokenizer), utterance_id="a", unknown="ignore")
