"""A Lightning callback that logs the search, and stops training or prunes at the ticket."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "torch_worm_optim.integrations.lightning needs Lightning, which cannot be imported "
        f'({error}). Install it: pip install "torch-worm-optim[lightning]"'
    ) from error

from torch_worm_optim.integrations.reports import Reporter, check_at_ticket, unwrapped
from torch_worm_optim.optimizer import WormOptimizer


class WormCallback(Callback):
    """Log phase, distances and ticket to the trainer's loggers, and act at the ticket.

    Each mask drawn is logged once, at ``trainer.global_step``, whatever ``log_every_n_steps`` says:
    ``worm/phase`` (0 searching, 1 truncating, 2 converged, 3 fading, 4 pruned),
    ``worm/max_distance`` and ``worm/mean_distance``; with the ticket ``worm/ticket_step`` and, for
    each parameter, the share that it keeps as ``worm/kept/<name>``. With several ``WormOptimizer``
    the names begin with ``worm0/``, ``worm1/`` and so on, in the order of ``trainer.optimizers``.

    Args:
        at_ticket (str, optional): What to do once the ticket is found, all of them if there are
            several optimizers: ``"continue"`` training, ``"stop"`` it, or ``"prune"`` and train on
            (default: ``"continue"``). Each optimizer is pruned when its own ticket is found.
        over (int, optional): Optimizer steps in which ``"prune"`` fades what the ticket removes to
            zero; 0 is at once (default: 0).

    Raises:
        TypeError: If ``over`` is not a number.
        ValueError: If ``at_ticket`` is none of the three, ``over`` not a whole number of at least
            0, or, when training starts, if none of the trainer's optimizers is a
            ``WormOptimizer``.
    """

    def __init__(self, at_ticket: str = "continue", *, over: int = 0) -> None:
        self.at_ticket, self.over = check_at_ticket(at_ticket, over)
        self._reporters: list[Reporter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers; checkpoints are loaded by now."""
        found = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        self._reporters = [
            Reporter(each, self.at_ticket, self.over)
            for each in found
            if isinstance(each, WormOptimizer)
        ]
        if not self._reporters:
            raise ValueError(
                "WormCallback needs a WormOptimizer among the trainer's optimizers, got "
                f"{[type(each).__name__ for each in found]}. Return one from "
                "configure_optimizers(): WormOptimizer(SGD(self.parameters(), lr=0.1), self)."
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the masks that this batch's step drew, and act if one is the ticket."""
        self._report(trainer)
        if all(reporter.stops for reporter in self._reporters):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was drawn after the last batch, as ``opt.sample()`` at the end of epochs is."""
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        for index, reporter in enumerate(self._reporters):
            prefix = "worm/" if len(self._reporters) == 1 else f"worm{index}/"
            for report in reporter.news():
                named = {name.replace("worm/", prefix, 1): value for name, value in report.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(named, step=trainer.global_step)
