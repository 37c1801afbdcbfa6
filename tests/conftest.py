import os
from collections.abc import Callable, Iterator

import pytest

from harness.stub_reward_server import StubRewardServer

# Tests run side by side (pytest -n): a thread each, for themselves and for the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def idle_stubs() -> Iterator[list[StubRewardServer]]:
    servers: list[StubRewardServer] = []
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def start_stub(idle_stubs: list[StubRewardServer]) -> Iterator[Callable[[], StubRewardServer]]:
    """Gives as many scriptable reward servers as a test asks for, each in a process of its own."""
    taken: list[StubRewardServer] = []

    def start() -> StubRewardServer:
        taken.append(idle_stubs.pop() if idle_stubs else StubRewardServer())
        taken[-1].reset()
        return taken[-1]

    yield start
    idle_stubs.extend(taken)


@pytest.fixture
def stub_reward_server(start_stub: Callable[[], StubRewardServer]) -> StubRewardServer:
    return start_stub()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what passed tests have measured (`record_property`), with any number of workers."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {name}: {value}")
