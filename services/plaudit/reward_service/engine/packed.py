"""BERT-like encoders on a CPU without padding: a batch is one matrix with a row for each token.

Attention runs for each text alone. The classifier reads only the first token, so the last layer computes only that one.

Failure modes: a text's reward depends on the other texts of its batch, or differs from the one by transformers.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, gelu, layer_norm, linear

from plaudit.reward_service.private_apis import PrivateApi

_LAYER = (
    "Attention",
    "Embeddings",
    "Encoder",
    "Intermediate",
    "Layer",
    "Model",
    "Output",
    "SelfAttention",
    "SelfOutput",
)
_WITH_HEAD = (*_LAYER, "ClassificationHead", "ForSequenceClassification")
_FAMILIES = {
    "bert": ("Bert", (*_LAYER, "Pooler", "ForSequenceClassification")),
    "camembert": ("Camembert", _WITH_HEAD),
    "distilbert": (
        "",
        (
            *("Embeddings", "FFN", "Transformer", "TransformerBlock"),
            *("DistilBertForSequenceClassification", "DistilBertModel", "DistilBertSelfAttention"),
        ),
    ),
    "roberta": ("Roberta", _WITH_HEAD),
    "xlm-roberta": ("XLMRoberta", _WITH_HEAD),
}
"""The modules that `PackedEncoder` knows, by transformers' `model_type`. Their classifiers read the first token."""
_TORCH_PARTS = (nn.Dropout, nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.Tanh)
NUMBERED_FROM_PADDING = {"camembert", "roberta", "xlm-roberta"}
ROWS_AT_ONCE = 128
"""Rows of a layer's matrix products that are computed together: the intermediate results then stay in the CPU cache."""
ROWS_STEP = 16
"""Matrices are filled up to a multiple of this many rows, so that few shapes occur: oneDNN compiles each of them."""
INT8_MAX = 127
U8_ZERO = 128
TINY = 1e-12
"""The smallest scale, for rows of zeros."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] to [rows, out], bias included, and GELU where it was asked for."""


def can_pack(model: Any) -> bool:
    """Whether `PackedEncoder` can run this model: its family is known, and every module has exactly a known type.

    `PackedEncoder` reads the modules' weights and never calls the modules. A subclass, or an adapter around a layer,
    would therefore be ignored.
    """
    config = model.config
    if (
        config.model_type not in _FAMILIES
        or getattr(config, "is_decoder", False)
        or getattr(config, "position_embedding_type", "absolute") != "absolute"
    ):
        return False
    known = _known_types(config.model_type)
    called = {id(module) for path, module in model.named_modules() if _is_called(path)}
    return all(type(module) in known or id(module) in called for module in model.modules())


def _is_called(path: str) -> bool:
    """Whether the module is an activation: those are called as they are, so any type will do."""
    return path.rpartition(".")[2] in ("activation", "intermediate_act_fn")


def _known_types(family: str) -> set[type]:
    prefix, parts = _FAMILIES[family]
    names = [prefix + part for part in parts]
    folder = family.replace("-", "_")
    code = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return {*_TORCH_PARTS, *(getattr(code, name) for name in names if hasattr(code, name))}


@dataclass(frozen=True)
class _Norm:
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Layer:
    """One transformer layer. The last layer has a separate `query`, because it needs the query of few rows."""

    query_key_value: Product | None
    query: Product | None
    key_value: Product | None
    output: Product
    attention_norm: _Norm
    up: Product
    """The first product of the feed-forward network, with its activation."""
    down: Product
    output_norm: _Norm

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the layer, from its input `hidden` and the attention's output `attended`."""
        middle = self.attention_norm(self.output(attended).add_(hidden))
        return self.output_norm(self.down(self.up(middle)).add_(middle))


class PackedEncoder:
    """A sequence classifier that `can_pack`, with its weights in a new layout. It doesn't need the original model."""

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
        # These families count positions from the padding id on. A padding token in a text gets the padding position.
        self._padding = config.pad_token_id if config.model_type in NUMBERED_FROM_PADDING else None
        parts = [_parts(layer, config.model_type) for layer in _layers(base)]
        self._layers = [_layer(part, self._heads, product, last=part is parts[-1]) for part in parts]
        self._head = _head_of(model)

    @torch.inference_mode()
    def __call__(self, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None) -> torch.Tensor:
        """Logits [texts, labels]. No text may be empty."""
        ends = list(accumulate(map(len, ids)))
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        hidden = self._embed(ids, type_ids, _whole_steps(ends[-1]))
        for layer in self._layers[:-1]:
            hidden = self._through(layer, hidden, bounds)
        first = self._through_last(self._layers[-1], hidden, bounds)
        logits: torch.Tensor = self._head(first[: len(ids)])
        return logits

    def warm_up(self) -> None:
        """Compute a product of every shape once, so that no request waits for its compilation."""
        for rows in range(ROWS_STEP, ROWS_AT_ONCE + 1, ROWS_STEP):
            self([[0]] * rows, None)

    def _embed(self, ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None, rows: int) -> torch.Tensor:
        def flat(texts: Iterable[Sequence[int]]) -> torch.Tensor:
            numbers = torch.zeros(rows, dtype=torch.int64)
            joined = torch.tensor(list(chain.from_iterable(texts)))
            numbers[: len(joined)] = joined
            return numbers

        hidden = embedding(flat(ids), self._words)
        hidden += embedding(flat(map(self._places, ids)), self._positions)
        if self._types is not None:
            hidden += self._types[0] if type_ids is None else embedding(flat(type_ids), self._types)
        return self._embedding_norm(hidden)

    def _places(self, ids: Sequence[int]) -> Sequence[int]:
        padding = self._padding
        if padding is None:
            return range(len(ids))
        if padding not in ids:
            return range(padding + 1, padding + 1 + len(ids))
        counted = accumulate(token != padding for token in ids)
        return [padding if token == padding else padding + place for token, place in zip(ids, counted, strict=True)]

    def _through(self, layer: _Layer, hidden: torch.Tensor, bounds: list[tuple[int, int]]) -> torch.Tensor:
        assert layer.query_key_value is not None
        mixed = _in_pieces(layer.query_key_value, hidden)
        query, key, value = mixed.view(len(hidden), 3, self._heads, -1).unbind(1)
        return _in_pieces(layer.finish, hidden, _attention(query, key, value, bounds))

    def _through_last(self, layer: _Layer, hidden: torch.Tensor, bounds: list[tuple[int, int]]) -> torch.Tensor:
        """The last hidden state of each text's first token, [texts, size]."""
        assert layer.query is not None
        assert layer.key_value is not None
        first = hidden.new_zeros(_whole_steps(len(bounds)), hidden.shape[1])
        first[: len(bounds)] = hidden[[start for start, _ in bounds]]
        key, value = _in_pieces(layer.key_value, hidden).view(len(hidden), 2, self._heads, -1).unbind(1)
        query = _in_pieces(layer.query, first).view(len(first), self._heads, -1)
        return _in_pieces(layer.finish, first, _attention(query, key, value, bounds, one_query=True))


def _whole_steps(rows: int) -> int:
    return math.ceil(rows / ROWS_STEP) * ROWS_STEP


def _in_pieces(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`function` of all rows, in pieces of about the same size and at most `ROWS_AT_ONCE` rows."""
    rows = len(inputs[0])
    count = math.ceil(rows / ROWS_AT_ONCE)
    if count == 1:
        return function(*inputs)
    steps = rows // ROWS_STEP
    cuts = [steps * piece // count * ROWS_STEP for piece in range(1, count)]
    return torch.cat([function(*piece) for piece in zip(*(each.tensor_split(cuts) for each in inputs), strict=True)])


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[tuple[int, int]],
    *,
    one_query: bool = False,
) -> torch.Tensor:
    """Attention within each text: [rows, heads, size] in, [query rows, heads * size] out.

    Queries are already scaled. With `one_query`, `query` has one row for each text, otherwise as many as `key`.
    """
    attended = query.new_empty(query.shape)
    attended[len(bounds) if one_query else bounds[-1][1] :] = 0
    query, into = query.transpose(0, 1), attended.transpose(0, 1)
    keys, value = key.permute(1, 2, 0), value.transpose(0, 1)
    for index, (start, end) in enumerate(bounds):
        rows = slice(index, index + 1) if one_query else slice(start, end)
        weights = torch.bmm(query[:, rows], keys[:, :, start:end]).softmax(-1)
        into[:, rows] = torch.bmm(weights, value[:, start:end])
    return attended.flatten(1)


def _float_product(weight: torch.Tensor, bias: torch.Tensor, *, with_gelu: bool = False) -> Product:
    if PREPACKED_PRODUCT[weight.dtype].usable:
        return _prepacked_product(weight, bias, with_gelu=with_gelu)
    return lambda rows: gelu(linear(rows, weight, bias)) if with_gelu else linear(rows, weight, bias)


def _prepacked_product(weight: torch.Tensor, bias: torch.Tensor, *, with_gelu: bool = False) -> Product:
    """The same by oneDNN, with the weights converted to its own layout once instead of in every product."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    multiply = torch.ops.mkldnn._linear_pointwise
    # As inductor calls it: the last argument names the exact GELU.
    after, algorithm = ("gelu", "none") if with_gelu else ("none", "")
    return lambda rows: multiply(rows, packed, bias, after, [], algorithm)


def _check_prepacked_product(dtype: torch.dtype) -> None:
    """oneDNN's product of a small matrix must be that of plain torch, with GELU and without."""
    _require_onednn(dtype)
    numbers = torch.linspace(-1, 1, ROWS_STEP * 32 + 24 * 32 + 24).sin()
    rows, weight, bias = torch.split(numbers.to(dtype), [ROWS_STEP * 32, 24 * 32, 24])
    rows, weight = rows.view(ROWS_STEP, 32), weight.view(24, 32)
    for with_gelu in (False, True):
        exact = linear(rows.double(), weight.double(), bias.double())
        exact = gelu(exact) if with_gelu else exact
        apart = (_prepacked_product(weight, bias, with_gelu=with_gelu)(rows).double() - exact).abs().max().item()
        if not apart <= 32 * torch.finfo(dtype).eps:
            raise RuntimeError(f"a product in {dtype} is {apart:.1e} from the exact one (with_gelu={with_gelu})")


def _require_onednn(dtype: torch.dtype) -> None:
    """Raise where oneDNN is missing, or doesn't compute in this number format on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise RuntimeError("torch was built without oneDNN")
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype in supported and not supported[dtype]():
        raise RuntimeError(f"oneDNN has no {dtype} on this processor")


PREPACKED_PRODUCT = {
    dtype: PrivateApi(
        f"torch.ops.mkldnn._linear_pointwise in {dtype}",
        fallback="torch.nn.functional.linear",
        check=partial(_check_prepacked_product, dtype),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
"""By the number format of the weights."""


def _int8_product(weight: torch.Tensor, bias: torch.Tensor, *, with_gelu: bool = False) -> Product:
    """Dynamic int8: a scale for each output channel of the weights, and one for each row of the input.

    A row's result is independent of the other rows, and, because integer products are exact, of the batch's shape.
    """
    channel_scale = weight.abs().amax(dim=1).clamp_min(TINY) / INT8_MAX
    whole = (weight / channel_scale[:, None]).round().to(torch.int8)
    multiply = _fast_integers(whole, channel_scale) if INT8_PRODUCT.usable else _slow_integers(whole, channel_scale)

    def product(rows: torch.Tensor) -> torch.Tensor:
        row_scale = rows.abs().amax(dim=1, keepdim=True).clamp_min_(TINY).div_(INT8_MAX)
        result = multiply((rows * row_scale.reciprocal()).round_().to(torch.int8))
        result.mul_(row_scale).add_(bias)
        return gelu(result) if with_gelu else result

    return product


def _fast_integers(whole: torch.Tensor, channel_scale: torch.Tensor) -> Product:
    """int8 rows times `whole`, then the channels' scales, by oneDNN."""
    packed = torch.ops.onednn.qlinear_prepack(whole, None)
    no_shift = torch.zeros(len(whole), dtype=torch.int32)
    multiply = torch.ops.onednn.qlinear_pointwise

    def product(rows: torch.Tensor) -> torch.Tensor:
        # oneDNN is fast only for unsigned input. Flipping the sign bit adds 128, which is the zero point.
        unsigned = rows.view(torch.uint8).bitwise_xor(U8_ZERO)
        result: torch.Tensor = multiply(
            unsigned, 1.0, U8_ZERO, packed, channel_scale, no_shift, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    return product


def _slow_integers(whole: torch.Tensor, channel_scale: torch.Tensor) -> Product:
    """The same in floats, which hold these integers exactly, where oneDNN's int8 products are missing or inexact."""
    floats = whole.float()
    return lambda rows: linear(rows.float(), floats).mul_(channel_scale)


def _check_exact_int8() -> None:
    """oneDNN's integers must be exact. Without VNNI, sums of two products may saturate at 16 bits."""
    _require_onednn(torch.int8)
    largest = torch.full((ROWS_STEP, 64), INT8_MAX, dtype=torch.int8)
    product = _fast_integers(largest, torch.ones(ROWS_STEP))(largest)
    if not torch.equal(product, torch.full_like(product, 64.0 * INT8_MAX**2)):
        raise RuntimeError("oneDNN's int8 products are not exact on this processor")


INT8_PRODUCT = PrivateApi(
    "torch.ops.onednn.qlinear_pointwise", fallback="the same integers in floats", check=_check_exact_int8
)


@dataclass(frozen=True)
class _Scaled:
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class _Parts:
    """The modules of a layer by their function; each family has its own names for them."""

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


def _layer(parts: _Parts, heads: int, product: Callable[..., Product], *, last: bool) -> _Layer:
    def of(*modules: Any) -> Product:
        return product(*joined(modules))

    def joined(modules: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.cat([module.weight for module in modules]).detach()
        return weight, torch.cat([module.bias for module in modules]).detach()

    scale = (parts.query.out_features // heads) ** -0.5
    query = _Scaled(parts.query.weight * scale, parts.query.bias * scale)
    activation = parts.activation
    fused = _is_gelu(activation)
    plain_up = product(*joined([parts.up]), with_gelu=fused)
    return _Layer(
        query_key_value=None if last else of(query, parts.key, parts.value),
        query=of(query) if last else None,
        key_value=of(parts.key, parts.value) if last else None,
        output=of(parts.output),
        attention_norm=_norm(parts.attention_norm),
        up=plain_up if fused else lambda rows: activation(plain_up(rows)),
        down=of(parts.down),
        output_norm=_norm(parts.output_norm),
    )


def _is_gelu(activation: Product) -> bool:
    """Whether it is the exact GELU, which oneDNN can fuse with a product."""
    probe = torch.linspace(-4, 4, 101)
    return torch.equal(activation(probe), gelu(probe))


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
