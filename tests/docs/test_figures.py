"""The figures of the first pages are those of the results."""

import re
import runpy

from tests.docs.pages import ROOT

FIGURES = ROOT / "docs/figures"
RESULTS = {page.name: page.read_text() for page in (ROOT / "docs/results").glob("*.md")}
NUMBER = re.compile(r"\d+\.\d+")


def rows_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_plot_shows_what_was_measured(tmp_path):
    draw = runpy.run_path(str(FIGURES / "draw.py"))
    points = draw["read"](FIGURES / "long_audio.csv")
    measured = {float(n) for name in ("long_audio.md", "digits.md") for n in NUMBER.findall(RESULTS[name])}
    drawn = [value for lines in points.values() for line in lines.values() for _, value in line]
    assert len(drawn) == 22 and set(drawn) <= measured
    draw["draw_long_audio"](points, "dark", tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_the_dark_picture_is_the_light_one():
    darken = runpy.run_path(str(FIGURES / "draw.py"))["darken"]
    light, dark = ((FIGURES / f"method-{theme}.svg").read_text() for theme in ("light", "dark"))
    assert darken(light) == dark
    assert not set(re.findall(r"#[0-9a-f]{6}", light)) & set(re.findall(r"#[0-9a-f]{6}", dark))


def test_the_tables_of_the_readme_are_those_of_the_results():
    there = {n for text in RESULTS.values() for n in NUMBER.findall(text)}
    figures = [n for row in rows_of((ROOT / "README.md").read_text()) for n in NUMBER.findall(row)]
    assert len(figures) > 20 and set(figures) <= there


def test_the_headlines_stand_on_their_pages():
    for row in rows_of(RESULTS["index.md"]):
        if (page := re.search(r"\]\((\w+\.md)\)", row)) and (figures := NUMBER.findall(row.split("|", 2)[2])):
            there = set(NUMBER.findall(RESULTS[page[1]]))
            told = [n for n in figures if n in there or any(rounded(t, n) for t in there)]
            assert told == figures, row


def rounded(exact: str, shown: str) -> bool:
    """Whether ``shown`` is ``exact`` with fewer decimals."""
    decimals = len(shown.split(".")[1])
    return decimals < len(exact.split(".")[1]) and abs(float(exact) - float(shown)) <= 0.5 * 10**-decimals + 1e-9
