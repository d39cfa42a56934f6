"""Arrow streams from anyone: their decompressed size is bounded before they are read, and their content is checked.

A record batch says in its message how long each of its buffers is, compressed and not. The message is a flatbuffer;
pyarrow shows its bytes but not these fields, so that the few that matter are read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from gmeta.serving.refusal import Declined

_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2  # of the union MessageHeader in Arrow's Message.fbs
_PLAIN = (
    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string),
    *(pa.types.is_timestamp, pa.types.is_date, pa.types.is_decimal, pa.types.is_null),
)


def read_streams(body: bytes, most_bytes: int) -> Iterator[pa.Table]:
    """Yield the tables of Arrow IPC streams behind each other; compressed ones may hold `most_bytes` in all.

    Raises `Declined` for bytes that are none, types that a request does not need, and content that is too large.
    """
    budget = most_bytes
    reader = pa.BufferReader(body)
    while reader.tell() < len(body):
        start = reader.tell()
        try:
            budget -= _content_bytes(pa.BufferReader(memoryview(body)[start:]))
            if budget < 0:
                raise Declined(
                    413, "body_too_large", f"the Arrow body holds more than {most_bytes:,} bytes: send it in parts"
                )
            stream = pa.ipc.open_stream(reader)
            for field in stream.schema:
                _require_plain(field)
            table = stream.read_all()
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, struct.error, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise Declined(400, "invalid_arrow", f"the body is no Arrow stream ({reason})") from None
        yield _without_dictionaries(table, most_bytes)


def _content_bytes(reader: pa.BufferReader) -> int:
    """Return how many bytes the buffers of one stream hold when they are decompressed."""
    total = 0
    while True:
        try:
            message = pa.ipc.read_message(reader)
        except EOFError:
            return total
        header, body = message.metadata.to_pybytes(), message.body
        if body is not None:
            total += max(body.size, _declared_bytes(header, body))


def _declared_bytes(header: bytes, body: pa.Buffer) -> int:
    """Return the decompressed size that the buffers of a message declare; 0 where they are not compressed."""
    message = _root(header)
    kind = header[_field(header, message, 1)] if _field(header, message, 1) else 0
    at = _field(header, message, 2)
    if kind not in (_RECORD_BATCH, _DICTIONARY_BATCH) or not at:
        return 0
    batch = _follow(header, at)
    if kind == _DICTIONARY_BATCH:
        batch = _follow(header, _field(header, batch, 1))
    if not _field(header, batch, 3):  # no compression
        return 0
    vector = _follow(header, _field(header, batch, 2))
    (count,) = struct.unpack_from("<I", header, vector)
    total = 0
    for number in range(count):
        offset, length = struct.unpack_from("<qq", header, vector + 4 + 16 * number)
        if length >= 8:
            (declared,) = struct.unpack_from("<q", body.slice(offset, 8))
            total += length - 8 if declared == -1 else declared if declared >= 0 else 1 << 62
    return total


def _root(buffer: bytes) -> int:
    return int(struct.unpack_from("<I", buffer)[0])


def _field(buffer: bytes, table: int, number: int) -> int:
    """Return where a field of a flatbuffer's table lies, 0 where it is left out."""
    vtable = table - int(struct.unpack_from("<i", buffer, table)[0])
    (size,) = struct.unpack_from("<H", buffer, vtable)
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", buffer, vtable + slot)[0] if slot + 2 <= size else 0
    return table + int(offset) if offset else 0


def _follow(buffer: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", buffer, at)[0])


def _require_plain(field: pa.Field) -> None:
    kind = field.type
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not any(test(kind) for test in _PLAIN):
        raise Declined(
            422, "invalid_type", f"column {field.name!r} is of type {field.type}: send plain values, or lists of them"
        )


def _without_dictionaries(table: pa.Table, most_bytes: int) -> pa.Table:
    """Write out dictionaries, of which few values may stand for many bytes."""
    size = 0
    for column in table.columns:
        if pa.types.is_dictionary(column.type):
            longest = max(
                (chunk.dictionary.nbytes // max(1, len(chunk.dictionary)) for chunk in column.chunks), default=0
            )
            texts = pa.types.is_string(column.type.value_type) or pa.types.is_large_string(column.type.value_type)
            if texts:
                longest = max(
                    (pc.max(pc.binary_length(c.dictionary)).as_py() or 0 for c in column.chunks),
                    default=0,
                )
            size += longest * len(column)
    if size > most_bytes:
        raise Declined(413, "body_too_large", f"the Arrow body's dictionaries stand for more than {most_bytes:,} bytes")
    return table
