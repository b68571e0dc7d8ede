"""P99 startup latency over the request rate, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stoker_core.errors import SetupFailed

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

    from stoker_sim.cluster.paper import Row

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 50
INK, GRID = "#222222", "#dddddd"
COLOURS = {
    "random": "#999999",
    "cache": "#cc9900",
    "shepherd": "#aa4499",
    "serverlessllm": "#3366cc",
    "stoker": "#dd3311",
}
TICKS = 5


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """One PNG for each model and dataset; returns their paths. Raises SetupFailed without Pillow, which vLLM brings."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise SetupFailed("plots need Pillow: pip install pillow") from error
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for model, dataset in dict.fromkeys((row.model, row.dataset) for row in rows):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if (row.model, row.dataset) == (model, dataset):
                lines.setdefault(row.policy, []).append((row.rate_per_s, row.measured.startup_p99_s))
        image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        _chart(ImageDraw.Draw(image), f"{model}, {dataset}: P99 startup latency", lines)
        path = directory / f"sim-paper-{model}-{dataset}.png"
        image.save(path)
        written.append(path)
    return written


def _chart(pen: ImageDraw, title: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    points = [point for line in lines.values() for point in line]
    x_max = max(x for x, _ in points) * 1.05
    y_max = max(max(y for _, y in points) * 1.05, 1e-3)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / x_max * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / y_max * (HEIGHT - TOP - BOTTOM),
        )

    pen.text((LEFT, 14), title, fill=INK)
    for tick in range(TICKS + 1):
        y = y_max * tick / TICKS
        pen.line([place(0, y), place(x_max, y)], fill=GRID)
        pen.text((8, place(0, y)[1] - 6), f"{y:.4g} s", fill=INK)
    for x in sorted({x for x, _ in points}):
        pen.text((place(x, 0)[0] - 8, HEIGHT - BOTTOM + 8), f"{x:g}", fill=INK)
    pen.text((LEFT, HEIGHT - 22), "requests per second", fill=INK)
    pen.line([place(0, y_max), place(0, 0), place(x_max, 0)], fill=INK)
    for number, (policy, line) in enumerate(lines.items()):
        colour = COLOURS.get(policy, INK)
        placed = [place(x, y) for x, y in sorted(line)]
        pen.line(placed, fill=colour, width=2)
        for x, y in placed:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        pen.text((WIDTH - RIGHT + 14, TOP + 18 * number), policy, fill=colour)
