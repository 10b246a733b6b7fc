"""What the outputs of a CTC head mean, by the model's own tokenizer: text to labels, and labels to text."""

import unicodedata
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase, Wav2Vec2PhonemeCTCTokenizer

from cald_speech.errors import UserError

WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for the space before a word


@dataclass(frozen=True)
class Vocabulary:
    """The written form of each output, the blank, and the word delimiter.

    Arguments
    ---------
    tokens : the written form of each output, which may have several characters (``TH``, ``ING``).
    blank : the output that writes nothing.
    delimiter : the output that stands between words; None for scripts that write no spaces.
    lower_case : True writes lower case, whatever the tokens say.
    special : outputs that no text is spelled with, beside the blank and the delimiter.
    subwords : the tokenizer of a vocabulary whose words begin with a token of their own kind (``▁the``, as in
        SentencePiece): it has no delimiter, and which tokens write a word is for the tokenizer's own rules to say.
    phones : True, where each token is a word by itself, as in transcripts of phonemes.

    Example
    -------
    >>> vocabulary = Vocabulary(("<pad>", "|", "A", "TH", "T", "H"), blank=0, delimiter=1)
    >>> vocabulary.spell("HATTH")
    ([5, 2, 4, 3], '')
    >>> vocabulary.spell("hat!", any_case=True)
    ([5, 2, 4], '!')
    """

    tokens: tuple[str, ...]
    blank: int
    delimiter: int | None
    lower_case: bool = False
    special: frozenset[int] = frozenset()
    subwords: PreTrainedTokenizerBase | None = field(default=None, compare=False, repr=False)
    phones: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, num_outputs: int | None = None) -> "Vocabulary":
        """That of a Hugging Face CTC tokenizer, whose pad token is the blank, for a head of so many outputs.

        A delimiter that its own vocabulary has not, and transformers has added behind it, is none: no head has an
        output for it. A space that the vocabulary has is one, whatever the tokenizer's files call it. Raises UserError
        for a tokenizer that writes no words, or whose blank is none of the outputs.
        """
        ids = tokenizer.get_vocab()
        tokens = tokenizer.convert_ids_to_tokens(range(max(ids.values()) + 1))
        blank, outputs = tokenizer.pad_token_id, len(tokens) if num_outputs is None else num_outputs
        beyond = frozenset(range(outputs, len(tokens)))
        if not hasattr(tokenizer, "word_delimiter_token"):
            if blank is None or not any(token.startswith(WORD_START) for token in ids):
                raise UserError(
                    f"expected a tokenizer of a CTC model, whose pad token is the blank, with a word delimiter "
                    f"(Wav2Vec2CTCTokenizer) or words that begin with {WORD_START} (ParakeetTokenizer), got "
                    f"{type(tokenizer).__name__} with neither. Give the one that the model was trained with"
                )
            _check_blank(tokenizer, outputs)
            special = frozenset(tokenizer.all_special_ids) | beyond
            return cls(tuple(tokens), blank, None, special=special, subwords=tokenizer)
        _check_blank(tokenizer, outputs)
        own = min(tokenizer.vocab_size, outputs)
        found = (ids.get(token) for token in (tokenizer.word_delimiter_token, " "))
        delimiter = next((place for place in found if place is not None and place < own), None)
        special = (frozenset(tokenizer.all_special_ids) | beyond) - {delimiter}
        if isinstance(tokenizer, Wav2Vec2PhonemeCTCTokenizer):  # which writes no other delimiter
            return cls(tuple(tokens), blank, None, special=special | {delimiter}, phones=True)
        return cls(tuple(tokens), blank, delimiter, tokenizer.do_lower_case, special)

    @property
    def writes_spaces(self) -> bool:
        """Whether it can tell where a word ends."""
        return self.delimiter is not None or self.subwords is not None or self.phones

    def begins_word(self, token: int) -> bool:
        """Whether a token of a vocabulary of subwords begins one."""
        return self.tokens[token].startswith(WORD_START)

    def write(self, token: int) -> str:
        """The token as it stands in a transcript."""
        if self.subwords is not None:
            return self.tokens[token].removeprefix(WORD_START)
        return self.tokens[token].lower() if self.lower_case else self.tokens[token]

    def join(self, tokens: list[int]) -> str:
        """The word that the tokens write."""
        if self.subwords is not None:
            return self.subwords.decode(tokens, group_tokens=False, clean_up_tokenization_spaces=False).strip()
        return "".join(map(self.write, tokens))

    def spell(self, word: str, *, any_case: bool = False) -> tuple[list[int], str]:
        """The outputs that write a word, the longest token first, and the characters that none writes.

        Subwords are those of the tokenizer. A letter may be written composed or decomposed (Unicode's NFC and NFD),
        whichever the tokens are. ``any_case`` takes a letter that the tokens have in the other case alone.
        """
        labels, strange, place = [], "", 0
        word = unicodedata.normalize("NFC", word)
        if self.subwords is not None:
            forms = dict.fromkeys((word, word.lower(), word.upper()) if any_case else (word,))
            return min(map(self._spell_subwords, forms), key=lambda spelled: len(spelled[1]))
        while place < len(word):
            for size in range(min(self._longest, len(word) - place), 0, -1):
                found = self._lookup(word[place : place + size], any_case and size == 1)
                if found is not None:
                    labels += found
                    place += size
                    break
            else:
                strange += word[place]
                place += 1
        return labels, strange

    def _spell_subwords(self, word: str) -> tuple[list[int], str]:
        ids = self._encode(word)
        if not self.special.intersection(ids):
            return ids, ""
        strange = "".join(c for c in word if self.special.intersection(self._encode(c)))
        kept = self._encode("".join(c for c in word if c not in strange)) if strange != word else []
        return [token for token in kept if token not in self.special], strange or word

    def _encode(self, text: str) -> list[int]:
        return self.subwords(text, add_special_tokens=False, split_special_tokens=True).input_ids if text else []

    @cached_property
    def _ids(self) -> dict[str, int]:
        unwritten = {self.blank, self.delimiter} | self.special
        written = ((self.write(place), place) for place in range(len(self.tokens)) if place not in unwritten)
        # Of two outputs with one and the same form, the first.
        return {unicodedata.normalize("NFC", token): place for token, place in reversed(list(written))}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=1)

    @cached_property
    def _other_case(self) -> dict[str, int]:
        return {other: place for token, place in self._ids.items() for other in (token.upper(), token.lower())}

    def _lookup(self, text: str, any_case: bool) -> list[int] | None:
        """The outputs of one token, or of one character's parts."""
        if text in self._ids:
            return [self._ids[text]]
        if len(text) > 1:
            return None
        if any_case and text in self._other_case:
            return [self._other_case[text]]
        for form in (unicodedata.normalize("NFD", text), *(_cases(text) if any_case else ())):
            ids = [self._ids.get(part) for part in form]
            if ids and None not in ids:
                return ids
        return None


def _check_blank(tokenizer: PreTrainedTokenizerBase, outputs: int) -> None:
    blank = tokenizer.pad_token_id
    if blank is None or not 0 <= blank < outputs:
        got = "none" if blank is None else f"{tokenizer.pad_token!r}, number {blank} of {outputs}, counted from 0"
        raise UserError(
            f"expected a tokenizer whose pad token, which is the blank of CTC, is one of the model's outputs, got "
            f'{got}. Say which token it is in tokenizer_config.json, such as "pad_token": "[PAD]", or give the '
            "processor that the model was trained with"
        )


def _cases(letter: str) -> tuple[str, ...]:
    """How a letter is written in the other case, its nearest kin included: İ as i, the final ς as Σ, ß as SS."""
    lower, upper = letter.lower(), letter.upper()
    return lower, lower.replace("\N{COMBINING DOT ABOVE}", ""), upper, upper.lower()
