"""One object for one process, several, and sharded weights; with real processes in `stages.test_ppo_processes`.

Here a group of one process shards its weights: the same calls, and every part is the whole.
"""

import copy
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from harness.parts import modules_of
from harness.tiny_models import tiny_gpt2
from plaudit.learner.stepper import PPOStepper
from plaudit.parallel.processes import Processes
from plaudit.parallel.sharding import Sharding
from plaudit.policy.adapters import add_lora
from plaudit.policy.model import Policy
from plaudit.policy.samples import Samples
from plaudit.run.runtime import StopRequested
from plaudit.settings.policy import LoraSettings
from plaudit.settings.ppo import PPOHyperparameters

CONFIG = PPOHyperparameters(batch_size=2, mini_batch_size=2, ppo_epochs=2, learning_rate=1e-2)
STEP = ([[1, 2], [3]], [[4, 5, 6], [7, 8]], [1.0, -1.0])


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[Processes]:
    """A process group of this process alone, whose weights are sharded tensors all the same."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield Processes(0, 1, Sharding())
    dist.destroy_process_group()


def new_policy() -> Policy:
    torch.manual_seed(0)
    return Policy(add_lora(tiny_gpt2(), LoraSettings()))


def new_stepper(processes: Processes) -> PPOStepper:
    policy = new_policy()
    processes.shard(policy)
    return PPOStepper(policy, None, CONFIG, processes=processes)


def full_weights(stepper: PPOStepper) -> dict[str, torch.Tensor]:
    processes = stepper.processes
    return {name: processes.full_tensor_on_main(p.detach()).clone() for name, p in stepper.policy.named_parameters()}


def test_shares_are_consecutive_and_cover_every_row_once() -> None:
    for rows, count in [(8, 2), (9, 2), (3, 3), (128, 5)]:
        shares = [Processes(rank, count).share(rows) for rank in range(count)]
        assert [row for share in shares for row in share] == list(range(rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_of_groups_hold_whole_ones() -> None:
    for rows, group, count in [(12, 3, 2), (9, 3, 2), (128, 8, 5)]:
        processes = [Processes(rank, count) for rank in range(count)]
        shares = [process.share(rows, group=group) for process in processes]
        assert [row for share in shares for row in share] == list(range(rows))
        assert all(share.start % group == 0 and len(share) % group == 0 for share in shares)
        assert max(map(len, shares)) == processes[0].largest_share(rows, group=group)
        assert max(map(len, shares)) - min(map(len, shares)) <= group


def test_alone_an_error_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise StopRequested(signal.SIGTERM)

    with pytest.raises(StopRequested) as caught:
        Processes().on_all(fail)
    assert not hasattr(caught.value, "__notes__")


def test_alone_every_operation_is_the_identity() -> None:
    alone, policy = Processes(), new_policy()
    tensor = torch.arange(6.0).view(1, 2, 3)
    alone.shard(policy)
    with alone.gathered_weights(policy):
        assert alone.all_gather_rows(tensor, range(2), (2, 3)) is tensor
    assert alone.full_tensor(tensor) is alone.full_tensor_on_main(tensor) is alone.own_shard(tensor, tensor) is tensor
    assert alone.full_weights_on_main(policy) is None
    assert alone.weights_line(policy) == ""
    assert alone.on_main(max, 1, 2) == 2
    assert alone.on_all(max, 1, 2) == [2]


def test_sharded_weights_take_the_steps_of_replicated_ones(sharded: Processes) -> None:
    plain, stepper = new_stepper(Processes()), new_stepper(sharded)
    assert all(isinstance(p, DTensor) for p in stepper.policy.parameters())
    for _ in range(2):
        expected, got = plain.step(*STEP), stepper.step(*STEP)
        assert got.statistics == pytest.approx(dict(expected.statistics), rel=1e-4, abs=1e-6)
    for name, weight in full_weights(plain).items():
        torch.testing.assert_close(full_weights(stepper)[name], weight, rtol=0, atol=1e-6)


def test_what_is_written_of_sharded_weights_is_whole_and_is_read_back_as_parts(sharded: Processes) -> None:
    first, second = new_stepper(sharded), new_stepper(sharded)
    first.step(*STEP)
    weights = sharded.full_weights_on_main(first.policy)
    assert weights is not None
    tensors = [*weights.model.values(), *weights.value_head.values()]
    assert not any(isinstance(tensor, DTensor) for tensor in tensors)
    # A copy: alone, parts share memory with what they are parts of.
    state, read = copy.deepcopy(first.state_dict()), full_weights(first)
    with torch.no_grad():
        for name, parameter in second.policy.named_parameters():
            part = sharded.own_shard(read[name], parameter)
            assert isinstance(part, DTensor)
            assert part.placements == parameter.placements  # type: ignore[attr-defined]
            parameter.copy_(part)
    second.load_state_dict(state)
    assert second.step(*STEP).statistics == first.step(*STEP).statistics
    assert all(torch.equal(tensor, full_weights(second)[name]) for name, tensor in full_weights(first).items())


@pytest.mark.parametrize("version", ["this one", "an earlier one"])
def test_a_rollout_with_gathered_weights_needs_no_way_to_forget_passes(
    sharded: Processes, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written for torch 2.13, which has `reset_iter_state`. Versions that lack it keep a growing list."""
    if version == "an earlier one":
        monkeypatch.delattr(FSDPModule, "reset_iter_state")
    plain, stepper = new_stepper(Processes()), new_stepper(sharded)
    samples = Samples.from_lists(STEP[0], STEP[1], pad_token_id=0)
    for _ in range(2):
        with sharded.gathered_weights(stepper.policy):
            evaluated = [stepper.evaluate(samples) for _ in range(2)]
        expected = plain.evaluate(samples)
        for got in evaluated:
            torch.testing.assert_close(got.logprobs, expected.logprobs)
            torch.testing.assert_close(got.ref_logprobs, expected.ref_logprobs)
        scores = torch.tensor(STEP[2])
        result = stepper.update(evaluated[0].with_scores(scores))
        wanted = plain.update(expected.with_scores(scores))
        assert result.statistics == pytest.approx(dict(wanted.statistics), rel=1e-4, abs=1e-6)


def test_no_other_package_knows_how_weights_are_sharded() -> None:
    words = ("DTensor", "FSDPModule", "fully_shard", "torch.distributed", "parallel.sharding")
    elsewhere = {
        name: found
        for name, path in modules_of("trainer").items()
        if not name.startswith("plaudit.parallel") and (found := [w for w in words if w in path.read_text()])
    }
    assert elsewhere == {}
