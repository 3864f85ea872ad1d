"""What the callbacks of all trainers share: what is new in a search, as numbers for a logger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_worm_optim._checks import check_choice, check_count
from torch_worm_optim.optimizer import WormOptimizer
from torch_worm_optim.search import Phase
from torch_worm_optim.ticket import apply_ticket_

PHASES = tuple(Phase)


def unwrapped(optimizer: object) -> object:
    """The :class:`WormOptimizer` inside what a trainer puts around it, else the innermost one.

    Args:
        optimizer: What a trainer holds, such as Accelerate's ``AcceleratedOptimizer``.

    Returns:
        The first ``WormOptimizer`` met on the way in, or what has no ``optimizer`` any more.
    """
    while not isinstance(optimizer, WormOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def one_example(batch: Any) -> Any:
    """The model's inputs for one example of a batch, to shrink with.

    Args:
        batch: What a loader gives: inputs, or a tuple or list whose first element they are. Inputs
            are a tensor, or a dict of keyword arguments.

    Returns:
        A copy of the first row of each tensor; a batch would stay in memory as long as its rows.

    Raises:
        ValueError: If there is no telling what the inputs are.

    Example:
        >>> images, labels = torch.ones(8, 3), torch.ones(8)
        >>> one_example((images, labels))
        tensor([[1., 1., 1.]])
    """
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, (Tensor, Mapping)):
        raise ValueError(
            f"A batch of type {type(batch).__name__} does not say what the model's inputs are, and "
            "shrinking needs some. Pass `inputs=` to WormCallback."
        )
    first = dict(first) if isinstance(first, Mapping) else first
    return tree_map_only(Tensor, lambda each: each[:1].clone() if each.dim() else each, first)


class Reporter:
    """Watch one search: act at its ticket, and tell what is new since the last time.

    Samples from before the reporter was made are not told: a resumed run has logged them already.

    Args:
        optimizer (WormOptimizer): Whose search to watch.
        at_ticket (str): ``"continue"``, ``"stop"``, ``"prune"`` or ``"shrink"``.
        over (int, optional): Steps that pruning takes, see :meth:`WormOptimizer.prune`
            (default: 0).
        scatter (bool, optional): Passed on to :meth:`WormOptimizer.shrink` (default: False).
        multiple_of (int, optional): Likewise (default: 1).
        copies (sequence of nn.Module, optional): Copies of the optimizer's model, such as averages
            of its weights, that are pruned and shrunk with it (default: none).

    Raises:
        TypeError: If ``over`` is not a number.
        ValueError: If ``at_ticket`` is none of the four, or ``over`` not a whole number of at
            least 0.
        RuntimeError: If it is ``"shrink"``, and there are several processes.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> opt = WormOptimizer(sgd, model, sample_every=None, window=2)
        >>> reporter = Reporter(opt, "prune")
        >>> _ = model.weight.data.copy_(torch.tensor([1.0, 2.0]))
        >>> _ = opt.sample(), model.weight.data.mul_(2), opt.sample()
        >>> for report in reporter.news():
        ...     print(report)
        {'worm/phase': 0}
        {'worm/phase': 4, 'worm/max_distance': 0.0, 'worm/mean_distance': 0.0,
         'worm/ticket_step': 0, 'worm/kept/weight': 0.5}
        >>> list(reporter.news())
        []
    """

    def __init__(
        self,
        optimizer: WormOptimizer,
        at_ticket: str,
        over: int = 0,
        *,
        scatter: bool = False,
        multiple_of: int = 1,
        copies: Sequence[nn.Module] = (),
    ) -> None:
        self.optimizer = optimizer
        self.at_ticket, self.over = check_at_ticket(at_ticket, over)
        self.scatter, self.multiple_of, self.copies = scatter, multiple_of, copies
        # Where a run was shrunk before it was resumed, they have been pruned and cut as well.
        self._copies_are_pruned = self._is_shrunk
        self._n_told = len(optimizer.history)
        # What a trainer wraps for several processes has planned its messages by then.
        if at_ticket == "shrink" and _n_processes() > 1:
            raise RuntimeError(
                '`at_ticket="shrink"` is for one process, and there are '
                f'{_n_processes()}. Pass "prune", and shrink when training is over.'
            )

    def news(self, inputs: Any = None, *, at_end: bool = False) -> Iterator[dict[str, float]]:
        """Prune if that is due, report on the masks drawn since the last call, and shrink if due.

        Args:
            inputs (optional): What to shrink with: a tensor, a tuple of positional arguments, or a
                dict of keyword arguments of the model. None never shrinks (default: None).
            at_end (bool, optional): Whether training is over, so that a fade ends now
                (default: False).

        Yields:
            For each mask drawn: the phase as its index in :class:`Phase`, the largest and the mean
            distance once the window is full, and with the ticket its step and the share that it
            keeps of each parameter. Once shrunk, the figures of the :class:`ShrinkReport`.

        Raises:
            RuntimeError: If the network cannot be shrunk, after all else is reported.
        """
        if self.at_ticket in ("prune", "shrink") and self.optimizer.converged:
            # A second call lengthens nothing, and what is left at the end has no steps to fade in.
            self.optimizer.prune(0 if at_end else self.over)
        if at_end:
            self.hold_()
        self._prune_copies_()
        samples = self.optimizer.history[self._n_told :]
        self._n_told += len(samples)
        for sample in samples:
            report: dict[str, float] = {"worm/phase": PHASES.index(sample.phase)}
            if sample.max_distance is not None and sample.mean_distance is not None:
                report["worm/max_distance"] = sample.max_distance
                report["worm/mean_distance"] = sample.mean_distance
            ticket = self.optimizer.final_mask if sample.phase.converged else None
            if ticket is not None:
                report["worm/phase"] = PHASES.index(self.optimizer.phase)
                report["worm/ticket_step"] = sample.step
                for name, mask in ticket.items():
                    report[f"worm/kept/{name}"] = int(mask.count_nonzero()) / mask.numel()
            yield report
        if inputs is not None and self.shrinks and self.optimizer.phase is Phase.PRUNED:
            yield self._shrink(inputs)

    def hold_(self) -> None:
        """Set what the ticket removes to zero once more, if the model is pruned.

        A trainer may have put other weights into it, such as an average or the best checkpoint.
        """
        if self.optimizer.phase is Phase.PRUNED:
            self.optimizer._hold_at_zero_(self.optimizer._entries())

    def _prune_copies_(self) -> None:
        """Prune the copies, once the model is pruned; averaging zeros leaves them so."""
        if self._copies_are_pruned or self.optimizer.phase is not Phase.PRUNED:
            return
        ticket = self.optimizer.ticket
        if ticket is not None:
            for each in self.copies:
                apply_ticket_(each, ticket)
        self._copies_are_pruned = True

    def _shrink(self, inputs: Any) -> dict[str, float]:
        """Shrink with inputs on the model's device, and return the figures."""
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = () if kwargs else inputs if isinstance(inputs, tuple) else (inputs,)
        device = self.optimizer.param_groups[0]["params"][0].device
        args, kwargs = tree_map_only(Tensor, lambda each: each.to(device), (args, kwargs))
        report = self.optimizer.shrink(
            *args, scatter=self.scatter, multiple_of=self.multiple_of, **kwargs
        )
        for each in self.copies:
            report.apply_(each)
        return {f"worm/{name}": value for name, value in report.as_dict().items()}

    @property
    def shrinks(self) -> bool:
        """Whether the network is to be shrunk, now or later; once it is, a resumed one too, no."""
        return self.at_ticket == "shrink" and not self._is_shrunk

    @property
    def _is_shrunk(self) -> bool:
        """Whether the network was shrunk, now or before the run was resumed."""
        held = self.optimizer._search.ticket
        return held is not None and held.is_shrunk

    @property
    def stops(self) -> bool:
        """Whether training is to stop now."""
        return self.at_ticket == "stop" and self.optimizer.converged


def check_at_ticket(at_ticket: str, over: int) -> tuple[str, int]:
    """Refuse an ``at_ticket`` that is none of the four, and steps that cannot be counted.

    Args:
        at_ticket: What the user passed.
        over: The steps that pruning takes, as the user passed them.

    Returns:
        The same.

    Raises:
        TypeError: If ``over`` is not a number.
        ValueError: If ``at_ticket`` is none of the four, or ``over`` not a whole number of at
            least 0.
    """
    at_ticket = check_choice("at_ticket", at_ticket, ("continue", "stop", "prune", "shrink"))
    return at_ticket, check_count("over", over, least=0)


def _n_processes() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()
