"""The Open Inference Protocol, version 2: metadata, and `infer` with one tensor a column.

Inputs are called `candidates.<column>` and `support.<column>`, and have one value a row; the task's column says whose
rows they are. The output `score` has one value a candidate; of several labels there is an output `score_<label>` for
each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from gmeta.serving.refusal import Declined
from gmeta.serving.versions import Version
from gmeta.serving.wire import PARTS, Columns, Query, RequestLimits, check_columns

_TYPES = {"BOOL", "BYTES", *(f"{kind}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)), "FP32", "FP64"}


def metadata(name: str, version: Version) -> dict[str, Any]:
    """Return the model's metadata."""
    columns = version.columns
    inputs = [
        {"name": f"{part}.{column}", "datatype": "BYTES", "shape": [-1]}
        for part in PARTS
        for column in (columns.task, *columns.needed(part))
    ]
    names = [f"score_{label}" for label in columns.labels] or ["score"]
    outputs = [{"name": name, "datatype": "FP64", "shape": [-1]} for name in names]
    return {"name": name, "versions": [version.id], "platform": "gmeta", "inputs": inputs, "outputs": outputs}


def query_of_infer(document: Mapping[str, Any], columns: Columns, limits: RequestLimits) -> Query:
    """Read the body of `infer`; `parameters.states` may map tasks to ids of states."""
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise Declined(422, "invalid_inputs", "inputs must be a list of tensors, one a column")
    found: dict[str, dict[str, list[Any]]] = {}
    for place, tensor in enumerate(inputs):
        where = f"inputs[{place}]"
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
            raise Declined(422, "invalid_inputs", f"{where} must be an object with a name")
        part, _, column = tensor["name"].partition(".")
        data, shape = tensor.get("data"), tensor.get("shape")
        if part not in PARTS or not column:
            raise Declined(
                422, "invalid_inputs", f"{where} is {tensor['name']!r}: it must be support.COLUMN or candidates.COLUMN"
            )
        if tensor.get("datatype") not in _TYPES:
            raise Declined(
                422,
                "invalid_inputs",
                f"{where}.datatype is {tensor.get('datatype')!r}: it must be one of {sorted(_TYPES)}",
            )
        if not isinstance(data, list) or shape not in ([len(data)], [len(data), 1]):
            raise Declined(422, "invalid_inputs", f"{where} must have data, a list, and its length as shape")
        found.setdefault(part, {})[column] = data
    parameters = document.get("parameters") or {}
    states = parameters.get("states") or {} if isinstance(parameters, dict) else {}
    if not isinstance(states, dict) or not all(isinstance(state, str) for state in states.values()):
        raise Declined(422, "invalid_state", "parameters.states must map keys to ids of states")
    return check_columns(found, states, columns, limits)


def named_scores(scores: NDArray[Any], labels: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return scores [rows] as the output `score`, those of several labels [rows, K] as `score_<label>` each."""
    return {f"score_{label}": scores[:, k] for k, label in enumerate(labels)} if labels else {"score": scores}


def answer(name: str, version: str, request_id: Any, scores: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Return the body of an answer."""
    outputs = [
        {"name": output, "datatype": "FP64", "shape": [len(values)], "data": values.tolist()}
        for output, values in scores.items()
    ]
    identity = {} if request_id is None else {"id": str(request_id)}
    return {"model_name": name, "model_version": version, **identity, "outputs": outputs}
