"""Compare a policy before and after training on the same held-out prompts, with the same random numbers."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from plaudit import demo_models
from plaudit.data.prompts import Prompts, load_sourced_prompts
from plaudit.data.sources import say_once
from plaudit.errors import ConfigError
from plaudit.parallel.devices import device_named, settle_arithmetic
from plaudit.policy.adapters import base_of, is_adapters, load_adapters
from plaudit.policy.checks import check_policy, check_prompts, check_tokenizer_fits, room_for_prompts
from plaudit.policy.endings import Endings
from plaudit.policy.generation import Draws, generate
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import ModelNotFound, load_causal_lm, load_tokenizer, load_whole_causal_lm
from plaudit.policy.reading import reading
from plaudit.policy.samples import Samples
from plaudit.policy.saving import VALUE_HEAD_FILE
from plaudit.policy.tokenizer import Tokenizer
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.report.evaluation import Answers, Evaluation, compare
from plaudit.report.page import (
    Sample,
    pair_samples,
    policies_table,
    render_report,
    samples_table,
    summary_table,
    verdict,
    write_samples,
)
from plaudit.report.policies import PolicyFigures, policy_figures
from plaudit.rewards import RewardClient, RewardRejected
from plaudit.run.metrics import FILE_NAME, read_metrics
from plaudit.run.progress import WaitingLine
from plaudit.run.runtime import exclusive
from plaudit.run.storage import replaced_files
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.plain import to_dict
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.watch import with_names
from plaudit.stages import by_people
from plaudit.stages.by_people import BothAnswers, PeopleResult
from plaudit.stages.ppo_results import CONFIG_FILE

EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "samples.csv"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class EvaluationResult:
    """The metrics, and every prompt with both answers."""

    evaluation: Evaluation
    samples: list[Sample]
    policies: tuple[PolicyFigures, ...] = ()
    """The policy before, the one after, and further ones, with all judges and intervals."""


def run(config: EvaluateConfig) -> EvaluationResult | PeopleResult:
    """Evaluate by rewards, or by people if the settings name a ranking service."""
    if config.by_people is None:
        return by_rewards(config)
    settle_arithmetic()
    # Tried before the first answer: figures that can't be written would be lost with all the work.
    with exclusive(config.output_dir):
        return by_people.run(config, lambda: both_answers(config))


def by_rewards(config: EvaluateConfig) -> EvaluationResult:
    """Generate, score and compare; write evaluation.json, samples.csv and report.html, and print the tables."""
    settle_arithmetic()
    console = Console()
    # Tried before the first answer: figures that can't be written would be lost with all the work.
    with exclusive(config.output_dir):
        policy, tokenizer = load_pair(config)
        prompts = held_out_prompts(config, policy, tokenizer)
        cached = _check_all(config, policy, tokenizer, prompts)
        with WaitingLine() as waiting, _clients(config, waiting) as (client, judges):
            try:
                client.connect()
                if judges is not None:
                    judges.connect()
                ask = functools.partial(answer, prompts=prompts, client=client, judges=judges, config=config)
                before = ask(policy, tokenizer, as_reference=True, cached=cached)
                answers = [ask(policy, tokenizer, as_reference=False, cached=cached)]
                for other in config.also:
                    this = dataclasses.replace(config, after=other, also=(), policy=_before(config))
                    policy, tokenizer = load_pair(this)
                    cached = _check_all(this, policy, tokenizer, prompts)
                    answers.append(ask(policy, tokenizer, as_reference=False, cached=cached))
            except RewardRejected as error:
                error.leave_in(config.output_dir)
                raise
        result = _result(config, prompts, before, answers)
        _write(config, result)
    console.print(f"before: {_before(config)}; after: {config.after}", markup=False, soft_wrap=True)
    console.print(summary_table(result.evaluation))
    console.print(policies_table(result.policies))
    console.print(verdict(result.evaluation))
    console.print(samples_table(result.samples))
    console.print(f"report: {config.output_dir / REPORT_FILE}", markup=False, soft_wrap=True)
    return result


def _result(config: EvaluateConfig, prompts: Prompts, before: Answers, answers: list[Answers]) -> EvaluationResult:
    """The figures of all policies. Raises `NotFinite`."""
    compared = [compare(before, own) for own in answers]
    policies = [policy_figures(_before(config), before, None)]
    policies += [
        policy_figures(name, own, before) for name, own in zip((config.after, *config.also), answers, strict=True)
    ]
    return EvaluationResult(compared[0], pair_samples(prompts.texts, before, answers[0]), tuple(policies))


def load_pair(config: EvaluateConfig) -> tuple[Policy, Tokenizer]:
    """The policy after PPO, with the policy before as its reference, and their tokenizer.

    Either may be a full model or adapters. If the adapters' base is the policy before, it is obtained by disabling the
    adapters. Otherwise two models are loaded.
    """
    before = _before(config)
    with reading(config.after), reading(before):
        return _load_pair(config.after, before, device_named(config.device))


def _load_pair(after: str, before: str, device: torch.device) -> tuple[Policy, Tokenizer]:
    if not is_adapters(after):
        policy = Policy(load_causal_lm(after, device=device), reference=load_whole_causal_lm(before, device=device))
        return policy.eval(), _tokenizer_of(before, after)
    base = base_of(after)
    if not _same(base, before):
        try:
            model = _with_adapters(load_causal_lm(base, device=device), after)
        except ModelNotFound as error:
            if is_adapters(before):
                raise
            print(
                f"the adapters of after={after!r} name a model that isn't here ({error}): they go on policy={before!r}"
            )
            base = before
        else:
            policy = Policy(model, reference=load_whole_causal_lm(before, device=device))
            return policy.eval(), _tokenizer_of(before, after)
    return Policy(_with_adapters(load_causal_lm(before, device=device), after)).eval(), load_tokenizer(before)


def _before(config: EvaluateConfig) -> str:
    """The policy to compare with: the one in the settings, or the one that the adapters were trained on."""
    if not is_adapters(config.after) and not (Path(demo_models.resolve(config.after)) / "config.json").is_file():
        raise ConfigError(f"after={config.after!r} holds neither adapters nor a model: name what `plaudit ppo` wrote")
    if config.policy is not None:
        return config.policy
    if not is_adapters(config.after):
        raise ConfigError(f"after={config.after!r} doesn't say what it was trained from: pass --policy")
    return _adapters_before(config.after) or base_of(config.after)


def _adapters_before(after: str) -> str | None:
    """The adapters of stage 1 that PPO continued to train, if any; the reference contains them merged."""
    file = Path(demo_models.resolve(after)) / CONFIG_FILE
    policy = json.loads(file.read_text(encoding="utf-8")).get("policy") if file.is_file() else None
    if not isinstance(policy, str) or not is_adapters(policy):
        return None
    return None if (Path(demo_models.resolve(policy)) / VALUE_HEAD_FILE).is_file() else policy


def _same(one: str, other: str) -> bool:
    """Whether two names refer to the same model."""
    paths = [Path(demo_models.resolve(name)) for name in (one, other)]
    return paths[0] == paths[1] or (paths[0].exists() and paths[1].exists() and paths[0].samefile(paths[1]))


def _with_adapters(model: PreTrainedModel, adapters: str) -> peft.PeftModel:
    try:
        return load_adapters(model, demo_models.resolve(adapters))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"after={adapters!r}: its adapters don't fit {model.name_or_path!r} ({' '.join(str(error).split()):.160}); "
            "pass the model that they were trained on as --policy"
        ) from error


def _tokenizer_of(before: str, after: str) -> Tokenizer:
    """The common tokenizer. Raises `ConfigError` if they differ, because token log-probabilities aren't comparable."""
    one, other = load_tokenizer(before), load_tokenizer(after, setting="after")
    if one.get_vocab() != other.get_vocab():
        raise ConfigError(
            f"policy={before!r} and after={after!r} have different tokenizers ({len(one)} and {len(other)} tokens): "
            "their answers can't be compared token by token; name two policies that were trained from one model"
        )
    return one


def _check(config: EvaluateConfig, policy: Policy, tokenizer: Tokenizer, prompts: Prompts) -> bool:
    """Check both policies. Returns whether both can sample with their cache."""
    check_tokenizer_fits(tokenizer, policy.language_model, config.after, prompts.texts, setting="after")
    cached = check_policy(policy, config.after)
    for reference in policy.transformers[1:]:
        check_tokenizer_fits(tokenizer, reference, _before(config), prompts.texts)
        cached = check_policy(Policy(reference), _before(config)) and cached
    return cached


def _check_all(config: EvaluateConfig, policy: Policy, tokenizer: Tokenizer, prompts: Prompts) -> bool:
    """`_check`, and check that every prompt and its answer fit into both policies."""
    cached = _check(config, policy, tokenizer, prompts)
    for model, source in ((policy.language_model, config.after), (policy.transformers[-1], _before(config))):
        check_prompts(tokenizer, model, prompts.token_ids, config.generation, source)
    return cached


def held_out_prompts(config: EvaluateConfig, policy: Policy, tokenizer: Tokenizer) -> Prompts:
    """`n_prompts` held-out prompts, or all if there are fewer, with a warning. Raises `ConfigError` if only one is
    left."""
    return held_out_sources(config, policy, tokenizer)[0]


def held_out_sources(config: EvaluateConfig, policy: Policy, tokenizer: Tokenizer) -> tuple[Prompts, list[str]]:
    """`held_out_prompts`, and each prompt's source text."""
    room = room_for_prompts(policy.language_model, config.generation)
    prompts, sources = load_sourced_prompts(
        config.dataset, config.prompts, tokenizer, "held_out", seed=config.seed, limit=config.n_prompts, room=room
    )
    if len(prompts) < 2:
        raise ConfigError(
            f"data={config.dataset.data!r} has {len(prompts)} held-out prompt, and an interval needs two; give a "
            "larger --held-out-fraction to every stage, or use a larger source"
        )
    if len(prompts) < config.n_prompts:
        say_once(
            f"warning: data={config.dataset.data!r} has {len(prompts)} held-out prompts, fewer than "
            f"n_prompts={config.n_prompts}: the figures are those of {len(prompts)} prompts"
        )
    return prompts, sources


def both_answers(config: EvaluateConfig) -> list[BothAnswers]:
    """Each held-out prompt with both policies' answers, from the same random numbers."""
    policy, tokenizer = load_pair(config)
    prompts, sources = held_out_sources(config, policy, tokenizer)
    cached = _check_all(config, policy, tokenizer, prompts)
    draw = generate if cached else generate_uncached
    draws = _draws(config, len(prompts))

    def texts(model: PreTrainedModel) -> list[str]:
        size = config.generation.batch_size
        listed: list[str] = []
        for start in range(0, len(prompts), size):
            rows = slice(start, min(start + size, len(prompts)))
            queries, chunk = prompts.token_ids[rows], draws.rows(rows.start, rows.stop)
            samples = draw(model, queries, chunk, config.generation, tokenizer)
            listed += Endings.of(model, tokenizer, config.generation).texts(samples)
        return listed

    with policy.as_reference() as model:
        before = texts(model)
    after = texts(policy.language_model)
    return [BothAnswers(*row) for row in zip(prompts.texts, sources, before, after, strict=True)]


def _draws(config: EvaluateConfig, count: int) -> Draws:
    return Draws.of(config.generation.answering(config.prompts.kind), count, seed=config.seed, step=0)


@torch.no_grad()
def answer(
    policy: Policy,
    tokenizer: Tokenizer,
    *,
    prompts: Prompts,
    client: RewardClient,
    judges: RewardClient | None,
    config: EvaluateConfig,
    as_reference: bool,
    cached: bool,
) -> Answers:
    """Answers of the policy, or of its reference. A chunk is scored while the next one is generated."""
    settings, draws = config.generation, _draws(config, len(prompts))
    draw = generate if cached else generate_uncached
    texts: list[str] = []
    pending, judging, scored = [], [], []
    for start in range(0, len(prompts), settings.batch_size):
        stop = min(start + settings.batch_size, len(prompts))
        chunk, chunk_draws = prompts.rows(start, stop), draws.rows(start, stop)
        if as_reference:
            with policy.as_reference() as model:
                samples = draw(model, chunk.token_ids, chunk_draws, settings, tokenizer)
        else:
            samples = draw(policy.language_model, chunk.token_ids, chunk_draws, settings, tokenizer)
        responses = Endings.of(policy.language_model, tokenizer, settings).texts(samples)
        pending.append(client.submit_components(chunk.judged, responses, chunk.fields))
        if judges is not None:
            judging.append(judges.submit_components(chunk.judged, responses, chunk.fields))
        texts += responses
        scored.append(_logprobs(policy, samples, settings, as_reference=as_reference))
    own, reference, plain, counts = (torch.cat(parts).tolist() for parts in zip(*scored, strict=True))
    return Answers(
        texts=tuple(texts),
        rewards=tuple(reward for future in pending for reward in future.result().totals),
        logprobs=tuple(own),
        reference_logprobs=tuple(reference),
        plain_reference_logprobs=tuple(plain),
        token_counts=tuple(counts),
        judged={
            component.name: tuple(score for future in judging for score in future.result().components[component.name])
            for component in (with_names(config.judges).components if judging else ())
        },
    )


@contextmanager
def _clients(config: EvaluateConfig, on_wait: WaitingLine) -> Iterator[tuple[RewardClient, RewardClient | None]]:
    """The rewards, and the further judges if there are any."""
    fields = config.prompts.fields
    with ExitStack() as held:
        client = held.enter_context(RewardClient(config.reward, fields=fields, on_wait=on_wait))
        judges = None
        if config.judges.says_whom_to_ask:
            named = with_names(config.judges)
            judges = held.enter_context(RewardClient(named, fields=fields, on_wait=on_wait, environment_key=False))
        yield client, judges


def _logprobs(
    policy: Policy, samples: Samples, settings: GenerationSettings, *, as_reference: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed log-probabilities [B] of the writer, the reference and the plain reference; and token counts [B]."""
    plain = policy.reference_logprobs(samples).sum(1)
    if as_reference:
        # The reference compared with itself: both terms of the KL cancel.
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
    after = Path(config.after)
    settings = {"evaluate": to_dict(config)}
    if (after / CONFIG_FILE).is_file():
        settings = {"ppo": json.loads((after / CONFIG_FILE).read_text(encoding="utf-8")), **settings}
    report = render_report(
        title=f"{config.after}: before and after PPO",
        evaluation=result.evaluation,
        samples=result.samples,
        policies=result.policies,
        training=read_metrics(after / FILE_NAME) if (after / FILE_NAME).is_file() else (),
        settings=settings,
    )
    write_evaluation(config.output_dir, result, report)


def write_evaluation(directory: Path, result: EvaluationResult, report: str) -> None:
    """Write metrics, samples and report of one evaluation, atomically. Raises `NotWritten`."""
    policies = {"policies": [dataclasses.asdict(figures) for figures in result.policies]} if result.policies else {}
    figures = json.dumps(result.evaluation.to_dict() | policies, indent=2, allow_nan=False)
    with replaced_files(directory, "evaluation", last=EVALUATION_FILE) as beside:
        write_samples(beside / SAMPLES_FILE, result.samples)
        (beside / REPORT_FILE).write_text(report, encoding="utf-8")
        (beside / EVALUATION_FILE).write_text(figures + "\n", encoding="utf-8")
