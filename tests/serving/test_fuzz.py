"""Requests that no client makes: whatever comes, the answer is a 4xx with one sentence, and nothing is left."""

import json
import random

import pytest

ADDRESSES = (
    "/v1/audio/transcriptions",
    "/v1/audio/transcriptions",
    "/v1/audio/transcriptions",
    "/v1/models/",
    "/v1/audio/translations",
    "/v1/live",
    "/healthy",
)
FIELDS = (
    "file",
    "model",
    "language",
    "prompt",
    "response_format",
    "temperature",
    "timestamp_granularities[]",
    "stream",
    "",
)
VALUES = (b"mini", b"", b"json", b"vtt", b"verbose_json", b"nan", b"1e999", b"\xff\xfe", b"word", b"true", b"x" * 5_000)
HEADS = (
    b"",
    b"RIFF",
    b"RIFF\xff\xff\xff\xffWAVEfmt ",
    b"fLaC\0",
    b"OggS",
    b"ID3",
    b"\xff\xfb\x90",
    b"#!AMR",
    b"caff",
    b"FORM",
)


def part(draw: random.Random) -> bytes:
    """A part of a form: a field or a file, sometimes without a name, or with a header that is none."""
    name, quote = draw.choice(FIELDS), draw.choice(['"', '"', '"', ""])
    file = draw.random() < (0.8 if name == "file" else 0.05)
    value = draw.choice(HEADS) + draw.randbytes(draw.randrange(3_000)) if file else draw.choice(VALUES)
    head = f"Content-Disposition: form-data; name={quote}{name}{quote}"
    head += f'; filename="{draw.choice(("a.wav", "", "a/../b.sd2", "é.gsm", "x.vox"))}"' if file else ""
    extra = draw.choice(("", "", "", "Content-Type: audio/x\r\n", "nonsense\r\n", ": \r\n", "A" * 5_000 + ": b\r\n"))
    return extra.encode() + head.encode() + b"\r\n\r\n" + value + b"\r\n"


def request(seed: int) -> tuple[str, str, dict[str, str], bytes]:
    """Method, address, headers and body, none of which makes a transcript."""
    draw = random.Random(seed)
    kind = draw.choice(("form", "form", "form", "torn", "bytes", "json"))
    boundary, address = draw.choice(("x", "x", "-" * 60, "a b")), draw.choice(ADDRESSES)
    headers = {"content-type": f'multipart/form-data; boundary="{boundary}"'}
    if kind in ("form", "torn"):
        parts = [part(draw) for _ in range(draw.randrange(6))]
        body = b"".join(f"--{boundary}\r\n".encode() + one for one in parts) + f"--{boundary}--\r\n".encode()
        if kind == "torn":
            at = draw.randrange(len(body))
            body = body[:at] + draw.choice((b"", draw.randbytes(3) + body[at + 3 :]))
    else:
        body = draw.randbytes(draw.randrange(4_000)) if kind == "bytes" else json.dumps({"model": "mini"}).encode()
        headers = draw.choice((headers, {"content-type": "application/json"}, {"content-type": ";;=\x7f"}, {}))
    if address == "/v1/models/":
        address += draw.choice(("x", "%00", "..%2f..%2fetc", "%ff%fe", "mini%0d%0a"))
    method = draw.choice(("POST", "POST", "POST", "PUT", "DELETE", "PATCH"))
    return method, address, headers, body


def refused(server, seeds) -> None:
    for seed in seeds:
        method, address, headers, body = request(seed)
        answer = server.client.request(method, address, headers=headers, content=body)
        # What is no HTTP is refused before the application sees it.
        invalid = answer.text == "Invalid HTTP request received." and "\x7f" in headers.get("content-type", "")
        message = answer.text if invalid else answer.json()["error"]["message"]
        assert 400 <= answer.status_code < 500, (seed, answer.status_code, message)
        assert message and "\n" not in message and "Traceback" not in message and "/proc" not in message, (
            seed,
            message,
        )


def test_what_no_client_sends_gets_a_4xx(server, settings):
    refused(server, range(50))
    assert not list(settings.upload_folder.iterdir()) and not server.line.inside


@pytest.mark.wide
def test_a_thousand_of_them(server, settings):
    refused(server, range(50, 1_050))
    assert not list(settings.upload_folder.iterdir()) and not server.line.inside
