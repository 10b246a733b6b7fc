"""Teacher, student and processor of an experiment."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, Wav2Vec2Processor

from cald_speech.checkpoints import from_pretrained, load_config
from cald_speech.conversion import ConversionReport, convert
from cald_speech.data.text import make_processor
from cald_speech.errors import UserError
from cald_speech.families import Family, family_of
from cald_speech.hub import check_source
from cald_speech.training.settings import Settings


@dataclass
class Models:
    """What an experiment trains and follows. ``teacher`` is None where no step needs one."""

    family: Family
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    processor: Wav2Vec2Processor
    conversion: ConversionReport


def build_models(settings: Settings, train_texts: Iterable[str]) -> Models:
    """Load the teacher, start the student from the weights that the guidance mode asks for, and convert it.

    Raises UserError where a model is missing from the settings, cannot be loaded, or does not fit the other.
    """
    guidance = settings.guidance
    if guidance.trains_teacher and settings.source is None:
        raise UserError(
            f"guidance {type(guidance).__name__.lower()} fine-tunes a teacher in the same run, and there is nothing to "
            "start it from: give --source, a folder or hub id of pretrained weights, or --guidance target with a "
            "--teacher"
        )
    if guidance.needs_teacher and not guidance.trains_teacher and settings.teacher is None:
        raise UserError(
            f"guidance {type(guidance).__name__.lower()} follows a teacher, and none is set: give --teacher, a folder "
            "or hub id of a fine-tuned model (hparams/teacher.yaml trains one), or --guidance unguided"
        )
    start = settings.source if guidance.starts_from == "source" and settings.source is not None else settings.teacher
    if start is None:
        raise UserError("no model to start from: give --source (pretrained weights) or --teacher (a fine-tuned model)")
    processor = load_processor(settings, train_texts)
    student = _load_student(start, settings, len(processor.tokenizer))
    family = family_of(student)
    teacher = None
    if guidance.trains_teacher:
        teacher = _load_student(start, settings, len(processor.tokenizer))
        teacher.load_state_dict(student.state_dict())  # a head that is new is the same in both
    elif guidance.needs_teacher:
        teacher = from_pretrained(settings.teacher, head=settings.task.head)
    if teacher is not None:
        check_match(teacher, student)
        try:
            guidance.check_teacher(teacher)
        except ValueError as error:
            raise UserError(str(error)) from error
    report = convert(student, family, settings.layer_map, initialise=settings.initialise)
    return Models(family, student, teacher, processor, report)


def load_processor(settings: Settings, train_texts: Iterable[str]) -> Wav2Vec2Processor:
    """That of the first of ``processor``, ``teacher``, ``source`` that has one, or one made from the transcripts."""
    for place in (settings.processor, settings.teacher, settings.source):
        if not isinstance(place, str):
            continue
        check_source(place)
        try:
            return Wav2Vec2Processor.from_pretrained(place)
        except (OSError, ValueError, TypeError) as error:
            # A self-supervised encoder has no tokenizer, which is no fault; a processor that was asked for is needed.
            if place == settings.processor:
                raise UserError(f"processor: cannot load one from {place!r}: {error}") from error
    return make_processor(Path(settings.output_folder) / "processor", train_texts)


def _load_student(start: str | PretrainedConfig, settings: Settings, vocab_size: int) -> PreTrainedModel:
    overrides = dict(settings.model_overrides)
    if isinstance(start, PretrainedConfig):
        family = family_of(start)
        overrides["vocab_size"] = vocab_size
        return family.load(start, model_class=family.classes[settings.task.head], **overrides)
    config = load_config(start)
    # A checkpoint without a head gets one of the tokenizer's size; one with a head must fit it.
    has_head = any("ForCTC" in name for name in config.architectures or ())
    if has_head and config.vocab_size != vocab_size:
        raise UserError(
            f"the head of {start!r} has {config.vocab_size} outputs and the tokenizer {vocab_size} tokens: give the "
            "model's own tokenizer with --processor"
        )
    return from_pretrained(start, head=settings.task.head, vocab_size=vocab_size, **overrides)


def check_match(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise UserError unless hidden states and logits of the two can be compared."""
    pairs = {
        "family": (family_of(teacher).model_type, family_of(student).model_type),
        "width": (teacher.config.hidden_size, student.config.hidden_size),
        "layers": (teacher.config.num_hidden_layers, student.config.num_hidden_layers),
        "vocabulary": (teacher.config.vocab_size, student.config.vocab_size),
        "frame rate": (tuple(teacher.config.conv_stride), tuple(student.config.conv_stride)),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise UserError(
                f"teacher and student do not match in their {name}: expected the same, got {ours} and {theirs}. "
                "Set `source` to the pretrained model the teacher was fine-tuned from, or leave it out"
            )
