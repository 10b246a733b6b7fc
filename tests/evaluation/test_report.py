"""The report's files hold what the result held, whole or not at all."""

import json
import os

import pytest

from cald_speech.errors import UserError
from cald_speech.evaluation.report import format_table, read_result, write_report
from cald_speech.tasks.wer import score

ABOUT = {"manifest_hash": "0f", "normaliser": "librispeech", "model": "results/m", "decoder": "greedy", "split": "test"}


@pytest.fixture
def result():
    references = {"a": "ONE TWO", "b": "ÉTÉ", "c": ""}
    hypotheses = {"a": "ONE", "b": "ÉTÉ", "c": "UH"}
    return score(references, hypotheses, durations_s={"a": 1.5, "b": 0.5, "c": 2.25})


def test_files_say_what_the_result_says(result, tmp_path):
    summary = write_report(tmp_path / "new", result, extra={"dtype": "float32"}, **ABOUT)
    assert json.loads((tmp_path / "new/test.json").read_text()) == summary
    assert summary.items() >= {**ABOUT, "dtype": "float32"}.items()
    assert summary["words"] == {"count": 3, "hits": 2, "substitutions": 0, "insertions": 1, "deletions": 1}
    assert summary["wer"] == pytest.approx(200 / 3)
    assert summary["wer_interval"][0] < summary["wer"] < summary["wer_interval"][1]
    assert (summary["num_utterances"], summary["audio_s"], summary["longest_audio_s"]) == (3, 4.25, 2.25)

    lines = [json.loads(line) for line in (tmp_path / "new/test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["reference"] == "ONE TWO" and lines[0]["hypothesis"] == "ONE" and lines[0]["duration_s"] == 1.5
    assert lines[0]["words"] == {"hits": 1, "substitutions": 0, "insertions": 0, "deletions": 1}
    assert lines[0]["alignment"] == [["=", "ONE", "ONE"], ["D", "TWO", None]]
    assert sorted(os.listdir(tmp_path / "new")) == ["test.json", "test.jsonl"]


def test_nothing_to_divide_by_is_null(tmp_path):
    summary = write_report(tmp_path, score({"a": ""}, {"a": "uh"}), **ABOUT)
    assert summary["wer"] is None and summary["wer_interval"] is None and summary["audio_s"] is None
    assert summary["words"]["insertions"] == 1


def test_a_summary_never_stands_beside_utterances_of_another_run(result, tmp_path, monkeypatch):
    write_report(tmp_path, result, **ABOUT)
    before = (tmp_path / "test.jsonl").read_text()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match=r"No space left on device.*WER 66\.6"):
        write_report(tmp_path, result, **ABOUT)
    assert os.listdir(tmp_path) == ["test.jsonl"]
    assert (tmp_path / "test.jsonl").read_text() == before


def test_names_that_would_write_elsewhere_are_refused(result, tmp_path):
    with pytest.raises(ValueError, match="plain name"):
        write_report(tmp_path, result, **{**ABOUT, "split": "../test"})
    with pytest.raises(ValueError, match="wer"):
        write_report(tmp_path, result, extra={"wer": 0.0}, **ABOUT)


def test_table_columns_are_the_keys_of_all_rows():
    table = format_table([{"a": 1, "b": 2.0}, {"a": 10, "c": "x"}]).splitlines()
    assert table == ["|  a |    b | c |", "|----|------|---|", "|  1 | 2.00 | - |", "| 10 |    - | x |"]


def test_a_report_is_read_again(tmp_path):
    """Also where a text holds what Python takes for the end of a line; and a damaged one is named."""
    found = score({"a": "ONE\u2028TWO"}, {"a": "ONE\x85"}, durations_s={"a": 1.5})
    write_report(tmp_path, found, **ABOUT)
    assert read_result(tmp_path, "test") == found
    for content in (b"[1]\n", b"{\n", b'{"id": "a"}\n', b"\xe9\n"):
        (tmp_path / "test.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=r"test\.jsonl:? ?.*expected a report"):
            read_result(tmp_path, "test")
