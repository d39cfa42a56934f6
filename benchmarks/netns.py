"""An emulated cluster on one machine: a network namespace for each node, joined by a switch, links held to a rate.

    with cluster(2, 2, inside_rate=None, between_rate="100mbit") as net:
        subprocess.Popen([*net.enter(rank=3), sys.executable, "-m", "gmeta", "train", ...],
                         env=os.environ | net.environment(rank=3, port=29500))

Every node has one network card, `eth0`, that its ranks share. The card is one end of a veth pair whose other end is a
port of a bridge, which has a namespace of its own, so that nothing is left on the host but names of namespaces. Ranks
of one node speak through its loopback interface. A rate is held by `tc tbf` on both ends of the card's link (so it
holds for sending and for receiving, each on its own) and on the loopback interface (for all of its traffic together).
Delay is not emulated: a round trip takes what the kernel takes, some 50 µs.

Needs Linux, root and iproute2: `unavailable()` says what is missing. Namespaces are called `gmeta-PID-NUMBER-NAME`;
those of a process that is gone are removed when the next cluster is made.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CARD = "eth0"
_NAME = re.compile(r"gmeta-(\d+)-\d+-(switch|node\d+)")
_COUNT = itertools.count()
_NAMESPACES = Path("/run/netns")
# A bucket below one segment-offloaded packet (64 KiB) would cut every packet into frames, at the price of a core; the
# kernel refills it at each timer tick, so it must also hold what passes in one (4 ms at the slowest clock in use).
_LEAST_BURST, _TICK_S = 128 * 1024, 0.004
# htb, unlike tbf, sends a packet that is larger than its bucket, and waits longer after it; its timer is finer than the
# kernel's tick. So little passes unhindered after a pause.
_SHORT_BURST, _TIMER_S = 16 * 1024, 0.0005
# Bytes that wait before one is dropped. A step's messages fit: drops would measure TCP's recovery, not the rate.
_QUEUE = 16 * 2**20
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Cluster:
    """A running cluster, whose ranks are numbered node by node."""

    prefix: str
    nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        """Return the number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    def namespace(self, rank: int) -> str:
        """Return the name of the namespace that holds `rank`."""
        return f"{self.prefix}-node{rank // self.ranks_per_node}"

    def enter(self, rank: int) -> list[str]:
        """Return the words with which a command line starts, to run where `rank` does."""
        return ["ip", "netns", "exec", self.namespace(rank)]

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """Return the variables that torchrun would set for `rank`, and the interface that gloo binds to.

        Rank 0 serves the store at `port`. A port serves one run: take another for the next.
        """
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(rank % self.ranks_per_node),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": address(0),
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": CARD,
        }

    def set_rates(self, inside_rate: str | None, between_rate: str | None) -> None:
        """Hold the links to other rates, as `tc` writes them ("100mbit"); None lets them go as fast as the kernel
        does."""
        for node in range(self.nodes):
            for words in shape_node(self.prefix, node, inside_rate, between_rate):
                _run(words)

    def set_group_rates(self, group_size: int, inside_rate: str, between_rate: str) -> None:
        """Give runs of consecutive nodes faster links inside: each node's card has a rate for either kind of peer."""
        for node in range(self.nodes):
            for words in shape_groups(self.prefix, node, group_size, inside_rate, between_rate):
                _run(words)

    def sent_bytes(self) -> dict[str, int]:
        """Return the bytes that all nodes have sent so far, headers included: `inside` them and `between` them."""
        links = {"inside": "lo", "between": CARD}
        return {name: sum(self._sent(node, link) for node in range(self.nodes)) for name, link in links.items()}

    def _sent(self, node: int, link: str) -> int:
        statistics = f"/sys/class/net/{link}/statistics/tx_bytes"
        return int(_run(["ip", "netns", "exec", f"{self.prefix}-node{node}", "cat", statistics]))


def unavailable() -> str:
    """Return why this machine can hold no cluster, or an empty text where it can."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} on the PATH: install iproute2"
    return _probe()


def _probe() -> str:
    """Try everything once. Root may still be refused (containers), and the kernel may lack tbf."""
    try:
        with cluster(1, 1, inside_rate="1gbit", between_rate="1gbit"):
            return ""
    except RuntimeError as error:
        return str(error)


@contextmanager
def cluster(nodes: int, ranks_per_node: int, inside_rate: str | None, between_rate: str | None) -> Iterator[Cluster]:
    """Set up `nodes` namespaces and their links. On exit, also through Ctrl-C, all of it and what runs in it ends.

    RuntimeError says that a command of iproute2 failed; nothing is left behind then.
    """
    remove_leftovers()
    prefix = f"gmeta-{os.getpid()}-{next(_COUNT)}"
    try:
        for words in [*build_switch(prefix), *(w for node in range(nodes) for w in build_node(prefix, node))]:
            _run(words)
        net = Cluster(prefix, nodes, ranks_per_node)
        net.set_rates(inside_rate, between_rate)
        yield net
    finally:
        _remove(prefix)


def remove_leftovers() -> list[str]:
    """End and remove clusters whose process is gone; returns the names of their namespaces."""
    names = [name for name in _namespaces() if not Path("/proc", name.split("-")[1]).exists()]
    for name in names:
        _remove(name)
    return names


def address(node: int) -> str:
    """Return a node's address. Every cluster has a network of its own, so all use the same addresses."""
    return f"10.77.{node // 250}.{node % 250 + 1}"


def build_switch(prefix: str) -> list[list[str]]:
    """Return commands that make the bridge in its namespace."""
    switch = f"{prefix}-switch"
    return [
        ["ip", "netns", "add", switch],
        ["ip", "-n", switch, "link", "add", "bridge", "type", "bridge"],
        ["ip", "-n", switch, "link", "set", "bridge", "up"],
    ]


def build_node(prefix: str, node: int) -> list[list[str]]:
    """Return commands that make a node's namespace and plug its card into the switch."""
    name, switch, port = f"{prefix}-node{node}", f"{prefix}-switch", f"port{node}"
    return [
        ["ip", "netns", "add", name],
        ["ip", "-n", name, "link", "set", "lo", "up"],
        ["ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", CARD, "netns", name],
        ["ip", "-n", switch, "link", "set", port, "master", "bridge", "up"],
        ["ip", "-n", name, "address", "add", f"{address(node)}/16", "dev", CARD],
        ["ip", "-n", name, "link", "set", CARD, "up"],
    ]


def shape_node(prefix: str, node: int, inside_rate: str | None, between_rate: str | None) -> list[list[str]]:
    """Return commands that hold a node's links to their rates, or let go of them (None)."""
    name, switch = f"{prefix}-node{node}", f"{prefix}-switch"
    links = [(name, "lo", inside_rate), (name, CARD, between_rate), (switch, f"port{node}", between_rate)]
    return [_shape(namespace, link, rate) for namespace, link, rate in links]


def _shape(namespace: str, link: str, rate: str | None) -> list[str]:
    start = ["tc", "-n", namespace, "qdisc", "replace", "dev", link, "root"]
    if rate is None:
        return [*start, "pfifo", "limit", "1000"]
    burst = max(_LEAST_BURST, int(bits_per_s(rate) / 8 * _TICK_S))
    return [*start, "tbf", "rate", rate, "burst", str(burst), "limit", str(_QUEUE)]


def shape_groups(prefix: str, node: int, group_size: int, inside_rate: str, between_rate: str) -> list[list[str]]:
    """Return commands that hold what a node exchanges with the nodes of its run to one rate, and all else to
    another.
    """
    first = node // group_size * group_size
    peers = [address(other) for other in range(first, first + group_size) if other != node]
    commands = []
    for namespace, link, way in ((f"{prefix}-node{node}", CARD, "dst"), (f"{prefix}-switch", f"port{node}", "src")):
        on = ["dev", link]
        commands.append(["tc", "-n", namespace, "qdisc", "replace", *on, "root", "handle", "1:", "htb", "default", "2"])
        for number, rate in ((1, inside_rate), (2, between_rate), (3, "10gbit")):
            burst = str(max(_SHORT_BURST, int(bits_per_s(rate) / 8 * _TIMER_S)))
            words = ["htb", "rate", rate, "burst", burst, "cburst", burst]
            commands.append(
                ["tc", "-n", namespace, "class", "add", *on, "parent", "1:", "classid", f"1:{number}", *words]
            )
        add = ["tc", "-n", namespace, "filter", "add", *on, "parent", "1:", "protocol", "ip"]
        # acknowledgements (packets below 64 bytes) pass at once: behind a full queue of data that goes the same way
        # they would cost what comes the other way a fifth of its rate (measured: 80 of 100 Mbit/s)
        commands.append([*add, "prio", "1", "u32", "match", "u16", "0x0000", "0xffc0", "at", "2", "flowid", "1:3"])
        for peer in peers:
            commands.append([*add, "prio", "2", "u32", "match", "ip", way, f"{peer}/32", "flowid", "1:1"])
    return commands


def bits_per_s(rate: str) -> float:
    """Return a rate in bits/s: "100mbit" -> 1e8. ValueError for what is no number with kbit, mbit or gbit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if not found:
        raise ValueError(f"rate is {rate!r}: must be a number and kbit, mbit or gbit, such as 100mbit")
    return float(found[1]) * _UNITS[found[2]]


_RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
buffer, got, start = bytearray(1 << 20), 0, 0.0
while count := connection.recv_into(buffer):
    got += count
    if got > int(sys.argv[2]) and not start:  # what the bucket held at the start passed unhindered
        start, first = time.perf_counter(), got
print(8 * (got - first) / (time.perf_counter() - start))
"""
_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    block = bytes(1 << 20)
    for _ in range(int(sys.argv[3])):
        connection.sendall(block)
"""


def measured_bits_per_s(net: Cluster, sender: int, receiver: int, mebibytes: int, skip_bytes: int = 4 * 2**20) -> float:
    """Return the payload bit/s of one TCP stream from rank to rank, without its first `skip_bytes`; it shows whether
    links hold the rate.
    """
    place = address(receiver // net.ranks_per_node)
    python = [sys.executable, "-c"]
    with subprocess.Popen(
        [*net.enter(receiver), *python, _RECEIVE, place, str(skip_bytes)], stdout=subprocess.PIPE, text=True
    ) as listening:
        assert listening.stdout is not None
        try:
            port = listening.stdout.readline().strip()
            _run([*net.enter(sender), *python, _SEND, place, port, str(mebibytes)])
            return float(listening.stdout.read())
        finally:
            listening.kill()  # else an interrupted sender leaves it waiting, and us for it


def _namespaces() -> list[str]:
    if not _NAMESPACES.is_dir():
        return []
    return sorted(path.name for path in _NAMESPACES.iterdir() if _NAME.fullmatch(path.name))


def _remove(prefix: str) -> None:
    """End what runs in the namespaces whose names are, or start with, `prefix`, then delete them."""
    names = [name for name in _namespaces() if name == prefix or name.startswith(f"{prefix}-")]
    for name in names:
        _end_processes(name)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _end_processes(namespace: str, patience_s: float = 2.0) -> None:
    """Kill what runs there and wait until it is gone, because a namespace lives as long as a process in it."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
        pids = [int(pid) for pid in found.stdout.split()]
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _run(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(words)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
