"""The policy: a causal language model with a value head, and the reference it is held to.

Failure modes: a log-probability that depends on padding; a reference that is the policy itself.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plaudit.errors import ConfigError
from plaudit.policy.packing import (
    SMALL_MODEL,
    ModelInput,
    attention_dtype,
    packed,
    padded,
    takes_own_mask,
    worth_packing,
)
from plaudit.policy.response_logits import (
    ResponseLogits,
    apply_head,
    computing_in,
    ends_with_its_head,
    in_pieces,
    probe_samples,
    response_logits,
    same_logits,
    token_statistics,
)
from plaudit.policy.samples import Samples
from plaudit.policy.transformer import bare, disable_dropout, fuse_activations, head_of, numel
from plaudit.policy.value_model import same_states, value_states
from plaudit.ppo import distributions, kl
from plaudit.settings.policy import LOGITS_MIB

PIECES = 8
"""A piece of the response tokens has at most this part of `logits_mib`."""


@dataclass(frozen=True)
class ResponseOutputs:
    """What one forward pass says about each response token; 0 on padding."""

    logprobs: Tensor
    """[B, T] fp32, of the tokens that were sampled, under the distribution that was sampled from."""
    values: Tensor
    """[B, T] fp32, of the state before each token."""
    entropy: Tensor
    """[B, T] fp32, of the distribution each token was drawn from."""


class Policy(nn.Module):
    """A causal language model, adapters if it has any, and a value head.

    The reference is the same model with its adapters off, or `reference` when every parameter learns. Dropout is
    switched off in the model for good: with it, the ratio would compare two different networks, and the classic
    trainer's updates had none either. `train()` therefore changes only what gradient checkpointing looks at.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reference: nn.Module | None = None,
        value_model: nn.Module | None = None,
        autocast: torch.dtype | None = None,
        logits_mib: float = LOGITS_MIB,
        value_head: bool = True,
    ) -> None:
        """`model` is any Hugging Face causal LM, bare or as a `peft.PeftModel`; `autocast` the dtype of its passes.

        `value_model` is a headless transformer of its own for the values, or such a one with adapters (`value_model`);
        without it they share the policy's. Response
        tokens whose logits take more than `logits_mib` go through the output head in pieces. Without a `value_head`,
        for advantages that need no critic, all values are 0.
        """
        super().__init__()
        self.model: Any = model
        self.value_model: Any = value_model
        head = head_of(model)
        width = head.in_features if value_model is None else bare(value_model).config.hidden_size
        self.v_head: Any = None
        if value_head:
            self.v_head = nn.Linear(width, 1, dtype=torch.float32, device=head.weight.device)
            nn.init.zeros_(self.v_head.weight)
            nn.init.zeros_(self.v_head.bias)
        self.autocast = autocast
        # BLOOM, MPT and others read positions off the attention mask and take none.
        self._takes_positions = "position_ids" in inspect.signature(self.language_model.forward).parameters
        self._parameter_count = sum(map(numel, self.model.parameters()))
        disable_dropout(self)
        # Not a submodule: it must neither be trained, nor saved, nor wrapped with the policy.
        self._reference: list[Any] = []
        if self._fuses_activations:
            fuse_activations(self)
        self._logits_mib, self._vocabulary = logits_mib, int(getattr(head, "out_features", head.weight.shape[0]))
        self._rows = max(1, int(2**20 * logits_mib / PIECES / (4 * self._vocabulary)))
        self._takes_own_mask = self._packs = self._head_is_last = False
        if self.device.type != "meta":
            self._try_forms_of_input()
        self._last_input: tuple[Samples, ModelInput] | None = None
        if reference is not None:
            self.use_reference(reference)

    def _try_forms_of_input(self) -> None:
        """Which forms of input give the same logits and values. The models are asked, not believed."""
        probe, positions = probe_samples(self.device), self._takes_positions
        plain = padded(probe, takes_positions=positions)

        def agrees(other: ModelInput) -> bool:
            return same_logits(self.model, plain, other, autocast=self.autocast) and (
                self.value_model is None or same_states(self.value_model, plain, other, autocast=self.autocast)
            )

        self._takes_own_mask = all(map(takes_own_mask, self.transformers))
        self._takes_own_mask = self._takes_own_mask and agrees(
            padded(probe, takes_positions=positions, mask_dtype=self.mask_dtype)
        )
        # By their positions, most architectures tell the samples of a row apart.
        self._packs = positions and agrees(packed(probe, mask_dtype=self.mask_dtype))
        self._head_is_last = ends_with_its_head(self.model, plain, autocast=self.autocast)

    def use_reference(self, model: nn.Module) -> None:
        """Holds the policy to this model from now on; its parameters are frozen."""
        disable_dropout(model)
        if self._fuses_activations:
            fuse_activations(model)
        self._reference[:] = [model.eval().requires_grad_(False)]

    @property
    def _fuses_activations(self) -> bool:
        # Small models on a CPU keep transformers' own, to stay as close to other trainers as they can.
        return self.device.type == "cuda" or self._parameter_count > SMALL_MODEL

    @property
    def has_adapters(self) -> bool:
        """Whether the reference comes from switching adapters off."""
        return isinstance(self.model, peft.PeftModel)

    @property
    def language_model(self) -> PreTrainedModel:
        """The Hugging Face model itself, for `generate` and its configuration; adapters stay active in it."""
        return bare(self.model)

    @property
    def transformers(self) -> list[PreTrainedModel]:
        """Every transformer that it computes with: the language model, the reference's copy, the values' own."""
        return [self.language_model, *self._reference, *([] if self.value_model is None else [bare(self.value_model)])]

    @property
    def device(self) -> torch.device:
        """Where the policy's inputs belong."""
        head = head_of(self.model) if self.v_head is None else self.v_head
        device: torch.device = head.weight.device
        return device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Policy":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for reference in self._reference:
            reference._apply(fn, recurse)
        if self.device.type == "cuda":
            for transformer in self.transformers:
                fuse_activations(transformer)
        return self

    def forward(
        self,
        samples: Samples,
        *,
        temperature: float = 1.0,
        support: Tensor | None = None,
        entropy: bool = True,
    ) -> ResponseOutputs:
        """Scores every response token in one pass; the LM head runs on response positions alone.

        `support` holds the distribution to the tokens that truncated sampling left (see `support`). Without `entropy`
        that is left at 0.
        """
        flat = self.score(
            self._input_of(samples),
            samples.gather(samples.response_ids),
            temperature=temperature,
            support=None if support is None else samples.gather(support),
            entropy=entropy,
        )
        return ResponseOutputs(samples.spread(flat.logprobs), samples.spread(flat.values), samples.spread(flat.entropy))

    def score(
        self,
        given: ModelInput,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        support: Tensor | None = None,
        entropy: bool = True,
    ) -> ResponseOutputs:
        """`forward` on an input that is made already: everything is [N], for the response tokens [N] of the input.

        `support` is [N, ceil(V / 8)] here.
        """
        logits = self._response_logits(self.model, given)
        logprobs, entropies = token_statistics(
            logits, tokens, support, rows=self._rows, temperature=temperature, entropy=entropy
        )
        if self.v_head is None:
            values = torch.zeros_like(logprobs)
        else:
            states = logits.states
            if self.value_model is not None:
                states = value_states(self.value_model, given, autocast=self.autocast)
            with torch.autocast(states.device.type, enabled=False):
                values = self.v_head(states.float()).squeeze(-1)
        return ResponseOutputs(logprobs, values, torch.zeros_like(logprobs) if entropies is None else entropies)

    @property
    def mask_dtype(self) -> torch.dtype | None:
        """What a whole attention mask must be made of; None for a model that makes its own."""
        if not self._takes_own_mask:
            return None
        with self.autocasting():
            return attention_dtype(self.language_model)

    @property
    def packs(self) -> bool:
        """Whether it scores packed rows under a mask of ours, whose shapes can be fixed."""
        return self._packs and self._takes_own_mask

    @torch.no_grad()
    def reference_logprobs(
        self, samples: Samples, *, temperature: float = 1.0, support: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of the response tokens under the reference, [B, T] fp32, 0 on padding."""
        kept = None if support is None else samples.gather(support)
        given, tokens = self._input_of(samples), samples.gather(samples.response_ids)
        return samples.spread(self.reference_score(given, tokens, temperature=temperature, support=kept))

    @torch.no_grad()
    def reference_score(
        self, given: ModelInput, tokens: Tensor, *, temperature: float = 1.0, support: Tensor | None = None
    ) -> Tensor:
        """`reference_logprobs` on an input that is made already, [N]; `support` is [N, ceil(V / 8)] here."""
        with self.as_reference() as reference:
            logits = self._response_logits(reference, given)
            logprobs, _ = token_statistics(
                logits, tokens, support, rows=self._rows, temperature=temperature, entropy=False
            )
            return logprobs

    @torch.no_grad()
    def full_kl(self, samples: Samples, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
        """KL of the policy from the reference over the whole vocabulary at each response token, [B, T] fp32."""

        def divergence(own: Tensor, other: Tensor, packed: Tensor | None) -> tuple[Tensor]:
            kept = None if packed is None else distributions.unpack(packed, own.shape[-1])
            sampled = (
                distributions.sampling_logits(logits, temperature=temperature, support=kept) for logits in (own, other)
            )
            return (kl.full_kl(*(logits.log_softmax(-1) for logits in sampled)),)

        given = self._input_of(samples)
        own = self._response_logits(self.model, given)
        with self.as_reference() as reference:
            other = self._response_logits(reference, given)
        other = dataclasses.replace(other, head=self._apply_head_of_reference)
        kept = None if support is None else samples.gather(support)
        return samples.spread(in_pieces(divergence, (own, other), kept, rows=self._rows)[0])

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The reference model: the frozen copy, or this model with its adapters off for as long as the block runs."""
        if self._reference:
            yield self._reference[0]
        elif self.has_adapters:
            with self.model.disable_adapter():
                yield self.model
        else:
            raise ConfigError(
                "a policy without adapters needs a frozen copy as its reference: Policy(model, reference=…)"
            )

    def support(
        self, samples: Samples, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Tensor | None:
        """The tokens that top-k and top-p left to choose from, or None where they keep everything.

        [B, T, ceil(V / 8)] uint8, eight tokens to a byte as `distributions.pack` packs them; all of them on padding.
        Compute it before the first update: later passes of policy and reference are held to the rollout's choices, so
        that a ratio compares probabilities over the same tokens and the KL stays a KL. The sampled token is always
        in, however a tie was rounded.
        """
        if top_k == 0 and top_p == 1.0:
            return None

        def truncated(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
            logits = distributions.sampling_logits(logits, temperature=temperature)
            kept = distributions.truncation(logits, top_k=top_k, top_p=top_p)
            return (distributions.pack(kept.scatter(-1, tokens.unsqueeze(-1), True)),)

        logits = self._response_logits(self.model, self._input_of(samples))
        kept = in_pieces(truncated, (logits,), samples.gather(samples.response_ids), rows=self._rows)[0]
        return samples.spread(kept, fill=255)

    def in_pieces(self, tokens: int) -> bool:
        """Whether so many response tokens go through the output head a few at a time, since their logits are large."""
        return self._head_is_last and 4 * tokens * self._vocabulary > 2**20 * self._logits_mib

    def _apply_head_of_reference(self, states: Tensor) -> Tensor:
        # Adapters of the head have to be off for every piece.
        with self.as_reference() as reference:
            return apply_head(reference, self.autocast, states)

    def _response_logits(self, model: Any, given: ModelInput) -> ResponseLogits:
        whole = not self.in_pieces(len(given.states))
        return response_logits(model, given, autocast=self.autocast, whole=whole)

    def _input_of(self, samples: Samples) -> ModelInput:
        # Policy, reference and values are asked about the same samples in turn.
        if self._last_input is None or self._last_input[0] is not samples:
            if self._packs and worth_packing(samples, self._parameter_count):
                given = packed(samples, mask_dtype=self.mask_dtype)
            else:
                # On a CPU, transformers' look at the mask costs nothing and may save the mask.
                mask_dtype = None if self.device.type == "cpu" else self.mask_dtype
                given = padded(samples, takes_positions=self._takes_positions, mask_dtype=mask_dtype)
            self._last_input = samples, given
        return self._last_input[1]

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Around generation: the policy's precision, and nothing compiled, since every token has another shape."""

        def in_one_piece(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # The last states of all rows lie apart, and torch would multiply them row by row.
            return (inputs[0].contiguous(), *inputs[1:])

        hook = head_of(self.model).register_forward_pre_hook(in_one_piece)
        try:
            with torch.compiler.set_stance("force_eager"), self.autocasting():
                yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def autocasting(self) -> Iterator[None]:
        """The precision that the policy and its reference compute in; their logits are fp32."""
        with computing_in(self.autocast, self.model, *self._reference):
            yield

    def trainable_parameters_line(self) -> str:
        """How much of the policy learns, in the words of peft; tied weights count once."""
        everything = sum(numel(p) for p in self.parameters())
        learning = sum(numel(p) for p in self.parameters() if p.requires_grad)
        share = 100 * learning / everything
        return f"trainable params: {learning:,} || all params: {everything:,} || trainable%: {share:.4f}"

    def reference_line(self) -> str:
        """What the reference is and what it costs."""
        if not self._reference:
            return "the reference is the same weights with the adapters off: no second copy"
        mib = sum(p.numel() * p.element_size() for p in self._reference[0].parameters()) / 2**20
        why = "the adapters had learnt before" if self.has_adapters else "every parameter learns"
        return f"{why}, so the reference is a frozen copy of the weights: another {mib:,.0f} MiB"
