"""Which parameters represent a network."""

from torch_worm_optim.selectors.attention import Block as Block
from torch_worm_optim.selectors.attention import QueryKeySelector as QueryKeySelector
from torch_worm_optim.selectors.attention import attention_blocks as attention_blocks
from torch_worm_optim.selectors.batchnorm import BatchNormSelector as BatchNormSelector
from torch_worm_optim.selectors.check import default_selector as default_selector
from torch_worm_optim.selectors.check import select as select
from torch_worm_optim.selectors.check import selected as selected
from torch_worm_optim.selectors.check import warn_of_zeros as warn_of_zeros
from torch_worm_optim.selectors.feed_forward import FeedForwardSelector as FeedForwardSelector
from torch_worm_optim.selectors.parameters import ParameterSelector as ParameterSelector
from torch_worm_optim.selectors.representative import Part as Part
from torch_worm_optim.selectors.representative import Representative as Representative
from torch_worm_optim.selectors.representative import Selector as Selector
