"""One system on one recording in a process of its own, so that its peak memory is its own: for long_audio.py.

    python -m cald_speech.benchmarks.long_audio_case '{"model": FOLDER, "reader": "long-form", "audio": FILE, ...}'

Prints one JSON line: seconds and peak memory, and the text that was read; or what kept it from running.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cald_speech.benchmarks.stopwatch import free_bytes, is_out_of_memory, resident, seconds_of
from cald_speech.conversion import from_pretrained
from cald_speech.data.audio import read_audio
from cald_speech.errors import UserError
from cald_speech.families.hub import load_processor
from cald_speech.tasks.reading import READERS

CANNOT_RUN = (ImportError, ValueError)  # what transformers raises for an attention that is not installed or not known


def run(case: dict) -> dict:
    """Load the model, read a second of audio to warm up, and time the recording."""
    try:
        model = load(case)
    except UserError as error:
        if not isinstance(error.__cause__, CANNOT_RUN):
            raise
        return {"fault": str(error.__cause__).splitlines()[0][:120]}
    read = READERS[case["reader"]](model, load_processor(case["model"]))
    samples = read_audio(case["audio"])
    read(samples[: min(len(samples), 32_000)])
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        # Most of the free memory, so that a case that is too large ends alone.
        resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + int(0.8 * free_bytes()),) * 2)
    text = []
    try:
        seconds = seconds_of(lambda: text.append(read(samples)), device=case["device"])
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        return {"fault": "out of memory"}
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return {"seconds": seconds, "peak_bytes": peak, "text": text[0]}


def load(case: dict) -> PreTrainedModel:
    options = {"attn_implementation": case["attention"]} if case.get("attention") else {}
    model = from_pretrained(Path(case["model"]), dtype=getattr(torch, case["dtype"]), **options)
    return model.to(case["device"])


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
