"""Plans: what the shipped studies would cost, how they would run, and what is refused because it cannot fit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from cluster.definition.spec import StudyConfig, load_study
from cluster.definition.trials import Trial, make_trials
from cluster.files.folder import requests
from cluster.planning.costs import evaluation_flops, trial_costs, trial_disk, trial_memory
from cluster.planning.fits import check_fits_devices, check_fits_memory, check_fits_storage
from cluster.planning.gantt import bars, text_chart
from cluster.planning.plan import PlanReport, plan_report, planned_nodes
from cluster.scheduling.jobs import Resources
from cluster.scheduling.simulate import Schedule, Span
from cluster.study import main
from cluster.words import duration
from data_pipeline.errors import ConfigError, UserError
from data_pipeline.words import size
from trainer.cascade import check_cascade
from trainer.memory import memory_of

STUDIES = Path(__file__).resolve().parents[2] / "configs" / "studies"


def shipped(name: str, *overrides: str) -> tuple[StudyConfig, list[Trial]]:
    study = load_study(STUDIES / f"{name}.yaml", overrides)
    return study, make_trials(study)


def planned(name: str, *overrides: str) -> PlanReport:
    return plan_report(*shipped(name, *overrides))


def test_imagenet64_is_the_papers_study() -> None:
    study, trials = shipped("imagenet64")
    assert [t.cost.num_params for t in trials] == [30_303_494, 68_126_598, 121_063_942, 272_281_350]
    assert [t.config.train.lr for t in trials] == pytest.approx([1.414e-4, 1.155e-4, 1e-4, 8.165e-5], rel=1e-3)
    assert all(t.total_images == 1_500_000 * 128 for t in trials)
    text = plan_report(study, trials).text()
    assert "1.858e20 FLOP in all" in text
    assert "174 H100-hours at 30 % of 989 TFLOP/s" in text
    assert "1 node with 64 CPUs and 8 GPUs" in text


def test_imagenet256_has_the_two_stage_route() -> None:
    trials = {t.label: t for t in shipped("imagenet256")[1]}
    assert trials["two-stage-base64"].cost.num_params == 273_049_350
    assert trials["two-stage-upsampler"].cost.num_params == 279_792_390
    assert all(t.config.model.num_classes == 1000 for t in trials.values())
    assert trials["C=128"].config.model.channel_mult == (1, 1, 2, 2, 4, 4)


def test_imagenet256_cascade_has_three_stages_that_fit_together() -> None:
    trials = {t.label: t for t in shipped("imagenet256_cascade")[1]}
    assert "two-stage-base64" not in trials
    check_cascade([trials[f"cascade-{sizes}"].config for sizes in ("32", "32-64", "64-256")])


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_study_can_be_planned(path: Path) -> None:
    plan = planned(path.stem)
    text = plan.text()
    assert all(trial.name in text for trial in plan.trials)
    assert plan.schedule.makespan >= plan.schedule.bound > 0
    assert 0 < plan.utilization <= 1
    assert plan.over_bound < 1.15  # the bound is one that no schedule can beat: this is near what is best


def test_the_cpu_study_gives_equal_compute_to_four_sizes() -> None:
    computes = [t.compute for t in shipped("cifar10_cpu")[1]]
    assert len(computes) == 4
    assert max(computes) / min(computes) < 1.01


def test_more_devices_shorten_the_simulated_time() -> None:
    one, two = (planned("cifar10_cpu", f"cluster.cpus={n}").schedule.makespan for n in (1, 2))
    assert 0.45 * one < two < 0.75 * one


def test_one_device_takes_the_sum_of_all_times() -> None:
    study, trials = shipped("cifar10_cpu", "cluster.cpus=1")
    plan = plan_report(study, trials)
    costs = trial_costs(study, trials).values()
    work = sum(cost.device_seconds + cost.evaluation_device_seconds for cost in costs)
    assert plan.schedule.makespan == pytest.approx(work) == pytest.approx(plan.schedule.bound)
    assert plan.utilization == pytest.approx(1.0)
    assert "no schedule can end earlier; 100 % of the devices' time is used" in plan.text()


def test_memory_of_each_process_is_shown_as_it_will_run() -> None:
    study, trials = shipped("cifar10_cpu")
    memories = [trial_memory(study, trial) for trial in trials]
    assert [m.total for m in memories] == sorted(m.total for m in memories)  # larger networks need more
    header, _, *rows = plan_report(study, trials).text().splitlines()[2 : 4 + len(trials)]
    assert "memory" in header
    for trial, memory, row in zip(trials, memories, rows, strict=True):
        assert memory == memory_of(trial.config, study.resources.num_processes, device="cpu")
        assert size(memory.total) in row


def test_every_evaluation_that_will_be_made_has_its_cost() -> None:
    for path in STUDIES.glob("*.yaml"):
        study = load_study(path)
        for trial in make_trials(study):
            for nimg in (trial.export_images[0], trial.total_images):
                wanted = requests(study, trial, nimg) if trial.evaluated else []
                assert len(evaluation_flops(study, trial, last=nimg == trial.total_images)) == len(wanted)


def test_many_trials_are_shown_as_sizes() -> None:
    plan = planned("cifar10_cpu", f"seeds={list(range(30))}", "cluster.cpus=40")
    rows = plan.text().splitlines()[2:8]
    assert [row.split("  ")[0] for row in rows[2:]] == [f"channels{c} x 30" for c in (6, 8, 12, 16)]
    assert plan.text().splitlines()[-1].split("   ")[-5:] == [
        "A channels6", "B channels8", "C channels12", "D channels16", ": evaluations"]  # fmt: skip
    assert plan.costs["channels6-seed0"] == plan.costs["channels6-seed29"]


def test_nothing_to_evaluate_costs_nothing() -> None:
    plan = planned("smoke", "evaluation.nll=null", "evaluation.distance=null")
    assert "evaluation:  0.000e00 FLOP (0.0 % of training), 0 CPU core-hours" in plan.text()
    assert {span.kind for span in plan.schedule.spans} == {"trial"}


def test_higher_priorities_are_planned_first() -> None:
    first = ("cluster.cpus=1", "priorities={'channels8-*': 1}", "priorities={'channels16-*': 2}")
    spans = [span for span in planned("cifar10_cpu", *first).schedule.spans if span.kind == "trial"]
    assert [span.key for span in sorted(spans, key=lambda span: span.start)][:2] == [
        "channels16-seed0", "channels8-seed0"]  # fmt: skip


def test_the_plan_as_json_is_plain_and_adds_up() -> None:
    plan = planned("cifar10_cpu")
    found = json.loads(json.dumps(plan.to_json()))
    assert [one["name"] for one in found["trials"]] == [trial.name for trial in plan.trials]
    assert found["totals"]["flops"] == pytest.approx(sum(one["flops"] for one in found["trials"]))
    assert found["totals"]["device_hours"] == pytest.approx(sum(one["seconds"] for one in found["trials"]) / 3600)
    assert found["schedule"]["makespan"] == max(span["end"] for span in found["schedule"]["spans"])
    assert found["nodes"] == {"node0": {"cpus": 2.0, "gpus": 0.0}}


def plan_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["study", "plan", str(STUDIES / "smoke.yaml"), *words])
    return main()


def test_the_command_prints_the_plan_and_writes_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command(monkeypatch, "--figure", str(tmp_path / "schedule.png")) == 0
    assert planned("smoke").text() in capsys.readouterr().out
    assert (tmp_path / "schedule.png").stat().st_size > 10_000
    assert plan_command(monkeypatch, "--json", "seeds=[3]") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["seed"] for one in found["trials"]] == [3, 3]


def test_a_disk_that_is_too_small_is_a_warning_where_no_folder_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 0, 100))
    assert plan_command(monkeypatch) == 0
    assert "warning: study smoke still needs" in capsys.readouterr().err
    with pytest.raises(UserError, match="study smoke still needs"):
        plan_command(monkeypatch, "--out", str(tmp_path))
    assert "study smoke: 2 trials" in capsys.readouterr().out  # the plan is shown all the same


def test_the_nodes_are_the_clusters_or_the_counted_devices_or_a_trials_own() -> None:
    assert planned_nodes(shipped("imagenet256")[0]) == {f"node{i}": Resources(96, 8) for i in range(4)}
    counted, _ = shipped("imagenet64", "cluster=null", "device.count=16")
    assert planned_nodes(counted) == {"node0": Resources(128, 16)}
    cores, _ = shipped("cifar10_cpu", "cluster=null", "device.count=3")
    assert planned_nodes(cores) == {"node0": Resources(3)}
    own, _ = shipped("imagenet64", "cluster=null", "resources.num_nodes=2")
    assert planned_nodes(own) == {"node0": Resources(16, 4), "node1": Resources(16, 4)}


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.gpus=4"], ["trial channels64-seed0 needs 32 CPUs and 8 GPUs", "resources.num_processes",
                              "1 node with 64 CPUs and 4 GPUs", "resources.min_processes", "cluster.nodes"]),
        (["cluster.cpus=24"], ["needs 32 CPUs and 8 GPUs", "1 node with 24 CPUs"]),
        (["resources.num_nodes=2"], ["16 CPUs and 4 GPUs on each of 2 nodes", "1 node"]),
        (["resources.eval_cpus=65"], ["an evaluation needs 65 CPUs and 1 GPU ", "resources.eval_cpus"]),
        (["device.memory_gb=6"], ["channels192-seed0 needs 7 GB", "device.memory_gb=6", "train.micro_batch=4"]),
        (["device.memory_gb=1", "ladder.values=[192]"], ["try engine.activation_checkpointing=true",
                                                         "engine.zero_stage=3"]),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_key_value_and_remedy(overrides: list[str], words: list[str]) -> None:
    study, trials = shipped("imagenet64", *overrides)
    with pytest.raises(ConfigError) as caught:
        check_fits_devices(study, trials, planned_nodes(study))
    for word in words:
        assert word in str(caught.value)


def test_the_micro_batch_that_a_refusal_names_is_the_largest_that_fits() -> None:
    """Four images, as the test above says, where eight do not fit."""
    with pytest.raises(ConfigError, match="channels192"):
        check_fits_memory(*shipped("imagenet64", "device.memory_gb=6", "settings={train.micro_batch: 8}"))
    check_fits_memory(*shipped("imagenet64", "device.memory_gb=6", "settings={train.micro_batch: 4}"))


def test_a_trial_that_may_go_on_with_fewer_processes_fits_a_smaller_cluster() -> None:
    study, trials = shipped("imagenet64", "cluster.gpus=4", "resources.min_processes=4", "device.memory_gb=null")
    check_fits_devices(study, trials, planned_nodes(study))
    plan = plan_report(study, trials)
    assert {span.resources.gpus for span in plan.schedule.spans if span.kind == "trial"} == {4}


def test_memory_is_checked_for_the_fewest_processes_too() -> None:
    """At ZeRO 1 fewer processes hold more of the optimizer's state each."""
    wide = ("ladder.values=[192]", "resources.min_processes=1", "device.memory_gb={}")
    eight, one = (trial_memory(*_only(*shipped("imagenet64", *wide[:2])), n).total for n in (8, 1))
    assert one > eight
    between = f"{(one + eight) / 2 / 0.92e9}"
    with pytest.raises(ConfigError) as caught:
        check_fits_memory(*shipped("imagenet64", *wide[:2], wide[2].format(between)))
    assert "resources.min_processes=1" in str(caught.value)
    check_fits_memory(*shipped("imagenet64", *wide[:2], wide[2].format(one / 0.91e9)))


def test_a_processs_memory_on_cores_is_that_of_its_cores() -> None:
    need = trial_memory(*_only(*shipped("cifar10_cpu", "ladder.values=[16]"))).total
    half = ("ladder.values=[16]", f"device.memory_gb={need / 2 / 0.91e9}")
    with pytest.raises(ConfigError, match="channels16-seed0"):
        check_fits_memory(*shipped("cifar10_cpu", *half))
    check_fits_memory(*shipped("cifar10_cpu", *half, "resources.cpus=2"))


def _only(study: StudyConfig, trials: list[Trial]) -> tuple[StudyConfig, Trial]:
    (trial,) = trials
    return study, trial


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_cannot_hold_the_study_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, trials = shipped("cifar10_cpu")
    disks = [trial_disk(trial) for trial in trials]
    need = sum(disk.peak - disk.checkpoint for disk in disks) + max(disk.checkpoint for disk in disks)

    def has(free: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(int(1e12), 0, int(free)))

    has(need + 1)
    check_fits_storage(study, trials, tmp_path / "not" / "there" / "yet")
    has(need - 1e3)
    with pytest.raises(UserError) as caught:
        check_fits_storage(study, trials, tmp_path)
    for word in (size(need), str(tmp_path), "--out", "train.keep_checkpoints", "evaluation.num_points"):
        assert word in str(caught.value)
    written = tmp_path / "trials" / trials[0].name / "exports" / "000000001024"
    written.mkdir(parents=True)
    (written / "ema.safetensors").write_bytes(bytes(2000))
    check_fits_storage(study, trials, tmp_path)  # a part of it is there already
    has(need - disks[-1].peak + disks[-2].checkpoint)
    folder = tmp_path / "trials" / trials[-1].name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"nimg": trials[-1].total_images}))
    check_fits_storage(study, trials, tmp_path)  # a finished trial writes nothing more


# ---- the schedule, drawn ----------------------------------------------------------------------------------------


def test_no_device_holds_two_jobs_at_a_time() -> None:
    plan = planned("imagenet64", "seeds=[0,1]", "cluster.nodes=2", "device.memory_gb=null")
    drawn = bars(plan.schedule, plan.nodes)
    assert {bar.span.key for bar in drawn} == {span.key for span in plan.schedule.spans}
    for number, a in enumerate(drawn):
        assert 0 <= a.bottom < a.top <= 8
        for b in drawn[number + 1 :]:
            together = a.span.node == b.span.node and a.span.start < b.span.end and b.span.start < a.span.end
            assert not (together and a.bottom < b.top - 1e-6 and b.bottom < a.top - 1e-6)


def test_a_job_without_one_gap_is_drawn_in_pieces() -> None:
    def held(key: str, start: float, end: float, gpus: float) -> Span:
        return Span(key, "trial", "node0", start, end, Resources(1, gpus))

    spans = (held("a", 0, 2, 1), held("b", 0, 1, 1), held("c", 0, 2, 1), held("d", 0, 1, 1), held("e", 1, 2, 2))
    drawn = bars(Schedule(2, 2, spans), {"node0": Resources(8, 4)})
    assert [(bar.bottom, bar.top) for bar in drawn if bar.span.key == "e"] == [(1, 2), (3, 4)]


def test_the_chart_shows_who_holds_what_when() -> None:
    spans = (
        Span("big-seed0", "trial", "node0", 0, 72, Resources(4, 2)),
        Span("small-seed0", "trial", "node1", 0, 36, Resources(2, 1)),
        Span("small-seed0/8/0.0", "evaluation", "node1", 36, 54, Resources(2, 1)),
    )
    nodes = {"node0": Resources(8, 2), "node1": Resources(8, 2)}
    chart = text_chart(Schedule(72, 72, spans), nodes, {"big-seed0": "big", "small-seed0": "small"})
    assert chart.splitlines() == [
        "  node0 GPUs 0-1  " + 72 * "A",
        "  node1 GPU 0     " + 36 * "B" + 36 * ".",
        "  node1 GPU 1     " + 36 * "." + 18 * ":" + 18 * ".",
        "                  A big   B small   : evaluations",
    ]
    many = {f"node{i}": Resources(8, 2) for i in range(25)}
    assert text_chart(Schedule(72, 72, spans), many, {}) == ""
    some = {f"node{i}": Resources(8, 2) for i in range(24)}
    busy = tuple(Span(f"t-seed{i}", "trial", f"node{i}", i, 72, Resources(4, 1)) for i in range(24))
    by_node = text_chart(Schedule(72, 72, busy), some, {span.key: span.key for span in busy}).splitlines()
    assert [line.split()[0] for line in by_node[:24]] == list(some)  # 48 devices are too many lines


def test_the_picture_is_written_whatever_the_study_is(tmp_path: Path) -> None:
    for number, overrides in enumerate([(), (f"seeds={list(range(40))}", "cluster.nodes=30")]):
        path = tmp_path / "new" / f"{number}.png"
        planned("cifar10_cpu", *overrides).figure(path)
        image = Image.open(path).convert("RGB")
        assert image.width > 1500
        colours = {colour for _, colour in image.getcolors(1 << 20) or []}
        assert {(0x86, 0xD5, 0x49), (0x35, 0xB7, 0x79)} & colours  # bars in the colours of the ladder
    planned("smoke").figure(tmp_path / "schedule.svg")
    assert "C=8" in (tmp_path / "schedule.svg").read_text()


def test_words_for_times_and_sizes() -> None:
    assert [duration(s) for s in (5, 125, 7265, 400_000)] == ["0:05", "2:05", "2:01:05", "4.6 days"]
    assert [size(n) for n in (12, 3.5e6, 2e13)] == ["12 B", "3.5 MB", "20 TB"]
