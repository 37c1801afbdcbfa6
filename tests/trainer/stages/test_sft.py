"""Stage 1: rows as they should be, a loss that is transformers' own, a directory that plain transformers loads."""

import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from harness.stub_reward_server import StubRewardServer
from harness.tiny_models import CHATML, chat_tokenizer, save, tiny_gpt2, tiny_tokenizer
from plaudit.data.examples import IGNORED, token_rows
from plaudit.errors import ConfigError
from plaudit.policy.adapters import add_lora, base_of
from plaudit.policy.from_scratch import train_tokenizer
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import load_tokenizer, load_whole_causal_lm
from plaudit.policy.samples import Samples
from plaudit.policy.texts import end_tokens
from plaudit.policy.writer import load_writer
from plaudit.rewards.settings import RewardSettings
from plaudit.run.metrics import KL, read_metrics
from plaudit.run.runtime import StopRequested
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.settings.sft import SFTConfig
from plaudit.settings.supervised import ModelSizes, OptimizerSettings
from plaudit.stages import evaluate, ppo, sft, supervised

SIZES = ModelSizes("gpt2", vocab_size=300, hidden_size=16, layers=1, heads=2, max_positions=32)
OPTIMIZER = OptimizerSettings(learning_rate=5e-3, batch_size=8, max_steps=60, warmup_fraction=0.0)


def test_rows_start_where_texts_start_and_no_token_is_lost() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["This movie was wonderful. " * 5, "Bad."]
    rows = token_rows(tokenizer, texts, 16)
    assert all(2 <= len(row) <= 16 for row in rows)
    assert tokenizer.decode([token for row in rows for token in row]) == "".join(
        f"{text}{tokenizer.eos_token}" for text in texts
    )
    assert tokenizer.decode(rows[0]).startswith("This movie")


def test_the_held_out_loss_is_that_of_the_model_row_by_row() -> None:
    model, rows = tiny_gpt2(), [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    losses = []
    for row in rows:
        ids = torch.tensor([row])
        losses.append(model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1))
    assert sft.held_out_loss(model, rows, batch_size=2) == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_the_held_out_loss_leaves_out_what_is_not_learnt() -> None:
    model, row = tiny_gpt2(), [5, 6, 7, 8]
    labels = [IGNORED, IGNORED, 7, 8]
    ids = torch.tensor([row])
    expected = model(input_ids=ids, labels=torch.tensor([labels])).loss.item()
    assert sft.held_out_loss(model, [row], [labels]) == pytest.approx(expected, rel=1e-5)


def test_from_scratch_it_learns_and_saves_what_transformers_loads(reviews: Path, tmp_path: Path) -> None:
    result = sft.run(
        SFTConfig(
            from_scratch=True,
            sizes=SIZES,
            output_dir=tmp_path / "sft",
            dataset=DataSettings(str(reviews)),
            optimizer=OPTIMIZER,
            max_length=32,
            half_precision=True,
        )
    )
    assert result.perplexity < 30  # uniform guessing over the vocabulary would be 300
    assert result.perplexity == pytest.approx(math.exp(result.held_out_loss))
    assert json.loads((tmp_path / "sft" / "sft.json").read_text())["perplexity"] == result.perplexity
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "sft")
    assert model.config.vocab_size == len(tokenizer)
    assert (tmp_path / "sft" / "model.safetensors").stat().st_size < 50_000


def test_fine_tuning_starts_from_the_model_it_is_given(policy_dir: Path, reviews: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    held_out = token_rows(tokenizer, ["Film 7 is great. The acting is moving."], 32)
    before = sft.held_out_loss(tiny_gpt2(), held_out)
    sft.run(
        SFTConfig(
            model=str(policy_dir),
            output_dir=tmp_path / "sft",
            dataset=DataSettings(str(reviews)),
            optimizer=OPTIMIZER,
            max_length=32,
        )
    )
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert sft.held_out_loss(after, held_out) < before - 1


def test_fine_tuning_may_start_from_adapters_and_gives_a_whole_model(
    policy_dir: Path, reviews: Path, tmp_path: Path
) -> None:
    adapters = add_lora(transformers.AutoModelForCausalLM.from_pretrained(policy_dir), LoraSettings(r=2))
    adapters.save_pretrained(tmp_path / "adapters")
    sft.run(
        SFTConfig(
            model=str(tmp_path / "adapters"),
            output_dir=tmp_path / "sft",
            dataset=DataSettings(str(reviews)),
            optimizer=OptimizerSettings(batch_size=8, max_steps=2),
            max_length=32,
        )
    )
    assert not list((tmp_path / "sft").glob("adapter*"))
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert {name.partition(".lora")[0] for name in saved.state_dict()} == set(tiny_gpt2().state_dict())


def test_a_trained_tokenizer_gives_any_text_back() -> None:
    tokenizer = train_tokenizer(["a small text about films"], vocab_size=300, max_length=32)
    text = " Tabs\t, ümlauts, 映画 and \U0001f3ac\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def conversations(path: Path, count: int = 60) -> Path:
    """Each asks for a word, and the assistant says it."""
    words = ("good", "bad", "great")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {words[i % 3]} {i}."},
                {"role": "assistant", "content": words[i % 3]},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def chat_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = chat_tokenizer()
    return save(tiny_gpt2(vocab_size=len(tokenizer)), tmp_path_factory.mktemp("chat"), tokenizer)


def chat_config(chat_policy_dir: Path, tmp_path: Path, **settings: Any) -> SFTConfig:
    return SFTConfig(
        model=str(chat_policy_dir),
        output_dir=tmp_path / "sft",
        dataset=DataSettings(str(conversations(tmp_path / "talks.jsonl"))),
        optimizer=dataclasses.replace(OPTIMIZER, learning_rate=2e-2, max_steps=settings.pop("steps", 40)),
        max_length=64,
        **settings,
    )


def test_conversations_are_learnt_and_the_log_says_from_where(
    chat_policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = chat_config(chat_policy_dir, tmp_path)
    result = sft.run(config)
    assert result.perplexity < 3  # three words, and the token that ends each
    told = capsys.readouterr().out
    assert "conversations in column 'messages', the assistant's turns are learnt" in told
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.output_dir)
    assert tokenizer.chat_template == CHATML
    model = transformers.AutoModelForCausalLM.from_pretrained(config.output_dir)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say bad 999."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=end)
    assert end in end_tokens(model, tokenizer)  # so that PPO stops there
    assert tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]).endswith("<|im_end|>")


def test_prompts_and_completions_are_found_by_their_columns(
    policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"Film {i} is", "answer": " great.", "text": "not this"} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SFTConfig(
        model=str(policy_dir),
        output_dir=tmp_path / "sft",
        dataset=DataSettings(str(path)),
        prompt_column="question",
        completion_column="answer",
        optimizer=dataclasses.replace(OPTIMIZER, learning_rate=2e-2, max_steps=40),
        max_length=32,
    )
    assert sft.run(config).perplexity < 2  # one completion, whatever the prompt
    told = capsys.readouterr().out
    assert "prompts in column 'question' and completions in 'answer', the completions are learnt" in told
    assert "column 'text' is not read (--data-format chooses)" in told
    with pytest.raises(ConfigError, match="has no column 'messages' for data_format=messages; it has: question"):
        sft.run(dataclasses.replace(config, data_format="messages"))


def test_a_tokenizer_without_a_template_needs_one(policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template, and the data holds conversations"):
        sft.run(chat_config(policy_dir, tmp_path))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    sft.run(chat_config(policy_dir, tmp_path, steps=1, chat_template=str(tmp_path / "chatml.jinja")))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "sft").chat_template == CHATML


LORA = LoraSettings(r=4, dropout=0.0)


@pytest.mark.parametrize("merge", [True, False])
def test_ppo_goes_on_from_adapters_and_is_held_to_what_they_had_learnt(
    merge: bool, reviews: Path, policy_dir: Path, tmp_path: Path, stub_reward_server: StubRewardServer
) -> None:
    before = transformers.AutoModelForCausalLM.from_pretrained(policy_dir).state_dict()
    first = SFTConfig(
        model=str(policy_dir),
        output_dir=tmp_path / "sft",
        dataset=DataSettings(str(reviews)),
        optimizer=dataclasses.replace(OPTIMIZER, max_steps=10),
        lora=LORA,
        merge=merge,
        max_length=32,
    )
    sft.run(first)
    assert (tmp_path / "sft" / "adapter_config.json").exists() is not merge
    assert (tmp_path / "sft" / "config.json").exists() is merge
    policy = load_policy(tmp_path / "sft", LORA)
    stage_1 = load_whole_causal_lm(tmp_path / "sft")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in stage_1.state_dict().items())
    samples = Samples.from_lists([[5, 6, 7]], [[8, 9]], pad_token_id=0)
    expected = stage_1(torch.tensor([[5, 6, 7, 8, 9]])).logits.log_softmax(-1)[0, [2, 3], [8, 9]]
    torch.testing.assert_close(policy(samples).logprobs[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(policy.reference_logprobs(samples)[0], expected, atol=1e-4, rtol=1e-4)
    reward = RewardSettings.of(url=(stub_reward_server.url,), patience_s=0.5, request_timeout_s=10.0)
    hyperparameters = PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-3, ppo_epochs=2)
    config = PPOConfig(
        policy=str(tmp_path / "sft"),
        output_dir=tmp_path / "ppo",
        dataset=DataSettings(str(reviews)),
        reward=reward,
        ppo=hyperparameters,
        lora=LORA,
        steps=2,
    )
    assert ppo.run(config).steps == 2
    records = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    assert abs(records[0][KL]) < 1e-4  # nothing has moved before the first update
    evaluation = EvaluateConfig(after=str(tmp_path / "ppo"), dataset=DataSettings(str(reviews)), reward=reward)
    assert evaluate._before(evaluation) == str(tmp_path / "sft")


def test_adapters_end_responses_where_the_merged_model_does(
    chat_policy_dir: Path, tmp_path: Path, stub_reward_server: StubRewardServer
) -> None:
    """The end of a turn, which the base doesn't know, ends a response in every stage that reads the adapters."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"Say good {i}."} for i in range(40)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = {}
    for name, merge in (("merged", True), ("adapters", False)):
        directory = tmp_path / name
        stage_1 = chat_config(chat_policy_dir, tmp_path, steps=1, lora=LORA, merge=merge)
        sft.run(dataclasses.replace(stage_1, output_dir=directory))
        trained = PPOConfig(
            policy=str(directory),
            output_dir=tmp_path / f"ppo-{name}",
            dataset=DataSettings(str(questions)),
            prompts=PromptSettings(column="prompt"),
            generation=GenerationSettings(max_new_tokens=4),
            reward=RewardSettings.of(url=(stub_reward_server.url,), patience_s=0.5, request_timeout_s=10.0),
            ppo=PPOHyperparameters(batch_size=4, mini_batch_size=4, ppo_epochs=1),
            lora=LORA,
            merge=True,
            steps=1,
        )
        ppo.run(trained)
        tokenizer = load_tokenizer(directory)
        models = {
            "ppo": load_policy(directory, LORA).language_model,
            "generate": load_writer(str(directory)).model,
            "after ppo": load_policy(trained.output_dir).language_model,
            "generate after ppo": load_writer(str(trained.output_dir)).model,
            "evaluate": evaluate.load_pair(EvaluateConfig(after=str(trained.output_dir)))[0].language_model,
            "merged after ppo": load_writer(str(trained.output_dir / "merged")).model,
        }
        ends[name] = {stage: end_tokens(model, tokenizer) for stage, model in models.items()}
    end = chat_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert end not in end_tokens(load_whole_causal_lm(chat_policy_dir), chat_tokenizer())
    assert ends["adapters"] == ends["merged"]
    assert all(end in found for found in ends["adapters"].values())


@pytest.mark.parametrize(("quantization", "merge"), [("8bit", True), ("4bit", False)])
def test_a_quantised_base_is_trained_and_the_result_is_in_full_precision(
    quantization: Any, merge: bool, chat_policy_dir: Path, tmp_path: Path
) -> None:
    config = chat_config(chat_policy_dir, tmp_path, steps=30, lora=LoraSettings(r=8, dropout=0.0), merge=merge)
    plain = sft.run(dataclasses.replace(config, output_dir=tmp_path / "plain"))
    config = dataclasses.replace(config, quantization=quantization)
    result = sft.run(config)
    untrained = transformers.AutoModelForCausalLM.from_pretrained(chat_policy_dir).state_dict()
    model = load_whole_causal_lm(config.output_dir)
    trained = model.state_dict()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    changed = {name for name in trained if not torch.equal(trained[name], untrained[name])}
    assert changed == {name for name in trained if name.endswith("c_attn.weight")}
    assert result.held_out_loss == pytest.approx(plain.held_out_loss, abs=0.1)
    assert result.held_out_loss < math.log(300) - 0.2  # uniform guessing
    assert json.loads((config.output_dir / "sft.json").read_text())["perplexity"] == result.perplexity


def test_only_adapters_of_a_model_on_disk_are_trained_on_a_quantised_base(
    chat_policy_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="quantization=8bit trains adapters only"):
        chat_config(chat_policy_dir, tmp_path, quantization="8bit")
    adapters = tmp_path / "adapters"
    add_lora(tiny_gpt2(), LORA).save_pretrained(adapters)
    with pytest.raises(ConfigError, match=r"needs a base on disk, and model=.* holds adapters"):
        sft.run(chat_config(adapters, tmp_path, quantization="8bit", lora=LORA))


def test_adapters_and_a_whole_model_do_not_lie_in_one_directory(
    policy_dir: Path, reviews: Path, tmp_path: Path
) -> None:
    config = SFTConfig(model=str(policy_dir), output_dir=tmp_path / "sft", dataset=DataSettings(str(reviews)))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a whole model, which would be loaded in place of what this run saves"):
        sft.run(dataclasses.replace(config, lora=LORA, merge=False))


def test_adapters_that_go_on_being_trained_stay_those_of_their_base(
    policy_dir: Path, reviews: Path, tmp_path: Path
) -> None:
    def trained(model: Path, to: Path) -> dict[str, torch.Tensor]:
        sft.run(
            SFTConfig(
                model=str(model),
                output_dir=to,
                dataset=DataSettings(str(reviews)),
                optimizer=dataclasses.replace(OPTIMIZER, max_steps=2),
                lora=LORA,
                merge=False,
                max_length=32,
            )
        )
        assert base_of(to) == str(policy_dir)
        return load_file(to / "adapter_model.safetensors")

    once = trained(policy_dir, tmp_path / "once")
    twice = trained(tmp_path / "once", tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert any(not torch.equal(once[name], twice[name]) for name in once)


def test_adapters_of_conversations_that_are_stopped_go_on_to_the_same_numbers(
    chat_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stops(supervised._Watch):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                signal.raise_signal(signal.SIGTERM)
            super().on_step_end(args, state, control, **kwargs)

    lora = dataclasses.replace(LORA, dropout=0.1)
    config = chat_config(chat_policy_dir, tmp_path, steps=6, lora=lora, merge=False)
    sft.run(dataclasses.replace(config, output_dir=tmp_path / "undisturbed"))
    with monkeypatch.context() as patched:
        patched.setattr(supervised, "_Watch", Stops)
        with pytest.raises(StopRequested):
            sft.run(config)
    sft.run(dataclasses.replace(config, resume="auto"))
    ours, expected = (load_file(d / "adapter_model.safetensors") for d in (config.output_dir, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
