"""Before against after: both policies answer the same held-out prompts with the same random numbers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from plaudit import demo_models
from plaudit.data.sources import Prompts, load_sourced_prompts
from plaudit.errors import ConfigError
from plaudit.parallel.processes import device_named, settle_arithmetic
from plaudit.policy.generation import Draws, decode_responses, generate
from plaudit.policy.model import Policy, load_causal_lm, load_tokenizer
from plaudit.policy.samples import Samples
from plaudit.report.evaluation import Answers, Evaluation, compare
from plaudit.report.page import (
    Sample,
    pair_samples,
    render_report,
    samples_table,
    summary_table,
    verdict,
    write_samples,
)
from plaudit.rewards import RewardClient, RewardRejected
from plaudit.run.metrics import FILE_NAME, read_metrics
from plaudit.run.progress import WaitingLine
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.plain import to_dict
from plaudit.settings.policy import GenerationSettings
from plaudit.stages import by_people
from plaudit.stages.by_people import BothAnswers, PeopleResult
from plaudit.stages.ppo import CONFIG_FILE

EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "samples.csv"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class EvaluationResult:
    """The figures, and every prompt with both answers."""

    evaluation: Evaluation
    samples: list[Sample]


def run(config: EvaluateConfig) -> EvaluationResult | PeopleResult:
    """Judge by rewards, or by people where the settings name a ranking service."""
    settle_arithmetic()
    if config.by_people is None:
        return by_rewards(config)
    return by_people.run(config, lambda: both_answers(config))


def by_rewards(config: EvaluateConfig) -> EvaluationResult:
    """Answer, judge, compare; writes evaluation.json, samples.csv and report.html, and prints the tables."""
    policy, tokenizer = load_pair(config)
    prompts = held_out_prompts(config, tokenizer)
    draws = Draws.of(config.generation, len(prompts), seed=config.seed, step=0)
    console = Console()
    with WaitingLine() as waiting, RewardClient(config.reward, on_wait=waiting) as client:
        try:
            client.connect()
            before = _answer(policy, tokenizer, prompts, draws, config.generation, client, as_reference=True)
            after = _answer(policy, tokenizer, prompts, draws, config.generation, client, as_reference=False)
        except RewardRejected as error:
            error.leave_in(config.output_dir)
            raise
    result = EvaluationResult(compare(before, after), pair_samples(prompts.texts, before, after))
    _write(config, result)
    console.print(summary_table(result.evaluation))
    console.print(verdict(result.evaluation))
    console.print(samples_table(result.samples))
    console.print(f"report: {config.output_dir / REPORT_FILE}", markup=False, soft_wrap=True)
    return result


def load_pair(config: EvaluateConfig) -> tuple[Policy, Any]:
    """The policy after PPO, whose reference is the policy before, and their tokenizer."""
    import peft

    after = Path(demo_models.resolve(config.after))
    adapters = (after / "adapter_config.json").is_file()
    if not adapters and not (after / "config.json").is_file():
        raise ConfigError(f"after={config.after!r} holds neither adapters nor a model: name what `plaudit ppo` wrote")
    before = config.policy or (
        peft.PeftConfig.from_pretrained(str(after)).base_model_name_or_path if adapters else None
    )
    if before is None:
        raise ConfigError(f"after={config.after!r} doesn't say what it was trained from: pass --policy")
    device = device_named(config.device)
    if adapters:
        policy = Policy(peft.PeftModel.from_pretrained(load_causal_lm(before, device=device), str(after)))
    else:
        policy = Policy(load_causal_lm(after, device=device), reference=load_causal_lm(before, device=device))
    return policy.eval(), load_tokenizer(before)


def held_out_prompts(config: EvaluateConfig, tokenizer: Any) -> Prompts:
    """As many as were asked for. Raises `ConfigError` if there are fewer."""
    return held_out_sources(config, tokenizer)[0]


def held_out_sources(config: EvaluateConfig, tokenizer: Any) -> tuple[Prompts, list[str]]:
    """`held_out_prompts`, and the text that each is the opening of."""
    prompts, sources = load_sourced_prompts(
        config.dataset, config.prompts, tokenizer, "held_out", seed=config.seed, limit=config.n_prompts
    )
    if len(prompts) < config.n_prompts:
        raise ConfigError(
            f"n_prompts={config.n_prompts} but data={config.dataset.data!r} has {len(prompts)} held-out prompts; "
            "ask for fewer, or use a larger source"
        )
    return prompts, sources


def both_answers(config: EvaluateConfig) -> list[BothAnswers]:
    """Each held-out prompt with both policies' answers to it, from the same random numbers."""
    policy, tokenizer = load_pair(config)
    prompts, sources = held_out_sources(config, tokenizer)
    draws = Draws.of(config.generation, len(prompts), seed=config.seed, step=0)

    def texts(model: Any) -> list[str]:
        size = config.generation.batch_size
        listed: list[str] = []
        for start in range(0, len(prompts), size):
            rows = slice(start, min(start + size, len(prompts)))
            queries, chunk = prompts.token_ids[rows], draws.rows(rows.start, rows.stop)
            listed += decode_responses(tokenizer, generate(model, queries, chunk, config.generation, tokenizer))
        return listed

    with policy.as_reference() as model:
        before = texts(model)
    after = texts(policy.language_model)
    return [BothAnswers(*row) for row in zip(prompts.texts, sources, before, after, strict=True)]


@torch.no_grad()
def _answer(
    policy: Policy,
    tokenizer: Any,
    prompts: Prompts,
    draws: Draws,
    settings: GenerationSettings,
    client: RewardClient,
    *,
    as_reference: bool,
) -> Answers:
    """Answers of the policy, or of its reference. A chunk is judged while the next one is generated."""
    texts: list[str] = []
    pending, scored = [], []
    for start in range(0, len(prompts), settings.batch_size):
        rows = slice(start, min(start + settings.batch_size, len(prompts)))
        queries, chunk_draws = prompts.token_ids[rows], draws.rows(rows.start, rows.stop)
        if as_reference:
            with policy.as_reference() as model:
                samples = generate(model, queries, chunk_draws, settings, tokenizer)
        else:
            samples = generate(policy.language_model, queries, chunk_draws, settings, tokenizer)
        responses = decode_responses(tokenizer, samples)
        pending.append(client.submit(prompts.texts[rows], responses))
        texts += responses
        scored.append(_logprobs(policy, samples, settings, as_reference=as_reference))
    own, reference, plain, counts = (torch.cat(parts).tolist() for parts in zip(*scored, strict=True))
    return Answers(
        texts=tuple(texts),
        rewards=tuple(reward for future in pending for reward in future.result()),
        logprobs=tuple(own),
        reference_logprobs=tuple(reference),
        plain_reference_logprobs=tuple(plain),
        token_counts=tuple(counts),
    )


def _logprobs(
    policy: Policy, samples: Samples, settings: GenerationSettings, *, as_reference: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed log-probabilities, each [B]: of the writer, of the reference, of the plain reference; and token counts."""
    plain = policy.reference_logprobs(samples).sum(1)
    if as_reference:
        # The reference against itself: both terms of its KL are whatever they are, and cancel.
        return plain, plain, plain, samples.response_lengths
    if settings.temperature == 1 and settings.top_k == 0 and settings.top_p == 1:
        return policy(samples).logprobs.sum(1), plain, plain, samples.response_lengths
    temperature = settings.temperature
    support = policy.support(samples, temperature=temperature, top_k=settings.top_k, top_p=settings.top_p)
    return (
        policy(samples, temperature=temperature, support=support).logprobs.sum(1),
        policy.reference_logprobs(samples, temperature=temperature, support=support).sum(1),
        plain,
        samples.response_lengths,
    )


def _write(config: EvaluateConfig, result: EvaluationResult) -> None:
    directory, after = config.output_dir, Path(config.after)
    directory.mkdir(parents=True, exist_ok=True)
    write_samples(directory / SAMPLES_FILE, result.samples)
    settings = {"evaluate": to_dict(config)}
    if (after / CONFIG_FILE).is_file():
        settings = {"ppo": json.loads((after / CONFIG_FILE).read_text(encoding="utf-8")), **settings}
    report = render_report(
        title=f"{config.after}: before and after PPO",
        evaluation=result.evaluation,
        samples=result.samples,
        training=read_metrics(after / FILE_NAME) if (after / FILE_NAME).is_file() else (),
        settings=settings,
    )
    (directory / REPORT_FILE).write_text(report, encoding="utf-8")
    # Last: whoever finds the figures finds the rest.
    (directory / EVALUATION_FILE).write_text(json.dumps(result.evaluation.to_dict(), indent=2) + "\n", encoding="utf-8")
