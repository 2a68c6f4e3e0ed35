"""Curves of runs and a test's confusions as PNG, by matplotlib, which no other file needs."""

import json
import math
import os

import numpy as np

from lib.checkpoint import read_rows

# of log.jsonl: what is drawn together; the dashed ones are what a model scores that knows nothing
LOSSES, BASELINES = ("loss", "rec", "con", "val_loss"), ("zeros", "visible_mean", "chance",
                                                         "uniform", "class_shares")
SCORES = "val_top1", "val_top5", "val_per_class", "map"


def pyplot():
    """matplotlib.pyplot without a screen; ValueError says what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs `pip install matplotlib`") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    return plt


def curves(folders: list[str], path: str) -> list[str]:
    """Losses, accuracies and the share of waiting of the runs in these folders -> a PNG.

    Returns a line per run: its last value of each curve. ValueError names a log that is none.
    """
    logs = {}
    for name in folders:
        log = os.path.join(name, "log.jsonl")
        logs[name] = [json.loads(row) for row in read_rows(log, math.inf)]
        if not logs[name]:
            raise ValueError(f"{log}: no such file, or an empty one; expected a run's out_dir")
    panels = [("loss", LOSSES + BASELINES, 1), ("accuracy or mAP, %", SCORES, 1),
              ("waiting for data, % of the time", ("waiting",), 100)]
    shown = {key for rows in logs.values() for row in rows for key in row}
    panels = [panel for panel in panels if shown & {*panel[1]}]
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    colors, last = {}, {name: [] for name in logs}
    for ax, (title, keys, factor) in zip(axes[0], panels):
        for name, rows in logs.items():
            for key in keys:
                points = [(row["step"], factor * row[key]) for row in rows
                          if row.get(key) is not None]
                if not points:
                    continue
                label = f"{name} {key}" if len(logs) > 1 else key
                color = colors.setdefault((name, key), f"C{len(colors) % 10}")
                ax.plot(*zip(*points), color=color, label=label, linewidth=1,
                        linestyle="--" if key in BASELINES else "-",
                        marker="o" if len(points) < 20 else None, markersize=3)
                unit = " %" if factor == 100 else ""
                last[name].append(f"{key} {points[-1][1]:.4g}{unit}")
        ax.set(title=title, xlabel="optimiser step")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return [f"{name}: step {logs[name][-1]['step']}, {', '.join(some)}"
            for name, some in last.items()]


def confusions(true: np.ndarray, guesses: np.ndarray, classes: list[str], path: str):
    """Class numbers (V,) of videos, true and predicted -> a PNG: shares of each true class.

    Rows and columns are in the order of `classes`; those that occur nowhere are left out.
    """
    occur = np.unique([true, guesses])
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, (true, guesses), 1)
    table = table[np.ix_(occur, occur)]
    share = table / table.sum(1, keepdims=True).clip(1)
    plt, n = pyplot(), len(occur)
    side = min(4 + 0.3 * n, 40)
    figure, ax = plt.subplots(figsize=(side + 1, side))
    picture = ax.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, shrink=0.8, label="% of the true class")
    ax.set(xlabel="predicted", ylabel="true")
    if n <= 100:  # names of more could not be read
        names = [classes[i] for i in occur]
        size = 8 if n <= 60 else 5
        ax.set_xticks(range(n), names, rotation=90, fontsize=size)
        ax.set_yticks(range(n), names, fontsize=size)
    for i, j in zip(*np.nonzero(table)) if n <= 30 else ():  # videos
        ax.text(j, i, int(table[i, j]), ha="center", va="center", fontsize=8,
                color="white" if share[i, j] > 0.5 else "black")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
