"""A student of which adapters alone train: LoRA and its kin, by PEFT (the extra ``peft``).

    adapters: !new:peft.LoraConfig {r: 8, target_modules: .*\\.mixer\\..*_proj, modules_to_save: [lm_head]}

They are put on after the conversion, and after the calibration. What ``modules_to_save`` names trains as a whole beside
them; ``mixer`` names the mixers. Everything else stays as it is.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cald_speech.errors import UserError, some_of
from cald_speech.families import family_of
from cald_speech.files import whole_folder
from cald_speech.training.distributed import is_main

# Of the kinds that sit inside of modules and can be merged into them. AdaLoRA would need a word at every step.
KINDS = ("LoraConfig", "LoHaConfig", "LoKrConfig", "IA3Config")
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # other starts change the weights that the adapter sits on


class Adapters:
    """PEFT's adapters on a model, which is changed in place and keeps its class; nothing else of it trains.

    Arguments
    ---------
    config : of PEFT.
    model : the student.
    base : the folder or hub id of the model that the adapters are put on.
    new_head : whether the model's head has no weights of a checkpoint's.

    Raises
    ------
    UserError
        for a kind of adapter that a recipe cannot have, and for modules that the model does not have.
    """

    def __init__(self, config: Any, model: PreTrainedModel, *, base: str, new_head: bool = False):
        from peft import get_peft_model

        check_kind(config)
        self._check_modules(config, model)
        config = copy.deepcopy(config)  # PEFT writes into it
        before = sum(p.numel() for p in model.parameters())
        try:
            self.model = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"adapters: {' '.join(str(error).split())[:300]} {_projections(model)}") from error
        config.base_model_name_or_path = base
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.facts = {"adapters": f"{config.peft_type.value}, {self.num_trained:,} of {before:,} parameters trained"}
        if new_head and not any(p.requires_grad for p in _head_parameters(model)):
            raise UserError(
                "adapters: the head is new, and would stay as it was drawn: expected modules_to_save with its name "
                f"({', '.join(_head_names(model))}), or a source that has this head"
            )

    def merged(self) -> PreTrainedModel:
        """A copy of the model with its adapters in its weights: a model as if there had never been any."""
        return copy.deepcopy(self.model).merge_and_unload()

    def save(self, folder: Path) -> None:
        """Write the adapters alone, as ``PeftModel.from_pretrained`` reads them; on the main process."""
        if is_main():
            with whole_folder(folder, last="adapter_config.json") as unfinished:
                self.model.save_pretrained(unfinished, save_embedding_layers=False)

    @staticmethod
    def _check_modules(config: Any, model: PreTrainedModel) -> None:
        """Each name of a list must be that of a module: PEFT passes over what it does not find."""
        known = [name for name, _ in model.named_modules() if name]
        for key in ("target_modules", "modules_to_save"):
            names = getattr(config, key, None)
            for name in sorted(names) if isinstance(names, Sequence | set) and not isinstance(names, str) else ():
                if not any(module == name or module.endswith(f".{name}") for module in known):
                    raise UserError(
                        f"adapters: {key}: expected the ends of modules' names, got {name!r}, which no module of "
                        f"{type(model).__name__} has. {_projections(model)}"
                    )


def check_kind(config: Any) -> None:
    """Raise UserError unless ``adapters`` are of a kind that can be trained by a recipe and merged."""
    name, home = type(config).__name__, type(config).__module__.partition(".")[0]
    if home != "peft" or name not in KINDS:
        raise UserError(
            f"adapters: expected `!new:peft.LoraConfig {{r: 8, target_modules: ...}}`, or another of "
            f"{', '.join(KINDS[1:])}, got {config if home == 'builtins' else name!r}"
        )
    start = getattr(config, "init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise UserError(
            f"adapters: init_lora_weights: expected one of {', '.join(map(str, PLAIN_STARTS))}, got {start!r}, which "
            "changes the model under the adapters"
        )


def _projections(model: nn.Module) -> str:
    """The linear maps that adapters may sit on, by the ends of their names, the mixers' first."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names.sort(key=lambda name: ".mixer." not in name)
    return f"Its linear maps end in {some_of(list(dict.fromkeys(name.rpartition('.')[2] for name in names)))}"


def _head_names(model: PreTrainedModel) -> list[str]:
    base = family_of(model).base(model)
    return [name for name, child in model.named_children() if child is not base]


def _head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    return [p for name in _head_names(model) for p in model.get_submodule(name).parameters()]
