"""What doesn't fit into memory is tried again in smaller parts, and nothing is counted twice for it."""

import copy
import platform
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.small_step import CONFIG, QUERIES, RESPONSES, SCORES, make_stepper, weights
from plaudit.learner.memory import BatchSizeFinder, measuring_peak
from plaudit.policy.samples import Samples


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_full_memory_halves_what_is_tried_at_once_until_it_fits_and_for_good(error: RuntimeError) -> None:
    tried: list[int] = []

    def work(samples: int) -> int:
        tried.append(samples)
        if samples > 3:
            raise error
        return samples

    finder = BatchSizeFinder(12)
    with pytest.warns(UserWarning, match="out of memory: from now on [36] samples"):
        assert finder.run(work) == 3
    assert finder.run(work) == 3
    assert tried == [12, 6, 3, 3]


def test_one_sample_that_does_not_fit_and_every_other_error_are_raised() -> None:
    def full(samples: int) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(samples: int) -> int:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(torch.OutOfMemoryError):
        BatchSizeFinder(1).run(full)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        BatchSizeFinder(8).run(broken)


def test_a_full_memory_is_not_tried_again_but_says_what_to_do() -> None:
    def full(_: int) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        BatchSizeFinder(8, fixed=True).run(full)
    assert caught.value.__notes__ == ["8 samples at once are too many: give --ppo.micro-batch-size less"]


def test_running_out_of_memory_in_the_middle_of_a_backward_pass_changes_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, mini_batch_size=4)
    undisturbed, disturbed = make_stepper(config), make_stepper(config)
    expected = undisturbed.step(QUERIES, RESPONSES, SCORES)
    forward = disturbed.policy.forward
    calls = 0

    def forward_with_little_memory(samples: Samples, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        # Calls 1 to 3 evaluate; 5 is the second half of the first mini-batch, once the first half's gradient is there.
        if calls == 5 or len(samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(samples, **options)

    monkeypatch.setattr(disturbed.policy, "forward", forward_with_little_memory)
    with pytest.warns(UserWarning, match="out of memory"):
        result = disturbed.step(QUERIES, RESPONSES, SCORES)
    assert disturbed.batch_size_finder.size == 1
    for name, value in expected.statistics.items():
        assert result.statistics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, weight in weights(undisturbed).items():
        assert torch.allclose(weights(disturbed)[name], weight, atol=1e-6), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_micro_batches_change_no_number(accumulation: int) -> None:
    config = replace(CONFIG, mini_batch_size=CONFIG.batch_size // 2, gradient_accumulation_steps=accumulation)
    results = []
    for micro_batch_size in (None, 1):
        stepper = make_stepper(replace(config, micro_batch_size=micro_batch_size))
        results.append((stepper.step(QUERIES, RESPONSES, SCORES), copy.deepcopy(weights(stepper))))
    (whole, whole_weights), (split, split_weights) = results
    assert split.statistics == pytest.approx(dict(whole.statistics), rel=1e-4, abs=1e-6)
    for name, weight in whole_weights.items():
        assert torch.allclose(split_weights[name], weight, atol=1e-6), name


def test_the_peak_of_a_phase_counts_what_it_took_and_not_what_came_before() -> None:
    with measuring_peak(torch.device("cpu")) as first:
        large = torch.ones(64, 2**20)
    del large
    with measuring_peak(torch.device("cpu")) as second:
        pass
    assert first.mib > 256
    assert second.mib < first.mib - 200


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to keep")
def test_the_kernel_clears_the_pages_of_a_tensor_once() -> None:
    # In a process of its own, since it changes how a process allocates.
    script = (
        "import resource, torch\n"
        "from plaudit.learner.memory import keep_freed_memory\n"
        "def page_faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(8, 2**20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "given_back = sum(page_faults() for _ in range(20))\n"
        "keep_freed_memory()\n"
        "for _ in range(20):\n"
        "    page_faults()\n"
        "print(given_back, sum(page_faults() for _ in range(20)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 4
