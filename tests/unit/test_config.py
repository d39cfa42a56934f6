"""Configs from files, mappings and words: types, unknown keys, and keys of the release before."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from commands import fails

from gmeta.cli import command_parser, run
from gmeta.config import cluster, data, evaluation, train
from gmeta.config.deprecated import upgrade, upgrade_words
from gmeta.config.parse import given_values, modern_words, parse_words, parser_of, require_named_code, train_config
from gmeta.config.train import DenseConfig, ReplayConfig, TrainConfig
from gmeta.data.schema import load_data_schema

BASE = {"pack": "p", "run_dir": "r"}


def test_a_mapping_a_file_and_a_dataclass_give_the_same_config(tmp_path: Path) -> None:
    values = {**BASE, "model": {"name": "taste", "args": {"hidden": [8]}}, "meta": {"inner_lr": 0.5}}
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(values))
    config = train_config(values)
    assert config == train_config(file) == train_config(str(file)) == train_config(config)
    assert (config.model.args, config.meta.inner_lr, config.seed) == ({"hidden": [8]}, 0.5, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sede": 1}, "unknown key sede: did you mean seed?"),
        ({"meta": {"inner_rl": 1}}, "unknown key meta.inner_rl: did you mean meta.inner_lr?"),
        ({"meta": {"inner_steps": "many"}}, "meta.inner_steps is 'many': must be of type int"),
        ({"meta": {"inner_steps": 0}}, "meta.inner_steps is 0: must be at least 1"),
        ({"loss": "hinge"}, "loss is 'hinge': must be one of"),
        ({"init_map": {"model": "model"}}, "init_map is {'model': 'model'}: says what to take of init_from"),
        ({"init_from": "b", "warm_start": "b"}, "init_from is 'b': warm_start goes on with a whole model"),
        ({"init_from": "b", "init_map": ["model"]}, "init_map is"),
        ({"replay": {"pack": "b", "fraction": 0}}, "replay.fraction is 0.0: must be in (0, 1)"),
        ({"replay": {"fraction": 0.2}}, "replay.fraction is 0.2: says how much of replay.pack to replay; name that"),
        ({"embedding": {"pretrained": {"item": "f"}, "start": "factors"}}, "embedding.pretrained sets first rows too"),
    ],
)
def test_mistakes_are_told_in_one_form(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"config") as caught:
        train_config({**BASE, **values})
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_setting_is_infinite_or_no_number(value: float) -> None:
    needed = {"pack": "p", "run_dir": "r", "out": "o", "journal": "j", "params": 1e9}
    needed |= {"scenario": "s", "support": "s", "query": "q", "steps": 1, "inner_lr": 0.1, "adapt": ["head"]}
    classes = [train, cluster, data, evaluation]
    found = 0
    for config in (c for module in classes for c in vars(module).values() if dataclasses.is_dataclass(c)):
        hints = get_type_hints(config)
        given = {f.name: needed[f.name] for f in dataclasses.fields(config) if f.default is f.default_factory}
        for key in (name for name, hint in hints.items() if hint in (float, float | None)):
            found += 1
            with pytest.raises(ValueError, match=rf"{key} is -?(inf|nan): must be a finite number"):
                config(**{**given, key: value})
    assert found > 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "melu"], "model is 'melu': it is a section, such as --model.name VALUE"),
        (["--elastic", "true"], "elastic is 'true': it is a section, such as --elastic.enabled VALUE"),
        (["--config", "absent.yaml"], "absent.yaml': there is no such file; name a YAML file"),
        (["--config", "year.yaml"], "run_dir is '2024': must be text: write it in quotes"),
        (["--config", "args.yaml"], "model.args is None: it is a section"),
        (["--config", "none.yaml"], "model.args is None: must be a mapping"),
        (["--comm.fetch", "{"], "comm.fetch is '{': this comparison moved"),
        (["--model.foo", "1"], "unknown key model.foo: did you mean model.name?"),
        (["--seed", str(2**63)], "seed is 9223372036854775808: must be in [0, 2^63)"),
        (
            ["--elastic.url", "http://x", "--model.name", "melu"],
            "elastic.url is 'http://x': has no effect without --elastic.enabled true",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("year.yaml").write_text("run_dir: 2024\n")
    Path("args.yaml").write_text("model: {hidden: [8], args: }\n")
    Path("none.yaml").write_text("model: {args: }\n")
    assert run(["train", "--pack", "p", *([] if "year.yaml" in words else ["--run_dir", "r"]), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "--out", "o", "--nproc", "2"], "unknown key nproc: `gmeta prepare --help` lists the keys"),
        (["prepare", "--out", "o", "--partitions", "{a: 1}"], "partitions['a'] is 1: splits are train, valid"),
        (["prepare", "--out", "o", "--memory_limit", "999999999999999TB"], "must be a size such as 500MB or 2GB"),
        (["prepare", "--out", "o", "--seed", "-1"], "seed is -1: must be in [0, 2^63)"),
        (["synth", "--out", "o", "--seed", str(2**64)], "must be in [0, 2^63)"),
        (["evaluate", "--run_dir", "r", "--seed", "-1"], "seed is -1: must be in [0, 2^63)"),
        (["evaluate", "--run_dir", "r", "--timeout_s", "0"], "timeout_s is 0: must be at least 1"),
        (["doctor", "--node_size", "4"], "node_size is 4: has no effect without --network FILE"),
    ],
)
def test_mistakes_of_other_commands(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "melu"}, "model is 'melu': it is a section, such as model: {name: …}"),
        ({"model": None}, "model is None: it is a section"),
    ],
)
def test_a_section_of_a_mapping_holds_keys(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match="config: model") as caught:
        train_config({**BASE, **values})
    assert message in str(caught.value)


def test_a_dataclass_is_checked_as_a_mapping_is(tmp_path: Path) -> None:
    made = train_config(TrainConfig(pack=tmp_path, run_dir=tmp_path / "run"))  # type: ignore[arg-type]
    assert (made.pack, made.run_dir) == (str(tmp_path), str(tmp_path / "run"))
    for values, message in (
        ({"seed": "0"}, "seed is '0': must be a number"),
        ({"schedule": {"max_steps": 1}}, "schedule is {'max_steps': 1}: must be a ScheduleConfig"),
        ({"device": "gpu"}, "device is 'gpu': must be one of"),
        ({"seed": 0.5}, "seed is '0.5': must be of type int"),
    ):
        with pytest.raises(ValueError) as caught:
            train_config(TrainConfig(**BASE, **values))
        assert message in str(caught.value)


def test_names_of_the_users_may_have_dots() -> None:
    values = {
        "init_from": "b",
        "init_map": {"model.layers.0": "model.bottom.0"},
        "embedding": {"pretrained": {"a.b": "f"}},
    }
    config = train_config({**BASE, **values})
    assert train_config(config) == config  # it names no model, and so is taken apart by dotted key
    assert config.init_map == values["init_map"]
    assert config.embedding.pretrained == {"a.b": "f"}


def test_old_keys_warn_and_name_the_new_one() -> None:
    values = {**BASE, "dense": {"placement": "IIG", "group_size": 2}, "model": {"hidden": [8], "bottom": [4]}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = train_config(values)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 4
    assert told[0].startswith("config: dense.placement is now dense.sharding")
    assert (config.dense.sharding, config.dense.node_size) == ("IIG", 2)
    assert config.model.args == {"hidden": [8]}  # melu never had a bottom network
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_config({**BASE, "dense": {"sharding": "IIG", "node_size": 2}})


def test_a_run_that_replayed_nothing_may_say_how_much() -> None:
    """As config.yaml of a release before does."""
    assert train_config({**BASE, "replay": {"pack": "", "fraction": 0.2}}).replay == ReplayConfig()


def test_an_old_key_beside_its_new_one_is_refused() -> None:
    both = {**BASE, "dense": {"placement": "IIG", "sharding": "NNN"}}
    with pytest.raises(ValueError, match=r"dense.placement is the old name of dense.sharding, and both are set"):
        train_config(both)
    with pytest.raises(ValueError, match=r"both are set"):
        upgrade_words(["--dense.placement", "IIG", "--dense.sharding=NNN"])


def test_words_and_files_of_the_release_before(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({**BASE, "dense": {"placement": "auto"}}))
    words, told = modern_words(["--config", str(file), "--dense.placement=IIG", "--seed", "3"])
    assert [sentence.partition(";")[0] for sentence in told] == [
        "dense.placement is now dense.sharding",
        f"{file}: dense.placement is now dense.sharding",
    ]
    assert words[2:] == ["--dense.sharding", "IIG", "--seed", "3"]
    assert yaml.safe_load(words[1])["dense"] == {"sharding": "auto"}
    untouched = ["--config", str(tmp_path / "absent.yaml"), "--seed", "3"]
    assert modern_words(untouched) == (untouched, [])


def test_later_files_add_to_the_arguments_of_a_model(tmp_path: Path) -> None:
    files = {
        "base": {"model": {"name": "melu", "args": {"hidden": [8], "dropout": 0.1}}},
        "more": {"model": {"args": {"hidden": [4]}}},
        "other": {"model": {"name": "dlrm", "args": {"top": [2]}}},
        "bare": {"model": {"name": "taste"}},
    }
    for name, values in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))

    def args(*names: str) -> object:
        words, _ = modern_words([f"--config={tmp_path / name}.yaml" for name in names])
        parser = command_parser("train")
        return given_values(parser, [*words, "--pack=p", "--run_dir=r"])["model"].get("args")

    assert args("base", "more") == {"hidden": [4], "dropout": 0.1}
    assert args("more", "base") == {"hidden": [8], "dropout": 0.1}
    assert args("base", "other") == {"top": [2]}
    assert args("base", "bare") == {}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (
            ["plan", "--params", "7e9", "--group_size", "4", "--groups=2"],
            {"group_size": "node_size", "groups": "nodes"},
        ),
        (["doctor", "--network", "n.json", "--group_size", "4"], {"group_size": "node_size"}),
    ],
)
def test_old_keys_of_other_commands(
    words: list[str], names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(words)
    told = capsys.readouterr().err
    for old, new in names.items():
        assert told.count(f"warning: {old} is now {new}") == 1
    assert run([*words, "--node_size", "8"]) == 2
    assert "group_size is the old name of node_size, and both are set" in capsys.readouterr().err


def test_every_setting_of_today_is_left_alone() -> None:
    from dataclasses import asdict

    values = asdict(TrainConfig(**BASE, dense=DenseConfig(sharding="IIG")))
    assert upgrade(values) == (values, [])


def test_the_command_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({"pack": str(tmp_path / "none"), "run_dir": str(tmp_path / "r"), "seed": 1}))
    assert run(["train", "--config", str(file), "--dense.placement", "NNN"]) == 2
    told = capsys.readouterr().err
    assert told.count("warning: dense.placement is now dense.sharding") == 1
    assert "Traceback" not in told


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gmeta 0.")
    assert run(["prepare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Turn raw ratings or click logs into a task pack") == 1
    for key in ("task:", "label:", "categorical:", "sequence:", "numeric:", "label_threshold:"):
        assert key in shown
    assert run(["predict", "--help"]) == 0
    assert "The support file needs the columns" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["a flag", "a file", "flags alone"])
def test_old_model_keys_go_to_the_model_that_is_trained(tmp_path: Path, how: str) -> None:
    """Whoever names the model: dlrm takes a bottom network, melu has none."""
    file, named = tmp_path / "old.yaml", ["--model.name", "dlrm"]
    file.write_text(yaml.safe_dump({"model": {"bottom": [8]} | ({"name": "dlrm"} if how == "a file" else {})}))
    words = ["--model.bottom", "[8]"] if how == "flags alone" else [f"--config={file}"]
    words, told = modern_words([*words, *(named if how != "a file" else [])])
    if how == "flags alone":
        assert words[:2] == ["--model.args.bottom", "[8]"]
    else:
        assert yaml.safe_load(words[0].removeprefix("--config="))["model"]["args"] == {"bottom": [8]}
    assert len(told) == 1
    left_out, told = modern_words(["--model.bottom", "[8]", "--model.name=melu"])
    assert left_out == ["--model.name=melu"]
    assert "has no effect" in told[0]


@pytest.mark.parametrize("word", ["true", "yes", "True"])
def test_a_dropped_switch_may_say_what_is_left(word: str) -> None:
    words, told = upgrade_words(["--comm.dedup", word, "--seed", "1"])
    assert words == ["--seed", "1"]
    assert "comm.dedup is gone" in told[0]
    with pytest.raises(ValueError, match=r"comm.dedup is False: this comparison moved"):
        upgrade_words(["--comm.dedup=no"])
    assert upgrade_words(["--dense.placement"])[0] == ["--dense.sharding"]


def test_mappings_may_hold_paths(tmp_path: Path) -> None:
    assert train_config({"pack": tmp_path, "run_dir": tmp_path / "run"}).pack == str(tmp_path)
    with pytest.raises(ValueError, match=r"config is None: give the path"):
        train_config(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "name"), [("elastic.policy", "mine:policy"), ("model.name", "mine.towers:Two")])
def test_code_that_only_a_run_names_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, name: str):
    section, _, last = key.partition(".")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"pack": "p", "run_dir": str(tmp_path), section: {last: name}}))
    words = ["train", "--config", str(file), "--resume", "true"]
    require_named_code(words)  # a config file of the user's own, beside no run
    (tmp_path / "run_id").write_text("r\n")
    fails(words, capsys, str(file), f"{key} {name}", f"name it yourself: --{key} {name}")
    fails(["train", f"--config={file}"], capsys, f"--{key} {name}")
    require_named_code([*words, f"--{key}", name])
    require_named_code([*words, f"--{key}={name}"])
    file.write_text(yaml.safe_dump({"model": {"name": "melu"}, "elastic": {"policy": "nd"}}))
    require_named_code(words)


@pytest.mark.parametrize("deep", ["[" * 2000, "a: " + "{b: " * 2000])
def test_what_is_nested_too_deeply_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], deep: str):
    file = tmp_path / "deep.yaml"
    file.write_text(deep)
    fails(["train", "--config", file], capsys, "nested too deeply")
    fails(["lab", "--scenario", file, "--out", tmp_path / "out"], capsys, "nested too deeply")
    (tmp_path / "x.csv").write_text("user,click\n1,1\n")
    words = ["prepare", "--input", tmp_path / "x.csv", "--schema", file, "--out", tmp_path / "pack"]
    fails(words, capsys, "nested too deeply")
    fails(["train", "--model.args", deep], capsys)


def test_brackets_that_close_are_nested_too_deeply_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    deep = "[" * 2000 + "]" * 2000
    (tmp_path / "deep.yaml").write_text(deep)
    fails(["train", "--config", tmp_path / "deep.yaml"], capsys, "nested too deeply")
    fails(["train", "--model.args", deep], capsys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("label_threshold: .nan", "label_threshold is nan: must be a finite number"),
        ("label_threshold: .inf", "label_threshold is inf: must be a finite number"),
        (f"label_threshold: {'9' * 400}", "label_threshold is of 1329 bits: must be a finite number"),
        (f"sequence: [{{name: tags, separator: ' ', max_length: {'9' * 30}}}]", "max_length is"),
        ("sequence: [{name: tags, separator: ' ', min_count: 2147483648}]", "min_count is 2147483648: must be below"),
    ],
)
def test_numbers_of_a_schema_beyond_reason_are_refused(tmp_path: Path, line: str, said: str):
    (tmp_path / "schema.yaml").write_text(f"task: user\nlabel: click\ncategorical: [item]\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(said)):
        load_data_schema(tmp_path / "schema.yaml")


@pytest.mark.parametrize("value", [".nan", ".inf"])
@pytest.mark.parametrize("key", ["report_s", "patience_s"])
def test_times_of_an_elastic_group_are_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: str):
    file = tmp_path / "own.yaml"
    file.write_text(f"pack: p\nrun_dir: r\nelastic: {{{key}: {value}}}\n")
    fails(["train", "--config", file], capsys, f"elastic.{key} is {value[1:]}")


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_the_cool_down_is_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str):
    fails(["coordinate", "--journal", tmp_path / "j", "--cooldown_s", value], capsys, "cooldown_s is ", "finite")


TEMPLATES = ["Title: {text}", "{text}: a title", "- {text}", "{text}"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("how", ["a flag", "a flag of all", "with an equals sign", "a file", "a mapping"])
def test_a_text_among_the_arguments_of_a_model_stays_one(how: str, template: str, tmp_path: Path) -> None:
    """Also where YAML would take it for a mapping or a list; words that are numbers stay numbers."""
    args = {"template": template, "layers": 3, "rate": 0.001}
    values = {"pack": "p", "run_dir": "r", "model": {"name": "bahe", "args": args}}
    words = ["--pack", "p", "--run_dir", "r", "--model.name", "bahe"]
    if how == "a mapping":
        found = train_config(values)
    elif how == "a file":
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
        words = ["--config", str(tmp_path / "train.yaml")]
    elif how == "a flag of all":
        words += ["--model.args", yaml.safe_dump(args, default_flow_style=True)]
    else:
        flags = [f"--model.args.{key}" for key in args]
        given = zip(flags, (template, "3", "1e-3"), strict=True)
        words += [f"{a}={b}" for a, b in given] if "equals" in how else [word for pair in given for word in pair]
    if how != "a mapping":
        found, _ = parse_words(parser_of(TrainConfig, "gmeta train"), TrainConfig, words)
    assert found.model.args == args
    assert train_config(found).model.args == args
