"""Part 3. Where the time goes: phases, operations, waits for the device by source line, and one trace as a table.

Rewards come from a function in the same process, so that nothing here waits for another one.
"""

import contextlib
import functools
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import FORMATS, Lengths, Results, Setting, attempt, rounded, synchronized, use_format

PHASES = ("generate", "decode", "evaluate", "update")
TOP = 18
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten.is_nonzero")
"""Operations whose result the host needs before it can go on, wherever they run."""
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def measure(setting: Setting, results: Results) -> None:
    setting.models_ready()
    for number_format in FORMATS:
        row = {"format": number_format}
        attempt(setting, results, "phases", row, functools.partial(phases, setting, number_format))
    for section, work in (
        ("waits by source line", waits),
        ("operations", operations),
        ("trace", trace),
    ):
        attempt(setting, results, section, {}, functools.partial(work, setting))


class Step:
    """PPO's step with its phases apart."""

    def __init__(self, setting: Setting, number_format: str) -> None:
        from plaudit.data.prompts import PromptSchedule, load_prompts
        from plaudit.learner.rollout import sampler
        from plaudit.learner.stepper import PPOStepper
        from plaudit.policy.loading import load_policy
        from plaudit.policy.pretrained import load_tokenizer
        from plaudit.settings.data import DataSettings, PromptSettings
        from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
        from plaudit.settings.ppo import PPOHyperparameters

        bf16 = use_format(number_format)
        self.setting, self.count = setting, 8 if setting.tiny else 128
        self.tokenizer = load_tokenizer(setting.policy)
        data = DataSettings(str(setting.prompts), held_out_fraction=1e-9, max_texts=16 * self.count)
        prompts = load_prompts(data, PromptSettings(min_text_chars=1), self.tokenizer, "train", seed=0)
        self.schedule = PromptSchedule(prompts, self.count, seed=0)
        lora = LoraSettings(r=16, alpha=32, target_modules=("c_attn",))
        self.policy = load_policy(setting.policy, lora, ModelSettings(bf16=bf16), device=setting.device)
        config = PPOHyperparameters(batch_size=self.count, mini_batch_size=self.count)
        self.stepper = PPOStepper(self.policy, None, config)
        self.generation = GenerationSettings(batch_size=self.count)
        self.sample = sampler(self.policy, self.generation, self.tokenizer)
        self.step = 0

    def run(self, around: Callable[[str], Any]) -> None:
        """One step, each phase inside what `around` gives for its name."""
        import torch

        from plaudit.policy.generation import Draws, decode_responses

        prompts = self.schedule.batch(self.step)
        draws = Draws.of(self.generation, self.count, seed=0, step=self.step)
        with around("generate"), self.policy.generating():
            samples = self.sample(prompts.token_ids, draws)
        with around("decode"):
            texts = decode_responses(self.tokenizer, samples)
        scores = Lengths().submit_components(prompts.texts, texts).result().totals
        with around("evaluate"):
            evaluation = self.stepper.evaluate(samples)
        with around("update"):
            self.stepper.update(evaluation.with_scores(torch.tensor(scores, device=self.policy.device)))
        self.step += 1

    def warm(self, steps: int = 3) -> "Step":
        for _ in range(1 if self.setting.tiny else steps):
            self.run(lambda _: contextlib.nullcontext())
        return self


def phases(setting: Setting, number_format: str) -> dict[str, Any]:
    """Milliseconds, the device's work included: it is waited for after each phase. Medians."""
    step = Step(setting, number_format).warm()
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    @contextlib.contextmanager
    def around(phase: str) -> Iterator[None]:
        began = synchronized(setting.device)
        yield
        seconds[phase].append(synchronized(setting.device) - began)

    for _ in range(1 if setting.tiny else 9):
        step.run(around)
    middle = {phase: sorted(values)[len(values) // 2] for phase, values in seconds.items()}
    return {f"{phase}_ms": rounded(1e3 * value) for phase, value in middle.items()} | {
        "together_ms": rounded(1e3 * sum(middle.values()))
    }


def waits(setting: Setting) -> list[dict[str, Any]]:
    """How often the host waits for the device in one step, by phase and line of our source.

    On a GPU torch's own warnings are counted; on a CPU the operations that would wait on one.
    """
    step = Step(setting, "TF32").warm()
    seen: Counter[tuple[str, str]] = Counter()
    phase = ""

    @contextlib.contextmanager
    def around(name: str) -> Iterator[None]:
        nonlocal phase
        phase = name
        with _watching(setting, lambda: seen.update([(phase, our_line())])):
            yield

    step.run(around)
    rows = [{"phase": where, "line": line, "times": times} for (where, line), times in seen.most_common()]
    totals = Counter(where for where, _ in seen.elements())
    return [{"phase": name, "line": "all", "times": totals[name]} for name in PHASES] + rows


@contextlib.contextmanager
def _watching(setting: Setting, saw: Callable[[], None]) -> Iterator[None]:
    import torch

    if not setting.on_gpu:
        with counting(lambda name: saw() if name in WAITING else None):
            yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: saw() if "synchroniz" in str(message) else None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def our_line() -> str:
    """The innermost line of Plaudit, or of a library if none of ours is on the stack."""
    stack = traceback.extract_stack(sys._getframe(1))
    ours = [frame for frame in stack if "/plaudit/" in frame.filename]
    others = [frame for frame in stack if "/transformers/" in frame.filename or "/peft/" in frame.filename]
    if not ours:
        return "elsewhere"
    line = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {(ours[-1].line or '')[:70]}"
    if others and stack.index(others[-1]) > stack.index(ours[-1]):
        line += f" > {Path(others[-1].filename).name}:{others[-1].lineno}"
    return line


@contextlib.contextmanager
def counting(saw: Callable[[str], None]) -> Iterator[None]:
    """Calls `saw` with the name of every operation of torch in the block, in forward passes and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            saw(".".join(name.split(".")[:2]))
            if name == "aten.index.Tensor" or name.startswith("aten.index_put"):
                # A mask among the indices is looked at by the host, which has to know how many it holds.
                for index in args[1] or ():
                    if index is not None and index.dtype.is_floating_point is False and index.element_size() == 1:
                        saw("aten.nonzero")
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


def operations(setting: Setting) -> list[dict[str, Any]]:
    """Operations of torch in one step by phase, as its dispatcher sees them. A replayed graph counts as none."""
    step = Step(setting, "TF32").warm()
    counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}

    @contextlib.contextmanager
    def around(phase: str) -> Iterator[None]:
        with counting(lambda name: counts[phase].update([name])):
            yield

    step.run(around)
    return [
        {
            "phase": phase,
            "operations": found.total(),
            "waiting": sum(found[name] for name in WAITING),
            "most": ", ".join(f"{name.removeprefix('aten.')} {times}" for name, times in found.most_common(6)),
        }
        for phase, found in counts.items()
    ]


def trace(setting: Setting) -> list[dict[str, Any]]:
    """One step in the profiler: what it asks of the device, and the operations that took most on either side."""
    from torch.profiler import ProfilerActivity, profile, record_function

    step = Step(setting, "TF32").warm()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiled:
        step.run(record_function)
        synchronized(setting.device)
    averages = [each for each in profiled.key_averages() if each.key not in PHASES]
    return [
        {"section": "launches", **launches(profiled.events())},
        *({"section": "trace, kernels", **row} for row in kernels(averages)),
        *({"section": "trace, host", **row} for row in on_the_host(averages)),
    ]


def launches(events: Any) -> dict[str, Any]:
    """How often the device is asked for something, and how long it worked."""
    counts = Counter(event.name for event in events)
    ran = [event for event in events if "CUDA" in str(event.device_type) and event.name not in PHASES]
    return {
        "launches": sum(counts[name] for name in LAUNCHES),
        "of them graphs": counts["cudaGraphLaunch"],
        "copies and fills": sum(counts[name] for name in COPIES),
        "waits": sum(counts[name] for name in WAITS),
        "kernels run": len(ran),
        "kernels_ms": rounded(sum(event.time_range.elapsed_us() for event in ran) / 1e3),
    }


def kernels(averages: Any) -> list[dict[str, Any]]:
    """By the device's time."""
    found = [each for each in averages if "CUDA" in str(each.device_type)]
    found.sort(key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in found) or 1.0
    return [
        {
            "kernel": each.key[:110],
            "calls": each.count,
            "ms": rounded(each.self_device_time_total / 1e3, 3),
            "share": f"{each.self_device_time_total / total:.1%}",
        }
        for each in found[:TOP]
    ]


def on_the_host(averages: Any) -> list[dict[str, Any]]:
    """By the host's time."""
    found = [each for each in averages if "CPU" in str(each.device_type)]
    found.sort(key=lambda each: -each.self_cpu_time_total)
    return [
        {"operation": each.key[:80], "calls": each.count, "ms": rounded(each.self_cpu_time_total / 1e3, 3)}
        for each in found[:TOP]
    ]
