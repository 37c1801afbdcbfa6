"""Every attack at once, beside clients that behave and a training run: are their rewards still right, and on time?

    python -m benchmarks.service.soak --seconds 600 --train-steps 8

One reward service of the embedded model. 16 clients score known texts and compare every reward with the logit that the
text has in an undisturbed service; attackers send the requests of `ATTACKS` as fast as they are answered. With
`--train-steps` a PPO run takes its rewards from the service (`--deterministic`) meanwhile, and its weights are compared
with those of the same run before the attack. Says how the clients fared, how many rewards were wrong, and what memory
it took.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from harness.load.siege import Outcome, besiege, besieged_service, known_texts
from harness.reward_service import RewardService


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--train-steps", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, besieged_service("--deterministic") as service:
        outcome = soak(service, arguments.seconds, arguments.train_steps, Path(name))
    print(outcome.said())
    sys.exit(bool(outcome.wrong) or outcome.same_weights is False)


def soak(service: RewardService, seconds: float, train_steps: int, directory: Path) -> Outcome:
    """The siege; with `train_steps`, also a training run under it beside the same run left in peace."""
    port = service.port
    expected = known_texts(port)
    if not train_steps:
        return besiege(service, seconds, expected)
    undisturbed = train(port, train_steps, directory / "undisturbed")
    besieged: list[bytes] = []
    trainer = threading.Thread(target=lambda: besieged.append(train(port, train_steps, directory / "besieged")))
    trainer.start()
    outcome = besiege(service, seconds, expected)
    trainer.join()
    outcome.same_weights = besieged == [undisturbed]
    return outcome


def train(port: int, steps: int, directory: Path) -> bytes:
    """The weights of a short PPO run whose rewards come from `port`."""
    command = [sys.executable, "-m", "plaudit.cli", "ppo", "--config", "demo", "--steps", str(steps)]
    url = f"http://127.0.0.1:{port}"
    subprocess.run([*command, "--reward.url", url, "--output-dir", str(directory)], check=True, capture_output=True)
    return (directory / "adapter_model.safetensors").read_bytes()


if __name__ == "__main__":
    main()
