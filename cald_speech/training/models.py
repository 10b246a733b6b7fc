"""Teacher, student and processor of an experiment, and the teacher that is fine-tuned in the same run."""

import copy
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.checkpoints import Checkpointer
from transformers import PretrainedConfig, PreTrainedModel

from cald_speech.conversion import ConversionReport, from_pretrained, load_config
from cald_speech.conversion.classes import config_class, converted_class
from cald_speech.errors import UserError
from cald_speech.evaluation.calibration import calibrate
from cald_speech.families import Family, SpeechFamily, family_of
from cald_speech.families.languages import write_in
from cald_speech.tasks.base import Processor
from cald_speech.training.adapters import Adapters, check_kind
from cald_speech.training.checkpointing import ModelStore
from cald_speech.training.distributed import sum_gradients
from cald_speech.training.optimiser import make_optimiser, parameters_of, set_learning_rate, step_if_finite
from cald_speech.training.settings import Settings
from cald_speech.training.stepwise import StepwiseConversion

logger = logging.getLogger(__name__)


@dataclass
class Models:
    """What an experiment trains and follows. ``teacher`` is None where no step needs one."""

    family: Family
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    processor: Processor
    conversion: ConversionReport
    stepwise: StepwiseConversion | None = None  # None: the student is given, converted or not
    adapters: Adapters | None = None  # None: every parameter trains


def build_models(settings: Settings, train: Path) -> Models:
    """Load the teacher, start the student from the weights that the guidance mode asks for, and convert it.

    A student that is given (``settings.student``) goes on from what it is, converted or not.

    Arguments
    ---------
    train : the manifest of the training set, of which a vocabulary is made where no model brings one.

    Raises
    ------
    UserError
        where a model is missing from the settings, cannot be loaded, or does not fit the other.
    """
    guidance, start = settings.guidance, _start(settings)
    if settings.adapters is not None:
        _check_adapters(settings)
    processor = load_processor(settings, train)
    student = _load_student(start, settings, processor)
    teacher = None
    if guidance.trains_teacher:
        teacher = _load_student(start, settings, processor)
        teacher.load_state_dict(student.state_dict())  # a head that is new is the same in both
    elif guidance.needs_teacher:
        teacher = from_pretrained(settings.teacher, head=settings.task.head, target_lang=settings.target_lang)
    if teacher is not None:
        check_match(teacher, student)
        try:
            guidance.check_teacher(teacher)
        except ValueError as error:
            raise UserError(str(error)) from error
    stepwise = None
    if settings.student is not None:
        report = ConversionReport.of(student)
    else:
        stepwise = StepwiseConversion(settings, student)
        original = copy.deepcopy(student) if settings.calibrate else None
        report = stepwise.convert_for(0)
        if original is not None:
            report = _calibrated(report, original, student, settings, processor, train)
    _freeze(student, settings)
    if settings.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return Models(family_of(student), student, teacher, processor, report, stepwise)


def put_on_adapters(settings: Settings, models: Models, store: ModelStore, *, anew: bool) -> None:
    """Let the adapters of the settings train, and nothing of the student beside them; without any, do nothing.

    Arguments
    ---------
    store : writes the model that they are put on into ``before_adapters``, where that is in no folder yet.
    anew : False for a run that is taken up: the folder is there.
    """
    if settings.adapters is None:
        return
    student, start = models.student, _start(settings)
    new_head = _head_is_new(start, models.family, settings.task.head)
    converted_here = settings.student is None and isinstance(student.config, config_class(models.family))
    base = str(Path(start).absolute()) if isinstance(start, str) and Path(start).exists() else start
    if new_head or converted_here:
        base = str(store.folder.absolute() / "before_adapters")
        if anew:
            store.save("before_adapters", student)
    models.adapters = Adapters(settings.adapters, student, base=base, new_head=new_head)
    mixers = [models.family.mixer(layer) for layer in models.family.layers(student)]
    parameters = [p for mixer in mixers if mixer is not None for p in mixer.parameters()]
    if settings.guidance.align_steps and not any(p.requires_grad for p in parameters):
        raise UserError(
            "align_steps: expected adapters inside of mixers, or modules_to_save: [mixer], since slot alignment trains "
            "mixers alone, got adapters elsewhere"
        )
    store.facts |= models.adapters.facts


def _check_adapters(settings: Settings) -> None:
    check_kind(settings.adapters)
    if settings.conversion_schedule is not None:
        raise UserError(
            "adapters: expected a model that is converted before the first step, got a conversion_schedule. Leave one "
            "of the two out"
        )


def _head_is_new(start: str | PretrainedConfig, family: Family, head: str) -> bool:
    """Whether the student's head has no weights of what it starts from."""
    config = start if isinstance(start, PretrainedConfig) else load_config(start)
    plain = family.class_with(head)
    known = {plain.__name__, converted_class(family, plain).__name__}
    return head != "base" and (config is start or not known & {*(config.architectures or ())})


def _start(settings: Settings) -> str | PretrainedConfig:
    """What the student starts from. Raises UserError where a model that the guidance mode needs is not set."""
    guidance = settings.guidance
    name = type(guidance).__name__.lower()
    if guidance.trains_teacher and settings.source is None:
        raise UserError(
            f"guidance {name} fine-tunes a teacher in the same run, and there is nothing to start it from: give "
            "--source, a folder or hub id of pretrained weights, or --guidance target with a --teacher"
        )
    if guidance.needs_teacher and not guidance.trains_teacher and settings.teacher is None:
        raise UserError(
            f"guidance {name} follows a teacher, and none is set: give --teacher, a folder or hub id of a fine-tuned "
            "model (hparams/teacher.yaml trains one), or --guidance unguided"
        )
    if settings.student is not None:
        if settings.calibrate:
            raise UserError(
                "calibrate: expected a model that is converted in this run, got the converted `student`. Leave it out, "
                "or give --calibrate where that student is converted"
            )
        if settings.conversion_schedule is not None:
            raise UserError(
                "conversion_schedule: expected a model that is converted in this run, got the converted `student`. "
                "Leave one of the two out"
            )
        return settings.student
    start = settings.source if guidance.starts_from == "source" and settings.source is not None else settings.teacher
    if start is None:
        raise UserError("no model to start from: give --source (pretrained weights) or --teacher (a fine-tuned model)")
    return start


def load_processor(settings: Settings, train: Path) -> Processor:
    """That of the first of ``processor``, ``teacher``, ``student``, ``source`` that has one, or a new one."""
    places = [p for p in (settings.teacher, settings.student, settings.source) if isinstance(p, str)]
    folder = Path(settings.output_folder) / "processor"
    processor = settings.task.processor(places, settings.processor, folder, train, settings.normaliser)
    if settings.target_lang is not None:
        write_in(getattr(processor, "tokenizer", processor), settings.target_lang)
    return processor


def _load_student(start: str | PretrainedConfig, settings: Settings, processor: Processor) -> PreTrainedModel:
    task = settings.task
    if settings.target_lang is not None and isinstance(start, str):
        model = from_pretrained(start, head=task.head, target_lang=settings.target_lang, **settings.model_overrides)
        task.head_options(start, model.config, processor)  # the language's head has come with its adapter
        return model
    config = start if isinstance(start, PretrainedConfig) else load_config(start)
    overrides = {**settings.model_overrides, **task.head_options(str(start), config, processor)}
    if isinstance(start, PretrainedConfig):
        family = family_of(start)
        return family.load(start, model_class=family.class_with(task.head), **overrides)
    return from_pretrained(start, head=task.head, **overrides)


def _calibrated(
    report: ConversionReport,
    original: PreTrainedModel,
    student: PreTrainedModel,
    settings: Settings,
    processor: Processor,
    train: Path,
) -> ConversionReport:
    task = settings.task
    options = {"normaliser": settings.normaliser, "unknown": settings.unknown_characters}
    dataset = task.dataset(train, processor, **options)
    return calibrate(report, original, student, dataset, modality=task.modality, utterances=settings.calibrate)


def _freeze(model: PreTrainedModel, settings: Settings) -> None:
    family = family_of(model)
    if not isinstance(family, SpeechFamily):
        return
    for parameter in family.constants(model):
        parameter.requires_grad_(False)
    if settings.freeze_front_end or settings.adapters is not None:
        family.freeze_front_end(model)


def check_match(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise UserError unless hidden states and logits of the two can be compared."""
    ours, theirs = (family_of(model).traits(model.config) for model in (teacher, student))
    for name, its in ours.items():
        other = theirs.get(name)
        if its != other:
            raise UserError(
                f"teacher and student do not match in their {name}: expected the same, got {its} and {other}. "
                "Set `source` to the pretrained model the teacher was fine-tuned from, or leave it out"
            )


class TeacherTraining:
    """The teacher's own optimiser. Between its steps the teacher is in evaluation mode, as every teacher is."""

    def __init__(self, teacher: PreTrainedModel, settings: Settings):
        self.teacher, self.settings = teacher, settings
        teacher.requires_grad_(True)
        _freeze(teacher, settings)
        options = settings.learning_rate, settings.weight_decay
        self.optimizer = make_optimiser(teacher, *options, decay=settings.decay)
        # float16 gradients underflow; the student's scaler has seen other gradients.
        self.scaler = torch.amp.GradScaler(teacher.device.type, enabled=settings.precision == "fp16")

    def register(self, checkpointer: Checkpointer) -> None:
        """What a resumed run needs of it."""
        checkpointer.add_recoverable("teacher", self.teacher)
        checkpointer.add_recoverable("teacher_optimizer", self.optimizer)
        if self.scaler.is_enabled():
            checkpointer.add_recoverable("teacher_scaler", self.scaler)

    def step(
        self, batches: list[PaddedBatch], count: float, learning_rate: float, precision: AbstractContextManager
    ) -> None:
        """One optimiser step on the task loss alone, over the student's batches.

        Arguments
        ---------
        batches : of this rank.
        count : characters or utterances of all batches and ranks.
        learning_rate : of this step.
        precision : the autocast context of training.
        """
        set_learning_rate(self.optimizer, learning_rate)
        self.teacher.train()
        for batch in batches:
            inputs, lengths = self.settings.task.modality.arguments(batch, self.teacher)
            with precision:
                outputs = self.settings.task.outputs(self.teacher(**inputs))
                loss = self.settings.task.loss(outputs, lengths, batch) / max(1.0, count)
            self.scaler.scale(loss).backward()
        self.teacher.eval()
        sum_gradients(parameters_of(self.optimizer))
        _, taken = step_if_finite(self.optimizer, self.scaler, self.settings.max_grad_norm)
        if not taken:
            logger.warning("the teacher's gradient is not finite: its step is skipped")
