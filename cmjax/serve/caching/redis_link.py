"""The way to a server that speaks Redis' protocol: whether it answers, and whether what it has still is the pool's."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from cmjax.errors import UserError
from cmjax.serve.caching.health import Health

T = TypeVar("T")


class RedisLink:
    """A server, and the epoch of the pool's segment there.

    The epoch holds for one run of the server: one that was started anew has nothing, or an older snapshot, in which
    what was deleted since is back. So every new connection sees whether it is the same run under the same epoch; where
    it is not, the server counts as failed until its segment has been cleared, here or by another process.

    Args:
        url: redis://, rediss:// or unix://.
        epoch_key: where the epoch stands.
        is_shared: an epoch that another process wrote is as good.
        timeouts_s: seconds that an answer may take, and that a connection may.
        clear: deletes a namespace's values (None: everybody's), with the client.

    Attributes:
        name: host:port/database, or path/database.
        client: for what `ask` is given to do.

    Raises:
        UserError: the URL is none, or the client library is not installed.
    """

    def __init__(
        self,
        url: str,
        epoch_key: str,
        is_shared: bool,
        timeouts_s: tuple[float, float],
        clear: Callable[[str | None], object],
    ) -> None:
        try:
            import valkey
        except ImportError as error:
            raise UserError("pool nodes on servers need the client of Valkey: pip install 'cmjax[serve]'") from error
        try:
            self.client: Any = valkey.Valkey.from_url(
                url,
                socket_timeout=timeouts_s[0],
                socket_connect_timeout=timeouts_s[1],
                valkey_connect_func=self._connected,
            )
            self.name = _address(self.client.connection_pool.connection_kwargs)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{_without_password(url)!r} is no redis://host:port[/database]: {error}") from error
        self._failures = (valkey.ConnectionError, valkey.TimeoutError, OSError)
        self._failure, self._refusal = valkey.ConnectionError, valkey.ValkeyError
        self._epoch_key, self._is_shared, self._clear = epoch_key, is_shared, clear
        self.health = Health()
        self._lock = threading.Lock()  # over what is owed
        self._owed: set[str | None] = set()
        self._epoch = ""  # from when it is written until `close`
        self._mark = b""  # the epoch as it stands on the server, with the run that it holds for
        self._is_catching_up = False

    @contextlib.contextmanager
    def as_os_error(self) -> Iterator[None]:
        """Turns whatever the client raises into an OSError."""
        try:
            yield
        except self._refusal as error:
            raise ConnectionError(str(error)) from error

    def _connected(self, connection: Any) -> None:
        """For the client: prepare a new connection."""
        connection.on_connect()
        if self._epoch and not self._is_catching_up:
            answers = []
            for command in (("GET", self._epoch_key), ("INFO", "server")):
                connection.send_command(*command)
                answers.append(connection.read_response())
            run = re.search(rb"run_id:(\S+)", answers[1])
            if answers[0] != self._mark or run is None or run[1] != self._mark.split()[-1]:
                raise self._failure(f"{self.name} was started anew, or has come under another epoch")

    def read_epoch(self) -> str | None:
        """The token; None where there is none, or it is of an earlier run of the server."""
        epoch, _, run = (self.client.get(self._epoch_key) or b"").decode("ascii", "replace").partition(" ")
        return epoch if epoch and run == self._run() else None

    def write_epoch(self, epoch: str) -> None:
        """Put the segment under this token, for as long as the server runs."""
        self._mark = f"{epoch} {self._run()}".encode()
        self.client.set(self._epoch_key, self._mark)
        self._epoch = epoch

    def _run(self) -> str:
        return str(self.client.info("server")["run_id"])

    def ask(self, work: Callable[[], T], otherwise: T) -> tuple[T, bool]:
        """What the server answers, and whether it failed: `otherwise` stands for the answer where it does not come, is
        refused, or has not come a moment ago (which is no failure more)."""
        if not self.health.may_try():
            return otherwise, False
        try:
            if not self.health.is_up:
                self._catch_up()
            answer = work()
        except self._failures:
            self.health.failed()
        except self._refusal:  # it answers, but will not do it
            if not self.health.is_up:
                self.health.failed()
        else:
            self.health.worked()
            return answer, False
        return otherwise, True

    def _catch_up(self) -> None:
        """It answers again: do what is owed, and see whether its data still are the pool's."""
        self._is_catching_up = True
        try:
            found = self.read_epoch()
            with self._lock:
                owed = set(self._owed)
            is_known = found is not None and (self._is_shared or found == self._epoch)
            for namespace in owed if is_known else {None}:
                self._clear(namespace)
            self.write_epoch(found if found is not None and is_known else self._epoch)
            with self._lock:
                self._owed -= owed
        finally:
            self._is_catching_up = False

    def owe(self, namespace: str | None) -> None:
        """What could not be deleted is cleared, with all of its namespace, before the server is asked again."""
        with self._lock:
            self._owed.add(namespace)
        self.health.failed()

    def close(self) -> bool:
        """Whether it had been given an epoch, and is closed for the first time."""
        was_open, self._epoch = bool(self._epoch), ""
        self.client.close()
        return was_open


def _address(told: Mapping[str, object]) -> str:
    where = told["path"] if "path" in told else f"{told.get('host', 'localhost')}:{told.get('port', 6379)}"
    return f"{where}/{told.get('db', 0)}"


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", url)
