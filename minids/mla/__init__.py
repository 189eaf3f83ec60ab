"""Multi-head Latent Attention: `reference` has the equations in both forms, `layer` the module and its cache.

`kernels` has decoding in Triton; it loads when it is first used, for `import minids` works without Triton.
"""

import importlib

from minids.mla import reference
from minids.mla.layer import MLA, LatentCache

__all__ = ["MLA", "LatentCache", "reference"]


def __getattr__(name):
    if name != "kernels":
        raise AttributeError(f"minids.mla has no {name!r}; it has {', '.join(__all__)} and kernels")
    return importlib.import_module("minids.mla.kernels")


def __dir__():
    return [*__all__, "kernels"]
