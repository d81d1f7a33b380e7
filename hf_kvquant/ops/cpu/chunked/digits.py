"""Products with int8 codes by the processor's products of bytes, through torch: the other factor in digits."""

from __future__ import annotations

import functools

import torch

from .workspace import workspace

_BITS = 8  # of a digit, which is -128 ... 127
# Below so many codes of a head waking the threads for its product takes longer than everything else; from so many rows
# on their digits do.
_FEWEST_CODES, _MOST_ROWS = 1 << 19, 16


def pay(num_rows: int, num_codes: int) -> bool:
    """Whether digits are the faster way for `num_rows` rows and `num_codes` codes of a head."""
    return num_rows <= _MOST_ROWS and num_codes >= _FEWEST_CODES and _are_exact()


@functools.cache
def _are_exact() -> bool:
    """Whether torch multiplies bytes by the processor's instructions for it, and exactly.

    oneDNN does; without it torch has a plain loop, and on older instructions pairs of products may saturate.
    """
    has_instructions = getattr(torch.cpu, "_is_vnni_supported", bool)() and torch.backends.mkldnn.is_available()
    if not has_instructions or not hasattr(torch, "_int_mm"):
        return False
    codes = torch.arange(64 * 40, dtype=torch.int32, device="cpu").remainder(256).sub(128).view(40, 64)
    codes[:4] = -128
    digits = codes[:9]
    return torch.equal(torch._int_mm(digits.to(torch.int8), codes.to(torch.int8).T), digits @ codes.T)


class Digits:
    """Rows fp32 `[B, H, R, N]` in P digits of 8 bits, from each row's largest number down. The rows are overwritten.

    `digits`, int8 `[B, H, P * R, N]`, is this thread's until the next `Digits`. `sums @ (products with them)`, with
    `sums` `[B, H, R, P * R]`, are the products with the rows. P is 2 or 3; without `signed` no number is negative.
    """

    def __init__(self, rows: torch.Tensor, num_places: int, signed: bool = True) -> None:
        batch_size, num_heads, num_rows, count = rows.shape
        # NaN and infinity go on to all products of the row.
        largest = (rows.abs() if signed else rows).amax(dim=-1, keepdim=True).clamp_(min=1e-30)
        # Adding 2^23 rounds to an integer, which then lies in the float's last bits (1.5 times as much: below zero as
        # well). Half a digit more in the lower places makes these 0 ... 255, flipping their first bits -128 ... 127.
        zero = 3 << 22 if signed else 2 << 22
        halves = sum(1 << (_BITS * place - 1) for place in range(1, num_places))
        scale = largest * (1 / min(127 << _BITS * (num_places - 1), 63 << 16 if signed else 127 << 16))
        bits = rows.mul_(scale.reciprocal()).add_(zero + halves).view(torch.int32).bitwise_xor_(halves)
        if signed:
            bits.sub_(1 << 22)
        by_place = workspace("digits", torch.int8, (batch_size, num_heads, num_places, num_rows, count))
        for place in range(num_places):
            by_place[:, :, place] = bits if place == 0 else bits.bitwise_right_shift_(_BITS)
        self.digits = by_place.flatten(2, 3)
        self.sums = scale * _places(num_rows, num_places)

    def dot(self, codes: torch.Tensor, sequences: slice, heads: slice) -> torch.Tensor:
        """Products `[B', H', R, L]` with the codes int8 `[B', H', L, N]` of some sequences and heads."""
        digits = self.digits[sequences, heads]
        products = workspace("products", torch.int32, (*digits.shape[:3], codes.shape[2]))
        _multiply(digits, codes.transpose(2, 3), products)
        return self.sums[sequences, heads] @ workspace("floats", torch.float32, tuple(products.shape)).copy_(products)

    def weigh(self, codes: torch.Tensor, sequences: slice, heads: slice, columns: slice) -> torch.Tensor:
        """The products `[B', H', R, D]` of some columns of the rows with as many codes int8 `[B', H', n, D]`."""
        digits = self.digits[sequences, heads, :, columns]
        products = digits.new_empty(*digits.shape[:3], codes.shape[3], dtype=torch.int32)
        _multiply(digits, codes, products)
        return self.sums[sequences, heads] @ products.to(torch.float32)


def _multiply(digits: torch.Tensor, codes: torch.Tensor, products: torch.Tensor) -> None:
    for x, y, out in zip(digits.flatten(0, 1), codes.flatten(0, 1), products.flatten(0, 1), strict=True):
        torch._int_mm(x, y, out=out)


@functools.cache
def _places(num_rows: int, num_places: int) -> torch.Tensor:
    """`[R, P * R]`: what adds up the digits of each row by their places."""
    with torch.inference_mode(False):
        weights = torch.tensor([float(1 << _BITS * place) for place in range(num_places)], device="cpu")
        return torch.eye(num_rows, device="cpu").repeat(1, num_places) * weights.repeat_interleave(num_rows)
