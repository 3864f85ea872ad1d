"""Zeros cut out of a network: nothing here knows of selectors, searches or the optimizer."""

from torch_worm_optim.shrink.cut import Kept as Kept
from torch_worm_optim.shrink.cut import composed as composed
from torch_worm_optim.shrink.cut import cut_tensor as cut_tensor
from torch_worm_optim.shrink.held import checked_ticket as checked_ticket
from torch_worm_optim.shrink.reload import load_shrunk_ as load_shrunk_
from torch_worm_optim.shrink.report import ShrinkReport as ShrinkReport
from torch_worm_optim.shrink.shrink import shrink_ as shrink_
from torch_worm_optim.shrink.state import is_preconditioning as is_preconditioning
from torch_worm_optim.shrink.state import with_inner as with_inner
