"""`/v1/live`: the words are those of `stream()`, however the audio arrives, and a wrong message gets one sentence."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from cald_speech.longform import Recogniser
from cald_speech.serving import LiveSettings
from cald_speech.serving.transcripts import word_times
from tests.serving.conftest import served

START = json.dumps({"sample_rate": 16_000})
END = json.dumps({"type": "end"})


@pytest.fixture
def connect(server):
    client = pytest.importorskip("websockets.sync.client")

    def open_one(running=server, **options):
        return client.connect(f"{running.url.replace('http', 'ws')}/v1/live", **options)

    return open_one


def words_of(recogniser, samples, settings):
    chunks = torch.from_numpy(samples.astype(np.float32) / 2**15).split(round(settings.chunk_s * 16_000))
    found = [word_times(word) for word in recogniser.live(chunks, lookahead_s=settings.lookahead_s)]
    assert len(found) > 3, "the model says too little for this test"
    return found


def said(connection):
    """All words until the end of the connection."""
    messages = [json.loads(message) for message in connection]
    assert messages[-1] == {"type": "done"} and connection.close_code == 1000
    return [{k: v for k, v in m.items() if k not in ("type", "joined")} for m in messages[:-1]]


@pytest.mark.parametrize("size", [64_001, 10_007], ids="{} bytes a message".format)
def test_words_are_those_of_stream(server, connect, settings, talk, size):
    """Of a bidirectional model with its lookahead. Messages end in the midst of samples."""
    samples = soundfile.read(talk, dtype="int16")[0]
    with connect() as connection:
        connection.send(START)
        ready = json.loads(connection.recv())
        assert ready["type"] == "ready" and ready["latency_s"] > 1 and server.client.get("/health").json()["live"] == 1
        data = samples.tobytes() + b"\0"
        for at in range(0, len(data), size):
            connection.send(data[at : at + size])
        connection.send(END)
        assert said(connection) == words_of(server.recogniser, samples, settings.live)


def test_words_of_a_causal_model_come_while_one_speaks(connect, causal, settings, talk):
    samples = soundfile.read(talk, dtype="int16")[0]
    settings = replace(settings, live=LiveSettings(max_live=1, chunk_s=1.0))
    with served(Recogniser.of(causal), settings) as running, connect(running) as connection:
        connection.send(json.dumps({"type": "start", "sample_rate": 16_000, "encoding": "pcm_s16le", "model": "mini"}))
        assert json.loads(connection.recv())["type"] == "ready"
        connection.send(samples.tobytes())
        first = json.loads(connection.recv())  # nobody said that the audio has ended
        with connect(running) as second:
            second.send(START)
            assert "1 clients speak" in json.loads(second.recv())["error"]["message"]
            with pytest.raises(Exception, match="1013"):
                second.recv()
        connection.send(END)
        first = {k: v for k, v in first.items() if k not in ("type", "joined")}
        assert [first, *said(connection)] == words_of(running.recogniser, samples, settings.live)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (["hello"], "as JSON, got 'hello'"),
        ([b"\0\0"], "as JSON, got bytes"),
        (["[16000]"], "got list"),
        (["[" * 100_000], "as JSON"),
        (["{}"], "sample_rate: expected 16000, got 'None'"),
        (['{"sample_rate": 44100}'], "sample_rate: expected 16000, got '44100'"),
        (['{"sample_rate": 16000, "encoding": "opus"}'], "encoding: expected 'pcm_s16le'"),
        (['{"sample_rate": 16000, "model": "other"}'], "got 'other'"),
        (['{"sample_rate": 16000, "channels": 2}'], "'channels' too"),
        ([START, "hello"], "expected samples as bytes"),
        ([START, END, b"\0\0"], "nothing more after the end"),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, list) else "",
)
def test_a_wrong_message_gets_one_sentence(server, connect, messages, told):
    with connect() as connection:
        for message in messages:
            connection.send(message)
        answers = [json.loads(answer) for answer in iter_until_closed(connection)]
    if messages[1:2] == [END] and answers[-1]["type"] == "done":
        return  # all words were there before the message was
    assert answers[-1]["type"] == "error" and told in answers[-1]["error"]["message"]
    assert connection.close_code == 1008


def iter_until_closed(connection):
    closed = pytest.importorskip("websockets.exceptions").ConnectionClosed
    try:
        while True:
            yield connection.recv()
    except closed:
        return


def test_the_page_of_another_site_is_refused(connect):
    with connect(origin="http://elsewhere.example") as connection:
        assert "the page of" in json.loads(connection.recv())["error"]["message"]


def test_who_leaves_is_forgotten(server, connect):
    with connect() as connection:
        connection.send(START)
        connection.recv()
        connection.send(bytes(400_000))
        connection.socket.close()
    end = time.monotonic() + 30
    while server.client.get("/health").json()["live"]:
        assert time.monotonic() < end
        time.sleep(0.01)
