"""Stage 2: a reward model. Labelled texts or ranked answers in, a Hugging Face classifier directory out."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments, set_seed

from plaudit import demo_models
from plaudit.data.sources import (
    Label,
    LabelledTexts,
    fingerprint,
    is_held_out,
    load_labelled_texts,
    load_ranked_answers,
    preference_pairs,
)
from plaudit.errors import ConfigError, NotAsSaved, NotFinite
from plaudit.policy.checks import FAILURES, check_tokenizer_fits, max_positions
from plaudit.policy.from_scratch import new_classifier, train_tokenizer
from plaudit.policy.model import is_adapters, load_tokenizer, require_no_random_weights
from plaudit.policy.reading import reading
from plaudit.policy.tokenizer import Tokenizer
from plaudit.run.storage import write_text
from plaudit.settings.plain import to_dict
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.stages.optimizers import build_optimizer
from plaudit.stages.supervised import (
    Drawing,
    Run,
    begun,
    forget_checkpoints,
    require_same_figures,
    resumable,
    saved_model,
    train,
    training_arguments,
)

CHARS_PER_TOKEN = 16
"""Upper bound used to cut texts before tokenising; no natural text has longer tokens on average."""


@dataclass(frozen=True)
class Judgement:
    """How well a reward model judges held-out examples."""

    n: int
    accuracy: float
    calibration_error: float
    """Expected calibration error over ten equal bins of the predicted probability; 0 is perfect."""


def run(config: RewardModelConfig) -> dict[str, Judgement]:
    """Train, judge on held-out examples, save to `config.output_dir`. Returns one judgement for each kind of text."""
    with begun(config) as run:
        set_seed(config.seed)
        measured = _pairwise(config, run) if config.kind == "pairwise" else _classifier(config, run)
        forget_checkpoints(run)
    for name, judged in measured.items():
        print(
            f"held-out {name}: accuracy {judged.accuracy:.3f}, "
            f"calibration error {judged.calibration_error:.3f}, n={judged.n}"
        )
    print(f"saved in {config.output_dir}; serve it with: plaudit-reward --model {config.output_dir}")
    return measured


def _classifier(config: RewardModelConfig, run: Run) -> dict[str, Judgement]:
    from datasets import Dataset

    texts = load_labelled_texts(config.dataset, "train")
    held_out = load_labelled_texts(config.dataset, "held_out")
    meaning = read_labels([*texts.labels, *held_out.labels], config.label_names, texts.class_names)
    labels = [meaning.index[spelled(label)] for label in texts.labels]
    for line in meaning.lines([*texts.labels, *held_out.labels]):
        print(line)
    if config.from_scratch:
        tokenizer = train_tokenizer(
            texts.texts, vocab_size=config.sizes.vocab_size, max_length=config.max_length, classifier=True
        )
        model = new_classifier(config.sizes, tokenizer, config.label_names)
    else:
        names = dict(enumerate(config.label_names))
        model, tokenizer = _load_classifier(
            config.model,
            id2label=names,
            label2id={name: i for i, name in names.items()},
            # Whatever the start model was for: its loss, and how its files are read, depend on it.
            problem_type="single_label_classification",
        )
    _check_start(config, model, tokenizer, texts.texts)
    collator = CroppingCollator(tokenizer, config)
    trainer = resumable(Trainer)(
        model=model,
        args=TrainingArguments(
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length",
            length_column_name="chars",
            **training_arguments(config),
        ),
        data_collator=collator,
        train_dataset=Dataset.from_dict(
            {
                "text": texts.texts,
                "label": labels,
                "chars": [min(len(text), 4 * config.max_length) for text in texts.texts],
            }
        ),
        optimizers=(build_optimizer(model, config.optimizer), None),
    )
    inputs = {"labelled texts": fingerprint(zip(texts.texts, labels, strict=True))}
    targets = torch.tensor([meaning.index[spelled(label)] for label in held_out.labels])
    openings = [" ".join(text.split()[: config.short_words]) for text in held_out.texts]

    def measure(model: PreTrainedModel) -> dict[str, Judgement]:
        return {
            name: judge(class_probabilities(model, tokenizer, judged, config.max_length), targets)
            for name, judged in (("whole texts", held_out.texts), (f"first {config.short_words} words", openings))
        }

    return save(config, train(trainer, run, inputs, collator), tokenizer, held_out.texts, measure)


def _pairwise(config: RewardModelConfig, run: Run) -> dict[str, Judgement]:
    from datasets import Dataset

    assert config.ranked is not None  # RewardModelConfig checks it
    ranked = load_ranked_answers(config.ranked)
    fraction = config.dataset.held_out_fraction
    pairs = preference_pairs([row for row in ranked if not is_held_out(row.prompt, fraction)])
    held_out = preference_pairs([row for row in ranked if is_held_out(row.prompt, fraction)])
    all_pairs = sum(len(row.answers) * (len(row.answers) - 1) // 2 for row in ranked)
    if all_pairs > len(pairs) + len(held_out):
        print(f"{config.ranked}: {all_pairs - len(pairs) - len(held_out)} pairs of equal answers left out")
    if not pairs or not held_out:
        raise ConfigError(
            f"{config.ranked}: {len(ranked)} ranked prompts give {len(pairs)} training pairs and {len(held_out)} "
            f"held-out pairs at held_out_fraction={fraction}; both are needed, so add prompts"
        )
    if config.from_scratch:
        texts = [pair["prompt"] + pair["chosen"] for pair in pairs]
        tokenizer = train_tokenizer(
            texts, vocab_size=config.sizes.vocab_size, max_length=config.max_length, classifier=True
        )
        model = new_classifier(config.sizes, tokenizer, None)
    else:
        model, tokenizer = _load_classifier(config.model, num_labels=1, problem_type=None)
    _check_start(config, model, tokenizer, [text for pair in pairs for text in pair.values()])

    from trl import RewardConfig, RewardTrainer  # seconds to import; wrong data should be told before

    trainer = resumable(RewardTrainer, pairs=True)(
        model=model,
        args=RewardConfig(max_length=config.max_length, **training_arguments(config)),
        train_dataset=Dataset.from_dict(
            {
                f"{side}_ids": _token_ids(tokenizer, [pair["prompt"] + pair[side] for pair in pairs], config.max_length)
                for side in ("chosen", "rejected")
            }
        ),
        processing_class=tokenizer,
        optimizers=(build_optimizer(model, config.optimizer), None),
    )
    inputs = {"ranked answers": fingerprint(list(pair.values()) for pair in pairs)}
    sample = [pair["prompt"] + pair["chosen"] for pair in held_out]

    def measure(model: PreTrainedModel) -> dict[str, Judgement]:
        better, worse = (
            logits(model, tokenizer, [pair["prompt"] + pair[side] for pair in held_out], config.max_length)[:, 0]
            for side in ("chosen", "rejected")
        )
        preferred = torch.sigmoid(better - worse)
        targets = torch.ones(len(held_out), dtype=torch.long)
        return {"pairs": judge(torch.stack([1 - preferred, preferred], dim=1), targets)}

    return save(config, train(trainer, run, inputs), tokenizer, sample, measure)


def _load_classifier(source: str, **settings: Any) -> tuple[PreTrainedModel, Tokenizer]:
    """A model to start from with a head for the labels that `settings` describe, and its tokenizer.

    In fp32 whatever its files hold: in half precision, small updates vanish and large ones overflow.
    """
    if is_adapters(source):
        raise ConfigError(
            f"model={source!r} holds adapters and no whole model: merge them into their base first (`plaudit ppo "
            "--merge` writes OUTPUT_DIR/merged; else peft's merge_and_unload and save_pretrained) and name the result"
        )
    try:
        with reading(source):
            tokenizer = load_tokenizer(source, setting="model")
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                demo_models.resolve(source),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
                **settings,
            )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model={source!r} can't be loaded as a classifier ({reason:.160}); name another") from error
    require_no_random_weights(model, loaded, source, "model", head_may_be_new=True)
    model.config.problem_type = settings["problem_type"]
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@torch.no_grad()
def _check_start(config: RewardModelConfig, model: PreTrainedModel, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Tries the model on a short text and one as long as texts may be: alone and together they must be judged alike."""
    name = f"model={config.model!r}" if not config.from_scratch else f"sizes.model_type={config.sizes.model_type!r}"
    check_tokenizer_fits(tokenizer, model, config.model, texts, setting="model")
    was_training, probe = model.training, ["good film", "a good film " * config.max_length]
    model.eval()
    try:
        together = logits(model, tokenizer, probe, config.max_length)
        alone = torch.cat([logits(model, tokenizer, [text], config.max_length) for text in probe])
    except FAILURES as error:
        raise ConfigError(
            f"{name} can't judge a text of max_length={config.max_length} tokens ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.100}); its configuration names {max_positions(model)} positions, of which "
            "some families keep a few for themselves: give --max-length less, or name another model"
        ) from error
    finally:
        model.train(was_training)
    if bool((together - alone).abs().max() > 1e-3 * together.abs().max().clamp(min=1e-3)):
        raise ConfigError(
            f"{name} judges a text otherwise beside a longer one than alone ({alone[0].tolist()} alone, "
            f"{together[0].tolist()} beside it): it reads padding; give its tokenizer the padding_side that it was "
            "trained with, or name another model"
        )


def save(
    config: RewardModelConfig,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    measure: Callable[[PreTrainedModel], dict[str, Judgement]],
) -> dict[str, Judgement]:
    """Saves the model with reward_model.json, what `measure` says of it, once it is proven on `texts`.

    It is measured in fp32 with the numbers as they were saved. Raises as `saved_model` does.
    """

    def reproduces(directory: Path) -> None:
        again = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).to(model.device)
        if again.config.id2label != model.config.id2label:
            raise NotAsSaved(f"the model is not saved: loaded again, its labels are {again.config.id2label}")
        own = logits(model, tokenizer, texts[:8], config.max_length)
        got = logits(again.eval(), load_tokenizer(directory), texts[:8], config.max_length)
        require_same_figures("the logits of held-out texts", own, got)

    with saved_model(
        model, tokenizer, config.output_dir, half_precision=config.half_precision, reproduces=reproduces
    ) as (model, beside):
        measured = measure(model)
        report = {
            "stage": "reward-model",
            "config": to_dict(config),
            "held_out": {name: asdict(judged) for name, judged in measured.items()},
        }
        write_text(beside / "reward_model.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    return measured


class CroppingCollator(Drawing):
    """Texts and labels into padded tensors; a share of the batches is cut to one random short length.

    Half of those texts keep their opening, which is what will be judged; the others start at a random word, since every
    passage of a review says something about its label and openings alone are soon learnt by heart.
    """

    def __init__(self, tokenizer: Tokenizer, config: RewardModelConfig) -> None:
        super().__init__(config.seed)
        self.tokenizer = tokenizer
        self.config = config

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.next_batch()
        length, texts = self.config.max_length, [row["text"] for row in rows]
        if self.random.random() < self.config.crop_fraction:
            length = min(length, self.random.randint(self.config.crop_min_tokens, self.config.crop_max_tokens))
            texts = [text if self.random.random() < 0.5 else self._from_a_random_word(text) for text in texts]
        batch = encode(self.tokenizer, texts, length)
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    def _from_a_random_word(self, text: str) -> str:
        words = text.split(" ")
        last = max(len(words) - self.config.crop_min_tokens, 0)
        return " ".join(words[self.random.randint(0, last) :])


def _token_ids(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[list[int]]:
    # Tokenised here, as the service will do it: TRL would end every text with an end-of-text token of its own.
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return ids


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, [B, T], of texts cut to `max_length` tokens."""
    cut = [text[: CHARS_PER_TOKEN * max_length] for text in texts]
    batch = tokenizer(cut, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@dataclass(frozen=True)
class LabelReading:
    """Which label name each value of a label column means."""

    names: tuple[str, ...]
    index: Mapping[str, int]
    """By the value as it is spelled (see `spelled`)."""
    class_names: tuple[str, ...] | None = None

    def lines(self, labels: Sequence[Label]) -> list[str]:
        """For people: each value with its name and how many rows have it, and the names that no row has."""
        counts = Counter(spelled(label) for label in labels)
        lines = []
        for value, i in sorted(self.index.items(), key=lambda entry: (entry[1], entry[0])):
            own = f" ({self.class_names[int(value)]})" if self.class_names and value.isdigit() else ""
            lines.append(f"label {value}{own} is {self.names[i]}: {counts[value]} rows")
        unused = [name for i, name in enumerate(self.names) if i not in self.index.values()]
        return lines + [f"label {name}: no row, so nothing can be learnt about it" for name in unused]


def spelled(label: Label) -> str:
    """A label as text: whole numbers without a decimal point, true and false as 1 and 0."""
    text = str(label).strip()
    if text.lower() in ("true", "false"):
        return "1" if text.lower() == "true" else "0"
    return text.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text


def read_labels(
    labels: Sequence[Label], names: Sequence[str], class_names: Sequence[str] | None = None
) -> LabelReading:
    """What the labels mean: the names themselves, or numbers that count the names from 0.

    Where they could be either, and differ, they are the names if they are nothing but names. `class_names` is what the
    source itself calls 0, 1, ...; names that are the same words in another order are matched by word, not by position.

    Raises:
        ConfigError: a label is neither; some are names and all of them could be numbers; or there is only one.
    """
    names = tuple(names)
    values = sorted({spelled(label) for label in labels})
    if len(values) < 2:
        raise ConfigError(
            f"every text has the label {', '.join(values)}: a classifier learns nothing from one label; add texts with "
            "another, or name another column with --label-column"
        )
    by_name = {value: names.index(value) for value in values if value in names}
    by_number = {value: int(value) for value in values if value.isdigit() and int(value) < len(names)}
    if len(by_name) == len(values):
        return LabelReading(names, by_name)
    if len(by_number) < len(values):
        unknown = [value for value in values if value not in by_name and value not in by_number]
        raise ConfigError(
            f"labels {', '.join((unknown or values)[:5])} are neither numbers below {len(names)} nor among "
            f"label_names={', '.join(names)}; give --label-names in the order of the labels"
        )
    if by_name:
        as_numbers = ", ".join(f"{value} is {names[i]!r}" for value, i in by_number.items())
        as_names = ", ".join(f"{value} is {names[i]!r}" for value, i in by_name.items())
        raise ConfigError(
            f"labels {', '.join(values)} with label_names={', '.join(names)} can be read in two ways: as numbers that "
            f"count the names from 0 ({as_numbers}), or as the names ({as_names}, the others unknown); give names "
            "that are no numbers, in the order of the labels"
        )
    if class_names is not None:
        own, wanted = ([name.casefold() for name in some] for some in (class_names, names))
        if set(own) & set(wanted):
            missing = [class_names[i] for i in by_number.values() if own[i] not in wanted]
            if missing:
                raise ConfigError(
                    f"the data call labels {', '.join(class_names)}, and label_names={', '.join(names)} lacks "
                    f"{', '.join(missing)}: give --label-names {' '.join(class_names)}"
                )
            by_number = {value: wanted.index(own[i]) for value, i in by_number.items()}
    return LabelReading(names, by_number, None if class_names is None else tuple(class_names))


def label_indices(data: LabelledTexts, names: Sequence[str]) -> list[int]:
    """Labels as indices into `names` (see `read_labels`)."""
    reading = read_labels(data.labels, names, data.class_names)
    return [reading.index[spelled(label)] for label in data.labels]


@torch.no_grad()
def logits(
    model: PreTrainedModel, tokenizer: Tokenizer, texts: Sequence[str], max_length: int, batch_size: int = 64
) -> torch.Tensor:
    """Raw logits [N, labels] of texts in their order, computed in batches of like length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = [
        model(
            **{name: t.to(model.device) for name, t in encode(tokenizer, [texts[i] for i in batch], max_length).items()}
        ).logits
        for batch in (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    ]
    result = torch.cat(rows).float().cpu()
    if not bool(result.isfinite().all()):
        raise NotFinite("the model's logits are not finite: its weights are damaged, so it is neither judged nor saved")
    return result[torch.argsort(torch.tensor(order))]


def class_probabilities(
    model: PreTrainedModel, tokenizer: Tokenizer, texts: Sequence[str], max_length: int
) -> torch.Tensor:
    """Softmax over the labels, [N, labels]."""
    return logits(model, tokenizer, texts, max_length).softmax(dim=-1)


def judge(probabilities: torch.Tensor, targets: torch.Tensor, bins: int = 10) -> Judgement:
    """Accuracy and expected calibration error (Guo et al. 2017) of class probabilities [N, K] against indices [N]."""
    confidence, predicted = probabilities.max(dim=-1)
    correct = (predicted == targets).float()
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    error = sum(
        (chosen.float().mean() * (correct[chosen].mean() - confidence[chosen].mean()).abs()).item()
        for b in range(bins)
        if (chosen := bin_of == b).any()
    )
    return Judgement(len(targets), correct.mean().item(), error)
