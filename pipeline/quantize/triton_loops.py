"""What ``triton_kernels`` launches. Importing this needs Triton."""

# Triton reads these functions' source: what they take are pointers and numbers, and what they call are its own names.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2


@triton.jit
def solve_block(
    target,
    weight,
    feedback,
    group,
    scale,
    zero,
    pivot,
    added,
    step,
    error,
    loss,
    error_norm,
    num_rows,
    num_columns,
    width,
    num_groups,
    max_code,
    PUSH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Solve ROWS rows of one block of at most COLUMNS columns, of a linear of ``width`` columns in all."""
    # Which linear. 64 bits: what all of them hold may not fit 32.
    n = tl.program_id(1).to(tl.int64)
    target += n * num_columns * num_rows
    weight += n * width * num_rows
    step += n * width * num_rows
    error += n * width * num_rows
    feedback += n * num_columns * num_columns
    group += n * width
    pivot += n * width
    added += n * width
    scale += n * num_groups * num_rows
    zero += n * num_groups * num_rows
    loss += n * num_rows
    error_norm += n * num_rows
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_rows
    column_B = tl.arange(0, COLUMNS)
    is_there_BR = (column_B[:, None] < num_columns) & is_row_R[None, :]
    target_BR = tl.load(target + column_B[:, None] * num_rows + row_R[None, :], mask=is_there_BR, other=0.0)
    loss_R = tl.load(loss + row_R, mask=is_row_R, other=0.0)
    error_norm_R = tl.load(error_norm + row_R, mask=is_row_R, other=0.0)
    for j in range(num_columns):
        own_R = tl.sum(tl.where(column_B[:, None] == j, target_BR, 0.0), axis=0)
        grid_R = tl.load(group + j) * num_rows + row_R
        scale_R = tl.load(scale + grid_R, mask=is_row_R, other=1.0)
        zero_R = tl.load(zero + grid_R, mask=is_row_R, other=0.0)
        weight_R = tl.load(weight + j * num_rows + row_R, mask=is_row_R, other=0.0)
        # Not ``clamp``, which is free to lose a NaN; what is lost here is found by the error, which is made of it.
        step_R = tl.math.div_rn(own_R, scale_R)
        step_R = tl.minimum(step_R, max_code - zero_R, propagate_nan=tl.PropagateNan.ALL)
        step_R = tl.maximum(step_R, -zero_R, propagate_nan=tl.PropagateNan.ALL)
        step_R = (step_R + PUSH) - PUSH
        error_R = weight_R - step_R * scale_R
        tl.store(step + j * num_rows + row_R, step_R, mask=is_row_R)
        tl.store(error + j * num_rows + row_R, error_R, mask=is_row_R)
        residual_R = (own_R - step_R * scale_R).to(tl.float64)
        squared_R = error_R.to(tl.float64) * error_R.to(tl.float64)
        loss_R += tl.load(pivot + j) * residual_R * residual_R - tl.load(added + j) * squared_R
        error_norm_R += squared_R
        # Column j of the transposed feedback: what feeds from j into every column after it.
        feeds_B = (column_B > j) & (column_B < num_columns)
        feedback_B = tl.load(feedback + column_B * num_columns + j, mask=feeds_B, other=0.0)
        target_BR += feedback_B[:, None] * error_R[None, :]
    tl.store(loss + row_R, loss_R, mask=is_row_R)
    tl.store(error_norm + row_R, error_norm_R, mask=is_row_R)


@triton.jit
def add_products(moment, x, num_tokens, width, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    """Add one tile on or below the diagonal, and its mirror."""
    # Tiles are numbered row by row: row i begins at i (i + 1) / 2. The root is good enough to be off by one at most.
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    # 64 bits: the square of a width may not fit 32.
    row_I = (i * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    column_J = (j * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    is_row_I, is_column_J = row_I < width, column_J < width
    sum_IJ = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for start in range(0, num_tokens, TOKENS):
        token_T = (start + tl.arange(0, TOKENS)).to(tl.int64)
        is_token_T = token_T < num_tokens
        left_IT = tl.load(
            x + token_T[None, :] * width + row_I[:, None], mask=is_token_T[None, :] & is_row_I[:, None], other=0.0
        )
        right_TJ = tl.load(
            x + token_T[:, None] * width + column_J[None, :], mask=is_token_T[:, None] & is_column_J[None, :], other=0.0
        )
        sum_IJ = tl.dot(left_IT, right_TJ, sum_IJ)
    place_IJ = moment + row_I[:, None] * width + column_J[None, :]
    is_there_IJ = is_row_I[:, None] & is_column_J[None, :]
    sum_IJ += tl.load(place_IJ, mask=is_there_IJ, other=0.0)
    tl.store(place_IJ, sum_IJ, mask=is_there_IJ)
    mirror_IJ = moment + column_J[None, :] * width + row_I[:, None]
    tl.store(mirror_IJ, sum_IJ, mask=is_there_IJ & (i != j))
