"""Sampling with fixed shapes, so that a GPU replays one CUDA graph for each token.

For small models, launching kernels from Python takes longer than running them. Here the key-value cache has its final
size from the start, finished rows stay in the batch, and the host reads nothing for a token, so one token is one graph.
Failure modes: samples that differ from `generation.generate`; a graph that uses weights of an earlier step. Weights are
therefore only changed in place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from plaudit.policy.endings import StopStrings
from plaudit.policy.generation import Draws, sample_tokens
from plaudit.policy.packing import additive, attention_dtype, takes_own_mask
from plaudit.policy.samples import Samples
from plaudit.policy.texts import end_tokens
from plaudit.policy.tokenizer import Tokenizer
from plaudit.settings.policy import GenerationSettings

QUERY_TOKENS = 8
"""Queries are padded to a multiple of this, to limit the number of shapes and graphs."""
LOGITS_AGREE_WITHIN = 0.1
"""Of their standard deviation. Half precision rounds to a hundredth of it; a wrong position or mask is far beyond."""
LOOK_EVERY = 16
"""Tokens between checks whether all rows have ended; each check synchronises with the device."""


class StaticGenerator:
    """`generate` for one model that `supports` it, as it is when first called: same adapters, same device."""

    def __init__(self, model: PreTrainedModel, settings: GenerationSettings, tokenizer: Tokenizer) -> None:
        self._model, self._settings, self._tokenizer = model, settings, tokenizer
        self._decoders: dict[int, Decoder] = {}

    @torch.no_grad()
    def __call__(self, queries: Sequence[Sequence[int]], draws: Draws) -> Samples:
        """One response for each query; what `plaudit.policy.generation.generate` gives."""
        self._model.eval()
        device = next(self._model.parameters()).device
        samples = Samples.from_lists(queries, [[0]] * len(queries), self._tokenizer.pad_token_id, device)
        width = -(-samples.query_ids.shape[1] // QUERY_TOKENS) * QUERY_TOKENS
        stop = StopStrings(self._tokenizer, self._settings.stop)
        looked_at = [0] * len(queries)

        def stopped(tokens: Tensor, written: Tensor) -> Tensor:
            """After how many tokens each row completes a stop string, [B]; more than there are if it does not yet."""
            found = []
            for row, (response, length) in enumerate(zip(tokens.tolist(), written.tolist(), strict=True)):
                first = stop.first(queries[row], response[:length], looked_at[row])
                looked_at[row] = length if first is None else first - 1
                found.append(tokens.shape[1] + 1 if first is None else first)
            return torch.tensor(found, device=device)

        tokens, written = self._decoder(len(queries), width).decode(samples, draws, stopped if stop else None)
        unwritten = torch.arange(tokens.shape[1], device=device) >= written.unsqueeze(1)
        return samples.answered(tokens.masked_fill(unwritten, self._tokenizer.pad_token_id), written)

    def _decoder(self, rows: int, width: int) -> "Decoder":
        """The one for so many queries, wide enough. One is kept for each number of rows, since each holds a cache."""
        decoder = self._decoders.get(rows)
        if decoder is None or decoder.width < width:
            self._decoders.pop(rows, None)
            ends = end_tokens(self._model, self._tokenizer)
            decoder = Decoder(self._model, self._settings, rows, width, ends=ends)
            self._decoders[rows] = decoder
        return decoder


@torch.no_grad()
def supports(model: PreTrainedModel) -> bool:
    """Whether the model generates with fixed shapes: three tokens are tried, since no attribute tells.

    Call it as the model will be used, inside `Policy.generating`. On a GPU the graph is really recorded and replayed,
    and its logits must be those of a plain pass over the same tokens. 8-bit layers look at their inputs on the host,
    which a recorded graph can't do.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        return False
    if not takes_own_mask(model):
        return False
    settings = GenerationSettings(min_new_tokens=3, max_new_tokens=3)
    queries, device = [[1, 2, 1], [2]], next(model.parameters()).device
    samples = Samples.from_lists(queries, [[0]] * len(queries), 0, device)
    decoder = Decoder(model, settings, len(queries), 4, ends=[])
    try:
        tokens, _ = decoder.decode(samples, Draws.of(settings, len(queries), seed=0, step=0))
    except (RuntimeError, TypeError, ValueError):
        return False
    plain = [
        model(input_ids=torch.tensor([query + row[:-1]], device=device), use_cache=False).logits[0, -1].float()
        for query, row in zip(queries, tokens.tolist(), strict=True)
    ]
    difference = decoder.logits.float() - torch.stack(plain)
    return bool(difference.abs().max() <= LOGITS_AGREE_WITHIN * torch.stack(plain).std())


class _Cache(StaticCache):  # type: ignore[misc]
    """Keys and values in one number format. Under autocast, rotary positions leave keys in fp32 and values are half."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Attention would round the keys to the same format, one token later.
        states: tuple[Tensor, Tensor] = super().update(
            key_states.to(value_states.dtype), value_states, layer_idx, *args, **kwargs
        )
        return states


class Decoder:
    """Everything a token reads and writes, at fixed addresses, for B queries of up to Q tokens."""

    def __init__(
        self, model: PreTrainedModel, settings: GenerationSettings, rows: int, width: int, *, ends: Sequence[int]
    ) -> None:
        self._model, self._settings, self.width = model, settings, width
        steps, device = settings.max_new_tokens, next(model.parameters()).device
        self._ends = torch.tensor(ends, dtype=torch.long, device=device)
        self._cache = _Cache(config=model.config, max_cache_len=width + steps)
        self._mask = torch.zeros(rows, 1, 1, width + steps, dtype=attention_dtype(model), device=device)
        """0 on the cells that are seen, -inf elsewhere."""
        self._last = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._uniforms = torch.zeros(rows, steps, dtype=torch.float64, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._step = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._tokens = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self._written = torch.zeros(rows, dtype=torch.long, device=device)
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, 0, device=device)
        """[B, V] that the newest token was drawn from."""
        self._graph: torch.cuda.CUDAGraph | None = None

    def decode(
        self, samples: Samples, draws: Draws, stopped: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, T], with anything behind a row's end, and how many of them count, [B].

        `stopped` is given the tokens so far and how many count, and gives for each row how many really count: fewer
        or equal where it has ended by what only the host can see. Tokens behind an end change nothing, so it is asked
        now and then.
        """
        self.prefill(samples, draws)
        if self._mask.is_cuda and self._graph is None and self._settings.max_new_tokens > 1:
            self._graph = self._record()
            # Where every replay leaves them.
            self._graph_logits = self.logits
            self.prefill(samples, draws)
        advance = self.advance if self._graph is None else self._graph.replay
        for step in range(1, int(draws.lengths.max())):
            if step % LOOK_EVERY == 0:
                self._stop_where(stopped)
                if bool(self._ended.all()):
                    break
            advance()
        self._stop_where(stopped)
        if self._graph is not None:
            self.logits = self._graph_logits
        return self._tokens, self._written

    def _stop_where(self, stopped: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        if stopped is not None:
            lengths = stopped(self._tokens, self._written)
            self._ended.logical_or_(lengths <= self._written)
            self._written.copy_(torch.minimum(self._written, lengths))

    def prefill(self, samples: Samples, draws: Draws) -> None:
        """Reset the buffers, process the queries and sample the first token."""
        skip = self.width - samples.query_ids.shape[1]
        real = torch.nn.functional.pad(samples.query_mask, (skip, 0))
        ids = torch.nn.functional.pad(samples.query_ids, (skip, 0))
        if self._cache.is_initialized:
            self._cache.reset()
        for buffer in (self._step, self._written, self._ended):
            buffer.zero_()
        self._lengths.copy_(draws.lengths)
        self._uniforms.copy_(draws.uniforms)
        seen = torch.nn.functional.pad(real[:, None, None], (0, self._mask.shape[-1] - self.width))
        self._mask.copy_(additive(seen, self._mask.dtype))
        self._position.copy_(samples.query_lengths.unsqueeze(1) - 1)
        causal = torch.ones(self.width, seen.shape[-1], dtype=torch.bool, device=ids.device).tril()
        # A padding token sees itself: a softmax over nothing is no number.
        own = torch.eye(self.width, seen.shape[-1], dtype=torch.bool, device=ids.device)
        mask = additive((seen & causal) | own, self._mask.dtype)
        self._choose(self._logits(ids, mask, (real.cumsum(1) - 1).clamp(min=0)))

    def advance(self) -> None:
        """Sample one more token for every row, without device-to-host copies."""
        self._choose(self._logits(self._last, self._mask, self._position))

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]
        return self.logits

    def _choose(self, logits: Tensor) -> None:
        chosen = sample_tokens(logits, self._uniforms.gather(1, self._step).squeeze(1), self._settings)
        self._tokens.scatter_(1, self._step, chosen.unsqueeze(1))
        self._written.add_(~self._ended)
        self._ended.logical_or_((self._written >= self._lengths) | (chosen.unsqueeze(1) == self._ends).any(1))
        # The chosen token is read next; its keys and values go into the cell that is seen from now on.
        self._last.copy_(chosen.unsqueeze(1))
        self._position.add_(1)
        self._mask.view(len(chosen), -1).scatter_(1, self._step + self.width, 0.0)
        self._step.add_(1)

    def _record(self) -> torch.cuda.CUDAGraph:
        # Lazy initialisation must be over before the recording, on a stream of its own as the recording is.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a reward function, may use the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.advance()
        return graph
