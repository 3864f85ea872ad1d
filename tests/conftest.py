"""Settings of the whole suite."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator

import pytest
import torch
import training
from _pytest.doctest import DoctestModule
from hypothesis import settings

# Hypothesis loads its own "ci" profile where CI is set; a deadline would make the suite depend on
# how busy the machine is.
settings.register_profile("dev", deadline=None)
if settings.get_current_profile_name() != "ci":
    settings.load_profile("dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option for the test that is too long for every day."""
    parser.addoption(
        "--every-timm-model",
        action="store_true",
        help="check BatchNormSelector on every model that timm has (some minutes)",
    )
    parser.addoption(
        "--device", default="cpu", help="where the small network of most tests is trained"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put the small network where it was asked for."""
    training.DEVICE = torch.device(config.getoption("--device"))


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Look for doctests in the package alone: they pass over a test file that cannot be imported.

    And what pytest has failed to import for its doctests it then takes for a file without tests.
    """
    collectors = yield
    return [each for each in collectors if not isinstance(each, DoctestModule)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device, or matplotlib for its example, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if importlib.util.find_spec("matplotlib") is None:
        for item in items:
            if "torch_worm_optim.plot." in item.name:
                item.add_marker(pytest.mark.skip(reason="needs matplotlib"))


# Tensors here are tiny: threads would only wait for each other, for minutes on a busy machine.
torch.set_num_threads(1)

# Pictures are drawn without a screen, and never shown.
os.environ["MPLBACKEND"] = "Agg"

# Else the bits of a convolution's gradient differ from call to call on a CUDA device.
torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
