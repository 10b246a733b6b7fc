"""Model folders that a run writes: Hugging Face files, processor and card, each folder whole or not there."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from cald_speech.conversion.model_card import update_facts
from cald_speech.errors import UserError
from cald_speech.tasks.base import Processor
from cald_speech.training.checkpointing import is_main


class ModelStore:
    """Saves models under ``folder``; ``facts`` go into every model's card."""

    def __init__(self, folder: Path, processor: Processor, facts: dict[str, Any]):
        self.folder, self.processor, self.facts = folder, processor, facts
        for old in folder.glob(".*.old") if is_main() else ():
            # Killed between two renames: the new folder is gone with its temporary name, the old one is put back.
            final = old.with_name(old.name[1 : -len(".old")])
            old.rename(final) if not final.exists() else shutil.rmtree(old)

    def save(self, name: str, model: PreTrainedModel, **facts: Any) -> None:
        """Write ``folder/name``, in place of what was there, ``facts`` over the store's; on the main process only.

        Raises UserError, with the old folder left as it was, if the disk is full.
        """
        if not is_main():
            return
        final = self.folder / name
        place, old = (final.with_name(f".{final.name}.{suffix}") for suffix in ("unfinished", "old"))
        for left_over in (place, old):
            shutil.rmtree(left_over, ignore_errors=True)
        unfinished = place / final.name  # the card reads the folder's name
        try:
            unfinished.mkdir(parents=True)
            # By the names that the model has now: waypoints are read by them, without a model.
            model.save_pretrained(unfinished, save_original_format=False)
            self.processor.save_pretrained(unfinished)
            update_facts(unfinished, **self.facts | facts)
        # safetensors reports a full disk with an error of its own, which is not an OSError.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(place, ignore_errors=True)
            raise UserError(
                f"cannot save the model in {final}: {error}. What was there before is untouched: make room and start "
                "the same command again"
            ) from error
        if final.exists():
            final.rename(old)
        unfinished.rename(final)
        for left_over in (place, old):
            shutil.rmtree(left_over, ignore_errors=True)
