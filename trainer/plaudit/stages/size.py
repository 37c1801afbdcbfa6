"""`plaudit size`: how many reward services for how many trainers, as text and, on request, as a drawn curve."""

import math
from pathlib import Path

from plaudit import atomic
from plaudit.errors import ConfigError
from plaudit.run.storage import writing
from plaudit.settings.size import SizeConfig
from plaudit.sizing.advice import Advice, advise, best_batch_tokens, simulated
from plaudit.sizing.curve import svg_of
from plaudit.sizing.fleet import Figures, FleetSettings
from plaudit.sizing.judges import judge_times
from plaudit.sizing.workload import EVALUATE_SHARE, Workload, from_run

ROLLOUT_SHARE = 0.35
"""Of a step without waits, when only its length is known (docs/evidence/speed.md: 0.38 and 0.34)."""
BAR = 40


def run(config: SizeConfig) -> None:
    """Print the advice, and draw it.

    Raises:
        ConfigError: there is neither a run nor the numbers of one, or no number of replicas is enough.
        NotWritten: the curve's file can't be written.
    """
    workload = workload_of(config)
    times = judge_times(config.judge)
    print(
        f"A trainer sends {workload.requests_per_step} requests a step, {workload.texts_per_step} texts or "
        f"{workload.tokens_per_step:,.0f} tokens. Its step takes {workload.step_s:.2f} s without waiting; "
        f"{workload.evaluate_s:.2f} s of work after each of {len(workload.chunks)} chunks hide its scoring."
    )
    if config.replicas is not None:
        settings = FleetSettings(
            workload,
            times,
            trainers=config.trainers,
            replicas=config.replicas,
            batch_tokens=best_batch_tokens(times, workload),
        )
        print(f"{_counted(config.replicas, 'replica')}: {_in_words(simulated(settings))}")
        return
    advice = advise(workload, times, config.trainers, config.wait)
    print(text_of(advice))
    if config.curve is not None:
        with writing(config.curve):
            atomic.write_file(config.curve, _document(config.curve, svg_of(advice)))
        print(f"The curve is in {config.curve}.")


def workload_of(config: SizeConfig) -> Workload:
    """The workload that the settings describe. Raises `ConfigError` if they are too few."""
    if config.run:
        workload = from_run(Path(config.run), tokens_per_text=config.tokens_per_text)
        return workload if config.step_s is None else workload.stretched(config.step_s / workload.step_s)
    if config.step_s is None or config.texts_per_step is None or config.tokens_per_text is None:
        raise ConfigError(
            "name a run's directory (plaudit size runs/demo), or give --step-s, --texts-per-step and --tokens-per-text"
        )
    rollout_s = ROLLOUT_SHARE * config.step_s
    chunks = math.ceil(config.texts_per_step / 128)
    return Workload(
        generate_s=rollout_s * (1 - EVALUATE_SHARE) / chunks,
        evaluate_s=rollout_s * EVALUATE_SHARE / chunks,
        update_s=config.step_s - rollout_s,
        texts_per_step=config.texts_per_step,
        chunk_texts=128,
        tokens_per_text=config.tokens_per_text,
    )


def text_of(advice: Advice) -> str:
    """The advice as lines of text: the curve, the numbers, the flags."""
    highest = max(point.figures.wait_share for point in advice.points)
    lines = [
        f"{_counted(advice.trainers, 'trainer')} of this kind would keep {advice.load:.2f} replicas busy.",
        "",
        "replicas    wait     p99    load",
    ]
    for point in advice.points:
        figures = point.figures
        bar = "#" * max(1, round(BAR * figures.wait_share / highest)) if figures.wait_share else ""
        mark = ">" if point.replicas == advice.replicas else " "
        lines.append(
            f"{mark}{point.replicas:7}  {figures.wait_share:6.1%}  {figures.latency_p99_s:5.2f} s  "
            f"{figures.utilisation:5.0%}  {bar}".rstrip()
        )
    lost = "there are no rewards" if advice.replicas == 1 else f"trainers wait {advice.one_down.wait_share:.1%}"
    return "\n".join(
        [
            *lines,
            "",
            f"{_counted(advice.replicas, 'replica')}: {_in_words(advice.chosen)}.",
            f"While one replica is away, {lost}.",
            "",
            f"plaudit-reward --threads 1 --batch-tokens {advice.batch_tokens} --max-queue-tokens "
            f"{advice.max_queue_tokens} --grace-s {advice.grace_s}",
            f"Compose     docker compose up --scale reward={advice.replicas}",
            f"Kubernetes  averageValue {advice.queue_items_target} of plaudit_reward_queue_items, minReplicas "
            f"{advice.replicas}, terminationGracePeriodSeconds {advice.grace_s + 15}",
            f"Ray         target_ongoing_requests {advice.requests_target:g}, min_replicas {advice.replicas}, "
            f"graceful_shutdown_timeout_s {advice.grace_s + 10}",
            "A replica has one CPU core or one GPU. On a CPU, more replicas of one thread score more texts than one "
            "replica of more threads.",
        ]
    )


def _in_words(figures: Figures) -> str:
    return (
        f"trainers wait {figures.wait_share:.1%} of their time ({figures.wait_s:.2f} s a step), "
        f"{figures.texts_per_s:,.0f} texts/s, p99 of a request {figures.latency_p99_s:.2f} s, "
        f"replicas are busy {figures.utilisation:.0%}"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _document(path: Path, svg: str) -> str:
    if path.suffix == ".svg":
        return svg
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>plaudit size</title><body>{svg}</body></html>\n'
    )
