"""The commands. Each parses its words and calls the library; what a person did wrong is said in a line, not a
traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lingshu_rl import __version__
from lingshu_rl.exits import exit_code, piped

if TYPE_CHECKING:
    from lingshu_rl.config import Config

EPILOG = "settings are given as key=value, for example train.lr=5e-7; --dry-run prints all of them"


def main(argv: Sequence[str] | None = None) -> int:
    def run() -> int:
        arguments = parsed(argv)
        return arguments.run(arguments)

    return piped(run)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The words of a command; wrong ones end the process, as argparse does."""
    from lingshu_rl.synth.run import add_steps, run_step

    parser = argparse.ArgumentParser(
        prog="lingshu-rl",
        description="Reinforcement learning with verifiable rewards for medical vision-language models.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="train in this process (several: accelerate launch recipes/grpo_medvqa.py)", epilog=EPILOG
    )
    _train_arguments(train)
    train.set_defaults(run=_train)
    serve = commands.add_parser(
        "serve", help="run one rollout or reference server here, for a run that names its URL", epilog=EPILOG
    )
    serve.add_argument("role", choices=["rollout", "reference"])
    serve.add_argument("--port", type=int, required=True)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    _train_arguments(serve)
    serve.set_defaults(run=_serve)
    rewards = commands.add_parser(
        "rewards", help="check labels and rewards before a run; show what report packs do not read (coverage)"
    )
    rewards.add_argument("arguments", nargs=argparse.REMAINDER)
    rewards.set_defaults(run=_rewards)
    sweep = commands.add_parser(
        "sweep", help="run variants of the settings over seeds and say which differ from noise", epilog=EPILOG
    )
    sweep.add_argument("file", help="YAML: base settings, axes or variants or search, seeds (docs/sweeps.md)")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs, what is done and how long the rest takes")
    sweep.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="variants or VARIANT/seed-N, * allowed")
    sweep.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    sweep.add_argument(
        "--set", nargs="+", default=[], dest="settings", metavar="key=value", help="settings over the file's base"
    )
    sweep.set_defaults(run=_sweep)
    report = commands.add_parser("report", help="write the report of a run, a sweep, or several runs side by side")
    report.add_argument("folders", nargs="+", metavar="RUN")
    report.add_argument("--out", help="page of a comparison (default: comparison.html where all runs are)")
    report.set_defaults(run=_report)
    card = commands.add_parser(
        "card", help="write the model card of a run beside its newest model; push both to the Hub"
    )
    card.add_argument("folder", metavar="RUN")
    card.add_argument(
        "--push", default="", metavar="ORG/NAME", help="upload the model with its card, as who is logged in"
    )
    card.add_argument("--private", action="store_true", help="... where only its owner sees it")
    card.set_defaults(run=_card)
    watch = commands.add_parser("watch", help="follow a run in the terminal while it trains")
    watch.add_argument("folder", metavar="RUN")
    watch.add_argument("--once", action="store_true", help="show where it stands and stop")
    watch.set_defaults(run=_watch)
    from lingshu_rl.eval.command import add_arguments

    add_leaks_parser(
        add_arguments(commands.add_parser("eval", help="evaluate a model on benchmarks; compare, rescore, leaks"))
    )
    curate = commands.add_parser(
        "curate", help="from raw sets to training rows: filter, deduplicate, decontaminate, split"
    )
    curate.add_argument("pipeline", help="YAML file of sources and steps, see docs/curation.md")
    curate.add_argument("--out", help="folder to write (default: the file's `out`)")
    curate.add_argument("--dry-run", action="store_true", help="check the file, print sources and steps, then stop")
    curate.set_defaults(run=_curate)
    synth = commands.add_parser("synth", help="make training rows: captions, questions, chains of thought")
    add_steps(synth)
    synth.set_defaults(run=run_step)
    sft = commands.add_parser(
        "sft",
        help="staged supervised fine-tuning (several processes: accelerate launch recipes/sft_medical.py)",
        epilog=EPILOG,
    )
    sft.add_argument("config", help="YAML file with the stages")
    _sft_arguments(sft)
    sft.set_defaults(run=_sft)
    pipeline = commands.add_parser(
        "pipeline",
        help="run the steps of a pipeline file that are not done yet",
        epilog="variables of the file are set as name=value",
    )
    pipeline.add_argument("file")
    pipeline.add_argument("--dry-run", action="store_true", help="say what would run and why, then stop")
    pipeline.add_argument("--force", action="append", default=[], metavar="STEP", help="run this step again")
    pipeline.add_argument("settings", nargs="*", metavar="name=value")
    pipeline.set_defaults(run=_pipeline)
    from lingshu_rl.look import add_arguments as add_look

    data = commands.add_parser("data", help="see how a source of rows is read, before a run is given it")
    add_look(data)
    data.set_defaults(run=_data)
    # argparse takes a command's key=value words only where its other words stand; they may stand after options as well.
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "settings") and all("=" in w and not w.startswith("-") for w in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    return arguments


def add_leaks_parser(commands) -> None:  # type: ignore[no-untyped-def]
    """`eval leaks`: pictures, patients and texts that two sets share."""
    from lingshu_rl.curate.leaks import add_leaks_parser as add

    add(commands)


def train_main(argv: Sequence[str]) -> int:
    """The recipe's entry: `--config FILE`, `--dry-run`, and key=value settings."""
    return piped(lambda: _train(train_words(argv)))


def train_words(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="grpo_medvqa.py", epilog=EPILOG)
    _train_arguments(parser)
    return parser.parse_args(argv)


def sft_main(argv: Sequence[str]) -> int:
    """The recipe's entry: like `lingshu-rl sft`, with the file as --config."""
    return piped(lambda: _sft(sft_words(argv)))


def sft_words(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sft_medical.py", epilog=EPILOG)
    parser.add_argument("--config", required=True, help="YAML file with the stages")
    _sft_arguments(parser)
    return parser.parse_args(argv)


def _sft_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", default="", help="only this stage, starting from `model`")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, then stop")
    parser.add_argument("settings", nargs="*", metavar="key=value")


def _sft(arguments: argparse.Namespace) -> int:
    from lingshu_rl.data.load import DataError
    from lingshu_rl.failures import ConfigError
    from lingshu_rl.pipeline.rehearsal import rehearsed
    from lingshu_rl.settings import to_yaml
    from lingshu_rl.sft.settings import load_sft_config
    from lingshu_rl.sft.stages import run_sft

    def tune() -> int:
        config = load_sft_config(arguments.config, arguments.settings)
        if arguments.dry_run:
            print(to_yaml(config).rstrip())
            return rehearsed("sft", arguments)
        run_sft(config, arguments.stage)
        return 0

    return exit_code(tune, "tuning", wrong=(ConfigError, DataError), goes_on="from the last checkpoint")


def _data(arguments: argparse.Namespace) -> int:
    from lingshu_rl.data.load import DataError
    from lingshu_rl.failures import ConfigError, RunStopped
    from lingshu_rl.look import run

    return exit_code(lambda: run(arguments), "the look", wrong=(ConfigError, DataError, RunStopped))


def _pipeline(arguments: argparse.Namespace) -> int:
    import signal
    from pathlib import Path

    from lingshu_rl.failures import ConfigError
    from lingshu_rl.pipeline.steps import Pipeline, PipelineError, load_pipeline
    from lingshu_rl.progress import Progress

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def steps() -> None:
        path = Path(arguments.file)
        pipeline = Pipeline(load_pipeline(path, arguments.settings), path.parent)
        if arguments.dry_run:
            pipeline.show(Progress(quiet=False))
            return
        pipeline.run(Progress(quiet=False), arguments.force)
        print(pipeline.table(), end="")

    signal.signal(signal.SIGTERM, interrupt)
    return exit_code(
        steps, "the pipeline", wrong=(ConfigError,), stops=(PipelineError,), goes_on="with the step that was under way"
    )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML file over the defaults (the embedded demo)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print settings, devices and what they hold, then stop (1: it does not fit)",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")


def _train(arguments: argparse.Namespace) -> int:
    from lingshu_rl.failures import ConfigError
    from lingshu_rl.pipeline.rehearsal import rehearsed
    from lingshu_rl.planning.given import load_config, origins

    def work() -> int:
        config = load_config(arguments.config, arguments.settings)
        if not arguments.dry_run:
            return run_training(config)
        return _dry_run(config, origins(arguments.config, arguments.settings)) or rehearsed("train", arguments)

    return exit_code(work, "the run", wrong=(ConfigError,), goes_on="from its last checkpoint")


def _dry_run(config: Config, origins: Sequence[str]) -> int:
    """Print the settings and what a run would do with them; 1 when it would not start, or does not fit."""
    from lingshu_rl.data.load import DataError
    from lingshu_rl.failures import KNOWN_FAILURES, ConfigError
    from lingshu_rl.planning.plan import report
    from lingshu_rl.prompts import foreseen
    from lingshu_rl.settings import to_yaml

    first = os.environ.get("RANK", "0") == "0"
    if not first:
        return 0 if report(config)[1] else 1
    print(to_yaml(config).rstrip())
    print("\n".join(f"# {line}" for line in origins))
    wrong: tuple[type[Exception], ...] = (ConfigError, DataError, *KNOWN_FAILURES)
    try:
        sized, prompts = foreseen(config)
    except wrong as error:
        print(f"the run would not start: {error}", file=sys.stderr)
        return 1
    lines, fits = report(sized)
    print("\n".join(f"# {line}" for line in [*prompts, *lines]))
    return 0 if fits else 1


def _serve(arguments: argparse.Namespace) -> int:
    """Become the server process. The token and the transfer folder come from the environment, as the run's must."""
    from pathlib import Path

    from lingshu_rl.failures import ConfigError
    from lingshu_rl.model.loading import model_path
    from lingshu_rl.planning.given import load_config
    from lingshu_rl.planning.plan import serving_devices
    from lingshu_rl.processes.locks import hold, release
    from lingshu_rl.processes.token import TOKEN_ENV
    from lingshu_rl.reference.server import reference_command
    from lingshu_rl.rollout.server import vllm_command, vllm_env
    from lingshu_rl.rollout.transfer import weight_transfer_kind
    from lingshu_rl.rollout.vllm_plugin import TRANSFER_DIR_ENV

    def serve() -> int:
        config = load_config(arguments.config, arguments.settings)
        devices = serving_devices(config, arguments.role)
        token = os.environ.get(TOKEN_ENV)
        if not token:
            raise ConfigError(f"set {TOKEN_ENV} to a secret of your choice, here and where the run starts")
        where = {"port": arguments.port, "host": arguments.host}
        if arguments.role == "rollout":
            folder = Path(os.environ.get(TRANSFER_DIR_ENV, "/dev/shm"))
            gpu = devices.on_gpu
            kind = weight_transfer_kind(config, policy_on_gpu=gpu, servers_on_gpu=gpu, ours=False)
            command = vllm_command(config, model_path(config.model), devices, transfer=kind, **where)
            env = vllm_env(devices, token=token, transfer_dir=folder, extra=config.rollout.env)
        else:
            command = reference_command(config, model_path(config.reference.model or config.model), devices, **where)
            env = devices.env()
        held = hold(devices, f"lingshu-rl serve {arguments.role} --port {arguments.port}", inherited=True)
        if not arguments.dry_run:
            os.execvpe(command[0], command, {**os.environ, **env})
        release(held)
        print(" ".join(f"{key}={value}" for key, value in devices.env().items()), *command)
        return 0

    return exit_code(serve, "the server", wrong=(ConfigError,))


def run_training(config: Config) -> int:
    """Train; errors that have a known cause become one message and exit code 1, Ctrl-C 130.

    SIGTERM between two steps saves a checkpoint and gives 75 (EX_TEMPFAIL: run the same command again).
    """
    import asyncio

    from lingshu_rl.processes.workers import die_with_launcher

    die_with_launcher()
    config = settle(config)
    from lingshu_rl.data.load import DataError
    from lingshu_rl.failures import KNOWN_FAILURES, ConfigError
    from lingshu_rl.processes.mainrank import Preempted
    from lingshu_rl.storage.disk import said
    from lingshu_rl.storage.folders import InUse
    from lingshu_rl.storage.runfolder import RunFolderError
    from lingshu_rl.train import train

    known: tuple[type[Exception], ...] = (ConfigError, DataError, InUse, RunFolderError, *KNOWN_FAILURES)
    try:
        asyncio.run(train(config))
    except Preempted as stop:
        print(f"\n{stop}", file=sys.stderr)
        code = 75
    except known as error:
        print(f"\nthe run stopped: {said(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, asyncio.CancelledError):  # Ctrl-C, and SIGTERM before there is a run
        print("\nthe run was stopped; the same command goes on from its last checkpoint", file=sys.stderr)
        code = 130
    else:
        code = 0
    sys.stdout.flush()
    _leave_process_group()
    return code


def settle(config: Config) -> Config:
    """What comes before anything else in a rank: it sees the policy's GPUs alone, and its node's GPUs are the run's.

    Nothing that could ask CUDA for its devices may be loaded before, as the answer stays. Returns the config, with the
    optimiser's state on the host where the run would not fit otherwise. Raises ConfigError for a placement that cannot
    be, and for a GPU that another run or server holds.
    """
    from lingshu_rl.processes.placement import Ranks, narrow, place, this_machine

    machine = this_machine()
    policy = place(config, machine, Ranks.launched().here).policy
    os.environ.update(narrow(policy, machine))
    if not machine.gpus:
        return config
    from lingshu_rl.planning.plan import made_to_fit, plan_here
    from lingshu_rl.processes.locks import hold

    plan = plan_here(config)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        starts_servers = config.cluster == "local" and os.environ.get("RANK", "0") == "0"
        hold(plan.placement.here if starts_servers else policy, f"a run in {config.run.dir}")
    config, note = made_to_fit(config, plan)
    if note and os.environ.get("RANK", "0") == "0":
        print(f"NOTE: {note}")
    return config


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.destroy_process_group()


def _rewards(arguments: argparse.Namespace) -> int:
    if arguments.arguments[:1] == ["coverage"]:
        from rewards.report.coverage import main as coverage

        return coverage(arguments.arguments[1:])
    from lingshu_rl.look import records_of
    from rewards.preflight import main as check

    return check(arguments.arguments, records_of)


def _sweep(arguments: argparse.Namespace) -> int:
    from lingshu_rl.pipeline.rehearsal import rehearsed
    from lingshu_rl.sweep.command import sweep_main

    code = sweep_main(
        arguments.file,
        dry_run=arguments.dry_run,
        only=arguments.only,
        retry_failed=arguments.retry_failed,
        settings=arguments.settings,
    )
    return code or (rehearsed("sweep", arguments) if arguments.dry_run else 0)


def _curate(arguments: argparse.Namespace) -> int:
    from lingshu_rl.curate.pipeline import main as curate
    from lingshu_rl.pipeline.rehearsal import rehearsed

    code = curate(arguments.pipeline, out=arguments.out, dry_run=arguments.dry_run)
    return code or (rehearsed("curate", arguments) if arguments.dry_run else 0)


def _report(arguments: argparse.Namespace) -> int:
    from lingshu_rl.sweep.command import report_main

    return report_main(arguments.folders, arguments.out)


def _card(arguments: argparse.Namespace) -> int:
    from lingshu_rl.report.card import main as write

    return write(arguments.folder, arguments.push, private=arguments.private)


def _watch(arguments: argparse.Namespace) -> int:
    from lingshu_rl.report.watch import watch

    return watch(arguments.folder, once=arguments.once)


if __name__ == "__main__":
    sys.exit(main())
