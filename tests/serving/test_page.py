"""The page, in a real browser: its microphone's words are those of `stream()`, its subtitles those of one pass."""

import os
import shutil

import numpy as np
import pytest
import soundfile
import torch

from cald_speech.longform import AudioSource, transcribe
from cald_speech.serving.live import Speaker

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 5


def test_the_page_loads_nothing_from_elsewhere(server):
    page = server.client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("// ", "").replace("://${location.host}", "").replace("// ----", "")


@pytest.fixture
def speech(tmp_path):
    """Noise that swells and fades, so that its place in other audio can be found; the browser wants 48 kHz."""
    generator = np.random.default_rng(0)
    slow = np.interp(np.arange(SECONDS * 48_000) / 48_000, np.linspace(0, SECONDS, 40), generator.random(40))
    samples = 0.3 * slow * np.convolve(generator.standard_normal(SECONDS * 48_000), np.ones(12) / 12, "same")
    soundfile.write(tmp_path / "speech.wav", samples, 48_000)
    return tmp_path / "speech.wav"


@pytest.fixture
def browser(speech, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (BROWSER and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "headless=new",
        "use-fake-ui-for-media-stream",
        "use-fake-device-for-media-stream",
        f"use-file-for-fake-audio-capture={speech}%noloop",
        f"user-data-dir={tmp_path / 'profile'}",
        "autoplay-policy=no-user-gesture-required",
        *(["no-sandbox"] if os.geteuid() == 0 else []),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(browser, script, seconds=30):
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        return WebDriverWait(browser, seconds, 0.1).until(lambda b: b.execute_script(f"return {script}"))
    except TimeoutException:
        shown = [text(browser, element) for element in ("live", "reading")]
        pytest.fail(f"{script} did not come true: {shown}, {browser.get_log('browser')}")


def text(browser, element):
    return browser.execute_script(f"return document.getElementById('{element}').textContent")


@pytest.mark.wide  # a browser, which listens for as long as the audio lasts
def test_words_from_the_microphone_are_those_of_stream(browser, server, settings, speech, monkeypatch):
    heard = []
    original = Speaker.hear

    async def hear(self, data):
        heard.append(data)
        await original(self, data)

    monkeypatch.setattr(Speaker, "hear", hear)
    browser.get(server.url)
    browser.find_element("id", "speak").click()
    wait(browser, "document.getElementById('live').textContent.startsWith('listening')")
    browser.set_script_timeout(60)
    browser.execute_async_script(f"setTimeout(arguments[0], {1000 * (SECONDS + 2)})")
    browser.find_element("id", "speak").click()
    wait(browser, "!document.getElementById('speak').disabled")
    assert text(browser, "live") == "done"
    samples = np.frombuffer(b"".join(heard), "<i2").astype(np.float32) / 2**15
    chunks = torch.from_numpy(samples).split(round(settings.live.chunk_s * 16_000))
    words = [word.text for word in server.recogniser.live(chunks, lookahead_s=settings.live.lookahead_s)]
    assert len(words) > 3 and text(browser, "words").split() == words
    assert likeness(samples, AudioSource.open(speech).read(0, SECONDS * 16_000).numpy()) > 0.9, (
        "what was heard is not the file"
    )
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def likeness(heard, expected):
    """The largest correlation of what was heard with the expected audio, from -1 to 1, wherever that begins in it."""
    size = len(heard) + len(expected)
    products = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(expected, size)), size)
    at = int(products[: len(heard)].argmax())
    return products[at] / np.linalg.norm(heard[at : at + len(expected)]) / np.linalg.norm(expected)


@pytest.mark.wide
def test_a_recordings_subtitles_stand_over_its_waveform(browser, server, model, talk, tmp_path):
    browser.get(server.url)
    browser.find_element("id", "file").send_keys(str(talk))
    wait(browser, "!document.getElementById('shown').hidden")
    words = list(transcribe(model, talk))
    assert text(browser, "reading") == f"{len(words)} words in 12.0 s"
    wait(browser, "document.getElementById('player').readyState > 1")
    middle = words[len(words) // 2]
    browser.execute_script(f"document.getElementById('player').currentTime = {(middle.start_s + middle.end_s) / 2}")
    wait(browser, f"document.querySelector('#caption b')?.textContent == '{middle.text}'")
    coloured = browser.execute_script(
        "const c = document.getElementById('wave'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return d.filter((x, i) => i % 4 == 3 && x > 0).length / (c.width * c.height)"
    )
    assert coloured > 0.1
    if folder := os.environ.get("CALD_SCREENSHOTS"):
        browser.save_screenshot(os.path.join(folder, "serve.png"))
    (tmp_path / "broken.wav").write_text("no audio")
    browser.find_element("id", "file").send_keys(str(tmp_path / "broken.wav"))
    wait(browser, "document.getElementById('reading').textContent.includes('expected an audio file')")
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("status of 400" in error for error in errors)
