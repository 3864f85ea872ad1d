"""What Triton's interpreter runs of the kernels for CUDA, each by name in a process of its own.

    TRITON_INTERPRET=1 python tests/kernel_jobs.py equal

The interpreter is chosen when Triton is imported, and kernels are none of a device's then.
"""

from __future__ import annotations

import sys

import drawing
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import layers, prune_ratios
from torch.utils._python_dispatch import TorchDispatchMode
from training import BASES, same, small_cnn, weights_of

from torch_worm_optim import Phase, WormOptimizer, mask_kernel, optimizer
from torch_worm_optim.mask_kernel import draw_mask_
from torch_worm_optim.masks import new_window

HALF = [torch.float32, torch.float16, torch.bfloat16]


def check_equal(entries, *args, **options):
    """Kernels take what is contiguous."""
    contiguous = {name: tensor.contiguous() for name, tensor in entries.items()}
    return drawing.check_equal(mask_kernel, contiguous, *args, **options)


def equal():
    """Masks, ties and distances are those of the ordinary way, for whatever weights."""

    @settings(
        max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(
        layers().filter(lambda entries: next(iter(entries.values())).dtype in HALF),
        prune_ratios,
        st.integers(2, 8),
        st.integers(0, 2),
    )
    def check(entries, ratio, window, min_keep):
        if round(ratio * sum(tensor.numel() for tensor in entries.values())) > 0:
            check_equal(entries, ratio, window, min_keep, may_give_up=True)

    mask_kernel._BLOCK = 16
    check()


def large():
    """So are those of thousands of entries: ties of every kind, strides, regions, odd sizes."""
    mask_kernel._BLOCK, mask_kernel._SAMPLE = 512, 1 << 11
    generator = torch.Generator().manual_seed(0)
    for sizes in ([4096, 0, 1024, 16], [5000, 1, 777, 3]):
        for dtype in (torch.float32, torch.bfloat16):
            normal = {
                str(i): torch.randn(n, generator=generator).to(dtype) for i, n in enumerate(sizes)
            }
            kinds = [
                normal,
                {name: (tensor * 2).round() for name, tensor in normal.items()},
                {name: tensor * (tensor > 0) for name, tensor in normal.items()},
                {name: torch.ones_like(tensor) for name, tensor in normal.items()},
                {name: tensor * torch.finfo(dtype).tiny for name, tensor in normal.items()},
            ]
            for entries, ratio in zip(kinds, (0.5, 0.03, 0.97, 0.5, 0.3), strict=True):
                assert check_equal(entries, ratio, 2, 0, may_give_up=False) == 0


def gives_up():
    """What cannot be told from the sample, or is no ranking, leaves the masks held as they were."""
    mask_kernel._BLOCK = 256
    weights = [torch.randn(3000), torch.full((50,), 1e-6)]
    for spoil, quotas in (
        (lambda: None, [1, 1]),  # the second would keep nothing
        (lambda: weights[0][5].fill_(torch.nan), [0, 0]),
        (lambda: weights[0][5].fill_(-torch.inf), [0, 0]),
    ):
        spoil()
        window = new_window(3050, 5)
        window.random_(0, 128, generator=torch.Generator().manual_seed(1))
        before = window.clone()
        assert draw_mask_(weights, window, 1500, quotas, 4) is None
        assert torch.equal(window, before)
    weights[0][5] = 1.0

    def interrupted(tensor):
        raise KeyboardInterrupt

    usual, torch.Tensor.tolist = torch.Tensor.tolist, interrupted
    try:
        draw_mask_(weights, window, 1500, [0, 0], 4)
    except KeyboardInterrupt:
        assert torch.equal(window, before)
    else:
        raise AssertionError
    torch.Tensor.tolist = usual
    # What the sample does not see all lies inside the bracket, or above it.
    mask_kernel._SAMPLE = 1 << 8
    stride = 3050 // mask_kernel._SAMPLE | 1
    flat = torch.cat(weights)
    for unseen in (flat[::stride].abs().median(), torch.tensor(9.0)):
        misleading = unseen.repeat(3050)
        misleading[::stride] = flat[::stride]
        assert draw_mask_([misleading], window, 1500, [0], 4) is None
        assert torch.equal(window, before)
    assert draw_mask_(weights, window, 1500, [0, 0], 4) is not None


class _Reads(TorchDispatchMode):
    """The operators that would make a CUDA device be waited for."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "bincount",
        "unique",
        "repeat_interleave",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits_once():
    """Nothing is read back but the list of numbers at the end, which is one."""
    weights = [torch.randn(300, 10), torch.randn(500)]
    window = new_window(3500, 5)
    lists, usual = [], torch.Tensor.tolist

    def tolist(tensor):
        lists.append(tensor.numel())
        return usual(tensor)

    torch.Tensor.tolist = tolist
    with _Reads() as reads:
        drawn = draw_mask_(weights, window, 1750, [1, 1], 4)
    torch.Tensor.tolist = usual
    assert drawn is not None
    assert len(lists) == 1
    assert reads.seen == []


def search():
    """A search that draws so is, step by step and bit for bit, the one that does not."""
    runs = []
    drawn = []
    usual_draw = mask_kernel.draw_mask_

    def draw(*args):
        drawn.append(usual_draw(*args))
        return drawn[-1]

    mask_kernel.draw_mask_ = draw
    for at_once in (True, False):
        optimizer.kernels_run = lambda device, at_once=at_once: at_once
        model = small_cnn()
        opt = WormOptimizer(
            BASES["SGD momentum"](model.parameters()), model, sample_every=2, stopping_point=0.2
        )
        images = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(60):
            opt.zero_grad()
            labels = torch.arange(16) % 3
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            opt.step()
            if opt.converged:
                opt.prune()
        assert opt.phase is Phase.PRUNED
        runs.append((opt.history, opt.final_mask, weights_of(model)))
    assert len(drawn) == len(runs[0][0])
    assert any(drawn)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(mask, runs[1][1][name]) for name, mask in runs[0][1].items())
    assert same(runs[0][2], runs[1][2])


if __name__ == "__main__":
    {job.__name__: job for job in (equal, large, gives_up, waits_once, search)}[sys.argv[1]]()
    print("equal")
