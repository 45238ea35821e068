"""Memory known before a run starts: traced activations, the state's theory, and the search for a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.memory import run_job
from data_pipeline.errors import ConfigError, UserError
from trainer import micro_batch
from trainer.activations import AsOnGpu, LiveBytes, _history, activations, drop_gradients
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import UNetConfig
from trainer.config.run import RunConfig, load_config
from trainer.memory import Memory, largest_that_fits, memory_of, with_micro_batch
from trainer.micro_batch import Room, search, with_largest_micro_batch
from trainer.models import build_model, count, random_inputs
from trainer.processes import Processes

MODEL = UNetConfig(image_size=16, channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(16,))
DIFFUSION = DiffusionConfig()


def live_bytes(network: nn.Module, batch: int, context: Any) -> int:
    """The peak of a real pass on the CPU."""
    drop_gradients(network)
    x, time, conditions = random_inputs(MODEL, batch, torch.device("cpu"))
    with LiveBytes([*network.parameters(), x, time]) as live:
        with context:
            output = network(x, time, *conditions)
        output.square().mean().backward()
    return int(max(live.history))


# ---- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_traces_tell_the_peak_of_every_batch(half: bool, checkpointing: bool) -> None:
    traced = activations(MODEL, DIFFUSION, half=half, checkpointing=checkpointing)
    for batch in (1, 7, 64):
        history = _history(MODEL, DIFFUSION, batch=batch, half=half, checkpointing=checkpointing)
        assert traced.peak(batch) == history.max()


def test_the_trace_is_what_a_real_pass_keeps() -> None:
    """On the CPU some kernels differ from a GPU's; together they keep about as much."""
    real = live_bytes(build_model(MODEL, DIFFUSION), 8, torch.autocast("cpu", enabled=False))
    traced = activations(MODEL, DIFFUSION, half=False, checkpointing=False).peak(8)
    assert traced == pytest.approx(real, rel=0.1)


def test_the_stand_in_for_autocast_keeps_the_same_bytes() -> None:
    real = live_bytes(build_model(MODEL, DIFFUSION), 4, torch.autocast("cpu", torch.bfloat16))
    network = build_model(MODEL, DIFFUSION)
    gpu = AsOnGpu(network, torch.bfloat16)

    class EndOfForward:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None:
            gpu.end_forward()

    assert live_bytes(network, 4, EndOfForward()) == real


def test_less_is_kept_by_recomputation_and_in_half_precision() -> None:
    def peak(**how: bool) -> float:
        return activations(MODEL, DIFFUSION, **how).peak(64)

    plain = peak(half=False, checkpointing=False)
    assert peak(half=False, checkpointing=True) < 0.6 * plain
    assert peak(half=True, checkpointing=False) < 0.9 * plain


@pytest.mark.parametrize(
    "extra", [{"dropout": 0.1}, {"num_classes": 3, "null_class": True}, {"low_res_size": 8}], ids=str
)
def test_every_kind_of_network_can_be_traced(extra: dict[str, Any]) -> None:
    model = MODEL.model_copy(update=extra)
    plain, recomputed = (activations(model, DIFFUSION, half=True, checkpointing=c).peak(16) for c in (False, True))
    assert 0 < recomputed < plain


def test_bytes_are_counted_until_they_are_freed() -> None:
    with LiveBytes() as live:
        a = torch.zeros(100)
        view = a.view(10, 10)
        b = a + 1
        del b
        c = a + 2
    assert live.history == [400, 800, 800]
    del a, c
    assert live.now == 400
    del view
    assert live.now == 0


# ---- the state ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_config: Path) -> RunConfig:
    return load_config(tiny_config, ["train.extra_ema_decays=[0.8]"])


def changed(config: RunConfig, **engine: Any) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


def largest_parameter(config: RunConfig) -> int:
    return max(p.numel() for p in build_model(config.model, config.diffusion).parameters())


def test_zero_divides_the_state(config: RunConfig) -> None:
    params = count(config.model, config.diffusion).num_params
    plain, one, two, three = (memory_of(changed(config, zero_stage=stage), 4) for stage in range(4))
    assert (plain.weights, plain.gradients, plain.masters, plain.moments) == (
        4 * params, 4 * params, 0, 8 * params,
    )  # fmt: skip
    assert all(m.averages == 2 * 4 * params / 4 for m in (plain, one, two, three))
    assert (one.weights, one.masters, one.moments) == (4 * params, params, 2 * params)
    assert two.gradients == params + 4 * largest_parameter(config)
    assert three.masters == params
    # A network this small is gathered whole, and stays so from the forward to the backward pass.
    assert three.weights == params + 4 * params


def test_gradients_wait_where_the_step_has_several_passes(config: RunConfig) -> None:
    params, largest = count(config.model, config.diffusion).num_params, largest_parameter(config)
    several = with_micro_batch(config, 1)
    assert memory_of(changed(several, zero_stage=1), 2).gradients == 4 * params
    assert memory_of(changed(several, zero_stage=2), 2).gradients == 2 * (2 * params) + 4 * largest
    # One pass a step: reduced at once where that overlaps with the pass, which it does not on the CPU.
    assert memory_of(changed(config, zero_stage=1), 2, device="cuda").gradients == 2 * params + 4 * largest
    assert memory_of(changed(config, zero_stage=1), 2, device="cpu").gradients == 4 * params


def test_buckets_are_bounded_and_doubled_by_overlap(config: RunConfig) -> None:
    small = changed(config, zero_stage=1, bucket_elements=1000)
    assert memory_of(small, 2, device="cuda").buckets == 2 * 4000
    assert memory_of(changed(small, overlap_comm=False), 2, device="cuda").buckets == 4000
    params = count(config.model, config.diffusion).num_params
    assert memory_of(changed(config, zero_stage=1), 2, device="cpu").buckets == 4 * params


def test_offloading_moves_the_state_to_the_host(config: RunConfig) -> None:
    here, there = (memory_of(changed(config, zero_stage=2, offload_optimizer=o), 2) for o in (False, True))
    assert (there.masters, there.moments, there.averages) == (0, 0, 0)
    assert there.total < here.total
    assert there.host - here.host > here.masters + here.moments + here.averages


def test_zero3_gathers_less_within_a_short_reuse_distance(config: RunConfig) -> None:
    settings = {"zero_optimization": {
        "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0,
    }}  # fmt: skip
    params = count(config.model, config.diffusion).num_params
    memory = memory_of(changed(config, zero_stage=3, deepspeed=settings), 4)
    assert memory.weights == params + 4 * largest_parameter(config)


def test_the_total_is_of_the_fullest_moment() -> None:
    parts = {"weights": 1, "gradients": 2, "masters": 3, "moments": 4, "averages": 5, "host": 1000}
    assert Memory(**parts, buckets=6, activations=7, flat_gradients=10).total == 15 + 13
    assert Memory(**parts, buckets=6, activations=7, flat_gradients=20).total == 15 + 20


@pytest.mark.parametrize("stage", [2, *(pytest.param(n, marks=pytest.mark.prove) for n in (0, 1, 3))])
def test_theory_is_what_two_processes_hold(stage: int) -> None:
    """The real engine and averages: every kind within 10 % of theory."""
    rows = run_job(stage, 2, 1)
    assert len(rows) == 2 * 5
    for row in rows:
        assert row.measured == pytest.approx(row.theory, rel=0.1), row


# ---- the micro-batch ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Together(Processes):
    """This process, and what others found."""

    others: list[Any] = field(default_factory=list)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, *self.others]


ALONE = Together(0, 1, 0, torch.device("cpu"))


def state_bytes(config: RunConfig) -> float:
    memory = memory_of(config, 1)
    return memory.state + memory.buckets


@pytest.mark.parametrize(("room", "expected"), [(1000.0, 8), (450.0, 4), (100.0, 1), (99.0, None)])
def test_the_largest_that_was_measured_to_fit_is_taken(
    config: RunConfig, room: float, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch, "memory_of", lambda *_, **__: Memory(0, 0, 0, 0, 0, 0, 0, 0, 0))
    found = search(config, 1, room, lambda n: 100.0 * n, device="cuda")  # a share of 8 images
    assert found == (None if expected is None else (expected, 100.0 * expected))


def test_measured_activations_are_added_to_the_state_in_theory(config: RunConfig) -> None:
    found = search(config, 1, 1e12, lambda n: 5e6, device="cuda")
    assert found is not None
    assert found[1] == pytest.approx(state_bytes(config) + 5e6)


def test_out_of_memory_means_the_next_smaller(config: RunConfig) -> None:
    tried = []

    def measure(n: int) -> float:
        tried.append(n)
        if n > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    found = search(config, 1, 1e12, measure, device="cuda")
    assert found is not None
    assert found[0] == 2
    assert tried == [8, 4, 2]


def test_the_estimate_says_where_to_begin(config: RunConfig) -> None:
    tried: list[int] = []

    def measure(n: int) -> float:
        tried.append(n)
        return activations(config.model, config.diffusion, half=False, checkpointing=False).peak(n)

    room = memory_of(config, 1, micro_batch=2).total
    found = search(config, 1, room, measure, device="cuda")
    assert found is not None
    assert found[0] == 2
    assert 8 not in tried


def test_without_trying_the_estimate_decides(config: RunConfig) -> None:
    for micro in (1, 2, 4, 8):
        need = memory_of(config, 1, micro_batch=micro, device="cpu").total
        found = search(config, 1, need, None, device="cpu")
        assert found == (micro, need)
        assert largest_that_fits(config, 1, need, device="cpu") == micro
    assert largest_that_fits(config, 1, 1.0) is None


def with_room(monkeypatch: pytest.MonkeyPatch, usable: float) -> None:
    monkeypatch.setattr(micro_batch, "_room", lambda device: Room(usable, usable / 0.92))


def test_the_config_gets_the_micro_batch_and_one_line_says_so(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    found = with_largest_micro_batch(config, ALONE, build=lambda: pytest.fail("a CPU does not try"))
    assert found == with_micro_batch(config, 8)
    assert capsys.readouterr().out.startswith("micro-batch 8 (of a share of 8): 0.0 of ")
    assert torch.equal(state, torch.get_rng_state())


def test_all_processes_take_what_fits_everywhere(config: RunConfig) -> None:
    two = Together(0, 2, 0, torch.device("cpu"), others=[(2, 1e6)])
    assert with_largest_micro_batch(config, two, build=nn.Identity).train.micro_batch == 2


@pytest.mark.parametrize("others", [[], [(4, 1.0)]], ids=["alone", "fits elsewhere"])
def test_what_does_not_fit_is_refused_with_remedies(
    config: RunConfig, others: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch, 1000.0)
    processes = Together(0, 1 + len(others), 0, torch.device("cpu"), others=others)
    with pytest.raises(UserError, match="not one image fits") as caught:
        with_largest_micro_batch(config, processes, build=nn.Identity)
    assert "engine.activation_checkpointing=true" in str(caught.value)
    assert "a smaller network" in str(caught.value)
    assert caught.value.exit_code == 2  # no other micro-batch would help, as one does where memory runs out in training
    tried_already = changed(config, activation_checkpointing=True)
    with pytest.raises(UserError) as caught:
        with_largest_micro_batch(tried_already, processes, build=nn.Identity)
    assert "activation_checkpointing" not in str(caught.value)


def test_a_batch_that_cannot_be_shared_is_refused(config: RunConfig) -> None:
    call: Callable[[], object]
    for call in (lambda: memory_of(config, 3), lambda: search(config, 3, 1e12, None, device="cpu")):
        with pytest.raises(ConfigError, match="cannot be divided among 3"):
            call()
