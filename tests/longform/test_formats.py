"""Every format, parsed back."""

import json
import re
from itertools import pairwise

import pytest

from cald_speech.longform.formats import CUE_LINES, CUE_S, FORMATS, LINE_CHARACTERS, cues, timestamp
from cald_speech.longform.words import Character, Word

DAY_S = 24 * 3_600


def word(text: str, start_s: float, end_s: float, confidence: float = 0.5) -> Word:
    step = (end_s - start_s) / len(text)
    letters = [Character(c, start_s + i * step, start_s + (i + 1) * step, confidence) for i, c in enumerate(text)]
    return Word(text, start_s, end_s, confidence, tuple(letters))


def speech(texts: list[str], start_s: float = 0.0, gap_s: float = 0.1) -> list[Word]:
    """The words one after the other, 0.3 s each."""
    return [word(text, start_s + i * (0.3 + gap_s), start_s + i * (0.3 + gap_s) + 0.3) for i, text in enumerate(texts)]


LATE = speech(["ONE", "O'CLOCK", "R&B", "a<b>-->c", "é"], start_s=DAY_S + 3_599.9996)


def seconds(stamp: str) -> float:
    hours, minutes, rest = re.fullmatch(r"(\d{2,}):([0-5]\d):([0-5]\d[.,]\d{3})", stamp).groups()
    return 3_600 * int(hours) + 60 * int(minutes) + float(rest.replace(",", "."))


def written(name: str, words: list[Word]) -> str:
    return "".join(FORMATS[name].write(iter(words), recording="my talk"))


def parse_subtitles(text: str) -> list[tuple[str | None, float, float, str]]:
    """(Number, start, end, text) of each block between empty lines."""
    blocks = []
    for block in filter(None, text.strip("\n").split("\n\n")):
        before, start, end, content = re.fullmatch(r"(?:(\d+)\n)?(\S+) --> (\S+)\n((?:.+\n?)+)", block).groups()
        blocks.append((before, seconds(start), seconds(end), " ".join(content.split("\n"))))
    return blocks


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "00:00:00.000"),
        (59.9994, "00:00:59.999"),
        (59.9996, "00:01:00.000"),
        (3_599.9996, "01:00:00.000"),
        (DAY_S + 61.5, "24:01:01.500"),
        (100 * 3_600.0, "100:00:00.000"),
    ],
)
def test_timestamps(value, expected):
    assert timestamp(value, ".") == expected


def test_text_breaks_at_long_pauses():
    words = [*speech(["ONE", "TWO"]), *speech(["THREE"], start_s=2.5), *speech(["FOUR"], start_s=5.0)]
    assert written("text", words) == "ONE TWO THREE\nFOUR\n"


def test_json_holds_everything():
    read = json.loads(written("json", LATE))
    assert (read["recording"], read["text"]) == ("my talk", "ONE O'CLOCK R&B a<b>-->c é")
    for entry, original in zip(read["words"], LATE, strict=True):
        assert entry["text"] == original.text
        assert [entry["start_s"], entry["end_s"]] == pytest.approx([original.start_s, original.end_s], abs=5.1e-4)
        assert entry["confidence"] == pytest.approx(original.confidence, abs=5.1e-5)
        for letter, character in zip(entry["characters"], original.characters, strict=True):
            assert letter["text"] == character.text
            assert letter["start_s"] == pytest.approx(character.start_s, abs=5.1e-4)


def test_srt_numbers_cues_and_shows_every_word_once():
    words = speech([f"WORD{i}" for i in range(200)], start_s=DAY_S - 10.0)
    blocks = parse_subtitles(written("srt", words))
    assert [number for number, *_ in blocks] == [str(i + 1) for i in range(len(blocks))]
    assert " ".join(text for *_, text in blocks) == " ".join(w.text for w in words)
    assert blocks[0][1] == pytest.approx(words[0].start_s, abs=1e-3)
    assert blocks[-1][2] == pytest.approx(words[-1].end_s, abs=1e-3)
    assert all(end <= start for (_, _, end, _), (_, start, _, _) in pairwise(blocks))


def test_vtt_escapes_what_would_be_markup():
    text = written("vtt", LATE)
    header, _, body = text.partition("\n\n")
    assert header == "WEBVTT"
    [(before, start, end, content)] = parse_subtitles(body)
    assert before is None
    assert (start, end) == (pytest.approx(DAY_S + 3_600, abs=1e-3), pytest.approx(LATE[-1].end_s, abs=1e-3))
    assert not re.search(r"<|>|&(?!amp;|lt;|gt;)", content)
    unescaped = content.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert unescaped == "ONE O'CLOCK R&B a<b>-->c é"


def test_ctm_has_six_columns():
    rows = [line.split(" ") for line in written("ctm", LATE).splitlines()]
    for (name, channel, start, duration, text, confidence), original in zip(rows, LATE, strict=True):
        assert (name, channel, text) == ("my_talk", "1", original.text)
        assert float(start) == pytest.approx(original.start_s, abs=5.1e-4)
        assert float(start) + float(duration) == pytest.approx(original.end_s, abs=5.1e-4)
        assert float(confidence) == pytest.approx(original.confidence, abs=5.1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_no_words(name):
    empty = {"text": "", "srt": "", "ctm": "", "vtt": "WEBVTT\n"}
    text = written(name, [])
    assert json.loads(text)["words"] == [] if name == "json" else text == empty[name]


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_come_as_words_do(name):
    def endless():
        for second in range(10**9):
            yield word("WORD", float(second), second + 0.5)
            assert second < 200, "the writer waits for the end"

    assert "WORD" in "".join(piece for _, piece in zip(range(20), FORMATS[name].write(endless()), strict=False))


def test_cues_are_short_and_break_at_pauses():
    words = speech(["WONDERFUL"] * 60)
    for cue in cues(words):
        assert len(cue.lines) <= CUE_LINES
        assert all(len(line) <= LINE_CHARACTERS for line in cue.lines)
        assert cue.end_s - cue.start_s <= CUE_S
    paused = [*speech(["ONE", "TWO"]), *speech(["THREE"], start_s=3.0)]
    assert [cue.lines for cue in cues(paused)] == [("ONE TWO",), ("THREE",)]


def test_a_word_longer_than_a_line_is_shown_whole():
    endless = "X" * 200
    assert [cue.lines for cue in cues(speech(["A", endless, "B"]))] == [("A", endless), ("B",)]


def test_a_word_longer_than_a_cue_is_a_cue():
    assert [cue.end_s for cue in cues([word("LONG", 0.0, 60.0), word("NEXT", 60.1, 60.4)])] == [60.0, 60.4]


def test_scripts_without_spaces_break_lines_and_join_words():
    characters = [
        Word(c, 0.1 * i, 0.1 * i + 0.1, 1.0, (), joined=True) for i, c in enumerate("今天气很好我们去公园" * 5)
    ]
    assert "".join(FORMATS["text"].write(characters)) == "今天气很好我们去公园" * 5 + "\n"
    assert json.loads("".join(FORMATS["json"].write(characters)))["text"] == "今天气很好我们去公园" * 5
    lines = [line for cue in cues(characters) for line in cue.lines]
    assert {len(line) for line in lines[:-1]} == {21}, "a Chinese character is two columns wide"
