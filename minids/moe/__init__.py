"""DeepSeekMoE: routers, experts, balance; `reference` has the equations, `layer` the modules."""

from minids.moe import reference
from minids.moe.layer import Experts, Gate, MoE

__all__ = ["Experts", "Gate", "MoE", "reference"]
