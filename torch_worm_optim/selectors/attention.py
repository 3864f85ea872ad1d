"""Query and key projections: the representative parameters of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_worm_optim._checks import check_choice
from torch_worm_optim.selectors.projections import (
    BIAS_NAME,
    BY_CLASS,
    BY_NAMES,
    FUSED_NAME,
    FUSED_WEIGHT,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    OUTPUT_DIM,
    TWO_MAPS,
    WITHOUT_MAP,
    Layouts,
    layouts_by_class,
)
from torch_worm_optim.selectors.representative import (
    LEAVE_IT_OUT,
    JoinableSelector,
    Part,
    Representative,
)

_QUERIES = ("q", "qk")
_KEYS = ("k", "kv")


class Block(NamedTuple):
    """A run of output features of one weight or bias, once or at equal distances.

    Attributes:
        label: What the features are: ``q``, ``k``, ``v``, ...
        path: The parameter's path in the attention module.
        parameter: The parameter.
        n_before: Dimensions of the parameter before its output features.
        n_after: Dimensions after them.
        repeat: How many times the layout repeats.
        start: Where the block starts in each repetition.
        stop: Where it ends.
    """

    label: str
    path: str
    parameter: Tensor
    n_before: int
    n_after: int
    repeat: int
    start: int
    stop: int

    @property
    def is_bias(self) -> bool:
        """Whether it is added to what others make: nothing to rank."""
        return bool(BIAS_NAME.search(self.path.rpartition(".")[2]))

    @property
    def n_features(self) -> int:
        """Output features of the block in all repetitions."""
        return self.repeat * (self.stop - self.start)

    @property
    def surroundings(self) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """The parameter's shape before, at and after its output features."""
        shape = tuple(self.parameter.shape)
        end = len(shape) - self.n_after
        return shape[: self.n_before], math.prod(shape[self.n_before : end]), shape[end:]


@dataclass(frozen=True)
class QueryKeySelector(JoinableSelector):
    """Select the entries that make the queries and keys of every attention layer, and no others.

    Section 6 of the WORM paper [1] takes them as the representatives of transformers. Projections
    with the usual names (``query``/``key``, ``q_proj``/``k_proj``, ``q_lin``/``k_lin``,
    ``to_q``/``to_k``, ``q``/``k``, ...) are recognised in any class; fused matrices in the classes
    of torch, transformers and timm that the table in ``selectors/layouts.py`` holds. A fused matrix
    of any other class raises: its layout is not guessed. State it with ``layouts``, in one line.
    Layers without an attention map (linear attention, state spaces) are passed over.

    Args:
        value (bool, optional): Whether to select the value weights too, as the paper's Table 4 does
            (default: False).
        granularity (str, optional): What a mask keeps or removes as a whole (default: ``"entry"``).
            ``"entry"`` ranks every weight on its own. ``"head"`` ranks heads: the query and key
            rows of a head, and its value rows with ``value=True``. ``"dim"`` ranks the dimensions
            of a head, query row and key row together, since neither is of use without the other.
            Where several query heads share a key head they are one group: ``"head"`` removes all of
            it, and the dimension of a key goes with that of each of its queries. Biases follow
            their rows; the shift of a BatchNorm after them does not. Rotary embeddings turn
            dimensions in pairs, and a mask may remove one of a pair: scores are then exactly those
            of queries and keys with a zero there, but a layer can be cut only by whole pairs.
        layouts (Mapping, optional): Layouts of further attention classes by the name of the class,
            each a mapping from the path of a weight in it to what its output features are:
            ``{"MyAttention": {"qkv": "q k v"}}`` for three blocks one after another,
            ``"num_heads * (q k v)"`` for queries, keys and values head by head.

    Raises:
        ValueError: When the model has no attention layer that is known, or one with a fused matrix
            whose layout is not known; when heads do not divide the width, or queries and keys have
            no pairing, for ``granularity`` other than ``"entry"``.

    Example:
        >>> attention = nn.MultiheadAttention(embed_dim=8, num_heads=2)
        >>> QueryKeySelector()(attention)
        [Representative(Part('in_proj_weight', index=(slice(0, 16),)))]
        >>> [head] = QueryKeySelector(granularity="head")(attention)
        >>> head.n_units(attention.in_proj_weight)
        2

    References:
        [1] Vasudev, "The EarlyBird Gets the WORM", PMLR 262, 2024,
        https://arxiv.org/abs/2406.11872.
    """

    value: bool = False
    granularity: str = "entry"
    layouts: Mapping[str, Layouts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        check_choice("granularity", self.granularity, ("entry", "head", "dim"))

    def __call__(self, model: nn.Module) -> list[Representative]:
        """The query and key weights of ``model``."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[str, Representative] = {}  # a weight that two layers share is selected once
        for path, module in model.named_modules():
            blocks = [
                block
                for block in attention_blocks(path, module, self.layouts)
                if block.label in (*_QUERIES, *_KEYS, "q_rank", "latent")
                or (block.label == "v" and self.value)
            ]
            if self.granularity == "entry":
                blocks = [
                    b for b in blocks if not b.is_bias and (b.label != "latent" or self.value)
                ]
            refuse_computed(path, module, blocks, names)
            if self.granularity == "entry":
                chosen = [
                    _as_entries(run, names[id(run.parameter)]) for run in _joined_runs(blocks)
                ]
            else:
                chosen = self._units(path, module, blocks, names)
            found.update((repr(each), each) for each in chosen)
        if not found:
            raise ValueError(
                f"QueryKeySelector found no query and key weights in {type(model).__name__}. "
                f"{LEAVE_IT_OUT}"
            )
        return list(found.values())

    def finds_any(self, model: nn.Module) -> bool:
        """Whether ``model`` has attention at all, in a layout that is known or not."""
        return any(
            unknown_fused(module) if known is None else known
            for module in model.modules()
            for known in (_layouts_of(module, self.layouts),)
        )

    def _units(
        self, path: str, module: nn.Module, blocks: list[Block], names: dict[int, str]
    ) -> list[Representative]:
        """Heads, or dimensions of heads, of one attention layer."""
        queries = [b for b in blocks if b.label in _QUERIES]
        keys = [b for b in blocks if b.label in _KEYS]
        shared = [b for b in queries if b.label == "qk"]
        if not queries and not keys:
            return []
        where = f"{path or 'the model'!r} ({type(module).__name__})"
        why = ""
        latent = {id(b.parameter) for b in blocks if b.label in ("q_rank", "latent")}
        if latent and self.granularity == "head":
            # What all heads share, on the way down to few dimensions, belongs to none of them.
            queries = [b for b in queries if id(b.parameter) not in latent]
            keys = [b for b in keys if id(b.parameter) not in latent]
        elif latent:
            why = "by rows: they are made in two steps"
        if not why and (not queries or not (keys or shared)):
            why = "in it: it makes only one of them"
        if why:
            shapes = {b.path: tuple(b.parameter.shape) for b in blocks}
            raise ValueError(
                f"Queries and keys of {where} have no pairing {why}, by {shapes}. Pass "
                'granularity="entry".'
            )
        width = _head_width(where, module, queries)
        # Keys that come from a latent have fewer rows than their queries, as many heads, though.
        n_groups = (queries if latent else keys or shared)[0].n_features // width
        chosen = [*queries, *keys]
        values = [b for b in blocks if b.label == "v"]
        if self.granularity == "head":
            chosen += values
        representatives = [
            self._unit_representative(where, chosen, n_groups, width, names),
            *(
                self._unit_representative(where, [value], value.n_features, 1, names)
                for value in values
                if self.granularity == "dim" and not value.is_bias
            ),
        ]
        return [each for each in representatives if each is not None]

    def _unit_representative(
        self, where: str, blocks: list[Block], n_groups: int, width: int, names: dict[int, str]
    ) -> Representative | None:
        parts: list[Part] = []
        followers: list[Part] = []
        for block in blocks:
            # A value, or a key from a latent, may have another width than a query.
            wide = width if block.label in _QUERIES else block.n_features // n_groups
            part = self._as_units(where, block, n_groups, wide, names[id(block.parameter)])
            (followers if block.is_bias else parts).append(part)
        return Representative(parts, followers) if parts else None

    def _as_units(self, where: str, block: Block, n_groups: int, width: int, name: str) -> Part:
        before, n_features, after = block.surroundings
        period, rows = n_features // block.repeat, block.stop - block.start
        outer = min(block.repeat, n_groups)  # a group may lie in several repetitions
        n_heads, groups = rows // width if width else 0, n_groups // outer if outer else 0
        per_group = width if self.granularity == "dim" else 1
        # What a dimension has in several heads lies apart; all else of a unit follows on.
        apart = per_group > 1 and n_heads != groups
        bounds = (block.start, block.stop, period) if apart else (rows,)
        fits = width > 0 and groups > 0 and all(bound % width == 0 for bound in bounds)
        if not fits or n_groups % outer or block.repeat % outer or n_heads % groups:
            raise ValueError(
                f"{block.path!r} of {where} has shape {tuple(block.parameter.shape)}, and its "
                f"{rows} rows from {block.start} on of every {period} cannot be cut into "
                f"{n_groups} equal groups of heads of width {width}. Set the module's `num_heads` "
                f'and `head_dim` to what they are, or pass granularity="entry".'
            )
        step = width if apart else 1
        return Part(
            name,
            view=(*before, block.repeat, period // step, *((width,) if apart else ()), *after),
            index=(
                *(slice(None),) * (len(before) + 1),
                slice(block.start // step, block.stop // step),
            ),
            units=(
                *(1 for _ in before),
                outer,
                *((groups, width) if apart else (groups * per_group,)),
            ),
        )


def refuse_computed(
    path: str, module: nn.Module, blocks: Sequence[Block], names: Mapping[int, str]
) -> None:
    """Raise for a block whose weight is no parameter, as one that is parametrised.

    Args:
        path: The module's path in its model.
        module: The module.
        blocks: What was found in it.
        names: Names of the model's parameters by their ids.

    Raises:
        ValueError: If a block's weight is not among them.
    """
    for block in blocks:
        if id(block.parameter) not in names:
            raise ValueError(
                f"{block.path!r} of {path or 'the model'!r} ({type(module).__name__}) is computed "
                "from other parameters. Name those: ParameterSelector(...)."
            )


def attention_blocks(path: str, module: nn.Module, layouts: Mapping[str, Layouts]) -> list[Block]:
    """What the weights and biases of one attention layer make, block by block.

    Args:
        path: The module's path in its model, for messages.
        module: Any module; of one that is no attention layer nothing is returned.
        layouts: Layouts by class name that come before those of the table.

    Returns:
        All blocks of all its projections, values and the rest included.

    Raises:
        ValueError: If the module has a fused matrix whose layout is not known, or a layout does not
            fit its weight.
    """
    known = _layouts_of(module, layouts)
    unknown = unknown_fused(module) if known is None else ""
    if unknown:
        shape = tuple(attrgetter(unknown)(module).shape)
        unknown = unknown.removesuffix(".weight")
        name = f"{path}.{unknown}" if path else unknown
        kind = type(module).__name__
        raise ValueError(
            f"QueryKeySelector does not know where the queries and keys lie in {name!r} of {kind}, "
            f"a fused matrix of shape {shape}. State it, for instance QueryKeySelector("
            f'layouts={{"{kind}": {{"{unknown}": "q k v"}}}}) if queries, keys and values follow '
            'one another, or "num_heads * (q k v)" if they do so head by head; or leave the layer '
            f'out: layouts={{"{kind}": {{}}}}.'
        )
    blocks = []
    for pattern, layout in (known or {}).items():
        for where, parameter, n_before, n_after in parameters_at(module, pattern):
            text = layout if isinstance(layout, str) else layout(module)
            n_features = math.prod(parameter.shape[n_before : parameter.ndim - n_after])
            try:
                runs = list(parse_layout(text, n_features, module))
            except (AttributeError, ValueError) as error:
                raise ValueError(
                    f"The layout {text!r} does not fit {where!r} of {path!r} "
                    f"({type(module).__name__}), which has shape {tuple(parameter.shape)}: "
                    f"{error} State what it is with QueryKeySelector(layouts=...)."
                ) from error
            blocks += [Block(run[0], where, parameter, n_before, n_after, *run[1:]) for run in runs]
    return blocks


def _layouts_of(module: nn.Module, layouts: Mapping[str, Layouts]) -> Layouts | None:
    """The layouts of a module: the user's, the table's by class, or those that its names tell."""
    known = layouts_by_class(module, layouts, BY_CLASS)
    if known is not None:
        return known
    if WITHOUT_MAP.search(type(module).__name__):
        return {}
    found: dict[str, Any] = {}
    for names in BY_NAMES:
        has_all = all(
            _has_weight(module._modules.get(name))
            or (layout == "v" and getattr(module, name, module) is None)
            for name, layout in names.items()
        )
        if has_all and found.keys().isdisjoint(names):
            found.update(names)
    return found or None


def _has_weight(module: nn.Module | None) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def unknown_fused(module: nn.Module) -> str:
    """The weight of a module that holds several projections in one, going by its name.

    Args:
        module: Any module.

    Returns:
        The path of the weight in the module, empty if there is none.

    Example:
        >>> unknown_fused(nn.ModuleDict({"qkv": nn.Linear(2, 6)}))
        'qkv.weight'
    """
    is_attention = "attention" in type(module).__name__.lower()
    for name, child in module._modules.items():
        if _has_weight(child) and (
            FUSED_NAME.fullmatch(name) or (is_attention and name == "in_proj")
        ):
            return f"{name}.weight"
    return next((name for name in module._parameters if FUSED_WEIGHT.fullmatch(name)), "")


def parameters_at(module: nn.Module, pattern: str) -> Iterator[tuple[str, Tensor, int, int]]:
    """Weights and biases at a path, with how many dimensions stand around the output features.

    Args:
        module: The module that the path begins in.
        pattern: The path of a parameter or of a module that has a weight; ``*`` is any name.

    Returns:
        For each parameter its path, itself, and how many dimensions stand before its output
        features and after them.

    Example:
        >>> [(path, before, after) for path, _, before, after in parameters_at(
        ...     nn.ModuleDict({"q": nn.Linear(2, 3)}), "q")]
        [('q.weight', 0, 1), ('q.bias', 0, 0)]
    """
    if "*" in pattern:
        paths = [path for path, _ in module.named_modules() if fnmatchcase(path, pattern)]
    else:
        paths = [pattern]
    for path in paths:
        owner: Any = module
        for name in path.split("."):
            owner = getattr(owner, name, None)
        if isinstance(owner, Tensor):  # a parameter of the attention module itself
            if "bias" in path:
                yield path, owner, 0, 0
            else:
                yield path, owner, *OUTPUT_DIM.get(type(module).__name__, (0, owner.ndim - 1))
        elif owner is not None and _has_weight(owner):
            kind = type(owner).__name__ if not isinstance(owner, nn.modules.conv._ConvNd) else ""
            around = OUTPUT_DIM.get(kind, (0, owner.weight.ndim - 1))
            yield f"{path}.weight", owner.weight, *around
            if isinstance(getattr(owner, "bias", None), Tensor):
                yield f"{path}.bias", owner.bias, 0, 0


def parse_layout(
    layout: str, n_features: int, module: nn.Module
) -> Iterator[tuple[str, int, int, int]]:
    """The blocks of a layout, see ``layouts.py``.

    Args:
        layout: Such as ``"q k v"``.
        n_features: How many output features it describes.
        module: The module whose attributes the layout may name.

    Returns:
        For each block its label, repetitions, start and stop.

    Raises:
        ValueError: If it is not written like a layout, or does not fit the number of features.
        AttributeError: If the module has no such attribute.

    Example:
        >>> list(parse_layout("q k v", 6, nn.Module()))
        [('q', 1, 0, 2), ('k', 1, 2, 4), ('v', 1, 4, 6)]
    """
    match = re.fullmatch(r"\s*(?:(\S+)\s*\*\s*\((.+)\)|([^()]+))\s*", layout)
    if match is None:
        raise ValueError(
            f'a layout reads "q k v", "q=size k v" or "repeat * (q k v)", got {layout!r}.'
        )
    times, inner, plain = match.groups()
    labels, sizes = zip(
        *((label, size) for label, _, size in (b.partition("=") for b in (inner or plain).split())),
        strict=True,
    )
    known = [_number(size, module) if size else None for size in sizes]
    stated = sum(size for size in known if size is not None)
    if times == "_":
        repeat = n_features // stated if stated and None not in known else 0
    else:
        repeat = _number(times, module) if times else 1
    period = n_features // repeat if repeat else 0
    n_open = known.count(None)
    share = (period - stated) // n_open if n_open else 0
    widths = [share if size is None else size for size in known]
    if not repeat or repeat * sum(widths) != n_features or min(widths) < 1:
        raise ValueError(f"{n_features} output features cannot be cut that way.")
    start = 0
    for label, width in zip(labels, widths, strict=True):
        yield label, repeat, start, start + width
        start += width


def _number(text: str, module: nn.Module) -> int:
    """A product of integers and of the module's, or its config's, integer attributes."""
    value = 1
    for factor in text.split("*"):
        if factor.isdecimal():
            value *= int(factor)
            continue
        number = _attribute(module, factor)
        if number is None:
            raise AttributeError(f"neither it nor its config has an integer {factor!r}.")
        value *= number
    return value


def _attribute(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that the module, or else its config, has as an integer."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            try:
                value = getattr(owner, name, None)
            except RuntimeError:  # a config whose layers differ refuses to tell for all of them
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _head_width(where: str, module: nn.Module, queries: list[Block]) -> int:
    """Rows of a query head."""
    n_rows = next(block.n_features for block in queries)
    width, n_heads = _attribute(module, *HEAD_WIDTHS), _attribute(module, *HEAD_COUNTS)
    weight = f"{queries[0].path!r} of shape {tuple(queries[0].parameter.shape)}"
    if width is not None:
        return 2 * width if type(module).__name__ in TWO_MAPS else width
    if n_heads is None:
        raise ValueError(
            f"{where} does not tell how many heads {weight} makes. Set the module's `num_heads` or "
            '`head_dim`, or pass granularity="entry".'
        )
    if n_rows % n_heads:
        raise ValueError(
            f"{n_heads} heads do not divide the {n_rows} query rows of {where}, {weight}. Set its "
            '`head_dim` to what it is, or pass granularity="entry".'
        )
    return n_rows // n_heads


def _joined_runs(blocks: list[Block]) -> list[Block]:
    """Blocks that follow one another in one parameter as one block."""
    runs: list[Block] = []
    for block in blocks:
        last = runs[-1] if runs else None
        if last and last.parameter is block.parameter and last.stop == block.start:
            runs[-1] = last._replace(stop=block.stop)
        else:
            runs.append(block)
    return runs


def _as_entries(block: Block, name: str) -> Representative:
    before, n_features, after = block.surroundings
    period = n_features // block.repeat
    if block.stop - block.start == period:
        return Representative(name)
    view = () if block.repeat == 1 else (*before, block.repeat, period, *after)
    everything = (slice(None),) * (len(before) + (block.repeat > 1))
    index = (*everything, slice(block.start, block.stop))
    return Representative(Part(name, view, index))
