"""Settings of the whole suite."""

from __future__ import annotations

import pytest
import torch
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


# Tensors here are tiny: threads would only wait for each other, for minutes on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
