"""A sweep as a picture."""

from collections.abc import Sequence
from pathlib import Path

from mediator.documents import DocumentError


def draw(path: Path, axis: str, values: Sequence[int | bool], series: dict[str, list[float | None]]) -> None:
    """Write a chart of each series over the values that were swept. Raises DocumentError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DocumentError(["--plot needs matplotlib: pip install 'optee-mediator[plot]'"]) from None
    figure = Figure(figsize=(7, 4 * len(series)), layout="constrained")
    labels = [("y" if value else "n") if isinstance(value, bool) else str(value) for value in values]
    for number, (name, numbers) in enumerate(series.items(), 1):
        axes = figure.add_subplot(len(series), 1, number)
        axes.plot(labels, [float("nan") if value is None else value for value in numbers], marker="o")
        axes.set_xlabel(axis)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DocumentError([f"{path}: {error}"]) from None
