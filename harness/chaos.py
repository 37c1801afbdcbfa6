"""A real `plaudit ppo` while its rewards fail in every way, and the account of each reward afterwards.

A run's texts follow from its weights, and those from the rewards before. So a reward that is lost, invented, repeated
or given to another text shows in two ways: in the list of rewards that entered an update, and in every weight after it.
What stops a run (75 or 65) is put right and the run resumed, and then it must be the undisturbed run too.
"""

import csv
import functools
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from harness.machine.network import Machine
from harness.reward_service import RewardService
from harness.runs import FORKS, TrainerProcess, weights
from harness.stub_reward_server import StubRewardServer, stub_reward
from harness.tiny_models import tiny_classifier_dir, tiny_gpt2_dir
from plaudit.learner import rollout
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import DataSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters

STEPS = 3
REQUESTS_A_STEP = 2
NOT_YET = {"do": "score", "times": REQUESTS_A_STEP}
"""The first step's requests are answered well."""
WAITING = "waiting for a reward"
FOR_EVER = 10_000
TIMEOUT_S = 400.0


@dataclass(frozen=True)
class Account:
    """What became of a run and of its rewards."""

    exit_codes: list[int]
    """Of the trainer's processes; all but the first are resumed."""
    said: str
    """The first sign of trouble on its stderr, "" if it had no need to say anything."""
    asked: int
    """Rewards that the updates of the undisturbed run are made of."""
    got: int
    """Of these, the ones that entered an update here."""
    invented: int
    """Rewards that entered an update and are not in the undisturbed one: another number, another text, or twice."""
    same_weights: bool
    """Weights and value head are those of the undisturbed run, to the bit."""

    @property
    def lost(self) -> int:
        return self.asked - self.got


@dataclass(frozen=True)
class Fault:
    """What a server does to the second step's requests, and how the run ends for it."""

    name: str
    acts: tuple[dict[str, Any], ...]
    exit_code: int = 0
    settings: Mapping[str, float] = field(default_factory=dict)


def refused(name: str, **act: Any) -> Fault:
    return Fault(name, (NOT_YET, act), 65)


def passing(name: str, **act: Any) -> Fault:
    return Fault(name, (NOT_YET, act), settings={"request_timeout_s": 2.0})


def endless(name: str, **act: Any) -> Fault:
    return Fault(name, (NOT_YET, act | {"times": FOR_EVER}), 75, {"patience_s": 1.0, "request_timeout_s": 1.0})


FAULTS = [
    passing("hangs before a byte of the answer", do="hang", times=2),
    passing("hangs in the middle of a body", do="hang", after=30, times=2),
    passing("sends a byte now and then", do="drip", delay_s=0.2),
    passing("answers slowly", do="score", delay_s=0.7, times=4),
    passing("429 with Retry-After", do="status", status=429, headers={"Retry-After": "0.5"}, times=2),
    passing("a burst of 500", do="status", status=500, times=4),
    passing("502 with a page from a gateway", do="status", status=502, body="<h1>Bad Gateway</h1>", times=2),
    passing("503", do="status", status=503, times=2),
    passing("breaks the connection", do="reset", times=2),
    passing("a body shorter than it says", do="cut", times=2),
    passing("truncated gzip", do="truncated_gzip", times=2),
    passing("half a JSON document", do="literal", text="[1, 2", times=2),
    endless("503 for longer than the patience", do="status", status=503),
    endless("429 and nothing else for longer than the patience", do="status", status=429),
    endless("hangs for longer than the patience", do="hang"),
    refused("one reward too few", do="wrong_count"),
    Fault("rewards in another order than the texts", ({"do": "reversed", "probes": True},), 65),
    refused("NaN", do="literal", text="NaN"),
    refused("Infinity as JSON text", do="literal", text="Infinity"),
    refused("1e999", do="literal", text="1e999"),
    refused("null", do="literal", text="null"),
    refused("another model answers", do="revision", revision="sha256:other"),
    refused("another label than asked for", do="label", label="NEGATIVE"),
    refused("HTML from a proxy, status 200", do="html"),
    refused("a redirect", do="redirect", location="http://elsewhere/v1/rewards"),
    refused("422", do="status", status=422, body="too strange"),
    refused("a body without an end", do="flood"),
]


class Held:
    """A trainer that stops after its first step's rollout until it is let go. Lives in both processes."""

    def __init__(self) -> None:
        self._reached: Event = FORKS.Event()
        self._go: Event = FORKS.Event()

    def stop_here(self) -> None:
        self._reached.set()
        self._go.wait(TIMEOUT_S)

    def wait_until_there(self) -> None:
        assert self._reached.wait(TIMEOUT_S), "the trainer has not finished its first rollout"

    def let_go(self) -> None:
        self._go.set()


Disturb = Callable[[TrainerProcess, Callable[[], None]], str]
"""Does something to the servers while the trainer is held, lets it go by calling the second argument, and perhaps does
more. Gives what it has read of the trainer's stderr."""


class Trial:
    """The undisturbed run of one small policy, and runs that are disturbed."""

    def __init__(self, directory: Path, url: str) -> None:
        """`url`: of the server whose rewards are the right ones."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._runs = 0
        data = directory / "reviews.csv"
        with data.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for i in range(200):
                rows.writerow([f"Film {i} is {'good' if i % 2 else 'bad'}. " + "The acting is moving. " * 12, i % 2])
        self._config = PPOConfig(
            policy=str(tiny_gpt2_dir(directory / "policy")),
            output_dir=directory / "undisturbed",
            dataset=DataSettings(str(data)),
            ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-3, ppo_epochs=2),
            steps=STEPS,
            checkpoint_every=1,
            trackers=(),
        )
        config = self._against((url,), {})
        config = replace(config, output_dir=self._config.output_dir)
        code, stderr = self._start(config, None).end(TIMEOUT_S)
        assert code == 0, stderr
        self.samples = samples_of(config.output_dir)
        self._weights = weights(config.output_dir)

    def run(
        self,
        urls: Sequence[str],
        disturb: Disturb,
        *,
        put_right: Callable[[], None] = lambda: None,
        **settings: float,
    ) -> Account:
        """Holds the trainer after its first rollout for `disturb`; if it stops, puts things right and resumes."""
        config, held = self._against(urls, settings), Held()
        trainer = self._start(config, held)
        held.wait_until_there()
        return self._end(trainer, config, put_right, disturb(trainer, held.let_go))

    def run_freely(
        self, urls: Sequence[str], *, put_right: Callable[[], None] = lambda: None, **settings: float
    ) -> Account:
        """Lets the trainer run; whenever it stops, puts things right and resumes."""
        config = self._against(urls, settings)
        return self._end(self._start(config, None), config, put_right, "")

    def _end(self, trainer: TrainerProcess, config: PPOConfig, put_right: Callable[[], None], heard: str) -> Account:
        code, stderr = trainer.end(TIMEOUT_S)
        stderr = heard + stderr
        codes, said = [code], in_short(stderr)
        while code:
            check_what_is_left(config.output_dir, code, stderr)
            put_right()
            code, stderr = self._start(config, None, "--resume", "auto").end(TIMEOUT_S)
            codes.append(code)
        needed, got = Counter(self.samples), Counter(samples_of(config.output_dir))
        final = weights(config.output_dir)
        return Account(
            exit_codes=codes,
            said=said,
            asked=needed.total(),
            got=(needed & got).total(),
            invented=(got - needed).total(),
            same_weights=final.keys() == self._weights.keys()
            and all(torch.equal(final[name], self._weights[name]) for name in final),
        )

    def _against(self, urls: Sequence[str], settings: Mapping[str, float]) -> PPOConfig:
        self._runs += 1
        values: dict[str, Any] = {"label": "POSITIVE", "patience_s": 300.0, "connect_timeout_s": 1.0} | dict(settings)
        reward = RewardSettings.of(url=tuple(urls), chunk_size=4, **values)
        return replace(self._config, output_dir=self._directory / f"run-{self._runs}", reward=reward)

    def _start(self, config: PPOConfig, held: Held | None, *flags: str) -> TrainerProcess:
        return TrainerProcess(config, *flags, before=functools.partial(keep_samples, config.output_dir, held))


def keep_samples(directory: Path, held: Held | None) -> None:
    """In the trainer's process: writes down what enters each update, and stops after the first rollout if told to."""
    collect = rollout.collect_rollout

    def kept(*arguments: Any, **named: Any) -> Any:
        collected = collect(*arguments, **named)
        scores = collected.rollout.scores.tolist()
        with (directory / "entered-updates.jsonl").open("a") as file:
            for sample in zip(collected.prompts, collected.responses, scores, strict=True):
                file.write(json.dumps(sample) + "\n")
        if held is not None:
            held.stop_here()
        return collected

    rollout.collect_rollout = kept


def reward_of(prompt: str, response: str) -> float:
    """The stand-in's reward as the trainer's tensors hold it."""
    return torch.tensor(stub_reward(prompt, response)).item()


def samples_of(directory: Path) -> list[tuple[str, str, float]]:
    """(prompt, response, reward) of everything that entered an update."""
    lines = (directory / "entered-updates.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


def check_what_is_left(directory: Path, code: int, stderr: str) -> None:
    """A stopped run says how to go on: after 75 the command, after 65 the request and the answer in a file."""
    if code == 75:
        assert "\nplaudit ppo --config " in stderr, stderr
        assert "--resume auto\n" in stderr, stderr
        return
    assert code == 65, stderr
    path = directory / "rejected-reward.json"
    assert str(path) in stderr, stderr
    exchange = json.loads(path.read_text())["exchange"]
    path.unlink()
    assert "items" in json.loads(exchange["request"])
    assert exchange["status"] is not None


def in_short(stderr: str) -> str:
    """The first sentence about the trouble, without addresses and times."""
    said = re.search(r"^(?:waiting for a reward, for \d+ s more: |plaudit ppo: )(.*)$", stderr, re.MULTILINE)
    if said is None:
        return ""
    text = re.sub(r"http://[\d.:]+(/[\w/]*)?:? ", "", said[1])
    return text.split("; checkpoint ")[0].split("; the request and ")[0].split(". ")[0]


def with_fault(trial: Trial, fault: Fault) -> Account:
    """A run against one server that misbehaves by script."""
    with stubs(1) as (server,):
        server.script(list(fault.acts))
        return trial.run_freely([server.url], put_right=lambda: server.script([]), **fault.settings)


def with_one_fault_after_the_other(trial: Trial, faults: Sequence[Fault]) -> Account:
    """One run that each of the faults stops, and that is resumed into the next."""
    with stubs(1) as (server,):
        scripts = iter([*([fault.acts[-1]] for fault in faults[1:]), []])
        server.script(list(faults[0].acts))
        return trial.run_freely([server.url], put_right=lambda: server.script(next(scripts)))


def killed_and_restarted(trial: Trial) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        server.kill()
        let_go()
        said = trainer.wait_for_line(WAITING)
        server.start()
        return said

    with stubs(1) as (server,):
        return trial.run([server.url], disturb)


def killed_with_a_request_under_way_and_restarted(trial: Trial) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        server.script([{"do": "hang"}])
        let_go()
        wait_until_asked(server)
        server.kill()
        said = trainer.wait_for_line(WAITING)
        server.start()
        return said

    with stubs(1) as (server,):
        return trial.run([server.url], disturb)


def one_of_two_killed_with_a_request_under_way(trial: Trial) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        first.script([{"do": "hang"}])
        let_go()
        wait_until_asked(first)
        first.kill()
        return ""

    with stubs(2) as (first, second):
        return trial.run([first.url, second.url], disturb)


def both_killed_for_longer_than_the_patience(trial: Trial) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        for server in servers:
            server.kill()
        let_go()
        return ""

    def put_right() -> None:
        for server in servers:
            server.start()

    with stubs(2) as servers:
        return trial.run([server.url for server in servers], disturb, put_right=put_right, patience_s=1.0)


KILLS: dict[str, tuple[int, Callable[[Trial], Account]]] = {
    "killed, and restarted when the trainer waits": (0, killed_and_restarted),
    "killed with a request under way, and restarted": (0, killed_with_a_request_under_way_and_restarted),
    "one of two killed for good with a request under way": (0, one_of_two_killed_with_a_request_under_way),
    "both of two killed for longer than the patience": (75, both_killed_for_longer_than_the_patience),
}
"""What happens to stand-in servers, by SIGKILL: exit code and how it is done."""


class Replicas:
    """Two processes of the real service with the same model, and a trial of its rewards."""

    def __init__(self, directory: Path) -> None:
        model = tiny_classifier_dir(directory / "judge")
        # The same score in whatever company, so that runs can be compared to the bit.
        self.services = [RewardService(model, "--deterministic") for _ in range(2)]
        self.urls = [service.url for service in self.services]
        self.trial = Trial(directory, self.urls[0])

    def restart(self) -> None:
        """Start those that don't run, and wait until they are ready."""
        begun = [service for service in self.services if not service.running]
        for service in begun:
            service.begin()
        for service in begun:
            service.wait_until_ready()

    def kill(self) -> None:
        for service in self.services:
            service.kill()


def real_one_killed_with_a_request_under_way_and_restarted(replicas: Replicas) -> Account:
    service = replicas.services[0]

    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        service.send_signal(
            signal.SIGSTOP
        )  # A request is surely under way when the trainer says that it has timed out.
        let_go()
        said = trainer.wait_for_line(WAITING)
        service.kill()
        replicas.restart()
        return said

    return replicas.trial.run([service.url], disturb, request_timeout_s=2.0)


def one_of_two_real_ones_killed(replicas: Replicas) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        replicas.services[0].kill()
        let_go()
        return ""

    return replicas.trial.run(replicas.urls, disturb)


def both_real_ones_killed_for_longer_than_the_patience(replicas: Replicas) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        replicas.kill()
        let_go()
        return ""

    return replicas.trial.run(replicas.urls, disturb, put_right=replicas.restart, patience_s=1.0)


REAL_KILLS: dict[str, tuple[int, Callable[[Replicas], Account]]] = {
    "the real service killed with a request under way, and restarted": (
        0,
        real_one_killed_with_a_request_under_way_and_restarted,
    ),
    "one of two real services killed for good": (0, one_of_two_real_ones_killed),
    "both real services killed for longer than the patience": (75, both_real_ones_killed_for_longer_than_the_patience),
}


def packets_lost_and_late(trial: Trial) -> Account:
    with machines(2) as both:
        for machine in both:
            machine.lose_packets(0.1)
            machine.narrow("128kbit")
        return trial.run_freely([machine.server.url for machine in both])


def cable_pulled_and_plugged_in(trial: Trial) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        machine.unplug()
        let_go()
        said = trainer.wait_for_line(WAITING)
        machine.plug()
        return said

    with machines(1) as (machine,):
        return trial.run([machine.server.url], disturb, request_timeout_s=2.0)


def one_of_two_cables_pulled(trial: Trial) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        both[0].unplug()
        let_go()
        return ""

    with machines(2) as both:
        return trial.run([machine.server.url for machine in both], disturb, request_timeout_s=2.0)


def every_cable_pulled_for_longer_than_the_patience(trial: Trial) -> Account:
    def disturb(trainer: TrainerProcess, let_go: Callable[[], None]) -> str:
        for machine in both:
            machine.unplug()
        let_go()
        return ""

    def put_right() -> None:
        for machine in both:
            machine.plug()

    with machines(2) as both:
        urls = [machine.server.url for machine in both]
        return trial.run(urls, disturb, put_right=put_right, patience_s=1.0, request_timeout_s=1.0)


CABLES: dict[str, tuple[int, Callable[[Trial], Account]]] = {
    "a tenth of all packets lost, 128 kbit/s, two endpoints": (0, packets_lost_and_late),
    "the cable pulled, and plugged in when the trainer waits": (0, cable_pulled_and_plugged_in),
    "one of two cables pulled for good": (0, one_of_two_cables_pulled),
    "both cables pulled for longer than the patience": (75, every_cable_pulled_for_longer_than_the_patience),
}
"""What happens to network namespaces: exit code and how it is done."""


@contextmanager
def stubs(count: int) -> Iterator[list[StubRewardServer]]:
    """So many stand-in servers."""
    servers = [StubRewardServer() for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


@contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """So many stand-in servers, each in a network namespace."""
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(Machine())
            stack.callback(made[-1].end)
        yield made


def wait_until_asked(server: StubRewardServer) -> None:
    """Returns when a request is under way."""
    deadline = time.monotonic() + TIMEOUT_S
    while server.state["in_flight"] == 0:
        assert time.monotonic() < deadline, "nobody asks"
        time.sleep(0.02)
