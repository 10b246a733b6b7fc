"""The shipped folders are found in a checkout and in an installed package; a file that is there comes first."""

import pytest

from cald_speech import shipped
from cald_speech.errors import UserError


@pytest.fixture(params=["checkout", "installed"])
def place(request, tmp_path, monkeypatch):
    """A package in a checkout, or installed with the same folders inside it; the folder that these are in."""
    package = tmp_path / "somewhere" / "cald_speech"
    package.mkdir(parents=True)
    if request.param == "checkout":
        (package.parent / "pyproject.toml").touch()
    folder = package.parent if request.param == "checkout" else package
    (folder / "hparams").mkdir()
    (folder / "hparams" / "mamba.yaml").touch()
    monkeypatch.setattr(shipped, "PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    return folder


def test_folders(place):
    assert shipped.hparams_folder() == place / "hparams"
    assert shipped.recipes_folder() == place / "recipes"


def test_the_users_own_file_comes_first(place, tmp_path):
    assert shipped.experiment_file("hparams/mamba.yaml") == place / "hparams" / "mamba.yaml"
    (tmp_path / "hparams").mkdir()
    (tmp_path / "hparams" / "mamba.yaml").touch()
    assert shipped.experiment_file("hparams/mamba.yaml").resolve() == tmp_path / "hparams" / "mamba.yaml"


def test_a_model_that_ships(place, tmp_path):
    """The demo's teacher, wherever a command is started; a folder of one's own comes first, and so do other names."""
    (place / "recipes" / "demo" / "teacher").mkdir(parents=True)
    assert shipped.model_folder("recipes/demo/teacher") == str(place / "recipes" / "demo" / "teacher")
    assert [shipped.model_folder(name) for name in ("recipes/none", "demo/teacher")] == ["recipes/none", "demo/teacher"]
    (tmp_path / "recipes" / "demo" / "teacher").mkdir(parents=True)
    assert shipped.model_folder("recipes/demo/teacher") == "recipes/demo/teacher"


@pytest.mark.parametrize("name", ["hparams/nothing.yaml", "mamba.yaml", "/hparams/mamba.yaml"])
def test_what_is_nowhere_is_named_with_one_that_ships(place, name):
    with pytest.raises(UserError, match=rf"^no experiment file {name}: .*such as hparams/mamba.yaml"):
        shipped.experiment_file(name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("demo", "demo/students"),
        ("align", "align/encoder"),
        ("digits_teacher_start", "digits/teacher_start"),
        ("speakers", "digits/speakers"),
        ("coffee", "coffee_orders/student"),
        ("slurp_joint", "slurp/joint"),
        ("stdlib_masked_teacher", "pile/stdlib_masked_teacher"),
    ],
)
def test_a_former_name_is_answered_with_the_new_one(old, new):
    with pytest.raises(UserError, match=rf"no experiment file hparams/{old}.yaml: .*\bhparams/{new}.yaml"):
        shipped.experiment_file(f"hparams/{old}.yaml")
