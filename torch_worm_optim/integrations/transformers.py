"""A callback of transformers' Trainer that logs the search, and acts at the ticket."""

from __future__ import annotations

from typing import Any

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise ImportError(
        "torch_worm_optim.integrations.transformers needs transformers, which cannot be imported "
        f'({error}). Install it: pip install "torch-worm-optim[transformers]"'
    ) from error

from torch_worm_optim import Phase, WormOptimizer
from torch_worm_optim.integrations.reports import AtTicket, Reporter, unwrapped


class WormCallback(TrainerCallback):
    """Log phase, distances and ticket to what the Trainer reports to, and act at the ticket.

    Each mask is logged once with ``trainer.log()``, whatever ``logging_steps`` says, and is in
    ``trainer.state.log_history`` too: ``worm/phase`` (0 searching, 1 truncating, 2 converged,
    3 pruned), ``worm/max_distance`` and ``worm/mean_distance``; with the ticket
    ``worm/ticket_step`` and the share that it keeps of each representative, ``worm/kept/<name>``;
    after shrinking the figures of the :class:`~torch_worm_optim.ShrinkReport`, such as
    ``worm/parameters_after``.

    Once the model is pruned, ``load_best_model_at_end`` looks for the best checkpoint among those
    that follow, and what it loads is pruned.

    Args:
        trainer (Trainer): The Trainer that it is added to; callbacks are not told whose they are,
            and only ``trainer.log()`` reaches all that it reports to.
        at_ticket (str, optional): What to do once the ticket is found: ``"continue"`` training,
            ``"stop"`` it, ``"prune"`` and train on, or prune, ``"shrink"`` and train on
            (default: ``"continue"``).
        inputs (optional): What ``"shrink"`` calls the optimizer's model with, and needs: a tensor,
            a tuple of positional arguments, or a dict of keyword arguments (default: None).
        scatter (bool, optional): Passed on to :meth:`~torch_worm_optim.WormOptimizer.shrink`
            (default: False).
        multiple_of (int, optional): Passed on as well (default: 1).

    Raises:
        ValueError: If ``at_ticket`` is none of the four, or ``"shrink"`` without ``inputs``; or,
            when training starts, if the Trainer's optimizer is not a ``WormOptimizer``.
        RuntimeError: If the network cannot be shrunk; or, when training starts, if it was to be
            shrunk on several processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        at_ticket: str = "continue",
        *,
        inputs: Any = None,
        scatter: bool = False,
        multiple_of: int = 1,
    ) -> None:
        self.trainer = trainer
        self.at_ticket = AtTicket(at_ticket, inputs, scatter, multiple_of)
        if at_ticket == "shrink" and inputs is None:
            raise ValueError(
                '`at_ticket="shrink"` needs `inputs`, since the Trainer shows its callbacks no '
                "batch. Pass one example: a tensor, a tuple, or a dict of keyword arguments of the "
                "model."
            )
        self._reporter: Reporter | None = None
        self._was_pruned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer; checkpoints are loaded by now."""
        found = unwrapped(kwargs.get("optimizer"))
        if not isinstance(found, WormOptimizer):
            raise ValueError(
                "WormCallback needs the Trainer's optimizer to be a WormOptimizer, got "
                f"{type(found).__name__}. Pass one: Trainer(..., optimizers=("
                "WormOptimizer(AdamW(model.parameters()), model), None))."
            )
        self._reporter = Reporter(found, self.at_ticket)
        self._was_pruned = found.phase is Phase.PRUNED

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the masks that this step drew, and act if one is the ticket."""
        if self._reporter is None:
            return
        self._log(self._reporter, control)
        if self._reporter.stops:
            control.should_training_stop = True
        if self._reporter.optimizer.phase is Phase.PRUNED and not self._was_pruned:
            # What was best before is another network: dense, or of other shapes if this is shrunk.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            self._was_pruned = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what was drawn after the last step, as ``opt.sample()`` at the end of epochs is."""
        if self._reporter is not None:
            self._reporter.hold_()
            self._log(self._reporter, control)

    def _log(self, reporter: Reporter, control: TrainerControl) -> None:
        # Logging says that what was to be logged is, and the Trainer's own log may be due as well.
        due = control.should_log
        for row in reporter.new_metrics(self.at_ticket.inputs):
            self.trainer.log(row)
        control.should_log = due
