"""The Triton kernel of `coding`: everything about a block of vectors in one launch.

A program takes a block of vectors and reads them three times: for their lengths, to project them, and for what the
projection leaves over. Codes are whitened where they are compared, so nothing has to be kept beside the book.

Imported late: `import noesis` does not import triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout_triton import INFINITY
from . import reference
from .reference import Book, Coded

SHORTEST = tl.constexpr(reference.SHORTEST)
LARGEST_FINITE = tl.constexpr(float(torch.finfo(torch.float32).max))
#: Vectors a program takes, channels and codes it reads at a time; the least that a matrix product takes.
ROWS, CHANNELS, CODES = 16, 16, 32
#: With fewer, registers spill.
WARPS = 8


@triton.jit
def _vectors(p_vectors, o_row, o_channel, rows, channels):
    """A tile [ROWS, CHANNELS], and which of it is there."""
    there = (o_row < rows)[:, None] & (o_channel < channels)[None, :]
    x = tl.load(p_vectors + o_row[:, None] * channels + o_channel[None, :], mask=there, other=0.0)
    return x.to(tl.float32), there


@triton.jit(do_not_specialize=["rows"])
def code_kernel(
    p_vectors,
    p_centre,
    p_projection,
    p_whiten,
    p_codes,
    p_log_weights,
    p_constant,
    p_residual,
    p_norm,
    p_parts,
    p_nearest,
    rows: tl.int64,
    channels,
    dim,
    codes,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CODES: tl.constexpr,
    DIM: tl.constexpr,
):
    """`coding.code_reference` for ROWS vectors: parts [4, rows] are mixture, residual, norm and distance."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_channel = tl.arange(0, CHANNELS)
    o_dim = tl.arange(0, DIM)
    in_dim = o_dim < dim

    largest = tl.zeros([ROWS], tl.float32)
    finite = tl.full([ROWS], 1, tl.int32)
    for start in range(0, channels, CHANNELS):
        x, there = _vectors(p_vectors, o_row, start + o_channel, rows, channels)
        size = tl.abs(x)
        good = size <= LARGEST_FINITE  # false for NaN too
        finite = finite & tl.min(good.to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.where(good, size, 0.0), 1))
    largest = tl.maximum(largest, SHORTEST)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, CHANNELS):
        x, there = _vectors(p_vectors, o_row, start + o_channel, rows, channels)
        x = tl.where((finite > 0)[:, None] & there, x / largest[:, None], 0.0)
        squares += tl.sum(x * x, 1)
    length = tl.maximum(tl.sqrt(squares), SHORTEST)

    z = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, channels, CHANNELS):
        x, there = _vectors(p_vectors, o_row, start + o_channel, rows, channels)
        centre = tl.load(p_centre + start + o_channel, mask=start + o_channel < channels, other=0.0)
        x = tl.where((finite > 0)[:, None] & there, x / largest[:, None] / length[:, None] - centre[None, :], 0.0)
        in_tile = ((start + o_channel) < channels)[:, None] & in_dim[None, :]
        basis = tl.load(p_projection + (start + o_channel)[:, None] * dim + o_dim[None, :], mask=in_tile, other=0.0)
        z += tl.dot(x, basis, input_precision="ieee")
    outside = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, CHANNELS):
        x, there = _vectors(p_vectors, o_row, start + o_channel, rows, channels)
        centre = tl.load(p_centre + start + o_channel, mask=start + o_channel < channels, other=0.0)
        x = tl.where((finite > 0)[:, None] & there, x / largest[:, None] / length[:, None] - centre[None, :], 0.0)
        in_tile = in_dim[:, None] & ((start + o_channel) < channels)[None, :]
        basis = tl.load(p_projection + (start + o_channel)[None, :] * dim + o_dim[:, None], mask=in_tile, other=0.0)
        left = x - tl.dot(z, basis, input_precision="ieee")
        outside += tl.sum(left * left, 1)

    square = in_dim[:, None] & in_dim[None, :]
    whiten = tl.load(p_whiten + o_dim[:, None] * dim + o_dim[None, :], mask=square, other=0.0)
    w = tl.dot(z, whiten, input_precision="ieee")
    w_squares = tl.sum(w * w, 1)
    top = tl.full([ROWS], -INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    distance = tl.full([ROWS], INFINITY, tl.float32)
    nearest = tl.zeros([ROWS], tl.int64)
    for start in range(0, codes, CODES):
        o_code = start + tl.arange(0, CODES)
        there = (o_code < codes)[:, None] & in_dim[None, :]
        code = tl.load(p_codes + o_code[:, None] * dim + o_dim[None, :], mask=there, other=0.0)
        code = tl.dot(code, whiten, input_precision="ieee")
        apart = w_squares[:, None] + tl.sum(code * code, 1)[None, :]
        apart -= 2 * tl.dot(w, tl.trans(code), input_precision="ieee")
        apart = tl.where((o_code < codes)[None, :], tl.maximum(apart, 0.0), INFINITY)
        weight = tl.load(p_log_weights + o_code, mask=o_code < codes, other=0.0)
        evidence = weight[None, :] - apart / 2
        higher = tl.maximum(top, tl.max(evidence, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(evidence - higher[:, None]), 1)
        top = higher
        least = tl.min(apart, 1)
        nearest = tl.where(least < distance, (start + tl.argmin(apart, 1)).to(tl.int64), nearest)
        distance = tl.minimum(distance, least)
    mixture = tl.load(p_constant) - (top + tl.log(total))

    away = (tl.log(tl.maximum(length * largest, SHORTEST)) - tl.load(p_norm)) / tl.load(p_norm + 1)
    there = o_row < rows
    tl.store(p_parts + o_row, tl.where(finite > 0, mixture, INFINITY), mask=there)
    tl.store(p_parts + rows + o_row, outside / (2 * tl.load(p_residual)), mask=there)
    tl.store(p_parts + 2 * rows + o_row, away * away / 2, mask=there)
    tl.store(p_parts + 3 * rows + o_row, distance, mask=there)
    tl.store(p_nearest + o_row, nearest, mask=there)


def code_triton(vectors: Tensor, book: Book) -> Coded:
    """The code lengths of vectors [N, D] in one launch; see `coding.code_reference`."""
    vectors = vectors.contiguous()
    rows, channels = vectors.shape
    codes, dim = book.codes.shape
    parts = torch.empty(4, rows, device=vectors.device)
    nearest = torch.empty(rows, dtype=torch.int64, device=vectors.device)
    if rows:
        code_kernel[triton.cdiv(rows, ROWS),](
            vectors,
            *(
                tensor.contiguous()
                for tensor in (book.centre, book.projection, book.whiten, book.codes, book.log_weights)
            ),
            book.constant,
            book.residual,
            book.norm,
            parts,
            nearest,
            rows,
            channels,
            dim,
            codes,
            ROWS,
            CHANNELS,
            CODES,
            max(16, triton.next_power_of_2(dim)),
            num_warps=WARPS,
        )
    mixture, residual, norm, distance = parts
    return Coded(mixture, residual, norm, nearest, distance)
