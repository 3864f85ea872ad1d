"""Plots of a search. matplotlib is imported when one is drawn, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch_worm_optim.report import counted, total
from torch_worm_optim.search import MaskSample, Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_worm_optim.optimizer import WormOptimizer


def plot_trajectory(
    opt_or_history: WormOptimizer | Sequence[MaskSample],
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """Plot the largest and the mean mask distance over optimizer steps.

    Each mask has a tick at the bottom; distances begin once the window is full. A dot marks the
    start of truncation, a star the ticket.

    Args:
        opt_or_history (WormOptimizer or list of MaskSample): The optimizer, or its
            :attr:`~torch_worm_optim.WormOptimizer.history`. An optimizer's stopping point and
            trigger point are drawn as well.
        ax (Axes, optional): The axes to draw in, perhaps over another search; None makes a new
            figure with pyplot (default: None).
        label (str, optional): What the legend calls this search, if there are others in the same
            axes (default: None).

    Returns:
        The axes. Nothing is shown or saved.

    Raises:
        TypeError: If the first argument is neither of the two, or ``ax`` is not matplotlib's axes.
        ImportError: If matplotlib cannot be imported.

    Example:
        >>> from torch_worm_optim import MaskSample, Phase
        >>> sample = MaskSample(300, (0.06, 0.04), 0.06, 0.05, Phase.CONVERGED)
        >>> largest, mean, *_ = plot_trajectory([sample]).get_lines()
        >>> mean.get_xydata().tolist()
        [[300.0, 0.05]]
    """
    from torch_worm_optim.optimizer import WormOptimizer

    opt = opt_or_history if isinstance(opt_or_history, WormOptimizer) else None
    history = _checked_history(opt_or_history) if opt is None else opt.history
    ax = _checked_axes(ax, height=4.5)
    ax.set(xlabel="optimizer step", ylabel="mask distance")
    if not history:
        given = opt is not None and opt.converged
        return _empty(ax, "no mask drawn: the ticket was given" if given else "no mask drawn yet")

    samples = [s for s in history if s.distances]
    steps, whose = [s.step for s in samples], f"{label}, " if label else ""
    largest, mean = [max(s.distances) for s in samples], [s.mean_distance or 0 for s in samples]
    [line] = ax.plot(steps, largest, ".-", label=f"{whose}largest distance")
    color = line.get_color()
    ax.plot(steps, mean, ".--", color=color, label=f"{whose}mean distance")
    ax.plot([s.step for s in history], [0] * len(history), "|", color=color, label="mask drawn")
    if not samples:
        ax.text(0.5, 0.5, "window not full yet", transform=ax.transAxes, ha="center")
    if opt is not None:
        s, t = opt.settings.stopping_point, opt.settings.trigger_point
        ax.axhline(s, color="0.3", lw=1, label=f"stopping point {s:g}")
        if opt.settings.trigger == "distance":
            ax.axhline(t, color="0.3", lw=1, ls=":", label=f"trigger point {t:g}")
    first = next((s for s in history if s.phase is Phase.TRUNCATING), None)
    if first and (opt is None or opt.settings.truncation < 1):
        ax.plot(first.step, first.mean_distance or 0, "o", color=color, label="truncation starts")
    last = history[-1]
    if last.phase.converged:
        ax.plot(last.step, last.max_distance or 0, "*", ms=14, color=color, label="ticket found")
    # What two searches in the same axes have in common has one line in the legend.
    handles, labels = ax.get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    ax.legend(legend.values(), legend.keys(), fontsize="small")
    return ax


def plot_kept(opt: WormOptimizer, ax: Axes | None = None) -> Axes:
    """Plot how much of each representative is kept, a bar for each.

    The numbers are those of :meth:`~torch_worm_optim.WormOptimizer.summary`: of the ticket, or
    before that of the newest mask; units where representatives have some. A bar's length is the
    size of the representative, and its dark part is what is kept.

    Args:
        opt (WormOptimizer): The optimizer. If parameters are sharded, all ranks have to make this
            call.
        ax (Axes, optional): The axes to draw in; None makes a new figure with pyplot, whose height
            fits the number of bars (default: None).

    Returns:
        The axes. Nothing is shown or saved.

    Raises:
        TypeError: If ``opt`` is no ``WormOptimizer``, or ``ax`` is not matplotlib's axes.
        ImportError: If matplotlib cannot be imported.

    Example:
        >>> import torch
        >>> from torch_worm_optim import WormOptimizer
        >>> model = torch.nn.BatchNorm1d(4)
        >>> _ = model.weight.data.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0]))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> opt = WormOptimizer(sgd, model, sample_every=None)
        >>> _ = opt.sample()
        >>> plot_kept(opt).get_title(loc="left")
        'newest mask: 2 of 4 entries kept'
    """
    from torch_worm_optim.optimizer import WormOptimizer

    if not isinstance(opt, WormOptimizer):
        raise TypeError(
            f"`opt` must be a WormOptimizer, got {type(opt).__name__}. Pass the optimizer itself; "
            "one that a trainer has wrapped is in its `.optimizer`."
        )
    counts = opt.kept_counts()
    everything, what = total(counts), counted(counts)
    ax = _checked_axes(ax, height=1.2 + 0.22 * len(counts))
    if everything.kept is None:
        return _empty(ax, "no mask drawn yet")

    rows = range(len(counts))
    bars = ax.barh(rows, [each.numel for each in counts], color="C0", alpha=0.3)
    ax.barh(rows, [each.kept or 0 for each in counts], color="C0")
    texts = [f"{each.kept:,} of {each.numel:,}" for each in counts]
    row_height = ax.get_window_extent().height / ax.figure.dpi * 72 / len(counts)  # in points
    fontsize = max(1.0, min(9.0, 0.8 * row_height))
    ax.bar_label(bars, texts, padding=3, fontsize=fontsize)
    ax.set_yticks(rows, [each.name for each in counts], fontsize=fontsize)
    longest = max(1, *(each.numel for each in counts))
    ax.set(xlim=(0, 1.2 * longest), ylim=(len(counts) - 0.4, -0.6), xlabel=f"{what}, kept dark")
    which = "ticket" if opt.converged else "newest mask"
    title = f"{which}: {everything.kept:,} of {everything.numel:,} {what} kept"
    ax.set_title(title, loc="left", fontsize="medium")
    return ax


def _empty(ax: Axes, text: str) -> Axes:
    """Axes that say why there is nothing in them."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")
    return ax


def _checked_history(history: object) -> list[MaskSample]:
    """A history that somebody passed."""
    samples = history if isinstance(history, (list, tuple)) else [history]
    for each in samples:
        if not isinstance(each, MaskSample):
            where = f" in a {type(history).__name__}" if samples is history else ""
            raise TypeError(
                "`opt_or_history` must be a WormOptimizer or its history, a list of MaskSample, "
                f"got {type(each).__name__}{where}. Pass `opt` or `opt.history`; an optimizer that "
                "a trainer has wrapped is in its `.optimizer`."
            )
    return list(samples)


def _checked_axes(ax: object, height: float) -> Axes:
    """The axes that somebody passed, or new ones of this height in inches."""
    try:
        from matplotlib.axes import Axes

        if ax is None:
            from matplotlib import pyplot as plt

            return plt.subplots(figsize=(8.0, height), layout="constrained")[1]
    except ImportError as error:
        raise ImportError(
            f"Plots need matplotlib, which cannot be imported ({error}). Install it: "
            'pip install "torch-worm-optim[plot]"'
        ) from error
    if not isinstance(ax, Axes):
        raise TypeError(
            f"`ax` must be the matplotlib axes to draw in, got {type(ax).__name__}. Pass one of "
            "`figure.subplots()`, or None for a new figure."
        )
    return ax
