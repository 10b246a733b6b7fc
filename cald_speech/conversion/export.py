"""A model as an ONNX file, for inference by runtimes that know neither this package nor torch.

The file holds ONNX's own operators alone: ``cald_speech.ops.traced`` says what they are made of.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families import Family, SpeechFamily, TextFamily, family_of
from cald_speech.files import whole_file
from cald_speech.ops import valid_frames

OPSET = 20
TOLERANCE = 1e-4  # of the largest value of an output
MOST_BYTES = 2_000_000_000  # of a file of protocol buffers
LIKE_PADDING = -1e4  # what masks write into logits is below


class ExportedModel(NamedTuple):
    """What was written: the file, and how far its outputs are from the model's, as a fraction of the largest."""

    path: Path
    opset: int
    error: float


def export_onnx(model: PreTrainedModel, path: str | Path, *, length: int | None = None) -> ExportedModel:
    """Write a model's inference as an ONNX file, and compare what onnxruntime makes of it with the model.

    The file takes ``input_values`` (B, samples), as the model's processor makes them, or ``input_ids`` (B, tokens), and
    ``attention_mask``, of int64, padded on the right, or on either side for a causal model; it gives the model's
    first output. A language model goes without a cache: each call reads its tokens from the first.

    Arguments
    ---------
    model : converted or not, of samples or of tokens, float32 on the CPU.
    path : of the file, ``.onnx``.
    length : samples or tokens of every input; of any number where it is None. The batch has any size.

    Returns
    -------
    What was written, by :class:`ExportedModel`.

    Raises
    ------
    UserError
        without the extra ``onnx``; for a model that cannot be traced, or whose outputs onnxruntime does not reach.

    Example
    -------
    >>> from cald_speech import from_pretrained
    >>> export_onnx(from_pretrained("FOLDER"), "model.onnx").error < 1e-4  # doctest: +SKIP
    True
    """
    path = Path(path)
    check_onnx()
    family = family_of(model)
    name, shortest = _input_of(family, model)
    if path.suffix != ".onnx":
        raise UserError(f"expected a file that ends in .onnx, got {path}")
    if length is not None and length < shortest:
        raise UserError(f"length: expected at least {shortest} {name[1]}, got {length}")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise UserError(
            f"expected a model of float32 on the CPU, got {model.dtype} on {model.device}: model.float().cpu()"
        )
    size = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    if size > MOST_BYTES:
        raise UserError(f"an ONNX file holds 2 GB, and the model has {size / 1e9:.1f}: expected a smaller one")
    wrapped = FirstOutput(model.eval(), name[0])
    with whole_file(path) as unfinished:
        _write(wrapped, _example(family, model, 2, length or 3 * shortest), unfinished, name, length)
        error = 0.0
        for batch, count in ((2, length or 3 * shortest), (1, length or 5 * shortest), (3, length or shortest)):
            example = _example(family, model, batch, count)
            try:
                error = max(error, _error(wrapped, unfinished, example, name[0]))
            except UserError:
                raise
            except Exception as fault:  # onnxruntime's have no class of their own
                cause = " ".join(str(fault).split())
                raise UserError(
                    f"onnxruntime cannot run what was made of {type(model).__name__} on {batch} inputs of {count} "
                    f"{name[1]}, and nothing was written: {cause:.300} "
                    + ("Expected other mixers" if length else "Give a length (--length) to have it fixed")
                ) from fault
        if not error <= TOLERANCE:
            raise UserError(
                f"what onnxruntime makes of the file is {error:.1e} from the model, and expected is {TOLERANCE:.0e} at "
                "most: nothing was written. Other versions of torch, onnxscript or onnxruntime may do better"
            )
    return ExportedModel(path, OPSET, error)


def check_onnx() -> None:
    """Raise UserError unless what ONNX needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise UserError(
            f"{missing}: expected onnx, onnxscript and onnxruntime, of the extra onnx. pip install 'cald-speech[onnx]'"
        ) from missing


class FirstOutput(nn.Module):
    """A model from its input and its mask to its first output."""

    def __init__(self, model: PreTrainedModel, name: str):
        super().__init__()
        self.model, self.name = model, name
        self.options = {"use_cache": False} if family_of(model).causal else {}

    def forward(self, values: Tensor, attention_mask: Tensor) -> Tensor:
        given = {self.name: values, "attention_mask": attention_mask}
        return self.model(**given, **self.options, return_dict=True)[0]


def _input_of(family: Family, model: PreTrainedModel) -> tuple[tuple[str, str], int]:
    """Of a model's input the name and what its axis counts; and how many there are in a short one."""
    if isinstance(family, TextFamily):
        return ("input_ids", "tokens"), 8
    if isinstance(family, SpeechFamily) and family.input_key == "input_values":
        return ("input_values", "samples"), 4_000
    raise UserError(
        f"expected a model of samples or of tokens, got {family.model_type}, which hears features: its front end is no "
        "part of a file, and it is not tried with them"
    )


def _example(family: Family, model: PreTrainedModel, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """An input and its mask, whose last row is padded where there are several."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.full((batch,), length)
    if batch > 1:
        sizes[-1] -= length // 3
    mask = valid_frames(sizes, length)
    if isinstance(family, TextFamily):
        values = torch.randint(1, model.config.get_text_config().vocab_size, (batch, length), generator=generator)
    else:
        values = torch.randn(batch, length, generator=generator)
    return values * mask, mask.long()


def _write(wrapped: FirstOutput, example: tuple, path: Path, name: tuple[str, str], length: int | None) -> None:
    axes = {0: "batch"} if length else {0: "batch", 1: name[1]}
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                wrapped,
                example,
                path,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                input_names=[name[0], "attention_mask"],
                output_names=["output"],
                dynamic_shapes=(axes, axes),
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"{type(wrapped.model).__name__} cannot be traced: {cause:.300} Expected mixers and heads that do not look "
            f"at values, and take {'that length' if length else 'any length; with a fixed one (--length) it may do'}"
        ) from error


def _error(wrapped: FirstOutput, path: Path, example: tuple[Tensor, Tensor], name: str) -> float:
    """Of what onnxruntime makes of an example, as a fraction of the largest value that is no padding's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {name: example[0].numpy(), "attention_mask": example[1].numpy()}
    actual = torch.from_numpy(session.run(None, given)[0])
    with torch.no_grad():
        expected = wrapped(*example)
    if actual.shape != expected.shape or not torch.equal(actual > LIKE_PADDING, expected > LIKE_PADDING):
        return float("inf")
    seen = expected > LIKE_PADDING
    if expected.dim() == 3 and expected.size(1) == example[1].size(1):
        seen &= example[1].bool()[..., None]  # a token of padding may get anything
    difference, largest = (actual - expected)[seen].abs().max(), expected[seen].abs().max()
    return float(difference / largest)


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter tells of its steps and of packages that it could use too."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
