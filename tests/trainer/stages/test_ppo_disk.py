"""A run on a real file system that fills up: it says where, and loses nothing that was there."""

import dataclasses
from pathlib import Path

import pytest

from harness.machine.disks import fill, small_disk
from harness.runs import TrainerProcess, assert_same_run, single_threaded, start_ranks
from plaudit.run.checkpoint import list_checkpoints
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import ppo

EXPORTED = {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors", "tokenizer.json"}


# The run's small files fit into the room that is left; a checkpoint of about 80 KiB, or what is exported, does not.
@pytest.mark.parametrize(
    ("steps_before", "room_kib", "place"),
    [
        pytest.param(2, 0, "run.json", id="the settings"),
        pytest.param(2, 48, "checkpoints/.step-000003.writing", id="a checkpoint"),
        pytest.param(3, 40, "", id="the final export"),
    ],
)
def test_a_full_disk_ends_the_run_with_74_and_leaves_it_to_be_resumed(
    config: PPOConfig, tmp_path: Path, steps_before: int, room_kib: int, place: str
) -> None:
    undisturbed = single_threaded(ppo.run, dataclasses.replace(config, output_dir=tmp_path / "undisturbed")).output_dir
    with small_disk(config.output_dir, 4096) as disk:
        single_threaded(ppo.run, dataclasses.replace(config, steps=steps_before))
        for name in EXPORTED:
            (config.output_dir / name).unlink()
        filler = fill(disk, but_kib=room_kib)

        code, stderr = TrainerProcess(config, "--resume", "auto").end()

        newest = config.output_dir / "checkpoints" / f"step-{steps_before:06d}"
        assert code == 74, stderr
        assert f"plaudit ppo: cannot write {config.output_dir / place}: No space left on device; " in stderr
        assert (
            f"make room, or see to it that the directory can be written to; the newest whole checkpoint is {newest}"
            in stderr
        )
        assert "Traceback" not in stderr
        assert list_checkpoints(config.output_dir / "checkpoints")[-1].directory == newest
        assert not EXPORTED & {path.name for path in config.output_dir.iterdir()}

        filler.unlink()
        code, stderr = TrainerProcess(config, "--resume", "auto").end()
        assert code == 0, stderr
        assert_same_run(config.output_dir, undisturbed)


def test_a_full_disk_ends_every_process_with_74(config: PPOConfig) -> None:
    with small_disk(config.output_dir, 4096) as disk:
        single_threaded(ppo.run, dataclasses.replace(config, steps=1))
        fill(disk)
        for code, stderr in [rank.end() for rank in start_ranks(config, 2, "--resume", "auto")]:
            assert code == 74, stderr
            assert f"cannot write {config.output_dir / 'run.json'}: No space left on device" in stderr
            assert "in process 0 of 2" in stderr
