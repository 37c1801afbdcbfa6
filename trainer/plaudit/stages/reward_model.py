"""Stage 2: train a reward model from labelled texts or ranked answers, and write a Hugging Face classifier
directory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from plaudit.data.labels import LabelReading, read_labels, spelled
from plaudit.data.sources import LabelledTexts, fingerprint, load_labelled_texts
from plaudit.errors import ConfigError
from plaudit.policy.from_scratch import new_classifier, train_tokenizer
from plaudit.report.preferences import RankingFigures
from plaudit.report.reward_model_card import classifier_card
from plaudit.run.hub import push_results, require_pushable
from plaudit.run.storage import write_text
from plaudit.settings.policy import Quantization
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.stages import ranked_answers
from plaudit.stages.judge_model import (
    check_start,
    encode,
    load_classifier,
    logits,
    save_classifier,
    with_adapters,
    without_adapters,
    write_report,
)
from plaudit.stages.optimizers import build_optimizer
from plaudit.stages.supervised import (
    Drawing,
    Run,
    begun,
    forget_checkpoints,
    resumable,
    settled,
    train,
    training_arguments,
)


@dataclass(frozen=True)
class Judgement:
    """Held-out metrics of a classifier."""

    n: int
    accuracy: float
    calibration_error: float
    """Expected calibration error over ten equal bins of the predicted probability; 0 is perfect."""

    def line(self) -> str:
        """For people."""
        return f"accuracy {self.accuracy:.3f}, calibration error {self.calibration_error:.3f}, n={self.n}"


def run(config: RewardModelConfig) -> dict[str, Judgement] | dict[str, RankingFigures]:
    """Train, evaluate on held-out examples, save to `config.output_dir`. Returns the metrics for each kind of
    example."""
    require_pushable(config.push_to_hub)
    with begun(config) as run:
        set_seed(config.seed)
        measured: dict[str, Judgement] | dict[str, RankingFigures]
        if config.kind == "pairwise":
            measured = {"pairs": ranked_answers.train_on_rankings(config, run)}
        else:
            measured = _classifier(config, run)
        forget_checkpoints(run)
    for name, judged in measured.items():
        print(f"held-out {name}: {judged.line()}")
    print(f"saved in {config.output_dir}")
    push_results(config.output_dir, config.push_to_hub, private=config.hub_private)
    return measured


def _classifier(config: RewardModelConfig, run: Run) -> dict[str, Judgement]:
    from datasets import Dataset

    texts = load_labelled_texts(config.dataset, "train")
    held_out = load_labelled_texts(config.dataset, "held_out")
    everywhere = [*texts.labels, *held_out.labels]
    reading = read_labels(everywhere, config.label_names, texts.class_names, config.label_map)
    for line in reading.lines(everywhere):
        print(line, flush=True)
    texts, labels = _read(texts, reading)
    held_out, held_out_labels = _read(held_out, reading)
    if config.from_scratch:
        tokenizer = train_tokenizer(
            texts.texts, vocab_size=config.sizes.vocab_size, max_length=config.max_length, classifier=True
        )
        model = new_classifier(config.sizes, tokenizer, config.label_names)
    else:
        model, tokenizer = _load(config, config.quantization)
    check_start(config, model, tokenizer, texts.texts)
    model = with_adapters(model, config.lora)
    run = settled(run, "classifier", model, len(texts.texts))
    config = replace(config, optimizer=run.config.optimizer)
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
    full_precision = (lambda: _load(config, None)[0]) if config.quantization else None
    trained = without_adapters(train(trainer, run, inputs, collator), full_precision)
    few = held_out.texts[:8]
    judged_texts = held_out.texts[: config.eval_examples]
    targets = torch.tensor(held_out_labels[: config.eval_examples])
    openings = [" ".join(text.split()[: config.short_words]) for text in judged_texts]

    def measure(model: Any, beside: Path) -> dict[str, Judgement]:
        measured = {
            name: judge(class_probabilities(model, tokenizer, judged, config.max_length), targets)
            for name, judged in (("whole texts", judged_texts), (f"first {config.short_words} words", openings))
        }
        write_report(beside, config, measured)
        lines = {name: judged.line() for name, judged in measured.items()}
        write_text(beside / "README.md", classifier_card(config, lines))
        return measured

    return save_classifier(
        config, trained, tokenizer, lambda model, tokenizer: logits(model, tokenizer, few, config.max_length), measure
    )


def _read(texts: LabelledTexts, reading: LabelReading) -> tuple[LabelledTexts, list[int]]:
    """The texts whose label has a meaning, and these labels as indices of their names."""
    known = [i for i, label in enumerate(texts.labels) if spelled(label) in reading.index]
    if not known:
        raise ConfigError(
            f"of {len(texts.texts)} texts in one of the splits, none has a label that means something: add texts, or "
            "say with --label-map what the values mean"
        )
    labels = [texts.labels[i] for i in known]
    kept = LabelledTexts([texts.texts[i] for i in known], labels, texts.class_names)
    return kept, [reading.index[spelled(label)] for label in labels]


def _load(config: RewardModelConfig, quantization: Quantization | None) -> tuple[Any, Any]:
    """The initial model with a head for the labels, and its tokenizer."""
    names = dict(enumerate(config.label_names))
    return load_classifier(
        config.model,
        quantization,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        # Set whatever the initial model was for, because the loss and loaders depend on it.
        problem_type="single_label_classification",
    )


class CroppingCollator(Drawing):
    """Collates texts and labels to padded tensors; a share of the batches is cropped to a random short length.

    Half of the cropped texts keep their opening, as in the texts that the model will judge. The others start at a
    random word, because every passage of a review is informative, and openings alone lead to overfitting.
    """

    def __init__(self, tokenizer: Any, config: RewardModelConfig) -> None:
        super().__init__(config.seed)
        self.tokenizer = tokenizer
        self.config = config

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of `input_ids` and `attention_mask` [B, T], and `labels` [B]."""
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
