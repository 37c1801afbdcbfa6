"""`PPOTrainer.generate`: responses to one query or to many, and a memory of how each response was drawn.

The classic trainer's step took the log-probabilities of the plain distribution, however a response was sampled. Here
`step` asks `Drawn`, so that they are those of the distribution which the response came from.

Failure modes: a response of another query, or tokens of a query taken for a response.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plaudit.classic.arguments import generation_arguments
from plaudit.policy.generation import Draws, generate
from plaudit.policy.texts import end_tokens
from plaudit.settings.policy import GenerationSettings

PLAIN = GenerationSettings()
"""Sampling from the model's own distribution, and what responses that nobody here drew are taken for."""
KEPT_BATCHES = 16
"""Of so many batches of responses it is remembered how they were drawn."""
OWN_ARGUMENTS = {
    *("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "min_length", "min_new_tokens"),
    *("pad_token_id", "eos_token_id", "bos_token_id", "use_cache", "num_beams", "num_return_sequences"),
}
"""Arguments of `generate` that leave the sampled distribution as temperature, top-k and top-p describe it."""


def settings_of(model: Any, arguments: Mapping[str, Any]) -> GenerationSettings | None:
    """The distribution that `model.generate(**arguments)` samples from; None if these settings cannot describe it.

    Greedy and beam search have none, nor have penalties and other processors of logits.
    """
    config = copy.deepcopy(arguments.get("generation_config") or model.generation_config)
    config.update(**{name: value for name, value in arguments.items() if name != "generation_config"})
    unknown = {n for n, value in arguments.items() if value is not None} - OWN_ARGUMENTS - {"generation_config"}
    plain = (
        not unknown
        and bool(config.do_sample)
        and (config.num_beams or 1) == 1
        and (config.num_return_sequences or 1) == 1
        and (config.min_length or 0) <= 0
        and not config.min_new_tokens
        and config.repetition_penalty in (None, 1.0)
        and not config.no_repeat_ngram_size
        and config.typical_p in (None, 1.0)
        and not config.bad_words_ids
    )
    if not plain:
        return None
    return GenerationSettings(
        temperature=1.0 if config.temperature is None else float(config.temperature),
        top_k=50 if config.top_k is None else int(config.top_k),  # transformers' own default
        top_p=1.0 if config.top_p is None else float(config.top_p),
    )


def respond(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    lengths: Sequence[int] | None,
    arguments: Mapping[str, Any],
    *,
    cut_at_end: bool,
) -> list[Tensor]:
    """A response to each query, all in one batch, without its prompt, up to and with the first end of text.

    That is `eos_token_id`, if it is among the arguments; `cut_at_end` cuts at the tokenizer's too, as the classic
    trainer did to a list of queries.

    `lengths` are the most tokens that each response may have, in place of `max_new_tokens`. Sampling that temperature,
    top-k and top-p describe is Plaudit's own, whose rows stop as they end; anything else is transformers'.
    """
    settings = settings_of(model, arguments)
    ends = _end_tokens(model, tokenizer, arguments)
    if lengths is None and arguments.get("max_new_tokens") is not None:
        lengths = [int(arguments["max_new_tokens"])] * len(queries)
    if settings is not None and lengths is not None and ends is None:
        draws = Draws(torch.tensor(list(lengths)), torch.rand(len(queries), max(lengths), dtype=torch.float64))
        samples = generate(model, [query.tolist() for query in queries], draws, settings, tokenizer)
        rows = zip(samples.response_ids, samples.lengths[1].tolist(), strict=True)
        return [row[:length] for row, length in rows]
    ends = ends or _own_ends(model, tokenizer)
    if cut_at_end:
        ends = ends | _own_ends(model, tokenizer)
    return _by_transformers(model, tokenizer, queries, lengths, arguments, ends)


@torch.no_grad()
def _by_transformers(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    lengths: Sequence[int] | None,
    arguments: Mapping[str, Any],
    ends: set[int],
) -> list[Tensor]:
    device, width = model.device, max(len(query) for query in queries)
    options = generation_arguments(arguments)
    options.setdefault("pad_token_id", tokenizer.pad_token_id)
    if lengths is not None:
        options["max_new_tokens"] = max(lengths)
    rows = [
        torch.cat([query.new_full((width - len(query),), options["pad_token_id"] or 0), query]) for query in queries
    ]
    mask = [torch.arange(width) >= width - len(query) for query in queries]
    output = model.generate(
        input_ids=torch.stack(rows).to(device), attention_mask=torch.stack(mask).long().to(device), **options
    )
    answers = []
    for i, row in enumerate(output):
        answer = row[width : None if lengths is None else width + lengths[i]]
        ended = torch.isin(answer, torch.tensor(sorted(ends), device=device)).nonzero()
        answers.append(answer if len(ended) == 0 else answer[: int(ended[0]) + 1])
    return answers


def _own_ends(model: Any, tokenizer: Any) -> set[int]:
    return set(end_tokens(model, tokenizer))


def _end_tokens(model: Any, tokenizer: Any, arguments: Mapping[str, Any]) -> set[int] | None:
    """The end-of-text tokens that the arguments name, if they are others than the model's."""
    if "eos_token_id" not in arguments:
        return None
    named = arguments["eos_token_id"]
    ends = set(named) if isinstance(named, list | tuple) else {named}
    return None if ends == _own_ends(model, tokenizer) else ends


@dataclass(frozen=True)
class _Answer:
    tokens: tuple[int, ...]
    settings: GenerationSettings


class Drawn:
    """How the latest responses were drawn, by their queries."""

    def __init__(self, capacity: int) -> None:
        """Remembers `capacity` responses at most, the latest."""
        self._capacity = capacity
        self._answers: OrderedDict[tuple[int, ...], list[_Answer]] = OrderedDict()
        self._count = 0

    def remember(self, query: Tensor, response: Tensor, settings: GenerationSettings) -> None:
        """That `response` is to `query`, and was drawn so."""
        key = tuple(query.tolist())
        self._answers.setdefault(key, []).append(_Answer(tuple(response.tolist()), settings))
        self._answers.move_to_end(key)
        self._count += 1
        while self._count > self._capacity:
            _, forgotten = self._answers.popitem(last=False)
            self._count -= len(forgotten)

    def forget(self) -> None:
        """Everything: a step has taken the responses."""
        self._answers.clear()
        self._count = 0

    def match(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> tuple[list[Tensor], GenerationSettings]:
        """The responses of a step as they were drawn, and the distribution that all of them came from.

        A response that begins with the end of its query (programs cut `output[-length:]`, and the end of text came
        early) is given back without those tokens. Responses that were not drawn here, or not all in one way, are taken
        to come from the model's plain distribution.
        """
        own, found = list(responses), []
        cut = 0
        for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
            prompt, tokens = tuple(query.tolist()), tuple(response.tolist())
            for answer in reversed(self._answers.get(prompt, [])):
                if answer.tokens[: len(tokens)] == tokens:
                    found.append(answer.settings)
                    break
                surplus = len(tokens) - len(answer.tokens)
                if surplus > 0 and (prompt + answer.tokens)[-len(tokens) :] == tokens:
                    own[i] = response[surplus:]
                    cut += 1
                    found.append(answer.settings)
                    break
        if cut:
            warnings.warn(
                f"{cut} of {len(own)} responses began with tokens of their queries, since they ended early; the step "
                "leaves those out. Generate with return_prompt=False",
                stacklevel=3,
            )
        if len(found) == len(own) and len(set(found)) == 1:
            return own, found[0]
        return own, PLAIN
