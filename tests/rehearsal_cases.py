"""What rehearsal.py rehearses: each case does a part of what happens on a GPU, and says what it was."""

import contextlib
import importlib
import itertools
from functools import partial
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from minids import ModelConfig, Transformer, bench, fp8, generate, layers, loss_kernels
from minids.bench import gpu, harness, train_step
from minids.fp8 import quantize_kernels
from minids.mla import kernels as mla_kernels
from minids.moe import Experts, reference
from minids.moe import kernels as moe_kernels

BF16, PRECISIONS = torch.bfloat16, ("bf16", "fp8", "fp32")


@contextlib.contextmanager
def default(dtype):
    """What is made inside is of this dtype: fake tensors cannot be moved to another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def training(preset, batch, length, precision="bf16", **changes):
    """Steps of training: forward and backward of the model's loss."""
    model = Transformer(ModelConfig.preset(preset, **changes)).train()
    if precision == "fp8":
        fp8.convert(model)
    sizes = {"a step": (batch, length), "the next": (batch, length)}
    for what, size in (sizes | {"a ragged batch": (batch - 1, length - 1), "another": (batch - 1, length - 3)}).items():
        tokens = torch.zeros(size, dtype=torch.int64)
        with torch.autocast("cpu", BF16, enabled=precision != "fp32"):
            loss, _ = model.loss(tokens, tokens)
        loss.backward()
        model.zero_grad()
        yield what


def writing(preset, dtype, precision=None, **changes):
    """A prompt, and tokens after it, for one sequence and for many."""
    with default(dtype):
        model = Transformer(ModelConfig.preset(preset, **changes)).eval()
    if precision == "fp8":
        fp8.convert(model)
    for batch, prompt, new in ((1, 37, 2), (1, 37, 2), (1, 64, 20), (1, 1000, 2), (128, 50, 2)):
        generate(model, torch.zeros(batch, prompt, dtype=torch.int64), new)
        yield f"{batch} x {prompt} + {new}"


def decoding(dtype):
    """The decode kernel at the published width, with many splits and few."""
    for H, B, S in itertools.product((16, 32, 64, 128), (1, 128), (1, 1000, 4096, 32768)):
        q, latents = torch.empty(B, 1, H, 576, dtype=dtype), torch.empty(B, S + 9, 576, dtype=dtype)[:, :S]
        mla_kernels.decode(q, latents, torch.zeros(B, dtype=torch.int32), 0.1, 512)
        yield f"H {H}, batch {B}, context {S}"


def experts(dtype, E, D, width, A):
    """The routed experts, forward and backward, for a batch of training and for decoding."""
    with default(dtype):
        module = Experts(E, D, width)
    for M in (16384, 16384, 1, 7, 128, 999):
        x, gates = torch.empty(M, D, dtype=dtype, requires_grad=True), torch.empty(M, A, requires_grad=True)
        module(x, torch.zeros(M, A, dtype=torch.int64), gates).sum().backward()
        with torch.no_grad():
            module(x, torch.zeros(M, A, dtype=torch.int64), gates)
        yield f"{M} tokens"


def loss(dtype):
    """The loss over the vocabularies of all presets and an odd one."""
    for V in (1001, 2048, 8192, 32768, 102400, 129280, 163840):
        x, weight = (torch.empty(n, 2048, dtype=dtype, requires_grad=True) for n in (4096, V))
        layers.linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64)).backward()
        with torch.no_grad():
            loss_kernels.cross_entropy_(torch.empty(5, V, dtype=dtype), torch.zeros(5, dtype=torch.int32), False)
        yield f"{V} words"


def products(dtype):
    """Grouped products of rows that lie sorted, which no layer has."""
    for K, J in ((256, 512), (1408, 2048), (2048, 1408)):
        x, dy, ends = (
            torch.empty(6000, K, dtype=dtype),
            torch.empty(6000, J, dtype=dtype),
            torch.zeros(32, dtype=torch.int32),
        )
        moe_kernels.grouped_gemm(x, torch.empty(32, J, K, dtype=dtype), ends)
        moe_kernels.grouped_gemm_dw(x, dy, ends)
        yield f"{K} to {J}"


def quantisers(dtype):
    """FP8's quantisers, in their forms that no layer has too."""
    gate_up = torch.empty(6000, 2 * 1408, dtype=dtype)
    for power in (False, True):
        for gates in (None, torch.empty(6000)):
            quantize_kernels.silu_mul_quantize(gate_up, power, gates)
        codes = quantize_kernels.quantize_tiles(gate_up, power)
        quantize_kernels.requantize_transposed(*codes, power)
        blocks = quantize_kernels.quantize_blocks(torch.empty(4, 1408, 2048, dtype=dtype), power)
        quantize_kernels.dequantize_blocks(*blocks, dtype)
        yield f"powers of 2: {power}"


def suite(name):
    """A suite of minids.bench, in full size: every case, every side that runs on fake tensors."""
    module = importlib.import_module(bench.SUITES[name])

    def make(self, quick):
        self.cuda, self.where, self.name = False, torch.device("cpu"), "a GPU"
        self.clock, self.copy, self.matmul, self.published = lambda run: (run(), 1.0)[1], 1.0, 1.0, None

    nothing, build = (lambda *given: None), (lambda label, build, layer, *rest: build(layer.formula))
    changes = {"agrees": nothing, "relative_error": lambda *given: 0.0, "max_vio": lambda *given: 0.0, "checked": build}
    changes |= {"ROUNDS": 1, "settings": lambda self: {}, "__init__": make, "provenance": dict}
    changes |= {"grouped_gemm": nothing, "grouped_gemm_dw": nothing}
    suites = [importlib.import_module(bench.SUITES[suite]) for suite in bench.GPU_SUITES]
    with contextlib.ExitStack() as stack:
        for owner in (gpu, gpu.Device, harness, train_step, reference, *suites):
            for attribute in changes.keys() & vars(owner).keys() - (
                {"checked"} if owner.__name__.endswith("mla") else {*()}
            ):
                stack.enter_context(mock.patch.object(owner, attribute, changes[attribute]))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", lambda self, *where: self))
        stack.enter_context(mock.patch.object(FakeTensor, "bincount", lambda self, minlength: torch.zeros(minlength)))
        done = []
        outcome = module.run(save=lambda outcome: done.append(len(outcome["cases"])))
        skipped = outcome["skipped"] | {
            f"{c['case']}, {k}": v for c in outcome["cases"] for k, v in c.get("skipped", {}).items()
        }
        yield f"{len(done)} cases, skipped {skipped}"


STEPS = {"tiny": (16, 256), "small": (32, 1024), "base": (16, 2048)}  # sequences and their length
V3, LITE = {"num_hidden_layers": 4}, {"num_hidden_layers": 2}  # with the dense layers, and one of experts
DTYPES = {"bf16": BF16, "fp16": torch.float16, "fp32": torch.float32}
CASES = {
    f"train {name} {how}": partial(training, name, *size, how) for name, size in STEPS.items() for how in PRECISIONS
}
CASES |= {f"train tiny {how}, short": partial(training, "tiny", 16, 256, how, **LITE) for how in ("bf16", "fp8")}
CASES |= {"train tiny with MTP": partial(training, "tiny", 16, 256, num_nextn_predict_layers=1)}
CASES |= {f"train deepseek-v3 {how}": partial(training, "deepseek-v3", 2, 4096, how, **V3) for how in PRECISIONS}
CASES |= {
    f"train deepseek-v2-lite {how}": partial(training, "deepseek-v2-lite", 4, 2048, how, **LITE) for how in PRECISIONS
}
CASES |= {"write tiny fp32": partial(writing, "tiny", torch.float32, **LITE)}
CASES |= {"write tiny fp8": partial(writing, "tiny", torch.float32, "fp8", **LITE)}
CASES |= {f"write deepseek-v3 {how}": partial(writing, "deepseek-v3", DTYPES[how], **V3) for how in ("bf16", "fp16")}
CASES |= {f"decode {how}": partial(decoding, dtype) for how, dtype in DTYPES.items()}
CASES |= {f"experts V2-Lite {how}": partial(experts, dtype, 64, 2048, 1408, 6) for how, dtype in DTYPES.items()}
CASES |= {"experts V3 bf16": partial(experts, BF16, 256, 7168, 2048, 8)}
CASES |= {f"loss {how}": partial(loss, dtype) for how, dtype in DTYPES.items()}
CASES |= {f"products {how}": partial(products, dtype) for how, dtype in DTYPES.items()}
CASES |= {f"quantisers {how}": partial(quantisers, dtype) for how, dtype in DTYPES.items()}
CASES |= {f"bench {name}": partial(suite, name) for name in bench.GPU_SUITES}
