"""Which entries could go, and when that is decided."""

from torch_worm_optim.search.mask import SCOPES as SCOPES
from torch_worm_optim.search.mask import Mask as Mask
from torch_worm_optim.search.mask import Sharding as Sharding
from torch_worm_optim.search.mask import compute_mask as compute_mask
from torch_worm_optim.search.mask import sum_over_ranks as sum_over_ranks
from torch_worm_optim.search.movement import fingerprint as fingerprint
from torch_worm_optim.search.rule import MaskSample as MaskSample
from torch_worm_optim.search.rule import Phase as Phase
from torch_worm_optim.search.rule import StoppingRule as StoppingRule
from torch_worm_optim.search.rule import decide as decide
from torch_worm_optim.search.units import expand_mask as expand_mask
from torch_worm_optim.search.units import unit_magnitudes as unit_magnitudes
from torch_worm_optim.search.window import Window as Window
