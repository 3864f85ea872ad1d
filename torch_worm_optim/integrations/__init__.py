"""Callbacks for trainers, one module each; a module needs the package that it is named after."""

from torch_worm_optim.integrations.reports import AtTicket as AtTicket
from torch_worm_optim.integrations.reports import Reporter as Reporter
from torch_worm_optim.integrations.reports import unwrapped as unwrapped
