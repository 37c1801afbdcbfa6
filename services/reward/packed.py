"""BERT-like encoders on a CPU without padding: a batch is one matrix with a row for each token; no text sees another.

Only the first token is read after the last layer, so that layer works out nothing else. Wrong here would be a text
whose reward depends on its company, or one that differs from what transformers says of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch.nn.functional import embedding, layer_norm, linear, scaled_dot_product_attention

FAMILIES = {"bert", "camembert", "distilbert", "roberta", "xlm-roberta"}
"""Encoders whose classifier reads the first token. The names are transformers' `model_type`."""
NUMBERED_FROM_PADDING = {"camembert", "roberta", "xlm-roberta"}
ROWS_AT_ONCE = 256
"""Tokens that go through a feed-forward together: what lies between its two products then stays in the cache."""

INT8_MAX = 127
TINY = 1e-12
"""Keeps a row of zeros from a scale of zero."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] to [rows, out], bias included."""


def can_pack(config: Any) -> bool:
    """Whether `PackedEncoder` runs this model."""
    return (
        config.model_type in FAMILIES
        and not getattr(config, "is_decoder", False)
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
    )


@dataclass(frozen=True)
class _Norm:
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Layer:
    """One transformer layer. In the last one `query` stands alone, because few rows want it."""

    query_key_value: Product | None
    query: Product | None
    key_value: Product | None
    output: Product
    attention_norm: _Norm
    up: Product
    activation: Product
    down: Product
    output_norm: _Norm


class PackedEncoder:
    """A sequence classifier of one of `FAMILIES`, its weights laid out anew; the model it is made from may go."""

    def __init__(self, model: Any, *, int8: bool = False) -> None:
        config = model.config
        product = _int8_product if int8 else _float_product
        base = model.base_model
        embeddings = base.embeddings
        self._words = embeddings.word_embeddings.weight.detach()
        self._positions = embeddings.position_embeddings.weight.detach()
        types = getattr(embeddings, "token_type_embeddings", None)
        self._types = None if types is None else types.weight.detach()
        self._embedding_norm = _norm(embeddings.LayerNorm)
        self._heads = config.num_attention_heads
        # These number their positions from the padding id on, and a padding token within a text has no position.
        self._padding = config.pad_token_id if config.model_type in NUMBERED_FROM_PADDING else None
        parts = [_parts(layer, config.model_type) for layer in _layers(base)]
        self._layers = [_layer(part, product, last=part is parts[-1]) for part in parts]
        self._head = _head_of(model)

    @torch.inference_mode()
    def __call__(self, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None) -> torch.Tensor:
        """Logits [texts, labels] in the order of `ids`. No text may be empty."""
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        lengths = [len(ids[index]) for index in order]
        hidden = self._embed(
            [ids[index] for index in order], None if type_ids is None else [type_ids[index] for index in order]
        )
        for layer in self._layers[:-1]:
            hidden = self._through(layer, hidden, lengths)
        logits = self._head(self._through_last(self._layers[-1], hidden, lengths))
        return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)

    def _embed(self, ids: list[Sequence[int]], type_ids: list[Sequence[int]] | None) -> torch.Tensor:
        flat = torch.tensor([token for text in ids for token in text])
        hidden = embedding(flat, self._words)
        hidden += embedding(torch.tensor([place for text in ids for place in self._places(text)]), self._positions)
        if self._types is not None:
            hidden += (
                self._types[0]
                if type_ids is None
                else embedding(torch.tensor([kind for text in type_ids for kind in text]), self._types)
            )
        return self._embedding_norm(hidden)

    def _places(self, ids: Sequence[int]) -> Sequence[int]:
        padding = self._padding
        if padding is None:
            return range(len(ids))
        if padding not in ids:
            return range(padding + 1, padding + 1 + len(ids))
        counted = accumulate(token != padding for token in ids)
        return [padding if token == padding else padding + place for token, place in zip(ids, counted, strict=True)]

    def _through(self, layer: _Layer, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        assert layer.query_key_value is not None
        query, key, value = layer.query_key_value(hidden).view(len(hidden), 3, self._heads, -1).unbind(1)
        return self._finish(layer, hidden, _attention(query, key, value, lengths))

    def _through_last(self, layer: _Layer, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        assert layer.query is not None
        assert layer.key_value is not None
        firsts = torch.tensor([0, *accumulate(lengths[:-1])])
        first = hidden[firsts]
        key, value = layer.key_value(hidden).view(len(hidden), 2, self._heads, -1).unbind(1)
        query = layer.query(first).view(len(first), self._heads, -1)
        return self._finish(layer, first, _attention(query, key, value, lengths, queries=1))

    def _finish(self, layer: _Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows attention, in pieces of `ROWS_AT_ONCE`."""
        done = torch.empty_like(hidden)
        for start in range(0, len(hidden), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            middle = layer.attention_norm(layer.output(attended[rows]).add_(hidden[rows]))
            done[rows] = layer.output_norm(layer.down(layer.activation(layer.up(middle))).add_(middle))
        return done


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], queries: int | None = None
) -> torch.Tensor:
    """Attention of each text to itself alone: [rows, heads, size] in, [query rows, heads * size] out.

    `lengths` are in ascending order, so that texts of one length are neighbours and share a call. `queries` is how many
    rows of `query` a text has, its length unless given.
    """
    attended = query.new_empty(query.shape)
    start = query_start = 0
    for length, count in _runs(lengths):
        wanted = queries or length
        end, query_end = start + count * length, query_start + count * wanted
        inputs = (
            query[query_start:query_end].view(count, wanted, *query.shape[1:]).transpose(1, 2),
            key[start:end].view(count, length, *key.shape[1:]).transpose(1, 2),
            value[start:end].view(count, length, *value.shape[1:]).transpose(1, 2),
        )
        result = scaled_dot_product_attention(*inputs).transpose(1, 2)
        attended[query_start:query_end].view(count, wanted, *query.shape[1:]).copy_(result)
        start, query_start = end, query_end
    return attended.flatten(1)


def _runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    for length, same in groupby(lengths):
        yield length, sum(1 for _ in same)


def _float_product(weight: torch.Tensor, bias: torch.Tensor) -> Product:
    return lambda rows: linear(rows, weight, bias)


def _int8_product(weight: torch.Tensor, bias: torch.Tensor) -> Product:
    """Weights with a scale for each output channel, inputs with one for each row: no row knows of another.

    The integers' product is exact, so a row's result doesn't depend on the shape of the batch either.
    """
    channel_scale = weight.abs().amax(dim=1).clamp_min(TINY) / INT8_MAX
    whole = (weight / channel_scale[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(whole, None)
    no_shift = torch.zeros(len(weight), dtype=torch.int32)

    def product(rows: torch.Tensor) -> torch.Tensor:
        row_scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(TINY) / INT8_MAX
        quantised = (rows / row_scale).round_().to(torch.int8)
        result = torch.ops.onednn.qlinear_pointwise(
            quantised, 1.0, 0, packed, channel_scale, no_shift, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(bias, result, row_scale)

    return product


@dataclass(frozen=True)
class _Parts:
    """The modules of a layer by what they do; families name them differently."""

    query: Any
    key: Any
    value: Any
    output: Any
    attention_norm: Any
    up: Any
    activation: Any
    down: Any
    output_norm: Any


def _layers(base: Any) -> Any:
    return base.transformer.layer if hasattr(base, "transformer") else base.encoder.layer


def _parts(layer: Any, family: str) -> _Parts:
    if family == "distilbert":
        attention, feed = layer.attention, layer.ffn
        return _Parts(
            attention.q_lin,
            attention.k_lin,
            attention.v_lin,
            attention.out_lin,
            layer.sa_layer_norm,
            feed.lin1,
            feed.activation,
            feed.lin2,
            layer.output_layer_norm,
        )
    attention, output = layer.attention.self, layer.attention.output
    return _Parts(
        attention.query,
        attention.key,
        attention.value,
        output.dense,
        output.LayerNorm,
        layer.intermediate.dense,
        layer.intermediate.intermediate_act_fn,
        layer.output.dense,
        layer.output.LayerNorm,
    )


def _layer(parts: _Parts, product: Callable[..., Product], *, last: bool) -> _Layer:
    def of(*modules: Any) -> Product:
        weight = torch.cat([module.weight for module in modules]).detach()
        return product(weight, torch.cat([module.bias for module in modules]).detach())

    return _Layer(
        query_key_value=None if last else of(parts.query, parts.key, parts.value),
        query=of(parts.query) if last else None,
        key_value=of(parts.key, parts.value) if last else None,
        output=of(parts.output),
        attention_norm=_norm(parts.attention_norm),
        up=of(parts.up),
        activation=parts.activation,
        down=of(parts.down),
        output_norm=_norm(parts.output_norm),
    )


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight.detach(), module.bias.detach(), module.eps)


def _head_of(model: Any) -> Product:
    """Logits [texts, labels] from the first tokens' hidden states."""
    family, classifier = model.config.model_type, model.classifier
    if family == "distilbert":
        before = model.pre_classifier
        return lambda first: classifier(torch.relu(before(first)))
    if family == "bert":
        pooler = model.bert.pooler
        return lambda first: classifier(pooler(first.unsqueeze(1)))
    return lambda first: classifier(first.unsqueeze(1))  # the RoBERTa families' head pools on its own
