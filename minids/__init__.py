"""minids: the compact reference of DeepSeek's techniques, and the package behind the course.

`import minids` needs torch alone; what reads files, trains or draws is imported where it is used.
"""

import warnings

from minids import accounting, fp8, mla, moe, triton_env
from minids.config import ConfigError, ModelConfig
from minids.generate import generate, speculate
from minids.model import Transformer

# `python -m minids.generate` finds its module imported, by the line above; that is meant, and does no harm.
warnings.filterwarnings("ignore", "'minids.generate' found in sys.modules", RuntimeWarning)

__all__ = ["ConfigError", "ModelConfig", "Transformer", "accounting", "fp8", "generate", "mla", "moe", "speculate"]
__all__ += ["triton_env"]
