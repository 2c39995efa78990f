"""Counter-based random numbers: Philox-4x32-10 in integer arithmetic.

A generator with state would tie a request's tokens to the order in which requests were sampled. Philox (Salmon,
Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11) is a function from (key, counter) to
128 random bits, so the number for "output token 17 of the request seeded 42" is the same in every batch, slot,
device and replica, can be recomputed after a preemption, and needs no state on the device.

Words are unsigned 32-bit values held in int64. Nothing here waits for a device.

Shape suffixes: R rows, W words (4 of a counter, 2 of a key), 2 a pair of words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from workers.kernels.triton_found import has_triton

#: Multipliers and Weyl constants of Philox-4x32, and its recommended number of rounds.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

_WORD = 0xFFFFFFFF

_Array = TypeVar("_Array", torch.Tensor, npt.NDArray[np.int64])


def philox_4x32(counter_RW: torch.Tensor, key_R2: torch.Tensor) -> torch.Tensor:
    """128 random bits per row.

    Args:
        counter_RW: int64 [R, 4], each word in [0, 2**32).
        key_R2: int64 [R, 2], each word in [0, 2**32).

    Returns:
        int64 [R, 4], each word in [0, 2**32); equal to Random123's ``philox4x32_R(10, ...)``.
    """
    even_R2, odd_R2 = counter_RW[:, 0::2], counter_RW[:, 1::2]
    if counter_RW.device.type == "cpu" and not torch.compiler.is_compiling():
        # Ninety operations on a handful of numbers: numpy's take a fraction of the time of torch's.
        even, odd = _rounds(even_R2.numpy(), odd_R2.numpy(), key_R2.numpy(), np.array, lambda x: x[:, ::-1])
        return torch.from_numpy(np.stack((even, odd), axis=-1).reshape(-1, 4))

    def pair(values: tuple[int, int]) -> torch.Tensor:
        # Made on the device: a copy from the host is not allowed during capture.
        return torch.arange(2, device=counter_RW.device) * (values[1] - values[0]) + values[0]

    even_R2, odd_R2 = _rounds(even_R2, odd_R2, key_R2, pair, lambda x: x.flip(-1))
    return torch.stack((even_R2, odd_R2), dim=-1).flatten(1)


def _rounds(
    even_R2: _Array,
    odd_R2: _Array,
    key_R2: _Array,
    pair: Callable[[tuple[int, int]], _Array],
    swap: Callable[[_Array], _Array],
) -> tuple[_Array, _Array]:
    """Ten rounds on words 0 and 2 of the counter (``even``) and words 1 and 3 (``odd``).

    Products are taken modulo 2**64 in two's complement, which leaves their 64 bits as they are; the masks undo
    the sign extension of the shift.
    """
    multipliers_2, weyl_2 = pair(_MULTIPLIERS), pair(_WEYL)
    for _ in range(_NUM_ROUNDS):
        product_R2 = swap(even_R2 * multipliers_2)
        even_R2 = ((product_R2 >> 32) ^ odd_R2 ^ key_R2) & _WORD
        odd_R2 = product_R2 & _WORD
        key_R2 = key_R2 + weyl_2
    return even_R2, odd_R2


def philox_uniform(seed_R: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) per row, a function of (seed, index) alone.

    Args:
        seed_R: int64 [R], the key.
        index_R: int64 [R], the counter: which number of that seed's sequence.

    Returns:
        float64 [R], multiples of 2**-53.
    """
    if index_R.is_cuda and not torch.compiler.is_compiling() and has_triton():
        from workers.sampling.philox_triton import uniform

        return uniform(seed_R.contiguous(), index_R.contiguous())
    zero_R = torch.zeros_like(index_R)
    counter_RW = torch.stack((index_R & _WORD, (index_R >> 32) & _WORD, zero_R, zero_R), dim=-1)
    key_R2 = torch.stack((seed_R & _WORD, (seed_R >> 32) & _WORD), dim=-1)
    bits_RW = philox_4x32(counter_RW, key_R2)
    mantissa_R = (bits_RW[:, 0] << 21) | (bits_RW[:, 1] >> 11)
    return mantissa_R.to(torch.float64) * 2.0**-53
