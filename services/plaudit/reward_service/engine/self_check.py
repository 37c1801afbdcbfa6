"""The start-up check of a model: a reward must depend on its text alone (batch invariance).

The same texts, short ones and one of full length, are scored by plain transformers one at a time, and by the service
alone and in batches. If padding changes a score, only texts of the same length share a forward pass; if any batching
does, each text gets its own.

Failure modes: a service that is ready and gives every text the same reward, or rewards that depend on other requests.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal, Protocol

import torch

from plaudit.reward_service.engine.batching import Chat, Encoded, Logits, ScorerLostError, TemporaryOutOfMemory, Text
from plaudit.reward_service.engine.loading import Loaded, one_line
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.settings import Settings

BatchingMode = Literal["packed", "padded", "by length", "alone"]
"""How texts share a forward pass: without padding, with padding, only texts of one length, not at all."""
BATCHING_MODES: tuple[BatchingMode, ...] = ("packed", "padded", "by length", "alone")
"""From the fastest to the most careful. If one fails the check, the next is tried."""
WORDS = (
    *("good", "bad", "the", "film", "great", "awful", "story", "best", "worst", "love", "hate", "never", "always"),
    *("music", "actor", "plot", "boring", "bright", "Haus", "livre", "好", "мир", "MKT", "ACGT", "GATTACA", "7", "42"),
    *("1999", "a", "z"),
)
"""Words of many kinds: some are in any vocabulary, and some have the same number of tokens."""
SHORT_LENGTHS = (3, 7, 15, 24)
"""Number of words in each of the short texts of several words."""
SAME_LENGTH_WORDS = 4
EXACT = 1e-5
"""Tolerance for scores in fp32, relative to the text's largest logit if that is above 1."""
ROUNDING = 1e-3
"""A larger difference between scores in fp32 is not due to rounding."""
ALIKE = 1e-6
"""Scores of different words within this distance count as equal."""


class ScorerUnderTest(Protocol):
    """The scorer under test."""

    id: str
    batching: BatchingMode
    max_tokens: int
    replicas: int

    @property
    def modules(self) -> Sequence[Any]:
        """The transformers model of each replica, on its device."""
        ...

    def use(self, batching: BatchingMode) -> None:
        """Switch to another way of batching."""
        ...

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Tokenise."""
        ...

    def score(self, batch: Sequence[Encoded], replica: int) -> list[Logits]:
        """Run one replica of the model."""
        ...


class ReferenceModel:
    """The reference: a transformers model that scores one text at a time, with its tokenizer's own inputs."""

    def __init__(self, module: Any, device: torch.device, takes: Sequence[str]) -> None:
        self.module = module
        self.device = device
        self._takes = takes

    @torch.inference_mode()
    def __call__(self, encoded: Encoded, *, with_mask: bool = True) -> torch.Tensor:
        """The text's logits [labels], on the CPU, in double precision."""
        inputs = {"input_ids": encoded.ids}
        if with_mask and "attention_mask" in self._takes:
            inputs["attention_mask"] = [1] * len(encoded.ids)
        if "token_type_ids" in self._takes and encoded.type_ids is not None:
            inputs["token_type_ids"] = encoded.type_ids
        tensors = {name: torch.tensor([list(values)], device=self.device) for name, values in inputs.items()}
        logits: torch.Tensor = self.module(**tensors).logits
        return logits[0].double().cpu()

    def scores(self, texts: Sequence[Encoded]) -> list[torch.Tensor]:
        """The logits of each text; computed on the CPU if the device lacks memory."""
        try:
            self.module.to(self.device)
            return [self(encoded) for encoded in texts]
        except torch.OutOfMemoryError:
            self.device = torch.device("cpu")
        self.module.to(self.device)
        return [self(encoded) for encoded in texts]

    def in_precision(self, dtype: torch.dtype, loaded: Loaded) -> "ReferenceModel":
        """The model that was loaded, in another number format."""
        return ReferenceModel(copy.deepcopy(loaded.model).to(dtype), self.device, self._takes)


@dataclass(frozen=True)
class Probes:
    """The texts of the check, tokenised by the service."""

    words: list[Encoded]
    """Different words that make the same number of tokens."""
    short: list[Encoded]
    """Those words, and texts of several lengths."""
    longest: Encoded

    @property
    def all(self) -> list[Encoded]:
        """The longest first: that reveals a model whose state changes with its inputs."""
        return [self.longest, *self.short]


def check_scores(
    subject: ScorerUnderTest, loaded: Loaded, settings: Settings, device: torch.device
) -> Mapping[str, object]:
    """Find the fastest way of batching that gives the model's own scores. Returns the findings, for the log.

    Raises `ModelError` when there is none, or when the model's scores can't be rewards.
    """
    started = time.perf_counter()
    name = subject.id
    probes = probes_of(subject, settings, loaded.tokenizer)
    plain, exact = _references(subject, loaded, settings, device)
    probes, expected = _plain_scores(name, plain, probes)
    wanted = expected if exact is plain else exact.scores(probes.all)
    _check_logits(name, wanted, expected, probes, loaded.labels, settings)
    _check_padding_token(name, plain, probes, loaded)
    allowed = max(EXACT, 2 * _apart(expected, wanted))
    del exact
    failures: list[str] = []
    for way in BATCHING_MODES[BATCHING_MODES.index(subject.batching) :]:
        try:
            if way != subject.batching:
                subject.use(way)
            got = _service_scores(subject, probes, settings)
        except (torch.AcceleratorError, torch.OutOfMemoryError, TemporaryOutOfMemory, ScorerLostError) as error:
            raise ModelError(
                f"{name} does not run on {device}: {one_line(error)}; lower --batch-tokens {settings.batch_tokens} or "
                f"--max-tokens {subject.max_tokens}, or choose another --dtype"
            ) from error
        except ModelError:
            raise
        except Exception as error:
            failures.append(f"{way}: {one_line(error)}")
            continue
        apart = max(_apart(rows, wanted) for rows in got)
        if settings.dtype == "fp32" and EXACT < apart < ROUNDING:
            apart, allowed = _beside_double(plain, loaded, probes, expected, got, (apart, allowed))
        if apart <= allowed:
            found: dict[str, object] = {
                "batches": way,
                "apart": float(f"{apart:.2g}"),
                "allowed": float(f"{allowed:.2g}"),
                "texts": len(probes.all),
                "longest_tokens": len(probes.longest.ids),
                "seconds": round(time.perf_counter() - started, 2),
            }
            return found | ({"not": "; ".join(failures)} if failures else {})
        failures.append(f"{way}: scores {apart:.1e} from those of the same texts alone, {allowed:.1e} allowed")
    raise ModelError(
        f"{name} gives scores that do not depend on the text alone ({failures[-1]}): they change with earlier inputs, "
        "or are random, so they can't be rewards; try a smaller --max-tokens, or give another model"
    )


def probes_of(subject: ScorerUnderTest, settings: Settings, tokenizer: Any) -> Probes:
    """The texts of the check. Raises `ModelError` when different words give the same tokens."""

    def encode(texts: Sequence[str]) -> list[Encoded]:
        if settings.join == "chat":
            return subject.encode([Chat((("user", WORDS[0]), ("assistant", text))) for text in texts])
        if settings.join == "pair":
            return subject.encode([(text, text[::-1]) for text in texts])
        return subject.encode([(text, None) for text in texts])

    try:
        words = [encoded for encoded in encode(WORDS) if encoded.ids]
        texts = [" ".join(islice(cycle(WORDS), length)) for length in SHORT_LENGTHS]
        pad = tokenizer.pad_token
        more = [encoded for encoded in encode(["", *([f"good {pad} film"] if pad else []), *texts]) if encoded.ids]
        [longest] = encode([" ".join(islice(cycle(WORDS), subject.max_tokens))])
    except Exception as error:
        raise ModelError(
            f"{subject.id}: its tokenizer fails on plain words, {one_line(error)} (--max-tokens {subject.max_tokens})"
        ) from error
    by_length: dict[int, dict[tuple[int, ...], Encoded]] = {}
    for encoded in words:
        by_length.setdefault(len(encoded.ids), {})[tuple(encoded.ids)] = encoded
    different = max(by_length.values(), key=len, default={})
    if len(different) < 2 and len(words) > len(different):
        raise ModelError(
            f"{subject.id} has a tokenizer, a {type(tokenizer).__name__}, that gives different words the same tokens "
            f"(--max-tokens {subject.max_tokens}), so that their rewards would be the same; put the files of the "
            "tokenizer there that the model was trained with"
        )
    if not different:
        raise ModelError(
            f"{subject.id} has a tokenizer, a {type(tokenizer).__name__}, that makes no tokens of words; put the files "
            "of the tokenizer there that the model was trained with"
        )
    chosen = list(different.values())[:SAME_LENGTH_WORDS]
    return Probes(chosen, [*chosen, *more], longest)


def _references(
    subject: ScorerUnderTest, loaded: Loaded, settings: Settings, device: torch.device
) -> tuple[ReferenceModel, ReferenceModel]:
    """The reference in the service's number format, and in fp32."""
    own = subject.modules[0] if subject.batching != "packed" else loaded.model
    plain = ReferenceModel(own, device, loaded.takes)
    if settings.dtype == "fp32":
        return plain, plain
    if settings.dtype == "int8":
        # `modules` are quantised copies; these weights are still fp32.
        return ReferenceModel(subject.modules[0], device, loaded.takes), ReferenceModel(
            loaded.model, device, loaded.takes
        )
    return plain, plain.in_precision(torch.float32, loaded)


def _plain_scores(name: str, plain: ReferenceModel, probes: Probes) -> tuple[Probes, list[torch.Tensor]]:
    """The reference's scores, and the texts that it can read: some families fail on an empty text."""
    rows: dict[int, torch.Tensor] = {}
    for encoded in probes.all:
        length = len(encoded.ids)
        try:
            rows[id(encoded)] = plain(encoded)
        except Exception as error:
            if length < len(probes.words[0].ids):
                continue
            raise _does_not_run(name, plain, encoded, probes, error) from error
    readable = [encoded for encoded in probes.short if id(encoded) in rows]
    probes = Probes(probes.words, readable, probes.longest)
    return probes, [rows[id(encoded)] for encoded in probes.all]


def _does_not_run(name: str, plain: ReferenceModel, text: Encoded, probes: Probes, error: Exception) -> ModelError:
    length = len(text.ids)
    said = f"{name} loads but does not run on a text of {length} tokens"
    if text is probes.longest and length > len(probes.words[0].ids):
        try:
            plain(probes.words[0])
        except Exception:
            return ModelError(f"{name} loads but does not run: {one_line(error)}")
        return ModelError(f"{said}, the most that it says it takes: {one_line(error)}; give a smaller --max-tokens")
    return ModelError(f"{said}: {one_line(error)}")


def _check_logits(
    name: str,
    wanted: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    probes: Probes,
    labels: Sequence[str],
    settings: Settings,
) -> None:
    """Require one finite logit for each label, and different logits for different words."""
    for rows in (wanted, expected):
        for row in rows:
            if row.shape != (len(labels),):
                raise ModelError(f"{name} gives {row.numel()} logits for {len(labels)} labels")
    for row, exact, encoded in zip(expected, wanted, probes.all, strict=True):
        for label, number, in_fp32 in zip(labels, row.tolist(), exact.tolist(), strict=True):
            if number - number != 0:  # NaN, or infinity
                in_range = settings.dtype != "fp32" and in_fp32 - in_fp32 == 0
                remedy = "try --dtype fp32" if in_range else "train it again, or give another model"
                raise ModelError(
                    f"{name} gives {number} as the logit of {label} for a text of {len(encoded.ids)} tokens in "
                    f"{settings.dtype}, which is no reward; {remedy}"
                )
    of_words = torch.stack([row for row, probe in zip(wanted, probes.all, strict=True) if probe in probes.words])
    spread = of_words.amax(0) - of_words.amin(0)
    dead = [label for label, size in zip(labels, (spread / _scale(of_words)).tolist(), strict=True) if size <= ALIKE]
    if len(of_words) > 1 and (len(dead) == len(labels) or settings.label in dead):
        raise ModelError(
            f"{name} gives different words the same score ({', '.join(dead)}: {of_words[0].tolist()}), so it can't be "
            "trained or its tokenizer is another model's; give a trained model with its own tokenizer"
        )


def _check_padding_token(name: str, plain: ReferenceModel, probes: Probes, loaded: Loaded) -> None:
    """Refuse a padding token that the tokenizer puts into every text: the model would ignore part of each text."""
    probe, pad_id = probes.words[0], loaded.pad_id
    if pad_id is None or pad_id not in probe.ids or "attention_mask" not in loaded.takes:
        return
    if _apart([plain(probe, with_mask=False)], [plain(probe)]) > ROUNDING:
        token = loaded.tokenizer.convert_ids_to_tokens(pad_id)
        raise ModelError(
            f"{name} takes {token!r} for padding (pad_token_id {pad_id} in config.json), which its tokenizer puts into "
            f"every text; write the tokenizer's own padding token there ({loaded.tokenizer.pad_token_id})"
        )


def _service_scores(subject: ScorerUnderTest, probes: Probes, settings: Settings) -> list[list[torch.Tensor]]:
    """The service's scores of all probes: alone, and in the batches that the service itself would form."""

    def score(batch: Sequence[Encoded], replica: int = 0) -> list[torch.Tensor]:
        return [torch.tensor(row, dtype=torch.float64) for row in subject.score(batch, replica)]

    alone = [score([encoded])[0] for encoded in probes.all]
    together = score(probes.short)
    if subject.batching == "packed":
        companions = probes.short
    else:
        companions = probes.short[-max(0, settings.batch_tokens // len(probes.longest.ids) - 1) :][-3:]
        if 2 * len(probes.longest.ids) > settings.batch_tokens:
            companions = []
    with_longest = score([probes.longest, *companions]) if companions else [alone[0]]
    beside_it = dict(zip(map(id, companions), with_longest[1:], strict=True))
    mixed = [beside_it.get(id(encoded), row) for encoded, row in zip(probes.short, together, strict=True)]
    elsewhere = [[with_longest[0], *score(probes.short, replica)] for replica in range(1, subject.replicas)]
    return [alone, [with_longest[0], *together], [with_longest[0], *mixed], *elsewhere]


def _beside_double(
    plain: ReferenceModel,
    loaded: Loaded,
    probes: Probes,
    expected: Sequence[torch.Tensor],
    got: Sequence[Sequence[torch.Tensor]],
    otherwise: tuple[float, float],
) -> tuple[float, float]:
    """The service's distance from double precision, and twice the reference's: deep models round more."""
    if _apart(plain.scores(probes.all), expected) > EXACT:
        return otherwise  # the reference itself is not deterministic
    try:
        exact = plain.in_precision(torch.float64, loaded).scores(probes.all)
    except Exception:  # not every operation exists in double precision
        return otherwise
    return max(_apart(rows, exact) for rows in got), max(EXACT, 2 * _apart(expected, exact))


def _apart(rows: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest difference of any logit, relative to the text's largest logit if that is above 1."""
    shares = [((row - right).abs().max() / _scale(right)).item() for row, right in zip(rows, wanted, strict=True)]
    return max(share if share == share else float("inf") for share in shares)


def _scale(logits: torch.Tensor) -> float:
    return max(1.0, logits.abs().max().item())
