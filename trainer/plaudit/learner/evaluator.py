"""Log-probabilities and values of samples under the policy as it is now, and log-probabilities under the reference.

Failure mode: another distribution than the one that was sampled from, by temperature or by truncation.
"""

import torch
from torch import Tensor

from plaudit.learner.graphs import FlatSamples, Graphs, warn_of_no_graphs
from plaudit.learner.memory import BatchSizeFinder
from plaudit.policy.model import Policy, ResponseOutputs
from plaudit.policy.samples import EvaluatedSamples, Samples
from plaudit.settings.policy import GenerationSettings


class Evaluator:
    """Evaluates samples in batches that fit into memory; on a GPU by a recorded CUDA graph, if `record`."""

    def __init__(
        self,
        policy: Policy,
        generation: GenerationSettings,
        batch_size_finder: BatchSizeFinder,
        *,
        full_kl: bool,
        record: bool,
    ) -> None:
        """`full_kl` also computes the KL over the whole vocabulary."""
        self._policy, self._generation, self._batch_size_finder = policy, generation, batch_size_finder
        self._full_kl = full_kl
        self._graphs = Graphs(self._forward_flat) if record else None

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> EvaluatedSamples:
        """Everything that an update needs to know of `samples` but their scores. All tensors are [B, T]."""
        self._policy.eval()
        return self._batch_size_finder.run(
            lambda size: EvaluatedSamples.concatenate([self._evaluate(chunk) for chunk in samples.chunks(size)])
        )

    def _evaluate(self, samples: Samples) -> EvaluatedSamples:
        recorded = self._evaluate_by_graph(samples)
        if recorded is not None:
            return recorded
        temperature = self._generation.temperature
        support = self._policy.support(
            samples, temperature=temperature, top_k=self._generation.top_k, top_p=self._generation.top_p
        )
        own: ResponseOutputs = self._policy(samples, temperature=temperature, support=support, entropy=False)
        full = None
        if self._full_kl:
            full = self._policy.full_kl(samples, temperature=temperature, support=support)
        return EvaluatedSamples(
            samples=samples,
            logprobs=own.logprobs,
            values=own.values,
            ref_logprobs=self._policy.reference_logprobs(samples, temperature=temperature, support=support),
            full_kl=full,
            support=support,
        )

    def _evaluate_by_graph(self, samples: Samples) -> EvaluatedSamples | None:
        """`_evaluate` by a recorded graph; None if there is none."""
        if self._graphs is None or self._full_kl:
            return None
        flat = FlatSamples.of(samples, self._policy.mask_dtype)
        if self._policy.in_pieces(len(flat.mask)):
            return None
        try:
            outputs = self._graphs.run(flat)
        except RuntimeError as error:
            self._graphs = None
            warn_of_no_graphs("evaluations", error)
            return None
        logprobs, values, reference = (samples.spread(row[: len(samples.cells)]) for row in outputs)
        return EvaluatedSamples(samples=samples, logprobs=logprobs, values=values, ref_logprobs=reference)

    def _forward_flat(self, flat: FlatSamples) -> Tensor:
        """[3, N]: log-probabilities and values of the policy, and log-probabilities of the reference."""
        temperature = self._generation.temperature
        own = self._policy.score(flat.given, flat.tokens, temperature=temperature, entropy=False)
        reference = self._policy.reference_score(flat.given, flat.tokens, temperature=temperature)
        return torch.stack([own.logprobs, own.values, reference])
