"""Draw every result as SVG, beside it.

python benchmarks/draw.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from drawings import DRAWINGS
from machine import RESULTS
from svg import draw


def drawn(path: Path) -> str:
    """Return the picture of a result."""
    result = json.loads(path.read_text())
    machine = result.get("machine", result)
    facts = [f"{machine['cores']} cores, {machine['processor']}"] if "cores" in machine else []
    facts += [f"{name} {machine[name]}" for name in ("torch", "transformers", "lightning")]
    if result.get("quick"):
        facts.insert(0, "NOT A MEASUREMENT, of a tiny model")
    return draw(DRAWINGS[path.stem](result), "; ".join(facts))


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
    for picture in draw_all(parser.parse_args().results):
        print(picture)
