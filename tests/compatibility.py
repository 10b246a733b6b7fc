"""What models can be put through, converted and not: docs/compatibility.md is what this finds.

    python -m tests.compatibility     writes the page, in some minutes on one core

Models are tiny and have random weights. Every cell is tried, and what is raised in one is the reason on the page.
Rows that need other processes try all models in one of them.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers, which reads it once

import torch
import transformers
from torch import Tensor, distributed, nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.conversion import export_onnx
from cald_speech.families import Family, SpeechFamily, families
from cald_speech.mixers import DEFAULT, Mamba2
from cald_speech.training.sharding import shard, whole_state
from tests.conversion.test_modeling_file import NOT_INSTALLED, run_alone
from tests.families.text import Case, tokens_and_mask
from tests.helpers import TOLERANCE, audio_batch, relative_error
from tests.sentences import write_tokenizer
from tests.training.miniature import write_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
FAMILIES = {"wav2vec2": "wav2vec2", "wavlm": "WavLM", "gpt_neox": "GPT-NeoX", "llama": "Llama"}
ROUNDED = 0.15  # of the largest output: what numbers of fewer bits may change, as in tests/conversion/test_int8.py
LEARNING_RATE = 0.1
FEED_FORWARD = ["intermediate_dense", "output_dense"]  # of speech models
ADAPTED = {  # by LoRA; converted as docs/howto/adapters.md has it
    "wav2vec2": ["q_proj", "v_proj"],
    "wavlm": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
    "converted": r".*\.mixer\..*_proj",
}
AUTO = torch.export.Dim.AUTO


@dataclass
class Subject:
    """A model in the folder ``place / "model"``, and what is given to it."""

    family: Family
    converted: bool
    place: Path

    @property
    def speech(self) -> bool:
        return isinstance(self.family, SpeechFamily)

    @property
    def folder(self) -> Path:
        return self.place / "model"

    def load(self, folder: Path | None = None, **options) -> PreTrainedModel:
        return from_pretrained(folder or self.folder, head="ctc" if self.speech else "lm", **options)

    def inputs(self, *, other: bool = False) -> dict[str, Tensor]:
        """A padded batch of two rows, or another of three that are longer."""
        if self.speech:
            values, mask = audio_batch([9_000, 7_000, 4_000] if other else [6_000, 3_500])
            return {"input_values": values, "attention_mask": mask}
        tokens, mask = tokens_and_mask((16, 9, 4) if other else (11, 7))
        return {"input_ids": tokens, "attention_mask": mask}

    def example(self) -> dict[str, Tensor]:
        """A row without padding and its labels, to train on."""
        given = {name: values[0] for name, values in self.inputs().items()}
        return given | {"labels": torch.tensor([5, 6, 7]) if self.speech else given["input_ids"]}

    def loss(self, model: nn.Module) -> Tensor:
        return model(**{name: values[None] for name, values in self.example().items()}).loss

    def heard(self, logits: Tensor, given: dict[str, Tensor], config: PretrainedConfig) -> Tensor:
        """The logits of what is no padding, one row after another."""
        sizes = given["attention_mask"].sum(-1)
        if self.speech:
            sizes = self.family.frame_lengths(sizes, config)
        return torch.cat([row[:size] for row, size in zip(logits.float(), sizes.tolist(), strict=True)])

    def outputs(self, model: nn.Module, config: PretrainedConfig, *, other: bool = False) -> Tensor:
        given = self.inputs(other=other)
        with torch.no_grad():
            return self.heard(model(**given, **self.options).logits, given, config)

    @property
    def options(self) -> dict[str, bool]:
        return {} if self.speech else {"use_cache": False}

    def error(self, model: nn.Module, reference: PreTrainedModel | None = None) -> float:
        """How far a model's outputs are from those of another, which is the folder's by default."""
        reference = reference or self.load()
        return relative_error(self.outputs(model, reference.config), self.outputs(reference, reference.config))


def write_subjects(folder: Path) -> list[Subject]:
    """Each model as it is and converted, with what reads its input."""
    subjects = []
    for name in FAMILIES:
        for converted in (False, True):
            one = Subject(families()[name], converted, folder / f"{len(subjects)}")
            if one.speech:
                write_model(one.folder, name, apply_spec_augment=False)
            else:
                Case(one.family, {}).model("lm", num_hidden_layers=2).save_pretrained(one.folder)
                write_tokenizer(one.folder)
            if converted:
                model = one.load()
                convert(model, LayerMap(DEFAULT if one.speech else Mamba2))
                model.save_pretrained(one.folder)
            subjects.append(one)
    return subjects


# --- one use, one model ----------------------------------------------------------------------------------------------


def eager(one: Subject) -> float:
    model, given = one.load(), one.inputs()
    batch, alone = one.outputs(model, model.config), []
    for row, size in enumerate(given["attention_mask"].sum(-1).tolist()):
        cut = {name: values[row : row + 1, :size] for name, values in given.items()}
        with torch.no_grad():
            alone.append(one.heard(model(**cut, **one.options).logits, cut, model.config))
    return relative_error(torch.cat(alone), batch)


def compiled(one: Subject) -> float:
    torch.compiler.reset()
    return one.error(torch.compile(one.load(), fullgraph=True, backend="aot_eager"))


def exported(one: Subject) -> float:
    model, given, other = one.load(), one.inputs(), one.inputs(other=True)
    shapes = {name: {0: AUTO, 1: AUTO} for name in given} | dict.fromkeys(one.options)
    with torch.no_grad():
        program = torch.export.export(model, (), {**given, **one.options}, dynamic_shapes=shapes)
        logits = program.module()(**other, **one.options).logits
    return relative_error(one.heard(logits, other, model.config), one.outputs(model, model.config, other=True))


def onnx(one: Subject) -> float:
    return export_onnx(one.load(), one.place / "model.onnx").error


def lora(one: Subject) -> float:
    targets = ADAPTED["converted" if one.converted else one.family.model_type]
    try:
        return lora_on(one, targets)
    except NotCalledError as error:
        feed_forward = lora_on(one, FEED_FORWARD)
        raise NotCalledError(
            f"adapters on {named(targets)} get no gradient and change nothing: transformers' attention takes the "
            f"weights of these projections and does not call them. On {named(FEED_FORWARD)}: {told(feed_forward)}"
        ) from error


def named(modules: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in modules)


class NotCalledError(Exception):
    """Adapters that a forward pass goes by."""


def lora_on(one: Subject, targets: str | list[str]) -> float:
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted = get_peft_model(one.load(), LoraConfig(r=2, target_modules=targets))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        one.loss(adapted.train()).backward()
        if all(p.grad is None for p in trained):
            raise NotCalledError
        optimiser.step()
    moved(one, adapted.eval())
    adapter, merged = one.place / "adapter", one.place / "merged"
    adapted.save_pretrained(adapter)
    PeftModel.from_pretrained(one.load(), adapter).merge_and_unload().save_pretrained(merged)
    return relative_error(one.outputs(one.load(merged), adapted.config), one.outputs(adapted, adapted.config))


def int8(one: Subject) -> float:
    return one.error(one.load(dtype=torch.int8))


def bf16(one: Subject) -> float:
    model, given = one.load(dtype=torch.bfloat16), one.inputs()
    if one.speech:
        given["input_values"] = given["input_values"].bfloat16()
    with torch.no_grad():
        found = one.heard(model(**given, **one.options).logits, given, model.config)
    return relative_error(found, one.outputs(one.load(), model.config))


def trainer(one: Subject) -> float:
    settings = TrainingArguments(
        str(one.place / "trainer"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    run = Trainer(one.load(), settings, train_dataset=[one.example()] * 4)
    run.train()
    run.save_model(one.place / "trained")
    moved(one, run.model.eval())
    return one.error(one.load(one.place / "trained"), run.model)


def accelerated(one: Subject) -> float:
    from accelerate import Accelerator

    plain = stepped(one)
    accelerator, model = Accelerator(cpu=True), one.load().train()
    optimiser = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    model, optimiser, loader = accelerator.prepare(
        model, optimiser, torch.utils.data.DataLoader([one.example()], batch_size=1)
    )
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimiser.step()
    return one.error(accelerator.unwrap_model(model).eval(), plain)


def piped(one: Subject) -> float:
    if one.speech:
        samples = audio_batch([20_000])[0][0].numpy()
        processor, model = AutoProcessor.from_pretrained(one.folder), one.load()
        given = processor(samples, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            expected = processor.batch_decode(model(**given).logits.argmax(-1))[0]
        found = pipeline("automatic-speech-recognition", model=str(one.folder))(samples)["text"]
    else:
        tokenizer, settings = AutoTokenizer.from_pretrained(one.folder), {"do_sample": False, "max_new_tokens": 5}
        expected = one.load().generate(**tokenizer("a good film", return_tensors="pt"), **settings)[0].tolist()
        generate = pipeline("text-generation", model=str(one.folder))
        found = generate("a good film", return_tensors=True, **settings)[0]["generated_token_ids"]
    if not expected or found != expected:
        raise AssertionError(f"the pipeline gives {found!r}, and the model {expected!r}")
    return 0.0


def stepped(one: Subject) -> PreTrainedModel:
    """The model after a step of one process."""
    model = one.load().train()
    optimiser = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    one.loss(model).backward()
    optimiser.step()
    moved(one, model.eval())
    return model


def moved(one: Subject, model: nn.Module) -> None:
    if not one.error(model) > 1e-4:
        raise AssertionError("training did not change the outputs")


# --- uses in other processes, all models in one -----------------------------------------------------------------------

WITHOUT_THE_PACKAGE = (
    NOT_INSTALLED
    + """
for place in sorted(Path(sys.argv[1]).iterdir()):
    asked = torch.load(place / "asked.pt")
    auto = getattr(transformers, asked["auto"])
    try:
        model = auto.from_pretrained(place / "model", trust_remote_code=True).eval()
        with torch.no_grad():
            torch.save(model(**asked["inputs"])[0], place / "alone.pt")
    except Exception as error:
        (place / "alone.error").write_text(f"{type(error).__name__}: {error}")
"""
)


def start_without_the_package(subjects: Sequence[Subject], folder: Path) -> None:
    for one in subjects:
        auto = one.family.auto_classes["ctc" if one.speech else "lm"].__name__
        torch.save({"auto": auto, "inputs": one.inputs()}, one.place / "asked.pt")
    done = run_alone(folder, WITHOUT_THE_PACKAGE)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def without_the_package(one: Subject) -> float:
    raise_what_was_told(one.place / "alone.error")
    model = one.load()
    found = one.heard(torch.load(one.place / "alone.pt"), one.inputs(), model.config)
    return relative_error(found, one.outputs(model, model.config))


def start_ranks(subjects: Sequence[Subject], folder: Path) -> None:
    """Two processes, of which each holds a part of every model."""
    told = {str(one.place): [one.family.model_type, one.converted] for one in subjects}
    (folder / "ranks.json").write_text(json.dumps(told))
    command = [sys.executable, "-W", "ignore", "-m", "tests.compatibility", "--rank", str(folder)]
    settings = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=settings | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=600)
            if rank.returncode:
                raise RuntimeError(errors[-2000:])
    finally:
        for rank in ranks:
            rank.kill()


def run_rank(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for place, (family, converted) in json.loads((folder / "ranks.json").read_text()).items():
        one = Subject(families()[family], converted, Path(place))
        try:
            model = one.load().train()
            shard(model, torch.device("cpu"))
            optimiser = torch.optim.SGD(model.parameters(), LEARNING_RATE)
            one.loss(model).backward()
            optimiser.step()
            state = whole_state(model)
            if rank == 0:
                torch.save(state, one.place / "sharded.pt")
        except Exception as error:
            (one.place / "sharded.error").write_text(f"{type(error).__name__}: {error}")
    distributed.destroy_process_group()


def sharded(one: Subject) -> float:
    raise_what_was_told(one.place / "sharded.error")
    model = one.load()
    model.load_state_dict(torch.load(one.place / "sharded.pt"))
    return one.error(model, stepped(one))


def raise_what_was_told(path: Path) -> None:
    if path.exists():
        raise RuntimeError(path.read_text())


# --- the page --------------------------------------------------------------------------------------------------------


MOST = 400  # characters of a reason


class Use(NamedTuple):
    attempt: Callable[[Subject], float]
    what: str  # is done, and what the figure compares
    needs: str | None = None
    allowed: float = TOLERANCE["parity"]


USES = {
    "eager": Use(eager, "`from_pretrained`; a padded batch against each row alone"),
    "compile": Use(
        compiled, '`torch.compile(model, fullgraph=True, backend="aot_eager")`; forward, a batch of one size'
    ),
    "export": Use(exported, "`torch.export`; run at another batch and length than it was traced with"),
    "ONNX": Use(onnx, "`cald_speech.conversion.export_onnx`; three batches and lengths in onnxruntime", "onnxruntime"),
    "LoRA": Use(lora, "PEFT, two steps; merged, saved and loaded against adapters beside the weights", "peft"),
    "int8": Use(int8, "`from_pretrained(..., dtype=torch.int8)`", allowed=ROUNDED),
    "bf16": Use(bf16, "`from_pretrained(..., dtype=torch.bfloat16)`", allowed=ROUNDED),
    "Trainer": Use(
        trainer, "`transformers.Trainer`, two steps; saved and loaded against the trained model", "accelerate"
    ),
    "accelerate": Use(accelerated, "`Accelerator(cpu=True).prepare`, one step; against the step without", "accelerate"),
    "FSDP2": Use(
        sharded,
        "`cald_speech.training.sharding.shard`, two gloo processes, the same row in each, one step; against one",
    ),
    "pipeline": Use(piped, "`transformers.pipeline`; greedy words of speech, five tokens of text, against the model's"),
    "remote code": Use(
        without_the_package,
        "transformers' Auto class, `trust_remote_code=True`, where `cald_speech` cannot be imported",
    ),
}
HEAD = """# What goes together

Tiny models with random weights, two layers each, float32 on a CPU. Converted: every layer, speech to `DEFAULT` (Mamba-2
in both directions), text to `Mamba2`. Speech has a CTC head, text a language model's. "works" has the largest
difference that was found, as a share of the largest output: it may be 1e-4, and 0.15 in bf16 and int8, where random
weights say little ([what they cost real models](results/precision.md)). [1] is the first of the reasons below.

```bash
python -m tests.compatibility
```

makes this page, and `tests/test_compatibility.py` compares it with what it finds then. It ran on one of two cores of an
AMD EPYC virtual machine, with {versions}.

"""
TAIL = """
Not run here: a GPU, larger models, other mixers and families, inductor (but see
[torch.compile](howto/compile_and_export.md#torchcompile)), FSDP2 by accelerate or Trainer, several machines, compiled
training.
"""


def find(folder: Path) -> dict[str, list[str]]:
    """Of each use, what is said of each model: ``works, 3e-07`` or the reason."""
    (folder / "folders").mkdir()
    subjects = write_subjects(folder / "folders")
    start_ranks(subjects, folder)
    start_without_the_package(subjects, folder)
    return {name: [said(use, one) for one in subjects] for name, use in USES.items()}


def said(use: Use, one: Subject) -> str:
    if use.needs and not find_spec(use.needs):
        return f"not run: {use.needs} is not installed"
    torch.manual_seed(0)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = use.attempt(one)
    except NotCalledError as raised:
        return f"{raised}"
    except Exception as raised:
        return " ".join(f"{type(raised).__name__}: {raised}".replace(str(one.place), "").split())[:MOST]
    return told(error) if error <= use.allowed else f"differs, {error:.0e}"


def told(error: float) -> str:
    return f"works, {error:.0e}" if error else "works, equal"


def page(found: dict[str, list[str]]) -> str:
    reasons = list(dict.fromkeys(cell for row in found.values() for cell in row if not cell.startswith("works")))
    columns = [f"{name}{kind}" for name in FAMILIES.values() for kind in ("", ", converted")]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, row in found.items():
        cells = [cell if cell.startswith("works") else f"[{reasons.index(cell) + 1}]" for cell in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    lines += [
        "",
        "## What each row does",
        "",
        "| | |",
        "|---|---|",
        *(f"| {n} | {use.what} |" for n, use in USES.items()),
    ]
    versions = f"torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}"
    return HEAD.format(versions=versions) + "\n".join(lines) + "\n" + TAIL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="the file to write")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # one of the two processes of FSDP2
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if given.rank:
        run_rank(given.rank)
        return
    with tempfile.TemporaryDirectory() as folder:
        given.page.write_text(page(find(Path(folder))))


if __name__ == "__main__":
    main()
