"""Where a program's tile lies, for the kernels of several techniques: bands of tiles, and rows that are experts'.

Rows are sorted by expert, and `ends` [E] on the device says where each expert's rows end. Its tiles of BLOCK rows have
the numbers ("slots") from ends[e-1] // BLOCK + e on, found without a sum over experts: N // BLOCK + E slots hold
all, and one between two experts may be empty. No tile holds rows of two experts.
"""

from minids import triton_env  # noqa: F401  before triton: it chooses the interpreter where there is no GPU

import triton  # isort: skip
import triton.language as tl  # isort: skip


@triton.jit
def band(program, HEIGHT, COLUMNS):
    """(row, column) of a program among tiles: down 8 rows, which share what they read, then on to their next column."""
    above, inside = program // (8 * COLUMNS) * 8, program % (8 * COLUMNS)
    height = tl.minimum(HEIGHT - above, 8)
    return above + inside % height, inside // height


@triton.jit
def expert_rows(ends, slot, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """(expert, first row, row after the expert's last) of a slot of BLOCK rows; first >= last in an empty one."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends + e, mask=e < E, other=0).to(tl.int32)
    expert = tl.sum(((end // BLOCK + e < slot) & (e < E)).to(tl.int32))
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    last = tl.load(ends + expert, mask=expert < E, other=0).to(tl.int32)  # past the last expert's slots: 0
    return expert, begin + (slot - begin // BLOCK - expert) * BLOCK, last
