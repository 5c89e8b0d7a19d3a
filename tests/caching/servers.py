"""Redis servers that tests start, kill and hold still."""

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import valkey


class Server:
    """A redis-server on a Unix socket in a folder of its own, without persistence."""

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        folder.mkdir()
        self.folder, self.options = folder, options
        self.url = f"unix://{folder}/s"
        self.client = valkey.Valkey(unix_socket_path=f"{folder}/s")
        self.start()

    def start(self) -> None:
        """Start it, or start it again, empty unless the options say otherwise."""
        told = ["redis-server", "--port", "0", "--unixsocket", "s", "--dir", str(self.folder), "--save", ""]
        self.process = subprocess.Popen([*told, *self.options], cwd=self.folder, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
                return
            except valkey.ConnectionError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def kill(self) -> None:
        """At once, as a crash would."""
        self.process.kill()
        self.process.wait()

    def hold(self) -> None:
        """It stays connected and does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `hold`."""
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Whatever state it is in."""
        self.client.close()
        self.kill()
