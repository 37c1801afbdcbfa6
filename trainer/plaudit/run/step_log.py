"""Logging of a PPO run's steps: files, TensorBoard, trackers, and progress on the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from plaudit.learner.rollout import CollectedRollout
from plaudit.learner.stepper import StepResult
from plaudit.parallel.processes import Processes
from plaudit.run.evaluations import FILE_NAME as EVALUATIONS
from plaudit.run.metrics import MetricsLog, open_tracker
from plaudit.run.progress import StepProgress
from plaudit.run.rollouts import RolloutLog
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PPOConfig


class StepLog:
    """The log of a run's steps. All processes call it; only rank 0 writes, and all raise its errors."""

    def __init__(self, config: PPOConfig, processes: Processes, progress: StepProgress) -> None:
        self._config, self._processes, self._progress = config, processes, progress
        self._log: MetricsLog
        self._rollouts: RolloutLog
        """Both are set in rank 0 by `opened`."""

    @contextmanager
    def opened(self, steps_done: int) -> Iterator["StepLog"]:
        """Open files and trackers for the steps after `steps_done`, inside the block.

        Raises:
            ConfigError: a tracker's name is unknown, or its package is not installed.
            NotWritten: a file can't be written.
        """
        self._processes.on_main(self._open, steps_done)
        try:
            yield self
        finally:
            if self._processes.is_main:
                self._log.close()

    def showing(self) -> AbstractContextManager[object]:
        """Show progress inside the block, in rank 0."""
        return self._progress.showing() if self._processes.is_main else nullcontext()

    def write(self, step: int, metrics: Mapping[str, float], collected: CollectedRollout, result: StepResult) -> None:
        """Write the metrics of one step, its rollouts, and every `log_samples_every` steps some of its samples.

        Raises:
            NotWritten: a file can't be written.
        """
        self._processes.on_main(self._write, step, metrics, collected, result)
        if self._processes.is_main:
            self._progress.step(metrics)

    def write_evaluation(self, record: Mapping[str, float]) -> None:
        """Write a held-out evaluation to evaluations.jsonl and the trackers. Raises `NotWritten`."""
        self._processes.on_main(self._write_evaluation, record)

    def _write_evaluation(self, record: Mapping[str, float]) -> None:
        self._log.write_evaluation(self._config.output_dir / EVALUATIONS, int(record["step"]), record)

    def _open(self, steps_done: int) -> None:
        config, directory = self._config, self._config.output_dir
        others = [
            open_tracker(name, directory, to_dict(config), project=config.tracker_project, run=config.tracker_run)
            for name in config.trackers
            if name != "tensorboard"
        ]
        tensorboard = "tensorboard" in config.trackers
        self._rollouts = RolloutLog(directory, config.watch)
        self._log = MetricsLog(directory, resume_from=steps_done, tensorboard=tensorboard, trackers=others)

    def _write(self, step: int, metrics: Mapping[str, float], collected: CollectedRollout, result: StepResult) -> None:
        self._rollouts.write(step, collected, result)
        self._log.write(step, metrics)
        if self._config.log_samples_every and step % self._config.log_samples_every == 0:
            samples = sample_table(collected)
            fields = {name: values[: len(samples)] for name, values in collected.fields.items()}
            self._log.write_samples(step, samples, fields)


def sample_table(collected: CollectedRollout, rows: int = 8) -> Sequence[tuple[str, str, float]]:
    """The first prompts, responses and scores of a step."""
    scores = collected.rollout.scores[:rows].tolist()
    return list(zip(collected.prompts[:rows], collected.responses[:rows], scores, strict=True))
