"""The figures of the README and the start page, each light and dark:

    python docs/figures/draw.py

long_audio-*.svg from the measured figures in long_audio.csv; method-dark.svg from method-light.svg, which is drawn by
hand, by changing its colours.
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SYSTEMS = ("teacher: one pass", "teacher: pieces stitched", "student: one pass")
COLOURS = {
    "light": {"ink": "#1f2328", "quiet": "#59636e", "grid": "#d1d9e0", "systems": ("#59636e", "#d9570f", "#0b6e8a")},
    "dark": {"ink": "#e6edf3", "quiet": "#9198a1", "grid": "#3d444d", "systems": ("#9198a1", "#f0883e", "#39b5d6")},
}
TICKS = {10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 86400: "24 h"}
# The picture's colours: light -> dark.
PICTURE = {
    "#1f2328": "#e6edf3",
    "#59636e": "#9198a1",
    "#b3400b": "#ffa657",
    "#f6f8fa": "#151b23",
    "#d1d9e0": "#3d444d",
    "#ffffff": "#0d1117",
    "#c4ccd4": "#4a525c",
    "#cfd8e3": "#333c48",
    "#8795a6": "#6b7886",
    "#0b6e8a": "#39b5d6",
    "#ffefe4": "#2b1a0e",
    "#d9570f": "#f0883e",
}


def read(path: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Measure -> system -> (seconds of audio, value) points, in the file's order."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    points = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(lines):
        points[row["measure"]][row["system"]].append((float(row["audio_s"]), float(row["value"])))
    return points


def draw_long_audio(points: dict, theme: str, path: Path) -> None:
    """Time and WER against the length of audio, side by side."""
    colours = COLOURS[theme]
    plt.rcParams.update({"svg.hashsalt": "cald_speech", "svg.fonttype": "path", "font.size": 10.5})
    plt.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor"), colours["ink"]))
    figure, (time, wer) = plt.subplots(1, 2, figsize=(9.2, 3.7), layout="constrained")
    for axes, measure in ((time, "seconds"), (wer, "wer")):
        for system, colour in zip(SYSTEMS, colours["systems"], strict=True):
            line = zip(*points[measure][system], strict=True)
            axes.plot(*line, "o-", label=system, color=colour, linewidth=2.2, markersize=5.5)
        axes.set_xscale("log")
        longest = max(x for line in points[measure].values() for x, _ in line)
        axes.set_xticks([t for t in TICKS if t <= longest], [TICKS[t] for t in TICKS if t <= longest])
        axes.minorticks_off()
        axes.grid(color=colours["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=colours["quiet"], length=0)
        axes.set_xlabel("length of the audio", color=colours["quiet"])
        for side in axes.spines.values():
            side.set_visible(False)
    time.set_yscale("log")
    time.set_yticks([1, 10, 100], ["1", "10", "100"])
    time.minorticks_off()
    time.set_title("Seconds to read it\nwav2vec2-base size, random weights, two CPU cores", **_title(colours))
    wer.set_ylim(0, 27)
    wer.set_title("Words read wrong, %\nspoken digits, models of 1 M parameters", **_title(colours))
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def _title(colours: dict) -> dict:
    return {"loc": "left", "fontsize": 10.5, "color": colours["ink"]}


def darken(svg: str) -> str:
    """The picture in the colours of a dark page; every colour is looked up in the light drawing alone."""
    for number, light in enumerate(PICTURE):
        svg = svg.replace(light, f"#{{{number}}}")
    for number, dark in enumerate(PICTURE.values()):
        svg = svg.replace(f"#{{{number}}}", dark)
    return svg


def main() -> None:
    points = read(HERE / "long_audio.csv")
    for theme in COLOURS:
        draw_long_audio(points, theme, HERE / f"long_audio-{theme}.svg")
    (HERE / "method-dark.svg").write_text(darken((HERE / "method-light.svg").read_text()))


if __name__ == "__main__":
    main()
