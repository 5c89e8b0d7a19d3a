"""The pool's controller: who is in the pool, where keys lie, and which data on a node are the pool's."""

import contextlib
import functools
import json
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from blake3 import blake3
from uhashring import HashRing

from cmjax.errors import UserError
from cmjax.serve.caching.accounts import Accounts
from cmjax.serve.caching.node import PoolNode
from cmjax.serve.caching.stats import Meter
from cmjax.serve.caching.store import replace_file
from cmjax.text import JsonObject

_POINTS_OF_A_NODE = 256  # on the ring: the share of a node is off by some 6 %
_RECORD = "controller.json"


class View:
    """Who is in the pool at one time. Where keys lie follows by consistent hashing: a node that joins or leaves changes
    only whose keys it gets or had (paper, section 4.4).

    Attributes:
        version: counts the changes.
        nodes: by name.
    """

    def __init__(self, version: int, nodes: Mapping[str, PoolNode]) -> None:
        self.version, self.nodes = version, nodes
        self._ring = HashRing(nodes=list(nodes), hash_fn=_position, vnodes=_POINTS_OF_A_NODE)
        self._only = next(iter(nodes.values())) if len(nodes) == 1 else None
        self.num_users = 0  # the controller's business

    def node_of(self, digest: int) -> PoolNode | None:
        """The node on which a key lies; None where there is no node."""
        if self._only or not self.nodes:
            return self._only
        return self.nodes[self._ring.get_node(digest)]

    def is_on(self, node: PoolNode, digest: int) -> bool:
        """A key lies on this node."""
        return self.node_of(digest) is node

    def by_node(self, digests: Sequence[int]) -> Iterable[tuple[PoolNode, list[int]]]:
        """Nodes, and which of the keys lie on each: places in the sequence."""
        if self._only:
            return [(self._only, list(range(len(digests))))]
        found: dict[str, list[int]] = {}
        for row, digest in enumerate(digests):
            node = self.node_of(digest)
            if node is not None:
                found.setdefault(node.name, []).append(row)
        return [(self.nodes[name], rows) for name, rows in found.items()]


def _position(key: int | str) -> int:
    """On the ring: digests are positions as they are."""
    return key if isinstance(key, int) else int.from_bytes(blake3(key.encode()).digest(length=16), "little")


class Controller:
    """Membership, namespaces' quotas, and the epochs of segments.

    A segment is what outlives the process on a node: its files, its keys on a server. An epoch is a token that is
    written into it when it is admitted, and into the controller's own record. At a join the two are compared: where
    they are equal the data in the segment are what this pool left there, and are registered; otherwise they may be out
    of date or another's, and are wiped. So a controller that is started anew over its folder finds its data again, and
    without its record it assumes nothing. A node that leaves is struck from the record, for keys of its own may be put
    elsewhere while it is away.

    Args:
        folder: for the record; None: it is kept nowhere.
        accounts: of the namespaces.
        meter: of the gets.

    Raises:
        UserError: the folder cannot be read.
    """

    def __init__(self, folder: Path | None, accounts: Accounts, meter: Meter) -> None:
        self._record = folder and folder / _RECORD
        self._accounts, self._meter = accounts, meter
        record = _read(self._record)
        self._epochs: dict[str, str] = record["epochs"]
        for namespace, quota in record["quotas"].items():
            accounts.set_quota(namespace, quota)
        self._changing = threading.Lock()  # one change of membership at a time
        self._idle = threading.Condition()
        self._view = View(record["version"], {})

    @contextlib.contextmanager
    def view(self) -> Iterator[View]:
        """Who is in the pool. Nodes that leave are closed, and keys that move are dropped where they were, only once
        nobody uses a view from before."""
        with self._idle:
            view = self._view
            view.num_users += 1
        try:
            yield view
        finally:
            with self._idle:
                view.num_users -= 1
                if view is not self._view and view.num_users == 0:
                    self._idle.notify_all()

    def join(self, nodes: Sequence[PoolNode], adopt: bool = False) -> None:
        """Take nodes in. Keys that lie on them from now on are dropped where they were, and are misses.

        Args:
            adopt: register what lies on them, whatever epoch it bears.

        Raises:
            UserError: a node of this name is there, or one cannot be reached or used; none of them has joined.
        """
        with self._changing:
            names = [*self._view.nodes, *(node.name for node in nodes)]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"pool node {twice} is given twice")
            epochs = {name: self._epochs[name] for name in self._view.nodes}
            try:
                for node in nodes:
                    epochs[node.name] = self._admit(node, adopt)
                self._write(epochs, self._view.version + 1)
            except UserError:
                for node in nodes:
                    node.close()
                raise
            self._change({**self._view.nodes, **{node.name: node for node in nodes}})
            if len(names) > 1:
                # Others may call a shared node by another name, or have other nodes beside it, and look for keys there.
                for node in self._view.nodes.values():
                    if not node.is_shared:
                        node.retain(functools.partial(self._view.is_on, node))

    def _admit(self, node: PoolNode, adopt: bool) -> str:
        try:
            found = node.read_epoch()
            if found is not None and (adopt or node.is_shared or found == self._epochs.get(node.name)):
                node.start(found, True, self._accounts, self._meter)
                return found
            epoch = secrets.token_hex(16)
            node.start(epoch, False, self._accounts, self._meter)
            return epoch
        except OSError as error:
            raise UserError(f"pool node {node.name} cannot be used: {error}") from error

    def leave(self, name: str) -> None:
        """Let a node go, and close it: what it had is a miss from now on.

        Raises:
            UserError: there is no such node, or the record cannot be written.
        """
        with self._changing:
            if name not in self._view.nodes:
                raise UserError(f"there is no pool node {name}; there are {', '.join(self._view.nodes) or 'none'}")
            members = {other: node for other, node in self._view.nodes.items() if other != name}
            leaving = self._view.nodes[name]
            self._write({other: self._epochs[other] for other in members}, self._view.version + 1)
            self._change(members)
            leaving.close()

    def _change(self, members: Mapping[str, PoolNode]) -> None:
        """Put a new view in place, and wait until nobody uses the old one."""
        with self._idle:
            old, self._view = self._view, View(self._view.version + 1, members)
            self._idle.wait_for(lambda: old.num_users == 0)

    def set_quota(self, namespace: str, num_bytes: int | None) -> None:
        """Bytes that a namespace may have (None: no limit); what it has over that goes.

        Raises:
            UserError: the record cannot be written; until the end of the process the quota holds.
        """
        self._accounts.set_quota(namespace, num_bytes)
        with self._changing:
            self._write(self._epochs, self._view.version)

    def _write(self, epochs: dict[str, str], version: int) -> None:
        self._epochs = epochs
        if self._record:
            record = {"version": version, "epochs": epochs, "quotas": self._accounts.quotas()}
            try:
                self._record.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self._record, json.dumps(record, indent=1).encode())
            except OSError as error:
                raise UserError(f"the cache folder {self._record.parent} cannot be written to: {error}") from error

    def close(self) -> None:
        """Close all nodes; the record stays as it is."""
        with self._changing:
            members = self._view.nodes
            self._change({})
            for node in members.values():
                node.close()


def _read(path: Path | None) -> JsonObject:
    """The record; an empty one where there is none, or it is none of ours: then nothing is assumed."""
    empty: JsonObject = {"version": 0, "epochs": {}, "quotas": {}}
    try:
        found = json.loads(path.read_bytes()) if path else empty
    except (FileNotFoundError, ValueError):
        return empty
    except OSError as error:
        raise UserError(f"the cache folder cannot be read: {error}") from error
    is_right = isinstance(found, dict) and isinstance(found.get("version"), int)
    for name, kind in (("epochs", str), ("quotas", int | None)):
        is_right = is_right and isinstance(found.get(name), dict)
        is_right = is_right and all(isinstance(one, kind) for one in found[name].values())
    return found if is_right else empty
