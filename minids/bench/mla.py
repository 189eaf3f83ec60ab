"""mla: one step of decoding over the latent cache, beside attention over expanded keys and values, on a GPU.

One token for each sequence of a batch, one layer, bf16, 512 + 64 numbers a position as in DeepSeek-V2 and V3:

- minids: kernels.decode. torch: the same in two products and a softmax.
- FlashMLA and FlagGems, public kernels for the same, where their packages are installed.
- SDPA expanded: torch's attention over keys (192 wide) and values (128) that were made of the latents beforehand; the
  same function of the token, at H*320 cached numbers a position instead of 576. "padded": values as wide as keys.
- SDPA GQA: the baseline, 8 groups of 128: another model's attention, so it is shown and not in the ratio. "rows": the
  queries of a group are rows of one product.

Bringing queries to the latents, and their sum back (W_UK, W_UV), is not in the time: it does not grow with the context.
Before any clock every side's result is compared with the fp32 equations (reference.py) on a small case.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minids.bench import gpu, harness
from minids.mla import reference

BYTES = 2  # of a bf16 number
PAGE = 64  # positions in a page of the public kernels


@dataclass(frozen=True)
class Case:
    """B sequences of S positions, H heads, widths as in DeepSeek-V3; the baseline has G groups of `width`."""

    B: int
    S: int
    H: int
    C: int = 512
    R: int = 64
    P: int = 128
    V: int = 128
    G: int = 8
    width: int = 128

    @property
    def name(self):
        return f"H {self.H}, batch {self.B}, context {self.S}"

    @property
    def scale(self):
        return (self.P + self.R) ** -0.5


SHAPES = [(B, S, H) for S in (4096, 1024, 32768) for B in (128, 32, 8, 1) for H in (128, 16)]  # what matters most first
TINY = {"C": 32, "R": 16, "P": 16, "V": 16, "G": 2, "width": 16}
ROUNDS = 20


def latent_work(case):
    """Latents, queries and results once; each query meets C+R numbers of a key and C of a value."""
    numbers = case.B * case.S * (case.C + case.R) + case.B * case.H * (2 * case.C + case.R)
    return {"bytes": BYTES * numbers, "flops": 2 * case.B * case.H * case.S * (2 * case.C + case.R)}


def heads_work(case, cached, key, value):
    """The same of attention with `cached` heads of keys and values of these widths."""
    numbers = case.B * (cached * case.S + case.H) * (key + value)
    return {"bytes": BYTES * numbers, "flops": 2 * case.B * case.H * case.S * (key + value)}


class Data:
    """The random inputs of a case: queries, latents, and what is made of them when a side asks for it."""

    def __init__(self, case, where, dtype=torch.bfloat16):
        self.case, draw = case, partial(torch.randn, device=where, dtype=dtype)
        self.q_nope, self.q_rope = draw(case.B, 1, case.H, case.P), draw(case.B, 1, case.H, case.R)
        self.latents = draw(case.B, case.S, case.C + case.R)
        self.kv_b = draw(case.H, case.P + case.V, case.C) * case.C**-0.5
        self.q = torch.cat([reference.absorb_query(self.q_nope, self.kv_b), self.q_rope], -1).squeeze(1)
        self.lengths = torch.full((case.B,), case.S, dtype=torch.int32, device=where)
        self.draw = draw

    def expanded(self, wide=False):
        """Queries [B,H,1,P+R], keys [B,H,S,P+R] and values [B,H,S,V] (`wide`: P+R, zeros behind), for SDPA."""
        case, new = self.case, self.latents.new_zeros
        k = new(case.B, case.H, case.S, case.P + case.R)
        v = new(case.B, case.H, case.S, case.P + case.R if wide else case.V)
        for b, latents in enumerate(self.latents.split(1)):  # one at a time: nothing of the whole size beside them
            k_nope, value = reference.expand(latents[..., : case.C], self.kv_b, case.P)
            k[b, :, :, : case.P], v[b, :, :, : case.V] = k_nope[0].transpose(0, 1), value[0].transpose(0, 1)
            k[b, :, :, case.P :] = latents[0, :, case.C :]
        return torch.cat([self.q_nope, self.q_rope], -1).transpose(1, 2), k, v

    def paged(self):
        """The latents as pages [B*S/64,64,1,C+R] and the table of each sequence's pages [B,S/64]."""
        case = self.case
        pages = self.latents.view(-1, PAGE, 1, case.C + case.R)
        return pages, torch.arange(len(pages), dtype=torch.int32, device=pages.device).view(case.B, -1)


# The sides: each gives a function without arguments whose result is [B,H,C], or [B,H,V] ------------------------------


def minids(data):
    from minids.mla import kernels

    case = data.case
    return lambda: kernels.decode(data.q, data.latents, data.lengths, case.scale, case.C)[0]


def products(data):
    case = data.case

    def run():
        weights = torch.softmax(torch.bmm(data.q * case.scale, data.latents.mT), -1)
        return torch.bmm(weights, data.latents[..., : case.C])

    return run


def flash_mla(data):
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    case, (pages, table) = data.case, data.paged()
    plan, splits = get_mla_metadata(data.lengths, case.H, 1)
    inputs = data.q.unsqueeze(1), pages, table, data.lengths, case.C, plan, splits
    return lambda: flash_mla_with_kvcache(*inputs, softmax_scale=case.scale, causal=True)[0].squeeze(1)


def flag_gems(data):
    from flag_gems.fused.flash_mla import flash_mla

    case, (pages, table) = data.case, data.paged()
    width = case.C + case.R
    q = (data.q * (case.scale * width**0.5)).unsqueeze(1)  # its scale is (C+R)^-0.5
    inputs = q, table, pages, case.S, PAGE, case.B, 1, data.lengths, case.H, 1, width, case.C, True
    return lambda: flash_mla(*inputs).squeeze(1)


def expanded(data, wide=False):
    q, k, v = data.expanded(wide)
    scale, V = data.case.scale, data.case.V
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :V].squeeze(2)


padded = partial(expanded, wide=True)


def gqa_inputs(data):
    case = data.case
    q = data.draw(case.B, case.H, 1, case.width)
    return q, *(data.draw(case.B, case.G, case.S, case.width) for _ in range(2))


def gqa(data, rows=False):
    case, (q, k, v) = data.case, gqa_inputs(data)
    if rows:  # [B,G,H/G,width]: every query of a group sees all positions
        grouped = q.view(case.B, case.G, -1, case.width)
        run = lambda: F.scaled_dot_product_attention(grouped, k, v).view(case.B, case.H, case.width)  # noqa: E731
    else:
        run = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).squeeze(2)  # noqa: E731
    run.inputs = q, k, v
    return run


class Side(NamedTuple):
    """Who is timed: `kind` is what it computes, `room` how many numbers of a case it keeps or makes besides `Data`."""

    side: str
    form: str
    build: callable
    kind: str = "latent"
    room: callable = lambda case: case.B * case.H * 128 * case.C * 2  # parts of splits, in fp32
    optional: bool = False

    @property
    def name(self):
        return f"{self.side} {self.form}".rstrip()

    def work(self, case):
        if self.kind == "latent":
            return latent_work(case)
        if self.kind == "expanded":
            return heads_work(case, case.H, case.P + case.R, case.V)
        return heads_work(case, case.G, case.width, case.width)


def heads_room(case, cached, widths):
    """The numbers of `cached` heads of keys and values, `widths` together."""
    return case.B * cached * case.S * widths


def of_groups(case):
    return heads_room(case, case.G, 2 * case.width)


SIDES = [
    Side("minids", "", minids),
    Side("torch", "two products", products, room=lambda case: 3 * case.B * case.H * case.S),
    Side("FlashMLA", "", flash_mla, optional=True),
    Side("FlagGems", "", flag_gems, optional=True),
    Side("SDPA GQA", "", gqa, "gqa", of_groups),
    Side("SDPA GQA", "rows", partial(gqa, rows=True), "gqa", of_groups),
    Side("SDPA expanded", "", expanded, "expanded", lambda c: heads_room(c, c.H, c.P + c.R + c.V)),
    Side("SDPA expanded", "padded", padded, "expanded", lambda c: heads_room(c, c.H, 2 * (c.P + c.R))),
]


def run(quick=False, save=None, until=None):
    """The result of the suite, saved after each case; raises BenchError where a side's result is wrong."""
    torch.manual_seed(0)
    device, skipped = gpu.Device(quick), {}
    cases = [Case(1, 64, 4, **TINY), Case(2, 128, 2, **TINY)] if quick else [Case(*shape) for shape in SHAPES]
    small = [Case(2, 128, H, **TINY) if quick else Case(2, 320, H) for H in dict.fromkeys(case.H for case in cases)]
    with torch.inference_mode():
        sides = checked(device, small, skipped)
        steps = {}
        for case in cases:
            if (need := latent_work(case)["bytes"]) > (free := device.free()):
                skipped[case.name] = f"its latents alone are {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            else:
                steps[case.name] = partial(decode, device, case, sides, 1 if quick else ROUNDS)
        settings = {"rounds": ROUNDS, "dtype": "bf16", "inputs": "normal, seed 0", **device.settings()}
        outcome = harness.result("mla", [], skipped, settings, quick, device.name)
        return harness.gather(steps, outcome, save, until)


def checked(device, cases, skipped, sides=SIDES):
    """The sides whose results are those of the fp32 equations on `cases`.

    Raises BenchError where one's is not; a public peer (`optional`) is skipped instead, and named.
    """
    good = list(sides)
    for case in cases:
        data = Data(case, device.where)
        for side in list(good):
            if gpu.tried(side.name, partial(check, side, data), skipped, side.optional) is None:
                good.remove(side)
    return good


def check(side, data):
    """True where the side's result is right; both forms of MLA are compared with the expanded equations."""
    case, run = data.case, side.build(data)
    got = run().float()
    if side.kind == "gqa":
        q, k, v = (t.float() for t in run.inputs)
        k, v = (t.repeat_interleave(case.H // case.G, 1) for t in (k, v))
        want = ((q @ k.mT * case.width**-0.5).softmax(-1) @ v).squeeze(2)
    else:
        if side.kind == "latent":
            got = reference.project_values(got.unsqueeze(1), data.kv_b.float(), case.P).squeeze(1)
        c_kv, k_rope = data.latents.float().split([case.C, case.R], -1)
        inputs = data.q_nope.float(), data.q_rope.float(), c_kv, k_rope, data.kv_b.float(), case.scale
        want = reference.attend_expanded(*inputs).squeeze(1)
    gpu.agrees(side.name, [got], [want], torch.bfloat16)
    return True


def decode(device, case, sides, rounds):
    """One case, timed: who does not fit in the memory that is left is skipped by name."""
    skipped, contenders = {}, []
    data = Data(case, device.where)
    for side in sides:
        if (need := BYTES * side.room(case)) > (free := device.free()):
            skipped[side.name] = f"it needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are left"
            continue
        run = gpu.tried(side.name, partial(warmed, side, data), skipped, side.optional)
        if run is not None:
            same, work = side.kind != "gqa", side.work(case)
            timed = harness.Contender(side.side, side.form, lambda _, run=run: run(), work=work, same=same)
            contenders.append(timed)
    return gpu.measure(device, case.name, contenders, rounds, skipped=skipped)


def warmed(side, data):
    """The side's function for these inputs, after one call, which compiles it and shows whether its memory is there."""
    run = side.build(data)
    run()
    return run
