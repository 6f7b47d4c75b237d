"""What every kernel file shares: the matrix product, and the one reading of Triton's interpret flag."""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


def interpreted() -> bool:
    """Whether kernels of this process run on the CPU, under Triton's interpreter."""
    return INTERPRET.value


@triton.jit
def dot(a, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, with operands of type OPERAND, accumulated in acc's dtype (float32, or float64 when interpreted).

    PRECISION ("ieee", "tf32" or "tf32x3") is for float32 operands. The interpreter holds bfloat16 as integers, and
    rounds towards zero on the way there, so its products are taken in acc's dtype.
    """
    if INTERPRET:
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION)


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """x in the type of a product's operands; as it is where interpreted, see `dot`."""
    if INTERPRET:
        return x
    else:
        return x.to(OPERAND)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate to a few units in the last place also where x is small (Kahan's correction)."""
    u = 1 + x
    small = u == 1
    return tl.where(small, x, tl.log(u) * (x / tl.where(small, 1.0, u - 1)))
