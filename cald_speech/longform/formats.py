"""Words as text, JSON, SRT, WebVTT or CTM: each writer takes words as they come and gives the file piece by piece.

SRT is the SubRip format, WebVTT the W3C's (https://www.w3.org/TR/webvtt1/), CTM NIST's time-marked conversation format.
"""

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from cald_speech.longform.words import Word

PARAGRAPH_PAUSE_S = 2.0
# Usual for subtitles: two lines of 42 characters, on screen for 7 s at most.
LINE_CHARACTERS, CUE_LINES, CUE_S, CUE_PAUSE_S = 42, 2, 7.0, 0.8


@dataclass(frozen=True)
class Cue:
    """What one subtitle shows, and when."""

    start_s: float
    end_s: float
    lines: tuple[str, ...]


def cues(words: Iterable[Word]) -> Iterator[Cue]:
    """Words grouped into subtitles: a new one after a pause, and where two lines or 7 s are full.

    A word longer than a line has a line of its own. A cue is given out when the word after it has come.

    Example
    -------
    >>> [cue.lines for cue in cues([Word("ONE", 0.0, 0.5, 1.0, ()), Word("TWO", 0.6, 0.9, 1.0, ())])]
    [('ONE TWO',)]
    """
    for group in cue_groups(words):
        yield Cue(group[0].start_s, group[-1].end_s, _lines(group))


def cue_groups(words: Iterable[Word]) -> Iterator[list[Word]]:
    """The words of each subtitle."""
    pending: list[Word] = []
    for word in words:
        if pending:
            paused = word.start_s - pending[-1].end_s >= CUE_PAUSE_S
            if paused or word.end_s - pending[0].start_s > CUE_S or len(_lines([*pending, word])) > CUE_LINES:
                yield pending
                pending = []
        pending.append(word)
    if pending:
        yield pending


def _lines(words: list[Word]) -> tuple[str, ...]:
    """As many words a line as fit; a line breaks where a space stands, or between words that are joined."""
    lines = [""]
    for word in words:
        space = "" if word.joined or not lines[-1] else " "
        if lines[-1] and _width(lines[-1] + space + word.text) > LINE_CHARACTERS:
            lines.append(word.text)
        else:
            lines[-1] += space + word.text
    return tuple(lines)


def _width(text: str) -> int:
    """In columns: Chinese, Japanese and Korean characters take two, marks above a letter none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def timestamp(seconds: float, separator: str) -> str:
    """``HH:MM:SS`` and milliseconds; the hours go on beyond 24 and 99.

    Example
    -------
    >>> timestamp(3_599.9996, ","), timestamp(100 * 3_600 + 1.5, ".")
    ('01:00:00,000', '100:00:01.500')
    """
    total_ms = round(1_000 * seconds)
    minutes, ms = divmod(total_ms, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{ms // 1_000:02d}{separator}{ms % 1_000:03d}"


def as_text(words: Iterable[Word], recording: str = "audio") -> Iterator[str]:
    """The words with spaces between them, where the script writes any, and a new line after a pause of 2 s.

    Example
    -------
    >>> "".join(as_text([Word("ONE", 0.0, 0.5, 1.0, ()), Word("TWO", 0.6, 0.9, 1.0, ())]))
    'ONE TWO\\n'
    """
    end_s = None
    for word in words:
        if end_s is not None:
            yield "\n" if word.start_s - end_s >= PARAGRAPH_PAUSE_S else "" if word.joined else " "
        yield word.text
        end_s = word.end_s
    if end_s is not None:
        yield "\n"


def as_json(words: Iterable[Word], recording: str = "audio") -> Iterator[str]:
    """An object with ``recording``, ``words`` (text, start_s, end_s, confidence and characters of each) and ``text``.

    Example
    -------
    >>> json.loads("".join(as_json([Word("ONE", 0.0, 0.5, 1.0, ())])))["text"]
    'ONE'
    """
    yield f'{{"recording": {json.dumps(recording, ensure_ascii=False)}, "words": ['
    texts = []
    for word in words:
        yield ",\n" if texts else "\n"
        yield json.dumps(_rounded(asdict(word)), ensure_ascii=False)
        texts.append(word.text if word.joined or not texts else f" {word.text}")
    yield f'\n], "text": {json.dumps("".join(texts), ensure_ascii=False)}}}\n'


def as_srt(words: Iterable[Word], recording: str = "audio") -> Iterator[str]:
    """Numbered subtitles. SRT has no escapes: players that know tags may take a word in <> for one.

    Example
    -------
    >>> print("".join(as_srt([Word("ONE", 0.0, 0.5, 1.0, ())])))
    1
    00:00:00,000 --> 00:00:00,500
    ONE
    <BLANKLINE>
    """
    for number, cue in enumerate(cues(words), start=1):
        times = f"{timestamp(cue.start_s, ',')} --> {timestamp(cue.end_s, ',')}"
        yield "\n".join(([""] if number > 1 else []) + [str(number), times, *cue.lines]) + "\n"


def as_vtt(words: Iterable[Word], recording: str = "audio") -> Iterator[str]:
    """WebVTT cues, with &, < and > escaped.

    Example
    -------
    >>> print("".join(as_vtt([Word("R&B", 0.0, 0.5, 1.0, ())])))
    WEBVTT
    <BLANKLINE>
    00:00:00.000 --> 00:00:00.500
    R&amp;B
    <BLANKLINE>
    """
    yield "WEBVTT\n"
    for cue in cues(words):
        text = "\n".join(cue.lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        yield f"\n{timestamp(cue.start_s, '.')} --> {timestamp(cue.end_s, '.')}\n{text}\n"


def as_ctm(words: Iterable[Word], recording: str = "audio") -> Iterator[str]:
    """A line for each word: recording, channel, start and duration in seconds, word, confidence.

    Example
    -------
    >>> "".join(as_ctm([Word("ONE", 0.25, 0.5, 0.987, ())], recording="my talk"))
    'my_talk 1 0.250 0.250 ONE 0.987\\n'
    """
    name = "_".join(recording.split())
    for word in words:
        duration_s = round(word.end_s, 3) - round(word.start_s, 3)
        yield f"{name} 1 {word.start_s:.3f} {duration_s:.3f} {word.text} {word.confidence:.3f}\n"


class Format(NamedTuple):
    """How a transcript is written, and how its file's name ends."""

    write: Callable[..., Iterator[str]]
    suffix: str


FORMATS: Mapping[str, Format] = {
    "text": Format(as_text, ".txt"),
    "json": Format(as_json, ".json"),
    "srt": Format(as_srt, ".srt"),
    "vtt": Format(as_vtt, ".vtt"),
    "ctm": Format(as_ctm, ".ctm"),
}


def _rounded(entry: dict) -> dict:
    """Times to the millisecond and confidences to the fourth place; no model is as exact as that."""
    places = {"start_s": 3, "end_s": 3, "confidence": 4}
    rounded = {key: round(value, places[key]) if key in places else value for key, value in entry.items()}
    if "characters" in rounded:
        rounded["characters"] = [_rounded(character) for character in rounded["characters"]]
    return rounded
