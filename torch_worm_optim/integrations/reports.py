"""What the callbacks share: acting at the ticket, and a search as numbers for a logger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_worm_optim import Phase, WormOptimizer, apply_ticket_
from torch_worm_optim._checks import check_choice

# What `worm/phase` numbers.
PHASES = (Phase.SEARCHING, Phase.TRUNCATING, Phase.CONVERGED, Phase.PRUNED)


class Call(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class AtTicket:
    """What to do once the ticket is found, and how to shrink if that is it."""

    action: str = "continue"
    inputs: Any = None
    scatter: bool = False
    multiple_of: int = 1

    def __post_init__(self) -> None:
        check_choice("at_ticket", self.action, ("continue", "stop", "prune", "shrink"))


class Reporter:
    """Watch one search: act at its ticket, and tell what is new since the last call."""

    def __init__(
        self, optimizer: WormOptimizer, at_ticket: AtTicket, copies: Sequence[nn.Module] = ()
    ) -> None:
        self.optimizer, self.at_ticket, self.copies = optimizer, at_ticket, copies
        # A resumed run has logged these samples, and cut these copies, before its checkpoint.
        self._n_logged = len(optimizer.history)
        self._ticket_is_logged = optimizer.converged
        self._copies_are_pruned = optimizer.is_shrunk
        # What a trainer wraps for several processes has planned its messages by then.
        if at_ticket.action == "shrink" and _n_processes() > 1:
            raise RuntimeError(
                '`at_ticket="shrink"` is for one process, and there are '
                f'{_n_processes()}. Pass "prune", and shrink when training is over.'
            )

    def new_metrics(self, inputs: Any = None) -> Iterator[dict[str, float]]:
        """Prune if due, yield a row for each new mask, and shrink if due and there are inputs."""
        opt = self.optimizer
        if self.at_ticket.action in ("prune", "shrink") and opt.phase is Phase.CONVERGED:
            opt.prune()
        self._prune_copies_()
        samples = opt.history[self._n_logged :]
        self._n_logged += len(samples)
        ticket_is_new = opt.converged and not self._ticket_is_logged
        if ticket_is_new and not samples:  # prune(force=True) took a mask that is logged already.
            samples = opt.history[-1:]
        for sample in samples:
            row: dict[str, float] = {"worm/phase": PHASES.index(sample.phase)}
            if sample.max_distance is not None and sample.mean_distance is not None:
                row["worm/max_distance"] = sample.max_distance
                row["worm/mean_distance"] = sample.mean_distance
            if ticket_is_new and sample is samples[-1]:
                row["worm/phase"] = PHASES.index(opt.phase)
                row["worm/ticket_step"] = sample.step
                for each in opt.kept_counts():
                    row[f"worm/kept/{each.name}"] = (each.kept or 0) / max(1, each.numel)
            yield row
        self._ticket_is_logged = opt.converged
        if inputs is not None and self.shrinks and opt.phase is Phase.PRUNED:
            yield self._shrink(inputs)

    def hold_(self) -> None:
        """Prune once more what a trainer has put into a pruned model, such as an average."""
        if self.optimizer.phase is Phase.PRUNED:
            self.optimizer.prune()

    def _prune_copies_(self) -> None:
        """Prune the copies, once the model is pruned; averaging zeros leaves them so."""
        if self._copies_are_pruned or self.optimizer.phase is not Phase.PRUNED:
            return
        for each in self.copies:
            apply_ticket_(each, self.optimizer.final_mask or {})
        self._copies_are_pruned = True

    def _shrink(self, inputs: Any) -> dict[str, float]:
        """Shrink with inputs on the model's device, and return the figures."""
        if isinstance(inputs, Call):
            args, kwargs = inputs
        else:
            kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
            args = () if kwargs else inputs if isinstance(inputs, tuple) else (inputs,)
        device = self.optimizer.param_groups[0]["params"][0].device
        args, kwargs = tree_map_only(Tensor, lambda each: each.to(device), (args, kwargs))
        scatter, multiple_of = self.at_ticket.scatter, self.at_ticket.multiple_of
        report = self.optimizer.shrink(*args, scatter=scatter, multiple_of=multiple_of, **kwargs)
        for each in self.copies:
            report.apply_(each)
        return {f"worm/{name}": value for name, value in report.as_dict().items()}

    @property
    def shrinks(self) -> bool:
        """Whether the network is still to be shrunk, now or later."""
        return self.at_ticket.action == "shrink" and not self.optimizer.is_shrunk

    @property
    def stops(self) -> bool:
        """Whether training is to stop now."""
        return self.at_ticket.action == "stop" and self.optimizer.converged


def unwrapped(optimizer: object) -> object:
    """The WormOptimizer inside what a trainer puts around it, else the innermost optimizer."""
    while not isinstance(optimizer, WormOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def one_example(batch: Any) -> Any:
    """A copy of the first row of a batch's inputs, to shrink with."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, (Tensor, Mapping)):
        raise ValueError(
            f"A batch of type {type(batch).__name__} does not say what the model's inputs are, and "
            "shrinking needs some. Pass `inputs=` to WormCallback."
        )
    first = dict(first) if isinstance(first, Mapping) else first
    return tree_map_only(Tensor, lambda each: each[:1].clone() if each.dim() else each, first)


def first_of(call: Call) -> Call:
    """A copy of the first row of what a model is called with, of all that has as many rows."""
    sizes = [len(each) for each in tree_leaves(call) if isinstance(each, Tensor) and each.dim()]

    def first(each: Tensor) -> Tensor:
        has_rows = each.dim() > 0 and len(each) == sizes[0]
        return (each[:1] if has_rows else each).detach().clone()

    return Call(*tree_map_only(Tensor, first, tuple(call)))


def _n_processes() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()
