"""The port of a server that is still coming up."""

import itertools
import socket
import stat
import threading

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cmjax.errors import UserError
from cmjax.serve.http.waiting import waiting_room
from cmjax.serve.settings import ListenSettings
from cmjax.serve.startup import StartProgress
from tests.http.serving import PATIENCE, wait_until

ANYWHERE = ListenSettings(port=0)


def address_of(room):
    return f"http://127.0.0.1:{room.socket.getsockname()[1]}"


def progress(num_done, elapsed_s, left_s):
    return StartProgress(num_done, 7, "decode0: 1 sequence a rank", elapsed_s, left_s)


def test_whoever_comes_is_told_how_far_it_is():
    with waiting_room(ANYWHERE) as room, httpx.Client(base_url=address_of(room), timeout=PATIENCE) as http:
        answer = http.get("/health")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the server is starting: loading the model"
        for left_s, retry_after in ((None, "1"), (0.0, "1"), (12.3, "13"), (500.0, "60")):
            room.tell(progress(2, 31.0, left_s))
            answer = http.post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 503
            assert "compiled 2 of 7 steps (decode0: 1 sequence a rank) in 31 s" in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "service_unavailable_error"
            assert answer.headers["Retry-After"] == retry_after
        room.close()
        room.socket.close()


def test_nobody_is_refused_when_the_server_takes_over():
    async def hello(_):
        return PlainTextResponse("hello")

    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route("/", hello)]), log_config=None, lifespan="off"))
    with waiting_room(ANYWHERE) as room:
        address, statuses, is_over = address_of(room), [], threading.Event()

        def ask():
            while not is_over.is_set():
                statuses.append(httpx.get(address, timeout=PATIENCE).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: len(statuses) > 3)
        room.close()
        serving = threading.Thread(target=server.run, args=([room.socket],))
        serving.start()
        wait_until(lambda: 200 in statuses)
        is_over.set()
        asking.join(PATIENCE)
        server.should_exit = True
        serving.join(PATIENCE)
    assert [status for status, _ in itertools.groupby(statuses)] == [503, 200]


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"cannot listen on 127.0.0.1:{port}: Address already in use"
        with pytest.raises(UserError, match=message), waiting_room(ListenSettings(port=port)):
            pass
    with (
        pytest.raises(UserError, match="cannot listen on /nowhere/at/all: No such"),
        waiting_room(ListenSettings(uds="/nowhere/at/all")),
    ):
        pass


def test_a_unix_socket_takes_the_place_of_a_stale_one_and_goes_at_the_end(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with waiting_room(ListenSettings(uds=str(path))) as room:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=PATIENCE) as http:
            assert http.get("http://server/health").status_code == 503
        room.close()
        room.socket.close()
    assert not path.exists()
    path.write_text("a file of somebody's")
    with pytest.raises(UserError, match="Address already in use"), waiting_room(ListenSettings(uds=str(path))):
        pass
    assert path.read_text() == "a file of somebody's"


def test_it_goes_with_the_engine_that_fails():
    addresses = []

    def fail():
        with waiting_room(ANYWHERE) as room:
            addresses.append(address_of(room))
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fail()
    with pytest.raises(httpx.ConnectError):
        httpx.get(addresses[0], timeout=PATIENCE)
