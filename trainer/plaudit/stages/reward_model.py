"""Stage 2: a reward model. Labelled texts or ranked answers in, a Hugging Face classifier directory out."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from plaudit.data.sources import LabelledTexts, is_held_out, load_labelled_texts, load_ranked_answers, preference_pairs
from plaudit.errors import ConfigError
from plaudit.policy.from_scratch import new_classifier, train_tokenizer
from plaudit.policy.model import load_tokenizer
from plaudit.settings.plain import to_dict
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.stages.optimizers import build_optimizer
from plaudit.stages.supervised import save_model_directory, training_arguments

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
    set_seed(config.seed)
    measured = _pairwise(config) if config.kind == "pairwise" else _classifier(config)
    for name, judged in measured.items():
        print(
            f"held-out {name}: accuracy {judged.accuracy:.3f}, "
            f"calibration error {judged.calibration_error:.3f}, n={judged.n}"
        )
    report = {
        "stage": "reward-model",
        "config": to_dict(config),
        "held_out": {name: asdict(judged) for name, judged in measured.items()},
    }
    (config.output_dir / "reward_model.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"saved in {config.output_dir}; serve it with: plaudit-reward --model {config.output_dir}")
    return measured


def _classifier(config: RewardModelConfig) -> dict[str, Judgement]:
    from datasets import Dataset

    train = load_labelled_texts(config.dataset, "train")
    held_out = load_labelled_texts(config.dataset, "held_out")
    labels = label_indices(train, config.label_names)
    if config.from_scratch:
        tokenizer = train_tokenizer(
            train.texts, vocab_size=config.sizes.vocab_size, max_length=config.max_length, classifier=True
        )
        model = new_classifier(config.sizes, tokenizer, config.label_names)
    else:
        names = dict(enumerate(config.label_names))
        model, tokenizer = _load_classifier(
            config.model, id2label=names, label2id={name: i for i, name in names.items()}
        )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length",
            length_column_name="chars",
            **training_arguments(config.output_dir, config.optimizer, config.seed),
        ),
        data_collator=CroppingCollator(tokenizer, config),
        train_dataset=Dataset.from_dict(
            {
                "text": train.texts,
                "label": labels,
                "chars": [min(len(text), 4 * config.max_length) for text in train.texts],
            }
        ),
        optimizers=(build_optimizer(model, config.optimizer), None),
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    save_model_directory(model, tokenizer, config.output_dir, half_precision=config.half_precision)
    model = model.float()
    targets = torch.tensor(label_indices(held_out, config.label_names))
    openings = [" ".join(text.split()[: config.short_words]) for text in held_out.texts]
    return {
        name: judge(class_probabilities(model, tokenizer, texts, config.max_length), targets)
        for name, texts in (("whole texts", held_out.texts), (f"first {config.short_words} words", openings))
    }


def _pairwise(config: RewardModelConfig) -> dict[str, Judgement]:
    from datasets import Dataset

    assert config.ranked is not None  # RewardModelConfig checks it
    ranked = load_ranked_answers(config.ranked)
    fraction = config.dataset.held_out_fraction
    train = preference_pairs([row for row in ranked if not is_held_out(row.prompt, fraction)])
    held_out = preference_pairs([row for row in ranked if is_held_out(row.prompt, fraction)])
    if not train or not held_out:
        raise ConfigError(
            f"{config.ranked}: {len(ranked)} ranked prompts give {len(train)} training pairs and {len(held_out)} "
            f"held-out pairs at held_out_fraction={fraction}; both are needed, so add prompts"
        )
    if config.from_scratch:
        texts = [pair["prompt"] + pair["chosen"] for pair in train]
        tokenizer = train_tokenizer(
            texts, vocab_size=config.sizes.vocab_size, max_length=config.max_length, classifier=True
        )
        model = new_classifier(config.sizes, tokenizer, None)
    else:
        model, tokenizer = _load_classifier(config.model, num_labels=1)

    from trl import RewardConfig, RewardTrainer  # seconds to import; wrong data should be told before

    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            max_length=config.max_length, **training_arguments(config.output_dir, config.optimizer, config.seed)
        ),
        train_dataset=Dataset.from_dict(
            {
                f"{side}_ids": _token_ids(tokenizer, [pair["prompt"] + pair[side] for pair in train], config.max_length)
                for side in ("chosen", "rejected")
            }
        ),
        processing_class=tokenizer,
        optimizers=(build_optimizer(model, config.optimizer), None),
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    save_model_directory(model, tokenizer, config.output_dir, half_precision=config.half_precision)
    model = model.float()
    better, worse = (
        logits(model, tokenizer, [pair["prompt"] + pair[side] for pair in held_out], config.max_length)[:, 0]
        for side in ("chosen", "rejected")
    )
    preferred = torch.sigmoid(better - worse)
    return {"pairs": judge(torch.stack([1 - preferred, preferred], dim=1), torch.ones(len(held_out), dtype=torch.long))}


def _load_classifier(source: str, **settings: Any) -> tuple[Any, Any]:
    """A model to start from with a head for the labels that `settings` describe, and its tokenizer."""
    tokenizer = load_tokenizer(source)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(source, ignore_mismatched_sizes=True, **settings)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model={source!r} can't be loaded as a classifier ({reason:.160}); name another") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


class CroppingCollator:
    """Texts and labels into padded tensors; a share of the batches is cut to one random short length.

    Half of those texts keep their opening, which is what will be judged; the others start at a random word, since every
    passage of a review says something about its label and openings alone are soon learnt by heart.
    """

    def __init__(self, tokenizer: Any, config: RewardModelConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.random = random.Random(config.seed)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
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


def _token_ids(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    # Tokenised here, as the service will do it: TRL would end every text with an end-of-text token of its own.
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return ids


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, [B, T], of texts cut to `max_length` tokens."""
    cut = [text[: CHARS_PER_TOKEN * max_length] for text in texts]
    batch = tokenizer(cut, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def label_indices(data: LabelledTexts, names: Sequence[str]) -> list[int]:
    """Labels as indices into `names`: they may be those indices already, or the names themselves.

    Raises:
        ConfigError: a label is neither.
    """
    index: dict[Any, int] = {name: i for i, name in enumerate(names)} | {i: i for i in range(len(names))}
    unknown = sorted({str(label) for label in data.labels if label not in index})
    if unknown:
        raise ConfigError(
            f"labels {', '.join(unknown[:5])} are neither numbers below {len(names)} nor among "
            f"label_names={', '.join(names)}; give --label-names in the order of the labels"
        )
    return [index[label] for label in data.labels]


@torch.no_grad()
def logits(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int, batch_size: int = 64) -> torch.Tensor:
    """Raw logits [N, labels] of texts in their order, computed in batches of like length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = [
        model(
            **{name: t.to(model.device) for name, t in encode(tokenizer, [texts[i] for i in batch], max_length).items()}
        ).logits
        for batch in (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    ]
    result = torch.cat(rows).float().cpu()
    return result[torch.argsort(torch.tensor(order))]


def class_probabilities(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> torch.Tensor:
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
