"""Which entries could go, and when that is decided."""

from torch_worm_optim.search.mask import Mask as Mask
from torch_worm_optim.search.mask import Scores as Scores
from torch_worm_optim.search.mask import compute_mask as compute_mask
from torch_worm_optim.search.mask import fingerprint as fingerprint
from torch_worm_optim.search.mask import unit_magnitudes as unit_magnitudes
from torch_worm_optim.search.masksearch import MaskSearch as MaskSearch
from torch_worm_optim.search.rule import MaskSample as MaskSample
from torch_worm_optim.search.rule import Phase as Phase
from torch_worm_optim.search.rule import SearchSettings as SearchSettings
from torch_worm_optim.search.window import Bits as Bits
from torch_worm_optim.search.window import Window as Window
from torch_worm_optim.search.window import pack as pack
from torch_worm_optim.search.window import unpack as unpack
