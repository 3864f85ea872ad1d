"""Query and key projections: the representative parameters of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor, nn

from torch_worm_optim._checks import check_choice
from torch_worm_optim.selectors.projections import (
    Layouts,
    attention_layouts,
    int_attribute,
    is_passed_over,
    parameters_at,
    parse_layout,
    unknown_fused,
)
from torch_worm_optim.selectors.representative import (
    JoinableSelector,
    Part,
    Representative,
    log_left_out,
    nothing_found,
)

_QUERIES = ("q", "qk")
_KEYS = ("k", "kv", "qk")
# What all heads share, on the way down to few dimensions, belongs to none of them.
_SHARED = ("q_rank", "latent")
# Parameters of an attention module that are added to what others make, or stand in their place.
_BIAS_NAME = re.compile("bias|token")
# Differential attention: a head has two maps, of queries and keys of half its width.
_TWO_MAPS = frozenset({"DiffAttention", "DiffParallelScalingBlock"})
# How attention modules, or their configs, call the rows of a head and the number of heads.
_HEAD_WIDTHS = (
    *("qk_head_dim", "qk_channels_per_head", "dim_head_qk", "key_dim", "head_dim"),
    *("attention_head_size", "head_size", "key_value_proj_dim", "d_head", "dim_head"),
)
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")


class Block(NamedTuple):
    """A run of output features of one weight or bias, once or at equal distances."""

    label: str  # what the features are: q, k, v, ...
    path: str  # of the parameter, in the module
    parameter: Tensor
    leading_dims: int  # of the parameter, before its output features
    trailing_dims: int
    repeat: int  # how many times the layout repeats
    start: int  # in each repetition
    stop: int

    @property
    def is_bias(self) -> bool:
        """Whether it is added to what others make: nothing to rank."""
        return bool(_BIAS_NAME.search(self.path.rpartition(".")[2]))

    @property
    def n_features(self) -> int:
        """Output features of the block in all repetitions."""
        return self.repeat * (self.stop - self.start)

    @property
    def split_shape(self) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """The parameter's shape before, at and after its output features."""
        shape = tuple(self.parameter.shape)
        end = len(shape) - self.trailing_dims
        return shape[: self.leading_dims], math.prod(shape[self.leading_dims : end]), shape[end:]

    def part(self, name: str, *, by_feature: bool = False) -> Part:
        """Its entries in the parameter of that name: each is a unit, or each output feature."""
        leading, n_all, trailing = self.split_shape
        period, width = n_all // self.repeat, self.stop - self.start
        shape, ones = tuple(self.parameter.shape), (1,) * len(leading)
        if width == period:
            features = shape[len(leading) : len(shape) - len(trailing)]
            return Part(name, units=(*ones, *features) if by_feature else ())
        repeats = (self.repeat,) if self.repeat > 1 else ()
        view = (*leading, *repeats, period, *trailing)
        return Part(
            name,
            view=view if view != shape else (),
            index=(*(slice(None),) * len((*leading, *repeats)), slice(self.start, self.stop)),
            units=(*ones, *repeats, width) if by_feature else (),
        )


@dataclass(frozen=True)
class QueryKeySelector(JoinableSelector):
    """Select the entries that make the queries and keys of every attention layer, and no others.

    Section 6 of the WORM paper [1] takes them as the representatives of transformers. Projections
    with the usual names (``query``/``key``, ``q_proj``/``k_proj``, ``q_lin``/``k_lin``,
    ``to_q``/``to_k``, ``q``/``k``, ...) are recognised in any class; fused matrices in the classes
    of torch, transformers and timm that the table in ``selectors/projections.py`` holds. A fused
    matrix of any other class raises: its layout is not guessed. State it with ``layouts``, in one
    line. Layers without an attention map (linear attention, state spaces) are left out.

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
        by_entry = self.granularity == "entry"
        wanted = {*_QUERIES, *_KEYS, *_SHARED, *(["v"] if self.value else [])}
        if by_entry and not self.value:
            wanted.remove("latent")
        found: dict[str, Representative] = {}  # a weight that two layers share is selected once
        left_out: dict[str, str] = {}
        for path, module in model.named_modules():
            blocks = [
                block
                for block in attention_blocks(path, module, self.layouts)
                if block.label in wanted and not (by_entry and block.is_bias)
            ]
            refuse_computed(path, module, blocks, names)
            if by_entry:
                runs = _joined_runs(blocks)
                chosen = [Representative(run.part(names[id(run.parameter)])) for run in runs]
            else:
                chosen = self._units(describe(path, module), module, blocks, names)
            found.update((repr(each), each) for each in chosen)
            if is_passed_over(module, self.layouts):
                left_out.setdefault(type(module).__name__, path)
        log_left_out(self, left_out, "is named like a layer without an attention map")
        if not found:
            raise nothing_found("QueryKeySelector found no query and key weights", model)
        return list(found.values())

    def _units(
        self, where: str, module: nn.Module, blocks: list[Block], names: Mapping[int, str]
    ) -> list[Representative]:
        """Heads, or dimensions of heads, of one attention layer."""
        queries = [b for b in blocks if b.label in _QUERIES]
        keys = [b for b in blocks if b.label in _KEYS]
        values = [b for b in blocks if b.label == "v"]
        if not queries and not keys:
            return []
        shared = {id(b.parameter) for b in blocks if b.label in _SHARED}
        if self.granularity == "head":
            queries = [b for b in queries if id(b.parameter) not in shared]
            keys = [b for b in keys if id(b.parameter) not in shared]
        two_steps = bool(shared) and self.granularity == "dim"
        if two_steps or not (queries and keys):
            why = "by rows: they are made in two steps"
            if not two_steps:
                why = "in it: it makes only one of them"
            shapes = {b.path: tuple(b.parameter.shape) for b in blocks}
            raise ValueError(
                f"Queries and keys of {where} have no pairing {why}, by {shapes}. Pass "
                'granularity="entry".'
            )
        width = _head_width(where, module, queries)
        # Keys that come from a latent have fewer rows than their queries, as many heads, though.
        n_groups = (queries if shared else keys)[0].n_features // width
        chosen = [*queries, *(b for b in keys if b.label != "qk")]
        if self.granularity == "head":
            chosen += values
        parts: list[Part] = []
        followers: list[Part] = []
        for block in chosen:
            # A value, or a key from a latent, may have another width than a query.
            head_width = width if block.label in _QUERIES else block.n_features // n_groups
            part = self._part(where, block, n_groups, head_width, names[id(block.parameter)])
            (followers if block.is_bias else parts).append(part)
        found = [Representative(parts, followers)] if parts else []
        if self.granularity == "dim":  # a dimension of a value goes by itself
            rows = [b for b in values if not b.is_bias]
            found += [Representative(b.part(names[id(b.parameter)], by_feature=True)) for b in rows]
        return found

    def _part(self, where: str, block: Block, n_groups: int, head_width: int, name: str) -> Part:
        """Where the heads, or dimensions of heads, lie that a block makes."""
        leading, n_features, trailing = block.split_shape
        period, rows = n_features // block.repeat, block.stop - block.start
        repeats = min(block.repeat, n_groups)  # a group may lie in several repetitions
        n_heads = rows // head_width if head_width else 0
        groups = n_groups // repeats if repeats else 0
        per_group = head_width if self.granularity == "dim" else 1
        # What a dimension has in several heads lies apart; all else of a unit follows on.
        strided = per_group > 1 and n_heads != groups
        bounds = (block.start, block.stop, period) if strided else (rows,)
        fits = head_width > 0 and groups > 0 and all(bound % head_width == 0 for bound in bounds)
        if not fits or n_groups % repeats or block.repeat % repeats or n_heads % groups:
            raise ValueError(
                f"{block.path!r} of {where} has shape {tuple(block.parameter.shape)}, and its "
                f"{rows} rows from {block.start} on of every {period} cannot be cut into "
                f"{n_groups} equal groups of heads of width {head_width}. Set the module's "
                '`num_heads` and `head_dim` to what they are, or pass granularity="entry".'
            )
        step, within = (head_width, (head_width,)) if strided else (1, ())
        run = slice(block.start // step, block.stop // step)
        split = (groups, *within) if strided else (groups * per_group,)
        return Part(
            name,
            view=(*leading, block.repeat, period // step, *within, *trailing),
            index=(*(slice(None),) * (len(leading) + 1), run),
            units=(*(1,) * len(leading), repeats, *split),
        )


def describe(path: str, module: nn.Module) -> str:
    """What to call a module in a message."""
    return f"{path or 'the model'!r} ({type(module).__name__})"


def refuse_computed(
    path: str, module: nn.Module, blocks: Sequence[Block], names: Mapping[int, str]
) -> None:
    """Raise for a block whose weight is not among the parameters, as one that is parametrised."""
    for block in blocks:
        if id(block.parameter) not in names:
            raise ValueError(
                f"{block.path!r} of {describe(path, module)} is computed from other parameters. "
                "Name those: ParameterSelector(...)."
            )


def attention_blocks(path: str, module: nn.Module, layouts: Mapping[str, Layouts]) -> list[Block]:
    """What the weights and biases of one attention layer make, block by block, values included."""
    known = attention_layouts(module, layouts)
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
    return read_layouts(path, module, known or {}, "QueryKeySelector")


def read_layouts(path: str, module: nn.Module, layouts: Layouts, selector: str) -> list[Block]:
    """The blocks that layouts cut the weights and biases of a module into."""
    blocks = []
    for pattern, layout in layouts.items():
        for where, parameter, leading, trailing in parameters_at(module, pattern):
            text = layout if isinstance(layout, str) else layout(module)
            n_features = math.prod(parameter.shape[leading : parameter.ndim - trailing])
            try:
                runs = list(parse_layout(text, n_features, module))
            except (AttributeError, ValueError) as error:
                raise ValueError(
                    f"The layout {text!r} does not fit {where!r} of {describe(path, module)}, "
                    f"which has shape {tuple(parameter.shape)}: {error} State what it is with "
                    f"{selector}(layouts=...)."
                ) from error
            blocks += [Block(run[0], where, parameter, leading, trailing, *run[1:]) for run in runs]
    return blocks


def _head_width(where: str, module: nn.Module, queries: list[Block]) -> int:
    """Rows of a query head."""
    n_rows = queries[0].n_features
    width, n_heads = int_attribute(module, *_HEAD_WIDTHS), int_attribute(module, *_HEAD_COUNTS)
    weight = f"{queries[0].path!r} of shape {tuple(queries[0].parameter.shape)}"
    if width is not None:
        return 2 * width if type(module).__name__ in _TWO_MAPS else width
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
