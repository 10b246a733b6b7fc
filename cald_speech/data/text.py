"""Text: transcripts made uniform, character vocabularies, and labels for CTC."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.errors import UserError
from cald_speech.families.vocabulary import Vocabulary
from cald_speech.files import whole_file

WORD_DELIMITER = "|"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


def _collapse_spaces(text: str) -> str:
    return " ".join(text.split())


# TED-LIUM splits "it's", "don't", "o'clock" and "y'all" before the apostrophe; 'em and 'cause are words of their own.
_ENDING = r"'(?:s|t|re|ve|m|ll|d|clock|all)\b"
_SPLIT = re.compile(rf"(?<=\w) +(?={_ENDING})", re.IGNORECASE)
# What its transcripts mark and nobody says: <unk>, with its ending, and <sil>, {NOISE} and [NOISE], the (2) of a word's
# second pronunciation.
_MARKS = re.compile(rf"<unk>(?: *{_ENDING})?|<[^<>]*>|\{{[^{{}}]*\}}|\[[^\[\]]*\]|\([^()]*\)", re.IGNORECASE)


def _tedlium(text: str) -> str:
    return _SPLIT.sub("", _collapse_spaces(_MARKS.sub(" ", text))).upper()


# In Turkish and Azerbaijani I and ı, İ and i are two letters: to bring them to one would hide every confusion.
_TURKIC = (("i", "İ"), ("\N{LATIN SMALL LETTER DOTLESS I}", "I"))


def _turkic(text: str, *, upper: bool) -> str:
    for small, capital in _TURKIC:
        text = text.replace(small, capital) if upper else text.replace(capital, small)
    return _collapse_spaces(text.upper() if upper else text.lower())


# The name travels with every published WER: two WERs compare only if their normalisers are the same.
NORMALISERS: Mapping[str, Callable[[str], str]] = {
    "librispeech": lambda text: _collapse_spaces(text.upper()),
    # Upper case, since that is what wav2vec2's published vocabularies write.
    "tedlium": _tedlium,
    "lower": lambda text: _collapse_spaces(text.lower()),
    "turkic_upper": partial(_turkic, upper=True),
    "turkic_lower": partial(_turkic, upper=False),
    # transformers' own, of the Whisper paper; the English one without its table of spellings, which a model ships.
    "whisper_basic": BasicTextNormalizer(),
    "whisper_english": EnglishTextNormalizer({}),
    "none": lambda text: text,
}


def normalise(text: str, name: str) -> str:
    """Apply the normaliser called `name` (a key of `NORMALISERS`), and Unicode's composed form (NFC) with every one.

    Raises: UserError, where there is none of that name.

    Example
    -------
    >>> normalise("turn  on the light", "librispeech")
    'TURN ON THE LIGHT'
    >>> normalise("{BREATH} it 's <unk> for(2) the o 'clock news", "tedlium")
    "IT'S FOR THE O'CLOCK NEWS"
    """
    if name not in NORMALISERS:
        raise UserError(
            f"expected a text normaliser ({', '.join(NORMALISERS)}), but came {name!r}. Choose one of these."
        )
    return unicodedata.normalize("NFC", NORMALISERS[name](unicodedata.normalize("NFC", text)))


def character_vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """The vocabulary {token: id} of wav2vec2's CTC heads: <pad> (which is the blank) 0, the other special tokens, the
    word delimiter, then the characters of `texts`, sorted.

    Example
    -------
    >>> list(character_vocabulary(["BAD CAB"]))
    ['<pad>', '<s>', '</s>', '<unk>', '|', 'A', 'B', 'C', 'D']
    """
    characters = set().union(*texts) - {WORD_DELIMITER}
    tokens = [*SPECIAL_TOKENS, WORD_DELIMITER, *sorted(c for c in characters if not c.isspace())]
    return {token: index for index, token in enumerate(tokens)}


def make_processor(
    folder: str | Path, texts: Iterable[str], *, do_normalize: bool = True, return_attention_mask: bool = True
) -> Wav2Vec2Processor:
    """Make the processor of a new CTC model from its (normalised) training texts, and write its files into `folder`.

    `do_normalize` brings each utterance to mean 0 and variance 1. `return_attention_mask` is True for models whose
    front end normalises by layer; Hugging Face expects False for those with group norm.

    Example
    -------
    >>> import tempfile
    >>> processor = make_processor(tempfile.mkdtemp(), ["ONE TWO"])
    >>> processor.tokenizer("TWO").input_ids
    [8, 9, 7]
    """
    vocabulary_file = Path(folder) / "vocab.json"
    with whole_file(vocabulary_file) as unfinished:
        unfinished.write_text(json.dumps(character_vocabulary(texts), ensure_ascii=False), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary_file), word_delimiter_token=WORD_DELIMITER)
    extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=SAMPLE_RATE, do_normalize=do_normalize, return_attention_mask=return_attention_mask
    )
    processor = Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return processor


def encode(text: str, vocabulary: Vocabulary, *, utterance_id: str, unknown: str = "error") -> list[int]:
    """Turn a normalised transcript into CTC labels, as the model's own tokenizer writes each word.

    A token may have several characters. A space becomes the word delimiter, or nothing where the vocabulary has none.
    A tokenizer with `do_lower_case` (whose vocabulary is upper case, whatever the name says) gets either case.
    `unknown` says what becomes of characters outside the vocabulary: "error" refuses them, "drop" leaves them out.
    <unk> is never a label: no model can learn to hear it. A literal word delimiter in the text counts as unknown.

    Raises: UserError, naming the utterance, the characters and the way out.

    Example
    -------
    >>> import tempfile
    >>> vocabulary = Vocabulary.of(make_processor(tempfile.mkdtemp(), ["ONE TWO"]).tokenizer)
    >>> encode("TWO ONE!", vocabulary, utterance_id="a", unknown="drop")
    [8, 9, 7, 4, 7, 6, 5]
    """
    if unknown not in ("error", "drop"):
        raise UserError(f'expected "error" or "drop" for characters outside the vocabulary, but came {unknown!r}.')
    spelled = [vocabulary.spell(word) for word in (text.lower() if vocabulary.lower_case else text).split()]
    strange = sorted(set().union(*(left for _, left in spelled)))
    if strange and unknown == "error":
        raise UserError(
            f"utterance {utterance_id}: the transcript {text!r} has characters outside the tokenizer's vocabulary: "
            f"{' '.join(map(repr, strange))}. Choose a text normaliser that fits the tokenizer "
            f"({', '.join(NORMALISERS)}), or leave such characters out with unknown_characters: drop in the experiment."
        )
    between = [] if vocabulary.delimiter is None else [vocabulary.delimiter]
    labels = [label for word, _ in spelled if word for label in (*word, *between)]
    return labels[: len(labels) - len(between)]
