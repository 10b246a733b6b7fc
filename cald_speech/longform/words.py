"""From CTC token spans to words with times: what every decoder and the forced alignment share.

A span is a run of frames on one token; frames become seconds by the strides of the model's front end. CTC puts a token
on few frames (Graves et al., 2006, section 3), mostly inside the sound it stands for, so a word's own spans are shorter
than the word: :class:`Margins` widens them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, repeat
from math import inf

from transformers import PreTrainedModel

from cald_speech.families import SpeechFamily, family_of
from cald_speech.families.vocabulary import Vocabulary
from cald_speech.longform.source import SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token on the frames ``first_frame`` to ``last_frame``; ``confidence`` is its mean posterior over them."""

    token: int
    first_frame: int
    last_frame: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Character:
    """A written token and the frames it stands on, in seconds."""

    text: str
    start_s: float
    end_s: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Word:
    """A word and its extent; ``confidence`` is the mean of its characters', each a mean posterior in [0, 1].

    ``joined`` says that no space stands before it: in a script without spaces every character is a word.
    """

    text: str
    start_s: float
    end_s: float
    confidence: float
    characters: tuple[Character, ...]
    joined: bool = False


@dataclass(frozen=True)
class FrameTimes:
    """Where frames lie in time: frame t stands for ``stride`` samples about the centre of its receptive field.

    So wav2vec2's frame 0, which sees samples 0 to 399, stands for 40 to 359, and frames tile the time without gaps. Of
    a front end that pads, the field is counted without the samples before the audio, and as many behind.

    Example
    -------
    >>> times = FrameTimes(stride=320, receptive_field=400)
    >>> times.start_s(0), times.end_s(0), times.start_s(1)
    (0.0025, 0.0225, 0.0225)
    """

    stride: int
    receptive_field: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FrameTimes":
        """Those of a speech encoder's convolutional front end."""
        front = family_of(model, SpeechFamily).front_end(model)
        return cls(front.stride, front.receptive_field - 2 * front.lead)

    def start_s(self, frame: int) -> float:
        """The first moment that the frame stands for, in seconds."""
        return max(0.0, frame * self.stride + (self.receptive_field - self.stride) / 2) / SAMPLE_RATE

    def end_s(self, frame: int) -> float:
        """The moment at which the next frame begins, in seconds."""
        return self.start_s(frame + 1)


@dataclass(frozen=True)
class Margins:
    """How far a word reaches beyond its tokens: ``lead_s`` before the first (less than 0: it begins after it),
    ``tail_s`` after the last.

    A word never reaches into the one before it nor past the beginning of the delimiter after it. Which margins fit
    depends on the model: `cald-speech word-times` finds them on digits. Zeros give
    the tokens' own frames. The default has a tail, because CTC tends to be done with a word before the sound is, and
    begins a frame late, because a model that hears the future tends to announce a word a little before it.
    """

    lead_s: float = -0.02
    tail_s: float = 0.1


DEFAULT_MARGINS = Margins()
PAUSE_WITHIN_WORD_S = 1.0


def words(
    spans: Iterable[TokenSpan],
    vocabulary: Vocabulary,
    times: FrameTimes,
    margins: Margins = DEFAULT_MARGINS,
    sizes: Iterable[int] | None = None,
) -> Iterator[Word]:
    """Group spans into words at the word delimiter; each word is given out as soon as it is known to be complete.

    Without a delimiter among the outputs a word goes from a token that begins one to the next such token; where there
    are none of these either, or they are phonemes, every token is a word, or so many as ``sizes`` says, where the text
    is known.

    Example
    -------
    >>> vocabulary = Vocabulary(("<pad>", "|", "A", "B"), blank=0, delimiter=1)
    >>> spans = [TokenSpan(2, 5, 6, 0.9), TokenSpan(3, 9, 9, 0.7), TokenSpan(1, 20, 22, 1.0), TokenSpan(2, 30, 31, 0.5)]
    >>> for word in words(spans, vocabulary, FrameTimes(320, 320), Margins(lead_s=0.04, tail_s=0.1)):
    ...     print(word.text, round(word.start_s, 2), round(word.end_s, 2), round(word.confidence, 2))
    AB 0.06 0.3 0.8
    A 0.56 0.74 0.5
    """
    if vocabulary.delimiter is not None:
        groups = _between_delimiters(spans, vocabulary.delimiter)
    elif vocabulary.subwords is not None and sizes is None:
        groups = _from_starts(spans, vocabulary)
    else:
        groups = _of_sizes(spans, repeat(1) if sizes is None else sizes)
    earliest_s = 0.0
    for group, end in groups:
        word = _word(group, vocabulary, times, margins, earliest_s, inf if end is None else times.start_s(end))
        earliest_s = word.end_s
        yield replace(word, joined=not vocabulary.writes_spaces and sizes is None)


Group = tuple[list[TokenSpan], int | None]
"""The spans of a word, and the frame that it may not reach beyond, if it is known."""


def _between_delimiters(spans: Iterable[TokenSpan], delimiter: int | None) -> Iterator[Group]:
    pending: list[TokenSpan] = []
    for span in spans:
        if span.token != delimiter:
            pending.append(span)
        elif pending:
            yield pending, span.first_frame
            pending = []
    if pending:
        yield pending, None


def _from_starts(spans: Iterable[TokenSpan], vocabulary: Vocabulary) -> Iterator[Group]:
    """A token that writes the space alone waits for the one that follows; behind the last word it writes nothing."""
    pending: list[TokenSpan] = []
    for span in spans:
        if vocabulary.begins_word(span.token) and any(vocabulary.write(s.token) for s in pending):
            yield pending, span.first_frame
            pending = []
        pending.append(span)
    if any(vocabulary.write(s.token) for s in pending):
        yield pending, None


def _of_sizes(spans: Iterable[TokenSpan], sizes: Iterable[int]) -> Iterator[Group]:
    spans = iter(spans)
    pending: list[TokenSpan] = []
    for size in sizes:
        group = [*pending, *islice(spans, size - len(pending))]
        pending = list(islice(spans, 1))
        if group:
            yield group, pending[0].first_frame if pending else None
        if not pending:
            return


def _word(
    spans: list[TokenSpan],
    vocabulary: Vocabulary,
    times: FrameTimes,
    margins: Margins,
    earliest_s: float,
    latest_s: float,
) -> Word:
    characters = tuple(
        Character(vocabulary.write(s.token), times.start_s(s.first_frame), times.end_s(s.last_frame), s.confidence)
        for s in spans
    )
    body = _body(characters)
    return Word(
        text=vocabulary.join([s.token for s in spans]),
        start_s=min(max(earliest_s, body[0].start_s - margins.lead_s), body[0].end_s),
        end_s=max(body[-1].end_s, min(latest_s, body[-1].end_s + margins.tail_s)),
        confidence=sum(c.confidence for c in characters) / len(characters),
        characters=characters,
    )


def _body(characters: Sequence[Character]) -> Sequence[Character]:
    """The characters that a word's extent is taken from: of the runs without a long pause, the surest.

    Nobody pauses for seconds within a word. A letter that a model writes far from the others, mostly in silence and
    with little confidence, stays in the text and in the characters, and the word does not last until then.
    """
    cuts = [
        place for place, (a, b) in enumerate(pairwise(characters), start=1) if b.start_s - a.end_s > PAUSE_WITHIN_WORD_S
    ]
    runs = [characters[a:b] for a, b in zip([0, *cuts], [*cuts, len(characters)], strict=True)]
    return max(runs, key=lambda run: sum(c.confidence for c in run))
