"""The command line: one parser per command, made from its config dataclass by jsonargparse.

Heavy imports (torch, duckdb) happen inside the commands, so that `--help` answers at once.
Exit codes: 0 done, 2 the user's mistake (one message, no traceback), 3 refused by a gate, 75 stopped on request and
saved.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from gmeta.config.benchmark import BenchmarkConfig
from gmeta.config.cluster import CoordinateConfig, DoctorConfig, LabConfig, PlanConfig, SimulateConfig
from gmeta.config.data import PrepareConfig, SynthConfig
from gmeta.config.deliver import DeliverConfig
from gmeta.config.delivery import BundleConfig, GateConfig
from gmeta.config.deprecated import RENAMED_BY_COMMAND
from gmeta.config.evaluation import CompareConfig, EvaluateConfig, PredictConfig, ReportConfig
from gmeta.config.export import ExportConfig, ExportStatesConfig
from gmeta.config.parse import given_values, modern_words, name_bare_words, parse_words, parser_of, require_named_code
from gmeta.config.recommend import RecommendConfig
from gmeta.config.registry import DeltaConfig, PublishConfig, RegistryConfig
from gmeta.config.serving import ServeConfig
from gmeta.config.text import EmbedConfig, EmbedImagesConfig
from gmeta.config.train import TrainConfig
from gmeta.config.tune import TuneConfig
from gmeta.core.errors import UserCodeError, closest
from gmeta.delivery.default_rules import CLICK_RULES, NEXT_ITEM_RULES, RATING_RULES
from gmeta.elastic import scenario
from gmeta.parallel.launch import is_worker, worker_rank


@dataclass(frozen=True)
class Command:
    """A command: its config dataclass, what runs it, whether it takes `--nproc`, and what its help ends with.

    `bare` is the field that words without a flag belong to, where there is one; `bare_usage` is what its help shows.
    """

    config: type
    run: Callable[[Any], int]
    distributed: bool = False
    epilog: str | None = None
    bare: str | None = None
    bare_usage: str = ""


def _prepare(config: PrepareConfig) -> int:
    from gmeta.data.prepare.prepare import prepare, print_summary

    print_summary(prepare(config))
    return 0


def _synth(config: SynthConfig) -> int:
    if config.kind == "antm2c":
        from gmeta.data.clone.write import print_clone, write_clone

        print_clone(write_clone(config))
    elif config.days is None:
        from gmeta.data.synthetic import print_synthesis, synthesize

        print_synthesis(synthesize(config))
    else:
        from gmeta.data.synthetic_days import print_days, synthesize_days

        print_days(synthesize_days(config))
    return 0


def _train(config: TrainConfig) -> int:
    from gmeta.training.trainer import train

    return train(config).exit_code


def _tune(config: TuneConfig) -> int:
    from gmeta.tuning.tune import tune

    return tune(config)


def _evaluate(config: EvaluateConfig) -> int:
    from gmeta.evaluation.evaluate import evaluate

    return evaluate(config)


def _compare(config: CompareConfig) -> int:
    from gmeta.evaluation.compare import compare

    return compare(config)


def _predict(config: PredictConfig) -> int:
    from gmeta.serving.predict import predict

    return predict(config)


def _recommend(config: RecommendConfig) -> int:
    from gmeta.serving.recommend import recommend

    return recommend(config)


def _serve(config: ServeConfig) -> int:
    from gmeta.serving.server import run_serve

    return run_serve(config)


def _bundle(config: BundleConfig) -> int:
    from gmeta.delivery.bundle import bundle

    return bundle(config)


def _gate(config: GateConfig) -> int:
    from gmeta.delivery.gate import gate

    return gate(config)


def _deliver(config: DeliverConfig) -> int:
    from gmeta.delivery.deliver import deliver

    return deliver(config)


def _delta(config: DeltaConfig) -> int:
    from gmeta.delivery.commands import run_delta

    return run_delta(config)


def _publish(config: PublishConfig) -> int:
    from gmeta.delivery.commands import run_publish

    return run_publish(config)


def _registry(config: RegistryConfig) -> int:
    from gmeta.delivery.commands import run_registry

    return run_registry(config)


def _embed(config: EmbedConfig) -> int:
    from gmeta.text.embed import embed

    return embed(config)


def _embed_images(config: EmbedImagesConfig) -> int:
    from gmeta.text.images import embed_images

    return embed_images(config)


def _export(config: ExportConfig) -> int:
    from gmeta.serving.export import export

    return export(config)


def _export_states(config: ExportStatesConfig) -> int:
    from gmeta.serving.export_states import export_states

    return export_states(config)


def _report(config: ReportConfig) -> int:
    from gmeta.evaluation.report import build_report

    print(build_report(config.run_dir))
    return 0


def _benchmark(config: BenchmarkConfig) -> int:
    from gmeta.benchmark.antm2c import benchmark

    return benchmark(config)


def _doctor(config: DoctorConfig) -> int:
    from gmeta.doctor import diagnose, print_checks, write_network

    if config.network is not None:
        write_network(config.network, config.node_size, config.timeout_s)
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


_SCHEMA_HELP = """Events need no schema. Their YAML file maps what they have to columns; user and item are required:
  {user: user_id, item: item_id, domain: shop, time: timestamp, text: title}
For all other rows the schema is a YAML file that says what the columns mean:

  task: user_id               # required: whose rows form a task
  label: click                # required: 0 or 1, or a rating; in its place, for several labels with a loss each:
#   labels: {click: bce, pay: bce}      # a row may lack some of them
#   label_weights: {pay: 0.5}           # of their losses in the sum; 1 when unset
  time: timestamp             # a user's last rows by time are then the query
  item: item_id               # what is recommended; reports show items that no training task has seen
  partition: day              # a column that says which split a row belongs to
  role: side                  # a column that says support or query, in place of a cut (--roles for other words)
  weight: weight              # how much a row counts in losses and metrics
  scenario: gender            # a feature of one value a row, by which every report is sliced
  label_threshold: 4          # labels of at least this become 1, others 0
  categorical:                # one value a row; a bare name, or a mapping:
    - gender
    - {name: item_id, min_count: 2}                       # rarer values count as unknown
    - {name: device, hash_buckets: 10000, nulls: oov}     # hashed, no vocabulary; missing values are unknown
    - {name: title, text: true}                           # texts, which a model that reads texts gets, new ones too
    - {name: shop, vocabulary: all}                       # values of valid and test rows get ids too
  multi: [{name: genres, separator: "|", pooling: mean}]  # several values a row
  sequence:                   # in order; the features of one table share its vocabulary and min_count
    - {name: last_items, separator: " ", max_length: 20, table: item_id, min_count: 2}
    - {name: last_shops, pooling: none}                   # a model gets every value, not their mean
    - {name: last_kinds, aligned: last_shops}             # as many values as last_shops in every row
  numeric: [age, {name: price, log: true, nulls: mean}]   # standardised
  numeric_sequence: [{name: gaps, aligned: last_shops, log: true, nulls: mean, separator: " "}]   # so are these
  vector: [{name: text, dim: 384, owner: item, dtype: fp16}]   # a list of numbers; kept once for each item, or a row
  item_statistics: false      # count and mean label of each item as numeric columns
  hash_seed: 0
"""

_PREDICT_HELP = """The support file needs the columns that the run's schema names: the task, the label, the features and
the numeric columns, and the item where the schema has item_statistics. The query file needs the same but the label.
`schema.json` in the run directory lists all of these. The time is not needed: where the support file has it, a task's
rows count in its order, else in that of the file; of a run with loader.max_support_rows the last ones are read. The
output has all columns of the query file.
"""

_RECOMMEND_HELP = """The events have the columns that the events had which the run's pack was made of. A user's events
count in the order of their time; without times those of each domain keep the order of the file, and domains are
interleaved evenly, but for those of the domain that is asked for, which are read last. Of a run with
loader.max_support_rows the last ones are read. Recommendations are ranked as gmeta evaluate ranks; of equal scores the
item with the lower id comes first.
"""

_TUNE_HELP = """The space is a YAML file, dotted keys of `gmeta train` with what they vary over:

  dense.lr: {low: 0.0003, high: 0.01, log: true}   # numbers between, drawn evenly in the logarithm
  meta.inner_steps: [1, 3, 5]                      # one of these
  model.args.dropout: [0.2]                        # the same for all trials

First every trial trains to a part of its schedule, then the best third goes on to three times as much, until the last
ones have trained to the end (successive halving). Parts end at validations: a schedule of few validations has few
rungs, and --schedule.eval_every gives it more. A trial that diverges or runs out of memory counts as the worst.
The best settings so far are in best.yaml under out: gmeta train --config OUT/best.yaml

With --baselines true baselines are tuned on valid tasks too: gmeta evaluate --baseline_settings OUT/baselines.json
"""

_GATE_HELP = f"""The exit code is 0 where the candidate may serve, and 3 where a rule refuses it. The rules are a YAML
file; without one they are, for clicks:

{CLICK_RULES}
and for ratings, whose margins of mae and rmse count in standard deviations of the day's labels:

{RATING_RULES}
and for next items, of which current_drop allows a share of what the metric was:

{NEXT_ITEM_RULES}"""

COMMANDS: dict[str, Command] = {
    "prepare": Command(PrepareConfig, _prepare, epilog=_SCHEMA_HELP),
    "train": Command(TrainConfig, _train, distributed=True),
    "tune": Command(TuneConfig, _tune, distributed=True, epilog=_TUNE_HELP),
    "evaluate": Command(EvaluateConfig, _evaluate, distributed=True),
    "compare": Command(CompareConfig, _compare, bare="runs", bare_usage="RUN RUN ..."),
    "predict": Command(PredictConfig, _predict, distributed=True, epilog=_PREDICT_HELP),
    "recommend": Command(RecommendConfig, _recommend, epilog=_RECOMMEND_HELP),
    "report": Command(ReportConfig, _report),
    "bundle": Command(BundleConfig, _bundle),
    "gate": Command(GateConfig, _gate, distributed=True, epilog=_GATE_HELP),
    "deliver": Command(DeliverConfig, _deliver),
    "delta": Command(DeltaConfig, _delta),
    "publish": Command(PublishConfig, _publish),
    "registry": Command(
        RegistryConfig, _registry, bare="do", bare_usage="list|show|rollback|pin|unpin|prune|fetch [N]"
    ),
    "serve": Command(ServeConfig, _serve),
    "export": Command(ExportConfig, _export),
    "export-states": Command(ExportStatesConfig, _export_states, distributed=True),
    "embed": Command(EmbedConfig, _embed, bare="do", bare_usage="[verify|stats|compact]"),
    "embed-images": Command(EmbedImagesConfig, _embed_images),
    "synth": Command(SynthConfig, _synth),
    "benchmark": Command(BenchmarkConfig, _benchmark, bare="do", bare_usage="antm2c"),
    "coordinate": Command(CoordinateConfig, _coordinate),
    "plan": Command(PlanConfig, _plan),
    "simulate": Command(SimulateConfig, _simulate, epilog=scenario.__doc__),
    "lab": Command(LabConfig, _lab, epilog=scenario.__doc__),
    "doctor": Command(DoctorConfig, _doctor, distributed=True),
}


def _summary(command: Command) -> str:
    return (command.config.__doc__ or "").strip().split("\n")[0]


def overview() -> ArgumentParser:
    """Return the top-level parser, which lists the commands and does not know their options."""
    parser = ArgumentParser(
        prog="gmeta",
        exit_on_error=False,
        description="Meta-learned recommenders that adapt to new users, items and scenarios.",
        epilog="`gmeta COMMAND --help` explains a command, `gmeta --version` prints the version.",
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, ArgumentParser(exit_on_error=False), help=_summary(command))
    return parser


@cache
def command_parser(name: str) -> ArgumentParser:
    """Return the parser of one command, from the fields and docstrings of its dataclass.

    Nobody adds to it: making that of `train` takes 0.2 s, and a process may call many commands.
    """
    command = COMMANDS[name]
    parser = parser_of(command.config, f"gmeta {name}")
    if command.bare is not None:
        parser.usage = f"gmeta {name} {command.bare_usage} [--key VALUE] ..."
    if command.distributed:
        parser.add_argument(
            "--nproc", type=int, default=1, help="Processes to start on this machine (torchrun does it on clusters)."
        )
    return parser


def _fail(prog: str, error: Exception | str) -> int:
    """Report a user's mistake. Where the user's own code raised, its traceback comes before the message."""
    from gmeta.parallel.launch import EXIT_USER_ERROR, report_error

    message = f"{prog}: error: {error}"
    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        message = "".join(traceback.format_exception(error.__cause__)) + message
    report_error(message)
    return EXIT_USER_ERROR


def _warn(prog: str, sentence: str) -> None:
    if not is_worker() or worker_rank() == 0:
        print(f"{prog}: warning: {sentence}", file=sys.stderr, flush=True)


def _left_out(parser: ArgumentParser, words: list[str]) -> list[str]:
    """Return words that add what the words of a training leave out, where they name no model."""
    given = given_values(parser, words)
    if not given.get("pack"):
        return []
    from gmeta.training.defaults import with_defaults

    filled = with_defaults(given)
    # As the last file, because an earlier one would lose model.args to the user's own.
    return [] if filled == given else [f"--config={yaml.safe_dump(filled)}"]


def run_quietly(argv: list[str]) -> int:
    """`run`, which ends without a word where nobody reads its output any more (`gmeta … | head -1`)."""
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 128 + signal.SIGPIPE


def _reader_left() -> bool:
    """Whether a broken pipe is that of the output; it may be that of a peer too. What was not read is still there."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    if argv == ["--version"]:
        print(f"gmeta {version('gmeta')}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(overview().format_help().strip())
        return 0
    if argv[0] not in COMMANDS:
        try:
            overview().parse_args(argv)
            return 0
        except ArgumentError as error:
            near = closest(argv[0], COMMANDS)
            hint = f"did you mean {near}?" if near else "`gmeta --help` lists the commands"
            return _fail("gmeta", f"{str(error).splitlines()[0]}; {hint}")
    name, words = argv[0], argv[1:]
    parser = command_parser(name)
    if {"-h", "--help"} & set(words):  # the parser would wrap the lines of what follows
        print("\n".join([parser.format_help(), COMMANDS[name].epilog or ""]).strip())
        return 0
    try:
        if name in ("train", "tune"):
            require_named_code(words)
        if (bare := COMMANDS[name].bare) is not None:
            words = name_bare_words(words, bare)
        if name in RENAMED_BY_COMMAND:
            words, told = modern_words(words, name)
            for sentence in told:
                _warn(parser.prog, sentence)
        config: Any
        if name in ("train", "tune"):  # mistakes come before what is left out, and that before --print_config
            said = [word for word in words if word != "--print_config"]
            parse_words(parser, COMMANDS[name].config, said)
            words = [*words, *_left_out(parser, said)]
        config, others = parse_words(parser, COMMANDS[name].config, words)
    except ValueError as error:
        return _fail(parser.prog, error)
    except RecursionError:
        return _fail(parser.prog, "a value is nested too deeply: correct it")
    nproc = others.get("nproc", 1)
    try:
        elastic = isinstance(config, TrainConfig) and config.elastic.enabled
        if (nproc != 1 or elastic) and not is_worker():
            return _launch(parser.prog, config, nproc, [name, *words])
        return COMMANDS[name].run(config)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise
        return _fail(parser.prog, error)
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        return _peer_lost(parser.prog, error)


def _peer_lost(prog: str, error: RuntimeError) -> int:
    """Report that the peers of this worker are gone, and return the exit code. Any other RuntimeError is a bug and is
    raised again.
    """
    from gmeta.parallel.launch import EXIT_PEER_LOST, report_error
    from gmeta.parallel.mesh import PeerLost

    if not isinstance(error, PeerLost):
        raise error
    report_error(f"{prog}: error: {error}")
    return EXIT_PEER_LOST


def _launch(prog: str, config: Any, nproc: int, argv: list[str]) -> int:
    """Run this command in worker processes. Those of an elastic group, and of a tuning, are watched and started
    again.
    """
    if nproc < 1:
        return _fail(prog, f"nproc is {nproc}: must be at least 1")
    if isinstance(config, TrainConfig) and config.elastic.enabled:
        from gmeta.training.supervise import supervise

        return supervise(config, nproc, argv)
    if isinstance(config, TuneConfig):
        from gmeta.tuning.supervise import supervise_tuning

        return supervise_tuning(Path(config.out), nproc, argv)
    from gmeta.parallel.launch import launch

    return launch(nproc, argv)
