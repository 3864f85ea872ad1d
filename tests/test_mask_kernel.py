"""Masks drawn by kernels: the same as in the ordinary way, and no waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from torch_worm_optim import ParameterSelector, WormOptimizer, kernels
from torch_worm_optim.kernels import kernels_run
from torch_worm_optim.masks import compute_mask, new_window, push_mask_, window_distances

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("job", ["equal", "large", "gives_up", "waits_once", "search"])
def test_the_interpreter_finds(job):
    """What Triton's interpreter makes of the kernels, see `kernel_jobs`."""
    if pytest.importorskip("triton").__version__.startswith("3.0."):
        pytest.skip("the interpreter of Triton 3.0 stores nothing into tensors on the host")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernel_jobs.py")), job],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_devices_that_are_not_here(dtype, capability):
    """What is interpreted compiles, too, and entries are read sixteen bytes at a time."""
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this Triton is asked in another way to compile for a device")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torch_worm_optim import mask_kernel, truncation_kernel

    like = {"fp32": "*i32", "bf16": "*i16"}[dtype]
    table = {"table": "*i64", "tensor_of_block": "*i32", "like": like}
    sample = {"n_tensors": "i32", "stride": "i32", "n": "i32", "out": "*i64"}
    bracket = {"low": "*i64", "high": "*i64", "room": "*i64", "capacity": "i32"}
    seen = {"n_inside": "*i32", "regions": "i32", "seen": "*i32"}
    sized = {"even": True, "block": mask_kernel._BLOCK}
    for kernel, arguments, constants, warps in (
        (
            mask_kernel._sample,
            {"table": "*i64", "like": like, **sample},
            {"halvings": 5, "block": mask_kernel._BLOCK},
            mask_kernel._WARPS,
        ),
        (
            mask_kernel._collect,
            {**table, **bracket, **seen},
            sized,
            mask_kernel._WARPS,
        ),
        (
            mask_kernel._push,
            {**table, "newest": "*u8", "cutoff": "*i64", "counts": "*i32"},
            {"n_words": 4, **sized},
            mask_kernel._WARPS,
        ),
        (
            truncation_kernel._scale_removed,
            {"gradient": f"*{dtype}", "newest": "*u8", "strength": "*fp32", "n": "i32"},
            {"block": truncation_kernel._BLOCK},
            4,
        ),
    ):
        source = ASTSource(
            fn=kernel,
            signature={**arguments, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
            attrs={
                (position,): [["tt.divisibility", 16]]
                for position, kind in enumerate(arguments.values())
                if kind.startswith("*") or kind == "i32"
            },
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
        )
        assert compiled.asm["cubin"]
        wide = compiled.asm["ptx"].count("ld.global.v4")
        assert wide or kernel is mask_kernel._sample


def test_kernels_are_left_alone_with_what_they_are_not_made_for():
    """They take addresses and sizes, and would read something else."""
    pytest.importorskip("triton")
    from torch_worm_optim.mask_kernel import can_draw

    class Packed(torch.Tensor):
        """As quantised weights are: not what lies at its address."""

    plain, window = torch.zeros(8, 8), new_window(64, 5)
    assert can_draw([plain], window)
    assert can_draw([torch.nn.Parameter(plain.bfloat16())], window)
    assert not can_draw([plain.double()], window)
    assert not can_draw([plain.T[:, :4]], window)
    assert not can_draw([plain.view(-1)[1:]], window)
    assert not can_draw([plain, plain.half()], window)
    assert not can_draw([plain.as_subclass(Packed)], window)
    assert not can_draw([plain], new_window(64, 9))
    assert not can_draw([plain.to("meta")], window)


def test_no_kernels_run_where_there_is_no_such_device():
    """Nothing is tried, and nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels_run(torch.device("cpu"))


@needs_cuda
def test_a_compiler_that_fails_is_told_of_and_done_without(monkeypatch):
    """Triton without a C compiler is no reason to fail: plain operators draw the mask."""
    from torch_worm_optim import truncation_kernel

    def fail(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(truncation_kernel, "scale_removed_", fail)
    with pytest.warns(UserWarning, match="plain operators.*Failed to find C compiler"):
        assert not kernels._try(torch.device("cuda"))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_device_draws_the_mask_of_the_host(dtype):
    """Millions of entries, ties included: masks, ties and distances are the host's."""
    from torch_worm_optim.mask_kernel import draw_mask_

    torch.manual_seed(0)
    weights = {name: torch.randn(1000, 1024).to(dtype) for name in "abcd"}
    n = sum(tensor.numel() for tensor in weights.values())
    bits, twin = new_window(n, 5, "cuda"), new_window(n, 5)
    for _ in range(7):
        for tensor in weights.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
        there = [tensor.cuda() for tensor in weights.values()]
        mask = compute_mask(weights, 0.5)
        push_mask_(twin, mask.kept)
        drawn = draw_mask_(there, bits, n // 2, [1] * 4, 4)
        assert drawn is not None
        assert drawn.n_tied == mask.n_tied
        assert tuple(count / n for count in drawn.differences) == window_distances(twin, 5)
        assert torch.equal(bits.cpu(), twin)


@needs_cuda
def test_a_sample_waits_for_the_device_once():
    """All is queued before anything is read back."""
    if not kernels_run(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("Triton cannot run kernels here")
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256, bias=False) for _ in range(4)]).cuda()
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        ParameterSelector("*"),
        sample_every=None,
        stopping_point=0,
    )
    for _ in range(6):
        opt.sample()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            opt.sample()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(each.message) for each in caught) == 1
