"""A reward server in a thread of the test's process."""

import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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
        self.wait_for(lambda: self.server.started)

    def wait_for(self, is_so):
        """Returns when something is so."""
        while not is_so():
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

    def figure(self, name):
        """A figure of `/metrics`, by its name and labels."""
        text = self.ask("GET", "/metrics").text
        return float(re.search(rf"^stage_reward_server_{re.escape(name)} (.*)$", text, re.M)[1])

    def remote(self, **settings):
        """The client's reward."""
        settings = {"give_up_s": 20.0, **settings}
        return RemoteRewardConfig(url=self.url, **settings).build(CPU)

    def terminate(self):
        """What SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def ends(self):
        """Whether the server ends by itself."""
        self.thread.join(20)
        return not self.thread.is_alive()

    def stop(self):
        """Ends the server."""
        self.server.should_exit = True
        assert self.ends()


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
def meanwhile():
    """Calls a function in another thread; returns the future of what it returns."""
    with ThreadPoolExecutor(4) as executor:
        yield executor.submit


@pytest.fixture
def drawn():
    """Random images, and a prompt for each."""

    def draw(count, *, side=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (count, side, side, 3)
        images_NHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return images_NHWC, [Prompt(f"prompt {i}", i, {"place": i}) for i in range(count)]

    return draw


@pytest.fixture
def anyio_backend():
    """What runs the tests that are coroutines."""
    return "asyncio"
