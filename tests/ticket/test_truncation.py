"""Scaling of gradients and updates, and holding at zero, against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import grad_lists, shares

from torch_worm_optim.ticket import (
    Entries,
    Faded,
    HeldAtZero,
    ScaledGradients,
    ScaledUpdates,
    apply_ticket_,
    is_normalising,
    scale_gradients_,
    scale_updates_,
)


def entries_of(pairs):
    """What a strategy is given for gradients of weights that are zero."""
    return [
        Entries(
            torch.zeros(mask.shape, dtype=torch.float32 if gradient is None else gradient.dtype),
            lambda gradient=gradient: gradient,
            lambda mask=mask: mask,
        )
        for gradient, mask in pairs
    ]


@pytest.mark.parametrize("with_closure", [False, True])
@given(pairs=grad_lists(), truncation=shares)
def test_gradients_of_removed_entries_are_scaled_by_r(with_closure, pairs, truncation):
    """Kept gradients keep their bits, removed ones are r times what they were, None stays None."""
    before = [None if gradient is None else gradient.clone() for gradient, _ in pairs]
    storages = [None if gradient is None else gradient.data_ptr() for gradient, _ in pairs]
    calls = []

    def base_step(closure):
        return closure() if with_closure else calls.append("step")

    closure = (lambda: calls.append(torch.is_grad_enabled()) or "loss") if with_closure else None
    strategy = ScaledGradients(truncation)
    with torch.no_grad():
        loss = strategy.step(base_step, closure, entries_of(pairs))

    assert loss == ("loss" if with_closure else None)
    assert calls == [True if with_closure else "step"]
    for old, storage, (gradient, mask) in zip(before, storages, pairs, strict=True):
        if gradient is not None:
            assert gradient.data_ptr() == storage
            assert torch.equal(gradient[mask], old[mask])
            r = torch.tensor(truncation, dtype=gradient.dtype)
            assert torch.equal(gradient[~mask], old[~mask] * r)


@pytest.mark.parametrize(
    "strategy", [ScaledGradients(0.5), ScaledUpdates(0.5), Faded(), HeldAtZero()]
)
def test_another_mask_applies_after_clear(strategy):
    """What is held between steps is the mask's that was newest, until it is cleared."""
    weight = torch.tensor([1.0, 1.0])
    gradient = torch.tensor([1.0, 1.0])
    mask = torch.tensor([True, False])
    entries = [Entries(weight, lambda: gradient, lambda: mask)]
    strategy.step(lambda closure: weight.add_(1), None, entries)
    changed = weight.tolist(), gradient.tolist()
    assert changed != ([2.0, 2.0], [1.0, 1.0])
    mask = torch.tensor([False, True])

    strategy.clear()
    weight.fill_(1), gradient.fill_(1)
    strategy.step(lambda closure: weight.add_(1), None, entries)

    assert (weight.tolist()[::-1], gradient.tolist()[::-1]) == changed


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), shares)
def test_sparse_gradients_are_scaled_as_dense_ones(rows, truncation):
    """An embedding's sparse gradient, repeated rows included, equals its dense twin."""
    mask = torch.rand(5, 3) > 0.5
    multiplier = torch.full((5, 3), truncation).masked_fill_(mask, 1)
    sparse = torch.sparse_coo_tensor(
        torch.tensor([rows]), torch.rand(len(rows), 3), (5, 3), check_invariants=True
    )
    dense = sparse.to_dense()

    scale_gradients_([sparse], [multiplier])
    scale_gradients_([dense], [multiplier])

    torch.testing.assert_close(sparse.to_dense(), dense)


@given(grad_lists(), shares)
def test_updates_of_removed_entries_are_scaled_by_r(pairs, truncation):
    """Kept entries keep the bits that the optimizer gave them; removed ones go r of the way."""
    pairs = [(new, mask) for new, mask in pairs if new is not None]
    old = [torch.linspace(-1, 1, new.numel()).view(new.shape).to(new.dtype) for new, _ in pairs]
    after = [new.clone() for new, _ in pairs]

    scale_updates_(after, [o.clone() for o in old], [mask for _, mask in pairs], truncation)

    for start, end, (new, mask) in zip(old, after, pairs, strict=True):
        assert torch.equal(end[mask], new[mask])
        if truncation == 0:
            assert torch.equal(end[~mask], start[~mask])
        if truncation == 1:
            assert torch.equal(end[~mask], new[~mask])
        expected = start.double() + truncation * (new.double() - start.double())
        tolerance = 8 * torch.finfo(new.dtype).eps
        assert (end.double() - expected)[~mask].abs().le(tolerance * 5).all()


@given(grad_lists())
def test_removed_entries_become_zero(pairs):
    """Removed entries are exactly zero, even infinite ones; kept ones keep their bits."""
    pairs = [(value, mask) for value, mask in pairs if value is not None]
    before = [value.clone() for value, _ in pairs]
    for value, mask in pairs:
        value[~mask] = torch.inf

    HeldAtZero().apply_(
        [Entries(value, lambda: None, lambda mask=mask: mask) for value, mask in pairs]
    )

    for old, (value, mask) in zip(before, pairs, strict=True):
        assert torch.equal(value, torch.where(mask, old, torch.zeros_like(old)))


def test_a_ticket_for_another_model_leaves_it_alone():
    """Unknown names, other shapes and masks that are not bool are refused before any change."""
    model = torch.nn.BatchNorm1d(3)
    good = torch.tensor([False, True, True])

    with pytest.raises(ValueError, match=r"for another model: it has a mask for 'bn\.weight'"):
        apply_ticket_(model, {"weight": good, "bn.weight": good})
    with pytest.raises(ValueError, match=r"mask for 'bias' has shape \(2,\)"):
        apply_ticket_(model, {"weight": good, "bias": good[:2]})
    with pytest.raises(
        TypeError, match=r"'bias' must be a bool tensor.*got a tensor of torch\.int64"
    ):
        apply_ticket_(model, {"weight": good, "bias": good.long()})
    with pytest.raises(TypeError, match="got list"):
        apply_ticket_(model, {"weight": [False, True, True]})

    assert torch.equal(model.weight, torch.ones(3))
    apply_ticket_(model, {"weight": good})
    assert model.weight.tolist() == [0, 1, 1]


def test_a_ticket_may_use_any_name_of_a_tied_parameter():
    """Tied weights have two names, and a ticket may use either."""
    model = torch.nn.ModuleList([torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)])
    model[1].weight = model[0].weight

    apply_ticket_(model, {"1.weight": torch.tensor([False, True, True])})

    assert model[0].weight.tolist() == [0, 1, 1]


def test_a_ticket_fits_a_model_that_is_wrapped_otherwise():
    """The prefixes of wrappers do not make another model."""
    model = torch.nn.BatchNorm1d(3)

    apply_ticket_(model, {"module._orig_mod.weight": torch.tensor([False, True, True])})

    assert model.weight.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (name, True)
        for name in (
            *("NAdamW", "LaProp", "SignSGD", "Lion", "Adan", "RMSpropTF", "Yogi", "Adopt", "Rprop"),
            *("Lamb", "FusedLAMB", "Prodigy", "SophiaG", "Shampoo", "SOAP", "Muon", "Kron", "CAME"),
            *("NovoGrad", "NvNovoGrad", "MADGRAD", "Mars", "AdEMAMix", "Ranger21", "Tiger"),
        )
    ]
    + [
        (name, False)
        for name in ("LambdaSGD", "DesignedSGD", "CanadaSGD", "SGDP", "Lookahead", "SGDMars")
    ],
)
def test_names_of_normalising_optimizers_are_told_from_others(name, expected):
    """A name that only holds the letters of another is not taken for it."""
    made = type(name, (torch.optim.SGD,), {})([torch.zeros(1, requires_grad=True)])

    assert is_normalising(made) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SGD", False),
        ("ASGD", False),
        ("LBFGS", False),
        *[(name, True) for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop")],
        *[(name, True) for name in ("Adagrad", "Adadelta", "Adafactor", "Rprop", "SparseAdam")],
    ],
)
def test_normalising_optimizers_are_known(name, expected):
    """Those that divide by the gradient's own size are told from those that do not."""
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    kind = getattr(torch.optim, name)

    assert is_normalising(kind([torch.zeros(1, requires_grad=True)])) is expected
    assert (
        is_normalising(type("Mine", (kind,), {})([torch.zeros(1, requires_grad=True)])) is expected
    )
