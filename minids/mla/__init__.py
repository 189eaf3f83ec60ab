"""Multi-head Latent Attention: `reference` has the equations in both forms, `layer` the module and its cache.

`kernels` has decoding in Triton; it loads when it is first used, for `import minids` works without Triton.
"""

from minids.layers import late_modules
from minids.mla import reference
from minids.mla.layer import MLA, LatentCache

__all__ = ["MLA", "LatentCache", "reference"]
__getattr__, __dir__ = late_modules(__name__, __all__, "kernels")
