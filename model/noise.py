"""Counter-based random numbers: every draw is a pure function of (seed, step, sample, stream, counter).

Nothing here has state, so the same run draws the same numbers at any world size, micro-batch split or device, and
after any resume. The generator is SplitMix64 (Steele, Lea, Flood 2014) in wrapping 64-bit integer arithmetic.

Shapes: B sequences of a batch; trailing dimensions are the caller's.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # round(2**64 * 0.6180339887...): the Weyl increment, and the fraction phi itself
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, count: int) -> Tensor:
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64 that flips half of the output bits for any input bit."""
    x = (x ^ _shift_right(x, 30)).mul_(_signed(_MIX1))
    x = (x ^ _shift_right(x, 27)).mul_(_signed(_MIX2))
    return x ^ _shift_right(x, 31)


def _mix_integer(x: int) -> int:
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def stream_key(seed: int, name: str) -> int:
    """The unsigned 64-bit key of a named stream under a seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def step_key(seed: int, step: int, name: str) -> int:
    """The unsigned 64-bit key of a named stream at one step of a run."""
    return _mix_integer(stream_key(seed, name) + _mix_integer(step))


@dataclass(frozen=True)
class Stream:
    """One source of numbers per sequence: `key_B` int64, any two streams independent."""

    key_B: Tensor

    def fold(self, value: int) -> "Stream":
        """The sub-stream number `value` (a layer, a site, a sampling step)."""
        return Stream(_mix(self.key_B + _signed(_mix_integer(value + 1))))

    def bits(self, *shape: int) -> Tensor:
        """Uniform int64 of shape [B, *shape]; element n of a row is a function of its key and n alone."""
        count = math.prod(shape)
        counter = torch.arange(1, count + 1, dtype=torch.int64, device=self.key_B.device).mul_(_signed(_GOLDEN))
        return _mix(self.key_B[:, None] + counter).view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Float64 in (0, 1) of shape [B, *shape]: 52 random bits and a half, so never 0 and never 1."""
        return _unit_interval(self.bits(*shape))

    def below(self, probability: Tensor) -> Tensor:
        """Bernoulli draws, one per element of `probability` [B, ...], compared as 32-bit integers.

        The rounding hides the last bits of `probability`, in which devices may differ.
        """
        threshold = (probability.double() * 2.0**32).round().to(torch.int64)
        return _shift_right(self.bits(*probability.shape[1:]), 32) < threshold

    def bernoulli(self, probability: float, *shape: int) -> Tensor:
        """Draws of shape [B, *shape] that are True with one probability, compared as 32-bit integers."""
        return _shift_right(self.bits(*shape), 32) < round(probability * 2.0**32)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 of shape [B, *shape], two from each 64-bit word (Box-Muller)."""
        count = math.prod(shape)
        words = self.bits((count + 1) // 2)
        first, second = _half_word(_shift_right(words, 32)), _half_word(words.bitwise_and_((1 << 32) - 1))
        radius = torch.sqrt(-2.0 * torch.log(first))
        angle = (2.0 * math.pi) * second
        pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        return pairs.flatten(1)[:, :count].reshape(-1, *shape)

    def at(self, sequence_M: Tensor, number_M: Tensor) -> "Stream":
        """One sub-stream for each of M places: number_M within the sequence sequence_M of the batch."""
        return Stream(_mix(self.key_B[sequence_M] + _mix(number_M + 1)))

    def gumbel(self, *shape: int) -> Tensor:
        """Standard Gumbel draws in float64 (float32 would truncate the tail)."""
        return -torch.log(-torch.log(self.uniform(*shape)))


def _half_word(bits: Tensor) -> Tensor:
    """Float32 in (0, 1] from integers below 2^32."""
    return (bits.float() + 0.5) * 2.0**-32


def _unit_interval(bits: Tensor) -> Tensor:
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


@dataclass(frozen=True)
class NoiseKey:
    """What a random number of a batch depends on: the run's seed, the step, and each sequence's global index.

    Args:
        seed: the run's seed.
        step: the optimizer step, or a sampling step.
        index_B: global sample indices, int64 [B].
    """

    seed: int
    step: int
    index_B: Tensor

    def stream(self, name: str) -> Stream:
        """The named stream of every sequence in the batch."""
        return Stream(_mix(_mix(self.index_B) + _signed(step_key(self.seed, self.step, name))))

    def stratified(self, name: str = "time", num_segments: int = 1) -> Tensor:
        """Float64 [B, S] in (0, 1): frac(u + j phi) for global index j, so every contiguous slice is stratified.

        A Weyl sequence in 64-bit integers, bit-identical on every device; u depends on step and segment alone.
        """
        start = step_key(self.seed, self.step, name)
        starts = [_signed(start), *(_signed(_mix_integer(start + segment)) for segment in range(1, num_segments))]
        start_S = torch.tensor(starts, dtype=torch.int64).to(self.index_B.device)
        return _unit_interval(self.index_B[:, None] * _signed(_GOLDEN) + start_S)

    def rows(self, start: int, stop: int) -> "NoiseKey":
        """The key of the sequences start..stop of this batch."""
        return NoiseKey(self.seed, self.step, self.index_B[start:stop])


def bernoulli_at(key: int, probability: float, device: torch.device) -> Callable[[Tensor], Tensor]:
    """(counters, int64, any shape) -> draws of the stream `key` that are True with one probability.

    Key and probability are tensors inside, so that a compiled kernel serves every step.
    """
    base = torch.tensor(_signed(key), device=device)
    threshold = torch.tensor(round(probability * 2.0**32), device=device)
    return lambda index: _shift_right(_mix(index * _signed(_GOLDEN) + base), 32) < threshold


def normal_at(key: int, index: Tensor) -> Tensor:
    """Standard normal draws in float32 at the counters `index` (int64, any shape) of the stream `key`.

    Box-Muller in float64; a tensor split over ranks is drawn piece by piece with the same values.
    """
    base = index * 2 + _signed(key)
    radius = torch.sqrt(-2.0 * torch.log(_unit_interval(_mix(base * _signed(_GOLDEN)))))
    angle = (2.0 * math.pi) * _unit_interval(_mix((base + 1) * _signed(_GOLDEN)))
    return (radius * torch.cos(angle)).float()
