"""Zeros cut out of a network: nothing here knows of selectors, searches or the optimizer."""

from torch_worm_optim.shrink.shrink import Kept as Kept
from torch_worm_optim.shrink.shrink import ShrinkReport as ShrinkReport
from torch_worm_optim.shrink.shrink import composed as composed
from torch_worm_optim.shrink.shrink import cut_tensor as cut_tensor
from torch_worm_optim.shrink.shrink import load_shrunk_ as load_shrunk_
from torch_worm_optim.shrink.shrink import shrink_ as shrink_
