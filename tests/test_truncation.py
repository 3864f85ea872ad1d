"""Scaling of gradients and updates, in place, against plain arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import grad_lists, shares

from torch_worm_optim import truncation as truncation_module
from torch_worm_optim.pruning import apply_ticket_, zero_removed_
from torch_worm_optim.truncation import (
    fill_multiplier_,
    is_normalising,
    truncate_gradients_,
    truncate_removed_,
    truncate_updates_,
)


def multipliers_of(pairs, truncation):
    """What each gradient is to be multiplied by."""
    multipliers = []
    for gradient, mask in pairs:
        dtype = torch.float32 if gradient is None else gradient.dtype
        multipliers.append(torch.empty(mask.shape, dtype=dtype))
        fill_multiplier_(multipliers[-1], mask, truncation)
    return multipliers


@given(grad_lists(), shares, st.booleans())
def test_truncation_scales_removed_entries_by_r(pairs, truncation, foreach):
    """Kept gradients keep their bits, removed ones are r times what they were, None stays None."""
    before = [None if gradient is None else gradient.clone() for gradient, _ in pairs]

    truncate_gradients_([g for g, _ in pairs], multipliers_of(pairs, truncation), foreach=foreach)

    for old, (gradient, mask) in zip(before, pairs, strict=True):
        if gradient is not None:
            assert torch.equal(gradient[mask], old[mask])
            r = torch.tensor(truncation, dtype=gradient.dtype)
            assert torch.equal(gradient[~mask], old[~mask] * r)


@given(grad_lists(), shares)
def test_foreach_equals_the_loop(pairs, truncation):
    """The grouped call and the loop give the same bits in the same memory."""
    twins = [None if gradient is None else gradient.clone() for gradient, _ in pairs]
    storages = [None if gradient is None else gradient.data_ptr() for gradient, _ in pairs]
    multipliers = multipliers_of(pairs, truncation)

    truncate_gradients_([gradient for gradient, _ in pairs], multipliers)
    truncate_gradients_(twins, multipliers, foreach=False)

    for twin, storage, (gradient, _) in zip(twins, storages, pairs, strict=True):
        if gradient is not None:
            assert torch.equal(gradient, twin)
            assert gradient.data_ptr() == storage


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grad_lists(), shares, st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 99))
def test_bytes_of_the_window_truncate_as_multipliers_do(
    monkeypatch, pairs, truncation, block, strided, as_tensor, seed
):
    """In blocks of any size, whatever the other bits of the bytes are, the bits are the same."""
    monkeypatch.setattr(truncation_module, "_BLOCK", block)
    generator = torch.Generator().manual_seed(seed)
    twins, gradients, rows = [], [], []
    for gradient, mask in pairs:
        twins.append(None if gradient is None else gradient.clone())
        if gradient is not None and strided:
            gradient = torch.stack([gradient, gradient], -1)[..., 0]
        gradients.append(gradient)
        noise = torch.randint(128, (mask.numel(),), dtype=torch.uint8, generator=generator)
        rows.append((noise << 1) | mask.flatten())

    share = torch.tensor(truncation) if as_tensor else truncation
    truncate_removed_(gradients, rows, share)
    truncate_gradients_(twins, multipliers_of(pairs, float(share)))

    for twin, gradient in zip(twins, gradients, strict=True):
        assert (twin is None and gradient is None) or torch.equal(twin, gradient)


def test_the_kernel_truncates_as_multipliers_do(tmp_path):
    """Run by Triton's interpreter, the kernel for CUDA gives the bits of the plain twin."""
    if pytest.importorskip("triton").__version__.startswith("3.0."):
        pytest.skip("the interpreter of Triton 3.0 stores nothing into tensors on the host")
    script = tmp_path / "kernel.py"
    script.write_text(
        """
import torch, triton
from torch_worm_optim.truncation import fill_multiplier_, truncate_gradients_
from torch_worm_optim.truncation_kernel import _scale_removed

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for n in (1, 1024, 5000):
        torch.manual_seed(n)
        gradient = torch.randn(n).to(dtype)
        before, newest = gradient.clone(), torch.randint(256, (n,), dtype=torch.uint8)
        twin, multiplier = gradient.clone(), torch.empty_like(gradient)
        fill_multiplier_(multiplier, (newest & 1).bool(), 0.003)
        truncate_gradients_([twin], [multiplier])
        grid = (triton.cdiv(n, 1024),)
        _scale_removed[grid](gradient, newest, torch.tensor(0.003), n, block=1024)
        # The interpreter, unlike a device, does not round to the nearest bfloat16.
        nearly = torch.bfloat16 if dtype == torch.bfloat16 else None
        ulps = (gradient.view(torch.int16).int() - twin.view(torch.int16).int()).abs().max()
        assert torch.equal(gradient, twin) or (nearly and ulps <= 2), (dtype, n)
        kept = (newest & 1).bool()
        assert torch.equal(gradient[kept], before[kept])
print("equal")
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), shares)
def test_sparse_gradients_are_truncated_as_dense_ones(rows, truncation):
    """An embedding's sparse gradient, repeated rows included, equals its dense twin."""
    mask = torch.rand(5, 3) > 0.5
    multiplier = torch.empty(5, 3)
    fill_multiplier_(multiplier, mask, truncation)
    sparse = torch.sparse_coo_tensor(
        torch.tensor([rows]), torch.rand(len(rows), 3), (5, 3), check_invariants=True
    )
    dense = sparse.to_dense()

    again = sparse.clone()

    truncate_gradients_([sparse], [multiplier])
    truncate_gradients_([dense], [multiplier])
    truncate_removed_([again], [mask.flatten().byte()], truncation)

    torch.testing.assert_close(sparse.to_dense(), dense)
    assert torch.equal(again.to_dense(), sparse.to_dense())


@given(grad_lists(), shares)
def test_updates_of_removed_entries_are_scaled_by_r(pairs, truncation):
    """Kept entries keep the bits that the optimizer gave them; removed ones go r of the way."""
    pairs = [(new, mask) for new, mask in pairs if new is not None]
    old = [torch.linspace(-1, 1, new.numel()).view(new.shape).to(new.dtype) for new, _ in pairs]
    after = [new.clone() for new, _ in pairs]

    truncate_updates_(after, [o.clone() for o in old], [mask for _, mask in pairs], truncation)

    for start, end, (new, mask) in zip(old, after, pairs, strict=True):
        assert torch.equal(end[mask], new[mask])
        if truncation == 0:
            assert torch.equal(end[~mask], start[~mask])
        if truncation == 1:
            assert torch.equal(end[~mask], new[~mask])
        expected = start.double() + truncation * (new.double() - start.double())
        tolerance = 8 * torch.finfo(new.dtype).eps
        assert (end.double() - expected)[~mask].abs().le(tolerance * 5).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_kernel_gives_the_bits_of_multipliers_on_a_device(dtype):
    """Where a kernel runs, it is exact in half precision, too."""
    for n in (1, 1000, 1 << 20):
        gradient = torch.randn(n, device="cuda").to(dtype)
        newest = torch.randint(256, (n,), dtype=torch.uint8, device="cuda")
        twin, multiplier = gradient.clone(), torch.empty_like(gradient)
        strength = torch.tensor(0.003, device="cuda")
        fill_multiplier_(multiplier, (newest & 1).bool(), float(strength))

        truncate_removed_([gradient], [newest], strength)
        truncate_gradients_([twin], [multiplier])

        assert torch.equal(gradient, twin)


@given(grad_lists())
def test_removed_entries_become_zero(pairs):
    """Removed entries are exactly zero, even infinite ones; kept ones keep their bits."""
    pairs = [(value, mask) for value, mask in pairs if value is not None]
    before = [value.clone() for value, _ in pairs]
    for value, mask in pairs:
        value[~mask] = torch.inf

    zero_removed_([value for value, _ in pairs], [~mask for _, mask in pairs])

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
    [(name, True) for name in ("NAdamW", "LaProp", "SignSGD", "Lion", "Adan", "RMSpropTF", "Yogi")]
    + [(name, False) for name in ("LambdaSGD", "DesignedSGD", "CanadaSGD", "SGDP", "Lookahead")],
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
