"""Gradients, and what optimizers keep of parameters, cut as the parameters were; all or nothing."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from torch_worm_optim._checks import warn_user
from torch_worm_optim.shrink.cut import Cut, cut_tensor, named_tensors

# Optimizers that keep matrices for a parameter's rows and columns, which may have its shape.
_PRECONDITIONING = re.compile("Shampoo|SOAP|Kron")
# Optimizers that make what they keep when they are built, for the sizes of then, and never again.
_BUILT_ONCE = ("DeMo", "SaRA")
_PLAIN = (Tensor, nn.Parameter)  # a subclass may be a code, and need not know how to pick indices
_SIZELESS = (int, float, complex, str, type(None))

# Something that holds values by key, and all that it shall hold.
_Change = tuple[MutableMapping[Any, Any], dict[Any, Any]]


def with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Optimizers, and those that they wrap."""
    found = list(optimizers)
    for each in found:  # which grows
        held = {k: v for k, v in vars(each).items() if k not in ("state", "param_groups")}
        inner = [value for value in tree_leaves(held) if isinstance(value, Optimizer)]
        found += [value for value in inner if all(value is not other for other in found)]
    return found


def is_preconditioning(optimizer: Optimizer) -> bool:
    """Whether state of a parameter's shape may be something else than a value for each entry."""
    return bool(_PRECONDITIONING.search(type(optimizer).__name__))


def cut_state_(cut: Cut, given: Sequence[Optimizer]) -> None:
    """Cut gradients and optimizers' state; if anything fails, put them and the model back."""
    named = named_tensors(cut.model)
    names = {named[name]: name for name in cut.kept}
    optimizers = _with_wrappers(given) if names and given else []
    _check_owners(names, optimizers)
    gradients = {p: _cut(p.grad, name, cut) for p, name in names.items() if p.grad is not None}
    # Some optimizers keep what they compute as an attribute of the parameter.
    changes: list[_Change] = [(vars(p), _smaller(vars(p), name, cut)) for p, name in names.items()]
    changes += [change for each in optimizers for change in _attributes(each, names, cut)]
    afresh: dict[str, str] = {}
    for state in {id(each.state): each.state for each in optimizers}.values():
        sharing = [each for each in optimizers if each.state is state]
        further, lost = _changes(sharing, names, cut)
        changes += further
        afresh |= dict.fromkeys(lost, type(sharing[0]).__name__)
    with contextlib.ExitStack() as undo:
        for tensor in gradients:
            undo.callback(setattr, tensor, "grad", tensor.grad)
        for holder, _ in changes:
            undo.callback(_fill, holder, dict(holder))
        undo.callback(cut.undo)  # the first to be called: gradients must have a parameter's shape
        for tensor, gradient in gradients.items():
            tensor.grad = None
            tensor.grad = gradient
        for holder, content in changes:
            _fill(holder, content)
        if afresh:
            warn_user(
                f"{' and '.join(dict.fromkeys(afresh.values()))} keeps something for "
                f"{len(afresh)} parameters, {next(iter(afresh))!r} among them, that cannot be cut "
                "as the parameters are. It starts afresh for them."
            )
        undo.pop_all()


def _with_wrappers(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Optimizers, those that they wrap, and those that wrap any of them."""
    found = with_inner(optimizers)
    ids = {id(each) for each in found}
    around = [o for o in _living() if not ids.isdisjoint(id(each) for each in with_inner([o]))]
    return with_inner([*found, *(each for each in around if id(each) not in ids)])


def _living() -> list[Optimizer]:
    """All optimizers that there are in this process."""
    return [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]


def _parameters(optimizers: Iterable[Optimizer]) -> dict[Tensor, Optimizer]:
    """The parameters that optimizers train, each with one that does."""
    return {
        parameter: each
        for each in optimizers
        for group in getattr(each, "param_groups", ())  # one that is being built has none yet
        for parameter in group["params"]
    }


def _check_owners(names: Mapping[Tensor, str], optimizers: Sequence[Optimizer]) -> None:
    """Raise if what was cut is trained by others than these, or by one that cannot follow."""
    for each in optimizers:
        kind = type(each).__name__
        if kind in _BUILT_ONCE and not names.keys().isdisjoint(_parameters([each])):
            raise RuntimeError(
                f"{kind} can neither be cut nor start afresh: what it keeps is made when it is "
                "built. Shrink with `shrink_(model, batch)`, and build optimizers anew."
            )
    owned = _parameters(optimizers)
    orphans = [each for each in names if each.requires_grad and each not in owned]
    if not optimizers or not orphans:
        return
    gc.collect()  # or those that nobody can reach any more would count
    strangers = _parameters(_living())
    for parameter in orphans:
        if parameter in strangers:
            kind = type(strangers[parameter]).__name__
            raise RuntimeError(
                f"{names[parameter]!r} would be cut, and another optimizer trains it, "
                f"{kind}, whose state would keep the old shape. Pass what else trains the model "
                f"along, as in `optimizers=[...]`, or delete that {kind} if it is no longer used."
            )


def _changes(
    sharing: Sequence[Optimizer], names: Mapping[Tensor, str], cut: Cut
) -> tuple[list[_Change], list[str]]:
    """What cutting makes of the state that optimizers share; for which names it starts afresh."""
    state = sharing[0].state
    trained = {p: names[p] for p in _parameters(sharing) if p in names}
    # LBFGS keeps a history of all parameters in one row, and how long that is.
    flat = [vars(each) for each in sharing if "_numel_cache" in vars(each)]
    if flat and trained:
        emptied: list[_Change] = [(each, {**each, "_numel_cache": None}) for each in flat]
        return [(state, {}), *emptied], list(trained.values()) if state else []
    changes: list[_Change] = []
    lost: dict[Any, list[str]] = {}
    preconditions = any(map(is_preconditioning, sharing))
    for key, entry in state.items():
        if key in names and not _can_be_cut(entry, names[key], cut, preconditions):
            lost[key] = [names[key]]
        elif key in names:
            changes.append((entry, _smaller(entry, names[key], cut)))
        elif not isinstance(key, Tensor) and trained and any(map(_has_size, tree_leaves(entry))):
            lost[key] = list(trained.values())  # of several parameters together
    if lost:
        changes.append((state, {k: v for k, v in state.items() if k not in lost}))
    return changes, [name for group in lost.values() for name in group]


def _attributes(each: Optimizer, names: Mapping[Tensor, str], cut: Cut) -> list[_Change]:
    """What an optimizer keeps beside its state, such as slow weights in a list, cut alike."""
    trained = list(_parameters([each]))
    before = [cut.before[names[p]].shape if p in names else p.shape for p in trained]
    shapes = {shape for p, shape in zip(trained, before, strict=True) if p in names}
    total = sum(shape.numel() for shape in before)
    smaller: dict[str, Any] = {}
    for key, value in vars(each).items():
        leaves, spec = tree_flatten(value)
        own = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf not in names]
        if key in ("state", "param_groups") or not any(
            leaf.shape in shapes or leaf.numel() == total > 1 for leaf in own
        ):
            continue
        if [getattr(leaf, "shape", None) for leaf in leaves] != before:
            raise RuntimeError(
                f"{type(each).__name__} keeps tensors of its parameters' sizes in its attribute "
                f"{key!r}, and nobody can tell which are whose. Shrink with "
                "`shrink_(model, batch)`, and build optimizers anew."
            )
        parts = [
            _cut(a, names[p], cut) if p in names else a
            for a, p in zip(leaves, trained, strict=True)
        ]
        smaller[key] = tree_unflatten(parts, spec)
    return [(vars(each), {**vars(each), **smaller})] if smaller else []


def _can_be_cut(entry: Any, name: str, cut: Cut, preconditions: bool) -> bool:
    """Whether all that an optimizer keeps for a parameter is single numbers, or has its shape."""
    return isinstance(entry, MutableMapping) and not any(
        _has_size(value) and (preconditions or not _is_like(value, name, cut))
        for value in entry.values()
    )


def _has_size(value: Any) -> bool:
    """Whether it is no single number, or cannot be known to be one."""
    is_scalar = isinstance(value, Tensor) and value.numel() <= 1
    return not is_scalar and not isinstance(value, _SIZELESS)


def _is_like(value: Any, name: str, cut: Cut) -> bool:
    """Whether it is a plain tensor of the shape that a parameter had."""
    return type(value) in _PLAIN and value.shape == cut.before[name].shape


def _smaller(holder: Mapping[Any, Any], name: str, cut: Cut) -> dict[Any, Any]:
    """The same with what has the shape of a parameter cut alike."""
    return {k: _cut(v, name, cut) if _is_like(v, name, cut) else v for k, v in holder.items()}


def _cut(tensor: Tensor, name: str, cut: Cut) -> Tensor:
    """A tensor of a parameter's shape, cut alike."""
    return cut_tensor(tensor, cut.kept[name], cut.groups.get(name, 1))


def _fill(holder: MutableMapping[Any, Any], content: Mapping[Any, Any]) -> None:
    """Have it hold this and nothing else."""
    holder.clear()
    holder.update(content)
