"""What the examples read, print, write and draw of trainings that ran side by side."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
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
    search_epochs: float | None = None  # until it was pruned, or the search was given up
    search_seconds: float | None = None
    seconds: float | None = None  # of the whole training, without evaluation
    history: list[MaskSample] = field(default_factory=list)
    ticket: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # of every training step, retraining included
    curve: list[tuple[float, float, float]] = field(default_factory=list)  # epochs, seconds, score
    sizes: dict[str, tuple[float, ...]] = field(default_factory=dict)  # before and after shrinking
    report: ShrinkReport | None = None


def between(
    low: float, high: float, kind: Callable[[str], float] = float, *, below: bool = False
) -> Callable[[str], float]:
    """The type of an argument: a number from ``low`` to ``high``, or below ``high``."""

    def read(text: str) -> float:
        what = "a whole number" if kind is int else "a number"
        limits = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        if below:
            limits = f"from {low} to below {high}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value) or (below and value == high):
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, got {text!r}")
        return value

    return read


def at_least(low: int) -> Callable[[str], float]:
    """The type of an argument: a whole number from ``low`` on."""
    return between(low, math.inf, int)


def least_kept(text: str) -> float:
    """The type of --min-keep: a count, or a share if it has a point."""
    return between(0, 1, below=True)(text) if "." in text else at_least(0)(text)


def device(text: str) -> torch.device:
    """The type of --device: one that there is."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_search_arguments(
    parser: argparse._ActionsContainer,
    *,
    window: int,
    stopping_point: float | None,
    margin: float | None,
    scope: str | None = "global",
) -> None:
    """The arguments of WormOptimizer, with these defaults; None where the data decides."""
    add = parser.add_argument
    add(
        "--prune-ratio",
        metavar="P",
        type=between(0, 1, below=True),
        default=0.5,
        help="p: share of entries to remove",
    )
    add(
        "--stopping-point",
        metavar="S",
        type=between(0, 1),
        default=stopping_point,
        help="s: converged when all are below",
    )
    add(
        "--margin",
        metavar="DELTA",
        type=between(0, 1),
        default=margin,
        help="delta: truncation starts below s + delta",
    )
    add(
        "--window",
        metavar="L",
        type=at_least(2),
        default=window,
        help="l: masks compared, the newest counted",
    )
    add(
        "--truncation",
        metavar="R",
        type=between(0, 1),
        default=3e-3,
        help="r: what is left of a gradient",
    )
    add(
        "--fade",
        metavar="F",
        type=between(0, 1),
        default=1,
        help="f: what is left of a removed entry from one mask to the next; 1 does not fade",
    )
    add(
        "--sample-every",
        metavar="STEPS",
        type=at_least(1),
        help="steps between masks (default: an epoch)",
    )
    add(
        "--scope",
        choices=["global", "layer", "selector"],
        default=scope,
        help="what is ranked together: everything, each layer, or what each joined selector names",
    )
    add(
        "--min-keep",
        metavar="N",
        type=least_kept,
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
    values = [[run.seconds for run in each if run.seconds is not None] for each in by_method]
    if any(values):
        rows.append(["seconds in all", *[cell(each, ".1f") for each in values]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_trajectory(runs: list[Run], args: argparse.Namespace, title: str, path: Path) -> None:
    """Largest and mean distance over training, the paper's Figure 1 for all methods."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    searches = [run for run in runs if run.found is not None]
    full_at = []
    for method, color, width, group in _by_method(searches, runs):
        lines: dict[str, list] = {"largest": [], "mean": []}
        for run in group:
            samples = [s for s in run.history if s.max_distance is not None]
            if not samples:
                continue
            epochs = [s.step / run.steps_per_epoch for s in samples]
            full_at.append(epochs[0])
            lines["largest"].append((epochs, [s.max_distance for s in samples]))
            lines["mean"].append((epochs, [s.mean_distance for s in samples]))
            if run.found:
                axes.plot(epochs[-1], samples[-1].max_distance, "*", color=color, markersize=13)
            truncating = [s for s in samples if s.phase is Phase.TRUNCATING]
            if method != "EB Train" and truncating:
                first = truncating[0]
                axes.plot(first.step / run.steps_per_epoch, first.mean_distance, "o", color=color)
        for (which, each), style in zip(lines.items(), ("-", "--"), strict=True):
            look = {"color": color, "lw": width, "ls": style, "marker": "."}
            _draw(axes, each, label=f"{method}, {which}", **look)
    axes.set(xlabel="epoch", ylabel="mask distance", title=title)
    if not full_at:
        _empty(axes, f"No distances: no search drew the {args.window} masks that fill its window.")
        _finish(figure, path)
        return
    axes.axvspan(0, min(full_at), color="0.95", zorder=0)
    axes.annotate(
        f"fewer than\n{args.window} masks:\nwindow not\nfull yet",
        (0.05 * min(full_at), 0.97),
        xycoords=("data", "axes fraction"),
        va="top",
        fontsize=8,
        color="0.3",
        bbox={"facecolor": "0.95", "edgecolor": "none"},
    )
    axes.axhline(args.stopping_point, color="0.3", linewidth=1)
    axes.axhline(args.stopping_point + args.margin, color="0.3", linewidth=1, linestyle=":")
    for height, text in (
        (args.stopping_point, "stopping point:\nlargest below"),
        (args.stopping_point + args.margin, "trigger point:\nmean below"),
    ):
        at = ("axes fraction", "data")
        axes.annotate(text, (1.01, height), xycoords=at, va="center", fontsize=8, color="0.3")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.plot([], [], "*", color="0.4", markersize=11, label="ticket found")
    axes.plot([], [], "o", color="0.4", label="truncation starts")
    _finish(figure, path)


def plot_accuracy(runs: list[Run], title: str, path: Path) -> None:
    """Accuracy over epochs and over seconds of training; a mark where a network is pruned."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    pruned = [run for run in runs if "after pruning" in run.scores]
    for method, color, width, group in _by_method([run for run in runs if run.curve], runs):
        # Whole epochs; the fall right after pruning would leave no room for anything else.
        points = []
        for run in group:
            whole = {p[0]: p for p in reversed(run.curve) if p[0] % 1 == 0}
            points.append(sorted(whole.values()))
        epochs_and_seconds = np.mean(points, 0).T[:2]
        for axis, (axes, x) in enumerate(zip(panels, epochs_and_seconds, strict=True)):
            _draw(
                axes, [(x, np.array(y)[:, 2]) for y in points], label=method, color=color, lw=width
            )
            for run in group:
                if run in pruned:
                    at = (run.search_epochs, run.search_seconds)[axis]
                    look = {"color": color, "markersize": 13 if run.found else 8}
                    axes.plot(at, run.scores["before pruning"], "*" if run.found else "X", **look)
    panels[0].set(xlabel="epoch", ylabel="test accuracy, %", xlim=(0, None))
    panels[1].set(xlabel="seconds of training", xlim=(0, None))
    if not any(run.curve for run in runs):
        _empty(panels[0], "Nothing was measured.")
        _empty(panels[1], "")
    if pruned:
        panels[0].plot([], [], "*", color="0.4", markersize=11, label="ticket found and pruned")
        panels[0].plot([], [], "X", color="0.4", label="random ticket applied")
        after = [run.scores["after pruning"] for run in pruned]
        note = f"right after, not drawn: {min(after):.0f} to {max(after):.0f} %"
        panels[0].plot([], [], " ", label=note)
    figure.suptitle(title)
    _finish(figure, path)


def plot_losses(runs: list[Run], title: str, path: Path) -> None:
    """Training loss over steps, the paper's Figure 2: a mean over the last steps, by method."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for method, color, width, group in _by_method([run for run in runs if run.losses], runs):
        lines = []
        for run in group:
            losses = torch.tensor(run.losses)
            span = max(1, len(losses) // 60)
            smooth = losses.unfold(0, span, 1).mean(1)
            lines.append(((np.arange(len(smooth)) + span) / run.steps_per_epoch, smooth.numpy()))
            if run.found:
                found = run.history[-1].step
                at = max(0, min(found - span, len(smooth) - 1))
                axes.plot(found / run.steps_per_epoch, smooth[at], "*", color=color, markersize=13)
        _draw(axes, lines, label=method, color=color, lw=width)
    axes.plot([], [], "*", color="0.4", markersize=11, label="ticket found and pruned")
    axes.set(xlabel="epoch", ylabel="training loss", title=title)
    if not any(run.losses for run in runs):
        _empty(axes, "Nothing was trained.")
    _finish(figure, path)


def plot_channels(runs: list[Run], title: str, path: Path) -> None:
    """Which channels of which layer go, for the searches of the first seed."""
    shown = [run for run in runs if run.found is not None and run.seed == runs[0].seed]
    shown = [run for run in shown if run.ticket]
    names = [name for name in shown[0].ticket if name.endswith("weight")] if shown else []
    figure, panels = plt.subplots(
        1,
        max(1, len(shown)),
        figsize=(5.5 * max(1.2, len(shown)), 1.2 + 0.24 * max(10, len(names))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for run, axes in zip(shown, panels[0], strict=False):
        for row, name in enumerate(names):
            kept = run.ticket[name].cpu().numpy()
            # Layers differ in width by a factor of ten: each fills the row.
            edges = np.linspace(0, 1, len(kept) + 1)
            axes.pcolormesh(
                edges, [row - 0.4, row + 0.4], kept[None], cmap="Blues", vmin=-0.15, vmax=1.3
            )
            axes.annotate(
                f"{(~kept).sum()} of {len(kept)}",
                (1.01, row),
                va="center",
                fontsize=7,
                annotation_clip=False,
            )
        what = "channels that go (light)" if run.found else "no ticket; the newest mask"
        axes.set(xlim=(0, 1), xticks=[])
        axes.set_title(f"{run.method}: {what}", fontsize=10)
        axes.spines[:].set_visible(False)
    if shown:
        panels[0][0].set_yticks(range(len(names)), names, fontsize=7)
        panels[0][0].invert_yaxis()
    else:
        _empty(panels[0][0], "No channels: no search drew a mask.")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _by_method(runs: list[Run], of: list[Run] | None = None) -> Iterator[tuple]:
    """Each method with its colour, a width by which no line hides another, and its runs."""
    methods = list(dict.fromkeys(run.method for run in of or runs))
    colors = dict(zip((m for m in methods if m != "dense"), COLORS, strict=False))
    for i, method in enumerate(methods):
        group = [run for run in runs if run.method == method]
        if group:
            yield method, colors.get(method, "0.6"), 1.2 + 0.8 * (len(methods) - 1 - i), group


def _draw(axes: plt.Axes, lines: list[tuple], **look: object) -> None:
    """One line, or the mean of several with the range that they span."""
    if len(lines) == 1:
        axes.plot(*lines[0], **look)
    elif lines:
        # Where a line drops within no time, the time before the drop is a little earlier.
        lines = [(x - 1e-6 * (np.diff(x, append=np.inf) == 0), y) for x, y in lines]
        grid = np.unique(np.concatenate([x for x, _ in lines]))
        values = [np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in lines]
        axes.plot(grid, np.nanmean(values, 0), **look)
        low, high = np.nanmin(values, 0), np.nanmax(values, 0)
        axes.fill_between(grid, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _empty(axes: plt.Axes, text: str) -> None:
    """Say why there is nothing to see."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")


def _finish(figure: plt.Figure, path: Path) -> None:
    """Save the picture; whole epochs below, and the seeds' range told in the legend."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_xlabel() == "epoch" and len(axes.get_xticks()):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes = figure.axes[0]
    if axes.collections:
        axes.plot([], [], color="0.8", linewidth=7, label="range of the seeds")
    if len(axes.get_xticks()):
        handles_and_labels = axes.get_legend_handles_labels()
        if len(figure.axes) > 1:
            figure.legend(*handles_and_labels, loc="outside right upper", fontsize=8)
        else:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(runs: list[Run], args: argparse.Namespace) -> None:
    """What is known so far, as results.json, results.csv and masks.pt; the ticket as ticket.pt."""
    masks = {f"{run.method}, seed {run.seed}": run.ticket for run in runs if run.ticket}
    torch.save(masks, args.out / "masks.pt")
    found = next((run for run in runs if run.found and run.method.startswith("WORM")), None)
    if found:
        torch.save(found.ticket, args.out / "ticket.pt")
    else:
        (args.out / "ticket.pt").unlink(missing_ok=True)

    rows = [
        {"method": run.method, "seed": run.seed, "found": run.found}
        | {"masks": len(run.history) if run.found is not None else None}
        | {"search_epochs": run.search_epochs, "search_seconds": run.search_seconds}
        | run.scores
        | {
            f"{name} {when}": value
            for name, sizes in run.sizes.items()
            for when, value in zip(("before", "after"), sizes, strict=False)
        }
        | {"seconds": run.seconds}
        for run in runs
    ]
    with (args.out / "results.csv").open("w", newline="") as file:
        columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

    results = {
        "arguments": arguments(args),
        "runs": [
            {
                name: value
                for name, value in asdict(run).items()
                if name not in ("history", "ticket", "report")
            }
            | {
                "distances": [
                    [s.step, s.max_distance, s.mean_distance, s.phase.value] for s in run.history
                ]
            }
            for run in runs
        ],
    }
    # Last and at once: what is in it is finished, whenever the power goes.
    (args.out / "results.tmp").write_text(json.dumps(results, indent=1))
    os.replace(args.out / "results.tmp", args.out / "results.json")


def arguments(args: argparse.Namespace) -> dict[str, object]:
    """The arguments, as JSON has them: numbers as numbers, paths as text."""
    plain = (bool, int, float, list, type(None))
    return {
        name: value if isinstance(value, plain) else str(value)
        for name, value in vars(args).items()
    }


def restore(out: Path) -> list[Run]:
    """The finished runs that :func:`save` wrote."""
    results = json.loads((out / "results.json").read_text())
    masks = torch.load(out / "masks.pt", weights_only=True)
    runs = []
    for values in results["runs"]:
        history = [
            MaskSample(step, (), largest, mean, Phase(phase))
            for step, largest, mean, phase in values.pop("distances")
        ]
        ticket = masks.get(f"{values['method']}, seed {values['seed']}", {})
        runs.append(Run(**values, history=history, ticket=ticket))
    return runs


def write(
    runs: list[Run], args: argparse.Namespace, text: str, limit: str = "--max-epochs"
) -> None:
    """Save everything, the table on the screen; exits with 1 if a search gave up."""
    save(runs, args)
    print(f"\n{text}\n\nPictures and results are in {args.out}/.")
    lost = [f"{run.method}, seed {run.seed}" for run in runs if run.found is False]
    if lost:
        epochs = getattr(args, limit.strip("-").replace("-", "_"))
        print(
            f"\nNo ticket within {epochs} epochs: {'; '.join(lost)}. Raise {limit} "
            "or --stopping-point, or draw masks more often with --sample-every.",
            file=sys.stderr,
        )
        sys.exit(1)
