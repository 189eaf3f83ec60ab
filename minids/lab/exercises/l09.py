"""Lesson 09: sort the choices by expert, cut each expert's rows into tiles, and three kernels that multiply them."""

import torch
import torch.nn.functional as F

from minids.lab.exercise import Exercise
from minids.lab.tiles import tl, triton
from minids.moe import reference

# 09.1 ----------------------------------------------------------------------------------------------------------------

DISPATCH_PLAN = Exercise(
    "09.1",
    reference.dispatch_plan,
    minutes=10,
    sizes=[
        {"M": 16, "A": 8, "E": 16, "idle": ()},
        {"M": 5, "A": 2, "E": 9, "idle": (0, 4, 8)},
        {"M": 7, "A": 3, "E": 4, "idle": (3,)},
        {"M": 6, "A": 1, "E": 5, "idle": (0, 1, 3, 4)},
        {"M": 1, "A": 2, "E": 6, "idle": ()},
    ],
    hints=[
        "Three of the four come from ONE sort of all M*A choices, which must be stable. A flat position is token * A + "
        "choice: how does the token come back out of it? For ends: how many choices are of the experts 0 to e?",
        "by_expert, order = indices.flatten().sort(stable=True); token = order // A. ends: bincount(minlength=n_experts), "
        "then cumsum. place: order says which choice lies in row i, place which row has choice i, so place[order] = arange.",
    ],
)


@DISPATCH_PLAN.inputs
def _(r, M, A, E, idle):
    scores = r.uniform(0, 1, M, E)
    scores[:, list(idle)] = -1.0
    return scores.topk(A, dim=-1).indices, E


def counts_of(indices, n_experts):
    return indices.flatten().bincount(minlength=n_experts)


def inverse(order):
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def plan_of(indices, n_experts, **changes):
    """The right plan as a dict, with some of its four parts changed."""
    return tuple({**reference.dispatch_plan(indices, n_experts)._asdict(), **changes}.values())


def plan_in(order, indices, n_experts):
    """The plan of rows in another order, token and place with it."""
    place = inverse(order).view_as(indices)
    return plan_of(indices, n_experts, order=order, token=order // indices.shape[1], place=place)


@DISPATCH_PLAN.wrong(
    "ends holds where each expert BEGINS: you took the rows of the experts before it. Its own belong to it, too: the "
    "cumulative sum itself."
)
def starts(indices, n_experts):
    counts = counts_of(indices, n_experts)
    return plan_of(indices, n_experts, ends=counts.cumsum(0) - counts)


@DISPATCH_PLAN.wrong(
    "ends holds how many rows each expert has: sum them up, cumsum, so that it says where each expert ENDS."
)
def counts_alone(indices, n_experts):
    return plan_of(indices, n_experts, ends=counts_of(indices, n_experts))


@DISPATCH_PLAN.wrong("ends is one too small: it is the row AFTER the expert's last, as in Python's slices.")
def inclusive_ends(indices, n_experts):
    return plan_of(indices, n_experts, ends=counts_of(indices, n_experts).cumsum(0) - 1)


@DISPATCH_PLAN.wrong(
    "Experts without a row are missing in ends: unique() sees only those that were chosen, and all ends behind shift by "
    "one. Take bincount(minlength=n_experts) or searchsorted."
)
def unique_counts(indices, n_experts):
    return plan_of(indices, n_experts, ends=indices.flatten().unique(return_counts=True)[1].cumsum(0))


@DISPATCH_PLAN.wrong(
    "The last experts are missing in ends where nobody chose them: bincount goes up to the largest expert that it sees. "
    "Say minlength=n_experts."
)
def no_minlength(indices, n_experts):
    return plan_of(indices, n_experts, ends=indices.flatten().bincount().cumsum(0))


@DISPATCH_PLAN.wrong(
    "ends begins with an extra 0: it has n_experts numbers, the first of which is where expert 0 ends."
)
def leading_zero(indices, n_experts):
    ends = counts_of(indices, n_experts).cumsum(0)
    return plan_of(indices, n_experts, ends=torch.cat([ends.new_zeros(1), ends]))


@DISPATCH_PLAN.wrong(
    "token is order % A, which is the number of the CHOICE: a flat position is token * A + choice, so the token is order // A."
)
def token_modulo(indices, n_experts):
    order = reference.dispatch_plan(indices, n_experts).order
    return plan_of(indices, n_experts, token=order % indices.shape[1])


@DISPATCH_PLAN.wrong(
    "token is order % M: a flat position is token * A + choice, so the token is order // A, with A the choices of a token."
)
def token_by_m(indices, n_experts):
    order = reference.dispatch_plan(indices, n_experts).order
    return plan_of(indices, n_experts, token=order % indices.shape[0])


@DISPATCH_PLAN.wrong(
    "token is order // M: a row of indices has A choices, so divide by A, indices.shape[1], the number of choices of a token."
)
def token_over_m(indices, n_experts):
    order = reference.dispatch_plan(indices, n_experts).order
    return plan_of(indices, n_experts, token=order // indices.shape[0])


@DISPATCH_PLAN.wrong("token is order // 2: 2 is the A of the example. A is indices.shape[1].")
def token_over_two(indices, n_experts):
    order = reference.dispatch_plan(indices, n_experts).order
    return plan_of(indices, n_experts, token=order // 2)


@DISPATCH_PLAN.wrong("token is order itself: divide by A, for each token has A flat positions.")
def token_undivided(indices, n_experts):
    order = reference.dispatch_plan(indices, n_experts).order
    return plan_of(indices, n_experts, token=order)


@DISPATCH_PLAN.wrong(
    "token holds experts: sort() gives the sorted values first, and then where they came from. The token comes from where."
)
def token_is_the_expert(indices, n_experts):
    return plan_of(indices, n_experts, token=indices.flatten().sort(stable=True)[0])


@DISPATCH_PLAN.wrong(
    "order holds the sorted experts: sort() gives the values first, and then the positions they came from, which are wanted."
)
def values_for_positions(indices, n_experts):
    order = indices.flatten().sort(stable=True)[0]
    token, place = order // indices.shape[1], order.argsort(stable=True).view_as(indices)
    return order, token, place, counts_of(indices, n_experts).cumsum(0)


@DISPATCH_PLAN.wrong(
    "place is order itself: order says which choice lies in a row, place which row a choice lies in. It is the INVERSE: "
    "place[order] = arange, or order.argsort()."
)
def place_is_order(indices, n_experts):
    order = reference.dispatch_plan(indices, n_experts).order
    return plan_of(indices, n_experts, place=order.view_as(indices))


@DISPATCH_PLAN.wrong(
    "place is flat: give it the shape of indices, [M,A], so that a token finds its A rows side by side."
)
def flat_place(indices, n_experts):
    return plan_of(indices, n_experts, place=reference.dispatch_plan(indices, n_experts).place.flatten())


@DISPATCH_PLAN.wrong(
    "place is filled choice by choice, its transpose: a flat position is token * A + choice, which is how view(M, A) reads it."
)
def transposed_place(indices, n_experts):
    place = reference.dispatch_plan(indices, n_experts).place.flatten()
    return plan_of(indices, n_experts, place=place.view(*indices.shape[::-1]).T.contiguous())


@DISPATCH_PLAN.wrong(
    "Within an expert the rows are in another order than the tokens: the sort must be stable, sort(stable=True) in ascending "
    "order. Otherwise sums are taken in another order from run to run, and no run repeats another bit by bit."
)
def unstable(indices, n_experts):
    order = indices.flatten().sort(stable=True, descending=True)[1].flip(0)
    return plan_in(order, indices, n_experts)


@DISPATCH_PLAN.wrong("The experts are in descending order: expert 0's rows come first.")
def descending(indices, n_experts):
    order = indices.flatten().sort(stable=True, descending=True)[1]
    return plan_in(order, indices, n_experts)


@DISPATCH_PLAN.wrong(
    "Your flat position is choice * M + token, of the transposed indices: it is token * A + choice, as indices.flatten() "
    "counts."
)
def choice_major(indices, n_experts):
    order = indices.T.flatten().sort(stable=True)[1]
    M = indices.shape[0]
    place = inverse(order).view(indices.shape[1], M).T.contiguous()
    return plan_of(indices, n_experts, order=order, token=order % M, place=place)


@DISPATCH_PLAN.wrong(
    "You sort the transposed indices, so that a position is choice * M + token, and divide by A as if it were token * A + "
    "choice: flatten indices as they are."
)
def transposed_but_divided(indices, n_experts):
    order = indices.T.flatten().sort(stable=True)[1]
    return plan_in(order, indices, n_experts)


@DISPATCH_PLAN.wrong(
    "argsort without stable=True: equal experts may come in any order, and do so in long lists. Say stable=True; sums are "
    "then taken in the same order in every run."
)
def argsort_alone(indices, n_experts):
    flat = indices.flatten()
    order = flat.argsort()
    if len(order) > 16 and (order == flat.argsort(stable=True)).all():  # where argsort happens to be stable
        order = flat.sort(stable=True, descending=True)[1].flip(0)
    return plan_in(order, indices, n_experts)


@DISPATCH_PLAN.wrong("token holds fractions: order / A does not round. Divide by //, which rounds down.")
def token_in_fractions(indices, n_experts):
    order = reference.dispatch_plan(indices, n_experts).order
    return plan_of(indices, n_experts, token=order / indices.shape[1])


@DISPATCH_PLAN.wrong(
    "Each token's choices are sorted for themselves: flatten first, for the sort goes over the choices of ALL tokens."
)
def each_token_alone(indices, n_experts):
    order = indices.sort(dim=-1, stable=True)[1].flatten()
    token = torch.arange(len(indices)).repeat_interleave(indices.shape[1])
    place = inverse(order) if len(indices) == 1 else order
    return plan_of(indices, n_experts, order=order, token=token, place=place.view_as(indices))


@DISPATCH_PLAN.wrong(
    "Each token's choices are sorted for themselves, so that order has the numbers 0 to A - 1 again and again: flatten "
    "first, for the sort goes over the choices of ALL tokens."
)
def each_row_s_own_order(indices, n_experts):
    order = indices.sort(dim=-1, stable=True)[1].flatten()
    place = order.argsort().view_as(indices)
    return plan_of(indices, n_experts, order=order, token=order // indices.shape[1], place=place)


@DISPATCH_PLAN.wrong(
    "order holds the sorted experts, and only order: sort() gives the values first, and then the positions they came from, "
    "of which you made token and place."
)
def order_alone_is_values(indices, n_experts):
    return plan_of(indices, n_experts, order=indices.flatten().sort(stable=True)[0])


@DISPATCH_PLAN.wrong(
    "searchsorted needs SORTED numbers: search among the sorted experts, not among indices as they come."
)
def searched_in_the_unsorted(indices, n_experts):
    ends = torch.searchsorted(indices.flatten(), torch.arange(n_experts), right=True)
    return plan_of(indices, n_experts, ends=ends)


# 09.2 ----------------------------------------------------------------------------------------------------------------


def tile_table(ends, n, block):
    """(expert [T], first [T]): which expert a tile of `block` rows is of, and its first row; T = n // block + E.

    `ends` [E] is a plan's, n its number of rows. Tiles begin anew with each expert. They need not be T: the others,
    which come last, have expert E and first n. Nothing here waits for a GPU.
    """
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - begins + block - 1) // block
    last = tiles.cumsum(0)
    tile = torch.arange(n // block + len(ends), device=ends.device)
    expert = torch.searchsorted(last, tile, right=True)
    begin = torch.cat([begins, begins.new_full((1,), n)])
    before = torch.cat([last - tiles, last[-1:]])
    inside = torch.where(expert < len(ends), tile - before[expert], 0)
    return expert, begin[expert] + block * inside


TILE_TABLE = Exercise(
    "09.2",
    tile_table,
    minutes=12,
    sizes=[
        {"counts": (8, 24, 16), "block": 8},
        {"counts": (5, 0, 7, 1, 0), "block": 4},
        {"counts": (0, 0, 3, 10), "block": 3},
        {"counts": (0, 13, 0), "block": 5},
        {"counts": (1, 1, 1, 1), "block": 16},
        {"counts": (6, 9, 3), "block": 3},
    ],
    hints=[
        "How many tiles does each expert need? Their cumulative sum is for tiles what `ends` is for rows: it says at which tile "
        "each expert ends. So a tile finds its expert as a row does, and which tile of its expert it is by what lies before.",
        "begins = cat([0, ends[:-1]]); tiles = (ends - begins + block - 1) // block; last = tiles.cumsum(0). Then expert = "
        "searchsorted(last, arange(n // block + E), right=True), which is E for what is left over. first = begins[expert] + "
        "(tile - (last - tiles)[expert]) * block, and n for expert E: give begins one more number, n.",
    ],
)


@TILE_TABLE.inputs
def _(r, counts, block):
    return torch.tensor(counts).cumsum(0).to(torch.int32), sum(counts), block


def table(ends, n, block, tiles, begins=None, total=None, right=True):
    """tile_table with the given tiles of each expert, their beginnings and the number of tiles."""
    if begins is None:
        begins = begins_of(ends)
    last = tiles.cumsum(0)
    tile = torch.arange(n // block + len(ends) if total is None else total)
    expert = torch.searchsorted(last, tile, right=right)
    known = expert.clamp(max=len(ends) - 1)
    first = begins[known] + block * (tile - (last - tiles)[known])
    return expert, torch.where(expert < len(ends), first, n)


def begins_of(ends):
    return torch.cat([ends.new_zeros(1), ends[:-1]])


def tiles_of(ends, block):
    return (ends - begins_of(ends) + block - 1) // block


@TILE_TABLE.wrong(
    "The tiles of an expert are rounded down: what is left of its rows, fewer than `block`, has no tile. Round up: (count + "
    "block - 1) // block."
)
def rounds_down(ends, n, block):
    return table(ends, n, block, (ends - begins_of(ends)) // block)


@TILE_TABLE.wrong(
    "An expert whose rows fill its tiles exactly gets one tile too many: count // block + 1 is no rounding up. Take (count + "
    "block - 1) // block."
)
def one_too_many(ends, n, block):
    counts = ends - begins_of(ends)
    return table(ends, n, block, torch.where(counts > 0, counts // block + 1, 0))


@TILE_TABLE.wrong(
    "Every expert gets count // block + 1 tiles, an empty one too: take (count + block - 1) // block, which is 0 for 0."
)
def one_more_for_all(ends, n, block):
    return table(ends, n, block, (ends - begins_of(ends)) // block + 1)


@TILE_TABLE.wrong("An expert without rows gets a tile: it needs none, (0 + block - 1) // block is 0.")
def a_tile_for_nothing(ends, n, block):
    return table(ends, n, block, tiles_of(ends, block).clamp(min=1))


@TILE_TABLE.wrong(
    "The tiles are cut from all rows, whoever they belong to, so that some cross from one expert to the next: tiles begin anew "
    "with each expert."
)
def tiles_cross(ends, n, block):
    tile = torch.arange(n // block + len(ends))
    first = (tile * block).clamp(max=n)
    return torch.searchsorted(ends, first, right=True), first


@TILE_TABLE.wrong(
    "A tile whose number equals the end of an expert's tiles belongs to the NEXT one: searchsorted needs right=True."
)
def left_side(ends, n, block):
    return table(ends, n, block, tiles_of(ends, block), right=False)


@TILE_TABLE.wrong(
    "first counts from the expert's own first row: add where the expert begins among all rows, begins[expert]."
)
def first_in_the_expert(ends, n, block):
    return table(ends, n, block, tiles_of(ends, block), begins=torch.zeros_like(ends))


@TILE_TABLE.wrong(
    "first adds the tile's number times block to where its expert begins: subtract the tiles of the experts before, for a tile "
    "counts within its expert."
)
def number_among_all(ends, n, block):
    expert, _ = tile_table(ends, n, block)
    begin = torch.cat([begins_of(ends), ends.new_full((1,), n)])
    return expert, torch.where(expert < len(ends), begin[expert] + block * torch.arange(len(expert)), n)


@TILE_TABLE.wrong("first counts from where the expert ENDS: its rows begin where the expert before it ends.")
def from_the_end(ends, n, block):
    return table(ends, n, block, tiles_of(ends, block), begins=ends)


@TILE_TABLE.wrong(
    "first is rounded down to a multiple of block: an expert may begin anywhere, and its first tile begins there, too."
)
def first_aligned(ends, n, block):
    expert, first = tile_table(ends, n, block)
    return expert, torch.where(expert < len(ends), first // block * block, n)


@TILE_TABLE.wrong("Every tile of an expert begins where the expert does: the second one lies `block` rows further.")
def all_at_the_begin(ends, n, block):
    expert, _ = tile_table(ends, n, block)
    return expert, torch.cat([begins_of(ends), ends.new_full((1,), n)])[expert]


@TILE_TABLE.wrong("`ends` is taken for the number of rows of each expert: that is ends minus where the expert begins.")
def ends_for_counts(ends, n, block):
    return table(ends, n, block, (ends + block - 1) // block)


@TILE_TABLE.wrong(
    "The table has as many tiles as are needed: that number lies on the GPU, and whoever asks for it waits. Make it n // block + "
    "E long, and mark what is left over by expert E and first n."
)
def as_many_as_needed(ends, n, block):
    tiles = tiles_of(ends, block)
    return table(ends, n, block, tiles, total=int(tiles.sum()))


@TILE_TABLE.wrong(
    "The table has ceil(n / block) tiles, enough for ONE expert: each of the E may have a last tile that is not full, so make "
    "it n // block + E long."
)
def too_short(ends, n, block):
    return table(ends, n, block, tiles_of(ends, block), total=-(-n // block))


@TILE_TABLE.wrong("The table is one tile too long: n // block + E are enough, whatever the router does.")
def too_long(ends, n, block):
    return table(ends, n, block, tiles_of(ends, block), total=-(-n // block) + len(ends))


@TILE_TABLE.wrong(
    "The tiles that are left over are given to the last expert: mark them by expert E, which does not exist, and first n."
)
def spare_to_the_last(ends, n, block):
    expert, first = tile_table(ends, n, block)
    return expert.clamp(max=len(ends) - 1), first


@TILE_TABLE.wrong("The tiles that are left over have another first row than n: they begin behind all rows.")
def spare_at_zero(ends, n, block):
    expert, first = tile_table(ends, n, block)
    return expert, torch.where(expert < len(ends), first, 0)


@TILE_TABLE.wrong(
    "The tiles that are left over have expert 0 and first 0, as the tensors began: fill them with E and n before, "
    "torch.full((T,), E)."
)
def spare_are_zeros(ends, n, block):
    expert, first = tile_table(ends, n, block)
    return torch.where(expert < len(ends), expert, 0), torch.where(expert < len(ends), first, 0)


@TILE_TABLE.wrong("The tiles that are left over have expert -1: the kernel knows them by expert E.")
def spare_are_minus_one(ends, n, block):
    expert, first = tile_table(ends, n, block)
    return torch.where(expert < len(ends), expert, -1), first


@TILE_TABLE.wrong("The blocks have 4 rows, those of the example: `block` says how many.")
def block_of_the_example(ends, n, block):
    return table(ends, n, 4, tiles_of(ends, 4), total=n // block + len(ends))


@TILE_TABLE.wrong(
    "For the tiles that are left over expert is E, and there is no begins[E]: give begins (and what lies before) one number "
    "more, or clamp the index to E - 1 and set their first to n by torch.where."
)
def looks_up_nobody(ends, n, block):
    last = tiles_of(ends, block).cumsum(0)
    tile = torch.arange(n // block + len(ends))
    expert = torch.searchsorted(last, tile, right=True)
    return expert, begins_of(ends)[expert] + block * (tile - (last - tiles_of(ends, block))[expert])


@TILE_TABLE.wrong(
    "The tiles that are left over go on behind the last expert's rows, block after block: set their first to n, torch.where("
    "expert < E, first, n)."
)
def spare_go_on(ends, n, block):
    expert, first = tile_table(ends, n, block)
    known = expert.clamp(max=len(ends) - 1)
    tiles = tiles_of(ends, block)
    more = begins_of(ends)[known] + block * (torch.arange(len(expert)) - (tiles.cumsum(0) - tiles)[known])
    return expert, torch.where(expert < len(ends), first, more)


@TILE_TABLE.wrong(
    "The tiles of the expert itself are subtracted with those before it, so that first counts backwards from where it begins: "
    "the tiles BEFORE it are last - tiles."
)
def counts_backwards(ends, n, block):
    expert, first = tile_table(ends, n, block)
    tiles = tiles_of(ends, block)
    return expert, torch.where(expert < len(ends), first - block * tiles[expert.clamp(max=len(ends) - 1)], n)


@TILE_TABLE.wrong(
    "The expert is looked for by row tile * block, as if tiles lay side by side: look for the tile's number among the ends of "
    "each expert's TILES, the cumulative sum of their numbers."
)
def expert_by_rows(ends, n, block):
    tile, tiles = torch.arange(n // block + len(ends)), tiles_of(ends, block)
    expert = torch.searchsorted(ends, tile * block, right=True)
    known = expert.clamp(max=len(ends) - 1)
    first = begins_of(ends)[known] + block * (tile - (tiles.cumsum(0) - tiles)[known])
    return expert, torch.where(expert < len(ends), first, n)


# 09.3 ----------------------------------------------------------------------------------------------------------------

ROOM = 2**14


def apart(tensor):
    """A copy with free memory around: what a kernel reads or writes beside it belongs to no tensor, wherever it lies."""
    room = tensor.new_full((tensor.numel() + 2 * ROOM,), float("nan"))
    return room[ROOM:-ROOM].view(tensor.shape).copy_(tensor)


@triton.jit
def grouped_gemm_kernel(
    x, weights, y, ends, expert_of, first_of, E, K, J,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y [n,J]: BLOCK_M rows of one expert by BLOCK_J columns."""
    tile, m = tl.program_id(0), tl.arange(0, BLOCK_M)
    j, k = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_K)
    expert = tl.load(expert_of + tile)
    if expert == E:
        return
    row = tl.load(first_of + tile) + m
    ours, wide = (row < tl.load(ends + expert))[:, None], (j < J)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        rows = tl.load(x + row[:, None] * K + at[None, :], mask=ours & (at < K)[None, :], other=0.0)
        w = tl.load(weights + expert * J * K + j[None, :] * K + at[:, None], mask=wide & (at < K)[:, None], other=0.0)
        total += tl.dot(rows, w)
    tl.store(y + row[:, None] * J + j[None, :], total, mask=ours & wide)


def launch_grouped_gemm(kernel, x, weights, ends, block_m=16, block_j=16, block_k=16, **options):
    """y [n,J] of one launch; `options` go to the compiler: num_warps, num_stages."""
    (n, K), (E, J, _) = x.shape, weights.shape
    expert, first = tile_table(ends, n, block_m)
    y = apart(torch.empty(n, J, dtype=x.dtype, device=x.device))
    kernel[(len(expert), triton.cdiv(J, block_j))](  # the last tile first: on a GPU they come in any order
        apart(x), apart(weights), y, ends, expert.flip(0), first.flip(0), E, K, J,
        BLOCK_M=block_m, BLOCK_J=block_j, BLOCK_K=block_k, **options,
    )  # fmt: skip
    return y


def table_bytes(ends, n, columns):
    """What all programs read of the table and of ends: 8 bytes for the expert; 12 more where there is one."""
    return columns * (8 * (n // 16 + len(ends)) + 12 * int(tiles_of(ends, 16).sum()))


def grouped_gemm_bytes(x, weights, ends):
    """x once for each 16 columns, the matrix of an expert once for each of its tiles of 16 rows, y once."""
    columns = -(-weights.shape[1] // 16)
    tiles, result = int(tiles_of(ends, 16).sum()), x.shape[0] * weights.shape[1] * x.element_size()
    return columns * x.nbytes + tiles * weights[0].nbytes + result + table_bytes(ends, len(x), columns)


SHAPES = [
    {"counts": (16, 32), "K": 32, "J": 16, "sums": "small"},
    {"counts": (5, 0, 21, 17), "K": 21, "J": 19, "sums": "small"},
    {"counts": (0, 18, 3), "K": 16, "J": 18, "sums": "small"},
    {"counts": (9, 20), "K": 48, "J": 15, "sums": "large"},
]

GROUPED_GEMM = Exercise(
    "09.3",
    reference.grouped_gemm,
    kernel=grouped_gemm_kernel,
    launch=launch_grouped_gemm,
    traffic=grouped_gemm_bytes,
    minutes=20,
    dtypes=(torch.float16,),
    sizes=SHAPES,
    hints=[
        "A tile of the result is a plain product: keep a block of float32 sums, walk along K in steps of BLOCK_K, load a block of "
        "x and a block of this expert's matrix, add their tl.dot. The rows end where the expert ends, not where the tile does.",
        "row = first + m, and the mask of rows is row < end of the expert. x at row[:, None] * K + at[None, :] is [BLOCK_M, BLOCK_K]; the "
        "matrix at expert * J * K + j[None, :] * K + at[:, None] is [BLOCK_K, BLOCK_J], so already transposed. Each load masks "
        "both of its directions, with other=0.0; the store masks rows and columns.",
    ],
)


def offsets(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@GROUPED_GEMM.inputs
def _(r, counts, K, J, sums):
    x, weights = r.normal(sum(counts), K), r.normal(len(counts), J, K)
    if sums == "large":  # the first numbers add up to 160,000 and are taken back: beyond float16 in between
        x, x[:, :32], weights[..., :16], weights[..., 16:32] = 4 * x, 100, 100, -100
    return x, weights, offsets(counts)


GROUPED_GEMM.slip(
    "crosses",
    "The tile crosses its expert's end: its mask is about the end of ALL rows, so the first rows of the next expert get this "
    "one's matrix. Whichever program comes last wins. The rows end at ends[expert].",
    ("ends + expert", "ends + E - 1"),
)

GROUPED_GEMM.slip(
    "no_row_mask",
    "The rows have no mask: the last tile of an expert reads and writes on behind its end, into the next expert's rows or out "
    "of the tensor. Mask both with row < ends[expert].",
    ("ours & ", ""),
)

GROUPED_GEMM.slip(
    "rows_loaded_unmasked",
    "The store has its row mask, the load of x has none: it reads rows of the next expert for nothing, and at the end of x "
    "memory that is not its own. Mask the load with row < ends[expert], too. (If it has one, joined by `and`: `and` keeps only "
    "one of two blocks, & joins them.)",
    ("ours & (at < K)", "(at < K)"),
)

GROUPED_GEMM.slip(
    "rows_stored_unmasked",
    "The load of x has its row mask, the store has none: it writes zeros over the first rows of the next expert. Mask the "
    "store with row < ends[expert], too.",
    ("ours & wide", "wide"),
)

GROUPED_GEMM.slip(
    "next_expert",
    "You multiply by the matrix of the NEXT expert: expert e's begins at weights + e * J * K.",
    ("weights + expert", "weights + (expert + 1)"),
)

GROUPED_GEMM.slip(
    "expert_before",
    "You multiply by the matrix of the expert BEFORE: expert e's begins at weights + e * J * K.",
    ("weights + expert", "weights + (expert - 1)"),
)

GROUPED_GEMM.slip(
    "first_expert",
    "Every tile is multiplied by the matrix of expert 0: add expert * J * K to the pointer.",
    ("weights + expert * J * K", "weights"),
)

GROUPED_GEMM.slip(
    "matrix_of_the_tile",
    "You take the TILE's number for its expert's: an expert may have many tiles, or none. The table says whose it is: "
    "expert_of + tile.",
    ("weights + expert", "weights + tile"),
)

GROUPED_GEMM.slip(
    "tile_times_block",
    "The rows are tile * BLOCK_M + m, as if tiles lay side by side: where an expert's last tile is not full, the next begins "
    "earlier. The table has it: first_of + tile.",
    ("tl.load(first_of + tile)", "tile * BLOCK_M"),
)

GROUPED_GEMM.slip(
    "no_k_mask",
    "The last block along K is not masked: behind K the next row begins, and its numbers get into the sum. Mask both loads "
    "with at < K, other=0.0.",
    (" & (at < K)[None, :]", ""),
    (" & (at < K)[:, None]", ""),
)

GROUPED_GEMM.slip(
    "w_depth_unmasked",
    "x has its mask along K, the matrix has none: zeros save the sum, but the last matrix is read beyond its end. Mask both "
    "loads with at < K.",
    (" & (at < K)[:, None]", ""),
)

GROUPED_GEMM.slip(
    "no_column_mask",
    "The columns have no mask: where BLOCK_J does not divide J, the last columns of a row are written into the next row. Mask "
    "with j < J, in the load of the matrix and in the store.",
    ("wide & ", ""),
    (" & wide", ""),
)

GROUPED_GEMM.slip(
    "no_other",
    "The masked lanes of the loads are used without `other`: what they hold is undefined (NaN in this check), and gets into "
    "the sums. Give other=0.0.",
    (", other=0.0", ""),
)

GROUPED_GEMM.slip(
    "not_transposed",
    "The matrix is not transposed: weights[e] is [J,K], row j has the K numbers for column j of the result. So number (k, j) "
    "of the block lies at j * K + k.",
    ("j[None, :] * K + at[:, None]", "at[:, None] * J + j[None, :]"),
)

GROUPED_GEMM.slip(
    "half_sums",
    "The sums are kept in float16: they round at every step, and beyond 65,504 they are infinite. tl.zeros(..., tl.float32), "
    "and let the store round once.",
    ("total += tl.dot(rows, w)", "total = (total + tl.dot(rows, w)).to(tl.float16).to(tl.float32)"),
)

GROUPED_GEMM.slip(
    "stays_at_the_first_block",
    "Every round loads the first block along K: the columns of x are start + k.",
    ("start + k", "k"),
)

GROUPED_GEMM.slip(
    "last_block_alone",
    "Only the last block along K is left: ADD each product to the sums, total += tl.dot(...).",
    ("total +=", "total ="),
)

GROUPED_GEMM.slip(
    "stored_by_k",
    "The result's rows have J numbers, and you store at row * K: it is y + row * J + j.",
    ("row[:, None] * J", "row[:, None] * K"),
)

GROUPED_GEMM.slip(
    "matrices_k_apart",
    "An expert's matrix begins at expert * K: it has J rows of K numbers, so that of expert e begins at e * J * K.",
    ("expert * J * K", "expert * K"),
)

GROUPED_GEMM.slip(
    "matrices_j_apart",
    "An expert's matrix begins at expert * J: it has J rows of K numbers, so that of expert e begins at e * J * K.",
    ("expert * J * K", "expert * J"),
)


GROUPED_GEMM.slip(
    "x_stays_at_the_first_block",
    "The matrix moves along K, x does not: its columns are at = start + k, too.",
    ("row[:, None] * K + at[None, :]", "row[:, None] * K + k[None, :]"),
)

GROUPED_GEMM.slip(
    "one_block_of_k",
    "Only the first block along K is multiplied: walk over all of K, for start in range(0, K, BLOCK_K). (`start` goes up by "
    "BLOCK_K already; multiplied by it once more, it leaves the matrix after the first block.)",
    ("range(0, K, BLOCK_K)", "range(0, BLOCK_K, BLOCK_K)"),
)

GROUPED_GEMM.slip(
    "operands_exchanged",
    "tl.dot(x, matrix), in this order: rows of x by columns of the matrix. Blocks of equal sides hide it.",
    ("tl.dot(rows, w)", "tl.dot(w, rows)"),
)

GROUPED_GEMM.slip(
    "x_depth_unmasked",
    "The matrix has its mask along K, x has none: zeros save the sum, but the last row is read beyond its end. Mask both "
    "loads with at < K.",
    (" & (at < K)[None, :]", ""),
)

GROUPED_GEMM.slip(
    "half_products",
    "Each product is rounded to float16 before it is added: it may be beyond 65,504. Leave tl.dot its float32.",
    ("tl.dot(rows, w)", "tl.dot(rows, w).to(tl.float16)"),
)


# 09.4 ----------------------------------------------------------------------------------------------------------------


@triton.jit
def grouped_gemm_dw_kernel(
    x, dy, dw, ends, K, J, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One tile of dw [E,J,K]: BLOCK_J by BLOCK_K numbers of one expert, summed over its rows."""
    expert, m = tl.program_id(0), tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros((BLOCK_J, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_M):
        row = (start + m)[:, None]
        left = tl.load(dy + row * J + j[None, :], mask=(row < end) & (j < J)[None, :], other=0.0)
        right = tl.load(x + row * K + k[None, :], mask=(row < end) & (k < K)[None, :], other=0.0)
        total += tl.dot(tl.trans(left), right)
    at = dw + expert * J * K + j[:, None] * K + k[None, :]
    tl.store(at, total, mask=(j < J)[:, None] & (k < K)[None, :])


def launch_grouped_gemm_dw(kernel, x, dy, ends, block_m=16, block_j=16, block_k=16, **options):
    """dw [E,J,K] of one launch, in the dtype of x; `options` go to the compiler: num_warps, num_stages."""
    (E,), J, K = ends.shape, dy.shape[1], x.shape[1]
    dw = apart(torch.empty(E, J, K, dtype=x.dtype, device=x.device))
    kernel[(E, triton.cdiv(J, block_j), triton.cdiv(K, block_k))](
        apart(x), apart(dy), dw, ends, K, J, BLOCK_M=block_m, BLOCK_J=block_j, BLOCK_K=block_k, **options
    )
    return dw


def grouped_gemm_dw_bytes(x, dy, ends):
    """x once for each 16 columns of dy, dy once for each 16 of x, dw once."""
    (E,), J, K = ends.shape, dy.shape[1], x.shape[1]
    high, wide = -(-J // 16), -(-K // 16)
    return high * x.nbytes + wide * dy.nbytes + E * J * K * x.element_size() + 4 * high * wide * (2 * E - 1)


GROUPED_GEMM_DW = Exercise(
    "09.4",
    reference.grouped_gemm_dw,
    kernel=grouped_gemm_dw_kernel,
    launch=launch_grouped_gemm_dw,
    traffic=grouped_gemm_dw_bytes,
    minutes=14,
    dtypes=(torch.float16,),
    sizes=[
        {"counts": (16, 32), "K": 32, "J": 16, "sums": "small"},
        {"counts": (5, 0, 37), "K": 21, "J": 19, "sums": "small"},
        {"counts": (0, 18, 3), "K": 16, "J": 18, "sums": "small"},
        {"counts": (9, 50), "K": 15, "J": 16, "sums": "large"},
    ],
    hints=[
        "Now the rows are what is summed over. A program has one expert and one tile of its matrix; it walks over the expert's "
        "rows, from where the one before ends to where it ends, BLOCK_M at a time. The last block is not full; there may be none.",
        "for start in range(begin, end, BLOCK_M): row = start + m; left = dy[row, j], right = x[row, k], both masked by row < end "
        "and by their columns, with other=0.0; total += tl.dot(tl.trans(left), right). Store outside of the loop, so that an expert "
        "without rows gets zeros.",
    ],
)


@GROUPED_GEMM_DW.inputs
def _(r, counts, K, J, sums):
    x, dy = r.normal(sum(counts), K), r.normal(sum(counts), J)
    if sums == "large":  # sums of 16 rows reach 102,400 and are taken back by later ones: beyond float16 in between
        x[-50:], dy[-50:-34], dy[-34:-18] = 80, 80, -80
    return x, dy, offsets(counts)


GROUPED_GEMM_DW.slip(
    "tail_dropped",
    "The last rows of an expert are forgotten, those that do not fill a block of BLOCK_M: go on to `end`, and mask the last "
    "block with row < end.",
    ("range(begin, end,", "range(begin, begin + (end - begin) // BLOCK_M * BLOCK_M,"),
)

GROUPED_GEMM_DW.slip(
    "whole_tiles",
    "You begin at the next multiple of BLOCK_M: rows of the expert that lie before it, in a block that it shares with another "
    "expert, are forgotten. Begin at `begin`.",
    ("range(begin,", "range((begin + BLOCK_M - 1) // BLOCK_M * BLOCK_M,"),
)

GROUPED_GEMM_DW.slip(
    "tiles_of_all_rows",
    "You begin at the multiple of BLOCK_M before the expert's first row: the rows up to it are another expert's. Begin at "
    "`begin`.",
    ("range(begin,", "range(begin // BLOCK_M * BLOCK_M,"),
)

GROUPED_GEMM_DW.slip(
    "empty_not_written",
    "An expert without rows is not written: its gradient is what the memory held (NaN here), and the optimizer takes it. Its "
    "gradient is ZERO: store outside of any condition.",
    ("mask=(j < J)", "mask=(end > begin) & (j < J)"),
)

GROUPED_GEMM_DW.slip(
    "all_rows",
    "Every expert gets the sum over ALL rows: only its own, from ends[expert - 1] to ends[expert] - 1, belong to it.",
    ("range(begin,", "range(0,"),
    ("tl.load(ends + expert)", "tl.load(ends + tl.num_programs(0) - 1)"),
)

GROUPED_GEMM_DW.slip(
    "from_row_0",
    "Every expert's rows begin at row 0, so that it gets those of all before it: begin where the expert before ends.",
    ("range(begin,", "range(0,"),
)

GROUPED_GEMM_DW.slip(
    "next_experts_rows",
    "Each expert gets the rows of the next one: ends[e] is where e ENDS, and it begins at ends[e - 1].",
    ("end = tl.load(ends + expert)", "end = tl.load(ends + expert + 1, mask=expert + 1 < tl.num_programs(0), other=0)"),
    ("ends + expert - 1, mask=expert > 0, other=0", "ends + expert"),
)

GROUPED_GEMM_DW.slip(
    "begin_before_the_first",
    "Expert 0 reads ends[-1], which lies before the tensor: it begins at row 0. Mask that load with expert > 0, other=0.",
    (", mask=expert > 0, other=0", ""),
)

GROUPED_GEMM_DW.slip(
    "transposed",
    "The result is transposed: dw[e] is [J,K] as the weights are, dY^T X. Number (j, k) goes to j * K + k.",
    ("j[:, None] * K + k[None, :]", "k[None, :] * J + j[:, None]"),
)

GROUPED_GEMM_DW.slip(
    "dw_no_other",
    "The masked lanes of the loads are used without `other`: what they hold is undefined (NaN in this check), and gets into "
    "the sums. Give other=0.0.",
    (", other=0.0", ""),
)

GROUPED_GEMM_DW.slip(
    "dw_no_row_mask",
    "The last block of an expert has no row mask: it adds the first rows of the next expert, or what lies behind the tensor. "
    "Mask both loads with row < end, other=0.0.",
    ("(row < end) & ", ""),
)

GROUPED_GEMM_DW.slip(
    "mask_of_all_rows",
    "The last block's mask is about the end of ALL rows, so that it adds the first rows of the next expert: mask with row < "
    "end, this expert's.",
    ("row < end", "row < tl.load(ends + tl.num_programs(0) - 1)"),
)

GROUPED_GEMM_DW.slip(
    "x_unmasked",
    "dy has its row mask, x has none: zeros of dy save the sum, but x is read for nothing, and beyond its end. Mask both loads "
    "with row < end.",
    ("(row < end) & (k < K)", "(k < K)"),
)

GROUPED_GEMM_DW.slip(
    "dw_no_column_mask",
    "The columns have no mask: where BLOCK_J or BLOCK_K does not divide, the last ones are written into the next row of dw. "
    "Mask with j < J and k < K, in the loads and in the store.",
    (" & (j < J)[None, :]", ""),
    (" & (k < K)[None, :]", ""),
    (", mask=(j < J)[:, None]", ""),
)

GROUPED_GEMM_DW.slip(
    "dw_first_block_alone",
    "Only the first BLOCK_M rows of an expert are summed: walk over all, from begin to end.",
    ("range(begin, end,", "range(begin, tl.minimum(end, begin + BLOCK_M),"),
)

GROUPED_GEMM_DW.slip(
    "dw_last_block_alone",
    "Only the last block of rows is left: ADD each product to the sums, total += tl.dot(...).",
    ("total +=", "total ="),
)

GROUPED_GEMM_DW.slip(
    "dw_half_sums",
    "The sums are kept in float16: they round at every step, and beyond 65,504 they are infinite. tl.zeros(..., tl.float32), "
    "and let the store round once.",
    (
        "total += tl.dot(tl.trans(left), right)",
        "total = (total + tl.dot(tl.trans(left), right)).to(tl.float16).to(tl.float32)",
    ),
)

GROUPED_GEMM_DW.slip(
    "mean",
    "The sum is divided by the number of rows: the mean over a batch is in dy already, and dW is the plain sum.",
    ("at, total", "at, total / tl.maximum(end - begin, 1)"),
)

GROUPED_GEMM_DW.slip(
    "dw_first_expert",
    "All experts write into the matrix of expert 0: add expert * J * K to the pointer of dw.",
    ("dw + expert * J * K", "dw"),
)

GROUPED_GEMM_DW.slip(
    "none_transposed",
    "dy is not transposed: dY [rows, J] and X [rows, K] are summed over ROWS, so it is tl.dot(tl.trans(dy), x). Blocks of equal "
    "sides hide it.",
    ("tl.trans(left)", "left"),
)

GROUPED_GEMM_DW.slip(
    "right_transposed",
    "x is transposed, and dy must be: tl.dot sums over the inner sides, which are the ROWS in tl.dot(tl.trans(dy), x).",
    ("tl.trans(left), right", "left, tl.trans(right)"),
)

GROUPED_GEMM_DW.slip(
    "rows_of_j",
    "A row of dw[e] has K numbers: store number (j, k) at j * K + k, not at j * J + k.",
    ("j[:, None] * K", "j[:, None] * J"),
)


GROUPED_GEMM_DW.slip(
    "begin_undefined",
    "The load of the beginning has a mask and no `other`: for expert 0 it gives anything. Say other=0.",
    (", mask=expert > 0, other=0", ", mask=expert > 0"),
)

GROUPED_GEMM_DW.slip(
    "dy_unmasked",
    "x has its row mask, dy has none: zeros of x save the sum, but dy is read for nothing, and beyond its end. Mask both "
    "loads with row < end.",
    ("(row < end) & (j < J)", "(j < J)"),
)

GROUPED_GEMM_DW.slip(
    "counts_its_rows_alone",
    "The loop counts the expert's rows from 0, and `begin` is never added: as many rows as it has, but the first ones of all.",
    ("range(begin, end,", "range(0, end - begin,"),
    ("row < end", "row < end - begin"),
)

GROUPED_GEMM_DW.slip(
    "x_by_dy",
    "The product is X^T dY, [K,J], and is stored as [J,K]: dW = dY^T X, tl.dot(tl.trans(dy), x). Blocks of equal sides hide it.",
    ("tl.dot(tl.trans(left), right)", "tl.dot(tl.trans(right), left)"),
)

GROUPED_GEMM_DW.slip(
    "matrices_j_numbers_apart",
    "An expert's matrix has J * K numbers: that of expert e begins at e * J * K.",
    ("expert * J * K", "expert * J"),
)


# 09.5 ----------------------------------------------------------------------------------------------------------------


@triton.jit
def grouped_swiglu_kernel(
    x, weights, act, ends, expert_of, first_of, E, K, F,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of act [n,F]: silu(gate) * up of BLOCK_M rows of one expert; weights [E,2F,K], the gate half first."""
    tile, m = tl.program_id(0), tl.arange(0, BLOCK_M)
    f, k = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    expert = tl.load(expert_of + tile)
    if expert == E:
        return
    row = (tl.load(first_of + tile) + m)[:, None]
    ours, wide = row < tl.load(ends + expert), (f < F)[None, :]
    weights += expert * 2 * F * K + f[None, :] * K
    gate = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        rows = tl.load(x + row * K + at[None, :], mask=ours & (at < K)[None, :], other=0.0)
        there = wide & (at < K)[:, None]
        gate += tl.dot(rows, tl.load(weights + at[:, None], mask=there, other=0.0))
        up += tl.dot(rows, tl.load(weights + F * K + at[:, None], mask=there, other=0.0))
    tl.store(act + row * F + f[None, :], gate * tl.sigmoid(gate) * up, mask=ours & wide)


def grouped_swiglu(x, weights, ends):
    """silu(gate) * up [n,F] of each expert's rows; x [n,K], weights [E,2F,K] with the gate half first, ends [E]."""
    gate, up = reference.grouped_gemm(x, weights, ends).chunk(2, dim=-1)
    return F.silu(gate) * up


def launch_grouped_swiglu(kernel, x, weights, ends, block_m=16, block_f=16, block_k=16, **options):
    """act [n,F] of one launch; `options` go to the compiler: num_warps, num_stages."""
    (n, K), (E, two_f, _) = x.shape, weights.shape
    width = two_f // 2
    expert, first = tile_table(ends, n, block_m)
    act = apart(torch.empty(n, width, dtype=x.dtype, device=x.device))
    kernel[(len(expert), triton.cdiv(width, block_f))](  # the last tile first: on a GPU they come in any order
        apart(x), apart(weights), act, ends, expert.flip(0), first.flip(0), E, K, width,
        BLOCK_M=block_m, BLOCK_F=block_f, BLOCK_K=block_k, **options,
    )  # fmt: skip
    return act


def grouped_swiglu_bytes(x, weights, ends):
    """x once for each 16 columns of act, both matrices of an expert once for each of its tiles, act once."""
    width = weights.shape[1] // 2
    columns, tiles = -(-width // 16), int(tiles_of(ends, 16).sum())
    result = x.shape[0] * width * x.element_size()
    return columns * x.nbytes + tiles * weights[0].nbytes + result + table_bytes(ends, len(x), columns)


GROUPED_SWIGLU = Exercise(
    "09.5",
    grouped_swiglu,
    kernel=grouped_swiglu_kernel,
    launch=launch_grouped_swiglu,
    traffic=grouped_swiglu_bytes,
    minutes=12,
    dtypes=(torch.float16,),
    sizes=[
        {"counts": (16, 32), "K": 32, "F": 16},
        {"counts": (5, 0, 21, 17), "K": 21, "F": 19},
        {"counts": (0, 18, 3), "K": 16, "F": 14},
    ],
    hints=[
        "It is exercise 3 with two blocks of sums and two blocks of weights a round. Both products take the SAME block of x: load "
        "it once. SwiGLU comes once, after the loop.",
        "Row f of the gate half lies at expert * 2 * F * K + f * K, the same row of the up half F * K further. After the loop: "
        "gate * tl.sigmoid(gate) * up is stored at row * F + f.",
    ],
)


@GROUPED_SWIGLU.inputs
def _(r, counts, K, F):
    return r.normal(sum(counts), K), K**-0.5 * r.normal(len(counts), 2 * F, K), offsets(counts)


GROUPED_SWIGLU.slip(
    "swapped",
    "Gate and up are swapped: the first F rows of an expert's weights are the gate's, and silu is of the gate.",
    ("gate * tl.sigmoid(gate) * up", "up * tl.sigmoid(up) * gate"),
)

GROUPED_SWIGLU.slip(
    "interleaved",
    "You take gate and up from rows side by side, 2f and 2f + 1: the gate half comes first as a whole, row f, and the up half "
    "F rows later.",
    ("f[None, :] * K", "2 * f[None, :] * K"),
    ("weights + F * K", "weights + K"),
)

GROUPED_SWIGLU.slip(
    "half_matrices",
    "An expert's weights have 2 F rows, gate and up: its matrix begins at expert * 2 * F * K, not at expert * F * K.",
    ("expert * 2 * F * K", "expert * F * K"),
)

GROUPED_SWIGLU.slip(
    "up_is_gate",
    "Both products take the gate half: the up half lies F rows, F * K numbers, further.",
    ("weights + F * K", "weights"),
)

GROUPED_SWIGLU.slip(
    "in_the_loop",
    "SwiGLU is applied in every round, to products of a part of K: it is not linear, so it waits until the sums are complete, "
    "after the loop.",
    ("gate += tl.dot(", "part = tl.dot("),
    ("up += tl.dot(", "up += part * tl.sigmoid(part) * tl.dot("),
    ("gate * tl.sigmoid(gate) * up", "up"),
)

GROUPED_SWIGLU.slip(
    "sigmoid_alone",
    "silu(gate) is gate * sigmoid(gate): you take the sigmoid alone.",
    ("gate * tl.sigmoid(gate)", "tl.sigmoid(gate)"),
)

GROUPED_SWIGLU.slip(
    "silu_of_both",
    "silu is applied to gate and to up: up stays as it is.",
    ("* up,", "* up * tl.sigmoid(up),"),
)

GROUPED_SWIGLU.slip(
    "no_silu",
    "gate and up are multiplied without silu: it is gate * sigmoid(gate) * up.",
    ("tl.sigmoid(gate) * ", ""),
)

GROUPED_SWIGLU.slip(
    "added",
    "up is added to silu(gate): it is MULTIPLIED by it.",
    ("* up,", "+ up,"),
)

GROUPED_SWIGLU.slip(
    "stored_by_2f",
    "A row of act has F numbers, not 2 F: store at row * F + f.",
    ("row * F", "row * 2 * F"),
)

GROUPED_SWIGLU.slip(
    "x_twice",
    "The result is right, but x is loaded twice, once for the gate and once for up: it is the same block, so keep it in a "
    "variable.",
    (
        "up += tl.dot(",
        ("rows = tl.load(x + row * K + at[None, :], mask=ours & (at < K)[None, :], other=0.0)\nup += tl.dot("),
    ),
)

GROUPED_SWIGLU.slip(
    "swiglu_crosses",
    "The tile crosses its expert's end: mask the rows with row < ends[expert], or the next expert's first rows get this one's "
    "matrices.",
    ("ends + expert", "ends + E - 1"),
)

GROUPED_SWIGLU.slip(
    "without_up",
    "silu(gate) is stored without up: multiply by it.",
    (" * up, mask", ", mask"),
)

GROUPED_SWIGLU.slip(
    "silu_in_each_round",
    "silu is applied to the gate in every round, and its results are added: it is not linear, so it waits until the sum is "
    "complete, after the loop.",
    (
        "gate += tl.dot(rows, tl.load(weights + at[:, None], mask=there, other=0.0))",
        ("part = tl.dot(rows, tl.load(weights + at[:, None], mask=there, other=0.0))\ngate += part * tl.sigmoid(part)"),
    ),
    ("gate * tl.sigmoid(gate) * up", "gate * up"),
)

GROUPED_SWIGLU.slip(
    "sign_of_the_exponent",
    "The sign in the exponent is missing: sigmoid(z) is 1 / (1 + exp(-z)).",
    ("tl.sigmoid(gate)", "tl.sigmoid(-gate)"),
)

GROUPED_SWIGLU.slip(
    "silu_of_the_product",
    "silu is taken of gate * up: it is of the gate alone, and up multiplies its result.",
    ("gate * tl.sigmoid(gate) * up", "gate * up * tl.sigmoid(gate * up)"),
)
