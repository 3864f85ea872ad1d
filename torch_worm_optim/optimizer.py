"""``WormOptimizer``: any torch optimizer, with a search for the ticket inside ``step()``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from torch_worm_optim._checks import (
    check_choice,
    check_count,
    check_count_or_share,
    check_share,
    warn_user,
)
from torch_worm_optim._state import (
    RECORD_KEY,
    SearchState,
    read_record,
    read_record_with_ticket,
    record_has_ticket,
    with_record,
    without_record,
)
from torch_worm_optim._wrapper import Closure, OptimizerWrapper
from torch_worm_optim.distributed import canonical_name, reshard_
from torch_worm_optim.layout import Layout
from torch_worm_optim.report import KeptCount, kept_counts, summary_text
from torch_worm_optim.search import (
    SCOPES,
    MaskSample,
    Phase,
    StoppingRule,
    Window,
    compute_mask,
    decide,
    sum_over_ranks,
)
from torch_worm_optim.selectors import (
    Representative,
    Selector,
    default_selector,
    select,
)
from torch_worm_optim.shrink import ShrinkReport, shrink_
from torch_worm_optim.ticket import (
    Entries,
    Faded,
    HeldAtZero,
    HeldTicket,
    ScaledGradients,
    ScaledUpdates,
    Strategy,
    checked_ticket,
    is_normalising,
)

logger = logging.getLogger(__name__)

# torch.compile leaves alone what is marked so. A search is Python whose way depends on counts and
# on numbers read back: traced, it would be compiled anew at each mask and phase. The public name,
# torch.compiler.disable, makes torch load its compiler as soon as this file is imported, for
# seconds; this one, which torch.optim uses for itself, makes it at the first call.
_untraced = _disable_dynamo

# When more than this share of the entries tie for a mask, their order decides more than training.
_MANY_TIES = 0.05
# A representative that keeps a smaller share than this is a bottleneck that training rarely leaves.
_NARROW = 0.1
# For so many steps after pruning it is checked, which waits for the device, whether something has
# written to weights that are held at zero. Lookahead, for one, does so every five or six steps.
_STEPS_CHECKED = 20


class WormOptimizer(OptimizerWrapper):
    r"""Wrap an optimizer so that it finds, while training, which part of the network can go.

    Every ``sample_every`` steps the representative entries are ranked by magnitude and a mask is
    drawn that removes the lowest ``prune_ratio`` of them. A window holds the last masks. When the
    mean distance from the newest mask to the others falls under the trigger point, the entries
    about to be pruned are truncated; when the largest falls under the stopping point, the newest
    mask is the ticket:

    .. math::

        \max_j d_j < s &\;\Rightarrow\; \text{converged} \\
        \operatorname{mean}_j d_j < s + \delta &\;\Rightarrow\; \nabla_t = r\,\nabla
        \text{ on removed entries}

    This is Algorithm 1 of the WORM paper [1]. Before the trigger point every step is the base
    optimizer's own, bit for bit; with ``truncation=1`` all steps are, and the stopping rule that is
    left is EB Train's [2]. After convergence a step costs what the base optimizer's costs. In every
    mask **True = kept**.

    Args:
        base_optim (Optimizer): The optimizer that trains ``model``. Its ``param_groups`` and
            ``state`` are shared, not copied.
        model (nn.Module): The model that it trains.
        selector (Selector, optional): Which parameters represent the network: a callable
            ``model -> list of Representative`` (default: BatchNorm scales if there are any, else
            query and key weights). Those that do not require a gradient are left out.
        prune_ratio (float, optional): *p*, share of the representative entries that a mask removes,
            in [0, 1) (default: 0.5).
        stopping_point (float, optional): *s*, the largest distance in the window must be below it,
            in [0, 1]; 0 never stops (default: 0.1).
        margin (float, optional): *δ*, in [0, 1]: truncation starts when the mean distance is below
            ``stopping_point + margin`` (default: 0.05).
        window (int, optional): *l*, how many masks are compared, the newest counted; at least 2
            (default: 5).
        truncation (float, optional): *r*, in [0, 1]: what is left of the gradient (or update) of an
            entry that the newest mask removes; 1 does not truncate (default: 3e-3).
        sample_every (int or callable, optional): Optimizer steps between masks, or a callable that
            is given the number of steps taken and says whether to draw one; None draws only when
            :meth:`sample` is called (default: 200). Thresholds and cadence belong together: the
            paper draws once an epoch.
        scope (str, optional): ``"global"`` ranks all entries together, ``"layer"`` each
            representative alone, and ``"selector"`` what each selector of a union ``a | b`` found,
            such as heads among heads and rows among rows (default: ``"global"``).
        min_keep (int or float, optional): How many entries of each representative always survive,
            or, in (0, 1), which share of them; at least one then (default: 1).
        truncate (str, optional): ``"gradient"`` scales what the base optimizer sees, as the paper
            does; ``"update"`` scales what it does, which means the same under every optimizer
            (default: ``"gradient"``).
        trigger (str, optional): ``"distance"`` truncates from the trigger point on; ``"always"``
            from the first mask on (default: ``"distance"``).
        ticket (dict, optional): A ticket that was found before, :attr:`ticket` of another run: bool
            masks by parameter name, **True = kept**. With :attr:`final_mask` followers, such as the
            shifts of BatchNorms, would stay, and their channels could not be cut out. It is applied
            now and held, and the phase is ``PRUNED`` from the start. Nothing is searched, so the
            selector and all arguments of the search are ignored (default: None).

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of its range, nothing is selected, a parameter is selected
            twice, the base optimizer does not own a selected parameter that requires a gradient,
            its ``state_dict()`` is not of torch's form, or the ticket is for another model.

    Example:
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
        {'1.weight': 4}
        >>> opt.prune()
        >>> int(model[1].weight.count_nonzero())
        4

    References:
        [1] Vasudev, "The EarlyBird Gets the WORM: Heuristically Accelerating EarlyBird
        Convergence", PMLR 262, 2024, https://arxiv.org/abs/2406.11872.

        [2] You et al., "Drawing Early-Bird Tickets", ICLR 2020, https://arxiv.org/abs/1909.11957.
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
        scope: str = "global",
        min_keep: int | float = 1,
        truncate: str = "gradient",
        trigger: str = "distance",
        ticket: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not isinstance(base_optim, Optimizer):
            raise TypeError(
                f"`base_optim` must be a torch.optim.Optimizer, got {type(base_optim).__name__}. "
                "Build the optimizer first: WormOptimizer(SGD(model.parameters(), lr=0.1), model)."
            )
        if isinstance(base_optim, WormOptimizer):
            raise TypeError(
                "`base_optim` is a WormOptimizer already. Wrap the optimizer inside it: "
                "opt.base_optim."
            )
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        _check_state_dict(base_optim)
        self._prune_ratio = check_share("prune_ratio", prune_ratio, below_one=True)
        self._truncation = check_share("truncation", truncation)
        self._rule = StoppingRule(
            stopping_point=check_share("stopping_point", stopping_point),
            margin=check_share("margin", margin),
            window=check_count("window", window, least=2),
            trigger=check_choice("trigger", trigger, ("distance", "always")),
        )
        self._scope = check_choice("scope", scope, SCOPES)
        self._min_keep = check_count_or_share("min_keep", min_keep)
        check_choice("truncate", truncate, ("gradient", "update"))
        if sample_every is not None and not callable(sample_every):
            sample_every = check_count("sample_every", sample_every, least=1)
        self._sample_every = sample_every
        reshard_(model)
        if ticket is not None and not ticket:
            raise ValueError(
                "`ticket` has no mask in it. Pass `opt.ticket` of another run, or None."
            )
        held = None if ticket is None else HeldTicket.given(checked_ticket(model, ticket))
        representatives: list[Representative] = []
        self._n_frozen = 0
        if held is None:
            owned = [
                parameter for group in base_optim.param_groups for parameter in group["params"]
            ]
            selector = default_selector if selector is None else selector
            representatives, self._n_frozen = select(selector, model, owned)
        if self._n_frozen:
            logger.info("%d representatives are frozen and left out", self._n_frozen)

        super().__init__(base_optim)
        self._layout = Layout(model, representatives, base_optim)
        # Trainers copy the attributes of this object into proxies of this class. An attribute that
        # a method binds anew on a proxy changes the proxy alone, so whatever changes lives inside
        # of objects that are never replaced.
        self._search = SearchState(
            step=0,
            pruned=False,
            fading_steps=0,
            history=[],
            window=Window(self._layout.local_numels(), window),
            ticket=held,
        )
        self._faded, self._held_at_zero = Faded(), HeldAtZero()
        self._strategies: dict[Phase, Strategy] = {
            Phase.FADING: self._faded,
            Phase.PRUNED: self._held_at_zero,
        }
        if self._truncation < 1:
            truncated = ScaledGradients if truncate == "gradient" else ScaledUpdates
            self._strategies[Phase.TRUNCATING] = truncated(self._truncation)
        self._warned: set[str] = set()
        self._reserve_record()
        if held is not None:
            self._hold_at_zero_(self._entries())
        if self._truncation < 1 and truncate == "gradient" and is_normalising(base_optim):
            warn_user(
                f"{type(base_optim).__name__} normalises gradients, so a gradient scaled by "
                "`truncation` is scaled back within some thousand steps, and "
                '`truncate="gradient"` loses its effect. Pass `truncate="update"` to scale what '
                "the optimizer does instead of what it sees."
            )

    # ---- a step

    @_untraced
    def step(self, closure: Closure | None = None, **kwargs: Any) -> Any:
        """Take one step of the base optimizer, truncated if need be, and draw a mask if one is due.

        Args:
            closure (Callable, optional): Evaluates the model and returns the loss; the gradients
                that it leaves are what is truncated, however often the base optimizer calls it.
            **kwargs: Passed on to the base optimizer's step.

        Returns:
            What the base optimizer's step returns.

        Raises:
            ValueError: If a mask is due and a representative parameter is NaN or infinite. The step
                was taken and counted; no mask was drawn.
            RuntimeError: If a CUDA graph is being captured, or if a parameter that the mask applies
                to was reparametrised after the search began.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "step() of WormOptimizer cannot be captured in a CUDA graph: a replay runs no "
                "Python, so it would count no steps, draw no masks and repeat the phase that was "
                "captured. Capture forward and backward, and call step() after each replay."
            )
        if closure is None and self._only_initialises_state():
            return self._step_base(None, **kwargs)
        phase = self.phase
        strategy = self._strategies.get(phase)

        def base_step(closure: Closure | None) -> Any:
            return self._step_base(closure, **kwargs)

        if strategy is None:
            loss = base_step(closure)
        else:
            entries = self._entries()
            if phase is Phase.PRUNED:
                self._warn_if_alive(entries)
            loss = strategy.step(base_step, closure, entries)
        self._search.step += 1
        if phase is Phase.FADING:
            self._fade_(entries)
        if phase is Phase.CONVERGED and self.phase is Phase.PRUNED:
            # The step's closure has called prune(), and the base optimizer went on from there.
            self._hold_at_zero_(self._entries())
        if phase is Phase.TRUNCATING and strategy is not None:
            self._warn_if_inert(entries)
        if not phase.converged and self._is_due():
            self.sample()
        return loss

    def _entries(self) -> list[Entries]:
        """The entries that the newest mask applies to. It is unpacked once, and only if needed."""
        if self._search.ticket is not None:
            return self._search.ticket.entries(self._layout)
        masks = functools.cache(self._search.window.newest)
        return [target.entries(masks) for target in self._layout.targets()]

    def _is_due(self) -> bool:
        """Whether the schedule asks for a mask after this step."""
        if self._sample_every is None:
            return False
        if callable(self._sample_every):
            return bool(self._sample_every(self._search.step))
        return self._search.step % self._sample_every == 0

    def _warn_if_inert(self, entries: list[Entries]) -> None:
        """Warn, once, if nothing was truncated because there were no gradients."""
        if all(each.gradient() is None for each in entries):
            self._warn_once(
                "no gradients",
                "No representative parameter has a gradient at step(), so nothing is truncated. "
                "Either they are all frozen (pass a `selector=` that names trained parameters), "
                "or gradients are consumed before step(), as optimizers that step in backward and "
                "sharded engines such as DeepSpeed ZeRO do, and truncation cannot reach them.",
            )

    def _warn_if_alive(self, entries: list[Entries]) -> None:
        """Warn, once, if something has written to weights that are held at zero."""
        held = self._held_at_zero
        if 0 < held.n_held <= _STEPS_CHECKED and held.finds_any(entries):
            self._warn_once(
                "alive",
                "Weights that the ticket removes, zero after the last step, are not zero any more: "
                "something writes weights after this optimizer, such as an optimizer around it, "
                "an average that is swapped in, or a checkpoint that is loaded, and what is saved "
                "then is not pruned. Put WormOptimizer outermost, or call "
                "pruning.apply_ticket_(model, opt.ticket) before saving.",
            )

    # ---- a sample

    @_untraced
    def sample(self) -> MaskSample:
        """Draw a mask from the weights as they are now, and let the search decide.

        For a cadence of your own, with ``sample_every=None``: once an epoch, or after each
        validation. Once the ticket is found nothing is drawn any more and the sample that found it
        is returned. So is the newest one if nothing that is ranked has moved since: a mask of
        weights that are not trained is no evidence, and one warning says so.

        Returns:
            The new :class:`MaskSample`.

        Raises:
            ValueError: If a representative parameter is NaN or infinite; the message names it and
                the search is left as it was.
            RuntimeError: If the base optimizer does not train what is ranked, if that has another
                shape than before, or if a ticket was given and there is nothing to search.
        """
        phase = self.phase
        if phase.converged and not self._search.history:
            raise RuntimeError(
                "There is nothing to sample: this optimizer holds the `ticket` that it was given. "
                "Build it without one to search."
            )
        if phase.converged:
            return self._search.history[-1]
        shards = self._layout.shards()
        self._layout.check_owned()
        fingerprint = self._layout.fingerprint()
        if fingerprint == self._search.fingerprint:
            self._warn_once(
                "nothing moved",
                "Nothing that is ranked has moved since the last mask, "
                f"{self._layout.representatives[0].name!r} for one, so no mask is drawn: equal "
                "masks of weights that are not trained would pass for a ticket. Look for a "
                "learning rate of 0 or gradients that never come, and start the search once these "
                "parameters are trained, or select others that are.",
            )
            return self._search.history[-1]
        mask = compute_mask(
            self._layout.scores(),
            self._prune_ratio,
            scope=self._scope,
            min_keep=self._min_keep,
            shards=shards,
            groups=[each.selector_index for each in self._layout.representatives],
        )
        self._fit_window()
        window, history = self._search.window, self._search.history
        window.push(mask.kept)
        n_entries = sum(self._layout.numels())
        distances: tuple[float, ...] = ()
        if len(history) + 1 >= self._rule.window:
            differences = sum_over_ranks(torch.tensor(window.differences(), device="cpu"), shards)
            distances = tuple(n / n_entries for n in differences.tolist())
        sample = decide(distances, step=self._search.step, history=history, rule=self._rule)
        history.append(sample)
        self._search.fingerprint = fingerprint
        self._clear_strategies()
        self._log_change(
            phase, f" (max distance {sample.max_distance}, mean distance {sample.mean_distance})"
        )
        if sample.phase.converged:
            self._warn_of_narrow_layers()
        if mask.n_tied > _MANY_TIES * n_entries:
            self._warn_once(
                "ties",
                f"{mask.n_tied} of {n_entries} entries tie for the mask: they have the very same "
                "magnitude and only their order decides which go. Freshly initialised BatchNorm "
                "scales are all 1 and do this. Let training move them before the first mask (a "
                "larger `sample_every`), or check that the selected parameters are trained at all.",
            )
        return sample

    def _fit_window(self) -> None:
        """Resize the empty window if sharding has changed what this rank has."""
        if self._search.ticket is not None:
            return
        numels = self._layout.local_numels()
        if self._search.window.numels == numels:
            return
        if self._search.history:
            raise RuntimeError(
                "The representatives are sharded in another way, or have other shapes, than when "
                "the last mask was drawn. Save a checkpoint before sharding anew, build "
                "WormOptimizer anew, and load the checkpoint."
            )
        self._search.window = Window(numels, self._rule.window)

    def _clear_strategies(self) -> None:
        """Discard what strategies derived from the mask before the newest."""
        for strategy in self._strategies.values():
            strategy.clear()

    # ---- pruning

    @_untraced
    def prune(self, over: int = 0, *, force: bool = False) -> None:
        r"""Apply the ticket in place, at once or little by little, and hold it from then on.

        Removed entries and those of their followers become zero, and each later :meth:`step` sets
        them back to zero, whatever momentum and weight decay do. Parameters, their names and the
        ``state_dict`` keys stay as they were.

        With ``over=n`` they get there in ``n`` steps, each on a straight line from where it is:

        .. math:: w_t = \frac{n - t}{n}\,w_0, \quad t = 1, \dots, n

        Until then the phase is ``FADING``: the base optimizer sees gradients of zero for them, and
        what momentum and weight decay do to them is undone. Further calls may shorten the steps
        that are left, to none by default, and never lengthen them, so that a call may stand in a
        training loop. Once pruned, a call sets removed entries to zero once more.

        Args:
            over (int, optional): Steps until removed entries are zero; 0 is at once (default: 0).
            force (bool, optional): Take the newest mask as the ticket before the search has
                converged (default: False).

        Raises:
            TypeError: If ``over`` is not a number.
            ValueError: If ``over`` is not a whole number of at least 0.
            RuntimeError: If the ticket is not found yet, or a parameter that it applies to was
                reparametrised or has another shape. Model and optimizer are left as they were.

        Example:
            >>> model = nn.BatchNorm1d(2)
            >>> _ = model.weight.data.copy_(torch.tensor([2.0, 4.0]))
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> opt = WormOptimizer(sgd, model, sample_every=None, window=2)
            >>> _ = opt.sample(), model.weight.data.mul_(0.5), opt.sample()
            >>> opt.prune(over=4)
            >>> for _ in range(4):
            ...     opt.step()
            ...     print(opt.phase.value, model.weight.tolist())
            fading [0.75, 2.0]
            fading [0.5, 2.0]
            fading [0.25, 2.0]
            pruned [0.0, 2.0]
        """
        over = check_count("over", over, least=0)
        history = self._search.history
        if force and history and not self.converged:
            history[-1] = history[-1]._replace(phase=Phase.PRUNED)
        phase = self.phase
        if not phase.converged:
            raise RuntimeError(
                f"There is no ticket to prune with yet: the search is {phase.value} after "
                f"{len(self._search.history)} masks. Train until `opt.converged`, or let it stop "
                "sooner with a larger `stopping_point`."
            )
        self._fit_window()
        entries = self._entries()
        if over == 0 or phase is Phase.PRUNED:
            self._hold_at_zero_(entries)
            return
        self._search.fading_steps = min(over, self._search.fading_steps or over)
        self._log_change(phase)

    def _fade_(self, entries: list[Entries]) -> None:
        """Take removed entries nearer to zero, by one of the steps that are left."""
        left = self._search.fading_steps - 1
        if left > 0:
            self._faded.apply_(entries, left / (left + 1))
            self._search.fading_steps = left
        else:  # below 0 where the step's closure has called prune()
            self._hold_at_zero_(entries)

    def _hold_at_zero_(self, entries: list[Entries]) -> None:
        """Set removed entries to zero, and hold them there from now on."""
        phase = self.phase
        self._clear_strategies()  # No step needs the memory of a fade any more.
        self._held_at_zero.apply_(entries)
        self._search.pruned, self._search.fading_steps = True, 0
        self._log_change(phase)

    @_untraced
    def shrink(
        self, *args: Any, scatter: bool = False, multiple_of: int = 1, **kwargs: Any
    ) -> ShrinkReport:
        """Cut what the ticket has removed out of the network, in place, and train on.

        Channels that are zero go, and what they are read by: exactly, so that the network computes
        and learns what it did, at the speed of the smaller one. Parameters stay the objects that
        they are, and the base optimizer's state is cut as they are. What has to stay zero for now,
        such as channels of a residual stream that other layers write to, is held on.
        :attr:`final_mask` and :attr:`ticket` keep the shapes that they had.

        Args:
            *args: One batch for the model, which is run in evaluation mode.
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

        Example:
            >>> bn = nn.BatchNorm1d(4)
            >>> model = nn.Sequential(nn.Linear(2, 4), bn, nn.ReLU(), nn.Linear(4, 1))
            >>> _ = bn.weight.data.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0]))
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> opt = WormOptimizer(sgd, model, sample_every=None, window=2)
            >>> _ = opt.sample(), bn.weight.data.mul_(0.5), opt.sample()
            >>> opt.prune()
            >>> print(opt.shrink(torch.ones(1, 2)))
            parameters 25 -> 13 (48 % gone)
            multiplications 12 -> 6 (50 % gone)
            zero channels: 2 of 2 gone
            layers that changed most:
              0: 12 -> 6
              1: 8 -> 4
              3: 5 -> 3
            >>> model[0].out_features, opt.final_mask["1.weight"]
            (2, tensor([False,  True, False,  True]))
        """
        if self.phase is Phase.FADING:
            raise RuntimeError(
                f"What the ticket removes is still fading: take {self._search.fading_steps} more "
                "steps, or call prune() to be done at once, and shrink then."
            )
        if self.phase is not Phase.PRUNED:
            raise RuntimeError(
                f"There is nothing to shrink yet: the search is {self.phase.value}. Call prune() "
                "once `opt.converged`, and shrink then."
            )
        final_mask, ticket = self.final_mask, self.ticket
        if final_mask is None or ticket is None:
            raise RuntimeError("The search is pruned and has no ticket. Load a whole checkpoint.")
        identity, counts = self._masks_identity(), self.kept_counts()
        report = shrink_(
            self._layout.model,
            args,
            kwargs,
            optimizer=self.base_optim,
            scatter=scatter,
            multiple_of=multiple_of,
        )
        held = self._search.ticket or HeldTicket(
            final_mask, ticket, identity=identity, counts=counts
        )
        self._search.ticket = held.shrunk(report)
        self._layout.shapes_changed()
        self._clear_strategies()
        logger.info(
            "step %d: shrunk from %d parameters to %d", self._search.step, *report.parameters
        )
        return report

    def _log_change(self, before: Phase, details: str = "") -> None:
        """Log that the phase is another one than before, if it is."""
        after = self.phase
        if after is not before:
            text = f"{before.value} -> {after.value}{details}"
            logger.info("step %d: %s", self._search.step, text)

    # ---- what users read

    @property
    def model(self) -> nn.Module:
        """The model that it was built with."""
        return self._layout.model

    @property
    def settings(self) -> Any:
        """The arguments of the search."""
        return SimpleNamespace(
            **vars(self._rule),
            trigger_point=self._rule.trigger_point,
            prune_ratio=self._prune_ratio,
            truncation=self._truncation,
            sample_every=self._sample_every,
            scope=self._scope,
            min_keep=self._min_keep,
        )

    @property
    def is_shrunk(self) -> bool:
        """Whether the network was shrunk, now or before a checkpoint was loaded."""
        return self._search.ticket is not None and self._search.ticket.is_shrunk

    @property
    @_untraced
    def phase(self) -> Phase:
        """How far the search is."""
        return self._search.phase

    @property
    def converged(self) -> bool:
        """Whether the ticket is found."""
        return self.phase.converged

    @property
    def history(self) -> list[MaskSample]:
        """All masks drawn so far, one :class:`MaskSample` each; a copy of the list."""
        return list(self._search.history)

    @property
    def final_mask(self) -> dict[str, Tensor] | None:
        """The ticket, a bool mask by parameter name, **True = kept**; None before it is found.

        Each mask has its parameter's shape; where only a part of a parameter is ranked, the other
        entries are True. The tensors are copies. The mask of a sharded parameter is a DTensor that
        is sharded alike; its ``full_tensor()`` is the whole. Once the network is shrunk, masks are
        plain and whole on every rank.
        """
        return self.candidate_mask if self.converged else None

    @property
    def candidate_mask(self) -> dict[str, Tensor] | None:
        """The newest mask in the form of :attr:`final_mask`; None before the first sample."""
        if self._search.ticket is not None:
            return {name: mask.clone() for name, mask in self._search.ticket.final_mask.items()}
        if not self._search.history:
            return None
        self._fit_window()
        return self._layout.parameter_masks(self._search.window.newest())

    @property
    def ticket(self) -> dict[str, Tensor] | None:
        """:attr:`final_mask` and the masks of its followers: what :meth:`prune` sets to zero.

        It is what :func:`~torch_worm_optim.apply_ticket_` takes to prune another copy of
        the weights. None before the ticket is found.
        """
        if not self.converged:
            return None
        if self._search.ticket is not None:
            return {name: mask.clone() for name, mask in self._search.ticket.ticket.items()}
        self._fit_window()
        return self._layout.parameter_masks(self._search.window.newest(), followers=True)

    @_untraced
    def summary(self) -> str:
        """How much of each representative is kept, as a table to print.

        What is counted is the ticket, or before that the newest mask. Where representatives have
        units, such as heads or rows, these are counted, and the header says so. Of a ticket that
        was given each parameter has a row. Shrinking the network changes no number.

        Returns:
            A row for each representative with its parameter's name, how many entries it has, and
            how many and which share of them are kept; a row for all; and a line with the phase and
            the number of masks drawn. It is equal on all ranks. With sharded parameters this is a
            collective call, once a mask is drawn: all ranks have to make it.

        Raises:
            RuntimeError: If a representative parameter has another shape than when the search
                began, or is sharded in another way than when the last mask was drawn.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            >>> _ = model[1].weight.data.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0]))
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> opt = WormOptimizer(sgd, model, sample_every=None)
            >>> print(opt.summary())
            name      entries  kept  share
            1.weight        4     -      -
            total           4     -      -
            phase: searching, no mask drawn yet
            >>> _ = opt.sample()
            >>> print(opt.summary())
            name      entries  kept   share
            1.weight        4     2  50.0 %
            total           4     2  50.0 %
            phase: searching, 1 mask drawn, the newest counted
        """
        return summary_text(self.kept_counts(), self.phase, len(self._search.history))

    def kept_counts(self) -> list[KeptCount]:
        """What the ticket or else the newest mask keeps; if sharded, a collective call."""
        if self._search.ticket is not None:
            return self._search.ticket.kept_counts()
        representatives, numels = self._layout.representatives, self._layout.numels()
        if not self._search.history:
            return kept_counts(representatives, numels, [None] * len(numels))
        self._fit_window()
        # One row for each, so that ranks add them up one by one.
        kept = [int(mask.sum()) for mask in self._search.window.newest()]
        counts = torch.tensor(kept, device="cpu").diag()
        totals = sum_over_ranks(counts, self._layout.shards()).tolist()
        return kept_counts(representatives, numels, totals)

    def __repr__(self) -> str:
        """The phase, the last distances and the base optimizer."""
        fading_steps = self._search.fading_steps
        lines = [
            f"phase: {self.phase.value}" + f" (steps left: {fading_steps})" * bool(fading_steps),
            f"step: {self._search.step}",
            f"masks drawn: {len(self._search.history)} (window: {self._rule.window})",
            f"ranked entries: {sum(self._search.window.numels)} of "
            f"{len(self._layout.representatives)} representatives"
            + f" ({self._n_frozen} more are frozen)"
            * bool(self._n_frozen),
        ]
        last = self._search.history[-1] if self._search.history else None
        if last is not None and last.max_distance is not None:
            lines += [
                f"distances: ({', '.join(f'{distance:.4f}' for distance in last.distances)})",
                f"max_distance: {last.max_distance:.4f} (converged below "
                f"{self._rule.stopping_point:g})",
                f"mean_distance: {last.mean_distance:.4f} (truncating below "
                f"{self._rule.trigger_point:g})",
            ]
        lines.append("base_optim: " + repr(self.base_optim).replace("\n", "\n  "))
        return f"{type(self).__name__} (\n  " + "\n  ".join(lines) + "\n)"

    # ---- checkpoints

    def _with_own_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The base optimizer's state with the search in it, see `checkpoint`."""
        self._fit_window()
        return with_record(state_dict, self._search, self._masks_identity(), self._layout)

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Check a checkpoint whole, and then load it."""
        plain, record = without_record(state_dict)
        n_masks = self._rule.window
        if record is None and self._search.ticket is not None:
            search = SearchState(0, True, 0, [], self._search.window, ticket=self._search.ticket)
        elif record is None:  # the plain base optimizer's
            search = SearchState(0, False, 0, [], Window(self._layout.local_numels(), n_masks))
        elif record_has_ticket(record):
            search = read_record_with_ticket(record, self._layout, self._search.window)
        elif self._search.ticket is not None:
            raise ValueError(
                "The checkpoint is of a search, and this optimizer holds a ticket that it was "
                "given, or its network was shrunk. Build the network and WormOptimizer anew, "
                "without `ticket`, and load it there."
            )
        else:
            search = read_record(record, self._masks_identity(), self._layout, n_masks)
        self.base_optim.load_state_dict(plain)
        vars(self._search).update(vars(search))
        if search.ticket is not None:
            self._layout.shapes_changed()
        self._clear_strategies()
        self._reserve_record()
        if record is None and search.ticket is not None:
            self._hold_at_zero_(self._entries())  # The state that was loaded knows of no ticket.

    def _masks_identity(self) -> dict[str, Any]:
        """What the masks depend on; two searches that differ in it cannot share a window."""
        if self._search.ticket is not None:
            return self._search.ticket.identity
        representatives = self._layout.representatives
        return {
            "parameters": [
                [canonical_name(part.name) for part in each.parts] for each in representatives
            ],
            "followers": [
                [canonical_name(part.name) for part in each.followers] for each in representatives
            ],
            "parts": [
                [f"{part.view}{part.index}{part.units}" for part in each.members]
                for each in representatives
            ],
            "sizes": self._layout.numels(),
            "prune_ratio": self._prune_ratio,
            "scope": self._scope,
            **(
                {"groups": [each.selector_index for each in representatives]}
                if self._scope == "selector"
                else {}
            ),
            "min_keep": self._min_keep,
            "window": self._rule.window,
        }

    def _reserve_record(self) -> None:
        """Keep the record's key in every parameter group, see `checkpoint`."""
        for group in self.param_groups:
            group.setdefault(RECORD_KEY, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer; the representatives stay as they are."""
        super().add_param_group(param_group)
        self._reserve_record()

    def _warn_of_narrow_layers(self) -> None:
        """Warn of representatives of which the ticket leaves next to nothing."""
        least = min(_NARROW, (1 - self._prune_ratio) / 2)
        narrow = [
            f"{each.name!r} ({each.kept} of {each.numel})"
            for each in self.kept_counts()
            if each.kept is not None and each.kept < least * each.numel
        ]
        if narrow:
            self._warn_once(
                "narrow",
                f"The ticket leaves little of {', '.join(narrow[:3])}"
                + f" and {len(narrow) - 3} more" * (len(narrow) > 3)
                + ", a bottleneck that a network may not recover from. "
                '`scope="layer"` prunes all alike'
                + (
                    ", and `min_keep=0.2` keeps a fifth of each."
                    if self._prune_ratio < 0.8
                    else "."
                ),
            )

    def _warn_once(self, topic: str, message: str) -> None:
        """Warn of a topic the first time that it comes up."""
        if topic not in self._warned:
            self._warned.add(topic)
            warn_user(message)


def _check_state_dict(base_optim: Optimizer) -> None:
    """Refuse an optimizer whose checkpoints have no place for the search."""
    if hasattr(base_optim, "consolidate_state_dict"):
        return  # ZeroRedundancyOptimizer, which raises before all ranks have called that.
    missing = {"state", "param_groups"} - set(base_optim.state_dict())
    if missing:
        raise ValueError(
            f"The state_dict() of {type(base_optim).__name__} has no {sorted(missing)[0]!r}, as "
            "those of torch's optimizers do, so the search could not be saved with it. Wrap the "
            "optimizer inside of it, and put it around that: "
            f"{type(base_optim).__name__}(WormOptimizer(SGD(...), model))."
        )
