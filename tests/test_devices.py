"""On a GPU every tensor is made there: what a processor's memory would hold by mistake shows here, without a GPU.

torch's fake tensors have a device and no numbers, and an operation on two devices raises. They need a torch that is
built for CUDA, and have no backward pass without a GPU. No kernel runs: what it is given must lie on the GPU.
"""

import collections
import sys
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minids import ModelConfig, Transformer, fp8, generate, loss_kernels, optim, triton_env
from minids.bench import attention, layers, mla
from minids.bench import fp8 as bench_fp8
from minids.layer_kernels import rms_norm_kernel

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="this torch is built without CUDA")
CUDA = torch.device("cuda")


@pytest.fixture
def launched(monkeypatch):
    """A GPU of fake tensors; counts the launches by name, each of tensors on it alone."""
    counts = collections.Counter()

    def run(self, *arguments, grid=None, warmup=None, **constants):
        assert {str(t.device) for t in arguments if isinstance(t, torch.Tensor)} == {"cuda:0"}, self
        counts[self.fn.__name__] += 1

    def here(where):
        assert where.type == "cuda", f"a kernel's wrapper asks for the GPU of {where}"
        return 90, 132

    for owner, name, value in (
        (type(rms_norm_kernel), "run", run),
        (triton_env, "mode", lambda: "gpu"),
        (triton_env, "compiles", lambda: True),
        (triton_env, "gpu", here),
        (sys.modules["minids.layers"], "prefers_cudnn", lambda where: False),
        (sys.modules["minids.generate"], "check_vocabulary", lambda tokens, cfg: None),
        (torch.cuda, "get_device_capability", lambda where=None: (9, 0)),
        (torch.cuda, "is_bf16_supported", lambda *given, **options: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (loss_kernels, "ADDS_TO_FP32", False),  # see rehearsal.py
    ):
        monkeypatch.setattr(owner, name, value)
    kept = sys.modules["minids.layers"].inverse_frequencies  # those of another test's fake mode would not go with these
    kept.cache_clear()
    with FakeTensorMode(), mock.patch("torch.cuda.is_available", lambda: False):
        yield counts
    kept.cache_clear()


def tiny(**changes):
    with CUDA:
        return Transformer(ModelConfig.preset("tiny", num_hidden_layers=2, **changes))


MODELS = {
    "plain": {},
    "MTP": {"num_nextn_predict_layers": 1},
    "GQA": {"attention": "gqa", "num_key_value_heads": 1},
    "balance loss": {"aux_loss_alpha": 0.01},
    "YaRN": {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}},
}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_trains_and_writes_on_the_gpu(launched, model, precision):
    model = tiny(**MODELS[model]).train()
    if precision == "fp8":
        fp8.convert(model)
    tokens = torch.zeros(4, 64, dtype=torch.int64, device=CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = model.loss(tokens, tokens)
    assert str(loss.device) == "cuda:0" and {"rms_norm_kernel", "cross_entropy_kernel"} <= launched.keys()
    model.update_expert_bias(0.001)
    prompt = torch.zeros(2, 9, dtype=torch.int64)  # on the processor, as a caller has it
    for sampling in ({}, {"temperature": 0.8, "top_p": 0.9}):
        assert generate(model, prompt, 3, **sampling).shape == (2, 12)
    assert {"tiles_kernel", "matmul_kernel"} <= launched.keys() or precision == "bf16"


def test_both_optimizers_update_on_the_gpu(launched):
    model = tiny()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optim.build_optimizers(model, 0.01, 0.01, 0.1):
        optimizer.step()


def test_sides_of_the_benchmarks_run_on_the_gpu(launched):
    data = mla.Data(mla.Case(2, 128, 16), CUDA)
    data.paged()
    for side in mla.SIDES:
        if not side.optional:
            assert str(side.build(data)().device) == "cuda:0"
    for layer in layers.LAYERS[:3]:
        inputs, rest = layer.draw(64, CUDA)
        for (side, _), build in layer.sides.items():
            if side in ("minids", "torch"):
                build(layer.formula)(*inputs, *rest)
    inputs, _ = attention.attention(*attention.SHAPES[0]).draw(64, CUDA)
    assert attention.minids(None)(*inputs).shape == attention.formula(*inputs).shape
    for wgrad in (False, True):  # torch's own checks of the scales' shapes and strides
        operands = bench_fp8.operands(256, 384, 640, wgrad, CUDA)
        for side in (bench_fp8.ours, bench_fp8.scaled_mm, bench_fp8.plain):
            assert side()(*operands).shape == (256, 384)
