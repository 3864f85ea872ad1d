"""What the examples print and draw of searches that ran side by side."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from torch_worm_optim import MaskSample, Phase, ShrinkReport

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

COLORS = ("tab:orange", "tab:blue", "tab:green")


@dataclass
class Run:
    """What the training of one seed by one method came to."""

    method: str
    seed: int
    scores: dict[str, float]  # accuracy in % or perplexity, by when it was measured
    steps_per_epoch: int
    found: bool | None = None  # None where nothing is searched
    search_epochs: float = 0
    search_seconds: float = 0
    history: list[MaskSample] = field(default_factory=list)
    ticket: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # of every training step, retraining included
    sizes: dict[str, tuple[float, ...]] = field(default_factory=dict)  # before and after shrinking
    report: ShrinkReport | None = None


def add_search_arguments(
    parser: argparse.ArgumentParser,
    *,
    window: int,
    stopping_point: float | None,
    margin: float | None,
    scope: str | None = "global",
) -> None:
    """The arguments of WormOptimizer, with these defaults; None where the data decides."""
    add = parser.add_argument
    add("--prune-ratio", type=float, default=0.5, help="p: share of entries to remove")
    add(
        "--stopping-point",
        type=float,
        default=stopping_point,
        help="s: converged when all are below",
    )
    add("--margin", type=float, default=margin, help="delta: truncation starts below s + delta")
    add("--window", type=int, default=window, help="l: masks compared, the newest counted")
    add("--truncation", type=float, default=3e-3, help="r: what is left of a gradient")
    add("--sample-every", type=int, help="steps between masks (default: an epoch)")
    add(
        "--scope",
        choices=["global", "layer", "selector"],
        default=scope,
        help="what is ranked together: everything, each layer, or what each joined selector names",
    )
    add(
        "--min-keep",
        type=lambda text: float(text) if "." in text else int(text),
        default=1,
        help="entries of each layer that always stay, or, as 0.2, which share of them",
    )
    add("--trigger", choices=["distance", "always"], default="distance", help="when to truncate")


def table(runs: list[Run], score: str, form: str = ".2f") -> str:
    """The methods side by side, means over seeds with the deviation where there are several."""

    def cell(values: list[float], form: str) -> str:
        if not values:
            return "-"
        spread = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
        return format(statistics.mean(values), form) + spread

    methods = list(dict.fromkeys(run.method for run in runs))
    by_method = [
        [run for run in runs if run.method == method and run.found is not False]
        for method in methods
    ]
    rows = [["", *methods]]
    for name, value, shape in (
        ("masks to the ticket", lambda run: len(run.history), ".1f"),
        ("epochs to the ticket", lambda run: run.search_epochs, ".1f"),
        ("seconds to the ticket", lambda run: run.search_seconds, ".1f"),
    ):
        values = [[value(run) for run in each if run.found] for each in by_method]
        rows.append([name, *[cell(each, shape) for each in values]])
    for key in max((run.scores for run in runs), key=len):
        values = [[run.scores[key] for run in each if key in run.scores] for each in by_method]
        rows.append([f"{score} {key}", *[cell(each, form) for each in values]])
    for key in dict.fromkeys(key for run in runs for key in run.sizes):
        for when, label in enumerate(("before shrinking", "after shrinking")):
            values = [
                [run.sizes[key][when] for run in each if when < len(run.sizes.get(key, ()))]
                for each in by_method
            ]
            if any(values):
                rows.append([f"{key} {label}", *[cell(each, ".2f") for each in values]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_trajectory(runs: list[Run], args: argparse.Namespace, title: str, path: Path) -> None:
    """Largest and mean distance over training, the paper's Figure 1 for all methods."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, color, look in _drawn(runs):
        if run.found is None:
            continue
        label = run.method if look["alpha"] == 1 else None
        samples = [s for s in run.history if s.max_distance is not None]
        epochs = [s.step / run.steps_per_epoch for s in samples]
        axes.plot(
            epochs,
            [s.max_distance for s in samples],
            label=label and f"{label}, largest",
            color=color,
            **look,
        )
        axes.plot(
            epochs,
            [s.mean_distance for s in samples],
            label=label and f"{label}, mean",
            color=color,
            linestyle="--",
            **look,
        )
        if run.found and samples:
            axes.plot(epochs[-1], samples[-1].max_distance, "*", color=color, markersize=13)
        truncating = [s for s in samples if s.phase is Phase.TRUNCATING]
        if run.method != "EB Train" and truncating:
            first = truncating[0]
            axes.plot(first.step / run.steps_per_epoch, first.mean_distance, "o", color=color)
    axes.axhline(args.stopping_point, color="0.3", linewidth=1)
    axes.axhline(args.stopping_point + args.margin, color="0.3", linewidth=1, linestyle=":")
    for height, text in (
        (args.stopping_point, "stopping point:\nlargest below"),
        (args.stopping_point + args.margin, "trigger point:\nmean below"),
    ):
        at = ("axes fraction", "data")
        axes.annotate(text, (1.01, height), xycoords=at, va="center", fontsize=8, color="0.3")
    axes.set(xlabel="epoch", ylabel="mask distance", title=title)
    axes.set_ylim(bottom=0)
    axes.plot([], [], "*", color="0.4", markersize=11, label="ticket found")
    axes.plot([], [], "o", color="0.4", label="truncation starts")
    _finish(figure, axes, path)


def plot_losses(runs: list[Run], title: str, path: Path) -> None:
    """Training loss over steps, the paper's Figure 2: a mean over the last steps, by method."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, color, look in _drawn(runs):
        losses = torch.tensor(run.losses)
        span = max(1, len(losses) // 60)
        smooth = losses.unfold(0, span, 1).mean(1)
        epochs = (torch.arange(len(smooth)) + span) / run.steps_per_epoch
        label = run.method if look["alpha"] == 1 else None
        axes.plot(epochs, smooth, color=color, label=label, **look)
        if run.found:
            found = run.history[-1].step
            at = max(0, min(found - span, len(smooth) - 1))
            axes.plot(found / run.steps_per_epoch, smooth[at], "*", color=color, markersize=13)
    axes.plot([], [], "*", color="0.4", markersize=11, label="ticket found and pruned")
    axes.set(xlabel="epoch", ylabel="training loss", title=title)
    _finish(figure, axes, path)


def _drawn(runs: list[Run]) -> list[tuple[Run, str, dict[str, float]]]:
    """Each run with its method's colour; the first seed stands out, and no line hides another."""
    methods = list(dict.fromkeys(run.method for run in runs))
    colors = dict(zip((m for m in methods if m != "dense"), COLORS, strict=False))
    return [
        (
            run,
            colors.get(run.method, "0.6"),
            {"linewidth": 1.5 * (len(methods) - methods.index(run.method)), "alpha": 1}
            if run.seed == runs[0].seed
            else {"linewidth": 0.8, "alpha": 0.4},
        )
        for run in runs
    ]


def _finish(figure: plt.Figure, axes: plt.Axes, path: Path) -> None:
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_xlim()[1] > 2:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(runs: list[Run], args: argparse.Namespace, text: str) -> None:
    """Tickets and figures as files, the table on the screen; exits with 1 if a search gave up."""
    torch.save([run.ticket for run in runs], args.out / "ticket.pt")
    results = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "runs": [
            {
                name: value
                for name, value in asdict(run).items()
                if name not in ("history", "ticket", "report")
            }
            | {"distances": [[s.step, s.max_distance, s.mean_distance] for s in run.history]}
            for run in runs
        ],
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{text}\n\nPictures are in {args.out}/.")
    lost = [f"{run.method}, seed {run.seed}" for run in runs if run.found is False]
    if lost:
        print(
            f"\nNo ticket within {args.max_epochs} epochs: {'; '.join(lost)}. Raise --max-epochs "
            "or --stopping-point, or draw masks more often with --sample-every.",
            file=sys.stderr,
        )
        sys.exit(1)
