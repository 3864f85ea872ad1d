"""A pruned network made smaller: channels that are zero are cut out, and nothing else changes.

``trace_channels`` says what can go. Parameters stay the objects that they are and only get smaller,
so optimizers, schedulers and hooks go on. What comes out is checked against what went in; if it
differs, everything is put back.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from torch_worm_optim._checks import check_count, warn_user
from torch_worm_optim.distributed import canonical_name, is_dtensor
from torch_worm_optim.shrink.resize import Sizes, states_its_size
from torch_worm_optim.shrink.trace import check_shapes, trace_channels, zero_channels

# For each dimension of a tensor which indices stay; None where all do.
Kept = tuple["Tensor | None", ...]

# Buffers of a scattered BatchNorm: the channels that it writes, and of how many.
_SCATTER, _WIDTH = "scatter", "scatter_width"


@dataclass
class ShrinkReport:
    """What was cut out of a network, and what could not be.

    Attributes:
        parameters: How many parameters there were before and after.
        macs: Multiplications of one forward pass of the batch given, before and after.
        layers: For each module that has parameters of its own, by name, how many those were before
            and after. One of the model itself stands under its own name.
        kept: For each parameter and buffer that was cut, by name, for each dimension the indices
            that stayed, a 1-D int64 tensor on the host, or None if all did. Of a grouped
            convolution's weight those of the second dimension are input channels, of all groups.
        reasons: For each BatchNorm scale or matrix of a linear layer with zero channels that
            stayed, for each reason how many. A row of a matrix is a channel, so a head is as many
            as its queries, keys and values have rows.
        channels: How many zero channels there were, and how many of them stayed.
        max_difference: The largest difference of outputs before and after, over the largest output.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        ...                       nn.Conv2d(4, 1, 1))
        >>> with torch.no_grad():
        ...     _ = model[1].weight[:2].zero_()
        >>> report = shrink_(model, torch.ones(1, 1, 2, 2))
        >>> print(report)
        parameters 17 -> 9 (47 % gone)
        multiplications 32 -> 16 (50 % gone)
        zero channels: 2 of 2 gone
        layers that changed most:
          1: 8 -> 4
          0: 4 -> 2
          3: 5 -> 3
        >>> report.kept["1.weight"]
        (tensor([2, 3]),)
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    layers: dict[str, tuple[int, int]]
    kept: dict[str, Kept]
    reasons: dict[str, dict[str, int]]
    channels: tuple[int, int]
    max_difference: float
    groups: dict[str, int] = field(default_factory=dict, repr=False)
    shapes: dict[str, torch.Size] = field(default_factory=dict, repr=False)
    is_scattered: bool = field(default=False, repr=False)

    @property
    def left(self) -> dict[str, str]:
        """For each scale or matrix with zero channels that stayed, how many did so and why."""
        return {
            name: ", ".join(f"{why}: {n}" for why, n in each.items())
            for name, each in self.reasons.items()
        }

    def as_dict(self) -> dict[str, float]:
        """The figures of the whole network as numbers, for a logger."""
        return {
            "parameters_before": self.parameters[0],
            "parameters_after": self.parameters[1],
            "macs_before": self.macs[0],
            "macs_after": self.macs[1],
            "zero_channels": self.channels[0],
            "zero_channels_left": self.channels[1],
            "max_difference": self.max_difference,
        }

    def apply_(self, model: nn.Module) -> None:
        """Cut a copy of the network in the same way, such as an average of its weights.

        Its zeros must be where the network's are, see
        :func:`~torch_worm_optim.apply_ticket_`; that is not checked.

        Args:
            model: A model with the parameters that the network had before.

        Raises:
            ValueError: If it has other parameters or buffers than the network had where that was
                cut, or the network was shrunk with ``scatter``. The model is left as it was.
        """
        if self.is_scattered:
            raise ValueError(
                "The network was shrunk with `scatter`, so some BatchNorms write by index, which "
                "those of a copy do not. Prune the copy, and shrink it with `scatter` by itself."
            )
        named = {canonical_name(name): each for name, each in _named_tensors(model).items()}
        for name, shape in self.shapes.items():
            found = named.get(canonical_name(name))
            if found is None or found.shape != shape:
                has = "none of that name" if found is None else f"one of {tuple(found.shape)}"
                raise ValueError(
                    f"{name!r} had shape {tuple(shape)} before it was cut, and "
                    f"{type(model).__name__} has {has}. Pass a copy of the network as it was."
                )
        sizes = Sizes(model)
        with torch.no_grad():
            for name, kept in self.kept.items():
                tensor = named[canonical_name(name)]
                tensor.set_(cut_tensor(tensor, kept, self.groups.get(name, 1)))  # type: ignore[call-overload]
        sizes.fit()

    def __str__(self) -> str:
        """A few lines: parameters, multiplications, channels, why some stayed, and five layers."""
        zero, stayed = self.channels
        lines = [
            f"{what} {before:,} -> {after:,} ({_percent(before - after, before)} gone)"
            for what, (before, after) in (
                ("parameters", self.parameters),
                ("multiplications", self.macs),
            )
        ]
        lines.append(f"zero channels: {zero - stayed:,} of {zero:,} gone")
        totals: Counter[str] = Counter()
        for reasons in self.reasons.values():
            totals.update(reasons)
        lines += [f"  {n:,} stay: {reason}" for reason, n in totals.most_common()]
        smaller = [(name, *sizes) for name, sizes in self.layers.items() if sizes[0] > sizes[1]]
        smaller.sort(key=lambda each: each[2] - each[1])
        lines += ["layers that changed most:"] if smaller else []
        lines += [f"  {name}: {before:,} -> {after:,}" for name, before, after in smaller[:5]]
        return "\n".join(lines)


def shrink_(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    scatter: bool = False,
    multiple_of: int = 1,
) -> ShrinkReport:
    """Cut the channels that are zero out of a network, exactly, in place.

    A channel goes where all that read it see zero: a BatchNorm scale and shift that are zero take
    the convolution's filter before them and the columns behind them along, and a row of a linear
    layer the column that reads it; of attention whole heads go. What the network computes stays the
    same to rounding, in evaluation and in training, and so does what further training makes of it.
    A branch that runs in training alone is not seen.

    Args:
        model: The network, on any device, in any dtype.
        args: One batch for ``model(*args, **kwargs)``: a tensor or a tuple. It is run in evaluation
            mode, a few times.
        kwargs: Keyword arguments of the same call.
        optimizer: An optimizer of the model, whose state is cut alike.
        scatter: Whether BatchNorms that write into a wider residual stream are narrowed as well;
            their class then is one that writes by index.
        multiple_of: Zero channels stay until the sizes that change are multiples of it. With 8, and
            half precision, tensor cores stay at their speed, which other sizes can halve.

    Returns:
        The :class:`ShrinkReport`.

    Raises:
        TypeError: If ``multiple_of`` is not a number.
        ValueError: If ``multiple_of`` is not a whole number of at least 1.
        RuntimeError: If the model is sharded or wrapped in DistributedDataParallel, if the
            optimizer's state is spread over ranks, if the model's output differs from call to call,
            or if what it computes would change. Model and optimizer are left as they were.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = model[1].weight[0].zero_()
        >>> _ = shrink_(model, torch.ones(4, 2))
        >>> model[0].out_features, model[1].num_features, model[3].in_features
        (2, 2, 2)
    """
    multiple_of = check_count("multiple_of", multiple_of, least=1)
    _refuse_wrapped(model)
    if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer has it
        raise RuntimeError(
            f"{type(optimizer).__name__} spreads its state over ranks, and parts cannot be cut "
            "alone. Load its consolidated state into the optimizer that it is made of, and shrink "
            "with that."
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile has around it
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    kwargs = dict(kwargs or {})
    with _evaluation(model):
        run = functools.partial(_outputs, model, args, kwargs)
        expected, macs_before = run()
        # A forward may read a number of channels from an attribute of its own. Then it fails, and
        # less is cut: first channels stay that it splits into parts, or heads, or both, then
        # nothing is scattered.
        attempts = [
            (splits, heads, scattering)
            for scattering in dict.fromkeys((scatter, False))
            for heads in (True, False)
            for splits in (True, False)
        ]
        problems: list[Exception] = []
        for cut_splits, cut_heads, scattering in attempts:
            cut = _Cut(model)
            try:
                cut.away(args, kwargs, cut_splits, cut_heads, scattering, multiple_of)
                outputs, macs_after = run()
                difference = _difference(expected, outputs)
                if difference > _tolerance(expected):
                    raise RuntimeError(
                        f"outputs differ by {difference:.2g} of the largest, and rounding would "
                        f"explain {_tolerance(expected):.2g}"
                    )
                break
            except BaseException as error:  # whatever a forward may raise
                cut.undo()
                if not isinstance(error, Exception):
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold all that was computed
                problems.append(error)
        else:
            again, _ = run()
            if _difference(expected, again) > _tolerance(expected):
                raise RuntimeError(
                    f"{type(model).__name__} returns other outputs when it is called again with "
                    "the same batch in evaluation mode, so nobody can tell whether shrinking "
                    "changes them. Shrink the part of it that is not random."
                )
            raise RuntimeError(
                f"Nothing was cut out of {type(model).__name__}. With as little cut as there is to "
                f"try, what it computes would still have changed: {problems[-1]}. A forward that "
                "reads a number of channels from an attribute may do this. Shrink its parts one by "
                "one, or leave such layers out of the selection."
            ) from problems[-1]
    if scatter and not scattering:
        warn_user(
            f"BatchNorms of {type(model).__name__} cannot write by index into a wider tensor "
            f"({problems[-1]}), so it was shrunk without `scatter`."
        )
    if optimizer is not None:
        _cut_state(optimizer, cut)
    layers: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0] or name
        before, after = layers.get(layer, (0, 0))
        layers[layer] = (before + cut.before[name].numel(), after + parameter.numel())
    return ShrinkReport(
        (sum(before for before, _ in layers.values()), sum(after for _, after in layers.values())),
        (macs_before, macs_after),
        layers,
        cut.kept,
        cut.left,
        (cut.n_zero, sum(n for each in cut.left.values() for n in each.values())),
        difference,
        cut.groups,
        {name: cut.before[name].shape for name in cut.kept},
        cut.is_scattered,
    )


class _Cut:
    """One attempt at cutting, which can be undone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[str, Kept] = {}
        self.left: dict[str, dict[str, int]] = {}
        self.groups = {
            f"{name}.weight": module.groups
            for name, module in model.named_modules()
            if isinstance(module, _ConvNd) and 1 < module.groups < module.in_channels
        }
        self.before = {name: tensor.detach() for name, tensor in _named_tensors(model).items()}
        self.n_zero = sum(int(zero.sum()) for _, zero in zero_channels(model).values())
        self._sizes = Sizes(model)
        self._classes = [(module, type(module)) for module in model.modules()]

    def away(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        cut_splits: bool,
        cut_heads: bool,
        scatter: bool,
        multiple_of: int,
    ) -> None:
        """Cut out all that can go."""
        trace_with = functools.partial(
            trace_channels,
            self.model,
            args,
            kwargs,
            cut_splits=cut_splits,
            cut_heads=cut_heads,
            multiple_of=multiple_of,
        )
        _forget(self.model)
        trace = trace_with()
        self._cut(trace.kept)
        self.left = trace.left
        _forget(self.model)
        check_shapes(self.model, args, kwargs, trace.steps)
        if not scatter or not trace.left:
            return
        modules = dict(self.model.named_modules())
        owners = {name: modules[name.rpartition(".")[0]] for name in trace.left}
        scattered = [name for name, module in owners.items() if _is_zero_at_zero(module)]
        trace = trace_with(scattered=scattered)
        for name in scattered:
            if name in trace.kept:
                indices = torch.as_tensor(trace.kept[name][0])
                _scatter_(owners[name], indices, owners[name].num_features)
        self._cut(trace.kept)
        self.left = trace.left

    def _cut(self, kept: Mapping[str, tuple[Any, ...]]) -> None:
        """Cut parameters and buffers, and set what modules say of their sizes."""
        named = _named_tensors(self.model)
        with torch.no_grad():
            for name, indices in kept.items():
                tensors = tuple(
                    None if each is None else torch.from_numpy(each) for each in indices
                )
                smaller = cut_tensor(named[name], tensors, self.groups.get(name, 1))
                named[name].set_(smaller)  # type: ignore[call-overload]
                self.kept[name] = composed(self.kept.get(name), tensors)
        self.fit()

    def fit(self) -> None:
        """Have modules say of their sizes what their parameters are."""
        self._sizes.fit()

    @property
    def is_scattered(self) -> bool:
        """Whether a BatchNorm writes by index now that did not before."""
        return any(type(module) is not kind for module, kind in self._classes)

    def undo(self) -> None:
        """Put everything back."""
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
                del module._buffers[_SCATTER], module._buffers[_WIDTH], module.width
        named = _named_tensors(self.model)
        with torch.no_grad():
            for name, tensor in self.before.items():
                if named[name].shape != tensor.shape:
                    named[name].set_(tensor)  # type: ignore[call-overload]
        self._sizes.restore()


def load_shrunk_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the ``state_dict`` of a shrunk network into a fresh one, which takes its shapes.

    Args:
        model: The network as it is built, of the dense size.
        state_dict: What ``state_dict()`` of the shrunk network returned, from any file format.

    Raises:
        ValueError: If it is of another network; the message names a parameter, and the model is
            left as it was.

    Example:
        >>> small = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> fresh = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        >>> load_shrunk_(fresh, small.state_dict())
        >>> fresh[2].in_features
        3
    """
    own = {
        key: tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    # A file may hold a weight once that has several names, as an embedding that is read twice.
    saved_as = {id(own[key]): key for key in own if key in state_dict}
    aliases = {key: saved_as[id(own[key])] for key in own if id(own[key]) in saved_as}
    state_dict = {**{key: state_dict[alias] for key, alias in aliases.items()}, **state_dict}
    modules = dict(model.named_modules(remove_duplicate=False))
    scattered = {
        key.removesuffix(f".{_SCATTER}")
        for key in state_dict.keys() - own.keys()
        if key.endswith(f".{_SCATTER}")
        and f"{key}_width" in state_dict
        and isinstance(modules.get(key.removesuffix(f".{_SCATTER}")), _BatchNorm)
    }
    extra = {f"{path}.{key}" for path in scattered for key in (_SCATTER, _WIDTH)}
    saved = {key for key in state_dict if not key.endswith("_extra_state")}
    unknown = (own.keys() ^ saved) - extra
    another = f"The state_dict is of another network than {type(model).__name__}: "
    if unknown:
        raise ValueError(
            f"{another}only one of them has {sorted(unknown)[0]!r}. Build the network as it was "
            "built before it was shrunk."
        )
    for key, tensor in own.items():
        entry, shape = state_dict[key], tuple(tensor.shape)
        if not isinstance(entry, Tensor) or entry.is_meta:
            kind = "a tensor without data" if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(
                f"{key!r} must be a tensor with data, got {kind}. Load the whole file."
            )
        module = modules[key.rpartition(".")[0]]
        same = entry.shape == state_dict[aliases.get(key, key)].shape
        if not same or not (
            tuple(entry.shape) == shape or _could_be_cut(module, shape, tuple(entry.shape))
        ):
            raise ValueError(
                f"{another}{key!r} has shape {tuple(entry.shape)}, where the network has {shape}. "
                "Build the network as it was built before it was shrunk."
            )
    cut = _Cut(model)
    try:
        with torch.no_grad():
            for path in scattered:
                width = int(state_dict[f"{path}.{_WIDTH}"])
                _scatter_(modules[path], state_dict[f"{path}.{_SCATTER}"], width)
            for key, tensor in own.items():
                if tensor.shape != state_dict[key].shape:
                    tensor.set_(tensor.new_empty(state_dict[key].shape))  # type: ignore[call-overload]
        cut.fit()
        model.load_state_dict(state_dict)
    except BaseException:
        cut.undo()
        raise


def _could_be_cut(module: nn.Module, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether shrinking could have made a parameter of a module that small."""
    if len(before) != len(after) or any(b < a for b, a in zip(before, after, strict=True)):
        return False
    if isinstance(module, nn.Embedding):
        return before[0] == after[0]
    return not states_its_size(module)


# ---- tensors


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def cut_tensor(tensor: Tensor, kept: Kept, groups: int = 1) -> Tensor:
    """The indices of a tensor that stay, in its own memory format.

    Args:
        tensor: A tensor of the shape that a parameter had before.
        kept: For each dimension the indices that stay, or None if all do.
        groups: Of a grouped convolution's weight how many groups it has, else 1.

    Returns:
        A new tensor.

    Example:
        >>> cut_tensor(torch.arange(6).view(2, 3), (None, torch.tensor([0, 2])))
        tensor([[0, 2],
                [3, 5]])
    """
    result = tensor.detach()
    for dim, indices in reversed(list(enumerate(kept))):
        if indices is None:
            continue
        indices = indices.to(tensor.device)
        if dim == 1 and groups > 1:
            n = tensor.shape[1]
            parts = [
                part.index_select(1, indices[indices // n == group] - group * n)
                for group, part in enumerate(result.chunk(groups))
            ]
            result = torch.cat(parts)
        else:
            result = result.index_select(dim, indices)
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=memory_format):
            return result.contiguous(memory_format=memory_format)
    return result


def composed(first: Kept | None, second: Kept) -> Kept:
    """What stays of a tensor that is cut twice, in the indices that it had at first.

    Args:
        first: What stayed the first time, or None if it was not cut.
        second: What stayed the second time.

    Example:
        >>> composed((torch.tensor([0, 2, 3]),), (torch.tensor([1, 2]),))
        (tensor([2, 3]),)
    """
    if first is None:
        return second
    return tuple(
        b if a is None else a if b is None else a[b] for a, b in zip(first, second, strict=True)
    )


def _cut_state(optimizer: Optimizer, cut: _Cut) -> None:
    """Cut gradients and the optimizer's state as their parameters were cut."""
    named, reset = _named_tensors(cut.model), []
    for name, kept in cut.kept.items():
        parameter, shape = named[name], cut.before[name].shape
        if parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            parameter.grad = cut_tensor(gradient, kept, cut.groups.get(name, 1))
        if parameter not in optimizer.state:
            continue
        state = optimizer.state[parameter]
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        if any(value.numel() > 1 and value.shape != shape for value in tensors.values()):
            del optimizer.state[parameter]
            reset.append(name)
            continue
        for key, value in tensors.items():
            if value.shape == shape:
                state[key] = cut_tensor(value, kept, cut.groups.get(name, 1))
    if reset:
        warn_user(
            f"{type(optimizer).__name__} keeps something of another shape than the parameter's for "
            f"{len(reset)} parameters, {reset[0]!r} among them, which cannot be cut as the "
            "parameters are. It starts afresh for them."
        )


# ---- modules


class _Scattered:
    """A BatchNorm that writes its channels into a wider tensor by index; the others are zero."""

    scatter: Tensor
    width: int

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and write into zeros."""
        y: Tensor = super().forward(x)  # type: ignore[misc]
        zeros = y.new_zeros(y.shape[0], self.width, *y.shape[2:])
        return zeros.index_copy(1, self.scatter, y)


@functools.cache
def _scattered_class(kind: Any) -> Any:
    """The class of a scattered BatchNorm of a kind."""
    return type(f"Scattered{kind.__name__}", (_Scattered, kind), {})


def _scatter_(module: Any, indices: Tensor, width: int) -> None:
    """Have a BatchNorm write into a tensor of so many channels."""
    device = module.weight.device
    module.register_buffer(_SCATTER, indices.to(device).clone())
    module.register_buffer(_WIDTH, torch.tensor(width, device=device))
    module.width = width  # so that a forward need not read it back from the device
    kind: Any = type(module)
    module.__class__ = _scattered_class(kind)


def _is_zero_at_zero(module: nn.Module) -> bool:
    """Whether a BatchNorm whose scale and shift are zero returns zeros; some have an activation."""
    if not isinstance(module, _BatchNorm) or isinstance(module, _Scattered):
        return False
    twin = copy.deepcopy(module).eval()
    with torch.no_grad():
        twin.weight.zero_(), twin.bias.zero_()
        n_spatial = next((n for n in (1, 2, 3) if f"{n}d" in str(type(module).__mro__)), 2)
        size = (1, module.num_features, *[1] * n_spatial)
        return not bool(twin(twin.weight.new_zeros(size)).any())


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise for a model that other ranks have a part or a copy of."""
    name = next((n for n, p in model.named_parameters() if is_dtensor(p)), None)
    if name is not None:
        raise RuntimeError(
            f"{canonical_name(name)!r} is sharded, and a shard cannot be cut alone. Gather the "
            "whole model and the optimizer's state, shrink, and shard again; "
            "docs/distributed.md shows how."
        )
    wrapped = next(
        (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None
    )
    if wrapped is not None:
        raise RuntimeError(
            "The model is wrapped in DistributedDataParallel, which has planned its messages for "
            "the sizes that parameters have. Shrink its `.module` on every rank, and wrap that "
            "anew. A WormOptimizer shrinks the model that it was built with: build it with "
            "`.module`; docs/distributed.md shows how, also for one that is built already."
        )


# ---- the check


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with modes, buffers and random numbers put back afterwards."""
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(
            f"{lazy!r} has no shape yet, so nothing is known of its zeros. Run the model once "
            "before."
        )
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    caches = torch.is_autocast_cache_enabled()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # Autocast would go on with copies of weights that it made before they were cut.
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        # Fused attention hides how it treats heads, and how many multiplications it takes.
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes:
            module.training = training
        named = dict(model.named_buffers())
        with torch.no_grad():
            for name, buffer in buffers.items():
                if named[name].shape == buffer.shape and not torch.equal(named[name], buffer):
                    named[name].copy_(buffer)


def _forget(model: nn.Module) -> None:
    """Have modules forget what they keep in evaluation, as LeViT's do their biases of positions."""
    model.train()
    model.eval()


class _MultiplicationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiplications and additions, without the module hooks of ``FlopCounterMode``.

    Those fail where a module gets a parameter as its input and no gradients are computed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count what it takes."""
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.n_operations += count(*args, **(kwargs or {}), out_val=out)
        return out


def _outputs(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], int]:
    """The tensors that a model returns, and how many multiplications that takes."""
    _forget(model)
    counter = _MultiplicationCounter()
    with torch.no_grad(), torch.random.fork_rng(), counter:
        torch.manual_seed(0)
        result = model(*args, **kwargs)
    leaves = tree_leaves(result)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    # What a decoder remembers of keys and values gets smaller with its heads.
    others = [
        leaf
        for leaf in leaves
        if not isinstance(leaf, (Tensor, int, float, str, type(None)))
        and not type(leaf).__name__.endswith("Cache")
    ]
    if others or not tensors:
        what = type(others[0]).__name__ if others else "no tensor"
        raise TypeError(
            f"{type(model).__name__} returns {what}, in which shrinking cannot find the tensors. "
            "Return tensors, or tuples, lists and dicts of tensors."
        )
    return tensors, counter.n_operations // 2


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of two outputs, over the largest entry; infinite if shapes differ."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return math.inf
        x, y = x.double(), y.double()
        differs = x != y  # which two equal infinities, as of masked scores, do not
        if differs.any():
            finite = x[x.isfinite()].abs()
            scale = max(float(finite.max()) if finite.numel() else 0.0, 1e-30)
            gap = float((x - y)[differs].abs().max()) / scale
            worst = math.inf if math.isnan(gap) else max(worst, gap)
    return worst


def _tolerance(outputs: Sequence[Tensor]) -> float:
    """What rounding may change: the root of the coarsest dtype's precision."""
    precisions = [
        # Convolutions of single precision are rounded to TF32 on a CUDA device, if not told else.
        2**-10 if each.is_cuda and each.dtype == torch.float32 else torch.finfo(each.dtype).eps
        for each in outputs
        if each.is_floating_point()
    ]
    return math.sqrt(max(precisions, default=0.0))


def _percent(part: int, whole: int) -> str:
    """A share in percent."""
    return f"{100 * part / max(whole, 1):.0f} %"
