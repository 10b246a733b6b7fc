"""A student of which adapters alone train: LoRA and its kin, by PEFT (the extra ``peft``).

    adapters: !new:peft.LoraConfig {r: 8, target_modules: .*\\.mixer\\..*_proj, modules_to_save: [lm_head]}

They are put on after the conversion, and after the calibration. What ``modules_to_save`` names trains as a whole beside
them; ``mixer`` names the mixers. Everything else stays as it is.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cald_speech.errors import UserError, some_of
from cald_speech.families import family_of
from cald_speech.files import whole_folder
from cald_speech.training.distributed import gathered, is_main

# Of the kinds that sit inside of modules and can be merged into them. AdaLoRA would need a word at every step.
KINDS = ("LoraConfig", "LoHaConfig", "LoKrConfig", "IA3Config")
PATIENCE = 100  # steps in which layerdrop may leave a layer out each time
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
        linear = _linear_maps(model)
        try:
            self.model = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"adapters: {' '.join(str(error).split())[:300]} {_projections(model)}") from error
        config.base_model_name_or_path = base
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.facts = {"adapters": f"{config.peft_type.value}, {self.num_trained:,} of {before:,} parameters trained"}
        self.watch: GradientWatch | None = GradientWatch(model, linear)  # None: each of them has had a gradient
        if new_head and not any(p.requires_grad for p in _head_parameters(model)):
            raise UserError(
                "adapters: the head is new, and would stay as it was drawn: expected modules_to_save with its name "
                f"({', '.join(_head_names(model))}), or a source that has this head"
            )

    def check_gradients(self) -> None:
        """To be called with a step's gradients, by all ranks. Raises UserError for adapters that the model goes by."""
        if self.watch is not None and self.watch.is_done():
            self.watch = None

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


class GradientWatch:
    """Whether every module that has an adapter, or trains as a whole beside them, gets a gradient.

    An attention may take the weights of its projections and call none of them: adapters on those would change nothing.
    A module is judged after a step whose forward passes called every item of a list of modules that it is in: a layer
    that layerdrop left out says nothing yet, until ``PATIENCE`` steps are over.

    Arguments
    ---------
    model : with its adapters.
    linear : the model's own linear maps, with the names that they had without adapters.
    """

    def __init__(self, model: nn.Module, linear: dict[nn.Module, str]):
        trained = ((name, module) for name, module in model.named_modules() if _is_trained(module))
        self.waiting = {name: [p for p in module.parameters() if p.requires_grad] for name, module in trained}
        self.linear = linear
        self.items = {name: list(_list_items(model, name)) for name in self.waiting}
        self.called: set[nn.Module] = set()
        self.steps = 0
        called, watched = self.called, {item for items in self.items.values() for item in items} | linear.keys()

        def note(module: nn.Module, _: Any) -> None:
            if torch.is_grad_enabled():  # not in a validation
                called.add(module)

        self.hooks = [module.register_forward_pre_hook(note) for module in watched]

    def is_done(self) -> bool:
        """Judge by the gradients that there are now; whether all are known to have one. Raises UserError."""
        self.steps += 1
        late = self.steps >= PATIENCE
        moved = {name for name, its in self.waiting.items() if any(p.grad is not None for p in its)}
        still = {name for name in self.waiting.keys() - moved if late or self.called.issuperset(self.items[name])}
        ranks = gathered((moved, still))  # each may have dropped other layers
        moved = set().union(*(rank[0] for rank in ranks))
        still = set().union(*(rank[1] for rank in ranks)) - moved
        if still:
            raise UserError(self._message([name for name in self.waiting if name in still]))
        self.waiting = {name: its for name, its in self.waiting.items() if name not in moved}
        self.called.clear()
        if not self.waiting:
            for hook in self.hooks:
                hook.remove()
        return not self.waiting

    def _message(self, names: list[str]) -> str:
        called = {name for module, name in self.linear.items() if module in self.called}
        ends, others = ([name.rpartition(".")[2] for name in of] for of in (called, {*self.linear.values()} - called))
        free = some_of(sorted({*ends} - {*others}))
        return (
            f"adapters: expected modules that get a gradient, got {some_of(names)}, which get none and would stay as "
            "they are: the model does not call them, and takes at most their weights. Give target_modules and "
            r"modules_to_save without them, for instance a pattern such as .*\.mixer\..*_proj for mixers alone. The "
            f"linear maps that it calls in every layer end in {free or 'no name of their own'}"
        )


def _is_trained(module: nn.Module) -> bool:
    """Whether PEFT has put it in the place of another that it adapts or trains as a whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)


def _list_items(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The items of lists of modules (layers, as a rule) that the module of that name is in."""
    holder = model
    for part in name.split("."):
        held = holder.get_submodule(part)
        if isinstance(holder, nn.ModuleList):
            yield held
        holder = held


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
    ends = dict.fromkeys(name.rpartition(".")[2] for name in _linear_maps(model).values())
    return f"Its linear maps end in {some_of(list(ends))}"


def _linear_maps(model: nn.Module) -> dict[nn.Module, str]:
    """With their names, the mixers' first."""
    maps = [(module, name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return dict(sorted(maps, key=lambda of: ".mixer." not in of[1]))


def _head_names(model: PreTrainedModel) -> list[str]:
    base = family_of(model).base(model)
    return [name for name, child in model.named_children() if child is not base]


def _head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    return [p for name in _head_names(model) for p in model.get_submodule(name).parameters()]
