"""The kernels of MoE against the loop in float64: interpreted where there is no GPU, compiled where there is one."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_mode import DEVICE, DTYPES, MARKS, interpreted, on_a_gpu

from minids import ModelConfig
from minids.lab.traffic import meter
from minids.moe import Experts, MoE, dispatch_kernels, kernels, reference
from minids.numerics import TOLERANCE, relative_error, seed_everything

pytestmark = MARKS
IMPLS = ["triton"] if DEVICE == "cuda" else ["triton", "torch"]  # grouped_mm on a GPU is made for bf16


# Inputs ----------------------------------------------------------------------------------------------------------


def choose(routing, M, E, A):
    """Indices [M,A]: "even", "skewed" to the low experts, "one" (all on the second, A = 1), "gap" (not the ends)."""
    weights = {"even": [1.0] * E, "skewed": [0.5**e for e in range(E)], "gap": [0.0, *[1.0] * (E - 2), 0.0]}
    if routing == "one":
        return torch.full((M, A), 1)
    return torch.tensor(weights[routing]).expand(M, E).multinomial(A) if M else torch.zeros(M, A, dtype=torch.int64)


def leaves(M, D, E, F, A, dtype):
    """x, gates (fp32, as the router gives them), gate_up_proj and down_proj, which keep the sizes of what they get."""
    x, gates = torch.randn(M, D).to(dtype), torch.rand(M, A) * 2 - 0.5
    weights = torch.randn(E, 2 * F, D) / D**0.5, torch.randn(E, D, F) / F**0.5
    return [t.to(DEVICE).requires_grad_() for t in (x, gates, *(w.to(dtype) for w in weights))]


def layer_of(gate_up_proj, down_proj, recompute=False):
    experts = Experts(1, 1, 1, recompute)
    experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(w.detach()) for w in (gate_up_proj, down_proj))
    return experts


def run(indices, inputs, weight, impl="triton", recompute=False):
    """Output and gradients of x, gates, gate_up_proj, down_proj; the loss is the sum of the output times `weight`."""
    x, gates = (t.detach().requires_grad_() for t in inputs[:2])
    experts = layer_of(*inputs[2:], recompute)
    out = experts(x, indices, gates, impl)
    return out, *torch.autograd.grad(out, [x, gates, *experts.parameters()], weight.to(out.dtype))


def in_bounds(function, *args, **kwargs):
    """`function` of these, with no access out of bounds where they can be seen."""
    if DEVICE == "cuda":
        return function(*args, **kwargs)
    with meter() as m:
        result = function(*args, **kwargs)
    assert m.out_of_bounds == [], "\n".join(map(str, m.out_of_bounds))
    return result


def agree(indices, inputs, **options):
    """`run` by the kernels against the loop in float64."""
    weight = torch.randn_like(inputs[0], dtype=torch.float32)
    got = in_bounds(run, indices, inputs, weight, **options)
    want = run(indices.cpu(), [t.detach().double().cpu() for t in inputs], weight.to(got[0].dtype).cpu(), "loop")
    for what, a, b, like in zip(("out", "x", "gates", "gate_up", "down"), got, want, (inputs[0], *inputs), strict=True):
        assert a.dtype == like.dtype, what
        assert a.numel() == 0 or relative_error(a, b) < TOLERANCE[inputs[0].dtype], what
    return got


CASES = [  # M, D, E, F, A, routing
    (0, 16, 3, 8, 2, "even"),
    (1, 13, 4, 5, 1, "gap"),
    (1, 130, 9, 24, 9, "even"),
    (7, 24, 6, 20, 3, "even"),
    (128, 40, 5, 33, 2, "skewed"),
    (128, 33, 4, 70, 1, "one"),
    (100, 64, 6, 64, 4, "gap"),
    (1030, 16, 3, 9, 2, "skewed"),
    (1100, 17, 2, 8, 1, "one"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_experts(case, dtype):
    *sizes, routing = case
    M, _, E, _, A = sizes
    agree(choose(routing, M, E, A).to(DEVICE), leaves(*sizes, dtype))


@given(st.data())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_experts_of_any_sizes(data):
    M, D, E, F = (data.draw(st.integers(1, most), label=n) for n, most in zip("MDEF", (150, 90, 9, 70), strict=True))
    A, dtype = data.draw(st.integers(1, E), label="A"), data.draw(st.sampled_from(DTYPES))
    seed_everything(M)
    agree(choose(data.draw(st.sampled_from(["even", "skewed"])), M, E, A).to(DEVICE), leaves(M, D, E, F, A, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_tiles(dtype):
    """Widths that are whole tiles of 256 and 128, and rows for tiles of 128: what is compiled without comparisons."""
    agree(choose("even", 140, 2, 1).to(DEVICE), leaves(140, 256, 2, 128, 1, dtype))


@pytest.mark.parametrize("recompute", [False, True])
def test_two_runs_give_the_same_bits(recompute):
    indices, inputs = choose("skewed", 150, 4, 2).to(DEVICE), leaves(150, 24, 4, 20, 2, torch.float16)
    weight = torch.randn(150, 24, device=DEVICE)
    first, second = (run(indices, inputs, weight, recompute=r) for r in (False, recompute))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_given_need_not_be_contiguous():
    x, gates, gate_up, down = leaves(40, 48, 4, 16, 2, torch.float32)
    inputs = x.detach()[:, ::2], gates.detach().T.contiguous().T, gate_up.detach()[:, :, 8:32], down.detach()[:, 24:]
    indices = choose("even", 40, 4, 2).to(DEVICE).T.contiguous().T
    assert not any(t.is_contiguous() for t in (*inputs, indices))
    agree(indices, inputs)
    out = layer_of(*inputs[2:])(inputs[0].requires_grad_(), indices, inputs[1], "triton")
    out.sum().backward()  # its gradient is one number with the strides 0


def test_only_gradients_that_are_wanted():
    indices, (x, gates, gate_up, down) = choose("even", 9, 3, 2).to(DEVICE), leaves(9, 16, 3, 8, 2, torch.float32)
    experts = layer_of(gate_up, down)
    experts.gate_up_proj.requires_grad_(False)
    experts(x.detach(), indices, gates.detach(), "triton").sum().backward()
    assert experts.gate_up_proj.grad is None and experts.down_proj.grad.abs().sum() > 0
    with torch.no_grad():
        assert not experts(x, indices, gates, "triton").requires_grad


def test_a_choice_of_no_expert_adds_nothing():
    indices, inputs = choose("even", 150, 4, 2).to(DEVICE), leaves(150, 16, 4, 8, 2, torch.float32)
    indices[3] = torch.tensor([-1, 4])
    indices[7, 0], indices[8, 1] = 2**32, -(2**40)
    indices[50:] = 9  # so many that tiles are left which no expert needs
    x, gates, gate_up, down = (t.detach() for t in inputs)

    def forward_and_back():
        order, token, place, ends = dispatch_kernels.dispatch_plan(indices, 4)
        act, pre = kernels.up(x, gate_up, gates, order, ends)
        out = dispatch_kernels.combine(kernels.grouped_gemm(act, down, ends), place)
        d_pre, act, d_gates = kernels.down_backward(x, down, gates, pre, order, ends)
        return out, d_gates, kernels.grouped_gemm_dw(x, d_pre, ends, token), place

    out, d_gates, dw, place = in_bounds(forward_and_back)
    want = reference.experts_loop(*(t.double().cpu() for t in (x, indices, gates, gate_up, down)))
    none = (indices < 0) | (indices > 3)
    assert relative_error(out, want) < TOLERANCE[torch.float32] and not out[3].any()
    assert torch.equal(place < 0, none) and not d_gates[none].any() and dw.isfinite().all()


def test_nan_stays_with_its_token_and_gates_of_zero_give_zero():
    indices, inputs = choose("even", 20, 4, 2).to(DEVICE), leaves(20, 16, 4, 8, 2, torch.bfloat16)
    x, gates = inputs[0].detach(), inputs[1].detach()
    gates[5], gates[6] = float("nan"), 0.0
    out = layer_of(*inputs[2:])(x, indices, gates, "triton")
    assert out[5].isnan().all() and not out[6].any() and out.isnan().sum() == 16
    empty = layer_of(*inputs[2:])(x, indices[:, :0], gates[:, :0], "triton")
    assert empty.shape == (20, 16) and not empty.any()


# The plan, and one kernel at a time ------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 512), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_plan_equals_the_sort(M, E, data):
    A, top = data.draw(st.integers(1, min(E, 9))), data.draw(st.integers(0, E - 1))
    seed_everything(M)
    indices = torch.randint(
        0, top + 1, (M, A), device=DEVICE, dtype=data.draw(st.sampled_from([torch.int64, torch.int32]))
    )
    plan = in_bounds(dispatch_kernels.dispatch_plan, indices, E)
    for name, got, want in zip(reference.Plan._fields, plan, reference.dispatch_plan(indices.long(), E), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[0, 5, 0, 61], [0, 0], [64, 64, 1], [200, 0, 3]])
def test_grouped_products(counts, dtype):
    ends, N = torch.tensor(counts).cumsum(0).int(), sum(counts)
    x, dy = torch.randn(N, 40).to(dtype), torch.randn(N, 24).to(dtype)
    weights = (torch.randn(len(counts), 40, 24) / 6).to(dtype).transpose(1, 2)  # a view: no copy of it is made
    x, dy, weights, ends = (t.to(DEVICE) for t in (x, dy, weights, ends))
    y, dw = in_bounds(lambda: (kernels.grouped_gemm(x, weights, ends), kernels.grouped_gemm_dw(x, dy, ends)))
    wide = [t.double().cpu() for t in (x, weights, dy)]
    if N:
        assert relative_error(y, reference.grouped_gemm(*wide[:2], ends.cpu())) < TOLERANCE[dtype]
    assert relative_error(dw, reference.grouped_gemm_dw(wide[0], wide[2], ends.cpu())) < TOLERANCE[dtype]


def test_slots_suffice_for_any_counts():
    for tile in (16, 64, 128):
        for counts in torch.randint(0, 3 * tile, (200, 7)).mul(torch.rand(200, 7) < 0.6).tolist():
            ends = torch.tensor(counts).cumsum(0).tolist()
            begins = [end - count for end, count in zip(ends, counts, strict=True)]
            slots = [end // tile - begin // tile + 1 for begin, end in zip(begins, ends, strict=True)]
            assert sum(slots) == ends[-1] // tile + 7
            assert all(tile * slot >= count for slot, count in zip(slots, counts, strict=True))


@interpreted
def test_products_read_and_multiply_no_more_than_their_tiles():
    M, D, E, F, A = 96, 128, 4, 64, 2
    x, gates, gate_up, down = (t.detach() for t in leaves(M, D, E, F, A, torch.half))
    indices = choose("even", M, E, A)
    order, _, place, ends = dispatch_kernels.dispatch_plan(indices, E)
    tiles = sum(-(-count // 64) for count in indices.flatten().bincount(minlength=E).tolist())  # 48 rows an expert: 64
    with meter() as m:
        act, pre = kernels.up(x, gate_up, gates, order, ends)
    assert m.multiply_adds == tiles * 64 * 2 * F * D and m.stored == act.nbytes + pre.nbytes
    used = tiles * 2 * F * D * 2 + M * A * D * 2 + M * A * (8 + 4)  # weights each tile, rows once, order and gates
    assert used <= m.loaded <= used + m.programs * (E + 2) * 4
    with meter() as m:
        kernels.up(x, gate_up, gates, order, ends, keep=False)
    assert m.stored == act.nbytes
    with meter() as m:
        dispatch_kernels.combine(y := kernels.grouped_gemm(act, down, ends), place)
    assert m.stored == y.nbytes + x.nbytes and m.launches == 2


# What a step keeps -----------------------------------------------------------------------------------------------


def kept(experts, *args):
    """(result, bytes that autograd keeps for backward), each memory once and without the parameters."""
    memory, own = {}, {p.untyped_storage().data_ptr() for p in experts.parameters()}

    def pack(tensor):
        memory[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = experts(*args)
    return result, sum(t.untyped_storage().nbytes() for at, t in memory.items() if at not in own)


def test_a_step_keeps_its_input_and_pre_activations_once():
    M, D, E, F, A = sizes = 120, 32, 4, 24, 3
    indices, inputs = choose("even", M, E, A).to(DEVICE), leaves(*sizes, torch.float32)
    x, gates, pre = M * D * 4, M * A * 4, M * A * 2 * F * 4
    plan = 3 * M * A * 8 + E * 4  # order, token and place in int64, ends
    found = {}
    for recompute, impl in itertools.product((False, True), IMPLS):
        experts = layer_of(*inputs[2:], recompute)
        out, found[impl, recompute] = kept(experts, inputs[0], indices, inputs[1], impl)
        out.sum().backward()
    assert found["triton", False] == x + gates + plan + pre
    assert found["triton", True] == x + gates + plan
    if "torch" in IMPLS:
        assert found["torch", False] > 2 * found["triton", False]
        assert found["torch", True] == x + gates + indices.nbytes


@pytest.mark.parametrize("impl", IMPLS)
def test_recomputing_changes_no_gradient(impl):
    indices, inputs = choose("skewed", 150, 4, 2).to(DEVICE), leaves(150, 16, 4, 24, 2, torch.float32)
    weight = torch.randn(150, 16, device=DEVICE)
    pair = [run(indices, inputs, weight, impl, recompute) for recompute in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_layer_in_float32_and_under_autocast():
    cfg = ModelConfig(hidden_size=32, moe_intermediate_size=24, n_routed_experts=6, num_experts_per_tok=2)
    moe, x = MoE(cfg).to(DEVICE).train(), torch.randn(2, 19, 32, device=DEVICE)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        results = []
        for impl in ("triton", "loop"):
            other = copy.deepcopy(moe)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                out = other(x, impl=impl)
            (out.float().square().sum() + other.balance_loss).backward()
            results.append([out, *(p.grad for p in other.parameters())])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and relative_error(a, b) < TOLERANCE[dtype]


# What is not taken -----------------------------------------------------------------------------------------------


def arguments(**changes):
    """Arguments of `up` for 2 experts, with `changes`."""
    given = {"x": torch.zeros(4, 16), "gate_up_proj": torch.zeros(2, 12, 16), "gates": torch.zeros(4, 1)}
    return {**given, "order": torch.arange(4), "ends": torch.tensor([2, 4], dtype=torch.int32), **changes}


BAD = [
    ({"x": torch.zeros(4, 15)}, r"x \[4, 15\].*give \[M,D\] and \[E,2F,D\]"),
    ({"x": torch.zeros(3, 16)}, r"x \[3, 16\].*N = M\*A rows"),
    ({"ends": torch.zeros(3, dtype=torch.int32)}, "as in the plan of N = M"),
    ({"gate_up_proj": torch.zeros(2, 11, 16)}, r"gate_up_proj \[2, 11, 16\]"),
    ({"gate_up_proj": torch.zeros(2, 12, 16).half()}, "torch.float16.*give all as one of fp32, fp16 and bf16"),
    ({"x": torch.zeros(4, 16).double(), "gate_up_proj": torch.zeros(2, 12, 16).double()}, "float64.*give all as one"),
    (
        {"gate_up_proj": torch.zeros(2, 12, 16, device="meta")},
        "on meta, and gates and plan on cpu; put all on one device",
    ),
    ({"ends": torch.zeros(2, dtype=torch.int32, device="meta")}, "plan on meta; put all on one device"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_what_the_kernels_do_not_take(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        kernels.up(**arguments(**change))


def test_what_the_other_kernels_do_not_take():
    ends = torch.tensor([2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"x \[4, 8\].*weights \[2, 6, 9\].*give \[N,K\] and \[E,J,K\]"):
        kernels.grouped_gemm(torch.zeros(4, 8), torch.zeros(2, 6, 9), ends)
    with pytest.raises(ValueError, match=r"x \[4, 8\].*dy \[5, 9\].*give \[N,K\] and \[N,J\]"):
        kernels.grouped_gemm_dw(torch.zeros(4, 8), torch.zeros(5, 9), ends)
    with pytest.raises(ValueError, match=r"pre \[4, 11\].*give \[M,D\], \[E,D,F\] and \[N,2F\]"):
        tensors = torch.zeros(4, 8), torch.zeros(2, 8, 6), torch.zeros(4, 1), torch.zeros(4, 11)
        kernels.down_backward(*tensors, torch.arange(4), ends)
    with pytest.raises(ValueError, match=r"indices are \[4\] torch.int64; give \[M,A\] int32 or int64"):
        dispatch_kernels.dispatch_plan(torch.arange(4), 2)
    with pytest.raises(ValueError, match="there are 0 experts; a plan is made for 1 to 4095"):
        dispatch_kernels.dispatch_plan(torch.zeros(4, 1, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"place \[4\] torch.int64; give \[N,D\] and \[M,A\] int64"):
        dispatch_kernels.combine(torch.zeros(4, 8), torch.arange(4))
    with pytest.raises(ValueError, match="y is on meta and place on cpu"):
        dispatch_kernels.combine(torch.zeros(4, 8, device="meta"), torch.zeros(4, 1, dtype=torch.int64))
    double, x = Experts(2, 8, 4).double().to(DEVICE), torch.zeros(1, 8, device=DEVICE).double()
    with pytest.raises(ValueError, match=r"float64.*give all as one of fp32, fp16 and bf16"):
        double(x, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), x[:, :1].float(), "triton")


# On a GPU alone --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ["even", "skewed"])
def test_published_widths_on_a_gpu(routing, dtype):
    M, D, E, F, A = 1500, 2048, 16, 1408, 6
    indices, inputs = choose(routing, M, E, A).to(DEVICE), leaves(M, D, E, F, A, dtype)
    weight = torch.randn(M, D, device=DEVICE)
    first, second = (run(indices, inputs, weight) for _ in range(2))
    want = run(indices, [t.detach().double() for t in inputs], weight.to(dtype), "loop")
    for a, again, b in zip(first, second, want, strict=True):
        assert torch.equal(a, again) and relative_error(a, b) < TOLERANCE[dtype]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_experts_by_kernels_never_wait_on_a_gpu(recompute):
    indices, inputs = choose("skewed", 300, 8, 3).to(DEVICE), leaves(300, 64, 8, 48, 3, torch.bfloat16)
    experts, calls, up = layer_of(*inputs[2:], recompute), [], kernels.up
    experts(*inputs[:1], indices, inputs[1]).sum().backward()  # what is compiled may wait
    torch.cuda.set_sync_debug_mode("error")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "up", lambda *args: calls.append(1) or up(*args))
        try:
            experts(*inputs[:1], indices, inputs[1]).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 1 + recompute
