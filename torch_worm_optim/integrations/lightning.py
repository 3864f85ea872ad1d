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

from torch_worm_optim import WormOptimizer
from torch_worm_optim.integrations.reports import (
    AtTicket,
    Call,
    Reporter,
    first_of,
    one_example,
    unwrapped,
)


class WormCallback(Callback):
    """Log phase, distances and ticket to the trainer's loggers, and act at the ticket.

    Each mask is logged once, at ``trainer.global_step``, whatever ``log_every_n_steps`` says:
    ``worm/phase`` (0 searching, 1 truncating, 2 converged, 3 pruned), ``worm/max_distance`` and
    ``worm/mean_distance``; with the ticket ``worm/ticket_step`` and the share that it keeps of each
    representative, ``worm/kept/<name>``; after shrinking the figures of the
    :class:`~torch_worm_optim.ShrinkReport`, such as ``worm/parameters_after``. With several
    ``WormOptimizer`` the names begin with ``worm0/``, ``worm1/`` and so on, in the order of
    ``trainer.optimizers``.

    Averages of the weights that other callbacks keep in an ``AveragedModel``, as Lightning's
    ``WeightAveraging`` does, are pruned and shrunk with the model. What ``fit()`` leaves in a
    pruned model is pruned.

    Args:
        at_ticket (str, optional): What to do once the ticket is found: ``"continue"`` training,
            ``"stop"`` it, ``"prune"`` and train on, or prune, ``"shrink"`` and train on. Several
            optimizers are each pruned at their own ticket, and training stops at the last one
            (default: ``"continue"``).
        inputs (optional): What ``"shrink"`` calls the optimizer's model with: a tensor, a tuple of
            positional arguments, or a dict of keyword arguments. None is the first example of what
            training calls it with, where it is a part of the module, such as one network of
            several. Of the module itself it is its ``example_input_array`` if it has one, else the
            first example of the first batch, or of the batch's first element if it is a tuple or
            list (default: None).
        scatter (bool, optional): Passed on to :meth:`~torch_worm_optim.WormOptimizer.shrink`
            (default: False).
        multiple_of (int, optional): Passed on as well (default: 1).

    Raises:
        ValueError: If ``at_ticket`` is none of the four; or, when training starts, if none of the
            trainer's optimizers is a ``WormOptimizer`` or a batch does not say what to shrink with.
        RuntimeError: If the network cannot be shrunk; or, when training starts, if it was to be
            shrunk on several processes.
    """

    def __init__(
        self,
        at_ticket: str = "continue",
        *,
        inputs: Any = None,
        scatter: bool = False,
        multiple_of: int = 1,
    ) -> None:
        self.at_ticket = AtTicket(at_ticket, inputs, scatter, multiple_of)
        self._inputs: list[Any] = []  # one for each of the reporters
        self._reporters: list[Reporter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers; checkpoints are loaded by now."""
        found = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        self._reporters = [
            Reporter(each, self.at_ticket, _averages(trainer, pl_module, each.model))
            for each in found
            if isinstance(each, WormOptimizer)
        ]
        self._inputs = [self.at_ticket.inputs] * len(self._reporters)
        for index, reporter in enumerate(self._reporters):
            if self._inputs[index] is None and reporter.shrinks:
                self._watch(index, reporter.optimizer.model, pl_module)
        if not self._reporters:
            raise ValueError(
                "WormCallback needs a WormOptimizer among the trainer's optimizers, got "
                f"{[type(each).__name__ for each in found]}. Return one from "
                "configure_optimizers(): WormOptimizer(SGD(self.parameters(), lr=0.1), self)."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the masks that this batch's step drew, and act if one is the ticket."""
        for index, reporter in enumerate(self._reporters):
            # The first batch already, so that one of no use says so before hours of training. A
            # part may not have been called yet; one that has its ticket is called by other names.
            is_due = reporter.optimizer.model is pl_module or reporter.optimizer.converged
            if self._inputs[index] is None and reporter.shrinks and is_due:
                self._inputs[index] = one_example(batch)
        self._log(trainer)
        if all(reporter.stops for reporter in self._reporters):
            trainer.should_stop = True

    def _watch(self, index: int, model: nn.Module, pl_module: LightningModule) -> None:
        """Take what a model is called with first, or the example of the module itself."""
        if model is pl_module:
            self._inputs[index] = pl_module.example_input_array
            return

        def take(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handle.remove()
            self._inputs[index] = first_of(Call(args, kwargs))

        handle = model.register_forward_pre_hook(take, with_kwargs=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was drawn after the last batch, as ``opt.sample()`` at the end of epochs is."""
        self._hold_()
        self._log(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune what callbacks of any order have put into the model when training ended."""
        self._hold_()

    def _hold_(self) -> None:
        for reporter in self._reporters:
            reporter.hold_()

    def _log(self, trainer: Trainer) -> None:
        for index, reporter in enumerate(self._reporters):
            prefix = "worm/" if len(self._reporters) == 1 else f"worm{index}/"
            for row in reporter.new_metrics(self._inputs[index]):
                named = {name.replace("worm/", prefix, 1): value for name, value in row.items()}
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
