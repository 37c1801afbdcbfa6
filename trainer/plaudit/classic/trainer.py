"""`PPOTrainer` of TRL 0.11: generate, step and log in a program's own loop, over Plaudit's one step.

`step` is `PPOStepper`'s: this module turns its arguments and results into the classic ones, and computes nothing that a
weight depends on. Failure modes: a setting that does not reach the step, a weight that the program's optimizer holds
and the step does not train, or a learning rate that two parties set.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import Tensor

from plaudit.classic.batches import checked_scores
from plaudit.classic.config import PPOConfig
from plaudit.classic.controllers import AdaptiveKLController, FixedKLController
from plaudit.classic.core import convert_to_scalar, set_seed, stats_to_np
from plaudit.classic.hub import BestUploads, upload, upload_best
from plaudit.classic.logs import Clock, log_table, model_card, start_trackers
from plaudit.classic.models import PreTrainedModelWrapper, create_reference_model, policy_of
from plaudit.classic.rates import rates_left_alone
from plaudit.classic.removed import HOOKS, refuse_overrides
from plaudit.classic.sampling import KEPT_BATCHES, PLAIN, Drawn, respond, settings_of
from plaudit.classic.set_up import checked_arguments, data_loader, give_pad_token
from plaudit.classic.state import restore_trainer, trainer_state
from plaudit.classic.statistics import classic_statistics
from plaudit.errors import ConfigError
from plaudit.learner.step_statistics import std_or_zero
from plaudit.learner.stepper import PPOStepper
from plaudit.parallel.processes import Processes
from plaudit.policy.samples import EvaluatedSamples, Rollout, Samples
from plaudit.run.runtime import exclusive
from plaudit.run.storage import replaced_model, write_text
from plaudit.settings.policy import GenerationSettings

REPLICATED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
NEGATIVE_KL = -1.0
"""A mean KL below this says that responses were not drawn as the step believes."""


class PPOTrainer:
    """The classic trainer: `generate` responses, `step` on their scores, `log_stats`. The program owns the loop."""

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        ref_model: PreTrainedModelWrapper | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        training_data_collator: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """Moves the model to its device and freezes the reference.

        Without `ref_model`, the reference is the model with its adapters off, or else a frozen copy of it, which shares
        the first `num_shared_layers` layers. `optimizer` and `lr_scheduler` take the place of Adam at a constant rate;
        the scheduler moves once a step. Dropout is switched off in model and reference for good.

        Raises:
            ConfigError: an argument is missing or of another kind, a setting cannot work, or accelerate's
                configuration asks for sharded weights.
        """
        config, model = checked_arguments(config, model, ref_model, tokenizer)
        if training_data_collator is not None:
            warnings.warn("training_data_collator has no effect: the step pads and packs token lists", stacklevel=2)
        set_seed(config.seed)
        self.config = config
        self.accelerator = Accelerator(
            log_with=config.log_with,
            project_config=ProjectConfiguration(**config.project_kwargs),
            **config.accelerator_kwargs,
        )
        if self.accelerator.distributed_type not in REPLICATED:
            raise ConfigError(
                f"accelerate's configuration asks for {self.accelerator.distributed_type.value}: here every process "
                "has a replica of the weights; `plaudit ppo` shards them"
            )
        self._processes = Processes(self.accelerator.process_index, self.accelerator.num_processes)
        self.is_distributed = self._processes.count > 1
        self.is_encoder_decoder, self.is_peft_model = False, model.is_peft_model
        self._tell(config)

        self.current_device = self._placed(model)
        self.model = model
        self.ref_model = self._reference(ref_model, num_shared_layers)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        policy = policy_of(model, reference=None if self.ref_model is None else self.ref_model.pretrained_model)
        self._processes.broadcast(policy.parameters())
        if not any(p.requires_grad for p in model.pretrained_model.parameters()):
            warnings.warn(
                "no weight of the language model learns, only the value head: load adapters with is_trainable=True",
                stacklevel=2,
            )
        self.stepper = PPOStepper(
            policy,
            None,
            config.hyperparameters(self._processes.count),
            seed=config.seed,
            processes=self._processes,
            graphs=optimizer is None,
        )
        if optimizer is not None:
            self.stepper.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.kl_ctl: Any = FixedKLController(config.init_kl_coef)
        if config.adap_kl_ctrl:
            self.kl_ctl = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)

        self.tokenizer = tokenizer
        give_pad_token(tokenizer)
        self.dataset = dataset
        self.dataloader: Any = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self._drawn = Drawn(KEPT_BATCHES * config.batch_size)
        self._best = BestUploads(config)
        self.current_step = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises `TypeError` for an override that a step would not call."""
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls)

    def __getattr__(self, name: str) -> Any:
        if name in HOOKS:
            raise AttributeError(f"PPOTrainer has no {name}: {HOOKS[name]}")
        raise AttributeError(f"PPOTrainer has no attribute {name!r}")

    # Set-up

    def _tell(self, config: PPOConfig) -> None:
        """What the configuration learns from the processes and the model, and trackers from the configuration."""
        config.world_size = self._processes.count
        config.global_batch_size = config.batch_size * config.world_size
        config.global_backward_batch_size = (config.backward_batch_size or 0) * config.world_size
        config.is_encoder_decoder, config.is_peft_model = self.is_encoder_decoder, self.is_peft_model
        start_trackers(self.accelerator, config)

    def _placed(self, model: PreTrainedModelWrapper) -> torch.device:
        """Moves the model to this process's device, unless it was loaded onto one of its own; returns which it is."""
        bare = model.pretrained_model
        if getattr(bare, "hf_device_map", None) is None:
            model.to(self.accelerator.device)
        device: torch.device = bare.device
        model.v_head.to(device)
        return device

    def _reference(
        self, ref_model: PreTrainedModelWrapper | None, num_shared_layers: int | None
    ) -> PreTrainedModelWrapper | None:
        if ref_model is not None:
            if num_shared_layers is not None:
                warnings.warn("num_shared_layers is left out: ref_model is a model of its own", stacklevel=3)
            self._placed(ref_model)
            return ref_model
        if self.is_peft_model:
            return None
        reference: PreTrainedModelWrapper = create_reference_model(self.model, num_shared_layers)
        return reference

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[[list[Any]], Any] | None = None) -> Any:
        """Batches of `batch_size` in random order, each process its own; the last one is left out if it is short."""
        loader = data_loader(dataset, self.config, data_collator)
        return self.accelerator.prepare(loader)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over everything that learns, or the program's own."""
        return self.stepper.optimizer

    @property
    def running(self) -> Any:
        """Count, mean and variance of all scores so far, if `use_score_scaling`."""
        return self.stepper.moments

    # Responses

    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Responses to one query [Q], as [1, L], or to a list of queries, as a list of [L_i].

        A list is one batch, whatever `batch_size` says. `length_sampler` draws a length for each response. With
        `return_prompt`, each begins with its query. `generate_ref_response` returns a pair: the policy's responses and
        the reference's.

        Raises:
            ValueError: `query_tensor` has two dimensions, or several responses to one query are asked for.
        """
        if generation_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError(
                f"num_return_sequences={generation_kwargs['num_return_sequences']}: give a list with the query as often"
            )
        if isinstance(query_tensor, Tensor) and query_tensor.ndim != 1:
            raise ValueError(
                f"query_tensor has the shape {tuple(query_tensor.shape)}: give one query (query.squeeze(0)) or a list"
            )
        alone = isinstance(query_tensor, Tensor)
        given = [query_tensor] if isinstance(query_tensor, Tensor) else query_tensor
        queries = [query.to(self.current_device) for query in given]
        lengths = None if length_sampler is None else [int(length_sampler()) for _ in queries]
        own = self._respond(queries, lengths, generation_kwargs, cut_at_end=not alone)
        results = [self._shaped(queries, own, alone=alone, return_prompt=return_prompt)]
        if generate_ref_response:
            other = self._respond(queries, lengths, generation_kwargs, cut_at_end=not alone, by_reference=True)
            results.append(self._shaped(queries, other, alone=alone, return_prompt=return_prompt))
        return tuple(results) if generate_ref_response else results[0]

    def _respond(
        self,
        queries: Sequence[Tensor],
        lengths: Sequence[int] | None,
        arguments: Mapping[str, Any],
        *,
        cut_at_end: bool,
        by_reference: bool = False,
    ) -> list[Tensor]:
        policy = self.stepper.policy
        policy.eval()
        with policy.generating():
            if by_reference:
                with policy.as_reference() as reference:
                    bare = reference.get_base_model() if hasattr(reference, "get_base_model") else reference
                    return respond(bare, self.tokenizer, queries, lengths, arguments, cut_at_end=cut_at_end)
            model = policy.language_model
            responses = respond(model, self.tokenizer, queries, lengths, arguments, cut_at_end=cut_at_end)
        settings = settings_of(model, arguments)
        if settings is not None:
            for query, response in zip(queries, responses, strict=True):
                self._drawn.remember(query, response, settings)
        return responses

    @staticmethod
    def _shaped(queries: Sequence[Tensor], responses: Sequence[Tensor], *, alone: bool, return_prompt: bool) -> Any:
        if return_prompt:
            responses = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
        return responses[0].unsqueeze(0) if alone else list(responses)

    # The step

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor],
        response_masks: Sequence[Tensor] | None = None,
        *,
        minibatch_permutations: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on `batch_size` queries, responses [T_i] and scores; returns its statistics.

        Tokens whose `response_masks` [T_i] are 0 stay in the context, and no loss, reward or KL counts them.
        `minibatch_permutations` gives each epoch's order of samples; without it they are drawn from the seed.

        Raises:
            ValueError: a list has another length than `batch_size`, or something in it is empty or not finite.
            NonFiniteUpdate: a loss or gradient is not finite; no weight has seen it.
        """
        began = time.perf_counter()
        clock = Clock(began)
        rollout = self._rollout(queries, responses, scores, response_masks)
        times = {"forward_pass": clock.lap()}
        self.stepper.kl_coef = self.kl_ctl.value
        experience = self.stepper.make_experience(rollout)
        # Rewards and advantages are computed in one go.
        times |= {"compute_rewards": clock.lap(), "compute_advantages": 0.0}
        with rates_left_alone(self.optimizer):
            result = self.stepper.learn(experience, minibatch_permutations)
        times["optimize_step"] = clock.lap()
        side = self.tokenizer.padding_side
        statistics = stats_to_np(classic_statistics(result, rollout.samples, padding_side=side))
        if statistics["objective/kl"] < NEGATIVE_KL:
            warnings.warn(
                f"KL is {statistics['objective/kl']:.2f}: the responses did not come from this policy as step() "
                "believes; generate them with PPOTrainer.generate, and don't change them",
                stacklevel=2,
            )
        times |= {"calc_stats": clock.lap(), "total": time.perf_counter() - began}
        self.kl_ctl.update(statistics["objective/kl"], self.stepper.config.batch_size)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self._best.is_beaten_by(float(result.scores.mean())) and self.accelerator.is_main_process:
            upload_best(lambda: self.push_to_hub(**self.config.push_to_hub_if_best_kwargs))
        statistics |= {f"time/ppo/{name}": seconds for name, seconds in times.items()}
        return statistics if self.config.log_with == "wandb" else convert_to_scalar(statistics)

    def _rollout(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor],
        response_masks: Sequence[Tensor] | None,
    ) -> Rollout:
        """What all processes' samples were, under the policy as it is now."""
        numbers = checked_scores(queries, responses, scores, response_masks, batch_size=self.config.batch_size)
        drawn, settings = self._drawn.match(queries, responses)
        self._drawn.forget()
        samples = Samples.from_lists(queries, drawn, self.tokenizer.pad_token_id, self.current_device)
        if response_masks is not None:
            pairs = zip(response_masks, drawn, strict=True)
            samples = samples.counting([mask[len(mask) - len(response) :] for mask, response in pairs])
        self.stepper.draw_from(self._agreed(settings))
        own = self.stepper.evaluate(samples)
        if not self.is_distributed:
            return own.with_scores(numbers.to(self.current_device))
        parts = self._processes.on_all(lambda: (own.to("cpu"), numbers))
        whole = EvaluatedSamples.concatenate([part for part, _ in parts])
        return whole.with_scores(torch.cat([part for _, part in parts])).to(self.current_device)

    def _agreed(self, settings: GenerationSettings) -> GenerationSettings:
        """How the responses of all processes were drawn."""
        found = set(self._processes.on_all(lambda: settings))
        return found.pop() if len(found) == 1 else PLAIN

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's weights and the batch that the next `generate` and `step` depend on."""
        return trainer_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`, once the model has the weights of that moment."""
        restore_trainer(self, state)

    # Logs and files

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Sends a step's statistics, its rewards and, with wandb, a table of `columns_to_log` to the tracker.

        Raises:
            ValueError: with wandb, `batch` lacks one of the columns.
        """
        numbers = torch.stack([torch.as_tensor(reward, dtype=torch.float32).reshape(()) for reward in rewards])
        numbers = self.accelerator.gather(numbers.to(self.accelerator.device)).flatten().cpu()
        self.current_step += 1
        if self.config.log_with == "wandb":
            log_table(self.accelerator, self._processes, batch, numbers, tuple(columns_to_log), step=self.current_step)
        logs = {
            **stats,
            "env/reward_mean": numbers.mean().item(),
            "env/reward_std": std_or_zero(numbers),
            "env/reward_dist": numbers.numpy(),
        }
        self.accelerator.log(logs, step=self.current_step)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The model with its value head, the tokenizer and a model card, together. Raises `NotWritten`."""
        directory = Path(save_directory)
        with exclusive(directory), replaced_model(directory) as beside:
            self._write(beside, **kwargs)

    def _write(self, directory: Path, **kwargs: Any) -> None:
        self.model.write(directory, **kwargs)
        self.tokenizer.save_pretrained(str(directory))
        self.create_model_card(directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads what `save_pretrained` writes; `kwargs` are `private`, `token` and `commit_message`."""
        return upload(repo_id, self._write, **kwargs)

    def create_model_card(self, path: str | Path, model_name: str | None = None) -> None:
        """Writes `README.md` into the directory. Needs no account and no network."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        steps, samples = self.stepper.steps_done, self.stepper.config.batch_size
        card = model_card(self.config, model_name, steps=steps, samples=samples, adapters=self.is_peft_model)
        write_text(directory / "README.md", card)

    def compute_reward_model_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The reward adapter's scores at every token (`PreTrainedModelWrapper.compute_reward_score`)."""
        return self.model.compute_reward_score(input_ids, attention_mask, **kwargs)
