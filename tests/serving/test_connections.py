"""What strangers may do to the connections of a server, and what a client bears from one."""

import contextlib
import logging
import resource
import socket
import threading
import time

import httpx2
import pytest
from toy_reward import Toy

from stage_rl.errors import RewardError
from stage_rl.rewards import remote
from stage_rl.rewards.remote import RetryingClient
from stage_rl.serving import connections
from stage_rl.serving.connections import LogLimit

TOY = Toy(name="toy")


def connect(running, data):
    client = socket.create_connection(("127.0.0.1", running.port), timeout=10)
    client.sendall(data)
    return client


def read_all(client):
    """What comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_length_beside_chunks_is_refused_and_nothing_behind_it_is_served(serve):
    running = serve(TOY, token="0123456789abcdef")
    head = (
        b"POST /v1/rewards/toy/scores HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer 0123456789abcdef\r\nContent-Length: 10\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    behind = b"5\r\nhello\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    with connect(running, head + behind) as client:
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 411 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_the_head_of_a_request_must_come_in_time(serve, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_S", 0.2)
    running = serve(TOY)
    started = time.monotonic()
    with connect(running, b"") as silent, connect(running, b"GET /health HTTP/1.1\r\nA:") as half:
        assert read_all(silent) == read_all(half) == b""
    assert time.monotonic() - started < 5
    # The second request of a connection as well.
    with connect(running, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /hea") as client:
        assert read_all(client).count(b"HTTP/1.1 200") == 1


def test_many_half_sent_heads_do_not_silence_the_server(serve, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 64)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    running = serve(TOY)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(running, b"GET /health HTTP/1.1\r\nA:"))
        started = time.monotonic()
        assert running.ask("GET", "/health").status_code == 200
        assert time.monotonic() - started < 1
        assert len(running.server.server_state.connections) <= 65


@pytest.mark.parametrize(
    ("line", "status"), [(b"POST /v1/rewards/toy/scores", b"401"), (b"GET /health", b"200")]
)
def test_bodies_that_never_come_do_not_silence_the_server(serve, monkeypatch, line, status):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 64)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    running = serve(TOY, token="0123456789abcdef")
    head = line + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999999\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(connect(running, head))
            assert client.recv(65536).startswith(b"HTTP/1.1 " + status)
            client.sendall(b"x")
        started = time.monotonic()
        assert running.ask("GET", "/health").status_code == 200
        assert time.monotonic() - started < 1
        assert len(running.server.server_state.connections) <= 65


def test_a_body_that_is_not_read_must_end_in_time(serve, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_S", 0.5)
    running = serve(TOY)
    head = b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"
    with connect(running, head) as client:
        client.sendall(b"x")
        assert read_all(client).count(b"HTTP/1.1 200") == 1
    # One that ends is thrown away, and the next request is answered.
    with connect(running, head + b"0123456789" + head) as client:
        assert read_all(client).count(b"HTTP/1.1 200") == 2


def test_answers_that_are_not_read_end_the_connection(serve, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_S", 0.2)
    running = serve(TOY)
    known = running.server.server_state.connections
    with connect(running, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 5000):
        running.wait_for(lambda: known)
        running.wait_for(lambda: not known)
    assert running.ask("GET", "/health").status_code == 200


def test_answers_are_sent_at_once(serve):
    running = serve(TOY)
    with httpx2.Client(trust_env=False) as client:
        client.get(running.url + "/health")
        (one,) = running.server.server_state.connections
        connected = one.transport.get_extra_info("socket")
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_nothing_is_redirected_to_where_the_client_says(serve):
    running = serve(TOY)
    answer = running.ask("GET", "/v1/rewards/", headers={"Host": "evil.example"})
    assert answer.status_code == 404
    assert "location" not in answer.headers


def test_a_log_is_limited_and_says_what_it_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit = LogLimit()
    records = [logging.makeLogRecord({"msg": "no %s", "args": ("head",)}) for _ in range(1000)]
    assert sum(map(limit.filter, records)) == LogLimit.MOST
    now[0] = LogLimit.PERIOD_S
    last = logging.makeLogRecord({"msg": "no %s", "args": ("head",)})
    assert limit.filter(last)
    assert last.getMessage() == "no head (980 left out before)"


@contextlib.contextmanager
def stranger(head, part, pause_s):
    """A server that answers with the same bytes for ever."""
    over = threading.Event()

    def answer():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client, contextlib.suppress(OSError):
                    client.recv(65536)
                    client.sendall(head)
                    while not over.wait(pause_s):
                        client.sendall(part)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    ("head", "part", "pause_s", "message"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x", 0.05, "its answer took longer than 0.3 s, at attempt"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.05, "its answer took longer than 0.3 s, at attempt"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4000, 0.0, "its answer has no end"),
    ],
    ids=["slow head", "slow body", "long body"],
)
def test_an_answer_that_does_not_end_is_given_up(monkeypatch, head, part, pause_s, message):
    monkeypatch.setattr(remote, "MAX_ANSWER_BYTES", 100_000)
    with stranger(head, part, pause_s) as url:
        client = RetryingClient(url, token=None, timeout_s=0.3, give_up_s=0.4, connections=1)
        with pytest.raises(RewardError, match=message):
            client.ask("GET", "/v1/rewards")
        client.close()
