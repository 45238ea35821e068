"""When a slow process is named, and that it is named once."""

from __future__ import annotations

from trainer.straggler import StragglerWatch


def told(*intervals: tuple[int, float]) -> list[str | None]:
    watch = StragglerWatch(["north", "south", "west"])
    return [watch.look({"speed/slowest_process": float(p), "speed/slowest_ratio": r}) for p, r in intervals]


def test_the_same_process_three_times_in_a_row_is_named_once() -> None:
    lines = told(*[(2, 1.5)] * 7)
    assert [line is not None for line in lines] == [False, False, True, False, False, False, False]
    assert lines[2] is not None
    assert "process 2 on west" in lines[2]
    assert "1.50 times" in lines[2]


def test_taking_turns_or_small_ratios_name_nobody() -> None:
    assert not any(told(*[(0, 1.5), (1, 1.5), (2, 1.5)] * 3))
    assert not any(told(*[(1, 1.29)] * 9))
    assert not any(told(*[(1, 2.0), (1, 2.0), (1, 1.1)] * 3))


def test_another_or_a_new_slowness_is_told_again() -> None:
    lines = told(*[(0, 2.0)] * 3, *[(1, 2.0)] * 3, (1, 1.0), *[(1, 2.0)] * 3)
    assert [i for i, line in enumerate(lines) if line] == [2, 5, 9]


def test_one_process_alone_has_no_ratio() -> None:
    watch = StragglerWatch(["here"])
    assert not any(watch.look({"train/loss": 1.0}) for _ in range(5))
