"""Other people's real servers behind the client and a PPO run. Each needs an interpreter that has the server installed.

    python -m venv infinity && infinity/bin/pip install infinity-emb[all]==0.0.78 transformers==4.57.6
    PLAUDIT_INFINITY_PYTHON=infinity/bin/python pytest tests/foreign

Likewise PLAUDIT_KSERVE_PYTHON (`kserve`), PLAUDIT_OPENRLHF_PYTHON (`openrlhf` and `deepspeed`, without flash-attn) and
PLAUDIT_LLAMACPP_PYTHON (`xllamacpp` and `gguf`).
"""

import json
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from harness.foreign import stand_ins as foreign
from harness.processes import free_port
from harness.tiny_models import VOCAB_SIZE, save, tiny_classifier_dir, tiny_gpt2_dir
from plaudit.demo_models import resolve
from plaudit.learner import rollout
from plaudit.learner.rollout import CollectedRollout
from plaudit.rewards import RewardClient, RewardRejected
from plaudit.rewards.settings import JudgeSettings, RewardSettings
from plaudit.run.metrics import REWARD_MEAN, read_metrics
from plaudit.settings.data import DataSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages import ppo

ROOT = Path(__file__).parents[2]
PROMPTS = [f"the movie {'was ' * (i % 7)}" for i in range(40)]
RESPONSES = [f"{word} and the plot" for word in ["good", "bad", "great", "awful"] * 10]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


@contextmanager
def running(variable: str, *arguments: str, log: Path) -> Iterator[str]:
    """The URL of the server that `arguments` start with the interpreter that `variable` names; `PORT` is its port."""
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(f"{variable} names no interpreter that has this server")
    port = str(free_port())
    command = [python, *(port if argument == "PORT" else argument for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=log.parent)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        print(log.read_text(errors="replace")[-4000:])


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A classifier whose tokenizer transformers 4 loads too: version 5 writes a class name that is new."""
    directory = tiny_classifier_dir(tmp_path / "classifier")
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def logits_of(directory: Path, texts: Sequence[str], **tokenizing: Any) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        rows = [
            model(**tokenizer(text, return_tensors="pt", truncation=True, **tokenizing)).logits[0] for text in texts
        ]
    return torch.stack(rows)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains two steps against an endpoint; gives the texts of both steps and their rewards."""

    def run(reward: RewardSettings) -> tuple[list[str], list[float]]:
        steps: list[CollectedRollout] = []
        collect = rollout.collect_rollout

        def kept(*arguments: Any, **named: Any) -> CollectedRollout:
            steps.append(collect(*arguments, **named))
            return steps[-1]

        monkeypatch.setattr(rollout, "collect_rollout", kept)
        reviews = tmp_path / "reviews.csv"
        reviews.write_text(
            "text\n" + "\n".join(f"Film {i} is good. " + "The acting is moving. " * 12 for i in range(50))
        )
        config = PPOConfig(
            policy=str(tiny_gpt2_dir(tmp_path / "policy")),
            output_dir=tmp_path / "run",
            dataset=DataSettings(str(reviews)),
            reward=reward,
            ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, ppo_epochs=1),
            steps=2,
        )
        ppo.run(config)
        rewards = [score for step in steps for score in step.rollout.scores.tolist()]
        means = [record[REWARD_MEAN] for record in read_metrics(config.output_dir / "metrics.jsonl")]
        assert means == pytest.approx([sum(rewards[:8]) / 8, sum(rewards[8:]) / 8])
        return [p + r for step in steps for p, r in zip(step.prompts, step.responses, strict=True)], rewards

    return run


def test_infinity_is_recognised_and_its_probabilities_are_refused_unless_they_are_meant(
    classifier: Path, tmp_path: Path, train: Any
) -> None:
    flags = ["--model-id", str(classifier), "--served-model-name", "judge", "--device", "cpu", "--engine", "torch"]
    flags += ["--no-bettertransformer", "--no-model-warmup", "--host", "127.0.0.1", "--port", "PORT"]
    start = "from infinity_emb.cli import cli; cli()"
    with running("PLAUDIT_INFINITY_PYTHON", "-c", start, "v2", *flags, log=tmp_path / "log") as url:
        settings = RewardSettings.of(url=(url,), label="POSITIVE", patience_s=90.0)
        with RewardClient(settings) as client, pytest.raises(RewardRejected, match="probabilities came back"):
            client.connect()
        meant = RewardSettings.of(url=(url,), label="POSITIVE", patience_s=90.0, accept_probabilities=True)
        with RewardClient(meant) as client:
            assert client.connect().id == "judge"
            expected = logits_of(classifier, TEXTS).softmax(-1)[:, 1].tolist()
            assert client.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-4)
        texts, rewards = train(meant)
        assert rewards == pytest.approx(logits_of(classifier, texts).softmax(-1)[:, 1].tolist(), abs=1e-4)


def test_kserves_model_server_gives_every_text_its_logit(tmp_path: Path, train: Any) -> None:
    script = str(ROOT / "harness" / "foreign" / "kserve_judge.py")
    with running("PLAUDIT_KSERVE_PYTHON", script, "--port", "PORT", log=tmp_path / "log") as url:
        settings = RewardSettings.of(url=(url,), label="POSITIVE", patience_s=90.0, model="judge", label_index=1)
        with RewardClient(settings) as client:
            assert client.connect().id == "judge"
            assert client.score(PROMPTS, RESPONSES) == pytest.approx([foreign.logits(text)[1] for text in TEXTS])
        texts, rewards = train(settings)
        assert rewards == pytest.approx([foreign.logits(text)[1] for text in texts])


def test_openrlhfs_reward_server_gives_every_text_its_reward(tmp_path: Path, train: Any) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=VOCAB_SIZE, num_labels=1, pad_token_id=0, initializer_range=0.5)
    model = save(LlamaForSequenceClassification(config), tmp_path / "judge")
    flags = ["--reward.model_name_or_path", str(model), "--ds.attn_implementation", "eager", "--data.max_len", "64"]
    script = str(ROOT / "harness" / "foreign" / "openrlhf_on_cpu.py")
    address = ["--host", "127.0.0.1", "--port", "PORT"]
    with running("PLAUDIT_OPENRLHF_PYTHON", script, *flags, *address, log=tmp_path / "log") as url:
        settings = RewardSettings.of(url=(url,), patience_s=90.0, kind="openrlhf")
        with RewardClient(settings) as client:
            client.connect()
            rewards = client.score(PROMPTS, RESPONSES)
        expected = logits_of(model, TEXTS, add_special_tokens=False)[:, 0]
        # It computes in bfloat16.
        assert rewards == pytest.approx(expected.tolist(), abs=0.1 * (expected.max() - expected.min()).item())
        texts, rewards = train(settings)
        expected = logits_of(model, texts, add_special_tokens=False, max_length=64)[:, 0]
        assert rewards == pytest.approx(expected.tolist(), abs=0.1 * (expected.max() - expected.min()).item())


SCORE = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["score"],
    "additionalProperties": False,
}


def test_llama_cpp_judges_by_probabilities_json_and_pattern(tmp_path: Path) -> None:
    """A tiny random judge, whose first token is almost always one of the scores; which one depends on the answer."""
    tokenizer = Path(resolve("imdb-gpt2-mini")) / "tokenizer.json"
    question, schema = tmp_path / "question.txt", tmp_path / "schema.json"
    question.write_text("{prompt}{response}")
    schema.write_text(json.dumps(SCORE))
    prompts, responses = PROMPTS[:8], RESPONSES[:8]
    command = ("-m", "harness.foreign.llama_cpp", str(tokenizer), "PORT")
    with running("PLAUDIT_LLAMACPP_PYTHON", *command, log=tmp_path / "log") as url:

        def scored(**judge: Any) -> list[float]:
            settings = RewardSettings.of(
                url=(url,),
                kind="chat-judge",
                judge=JudgeSettings(prompt=question, low=1, high=5, **judge),
                patience_s=90.0,
            )
            with RewardClient(settings) as client:
                assert client.connect().id == "tiny-judge"
                return client.score(prompts, responses)

        by_probability = scored(answer="logprobs")
        expected = []
        for text in TEXTS[:8]:
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 5}).json()
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            weights = {float(entry["token"]): math.exp(entry["logprob"]) for entry in top}
            expected.append(sum(score * weight for score, weight in weights.items()) / sum(weights.values()))
        assert by_probability == pytest.approx(expected, abs=1e-4)
        assert len(set(by_probability)) > 4
        assert set(scored(answer="json", schema=schema, max_tokens=64)) <= {1.0, 2.0, 3.0, 4.0, 5.0}
        assert set(scored(answer="pattern", pattern=r"^(\d)", max_tokens=2)) <= {1.0, 2.0, 3.0, 4.0, 5.0}
