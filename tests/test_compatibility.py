"""docs/compatibility.md says what its script finds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

FIGURE = re.compile(r"works, (equal|[0-9.e+-]+)")
EQUAL = 1e-6  # figures below are the rounding of float32


def read(page: Path) -> tuple[str, list[float]]:
    """The page's words, whatever the versions, and its figures."""
    text = re.sub(r"with torch .*", "", page.read_text())
    figures = [EQUAL if found == "equal" else max(float(found), EQUAL) for found in FIGURE.findall(text)]
    return FIGURE.sub("works", text), figures


@pytest.mark.slow
@pytest.mark.wide  # some minutes: twelve uses of eight models, and two more processes
def test_the_page_is_what_is_found(tmp_path):
    for name in ("peft", "onnxruntime", "onnxscript", "accelerate"):
        pytest.importorskip(name, reason=f"the page was written with {name}")
    made = tmp_path / "page.md"
    command = [sys.executable, "-W", "ignore", "-m", "tests.compatibility", "--page", made]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (words, figures), (said, published) = read(made), read(ROOT / "docs" / "compatibility.md")
    assert words == said
    for one, other in zip(figures, published, strict=True):
        assert max(one, other) <= 10 * min(one, other)
