"""A shuffle of any length, one place at a time: nothing is stored, and any place can be asked for.

A number below n is written as two digits, (left, right) with left < a and right < b, where a·b is
the least product of like factors that is n or more. A round adds to one digit a keyed hash of the
other, modulo the digit's base: whatever the hash is, that can be undone, so the rounds together are
a permutation of a·b numbers (a Feistel network; Black and Rogaway 2002, "Ciphers with Arbitrary
Finite Domains"). Where it leads to a number of n or more it is applied again, which must come back
below n, since it runs in circles, and meets each number below n once.
"""

import hashlib
import math
from functools import cached_property

# Four are enough for a cipher whose round function is random; small bases mix less in each.
NUM_ROUNDS = 8
MASK = 2**64 - 1


class Permutation:
    """The numbers below `length` in an order that `key` decides; `permutation[i]` is the i-th."""

    def __init__(self, length: int, *key: int) -> None:
        self.length = length
        self.key = key
        self._left_base = math.isqrt(max(0, length - 1)) + 1
        self._right_base = -(-length // self._left_base)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"place {index} of {self.length}")
        number = self._rounds(index)
        while number >= self.length:
            number = self._rounds(number)
        return number

    def _rounds(self, number: int) -> int:
        left, right = divmod(number, self._right_base)
        left_base, right_base = self._left_base, self._right_base
        for left_key, right_key in self._round_keys:
            left = (left + _mix(right ^ left_key)) % left_base
            right = (right + _mix(left ^ right_key)) % right_base
        return left * right_base + right

    @cached_property
    def _round_keys(self) -> list[tuple[int, int]]:
        """64 bits for each half of a round."""
        words = ",".join(str(number) for number in (self.length, *self.key)).encode()
        content = hashlib.shake_256(words).digest(8 * NUM_ROUNDS)
        keys = [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]
        return list(zip(keys[::2], keys[1::2], strict=True))


def _mix(number: int) -> int:
    """A 64-bit hash (the finalizer of SplitMix64; Steele, Lea and Flood 2014)."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & MASK
    return number ^ (number >> 31)
