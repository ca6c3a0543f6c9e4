"""Draw every result as SVG, beside it; with --png as PNG too, to be looked at.

python benchmarks/draw.py [--results FOLDER] [--png FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from bars import figure_of, svg_of
from drawings import DRAWINGS
from machine import RESULTS


def figure(path: Path) -> Figure:
    """Return the picture of a result."""
    result = json.loads(path.read_text())
    machine = result.get("machine", result)
    facts = [f"{machine['cores']} cores, {machine['processor']}"] if "cores" in machine else []
    facts += [f"{name} {machine[name]}" for name in ("torch", "transformers", "lightning")]
    if result.get("quick"):
        facts.insert(0, "NOT A MEASUREMENT, of a tiny model")
    return figure_of(DRAWINGS[path.stem](result), "; ".join(facts))


def drawn(path: Path) -> str:
    """Return the picture of a result as SVG."""
    return svg_of(figure(path))


def draw_all(folder: Path) -> list[Path]:
    """Draw the results in a folder; return the pictures."""
    pictures = []
    for path in sorted(folder.glob("*.json")):
        picture = path.with_suffix(".svg")
        picture.write_text(drawn(path))
        pictures.append(picture)
    return pictures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    for picture in draw_all(arguments.results):
        print(picture)
        if arguments.png is not None:
            arguments.png.mkdir(parents=True, exist_ok=True)
            png = arguments.png / picture.with_suffix(".png").name
            figure(picture.with_suffix(".json")).savefig(png, dpi=110)
