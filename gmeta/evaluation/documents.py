"""Read the JSON of a run that a report shows. What has another shape than gmeta writes is refused, by file and key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from gmeta.runs.log import read_metrics

Json = dict[str, Any]


class _Each(NamedTuple):
    """A mapping of any texts to one shape."""

    shape: Any


_NUMBER, _COUNT, _MAYBE = (int, float), (int,), (int, float, type(None))
_MEASURED = {"case": (str,), "metric": (str,), "value": _MAYBE, "low": _MAYBE, "high": _MAYBE}
_EVALUATION = {
    "headline": {"metric": (str,), "higher_is_better": (bool,)},
    "reference": (str,),
    "variants": [(str,)],
    "baselines": [(str,)],
    "resamples": _COUNT,
    "cases": [{"case": (str,), "about": (str,), "tasks": _COUNT, "rows": _COUNT}],
    "records": [{**_MEASURED, "variant": (str,), "n": _COUNT}],
    "differences": [{**_MEASURED, "against": (str,)}],
    "curves": _Each([{"predicted": _NUMBER, "observed": _NUMBER}]),
    "notes": [(str,)],
}
_POINT = {"size": _COUNT, "metric": (str,), "value": _MAYBE, "low": _MAYBE, "high": _MAYBE, "n": _COUNT}
_CURVE = {
    "tasks": _COUNT,
    "sizes": [{"size": _COUNT, "short_tasks": _COUNT}],
    "records": [{**_POINT, "variant": (str,)}],
    "differences": [{**_POINT, "against": (str,)}],
}
"""Shape of `support_curve`, which not every evaluation has."""
_SINCE = {"left_out": [(str,)]}
"""Keys that evaluations of earlier releases lack."""
_SENT = _Each({"bytes": _NUMBER, "remote_bytes": _NUMBER, "calls": _NUMBER})
_TRAFFIC = {"measured": _SENT, "predicted": _SENT}
_NO_NUMBERS = ("kind", "comm", "slots", "put_back")


def read_object(path: Path, cure: str) -> Json | None:
    """Return the object in a JSON file; None where there is no file. ValueError names the file and `cure`."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it and {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object: delete it and {cure}")
    return content


def read_evaluation(path: Path) -> Json | None:
    """Return what `gmeta evaluate` measured; None where there is no file. ValueError names what is wrong with it."""
    cure = "run `gmeta evaluate` again"
    found = read_object(path, cure)
    if found is None:
        return None
    if missing := [key for key in _EVALUATION if key not in found]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: delete it and {cure}")
    shape = _EVALUATION | {key: _SINCE[key] for key in _SINCE.keys() & found.keys()}
    problem = _misfit(found, shape, "") or _gap(found)
    if not problem and "support_curve" in found:
        problem = _misfit(found["support_curve"], _CURVE, "support_curve")
    if problem:
        raise ValueError(f"{path} is not what gmeta writes ({problem}): delete it and {cure}")
    return found


def read_log(path: Path) -> list[Json]:
    """Return the records of metrics.jsonl, as `read_metrics` does; ValueError too for values that are no numbers."""
    records = read_metrics(path)
    for number, record in enumerate(records, start=1):
        shape: Json = {key: _MAYBE for key in record if key not in _NO_NUMBERS}
        shape |= {"comm": _TRAFFIC} if "comm" in record else {}
        problem = _misfit(record, shape, "")
        if not problem and "comm" in record and record["comm"]["measured"].keys() - record["comm"]["predicted"].keys():
            problem = "comm.predicted lacks what comm.measured has"
        if problem:
            raise ValueError(f"{path}, record {number} is not what gmeta writes ({problem}); delete the line")
    return records


def _misfit(value: Any, shape: Any, where: str) -> str | None:
    """Say where a value has another shape; None where it has none. Keys that no shape names may be anything."""
    if isinstance(shape, tuple) and not isinstance(shape, _Each):
        fine = isinstance(value, shape) and (bool in shape or not isinstance(value, bool))
        return None if fine and not (isinstance(value, float) and not math.isfinite(value)) else f"{where} is {value!r}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        inside = [(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value)]
    elif not isinstance(value, dict):
        return f"{where} is no object"
    elif isinstance(shape, _Each):
        inside = [(item, shape.shape, f"{where}.{key}") for key, item in value.items()]
    else:
        inside = [(value.get(key), item, f"{where}.{key}".lstrip(".")) for key, item in shape.items()]
    return next((problem for one in inside if (problem := _misfit(*one))), None)


def _gap(evaluation: Json) -> str | None:
    """Say what the headline needs and is not there; None where all is."""
    reference, metric = evaluation["reference"], evaluation["headline"]["metric"]
    if not evaluation["cases"]:
        return "it has no cases"
    for key, name in (("records", "variant"), ("differences", "against")):
        there = {one[name] for one in evaluation[key] if (one["case"], one["metric"]) == ("all", metric)}
        wanted = {*evaluation["variants"], reference} if key == "records" else {*evaluation["variants"]} - {reference}
        if lacking := sorted(wanted - there):
            return f"{key} have none of {metric!r} for {lacking[0]!r}"
    return None
