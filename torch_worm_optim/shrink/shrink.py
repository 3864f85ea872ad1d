"""A pruned network made smaller: channels that are zero are cut out, and nothing else changes.

``trace_channels`` says what can go. Parameters stay the objects that they are and only get smaller,
so optimizers, schedulers and hooks go on. What comes out is checked against what went in; if it
differs, everything is put back.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from torch_worm_optim._checks import check_count, warn_user
from torch_worm_optim.distributed import canonical_name, is_dtensor
from torch_worm_optim.shrink.cut import Cut, cut_tensor, named_tensors
from torch_worm_optim.shrink.labels import Limits, tensors_in
from torch_worm_optim.shrink.report import ShrinkReport
from torch_worm_optim.shrink.scatter import can_scatter
from torch_worm_optim.shrink.trace import Run, Trace, check_steps, record, trace_channels

_HALF = (torch.float16, torch.bfloat16)


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
    _refuse_spread(model, optimizer)
    model = getattr(model, "_orig_mod", model)  # what torch.compile has around it
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    batch = args, dict(kwargs or {})
    with _evaluation(model):
        run = _runner(model, batch)
        expected = run()
        # A forward may read a number of channels from an attribute of its own. Then it fails, and
        # less is cut: first channels stay that it splits into parts, or heads, or both, then
        # nothing is scattered.
        attempts = itertools.product(dict.fromkeys((scatter, False)), (True, False), (True, False))
        for scattering, cut_heads, cut_splits in attempts:
            cut = Cut(model)
            limits = Limits(cut_splits, cut_heads, multiple_of)
            try:
                found, result = _cut_all(cut, batch, limits, run, scattering)
                difference = _difference(expected.outputs, result.outputs)
                if difference > _tolerance(expected.outputs):
                    raise RuntimeError(
                        f"outputs differ by {difference:.2g} of the largest, and rounding would "
                        f"explain {_tolerance(expected.outputs):.2g}"
                    )
                break
            except BaseException as error:  # whatever a forward may raise
                cut.undo()
                if not isinstance(error, Exception):
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold all that was computed
                problem = error
        else:
            again = run().outputs
            if _difference(expected.outputs, again) > _tolerance(again):
                raise RuntimeError(
                    f"{type(model).__name__} returns other outputs when it is called again with "
                    "the same batch in evaluation mode, so nobody can tell whether shrinking "
                    "changes them. Shrink the part of it that is not random."
                )
            raise RuntimeError(
                f"Nothing was cut out of {type(model).__name__}. With as little cut as there is to "
                f"try, what it computes would still have changed: {problem}. A forward that "
                "reads a number of channels from an attribute may do this. Shrink its parts one by "
                "one, or leave such layers out of the selection."
            ) from problem
    if scatter and not scattering:
        warn_user(
            f"BatchNorms of {type(model).__name__} cannot write by index into a wider tensor "
            f"({problem}), so it was shrunk without `scatter`."
        )
    if optimizer is not None:
        _cut_state(optimizer, cut)
    layers: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0] or name
        before, after = layers.get(layer, (0, 0))
        layers[layer] = (before + cut.before[name].numel(), after + parameter.numel())
    return ShrinkReport(
        parameters=(sum(n for n, _ in layers.values()), sum(n for _, n in layers.values())),
        macs=(expected.n_flops // 2, result.n_flops // 2),
        layers=layers,
        kept=cut.kept,
        reasons=found.left,
        channels=(found.n_zero, sum(n for each in found.left.values() for n in each.values())),
        max_difference=difference,
        groups=cut.groups,
        shapes={name: cut.before[name].shape for name in cut.kept},
        is_scattered=bool(cut.scattered),
    )


def _cut_all(
    cut: Cut, batch: tuple[Any, Any], limits: Limits, run: Callable[[], Run], scatter: bool
) -> tuple[Trace, Run]:
    """Cut out all that can go, and run what is left."""
    found = trace_channels(cut.model, *batch, limits)
    cut.cut_(found.kept)
    result = run()
    check_steps(found.steps, result.steps)
    if not scatter or not found.left:
        return found, result
    modules = dict(cut.model.named_modules())
    owners: dict[str, Any] = {name: modules[name.rpartition(".")[0]] for name in found.left}
    scattered = [name for name, module in owners.items() if can_scatter(module)]
    rest = trace_channels(cut.model, *batch, limits._replace(scattered=scattered))
    for name in scattered:
        [indices] = rest.kept.get(name, (None,))
        if indices is not None:
            cut.scatter_(owners[name], indices, owners[name].num_features)
    cut.cut_(rest.kept)
    return rest._replace(n_zero=found.n_zero), run()


def _cut_state(optimizer: Optimizer, cut: Cut) -> None:
    """Cut gradients and the optimizer's state as their parameters were cut."""
    named, reset = named_tensors(cut.model), []
    for name, kept in cut.kept.items():
        parameter, shape = named[name], cut.before[name].shape
        smaller = functools.partial(cut_tensor, kept=kept, groups=cut.groups.get(name, 1))
        if parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            parameter.grad = smaller(gradient)
        state = optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        if any(value.numel() > 1 and value.shape != shape for value in tensors.values()):
            del optimizer.state[parameter]
            reset.append(name)
        else:
            state.update({k: smaller(v) for k, v in tensors.items() if v.shape == shape})
    if reset:
        warn_user(
            f"{type(optimizer).__name__} keeps something of another shape than the parameter's for "
            f"{len(reset)} parameters, {reset[0]!r} among them, which cannot be cut as the "
            "parameters are. It starts afresh for them."
        )


def _refuse_spread(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Raise for a model or an optimizer that other ranks have a part or a copy of."""
    name = next((n for n, p in model.named_parameters() if is_dtensor(p)), None)
    if name is not None:
        raise RuntimeError(
            f"{canonical_name(name)!r} is sharded, and a shard cannot be cut alone. Gather the "
            "whole model and the optimizer's state, shrink, and shard again; "
            "docs/distributed.md shows how."
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise RuntimeError(
            "The model is wrapped in DistributedDataParallel, which has planned its messages for "
            "the sizes that parameters have. Shrink its `.module` on every rank, and wrap that "
            "anew. A WormOptimizer shrinks the model that it was built with: build it with "
            "`.module`; docs/distributed.md shows how, also for one that is built already."
        )
    if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer has it
        raise RuntimeError(
            f"{type(optimizer).__name__} spreads its state over ranks, and parts cannot be cut "
            "alone. Load its consolidated state into the optimizer that it is made of, and shrink "
            "with that."
        )


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
        # Those that override `train()` hear of it.
        model.train(modes[0][1])
        for module, training in modes:
            if module.training is not training:
                module.train(training)
        for module, training in modes:
            module.training = training
        named = dict(model.named_buffers())
        with torch.no_grad():
            for name, buffer in buffers.items():
                if named[name].shape == buffer.shape and not torch.equal(named[name], buffer):
                    named[name].copy_(buffer)


def _runner(model: nn.Module, batch: tuple[Any, Any]) -> Callable[[], Run]:
    """What runs the model's forward; in single precision too, where half would hide differences."""

    def run(model: nn.Module = model, batch: tuple[Any, Any] = batch) -> Run:
        result = record(model, *batch)
        return result._replace(outputs=_tensors_of(result.outputs, model))

    def run_precisely() -> Run:
        return run()._replace(outputs=run(copy.deepcopy(model).float(), single_batch).outputs)

    single_batch = tree_map(
        lambda x: x.float() if isinstance(x, Tensor) and x.dtype in _HALF else x, batch
    )
    if any(parameter.dtype in _HALF for parameter in model.parameters()):
        with contextlib.suppress(Exception):  # a model that has no copy, or names its precision
            run_precisely()
            return run_precisely
    return run


def _tensors_of(outputs: Any, model: nn.Module) -> list[Tensor]:
    """The tensors that a model returns."""
    tensors = tensors_in(outputs)
    # What a decoder remembers of keys and values gets smaller with its heads.
    others = [
        leaf
        for leaf in tree_leaves(outputs)
        if not isinstance(leaf, (Tensor, int, float, str, type(None)))
        and not type(leaf).__name__.endswith("Cache")
    ]
    if others or not tensors:
        what = type(others[0]).__name__ if others else "no tensor"
        raise TypeError(
            f"{type(model).__name__} returns {what}, in which shrinking cannot find the tensors. "
            "Return tensors, or tuples, lists and dicts of tensors."
        )
    return tensors


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
