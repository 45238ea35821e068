"""Train one run, under deepspeed, torchrun, another launcher or plain python:

    deepspeed trainer/run.py --config configs/runs/cifar10/hybrid.yaml [section.key=value ...]

Exit codes: 0 the budget is reached, 2 a mistake that the message explains, 3 stopped on request after saving (the same
command continues). Any other code is a crash.
"""

import sys
from pathlib import Path

# A launcher puts trainer/ first on the path, where our `config` or `engine` would hide others' modules.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os

from data_pipeline.errors import ConfigError, UserError, disk_message, exit_with
from trainer.config import RunConfig, load_config


def parse_arguments(arguments: list[str] | None = None) -> RunConfig:
    """The run's config from the command line. Raises ConfigError."""
    parser = argparse.ArgumentParser(description="Train a diffusion model.", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", required=True, type=Path, help="a run's YAML file, such as those in configs/runs")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; the environment says the same")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces the file's value")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; settings are given as section.key=value.")
    return load_config(parsed.config, parsed.overrides)


def main(config: RunConfig) -> int:
    """Run one process of the training that `config` describes; the environment says which."""
    from trainer.processes import StopRequest, start_processes

    stop = StopRequest()
    stop.install(launched="RANK" in os.environ)
    processes = start_processes(num_cpu_threads=config.engine.num_cpu_threads)
    from trainer.loop import train

    return train(config, processes, stop)


def command_line() -> None:
    """`main` for a shell: user errors as one message from the first process, exit codes as documented."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        code = main(parse_arguments())
    except UserError as error:
        exit_with(str(error)) if first else sys.exit(2)
    except KeyboardInterrupt:
        exit_with("interrupted.", 130)
    except OSError as error:
        message = disk_message(error)
        if message is None:
            raise
        exit_with(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo and shared-memory threads can hang in the interpreter's own teardown


if __name__ == "__main__":
    command_line()
