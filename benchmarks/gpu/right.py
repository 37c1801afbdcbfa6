"""Part 1. Right? Does what runs on a CPU give the same on the card, and to which digit.

Graphs are really recorded, classic cases are really replayed. A check that fails leaves the text of its error.
"""

import dataclasses
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import (
    FAMILIES,
    FORMATS,
    Ends,
    Results,
    Setting,
    attempt,
    policy_of,
    random_queries,
    rounded,
    said,
    small_model,
    synchronized,
    use_format,
)


def measure(setting: Setting, results: Results) -> None:
    attempt(setting, results, "card", {}, functools.partial(card, setting))
    for family in FAMILIES:
        for number_format in ("fp32", "bf16"):
            row: dict[str, Any] = {"model": family, "format": number_format}
            attempt(setting, results, "capture", row, functools.partial(capture, setting, family, number_format))
    attempt(setting, results, "number formats", {}, functools.partial(number_formats, setting))
    attempt(setting, results, "classic cases", {}, functools.partial(classic_cases, setting))
    attempt(setting, results, "packed", {}, functools.partial(packed_against_padded, setting))
    attempt(setting, results, "attention", {}, functools.partial(attention, setting))
    for number_format in FORMATS:
        row = {"format": number_format}
        attempt(setting, results, "resume", row, functools.partial(resume, setting, number_format))


def card(setting: Setting) -> dict[str, Any]:
    """What the card does at most: one large product in each number format, one large copy."""
    import torch

    row: dict[str, Any] = {}
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        row |= {"card": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        row |= {"multiprocessors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
    for number_format in FORMATS:
        use_format(number_format)
        dtype = torch.bfloat16 if number_format == "bf16" else torch.float32
        row[f"{number_format}_tflops"] = rounded(product_rate(setting, dtype) / 1e12)
    cells = 2**16 if setting.tiny else 2**30
    source = torch.randn(cells, device=setting.device)
    target = torch.empty_like(source)
    seconds = median_seconds(setting, lambda: target.copy_(source))
    return row | {"copy_gb_per_s": rounded(2 * 4 * cells / seconds / 1e9)}


def product_rate(setting: Setting, dtype: Any) -> float:
    """Operations a second of a large matrix product."""
    import torch

    size = 128 if setting.tiny else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(setting, lambda: torch.mm(a, b, out=out))


def median_seconds(setting: Setting, work: Any, *, repeats: int = 7) -> float:
    """Of one call, the device's work included; two calls before are not counted."""
    seconds = []
    for _ in range(repeats + 2):
        began = synchronized(setting.device)
        work()
        seconds.append(synchronized(setting.device) - began)
    return sorted(seconds[2:])[repeats // 2]


def attention(setting: Setting) -> list[dict[str, Any]]:
    """Which kernel scaled dot product attention takes, and what a shape costs when it is met first."""
    import torch

    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, columns in (("additive mask", 64), ("bool mask", 72), ("causal", 80)):
            for cudnn in (True, False) if setting.on_gpu else (True,):
                row = {"dtype": str(dtype).removeprefix("torch."), "mask": name, "cuDNN allowed": cudnn}
                before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(cudnn and before)
                try:
                    # Each its own width, so that no plan is there already.
                    row |= one_attention(setting, dtype, name, columns + 256 * (not cudnn))
                except RuntimeError as error:
                    row["error"] = said(error)
                finally:
                    torch.backends.cuda.enable_cudnn_sdp(before)
                found.append(row)
    return found


def one_attention(setting: Setting, dtype: Any, kind: str, length: int) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend

    heads, width, rows = (2, 16, 4) if setting.tiny else (12, 64, 32)
    q, k, v = (torch.randn(rows, heads, length, width, device=setting.device, dtype=dtype) for _ in "qkv")
    kept = torch.ones(rows, 1, length, length, dtype=torch.bool, device=setting.device).tril()
    mask = {"bool mask": kept, "causal": None}.get(kind, torch.zeros_like(kept, dtype=dtype))
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, kind == "causal")
    work = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=kind == "causal"
    )
    began = synchronized(setting.device)
    work()
    first = synchronized(setting.device) - began
    return {
        "kernel": SDPBackend(choice).name if choice >= 0 else str(choice),
        "first_ms": rounded(first * 1e3, 3),
        "then_ms": rounded(median_seconds(setting, work) * 1e3, 3),
    }


def capture(setting: Setting, family: str, number_format: str) -> dict[str, Any]:
    """Static generation (on a GPU a recorded graph) beside dynamic, before and after a step of the optimizer."""
    import torch

    from plaudit.learner.stepper import PPOStepper
    from plaudit.policy.generation import Draws, generate
    from plaudit.policy.static_generation import StaticGenerator, supports
    from plaudit.settings.policy import GenerationSettings
    from plaudit.settings.ppo import PPOHyperparameters

    model = small_model(family, setting.device, tiny=setting.tiny)
    policy = policy_of(model, number_format)
    count, settings = (8 if setting.tiny else 64), GenerationSettings()
    queries = random_queries(count, model.config.vocab_size)
    with policy.generating():
        row: dict[str, Any] = {"supports()": supports(policy.language_model)}
    if not row["supports()"]:
        with policy.generating():
            return row | {"error": why_not(policy.language_model)}
    static = StaticGenerator(policy.language_model, settings, Ends())
    stepper = PPOStepper(
        policy, None, PPOHyperparameters(batch_size=count, mini_batch_size=count, learning_rate=1e-2, ppo_epochs=2)
    )

    def compare(step: int) -> Any:
        draws = Draws.of(settings, count, seed=0, step=step)
        with policy.generating():
            expected = generate(policy.language_model, queries, draws, settings, Ends())
            got = static(queries, draws)
        row[f"same rows, step {step}"] = f"{_same_rows(got, expected)} of {count}"
        return got

    with torch.no_grad():
        samples = compare(0)
        compare(0)
    graphs = [getattr(decoder, "_graph", None) is not None for decoder in getattr(static, "_decoders", {}).values()]
    row["recorded"] = all(graphs) if graphs else "unknown"
    evaluation = stepper.evaluate(samples)
    stepper.update(evaluation.with_scores(torch.randn(count, device=policy.device)))
    with torch.no_grad():
        after = compare(1)
        draws = Draws.of(settings, count, seed=0, step=0)
        with policy.generating():
            moved = static(queries, draws)
    row["rows that the step changed"] = f"{count - _same_rows(moved, samples)} of {count}"
    del after
    return row


def why_not(model: Any) -> str:
    """The error that `supports` swallows, if it is one."""
    import torch

    from plaudit.policy import static_generation
    from plaudit.policy.generation import Draws
    from plaudit.policy.samples import Samples
    from plaudit.settings.policy import GenerationSettings

    settings = GenerationSettings(min_new_tokens=2, max_new_tokens=2)
    samples = Samples.from_lists([[1, 1]], [[0]], 0, next(model.parameters()).device)
    try:
        with torch.no_grad():
            decoder = static_generation.Decoder(model, settings, 1, 2, ends=())
            decoder.prefill(samples, Draws.of(settings, 1, seed=0, step=0))
            decoder.advance()
    except Exception as error:
        return said(error)
    return "not for an error"


def _same_rows(one: Any, other: Any) -> int:
    width = max(one.mask.shape[1], other.mask.shape[1])

    def plain(samples: Any) -> list[list[int]]:
        ids = samples.response_ids.masked_fill(~samples.mask, -1).tolist()
        return [row + [-1] * (width - len(row)) for row in ids]

    return sum(a == b for a, b in zip(plain(one), plain(other), strict=True))


def base_model(setting: Setting) -> Any:
    """GPT-2 of 124M made on the device, or a small one."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if setting.tiny:
        return small_model("gpt2", setting.device, tiny=True)
    torch.manual_seed(0)
    with torch.device(setting.device):
        return GPT2LMHeadModel(GPT2Config(initializer_range=0.05)).eval()


def move_logits(model: Any, offset: float) -> None:
    """Adds about the same number to all logits of a GPT-2. Trained ones lie far from 0, where bf16 has few digits."""
    import torch

    embeddings = model.transformer.wte.weight.data
    direction = torch.nn.functional.normalize(torch.randn(embeddings.shape[1], device=embeddings.device), dim=0)
    embeddings += direction
    model.transformer.ln_f.bias.data += offset * direction


def random_samples(setting: Setting, vocabulary: int, count: int, seed: int = 0) -> Any:
    from plaudit.policy.samples import Samples

    queries = random_queries(count, vocabulary, seed=seed)
    responses = random_queries(count, vocabulary, at_least=4, at_most=16, seed=seed + 1)
    return Samples.from_lists(queries, responses, 0, setting.device)


def number_formats(setting: Setting) -> list[dict[str, Any]]:
    """Log-probabilities beside those in fp64, and how far the first ratio is from 1."""
    import copy

    import torch

    from plaudit.learner.stepper import PPOStepper
    from plaudit.settings.ppo import PPOHyperparameters

    model = base_model(setting)
    move_logits(model, -60.0)
    vocabulary, count = model.config.vocab_size, 16 if setting.tiny else 128
    samples = random_samples(setting, vocabulary, count)
    policy = policy_of(model, "fp32")
    with torch.no_grad():
        few = samples.select(range(min(count, 32)))
        exact = copy.deepcopy(policy).double().language_model
        real = torch.cat([few.query_mask, few.mask], dim=1)
        logits = exact(
            input_ids=torch.cat([few.query_ids, few.response_ids], dim=1),
            attention_mask=real.long(),
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
        ).logits[:, few.query_ids.shape[1] - 1 : -1]
        offset = logits.mean().item()
        reference = logits.log_softmax(-1).gather(-1, few.response_ids.unsqueeze(-1)).squeeze(-1)[few.mask]
        del exact, logits
    rows = []
    for number_format in FORMATS:
        policy.autocast = torch.bfloat16 if use_format(number_format) else None
        config = PPOHyperparameters(batch_size=count, mini_batch_size=count, ppo_epochs=1, learning_rate=1e-9)
        stepper = PPOStepper(policy, None, config)
        with torch.no_grad():
            errors = policy(few).logprobs[few.mask].double() - reference
        result = stepper.update(stepper.evaluate(samples).with_scores(torch.randn(count, device=setting.device)))
        rows.append(
            {
                "format": number_format,
                "logits lie near": rounded(offset, 3),
                "log-probability error, rms": rounded(errors.square().mean().sqrt().item(), 3),
                "at most": rounded(errors.abs().max().item(), 3),
                "first ratio is 1 within": rounded(result.statistics["ppo/policy/ratio_drift"], 3),
                "KL to the reference": rounded(result.statistics["objective/kl"]),
            }
        )
    return rows


def classic_cases(setting: Setting) -> list[dict[str, Any]]:
    """The recorded runs of the classic trainer on this device: worst differences over three steps."""
    from harness.classic_ppo import CASES

    rows = []
    for number_format in ("fp32", "TF32") if setting.on_gpu else ("fp32",):
        use_format(number_format)
        for name in CASES:
            rows.append({"case": name, "format": number_format, **reproduce(setting, name)})
    return rows


def reproduce(setting: Setting, name: str) -> dict[str, float]:
    import torch

    from harness.classic_ppo import KEY_BIAS, Recording
    from plaudit.learner.stepper import PPOStepper

    recording = Recording(name)
    # Made again on the device: an optimizer looks at where its parameters are.
    stepper = PPOStepper(recording.stepper().policy.to(setting.device), None, recording.config)
    worst = {"intermediates": 0.0, "statistics": 0.0, "kl_coef": 0.0}
    for step, recorded in enumerate(recording.case["steps"]):
        result = recording.run_step(stepper, step)
        on_cpu: dict[str, Any] = {n: v.cpu() for n, v in vars(result).items() if isinstance(v, torch.Tensor)}
        result = dataclasses.replace(result, **on_cpu)
        worst["intermediates"] = max(worst["intermediates"], *recording.intermediate_differences(result, step).values())
        worst["statistics"] = max(worst["statistics"], *recording.statistic_differences(result, step).values())
        worst["kl_coef"] = max(worst["kl_coef"], abs(stepper.kl_coef - recorded["kl_coef_after"]))
    stepper.policy.to("cpu")
    distances = recording.weight_distances(stepper, 2)
    worst["weights"] = max(d.max().item() for n, d in distances.items() if not n.endswith(KEY_BIAS))
    return {column: rounded(value, 3) for column, value in worst.items()}


def packed_against_padded(setting: Setting) -> list[dict[str, Any]]:
    """The same samples one after another in rows, and a row each: largest differences."""
    import torch

    from plaudit.policy import packing

    rows = []
    for family in FAMILIES:
        for number_format in FORMATS:
            model = small_model(family, setting.device, tiny=setting.tiny)
            policy = policy_of(model, number_format)
            policy.v_head.weight.data.normal_()
            samples = random_samples(setting, model.config.vocab_size, 8 if setting.tiny else 128)
            outputs, before = {}, packing.FEW_CELLS
            for layout, few in (("packed", 0), ("padded", 10**9)):
                packing.FEW_CELLS = few
                with torch.no_grad():
                    # Other samples of the same contents: of one and the same, the policy remembers the layout.
                    outputs[layout] = policy(samples.select(range(len(samples))))
            packing.FEW_CELLS = before
            one, other = outputs["packed"], outputs["padded"]
            rows.append(
                {
                    "model": family,
                    "format": number_format,
                    "log-probabilities": rounded((one.logprobs - other.logprobs).abs().max().item(), 3),
                    "values": rounded((one.values - other.values).abs().max().item(), 3),
                    "values spread": rounded(one.values[samples.mask].std().item(), 3),
                }
            )
    return rows


def resume(setting: Setting, number_format: str) -> dict[str, Any]:
    """Four steps at once, beside two steps, an end and two more: the same numbers and weights, to the bit?"""
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        directory = Path(folder)
        model = directory / "model"
        small_model("gpt2", "cpu", tiny=setting.tiny).save_pretrained(model)
        tokenizer_for(setting, model)
        return _resumed(setting, directory, number_format)


def tokenizer_for(setting: Setting, directory: Path) -> None:
    """One whose tokens the small model knows."""
    from plaudit.policy.from_scratch import train_tokenizer

    texts = [f"Film {i} was good and bad, and I saw it {i % 7} times with {i * 13} others." for i in range(300)]
    train_tokenizer(texts, vocab_size=300, max_length=64).save_pretrained(directory)


def _resumed(setting: Setting, directory: Path, number_format: str) -> dict[str, Any]:
    from plaudit.run.metrics import read_metrics
    from plaudit.stages import ppo

    count = 8 if setting.tiny else 128
    texts = [f"{'very ' * (i % 5)}good film number {i}, seen with {i * 13} others" for i in range(3 * count)]
    (directory / "prompts.txt").write_text("\n".join(texts))
    config = run_config(
        setting, directory / "model", directory / "prompts.txt", directory / "straight", count, number_format
    )
    began = time.perf_counter()
    ppo.run(dataclasses.replace(config, steps=4))
    seconds = time.perf_counter() - began
    other = dataclasses.replace(config, output_dir=directory / "twice", steps=2)
    ppo.run(other)
    ppo.run(dataclasses.replace(other, steps=4, resume="auto"))
    differing, worst = [], 0.0
    pairs = zip(
        read_metrics(directory / "straight" / "metrics.jsonl"),
        read_metrics(directory / "twice" / "metrics.jsonl"),
        strict=True,
    )
    for one, two in pairs:
        for name, value in one.items():
            if not name.startswith(("time/", "memory/")) and value != two[name]:
                differing.append(f"{name} of step {one['step']}")
    total = 0
    for file in sorted((directory / "straight").glob("*.safetensors")):
        a, b = _tensors(file), _tensors(directory / "twice" / file.name)
        total += len(a)
        worst = max([worst, *((a[name] - b[name]).abs().max().item() for name in a)])
    return {
        "weights to the bit": worst == 0.0,
        "worst weight": worst,
        "tensors": total,
        "metrics that differ": len(differing),
        "first": differing[0] if differing else "",
        "four_steps_s": rounded(seconds, 3),
    }


def _tensors(file: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(file)


def run_config(
    setting: Setting, model: Path, prompts: Path, output: Path, batch: int, number_format: str, **ppo_settings: Any
) -> Any:
    """A stage of PPO with a reward function, for runs that are about something else."""
    from plaudit.rewards.settings import RewardSettings
    from plaudit.settings.data import DataSettings, PromptSettings
    from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
    from plaudit.settings.ppo import PPOConfig, PPOHyperparameters

    return PPOConfig(
        policy=str(model),
        output_dir=output,
        dataset=DataSettings(str(prompts), held_out_fraction=1e-9),
        prompts=PromptSettings(min_text_chars=1),
        generation=GenerationSettings(batch_size=batch),
        reward=RewardSettings.of(function="benchmarks.gpu.common:lengths"),
        lora=LoraSettings(r=8, alpha=16),
        model=ModelSettings(bf16=number_format == "bf16", tf32=number_format == "TF32"),
        ppo=PPOHyperparameters(batch_size=batch, mini_batch_size=batch, learning_rate=1e-3, **ppo_settings),
        trackers=(),
        device=setting.device,
    )
