"""What has been decided, applied to weights."""

from torch_worm_optim.ticket.restraint import Restraint as Restraint
from torch_worm_optim.ticket.restraint import is_normalising as is_normalising
from torch_worm_optim.ticket.restraint import warn_if_normalising as warn_if_normalising
from torch_worm_optim.ticket.ticket import PackedMask as PackedMask
from torch_worm_optim.ticket.ticket import Ticket as Ticket
from torch_worm_optim.ticket.ticket import apply_ticket_ as apply_ticket_
