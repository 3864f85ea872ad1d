"""What the callbacks of all trainers share: what is new in a search, as numbers for a logger."""

from __future__ import annotations

from torch_worm_optim.arguments import check_choice, check_count
from torch_worm_optim.optimizer import WormOptimizer
from torch_worm_optim.search import Phase

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


class Reporter:
    """Watch one search: act at its ticket, and tell what is new since the last time.

    Samples from before the reporter was made are not told: a resumed run has logged them already.

    Args:
        optimizer (WormOptimizer): Whose search to watch.
        at_ticket (str): ``"continue"``, ``"stop"`` or ``"prune"``.
        over (int, optional): Steps that ``"prune"`` takes, see :meth:`WormOptimizer.prune`
            (default: 0).

    Raises:
        TypeError: If ``over`` is not a number.
        ValueError: If ``at_ticket`` is none of the three, or ``over`` not a whole number of at
            least 0.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> opt = WormOptimizer(sgd, model, sample_every=None, window=2)
        >>> reporter = Reporter(opt, "prune")
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([1.0, 2.0]))
        >>> _ = opt.sample(), opt.sample()
        >>> for report in reporter.news():
        ...     print(report)
        {'worm/phase': 0}
        {'worm/phase': 4, 'worm/max_distance': 0.0, 'worm/mean_distance': 0.0,
         'worm/ticket_step': 0, 'worm/kept/weight': 0.5}
        >>> reporter.news()
        []
    """

    def __init__(self, optimizer: WormOptimizer, at_ticket: str, over: int = 0) -> None:
        self.optimizer = optimizer
        self.at_ticket, self.over = check_at_ticket(at_ticket, over)
        self._n_told = len(optimizer.history)

    def news(self) -> list[dict[str, float]]:
        """Prune if that is due, and return the reports on the masks drawn since the last call.

        Returns:
            For each mask drawn: the phase as its index in :class:`Phase`, the largest and the mean
            distance once the window is full, and with the ticket its step and the share that it
            keeps of each parameter.
        """
        if self.at_ticket == "prune" and self.optimizer.converged:
            self.optimizer.prune(self.over)  # A second call lengthens nothing.
        samples = self.optimizer.history[self._n_told :]
        self._n_told += len(samples)
        reports: list[dict[str, float]] = []
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
            reports.append(report)
        return reports

    @property
    def stops(self) -> bool:
        """Whether training is to stop now."""
        return self.at_ticket == "stop" and self.optimizer.converged


def check_at_ticket(at_ticket: str, over: int) -> tuple[str, int]:
    """Refuse an ``at_ticket`` that is none of the three, and steps that cannot be counted.

    Args:
        at_ticket: What the user passed.
        over: The steps that ``"prune"`` takes, as the user passed them.

    Returns:
        The same.

    Raises:
        TypeError: If ``over`` is not a number.
        ValueError: If ``at_ticket`` is none of the three, or ``over`` not a whole number of at
            least 0.
    """
    at_ticket = check_choice("at_ticket", at_ticket, ("continue", "stop", "prune"))
    return at_ticket, check_count("over", over, least=0)
