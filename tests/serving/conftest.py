"""A reward server in a thread of the test's process."""

import signal
import threading
import time

import httpx2
import pytest
import torch

from stage_rl.rewards.remote import RemoteRewardConfig
from stage_rl.serving.server import Server, Serving, bound_socket, build_routes
from stage_rl.types import Prompt

CPU = torch.device("cpu")


class Running:
    """A server that runs until `stop`, and ways to ask it."""

    def __init__(self, *configs, port=0, **settings):
        serving = Serving(port=port, **settings)
        self.token = serving.token
        with bound_socket(serving) as listener:
            self.port = listener.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
            self.routes = build_routes(configs, serving, CPU)
            self.server = Server(self.routes, serving)
            listener = listener.dup()
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.005)

    def ask(self, method, path, **options):
        """One plain request; with the token where there is one."""
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        if self.token:
            headers = {"Authorization": f"Bearer {self.token}", **headers}
        with httpx2.Client(trust_env=False, verify=False, timeout=20) as client:
            return client.request(method, self.url + path, headers=headers, **options)

    def post(self, body, reward="toy", **options):
        """A request for scores."""
        return self.ask("POST", f"/v1/rewards/{reward}/scores", content=body, **options)

    def remote(self, **settings):
        """The client's reward."""
        settings = {"give_up_s": 20.0, **settings}
        return RemoteRewardConfig(url=self.url, **settings).build(CPU)

    def terminate(self):
        """What SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def stop(self):
        """Ends the server; it must do so by itself."""
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def serve():
    """Starts servers that end with the test."""
    yield from _starter()


@pytest.fixture(scope="module")
def serve_long():
    """Starts servers that end with the module, for tests that leave no trace on them."""
    yield from _starter()


def _starter():
    running = []

    def start(*configs, **settings):
        running.append(Running(*configs, **settings))
        return running[-1]

    yield start
    for one in running:
        one.stop()


@pytest.fixture
def drawn():
    """Random images, and a prompt for each."""

    def draw(count, *, side=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (count, side, side, 3)
        images_NHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return images_NHWC, [Prompt(f"prompt {i}", i, {"place": i}) for i in range(count)]

    return draw
