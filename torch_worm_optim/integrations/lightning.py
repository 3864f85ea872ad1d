"""A Lightning callback that logs the search, and stops, prunes or shrinks at the ticket."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "torch_worm_optim.integrations.lightning needs Lightning, which cannot be imported "
        f'({error}). Install it: pip install "torch-worm-optim[lightning]"'
    ) from error

from torch_worm_optim.integrations.reports import (
    Reporter,
    check_at_ticket,
    one_example,
    unwrapped,
)
from torch_worm_optim.optimizer import WormOptimizer


class WormCallback(Callback):
    """Log phase, distances and ticket to the trainer's loggers, and act at the ticket.

    Each mask drawn is logged once, at ``trainer.global_step``, whatever ``log_every_n_steps`` says:
    ``worm/phase`` (0 searching, 1 truncating, 2 converged, 3 fading, 4 pruned),
    ``worm/max_distance`` and ``worm/mean_distance``; with the ticket ``worm/ticket_step`` and, for
    each parameter, the share that it keeps as ``worm/kept/<name>``; once shrunk, the figures of the
    :class:`~torch_worm_optim.ShrinkReport`, such as ``worm/parameters_after``. With several
    ``WormOptimizer`` the names begin with ``worm0/``, ``worm1/`` and so on, in the order of
    ``trainer.optimizers``.

    Averages that other callbacks keep of the weights in an ``AveragedModel``, as Lightning's
    ``WeightAveraging`` does, are pruned and shrunk with the model. When training ends, a fade is
    finished, and what ``fit()`` leaves in a model that is pruned is pruned.

    Args:
        at_ticket (str, optional): What to do once the ticket is found, all of them if there are
            several optimizers: ``"continue"`` training, ``"stop"`` it, ``"prune"`` and train on, or
            prune, ``"shrink"`` once pruned, and train on (default: ``"continue"``). Each optimizer
            is pruned when its own ticket is found.
        over (int, optional): Optimizer steps in which ``"prune"`` and ``"shrink"`` fade what the
            ticket removes to zero; 0 is at once (default: 0).
        inputs (optional): What ``"shrink"`` calls the optimizer's model with: a tensor, a tuple of
            positional arguments, or a dict of keyword arguments. None is the module's
            ``example_input_array`` if it has one, else one example of the first batch: of its
            first element if that is a tuple or list (default: None).
        scatter (bool, optional): Passed on to :meth:`~torch_worm_optim.WormOptimizer.shrink`
            (default: False).
        multiple_of (int, optional): Likewise (default: 1).

    Raises:
        TypeError: If ``over`` is not a number.
        ValueError: If ``at_ticket`` is none of the four, ``over`` not a whole number of at least
            0, or, when training starts, if none of the trainer's optimizers is a
            ``WormOptimizer`` or a batch does not say what to shrink with.
        RuntimeError: If the network cannot be shrunk, or, when training starts, if it was to be on
            several processes.
    """

    def __init__(
        self,
        at_ticket: str = "continue",
        *,
        over: int = 0,
        inputs: Any = None,
        scatter: bool = False,
        multiple_of: int = 1,
    ) -> None:
        self.at_ticket, self.over = check_at_ticket(at_ticket, over)
        self.inputs, self.scatter, self.multiple_of = inputs, scatter, multiple_of
        self._example: Any = None
        self._reporters: list[Reporter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers; checkpoints are loaded by now."""
        found = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        self._reporters = [
            Reporter(
                each,
                self.at_ticket,
                self.over,
                scatter=self.scatter,
                multiple_of=self.multiple_of,
                copies=_averages(trainer, pl_module, each._layout.model),
            )
            for each in found
            if isinstance(each, WormOptimizer)
        ]
        self._example = pl_module.example_input_array if self.inputs is None else self.inputs
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
        # The first batch already, so that one of no use says so before hours of training.
        if self._example is None and any(reporter.shrinks for reporter in self._reporters):
            self._example = one_example(batch)
        self._report(trainer)
        if all(reporter.stops for reporter in self._reporters):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was drawn after the last batch, as ``opt.sample()`` at the end of epochs is."""
        self._report(trainer, at_end=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune what callbacks of any order have put into the model when training ended."""
        for reporter in self._reporters:
            reporter.hold_()

    def _report(self, trainer: Trainer, *, at_end: bool = False) -> None:
        for index, reporter in enumerate(self._reporters):
            prefix = "worm/" if len(self._reporters) == 1 else f"worm{index}/"
            for report in reporter.news(self._example, at_end=at_end):
                named = {name.replace("worm/", prefix, 1): value for name, value in report.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(named, step=trainer.global_step)


def _averages(trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> list[nn.Module]:
    """The averages of a part of the module that callbacks keep, and checkpoints hold instead."""
    return [
        average.module.get_submodule(name)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for average in vars(callback).values()
        if isinstance(average, AveragedModel) and isinstance(average.module, type(pl_module))
        for name, part in pl_module.named_modules()
        if part is model
    ]
