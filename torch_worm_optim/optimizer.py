"""``WormOptimizer``: any torch optimizer, with a search for the ticket inside ``step()``."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from torch_worm_optim.arguments import check_choice, check_count, check_share
from torch_worm_optim.checkpoint import (
    RECORD_KEY,
    SearchRecord,
    read_record,
    with_record,
    without_record,
)
from torch_worm_optim.kernels import kernels_run
from torch_worm_optim.masks import (
    Held,
    compute_mask,
    new_window,
    newest_mask,
    spread_mask,
    unit_magnitudes,
)
from torch_worm_optim.pruning import zero_removed_
from torch_worm_optim.search import MaskSample, Phase, StoppingRule, decide, observe_
from torch_worm_optim.selectors import (
    Representative,
    Selector,
    canonical_name,
    default_selector,
    select,
)
from torch_worm_optim.selectors.selection import check_visible
from torch_worm_optim.sharding import (
    Shard,
    is_distributed,
    local,
    local_part_of,
    ranked_indices,
    reshard_,
    shard_of,
    spread_alike,
    spread_like,
)
from torch_worm_optim.truncation import (
    fill_multiplier_,
    is_normalising,
    truncate_gradients_,
    truncate_removed_,
    truncate_updates_,
)
from torch_worm_optim.wrapper import Closure, OptimizerWrapper

logger = logging.getLogger(__name__)

# torch.compile leaves alone what is marked so. A search is Python that counts, reads numbers back
# and changes its mind: traced, it would be compiled anew at each mask and phase. The public name,
# torch.compiler.disable, makes torch load its compiler as soon as this file is imported, for
# seconds; this one, which torch.optim uses for itself, makes it at the first call.
_untraced = _disable_dynamo


class Target(NamedTuple):
    """A parameter that the mask reaches, with what says which entries of it."""

    part: Representative
    parameter: Tensor
    shard: Shard | None

    def reached(self, tensor: Tensor) -> Tensor:
        """Of the parameter, or of a gradient of it, what a mask is applied to here, as a view."""
        if self.shard is not None:
            return self.shard.reached(local(tensor))
        return self.part.entries(local(tensor) if is_distributed(tensor) else tensor)

    @property
    def is_in_window(self) -> bool:
        """Whether each entry that a mask is applied to has a byte of its own in the window."""
        if self.shard is not None:
            return self.shard.slices is not None
        return not self.part.units


# For so many entries what their gradients are multiplied by is held, a few megabytes; for more it
# is made anew in each step.
_FEW = 1 << 20
# A mask that this share of the entries tie for is a matter of their order more than of training.
_MANY_TIES = 0.05


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

    This is Algorithm 1 of the WORM paper [1]; with ``truncation=1`` it is EB Train [2], bit for
    bit. Before the trigger point every step is the base optimizer's own, bit for bit, and after
    convergence it costs what the base optimizer costs. In every mask **True = kept**.

    Args:
        base_optim (Optimizer): The optimizer that trains ``model``. Its ``param_groups`` and
            ``state`` are shared, not copied.
        model (nn.Module): The model that it trains.
        selector (Selector, optional): Which parameters represent the network: a callable
            ``model -> list of Representative`` (default: BatchNorm scales if there are any, else
            query and key weights).
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
            representative alone (default: ``"global"``).
        min_keep (int, optional): Entries of each representative that always survive (default: 1).
        truncate (str, optional): ``"gradient"`` scales what the base optimizer sees, as the paper
            does; ``"update"`` scales what it does, which means the same under every optimizer
            (default: ``"gradient"``).
        trigger (str, optional): ``"distance"`` truncates from the trigger point on; ``"always"``
            from the first mask on (default: ``"distance"``).

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of its range, nothing is selected, a parameter is selected
            twice, or the base optimizer does not own a selected parameter. The base optimizer is
            left as it was.

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
        min_keep: int = 1,
        truncate: str = "gradient",
        trigger: str = "distance",
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
        self._prune_ratio = check_share("prune_ratio", prune_ratio, below_one=True)
        self._truncation = check_share("truncation", truncation)
        self._rule = StoppingRule(
            stopping_point=check_share("stopping_point", stopping_point),
            margin=check_share("margin", margin),
            window=check_count("window", window, least=2),
            trigger=check_choice("trigger", trigger, ("distance", "always")),
        )
        self._scope = check_choice("scope", scope, ("global", "layer"))
        self._min_keep = check_count("min_keep", min_keep, least=0)
        self._truncate = check_choice("truncate", truncate, ("gradient", "update"))
        if sample_every is not None and not callable(sample_every):
            sample_every = check_count("sample_every", sample_every, least=1)
        self._sample_every = sample_every
        reshard_(model)  # an evaluation may have left whole parameters in the places of shards
        self._representatives = select(
            default_selector if selector is None else selector,
            model,
            owned=[parameter for group in base_optim.param_groups for parameter in group["params"]],
        )

        super().__init__(base_optim)
        self._model = model
        self._strengths: dict[torch.device, Tensor] = {}
        self._shards: dict[int, Shard] = {}
        self._shard_of_name: dict[str, Shard] = {}
        # A meta-device model says how many entries there will be, and not yet where.
        device = self._parameter(self._representatives[0].name).device
        with torch.inference_mode(False):  # Later masks could not be written to it otherwise.
            held = new_window(
                sum(self._sizes()), window, "cpu" if device.type == "meta" else device
            )
        # What changes is changed in place, here and in the buffers. Trainers hand out proxies that
        # have this class and read the attributes of this object, but whatever a method sets on a
        # proxy stays there.
        self._search = SearchRecord(step=0, pruned=False, history=[], window=held)
        self._buffers: list[tuple[Tensor, ...]] = []
        self._warned: set[str] = set()
        self._kernels_loaded: list[bool] = []  # not empty once they are
        self._hold_place()
        if self._truncation < 1 and self._truncate == "gradient" and is_normalising(base_optim):
            warnings.warn(
                f"{type(base_optim).__name__} normalises gradients, so a gradient scaled by "
                "`truncation` is scaled back within some thousand steps, and "
                '`truncate="gradient"` loses its effect. Pass `truncate="update"` to scale what '
                "the optimizer does instead of what it sees.",
                stacklevel=2,
            )

    # ---- what users read

    @property
    @_untraced
    def phase(self) -> Phase:
        """How far the search is."""
        if self._search.pruned:
            return Phase.PRUNED
        return self._search.history[-1].phase if self._search.history else Phase.SEARCHING

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
        is sharded alike; its ``full_tensor()`` is the whole.
        """
        return self.candidate_mask if self.converged else None

    @property
    def candidate_mask(self) -> dict[str, Tensor] | None:
        """The newest mask in the form of :attr:`final_mask`; None before the first sample."""
        if not self._search.history:
            return None
        masks: dict[str, Tensor] = {}
        for index, mask in enumerate(self._newest_masks()):
            for part in self._representatives[index].ranked:
                parameter = self._parameter(part.name)
                here = masks.setdefault(
                    part.name, torch.ones_like(local(parameter), dtype=torch.bool)
                )
                self._put(index, part, mask, here)
        return {name: spread_like(mask, like=self._parameter(name)) for name, mask in masks.items()}

    def __repr__(self) -> str:
        """The phase, the last distances and the base optimizer."""
        lines = [
            f"phase: {self.phase.value}",
            f"step: {self._search.step}",
            f"masks drawn: {len(self._search.history)} (window: {self._rule.window})",
            f"ranked entries: {sum(self._all_sizes())} of {len(self._representatives)} parameters",
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

    # ---- what an optimizer does

    @_untraced
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step of the base optimizer, truncated if need be, and draw a mask if one is due.

        Args:
            closure (Callable, optional): Evaluates the model and returns the loss; the gradients
                that it leaves are what is truncated, however often the base optimizer calls it.

        Returns:
            What the base optimizer's step returns.

        Raises:
            ValueError: If a mask is due and a representative parameter is NaN or infinite. The step
                itself was taken; the search is as it was before it.
            RuntimeError: If a parameter that the mask reaches was reparametrised under the search.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            return self._recorded_step(closure)
        if closure is None and self._only_initialises_state():
            return self._step_base(None)
        phase = self.phase
        if self._search.window.is_cuda:
            self._strength_on(self._search.window.device)  # a graph may be recorded next
            self._load_kernels()
        if phase is not Phase.TRUNCATING or self._truncation == 1:
            loss = self._step_base(closure)
        elif self._truncate == "gradient":
            loss = self._step_after(closure, self._truncate_gradients)
        else:
            loss = self._update_truncated_step(closure)
        if phase is Phase.PRUNED:
            self._hold_at_zero()
        self._search.step += 1
        if not phase.converged and self._is_due():
            self.sample()
        return loss

    @_untraced
    def sample(self) -> MaskSample:
        """Draw a mask from the weights as they are now, and let the search decide.

        For a cadence of your own, with ``sample_every=None``: once an epoch, or after each
        validation. Once the ticket is found nothing is drawn any more and the sample that found it
        is returned.

        Returns:
            The new :class:`MaskSample`.

        Raises:
            ValueError: If a representative parameter is NaN or infinite; the message names it and
                the search is left as it was.
        """
        phase = self.phase
        if phase.converged:
            return self._search.history[-1]
        self._fit_window()
        ranked, shares = self._ranked(), self._shares()
        drawn = self._drawn_at_once(list(ranked.values()), shares)
        if drawn is None:
            drawn = self._drawn(ranked, shares)
        sample, n_tied = drawn
        self._search.history.append(sample)
        if sample.phase.converged:
            self._buffers.clear()
        elif self._buffers:
            self._fill_buffers(self._buffers)
        self._set_strengths()
        if sample.phase is not phase:
            logger.info(
                "step %d: %s -> %s (max distance %s, mean distance %s)",
                sample.step,
                phase.value,
                sample.phase.value,
                sample.max_distance,
                sample.mean_distance,
            )
        n_entries = sum(self._all_sizes())
        if n_tied > _MANY_TIES * n_entries:
            self._warn_once(
                "ties",
                f"{n_tied} of {n_entries} entries tie for the mask: they have the very same "
                "magnitude and only their order decides which go. Freshly initialised BatchNorm "
                "scales are all 1 and do this. Let training move them before the first mask (a "
                "larger `sample_every`), or check that the selected parameters are trained at all.",
            )
        return sample

    def _drawn(
        self, ranked: dict[str, Tensor], shares: list[tuple[int, Held | None]]
    ) -> tuple[MaskSample, int]:
        """A new mask, put into the window: what follows from it, and how many entries tie."""
        mask, n_tied = compute_mask(
            ranked,
            self._prune_ratio,
            scope=self._scope,
            min_keep=self._min_keep,
            held={name: held for name, (_, held) in zip(ranked, shares, strict=True) if held},
        )
        if self._search.window.device != mask.device:
            with torch.inference_mode(False):
                self._search.window = self._search.window.to(mask.device)
        sample = observe_(
            self._search.window,
            mask,
            step=self._search.step,
            history=self._search.history,
            rule=self._rule,
            shares=shares,
        )
        return sample, n_tied

    def _drawn_at_once(
        self, entries: list[Tensor], shares: list[tuple[int, Held | None]]
    ) -> tuple[MaskSample, int] | None:
        """The same, where the window can take it in as it is drawn; None where that cannot be."""
        window, n = self._search.window, sum(entry.numel() for entry in entries)
        count = round(self._prune_ratio * n)
        if self._scope != "global" or count == 0 or any(held for _, held in shares):
            return None
        if kernels_run(window.device):
            from torch_worm_optim.mask_kernel import can_draw, draw_mask_
        else:
            from torch_worm_optim.mask_pass import can_draw, draw_mask_
        if not can_draw(entries, window):
            return None
        quotas = [min(self._min_keep, entry.numel()) for entry in entries]
        drawn = draw_mask_(entries, window, count, quotas, self._rule.window - 1)
        if drawn is None:
            return None
        full = len(self._search.history) + 1 >= self._rule.window
        distances = tuple(differing / n for differing in drawn.differences) if full else ()
        sample = decide(
            distances, step=self._search.step, history=self._search.history, rule=self._rule
        )
        return sample, drawn.n_tied

    @_untraced
    def prune(self) -> None:
        """Apply the ticket in place, and hold it through every later step.

        Removed entries and those of their followers become zero, and each later :meth:`step` sets
        them back to zero, whatever momentum and weight decay do. Parameters, their names and the
        ``state_dict`` keys stay as they were. A second call does nothing.

        Raises:
            RuntimeError: If the ticket is not found yet, or a parameter that it reaches was
                reparametrised.
        """
        phase = self.phase
        if not phase.converged:
            raise RuntimeError(
                f"There is no ticket to prune with yet: the search is {phase.value} after "
                f"{len(self._search.history)} masks. Train until `opt.converged`, or let it stop "
                "sooner with a larger `stopping_point`."
            )
        if phase is Phase.PRUNED:
            return
        self._targets()  # An error in finding them leaves the phase as it was.
        self._search.pruned = True
        self._hold_at_zero()
        logger.info("step %d: %s -> %s", self._search.step, phase.value, self.phase.value)

    # ---- what checkpoints hold

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and the search's in its first parameter group.

        It loads with ``torch.load(weights_only=True)``, and into the plain base optimizer too.

        Returns:
            A dict with ``"state"`` and ``"param_groups"``, as every torch optimizer's.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint as if training had never stopped.

        What the held masks depend on (the representatives with their followers and parts,
        ``prune_ratio``, ``scope``, ``min_keep``, ``window``) must be as it was; the thresholds,
        ``truncation`` and the cadence are those of this optimizer. A checkpoint of the plain base
        optimizer loads too, and the search starts afresh.

        Args:
            state_dict (dict): What :meth:`state_dict` returned.

        Raises:
            TypeError: If it is not a dict.
            ValueError: If it is truncated, or saved for other parameters or other masks; optimizer
                and search are left as they were.
        """
        super().load_state_dict(state_dict)

    def _save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return with_record(state_dict, self._search, self._masks_identity(), self._packed_window())

    def _load(self, state_dict: dict[str, Any]) -> None:
        plain, record = without_record(state_dict)
        # A plain checkpoint of the base optimizer has no record: the search starts afresh.
        if record is None:
            window = new_window(sum(self._sizes()), self._rule.window)
            search = SearchRecord(0, False, [], window)
        else:
            search = read_record(
                record,
                identity=self._masks_identity(),
                n_held=self._rule.window,
                unpack=self._unpacked_window,
            )
        super()._load(plain)
        self._search.step, self._search.pruned = search.step, search.pruned
        self._search.history[:] = search.history
        self._fit_window()
        self._search.window.copy_(search.window)
        self._buffers.clear()
        self._set_strengths()
        self._hold_place()

    def _masks_identity(self) -> dict[str, Any]:
        """What the masks depend on; two searches that differ in it cannot share a window."""
        return {
            "parameters": [
                [canonical_name(part.name) for part in each.ranked]
                for each in self._representatives
            ],
            "followers": [
                [canonical_name(part.name) for part in each.reached[len(each.ranked) :]]
                for each in self._representatives
            ],
            "parts": [
                [f"{part.view}{part.part}{part.units}" for part in each.reached]
                for each in self._representatives
            ],
            "sizes": self._all_sizes(),
            "prune_ratio": self._prune_ratio,
            "scope": self._scope,
            "min_keep": self._min_keep,
            "window": self._rule.window,
        }

    def __getstate__(self) -> dict[str, Any]:
        """All but what is found again when it is needed, and holds process groups."""
        return {**super().__getstate__(), "_shards": {}, "_shard_of_name": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer; the representatives stay as they are."""
        super().add_param_group(param_group)
        self._hold_place()

    # ---- the parts of a step

    def _step_after(self, closure: Closure | None, truncate: Callable[[], None]) -> Any:
        """The base optimizer's step, with its gradients truncated first."""
        if closure is None:
            truncate()
            return self._step_base(None)

        def truncated_closure() -> Any:
            # Gradients are there only after the closure, however often the base optimizer calls it.
            with torch.enable_grad():
                loss = closure()
            truncate()
            return loss

        return self._step_base(truncated_closure)

    def _truncate_gradients(self) -> None:
        targets = self._targets()
        self._warn_if_inert(targets)
        gradients = _gradients(targets)
        buffers = self._mask_buffers(targets)
        held = [i for i, buffer in enumerate(buffers) if buffer]
        truncate_gradients_([gradients[i] for i in held], [buffers[i][0] for i in held])
        if len(held) < len(buffers):
            rows = self._newest_bytes()
            direct = [i for i, buffer in enumerate(buffers) if not buffer]
            strength: float | Tensor = self._truncation
            if rows[0].is_cuda:
                strength = self._strength_on(rows[0].device)
            truncate_removed_([gradients[i] for i in direct], [rows[i] for i in direct], strength)

    def _recorded_step(self, closure: Closure | None) -> Any:
        """A step that becomes part of a CUDA graph, and is taken when that is replayed.

        Replays run no Python: they count no steps and draw no masks. What they do depends on the
        window and on how strongly it is applied, which :meth:`sample` writes between them.
        """
        phase = self.phase
        device = self._search.window.device
        if device not in self._strengths or (phase is Phase.PRUNED and not self._buffers):
            raise RuntimeError(
                "A CUDA graph is being recorded before the first step of this optimizer. Take a "
                "few steps without it first, as torch.cuda.graph asks for anyway."
            )
        if phase.converged or self._truncation == 1:
            loss = self._step_base(closure)
            if phase is Phase.PRUNED:
                self._hold_at_zero()
            return loss
        strength = self._strengths[device]
        targets = self._targets()
        if any(t.shard is not None and not t.is_in_window for t in targets):
            raise RuntimeError(
                "A CUDA graph cannot hold the truncation of a sharded parameter of which parts "
                "with gaps between them are ranked. Keep `step()` out of the graph."
            )
        if self._truncate == "update":
            entries = _entries(targets)
            before = [each.clone() for each in entries]
            loss = self._step_base(closure)
            kept = [
                (row & 1).bool().view(each.shape)
                for row, each in zip(self._spread_bytes(targets), entries, strict=True)
            ]
            truncate_updates_(entries, before, kept, strength)
            return loss

        def truncate() -> None:
            truncate_removed_(_gradients(targets), self._spread_bytes(targets), strength)

        return self._step_after(closure, truncate)

    def _load_kernels(self) -> None:
        """Launch once what a recorded step launches, on the gradients of this step.

        A kernel is loaded at its first launch, which cannot be while a graph is recorded. Gradients
        times one are what they were.
        """
        device = self._search.window.device
        if (
            self._kernels_loaded
            or self._truncate != "gradient"
            or self._truncation == 1
            or self.phase.converged
            or not kernels_run(device)
        ):
            return
        targets = self._targets()
        gradients = _gradients(targets)
        found = [each for each in gradients if each is not None]
        if not found:
            return
        # What else there may be cannot be recorded, and is not launched by kernels.
        if all(each.device == device and not each.is_sparse for each in found) and all(
            t.shard is None or t.is_in_window for t in targets
        ):
            one = torch.ones((), dtype=torch.float32, device=device)
            truncate_removed_(gradients, self._spread_bytes(targets), one)
        self._kernels_loaded.append(True)

    def _spread_bytes(self, targets: list[Target]) -> list[Tensor]:
        """For each target the bytes of its entries, made from those of units where it has some."""
        rows = []
        for target, row in zip(targets, self._newest_bytes(), strict=True):
            if target.is_in_window:
                rows.append(row)
                continue
            entries = target.reached(target.parameter.detach())
            rows.append(spread_mask(row, target.part.units, entries.shape).reshape(-1))
        return rows

    def _strength_on(self, device: torch.device) -> Tensor:
        """What the gradients of removed entries are multiplied by now, where a kernel can read it.

        The same tensor for good: a recorded graph reads it at every replay.
        """
        if device not in self._strengths:
            kernels_run(device)  # what has to be tried cannot be while a graph is recorded
            self._strengths[device] = torch.ones((), dtype=torch.float32, device=device)
            self._set_strengths()
        return self._strengths[device]

    def _set_strengths(self) -> None:
        strength = self._truncation if self.phase is Phase.TRUNCATING else 1.0
        for each in self._strengths.values():
            each.fill_(strength)

    def _update_truncated_step(self, closure: Closure | None) -> Any:
        targets = self._targets()
        entries = _entries(targets)
        masks, before = zip(*self._mask_buffers(targets), strict=True)
        torch._foreach_copy_(before, entries)
        loss = self._step_base(closure)
        self._warn_if_inert(targets)
        truncate_updates_(entries, before, masks, self._truncation)
        return loss

    def _warn_if_inert(self, targets: list[Target]) -> None:
        if all(target.parameter.grad is None for target in targets):
            self._warn_once(
                "no gradients",
                "No representative parameter has a gradient at step(), so nothing is truncated. "
                "Either they are all frozen (pass a `selector=` that names trained parameters), "
                "or gradients are consumed before step(), as optimizers that step in backward and "
                "sharded engines such as DeepSpeed ZeRO do, and truncation cannot reach them.",
            )

    def _hold_at_zero(self) -> None:
        targets = self._targets()
        buffers = self._mask_buffers(targets)
        zero_removed_(_entries(targets), [removed for (removed,) in buffers])

    def _is_due(self) -> bool:
        if self._sample_every is None:
            return False
        if callable(self._sample_every):
            return bool(self._sample_every(self._search.step))
        return self._search.step % self._sample_every == 0

    # ---- where things are

    def _parameter(self, name: str) -> Tensor:
        """The parameter of that name now.

        It is looked up at every use: sharding, ``module.to()``, ``swap_tensors`` and
        ``convert_sync_batchnorm`` put new parameters and modules in the places of old ones.
        """
        parameter: Tensor = attrgetter(name)(self._model)
        known = self._shard_of_name.get(name)
        if known is not None and not known.is_of(parameter):
            # A forward pass without a backward may have left there what FSDP cuts into shards.
            reshard_(self._model)
            parameter = attrgetter(name)(self._model)
        if type(parameter) is Tensor:
            raise RuntimeError(
                f"{name!r} is no parameter any more but computed from another, as "
                "torch.nn.utils.prune and parametrize make it, so nothing that is done to it "
                "lasts. Reparametrise before WormOptimizer is built and select what it is computed "
                "from, or make it a parameter again with torch.nn.utils.prune.remove() or "
                "parametrize.remove_parametrizations()."
            )
        return parameter

    def _shard(self, index: int) -> Shard | None:
        """What this rank holds of a representative; None if that is all of it."""
        representative = self._representatives[index]
        parameter = self._parameter(representative.name)
        if not is_distributed(parameter):
            return None
        known = self._shards.get(index)
        if known is None or not known.is_of(parameter):
            if known is not None and self._search.history:
                raise RuntimeError(
                    f"{representative.name!r} is sharded in another way than when the last mask "
                    "was drawn. Save a checkpoint before sharding anew, and load it afterwards."
                )
            found = shard_of(representative.ranked[0], parameter)
            if found is None:
                return None
            owned = {id(p) for group in self.param_groups for p in group["params"]}
            if id(parameter) not in owned:
                raise RuntimeError(
                    f"{representative.name!r} was sharded after the base optimizer was built, "
                    "which still holds the parameter that it was before. Build the optimizer after "
                    "sharding, or put the new parameters into its `param_groups`."
                )
            for part in representative.reached:
                if not spread_alike(self._parameter(part.name), parameter):
                    raise RuntimeError(
                        f"{part.name!r} goes with {representative.name!r}, and is not sharded in "
                        "the same way. Shard both alike, or select without followers."
                    )
                self._shard_of_name[part.name] = found
            self._shards[index] = known = found
        return known

    def _shares(self) -> list[tuple[int, Held | None]]:
        """For each representative how much is in this rank's window, and what others hold."""
        shards = [self._shard(index) for index in range(len(self._representatives))]
        return [
            (size, None if shard is None else shard.held)
            for size, shard in zip(self._sizes(), shards, strict=True)
        ]

    def _ranked(self) -> dict[str, Tensor]:
        """What is ranked, by what to call it in a message: entries, or the scores of units."""
        ranked = {}
        for index, representative in enumerate(self._representatives):
            names = " and ".join(dict.fromkeys(part.name for part in representative.ranked))
            # Two representatives may be parts of one parameter.
            label = f"{names} (representative {index})" if names in ranked else names
            check_visible(representative.name, self._parameter(representative.name))
            shard = self._shard(index)
            if shard is not None:
                ranked[label] = shard.ranked(local(self._parameter(representative.name)))
                continue
            parts = [
                (part.entries(local(self._parameter(part.name))), part.units)
                for part in representative.ranked
            ]
            ranked[label] = unit_magnitudes(parts) if representative.units else parts[0][0]
        return ranked

    def _targets(self) -> list[Target]:
        """Every parameter that the mask reaches, with what says where."""
        return [
            Target(part, self._parameter(part.name), shard)
            for index, representative in enumerate(self._representatives)
            for shard in (self._shard(index),)
            for part in representative.reached
        ]

    def _sizes(self) -> list[int]:
        """How many entries or units of each representative are in this rank's window."""
        return [
            self._all_size(representative) if shard is None else shard.size
            for index, representative in enumerate(self._representatives)
            for shard in (self._shard(index),)
        ]

    def _all_sizes(self) -> list[int]:
        """How many entries or units each representative has, on all ranks together."""
        return [self._all_size(representative) for representative in self._representatives]

    def _all_size(self, representative: Representative) -> int:
        parameter = self._parameter(representative.name)
        if representative.units or not is_distributed(parameter):
            return representative.n_units(parameter)
        shape = ranked_indices(representative.ranked[0], tuple(parameter.shape))
        return math.prod(len(indices) for indices in shape)

    def _newest_masks(self) -> list[Tensor]:
        """The newest mask, cut into that of each representative's units."""
        self._fit_window()
        return list(torch.split(newest_mask(self._search.window), self._sizes()))

    # ---- the window on this rank, and on all

    def _fit_window(self) -> None:
        """Have the window hold what this rank holds: sharding may have come after it was made."""
        sizes = self._sizes()
        window = self._search.window
        if window.shape[1] == sum(sizes):
            return
        parts = []
        for index, rows in enumerate(torch.split(window, self._all_sizes(), dim=1)):
            shard = self._shard(index)
            parts.append(rows if shard is None else shard.part_of(rows))
        with torch.inference_mode(False):
            self._search.window = torch.cat(parts, dim=1)

    def _put(self, index: int, part: Representative, values: Tensor, here: Tensor) -> None:
        """Write values of a representative's units to where they lie in a parameter, in place."""
        shard = self._shard(index)
        if shard is not None:
            shard.fill(values, here)
        else:
            entries = part.entries(here)
            entries.copy_(spread_mask(values, part.units, entries.shape))

    def _packed_window(self) -> dict[str, list[Tensor]]:
        """The window as tensors that are shaped and spread as the parameters are.

        So whatever saves and reshards parameters can save and reshard it. Units have no place of
        their own in a parameter; theirs are flat.
        """
        self._fit_window()
        packed: dict[str, list[Tensor]] = {}
        for index, rows in enumerate(torch.split(self._search.window, self._sizes(), dim=1)):
            representative = self._representatives[index]
            key = self._packed_name(index)
            if representative.units:
                packed[key] = [row.clone() for row in rows]
                continue
            here = local(self._parameter(representative.name))
            if key not in packed:
                packed[key] = [
                    torch.zeros_like(here, dtype=torch.uint8, device=rows.device) for _ in rows
                ]
            for row, place in zip(rows, packed[key], strict=True):
                self._put(index, representative.ranked[0], row, place)
        for index, representative in enumerate(self._representatives):
            key = self._packed_name(index)
            if not representative.units:
                like = self._parameter(representative.name)
                packed[key] = [
                    row if is_distributed(row) else spread_like(row, like) for row in packed[key]
                ]
        return packed

    def _unpacked_window(self, packed: Any) -> Tensor:
        """The window that :meth:`_packed_window` was made of, on whatever ranks that was."""
        parts = []
        n_rows = len(self._search.window)
        for index, representative in enumerate(self._representatives):
            key = self._packed_name(index)
            like = self._parameter(representative.name)
            shape = (self._all_size(representative),) if representative.units else tuple(like.shape)
            rows = packed.get(key) if isinstance(packed, dict) else None
            if (
                not isinstance(rows, (list, tuple))
                or len(rows) != n_rows
                or any(not isinstance(row, Tensor) or tuple(row.shape) != shape for row in rows)
            ):
                raise ValueError(
                    f"The checkpoint's window of masks has no {n_rows} tensors of shape {shape} "
                    f"for {key!r}: it is truncated or for another model. Load an earlier one."
                )
            shard = self._shard(index)
            if not representative.units:
                rows = [local_part_of(row, like) for row in rows]
                part = representative.ranked[0]
                rows = [
                    (part.entries(row) if shard is None else shard.ranked(row)).reshape(-1)
                    for row in rows
                ]
            parts.append(torch.stack([row.to(self._search.window.device) for row in rows]))
        return torch.cat(parts, dim=1)

    def _packed_name(self, index: int) -> str:
        representative = self._representatives[index]
        name = canonical_name(representative.name)
        return f"{name} (units {index})" if representative.units else name

    # ---- what a step needs of the newest mask

    def _mask_buffers(self, targets: list[Target]) -> list[tuple[Tensor, ...]]:
        """What a step needs of the newest mask, for each target in order.

        What gradients are multiplied by, or nothing where the bytes in the window do; or the mask
        and room for the weights before the step; or, when pruned, what is removed. The first step
        that needs them makes them; later masks are only written into them, so that the other steps
        allocate nothing.
        """
        entries = _entries(targets)
        device = self._search.window.device
        if not self._buffers or not all(
            _fits(buffers, each) and (buffers or each.device == device)
            for buffers, each in zip(self._buffers, entries, strict=True)
        ):
            few = sum(each.numel() for each in entries) <= _FEW
            self._buffers[:] = [
                self._new_buffers(target, each, few)
                for target, each in zip(targets, entries, strict=True)
            ]
            self._fill_buffers(self._buffers)
        return self._buffers

    def _new_buffers(self, target: Target, entries: Tensor, few: bool) -> tuple[Tensor, ...]:
        if self._search.pruned:
            return (torch.empty_like(entries, dtype=torch.bool),)
        if self._truncate == "update":
            return torch.empty_like(entries, dtype=torch.bool), torch.empty_like(entries)
        direct = target.is_in_window and entries.device == self._search.window.device
        return () if direct and not few else (torch.empty_like(entries),)

    def _newest_bytes(self) -> list[Tensor]:
        """For each target the bytes of the window that its entries have, or would have."""
        parts = torch.split(self._search.window[0], self._sizes())
        return [
            part
            for part, representative in zip(parts, self._representatives, strict=True)
            for _ in representative.reached
        ]

    def _fill_buffers(self, buffers: list[tuple[Tensor, ...]]) -> None:
        masks = self._newest_masks()
        reached = [
            (self._shard(index), part, masks[index])
            for index, representative in enumerate(self._representatives)
            for part in representative.reached
        ]
        for (buffer, *_), (shard, part, unit_mask) in (
            pair for pair in zip(buffers, reached, strict=True) if pair[0]
        ):
            if shard is None:
                mask = spread_mask(unit_mask, part.units, buffer.shape)
            else:
                mask = shard.spread(unit_mask, buffer, rest=True)
            if self._search.pruned:
                buffer.copy_(~mask)
            elif self._truncate == "update":
                buffer.copy_(mask)
            else:
                fill_multiplier_(buffer, mask.to(buffer.device), self._truncation)

    def _hold_place(self) -> None:
        """Keep the record's key in every parameter group, see `checkpoint`."""
        for group in self.param_groups:
            group.setdefault(RECORD_KEY, None)

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=2)


def _entries(targets: list[Target]) -> list[Tensor]:
    """The entries of each target that the mask reaches, as views."""
    return [target.reached(target.parameter.detach()) for target in targets]


def _gradients(targets: list[Target]) -> list[Tensor | None]:
    """The gradient of the same entries, as views; None where there is none."""
    return [
        None if target.parameter.grad is None else target.reached(target.parameter.grad)
        for target in targets
    ]


def _fits(buffers: tuple[Tensor, ...], entries: Tensor) -> bool:
    """Whether buffers were made for entries of this dtype, on this device."""
    return all(
        buffer.device == entries.device and buffer.dtype in (torch.bool, entries.dtype)
        for buffer in buffers
    )
