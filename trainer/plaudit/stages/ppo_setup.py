"""Set-up of stage 3 before its first step, and resuming from a checkpoint.

Failure modes: a mistake in the settings, or a policy that can't be trained, is found only after the first step; a run
overwrites another one.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from plaudit.data.prompts import Prompts, PromptSchedule, load_prompts
from plaudit.errors import ConfigError
from plaudit.learner.memory import keep_freed_memory
from plaudit.learner.rollout import RolloutCollector, sampler
from plaudit.learner.stepper import PPOStepper
from plaudit.parallel.devices import settle_arithmetic
from plaudit.parallel.launch import process_group
from plaudit.parallel.processes import Processes
from plaudit.policy.adapters import is_adapters
from plaudit.policy.checks import check_policy, check_prompts, check_room, check_tokenizer_fits, room_for_prompts
from plaudit.policy.loading import load_policy
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.policy.reading import reading
from plaudit.policy.tokenizer import Tokenizer
from plaudit.policy.transformer import bare
from plaudit.policy.value_model import require_same_vocabulary
from plaudit.report.held_out import HeldOut, open_held_out
from plaudit.rewards import RewardClient, RewardRejected
from plaudit.run import checkpoint as checkpoints
from plaudit.run.evaluations import BEST, forget_evaluations_after
from plaudit.run.metrics import FILE_NAME, forget_steps_after
from plaudit.run.progress import StepProgress, WaitingLine
from plaudit.run.rollouts import forget_rollouts_after
from plaudit.run.runtime import StopSignal, exclusive
from plaudit.run.step_log import StepLog
from plaudit.run.storage import NotWritten, write_text
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.starting_points import chosen_ppo, ppo_steps
from plaudit.stages.ppo_results import CONFIG_FILE, require_same_kind

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Training:
    """A run of stage 3, ready for its next step. Policy and processes are attributes of the stepper."""

    config: PPOConfig
    total_steps: int
    stepper: PPOStepper
    rollouts: RolloutCollector
    client: RewardClient
    log: StepLog
    stop: StopSignal
    inputs: Mapping[str, str]
    """Fingerprints of the run's inputs, for its checkpoints."""
    held_out: HeldOut | None = None
    """Evaluation while training, if it is on."""

    def save_checkpoint(self) -> checkpoints.Checkpoint:
        """Save the state after the last complete step. All processes call this. Raises `NotWritten`."""
        return checkpoints.save_checkpoint(
            self.config.output_dir / CHECKPOINTS,
            self.stepper.policy,
            self.stepper,
            config=to_dict(self.config),
            reward_revision=self.client.revision,
            keep=self.config.keep_checkpoints,
            inputs=self.inputs,
        )


@contextmanager
def set_up(config: PPOConfig) -> Iterator[Training]:
    """Check the settings, load the model, connect to the rewards, and resume if requested. The run is open in the
    block.

    Raises:
        ConfigError: settings, model, tokenizer, prompts and checkpoint don't match.
        RewardUnavailable, RewardRejected: the reward service does not answer, or its answer can't be used.
        NotWritten: a file can't be written; with a note on the newest checkpoint.
        ProcessLost: another process of the run has died.
    """
    if not config.reward.says_whom_to_ask:
        raise ConfigError(
            "reward.url is missing: start a service with `plaudit-reward --model DIR` and pass --reward.url"
        )
    torch.manual_seed(config.seed)
    keep_freed_memory()
    settle_arithmetic(tf32=config.model.tf32)
    with (
        _naming_the_newest_checkpoint(config.output_dir / CHECKPOINTS),
        process_group(config) as (processes, device),
        ExitStack() as held,
        StopSignal().listening() as stop,
    ):
        resumed = processes.on_main(hold_directory, config, held)
        config = _with_texts_of(config, resumed)
        with reading(config.policy):
            tokenizer = load_tokenizer(config.policy)
            policy = load_policy(
                config.policy, config.lora, config.model, device=device, value_head=not config.ppo.critic_free
            )
        check_value_model(policy, config, tokenizer)
        cached = check_policy(policy, config.policy)
        prompts = _load_prompts(config, tokenizer, policy)
        inputs = _fingerprints(prompts, policy)
        if resumed is not None:
            checkpoints.check_same_inputs(resumed, inputs)
        hyperparameters, chosen = chosen_ppo(
            config.ppo,
            {} if resumed is None else resumed.config["ppo"],
            parameters=policy.language_model.num_parameters(),
            adapters=is_adapters(config.policy) or config.lora.enabled,
            prompts=len(prompts),
        )
        config = replace(config, ppo=hyperparameters)
        _distribute_weights(policy, processes)
        schedule = PromptSchedule(
            prompts,
            hyperparameters.batch_size,
            seed=config.seed,
            responses_per_prompt=hyperparameters.responses_per_prompt,
        )
        total_steps = config.steps if config.steps is not None else ppo_steps(schedule.steps_per_epoch)
        stepper = PPOStepper(
            policy,
            None,
            hyperparameters,
            generation=config.generation,
            total_steps=total_steps,
            seed=config.seed,
            processes=processes,
            graphs=config.model.cuda_graphs,
        )
        if resumed is not None:
            checkpoints.restore(resumed, policy, stepper)
        progress = StepProgress(total_steps, stepper.steps_done, held.enter_context(WaitingLine()))
        client = held.enter_context(RewardClient(config.reward, fields=config.prompts.fields, on_wait=progress.waiting))
        _connect(client, config, resumed, stop, processes)
        sample = sampler(policy, config.generation, tokenizer, cached=cached, processes=processes)
        generation = config.generation.answering(config.prompts.kind)
        rollouts = RolloutCollector(
            stepper, tokenizer, schedule, generation, client, sample, wait=stop.wait, seed=config.seed
        )
        held_out = open_held_out(config, rollouts, held, cached=cached, on_wait=progress.waiting, inputs=inputs)
        if resumed is not None and held_out is not None:
            checkpoints.check_same_inputs(resumed, inputs)
        processes.on_main(_prepare_directory, config, stepper.steps_done)
        log = held.enter_context(StepLog(config, processes, progress).opened(stepper.steps_done))
        if processes.is_main:
            if config.model.separate_value_model:
                print("model.separate_value_model is model.value_model=copy now: 0.3.0 removes the earlier name")
            print(f"{policy.trainable_parameters_line()}\n{policy.reference_line()}", flush=True)
            if chosen:
                print(chosen, flush=True)
            if not cached:
                print("sampling without a key-value cache, since this model keeps none: right, and slow")
        yield Training(config, total_steps, stepper, rollouts, client, log, stop, inputs, held_out)


@contextmanager
def _naming_the_newest_checkpoint(root: Path) -> Iterator[None]:
    """Add a note with the newest checkpoint to a `NotWritten` error."""
    try:
        yield
    except NotWritten as error:
        existing = checkpoints.list_checkpoints(root)
        whole = f"the newest whole checkpoint is {existing[-1].directory}" if existing else "there is no checkpoint yet"
        error.add_note(f"{whole}; then go on with --resume auto")
        raise


def hold_directory(config: PPOConfig, held: ExitStack) -> checkpoints.Checkpoint | None:
    """Lock the output directory; return the checkpoint to continue from."""
    held.enter_context(exclusive(config.output_dir))
    require_same_kind(config)
    if (config.output_dir / BEST).is_dir():
        with exclusive(config.output_dir / BEST):
            """Entering finishes a replacement that a kill interrupted."""
    root = config.output_dir / CHECKPOINTS
    return checkpoints.checkpoint_to_resume(root, config.output_dir, config.resume, config)


def _with_texts_of(config: PPOConfig, resumed: checkpoints.Checkpoint | None) -> PPOConfig:
    """The settings with the checkpoint's `prompts.min_text_chars` if they leave it open: its default has changed."""
    if resumed is None or config.prompts.min_text_chars is not None:
        return config
    shortest = resumed.config["prompts"].get("min_text_chars")
    return replace(config, prompts=replace(config.prompts, min_text_chars=shortest))


def check_value_model(policy: Policy, config: PPOConfig, tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` if a value model from elsewhere has another vocabulary than the policy."""
    source = config.model.value_source
    if source not in ("shared", "copy"):
        rows = policy.language_model.get_output_embeddings().weight.shape[0]
        require_same_vocabulary(source, policy.value_model, tokenizer, rows)


def _load_prompts(config: PPOConfig, tokenizer: Tokenizer, policy: Policy) -> Prompts:
    """The training prompts, checked against the policy's vocabulary and context length."""
    model = policy.language_model
    room = room_for_prompts(model, config.generation)
    prompts = load_prompts(config.dataset, config.prompts, tokenizer, "train", seed=config.seed, room=room)
    check_tokenizer_fits(tokenizer, model, config.policy, prompts.texts)
    check_prompts(tokenizer, model, prompts.token_ids, config.generation, config.policy)
    if policy.value_model is not None:
        longest, source = max(map(len, prompts.token_ids)), config.model.value_source
        check_room(bare(policy.value_model), longest, config.generation, source, setting="model.value_model")
    return prompts


def _fingerprints(prompts: Prompts, policy: Policy) -> dict[str, str]:
    return {
        "prompts": prompts.fingerprint(),
        "policy": checkpoints.frozen_weights_fingerprint(policy),
    }


def _distribute_weights(policy: Policy, processes: Processes) -> None:
    """Give all processes the same trainable weights, and shard them if requested."""
    processes.broadcast(parameter for parameter in policy.parameters() if parameter.requires_grad)
    processes.shard(policy)
    if processes.is_main and processes.is_sharded:
        print(processes.weights_line(policy))


def _connect(
    client: RewardClient,
    config: PPOConfig,
    resumed: checkpoints.Checkpoint | None,
    stop: StopSignal,
    processes: Processes,
) -> None:
    """Wait for the reward service; check that all processes and the checkpoint use the same reward model."""

    def revision() -> str:
        try:
            stop.wait(client.connecting())
        except RewardRejected as error:
            error.leave_in(config.output_dir)
            raise
        before = None if resumed is None else resumed.reward_revision
        if config.reward.allow_revision_change or before in (None, client.revision):
            return client.revision
        raise RewardRejected(
            f"the reward model has changed since the checkpoint: {before} then, {client.revision} now; serve the "
            "same model, or pass --reward.allow-revision-change if the change is meant"
        )

    revisions = sorted(set(processes.on_all(revision)))
    if len(revisions) > 1 and not config.reward.allow_revision_change:
        raise RewardRejected(f"the processes see different reward models: {', '.join(revisions)}")


def _prepare_directory(config: PPOConfig, steps_done: int) -> None:
    """Save the run's settings, and delete what it recorded of steps that it will repeat."""
    directory = config.output_dir
    write_text(directory / CONFIG_FILE, json.dumps(to_dict(config), indent=2) + "\n")
    forget_steps_after(directory / FILE_NAME, steps_done)
    forget_rollouts_after(directory, steps_done)
    for dropped in forget_evaluations_after(directory, steps_done) + checkpoints.forget_checkpoints_after(
        directory / CHECKPOINTS, steps_done
    ):
        print(f"dropped {dropped}: its steps are taken again")
