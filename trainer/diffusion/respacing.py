"""Which steps of a long process a shorter one visits, from a few characters of text."""

from __future__ import annotations

from itertools import accumulate, repeat

from data_pipeline.errors import ConfigError

FORMS = 'a number such as 100, sections such as "10,15,20", "ddim50" or "quadratic50"'


def space_timesteps(num_timesteps: int, respacing: str | int) -> tuple[int, ...]:
    """Steps of 0 .. num_timesteps - 1 that a respaced process keeps, ascending.

    - "100": a hundred, evenly spaced, both ends included (Nichol & Dhariwal 2021, section 4).
    - "10,15,20": the process cut into equal sections, that many evenly spaced steps from each.
    - "ddim50": fifty by a fixed integer stride from step 0 (Song et al. 2021, appendix D.2, "linear").
    - "quadratic50": fifty at c * i², dense where there is little noise (ibid., "quadratic").

    Raises ConfigError for other words and for more steps than there are.
    """
    text = str(respacing).strip()
    for prefix, space in (("ddim", _strided), ("quadratic", _quadratic)):
        if text.startswith(prefix):
            return space(num_timesteps, _count(text[len(prefix) :], text))
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


def _quadratic(num_timesteps: int, count: int) -> tuple[int, ...]:
    if count > num_timesteps:
        raise ConfigError(
            f"respacing='quadratic{count}': there are {num_timesteps} steps; use quadratic{num_timesteps} or fewer."
        )
    last = max(count - 1, 1)
    # c * i² from 0 to T - 1; where c * i² grows by less than a step, the steps stay one apart.
    first = num_timesteps - 1 if count == 1 else 0
    return tuple(first or max((num_timesteps - 1) * i * i // (last * last), i) for i in range(count))
