"""Query and key projections: the representative parameters of transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torch_worm_optim.selectors.base import JoinableSelector, Representative

# How query, key and value projections are called where each is a Linear of its own.
_SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)

# How one projection that holds several of them is called. Its layout differs from model to model
# (blocks, heads interleaved, transposed), so it is never guessed.
_FUSED = frozenset(
    {
        "qkv",
        "qkv_proj",
        "Wqkv",
        "query_key_value",
        "c_attn",
        "in_proj",
        "to_qkv",
        "kv",
        "to_kv",
        "qk",
    }
)


@dataclass(frozen=True)
class QueryKeySelector(JoinableSelector):
    """Select the query and key weights of every attention layer.

    Section 6 of the WORM paper [1] takes them as the representatives of transformers. Known are
    projections that are a ``Linear`` each (``query``/``key``, ``q_proj``/``k_proj``,
    ``q_lin``/``k_lin``, ``to_q``/``to_k``, ``q``/``k``) and :class:`torch.nn.MultiheadAttention`,
    fused or not. A fused matrix of any other class raises: its layout is not guessed. State it with
    :class:`Representative`, whose ``view`` and ``part`` name the query and key entries.

    Args:
        value (bool, optional): Whether to select the value weights too, as the paper's Table 4 does
            (default: False).

    Raises:
        ValueError: When the model has no attention layer that is known, or has one with a fused
            matrix of a layout that is not known.

    Example:
        >>> attention = nn.MultiheadAttention(embed_dim=8, num_heads=2)
        >>> QueryKeySelector()(attention)
        [Representative(name='in_proj_weight', followers=(), view=(), part=(slice(0, 16, None),))]

    References:
        [1] Vasudev, "The EarlyBird Gets the WORM", PMLR 262, 2024,
        https://arxiv.org/abs/2406.11872.
    """

    value: bool = False

    def __call__(self, model: nn.Module) -> list[Representative]:
        """The query and key weights of ``model``."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[str, Representative] = {}
        for path, module in model.named_modules():
            for weight, part in self._weights(path, module):
                if id(weight) not in names:
                    raise ValueError(
                        f"A query or key weight of {path!r} ({type(module).__name__}) is computed "
                        "from other parameters. Name those: ParameterSelector(...)."
                    )
                found.setdefault(names[id(weight)], Representative(names[id(weight)], part=part))
        if not found:
            raise ValueError(
                f"QueryKeySelector found no query and key weights in {type(model).__name__}. Pass "
                "another `selector=`, for instance BatchNormSelector() for convolutional networks "
                'or ParameterSelector("*.weight").'
            )
        return list(found.values())

    def finds_any(self, model: nn.Module) -> bool:
        """Whether ``model`` has attention at all, in a layout that is known or not."""
        return any(
            isinstance(module, nn.MultiheadAttention) or _separate(module) or _fused(module)
            for module in model.modules()
        )

    def _weights(
        self, path: str, module: nn.Module
    ) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
        n_chosen = 3 if self.value else 2
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None:
                return [(module.in_proj_weight, (slice(0, n_chosen * module.embed_dim),))]
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            return [(weight, ()) for weight in weights[:n_chosen]]
        fused = _fused(module)
        if fused:
            shape = tuple(module.get_submodule(fused).weight.shape)  # type: ignore[arg-type]
            name = f"{path}.{fused}" if path else fused
            # A Conv1D as in GPT-2 has its outputs in columns.
            first = "slice(None), " if shape[0] < shape[-1] else ""
            raise ValueError(
                f"QueryKeySelector does not know where the queries and keys lie in {name!r} of "
                f"{type(module).__name__}, a fused matrix of shape {shape}. State it in a "
                f'selector of your own, for instance Representative("{name}.weight", '
                f"part=({first}slice(0, 2 * width),)) if query, key and value follow one another."
            )
        return [(module.get_submodule(name).weight, ()) for name in _separate(module)[:n_chosen]]  # type: ignore[misc]


def _separate(module: nn.Module) -> tuple[str, ...]:
    """The names of the projections of ``module`` if it has them as Linear layers of their own."""
    for names in _SEPARATE:
        if all(isinstance(module._modules.get(name), nn.Linear) for name in names):
            return names
    return ()


def _fused(module: nn.Module) -> str:
    """The name of a child of ``module`` that holds several projections in one, or nothing."""
    return next(
        (n for n, child in module._modules.items() if n in _FUSED and hasattr(child, "weight")), ""
    )
