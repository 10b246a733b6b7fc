"""A converted model's folder without cald_speech: its own file gives the same outputs; cald_speech never runs it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCTC

from cald_speech import LayerMap, convert, from_pretrained, mixers
from cald_speech.conversion.bundle import Bundle, CannotBundle
from cald_speech.conversion.modeling_file import NAME, modeling_file
from cald_speech.errors import UserError
from cald_speech.families import SpeechFamily, TextFamily, families
from cald_speech.mixers import CausalMixer, Linformer, Mamba2, Mixer
from tests.families.text import Case
from tests.helpers import tiny_config, tiny_model

# What Python runs first where cald_speech cannot be imported.
NOT_INSTALLED = """
import sys
from pathlib import Path

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cald_speech":
            raise ImportError("cald_speech is not installed here")

sys.meta_path.insert(0, Refused())
import torch, transformers
"""
# What is asked of each folder there: its outputs, its tokens, and to be saved again.
ALONE = (
    NOT_INSTALLED
    + """
for place in sorted(Path(sys.argv[1]).iterdir()):
    asked = torch.load(place / "asked.pt")
    auto = getattr(transformers, asked["auto"])
    model = auto.from_pretrained(place / "model", trust_remote_code=True).eval()
    def compare(model):
        with torch.no_grad():
            for inputs, expected in asked["outputs"]:
                got, padded = model(**inputs)[0], expected < -1e4
                assert torch.equal(got < -1e4, padded)
                error = (got - expected)[~padded].abs().max() / expected[~padded].abs().max()
                assert error < 1e-5, f"{place.name}: {error}"
        if asked["tokens"] is not None:
            inputs, expected = asked["tokens"]
            got = model.generate(**inputs, do_sample=False, max_new_tokens=5)
            assert torch.equal(got, expected), f"{place.name}: {got} is not {expected}"
    compare(model)
    model(**asked["outputs"][0][0])[0].clamp(min=-1e4).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(".mixer." in name and p.grad is not None for name, p in model.named_parameters())
    if asked["again"]:
        model.save_pretrained(place / "again")
        compare(auto.from_pretrained(place / "again", trust_remote_code=True).eval())
    print(place.name, type(model).__name__)
assert not any(name.partition(".")[0] == "cald_speech" for name in sys.modules)
"""
)


def run_alone(folder: Path, code: str = ALONE) -> subprocess.CompletedProcess:
    """Python in another place, without the package."""
    kept = {key: v for key, v in os.environ.items() if key != "PYTHONPATH"}
    settings = {"HF_MODULES_CACHE": str(folder / ".modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder / "folders")]
    return subprocess.run(
        command, cwd=folder, env=kept | settings, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def concrete(base: type) -> list:
    """A factory of every mixer that can be built."""
    classes = [c for c in vars(mixers).values() if isinstance(c, type) and issubclass(c, base)]
    classes = [c for c in classes if c not in (Mixer, CausalMixer)]
    return [partial(c, k=4, max_length=64) if c is Linformer else c for c in classes]


def save(model, place: Path, auto: str, inputs: list[dict], tokens: dict | None = None, again: bool = True) -> None:
    """The model, and what it gives for some inputs, with padding and without; whether it is to be saved ``again``."""
    with torch.no_grad():
        outputs = [(one, model.eval()(**one)[0]) for one in inputs]
    if tokens is not None:
        tokens = (tokens, model.generate(**tokens, do_sample=False, max_new_tokens=5))
    model.save_pretrained(place / "model")
    torch.save({"auto": auto, "outputs": outputs, "tokens": tokens, "again": again}, place / "asked.pt")


def audio() -> list[dict]:
    torch.manual_seed(0)
    samples, mask = torch.randn(2, 6000), torch.ones(2, 6000, dtype=torch.long)
    mask[1, 3500:] = 0
    return [{"input_values": samples}, {"input_values": samples * mask, "attention_mask": mask}]


def text(*, left: bool = False) -> list[dict]:
    tokens, mask = torch.arange(1, 19).view(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, slice(0, 4) if left else slice(5, None)] = 0
    return [{"input_ids": tokens}, {"input_ids": tokens * mask, "attention_mask": mask}]


def save_speech(
    kind: str, place: Path, layer_map: LayerMap, head: str = "ctc", layers: int = 3, again: bool = True
) -> None:
    family = families()[kind]
    torch.manual_seed(0)
    config = tiny_config(family, layers=layers, num_labels=3, classifier_proj_size=8)
    model = family.load(config, model_class=family.class_with(head)).eval()
    convert(model, layer_map)
    auto = family.auto_classes[head].__name__
    save(model, place, auto, audio(), again=again)


def save_text(
    kind: str, place: Path, layer_map: LayerMap, head: str | None = None, layers: int = 3, again: bool = True
) -> None:
    case = Case(families()[kind], {})
    head = head or case.family.default_head
    model = case.model(head, num_hidden_layers=layers, num_labels=3)
    convert(model, layer_map, initialise="random")
    generated = text(left=True)[1] if head == "lm" else None
    save(model, place, case.family.auto_classes[head].__name__, text(), generated, again=again)


@pytest.mark.slow
def test_outputs_without_the_package(tmp_path):
    folders, once = tmp_path / "folders", {"again": False}  # two of them are saved again
    every, causal = concrete(Mixer), concrete(CausalMixer)
    save_speech("wav2vec2", folders / "every mixer", LayerMap(None, dict(enumerate(every))), layers=len(every) + 1)
    save_speech("wavlm", folders / "wavlm", LayerMap(mixers.DEFAULT, {1: None}), **once)
    save_speech("hubert", folders / "hubert labels", LayerMap(mixers.DEFAULT, {0: None}), "classification", **once)
    save_text("llama", folders / "llama", LayerMap(None, dict(enumerate(causal))), layers=len(causal) + 1)
    save_text("gpt_neox", folders / "neox", LayerMap(partial(mixers.Mamba, expand=2.5), {1: None}), **once)
    save_text("bert", folders / "bert labels", LayerMap(mixers.Hydra), "classification", **once)
    save_text("bert", folders / "bert", LayerMap(partial(Linformer, k=4, max_length=64, sharing="layer")), **once)
    done = run_alone(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 7
    written = (folders / "neox" / "model" / f"{NAME}.py").read_text()
    assert "class Mamba(" in written and "class Mamba2(" not in written


@pytest.mark.slow
@pytest.mark.wide
def test_every_family_without_the_package(tmp_path):
    for kind, family in families().items():
        if isinstance(family, TextFamily):
            mixer = Mamba2 if family.causal else mixers.DEFAULT
            save_text(kind, tmp_path / "folders" / kind, LayerMap(mixer, {1: None}))
        elif isinstance(family, SpeechFamily) and family.input_key == "input_values":
            save_speech(kind, tmp_path / "folders" / kind, LayerMap(mixers.DEFAULT, {1: None}))
        else:  # those that hear features: their classes are made
            exec(modeling_file(family, LayerMap(mixers.DEFAULT).to_dict()), {"__name__": "alone"})
    done = run_alone(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


HOSTILE = "from pathlib import Path\nPath({!r}).write_text('run')\nraise SystemExit(3)\n"


def test_the_package_never_runs_a_folders_file(tmp_path):
    family, ran, folder = families()["wav2vec2"], tmp_path / "ran", tmp_path / "model"
    model = tiny_model(family, layers=1)
    convert(model, LayerMap(Mamba2))
    model.save_pretrained(folder)
    (folder / f"{NAME}.py").write_text(HOSTILE.format(str(ran)))
    loaded = from_pretrained(folder)
    for options in ({}, {"trust_remote_code": True}):  # a class that is registered comes first in both
        AutoModelForCTC.from_pretrained(folder, **options)
        AutoConfig.from_pretrained(folder, **options)
    # A model that is none of ours, with a file of its own: its architecture is known, and its file is not needed.
    plain = tiny_model(family, layers=1)
    plain.config.auto_map = {"AutoConfig": "evil.A", "AutoModelForCTC": "evil.B"}
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "evil.py").write_text(HOSTILE.format(str(ran)))
    student = from_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text()) | {"model_type": "evil"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Python of its own"):
        from_pretrained(tmp_path / "plain")
    # What is saved again has our file, whatever the folder said before.
    convert(student, LayerMap(Mamba2))
    for one, place in ((loaded, "again"), (student, "student")):
        one.save_pretrained(tmp_path / place)
        assert "class Mamba2(" in (tmp_path / place / f"{NAME}.py").read_text()
        said = json.loads((tmp_path / place / "config.json").read_text())["auto_map"]
        assert said["AutoModelForCTC"] == f"{NAME}.CaldWav2Vec2ForCTC" and "evil" not in str(said)
    assert not ran.exists()


def test_a_mixer_of_the_users_own(tmp_path, monkeypatch, caplog):
    """Its module goes into the file; one without a source, from a notebook, leaves the file out, and is told."""
    source = "from cald_speech.mixers import Mamba2\n\nclass Doubled{}(Mamba2):\n    def finish(self, y, gate):\n"
    source += "        return 2 * super().finish(y, gate)\n"
    (tmp_path / "own_mixers.py").write_text(source.format(""))
    monkeypatch.syspath_prepend(tmp_path)
    import own_mixers

    written = modeling_file(families()["llama"], LayerMap(own_mixers.Doubled).to_dict())
    assert "class Doubled(Mamba2):" in written and "import own_mixers" not in written
    assert "from own_mixers" not in written
    there = {"__name__": "a_notebook"}
    exec(source.format("InANotebook"), there)
    model = tiny_model(families()["wav2vec2"], layers=1)
    convert(model, LayerMap(there["DoubledInANotebook"]))
    model.save_pretrained(tmp_path / "model")
    assert "a_notebook" in caplog.text and not (tmp_path / "model" / f"{NAME}.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_a_push_without_a_network(tmp_path, monkeypatch):
    model = tiny_model(families()["wav2vec2"], layers=1)
    convert(model, LayerMap(Mamba2))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for push in (
        lambda: model.push_to_hub("nobody/nothing"),
        lambda: model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="nobody/nothing"),
        lambda: model.config.push_to_hub("nobody/nothing"),
    ):
        with pytest.raises(UserError, match="hf upload"):
            push()


def test_names_that_two_modules_have(tmp_path, monkeypatch):
    """The second is renamed where it means the module's, and not where a function has one of its own."""
    (tmp_path / "one_thing.py").write_text("SIZE = 1\ndef f(): return SIZE\ndef unused(): return 1 / 0\n")
    (tmp_path / "another.py").write_text(
        "from one_thing import f as first\nSIZE = 2\ndef f(): return first() + SIZE\n"
        "def g(SIZE=5): return SIZE + f()\nclass C:\n    size = SIZE\n    def lost(self): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ours = ("one_thing", "another")
    bundled = Bundle("from another import C, f, g\nRESULT = (f(), g(), C().size)", ours=ours).text()
    exec(bundled, space := {"__name__": "bundled"})
    assert space["RESULT"] == (3, 8, 2)
    assert "unused" not in bundled and "lost" not in bundled
    with pytest.raises(CannotBundle, match="another"):
        Bundle("import another\nx = another", ours=ours)
