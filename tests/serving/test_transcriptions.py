"""`/v1/audio/transcriptions`: OpenAI's clients are answered as one pass reads, and everything else is a 4xx."""

import io
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from cald_speech.longform import transcribe
from cald_speech.longform.formats import as_srt, as_text, as_vtt

ADDRESS = "/v1/audio/transcriptions"


@pytest.fixture
def words(model, talk):
    found = list(transcribe(model, talk))
    assert len(found) > 3, "the model says too little for this test"
    return found


@pytest.fixture
def ask(server):
    """``ask(file, field=value)``: the answer, whose status must be ``status``."""

    def post(file, *, status=200, name="talk.wav", running=server, **fields):
        file = file.read_bytes() if isinstance(file, Path) else file
        data = {"model": "mini", **fields}
        answer = running.client.post(ADDRESS, files={"file": (name, file)}, data=data)
        assert answer.status_code == status, answer.text
        return answer

    return post


def nothing_is_left(settings) -> bool:
    """Neither a name in the folder, nor an open file without one."""
    handles = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(handle) for handle in handles if handle.is_symlink()]
    return not list(settings.upload_folder.iterdir()) and not any(str(settings.upload_folder) in t for t in targets)


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def hours(count=1) -> bytes:
    """Noise that a miniature reads for many seconds."""
    file = io.BytesIO()
    samples = np.random.default_rng(0).integers(-3000, 3000, 8_000 * 600, dtype=np.int16)
    soundfile.write(file, np.tile(samples, 6 * count), 8_000, format="WAV")
    return file.getvalue()


@pytest.mark.slow  # imports openai
def test_openais_client_gets_what_one_pass_reads(server, settings, talk, words):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    ask = client.audio.transcriptions.create
    assert [model.id for model in client.models.list()] == ["mini"] and client.models.retrieve("mini").id == "mini"
    text = " ".join(word.text for word in words)
    assert ask(model="mini", file=talk).text == text
    assert ask(model="mini", file=talk, temperature=0, language="en", prompt="").text == text
    for form, write in (("text", as_text), ("srt", as_srt), ("vtt", as_vtt)):
        assert ask(model="mini", file=talk, response_format=form) == "".join(write(words))
    told = ask(model="mini", file=talk, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert (told.language, told.duration, told.text) == ("en", 12.0, text)
    assert [(w.word, w.start, w.end) for w in told.words] == [
        (w.text, round(w.start_s, 3), round(w.end_s, 3)) for w in words
    ]
    assert " ".join(segment.text for segment in told.segments) == text
    assert ask(model="mini", file=talk, response_format="verbose_json").words is None
    with pytest.raises(openai.NotFoundError, match="'mini', which alone is served here"):
        ask(model="whisper-1", file=talk)
    with pytest.raises(openai.BadRequestError, match="expected an audio file"):
        ask(model="mini", file=("talk.wav", b"no audio"))
    assert nothing_is_left(settings)


@pytest.mark.parametrize(
    ("fields", "status", "param", "told"),
    [
        ({"model": ""}, 400, "model", "expected 'mini', got none"),
        ({"model": "other"}, 404, "model", "got 'other'"),
        ({"response_format": "doc"}, 400, "response_format", "expected one of json, text"),
        ({"language": "fr"}, 400, "language", "expected 'en'"),
        ({"prompt": "Dr. Who"}, 400, "prompt", "a CTC model writes what it hears"),
        ({"temperature": "0.5"}, 400, "temperature", "expected 0"),
        ({"temperature": "warm"}, 400, "temperature", "expected 0"),
        ({"stream": "true"}, 400, "stream", "/v1/live"),
        ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities", "verbose_json alone"),
        (
            {"timestamp_granularities[]": "line", "response_format": "verbose_json"},
            400,
            "timestamp_granularities",
            "got 'line'",
        ),
        ({"chunking_strategy": "auto"}, 400, "chunking_strategy", "expected the fields"),
        ({"prompt": ["", ""]}, 400, "prompt", "got it 2 times"),
        ({"prompt": "x" * 70_000}, 413, None, "prompt: expected at most 65,536 bytes"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_a_field_that_cannot_act_is_refused(ask, talk, fields, status, param, told):
    error = ask(talk, status=status, **fields).json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param and told in error["message"]


@pytest.mark.parametrize(
    ("name", "file", "told"),
    [
        ("talk.wav", b"", "empty file"),
        ("talk.wav", b"no audio at all", "talk.wav: expected an audio file"),
        ("../../etc/passwd", b"no audio at all", "passwd: expected an audio file"),
        ("talk.wav", b"RIFF\x24\0\0\0WAVEfmt ", "expected an audio file"),
    ],
    ids=["empty", "text", "a path", "a header"],
)
def test_what_is_no_audio_is_refused(ask, settings, name, file, told):
    message = ask(file, status=400, name=name).json()["error"]["message"]
    assert told in message and "/proc" not in message and "\n" not in message
    assert nothing_is_left(settings)


def test_a_recording_cut_short_is_read_up_to_there_and_that_is_told(ask, talk):
    short = talk.read_bytes()[: 44 + 2 * 16_000 * 5]
    answer = ask(short, response_format="verbose_json")
    assert "only the first 5.00 s" in answer.json()["warnings"][0] and answer.json()["duration"] == 5.0
    assert "only the first 5.00 s" in ask(short, response_format="vtt").headers["x-warning"]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"", 400),
        ({"content-type": "application/json"}, b'{"model": "mini"}', 400),
        ({"content-type": "multipart/form-data"}, b"--x--", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--y\r\n", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\nhello\r\n--x--\r\n", 400),
        ({"content-type": "multipart/form-data; boundary=" + "x" * 300}, b"--x--", 400),
        ({"origin": "http://elsewhere.example"}, b"", 403),
    ],
    ids=["nothing", "json", "no boundary", "another boundary", "a part without a name", "a long one", "another page"],
)
def test_what_is_no_form_is_refused(server, headers, body, status):
    answer = server.client.post(ADDRESS, content=body, headers=headers)
    assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize("how", [("GET", "/v1/audio/translations"), ("GET", ADDRESS), ("GET", "/v1/models/other")])
def test_other_addresses_have_openais_errors(server, how):
    answer = server.client.request(*how)
    assert answer.status_code in (404, 405) and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_recording_that_is_too_large(ask, small_server, settings):
    """By its header before it came, and without one as soon as it is too much."""
    error = ask(bytes(3_000_000), status=413, running=small_server).json()["error"]
    assert "expected at most 1 MB" in error["message"]

    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        for _ in range(40):
            yield bytes(100_000)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert small_server.client.post(ADDRESS, content=endless(), headers=headers).status_code == 413
    assert nothing_is_left(settings)


def test_a_full_line_says_when_to_come_again_and_who_leaves_is_taken_out(ask, small_server, settings, talk, words):
    """The work of a client that is killed ends, long before it is done, and the next one is served."""
    line = small_server.line
    file = hours()[:900_000]  # 1 MB is allowed; the work is held below

    release = threading.Event()
    original = line._work

    def held(work, flag):
        def slow(look):
            while not release.is_set():
                look()
                time.sleep(0.01)
            return work(look)

        return original(slow, flag)

    line._work = held
    raw = socket.create_connection(("127.0.0.1", int(small_server.url.rpartition(":")[2])))
    body = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nmini\r\n'
    body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + file + b"\r\n--x--\r\n"
    head = f"POST {ADDRESS} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: line.running)
    answer = ask(talk, status=503, running=small_server)
    assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["code"] == "queue_full"
    assert small_server.client.get("/health").json()["running"] == 1
    raw.close()
    until(lambda: not line.inside)
    assert (line.ended, line.served, line.running) == (1, 0, 0) and nothing_is_left(settings)
    release.set()
    assert ask(talk, running=small_server).json()["text"] == " ".join(word.text for word in words)


def test_a_client_that_leaves_during_its_upload(server, settings):
    raw = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + bytes(100_000)
    head = f"POST {ADDRESS} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    raw.sendall(f"{head}Content-Length: 1000000\r\n\r\n".encode() + body)
    until(lambda: server.line.inside)
    raw.close()
    until(lambda: not server.line.inside)
    assert nothing_is_left(settings)


@pytest.mark.wide
def test_real_work_ends_with_its_client(server, settings):
    """An hour, which a miniature reads for many seconds: the flag is looked at in every stage."""
    ended, file = server.line.ended, hours()
    with (
        httpx.Client(base_url=server.url, timeout=httpx.Timeout(30, read=1.0)) as client,
        pytest.raises(httpx.ReadTimeout),
    ):
        client.post(ADDRESS, files={"file": ("a.wav", file)}, data={"model": "mini"})
    until(lambda: not server.line.inside)
    assert server.line.ended == ended + 1 and nothing_is_left(settings)


@pytest.mark.wide
def test_32_clients_at_once_lose_nothing(ask, settings, talk, words):
    expected = " ".join(word.text for word in words)
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda _: ask(talk).json()["text"], range(32)))
    assert answers == [expected] * 32 and nothing_is_left(settings)
