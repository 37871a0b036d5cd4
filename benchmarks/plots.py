"""Plots of docs/BENCHMARKS.md as small SVG files. matplotlib (the extra ``bench``) is imported only where something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.step_parts import MESSAGES, PARTS
from benchmarks.work import BASE, MIXED_METHOD, MIXED_RANK, SINGLE, W1

_VARIANTS = (BASE, "1", "8", "32", MIXED_RANK, MIXED_METHOD, SINGLE)


def draw(name: str, found: Any, directory: Path) -> None:
    """Write ``directory/NAME.svg``: the same bytes for the same results. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "medley", "font.size": 9, "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    PLOTS[name](axes, found)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def paces(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """W1's tokens per second: a group of bars for each variant, a colour for each engine."""
    here = {(row["engine"], row["variant"]): row["tokens_per_s"] for row in rows if row["workload"] == W1.name}
    engines = list(dict.fromkeys(engine for engine, _ in here))
    variants = [variant for variant in _VARIANTS if any(key[1] == variant for key in here)]
    width = 0.8 / max(1, len(engines))
    for number, engine in enumerate(engines):
        places = [index for index, variant in enumerate(variants) if (engine, variant) in here]
        heights = [here[engine, variants[index]] for index in places]
        axes.bar([index + number * width for index in places], heights, width, label=engine)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(variants))], variants)
    axes.set_ylabel("tokens/s")


def steps(axes: Any, found: Mapping[str, Any]) -> None:
    """A stack of parts for each case."""
    rows = found["steps"]
    labels = [f"{row['rows']} {row['variant']}" for row in rows]
    bottom = [0.0] * len(rows)
    for part in (*PARTS, MESSAGES):
        heights = [max(0.0, row["parts_ms"].get(part, 0.0)) for row in rows]
        axes.bar(labels, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("ms a step")


PLOTS: dict[str, Callable[[Any, Any], None]] = {"throughput": paces, "peers": paces, "steps": steps}
