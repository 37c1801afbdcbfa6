"""Best of n: of several sampled texts, those that a judge likes best."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plaudit.classic.arguments import generation_arguments
from plaudit.classic.core import set_seed
from plaudit.errors import ConfigError


class BestOfNSampler:
    """Samples `sample_size` texts for each query and keeps the `n_candidates` with the highest scores."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        queries_to_scores: Callable[[list[str]], Sequence[Any]],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: Any = None,
    ) -> None:
        """`model` has `generate`; `queries_to_scores` scores texts; `length_sampler` draws a query's new tokens.

        Raises:
            ConfigError: more candidates are wanted than texts are sampled.
        """
        if not 1 <= n_candidates <= sample_size:
            raise ConfigError(f"n_candidates={n_candidates} must be from 1 to sample_size={sample_size}")
        if seed is not None:
            set_seed(seed)
        self.model = model
        self.tokenizer = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.gen_config = generation_config
        self.sample_size = sample_size
        self.n_candidates = n_candidates

    @torch.no_grad()
    def generate(
        self,
        tokenized_query: Tensor | Sequence[Any],
        skip_special_tokens: bool = True,
        device: int | str | torch.device | None = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """The best texts for each query, best first, prompts included.

        `tokenized_query` is one query (a tensor [Q] or a list of numbers) or a list of them.
        """
        chosen = []
        options = generation_arguments(generation_kwargs)
        for query in _queries(tokenized_query):
            output = self.model.generate(
                input_ids=query.to(self.model.device if device is None else device).repeat(self.sample_size, 1),
                max_new_tokens=int(self.length_sampler()),
                generation_config=self.gen_config,
                **options,
            )
            texts = self.tokenizer.batch_decode(output, skip_special_tokens=skip_special_tokens)
            scores = torch.tensor([float(score) for score in self.queries_to_scores(texts)])
            chosen.append([texts[i] for i in scores.topk(self.n_candidates).indices.tolist()])
        return chosen


def _queries(given: Tensor | Sequence[Any]) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given] if given.ndim == 1 else list(given)
    if len(given) > 0 and isinstance(given[0], int):
        return [torch.tensor(given)]
    return [torch.as_tensor(query).reshape(-1) for query in given]
