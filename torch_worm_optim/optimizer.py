"""``WormOptimizer``: any torch optimizer, with a search for the ticket inside ``step()``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from torch_worm_optim._binding import Binding
from torch_worm_optim._checks import warn_once
from torch_worm_optim._state import State, insert_record, pop_record, read_record
from torch_worm_optim._wrapper import (
    Closure,
    OptimizerWrapper,
    check_wrappable,
    refuse_capture,
)
from torch_worm_optim.distributed import reshard_
from torch_worm_optim.report import KeptCount, description, narrow_layers, summary_text
from torch_worm_optim.search import MaskSample, MaskSearch, Phase, SearchSettings
from torch_worm_optim.selectors import Representative, Selector, select, warn_of_zeros
from torch_worm_optim.shrink import ShrinkReport, shrink_
from torch_worm_optim.ticket import Restraint, Ticket, is_normalising, warn_if_normalising

logger = logging.getLogger(__name__)

# torch.compile leaves alone what is marked so. A search is Python that branches on counts and on
# numbers read back: traced, it would be compiled anew at each mask and phase. The public name,
# torch.compiler.disable, makes torch load its compiler as soon as this file is imported, for
# seconds; this one, which torch.optim uses for itself, makes it at the first call.
_untraced = _disable_dynamo


class WormOptimizer(OptimizerWrapper):
    r"""Wrap an optimizer so that it finds, while training, which part of the network can go.

    Every ``sample_every`` steps a mask is drawn that removes the lowest ``prune_ratio`` of the
    representative entries, and a window holds the last masks. With *d* the distances from the
    newest mask to the others, this is Algorithm 1 of the WORM paper [1]:

    .. math::

        \max_j d_j < s &\;\Rightarrow\; \text{converged: the newest mask is the ticket} \\
        \operatorname{mean}_j d_j < s + \delta &\;\Rightarrow\; \nabla_t = r\,\nabla
        \text{ on removed entries}

    Before that every step is the base optimizer's own, bit for bit; with ``truncation=1`` all steps
    are, and the search is EB Train's [2]. In every mask **True = kept**.

    Args:
        base_optim (Optimizer): The optimizer that trains ``model``; its ``param_groups`` and
            ``state`` are shared, not copied. A ``WormOptimizer`` that has pruned ``model`` holds
            its ticket in each step of a second search.
        model (nn.Module): The model that it trains.
        selector (Selector, optional): Which parameters represent the network: a callable
            ``model -> list of Representative`` (default: BatchNorm scales if there are any, else
            query and key weights). Those that do not require a gradient are left out.
        prune_ratio (float, optional): *p*, share of the entries that a mask removes, in [0, 1)
            (default: 0.5).
        stopping_point (float, optional): *s*, in [0, 1]; 0 never stops (default: 0.1).
        margin (float, optional): *δ*, in [0, 1]; ``stopping_point + margin`` is the trigger point
            (default: 0.05).
        window (int, optional): *l*, how many masks are compared, the newest counted; at least 2
            (default: 5).
        truncation (float, optional): *r*, in [0, 1], what is left of the gradient (or update) of
            an entry that the newest mask removes; 1 does not truncate (default: 3e-3).
        sample_every (int or callable, optional): Optimizer steps between masks, or a callable that
            is given the number of steps taken and says whether to draw one; None draws only when
            :meth:`sample` is called. The paper draws one mask per epoch (default: 200).
        scope (str, optional): ``"global"`` ranks all entries together, ``"layer"`` each
            representative alone, ``"selector"`` what each selector of a union ``a | b`` found
            (default: ``"layer"``).
        min_keep (int or float, optional): How many entries of each representative always survive,
            or, in (0, 1), which share of them; at least one then (default: 1).
        truncate (str, optional): ``"gradient"`` scales what the base optimizer sees, as the paper
            does; ``"update"`` scales what it does, which means the same under every optimizer
            (default: ``"update"`` where the base optimizer normalises gradients, as Adam does, else
            ``"gradient"``).
        trigger (str, optional): ``"distance"`` truncates from the trigger point on; ``"always"``
            from the first mask on (default: ``"distance"``).
        fade (float, optional): *f*, in (0, 1], what is left of a removed entry from one mask to the
            next while truncating: it is multiplied by ``f ** (1 / n)`` after each of the *n* steps
            between. 1 is the paper's algorithm. With ``truncation=1`` nothing fades (default: 0.1).
        ticket (dict, optional): :attr:`final_mask` of another run, applied now and held: the phase
            is ``PRUNED`` from the start, nothing is searched, and the selector only adds followers
            that the ticket lacks, such as the shifts of BatchNorm scales (default: None).

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of its range, nothing is selected, a parameter is selected
            twice, the base optimizer does not own a selected parameter that requires a gradient,
            its ``state_dict()`` is not of torch's form, or the ticket is for another model.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> opt = WormOptimizer(sgd, model, sample_every=5)  # instead of opt = sgd
        >>> x, y = torch.randn(64, 4), torch.randint(2, (64,))
        >>> while not opt.converged:
        ...     opt.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     _ = opt.step()
        >>> {name: int(mask.sum()) for name, mask in opt.final_mask.items()}
        {'1.weight': 4, '1.bias': 4}
        >>> opt.prune()
        >>> opt.shrink(x).parameters, model[0].out_features
        ((74, 38), 4)

    References:
        [1] Vasudev, "The EarlyBird Gets the WORM", PMLR 262, 2024, https://arxiv.org/abs/2406.11872

        [2] You et al., "Drawing Early-Bird Tickets", ICLR 2020, https://arxiv.org/abs/1909.11957
    """

    def __init__(
        self,
        base_optim: Optimizer,
        model: nn.Module,
        selector: Selector | None = None,
        *,
        prune_ratio: float = 0.5,
        stopping_point: float = 0.1,
        margin: float = 0.05,
        window: int = 5,
        truncation: float = 3e-3,
        sample_every: int | Callable[[int], bool] | None = 200,
        scope: str = "layer",
        min_keep: int | float = 1,
        truncate: str | None = None,
        trigger: str = "distance",
        fade: float = 0.1,
        ticket: Mapping[str, Tensor] | None = None,
    ) -> None:
        first = base_optim if isinstance(base_optim, WormOptimizer) else None
        is_pruned = first is not None and first.phase is Phase.PRUNED and first.model is model
        check_wrappable(base_optim, is_pruned)
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        searches = [] if first is None else first._searches()
        plain = searches[-1].base_optim if searches else base_optim
        self._settings = SearchSettings(
            prune_ratio=prune_ratio,
            stopping_point=stopping_point,
            margin=margin,
            window=window,
            truncation=truncation,
            sample_every=sample_every,
            scope=scope,
            min_keep=min_keep,
            truncate=("update" if is_normalising(plain) else "gradient")
            if truncate is None
            else truncate,
            trigger=trigger,
            fade=fade,
        )
        reshard_(model)
        given = None if ticket is None else Ticket.given(model, ticket, selector)
        self._representatives: list[Representative] = []
        self._n_frozen = 0
        if given is None:
            owned = (each for group in base_optim.param_groups for each in group["params"])
            found = select(selector, model, owned)
            self._representatives, self._n_frozen = found
            if first is None:  # Else the search inside has set to zero what is zero.
                warn_of_zeros(self._representatives, model)
        if self._n_frozen:
            logger.info("%d representatives are frozen and left out", self._n_frozen)
        super().__init__(base_optim)
        names = [part.name for each in self._representatives for part in each.members]
        self._binding = Binding(model, plain, given.masks if given else names)
        # Trainers copy the attributes of this object into proxies of this class. An attribute that
        # a method binds anew on a proxy changes the proxy alone, so whatever changes lives inside
        # of this object, which is never replaced.
        self._state = State(self._new_search(), given)
        if given is not None:
            self._hold(given)
        elif truncation < 1 and truncate == "gradient":
            warn_if_normalising(plain)

    def _searches(self) -> list[WormOptimizer]:
        """This search, and the ones inside of it, which hold their tickets in each step."""
        inner = self.base_optim
        return [self, *(inner._searches() if isinstance(inner, WormOptimizer) else ())]

    def _new_search(self) -> MaskSearch | None:
        """A search without masks; None where there is nothing to search."""
        found = self._representatives
        return MaskSearch(found, self._settings, self._binding) if found else None

    # ---- a step

    @_untraced
    def step(self, closure: Closure | None = None, **kwargs: Any) -> Any:
        """Take one step of the base optimizer, truncated if need be, and draw a mask if one is due.

        Args:
            closure (Callable, optional): Evaluates the model and returns the loss; the gradients
                that it leaves are truncated, however often the base optimizer calls it.
            **kwargs: Passed on to the base optimizer's step, whose result is returned.

        Raises:
            ValueError: If a mask is due and a representative parameter is NaN or infinite. The step
                was taken and counted; no mask was drawn.
            RuntimeError: If a CUDA graph is being captured, or a parameter that the mask applies to
                was reparametrised after the search began.
        """
        refuse_capture()
        if closure is None and self._only_initialises_state():
            return self._step_base(None, **kwargs)
        state = self._state
        phase, restraint = state.phase, self._restraint()
        if restraint is None:
            loss = self._step_base(closure, **kwargs)
        else:
            loss = restraint.step(lambda closure: self._step_base(closure, **kwargs), closure)
        state.step += 1
        if phase is not Phase.PRUNED and state.phase is Phase.PRUNED and state.ticket is not None:
            # The step's closure has called prune(), and the base optimizer went on from there.
            self._hold(state.ticket)
        if not phase.converged and self._settings.is_due(state.step):
            self.sample()
        return loss

    def _restraint(self) -> Restraint | None:
        """What holds removed entries back in the present phase, if anything does."""
        state, settings = self._state, self._settings
        if state.phase is Phase.TRUNCATING and settings.truncation < 1:
            newest = state.history[-1].step
            before = next((s.step for s in reversed(state.history) if s.step < newest), 0)
            n = newest - before  # 0 for a mask before the first step, when nothing says how fast
            factor = settings.fade ** (1 / n) if n else 1.0
            shares = {settings.truncate: settings.truncation, "factor": factor}
        elif state.phase is Phase.PRUNED:
            shares = {"gradient": 0.0, "factor": 0.0}
        else:
            return None
        if state.restraint is None or not state.restraint.is_current():
            ticket = state.ticket or Ticket.newest_of(state.search)
            state.restraint = Restraint(self._binding, ticket, state.warned, **shares)
        return state.restraint

    # ---- a sample

    @_untraced
    def sample(self) -> MaskSample:
        """Draw a mask from the weights as they are now, and let the search decide.

        For a cadence of your own, with ``sample_every=None``: once an epoch, or after each
        validation. If there is a ticket already, or nothing that is ranked has moved since the last
        mask, none is drawn.

        Returns:
            The new :class:`MaskSample`, or the newest one if none is drawn.

        Raises:
            ValueError: If a representative parameter is NaN or infinite; the message names it and
                the search is left as it was.
            RuntimeError: If the base optimizer does not train what is ranked, if that has another
                shape than before, or if a ticket was given and there is nothing to search.
        """
        state, search = self._state, self._state.search
        if search is None and not state.history:
            raise RuntimeError(
                "There is nothing to sample: this optimizer holds the `ticket` that it was given. "
                "Build it without one to search."
            )
        sample = search.sample(state.step, state.phase, state.warned) if search else None
        if sample is None:  # There is a ticket already, or nothing has moved.
            return state.history[-1]
        before = state.phase
        state.history.append(sample)
        state.restraint = None
        self._enter(sample.phase, f" (distances {sample.max_distance}, {sample.mean_distance})")
        if sample.phase.converged:
            self._take_ticket(Ticket.newest_of(search))
        elif sample.phase is not before:
            self._warn_if_narrow("The newest mask")
        elif message := self._settings.never_ends(state.history):
            warn_once(state.warned, "never ends", message)
        return sample

    def _take_ticket(self, ticket: Ticket) -> None:
        """Keep a ticket, and drop the search."""
        self._state.ticket, self._state.search = ticket, None
        self._warn_if_narrow("The ticket")

    def _warn_if_narrow(self, what: str) -> None:
        """Warn, once, of representatives that a mask leaves little of."""
        if message := narrow_layers(self.kept_counts(), self._settings, what):
            warn_once(self._state.warned, "narrow", message)

    def _enter(self, phase: Phase, details: str = "") -> None:
        """Enter a phase, and log it if it is another one."""
        before, self._state.phase = self._state.phase, phase
        if phase is not before:
            logger.info("step %d: %s -> %s%s", self._state.step, before.value, phase.value, details)

    # ---- pruning

    @_untraced
    def prune(self, force: bool = False) -> None:
        """Apply the ticket in place, and hold it from then on.

        Removed entries become zero, in the weights and in the base optimizer's state, and each
        later :meth:`step` holds them there, whatever momentum and weight decay do. Parameters,
        their names and the ``state_dict`` keys stay as they were. Called again, it sets them to
        zero once more, as is needed after other weights were loaded into the model.

        Args:
            force (bool, optional): Whether to take the newest mask as the ticket if the search has
                not found one; its sample in :attr:`history` then has the phase ``PRUNED``
                (default: False).

        Raises:
            RuntimeError: If there is no ticket yet (with ``force``: no mask), or a parameter that
                it applies to was reparametrised or has another shape. Model and optimizer are left
                as they were.
        """
        state = self._state
        if state.ticket is None and not (force and state.history):
            way_out = (
                "or take the newest mask as the ticket: `opt.prune(force=True)`"
                if state.history
                else "or draw a mask with `opt.sample()` and pass `force=True`"
            )
            raise RuntimeError(
                f"There is no ticket to prune with yet: after {len(state.history)} masks the phase "
                f"is {state.phase.value}. Train until `opt.converged`, let the search stop sooner "
                f"with a larger `stopping_point`, {way_out}."
            )
        if isinstance(self.base_optim, WormOptimizer):
            self.base_optim.prune()
        if state.phase is Phase.PRUNED and (restraint := self._restraint()):
            restraint.apply_()
            return
        ticket = state.ticket or Ticket.newest_of(state.search)
        self._hold(ticket)
        if state.ticket is None:
            state.history[-1] = state.history[-1]._replace(phase=Phase.PRUNED)
            self._take_ticket(ticket)

    def _hold(self, ticket: Ticket) -> None:
        """Set what a ticket removes to zero, and hold it there from now on."""
        restraint = Restraint(self._binding, ticket, self._state.warned, gradient=0, factor=0)
        restraint.apply_()
        self._state.restraint = restraint
        self._enter(Phase.PRUNED)

    @_untraced
    def shrink(
        self,
        *args: Any,
        batches: Iterable[Any] = (),
        optimizers: Iterable[Optimizer] = (),
        scatter: bool = False,
        multiple_of: int = 1,
        **kwargs: Any,
    ) -> ShrinkReport:
        """Cut what the ticket has removed out of the network, in place, and train on.

        The network computes and learns what it did, at the speed of the smaller one. Parameters
        stay the objects that they are, and the base optimizer's state is cut as they are. What
        cannot go yet, such as channels of a residual stream that other layers write to, stays zero.

        Args:
            *args: One batch for the model, which is run in evaluation mode.
            batches (Iterable, optional): Further batches, where one does not use all of the model:
                each a tensor, a tuple or a dict of keyword arguments (default: ()).
            optimizers (Iterable, optional): What else trains the model, such as Muon for matrices
                beside AdamW; their state is cut too (default: ()).
            scatter (bool, optional): Whether BatchNorms that write into a wider residual stream are
                narrowed too, see :func:`~torch_worm_optim.shrink_` (default: False).
            multiple_of (int, optional): What sizes that change are a multiple of; 8 suits tensor
                cores in half precision (default: 1).
            **kwargs: Keyword arguments of the model.

        Returns:
            The :class:`~torch_worm_optim.ShrinkReport`.

        Raises:
            RuntimeError: If the network is not pruned, is sharded or wrapped in
                DistributedDataParallel, or would compute something else. Model and optimizer are
                left as they were.
        """
        state = self._state
        if state.phase is not Phase.PRUNED or state.ticket is None:
            raise RuntimeError(
                f"There is nothing to shrink yet: the phase is {state.phase.value}. Call prune() "
                "once `opt.converged`, and shrink then."
            )
        held = [(each, each._state.ticket) for each in self._searches() if each._state.ticket]
        with contextlib.ExitStack() as stack:
            # Other weights may have been loaded since, such as the best of those before pruning.
            for each, ticket in held:
                restraint = Restraint(each._binding, ticket, state.warned, gradient=0, factor=0)
                stack.enter_context(restraint.applied())
            report = shrink_(
                self.model,
                args,
                kwargs,
                optimizer=self._binding.optimizer,
                optimizers=optimizers,
                ticket=_all_kept(ticket for _, ticket in held),
                batches=batches,
                scatter=scatter,
                multiple_of=multiple_of,
            )
        for each, ticket in held:
            each._state.ticket, each._state.restraint = ticket.shrunk(report), None
            each._binding.accept_shapes()
        logger.info("step %d: shrunk from %d parameters to %d", state.step, *report.parameters)
        return report

    # ---- what users read

    @property
    @_untraced
    def phase(self) -> Phase:
        """How far the search is."""
        return self._state.phase

    @property
    def converged(self) -> bool:
        """Whether the ticket is found."""
        return self.phase.converged

    @property
    def history(self) -> list[MaskSample]:
        """All masks drawn so far, one :class:`MaskSample` each; a copy of the list."""
        return list(self._state.history)

    @property
    def final_mask(self) -> dict[str, Tensor] | None:
        """The ticket, a bool mask by parameter name, **True = kept**; None before it is found.

        It holds what is ranked and its followers: all that :meth:`prune` sets to zero. Each mask is
        a copy of its parameter's shape, True at entries that are not ranked. That of a sharded
        parameter is a DTensor that is sharded alike; once the network is shrunk, masks are whole
        and of the shapes before.
        """
        return self.candidate_mask if self.converged else None

    @property
    def candidate_mask(self) -> dict[str, Tensor] | None:
        """The newest mask in the form of :attr:`final_mask`; None before the first sample."""
        ticket, search = self._state.ticket, self._state.search
        if ticket is None and search is not None and search.window.rows:
            ticket = Ticket.newest_of(search)
        return None if ticket is None else ticket.final_mask(self._binding.parameter)

    @property
    def model(self) -> nn.Module:
        """The model that it was built with."""
        return self._binding.model

    @property
    def settings(self) -> SearchSettings:
        """The arguments of the search, as attributes of their names."""
        return self._settings

    @property
    def is_shrunk(self) -> bool:
        """Whether :meth:`shrink` has made the network smaller, in this run or before a resume."""
        return self._state.ticket is not None and self._state.ticket.is_shrunk

    def kept_counts(self) -> list[KeptCount]:
        """What :meth:`summary` shows: of each representative how much is kept."""
        ticket, search = self._state.ticket, self._state.search
        return ticket.counts if ticket is not None else search.kept_counts() if search else []

    @_untraced
    def summary(self) -> str:
        """How much the ticket, or before that the newest mask, keeps: a table to print.

        Of representatives with units, such as heads or rows, the units are counted. The table is
        equal on all ranks, and shrinking the network changes no number.
        """
        return summary_text(self.kept_counts(), self.phase, len(self._state.history))

    def __repr__(self) -> str:
        """The phase, the last distances and the base optimizer."""
        return description(self, step=self._state.step, n_frozen=self._n_frozen)

    # ---- checkpoints

    def _with_own_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The base optimizer's state with the search in it, see `_state`."""
        return insert_record(state_dict, self._state)

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Check a checkpoint whole, and then load it."""
        plain, record = pop_record(state_dict, len(self._searches()))
        self._check_inner(plain)
        new_search = (lambda: None) if self.is_shrunk else self._new_search
        if record is not None:
            state = read_record(record, new_search, self.model)
        else:  # The plain base optimizer's: a search starts afresh, a ticket without one is held.
            search = new_search()
            state = State(search, None if search else self._state.ticket)
        self.base_optim.load_state_dict(plain)
        vars(self._state).update(vars(state), warned=self._state.warned)
        self._reserve_record()
        if self.is_shrunk:
            self._binding.accept_shapes()
        if record is None and state.ticket is not None:
            self._hold(state.ticket)  # The state that was loaded knows of no ticket.

    def _check_inner(self, state_dict: dict[str, Any]) -> None:
        """Raise if the search inside of this one would hold nothing."""
        for depth, each in enumerate(reversed(self._searches()[1:]), start=1):
            _, record = pop_record(state_dict, depth)
            if (
                not record
                or read_record(record, each._new_search, self.model).phase is not Phase.PRUNED
            ):
                raise ValueError(
                    "The checkpoint is of before the network was pruned, and this search is over "
                    "what another one has pruned. Load it into that one, as a search of its own."
                )


def _all_kept(tickets: Iterable[Ticket]) -> dict[str, Tensor]:
    """The masks of what all of several tickets keep, by parameter name."""
    masks: dict[str, Tensor] = {}
    for ticket in tickets:
        for name in ticket.masks:
            masks[name] = ticket.mask(name) & masks.get(name, True)
    return masks
