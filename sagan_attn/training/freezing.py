"""What of a network is its host, for freezing it."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sagan_attn.surgery import grafts_of
from sagan_attn.training.hosts import find_head

__all__ = ["host_norms_to_eval", "host_parameters"]


def host_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Those that learn, but for grafts and head."""
    others = {*grafts_of(network).parameters(), *find_head(network).parameters()}
    return [parameter for parameter in network.parameters() if parameter.requires_grad and parameter not in others]


def host_norms_to_eval(network: nn.Module) -> None:
    """Have the host's batch norms use, and keep, the statistics they have."""
    grafted = {module for graft in grafts_of(network) for module in graft.block.modules()}
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module not in grafted:
            module.eval()
