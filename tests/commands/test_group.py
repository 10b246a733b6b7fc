"""The group itself: its table, its help, how it ends, and the options that commands share."""

import errno
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cald_speech.commands import JOBS, main, options
from cald_speech.commands.command import Command
from cald_speech.errors import UserError

NAMES = [name for jobs in JOBS.values() for name in jobs]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_there_under_its_name_and_has_help(call, name):
    command = main.get_command(None, name)
    assert command.name == name and isinstance(command, click.Command)
    help_text = call(name, "--help").output
    assert help_text.startswith(f"Usage: main {name} ") and len(help_text.splitlines()) > 5


def test_every_model_that_a_command_takes_may_be_a_shipped_one():
    found = {}
    for name in NAMES:
        for param in getattr(main.get_command(None, name), "params", ()):
            if param.name in ("model", "models", "teacher", "student"):
                found[f"{name} {param.name}"] = type(param.type)
    assert len(found) >= 14 and set(found.values()) == {options.ModelSource}


def test_the_help_of_the_group_names_every_command_with_its_line(call):
    shown = " ".join(call("--help").output.split())
    for jobs in JOBS.values():
        for name, job in jobs.items():
            assert f" {name} {job.summary} " in f"{shown} "


def test_a_tilde_that_no_shell_has_seen(monkeypatch):
    """Behind = it is left as it is, and would be the name of a folder."""
    monkeypatch.setenv("HOME", "/home/anna")
    seen = []
    option, argument = click.Option(["--to"], type=Path), click.Argument(["files"], type=Path, nargs=-1)
    command = Command("x", params=[option, argument], callback=lambda to, files: seen.extend([to, *files]))
    command(["--to=~/results", "~/a.wav", "~b"], standalone_mode=False)
    assert seen == [Path("/home/anna/results"), Path("/home/anna/a.wav"), Path("~b")]


def test_an_unknown_command_is_refused(call):
    assert "No such command 'trian'" in call("trian", status=2).stderr


def test_the_help_of_the_group_loads_no_library(repository):
    code = "import sys; from cald_speech.commands import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(repr({'torch', 'transformers', 'numpy'} & sys.modules.keys() or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository)
    assert "transcribe" in done.stdout and done.stderr.strip() == "''"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("expected a folder"), 2, "error: expected a folder\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(errno.EPIPE, "nobody reads"), 1, ""),  # `cald-speech ... | head`
    ],
    ids=["what a user can mend", "Ctrl-C", "a reader that goes away"],
)
def test_how_a_command_ends(error, status, told):
    @options.command()
    def broken():
        raise error

    done = CliRunner().invoke(broken, [])
    assert (done.exit_code, done.stderr) == (status, told)


def test_a_fault_of_the_program_keeps_its_traceback():
    @options.command()
    def broken():
        raise ZeroDivisionError

    assert isinstance(CliRunner().invoke(broken, []).exception, ZeroDivisionError)


@pytest.mark.parametrize("status", [0, 1, None])
def test_a_number_that_a_command_returns_is_its_status(status):
    @options.command()
    def done():
        return status

    assert CliRunner().invoke(done, []).exit_code == (status or 0)


def test_where_a_models_evaluation_goes_by_default():
    @options.command()
    @click.argument("folder")
    @options.evaluation_folder()
    @options.dtype()
    def show(folder, output_folder, dtype):
        click.echo(f"{output_folder} {dtype}")

    assert (
        CliRunner().invoke(show, ["results/a/model"]).output == "results/evaluation/results--a--model torch.float32\n"
    )
    assert (
        CliRunner().invoke(show, ["m", "--dtype", "float16"]).output == "results/evaluation/m--float16 torch.float16\n"
    )
    given = ["--output_folder", "o", "m", "--dtype", "bfloat16"]
    assert CliRunner().invoke(show, given).output == "o torch.bfloat16\n"
    assert "'int8' is not one of" in CliRunner().invoke(show, ["m", "--dtype", "int8"]).stderr


def test_values_with_commas():
    @options.command()
    @click.option("--joins", type=options.Listed(click.INT), default="1,2")
    def show(joins):
        click.echo(joins)

    assert CliRunner().invoke(show, []).output == "(1, 2)\n"
    assert CliRunner().invoke(show, ["--joins", "4, 8"]).output == "(4, 8)\n"
    refused = CliRunner().invoke(show, ["--joins", "1,two"])
    assert refused.exit_code == 2 and "'two' is not a valid integer" in refused.stderr


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (options.check_writable, lambda folder: options.write_found(folder, "found", {})):
        with pytest.raises(UserError, match="expected a folder to write to, but it cannot be written"):
            write(tmp_path / "file")


MOVED = {
    "cald_speech.longform.__main__": "transcribe",
    "cald_speech.evaluation.by_length": "by-length",
    "cald_speech.evaluation.drift": "drift",
    "cald_speech.evaluation.labels": "labels",
    "cald_speech.evaluation.language": "perplexity",
    "cald_speech.evaluation.layer_importance": "layers",
    "cald_speech.evaluation.lookahead": "lookahead",
    "cald_speech.evaluation.word_times": "word-times",
}


@pytest.mark.parametrize(("module", "command"), MOVED.items())
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_module_that_became_a_command_says_its_name(capsys, module, command):
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().err == f"error: this is now `cald-speech {command}`\n"
    assert command.split()[0] in NAMES
