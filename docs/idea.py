"""Draw docs/images/idea.png, with distances and scales that are made up: `python docs/idea.py`."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

BLUE, GREY = "tab:blue", "0.45"
LAYERS = (6, 10, 8)


def draw_layers(axes: plt.Axes, scales: list[np.ndarray], threshold: float, what: str) -> None:
    """Channels as boxes, the darker the larger their scale; ``what`` is dense, pruned or shrunk."""
    for x, layer in enumerate(scales):
        shown = layer[layer >= threshold] if what == "shrunk" else layer
        for y, scale in enumerate(shown):
            goes = what == "pruned" and scale < threshold
            box = Rectangle(
                (1.6 * x, y - len(shown) / 2),
                1.0,
                0.8,
                facecolor="none" if goes else BLUE,
                alpha=1 if goes else 0.15 + 0.85 * scale,
                edgecolor="0.7" if goes else "none",
                linestyle="--",
            )
            axes.add_patch(box)
    axes.set(xlim=(-0.5, 4.7), ylim=(-5.6, 5.6), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def main() -> None:
    """Four panels, from dense training to training on."""
    rng = np.random.default_rng(3)
    scales = [rng.uniform(0, 1, n) for n in LAYERS]
    threshold = float(np.median(np.concatenate(scales)))
    figure, panels = plt.subplots(
        1, 4, figsize=(11, 2.7), width_ratios=[1, 1.5, 1, 1], layout="constrained"
    )
    titles = (
        "1  train, rank channels",
        "2  wait until the masks agree",
        "3  prune: the lowest half is zero",
        "4  shrink, and train on faster",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
    draw_layers(panels[0], scales, threshold, "dense")
    draw_layers(panels[2], scales, threshold, "pruned")
    draw_layers(panels[3], scales, threshold, "shrunk")

    axes = panels[1]
    epochs = np.arange(5, 11)
    largest = np.array([0.46, 0.34, 0.26, 0.19, 0.13, 0.08])
    mean = 0.62 * largest
    axes.plot(epochs, largest, ".-", color=BLUE, label="largest distance in the window")
    axes.plot(epochs, mean, ".--", color=BLUE, label="mean distance")
    axes.plot(epochs[-1], largest[-1], "*", color=BLUE, markersize=14)
    axes.plot(epochs[3], mean[3], "o", color=BLUE, markersize=7)
    axes.annotate(
        "WORM truncates the gradients\nof what is about to go",
        (epochs[3], mean[3]),
        xytext=(4.9, 0.02),
        fontsize=8,
        color=GREY,
        arrowprops={"arrowstyle": "->", "color": GREY},
    )
    axes.annotate("ticket", (10, 0.08), xytext=(9.72, 0.18), fontsize=9)
    axes.axhline(0.1, color=GREY, linewidth=1)
    axes.axhline(0.15, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="epoch", ylim=(0, 0.5), xlim=(4.7, 10.6), yticks=[0, 0.1, 0.15, 0.5])
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / "images" / "idea.png", dpi=130)


if __name__ == "__main__":
    main()
