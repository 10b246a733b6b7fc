# ruff: noqa: RUF001
"""Labels are the tokenizer's own, in every script, and what a model writes of its own words is these words."""

import json
import unicodedata

import pytest
import tokenizers
import torch
from tokenizers.trainers import BpeTrainer
from transformers import (
    ParakeetTokenizer,
    PreTrainedTokenizerFast,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2PhonemeCTCTokenizer,
)

from cald_speech.data.text import encode
from cald_speech.errors import UserError
from cald_speech.families.vocabulary import Vocabulary
from cald_speech.longform.formats import CUE_LINES, FORMATS, LINE_CHARACTERS
from cald_speech.longform.words import FrameTimes, TokenSpan, words
from cald_speech.tasks.decoding import greedy
from cald_speech.tasks.wer import score

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
# Script: what the vocabulary holds beside the special tokens, and a text that it writes.
SCRIPTS = {
    "Latin": (["|", *"ABDEHLORSTUW'"], "HOLD THE WORLD'S AUTHOR"),
    "lower case": (["|", *"abdehlortuw"], "hold the world"),
    "several characters": (["|", "TH", "ING", *"ABDEGHILNORTUW"], "THE THING WITH NOTHING AT BATH"),
    "subwords": (["|", "HE", "LLO", "WOR", "LD", *"DEHLORW"], "HELLO WORLD HELD"),
    "Turkish": (["|", *"abdıirkmsşzüğç"], "kız ısırdı şirazi"),
    "German": (["|", *"abdeghinorstuäöüß"], "straße grün übergoss"),
    "Russian": (["|", *"абвгдежзийклмнопрстуыьюя"], "добрый день йога"),
    "Greek": (["|", *"αβγδεζηικλνοόςστύ"], "λόγος κύκλος"),
    "Chinese": ([*"今天气很好我们去公园"], "今天天气很好"),
    "Japanese": ([*"きょうはいてんですガ"], "きょうはいいてんガ"),
    "Arabic": (["|", *"ابتسلمرحيكو"], "مرحبا سلام"),
    "Devanagari": (["|", *"नमस्तेदुिया"], "नमस्ते दुनिया"),
    "a space as delimiter": ([" ", *"ABC"], "AB CAB"),
}


def make_tokenizer(folder, tokens, **options) -> Wav2Vec2CTCTokenizer:
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *tokens])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    return Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **options)


@pytest.mark.parametrize(("tokens", "text"), SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_labels_are_the_tokenizers_and_its_words_come_back(tmp_path, tokens, text, form):
    tokenizer = make_tokenizer(tmp_path, tokens, word_delimiter_token=" " if " " in tokens else "|")
    vocabulary = Vocabulary.of(tokenizer)
    labels = encode(unicodedata.normalize(form, text), vocabulary, utterance_id="a")
    # Word by word: at a token of several characters the tokenizer swallows the space beside it.
    words = [tokenizer(word, add_special_tokens=False).input_ids for word in text.split()]
    own = [[vocabulary.delimiter, *word] if place else word for place, word in enumerate(words)]
    assert labels == [label for word in own for label in word]
    assert score({"a": text}, {"a": tokenizer.decode(labels, group_tokens=False)}).words.rate == 0


@pytest.mark.parametrize(("tokens", "text"), SCRIPTS.values(), ids=SCRIPTS)
def test_what_a_model_says_is_read_and_shown(tmp_path, tokens, text):
    """From logits to a transcript without an error, and to subtitles whose lines fit and hold every word once."""
    tokenizer = make_tokenizer(tmp_path, tokens, word_delimiter_token=" " if " " in tokens else "|")
    vocabulary = Vocabulary.of(tokenizer)
    space = "" if vocabulary.delimiter is None else " "
    said = space.join([text] * 9)
    labels = torch.tensor(encode(said, vocabulary, utterance_id="a"))
    frames = torch.stack([labels, torch.full_like(labels, vocabulary.blank)], dim=1).flatten()
    logits = torch.nn.functional.one_hot(frames, len(vocabulary.tokens)).float()[None]
    assert score({"a": said}, {"a": greedy(logits, torch.tensor([len(frames)]), tokenizer)[0]}).words.rate == 0
    spans = [TokenSpan(label, 2 * place, 2 * place, 1.0) for place, label in enumerate(labels.tolist())]
    shown = "".join(FORMATS["srt"].write(words(spans, vocabulary, FrameTimes(320, 320))))
    cues = [block.split("\n")[2:] for block in shown.strip("\n").split("\n\n")]
    wide = 2 if space == "" else 1
    assert sum(map(len, cues)) > 1
    assert all(1 <= len(lines) <= CUE_LINES for lines in cues)
    assert all(wide * len(line) <= LINE_CHARACTERS and line == line.strip() for lines in cues for line in lines)
    assert not any(unicodedata.combining(line[0]) for lines in cues for line in lines)
    assert space.join(line for lines in cues for line in lines) == said


def test_a_decomposed_vocabulary_writes_composed_text(tmp_path):
    tokens = ["|", *sorted(set(unicodedata.normalize("NFD", "tiếng việt")) - {" "})]
    vocabulary = Vocabulary.of(make_tokenizer(tmp_path, tokens))
    labels = encode("tiếng việt", vocabulary, utterance_id="a")
    assert (
        score({"a": "tiếng việt"}, {"a": "".join(vocabulary.write(t) for t in labels).replace("|", " ")}).words.rate
        == 0
    )


def test_what_no_head_has_an_output_for_is_no_label(tmp_path):
    """transformers adds a delimiter behind a vocabulary that has none."""
    tokenizer = make_tokenizer(tmp_path, [*"今天"])
    assert tokenizer.get_vocab()["|"] == tokenizer.vocab_size
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.delimiter is None
    assert encode("今 天", vocabulary, utterance_id="a") == [4, 5]


def test_a_space_is_the_delimiter_of_a_saved_tokenizer_too(tmp_path):
    """transformers takes a vertical bar for it when it reads the files again, and adds one where it wrote none."""
    made = make_tokenizer(tmp_path, [" ", *"AB"], word_delimiter_token=" ")
    made.save_pretrained(tmp_path)
    for tokenizer in (Wav2Vec2CTCTokenizer.from_pretrained(tmp_path), make_tokenizer(tmp_path, [" ", *"AB"])):
        vocabulary = Vocabulary.of(tokenizer, num_outputs=7)
        assert vocabulary.delimiter == 4 and encode("A B", vocabulary, utterance_id="a") == [5, 4, 6]


def test_only_what_the_head_has_is_a_label_or_the_blank(tmp_path):
    tokenizer = make_tokenizer(tmp_path, ["|", *"AB"])
    tokenizer.add_tokens(["[noise]"])
    with pytest.raises(UserError, match=r"characters outside the tokenizer's vocabulary: '\[' '\]'"):
        encode("A [AB] B", Vocabulary.of(tokenizer, num_outputs=7), utterance_id="a")
    assert encode("A [noise]", Vocabulary.of(tokenizer), utterance_id="a") == [5, 4, 7]
    assert 7 not in encode("A [noise]", Vocabulary.of(tokenizer, 7), utterance_id="a", unknown="drop")
    # Nothing in its files says which token is the blank: transformers adds one that no head has an output for.
    vocabulary = {token: place for place, token in enumerate(["[PAD]", "[UNK]", "|", *"AB"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    lost = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    with pytest.raises(UserError, match=r"got '<pad>', number \d of 5.*\"pad_token\": \"\[PAD\]\""):
        Vocabulary.of(lost, num_outputs=5)


def test_phonemes_are_words_of_their_own(tmp_path):
    make_tokenizer(tmp_path, ["n", "aː", "t", "tʃ"])
    tokenizer = Wav2Vec2PhonemeCTCTokenizer(str(tmp_path / "vocab.json"), do_phonemize=False)
    vocabulary = Vocabulary.of(tokenizer, num_outputs=8)
    labels = encode("n aː tʃ t", vocabulary, utterance_id="a")
    assert labels == [4, 5, 7, 6] and tokenizer.decode(labels) == "n aː tʃ t"
    spans = [TokenSpan(token, place, place, 1.0) for place, token in enumerate(labels)]
    assert "".join(FORMATS["text"].write(words(spans, vocabulary, FrameTimes(320, 320)))) == "n aː tʃ t\n"


@pytest.mark.parametrize(
    ("text", "letters"), [("İZMİR", "izmr"), ("STRAẞE", "aerstß"), ("λόγος", "ΛΌΓΟΣ"), ("straße", "STRAẞE")]
)
def test_a_letter_is_taken_in_the_case_that_the_vocabulary_has(text, letters):
    vocabulary = Vocabulary(("<pad>", "|", *letters), blank=0, delimiter=1)
    labels, strange = vocabulary.spell(text, any_case=True)
    assert (len(labels), strange) == (len(text), "")
    assert vocabulary.spell(text)[1], "without any_case it is refused"


def subword_tokenizer(texts, size=18) -> ParakeetTokenizer:
    """Laid out as Parakeet's: byte pairs of words that begin with a mark, and the blank behind all of them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.train_from_iterator(texts, BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False))
    tokenizer = ParakeetTokenizer(tokenizer_object=made, unk_token="<unk>", clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def test_subwords_are_the_tokenizers():
    text = "hello low holler hello wool oh w hero"
    tokenizer = subword_tokenizer([text])
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.blank == tokenizer.pad_token_id == len(tokenizer) - 1
    labels = encode(text, vocabulary, utterance_id="a")
    assert labels == tokenizer(text, add_special_tokens=False).input_ids and len(labels) > len(text.split())
    assert tokenizer.decode(labels, group_tokens=False) == text
    # What was written comes back as words with times, a space of its own at the end with none.
    lone = tokenizer.convert_tokens_to_ids("\N{LOWER ONE EIGHTH BLOCK}")
    spans = [TokenSpan(token, place, place, 1.0) for place, token in enumerate([*labels, lone])]
    found = list(words(spans, vocabulary, FrameTimes(320, 320)))
    assert [word.text for word in found] == text.split() and not any(word.joined for word in found)
    sizes = [len(vocabulary.spell(word)[0]) for word in text.split()]
    assert [word.text for word in words(spans, vocabulary, FrameTimes(320, 320), sizes=sizes)] == text.split()


def test_what_subwords_do_not_write_is_told_or_left_out():
    vocabulary = Vocabulary.of(tokenizer := subword_tokenizer(["hello hole"]))
    for text, told in (("he€llo", "'€'"), ("<unk>", "'<'"), ("<pad>h", "'<'")):
        with pytest.raises(UserError, match=f"utterance a: .*outside the tokenizer's vocabulary: .*{told}"):
            encode(text, vocabulary, utterance_id="a")
    labels = encode("he€llo € hole", vocabulary, utterance_id="a", unknown="drop")
    assert labels == tokenizer("hello hole", add_special_tokens=False).input_ids
    assert vocabulary.spell("Hello")[1] == "H"
    assert vocabulary.spell("HELLO", any_case=True) == vocabulary.spell("hello")


def test_a_tokenizer_that_writes_no_words_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})))
    with pytest.raises(UserError, match=r"expected a tokenizer of a CTC model, .* with neither"):
        Vocabulary.of(tokenizer)
