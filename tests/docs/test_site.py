"""The site builds without a warning (`make docs` does the same), and its docstrings are read as they are meant."""

import os
import runpy
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the docs extra: pip install -e '.[docs]', or `make docs`")
    pytest.importorskip("mkdocstrings", reason="needs the docs extra: pip install -e '.[docs]', or `make docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert "linear" in (tmp_path / "site/index.html").read_text()


def test_a_docstring_in_markdown():
    pytest.importorskip("griffe", reason="needs the docs extra: pip install -e '.[docs]', or `make docs`")
    markdown = runpy.run_path(str(ROOT / "docs/dialect.py"))["markdown"]
    text = (
        "Adds :class:`A` up.\n\nArguments\n---------\nx, y : a number,\n    or two.\n\nIt is quick.\n\nRaises\n------\n"
    )
    text += "ValueError\n    for none.\n\nExample\n-------\n>>> 1 + 1\n2\n"
    assert markdown(text) == (
        "Adds `A` up.\n\n**Arguments**\n\n- **`x`**, **`y`**: a number, or two.\n\nIt is quick.\n\n"
        "**Raises**\n\n- **`ValueError`**: for none.\n\n**Example**\n\n```pycon\n>>> 1 + 1\n2\n```"
    )
