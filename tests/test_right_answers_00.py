"""Lesson 00: right answers in other styles pass."""

import numpy as np
import torch
from right_answers import Answers, passes

right = Answers()


@right("00.1")
def by_a_tensor(flops, nbytes):
    return torch.tensor(flops, dtype=torch.float64) / nbytes


@right("00.1")
def by_numpy(f, b):
    return np.divide(f, b)


@right("00.1")
def by_an_array_without_axes(flops, nbytes):
    return np.asarray(flops / nbytes)


@right("00.2")
def in_floats(M, N, K, itemsize):
    return 2.0 * M * N * K, 1.0 * itemsize * (M * K + K * N + M * N)


@right("00.2")
def by_tensors_without_memory(M, N, K, itemsize):
    dtype = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    a, b = torch.empty(M, K, dtype=dtype, device="meta"), torch.empty(K, N, dtype=dtype, device="meta")
    return [2 * M * N * K, a.nbytes + b.nbytes + itemsize * M * N]


@right("00.2")
def counted_one_by_one(M, K, N, itemsize):  # the sizes may be exchanged, the count is the same
    flops = 0
    for _ in range(M * N):
        flops += 2 * K
    return flops, sum(itemsize * rows * columns for rows, columns in ((M, K), (K, N), (M, N)))


@right("00.3")
def by_the_speed(flops, nbytes, peak, bandwidth):
    return flops / min(peak, flops / nbytes * bandwidth)


@right("00.3")
def by_the_ridge(flops, nbytes, peak, bandwidth):
    if flops / nbytes < peak / bandwidth:
        return nbytes / bandwidth
    return flops / peak


@right("00.3")
def by_sorting(flops, nbytes, peak, bandwidth):
    return torch.tensor([flops / peak, nbytes / bandwidth]).sort().values[-1]


@right("00.4")
def row_by_row(x, scale):
    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            y[b, t] = x[b, t] * scale[b, t]
    return y


@right("00.4")
def by_diagonals(x, scale):
    return torch.diag_embed(scale) @ x


@right("00.4")
def with_the_columns_first(x, scale):
    return (x.permute(2, 0, 1) * scale).permute(1, 2, 0)


@right("00.4")
def in_place_on_a_wide_copy(x, scale):
    y = x.double().clone()
    y *= scale[:, :, None]
    return y.to(x.dtype)


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)
