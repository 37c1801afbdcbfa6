"""Checkpoints: everything the next step depends on, whole or not at all.

A checkpoint is written into a directory beside its place and then renamed (`atomic.new_directory`); its manifest comes
last. So a kill or a full disk leaves the previous checkpoint, and a directory without a manifest. Prompts and sampling
depend on seed and step alone: the position in the data is the step, and no generator state is saved but the stepper's.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from plaudit import atomic
from plaudit.errors import ConfigError
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.model import Policy
from plaudit.run.storage import writing
from plaudit.settings.plain import comparable, flat, to_dict
from plaudit.settings.ppo import PPOConfig

MANIFEST = "manifest.json"
WEIGHTS = "trainable.safetensors"
STATE = "state.pt"
FORMAT = 1

FREE_TO_CHANGE = (
    "output_dir",
    "resume",
    "check",
    "steps",
    "checkpoint_every",
    "keep_checkpoints",
    "log_samples_every",
    "tracker",
    "collective_timeout_s",
    "merge",
    "push_to_hub",
    "hub_private",
    "device",
    "generation.static_cache",
    "model.cuda_graphs",
    "ppo.micro_batch_size",
    "reward.",
    "watch.eval_every",
    "watch.judges.",
    "watch.rollout",
    "watch.stop_",
)
"""Settings, or prefixes of their names, that may change when a run is resumed."""
CHOSEN_IF_OPEN = (
    *(f"ppo.{name}" for name in ("learning_rate", "batch_size", "mini_batch_size", "init_kl_coef")),
    *("optimizer.learning_rate", "optimizer.epochs"),
    "prompts.min_text_chars",
)
"""Settings that a run chooses if they are None; a resumed run then keeps the checkpoint's."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    directory: Path
    step: int
    """Steps done; the next one has this index."""
    config: dict[str, Any]
    reward_revision: str | None
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of what the run reads, by name; empty in a checkpoint of an earlier version."""


def save_checkpoint(
    root: Path,
    policy: Policy,
    stepper: PPOStepper,
    *,
    config: dict[str, Any],
    reward_revision: str | None,
    keep: int,
    inputs: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Write the state after `stepper.steps_done` steps under `root`, then delete all but the newest `keep`.

    All processes call this. Rank 0 writes; if it fails, all raise its error.

    Raises:
        NotWritten: the disk is full or the directory cannot be written; earlier checkpoints are untouched.
    """
    inputs = dict(inputs or {})
    manifest, fill = contents(policy, stepper, config=config, reward_revision=reward_revision, inputs=inputs)
    checkpoint = Checkpoint(
        root / f"step-{stepper.steps_done:06d}", stepper.steps_done, config, reward_revision, inputs
    )
    stepper.processes.on_main(write_checkpoint, checkpoint.directory, manifest, fill, keep=keep)
    return checkpoint


def contents(
    policy: Policy,
    stepper: PPOStepper,
    *,
    config: dict[str, Any],
    reward_revision: str | None,
    inputs: Mapping[str, str],
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """The manifest of a checkpoint of the state as it is now, and what writes its other files into a directory.

    All processes call this; only rank 0 may write.
    """
    processes = stepper.processes
    manifest = {
        "format": FORMAT,
        "step": stepper.steps_done,
        "config": config,
        "reward_revision": reward_revision,
        "inputs": dict(inputs),
    }
    weights = {
        name: processes.full_tensor_on_main(parameter.detach()).contiguous() for name, parameter in _trainable(policy)
    }
    state = stepper.state_dict()

    def fill(beside: Path) -> None:
        save_file(weights, beside / WEIGHTS)
        # By way of a Python file: torch's own writer keeps the operating system's reason to itself.
        with (beside / STATE).open("wb") as file:
            torch.save(state, file)

    return manifest, fill


def write_checkpoint(final: Path, manifest: dict[str, Any], fill: Callable[[Path], None], *, keep: int) -> None:
    """Writes the checkpoint `final` whole or not at all: what `fill` puts into a directory, then the manifest.

    Then deletes all but the newest `keep` checkpoints beside it.

    Raises:
        NotWritten: the disk is full or the directory cannot be written; earlier checkpoints are untouched.
    """
    # One of the same step is a whole checkpoint until the new one is.
    with (
        writing(final.with_name(f".{final.name}.writing")),
        atomic.new_directory(final, marker=MANIFEST) as beside,
    ):
        fill(beside)
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for old in list_checkpoints(final.parent)[:-keep]:
        atomic.remove_directory(old.directory, marker=MANIFEST)


def forget_checkpoints_after(root: Path, step: int) -> list[Path]:
    """Removes checkpoints of later steps, which a run that continues from `step` takes again; returns their paths."""
    later = [checkpoint.directory for checkpoint in list_checkpoints(root) if checkpoint.step > step]
    for directory in reversed(later):
        atomic.remove_directory(directory, marker=MANIFEST)
    return later


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """The complete checkpoints under `root`, oldest first."""
    return sorted(
        (read_checkpoint(path.parent) for path in root.glob(f"step-*/{MANIFEST}")),
        key=lambda checkpoint: (checkpoint.step, checkpoint.directory.suffix == ""),
    )


def read_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`.

    Raises:
        ConfigError: there is none, or this version can't read it.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise TypeError("its manifest is no JSON object")
        if manifest["format"] != FORMAT:
            raise ConfigError(f"{directory}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
        step, config, revision = manifest["step"], manifest["config"], manifest["reward_revision"]
        if not (type(step) is int and step >= 0 and isinstance(config, dict) and isinstance(revision, str | None)):
            raise TypeError(f"its manifest holds step {step!r:.80}, and settings and a revision of the wrong kind")
        inputs = manifest.get("inputs", {})
        if not isinstance(inputs, dict):
            raise TypeError("its manifest holds inputs of the wrong kind")
        return Checkpoint(directory, step, config, revision, inputs)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{directory}: not a checkpoint ({error}); name a directory checkpoints/step-NNNNNN"
        ) from error


def restore(checkpoint: Checkpoint, policy: Policy, stepper: PPOStepper) -> None:
    """Puts policy and stepper into the saved state, bit for bit. All processes call this.

    Raises:
        ConfigError: the checkpoint holds other parameters than the policy trains.
    """
    processes = stepper.processes
    # Sharded weights may not fit on one device as a whole.
    device = "cpu" if processes.is_sharded else str(policy.device)
    saved = load_file(checkpoint.directory / WEIGHTS, device=device)
    trainable = dict(_trainable(policy))
    if saved.keys() != trainable.keys():
        differing = sorted(saved.keys() ^ trainable.keys())
        raise ConfigError(
            f"{checkpoint.directory}: trained parameters differ from the policy's, for example {differing[0]}"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(processes.own_shard(saved[name], parameter))
    # Memory-mapped, so that several processes of one machine, each of which needs a part, share the pages.
    mmap = processes.is_sharded
    state = torch.load(checkpoint.directory / STATE, weights_only=True, map_location="cpu", mmap=mmap)
    stepper.load_state_dict(state)


def check_same_inputs(checkpoint: Checkpoint, inputs: Mapping[str, str]) -> None:
    """Compares what the run read with what it would read now, by fingerprints.

    Raises:
        ConfigError: something has changed, and going on would be another run; both fingerprints are named.
    """
    changed = [
        f"the {name}: {then} then, {inputs[name]} now"
        for name, then in checkpoint.inputs.items()
        if inputs.get(name, then) != then
    ]
    if changed:
        raise ConfigError(
            f"cannot resume from {checkpoint.directory}: what the run reads has changed since: {'; '.join(changed)}. "
            "Put the earlier files back, or start a new run in another --output-dir"
        )


def frozen_weights_fingerprint(policy: Policy) -> str:
    """A fingerprint of the weights that no checkpoint holds: the base model's frozen ones, and the reference's copy.

    Up to 64 numbers of each tensor enter it: further training of a model changes nearly all of them. Quantised weights
    are left out, since each device packs them differently.
    """
    digest, count = hashlib.sha256(), 0
    frozen = [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    for tensor in (*frozen, *(parameter for model in policy.transformers[1:] for parameter in model.parameters())):
        if tensor.is_floating_point() and not tensor.requires_grad:
            flat = tensor.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy().tobytes())
            count += 1
    return f"{count} tensors, sha256 {digest.hexdigest()[:16]}"


def checkpoint_to_resume(
    root: Path,
    output_dir: Path,
    resume: str | None,
    config: object,
    *,
    holds: str = "a run",
    defaults: object = None,
    free: tuple[str, ...] = FREE_TO_CHANGE,
) -> Checkpoint | None:
    """The checkpoint below `root` that a run continues from, None for a new run. Prints it and the changed settings.

    `resume` is `auto`, a checkpoint's directory, or None; `holds` says in the error what `output_dir` contains.

    Raises:
        ConfigError: there are checkpoints and `resume` is None, the checkpoint can't be read, or its settings differ.
    """
    existing = list_checkpoints(root)
    if resume is None:
        if existing:
            raise ConfigError(
                f"output_dir={output_dir} holds {holds} with checkpoints up to step {existing[-1].step}; "
                "go on with --resume auto, or give another --output-dir"
            )
        return None
    if resume == "auto":
        if not existing:
            return None
        chosen = existing[-1]
    else:
        chosen = read_checkpoint(Path(resume))
    for line in check_same_run(chosen.config, to_dict(config), defaults=defaults, free=free):
        print(f"resuming with {line}")
    print(f"resuming after step {chosen.step} from {chosen.directory}", flush=True)
    return chosen


def check_same_run(
    saved: dict[str, Any], current: dict[str, Any], *, defaults: object = None, free: tuple[str, ...] = FREE_TO_CHANGE
) -> list[str]:
    """Compares a checkpoint's settings with the current ones; returns the harmless differences, one line each.

    `defaults` is a configuration of that kind with default values; `free` names the settings that may change.

    Raises:
        ConfigError: a difference that would make the resumed run another run; all of them are named.
    """
    # A setting added since the checkpoint was written had its default value.
    defaults = comparable(to_dict(PPOConfig() if defaults is None else defaults))
    before, after = defaults | comparable(saved), defaults | comparable(current)
    given = flat(current)
    left_open = {name for name in CHOSEN_IF_OPEN if given.get(name) is None}
    differing = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name) and name not in left_open
    )
    lines = {name: f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in differing}
    refused = [line for name, line in lines.items() if not name.startswith(free)]
    if refused:
        raise ConfigError(
            f"cannot resume with other settings: {'; '.join(refused)}. "
            "Give the checkpoint's values, or start a new run in another --output-dir"
        )
    # `resume` says where to continue from, and is no setting of the run.
    return [line for name, line in lines.items() if name != "resume"]


def _trainable(policy: Policy) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
