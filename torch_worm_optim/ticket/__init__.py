"""What has been decided, applied to weights."""

from torch_worm_optim.ticket.pruning import apply_ticket_ as apply_ticket_
from torch_worm_optim.ticket.pruning import checked_ticket as checked_ticket
from torch_worm_optim.ticket.restraint import Entries as Entries
from torch_worm_optim.ticket.restraint import Faded as Faded
from torch_worm_optim.ticket.restraint import HeldAtZero as HeldAtZero
from torch_worm_optim.ticket.restraint import ScaledGradients as ScaledGradients
from torch_worm_optim.ticket.restraint import ScaledUpdates as ScaledUpdates
from torch_worm_optim.ticket.restraint import Strategy as Strategy
from torch_worm_optim.ticket.restraint import is_normalising as is_normalising
from torch_worm_optim.ticket.restraint import scale_gradients_ as scale_gradients_
from torch_worm_optim.ticket.restraint import scale_updates_ as scale_updates_
from torch_worm_optim.ticket.ticket import HeldTicket as HeldTicket
