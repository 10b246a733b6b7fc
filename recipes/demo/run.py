"""`make demo`: conversion and distillation from nothing but the package index, in minutes on two CPU cores.

    python -m cald_speech.recipes.demo.run

does the same where the package was installed (`pip install 'cald-speech[demo]'`). Files go to results/demo.

It synthesises a corpus of spoken commands, converts the small teacher that ships beside this file with the LibriSpeech
recipe, once by its task alone and once guided by the teacher, and compares the three on voices and sentences that
training never heard. It ends with a page to look at, results/demo/report.html; the last line is one JSON object.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

import cald_speech
from cald_speech.benchmarks.stopwatch import measure, peak_rss_gib
from cald_speech.data.audio import SAMPLE_RATE, read_audio
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError, error_epilogue
from cald_speech.evaluation.page import write_page
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.recipes.demo.figure import draw
from cald_speech.recipes.demo.synthesis import synthesise_corpus
from cald_speech.shipped import recipes_folder
from cald_speech.tasks.wer import compare

ROOT = recipes_folder().parent  # of a checkout, or of the installed package
RESULTS = Path("results/demo").absolute()
TEACHER = ROOT / "recipes/demo/teacher"
NAMES = ("teacher", "unguided", "student")


def main() -> None:
    start = time.perf_counter()
    torch.manual_seed(0)
    say("1. a corpus of spoken commands, synthesised")
    synthesise_corpus(RESULTS / "data")
    say("2. two students with the same start and the same number of steps: by the task alone, and guided")
    models = {"teacher": TEACHER}
    for name, guidance in (("unguided", "unguided"), ("student", "target")):
        recipe("train.py", "hparams/demo/students.yaml", "--guidance", guidance, "--output_folder", RESULTS / name)
        models[name] = RESULTS / name / "model"
    say("3. word error rates on voices and sentences that training never heard")
    reports = {name: RESULTS / "reports" / name for name in NAMES}
    for name, folder in models.items():
        recipe(
            "evaluate.py",
            folder,
            "--data_folder",
            RESULTS / "data",
            "--split",
            "test",
            "--output_folder",
            reports[name],
        )
    results = {name: read_result(folder, "test") for name, folder in reports.items()}
    say("4. time for a minute of audio, at 10 s and at 10 min")
    audio = joined_test_audio(reports["teacher"] / "manifests/test.json", 600)
    rows = []
    for name, folder in models.items():
        model = cald_speech.from_pretrained(folder)
        (low, high), words = results[name].interval(), results[name].words
        rows.append({"model": name, "WER %": words.rate, "low": low, "high": high, "words": words.count})
        rows[-1]["parameters"] = sum(p.numel() for p in model.parameters())
        for label, seconds in (("s/min at 10 s", 10), ("s/min at 10 min", 600)):
            rows[-1][label] = seconds_per_minute(model, audio[: seconds * SAMPLE_RATE])
    plot = draw(rows, RESULTS / "demo.png")
    page = write_page([*reports.values(), RESULTS / "unguided", RESULTS / "student"], RESULTS / "report.html")["html"]
    difference, low, high = compare(results["unguided"], results["student"])
    print(format_table(rows))
    verdict = "which includes 0: on this run the two cannot be told apart" if low <= 0 <= high else "which excludes 0"
    print(f"unguided minus guided: {difference:.2f} points of WER, 95 % interval {low:.2f} to {high:.2f}, {verdict}.")
    summary = {f"{name}_wer": round(results[name].words.rate, 3) for name in NAMES}
    summary |= {"unguided_minus_student": [round(v, 3) for v in (difference, low, high)]}
    summary |= {"minutes": round((time.perf_counter() - start) / 60, 2), "peak_rss_gib": round(peak_rss_gib(), 2)}
    print(f"curves, and every utterance with its edits and its sound: {page}")
    print(json.dumps(summary | {"plot": str(plot), "report": page}))


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def recipe(script: str, *arguments: object) -> None:
    """Run a script of the LibriSpeech recipe as a user would; its error message is ours."""
    command = [str(ROOT / "recipes/librispeech" / script), *map(str, arguments)]
    shown = " ".join(command).replace(f"{Path.cwd()}/", "").replace(f"{ROOT}/", "")
    print("$ python", shown, flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise UserError(f"{shown.split()[0]} failed; its message stands above")


def joined_test_audio(manifest: Path, seconds: int) -> torch.Tensor:
    """(seconds * 16,000,) samples: the test set joined, from its beginning again if it is too short."""
    audio = torch.cat([read_audio(entry["audio"]) for entry in read_manifest(manifest).values()])
    wanted = seconds * SAMPLE_RATE
    return audio.repeat(-(-wanted // len(audio)))[:wanted]


def seconds_per_minute(model: PreTrainedModel, audio: torch.Tensor) -> float:
    """Median seconds of computing for a minute of this audio in one forward pass, batch 1, float32."""
    with torch.inference_mode():
        timing = measure(lambda: model(audio[None]), repeats=3, warmup=1)
    return timing.median_s * 60 * SAMPLE_RATE / len(audio)


if __name__ == "__main__":
    with error_epilogue():
        main()
