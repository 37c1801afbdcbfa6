"""Shared by stages 1 and 2: training that can be stopped and resumed, and a verified model directory.

Failure modes: hours of training whose result can't be written; non-finite weights; a saved directory that can't be
loaded. The directory is therefore checked first, every gradient is checked before an optimizer step, and the saved
model is loaded again and must give the same metrics.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import peft
import torch
from torch.nn.utils import get_total_norm
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from plaudit import atomic
from plaudit.errors import ConfigError, NotAsSaved, NotFinite
from plaudit.learner.memory import BatchSizeFinder, is_out_of_memory
from plaudit.parallel.launch import world_size
from plaudit.policy.adapters import save_generation_settings
from plaudit.policy.saving import require_finite
from plaudit.policy.tokenizer import Tokenizer
from plaudit.run import checkpoint as checkpoints
from plaudit.run.runtime import StopRequested, StopSignal, exclusive
from plaudit.run.storage import NotWritten, replaced_model
from plaudit.settings.plain import to_dict
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sft import SFTConfig
from plaudit.settings.starting_points import Stage, chosen_optimizer
from plaudit.settings.supervised import OptimizerSettings

CHECKPOINTS = "checkpoints"
ORDER = "order.pt"
"""File in a checkpoint with the generator states of the epoch's order and of a random collator."""
FREE_TO_CHANGE = (
    *("output_dir", "resume", "checkpoint_every", "allow_chance", "push_to_hub", "hub_private"),
    *("ranked", "api_key_file", "patience_s"),  # the rankings themselves are compared
)
RandomState: TypeAlias = tuple[Any, ...]
"""State of Python's generator: version, numbers, and a cached number from `gauss`."""


@dataclass(frozen=True)
class Run:
    """A running stage: its directory is locked, and stop signals are recorded."""

    config: SFTConfig | RewardModelConfig
    stop: StopSignal
    resumed: checkpoints.Checkpoint | None

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.config.output_dir / CHECKPOINTS


@contextmanager
def begun(config: SFTConfig | RewardModelConfig) -> Iterator[Run]:
    """Check and lock the output directory, find the checkpoint to resume, and handle stop signals inside the block.

    Raises:
        ConfigError: another run holds the lock, there is an unfinished run, or several processes were started.
        NotWritten: a file can't be written; the message names the checkpoint to resume from.
        StopRequested: after a signal; the message names the saved checkpoint.
    """
    count = world_size()
    if count > 1:
        raise ConfigError(f"this stage runs in one process, and a launcher started {count}: start it without one")
    with exclusive(config.output_dir), StopSignal().listening() as stop:
        _require_nothing_of_the_other_kind(config)
        root = config.output_dir / CHECKPOINTS
        run = Run(config, stop, _checkpoint_to_resume(config, root))
        try:
            yield run
        except (NotWritten, StopRequested, RuntimeError) as error:
            existing = checkpoints.list_checkpoints(root)
            if not isinstance(error, RuntimeError) or is_out_of_memory(error):
                newest = f"the newest whole checkpoint is {existing[-1].directory}" if existing else "no checkpoint yet"
                error.add_note(f"{newest}; go on with --resume auto" if existing else newest)
            raise


def _require_nothing_of_the_other_kind(config: SFTConfig | RewardModelConfig) -> None:
    saves_adapters = isinstance(config, SFTConfig) and config.saves_adapters
    other = "config.json" if saves_adapters else "adapter_config.json"
    if (config.output_dir / other).exists():
        whole = "a whole model, which would be loaded in place of" if saves_adapters else "adapters, which go on"
        raise ConfigError(
            f"output_dir={config.output_dir} holds {whole} what this run saves: give another --output-dir"
        )


def _checkpoint_to_resume(config: SFTConfig | RewardModelConfig, root: Path) -> checkpoints.Checkpoint | None:
    return checkpoints.checkpoint_to_resume(
        root,
        config.output_dir,
        config.resume,
        config,
        holds="an unfinished run",
        defaults=type(config)(),
        free=FREE_TO_CHANGE,
    )


def settled(run: Run, stage: Stage, model: PreTrainedModel, examples: int) -> Run:
    """The run with the open settings of its optimizer chosen (`settings.starting_points`). Prints what was chosen."""
    before = {} if run.resumed is None else run.resumed.config["optimizer"]
    parameters = model.num_parameters()
    adapters = run.config.lora.enabled
    optimizer, chosen = chosen_optimizer(
        run.config.optimizer, before, stage, parameters=parameters, adapters=adapters, examples=examples
    )
    if chosen:
        print(chosen, flush=True)
    return replace(run, config=replace(run.config, optimizer=optimizer))


def training_arguments(config: SFTConfig | RewardModelConfig) -> dict[str, Any]:
    """The TrainingArguments of transformers that both stages use."""
    optimizer: OptimizerSettings = config.optimizer
    return {
        "output_dir": str(config.output_dir / CHECKPOINTS),
        "per_device_train_batch_size": optimizer.batch_size,
        "num_train_epochs": optimizer.epochs,
        "max_steps": optimizer.max_steps or -1,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(optimizer.schedule, optimizer.schedule),
        "warmup_steps": optimizer.warmup_fraction,
        "max_grad_norm": optimizer.max_grad_norm,
        "logging_steps": 50,
        # It would replace a non-finite loss by the average of earlier ones.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "report_to": "none",
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "seed": config.seed,
    }


def train(trainer: Trainer, run: Run, inputs: Mapping[str, str], collator: "Drawing | None" = None) -> PreTrainedModel:
    """Train, from the checkpoint if there is one, and return the model. `trainer` comes from `resumable`.

    Raises:
        StopRequested: after a signal; a checkpoint of the last step is saved.
        NotFinite: a gradient is not finite. No weight has changed.
        ConfigError: the data have changed since the checkpoint.
    """
    if run.resumed is not None:
        checkpoints.check_same_inputs(run.resumed, inputs)
    run.stop.check()
    trainer.keeper = _Keeper(run, inputs, collator)
    trainer.add_callback(_Watch(run.stop, trainer))
    directory = None if run.resumed is None else str(run.resumed.directory)
    if run.resumed is not None:
        trainer.keeper.restore(run.resumed)
    if run.resumed is not None and run.resumed.inputs.get("steps") == str(run.resumed.step):
        trainer._load_from_checkpoint(directory)  # all steps were done
    else:
        try:
            trainer.train(resume_from_checkpoint=directory)
        except RuntimeError as error:
            if is_out_of_memory(error):
                trainer.keeper.save(trainer, after_failure=True)
            raise
    run.stop.check()
    return trainer.accelerator.unwrap_model(trainer.model).eval()


class Drawing:
    """A source of random numbers for every batch, whose state is part of a checkpoint.

    Batches are prepared before the steps that use them, so the last few states are kept.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._batches = 0
        self._states: dict[int, RandomState] = {}

    def next_batch(self) -> None:
        """Call this before drawing numbers for a batch."""
        self._states[self._batches] = self.random.getstate()
        self._states.pop(self._batches - 8, None)
        self._batches += 1

    def state_after(self, batches: int) -> RandomState:
        """The state before batch number `batches`, counted from 0."""
        return self._states.get(batches, self.random.getstate())

    def restore(self, batches: int, state: RandomState) -> None:
        """Continue from batch number `batches`, counted from 0, with the generator state that `state_after` gave."""
        self._batches = batches
        version, numbers, gauss = state
        self.random.setstate((version, tuple(numbers), gauss))


class _SameOrder(Sampler[int]):
    """A sampler that uses torch's global generator and can reproduce the order of an epoch."""

    def __init__(self, inner: LengthGroupedSampler) -> None:
        self.inner = inner
        self.drawn_from: torch.Tensor | None = None
        self.draw_from: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        if self.draw_from is not None:
            torch.set_rng_state(self.draw_from)
            self.draw_from = None
        self.drawn_from = torch.get_rng_state()
        return iter(self.inner)


class _Keeper:
    """Writes checkpoints in transformers' layout with a manifest, and restores the states that transformers doesn't."""

    def __init__(self, run: Run, inputs: Mapping[str, str], collator: Drawing | None) -> None:
        self._run, self._inputs, self._collator = run, inputs, collator
        self.sampler: _SameOrder | None = None
        self._order: torch.Tensor | None = None
        self.random_states: dict[str, Any] = {}
        """The states at the beginning of the current step."""

    def save(self, trainer: Trainer, *, after_failure: bool = False) -> None:
        """A checkpoint of the last complete step."""
        step, config = trainer.state.global_step, self._run.config
        # What a step needs and what it had drawn before it failed.
        states = self.random_states if after_failure else _random_states()
        mid_epoch = trainer.state.epoch is not None and trainer.state.epoch % 1 != 0

        def fill(beside: Path) -> None:
            trainer.args.output_dir = str(beside)
            trainer.rng_states = states
            Trainer._save_checkpoint(trainer, trainer.model, None)
            within = beside / f"checkpoint-{step}"
            for file in within.iterdir():
                file.rename(beside / file.name)
            within.rmdir()
            order = {
                "sampler": self.sampler.drawn_from if self.sampler is not None and mid_epoch else None,
                "collator": None if self._collator is None else self._collator.state_after(step),
            }
            _save(order, beside / ORDER)

        manifest = {
            "format": checkpoints.FORMAT,
            "step": step,
            "config": to_dict(config),
            "reward_revision": None,
            "inputs": {**self._inputs, "steps": str(trainer.state.max_steps)},
        }
        final = self._run.checkpoints / f"step-{step:06d}"
        try:
            checkpoints.write_checkpoint(final, manifest, fill, keep=1)
        except NotWritten as error:
            if step < trainer.state.max_steps or after_failure:
                raise
            print(f"{error}; the model itself is written next", flush=True)

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """The generator states of batches after the checkpoint."""
        order = torch.load(checkpoint.directory / ORDER, weights_only=True)
        self._order = order["sampler"]
        if self._collator is not None and order["collator"] is not None:
            self._collator.restore(checkpoint.step, order["collator"])

    def watched(self, sampler: Sampler[int]) -> Sampler[int]:
        """The sampler, with its order kept for checkpoints."""
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler  # of others, accelerate draws the order from seed and epoch alone
        self.sampler = _SameOrder(sampler)
        self.sampler.draw_from = self._order
        return self.sampler


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Checks every step for a stop signal and a non-finite gradient."""

    def __init__(self, stop: StopSignal, trainer: Trainer) -> None:
        self._stop, self._trainer = stop, trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.keeper.random_states = _random_states()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        if not bool(get_total_norm(gradients).isfinite()):
            raise NotFinite(
                f"the gradient of step {state.global_step} is not finite, and no weight has seen it: lower "
                "--optimizer.learning-rate, or look at the texts"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._stop.asked:
            control.should_save = control.should_training_stop = True


@dataclass(frozen=True)
class BatchShape:
    """The structure of a batch: its number of examples, and how to take a part of it."""

    size: Callable[[Mapping[str, Any]], int]
    part: Callable[[Mapping[str, Any], int, int], dict[str, Any]]


ROWS = BatchShape(
    size=lambda inputs: len(next(iter(inputs.values()))),
    part=lambda inputs, start, stop: {
        name: values[start:stop] for name, values in inputs.items() if isinstance(values, torch.Tensor)
    },
)
"""An example is row i of every tensor."""


def resumable(trainer_type: type[Trainer], shape: BatchShape = ROWS) -> Any:
    """The trainer class extended by our checkpoints and by halving batches that don't fit into memory."""

    class Resumable(trainer_type):  # type: ignore[misc]
        keeper: _Keeper
        rng_states: dict[str, Any]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._batch_size_finder = BatchSizeFinder(self.args.per_device_train_batch_size)
            self._share = 1.0

        def _get_train_sampler(self, *args: Any) -> Any:
            return self.keeper.watched(super()._get_train_sampler(*args))

        def _save_checkpoint(self, model: PreTrainedModel, trial: object) -> None:
            self.keeper.save(self)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            _save(self.optimizer.state_dict(), Path(output_dir, "optimizer.pt"))
            _save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

        def _save_rng_state(self, output_dir: str) -> None:
            _save(self.rng_states, Path(output_dir, "rng_state.pth"))

        def training_step(
            self, model: PreTrainedModel, inputs: Mapping[str, Any], num_items_in_batch: Any = None
        ) -> torch.Tensor:
            """One batch's gradient, accumulated over smaller parts if the batch does not fit into memory."""
            examples = shape.size(inputs)

            def in_parts(size: int) -> torch.Tensor:
                if size >= examples:
                    self._share = 1.0
                    whole: torch.Tensor = super(Resumable, self).training_step(model, inputs, num_items_in_batch)
                    return whole
                model.zero_grad()
                losses: list[torch.Tensor] = []
                for start in range(0, examples, size):
                    part = shape.part(inputs, start, min(start + size, examples))
                    self._share = _items(part, shape) / _items(inputs, shape)
                    losses.append(super(Resumable, self).training_step(model, part, None))
                return torch.stack(losses).sum()

            try:
                return self._batch_size_finder.run(in_parts)
            finally:
                self._share = 1.0

        def compute_loss(self, model: PreTrainedModel, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            computed = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            if self._share == 1.0:
                return computed
            return (self._share * computed[0], computed[1]) if return_outputs else self._share * computed

    return Resumable


def _items(inputs: Mapping[str, Any], shape: BatchShape) -> int:
    """The divisor of a batch's mean loss: the number of predicted tokens, or of examples."""
    labels = inputs.get("labels")
    if labels is not None and labels.ndim == 2:
        return int((labels[:, 1:] != -100).sum())
    return shape.size(inputs)


def _random_states() -> dict[str, Any]:
    """In transformers' layout."""
    import numpy as np

    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _save(value: object, path: Path) -> None:
    # Through a Python file object, because torch's own writer drops the operating system's error.
    with path.open("wb") as file:
        torch.save(value, file)


@contextmanager
def saved_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    half_precision: bool,
    reproduces: Callable[[Path], None],
) -> Iterator[tuple[PreTrainedModel, Path]]:
    """Save a plain Hugging Face directory: config, safetensors, tokenizer, and files that the block adds.

    Yields the model in fp32 with the saved weights, and the directory for the stage's report. If the block succeeds,
    everything replaces the previous result in `directory` atomically.

    Before that, `reproduces` receives the new files, and raises unless they load and give the model's metrics.

    Raises:
        NotFinite: a weight is not finite, or overflows in float16.
        NotWritten: the disk is full, or can't be written to.
    """
    model = model.to(torch.float16 if half_precision else torch.float32)
    require_finite(model.named_parameters(), "the model")
    with replaced_model(directory) as beside:
        model.save_pretrained(beside, safe_serialization=True)
        if isinstance(model, peft.PeftModel):
            save_generation_settings(model, beside)
        tokenizer.save_pretrained(beside)
        model = model.float()
        reproduces(beside)
        yield model, beside


def require_same_figures(what: str, expected: torch.Tensor, got: torch.Tensor) -> None:
    """Raises `NotFinite` or `NotAsSaved` if a saved and reloaded model gives other results."""
    if not bool(expected.isfinite().all()):
        raise NotFinite(f"the model is not saved: {what} is not finite")
    worst = (expected - got).abs().max().item() if expected.shape == got.shape else float("inf")
    if not worst <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise NotAsSaved(f"the model is not saved: loaded again, it is off by {worst:.3g} in {what}")


def forget_checkpoints(run: Run) -> None:
    """Delete the checkpoints of a finished stage."""
    for checkpoint in checkpoints.list_checkpoints(run.checkpoints):
        atomic.remove_directory(checkpoint.directory, marker=checkpoints.MANIFEST)
    atomic.remove_directory(run.checkpoints)
