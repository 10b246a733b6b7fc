"""Time, memory and WER against duration: converted models against their teacher, in one run.

    cald-speech benchmark long-audio hparams/long_audio.yaml --durations 10 60 600 3600

Every case runs in a process of its own: its peak memory is the most that process held (resident on a CPU, the model,
the audio and Python included; allocated on a GPU), its time that of one recording after a short one to warm up. A case
that runs out of memory, or takes more than ``limit_s``, is a row that says so, and longer ones of that system are left
out. Prints a table, and one JSON line last; draws time and memory, log-log, with the crossover marked.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from transformers import PretrainedConfig

from cald_speech.benchmarks.stopwatch import crossover
from cald_speech.conversion import LayerMap, convert, from_pretrained
from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.data.joining import recordings
from cald_speech.data.manifests import read_manifest
from cald_speech.data.text import make_processor, normalise
from cald_speech.errors import UserError, error_epilogue
from cald_speech.experiment_yaml import build, check
from cald_speech.families import family_of
from cald_speech.files import whole_file
from cald_speech.shipped import experiment_file
from cald_speech.tasks.wer import score

PAUSE_S = (0.3, 1.0)


@dataclass(eq=False)  # hashed by identity, for its caches
class Experiment:
    """What hparams/long_audio.yaml says; see there."""

    systems: Mapping[str, Mapping[str, str]]
    config: PretrainedConfig | None = None
    layer_map: LayerMap = field(default_factory=LayerMap)
    output_folder: str = "results/long_audio"
    durations_s: Sequence[float] = (10, 60, 600)
    limit_s: float = 900.0
    dtype: str = "float32"
    teacher: str | None = None
    student: str | None = None
    manifest: str | None = None
    normaliser: str = "librispeech"

    @property
    def folder(self) -> Path:
        return Path(self.output_folder)

    @cache  # noqa: B019  one experiment lives as long as the program
    def model(self, name: str) -> str:
        """The folder of ``teacher`` or ``student``, made with random weights where none is given."""
        given = {"teacher": self.teacher, "student": self.student}[name]
        if given is not None:
            return given
        place = self.folder / "models" / name
        letters = len(make_processor(place, ["ABCDEFGHIJKLMNOPQRSTUVWXYZ"]).tokenizer)
        torch.manual_seed(0)
        family = family_of(self.config)
        model = family.load(self.config, model_class=family.classes["ctc"], vocab_size=letters)
        if name == "student":
            convert(model, self.layer_map, initialise="random")
        model.save_pretrained(place)
        return str(place)

    @cache  # noqa: B019
    def recording(self, duration_s: float) -> tuple[Path, str | None]:
        """A file of so many seconds, and its text: joined utterances of the manifest, or noise without a text."""
        path = self.folder / "audio" / f"{duration_s:g}.flac"
        generator = torch.Generator().manual_seed(0)
        if self.manifest is None:
            write_audio(path, 0.1 * torch.randn(int(duration_s * SAMPLE_RATE), generator=generator))
            return path, None
        entries = list(read_manifest(self.manifest).values())
        mean_s = sum(entry["duration_s"] for entry in entries) / len(entries) + sum(PAUSE_S) / 2
        made = next(recordings(entries, max(1, round(duration_s / mean_s)), PAUSE_S, count=1))
        write_audio(path, made.samples)
        return path, normalise(made.text, self.normaliser)


def measure(experiment: Experiment, device: str) -> Iterator[dict[str, Any]]:
    """A row for each system and duration, shortest first; a system that failed is not tried on longer ones."""
    failed: set[str] = set()
    for duration_s in sorted(experiment.durations_s):
        audio, reference = experiment.recording(duration_s)
        for name, system in experiment.systems.items():
            if name in failed:
                continue
            case = dict(system) | {"model": experiment.model(system["model"]), "audio": str(audio), "device": device}
            found = run_case(case | {"dtype": experiment.dtype}, experiment.limit_s)
            row = {"system": name, "duration_s": duration_s}
            if "fault" in found:
                failed.add(name)
                row["fault"] = found["fault"]
            else:
                row |= {"seconds": found["seconds"], "real-time factor": found["seconds"] / duration_s}
                row["peak GiB"] = found["peak_bytes"] / 2**30
                if reference is not None:
                    said = {"": normalise(found["text"], experiment.normaliser)}
                    row["WER %"] = score({"": reference}, said).words.rate
            yield row


def run_case(case: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """The worker's answer, or a fault: out of memory, out of time, or what else ended it."""
    command = [sys.executable, "-m", "cald_speech.benchmarks.long_audio_case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"fault": f"more than {limit_s:g} s"}
    if done.returncode == -9:
        return {"fault": "out of memory"}
    if done.returncode:
        raise UserError(f"the case {case} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def load(path: Path, overrides: Mapping[str, Any]) -> Experiment:
    """Raises UserError for a file that is not there and for keys that are not known."""
    given = {key: v for key, v in overrides.items() if v is not None}
    text = experiment_file(path).read_text()
    check(text, str(path))
    values = build(text) | given
    unknown = values.keys() - Experiment.__dataclass_fields__.keys()
    if unknown:
        known = ", ".join(Experiment.__dataclass_fields__)
        raise UserError(f"{path}: unknown keys {', '.join(sorted(unknown))}; the known keys: {known}")
    return Experiment(**values)


def print_row(row: Mapping[str, Any]) -> None:
    """One line of the table, as soon as it is there: a benchmark of hours is watched."""
    cells = [f"{row['system']:22}", f"{row['duration_s']:>8g} s"]
    if "fault" in row:
        cells.append(row["fault"])
    else:
        cells += [f"{row['seconds']:9.2f} s", f"{row['real-time factor']:8.4f}", f"{row['peak GiB']:6.2f} GiB"]
        cells += [f"{row['WER %']:6.2f} %"] if "WER %" in row else []
    print(" | ".join(cells), flush=True)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the rows of the table into a PNG at ``path``, and return it."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    systems = list(dict.fromkeys(row["system"] for row in rows))
    for axes, key, label in zip(panels, ("seconds", "peak GiB"), ("seconds", "peak memory, GiB"), strict=True):
        lines = {s: [(r["duration_s"], r[key]) for r in rows if r["system"] == s and key in r] for s in systems}
        for number, (system, line) in enumerate(lines.items()):
            if line:
                axes.plot(*zip(*line, strict=True), "-o", color=f"C{number}", label=system, markersize=4)
        for other in systems[1:]:
            if (point := crossover(lines[systems[0]], lines[other])) is not None:
                axes.plot(*point, "kx", markersize=8)
                axes.annotate(f"{point[0]:.0f} s", point, textcoords="offset points", xytext=(6, -10), fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="seconds of audio", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cald-speech benchmark long-audio",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", type=Path, nargs="?", default=Path("hparams/long_audio.yaml"))
    parser.add_argument("--durations", dest="durations_s", type=float, nargs="+", help="seconds")
    for name in ("teacher", "student", "manifest", "output_folder", "dtype"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--limit_s", type=float, help="seconds that a case may take")
    parser.add_argument("--systems", nargs="+", help="only these, by their names in the yaml")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args(arguments))
    path, device, chosen = (args.pop(name) for name in ("experiment", "device", "systems"))
    with error_epilogue():
        experiment = load(path, args)
        if chosen:
            experiment.systems = {name: experiment.systems[name] for name in chosen}
        machine = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
        print(f"{__doc__}\n{machine}; torch {torch.__version__}, {experiment.dtype}")
        for name in ("teacher", "student"):
            parameters = sum(p.numel() for p in from_pretrained(experiment.model(name)).parameters())
            print(f"{name}: {experiment.model(name)}, {parameters:,} parameters")
        rows = []
        for row in measure(experiment, device):
            print_row(row)
            rows.append(row)
        draw(rows, experiment.folder / "long_audio.png")
    print(json.dumps({"machine": machine, "torch": torch.__version__, "dtype": experiment.dtype, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
