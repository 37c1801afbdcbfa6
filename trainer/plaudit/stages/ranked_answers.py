"""Stage 2 on ranked answers: all pairs of a prompt form one example, and each answer passes through the model once.

Failure modes: pairs shuffled over the data set, which repeat answers within an epoch and overfit; training on held-out
texts; use of a model that learnt nothing; scores without a fixed scale, on which PPO's KL coefficient depends.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from plaudit.data.chat_templates import judged_ids, use_chat_template
from plaudit.data.conversations import Prompt, conversation, is_conversation, plain
from plaudit.data.preferences import (
    MIN_OVERLAP,
    LeftOut,
    Opinion,
    RankedPrompt,
    load_opinions,
    merged,
    opinions_of_rankings,
    split,
)
from plaudit.data.sources import fingerprint, shuffled_place
from plaudit.data.tables import DataError, load_table
from plaudit.errors import EXIT_REJECTED, ConfigError, NotFinite, PlauditError
from plaudit.policy.from_scratch import new_classifier, train_tokenizer
from plaudit.policy.texts import named_tokens
from plaudit.policy.transformer import disable_dropout
from plaudit.report.preferences import FEWEST_PROMPTS, RankingFigures, pair_agreement, ranking_figures
from plaudit.report.reward_model_card import reward_model_card
from plaudit.run.progress import WaitingLine
from plaudit.run.rankings import RankingAdmin
from plaudit.run.storage import write_text
from plaudit.settings.policy import Quantization
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.stages.judge_model import (
    check_start,
    load_classifier,
    padded,
    save_classifier,
    scale_scores,
    scores,
    with_adapters,
    without_adapters,
    write_report,
)
from plaudit.stages.optimizers import build_optimizer
from plaudit.stages.ranking_loss import ranking_loss
from plaudit.stages.supervised import BatchShape, Run, resumable, settled, train, training_arguments
from plaudit.wire import rankings as wire

RANKINGS_FILE = "rankings.jsonl"
"""Rankings from a ranking service, saved so that a resumed run uses the same ones."""
WEIGHTS_FILE = "weights.json"
SCALE_ANSWERS = 4096
"""Maximum number of answers for the scale: enough to estimate a standard deviation to 1 %."""


class AtChance(PlauditError):
    """A reward model's held-out accuracy is no better than guessing, so PPO would optimise noise (exit 65)."""

    exit_code = EXIT_REJECTED


def train_on_rankings(config: RewardModelConfig, run: Run) -> RankingFigures:
    """Train, evaluate on held-out prompts, scale and save. Returns the held-out metrics.

    Raises:
        AtChance: the held-out accuracy can't be distinguished from guessing. Only the last checkpoint is kept.
        ConfigError: there are too few rankings to train on or to evaluate with.
        RankingsUnavailable, RankingsRejected: from the ranking service.
    """
    left_out = LeftOut()
    opinions, weights = _opinions(config, run, left_out)
    rows = merged(opinions, left_out, weights)
    training, held_out = split(rows, config.dataset.held_out_fraction, left_out)
    held_out = held_out[: config.eval_examples]
    if not training or not held_out:
        _tell(config, left_out)
        raise ConfigError(
            f"ranked={config.ranked}: {len(rows)} ranked prompts of {len({row.group for row in rows})} texts give "
            f"{len(training)} to train on and {len(held_out)} to hold out at "
            f"held_out_fraction={config.dataset.held_out_fraction}; both are needed, so add prompts"
        )
    model, tokenizer = _start(config, training)
    elements = _elements(tokenizer, training, config.max_length, left_out)
    _tell(config, left_out)
    if not elements:
        raise ConfigError(
            f"max_length={config.max_length} cuts the answers to every prompt down to the same tokens: give more"
        )
    print(
        f"{len(elements)} prompts to train on, {len(held_out)} held out; "
        f"{sum(len(element['first']) for element in elements)} pairs of {sum(map(_answers, elements))} answers"
    )
    example = elements[0]["ids"][0]
    print(f"an answer as the judge reads it, {len(example)} tokens: {named_tokens(tokenizer, example)}", flush=True)

    from datasets import Dataset  # takes seconds to import; data errors should come first

    run = settled(run, "pairwise", model, len(elements))
    config = dataclasses.replace(config, optimizer=run.config.optimizer)
    trainer = resumable(RankingTrainer, EXAMPLES)(
        model=model,
        args=TrainingArguments(remove_unused_columns=False, **training_arguments(config)),
        data_collator=Collator(tokenizer),
        train_dataset=Dataset.from_list(elements),
        optimizers=(build_optimizer(model, config.optimizer), None),
        centring=config.center_rewards_coefficient,
    )
    described = [[row.prompt, row.answers, [dataclasses.astuple(pair) for pair in row.pairs]] for row in training]
    full_precision = (lambda: _load(config, None)[0]) if config.quantization else None
    model = without_adapters(train(trainer, run, {"ranked answers": fingerprint(described)}), full_precision)
    figures = ranking_figures(held_out, scores_of(model, tokenizer, held_out, config), agreement=pair_agreement(rows))
    _require_above_chance(config, figures)
    scaled = _scale(config, model, tokenizer, training)
    model.config.score_scale = scaled.factor
    few = held_out[:4]

    def finish(model: Any, beside: Path) -> RankingFigures:
        more = {"scale": dataclasses.asdict(scaled), "left_out": left_out.counts, "train_prompts": len(elements)}
        write_report(beside, config, {"pairs": figures}, **more)
        write_text(beside / "README.md", reward_model_card(config, figures, scaled.factor, len(elements)))
        return figures

    save_classifier(
        config,
        model,
        tokenizer,
        lambda model, tokenizer: torch.tensor([r for row in scores_of(model, tokenizer, few, config) for r in row]),
        finish,
    )
    print(scaled.line())
    return figures


def _opinions(config: RewardModelConfig, run: Run, left_out: LeftOut) -> tuple[list[Opinion], dict[str, float]]:
    """The opinions, and the annotators' weights where they differ from 1."""
    assert config.ranked is not None  # RewardModelConfig checks it
    if not config.ranked_is_service:
        return load_opinions(config.ranked, left_out), {}
    file, weights_file = config.output_dir / RANKINGS_FILE, config.output_dir / WEIGHTS_FILE
    if run.resumed is None or not file.is_file():
        rows, weights = _from_service(config)
        write_text(weights_file, json.dumps(weights, indent=2) + "\n")
        write_text(file, "".join(row.model_dump_json() + "\n" for row in rows))
    else:
        rows = wire.rows_of(file.read_text(encoding="utf-8"), wire.RankingRow)
        weights = json.loads(weights_file.read_text(encoding="utf-8"))
    return opinions_of_rankings(rows, left_out), weights


def _from_service(config: RewardModelConfig) -> tuple[list[wire.RankingRow], dict[str, float]]:
    assert config.ranked is not None
    with (
        WaitingLine() as waiting,
        RankingAdmin(
            config.ranked, api_key_file=config.api_key_file, patience_s=config.patience_s, on_wait=waiting
        ) as admin,
    ):
        batches = config.batches or tuple(b.id for b in admin.batches() if b.purpose == "train")
        if not batches:
            raise ConfigError(
                f"ranked={admin.url} has no batch that was made for training; upload one and have it ranked"
            )
        rows = [row for batch in batches for row in admin.rankings(batch)]
        print(f"{len(rows)} rankings, skips and flags from {admin.url}, batches {', '.join(batches)}")
        if config.weights == "equal":
            return rows, {}
        return rows, reliability_weights([admin.agreement(batch) for batch in batches])


def reliability_weights(reports: Sequence[wire.AgreementReport]) -> dict[str, float]:
    """Annotators' weights from the ranking service's estimates, averaged over batches by the number of shared tasks.

    Raises:
        ConfigError: an annotator has fewer than `MIN_OVERLAP` tasks in common with others.
    """
    shared: dict[str, int] = {}
    points: dict[str, float] = {}
    for report in reports:
        for person in report.annotators:
            if person.rankings:
                known = person.weight is not None
                shared[person.annotator] = shared.get(person.annotator, 0) + person.overlapping_tasks * known
                more = (person.weight or 0.0) * person.overlapping_tasks
                points[person.annotator] = points.get(person.annotator, 0.0) + more
    few = {name: count for name, count in shared.items() if count < MIN_OVERLAP}
    if few:
        named = ", ".join(f"{name} {count}" for name, count in sorted(few.items()))
        raise ConfigError(
            f"weights=reliability needs {MIN_OVERLAP} tasks that each person shares with others, and some share fewer "
            f"({named}): have more tasks ranked by several people, or pass --weights equal"
        )
    weights = {name: points[name] / shared[name] for name in sorted(shared)}
    for name, weight in weights.items():
        print(f"the word of {name} weighs {weight:.2f} ({shared[name]} shared tasks)")
    return weights


def _tell(config: RewardModelConfig, left_out: LeftOut) -> None:
    for line in left_out.lines():
        print(f"ranked={config.ranked}: {line}")


def _start(config: RewardModelConfig, rows: Sequence[RankedPrompt]) -> tuple[Any, Any]:
    """The model to train, with adapters if the settings enable them, and its tokenizer."""
    if config.from_scratch:
        texts = [text for row in rows for text in (*_texts(row.prompt), *row.answers)]
        if all(isinstance(row.prompt, str) for row in rows):
            texts = [f"{row.prompt}{answer}" for row in rows for answer in row.answers]
        tokenizer: Any = train_tokenizer(
            texts, vocab_size=config.sizes.vocab_size, max_length=config.max_length, classifier=True
        )
        model = new_classifier(config.sizes, tokenizer, None)
    else:
        model, tokenizer = _load(config, config.quantization)
    if config.chat_template is not None or not all(isinstance(row.prompt, str) for row in rows):
        use_chat_template(tokenizer, config.chat_template, f"model={config.model!r}")
    check_start(config, model, tokenizer, [text for row in rows for text in (*_texts(row.prompt), *row.answers)])
    # No dropout: two answers must be compared under the same network.
    disable_dropout(model)
    return with_adapters(model, config.lora), tokenizer


def _load(config: RewardModelConfig, quantization: Quantization | None) -> tuple[Any, Any]:
    """The initial model with a head of one score, and its tokenizer."""
    return load_classifier(config.model, quantization, num_labels=1, problem_type=None)


def _texts(prompt: Prompt) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]


def _elements(
    tokenizer: Any, rows: Sequence[RankedPrompt], max_length: int, left_out: LeftOut
) -> list[dict[str, list[Any]]]:
    """Each prompt as token rows of its answers, with its pairs. Pairs that are equal after truncation are left out."""
    prompts = [row.prompt for row in rows for _ in row.answers]
    ids = iter(judged_ids(tokenizer, prompts, [answer for row in rows for answer in row.answers], max_length))
    elements: list[dict[str, list[Any]]] = []
    filled = 0
    for row in rows:
        own = [next(ids) for _ in row.answers]
        filled += sum(len(answer) >= max_length for answer in own)
        kept = [pair for pair in row.pairs if own[pair.first] != own[pair.second]]
        left_out.add(f"pairs whose first {max_length} tokens are the same", len(row.pairs) - len(kept))
        if kept:
            elements.append(
                {
                    "ids": own,
                    "first": [pair.first for pair in kept],
                    "second": [pair.second for pair in kept],
                    "target": [pair.target for pair in kept],
                    "margin": [pair.margin for pair in kept],
                }
            )
    if filled:
        print(f"{filled} answers fill max_length={max_length} with their prompts; what is longer is cut at its end")
    return elements


def _answers(element: Mapping[str, list[Any]]) -> int:
    return len(element["ids"])


class Collator:
    """Collates prompts: all answers as padded rows [N, T], all pairs [P] as indices of their answers' rows."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, elements: Sequence[Mapping[str, list[Any]]]) -> dict[str, Tensor]:
        """The batch: `input_ids` [N, T], `answers` and `pairs` [prompts], `first`, `second`, `target`, `margin` [P]."""
        counts = [_answers(element) for element in elements]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        pairs = [len(element["first"]) for element in elements]
        return {
            **padded(self._tokenizer, [row for element in elements for row in element["ids"]]),
            "answers": torch.tensor(counts),
            "pairs": torch.tensor(pairs),
            **{
                side: torch.tensor(
                    [start + place for start, e in zip(starts, elements, strict=True) for place in e[side]]
                )
                for side in ("first", "second")
            },
            **{
                name: torch.tensor([value for element in elements for value in element[name]], dtype=torch.float32)
                for name in ("target", "margin")
            },
        }


def _part(inputs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The part of a batch with the prompts `start` to `stop`."""
    answers, pairs = inputs["answers"].tolist(), inputs["pairs"].tolist()
    rows = slice(sum(answers[:start]), sum(answers[:stop]))
    of_pairs = slice(sum(pairs[:start]), sum(pairs[:stop]))
    part = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
    part |= {name: inputs[name][start:stop] for name in ("answers", "pairs")}
    part |= {name: inputs[name][of_pairs] - rows.start for name in ("first", "second")}
    return part | {name: inputs[name][of_pairs] for name in ("target", "margin")}


EXAMPLES = BatchShape(size=lambda inputs: len(inputs["answers"]), part=_part)


class RankingTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the ranking loss."""

    def __init__(self, *args: Any, centring: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._centring = centring

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The mean ranking loss over the batch's prompts; called by transformers' Trainer."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        pairs = inputs["pairs"]
        loss = ranking_loss(
            outputs.logits[:, 0],
            inputs["first"],
            inputs["second"],
            inputs["target"],
            margin=inputs["margin"],
            weight=(1 / pairs).repeat_interleave(pairs),
            prompts=len(pairs),
            centring=self._centring,
        )
        return (loss, outputs) if return_outputs else loss


def scores_of(model: Any, tokenizer: Any, rows: Sequence[RankedPrompt], config: RewardModelConfig) -> list[list[float]]:
    """The scores of every row's answers."""
    prompts = [row.prompt for row in rows for _ in row.answers]
    answers = [answer for row in rows for answer in row.answers]
    found = iter(scores(model, tokenizer, prompts, answers, config.max_length).tolist())
    return [[next(found) for _ in row.answers] for row in rows]


def _require_above_chance(config: RewardModelConfig, figures: RankingFigures) -> None:
    if not figures.at_chance:
        return
    low, high = figures.accuracy_ci95
    few = f" ({figures.prompts} held-out prompts are too few to tell)" if figures.prompts < FEWEST_PROMPTS else ""
    message = (
        f"the model is at chance: it orders {figures.accuracy:.3f} of {figures.pairs} held-out pairs as people did, "
        f"95 % interval {low:.3f} to {high:.3f}{few}; PPO would follow noise"
    )
    if config.allow_chance:
        print(f"{message}; saved all the same, since allow_chance is given")
        return
    raise AtChance(
        f"{message}. Nothing is saved: add rankings, or train longer; --resume auto --allow-chance saves it as it is"
    )


@dataclass(frozen=True)
class Scaling:
    """The factor applied to the head's weights."""

    factor: float
    answers: int
    """Number of answers used to measure the standard deviation; 0 if scores are not scaled."""
    mean: float
    """Of these answers' scores after scaling."""

    def line(self) -> str:
        """For people."""
        if not self.answers:
            return "scores are as they were learnt: without a scale of their own"
        return (
            f"scores times {self.factor:.4g}, in the head's weights: standard deviation 1 on {self.answers} answers, "
            f"mean {self.mean:.3f}"
        )


def _scale(config: RewardModelConfig, model: Any, tokenizer: Any, training: Sequence[RankedPrompt]) -> Scaling:
    """Scale the model's scores to standard deviation 1 on the answers in the settings."""
    if config.scale_on == "none":
        return Scaling(1.0, 0, 0.0)
    answers = (
        [
            (row.prompt, answer, policy)
            for row in training
            for answer, policy in zip(row.answers, row.policies, strict=True)
        ]
        if config.scale_on == "training"
        else answers_in(config.scale_on)
    )
    if config.scale_policy is not None:
        known = sorted({policy for *_, policy in answers})
        answers = [row for row in answers if row[2] == config.scale_policy]
        if not answers:
            raise ConfigError(
                f"scale_policy={config.scale_policy!r} wrote none of the answers of scale_on={config.scale_on}; there "
                f"are those of {', '.join(map(repr, known))}"
            )
    if len(answers) > SCALE_ANSWERS:  # some of each part of the file
        answers.sort(key=lambda row: shuffled_place(json.dumps(row)))
        answers = answers[:SCALE_ANSWERS]
    found = scores(model, tokenizer, [row[0] for row in answers], [row[1] for row in answers], config.max_length)
    deviation = found.std().item() if len(found) > 1 else 0.0
    if not deviation > 1e-6 * max(1.0, found.abs().max().item()):
        raise NotFinite(
            f"the scores of {len(found)} answers of scale_on={config.scale_on} have standard deviation "
            f"{deviation:.3g}: they can't be scaled to 1; the model tells no answers apart, or pass --scale-on none"
        )
    scale_scores(model, 1 / deviation)
    return Scaling(1 / deviation, len(found), found.mean().item() / deviation)


def answers_in(source: str) -> list[tuple[Prompt, str, str]]:
    """Prompt, answer and policy ("" if unknown) of each answer in a file from `plaudit sample`, or in a file with the
    columns prompt and completion.

    Raises:
        DataError: the file can't be read, or has other columns.
    """
    table = load_table(source)
    column = next((name for name in ("answers", "completion") if name in table.columns), None)
    if column is None or "prompt" not in table.columns:
        raise DataError(
            f"scale_on={source!r} has the columns {', '.join(table.columns) or '(none)'}; answers are prompt and "
            "answers (as `plaudit sample` writes them), or prompt and completion"
        )
    found: list[tuple[Prompt, str, str]] = []
    for number, (prompt, cell) in enumerate(zip(table.columns["prompt"], table.columns[column], strict=True), start=1):
        where = f"scale_on={source!r}, row {number}"
        prompt = conversation(prompt, f"{where}, prompt") if is_conversation(prompt) else prompt
        for answer in cells if isinstance(cells := plain(cell), list) else [cells]:
            text, policy = (answer.get("text"), answer.get("policy", "")) if isinstance(answer, dict) else (answer, "")
            if not isinstance(prompt, str | list) or not isinstance(text, str):
                raise DataError(f"{where}: prompt={prompt!r:.40} and answer={text!r:.40}; both must be given")
            found.append((prompt, text, policy))
    return found
