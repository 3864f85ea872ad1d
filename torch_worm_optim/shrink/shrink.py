"""A pruned network made smaller: channels that are zero are cut out, and nothing else changes.

``trace_channels`` says what can go. Parameters stay the objects that they are and only get smaller,
so optimizers, schedulers and hooks go on. What comes out is checked against what went in; if it
differs, everything is put back.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from torch_worm_optim._checks import check_count, warn_user
from torch_worm_optim.distributed import canonical_name, is_dtensor
from torch_worm_optim.shrink.cut import Cut, put_back_on_error
from torch_worm_optim.shrink.differences import (
    ComputesOtherwiseError,
    check_steps,
    difference_of,
    failed_at,
    first_difference,
    first_other_value,
    largest_difference,
    last_places,
    magnitudes,
    tolerance,
)
from torch_worm_optim.shrink.held import held_masks, only_held_zeros
from torch_worm_optim.shrink.labels import Limits, tensors_of
from torch_worm_optim.shrink.passes import Pass, Run, Step, record
from torch_worm_optim.shrink.report import ShrinkReport
from torch_worm_optim.shrink.scatter import can_scatter
from torch_worm_optim.shrink.state import cut_state_, with_inner
from torch_worm_optim.shrink.trace import Place, Trace, trace_channels

_HALF = (torch.float16, torch.bfloat16)
# How often what one more operator touches is kept before less is cut everywhere.
_MOST_TRIES = 8


def shrink_(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    optimizers: Iterable[Optimizer] = (),
    ticket: Mapping[str, Tensor] | None = None,
    batches: Iterable[Any] = (),
    scatter: bool = False,
    multiple_of: int = 1,
) -> ShrinkReport:
    """Cut the channels that are zero out of a network, exactly, in place.

    A channel goes where all that read it see zero: a BatchNorm scale and shift that are zero take
    the convolution's filter before them and the columns behind them along, and a row of a linear
    layer the column that reads it; of attention whole heads go. What the network computes stays the
    same to rounding, in evaluation and in training, and so does what further training makes of it.
    Where a forward states a width, what that operator touches stays.

    Args:
        model: The network, on any device, in any dtype.
        args: One batch for ``model(*args, **kwargs)``: a tensor or a tuple. It is run a few times
            in evaluation and, if the model can be called so, in training mode.
        kwargs: Keyword arguments of the same call.
        optimizer: An optimizer of the model, whose state is cut alike, with that of optimizers that
            it wraps or that wrap it. State that cannot be cut, such as factors and codes, starts
            afresh for the parameter, with one warning.
        optimizers: What else trains the model, such as Muon for matrices beside AdamW.
        ticket: Bool masks by parameter name, True = kept, that were applied to the model. Of
            trainable parameters only zeros that it removes count then; others are values that
            training will move. Without it every zero counts.
        batches: Further batches, for a model that takes several ways, such as several heads. Each
            is a tensor or a tuple, as ``args``, or a dict of keyword arguments.
        scatter: Whether BatchNorms that write into a wider residual stream are narrowed as well;
            their class then is one that writes by index.
        multiple_of: Zero channels stay until the sizes that change are multiples of it. With 8, and
            half precision, tensor cores stay at their speed, which other sizes can halve.

    Returns:
        The :class:`ShrinkReport`.

    Raises:
        TypeError: If ``multiple_of`` is not a number, an optimizer is none, torch.jit compiled the
            model, or it returns no tensor.
        ValueError: If ``multiple_of`` is not a whole number of at least 1, or the ticket is for
            another model or was not applied to this one.
        RuntimeError: If the model cannot be run with the batch, is sharded or wrapped in
            DistributedDataParallel, if the optimizer's state is spread over ranks, if an optimizer
            that was not passed trains a parameter that would be cut, if the model's output differs
            from call to call, or if what it computes would change. Whatever fails, model and
            optimizers are left as they were.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = model[1].weight[0].zero_()
        >>> _ = shrink_(model, torch.ones(4, 2))
        >>> model[0].out_features, model[1].num_features, model[3].in_features
        (2, 2, 2)
    """
    multiple_of = check_count("multiple_of", multiple_of, least=1)
    given = _checked(optimizer, optimizers)
    _refuse_spread(model, given)
    _refuse_lazy(model)
    model = getattr(model, "_orig_mod", model)  # what torch.compile has around it
    masks = None if ticket is None else held_masks(model, ticket)
    passes = [_pass(args, kwargs), *(_pass(each) for each in batches)]
    with put_back_on_error(model):
        return _shrink(model, passes, masks, given, scatter, multiple_of)


def _shrink(
    model: nn.Module,
    passes: list[Pass],
    masks: Mapping[str, Tensor] | None,
    optimizers: Sequence[Optimizer],
    scatter: bool,
    multiple_of: int,
) -> ShrinkReport:
    """Shrink a model, and the state of these optimizers."""
    with _evaluation(model):
        passes, run, expected = _runner(model, passes)
        attempts = itertools.product(dict.fromkeys((scatter, False)), (True, False), (True, False))
        scattering, cut_heads, cut_splits = next(attempts)
        stay: dict[Place, str] = {}
        for n_tries in itertools.count(1):
            cut = Cut(model)
            limits = Limits(cut_splits, cut_heads, multiple_of, stay=stay)
            try:
                found, result = _cut_all(cut, masks, passes, limits, run, expected, scattering)
                break
            except BaseException as error:  # whatever a forward may raise
                cut.undo()
                if not isinstance(error, Exception):
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold all that was computed
                problem = error
            # A forward may state a width. What the operator touches that fails then stays. If that
            # does not help, less is cut everywhere: first channels stay that are split into
            # parts, or heads, or both, then nothing is scattered.
            to_keep = getattr(problem, "stay", ())
            more = next((each for each in to_keep if each.keys() - stay.keys()), None)
            if more and n_tries <= _MOST_TRIES:
                stay = {**more, **stay}
                continue
            try:
                scattering, cut_heads, cut_splits = next(attempts)
            except StopIteration:
                _refuse(model, expected, run, problem)
    if scatter and not scattering:
        warn_user(
            f"BatchNorms of {type(model).__name__} cannot write by index into a wider tensor "
            f"({problem}), so it was shrunk without `scatter`."
        )
    layers: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0] or name
        before, after = layers.get(layer, (0, 0))
        layers[layer] = (before + cut.before[name].numel(), after + parameter.numel())
    report = ShrinkReport(
        parameters=(sum(n for n, _ in layers.values()), sum(n for _, n in layers.values())),
        macs=(expected.n_flops // 2, result.n_flops // 2),
        layers=layers,
        kept=cut.kept,
        reasons=found.left,
        channels=(found.n_zero, sum(n for each in found.left.values() for n in each.values())),
        max_difference=largest_difference(expected.outputs, result.outputs),
        unused=[name for name, p in model.named_parameters() if id(p) not in expected.used],
        zero=[] if masks is not None else _whole_zeros(model, cut),
        groups=cut.groups,
        shapes={name: cut.before[name].shape for name in cut.kept},
        is_scattered=bool(cut.scattered),
    )
    if masks is None or not all(mask.all() for mask in masks.values()):
        _warn(report, model)
    cut_state_(cut, optimizers)
    return report


def _pass(args: Any, kwargs: Mapping[str, Any] | None = None) -> Pass:
    """A call of the model with what was given for it: a tensor, a tuple, or a dict of keywords."""
    if isinstance(args, Mapping) and kwargs is None:
        return Pass((), args)
    return Pass(tuple(args) if isinstance(args, (tuple, list)) else (args,), kwargs or {})


def _whole_zeros(model: nn.Module, cut: Cut) -> list[str]:
    """Trainable matrices and scales that were zero as a whole, of those that were cut."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    names = [name for name in cut.kept if name in trainable and not name.endswith("bias")]
    return [name for name in names if not cut.before[name].any()]


def _warn(report: ShrinkReport, model: nn.Module) -> None:
    """Warn of what a user may not have wanted."""
    kind, trainable = type(model).__name__, dict(model.named_parameters())
    unused = [name for name in report.unused if trainable[name].requires_grad]
    if not report.kept:
        why = [f"{n:,} zero channels stay: {reason}" for reason, n in report.totals()[:3]]
        none = "no channel is zero as a whole, single weights at most"
        warn_user(f"Nothing was cut out of {kind}: {'; '.join(why) or none}.")
    elif unused:
        warn_user(
            f"This batch does not use {len(unused)} trainable parameters of {kind}, {unused[0]!r} "
            "among them. They stay as they are, and what they read may have been cut. Pass further "
            "batches that use them as `batches=[...]`."
        )
    if report.zero:
        warn_user(
            f"{len(report.zero)} trainable parameters of {kind} were zero as a whole, "
            f"{report.zero[0]!r} among them, and what multiplies them was cut. If training is to "
            "move them, pass the `ticket`, so that only what it removes goes."
        )


def _refuse(model: nn.Module, expected: Run, run: Any, problem: Exception) -> NoReturn:
    """Raise for a network of which nothing can be cut."""
    if any(each.isnan().any() for each in expected.outputs):
        raise RuntimeError(
            f"{type(model).__name__} returns NaN for this batch, so nobody can tell whether "
            "shrinking changes what it computes. Load weights of before training diverged, or pass "
            "a batch that gives numbers."
        )
    again = run([]).outputs
    if largest_difference(expected.outputs, again) > tolerance(again):
        raise RuntimeError(
            f"{type(model).__name__} returns other outputs when it is called again with the same "
            "batch in evaluation mode, so nobody can tell whether shrinking changes them. Shrink "
            "the part of it that is not random."
        )
    raise RuntimeError(
        f"Nothing was cut out of {type(model).__name__}. With as little cut as there is to try, "
        f"what it computes would still have changed: {problem}. A forward that reads a number of "
        "channels from an attribute may do this. Shrink its parts one by one, or leave such layers "
        "out of the selection."
    ) from problem


def _cut_all(
    cut: Cut,
    masks: Mapping[str, Tensor] | None,
    passes: Sequence[Pass],
    limits: Limits,
    run: Callable[[list[Step]], Run],
    expected: Run,
    scatter: bool,
) -> tuple[Trace, Run]:
    """Cut out all that can go, and run what is left."""
    with only_held_zeros(cut, masks):
        found = trace_channels(cut.model, passes, limits)
    cut.cut_(found.kept)
    steps: list[Step] = []
    try:
        result = run(steps)
    except Exception as error:
        # Where an operator that computes raises, what it was given may be wrong before.
        is_step = bool(steps) and steps[-1].results is None
        to_keep = [] if is_step else failed_at(found, error)
        to_keep += first_difference(found, steps)[1]
        raise ComputesOtherwiseError(f"{type(error).__name__}: {error}", to_keep) from error
    check_steps(found, result)
    if message := difference_of(expected, result):
        after = magnitudes(cut.model, passes)
        cut.undo()
        before = magnitudes(cut.model, passes, found)
        number = first_other_value(before, after, tolerance(list(cut.model.parameters())))
        raise ComputesOtherwiseError(message, last_places(found, number))
    if not scatter or not found.left:
        return found, result
    modules = dict(cut.model.named_modules())
    owners: dict[str, Any] = {name: modules[name.rpartition(".")[0]] for name in found.left}
    scattered = [name for name, module in owners.items() if can_scatter(module)]
    with only_held_zeros(cut, masks):
        rest = trace_channels(cut.model, passes, limits._replace(scattered=scattered))
    for name in scattered:
        [indices] = rest.kept.get(name, (None,))
        if indices is not None:
            cut.scatter_(owners[name], indices, owners[name].num_features)
    cut.cut_(rest.kept)
    result = run([])
    if message := difference_of(expected, result):
        raise RuntimeError(message)
    return rest._replace(n_zero=found.n_zero), result


def _checked(optimizer: Optimizer | None, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """All optimizers in one list."""
    if isinstance(optimizers, Optimizer):
        optimizers = [optimizers]
    given = [*([] if optimizer is None else [optimizer]), *optimizers]
    for each in given:
        if not isinstance(each, Optimizer):
            raise TypeError(
                "`optimizer`, and all in `optimizers`, must be torch.optim.Optimizers, got "
                f"{type(each).__name__}. Pass the optimizers that train the model."
            )
    return given


def _refuse_lazy(model: nn.Module) -> None:
    """Raise for a model that has not seen any input."""
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(
            f"{lazy!r} has no shape yet, so nothing is known of its zeros. Run the model once "
            "before."
        )


def _refuse_spread(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise for a model or optimizers that other ranks have a part or a copy of."""
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
    for optimizer in with_inner(optimizers):
        if not hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer has it
            continue
        raise RuntimeError(
            f"{type(optimizer).__name__} spreads its state over ranks, and parts cannot be cut "
            "alone. Load its consolidated state into the optimizer that it is made of, and shrink "
            "with that."
        )


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with modes put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    caches = torch.is_autocast_cache_enabled()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # Autocast would go on with copies of weights that it made before they were cut.
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        # Fused attention hides how it treats heads, and how many multiplications it takes.
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with sdpa_kernel(SDPBackend.MATH):
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


def _runner(
    model: nn.Module, passes: list[Pass]
) -> tuple[list[Pass], Callable[[list[Step]], Run], Run]:
    """The passes to watch, what runs them in a precision that shows differences, and a run."""
    first = _evaluated(model, passes)
    in_training = [each._replace(training=True) for each in passes]
    with contextlib.suppress(Exception):  # a model that needs labels in training
        again = record(model, in_training, [])
        if (again.steps, again.used) != (first.steps, first.used):
            passes = [*passes, *in_training]
            first = record(model, passes, [])
    device = next((p.device.type for p in model.parameters()), "cpu")
    is_half = any(p.dtype in _HALF for p in model.parameters())
    dtype = None
    if first.is_fragile:  # which boxes are found, and how many, is a matter of rounding
        dtype = torch.float64
    elif is_half or torch.is_autocast_enabled(device):
        dtype = torch.float32

    def precise(result: Run) -> Run:
        if dtype is not None:
            with contextlib.suppress(Exception), torch.autocast(device, enabled=False):
                # Some have no copy, or name their precision.
                twin = copy.deepcopy(model).to(dtype)
                result = result._replace(outputs=record(twin, _cast(passes, dtype), []).outputs)
        return result._replace(outputs=_comparable(result.outputs, model))

    return passes, lambda steps: precise(record(model, passes, steps)), precise(first)


def _evaluated(model: nn.Module, passes: Sequence[Pass]) -> Run:
    """Passes in evaluation mode; raise if the model cannot be run with the batch."""
    try:
        return record(model, passes, [])
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"{type(model).__name__} cannot be run with this batch ({type(error).__name__}: "
            f"{message}). Pass the arguments of one call, as in training: shrink(images) for "
            "model(images), shrink(**batch) for model(**batch)."
        ) from error


def _cast(passes: Sequence[Pass], dtype: torch.dtype) -> Any:
    """Passes in another precision."""
    return tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, passes
    )


def _comparable(outputs: Any, model: nn.Module) -> list[Tensor]:
    """The tensors that a model returns."""
    tensors = tensors_of(outputs)
    if not tensors:
        raise TypeError(
            f"{type(model).__name__} returns no tensor, so nobody can tell whether shrinking "
            "changes what it computes. Return tensors, or objects that hold them."
        )
    return tensors
