"""The README is short, and its Python runs."""

import re

from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

import cald_speech
from tests.docs.pages import ROOT, blocks

README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_no_commit_is_named():
    assert not re.search(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", README)


def test_its_python_runs(tmp_path, monkeypatch):
    """With a small random model in the place of the hub's."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    front = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **front)).save_pretrained("teacher")
    programs = [body for language, _, body in blocks(README) if language == "python"]
    assert programs
    for program in programs:
        exec(compile(program.replace("facebook/wav2vec2-large-960h-lv60-self", "teacher"), "README.md", "exec"), {})
    assert type(cald_speech.from_pretrained("student")).__name__ == "CaldWav2Vec2ForCTC"
