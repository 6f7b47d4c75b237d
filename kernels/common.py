"""What every kernel file shares: the matrix product, and the one reading of Triton's interpret flag."""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


def interpreted() -> bool:
    """Whether kernels of this process run on the CPU, under Triton's interpreter."""
    return INTERPRET.value


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in acc's dtype (float32, or float64 when interpreted).

    PRECISION ("ieee", "tf32" or "tf32x3") is for float32 operands. The interpreter holds bfloat16 as integers, so its
    products are taken in acc's dtype.
    """
    if INTERPRET:
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
