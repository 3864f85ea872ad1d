"""Which parameters represent a network."""

from torch_worm_optim.selectors.attention import QueryKeySelector as QueryKeySelector
from torch_worm_optim.selectors.base import Representative as Representative
from torch_worm_optim.selectors.base import Selector as Selector
from torch_worm_optim.selectors.base import canonical_name as canonical_name
from torch_worm_optim.selectors.batchnorm import BatchNormSelector as BatchNormSelector
from torch_worm_optim.selectors.feed_forward import FeedForwardSelector as FeedForwardSelector
from torch_worm_optim.selectors.parameters import ParameterSelector as ParameterSelector
from torch_worm_optim.selectors.recurrent import RecurrentSelector as RecurrentSelector
from torch_worm_optim.selectors.selection import default_selector as default_selector
from torch_worm_optim.selectors.selection import select as select
