"""Rounds: answers, people's rankings, a reward model of all rankings, PPO, evaluation; and again from the new policy.

Every stage is the same as its own command, called in this process.

Failure modes: a finished stage is repeated; PPO uses another round's reward model, or one that learnt nothing.
"""

import dataclasses
import gc
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from plaudit import atomic
from plaudit.errors import ConfigError
from plaudit.policy.reading import settle
from plaudit.report.comparison import win_rate_by_scores
from plaudit.report.rounds import render_rounds, rounds_table
from plaudit.rewards.settings import RewardSettings
from plaudit.run.loop_state import LoopState, open_state, write_rounds
from plaudit.run.people import wait_for_people
from plaudit.run.progress import Counting, WaitingLine
from plaudit.run.rankings import RankingAdmin
from plaudit.run.runtime import exclusive
from plaudit.run.service_process import ranking_service, reward_service
from plaudit.run.serving import admin_key, publish, reload_all, revision_of
from plaudit.run.storage import write_text, writing
from plaudit.settings.loop import LoopConfig
from plaudit.stages import annotate, evaluate, ppo, reward_model, sample
from plaudit.stages.loop_settings import Ranking, Round
from plaudit.stages.ranked_answers import AtChance

REPORT_FILE = "report.html"
SERVED = "reward-model"
"""The newest reward model, in the output directory: what reward services that run already serve."""
RANKINGS_DB = "rankings.db"
RANK_KEY_FILE = "rank-key"


def run(config: LoopConfig) -> list[dict[str, Any]]:
    """All rounds, or those that are left. What rounds.jsonl holds.

    Raises:
        RankingsUnavailable, RewardUnavailable: people, or a service, took longer than the patience. Resume later.
        AtChance: the reward model can't be told from guessing: there is no PPO on it.
        PlauditError: whatever else a stage raises.
    """
    _check(config)
    with exclusive(config.output_dir), ExitStack() as services:
        state = open_state(config)
        ranking = services.enter_context(_ranking(config))
        rounds = [Round(config, number, state.batch) for number in range(1, config.rounds + 1)]
        records = []
        for this in rounds:
            print(f"round {this.number} of {config.rounds}", flush=True)
            _take_round(this, ranking, state)
            records.append(_record(this, state))
            write_rounds(config.output_dir, records)
            write_text(config.output_dir / REPORT_FILE, render_rounds(records, title=str(config.output_dir)))
    from rich.console import Console

    Console().print(rounds_table(records))
    print(f"report: {config.output_dir / REPORT_FILE}")
    return records


def _check(config: LoopConfig) -> None:
    """What would otherwise show after hours."""
    if config.rank_url is None and not config.simulated.annotators:
        raise ConfigError(
            "nobody ranks: give the address of the ranking service where people do, --rank-url, or have simulated "
            "people rank, --simulated.annotators 5 --judge DIR"
        )
    if config.reward_urls:
        admin_key(config.admin_key_file)


def _take_round(this: Round, ranking: Ranking, state: LoopState) -> None:
    """The stages of one round that are not finished."""

    def stage(name: str, work: Callable[[], dict[str, Any]]) -> None:
        key = f"{this.name}/{name}"
        if key in state.finished:
            return
        state.begin(key)
        print(f"{key}: begun", flush=True)
        began = time.monotonic()
        figures = work()
        seconds = round_to_hundredths(time.monotonic() - began)
        state.finish(key, figures | {"seconds": seconds})
        print(f"{key}: finished in {seconds:g} s", flush=True)
        _free_memory()

    stage("sample", lambda: _sample(this, ranking))
    stage("people", lambda: _people(this, ranking))
    stage("reward-model", lambda: _reward_model(this, ranking))
    comparing = {f"against-{name.replace(' ', '-')}": policy for name, policy in this.policies_before().items()}
    if any(f"{this.name}/{name}" not in state.finished for name in ("ppo", *comparing)):
        with _rewards(this) as reward:
            stage("ppo", lambda: _ppo(this, reward))
            for name, policy in comparing.items():
                stage(name, lambda name=name, policy=policy: _compare(this, policy, reward, name))  # type: ignore[misc]
    if this.config.judge is not None:
        judging = {f"judged-{name}": policy for name, policy in comparing.items()}
        if any(f"{this.name}/{name}" not in state.finished for name in judging):
            with _judge(this) as reward:
                for name, policy in judging.items():
                    stage(name, lambda name=name, policy=policy: _compare(this, policy, reward, name))  # type: ignore[misc]


def round_to_hundredths(seconds: float) -> float:
    """For people and files."""
    return int(100 * seconds + 0.5) / 100


def _sample(this: Round, ranking: Ranking) -> dict[str, Any]:
    config = this.sample(ranking)
    if not config.file.is_file():
        with _admin(this, ranking) as admin:
            if any(batch.id == this.batch and batch.tasks for batch in admin.batches()):
                raise ConfigError(
                    f"{admin.url} has a batch {this.batch!r}, and it isn't this loop's; give this one a name of its "
                    "own, --people.batch"
                )
    result = sample.run(config)
    return {"prompts": result.prompts, "same_answers": result.same_answers}


def _admin(this: Round, ranking: Ranking, on_wait: Callable[[str], None] | None = None) -> RankingAdmin:
    patience_s = this.config.people.patience_s
    return RankingAdmin(ranking.url, api_key_file=ranking.api_key_file, patience_s=patience_s, on_wait=on_wait)


def _people(this: Round, ranking: Ranking) -> dict[str, Any]:
    """Simulated people rank, or people are waited for."""
    config = this.config
    with (
        Counting("rankings") as counting,
        _admin(this, ranking, counting.waiting) as admin,
    ):
        if config.simulated.annotators:
            annotate.run(this.annotate(ranking))
        progress = wait_for_people(
            admin, this.batch, counting, patience_s=config.people_patience_s, poll_s=config.people_poll_s
        )
        agreement = admin.agreement(this.batch)
    return {
        "rankings": progress.counted + progress.surplus,
        "people": progress.annotators,
        "parked": progress.parked,
        "agreement": agreement.pair_agreement.model_dump(),
        "chance_agreement": agreement.chance,
        "alpha": agreement.alpha.model_dump(),
    }


def _reward_model(this: Round, ranking: Ranking) -> dict[str, Any]:
    config = this.reward_model(ranking)
    try:
        figures = reward_model.run(config)["pairs"]
    except AtChance as error:
        error.add_note(
            f"there is no PPO in {this.name}; of this loop, --resume auto --reward-model.allow-chance goes on all the "
            "same"
        )
        raise
    return {
        "held_out": dataclasses.asdict(figures),
        "revision": revision_of(config.output_dir),
    }


def _ppo(this: Round, reward: RewardSettings) -> dict[str, Any]:
    result = ppo.run(this.ppo(reward))
    return {"steps": result.steps, "training": result.metrics}


def _compare(this: Round, policy: str, reward: RewardSettings, name: str) -> dict[str, Any]:
    """This round's policy against another one, by the scores of `reward`."""
    result = evaluate.by_rewards(this.evaluate(policy, reward, name))
    figures, samples = result.evaluation, result.samples
    rate = win_rate_by_scores([s.reward_after for s in samples], [s.reward_before for s in samples])
    return {
        "win_rate": dataclasses.asdict(rate),
        "before": figures.reward.before.mean,
        "after": figures.reward.after.mean,
        "kl": figures.kl,
        "perplexity": figures.perplexity.after,
        "distinct_responses": figures.distinct_responses.after,
    }


@contextmanager
def _ranking(config: LoopConfig) -> Iterator[Ranking]:
    """The ranking service that was named, else one for simulated people that lives as long as the block."""
    if config.rank_url is not None:
        yield Ranking(config.rank_url, config.people.api_key_file)
        return
    key_file = config.output_dir / RANK_KEY_FILE
    if not key_file.is_file():
        with writing(key_file):
            atomic.write_file(key_file, secrets.token_urlsafe(32) + "\n", mode=0o600)
    key = key_file.read_text(encoding="utf-8").strip()
    with ranking_service(
        config.output_dir / RANKINGS_DB, config.output_dir, api_key=key, ready_timeout_s=config.ready_timeout_s
    ) as url:
        yield Ranking(url, key_file)


@contextmanager
def _rewards(this: Round) -> Iterator[RewardSettings]:
    """The round's reward model behind HTTP: in the services that were named, else in one that lives as long as this."""
    config, model = this.config, this.reward_model_dir
    settle(model)
    if not config.reward_urls:
        with reward_service(
            str(model), this.directory, ready_timeout_s=config.ready_timeout_s, device=config.device
        ) as url:
            yield config.reward_from(url)
        return
    publish(model, config.output_dir / SERVED)
    with WaitingLine() as waiting:
        reload_all(
            config.reward_urls,
            revision_of(model),
            key=admin_key(config.admin_key_file),
            patience_s=config.reload_patience_s,
            on_wait=waiting,
        )
    print(f"{len(config.reward_urls)} reward services serve the model of {this.name}", flush=True)
    yield config.reward_from(*config.reward_urls)


@contextmanager
def _judge(this: Round) -> Iterator[RewardSettings]:
    """The hidden judge behind HTTP."""
    config = this.config
    assert config.judge is not None
    if config.judge_is_service:
        yield this.judged_by(config.judge)
        return
    with reward_service(
        config.judge, this.directory, ready_timeout_s=config.ready_timeout_s, device=config.device, name="judge"
    ) as url:
        yield this.judged_by(url)


def _record(this: Round, state: LoopState) -> dict[str, Any]:
    """What is told of one round."""
    of = {key.removeprefix(f"{this.name}/"): figures for key, figures in state.finished.items()}
    own = {key: figures for key, figures in of.items() if "/" not in key}
    known = {number: state.finished[f"round-{number}/people"]["rankings"] for number in range(1, this.number + 1)}
    people, held_out, first = own["people"], own["reward-model"]["held_out"], own["against-stage-1"]
    rates: dict[str, dict[str, Any]] = {}
    for key, figures in own.items():
        judge, _, against = key.rpartition("against-")
        if against and "win_rate" in figures:
            by = "judge" if judge else "reward_model"
            rates.setdefault(by, {})[against] = {
                name: figures["win_rate"][name] for name in ("mean", "ci95", "ties", "prompts")
            }
    return {
        "round": this.number,
        "policy": this.trained,
        "rankings": known[this.number],
        "all_rankings": sum(known.values()),
        "people": people["people"],
        "agreement": people["agreement"],
        "chance_agreement": people["chance_agreement"],
        "alpha": people["alpha"],
        "held_out_accuracy": held_out["accuracy"],
        "held_out_ci95": held_out["accuracy_ci95"],
        "held_out_pairs": held_out["pairs"],
        "revision": own["reward-model"]["revision"],
        "reward_before": first["before"],
        "reward": first["after"],
        "kl": first["kl"],
        "judge": own.get("judged-against-stage-1", {}).get("after"),
        "judge_before": own.get("judged-against-stage-1", {}).get("before"),
        "win_rates": rates,
        "seconds": {key: figures["seconds"] for key, figures in own.items()},
    }


def _free_memory() -> None:
    """What the stage held, so that a service on the same GPU can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
