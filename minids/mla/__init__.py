"""Multi-head Latent Attention: `reference` has the equations in both forms, `layer` the module and its cache."""

from minids.mla import reference
from minids.mla.layer import MLA, LatentCache

__all__ = ["MLA", "LatentCache", "reference"]
