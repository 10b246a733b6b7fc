"""The page on own data: its files are written, and its commands run, on two clips and a tiny teacher."""

import shlex
import subprocess
from string import ascii_uppercase

import numpy as np
import soundfile
from click.testing import CliRunner

from cald_speech.commands import main
from cald_speech.training.run import run
from tests.docs.pages import ROOT, blocks
from tests.training.miniature import write_model

PAGE = ROOT / "docs/howto/own_data.md"
SMALL = ["--num_steps=2", "--max_batch_s=5", "--noprogressbar"]


def test_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "my-teacher", letters=ascii_uppercase + "'")
    (tmp_path / "clips").mkdir()
    for name in ("one", "two"):
        soundfile.write(f"clips/{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)
    lines = []
    for language, title, body in blocks(PAGE.read_text()):
        if title:
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / title).write_text(body)
        elif language == "bash":
            lines += body.splitlines()
    assert len(lines) > 12
    for line in lines:
        program, *words = shlex.split(line)
        if words[0] == "train":
            run([*words[1:], *SMALL])
        elif program == "cald-speech":
            done = CliRunner().invoke(main, [*words, "--quiet"] if words[0] == "evaluate" else words)
            assert done.exit_code == 0, (line, done.output)
        else:
            subprocess.run([program, *words], check=True)
    assert {path.name for path in (tmp_path / "results/texts").rglob("*.txt")} == {"one.txt", "two.txt"}
