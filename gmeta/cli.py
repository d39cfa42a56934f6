"""The command line: one parser per command, made from its config dataclass by jsonargparse.

Heavy imports (torch, duckdb) happen inside the commands, so that `--help` answers at once.
Exit codes: 0 done, 2 the user's mistake (one message, no traceback), 75 stopped on request and saved.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from gmeta.config.cluster import CoordinateConfig, DoctorConfig, LabConfig, PlanConfig, SimulateConfig
from gmeta.config.data import PrepareConfig, SynthConfig
from gmeta.config.evaluation import EvaluateConfig, PredictConfig, ReportConfig
from gmeta.config.train import TrainConfig
from gmeta.core.files import read_mapping
from gmeta.parallel.launch import is_worker


@dataclass(frozen=True)
class Command:
    """A command: its config dataclass, what runs it, and whether it takes `--nproc`."""

    config: type
    run: Callable[[Any], int]
    distributed: bool = False


def _prepare(config: PrepareConfig) -> int:
    from gmeta.data.prepare.prepare import prepare, print_summary

    print_summary(prepare(config))
    return 0


def _synth(config: SynthConfig) -> int:
    from gmeta.data.synthetic import print_summary, synthesize

    print_summary(synthesize(config))
    return 0


def _train(config: TrainConfig) -> int:
    from gmeta.training.loop import train

    return train(config)


def _evaluate(config: EvaluateConfig) -> int:
    from gmeta.evaluation.evaluate import evaluate

    return evaluate(config)


def _predict(config: PredictConfig) -> int:
    from gmeta.serving.predict import predict

    return predict(config)


def _report(config: ReportConfig) -> int:
    from gmeta.evaluation.report import build_report

    print(build_report(config.run_dir))
    return 0


def _doctor(config: DoctorConfig) -> int:
    from gmeta.doctor import diagnose, print_checks, write_network

    if config.network is not None:
        write_network(config.network, config.group_size, config.timeout_s)
        return 0
    if is_worker():
        raise ValueError("nproc is for --network FILE: without it doctor checks this machine alone")
    return print_checks(diagnose(config.timeout_s))


def _coordinate(config: CoordinateConfig) -> int:
    from gmeta.elastic.service import coordinate

    values = {field.name: getattr(config, field.name) for field in fields(config)}
    coordinate(**values)
    return 0


def _simulate(config: SimulateConfig) -> int:
    from gmeta.elastic.simulate import print_results, run_simulations

    print_results(run_simulations(config.scenario, config.trace_in, config.workers, tuple(config.policies), config.out))
    return 0


def _plan(config: PlanConfig) -> int:
    from gmeta.sharding.planner import build_advice, print_advice

    print_advice(config, build_advice(config))
    return 0


def _lab(config: LabConfig) -> int:
    from gmeta.lab.run import lab, summary

    print(summary(lab(config)))
    return 0


COMMANDS: dict[str, Command] = {
    "prepare": Command(PrepareConfig, _prepare),
    "train": Command(TrainConfig, _train, distributed=True),
    "evaluate": Command(EvaluateConfig, _evaluate, distributed=True),
    "predict": Command(PredictConfig, _predict),
    "report": Command(ReportConfig, _report),
    "synth": Command(SynthConfig, _synth),
    "coordinate": Command(CoordinateConfig, _coordinate),
    "plan": Command(PlanConfig, _plan),
    "simulate": Command(SimulateConfig, _simulate),
    "lab": Command(LabConfig, _lab),
    "doctor": Command(DoctorConfig, _doctor, distributed=True),
}


def _summary(command: Command) -> str:
    return (command.config.__doc__ or "").strip().split("\n")[0]


def overview() -> ArgumentParser:
    """The top-level parser: lists the commands and knows nothing of their options."""
    parser = ArgumentParser(
        prog="gmeta",
        exit_on_error=False,
        description="Meta-learned recommenders that adapt to new users, items and scenarios.",
        epilog="`gmeta COMMAND --help` explains a command.",
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, ArgumentParser(exit_on_error=False), help=_summary(command))
    return parser


def command_parser(name: str) -> ArgumentParser:
    """The parser of one command, from the fields and docstrings of its dataclass."""
    command = COMMANDS[name]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"gmeta {name}",
        exit_on_error=False,
        allow_abbrev=False,
        description=command.config.__doc__,
        usage=f"gmeta {name} [--config FILE] [--key VALUE] [--section.key VALUE] ...",
    )
    parser.add_argument("--config", action="config", help="YAML file; later options override it.")
    parser.add_class_arguments(command.config)
    if command.distributed:
        parser.add_argument(
            "--nproc", type=int, default=1, help="Processes to start on this machine (torchrun does it on clusters)."
        )
    return parser


def _keys(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]


def _explain(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's complaint in gmeta's form: `key is VALUE: what it must be`, and the nearest known key."""
    named = re.match(r'Parser key "([^"]+)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if named and value:
        choices = re.search(r"typing\.Literal\[(.*?)\]", message)
        kinds = re.search(r"(?:Expected an? |Subtypes: \[)(.+?)(?:\. Got value|\]\n|\n)", message)
        kind = re.sub(r"<class '(\w+)'>", r"\1", kinds[1]) if kinds else "another type"
        rule = (
            f"one of {choices[1]}" if choices else f"of type {kind.replace(', ', ' or ').replace('NoneType', 'null')}"
        )
        return f"{named[1]} is {value[1]!r}: must be {rule}"
    found_key = re.search(r"(?:unrecognized arguments: --|option '|[Kk]ey '|nexpected key[s]? )([\w.]+)", message)
    known = _keys(parser)
    if found_key and found_key[1] not in known:
        unknown = found_key[1]
        near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists the keys"
        return f"unknown key {unknown}: {hint}"
    return message


def _check_config_files(words: list[str], keys: list[str]) -> None:
    """ValueError naming a --config file that is no YAML mapping, or whose section holds no keys of its own."""
    for flag, value in zip_longest(words, words[1:], fillvalue=""):
        path = Path(flag.partition("=")[2] if flag.startswith("--config=") else value if flag == "--config" else "")
        if not path.is_file():
            continue  # the parser says so
        for section, found in read_mapping(path, "correct it, it must hold `key: value` lines").items():
            inside = [key for key in keys if key.startswith(f"{section}.")]
            if inside and not isinstance(found, dict):
                example = inside[0].partition(".")[2]
                raise ValueError(
                    f"{section} is {found!r} in {path}: it is a section, such as {section}: {{{example}: …}}"
                )


def _fail(prog: str, message: str) -> int:
    from gmeta.parallel.launch import EXIT_USER_ERROR, report_error

    report_error(f"{prog}: error: {message}")
    return EXIT_USER_ERROR


def run(argv: list[str]) -> int:
    """Run one command line; returns its exit code."""
    if not argv or argv[0] not in COMMANDS:
        try:
            overview().parse_args(argv or ["--help"])
            return 0
        except ArgumentError as error:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "`gmeta --help` lists the commands"
            return _fail("gmeta", f"{str(error).splitlines()[0]}; {hint}")
    name, rest = argv[0], argv[1:]
    parser = command_parser(name)
    try:
        _check_config_files(rest, _keys(parser))
        values = parser.parse_args(rest)
        nproc = values.pop("nproc", 1)
        values.pop("config", None)
        made = parser.instantiate(values)
        cls = COMMANDS[name].config
        config = cls(**{f.name: made[f.name] for f in fields(cls)})
    except ArgumentError as error:
        return _fail(parser.prog, _explain(str(error), parser))
    except (ValueError, TypeError) as error:
        return _fail(parser.prog, str(error))
    try:
        elastic = isinstance(config, TrainConfig) and config.elastic.enabled
        if (nproc != 1 or elastic) and not is_worker():
            return _launch(parser.prog, config if elastic else None, nproc, argv)
        return COMMANDS[name].run(config)
    except (ValueError, OSError) as error:
        return _fail(parser.prog, str(error))
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        return _peer_lost(parser.prog, error)


def _peer_lost(prog: str, error: RuntimeError) -> int:
    """A worker whose peers are gone tells so and ends; any other RuntimeError is a bug and goes up."""
    from gmeta.parallel.launch import EXIT_PEER_LOST, report_error
    from gmeta.parallel.mesh import PeerLost

    if not isinstance(error, PeerLost):
        raise error
    report_error(f"{prog}: error: {error}")
    return EXIT_PEER_LOST


def _launch(prog: str, elastic: TrainConfig | None, nproc: int, argv: list[str]) -> int:
    """Run this command in workers; an elastic group's are watched over, and started again."""
    if nproc < 1:
        return _fail(prog, f"nproc is {nproc}: must be at least 1")
    if elastic is not None:
        from gmeta.training.supervise import supervise

        return supervise(elastic, nproc, argv)
    from gmeta.parallel.launch import launch

    return launch(nproc, argv)
