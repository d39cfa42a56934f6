"""The report of a laboratory run: one HTML file that shows who computed, who waited, what was done, and when."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from gmeta.core.files import write_text
from gmeta.elastic.scenario import Scenario
from gmeta.lab.drawing import BUSY, IDEAL, INPUT, SLOW, WAITING, Picture, fraction_path, rank_colour
from gmeta.lab.folder import LabFolder, read_lines
from gmeta.lab.measure import Execution, LabResult, executions

_ZOOM_S = 6.0
_BIN_PX = 2.0
_MAX_ROWS = 200
_PAUSE_S = 3.0
"""Without a step for longer, a group was being started again: that takes several seconds, a step less."""
_SLOWED = 1.05
"""A device that takes so many times longer than one of speed 1 is marked as slow."""


@dataclass(frozen=True)
class Moment:
    """Something that was done to the run, or decided in it."""

    at: float  # seconds since the start
    kind: str  # fault or action
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Story:
    """All that is drawn."""

    scenario: Scenario
    ranks: list[list[Execution]]
    inputs: list[dict[int, float]]  # of each rank: step -> seconds without a batch
    moments: list[Moment]
    end: float


def write_timeline(folder: LabFolder, scenario: Scenario, result: LabResult) -> Path:
    """Write report.html into the folder."""
    story = _story(folder, scenario)
    sections = [
        _cards(result),
        _legend(),
        _figure("The whole run", _whole(story)),
        _figure(_zoom_title(story), _zoom(story)),
        _table("What was done", ("seconds", "", "what", "details"), [_row(m) for m in story.moments[:_MAX_ROWS]]),
        _table("The run in numbers", ("", ""), _numbers(result)),
    ]
    template = resources.files("gmeta.evaluation").joinpath("report_template.html").read_text(encoding="utf-8")
    title = f"{result.policy} on {scenario.workers} emulated workers"
    subtitle = " · ".join([f"{scenario.steps} steps of {scenario.tasks_per_batch} tasks", *_troubles(scenario)])
    page = Template(template).substitute(title=escape(title), subtitle=escape(subtitle), body="\n".join(sections))
    path = folder.path / "report.html"
    write_text(path, page)
    return path


def _story(folder: LabFolder, scenario: Scenario) -> Story:
    ranks = [executions(folder, rank) for rank in range(scenario.workers)]
    inputs: list[dict[int, float]] = [{} for _ in ranks]
    trace, started = read_lines(folder.trace), folder.clock() or 0.0
    for line in trace:
        if line["kind"] == "report":
            inputs[line["rank"]] |= {step: input_s for step, _, input_s, *_ in line["steps"]}
    moments = [
        Moment(line["at"], "fault", line["what"], _words(line, ("at", "what"))) for line in read_lines(folder.faults)
    ]
    for line in trace:
        if line["kind"] == "decide":
            moments += [_action(action, line, started) for action in line["actions"]]
    end = max((e.end for found in ranks for e in found), default=1.0)
    return Story(scenario, ranks, inputs, sorted(moments, key=lambda m: m.at), end)


def _action(action: Mapping[str, Any], line: Mapping[str, Any], started: float) -> Moment:
    detail = f"{_words(action, ('action',))}, from step {line['setting']['step']}"
    return Moment(line["now"] - started, "action", action["action"], detail)


def _words(values: Mapping[str, Any], without: Sequence[str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if key not in without)


# Pictures


def _whole(story: Story) -> str:
    picture = Picture(0.0, story.end)
    _moments(picture, story.moments)
    height = max(7.0, min(26.0, 320 / len(story.ranks)))
    top = picture.y
    for rank, found in enumerate(story.ranks):
        busy = sum(e.busy_s for e in found) / story.end
        _lane(picture, story, rank, height, f"rank {rank}  {busy:.0%}" if height >= 12 else "")
    _tasks(picture, story)
    _step_times(picture, story)
    picture.rules([m.at for m in story.moments if m.kind == "action"], top)
    picture.axis()
    return picture.svg("Timeline: computing, waiting, tasks and step time of every worker")


def _moments(picture: Picture, moments: Sequence[Moment]) -> None:
    for kind in ("fault", "action"):
        here = [m for m in moments if m.kind == kind]
        if here:
            picture.marks(kind + "s", [(m.at, m.label, f"{m.at:.2f} s: {m.label} {m.detail}") for m in here], kind)


def _lane(picture: Picture, story: Story, rank: int, height: float, label: str) -> None:
    """Draw the fractions of computing, input and waiting, bin by bin, with a strip above where the device is slow."""
    found, inputs = story.ranks[rank], story.inputs[rank]
    bins = max(1, int(picture.width / _BIN_PX))
    size = story.end / bins
    busy, fed, alive = [0.0] * bins, [0.0] * bins, [0.0] * bins
    before: Execution | None = None
    for e in found:
        spread(busy, size, e.begin, e.begin + e.busy_s)
        wait = min(inputs.get(e.step, 0.0), e.begin - before.end if before else 0.0)
        spread(fed, size, e.begin - wait, e.begin)
        going_on = before is not None and e.step == before.step + 1 and e.begin - before.end < _PAUSE_S
        spread(alive, size, before.end if before and going_on else e.begin, e.end)
        before = e
    fractions = [[min(1.0, value / size) for value in values] for values in (busy, fed, alive)]
    stacked = [[min(1.0, b + f) for b, f in zip(fractions[0], fractions[1], strict=True)], fractions[0]]
    y = picture.lane(height, label)
    picture.path(fraction_path(picture, fractions[2], size, y, height), WAITING)
    picture.path(fraction_path(picture, stacked[0], size, y, height), INPUT)
    picture.path(fraction_path(picture, stacked[1], size, y, height), BUSY)
    for begin, end, factor in _slow(found):
        picture.box(begin, end, y - 3, 2.5, SLOW, f"{factor:.2g} times slower")


def spread(bins: list[float], size: float, begin: float, end: float) -> None:
    """Add the seconds of [begin, end) to the bins of `size` seconds that they lie in."""
    first, last = max(0, int(begin / size)), min(len(bins) - 1, int(end / size))
    for i in range(first, last + 1):
        bins[i] += max(0.0, min(end, (i + 1) * size) - max(begin, i * size))


def stretches(found: Sequence[Execution]) -> list[list[Execution]]:
    """Return the runs of steps that were made one after the other, without a restart between them."""
    parts: list[list[Execution]] = []
    for e in found:
        if parts and e.step == parts[-1][-1].step + 1 and e.begin - parts[-1][-1].end < _PAUSE_S:
            parts[-1].append(e)
        else:
            parts.append([e])
    return parts


def _slow(found: Sequence[Execution]) -> list[tuple[float, float, float]]:
    """Return (begin, end, factor) of the stretches in which a device is slow."""
    stretches: list[tuple[float, float, float]] = []
    for e in found:
        if e.factor < _SLOWED:
            continue
        if stretches and e.begin - stretches[-1][1] < 1.0 and abs(stretches[-1][2] / e.factor - 1) < 0.2:
            stretches[-1] = (stretches[-1][0], e.end, stretches[-1][2])
        else:
            stretches.append((e.begin, e.end, e.factor))
    return stretches


def _tasks(picture: Picture, story: Story) -> None:
    top = max((e.work for found in story.ranks for e in found), default=1.0)
    y = picture.chart(90, "tasks of a step", top)
    for rank, found in enumerate(story.ranks):
        for stretch in stretches(found):
            corners = [(stretch[0].begin, stretch[0].work)]
            for e in stretch[1:]:
                if abs(corners[-1][1] - e.work) > 1e-6:
                    corners += [(e.begin, corners[-1][1]), (e.begin, e.work)]
            corners.append((stretch[-1].end, corners[-1][1]))
            picture.line(corners, y, 90, top, rank_colour(rank), f"rank {rank}")
    if len(story.ranks) <= 8:
        picture.key([(f"rank {rank}", rank_colour(rank)) for rank in range(len(story.ranks))], y)


def _step_times(picture: Picture, story: Story) -> None:
    """Draw the time from a step's begin on rank 0 to the next one's, beside the ideal, as means over equally many
    steps."""
    factors = [{e.step: e.factor for e in found} for found in story.ranks]
    parts: list[list[tuple[float, float, float]]] = []
    for stretch in stretches(story.ranks[0]):
        rows = []
        for a, b in itertools.pairwise(stretch):
            if all(a.step in steps for steps in factors):
                ideal = story.scenario.ideal_step_s(story.scenario.tasks_per_batch, [s[a.step] for s in factors])
                rows.append((a.begin, b.begin - a.begin, ideal))
        parts.append(_means(rows, -(-len(story.ranks[0]) // 400)))
    times = sorted(took for rows in parts for _, took, _ in rows)
    if not times:
        return
    # a step that waited for a worker which was stopped would flatten all others
    top = 1.15 * max(times[int(0.98 * (len(times) - 1))], *(ideal for rows in parts for *_, ideal in rows))
    y = picture.chart(90, "seconds a step", top)
    for rows in parts:
        if rows:
            picture.line([(at, min(top, took)) for at, took, _ in rows], y, 90, top, "#334155", "took")
            picture.line([(at, ideal) for at, _, ideal in rows], y, 90, top, IDEAL, "ideal")
    picture.key([("took", "#334155"), ("ideal", IDEAL)], y)


def _means(rows: Sequence[tuple[float, float, float]], size: int) -> list[tuple[float, float, float]]:
    """Return the mean of every `size` rows, at the position of the first of them."""
    found = []
    for i in range(0, len(rows), size):
        group = rows[i : i + size]
        found.append((group[0][0], sum(r[1] for r in group) / len(group), sum(r[2] for r in group) / len(group)))
    return found


def _zoom_begin(story: Story) -> float:
    """Return a time a little before the first event that came after a few steps."""
    happened = [m.at for m in story.moments if m.at > 0]
    return max(0.0, (happened[0] if happened else 0.0) - 0.3 * _ZOOM_S)


def _zoom_title(story: Story) -> str:
    begin = _zoom_begin(story)
    return f"Step by step: seconds {begin:.1f} to {min(begin + _ZOOM_S, story.end):.1f}"


def _zoom(story: Story) -> str:
    """Draw every step of a short time as it was, with its tasks."""
    begin = _zoom_begin(story)
    end = min(begin + _ZOOM_S, story.end)
    picture = Picture(begin, end)
    _moments(picture, [m for m in story.moments if begin <= m.at <= end])
    top = picture.y
    for rank, found in list(enumerate(story.ranks))[:16]:
        y = picture.lane(24, f"rank {rank}")
        for before, e in zip([None, *found], found, strict=False):
            if e.end < begin or e.begin > end:
                continue
            if before is not None and e.step == before.step + 1:
                wait = min(story.inputs[rank].get(e.step, 0.0), e.begin - before.end)
                picture.box(before.end, e.begin - wait, y, 24, WAITING, f"step {before.step}: waiting")
                picture.box(e.begin - wait, e.begin, y, 24, INPUT, f"step {e.step}: no batch yet")
            text = f"step {e.step}: {e.work:.4g} tasks in {e.busy_s:.3f} s, {e.factor:.2g} times slower than speed 1"
            picture.box(e.begin, e.end, y, 24, BUSY, text, f"{e.work:.3g}", rim=True)
    picture.rules([m.at for m in story.moments if m.kind == "action" and begin <= m.at <= end], top)
    picture.axis()
    return picture.svg("Steps of every worker around the first event")


# Words and numbers


def _troubles(scenario: Scenario) -> list[str]:
    events = [f"{type(e).__name__.lower()} {_words(vars(e), ())}".replace(" None", " -") for e in scenario.events]
    return [*(f"{d.count} × {d.name} at speed {d.speed:g}" for d in scenario.devices), *events]


def _cards(result: LabResult) -> str:
    whole = "each task exactly once an epoch" if not (result.lost or result.repeated) else "see below"
    cards = (
        ("job completion time", f"{result.jct_s:.1f} s", f"ideal {result.ideal_s:.1f} s"),
        ("achieved of ideal", f"{result.achieved:.0%}", "ideal: each step balanced by its true speeds"),
        ("computing", f"{result.utilisation:.0%}", "of all workers' time"),
        ("lost, repeated", f"{result.lost}, {result.repeated}", f"of {result.expected:,} tasks: {whole}"),
        ("decisions, restarts", f"{result.decisions}, {result.restarts}", f"{result.repeated_steps} steps done again"),
    )
    inner = "".join(
        f'<div class="card"><div class="name">{name}</div><div class="big">{big}</div>'
        f'<div class="interval">{escape(small)}</div></div>'
        for name, big, small in cards
    )
    return f'<div class="cards" style="margin-top:16px">{inner}</div>'


def _legend() -> str:
    names = (("computing", BUSY), ("waiting for others", WAITING), ("no batch", INPUT), ("slow device", SLOW))
    inner = "".join(
        f'<span style="white-space:nowrap;margin-right:18px"><span style="display:inline-block;width:12px;height:12px;'
        f'border-radius:3px;vertical-align:-1px;background:{colour}"></span> {name}</span>'
        for name, colour in names
    )
    return f'<p class="note" style="margin:22px 0 0">{inner}<span>white: no process</span></p>'


def _numbers(result: LabResult) -> list[tuple[str, ...]]:
    actions = ", ".join(f"{name} {count}" for name, count in result.actions.items()) or "none"
    rows: list[tuple[str, ...]] = [
        ("actions", actions),
        ("restarts of the group", f"{result.restarts}, {result.restart_s:.1f} s without a step each"),
        ("tasks put back to the epoch's end", f"{result.tail_tasks:,}"),
        ("a step besides its slowest rank's computing", f"{1e3 * result.overhead_s:.1f} ms (median)"),
        ("CPU of rank 0's agent", f"{result.agent_cpu_share:.2%} of the time of steps"),
        ("micro-batches whose real computing took longer than the emulated", f"{result.not_emulated:.1%}"),
        *((name.replace("_after", " on valid, after adapting"), f"{v:.4f}") for name, v in result.metrics.items()),
        *((f"difference from undisturbed: {k}", f"{v:.3g}") for k, v in (result.difference or {}).items()),
        *(("problem", problem) for problem in result.problems),
    ]
    return rows


def _row(moment: Moment) -> tuple[str, ...]:
    return f"{moment.at:.2f}", moment.kind, moment.label, moment.detail


def _figure(title: str, svg: str) -> str:
    return f'<h2>{escape(title)}</h2><div class="scroll" style="padding:10px 12px">{svg}</div>'


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f'<h2>{escape(title)}</h2><p class="note">Nothing.</p>'
    head = "".join(f"<th>{escape(name)}</th>" for name in header) if any(header) else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table class="keys">{f"<tr>{head}</tr>" if head else ""}{body}'
        "</table></div>"
    )
