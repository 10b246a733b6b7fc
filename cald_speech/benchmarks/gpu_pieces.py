"""The pieces of the evidence that a GPU is asked for: each gives its figures row by row, as soon as they are there.

    python -m cald_speech.benchmarks.gpu_pieces '{"piece": "training step", "device": "cuda", "size": "full"}'

Prints a JSON line for each row. Nothing is read but this checkout: models have random weights at published sizes, and
audio is noise, of which only time and memory are asked. A measurement that fails is a row with its ``fault``, and the
next one runs. cald_speech/benchmarks/gpu_evidence.py runs each piece in a process of its own: a kernel that fails can
leave its process unable to use the GPU.
"""

import gc
import importlib.machinery
import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedModel, Wav2Vec2Config

from cald_speech.benchmarks.bars import gpu_bars
from cald_speech.benchmarks.cases import OPS, Case
from cald_speech.benchmarks.contest import failures, parity_fault
from cald_speech.benchmarks.stopwatch import crossover, is_out_of_memory, measure, measure_limits
from cald_speech.conversion import LayerMap, convert
from cald_speech.distillation import PRESETS, Target, captured_states
from cald_speech.families import families
from cald_speech.mixers import Bidirectional, GatedDeltaNet, Mamba2
from cald_speech.ops import valid_frames
from cald_speech.ops.backends import choose_backend
from cald_speech.shipped import hparams_folder

Row = dict[str, Any]
SAMPLE_RATE, GIB = 16_000, 2**30
LIBRISPEECH_H = 960
LETTERS_PER_S = 14  # of read English
SHORTEST_SHARE = 0.75  # of the longest utterance of a batch, as batches sorted by length have it
SSD_MIXER = partial(Bidirectional, share_projections=True)
DELTA_MIXER = partial(Bidirectional, mixer=GatedDeltaNet, share_projections=True)
# What the figures below run, and what never ran on a GPU before it is asked for here.
PARITY = ("ssd", "ssd_bidirectional", "gated_delta", "gated_delta_per_channel", "short_conv", "selective_scan")


@dataclass(frozen=True)
class Size:
    """How large everything is: as published, or so small that a CPU finds the typing errors.

    encoder, decoder : options of the configs; batch_s and batches : audio of a batch, and batches of an optimiser step;
    utterance_s : the longest of them; durations_s and day_s : recordings; converted : how many layers of the decoder
    are, in each system; prompts : tokens before ``new_tokens`` are generated.
    """

    encoder: Mapping[str, Any]
    batch_s: float
    batches: int
    utterance_s: float
    durations_s: Sequence[float]
    day_s: float
    decoder: Mapping[str, Any]
    converted: Sequence[int]
    prompts: Sequence[int]
    new_tokens: int
    repeats: int


# wav2vec2-large as facebook/wav2vec2-large-960h-lv60-self has it, and SmolLM2-135M, whose positions go on here.
SIZES = {
    "full": Size(
        encoder={"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        batch_s=160,
        batches=4,
        utterance_s=16,
        durations_s=(10, 60, 300, 600, 1200, 1800, 3600),
        day_s=24 * 3600,
        decoder={
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        converted=(0, 8, 30),
        prompts=(1_024, 8_192, 32_768, 131_072),
        new_tokens=64,
        repeats=3,
    ),
    "tiny": Size(
        encoder={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        | {"conv_dim": [4, 4, 4], "conv_kernel": [10, 8, 8], "conv_stride": [8, 8, 5], "num_conv_pos_embeddings": 16},
        batch_s=3,
        batches=2,
        utterance_s=1.5,
        durations_s=(0.5, 1),
        day_s=2,
        decoder={
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        converted=(0, 1, 2),
        prompts=(4, 8),
        new_tokens=2,
        repeats=1,
    ),
}


def parity(device: str, size: Size) -> Iterator[Row]:
    """The kernels against the recurrence in float64; a converted encoder, whole and in blocks, against the CPU's."""
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    for op in PARITY if device == "cuda" else PARITY[-2:-1]:
        for dtype in dtypes:
            case = Case(op, 1, 1, heads=2, groups=2, dtype=dtype, device=device, d_state=OPS[op].d_state)
            backend = choose_backend(op, "auto", OPS[op].backends, case.request)
            named = {"op": op, "dtype": str(dtype)[6:], "backend": backend}
            yield attempt("parity", named, lambda c=case, b=backend: {"wrong": parity_fault(c, b)})
    samples = torch.randn(int(2 * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    for mixer, named in ((SSD_MIXER, "Mamba-2"), (DELTA_MIXER, "gated DeltaNet")):
        student = encoder(SIZES["tiny"], mixer).eval()
        with torch.inference_mode():
            expected = student(normalised(samples)[None]).logits[0]
            readers = {"whole": whole(student, torch.float32, device), "in blocks": blocks(student, torch.float32)}
            student.to(device)
            for how, read in readers.items():
                yield attempt(
                    "a converted encoder on this device against the CPU, float32",
                    {"mixer": named, "read": how},
                    lambda read=read, right=expected: {"relative error": relative_error(read(samples), right)},
                )


def bars(device: str, size: Size) -> Iterator[Row]:
    """The project's bars, each held or not."""
    for bar in gpu_bars(device=device):
        row = {"what": bar.what, "figure": bar.figure, "limit": bar.limit, "at most": bar.at_most, "held": bar.held}
        yield row | ({"reason": bar.reason} if bar.figure is None else {})


def training_step(device: str, size: Size) -> Iterator[Row]:
    """One optimiser step of hparams/mamba.yaml: teacher and student forwards, the student backwards, the update."""
    yield from conversion_step(device, size, "Mamba-2 in both directions, shared projections", SSD_MIXER)


def delta_training_step(device: str, size: Size) -> Iterator[Row]:
    """The same with hparams/gated_delta_net.yaml."""
    yield from conversion_step(device, size, "gated DeltaNet in both directions, shared projections", DELTA_MIXER)


def conversion_step(device: str, size: Size, named: str, mixer: Callable) -> Iterator[Row]:
    """Where the recipe's batch does not fit, halves of it, twice as many: the step sees as much audio."""
    recipe = {key: number_in("mamba.yaml", key) for key in ("num_steps", "alpha_layer", "alpha_logits")}
    for halvings in range(3):
        batch_s, batches = size.batch_s / 2**halvings, size.batches * 2**halvings
        shape = {"mixer": named, "batch_s": batch_s, "batches": batches}
        row = attempt(
            "training step",
            shape,
            lambda batch_s=batch_s, batches=batches: measured_step(device, size, mixer, recipe, batch_s, batches),
        )
        yield row
        if row.get("fault") != "out of memory":
            break


def measured_step(
    device: str, size: Size, mixer: Callable, recipe: Mapping[str, float], batch_s: float, batches: int
) -> Row:
    """Seconds, GiB, the share of the device's rate of matrix products, and the recipe's steps in days."""
    dtype = torch.bfloat16
    step, operations_of = make_step(device, size, mixer, recipe, batch_s, batches)
    operations = operations_of() * batches
    rate = measure_limits(device, [dtype]).matmul_per_s[dtype]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timing = measure(step, repeats=size.repeats, device=device)
    audio_s, steps = batch_s * batches, recipe["num_steps"]
    return {
        "seconds": timing.median_s,
        "spread_s": timing.spread_s,
        "peak GiB": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
        "operations of matrix products": operations,
        "of the limit": operations / timing.median_s / rate,
        "limit, operations per s": rate,
        "audio s per s": audio_s / timing.median_s,
        "steps of the recipe": steps,
        "days": steps * timing.median_s / 86_400,
        "passes over LibriSpeech 960 h": steps * audio_s / 3_600 / LIBRISPEECH_H,
    }


def make_step(
    device: str, size: Size, mixer: Callable, recipe: Mapping[str, float], batch_s: float, batches: int
) -> tuple[Callable[[], None], Callable[[], int]]:
    """The step, and what counts the operations of one of its batches."""
    family, form = families()["wav2vec2"], PRESETS["speech"]
    weights = Target(alpha_layer=recipe["alpha_layer"], alpha_logits=recipe["alpha_logits"]).weights(0)
    dropout = {"hidden_dropout": 0.2, "activation_dropout": 0.2, "feat_proj_dropout": 0.2, "mask_time_prob": 0.1}
    teacher = encoder(size, None, **dropout).to(device).eval().requires_grad_(False)
    student = encoder(size, mixer, **dropout).to(device).train()
    family.freeze_front_end(student)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-6)
    batch = make_batch(family, student, size.utterance_s, batch_s, device)
    frames, blank = batch["frames"], student.config.pad_token_id

    def run(model: PreTrainedModel) -> tuple[Tensor, Sequence[Tensor]]:
        with captured_states(family.layers(model)) as states:
            logits = model(batch["samples"], attention_mask=batch["mask"]).logits
        return logits, form.compared(states, family.final_norm(model))

    def one_batch() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits, states = run(student)
            with torch.no_grad():
                followed, teacher_states = run(teacher)
            log_probs = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
            labels, letters = batch["labels"], batch["letters"]
            task = F.ctc_loss(log_probs, labels, frames, letters, blank=blank, reduction="sum", zero_infinity=True)
            layers = form.layer_loss(form.distances(states, teacher_states, frames)) / batch["num_frames"]
            distance = form.logit_loss(logits, followed, frames, None) / batch["num_frames"]
            loss = weights.task * task / batch["num_letters"] + weights.layer * layers + weights.logits * distance
        (loss / batches).backward()

    def step() -> None:
        for _ in range(batches):
            one_batch()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def operations() -> int:
        with FlopCounterMode(display=False) as counter:
            one_batch()
        optimiser.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    return step, operations


def make_batch(family: Any, model: PreTrainedModel, utterance_s: float, batch_s: float, device: str) -> dict[str, Any]:
    """Utterances of unlike lengths, padded to the longest; ``batch_s`` counts the padding."""
    count = max(1, int(batch_s / utterance_s))
    lengths = torch.linspace(utterance_s * SHORTEST_SHARE, utterance_s, count).mul(SAMPLE_RATE).long().flip(0)
    generator = torch.Generator().manual_seed(0)
    letters = (lengths * (LETTERS_PER_S / SAMPLE_RATE)).long().clamp(min=1)
    frames = family.frame_lengths(lengths, model.config)
    made = {
        "samples": torch.randn(count, int(lengths.max()), generator=generator),
        "mask": valid_frames(lengths, int(lengths.max())).long(),
        "labels": torch.randint(1, model.config.vocab_size, (count, int(letters.max())), generator=generator),
        "letters": letters,
        "frames": frames,
    }
    numbers = {"num_frames": int(frames.sum()), "num_letters": int(letters.sum())}
    return {name: v.to(device) for name, v in made.items()} | numbers


def length(device: str, size: Size) -> Iterator[Row]:
    """Seconds, memory and real-time factor of teacher and student, up to an hour, and where the lines cross."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    teacher, student = (encoder(size, mixer).to(device, dtype).eval() for mixer in (None, SSD_MIXER))
    systems = {
        "student, in blocks": blocks(student, dtype),
        "teacher, whole, SDPA": whole(teacher, dtype, device),
        "student, whole": whole(student, dtype, device),
    }
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for duration_s in size.durations_s:
        for name in list(systems):
            named = {"system": name, "duration_s": duration_s}
            row = attempt("reading", named, reading(systems[name], duration_s, device))
            yield row
            if "fault" in row:
                del systems[name]  # longer ones would fail as well
            else:
                lines[name].append((duration_s, row["seconds"]))
    for name in ("student, in blocks", "student, whole"):
        point = crossover(lines[name], lines["teacher, whole, SDPA"])
        found = {"duration_s": None if point is None else point[0]}
        yield {"what": "crossover", "system": name, "over": "teacher, whole, SDPA"} | found


def day(device: str, size: Size) -> Iterator[Row]:
    """24 hours in one pass. Not asked of the teacher: its attention takes the square of the time."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    student = encoder(size, SSD_MIXER).to(device, dtype).eval()
    read = blocks(student, dtype)
    read(noise(size.durations_s[0]))
    named = {"system": "student, in blocks", "duration_s": size.day_s}
    yield attempt("reading", named, reading(read, size.day_s, device, repeats=1, warmup=0))


def language_model(device: str, size: Size) -> Iterator[Row]:
    """Prefill and generation at SmolLM2-135M's shape: attention in all layers, in most, and in none."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    longest = max(size.prompts) + size.new_tokens
    config = LlamaConfig(**size.decoder, max_position_embeddings=longest, tie_word_embeddings=True, rope_theta=1e5)
    family, layers = families()["llama"], config.num_hidden_layers
    models = {}
    for count in size.converted:
        torch.manual_seed(0)
        model = family.load(config, model_class=family.classes["lm"])
        chosen = [round((i + 0.5) * layers / count - 0.5) for i in range(count)]
        convert(model, LayerMap(None, dict.fromkeys(chosen, Mamba2)))
        models[count] = model.to(device, dtype).eval()
    for num_tokens in size.prompts:
        for count in list(models):
            shape = {"layers converted": count, "layers": layers, "prompt tokens": num_tokens}
            call = partial(prefill_and_generation, models[count], num_tokens, size, device)
            row = attempt("language model", shape, call)
            yield row
            if "fault" in row:
                del models[count]


def prefill_and_generation(model: PreTrainedModel, num_tokens: int, size: Size, device: str) -> Row:
    """Seconds of a prompt, tokens a second after it, and what the cache holds by then."""
    tokens = torch.randint(0, model.config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    held: dict[str, Any] = {}

    def prefill() -> None:
        held.clear()
        held["outputs"] = model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    def generate() -> None:
        outputs = held["outputs"]
        for _ in range(size.new_tokens):
            token = outputs.logits[:, -1:].argmax(-1)
            outputs = model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)
        held["outputs"] = outputs

    with torch.inference_mode():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = measure(prefill, repeats=size.repeats, device=device)
        generation = measure(generate, repeats=1, warmup=0, device=device)
    return {
        "prefill s": first.median_s,
        "prompt tokens per s": num_tokens / first.median_s,
        "generated tokens per s": size.new_tokens / generation.median_s,
        "cache MiB": cache_bytes(held["outputs"].past_key_values) / 2**20,
        "peak GiB": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
    }


# Most valuable first.
PIECES: dict[str, Callable[[str, Size], Iterator[Row]]] = {
    "parity": parity,
    "training step": training_step,
    "length": length,
    "day": day,
    "language model": language_model,
    "bars": bars,
    "training step, gated DeltaNet": delta_training_step,
}


# --- what they are made of -------------------------------------------------------------------------------------------


def attempt(what: str, named: Row, call: Callable[[], Row]) -> Row:
    """The row of a measurement, or of what kept it from being made."""
    row = {"what": what} | named
    try:
        found = call()
    except failures() as error:
        said = (str(error).splitlines() or [""])[0][:300]
        found = {"fault": "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {said}"}
    if "fault" in found:  # what the failed call held is held by its traceback's frames until here
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return row | found


def encoder(size: Size, mixer: Callable | None, **options: Any) -> PreTrainedModel:
    """An encoder with a CTC head at a size; ``mixer`` None keeps the attention, which is SDPA's."""
    family = families()["wav2vec2"]
    published = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, "layerdrop": 0.0}
    torch.manual_seed(0)
    config = Wav2Vec2Config(**published, **size.encoder, **options)
    model = family.load(config, model_class=family.classes["ctc"])
    if mixer is not None:
        convert(model, LayerMap(mixer))
    return model


def normalised(samples: Tensor) -> Tensor:
    return (samples - samples.mean()) / (samples.var(unbiased=False) + 1e-7).sqrt()


def noise(duration_s: float) -> Tensor:
    """A minute of noise, again and again: the numbers do not matter, and a day of them takes its time to draw."""
    minute = torch.randn(60 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    num_samples = int(duration_s * SAMPLE_RATE)
    return minute.repeat(-(-num_samples // len(minute)))[:num_samples]


def whole(model: PreTrainedModel, dtype: torch.dtype, device: str) -> Callable[[Tensor], Tensor]:
    """Samples on the CPU to logits (T, V) there, in one forward pass."""

    def read(samples: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(normalised(samples.to(device)).to(dtype)[None]).logits[0].float().cpu()

    return read


def blocks(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The same by :mod:`cald_speech.longform`."""
    longform = imported_longform()

    def read(samples: Tensor) -> Tensor:
        source = longform.AudioSource.from_samples(samples)
        return torch.cat([logits for _, logits in longform.stream_logits(model, source, dtype=dtype)])

    return read


def imported_longform() -> types.ModuleType:
    """:mod:`cald_speech.longform`, which reads files with soundfile: no file is read here, and so none is needed."""
    if importlib.util.find_spec("soundfile") is None:
        sys.modules["soundfile"] = Absent("soundfile")
    return importlib.import_module("cald_speech.longform")


class Absent(types.ModuleType):
    """A module in the place of one that is not installed: whatever is asked of it is an empty class."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


def reading(
    read: Callable[[Tensor], Tensor], duration_s: float, device: str, *, repeats: int = 3, warmup: int = 1
) -> Callable[[], Row]:
    def call() -> Row:
        samples = noise(duration_s)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        timing = measure(lambda: read(samples), repeats=repeats, warmup=warmup, device=device)
        return {
            "seconds": timing.median_s,
            "spread_s": timing.spread_s,
            "repeats": repeats,
            "audio s per s": duration_s / timing.median_s,
            "peak GiB": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
        }

    return call


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def cache_bytes(cache: Any) -> int:
    """Of keys, values and states: every tensor that is reached from the cache's layers, once."""
    seen: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            for one in value.values():
                look(one)
        elif isinstance(value, list | tuple):
            for one in value:
                look(one)

    for layer in cache.layers:
        look(vars(layer))
    return sum(seen.values())


def number_in(experiment: str, key: str) -> float:
    """A number of a shipped experiment, by its line: what reads yaml with objects may not be installed here."""
    text = (hparams_folder() / experiment).read_text()
    return float(re.search(rf"^{key}: ([\d.e+-]+)", text, re.MULTILINE)[1])


def main(argument: str) -> int:
    case = json.loads(argument)
    for row in PIECES[case["piece"]](case["device"], SIZES[case["size"]]):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
