"""Train one run, under deepspeed, torchrun, another launcher or plain python:

    deepspeed trainer/run.py --config configs/runs/cifar10/hybrid.yaml [section.key=value ...]

Exit codes: 0 the budget is reached; 2 a mistake that the message explains; 3 stopped on request after saving, and 4
a process of the job died or hung (after both the same command continues); 5 the run diverged; 6 out of memory; 7 the
run's folder or the port is in use; 8 the disk is full (after both the same command continues, later). 1 is a crash.
"""

import sys
from pathlib import Path

# A launcher puts trainer/ first on the path, where our `config` or `engine` would hide others' modules.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import traceback
from typing import NoReturn

from data_pipeline.errors import AgreedError, ConfigError
from trainer.config.run import RunConfig, load_config
from trainer.exits import Exit, explained, first_line
from trainer.run_folder import naming_a_full_disk
from trainer.watchdog import Watchdog, lost_a_peer


def parse_arguments(arguments: list[str] | None = None) -> tuple[RunConfig, bool]:
    """The run's config from the command line, and whether to look for the micro-batch. Raises ConfigError."""
    parser = argparse.ArgumentParser(description="Train a diffusion model.", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", required=True, type=Path, help="a run's YAML file, such as those in configs/runs")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; the environment says the same")
    parser.add_argument("--auto-micro-batch", action="store_true",
                        help="take the largest train.micro_batch that fits into the device's memory")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces the file's value")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; settings are given as section.key=value.")
    return load_config(parsed.config, parsed.overrides), parsed.auto_micro_batch


def main(config: RunConfig, auto_micro_batch: bool = False) -> int:
    """Run one process of the training that `config` describes; the environment says which."""
    from trainer.processes import StopRequest, start_processes

    hang_seconds = config.engine.hang_seconds
    stop = StopRequest()
    stop.install(launched="RANK" in os.environ)
    processes = start_processes(num_cpu_threads=config.engine.num_cpu_threads, hang_seconds=hang_seconds)
    with Watchdog.start(processes, hang_seconds=hang_seconds) as watchdog, naming_a_full_disk(config.run.folder):
        from trainer.loop import train
        from trainer.out_of_memory import naming_the_memorys_remedies

        if auto_micro_batch:
            from trainer.micro_batch import with_fitting_micro_batch

            config = with_fitting_micro_batch(config, processes)
        with naming_the_memorys_remedies(config, processes):
            return train(config, processes, stop, watchdog)


def command_line() -> NoReturn:
    """`main` for a shell: user errors as one message from the first process, exit codes as documented.

    Ends by `os._exit`: threads of gloo and of a half-built process group can hang in the interpreter's teardown.
    """
    try:
        code = main(*parse_arguments())
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else Exit.USER_ERROR
    except Exception as error:
        code = _tell(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(error: Exception) -> int:
    """Print an error as far as this process is the one to do so; returns its exit code."""
    known = explained(error)
    if known is not None:
        # What all processes raise is said once; what only this one met (a damaged sample, say) nobody else can say.
        if os.environ.get("RANK", "0") == "0" or not isinstance(known, (AgreedError, ConfigError)):
            print(f"error: {known}", file=sys.stderr)
        return known.exit_code
    if lost_a_peer(error):
        print(f"error: lost another process of this job: {first_line(error)}", file=sys.stderr)
        return Exit.LOST
    traceback.print_exc()
    return Exit.CRASHED


if __name__ == "__main__":
    command_line()
