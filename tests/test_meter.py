"""The traffic meter: counts worked out by hand, accesses out of bounds, and an interpreter that is left as it was."""

import pytest
import torch

from minids import accounting, triton_env
from minids.lab.traffic import Meter, call, meter

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(triton_env.mode() == "gpu", reason="kernels are compiled here; set TRITON_INTERPRET=1")


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


@triton.jit
def shift_kernel(x, out, shift, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at + shift)
    tl.store(out + at, value)


@triton.jit
def spill_kernel(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.full((BLOCK,), 7.0, tl.float32))


@triton.jit
def dot_kernel(a, b, c, M, K, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    m, k, n = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BN)
    mask = (m[:, None] < M) & (k[None, :] < K)
    left = tl.load(a + m[:, None] * K + k[None, :], mask=mask, other=0.0)
    right = tl.load(b + k[:, None] * BN + n[None, :], mask=k[:, None] < K, other=0.0)
    tl.store(c + m[:, None] * BN + n[None, :], tl.dot(left, right), mask=m[:, None] < M)


@triton.jit
def load_it(x, at):
    return tl.load(x + at)


@triton.jit
def rows_kernel(x, out, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(N):
        total += load_it(x, at) * row
    tl.store(out + at, total)


@triton.jit
def count_kernel(bins, x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    index = tl.load(x + at, mask=at < n, other=0)
    tl.atomic_add(bins + index, 1, mask=at < n)


@triton.jit
def swap_kernel(locks, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.int32)
    tl.atomic_cas(locks + tl.arange(0, BLOCK), zero, zero + 1)


@triton.jit
def block_kernel(x, out, M, N, BM: tl.constexpr, BN: tl.constexpr):
    source = tl.make_block_ptr(x, (M, N), (N, 1), (0, 0), (BM, BN), (1, 0))
    target = tl.make_block_ptr(out, (M, N), (N, 1), (0, 0), (BM, BN), (1, 0))
    tl.store(target, tl.load(source, boundary_check=(0, 1)), boundary_check=(0, 1))


@triton.jit
def descriptor_kernel(source, out, M, N, BM: tl.constexpr, BN: tl.constexpr):
    target = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BM, BN])
    target.store([0, 0], source.load([0, 0]))


def add(x, y, block=256):
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), BLOCK=block)
    return out


@pytest.mark.parametrize(("size", "programs"), [(1000, 4), (1, 1), (257, 2), (256, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_add_counts_active_lanes_alone(size, programs, dtype):
    x, y = torch.ones(size, dtype=dtype), torch.ones(size, dtype=dtype)
    out, m = call(add, x, y)
    assert torch.equal(out, x + y)
    assert (m.loaded, m.stored) == (2 * size * dtype.itemsize, size * dtype.itemsize)
    assert (m.programs, m.launches, m.multiply_adds, len(m.out_of_bounds)) == (programs, 1, 0, 0)
    assert m.distinct_loaded == m.loaded


def test_a_tensor_passed_twice_is_distinct_once():
    x = torch.ones(1000)
    _, m = call(add, x, x)
    assert (m.loaded, m.distinct_loaded) == (8000, 4000)


def test_dot_and_two_dimensional_loads():
    M, K, N = 13, 19, 16
    a, b, c = torch.randn(M, K), torch.randn(K, N), torch.full((M, N), torch.nan)
    with meter() as m:
        dot_kernel[(1,)](a, b, c, M, K, BM=16, BK=32, BN=N)
    torch.testing.assert_close(c, a @ b)
    assert (m.loaded, m.stored) == (4 * (M * K + K * N), 4 * M * N)
    assert (m.multiply_adds, m.flops) == (16 * 32 * 16, 2 * 16 * 32 * 16)
    assert m.out_of_bounds == []


def test_re_reads_show():
    x, out = torch.ones(64), torch.empty(64)
    with meter() as m:
        rows_kernel[(1,)](x, out, 5, BLOCK=64)
    assert (m.loaded, m.distinct_loaded, m.stored) == (5 * 256, 256, 256)
    assert "1,280 (256 distinct)" in str(m)


def test_atomics_read_and_write():
    bins, x = torch.zeros(4, dtype=torch.int32), torch.tensor([0, 1, 1, 3, 3, 3, 0], dtype=torch.int32)
    with meter() as m:
        count_kernel[(1,)](bins, x, 7, BLOCK=8)
    assert bins.tolist() == [2, 2, 0, 3]
    assert (m.loaded, m.stored, m.distinct_loaded) == (28 + 28, 28, 28 + 12)
    with meter() as m:
        swap_kernel[(1,)](bins, BLOCK=4)
    assert (m.loaded, m.stored, bins.tolist()) == (16, 16, [2, 2, 1, 3])


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_and_descriptors():
    x = torch.randn(5, 12)
    with meter() as m:
        block_kernel[(1,)](x, out := torch.zeros(5, 12), 5, 12, BM=8, BN=16)
    assert torch.equal(out, x) and (m.loaded, m.stored, m.out_of_bounds) == (240, 240, [])
    source = triton.tools.tensor_descriptor.TensorDescriptor.from_tensor(x, [8, 16])
    with meter() as m:
        descriptor_kernel[(1,)](source, out := torch.zeros(5, 12), 5, 12, BM=8, BN=16)
    assert torch.equal(out, x) and (m.loaded, m.stored, m.out_of_bounds) == (240, 240, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_read_out_of_bounds_gives_nan_and_its_line(dtype):
    storage = torch.zeros(200).to(dtype)
    x, out = storage[:100], torch.zeros(64, dtype=dtype)
    with meter() as m:
        shift_kernel[(1,)](x, out, 60, BLOCK=64)
    assert out.float().isnan().tolist() == [False] * 40 + [True] * 24
    (found,) = m.out_of_bounds
    assert (found.kind, found.kernel, found.argument, found.offset, found.elements) == (
        "load",
        "shift_kernel",
        "x",
        100,
        100,
    )
    assert found.text == "value = tl.load(x + at + shift)" and found.lanes == 24
    assert "load out of bounds at element 100 of x, which has 100" in str(m)


def test_a_read_before_the_first_element_and_far_away():
    x, out = torch.zeros(64, dtype=torch.int64), torch.ones(64, dtype=torch.int64)
    for shift, lanes in ((-3, 3), (10**12, 64), (-(10**12), 64)):
        with meter() as m:
            shift_kernel[(1,)](x, out, shift, BLOCK=64)
        assert (m.out_of_bounds[0].lanes, m.loaded) == (lanes, 512)
        assert out.eq(0).all()
    assert m.out_of_bounds[0].argument in ("x", "out")


def test_a_write_out_of_bounds_is_dropped():
    storage = torch.zeros(64)
    with meter() as m:
        spill_kernel[(3,)](storage[:30], BLOCK=64)
    assert storage[:30].eq(7).all() and storage[30:].eq(0).all()
    (found,) = m.out_of_bounds
    assert (found.kind, found.offset, found.lanes, found.program) == ("store", 30, 3 * 34, (0, 0, 0))
    with meter() as m:
        swap_kernel[(1,)](locks := torch.zeros(3, dtype=torch.int32), BLOCK=4)
    assert (locks.tolist(), m.out_of_bounds[0].kind) == ([1, 1, 1], "atomic")
    with meter() as m:
        spill_kernel[(1,)](torch.zeros(0), BLOCK=64)
    assert m.out_of_bounds[0].lanes == 64


def test_a_line_in_a_device_function_is_named():
    with meter() as m:
        rows_kernel[(1,)](torch.ones(60), torch.empty(64), 2, BLOCK=64)
    assert [(found.text, found.lanes) for found in m.out_of_bounds] == [("return tl.load(x + at)", 8)]


def interpreter_state():
    from triton.runtime import interpreter

    executor = interpreter.GridExecutor
    return dict(vars(interpreter.interpreter_builder)).keys(), executor.__call__, executor._init_args_hst


def test_two_launches_nesting_and_an_exception():
    before = interpreter_state()
    x = torch.ones(1000)
    with meter() as outer:
        add(x, x)
        with meter() as inner, inner:
            add(x, x)
            with pytest.raises(ZeroDivisionError), meter() as broken:
                add(x, x)
                raise ZeroDivisionError
    assert [m.launches for m in (outer, inner, broken)] == [3, 2, 1]
    assert [m.loaded for m in (outer, inner, broken)] == [24000, 16000, 8000]
    add(x, x)
    with outer:
        add(x, x)
    assert (outer.launches, inner.launches) == (4, 2)
    assert interpreter_state() == before


def test_an_exception_in_a_kernel_leaves_nothing_behind():
    before = interpreter_state()
    with pytest.raises(triton.runtime.errors.InterpreterError), meter() as m:
        dot_kernel[(1,)](torch.ones(4, 4), torch.ones(4, 4), None, 4, 4, BM=4, BK=4, BN=4)
    assert m.launches == 1 and interpreter_state() == before


def test_rooflines_by_hand():
    m = Meter()
    m.loaded, m.stored, m.multiply_adds = 4_800_000_000, 4_800_000_000, 989_500_000_000
    assert m.roofline("H200") == pytest.approx(2e-3)
    assert m.roofline("A100") == pytest.approx(1979 / 312 * 1e-3)
    assert set(m.rooflines(torch.float8_e4m3fn)) == set(accounting.GPUS) - {"A100"}
    assert accounting.ridge("H200") == pytest.approx(206.1, abs=0.1)
    with pytest.raises(ValueError, match="no GPU 'H20'; the table has H100"):
        m.roofline("H20")
    with pytest.raises(ValueError, match=r"A100 does not multiply torch.float8_e4m3fn"):
        m.roofline("A100", torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("gpu", "fresh process with TRITON_INTERPRET=1"), ("absent", "the traffic meter needs Triton")],
)
def test_where_nothing_can_be_counted_it_says_so(monkeypatch, how, sentence):
    monkeypatch.setattr(triton_env, "mode", lambda: how)
    with pytest.raises(triton_env.TritonUnavailable, match=sentence), meter():
        pass
