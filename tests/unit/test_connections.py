"""Connections that owe something are ended in time, and make room for those that have something to say."""

import logging
from types import SimpleNamespace

from gmeta.elastic.connections import OWED_S, Guard, speak_seldom


class Connection:
    """What the guard sees of one of uvicorn's connections."""

    def __init__(self, cycle=None, timer=None):
        self.cycle, self.timeout_keep_alive_task, self.ended = cycle, timer, False
        self.transport = SimpleNamespace(abort=lambda: setattr(self, "ended", True))


def request(complete=False, more_body=False):
    return SimpleNamespace(response_complete=complete, more_body=more_body)


def test_who_owes_headers_or_a_body_too_long_is_ended():
    now = [0.0]
    silent, late, slow = Connection(), Connection(request(complete=True)), Connection(request(more_body=True))
    idle, busy = Connection(request(complete=True), timer="75 s"), Connection(request())
    talker = Connection(request(more_body=True))  # each time with a new request
    everyone = {silent, late, slow, idle, busy, talker}
    guard = Guard(set(everyone), 100, lambda: now[0])
    for _ in range(int(OWED_S) + 2):
        guard.sweep()
        now[0] += 1.0
        talker.cycle = request(more_body=True)
    assert {one for one in everyone if one.ended} == {silent, late, slow}


def test_there_is_room_for_one_more():
    silent, idle, busy = Connection(), Connection(request(complete=True), timer="75 s"), Connection(request())
    connections = {silent, idle, busy}
    guard = Guard(connections, 3)
    guard.sweep()
    ended = []
    for _ in range(3):
        guard.admit()
        ended.append((silent.ended, idle.ended, busy.ended))
        connections.add(Connection(request()))
    assert ended == [(True, False, False), (True, True, False), (True, True, False)]


def test_the_same_is_said_once_a_minute(caplog):
    now = [0.0]
    logger = logging.getLogger("uvicorn.error")
    before = list(logger.filters), list(logging.getLogger("asyncio").filters)
    logger.propagate = True
    try:
        speak_seldom(lambda: now[0])
        for _ in range(1000):
            logger.error("socket.accept() out of system resource")
            now[0] += 0.1
        logger.error("something else")
    finally:
        logger.filters[:], logging.getLogger("asyncio").filters[:] = before
    assert [record.getMessage()[:13] for record in caplog.records] == ["socket.accept"] * 2 + ["something els"]
