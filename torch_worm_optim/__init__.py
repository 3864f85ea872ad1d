"""Find the winning ticket of a network while it trains, from inside its optimizer."""

from torch_worm_optim.optimizer import WormOptimizer as WormOptimizer
from torch_worm_optim.plot import plot_kept as plot_kept
from torch_worm_optim.plot import plot_trajectory as plot_trajectory
from torch_worm_optim.search import MaskSample as MaskSample
from torch_worm_optim.search import Phase as Phase
from torch_worm_optim.selectors import BatchNormSelector as BatchNormSelector
from torch_worm_optim.selectors import FeedForwardSelector as FeedForwardSelector
from torch_worm_optim.selectors import ParameterSelector as ParameterSelector
from torch_worm_optim.selectors import Part as Part
from torch_worm_optim.selectors import QueryKeySelector as QueryKeySelector
from torch_worm_optim.selectors import Representative as Representative
from torch_worm_optim.selectors import Selector as Selector
from torch_worm_optim.shrink import ShrinkReport as ShrinkReport
from torch_worm_optim.shrink import load_shrunk_ as load_shrunk_
from torch_worm_optim.shrink import shrink_ as shrink_
from torch_worm_optim.ticket import apply_ticket_ as apply_ticket_

__version__ = "0.3.0"

__all__ = [
    "BatchNormSelector",
    "FeedForwardSelector",
    "MaskSample",
    "ParameterSelector",
    "Part",
    "Phase",
    "QueryKeySelector",
    "Representative",
    "Selector",
    "ShrinkReport",
    "WormOptimizer",
    "apply_ticket_",
    "load_shrunk_",
    "plot_kept",
    "plot_trajectory",
    "shrink_",
]
