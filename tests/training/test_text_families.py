"""Every text family from a teacher to what it writes: converted, trained, saved, loaded, measured, generating."""

import json

import pytest
import yaml

from cald_speech import from_pretrained
from cald_speech.evaluation.language import evaluate_language
from cald_speech.recipes.pile import prepare as recipe
from cald_speech.training.run import run
from tests.families.text import CASES
from tests.recipes.test_pile import CORPUS, TASK, texts
from tests.training.miniature import BIDIRECTIONAL, CONVERTED, ROOT

__all__ = ["texts"]

OPTIONS = {"vocab_size": CORPUS["vocab_size"], "initializer_range": 0.1}


@pytest.mark.wide
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_a_family_is_trained_measured_and_generates(case, texts, tmp_path):
    causal = case.family.causal
    teacher, path = tmp_path / "teacher", tmp_path / "experiment.yaml"
    case.model(**OPTIONS).save_pretrained(teacher)
    keys = {"data_folder": str(texts), "prepare_folder": str(tmp_path / "data"), "corpus": CORPUS}
    keys |= {"teacher": str(teacher), "output_folder": str(tmp_path / "run"), "max_batch_tokens": 400}
    keys |= {"guidance": "hybrid", "switch_step": 2, "align_steps": 1, "alpha_logits": 1.0, "num_steps": 4}
    mixer = "!name:cald_speech.mixers.Mamba2 {chunk_size: 16}" if causal else f"{BIDIRECTIONAL} {{chunk_size: 16}}"
    text = f"task: {TASK.format('CausalLM' if causal else 'MaskedLM')}\n"
    text += f"layer_map: {CONVERTED}\n    default: {mixer}\n    overrides: {{1: null}}\n"
    path.write_text(yaml.safe_dump(keys) + text)
    (tmp_path / "guidance").symlink_to(ROOT / "hparams" / "guidance")
    brain = run([str(path), "--noprogressbar"], recipe.prepare)
    assert brain.optimizer_step == 4 and brain.skipped.count == 0
    model, tokens = tmp_path / "run" / "model", tmp_path / "data" / "manifests" / "valid.json"
    assert json.loads((model / "config.json").read_text())["model_type"] == f"cald_{case.family.model_type}"
    loaded = from_pretrained(model, head=case.family.default_head)
    layers = [case.family.mixer(layer) for layer in case.family.layers(loaded)]
    assert [mixer is None for mixer in layers] == [False, True, False]
    summary = evaluate_language(str(model), tokens, num_prompts=3)
    assert summary["value"] == pytest.approx(brain.progress.best_metric, rel=1e-4)
    if causal:
        assert summary["generation"]["step_error"] < 1e-5 and summary["generation"]["same_padded"] == 1
