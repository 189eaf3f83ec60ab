"""Linear + cross-entropy by its kernel: against float64, its bytes and memory; and a step that waits for no GPU."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_mode import DEVICE, DTYPES, interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from minids import ModelConfig, layers, loss_kernels, run
from minids.fp8 import layer as fp8_layer
from minids.functions import LinearCrossEntropy
from minids.lab import compiled
from minids.lab.traffic import call
from minids.mla import layer as mla_layer
from minids.moe import layer as moe_layer
from minids.numerics import TOLERANCE, relative_error, seed_everything

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # `make gpu` runs all of this file
NAN = float("nan")
SHAPES = [(1, 1, 1), (3, 5, 2), (7, 24, 33), (150, 8, 100), (5, 3, 1001), (4, 6, 8200), (3, 2, 33000)]  # M, D, V


def draw(M, D, V, dtype, ignored=True):
    """x, weight and targets, of which some do not count; the weight is large enough for peaked distributions."""
    x, weight = torch.randn(M, D, device=DEVICE).to(dtype), (2 * torch.randn(V, D, device=DEVICE)).to(dtype)
    targets = torch.randint(V, (M,), device=DEVICE)
    if ignored and M > 1:
        targets[::3] = -100
    return x, weight, targets


def formula(x, weight, targets):
    return F.cross_entropy(x @ weight.T, targets)


def results(function, x, weight, targets, factor=1.0):
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = function(x, weight, targets)
    return loss, *torch.autograd.grad(factor * loss, (x, weight))


def by_kernel(x, weight, targets):
    return layers.linear_cross_entropy(x, weight, targets, impl="triton")


# The kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "V"), [(5, 1), (6, 77), (4, 1024), (3, 8193), (2, 32769), (2, 163840)])
def test_a_row_becomes_its_loss_and_its_gradient(M, V, dtype, poison):
    logits = (3 * torch.randn(M, V, device=DEVICE)).to(dtype)
    targets = torch.randint(V, (M,), device=DEVICE)
    targets[1] = -100
    wide = logits.double().requires_grad_()
    want = F.cross_entropy(wide, targets, reduction="none")
    (gradient,) = torch.autograd.grad(want.sum(), wide)
    kept = logits.clone()
    without = loss_kernels.cross_entropy_(logits, targets, gradient=False)
    assert torch.equal(logits, kept)
    losses = loss_kernels.cross_entropy_(logits, targets)
    assert torch.equal(losses, without) and losses.dtype == torch.float32 and losses[1] == 0
    assert not logits[1].any() and relative_error(logits, gradient) < TOLERANCE[dtype]
    if V > 1:
        assert relative_error(losses, want) < TOLERANCE[torch.float32]


def test_both_ways_of_taking_a_row_agree(monkeypatch):
    logits, targets = torch.randn(4, 700, device=DEVICE), torch.tensor([0, 699, 350, -100], device=DEVICE)
    whole, pieces = logits.clone(), logits.clone()
    losses = loss_kernels.cross_entropy_(whole, targets)
    monkeypatch.setattr(loss_kernels, "WHOLE", 64)
    monkeypatch.setattr(loss_kernels, "PIECE", 128)
    assert relative_error(loss_kernels.cross_entropy_(pieces, targets), losses) < 1e-6
    assert relative_error(pieces, whole) < 1e-6


def test_rows_may_be_a_slice_and_nothing_beside_them_is_touched():
    wide = torch.full((5, 50), NAN, device=DEVICE)
    wide[:, 3:40] = torch.randn(5, 37)
    want = wide[:, 3:40].clone()
    targets = torch.arange(5, device=DEVICE, dtype=torch.int32)
    losses = loss_kernels.cross_entropy_(wide[:, 3:40], targets)
    assert torch.equal(losses, loss_kernels.cross_entropy_(want, targets)) and torch.equal(wide[:, 3:40], want)
    assert wide[:, :3].isnan().all() and wide[:, 40:].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of numpy, at infinity - infinity
def test_extreme_logits_nan_and_targets_outside_of_the_vocabulary():
    logits = torch.tensor([[3e4, -3e4, 0.0], [-60000.0, -60000.0, -60000.0], [NAN, 0.0, 0.0], [0.0, 0.0, 0.0]])
    targets = torch.tensor([1, 0, 1, 3])
    logits, targets = logits.to(DEVICE), targets.to(DEVICE)
    losses = loss_kernels.cross_entropy_(logits, targets)
    assert losses[0] == 6e4 and losses[1].item() == pytest.approx(1.0986123) and losses[2:].isnan().all()
    assert logits[0].tolist() == [1, -1, 0] and relative_error(logits[1].cpu(), torch.tensor([-2.0, 1, 1]) / 3) < 1e-6


@interpreted
@pytest.mark.parametrize(("V", "reads"), [(1000, 1), (8192, 1), (16385, 2), (40000, 2)])
def test_bytes_of_the_kernel(V, reads):
    logits, targets = torch.randn(3, V).half(), torch.tensor([0, V - 1, -100])
    (losses), m = call(loss_kernels.cross_entropy_, logits, targets)
    counted, row = 2, 2 * V
    assert m.loaded == counted * (reads * row + 2) + targets.nbytes  # 2: the target's logit
    assert m.stored == logits.nbytes + losses.nbytes and m.out_of_bounds == []
    _, m = call(loss_kernels.cross_entropy_, logits, targets, gradient=False)
    assert m.loaded == counted * (row + 2) + targets.nbytes and m.stored == losses.nbytes


# Linear + cross-entropy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(shape, dtype, poison):
    x, weight, targets = draw(*shape, dtype)
    got = results(by_kernel, x, weight, targets, factor=0.5)
    want = results(formula, x.cpu().double(), weight.cpu().double(), targets.cpu(), factor=0.5)
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype]
    for one, other in zip(got, want, strict=True):
        if shape[2] > 1:  # with one word there is nothing to lose
            assert relative_error(one, other.nan_to_num()) < TOLERANCE[dtype] * max(1, shape[2] / 10000)  # a long sum
        else:
            assert not one.any()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(2, 300), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_loss_of_any_sizes(M, D, V, dtype, ignored):
    seed_everything(M)
    x, weight, targets = draw(M, D, V, dtype, ignored)
    got, want = results(by_kernel, x, weight, targets), results(formula, x.double(), weight.double(), targets)
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other.nan_to_num()) < TOLERANCE[dtype]


def test_it_computes_what_torch_computes_under_autocast():
    x, weight, targets = draw(140, 16, 90, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, want = (
            results(lambda *of, impl=impl: layers.linear_cross_entropy(*of, impl=impl), x, weight, targets)
            for impl in ("triton", "torch")
        )
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype == torch.float32 and relative_error(one, other) < TOLERANCE[torch.bfloat16]


def test_a_second_backward_gives_the_same_and_what_is_frozen_gets_nothing():
    x, weight, targets = draw(9, 4, 30, torch.float32)
    x.requires_grad_()
    loss = by_kernel(x, weight, targets)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
    head = weight.clone().requires_grad_()
    assert torch.autograd.grad(by_kernel(x.detach(), head, targets), head)[0].any()
    with torch.no_grad():
        assert torch.equal(by_kernel(x, weight, targets), loss)


def test_nothing_to_learn_from_is_no_loss():
    x, weight, targets = draw(6, 4, 30, torch.float32)
    loss, dx, dw = results(by_kernel, x, weight, torch.full_like(targets, -100))
    assert loss == 0 and not dx.any() and not dw.any()
    assert by_kernel(x[:0], weight, targets[:0]) == 0


def test_on_a_cpu_auto_is_torch(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    calls, apply = [], LinearCrossEntropy.apply
    monkeypatch.setattr(LinearCrossEntropy, "apply", lambda *args: calls.append(1) or apply(*args))
    layers.linear_cross_entropy(*draw(5, 4, 30, torch.float32))
    by_kernel(*draw(5, 4, 30, torch.float32))
    assert len(calls) == 1


def test_what_the_loss_does_not_take():
    x, weight, targets = draw(4, 8, 16, torch.float32)
    with pytest.raises(ValueError, match=r"x is \[4, 8\], weight \[16, 7\] and targets \[4\]; give \[M,D\], \[V,D\]"):
        by_kernel(x, weight[:, :7], targets)
    with pytest.raises(ValueError, match=r"give \[M,D\], \[V,D\] and \[M\]"):
        by_kernel(x, weight, targets[:3])
    with pytest.raises(ValueError, match='takes fp32, fp16 and bf16: use impl="torch"'):
        by_kernel(x.double(), weight.double(), targets)
    with pytest.raises(ValueError, match="give targets as int32 or int64"):
        loss_kernels.cross_entropy_(x, targets.float())
    with pytest.raises(ValueError, match=r"logits are \[4\].*give \[M,V\] and \[M\]"):
        loss_kernels.cross_entropy_(x[:, 0], targets)
    with pytest.raises(ValueError, match="must lie side by side"):
        loss_kernels.cross_entropy_(weight.T, targets.repeat(2))


# Memory ----------------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """The most bytes that tensors of more than `rows` rows of such `widths` have held at once."""

    def __init__(self, rows, widths):
        super().__init__()
        self.rows, self.widths, self.held, self.most = rows, widths, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dim() == 2 and len(out) > self.rows and out.shape[1] in self.widths:
            self.held[id(out)] = weakref.ref(out), out.untyped_storage().data_ptr(), out.untyped_storage().nbytes()
        alive = {where: size for ref, where, size in self.held.values() if ref() is not None}
        self.most = max(self.most, sum(alive.values()))
        return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_logits_alive_at_once_are_a_tenth_of_all(dtype, monkeypatch):
    monkeypatch.setattr(loss_kernels, "FEWEST", 16)  # so few programs are interpreted
    M, D, V = 170, 8, 1001
    x, weight, targets = draw(M, D, V, dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with Alive(D, {V, 1008}) as alive:
        by_kernel(x, weight, targets).backward()
    whole = M * V * dtype.itemsize
    assert 0.05 * whole < alive.most <= 0.1 * whole
    with Alive(D, {V}) as alive:  # the measure sees what is whole
        F.cross_entropy(x @ weight.T, targets).backward()
    assert alive.most >= whole


def test_rows_of_a_chunk():
    def rows(M, V):
        buffer, count = loss_kernels.logits_buffer(M, V, torch.bfloat16, torch.device("meta"))
        assert buffer.shape == (count, V) and buffer.stride(0) % 16 == 0
        return count

    assert rows(16384, 32768) == 1536 and rows(2560, 129280) == 256 and rows(1300, 1001) == 128
    assert rows(10**6, 32768) == loss_kernels.MOST and rows(50, 77) == 50
    for M in range(1280, 20000, 999):
        for V in (1001, 8192, 163840):
            width = -(-V // 16) * 16
            assert rows(M, V) == 128 or rows(M, V) * width <= M * V / 10


# A step of training ----------------------------------------------------------------------------------------------

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")


class NoWaiting(TorchDispatchMode):
    """Raises where an operation's result, or its size, would have to come from a GPU before the host can go on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        indexed = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if indexed or any(name == word or name.startswith(word + "_") for word in WAITS):
            raise AssertionError(f"{function} waits for the GPU")
        return function(*args, **kwargs or {})


def a_run(precision, monkeypatch):
    """A run.Run of a small model, without folder and corpus."""
    small = {"num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64}
    preset = ModelConfig.preset
    monkeypatch.setattr(run.ModelConfig, "preset", lambda name, **changes: preset(name, **small, **changes))
    one = run.Run.__new__(run.Run)
    one.args = {"seed": 0, "preset": "tiny", "balance": "bias", "precision": precision, "device": DEVICE, "lr": 0.01}
    one.args |= {"batch_size": 2, "seq_len": 12, "mtp": int(precision != "fp8")}
    one.tokens, one.record = torch.randint(64, (500,)), {"bf16": precision == "bf16"}
    one.build()
    one.model.train()
    return one


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_step_as_on_a_gpu_waits_for_nothing(precision, monkeypatch):
    """The kernels, interpreted, in place of torch; what only a CPU checks is left out."""
    one, used = a_run(precision, monkeypatch), []
    batch = one.batch(0)  # which the host makes from tokens that it has

    def on_a_gpu(impl, x, what):
        used.append(what)
        return impl != "torch"

    for module in (layers, mla_layer, moe_layer, fp8_layer):
        monkeypatch.setattr(module, "use_kernel", on_a_gpu)
    monkeypatch.setattr("minids.model.check_vocabulary", lambda tokens, cfg: None)
    monkeypatch.setattr(moe_layer, "check", lambda *args: None)
    one.batch = lambda step: batch
    with NoWaiting():
        nats, vio, loads = one.train_step(9)
    assert nats.isfinite() and vio.isfinite() and loads.shape[1:] == (8,)
    assert {"RMSNorm", "RoPE", "SwiGLU", "the loss", {"fp32": "the experts", "fp8": "FP8"}[precision]} <= set(used)


def test_what_waits_is_noticed():
    x = torch.randn(5)
    for waits in (lambda: float(x.sum()), lambda: bool(x[0] > 0), x.nonzero, lambda: x[x > 0]):
        with NoWaiting(), pytest.raises(AssertionError, match="waits for the GPU"):
            waits()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_step_on_a_gpu_waits_for_nothing(precision, monkeypatch):
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply FP8")
    one = a_run(precision, monkeypatch)
    one.train_step(9)  # compiles, and fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        nats = one.train_step(9)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert nats.isfinite()


# Compiled --------------------------------------------------------------------------------------------------------

CASES = [(arch, V, torch.bfloat16, True) for arch in (80, 89, 90, 100) for V in (2048, 8192, 32768, 129280)]
CASES += [(90, V, torch.bfloat16, True) for V in (1000, 16001, 32001, 102400, 163840)]
CASES += [(90, V, dtype, g) for V in (8192, 16384, 32768, 163840) for dtype in DTYPES for g in (True, False)]


def test_it_compiles_spills_nothing_and_moves_16_bytes_at_once():
    names, wanted = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}, []
    for arch, V, dtype, gradient in CASES:
        sizes = loss_kernels.blocks(V)
        types = {"logits": f"*{names[dtype]}", "targets": "*i64", "losses": "*fp32", "stride": "i32"}
        options = {"num_warps": sizes.pop("num_warps"), "aligned": ("stride",)}
        values = {"V": V, "GRADIENT": gradient, **sizes}
        wanted.append(compiled.request(loss_kernels.cross_entropy_kernel, types, values, arch, **options))
    for case, one in zip(CASES, compiled.facts_of_all(wanted), strict=True):
        assert one.spills == 0 and one.fits, f"{case}: {one}"
        wide = case[1] % 8 == 0
        assert ("ld.global.v4.b32" in one.ptx) == wide and ("st.global.v4.b32" in one.ptx) == (wide and case[3]), case
