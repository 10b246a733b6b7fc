"""What an experiment's yaml may name and how large it may be: all else is refused before anything of it runs."""

import time

import pytest
from ruamel.yaml import YAML

from cald_speech.errors import UserError
from cald_speech.experiment_yaml import OWN_MODULES, build, check
from cald_speech.shipped import hparams_folder
from cald_speech.training.settings import Settings

ALLOWED = {
    "a mixer": "a: !name:cald_speech.mixers.Mamba2 {d_state: 4}",
    "a config of transformers": "a: !new:transformers.BertConfig {hidden_size: 8}",
    "a module of torch": "a: !new:torch.nn.Linear [2, 3]",
    "a function of ours": "a: !apply:cald_speech.training.choices.choose [{b: 3}, b]",
    "references": "a: 3\nb: !ref <a> + 1\nc: !ref <a>/<b>\nd: !copy <a>",
    "a tuple": "a: (1, 2)",
    "an alias": "a: &x [1, 2]\nb: *x",
}
CODE = {
    "a module of Python": "!apply:os.system [touch {mark}]",
    "a builtin": "!apply:exec [\"open('{mark}', 'w')\"]",
    "a module that ours imports": "!apply:cald_speech.files.os.system [touch {mark}]",
    "another class": "!new:subprocess.Popen [[touch, {mark}]]",
    "a name with arguments": "!name:os.system [touch {mark}]",
    "Python's own tag": "!!python/object/apply:os.system [touch {mark}]",
    "Python's own tag in full": "!<tag:yaml.org,2002:python/object/apply:os.system> [touch {mark}]",
    "a function of torch": "!apply:torch.load [{mark}]",
    "a model of transformers": "!new:transformers.AutoModel []",
    "a function over references": "!applyref:os.system [touch {mark}]",
    "a module": "!module:os []",
    "another file": "!include:/etc/passwd",
    "no tag of anybody's": "!run x",
}
BOMBS = {
    "aliases": "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40))]),
    "an alias of what it stands in": "a: &a [1, *a]",
    "depth": "a: " + "[" * 5000 + "]" * 5000,
    "depth without an end": "a: " + "{a: " * 100_000,
    "size": "a: " + "x" * 2_000_000,
    "references": "\n".join(["a0: x", *(f"a{i}: !ref <a{i - 1}><a{i - 1}>" for i in range(1, 40))]),
    "references in a circle": "a: !ref <b>x\nb: !ref <a>x",
    "a reference to itself": "a: !ref <a><a>",
    "a power": "a: 9\nb: !ref <a> ** 99999999",
    "no yaml": "a: [1",
    "a tab": "a:\n\t- b",
}


@pytest.mark.parametrize("text", ALLOWED.values(), ids=ALLOWED)
def test_allowed(text):
    check(text, "mine.yaml")
    assert build(text)


@pytest.mark.parametrize("text", CODE.values(), ids=CODE)
def test_code_is_refused_before_it_runs(text, tmp_path):
    mark, experiment = tmp_path / "ran", tmp_path / "a.yaml"
    experiment.write_text(f"output_folder: x\nguidance: {text.format(mark=mark)}\n")
    with pytest.raises(UserError, match=r"a\.yaml, line 2: the tag .* is not one that an experiment may have"):
        Settings.load(experiment)
    experiment.write_text("output_folder: x\n")
    with pytest.raises(UserError, match=r"the command line, line 1: the tag"):
        Settings.load(experiment, f"data_folder: {text.format(mark=mark)}")
    assert not mark.exists()


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_what_grows_or_does_not_end_is_refused_at_once(text, tmp_path):
    (tmp_path / "a.yaml").write_text(f"output_folder: x\ncorpus:\n  {text.replace(chr(10), chr(10) + '  ')}\n")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"a\.yaml"):
        Settings.load(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        check(text, "mine.yaml")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "text", ["%TAG !! !new:subprocess.\n---\na: !!Popen [[ls]]", "a: !ref <b.__class__>\nb: x"], ids=["tags", "insides"]
)
def test_ways_round_the_list_of_tags_are_closed(text):
    with pytest.raises(UserError, match=r"mine\.yaml: expected (an experiment without directives|references to keys)"):
        check(text, "mine.yaml")


def test_an_unknown_key_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "a.yaml").write_text("output_folder: x\nlayer_mop: !new:cald_speech.conversion.LayerMap {no: 1}\n")
    with pytest.raises(UserError, match="unknown key 'layer_mop'; did you mean 'layer_map'"):
        Settings.load(tmp_path / "a.yaml")


def test_an_experiment_based_on_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("output_folder: x\nbase: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    with pytest.raises(UserError, match=r"a\.yaml: base: expected another experiment"):
        Settings.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("base: [a.yaml]\n")
    with pytest.raises(UserError, match=r"b\.yaml: base: expected the name"):
        Settings.load(tmp_path / "a.yaml")


def test_a_module_of_ones_own_is_let_in_by_the_environment(monkeypatch):
    text = "a: !name:fractions.Fraction {}"
    with pytest.raises(UserError, match=rf"{OWN_MODULES}=its_name"):
        check(text, "mine.yaml")
    monkeypatch.setenv(OWN_MODULES, "others, fractions")
    check(text, "mine.yaml")


@pytest.mark.parametrize("file", sorted(hparams_folder().rglob("*.yaml")), ids=lambda path: path.stem)
def test_what_ships_is_allowed(file):
    check(file.read_text(), str(file))
    assert YAML().load(file.read_text())
