"""Which steps of a long process a shorter one visits, from a few characters of text.

How many they are depends on the text alone, so a config can be checked without the tables of its process.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, repeat

from data_pipeline.errors import ConfigError

FORMS = 'a number such as 100, sections such as "10,15,20", "ddim50", "quadratic50", "logsnr20" or "karras20"'
KARRAS_RHO = 7.0  # Karras et al. 2022, table 1
LARGEST_SIGMA = 80.0  # ibid.: sigma / alpha above which images leave hardly a trace


def count_timesteps(num_timesteps: int, respacing: str | int) -> int:
    """How many of 0 .. num_timesteps - 1 a respaced process keeps. Raises ConfigError as `space_timesteps` does."""
    any_noise = [-float(step) for step in range(num_timesteps)]
    return len(space_timesteps(num_timesteps, respacing, any_noise))


def space_timesteps(num_timesteps: int, respacing: str | int, half_logsnr: Sequence[float]) -> tuple[int, ...]:
    """Steps of 0 .. num_timesteps - 1 that a respaced process keeps, ascending.

    - "100": a hundred, evenly spaced, both ends included (Nichol & Dhariwal 2021, section 4).
    - "10,15,20": the process cut into equal sections, that many evenly spaced steps from each.
    - "ddim50": fifty by a fixed integer stride from step 0 (Song et al. 2021, appendix D.2, "linear").
    - "quadratic50": fifty at c * i², dense where there is little noise (ibid., "quadratic").
    - "logsnr20": twenty, evenly spaced in lambda = log(alpha / sigma) (Lu et al. 2022).
    - "karras20": twenty, evenly spaced in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5).

    The last two take the steps whose lambda is nearest, each once: the last step, where sampling starts, and from
    sigma / alpha = 80 on (or from there, if that is less) down to step 0. Most of the way of the cosine schedule's
    sigma / alpha, up to 8e4 at T = 4000, lies above and is a matter of its last few steps.

    Args:
        half_logsnr: lambda of every step, [num_timesteps], falling.

    Raises ConfigError for other words and for more steps than there are.
    """
    text = str(respacing).strip()
    for prefix, space in (("ddim", _strided), ("quadratic", _quadratic)):
        if text.startswith(prefix):
            return space(num_timesteps, _count(text[len(prefix) :], text))
    for prefix, spread in (("logsnr", _evenly), ("karras", _karras)):
        if text.startswith(prefix):
            count = _few_enough(num_timesteps, _count(text[len(prefix) :], text), prefix)
            lowest = max(half_logsnr[-1], -math.log(LARGEST_SIGMA))
            return _nearest(half_logsnr, [*spread(half_logsnr[0], lowest, count - 1), half_logsnr[-1]])
    return _sections(num_timesteps, [_count(word, text) for word in text.split(",")])


def _count(word: str, text: str) -> int:
    if not word.strip().isdecimal() or int(word) < 1:
        raise ConfigError(f"respacing={text!r} is not understood; use {FORMS}.")
    return int(word)


def _sections(num_timesteps: int, counts: list[int]) -> tuple[int, ...]:
    if counts == [1]:
        return (num_timesteps - 1,)  # a single step must start from pure noise
    steps: list[int] = []
    start = 0
    for number, count in enumerate(counts):
        size = num_timesteps // len(counts) + (number < num_timesteps % len(counts))
        if count > size:
            raise ConfigError(
                f"respacing={','.join(map(str, counts))!r}: {count} steps were asked of {size}; use {size} or fewer."
            )
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        # Strides are added up, not multiplied: so halves round as they do in the published code.
        steps += [start + round(place) for place in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += size
    return tuple(steps)


def _strided(num_timesteps: int, count: int) -> tuple[int, ...]:
    lengths = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps, 0, -1)}
    if count not in lengths:
        nearest = sorted(lengths, key=lambda length: abs(length - count))[:2]
        raise ConfigError(
            f"respacing='ddim{count}': no integer stride takes exactly {count} of {num_timesteps} steps; "
            f"use {' or '.join(f'ddim{n}' for n in sorted(nearest))}."
        )
    return tuple(range(0, num_timesteps, lengths[count]))


def _few_enough(num_timesteps: int, count: int, prefix: str) -> int:
    if count > num_timesteps:
        raise ConfigError(
            f"respacing='{prefix}{count}': there are {num_timesteps} steps; use {prefix}{num_timesteps} or fewer."
        )
    return count


def _quadratic(num_timesteps: int, count: int) -> tuple[int, ...]:
    last = max(_few_enough(num_timesteps, count, "quadratic") - 1, 1)
    # c * i² from 0 to T - 1; where c * i² grows by less than a step, the steps stay one apart.
    first = num_timesteps - 1 if count == 1 else 0
    return tuple(first or max((num_timesteps - 1) * i * i // (last * last), i) for i in range(count))


def _evenly(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from one to another, both included; one alone is the first."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def _karras(first: float, last: float, count: int) -> list[float]:
    """`count` lambdas that are evenly spaced in (sigma / alpha)^(1 / rho); sigma / alpha is exp(-lambda)."""
    roots = _evenly(math.exp(-first / KARRAS_RHO), math.exp(-last / KARRAS_RHO), count)
    return [-KARRAS_RHO * math.log(root) for root in roots]


def _nearest(half_logsnr: Sequence[float], places: Sequence[float]) -> tuple[int, ...]:
    """The steps nearest to falling places in lambda, each once: where several share one, they move apart."""
    rising = [-value for value in half_logsnr]
    steps: list[int] = []
    for place in places:
        after = min(max(bisect_left(rising, -place), 1), len(rising) - 1)
        nearest = after - (-place - rising[after - 1] < rising[after] + place)
        steps.append(max(nearest, steps[-1] + 1) if steps else nearest)
    room = len(rising) - 1
    for i in reversed(range(len(steps))):
        steps[i] = min(steps[i], room)
        room = steps[i] - 1
    return tuple(steps)
