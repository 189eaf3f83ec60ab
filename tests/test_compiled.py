"""Every kernel that is shipped compiles for the GPUs it is meant for, spills nothing and fits; no GPU is needed."""

import pytest
import torch

from minids import layer_kernels
from minids.lab import compiled
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
    sizes, _ = layer_kernels.row_tiles(4096, 7168, torch.device("cpu"))
    yield layer("rms_norm_kernel", arch, whole, D=7168, **sizes)
    yield layer("rms_norm_backward_kernel", arch, whole, D=7168, **sizes)
    turn = {"cos": "*fp32", "sin": "*fp32", **dict.fromkeys(("T", "H", "stride_b", "stride_t", "stride_h"), "i32")}
    yield layer("rope_kernel", arch, turn, SIGN=-1.0, PAIRS=32, BLOCK_P=32, BLOCK_T=4, BLOCK_H=16)
    strides = dict.fromkeys(("rows", "gate_stride", "up_stride", "dy_stride", "W"), "i32")
    for name in ("silu_mul_kernel", "silu_mul_backward_kernel"):
        yield layer(name, arch, strides, BLOCK_M=1, BLOCK_W=2048)


DECODE = [(arch, rows, torch.bfloat16) for arch in (80, 90, 100) for rows in (16, 32, 128)]
DECODE += [(89, 16, torch.bfloat16), (89, 128, torch.bfloat16), (90, 128, torch.float16), (90, 128, torch.float32)]
ARCHS = (80, 90, 100)


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
    assert one.spills == 0 and one.fits, str(one)
    if dtype != torch.float32:
        kind = {90: "wgmma", 100: "tcgen05" if rows > 32 else "mma"}.get(arch, "mma")
        assert getattr(one, kind) >= 68, str(one)


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


EXPERTS = [(arch, 1536, torch.bfloat16) for arch in (80, 89, 90, 100)]
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
