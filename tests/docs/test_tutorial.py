"""The tutorial, from its first command to its last, with the sizes that the page gives for this test."""

import json
import re
import runpy
import shlex
import sys

import pytest

from cald_speech.commands import main
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/tutorial.md"
# "num_steps: 300 # the test of this page: 2" and "SIZES = {...}  # the test of this page: {...}"
SIZE = re.compile(r"^(.*?[:=] )(.+?)( +# the test of this page: )(.+)$", re.MULTILINE)


def run(line: str) -> None:
    """A shell line, in this process: `python SCRIPT ...` or `cald-speech ...`."""
    program, *words = shlex.split(line)
    try:
        if program == "cald-speech":
            main(words, prog_name="cald-speech")
        else:
            assert program == "python"
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, line


@pytest.mark.slow
def test_every_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("espeakng_loader", reason="the page's recordings are spoken by espeakng-loader")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # the page works in the top folder of a clone
    commands = []
    for language, title, body in blocks(PAGE.read_text()):
        if title:
            (tmp_path / title).write_text(SIZE.sub(r"\1\4", body))
        elif language == "bash":
            commands += body.splitlines()
    assert len(commands) > 5
    for line in commands:
        run(line)
    out = capsys.readouterr().out
    summaries = [json.loads(line) for line in out.splitlines() if line.startswith('{"split"')]
    assert [summary["model"] for summary in summaries] == ["recipes/demo/teacher", "results/mine/student/model"]
    assert all(summary["num_utterances"] == 4 for summary in summaries)


def test_the_sizes_are_smaller():
    found = SIZE.findall(PAGE.read_text())
    assert len(found) == 4 and all(len(small) <= len(size) and small != size for _, size, _, small in found)
