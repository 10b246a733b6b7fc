"""Attention comes back where it is missed, layer by layer, until the student is the teacher but for what it learnt."""

import json

import pytest
import torch
import yaml
from click.testing import CliRunner

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.commands import main
from cald_speech.errors import UserError
from cald_speech.evaluation.restoring import restore_layers, restored
from cald_speech.families import family_of
from cald_speech.mixers import Bidirectional, Hydra
from tests.evaluation.layerwise import rewrite, write_recordings, write_teacher
from tests.evaluation.test_layer_importance import NEEDED, convert_all_but, only_one_layer_attends
from tests.helpers import SPEECH, tiny_model, wide_unless_usual


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("restoring")
    teacher = rewrite(write_teacher(place / "plain"), place / "teacher", only_one_layer_attends)
    rewrite(teacher, place / "student", convert_all_but())
    write_recordings(place, teacher)
    return place


def restore(place, student="student", **options):
    return restore_layers(
        str(place / "teacher"), place / "manifest.json", str(place / student), progress=False, **options
    )


def test_the_layer_that_needs_attention_comes_first_and_all_of_them_are_the_teacher(place):
    found = restore(place, keep_best=3)
    none, one, *_, everything = found["steps"]
    assert found["restored"][0] == NEEDED and one["restored"] == [NEEDED] and len(found["restored"]) == 3
    assert none["kl"] > 1e-3 > 1e-6 > one["kl"] and none["wer"] > one["wer"] == found["teacher_wer"] == 0
    assert everything["kl"] < 1e-6 and found["keep"] == [0, 1, 2]
    assert max(found["gains"], key=found["gains"].get) == NEEDED


@pytest.mark.parametrize("name", [pytest.param(name, marks=wide_unless_usual(name)) for name in SPEECH])
def test_a_restored_layer_has_the_teachers_attention_and_the_rest_is_the_students(name):
    teacher = tiny_model(SPEECH[name])
    student = tiny_model(SPEECH[name])
    convert(student, LayerMap(Hydra, {2: None}), initialise="random")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    before = {key: value.clone() for model in (teacher, student) for key, value in model.state_dict().items()}
    model = restored(student, teacher, [0])
    kept = [family_of(model).mixer(layer) for layer in family_of(model).layers(model)]
    assert [type(mixer).__name__ for mixer in kept] == ["NoneType", "Hydra", "NoneType"]
    own, theirs, state = student.state_dict(), teacher.state_dict(), model.state_dict()
    assert all(torch.equal(value, own[key] if key in own else theirs[key]) for key, value in state.items())
    assert any(key not in own for key in state)
    after = {key: value for model in (teacher, student) for key, value in model.state_dict().items()}
    assert all(torch.equal(before[key], value) for key, value in after.items())


@pytest.mark.slow
def test_the_command_writes_the_map_and_the_model(place, tmp_path):
    words = [str(place / "teacher"), str(place / "manifest.json"), "--student", str(place / "student")]
    words += ["--keep_best", "1", "--save_to", str(tmp_path / "hybrid"), "--output_folder", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["layers", *words])
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["restoring"]["keep"] == [NEEDED] and "keep_best.yaml keeps them" in done.output
    assert yaml.safe_load((tmp_path / "out/keep_best.yaml").read_text()) == {"layer_map": {"overrides": {NEEDED: None}}}
    hybrid = from_pretrained(str(tmp_path / "hybrid"))
    kinds = [type(family_of(hybrid).mixer(layer)) for layer in family_of(hybrid).layers(hybrid)]
    assert kinds == [Bidirectional, type(None), Bidirectional]


def test_what_it_refuses(place, tmp_path):
    with pytest.raises(UserError, match="--keep_best: expected from 1 to 3, the layers that are converted, got 4"):
        restore(place, keep_best=4)
    with pytest.raises(UserError, match="expected a converted model, got one with attention in every layer"):
        restore(place, student="teacher", keep_best=1)
    words = [str(place / "teacher"), str(place / "manifest.json"), "--keep_best", "1"]
    done = CliRunner().invoke(main, ["layers", *words, "--output_folder", str(tmp_path)])
    assert done.exit_code == 2 and "expected --student, got none" in done.output
