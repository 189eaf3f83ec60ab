"""Every kernel that is shipped compiles for the GPUs it is meant for, spills nothing and fits; no GPU is needed."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from minids import layer_kernels, triton_env
from minids.fp8 import kernels as kernels_of_fp8
from minids.fp8 import quantize_kernels as quantisers_of_fp8
from minids.lab import compiled
from minids.layers import use_kernel
from minids.mla import kernels
from minids.moe import dispatch_kernels
from minids.moe import kernels as moe_kernels

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def decode(arch, rows, dtype=torch.bfloat16, C=512, R=64):
    """The request for decode_kernel as kernels.decode launches it on `arch`."""
    types = {"q": f"*{NAMES[dtype]}", "latents": f"*{NAMES[dtype]}", "lengths": "*i32", "out": "*fp32", "lse": "*fp32"}
    types |= {"scale": "fp32", "rows": "i32", "heads": "i32", "S": "i32", "stride_b": "i32", "splits": "i32"}
    config = kernels.blocks(rows, dtype, arch)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    values = {"C": C, "R": R, "BLOCK_C": kernels.block(C), "BLOCK_R": kernels.block(R), "WIDE": False, **config}
    aligned = ("rows", "heads", "stride_b")
    return compiled.request(kernels.decode_kernel, types, values, arch, **options, aligned=aligned)


def merge(arch):
    """The request for merge_kernel."""
    types = {"part": "*fp32", "part_lse": "*fp32", "out": "*bf16", "lse": "*fp32", "rows": "i32", "splits": "i32"}
    return compiled.request(kernels.merge_kernel, types, {"C": 512, "BLOCK_C": 512, "BLOCK_S": 16}, arch)


def layer(name, arch, types, **values):
    """The request for a kernel of the layers on bf16: `types` of what is no bf16 pointer, `values` its constants."""
    kernel = getattr(layer_kernels, name)
    warps = values.pop("num_warps", 4)
    types = {n: types.get(n, "*bf16") for n in kernel.arg_names if n not in values}
    aligned = tuple(n for n in types if "stride" in n or n == "W")
    return compiled.request(kernel, types, values, arch, num_warps=warps, aligned=aligned)


def layers(arch):
    """The requests for the layers' kernels, RMSNorm 7168 wide."""
    whole = {"rows": "i32", "stride": "i32", "dy_stride": "i32", "eps": "fp32", "r": "*fp32", "dw": "*fp32"}
    sizes = layer_kernels.row_sizes(7168)
    yield layer("rms_norm_kernel", arch, whole, D=7168, **sizes)
    yield layer("rms_norm_backward_kernel", arch, whole, D=7168, **sizes)
    turn = {"cos": "*fp32", "sin": "*fp32", **dict.fromkeys(("T", "H", "stride_b", "stride_t", "stride_h"), "i32")}
    yield layer("rope_kernel", arch, turn, SIGN=-1.0, PAIRS=32, BLOCK_P=32, BLOCK_T=4, BLOCK_H=16)
    strides = dict.fromkeys(("rows", "gate_stride", "up_stride", "dy_stride", "W"), "i32")
    for name in ("silu_mul_kernel", "silu_mul_backward_kernel"):
        yield layer(name, arch, strides, BLOCK_M=4, BLOCK_W=512)


DECODE = [(arch, rows, torch.bfloat16) for arch in (80, 90, 100) for rows in (16, 32, 128)]
DECODE += [(arch, rows, torch.bfloat16) for arch in (86, 89, 120) for rows in (16, 128)]
DECODE += [(90, 128, torch.float16), (90, 128, torch.float32)]
ARCHS = (80, 90, 100)  # of kernels that have the same sizes everywhere, and need little shared memory


@pytest.fixture(scope="module")
def found():
    """{what: CompiledFacts} of all that is shipped, from one process."""
    wanted = {case: decode(*case) for case in DECODE}
    wanted |= {("merge", arch): merge(arch) for arch in ARCHS}
    wanted |= {(one["name"], arch): one for arch in ARCHS for one in layers(arch)}
    found = dict(zip(wanted, compiled.facts_of_all(wanted.values()), strict=True))
    for what, one in found.items():
        print(what, one)
    return found


@pytest.mark.parametrize("case", DECODE)
def test_decode_fits_and_spills_nothing(found, case):
    arch, rows, dtype = case
    one = found[case]
    beside_the_loop = 12 if (arch, rows) == (100, 128) else 0  # three numbers that are needed after it
    assert one.spills <= beside_the_loop and one.fits, str(one)
    if dtype == torch.float32:
        return
    if arch == 90:  # the warpgroups share each product: none is computed twice
        config = kernels.blocks(rows, dtype, arch)
        shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", one.ptx)
        computed = one.num_warps // 4 * sum(int(m) * int(n) * int(k) for m, n, k in shapes)
        assert computed == config["BLOCK_H"] * config["BLOCK_N"] * (2 * 512 + 64), str(one)
    else:
        assert getattr(one, "tcgen05" if arch == 100 and rows > 32 else "mma") >= 68, str(one)


def test_the_other_kernels_fit_and_spill_nothing(found):
    others = [one for what, one in found.items() if what not in DECODE]
    assert len(others) == 6 * len(ARCHS)
    assert not [str(one) for one in others if one.spills or not one.fits]


# MoE -------------------------------------------------------------------------------------------------------------

INDICES = {**dict.fromkeys(("chosen", "order", "token", "place", "x_token", "dy_token"), "*i64")}
INDICES |= {**dict.fromkeys(("ends", "counts", "sums"), "*i32"), "gates": "*fp32", "parts": "*fp32"}
INDICES |= dict.fromkeys(("M", "N", "A", "tiles", "stride_e", "stride_j", "stride_k"), "i32")


def of_moe(kernel, arch, dtype, values, **options):
    """The request for a kernel of MoE: its arguments have the types of INDICES, the others point to `dtype`."""
    types = {n: INDICES.get(n, f"*{NAMES[dtype]}") for n in kernel.arg_names if n not in values}
    return compiled.request(kernel, types, values, arch, **options, aligned=[n for n in types if "stride" in n])


def experts(arch, rows, dtype):
    """(what, request) of the experts' products for `rows` an expert, in the widths of DeepSeek-V2-Lite."""
    D, F, E = 2048, 1408, 64
    for what, kernel, kind, width, values in (
        ("up", moe_kernels.up_kernel, "up", F, {"D": D, "F": F, "E": E, "KEEP": True}),
        ("down", moe_kernels.product_kernel, "product", D, {"K": F, "J": D, "E": E, "stride_k": 1}),
        ("dx", moe_kernels.product_kernel, "product", D, {"K": 2 * F, "J": D, "E": E, "stride_j": 1}),
        ("back", moe_kernels.down_backward_kernel, "back", F, {"D": D, "F": F, "E": E}),
        ("dw up", moe_kernels.dw_kernel, "dw", D, {"K": D, "J": 2 * F, "dy_token": None}),
        ("dw down", moe_kernels.dw_kernel, "dw", F, {"K": F, "J": D, "x_token": None}),
    )[: 6 if rows > 64 else 4]:  # for few rows dw_kernel is compiled as for many
        sizes = moe_kernels.blocks(kind, rows, width, dtype, arch)
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        yield what, of_moe(kernel, arch, dtype, {**values, **sizes, "WIDE": False}, **options)


def dispatch(arch):
    """(what, request) of the kernels around the products."""
    wide = {"D": 2048, "A": 6, "BLOCK_M": 2, "BLOCK_D": 1024}
    for name, values in (("count", {"E": 64, "TILE": 128}), ("place", {"E": 64, "TILE": 128}), ("combine", wide)):
        yield name, of_moe(getattr(dispatch_kernels, f"{name}_kernel"), arch, torch.bfloat16, values)


EXPERTS = [(arch, 1536, torch.bfloat16) for arch in (80, 89, 90, 100, 120)]
EXPERTS += [(90, 8, torch.bfloat16), (90, 40, torch.bfloat16), (89, 40, torch.bfloat16)]
EXPERTS += [(90, 1536, torch.float16), (90, 1536, torch.float32)]


@pytest.fixture(scope="module")
def found_in_moe():
    """{(case, what): CompiledFacts} of MoE's kernels, from one process."""
    wanted = {(case, what): one for case in EXPERTS for what, one in experts(*case)}
    wanted |= {(arch, what): one for arch in (80, 89, 90, 100) for what, one in dispatch(arch)}
    found = dict(zip(wanted, compiled.facts_of_all(wanted.values()), strict=True))
    for (_, what), one in found.items():
        print(what, one)
    return found


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_fit_and_spill_nothing(found_in_moe, case):
    arch, rows, dtype = case
    kind = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma") if rows >= 16 else "mma"  # below, tiles have 16 rows
    found = {what: one for (of, what), one in found_in_moe.items() if of == case}
    assert len(found) == (6 if rows > 64 else 4)
    for what, one in found.items():
        assert one.spills == 0 and one.fits, f"{what}: {one}"
        assert dtype == torch.float32 or getattr(one, kind) >= 4, f"{what}: {one}"


def test_dispatch_fits_and_spills_nothing(found_in_moe):
    found = [one for (case, _), one in found_in_moe.items() if case not in EXPERTS]
    assert len(found) == 12 and not [str(one) for one in found if one.spills or not one.fits]


# FP8 -------------------------------------------------------------------------------------------------------------

FP8, OPTIONAL = "*fp8e4nv", ("x_scale", "gates", "ends", "out", "out_t", "scale_t")


def of_fp8(kernel, arch, options, values, **types):
    """The request for a kernel of FP8: pointers are fp32 scales and sizes i32 where `types` says nothing else."""
    sizes = {"M", "N", "K", "stride", "width", "x_row", "x_tile", "w_expert", "w_row", "w_tile"}
    values = {**dict.fromkeys(name for name in OPTIONAL if name in kernel.arg_names and name not in types), **values}
    values |= {"TILE": 128} | ({"BITS": arch < 90} if "BITS" in kernel.arg_names else {"WIDE": False})
    types = {n: types.get(n, "i32" if n in sizes else "*fp32") for n in kernel.arg_names if n not in values}
    return compiled.request(
        kernel, types, values, arch, **options, aligned=sizes & {*types} - {"M", "x_tile", "w_tile"}
    )


def products(arch):
    """(what, request) of FP8's products: few and many rows, of a Linear and of 64 experts, ragged sums too."""
    for rows in (4096, 64)[: 1 if arch in (89, 120) else 2]:  # there both are compiled alike
        for experts in ("none", "rows", "sum"):
            for blocks in {"none": (True, False), "rows": (True,), "sum": (False,)}[experts]:
                if rows == 64 and not blocks:
                    continue  # as for many rows
                for even in (True, False)[: 1 + (arch == 90)]:
                    values = kernels_of_fp8.config(rows, arch, blocks)
                    options = {name: values.pop(name) for name in ("num_warps", "num_stages")}
                    E = 1 if experts == "none" else 64
                    values |= {"E": E, "BLOCK_E": E, "EXPERTS": experts, "BLOCKS": blocks, "EVEN": even, "x_row": 1}
                    types = {"x": FP8, "x_scale": "*fp32", "w": FP8, "y": "*fp32" if not blocks else "*bf16"}
                    types |= {} if E == 1 else {"ends": "*i32"}
                    what = f"{rows} rows, experts {experts}, {'blocks' if blocks else 'tiles'}, even {even}"
                    values |= {"w_tile" if blocks else "w_row": 1}
                    yield what, of_fp8(kernels_of_fp8.matmul_kernel, arch, options, values, **types)


def quantisers(arch):
    """(what, request) of FP8's quantisers as they are launched, all of them of bf16."""
    rows, columns = {"out": FP8, "scale": "*fp32"}, {"out_t": FP8, "scale_t": "*fp32"}
    for power in (False, True)[: 1 + (arch == 90)]:
        for what, types in (
            ("rows", {"x": "*bf16", **rows}),
            ("both", {"x": "*bf16", **rows, **columns}),
            ("both of experts", {"x": "*bf16", "ends": "*i32", **rows, **columns}),
            ("transposed", {"x": FP8, "x_scale": "*fp32", **columns}),
            ("SwiGLU", {"x": "*bf16", "up": "*bf16", "gates": "*fp32", **rows}),
        ):
            E, square = 64 if "ends" in types else 1, "out_t" in types
            values = {"E": E, "BLOCK_E": E, "BLOCK": 128 if square else 32, "POWER": power}
            values |= {} if "up" in types else {"up": None}
            values |= {} if "out" in types else {"scale": None}
            options = {"num_warps": quantisers_of_fp8.WARPS if square else 4}
            yield f"{what}, {power}", of_fp8(quantisers_of_fp8.tiles_kernel, arch, options, values, **types)
        block = {"w": "*bf16", **rows, **columns}
        options, values = {"num_warps": quantisers_of_fp8.WARPS}, {"POWER": power}
        yield f"blocks, {power}", of_fp8(quantisers_of_fp8.blocks_kernel, arch, options, values, **block)
    back = {"w": FP8, "out": "*bf16"}
    yield "back", of_fp8(quantisers_of_fp8.dequantize_kernel, arch, {}, {}, **back)


@pytest.fixture(scope="module")
def found_in_fp8():
    """{(arch, what): CompiledFacts} of FP8's kernels, from one process; DoesNotCompile for sm_80."""
    wanted = {(arch, what): one for arch in (89, 90, 100) for of in (products, quantisers) for what, one in of(arch)}
    wanted |= {(120, what): one for what, one in products(120)}
    wanted |= {(80, "rows"): next(quantisers(80))[1], (80, "product"): next(products(80))[1]}
    found = dict(zip(wanted, compiled.facts_of_all(wanted.values()), strict=True))
    for (_, what), one in found.items():
        print(what, one)
    return found


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_fp8_fits_and_spills_nothing(found_in_fp8, arch):
    found = {what: one for (of, what), one in found_in_fp8.items() if of == arch}
    assert len(found) == {89: 11, 90: 25, 100: 13, 120: 4}[arch]
    kind, count = {90: ("wgmma", 4), 100: ("tcgen05", 4)}.get(arch, ("mma", 64))
    for what, one in found.items():
        assert one.spills == 0 and one.fits, f"{what}: {one}"
        assert one.kernel != "matmul_kernel" or getattr(one, kind) >= count, f"{what}: {one}"


def test_fp8_divides_and_rounds_as_ieee_says(found_in_fp8):
    """Bit equality with the reference needs div.rn, or powers of 2; the approximate division is in SwiGLU's sigmoid.

    And one rounding from fp32 to E4M3: for sm_89 Triton would go by fp16, so there it is done by bits.
    """
    for (arch, what), one in found_in_fp8.items():
        if arch != 80 and one.kernel in ("tiles_kernel", "blocks_kernel"):
            assert ("div.rn.f32" in one.ptx) == ("False" in what) and ".ftz" not in one.ptx, what
            assert ("cvt.rn.satfinite.e4m3x2.f32" in one.ptx) == (arch >= 90) and "e4m3x2.f16x2" not in one.ptx, what
            assert ("div.full" in one.ptx or "div.approx" in one.ptx) == ("SwiGLU" in what), what


def test_no_fp8_before_sm_89(found_in_fp8):
    for what in ("rows", "product"):
        found = found_in_fp8[80, what]
        assert isinstance(found, compiled.DoesNotCompile) and "fp8e4nv not supported" in str(found)


def test_a_gpu_before_sm_80_counts_as_none(monkeypatch):
    """A T4: "auto" takes torch, and a kernel that is asked for says why it cannot be compiled there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_env, "compiles", triton_env.compiles.__wrapped__)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delitem(sys.modules, "triton")  # it would tell how it was imported here
    x = SimpleNamespace(is_cuda=True, dtype=torch.float16)
    for arch, taken in ((75, False), (80, True), (120, True)):
        monkeypatch.setattr(triton_env, "gpu", lambda where, arch=arch: (arch, 40))
        assert use_kernel("auto", x, "RoPE") == taken and triton_env.mode() == ("gpu" if taken else "absent")
    monkeypatch.setattr(triton_env, "gpu", lambda where: (75, 40))
    with pytest.raises(triton_env.TritonUnavailable, match="this GPU is sm_75 and kernels are compiled for sm_80"):
        use_kernel("triton", x, "RoPE")


# The module itself -----------------------------------------------------------------------------------------------


@triton.jit
def twice(x):
    return x * 2


@triton.jit
def twice_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, twice(tl.load(x + at, mask=at < n)), mask=at < n)


@triton.jit
def product_kernel(a, b, out, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at = i * BLOCK + j
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


TYPES = {"x": "*fp32", "out": "*fp32", "n": "i32"}


def test_a_kernel_with_its_helper():
    one = compiled.facts(twice_kernel, TYPES, {"BLOCK": 128}, aligned=("n",))
    assert (one.kernel, one.arch, one.num_warps, one.spills, one.shared) == ("twice_kernel", 90, 4, 0, 0)
    assert 4 <= one.registers <= 64 and (one.wgmma, one.mma, one.tcgen05) == (0, 0, 0)
    assert ".target sm_90a" in one.ptx and "no tensor cores" in str(one)


def test_the_same_request_twice_gives_the_same_facts_twice():
    wanted = compiled.request(twice_kernel, TYPES, {"BLOCK": 256})
    one, other = compiled.facts_of_all([wanted, wanted])
    assert one == other and one.registers >= 4


def test_spills_and_what_does_not_fit_show():
    def product(dtype, size, arch, warps):
        types = {"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32"}
        return compiled.request(product_kernel, types, {"BLOCK": size}, arch, num_warps=warps)

    large, unknown = compiled.facts_of_all([product("fp16", 256, 90, 4), product("fp8e4nv", 64, 80, 4)])
    assert large.spills > 0 and large.wgmma > 0 and not large.fits and "256.0 of 227 KiB shared" in str(large)
    assert isinstance(unknown, compiled.DoesNotCompile) and "fp8e4nv not supported" in str(unknown)


def test_wrong_signatures_are_said():
    with pytest.raises(ValueError, match="no argument n; twice_kernel takes x, out, n, BLOCK"):
        compiled.facts(twice_kernel, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 128})
    with pytest.raises(ValueError, match="unknown argument m"):
        compiled.facts(twice_kernel, {**TYPES, "m": "i32"}, {"BLOCK": 128})
    with pytest.raises(ValueError, match="arch is 70; give one of 80"):
        compiled.facts(twice_kernel, TYPES, {"BLOCK": 128}, arch=70)
    with pytest.raises(compiled.DoesNotCompile, match="arange"):
        compiled.facts(twice_kernel, TYPES, {"BLOCK": 100})
