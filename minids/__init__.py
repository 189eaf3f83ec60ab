"""minids: the compact reference of DeepSeek's techniques, and the package behind the course.

    ModelConfig     sizes and switches of a model; help(minids.config) has the letters in shapes, presets the names
    Transformer     the model: model(tokens), model.loss, model.layers[0].self_attn, from_pretrained, save_pretrained
    generate        tokens after tokens; speculate does so with MTP
    mla, moe, fp8   the three techniques, each with reference (equations), its modules, and kernels (Triton)
    accounting      parameters, cache bytes, FLOPs, seconds and dollars from a configuration alone

`import minids` needs torch alone; what reads files, trains or draws loads when it is first used, such as

    minids.data, minids.layers, minids.optim    # texts and batches, the common parts, Muon and AdamW
    from minids.lab import check, hint, status

`python -m minids.train` trains by command; a loop of your own, with B sequences of T tokens a step:

    from minids import data, optim
    corpus = data.load_corpus("stdlib")
    tokenizer = data.load_tokenizer(corpus, model.cfg.vocab_size)
    tokens = data.encode_files(tokenizer, corpus.train)
    optimizers = optim.build_optimizers(model, lr_muon=0.02, lr_adam=0.003, weight_decay=0.1)
    for step in range(100):
        loss, nats_per_token = model.loss(*data.batch(tokens, step, seed=0, batch_size=B, seq_len=T))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
        model.update_expert_bias(1e-3)
"""

import warnings

from minids import accounting, fp8, mla, moe, triton_env
from minids.config import ConfigError, ModelConfig
from minids.generate import generate, speculate
from minids.layers import late_modules
from minids.model import Transformer

# `python -m minids.generate` finds its module imported, by the line above; that is meant, and does no harm.
warnings.filterwarnings("ignore", "'minids.generate' found in sys.modules", RuntimeWarning)

__all__ = ["ConfigError", "ModelConfig", "Transformer", "accounting", "fp8", "generate", "mla", "moe", "speculate"]
__all__ += ["triton_env"]
__getattr__, __dir__ = late_modules(__name__, __all__)
