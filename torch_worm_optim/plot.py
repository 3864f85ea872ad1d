"""Pictures of a search. matplotlib is imported when one is drawn, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch_worm_optim.optimizer import WormOptimizer
from torch_worm_optim.report import counted, total
from torch_worm_optim.search import MaskSample, Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW = 0.22  # inches
_TALLEST = 60.0  # inches, which is what can be saved in print quality


def plot_trajectory(
    opt_or_history: WormOptimizer | Sequence[MaskSample],
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """Draw the largest and the mean mask distance over optimizer steps.

    A tick at the bottom stands for each mask drawn. Until the window is full there are no
    distances; that stretch is shaded. A dot is where truncation started, a star where the ticket
    was found.

    Args:
        opt_or_history (WormOptimizer or list of MaskSample): The optimizer, or its
            :attr:`~torch_worm_optim.WormOptimizer.history`. Of an optimizer the stopping point and
            the trigger point are drawn as well.
        ax (Axes, optional): What to draw in, perhaps over another search; None makes a new figure
            with pyplot (default: None).
        label (str, optional): What the legend calls this search, where others are drawn into the
            same axes (default: None).

    Returns:
        The axes. Nothing is shown or saved.

    Raises:
        TypeError: If the first argument is neither of the two, or ``ax`` is something else than
            matplotlib's axes.
        ImportError: If matplotlib cannot be imported.

    Example:
        >>> from torch_worm_optim import MaskSample, Phase
        >>> history = [
        ...     MaskSample(100, (), None, None, Phase.SEARCHING),
        ...     MaskSample(200, (0.3, 0.2), 0.3, 0.25, Phase.SEARCHING),
        ...     MaskSample(300, (0.06, 0.04), 0.06, 0.05, Phase.CONVERGED),
        ... ]
        >>> ax = plot_trajectory(history)
        >>> largest, mean, *_ = ax.get_lines()
        >>> mean.get_xydata().tolist()
        [[200.0, 0.25], [300.0, 0.05]]
    """
    opt = opt_or_history if isinstance(opt_or_history, WormOptimizer) else None
    history = _checked_history(opt_or_history) if opt is None else opt.history
    ax = _checked_axes(ax, height=4.5)
    ax.set(xlabel="optimizer step", ylabel="mask distance")
    ax.spines[["top", "right"]].set_visible(False)
    if not history:
        given = opt is not None and opt.converged
        return _empty(ax, "no mask drawn: the ticket was given" if given else "no mask drawn yet")

    samples = [s for s in history if s.distances]
    steps = [s.step for s in samples]
    largest = [s.max_distance or 0.0 for s in samples]
    mean = [s.mean_distance or 0.0 for s in samples]
    whose = "" if label is None else f"{label}, "
    [line] = ax.plot(steps, largest, ".-", label=f"{whose}largest distance")
    color = line.get_color()
    ax.plot(steps, mean, ".--", color=color, label=f"{whose}mean distance")
    if opt is not None:
        rule = opt._rule
        if rule.trigger == "distance":
            _threshold(ax, rule.trigger_point, "trigger point: mean below", ":", above=True)
        _threshold(ax, rule.stopping_point, "stopping point: largest below", "-", above=False)

    mark: dict[str, Any] = {"color": color, "linestyle": "none", "clip_on": False}
    first = next((s for s in history if s.phase is Phase.TRUNCATING), None)
    if first is not None and (opt is None or opt._truncation < 1):
        height = first.mean_distance or 0.0
        ax.plot(first.step, height, marker="o", markersize=8, label="truncation starts", **mark)
    found = next((s for s in history if s.phase.converged), None)
    if found is not None:
        height = found.max_distance or 0.0
        ax.plot(found.step, height, marker="*", markersize=14, label="ticket found", **mark)
    all_steps, zeros = [s.step for s in history], [0.0] * len(history)
    [ticks] = ax.plot(all_steps, zeros, marker="|", markersize=10, label="mask drawn", **mark)
    ticks.sticky_edges.y.append(0)
    full_at = steps[0] if steps else all_steps[-1]
    shade = ax.axvspan(0, full_at, color="0.92", zorder=0, label="window not full yet")
    shade.sticky_edges.x.append(0)
    if not samples:
        ax.text(0.5, 0.5, "window not full yet", transform=ax.transAxes, ha="center")
    # What two searches in the same axes have in common is told once.
    handles, labels = ax.get_legend_handles_labels()
    told = dict(zip(labels, handles, strict=True))
    ax.legend(told.values(), told.keys(), fontsize="small")
    return ax


def plot_kept(opt: WormOptimizer, ax: Axes | None = None) -> Axes:
    """Draw how much of each representative is kept, a bar for each.

    The numbers are those of :meth:`~torch_worm_optim.WormOptimizer.summary`: of the ticket, or
    before that of the newest mask; units where representatives have some. A bar is as long as the
    representative is wide, and dark as far as it is kept.

    Args:
        opt (WormOptimizer): The optimizer. If parameters are sharded, all ranks have to make this
            call.
        ax (Axes, optional): What to draw in; None makes a new figure with pyplot, as tall as there
            are rows (default: None).

    Returns:
        The axes. Nothing is shown or saved.

    Raises:
        TypeError: If ``opt`` is no ``WormOptimizer``, or ``ax`` is something else than matplotlib's
            axes.
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
    if not isinstance(opt, WormOptimizer):
        raise TypeError(
            f"`opt` must be a WormOptimizer, got {_kind(opt)}. Pass the optimizer itself; one that "
            "a trainer has wrapped is in its `.optimizer`."
        )
    counts = opt.kept_counts()
    ax = _checked_axes(ax, height=min(1.2 + _ROW * len(counts), _TALLEST))
    ax.spines[["top", "right"]].set_visible(False)
    kept = [each.kept for each in counts if each.kept is not None]
    if len(kept) < len(counts):
        return _empty(ax, "no mask drawn yet")

    what = counted(counts)
    rows, numels = range(len(counts)), [each.numel for each in counts]
    removed = [numel - n_kept for numel, n_kept in zip(numels, kept, strict=True)]
    color = ax.barh(rows, kept, color="C0", label="kept").patches[0].get_facecolor()
    bars = ax.barh(rows, removed, left=kept, color=color, alpha=0.3, label="removed")
    row_height = ax.get_window_extent().height / ax.figure.dpi * 72 / len(counts)  # in points
    fontsize = max(1.0, min(9.0, 0.8 * row_height))
    texts = [f"{n_kept:,} of {numel:,}" for n_kept, numel in zip(kept, numels, strict=True)]
    ax.bar_label(bars, texts, padding=3, fontsize=fontsize)
    ax.set_yticks(rows, [each.name for each in counts], fontsize=fontsize)
    ax.set(xlim=(0, 1.2 * max(1, *numels)), ylim=(len(counts) - 0.4, -0.6))
    everything, which = total(counts), "ticket" if opt.converged else "newest mask"
    title = f"{which}: {everything.kept:,} of {everything.numel:,} {what} kept"
    ax.set_title(title, loc="left", fontsize="medium")
    ax.set_xlabel(f"{what}, kept ones dark")
    return ax


def _threshold(ax: Axes, height: float, text: str, linestyle: str, *, above: bool) -> None:
    """A line with words at its left end, where no distances are yet."""
    ax.axhline(height, color="0.3", linewidth=1, linestyle=linestyle)
    ax.annotate(
        f"{text} {height:g}",
        (0, height),
        xycoords=("axes fraction", "data"),
        xytext=(4, 2 if above else -2),
        textcoords="offset points",
        va="bottom" if above else "top",
        fontsize="small",
        color="0.3",
    )


def _empty(ax: Axes, text: str) -> Axes:
    """Axes that say why there is nothing in them."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")
    return ax


def _checked_history(history: object) -> list[MaskSample]:
    """A history that somebody passed."""
    # A MaskSample is a tuple, too, of what is none.
    if not isinstance(history, (list, tuple)):
        wrong: object = history
    else:
        wrong = next((each for each in history if not isinstance(each, MaskSample)), None)
        if wrong is None and None not in history:
            return list(history)
    where = "" if wrong is history else f" in a {_kind(history)}"
    raise TypeError(
        "`opt_or_history` must be a WormOptimizer or its history, a list of MaskSample, got "
        f"{_kind(wrong)}{where}. Pass `opt` or `opt.history`; an optimizer that a trainer has "
        "wrapped is in its `.optimizer`."
    )


def _checked_axes(ax: object, height: float) -> Axes:
    """The axes that somebody passed, or new ones of this height in inches."""
    try:
        from matplotlib.axes import Axes

        if ax is None:
            from matplotlib import pyplot as plt

            return plt.subplots(figsize=(8.0, height), layout="constrained")[1]
    except ImportError as error:
        raise ImportError(
            f"Pictures need matplotlib, which cannot be imported ({error}). Install it: "
            'pip install "torch-worm-optim[plot]"'
        ) from error
    if not isinstance(ax, Axes):
        raise TypeError(
            f"`ax` must be the matplotlib axes to draw in, got {_kind(ax)}. Pass one of "
            "`figure.subplots()`, or None for a new figure."
        )
    return ax


def _kind(value: object) -> str:
    """The type of what was passed."""
    return type(value).__name__
