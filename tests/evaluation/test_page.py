"""The page of runs and evaluations: what is in it, what must not get out of it, and what a browser makes of it."""

import base64
import io
import json
import re
import shutil

import pytest
import soundfile
import torch

from cald_speech.data.audio import write_audio
from cald_speech.data.manifests import manifest_hash, write_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation.page import write_page
from cald_speech.evaluation.report import compare_reports, write_report
from cald_speech.tasks.wer import score

EVIL = "</script><img/src=x/onerror=document.title='stolen'>"
REFERENCES = {"a": "ONE TWO THREE", "b": f"{EVIL} FOUR", "c": "TWO TWO FIVE", "d": "SIX"}
HEARD = {
    "teacher": {**REFERENCES, "c": "TWO TOO FIVE"},
    "student": {"a": "ONE TO THREE UH", "b": EVIL, "c": "FIVE", "d": "SIX"},
}

COST = {"wer_added": 1.0, "wer_added_interval": None, "kl": 0.2, "distance_after_layer": 0.1, "distance_at_end": 0.2}
FIGURES = {
    "drift": {
        "teacher": "t",
        "source": "s",
        "layers": [0.1, 0.2],
        "mean": 0.15,
        "borders": {"small": 0.1, "large": 0.2},
    }
    | {"waypoints": [{"step": 5, "from_source": [0.1, 0.1], "to_teacher": [0.0, 0.1]}]}
    | {"suggestion": {"modes": ["target"], "clear": False, "reason": EVIL}},
    "layer_importance": {"teacher": "t", "num_layers": 1, "teacher_wer": 4.0, "student": {"distances": [0.3]}}
    | {"layers": [{"layer": 0, **COST, "memory_frames": {"forwards": [3.0, 9.0]}}], "keep": [0], "ranked_by": "kl"},
    "restoring": {"student_folder": "s", "gains": {"0": 0.1}, "restored": [0], "teacher_wer": 4.0}
    | {"steps": [{"restored": [], "kl": 0.3, "wer": 9.0}, {"restored": [0], "kl": 0.2, "wer": 8.0}]},
    "by_length": [{"condition": "x 1, pauses to 1 s", "model": EVIL, "WER %": 4.0, "s each": 3.0}],
    "lookahead": [{"lookahead": "whole", "WER %": 4.0}, {"lookahead": "0.5 s", "WER %": None}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Reports of two models on four utterances with sound, a run that was killed, and every figure."""
    made = tmp_path_factory.mktemp("made")
    entries = {}
    for i, (key, text) in enumerate(REFERENCES.items()):
        write_audio(made / f"{key}.flac", 0.1 * torch.randn(8000 * (1 + i % 2)))
        seconds = 0.5 * (1 + i % 2)
        entries[key] = {
            "audio": str(made / f"{key}.flac"),
            "duration_s": seconds,
            "text": text,
            "speaker": f"{EVIL}{i % 2}",
        }
    write_manifest(made / "test.json", entries)
    about = {"manifest_hash": manifest_hash(made / "test.json"), "normaliser": "none", "decoder": "greedy"}
    for name, heard in HEARD.items():
        result = score(REFERENCES, heard, durations_s={key: entries[key]["duration_s"] for key in entries})
        extra = {"manifest": str(made / "test.json"), "parameters": 10}
        write_report(made / "reports" / name, result, split="test", model=f"m/{EVIL}", extra=extra, **about)
    run = made / "student"
    run.mkdir()
    lines = [
        {"step": step, "loss/task": 3.0 - step, "layer_distance/00": 0.5, "valid/WER": 9.0 - step} for step in (0, 1)
    ]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "loss/task": NaN}\n{"step": 3, "lo'
    (run / "train_log.jsonl").write_text(log)
    (run / "run.json").write_text(json.dumps([{"step": 0, "time": "2026-01-01T00:00:00+00:00", "command": [EVIL]}]))
    (run / "settings.yaml").write_text(f'seed: 0\nlicence: "{EVIL}"\nlayer_map: !new:a.B {{x: 1}}\n')
    for kind, found in FIGURES.items():
        (run / f"{kind}.json").write_text(json.dumps(found))
    return made


@pytest.fixture(scope="module")
def page(made):
    reports = [made / "reports" / name for name in HEARD]
    return made / "page.html", write_page([*reports, made / "student"], made / "page.html")


def data_in(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL).group(1))


def test_what_is_in_it(made, page):
    """The figures are those of the text table; edits and sound are whole; what is killed or not finite is told."""
    path, written = page
    assert written["bytes"] == path.stat().st_size
    assert (written["runs"], written["evaluations"], written["figures"], written["audio"]["embedded"]) == (1, 2, 5, 4)
    data = data_in(path)
    (shown,) = data["sets"]
    rows = compare_reports([made / "reports" / name for name in HEARD])
    for row, model, difference in zip(rows, shown["models"], shown["differences"], strict=True):
        assert (row["WER %"], [row["low"], row["high"]]) == (model["wer"], model["interval"])
        if difference[0] is not None:
            assert difference[0] == [row["minus first"], row["diff low"], row["diff high"]]
    assert data["names"] == ["teacher", "student"] and data["runs"][0]["name"] == "student"
    utterance = shown["utterances"][2]
    assert utterance["heard"][1] == {"signs": "DD=", "words": [], "errors": 2}
    assert utterance["heard"][0] == {"signs": "=S=", "words": ["TOO"], "errors": 1}
    for key in shown["utterances"]:
        sound, rate = soundfile.read(io.BytesIO(base64.b64decode(data["audio"][key["audio"]])))
        assert rate == 16_000 and len(sound) / rate == pytest.approx(key["seconds"], abs=0.15)
    (run,) = data["runs"]
    assert run["curves"]["loss/task"] == [[0, 3.0], [1, 2.0], [2, None]]
    assert run["is_cut"] and run["best"] == {"metric": "WER", "value": 8.0, "step": 1}


def test_what_users_write_stays_text(page):
    text = page[0].read_text()
    assert "<img" not in text and text.count("</script>") == 2
    assert data_in(page[0])["sets"][0]["utterances"][1]["reference"] == REFERENCES["b"]


def test_what_is_left_out_is_told(made, tmp_path):
    """The worst utterances have their sound first; a manifest that changed has none of these utterances' sound."""
    folders = [made / "reports"]
    small = write_page(folders, tmp_path / "a.html", audio_mib=0.006, utterances=3)
    data = data_in(tmp_path / "a.html")
    assert small["audio"]["embedded"] >= 1 and small["audio"]["embedded"] + small["audio"]["left_out"] == 3
    assert data["sets"][0]["num_utterances"] == 4
    assert "d" not in [utterance["id"] for utterance in data["sets"][0]["utterances"]]
    for name in HEARD:
        shutil.copytree(made / "reports" / name, tmp_path / name)
        summary = json.loads((tmp_path / name / "test.json").read_text()) | {"manifest_hash": "0f"}
        (tmp_path / name / "test.json").write_text(json.dumps(summary))
    assert write_page([tmp_path], tmp_path / "b.html")["audio"] == {"embedded": 0, "left_out": 0, "unreadable": 4}
    assert "has changed" in data_in(tmp_path / "b.html")["audio_facts"]["why"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "it is empty"),
        ({"config.json": "{}"}, "got config.json. Give the output folder"),
        ({"test.jsonl": "{}\n"}, "without its summary test.json"),
        ({"test.jsonl": '{"id": ', "test.json": '{"wer": 1, "words": {}, "normaliser": "none"}'}, "Evaluate again"),
        ({"test.jsonl": "", "test.json": '{"wer": '}, "cannot be parsed"),
        ({"train_log.jsonl": '{"step": 1}\n{"st\n{"step": 2}\n'}, "train_log.jsonl:2: expected"),
        ({"train_log.jsonl": '{"st'}, "the run has not begun"),
        ({"train_log.jsonl": '{"step": 1}\n', "run.json": "{}"}, "list of the run's starts"),
        ({"drift.json": "[1]"}, "another file of that name"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_is_no_run_and_no_evaluation(files, told, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        write_page([tmp_path], tmp_path / "page.html")
    assert told in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_a_split_that_there_is_not(made, tmp_path):
    with pytest.raises(UserError, match="--split other: expected an evaluation of that name"):
        write_page([made / "reports"], tmp_path / "page.html", split="other")
    with pytest.raises(UserError, match="nowhere: expected a folder"):
        write_page([tmp_path / "nowhere"], tmp_path / "page.html")


@pytest.mark.slow  # a browser
def test_in_a_browser(page):
    """No error on the console, nothing of a user's runs, and the list follows model, word and speaker."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    by = pytest.importorskip("selenium.webdriver.common.by").By.CSS_SELECTOR
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        browser.get(page[0].as_uri())

        def listed():
            return [card.get_attribute("data-id") for card in browser.find_elements(by, ".utterance")]

        def choose(control, value):
            code = "const c = document.querySelector(arguments[0]); c.value = arguments[1]; "
            browser.execute_script(f"{code}c.dispatchEvent(new Event(arguments[2]))", control, value, "change")

        assert listed() == ["c", "a", "b", "d"]
        choose("select.model", "1")
        assert listed() == ["a", "c", "b", "d"]
        assert browser.find_element(by, "[data-id=c] .words").text.split() == ["TWO", "TWO", "FIVE", "FIVE"]
        browser.find_element(by, ".word-filter").send_keys("two")
        assert listed() == ["a", "c"]
        choose("select.speaker", f"={EVIL}1")
        assert listed() == []
        browser.find_element(by, ".word-filter").clear()
        browser.find_element(by, ".word-filter").send_keys("four")
        assert listed() == ["b"]
        titles = [title.text.split(":")[0] for title in browser.find_elements(by, "h2")]
        assert {"Drift", "Layer importance", "Restored attention", "WER against length"} < set(titles)
        assert len(browser.find_elements(by, ".plot svg")) == 3 + 2 + 4 + 3 + 1
        loaded = "const a = document.querySelector('audio'), done = arguments[0]; a.onloadedmetadata = () => "
        seconds = browser.execute_async_script(f"{loaded}done(a.duration); a.onerror = () => done(null); a.load()")
        assert seconds == pytest.approx(1.0, abs=0.2)
        assert browser.find_elements(by, "img") == [] and browser.title == "Report: teacher, student"
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
