"""What the properties are checked on: layers of scores, masks, gradients, searches."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

prune_ratios = st.one_of(
    st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.9, 0.99]), st.floats(min_value=0.0, max_value=0.99)
)
"""A ratio such as 0.5, the ends of the range included."""

scopes = st.sampled_from(["global", "layer"])

shares = st.one_of(st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0]), st.floats(0.0, 1.0))
"""A threshold or truncation in [0, 1] such as 0.1."""

shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)
"""A layer's shape such as (3, 1, 2)."""


def values(dtype: torch.dtype = torch.float32) -> st.SearchStrategy[float]:
    """Finite weights, most of them from a handful so that ties are common."""
    few = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1.0, 2.0, 1e-7, -3.0])
    width = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}[dtype]
    return st.one_of(few, st.floats(allow_nan=False, allow_infinity=False, width=width))


@st.composite
def layers(draw: st.DrawFn, max_layers: int = 5) -> dict[str, Tensor]:
    """Weights by name, such as {"layer0": tensor([1., -1.]), "layer1": tensor([[0.5]])}."""
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    n_layers = draw(st.integers(1, max_layers), label="number of layers")
    result = {}
    for i in range(n_layers):
        shape = draw(shapes, label=f"shape of layer {i}")
        array = draw(hnp.arrays(np.float64, shape, elements=values(dtype)), label=f"layer {i}")
        # bfloat16 rounds half a dozen of float16's digits away and cannot overflow on its values.
        result[f"layer{i}"] = torch.from_numpy(array).to(dtype)
    return result


def masks(n: int) -> st.SearchStrategy[list[bool]]:
    """A mask of n entries such as [True, False, True]."""
    return st.lists(st.booleans(), min_size=n, max_size=n)


@st.composite
def mask_sequences(draw: st.DrawFn, max_masks: int = 20) -> list[list[bool]]:
    """Masks of one network in the order drawn, each a few flips away from the one before it."""
    n = draw(st.integers(1, 24), label="entries")
    mask = draw(masks(n), label="first mask")
    sequence = [mask]
    for _ in range(draw(st.integers(0, max_masks - 1), label="further masks")):
        flips = draw(st.sets(st.integers(0, n - 1), max_size=max(1, n // 4)), label="flips")
        mask = [bit ^ (position in flips) for position, bit in enumerate(mask)]
        sequence.append(mask)
    return sequence


@st.composite
def grad_lists(draw: st.DrawFn) -> list[tuple[Tensor | None, Tensor]]:
    """Gradients of mixed shapes and dtypes, some None, each with a mask of its shape."""
    pairs = []
    for i in range(draw(st.integers(0, 6), label="tensors")):
        shape = draw(shapes, label=f"shape {i}")
        dtype = draw(st.sampled_from(DTYPES), label=f"dtype {i}")
        array = draw(hnp.arrays(np.float64, shape, elements=st.floats(-4, 4, width=16)))
        mask = torch.from_numpy(draw(hnp.arrays(np.bool_, shape), label=f"mask {i}"))
        is_none = draw(st.booleans(), label=f"gradient {i} is None")
        pairs.append((None if is_none else torch.from_numpy(array).to(dtype), mask))
    return pairs
