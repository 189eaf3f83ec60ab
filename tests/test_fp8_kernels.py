"""FP8's Triton kernels against exact arithmetic and float64: interpreted where there is no GPU, compiled on one."""

import fp8_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_mode import DEVICE, DTYPES, MARKS, interpreted, on_a_gpu

from minids import triton_env
from minids.numerics import TOLERANCE, relative_error, seed_everything

if triton_env.mode() == "gpu" and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip(f"{torch.cuda.get_device_name()} does not multiply FP8 (sm_89 does)", allow_module_level=True)

import triton
import triton.language as tl

from minids.fp8 import kernels, reference
from minids.fp8 import quantize_kernels as quantisers
from minids.lab.traffic import call
from minids.layers import silu_mul

pytestmark = MARKS
E4M3, NAN = torch.float8_e4m3fn, float("nan")
EXACT = 1e-5 if DEVICE == "cpu" else 1e-3  # Hopper's tensor cores add 128 products with about 14 bits
POWER = pytest.mark.parametrize("power_of_2", [False, True])
ENDS = [[3], [0], [0, 70, 70, 260, 300], [128, 256, 300], [300, 300, 300], [1, 130, 131, 258, 259, 300], [0, 0, 300]]


def with_dtypes(*shapes):
    """Each of the shapes with one of the dtypes; any go together below (of_any_sizes)."""
    return [(shape, DTYPES[i % 3]) for i, shape in enumerate(shapes)]


def run(function, *args, **kwargs):
    """The results on the CPU; in the interpreter nothing may be out of bounds."""
    if DEVICE == "cpu":
        result, met = call(function, *args, **kwargs)
        assert met.out_of_bounds == [], met
        return result
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    kwargs = {name: a.to(DEVICE) if isinstance(a, torch.Tensor) else a for name, a in kwargs.items()}
    result = function(*moved, **kwargs)
    return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()


def bits(x):
    """A tensor's bytes as integers, so that NaN equals itself and -0 is not 0."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(got, want):
    """Every tensor of one has the bits of the other's."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b)), f"{int((bits(a) != bits(b)).sum())} of {a.numel()} differ"


# Rounding --------------------------------------------------------------------------------------------------------


@triton.jit
def cast_kernel(x, out, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, quantisers.to_e4m3(tl.load(x + at, mask=at < n, other=0.0), BITS), mask=at < n)


def cast(x, by_bits):
    out = x.new_empty(x.shape, dtype=E4M3)
    block = 65536 if DEVICE == "cpu" else 1024  # few programs to interpret; what is compiled fits into registers
    cast_kernel[(triton.cdiv(len(x), block),)](x, out, len(x), BITS=by_bits, BLOCK=block)
    return out


@pytest.mark.filterwarnings("ignore:invalid value encountered in add")  # numpy adds to a NaN that signals
@pytest.mark.parametrize("by_bits", {True, quantisers.by_bits(torch.device(DEVICE))})
def test_the_cast_rounds_as_exact_arithmetic_and_as_torch(by_bits):
    """A million patterns to 448 and its rounding error, either sign; ties and their neighbours; NaN."""
    x = oracle.from_bits(torch.arange(0, 0x43E00002, 2039))
    x = torch.cat([x, -x, oracle.ties().flatten()[: 8 * 128], torch.tensor([448.00003, -448.00003, NAN])])
    x = torch.cat([x, oracle.from_bits(torch.tensor([-1, 0x7F800001]))])  # NaN of other bits
    got = run(cast, x, by_bits)
    finite = x.isfinite()
    same([got[finite]], [x[finite].to(E4M3)])
    assert bits(got[~finite]).tolist() == [0x7F] * 3
    want = [oracle.code_of(oracle.Fraction(v), str(v)[0] == "-") for v in x[finite][::211].tolist()]
    assert bits(got[finite][::211]).tolist() == want


def test_where_the_compilers_own_cast_rounds_twice(monkeypatch):
    monkeypatch.setattr(triton_env, "compiles", lambda: True)
    for arch, by_bits in ((89, True), (90, False), (100, False)):
        monkeypatch.setattr(triton_env, "gpu", lambda where, arch=arch: (arch, 100))
        assert quantisers.by_bits(torch.device("cuda")) == by_bits
    x = torch.tensor([1.0625 + 2.0**-20])  # between 1 and 1.125, nearer to the latter; in fp16 in the middle
    assert x.half().to(E4M3).float().item() == 1 and run(cast, x, True).float().item() == 1.125


@interpreted
def test_the_interpreters_own_cast_still_is_wrong():
    """If this fails, to_e4m3 and decode need not round by themselves any more."""
    with pytest.raises(AssertionError):
        same([cast(torch.tensor([127.75]), False)], [torch.tensor([127.75]).to(E4M3)])
    assert cast(torch.tensor([NAN]), False).float().item() == 384


def test_every_code_is_decoded():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    got = run(quantisers.dequantize_blocks, codes.view(E4M3), torch.ones(1, 1), torch.float32)
    want = reference.decode_e4m3(codes)
    assert torch.equal(got.isnan(), want.isnan())
    same([got.nan_to_num(0)], [want.nan_to_num(0)])


# Quantisers ------------------------------------------------------------------------------------------------------


@POWER
@pytest.mark.parametrize("name", oracle.patterns())
def test_tiles_are_exact_arithmetics(name, power_of_2):
    """Along rows and, of the same numbers transposed, along columns; blocks of few rows."""
    x = oracle.patterns()[name]
    want = oracle.quantize_rows(x, power_of_2)
    want = want[0].view(E4M3), want[1]
    same(run(quantisers.quantize_tiles, x, power_of_2), want)
    same(run(quantisers.quantize_tiles, x.T, power_of_2, both=True)[2:], want)
    scale, codes = oracle.quantize(x[:8].flatten().tolist(), power_of_2)
    codes, scale = torch.tensor(codes).byte().view(E4M3).view(-1, 128), torch.tensor([[scale]])
    got = run(quantisers.quantize_blocks, x[:8], power_of_2, transposed=True)
    same(got, (codes, scale, codes.T, scale))


@POWER
@pytest.mark.parametrize(("shape", "dtype"), with_dtypes((1, 1), (3, 127), (129, 128), (40, 300), (257, 24), (1, 513)))
def test_tiles_are_the_references(shape, dtype, power_of_2):
    x = (torch.randn(shape) * 2.0 ** torch.randint(-12, 12, shape)).to(dtype)
    rows, columns = reference.quantize_tiles(x, power_of_2), reference.quantize_tiles(x.T, power_of_2)
    same(run(quantisers.quantize_tiles, x, power_of_2), rows)
    got = run(quantisers.quantize_tiles, x, power_of_2, both=True)
    same(got, (*rows, *columns))
    assert all(codes.stride(1) == 1 and codes.stride(0) % 16 == 0 for codes in got[::2])  # for wide accesses
    assert all(scale.stride(0) == 1 for scale in got[1::2])
    again = reference.quantize_tiles(reference.dequantize_tiles(*rows).T, power_of_2)
    same(run(quantisers.requantize_transposed, *rows, power_of_2), again)
    same(run(quantisers.requantize_transposed, *got[:2], power_of_2), again)  # scales in other strides


@POWER
@pytest.mark.parametrize(("shape", "dtype"), with_dtypes((1, 1), (130, 24), (2, 128, 257), (3, 5, 130), (1, 300, 129)))
def test_blocks_are_the_references(shape, dtype, power_of_2):
    w = torch.randn(shape).to(dtype)
    want = reference.quantize_blocks(w, power_of_2)
    same(run(quantisers.quantize_blocks, w, power_of_2), want)
    got = run(quantisers.quantize_blocks, w, power_of_2, transposed=True)
    same(got, (*want, *(t.mT for t in want)))
    assert all(t.is_contiguous() for t in got)
    whole = reference.dequantize_blocks(*want)
    for out_dtype in DTYPES:  # in the interpreter bf16 is cut
        back = run(quantisers.dequantize_blocks, *want, out_dtype)
        assert back.dtype == out_dtype and relative_error(back, whole) < TOLERANCE[out_dtype] / 3
        if out_dtype != torch.bfloat16 or DEVICE == "cuda":
            same([back], [whole.to(out_dtype)])


@given(st.integers(1, 280), st.integers(1, 280), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_quantisers_of_any_sizes(M, K, dtype, power_of_2):
    seed_everything(M)
    test_tiles_are_the_references((M, K), dtype, power_of_2)
    test_blocks_are_the_references((M, K), dtype, power_of_2)


def test_a_slice_a_transpose_and_nothing():
    wide = torch.full((50, 210), NAN)
    wide[:, 3:203] = torch.randn(50, 200)
    x = wide[:, 3:203]
    same(run(quantisers.quantize_tiles, x, both=True)[:2], reference.quantize_tiles(x))
    same(run(quantisers.quantize_tiles, x.T), reference.quantize_tiles(x.T))
    same(run(quantisers.quantize_blocks, x.T), reference.quantize_blocks(x.T))
    for shape in ((0, 130), (5, 0)):
        x = torch.zeros(shape)
        same(run(quantisers.quantize_tiles, x), reference.quantize_tiles(x))
        assert [t.shape[0] for t in run(quantisers.quantize_tiles, x, both=True)[2:]] == [shape[1]] * 2
        same(run(quantisers.quantize_blocks, x), reference.quantize_blocks(x))


@POWER
@pytest.mark.parametrize(("shape", "dtype"), with_dtypes((33, 130), (1, 1), (70, 300)))
def test_swiglu_is_quantised_as_it_comes(shape, dtype, power_of_2):
    """Sigmoid differs in the last places, so a scale may by as much, and a number at a tie by one code."""
    M, F = shape
    gate_up, gates = torch.randn(M, 2 * F).to(dtype), torch.rand(M)
    for g in (None, gates):
        h = silu_mul(*gate_up.float().chunk(2, 1), impl="torch") * (1 if g is None else g[:, None])
        codes, scale = run(quantisers.silu_mul_quantize, gate_up, power_of_2, g)
        want, want_scale = reference.quantize_tiles(h, power_of_2)
        assert ((scale - want_scale).abs() <= 1e-5 * want_scale).all()
        off = (bits(codes).int() - bits(want).int()).abs()
        assert off.max() <= 1 and off.count_nonzero() <= 2 + off.numel() / 1000
    x = torch.zeros(3, 2 * F)
    x[1, 0] = NAN
    got = reference.dequantize_tiles(*run(quantisers.silu_mul_quantize, x))
    assert got[1, :128].isnan().all() and not got[::2].any()


# Experts' tokens -------------------------------------------------------------------------------------------------


def places(ends):
    """[(first row, end, first padded column)] of each expert, by the rule of kernels.py's docstring."""
    begins = [0, *ends[:-1]]
    return [(begin, end, 128 * (begin // 128 + e)) for e, (begin, end) in enumerate(zip(begins, ends, strict=True))]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([64, 128]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_there_is_room_for_every_expert(counts, block):
    ends = torch.tensor(counts).cumsum(0).tolist()
    starts = [begin // block + e for e, begin in enumerate([0, *ends[:-1]])]
    filled = [start + -(-n // block) for start, n in zip(starts, counts, strict=True)]
    assert all(end <= start for end, start in zip(filled, [*starts[1:], ends[-1] // block + len(ends)], strict=True))


@triton.jit
def slots_kernel(ends, out, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    expert, first, last = kernels.expert_rows(ends, tl.program_id(0), E, BLOCK_E, BLOCK)
    for i in tl.static_range(3):
        tl.store(out + 3 * tl.program_id(0) + i, expert if i == 0 else (first if i == 1 else last))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ends", ENDS)
def test_every_row_is_in_one_slot(ends, dtype):
    def slots(ends):
        out = ends.new_zeros(N // 64 + len(ends), 3)
        size = triton.next_power_of_2(len(ends))
        slots_kernel[(len(out),)](ends, out, E=len(ends), BLOCK_E=size, BLOCK=64)
        return out

    N, seen = ends[-1] + 70, []  # 70 rows are nobody's
    for expert, first, last in run(slots, torch.tensor(ends, dtype=dtype)).tolist():
        seen += [(expert, row) for row in range(first, min(first + 64, last))]
    assert seen == [(e, row) for e, (begin, end, _) in enumerate(places(ends)) for row in range(begin, end)]


@POWER
@pytest.mark.parametrize("ends", ENDS)
def test_tiles_of_tokens_begin_anew_at_each_expert(ends, power_of_2):
    N, K = ends[-1] + 9, 140 if len(ends) < 4 else 30
    x, ends_ = torch.randn(N, K), torch.tensor(ends, dtype=torch.int32)
    x_fp8, x_scale, xt_fp8, xt_scale = run(quantisers.quantize_tiles, x, power_of_2, both=True, ends=ends_)
    rows = reference.quantize_tiles(x[: ends[-1]], power_of_2)
    same([x_fp8[: ends[-1]], x_scale[: ends[-1]]], rows)
    width = (N // 128 + len(ends)) * 128
    assert xt_fp8.shape == (K, width) and xt_scale.shape == (K, width // 128)
    again = run(quantisers.requantize_transposed, x_fp8, x_scale, power_of_2, ends_)
    empty = torch.ones(width, dtype=torch.bool)
    for begin, end, at in places(ends):
        at = slice(at, at + end - begin)
        tiles = slice(at.start // 128, -(-at.stop // 128))
        empty[at] = False
        same([xt_fp8[:, at], xt_scale[:, tiles]], reference.quantize_tiles(x[begin:end].T, power_of_2))
        back = reference.dequantize_tiles(rows[0][begin:end], rows[1][begin:end])
        same([again[0][:, at], again[1][:, tiles]], reference.quantize_tiles(back.T, power_of_2))
    assert not bits(xt_fp8[:, empty]).any() and not bits(again[0][:, empty]).any()
    assert not xt_scale.isnan().any() and not again[1].isnan().any()


# Products --------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (5, 3, 127), (64, 128, 128), (65, 129, 129), (130, 7, 300), (3, 260, 512), (200, 130, 144)]


@POWER
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape, power_of_2):
    M, N, K = shape
    x, w = torch.randn(M, K) * 2.0 ** torch.randint(-6, 6, (M, 1)), torch.randn(N, K)
    w[:, K // 2 :] *= 30  # one scale for all of K would show
    x_fp8 = run(quantisers.quantize_tiles, x, power_of_2)
    for w_fp8 in (reference.quantize_blocks(w, power_of_2), reference.quantize_tiles(w, power_of_2)):
        want = oracle.product(*x_fp8, *w_fp8)
        for dtype in DTYPES:
            y = run(kernels.matmul_blockscaled, *x_fp8, *w_fp8, dtype)
            assert y.shape == (M, N) and y.dtype == dtype
            assert relative_error(y, want) < (EXACT if dtype == torch.float32 else TOLERANCE[dtype] / 3)
    assert run(kernels.matmul_blockscaled, *x_fp8, *w_fp8).dtype == torch.bfloat16


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 300), st.booleans(), st.booleans())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_products_of_any_sizes(M, N, K, blocks, power_of_2):
    seed_everything(M)
    x_fp8 = reference.quantize_tiles(torch.randn(M, K), power_of_2)
    w_fp8 = (reference.quantize_blocks if blocks else reference.quantize_tiles)(torch.randn(N, K), power_of_2)
    y = run(kernels.matmul_blockscaled, *x_fp8, *w_fp8, torch.float32)
    assert relative_error(y, oracle.product(*x_fp8, *w_fp8)) < 1e-3


@pytest.mark.parametrize("shape", [(33, 70, 200), (128, 129, 130)])
def test_the_three_products_of_a_linear(shape):
    M, N, K = shape
    x, w, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    x_fp8, dy_fp8 = run(quantisers.quantize_tiles, x), run(quantisers.quantize_tiles, dy, both=True)
    w_fp8 = run(quantisers.quantize_blocks, w, transposed=True)
    xt = run(quantisers.requantize_transposed, *x_fp8)
    multiply = kernels.matmul_blockscaled
    for got, want in (
        (run(multiply, *x_fp8, *w_fp8[:2], torch.float32), reference.fprop(*x_fp8, *w_fp8[:2])),
        (run(multiply, *dy_fp8[:2], *w_fp8[2:], torch.float32), reference.dgrad(*dy_fp8[:2], *w_fp8[:2])),
        (run(multiply, *dy_fp8[2:], *xt, torch.float32), reference.wgrad(dy, *x_fp8)),
    ):
        assert relative_error(got, want) < EXACT


def test_operands_that_are_not_contiguous():
    w_fp8, w_scale = reference.quantize_blocks(torch.randn(200, 150))
    x_fp8, x_scale = reference.quantize_tiles(torch.randn(40, 400))
    x_fp8, x_scale = x_fp8[:, :256][::2, 128:], x_scale[::2, 1:2]
    got = run(kernels.matmul_blockscaled, x_fp8, x_scale, w_fp8.T[:, :128], w_scale.T[:, :1], torch.float32)
    assert relative_error(got, oracle.product(x_fp8, x_scale, w_fp8.T[:, :128], w_scale.T[:, :1])) < EXACT


def test_nan_shows_in_its_row_and_its_column_alone():
    x, w = torch.randn(70, 300), torch.randn(260, 300)
    x[3, 299], w[130, 5] = float("inf"), NAN
    y = run(kernels.matmul_blockscaled, *reference.quantize_tiles(x), *reference.quantize_blocks(w))
    want = torch.zeros(70, 260, dtype=torch.bool)
    want[3] = want[:, 128:256] = True  # the block of the NaN has all rows from 128 to 255
    assert torch.equal(y.isnan(), want)
    x_fp8, x_scale = reference.quantize_tiles(torch.randn(5, 20))
    bits(x_fp8)[2, 7] = 0x7F  # NaN in a tile with a scale, which no quantiser gives
    y = run(kernels.matmul_blockscaled, x_fp8, x_scale, *reference.quantize_blocks(torch.randn(9, 20)))
    assert y[2].isnan().all() and y.isnan().sum() == 9


def test_products_of_nothing():
    for M, N, K in ((0, 5, 130), (5, 0, 130), (5, 7, 0)):
        x_fp8, w_fp8 = reference.quantize_tiles(torch.zeros(M, K)), reference.quantize_tiles(torch.zeros(N, K))
        y = run(kernels.matmul_blockscaled, *x_fp8, *w_fp8, torch.float32)
        assert y.shape == (M, N) and not y.any()


@pytest.mark.parametrize(("ends", "dtype"), list(zip(ENDS, [torch.int32, torch.int64] * 4, strict=False)))
def test_products_of_experts(ends, dtype):
    E, N = len(ends), ends[-1] + 9
    J, K = (130, 144) if E < 4 else (20, 48)
    x, dy, w = torch.randn(N, K), torch.randn(N, J), torch.randn(E, J, K)
    ends_ = torch.tensor(ends, dtype=dtype)
    x_fp8 = run(quantisers.quantize_tiles, x, both=True, ends=ends_)
    dyt = run(quantisers.quantize_tiles, dy, both=True, ends=ends_)[2:]
    w_fp8 = run(quantisers.quantize_blocks, w)
    y = run(kernels.grouped_matmul, *x_fp8[:2], *w_fp8, ends_, torch.float32)
    dw = run(kernels.grouped_wgrad, *dyt, *x_fp8[2:], ends_)
    assert y.shape == (N, J) and dw.shape == (E, J, K) and dw.dtype == torch.float32
    for e, (begin, end, _) in enumerate(places(ends)):
        if begin == end:
            assert not dw[e].any()  # and NaN would be any
            continue
        mine = [t[begin:end] for t in x_fp8[:2]]
        assert relative_error(y[begin:end], oracle.product(*mine, *(t[e] for t in w_fp8))) < EXACT
        both = reference.quantize_tiles(dy[begin:end].T), reference.quantize_tiles(x[begin:end].T)
        assert relative_error(dw[e], oracle.product(*both[0], *both[1])) < EXACT
    assert y[ends[-1] :].isnan().all()  # nobody's


def test_many_experts_with_one_row_and_one_with_most():
    ends = torch.tensor([1, 2, 3, *[3] * 30, 180, 181])
    x_fp8, w_fp8 = reference.quantize_tiles(torch.randn(181, 20)), reference.quantize_blocks(torch.randn(35, 7, 20))
    y = run(kernels.grouped_matmul, *x_fp8, *w_fp8, ends)
    assert y.dtype == torch.bfloat16
    for begin, end, e in ((0, 1, 0), (2, 3, 2), (3, 180, 33), (180, 181, 34)):
        want = oracle.product(*(t[begin:end] for t in x_fp8), *(t[e] for t in w_fp8))
        assert relative_error(y[begin:end], want) < TOLERANCE[torch.bfloat16] / 3


# What they move --------------------------------------------------------------------------------------------------


@interpreted
def test_quantisers_move_their_inputs_and_outputs_once():
    x, w = torch.randn(304, 288).bfloat16(), torch.randn(2, 140, 260)
    for function, args, options in (
        (quantisers.quantize_tiles, (x,), {}),
        (quantisers.quantize_tiles, (x,), {"both": True}),
        (quantisers.requantize_transposed, reference.quantize_tiles(x), {}),
        (quantisers.silu_mul_quantize, (x, True, torch.rand(304)), {}),
        (quantisers.quantize_blocks, (w,), {"transposed": True}),
    ):
        out, met = call(function, *args, **options)
        read = sum(t.nbytes for t in args if isinstance(t, torch.Tensor))
        read += 304 * 4 if function is quantisers.silu_mul_quantize else 0  # the gates, for each of two tiles
        assert (met.loaded, met.launches, met.out_of_bounds) == (read, 1, []), function
        assert met.stored == sum(t.nbytes for t in out), function


@interpreted
def test_a_product_multiplies_what_it_must():
    x_fp8, w_fp8 = reference.quantize_tiles(torch.randn(130, 300)), reference.quantize_blocks(torch.randn(129, 300))
    y, met = call(kernels.matmul_blockscaled, *x_fp8, *w_fp8, torch.float32)
    assert (met.launches, met.programs, met.multiply_adds) == (1, 4, 4 * 3 * 128**3)
    scales = x_fp8[1].nbytes + w_fp8[1].nbytes
    assert met.stored == y.nbytes and met.distinct_loaded == (130 + 129) * 384 + scales  # filled up: 300 is no 16 n
    x_fp8, w_fp8 = reference.quantize_tiles(torch.randn(9, 304)), reference.quantize_tiles(torch.randn(9, 304))
    _, met = call(kernels.matmul_blockscaled, *x_fp8, *w_fp8)
    assert met.distinct_loaded == 2 * (9 * 304 + x_fp8[1].nbytes)  # as it is


# What they refuse ------------------------------------------------------------------------------------------------

X8, W8 = torch.zeros(5, 300).to(E4M3), torch.zeros(200, 300).to(E4M3)
GOOD = {"x_fp8": X8, "x_scale": torch.ones(5, 3), "w_fp8": W8, "w_scale": torch.ones(2, 3)}
BAD = [
    ({"x_scale": torch.ones(5, 2)}, r"x_scale \[5, 2\] torch.float32; the scales must be \[5, 3\] float32"),
    ({"x_scale": torch.ones(3, 5)}, r"the scales must be \[5, 3\]"),
    ({"x_scale": torch.ones(5, 3).double()}, r"x_scale \[5, 3\] torch.float64; the scales must be"),
    ({"w_scale": torch.ones(3, 2)}, r"the scales must be \[200, 3\] or \[2, 3\] float32"),
    ({"w_scale": torch.ones(1, 3)}, r"w_scale \[1, 3\]"),
    ({"w_scale": torch.ones(())}, r"w_scale \[\]"),
    ({"x_fp8": torch.zeros(5, 300)}, r"x_fp8 is \[5, 300\] torch.float32 .* give 2 dimensions of float8_e4m3fn"),
    ({"w_fp8": W8[None]}, r"w_fp8 is \[1, 200, 300\]"),
    ({"x_fp8": X8[:, :256], "x_scale": torch.ones(5, 2)}, "both must end with the size of the sum"),
    ({"out_dtype": torch.float64}, "out_dtype is torch.float64; give float32, float16 or bfloat16"),
    ({"w_scale": torch.ones(2, 3, device="meta")}, "tensors on .*meta; put them on one device"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_what_a_product_does_not_take(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        kernels.matmul_blockscaled(**{**GOOD, **change})


def test_what_the_products_of_experts_do_not_take():
    w8, w_scale, ends = torch.zeros(4, 200, 300).to(E4M3), torch.ones(4, 2, 3), torch.tensor([1, 2, 3, 5])
    given = {"x_fp8": X8, "x_scale": torch.ones(5, 3), "w_fp8": w8, "w_scale": w_scale, "ends": ends}
    for change, sentence in (
        ({"ends": ends[:3]}, r"ends are \[3\] torch.int64; give \[4\] int32 or int64"),
        ({"ends": ends.float()}, r"torch.float32; give \[4\]"),
        ({"w_scale": torch.ones(4, 200, 3)}, r"the scales must be \[4, 2, 3\]"),
        ({"w_fp8": W8}, "give 3 dimensions"),
        ({"w_fp8": w8[:, :, :256], "w_scale": w_scale[..., :2]}, "both must end with the size of the sum"),
    ):
        with pytest.raises(ValueError, match=sentence):
            kernels.grouped_matmul(**{**given, **change})
    a, scale = torch.zeros(7, 384).to(E4M3), torch.ones(7, 3)
    with pytest.raises(ValueError, match=r"384 padded tokens and 4 experts; give \(N // 128 \+ E\) \* 128"):
        kernels.grouped_wgrad(a, scale, a, scale, ends)
    with pytest.raises(ValueError, match="300 padded tokens"):
        kernels.grouped_wgrad(a[:, :300], scale, a[:, :300], scale, ends[:2])


def test_what_the_quantisers_do_not_take():
    for function, args, sentence in (
        (quantisers.quantize_tiles, (torch.zeros(5),), r"x is \[5\] torch.float32; give 2 dimensions"),
        (quantisers.quantize_tiles, (torch.zeros(5, 5).double(),), "torch.float64; give 2 dimensions of float32"),
        (quantisers.quantize_tiles, (X8,), "float8_e4m3fn; give 2 dimensions of float32, float16 or bfloat16"),
        (quantisers.quantize_tiles, (torch.zeros(5, 5), False, False, torch.tensor([5])), "give both=True"),
        (quantisers.quantize_tiles, (torch.zeros(5, 5), False, True, torch.ones(1)), "ends are"),
        (quantisers.quantize_blocks, (torch.zeros(5),), "give 2 or 3 dimensions"),
        (quantisers.requantize_transposed, (X8, torch.ones(5, 2)), r"the scales must be \[5, 3\]"),
        (quantisers.requantize_transposed, (torch.zeros(5, 300), torch.ones(5, 3)), "dimensions of float8_e4m3fn"),
        (quantisers.dequantize_blocks, (W8, torch.ones(200, 3)), r"the scales must be \[2, 3\]"),
        (quantisers.dequantize_blocks, (W8, torch.ones(2, 3), torch.float64), "w is .* torch.float64; give"),
        (quantisers.silu_mul_quantize, (torch.zeros(5, 5),), "its last size is 2F"),
        (quantisers.silu_mul_quantize, (torch.zeros(5, 6), False, torch.ones(4)), r"gates not \[5\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            function(*args)


def test_a_card_without_fp8_says_what_to_do(monkeypatch):
    monkeypatch.setattr(triton_env, "require", lambda what: "gpu")
    monkeypatch.setattr(triton_env, "gpu", lambda device: (80, 108))
    sentence = r"needs a GPU that multiplies FP8, sm_89 or newer .* this one is sm_80: .* emulates FP8"
    for function, args in (
        (kernels.matmul_blockscaled, GOOD.values()),
        (quantisers.quantize_tiles, (torch.zeros(5, 5),)),
        (quantisers.quantize_blocks, (torch.zeros(5, 5),)),
        (quantisers.silu_mul_quantize, (torch.zeros(5, 6),)),
    ):
        with pytest.raises(triton_env.TritonUnavailable, match=sentence):
            function(*args)


# On a GPU alone --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_a_gpu
def test_published_sizes_on_a_gpu():
    """Where the tensor cores add 128 products with about 14 bits; a layer of DeepSeek-V3, 4 experts of V2-Lite."""
    x, w = torch.randn(4096, 7168, device=DEVICE), torch.randn(2112, 7168, device=DEVICE)
    x_fp8, w_fp8 = quantisers.quantize_tiles(x, both=True), quantisers.quantize_blocks(w)
    want = reference.dequantize_tiles(*x_fp8[:2]).double() @ reference.dequantize_blocks(*w_fp8).double().T
    assert relative_error(kernels.matmul_blockscaled(*x_fp8[:2], *w_fp8, torch.float32), want) < 1e-3
    dy = quantisers.quantize_tiles(torch.randn(4096, 2112, device=DEVICE), both=True)
    want = reference.dequantize_tiles(*dy[2:]).double() @ reference.dequantize_tiles(*x_fp8[2:]).double().T
    assert relative_error(kernels.matmul_blockscaled(*dy[2:], *x_fp8[2:], torch.float32), want) < 1e-3
    ends, w = torch.tensor([1000, 1000, 1129, 4096], device=DEVICE), torch.randn(4, 2816, 7168, device=DEVICE)
    y = kernels.grouped_matmul(*x_fp8[:2], *quantisers.quantize_blocks(w), ends)
    begin = 0
    for e, end in enumerate(ends.tolist()):
        if begin < end:
            assert relative_error(y[begin:end], x[begin:end].double() @ w[e].double().T) < 0.12
        begin = end
