"""Kernels of the coordinate engine on a GPU (see ``models.coordinate_gpu``), in Triton.

Units are rows of ``width``, of which ``h`` are real; all arithmetic is in float32, whatever they are stored
in. Program k goes through part ``k % parts`` of image ``k // parts``, which is ``N_ROWS`` of its pixels, R
at a time, C units of each. C and OUTS are powers of 2. Sums over pixels are a row for each program.
"""

import triton
import triton.language as tl

SIZES = ("n_pixels", "parts", "h")  # one making for all of them


@triton.jit
def _activated(x, RELU: tl.constexpr):
    """The activation of x; what is not a number stays so."""
    up_to = tl.where(x > 15.0, 15.0, x)  # tanh is 1 from 9 on
    return tl.where(x < 0.0, 0.0, x) if RELU else 1.0 - 2.0 / (1.0 + tl.exp(2.0 * up_to))


@triton.jit
def _slope(y, RELU: tl.constexpr):
    """Derivative of the activation where its value is y."""
    return tl.where(y > 0.0, 1.0, 0.0) if RELU else 1.0 - y * y


@triton.jit
def _rows(n_pixels, parts, step, N_ROWS: tl.constexpr, R: tl.constexpr):
    """Rows of a step of this program, and which of them are its own."""
    program = tl.program_id(0)
    pixel = (program % parts) * N_ROWS + step + tl.arange(0, R)
    own = (pixel < n_pixels) & (pixel < (program % parts + 1) * N_ROWS)
    return ((program // parts) * n_pixels + pixel).to(tl.int64), own


@triton.jit(do_not_specialize=SIZES)
def first(
    points, weight, of_z, bias, units, n_pixels, parts, h, width,
    RELU: tl.constexpr, ACTIVATE: tl.constexpr, N_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """First layer of points (pixels, 2), with z's part (images, h); a bias only if it is activated."""
    unit = tl.arange(0, C)
    image = tl.program_id(0) // parts
    wx = tl.load(weight + 2 * unit, unit < h, 0.0)[None, :]
    wy = tl.load(weight + 2 * unit + 1, unit < h, 0.0)[None, :]
    of_image = tl.load(of_z + image * h + unit, unit < h, 0.0)[None, :]
    if ACTIVATE:
        of_image += tl.load(bias + unit, unit < h, 0.0)[None, :]
    for step in range(0, N_ROWS, R):
        row, own = _rows(n_pixels, parts, step, N_ROWS, R)
        x = tl.load(points + 2 * row, own, 0.0)[:, None]
        y = tl.load(points + 2 * row + 1, own, 0.0)[:, None]
        made = x * wx + y * wy + of_image
        if ACTIVATE:
            made = _activated(made, RELU)
        place = units + row[:, None] * width + unit[None, :]
        tl.store(place, made.to(units.dtype.element_ty), own[:, None] & (unit < width)[None, :])


@triton.jit(do_not_specialize=SIZES)
def activate(
    units, bias, n_pixels, parts, h, width,
    RELU: tl.constexpr, N_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Adds a bias to units and activates them, in place."""
    unit = tl.arange(0, C)
    added = tl.load(bias + unit, unit < h, 0.0)[None, :]
    for step in range(0, N_ROWS, R):
        row, own = _rows(n_pixels, parts, step, N_ROWS, R)
        place = units + row[:, None] * width + unit[None, :]
        here = own[:, None] & (unit < width)[None, :]
        made = _activated(tl.load(place, here, 0.0).to(tl.float32) + added, RELU)
        tl.store(place, made.to(units.dtype.element_ty), here)


@triton.jit(do_not_specialize=SIZES)
def last(
    units, bias, weight, bias_out, output, n_pixels, parts, h, width,
    N_OUT: tl.constexpr, RELU: tl.constexpr, N_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Outputs (pixels, N_OUT) of units before bias and activation."""
    unit = tl.arange(0, C)
    added = tl.load(bias + unit, unit < h, 0.0)[None, :]
    for step in range(0, N_ROWS, R):
        row, own = _rows(n_pixels, parts, step, N_ROWS, R)
        here = own[:, None] & (unit < width)[None, :]
        before = tl.load(units + row[:, None] * width + unit[None, :], here, 0.0).to(tl.float32)
        value = _activated(before + added, RELU)
        for k in tl.static_range(N_OUT):
            w = tl.load(weight + k * h + unit, unit < h, 0.0)[None, :]
            tl.store(output + row * N_OUT + k, tl.sum(value * w, 1) + tl.load(bias_out + k), own)


@triton.jit(do_not_specialize=SIZES)
def last_backward(
    gradient, units, bias, weight, made, of_bias, of_weight, n_pixels, parts, h, width,
    N_OUT: tl.constexpr, OUTS: tl.constexpr,
    RELU: tl.constexpr, N_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient ``made`` of those units, of the outputs'; sums for the bias and the weight (N_OUT, h)."""
    program = tl.program_id(0)
    unit = tl.arange(0, C)
    out = tl.arange(0, OUTS)[:, None]
    added = tl.load(bias + unit, unit < h, 0.0)[None, :]
    sum_of_bias = tl.zeros((C,), tl.float32)
    sum_of_weight = tl.zeros((OUTS, C), tl.float32)
    for step in range(0, N_ROWS, R):
        row, own = _rows(n_pixels, parts, step, N_ROWS, R)
        place = row[:, None] * width + unit[None, :]
        here = own[:, None] & (unit < width)[None, :]
        value = _activated(tl.load(units + place, here, 0.0).to(tl.float32) + added, RELU)
        of_units = tl.zeros((R, C), tl.float32)
        for k in tl.static_range(N_OUT):
            of_output = tl.load(gradient + row * N_OUT + k, own, 0.0)[:, None]
            of_units += of_output * tl.load(weight + k * h + unit, unit < h, 0.0)[None, :]
            sum_of_weight += tl.where(out == k, tl.sum(of_output * value, 0)[None, :], 0.0)
        of_units *= _slope(value, RELU)
        sum_of_bias += tl.sum(of_units, 0)
        tl.store(made + place, of_units.to(made.dtype.element_ty), here)
    tl.store(of_bias + program * h + unit, sum_of_bias, unit < h)
    place = of_weight + (program * N_OUT + out) * h + unit[None, :]
    tl.store(place, sum_of_weight, (out < N_OUT) & (unit < h)[None, :])


@triton.jit(do_not_specialize=SIZES)
def slope(
    gradient, units, of_bias, n_pixels, parts, h, width,
    RELU: tl.constexpr, N_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of activated units to that of the units before, in place; sums for the bias."""
    unit = tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    for step in range(0, N_ROWS, R):
        row, own = _rows(n_pixels, parts, step, N_ROWS, R)
        place = row[:, None] * width + unit[None, :]
        here = own[:, None] & (unit < width)[None, :]
        slope = _slope(tl.load(units + place, here, 0.0).to(tl.float32), RELU)
        made = tl.load(gradient + place, here, 0.0).to(tl.float32) * slope
        total += tl.sum(made, 0)
        tl.store(gradient + place, made.to(gradient.dtype.element_ty), here)
    tl.store(of_bias + tl.program_id(0) * h + unit, total, unit < h)


@triton.jit(do_not_specialize=SIZES)
def first_backward(
    gradient, units, points, weight, of_points, of_z, of_weight, n_pixels, parts, h, width,
    RELU: tl.constexpr, ACTIVATED: tl.constexpr, N_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of points (pixels, 2); sums for z's part and the weight (h, 2)."""
    program = tl.program_id(0)
    unit = tl.arange(0, C)
    wx = tl.load(weight + 2 * unit, unit < h, 0.0)[None, :]
    wy = tl.load(weight + 2 * unit + 1, unit < h, 0.0)[None, :]
    total = tl.zeros((C,), tl.float32)
    total_x = tl.zeros((C,), tl.float32)
    total_y = tl.zeros((C,), tl.float32)
    for step in range(0, N_ROWS, R):
        row, own = _rows(n_pixels, parts, step, N_ROWS, R)
        place = row[:, None] * width + unit[None, :]
        here = own[:, None] & (unit < width)[None, :]
        made = tl.load(gradient + place, here, 0.0).to(tl.float32)
        if ACTIVATED:
            made *= _slope(tl.load(units + place, here, 0.0).to(tl.float32), RELU)
        tl.store(of_points + 2 * row, tl.sum(made * wx, 1), own)
        tl.store(of_points + 2 * row + 1, tl.sum(made * wy, 1), own)
        total += tl.sum(made, 0)
        total_x += tl.sum(made * tl.load(points + 2 * row, own, 0.0)[:, None], 0)
        total_y += tl.sum(made * tl.load(points + 2 * row + 1, own, 0.0)[:, None], 0)
    tl.store(of_z + program * h + unit, total, unit < h)
    tl.store(of_weight + 2 * (program * h + unit), total_x, unit < h)
    tl.store(of_weight + 2 * (program * h + unit) + 1, total_y, unit < h)
