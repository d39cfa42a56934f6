"""The report of a made-up but realistic run, and of runs that lack pieces."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from gmeta.evaluation.report import build_report
from gmeta.evaluation.slices import evaluation_records, write_evaluation
from gmeta.runs.log import write_environment

CONFIG = {
    "pack": "packs/clicks",
    "run_dir": "runs/<demo>",
    "loss": "bce",
    "model": {"name": "melu", "features": [], "embedding_dim": 16, "hidden": [64, 64]},
    "meta": {"adapt": ["embeddings", "decision"], "order": "second", "inner_steps": 1, "inner_lr": 0.1},
    "seed": 0,
}


def make_scores(binary, rng, task):
    """Labels with a taste of each task that the support partly shows, and scores of every usual variant."""
    taste = rng.normal(size=task.max() + 1)[task]
    item = rng.normal(size=len(task))
    noise = rng.normal(size=(6, len(task)))
    truth = 0.9 * item + taste * item[::-1]
    known = {
        "before": 0.7 * item,
        "after": 0.8 * item + 0.8 * taste * item[::-1] + 0.3 * noise[0],
        "plain": 0.75 * item + 0.2 * noise[1],
        "plain-finetuned": 0.75 * item + 0.4 * taste * item[::-1] + 0.3 * noise[2],
        "global-mean": 0 * item,
        "task-mean": 0.2 * taste,
        "item-mean": 0.6 * item + 0.2 * noise[3],
        "item-mean+task-bias": 0.6 * item + 0.2 * taste,
        "factor-analysis": 0.6 * item + 0.5 * taste * item[::-1] + 0.5 * noise[4],
    }
    if binary:
        label = (rng.random(len(task)) < 1 / (1 + np.exp(-2 * truth))).astype(float)
        return label, {name: 1 / (1 + np.exp(-2 * value)) for name, value in known.items()}
    label = np.clip(np.round(3.5 + 0.8 * truth + 0.5 * noise[5]), 1, 5)
    return label, {name: np.clip(3.5 + 0.8 * value, 1, 5) for name, value in known.items()}


def write_metrics(run_dir, num_steps, binary):
    rng = np.random.default_rng(1)
    lines, clock = [], 0.0
    for step in range(1, num_steps + 1):
        seconds = 0.05 * (1 + 0.2 * rng.random())
        clock += seconds
        loss = 0.45 + 0.25 * np.exp(-step / (num_steps / 5)) + 0.03 * rng.normal()
        lines.append(
            {
                **{"kind": "train", "step": step, "epoch": step * 10 // (num_steps + 1), "loss": loss},
                **{"support_loss": loss + 0.05, "lr": 0.001 * min(1, step / 50), "grad_norm": 1 + rng.random()},
                **{"tasks_per_s": 64 / seconds, "samples_per_s": 1280 / seconds, "padding": 0.06},
                **{"input_share": 0.08, "exchange_share": 0.12 + 0.05 * rng.random(), "time_s": clock},
            }
        )
        kinds = {kind: {"bytes": 1000, "remote_bytes": 700, "calls": 1} for kind in ("ids", "rows", "dense")}
        sent = {**kinds, "rows": {"bytes": 64_000 + 2 * step, "remote_bytes": 48_000, "calls": 2}}
        lines[-1]["comm"] = {"measured": sent, "predicted": {**sent, "dense": kinds["ids"] | {"bytes": 999}}}
        lines[-1]["compute_share"] = 0.92 - lines[-1]["exchange_share"]
        if step % max(1, num_steps // 10) == 0:
            record = {"kind": "valid", "step": step}
            for name in ("loss", "auc", "gauc") if binary else ("loss", "mae"):
                gain = 0.1 * (1 - np.exp(-step / (num_steps / 4)))
                sign = -1 if name in ("loss", "mae") else 1
                record |= {f"{name}_before": 0.6 + sign * gain / 3, f"{name}_after": 0.6 + sign * gain}
            lines.append(record)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(run_dir, *, binary=True, num_tasks=150, num_steps=400, resamples=20):
    """A run directory with everything a report reads."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    write_environment(run_dir / "environment.json", ranks=2, backend="gloo")
    write_metrics(run_dir, num_steps, binary)
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(num_tasks), 10)
    label, scores = make_scores(binary, rng, task)
    document = evaluation_records(
        scores,
        label=label,
        task=task,
        support_size=rng.integers(2, 60, size=num_tasks)[task],
        item_cold=rng.random(len(task)) < 0.15,
        task_cold=True,
        binary=binary,
        resamples=resamples,
        seed=0,
    )
    write_evaluation(run_dir / "evaluation.json", document, {"split": "test", "checkpoint": "best"})
    return run_dir


class Page(HTMLParser):
    """Checks that tags nest; collects ids, references and text."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "use", "rect"})

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.words = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[key] for key in ("href", "src", "xlink:href") if key in values]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module", params=[True, False], ids=["clicks", "ratings"])
def page(request, tmp_path_factory):
    path = build_report(make_run(tmp_path_factory.mktemp("runs") / "demo", binary=request.param))
    return path.read_text(encoding="utf-8"), json.loads((path.parent / "evaluation.json").read_text())


def test_page_is_self_contained_and_well_formed(page):
    parsed = Page(page[0])
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links)
    assert set(re.findall(r"url\(#([^)]*)\)", page[0])) <= set(parsed.ids)
    assert "<script" not in page[0]
    assert not re.findall(r"""(?:url\(|@import|src=)["']?(?:https?:)?//""", page[0])


def test_numbers_on_the_page_are_those_of_the_evaluation(page):
    html, evaluation = page
    metric = evaluation["headline"]["metric"]
    for record in evaluation["records"]:
        if record["case"] == "all":
            assert f"{record['value']:.4f}".replace("-", "−") in html
    difference = next(d for d in evaluation["differences"] if (d["case"], d["metric"]) == ("all", metric))
    assert f"{difference['value']:+.4f}".replace("-", "−") in html
    text = " ".join(Page(html).words)
    assert f"adapting to the support set improves {metric.upper()}" in text
    assert "best baseline, factor-analysis" in text


def test_page_has_every_part(page):
    text = " ".join(Page(page[0]).words)
    for part in (
        *("Every variant", "By support size", "By coldness", "Calibration", "Training loss", "Validation loss"),
        *("Where the time went", "All metrics", "meta.inner_lr", "packages.torch", "both-cold", "mean prediction"),
        *("Each point averages 2 steps", "No query rows here with: task and item seen in training"),
    ):
        assert part in text, part
    assert "runs/&lt;demo&gt;" in page[0]


def test_reports_repeat_byte_for_byte(tmp_path):
    run = make_run(tmp_path / "demo", num_tasks=20, num_steps=0, resamples=10)
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first


def test_what_is_missing_names_its_command(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    text = " ".join(Page(build_report(tmp_path).read_text()).words)
    assert f"gmeta evaluate --run_dir {tmp_path}" in text
    assert "No step has been logged yet" in text


def test_one_step_and_one_validation_are_enough(tmp_path):
    run = make_run(tmp_path / "demo", num_tasks=4, num_steps=1, resamples=5)
    assert "Validation AUC" in build_report(run).read_text()


def test_plain_run_without_after(tmp_path):
    run = make_run(tmp_path / "demo", num_tasks=20, num_steps=0, resamples=5)
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(20), 10)
    label, scores = make_scores(True, rng, task)
    zeros = np.zeros(len(task))
    document = evaluation_records(
        {name: scores[name] for name in ("before", "global-mean")},
        **{"label": label, "task": task, "support_size": zeros + 5, "item_cold": zeros},
        **{"task_cold": False, "binary": True, "resamples": 5, "seed": 0},
    )
    write_evaluation(run / "evaluation.json", document, {})
    assert "AUC of before" in build_report(run).read_text()


def test_what_the_pack_left_out_stands_beside_the_headline(tmp_path):
    run = make_run(tmp_path / "demo", num_tasks=20, num_steps=0, resamples=5)
    evaluation = json.loads((run / "evaluation.json").read_text())
    for found, shown in ((["12 tasks <left> out"], True), ([], False), (None, False)):
        evaluation["left_out"] = found
        if found is None:  # as earlier releases wrote it
            del evaluation["left_out"]
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        assert ("12 tasks &lt;left&gt; out." in build_report(run).read_text()) == shown
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "left_out": [3]}))
    with pytest.raises(ValueError, match=r"left_out\[0\] is 3"):
        build_report(run)


def test_undefined_metrics_are_said(tmp_path):
    run = make_run(tmp_path / "demo", num_tasks=20, num_steps=0, resamples=5)
    evaluation = json.loads((run / "evaluation.json").read_text())
    for record in (*evaluation["records"], *evaluation["differences"]):
        record |= {"value": None, "low": None, "high": None}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "AUC is undefined on these rows" in build_report(run).read_text()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        build_report(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml holds no mapping"):
        build_report(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "evaluation.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"evaluation\.json is not JSON .*run `gmeta evaluate` again"):
        build_report(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"records": []}')
    with pytest.raises(ValueError, match=r"lacks headline, .*run `gmeta evaluate` again"):
        build_report(tmp_path)


def with_curve(run):
    """Add a learning curve to the evaluation of a run: the usual variants, two sizes."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    metric = evaluation["headline"]["metric"]
    keys = {"metric": metric, "low": 0.5, "high": 0.75, "n": 20, "unit": "1"}
    points = [(size, name) for size in (0, 5) for name in evaluation["variants"]]
    evaluation["support_curve"] = {
        "tasks": 20,
        "sizes": [{"size": 0, "short_tasks": 0}, {"size": 5, "short_tasks": 1234}],
        "records": [{"size": s, "variant": v, "value": 0.6 + s / 100, **keys} for s, v in points],
        "differences": [{"size": s, "against": v, "value": 0.1125, **keys} for s, v in points if v != "after"],
        "gains": [],
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


def test_a_learning_curve_is_a_chart_and_tables(tmp_path):
    run = make_run(tmp_path / "demo", num_tasks=20, num_steps=0, resamples=5)
    assert "Learning curve" not in build_report(run).read_text()
    evaluation = with_curve(run)
    html = build_report(run).read_text()
    parsed = Page(html)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert '<svg role="img" aria-label="Learning curve"' in html
    section = html[html.index("<h2>Learning curve") : html.index("<h2>Training")]
    text = " ".join(Page(section).words)
    for part in (*evaluation["variants"], "0.6500", "after − variant", "+0.1125", "+0.5000 … +0.7500"):
        assert part in text, part
    assert "use what they have: 0: 0; 5: 1,234." in text


def test_an_evaluation_of_another_folder_is_reported_there(tmp_path):
    run = make_run(tmp_path / "demo", num_tasks=20, num_steps=2, resamples=5)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (run / "evaluation.json").rename(folder / "evaluation.json")
    assert build_report(run, folder) == folder / "report.html"
    assert "Training loss" in (folder / "report.html").read_text()
    assert "AUC of after" in (folder / "report.html").read_text()
    assert not (run / "report.html").exists()


def test_traffic_stands_beside_its_prediction(tmp_path):
    make_run(tmp_path / "run", num_steps=5)
    page = build_report(tmp_path / "run").read_text()
    row = re.search(r"<tr><td>rows \(AlltoAll\)</td>(.*?)</tr>", page)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == ["64,006", "64,006", "48,000", "48,000", "2.0"]
    row = re.search(r"<tr><td>dense gradients</td>(.*?)</tr>", page)[1]
    assert re.findall(r"<td>(.*?)</td>", row)[:2] == ["1,000", "999"]


def test_traffic_is_that_of_the_last_stretch(tmp_path):
    """A run resumed with other settings, or on one process, makes other calls."""
    make_run(tmp_path / "run", num_steps=5)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    first = [line for line in lines if line["kind"] == "train"][:2]
    for line in first:
        for which in ("measured", "predicted"):
            line["comm"][which]["rows"]["calls"] += 2
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = build_report(tmp_path / "run").read_text()
    assert "mean of the last 3<" in page
    assert "<td>2.0</td>" in page


def test_one_process_has_no_traffic_to_show(tmp_path):
    make_run(tmp_path / "run", num_steps=5)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "comm"}) + "\n" for r in lines))
    assert "Communication" not in build_report(tmp_path / "run").read_text()


EVIL = '"><script>$x'


def poisoned(value, keep=()):
    """The same JSON with markup in every text and key; equal texts stay equal."""
    if isinstance(value, str):
        return value if value in keep else value + EVIL
    if isinstance(value, list):
        return [poisoned(item, keep) for item in value]
    if isinstance(value, dict):
        return {key if key in keep else key + EVIL: poisoned(item, keep) for key, item in value.items()}
    return value


@pytest.mark.parametrize("reference_too", [False, True])
def test_no_text_of_a_run_becomes_markup(tmp_path, reference_too):
    run = make_run(tmp_path / "run", num_tasks=20, num_steps=20, resamples=5)
    evaluation = with_curve(run)
    keys = {*evaluation["support_curve"], "size", "short_tasks"}
    keys |= {*evaluation, "metric", "higher_is_better", "case", "about", "tasks", "rows", "variant", "value", "low"}
    keys |= {"warm", "user_cold", "item_cold", "both_cold"}
    keys |= {"high", "n", "against", "predicted", "observed", "all", *([] if reference_too else ["after", "before"])}
    (run / "evaluation.json").write_text(json.dumps(poisoned(evaluation, keys)))
    (run / "config.yaml").write_text(yaml.safe_dump(poisoned(CONFIG, {*CONFIG, "name", "order", "adapt"})))
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(poisoned(environment)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "valid":
            line |= {f"{EVIL}_before": 0.1, f"{EVIL}_after": 0.2}
        else:
            line["comm"] = poisoned(line["comm"], {"measured", "predicted", "bytes", "remote_bytes", "calls"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = build_report(run).read_text()
    Page(page)
    assert "<script" not in page
    assert page.index("Content-Security-Policy") < page.index("<title>")


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["resamples"], EVIL, "resamples is"),
        (["headline", "metric"], 3, "headline.metric is 3"),
        (["cases", 0, "rows"], EVIL, r"cases\[0\].rows is"),
        (["cases"], [], "it has no cases"),
        (["records", 1, "low"], "0.5", r"records\[1\].low is '0.5'"),
        (["records", 1, "value"], float("nan"), "value is nan"),
        (["records"], {}, "records is no list"),
        (["curves", "after"], [{"predicted": "x", "observed": 0.5}], "predicted is 'x'"),
        (["reference"], "somebody", "none of 'auc' for 'somebody'"),
        (["differences"], [], "differences have none of 'auc'"),
        (["support_curve", "sizes", 0, "size"], EVIL, r"support_curve.sizes\[0\].size is"),
        (["support_curve", "records", 1, "value"], "x", r"support_curve.records\[1\].value is 'x'"),
        (["support_curve"], 3, "support_curve is no object"),
    ],
)
def test_an_evaluation_of_another_shape_is_refused(tmp_path, where, value, said):
    run = make_run(tmp_path / "run", num_tasks=20, num_steps=2, resamples=5)
    evaluation = with_curve(run)
    inside = evaluation
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(ValueError, match=rf"evaluation.json is not what gmeta writes \(.*{said}"):
        build_report(run)


@pytest.mark.parametrize("wrong", [{"loss": EVIL}, {"epoch": "1"}, {"comm": 3}, {"comm": {"measured": {"ids": {}}}}])
def test_a_log_of_another_shape_is_refused(tmp_path, wrong):
    run = make_run(tmp_path / "run", num_tasks=20, num_steps=2, resamples=5)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    (run / "metrics.jsonl").write_text(json.dumps(first | wrong) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, record 1 is not what gmeta writes \(.*; delete the line"):
        build_report(run)
