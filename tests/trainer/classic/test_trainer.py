"""The classic trainer's surface: responses, steps, statistics, files, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from harness.foreign.hub import Hub
from harness.tiny_models import tiny_gpt2, tiny_gpt2_dir, tiny_tokenizer
from plaudit.classic import (
    AutoModelForCausalLMWithValueHead,
    FixedKLController,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)
from plaudit.errors import ConfigError
from plaudit.policy.loading import load_policy
from plaudit.run.hub import HubRejected
from plaudit.settings.policy import LoraSettings

QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7, 8], [9, 10], [11, 12, 13], [14])]
RESPONSES = [torch.tensor(ids) for ids in ([20, 21], [22, 23, 24, 25, 26], [27], [28, 29, 30])]
SCORES = [torch.tensor(score) for score in (1.0, -2.0, 0.5, 3.0)]
SAMPLING: dict[str, Any] = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 0}


def make_config(**settings: Any) -> PPOConfig:
    return PPOConfig(**{"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3} | settings)


def make_trainer(lora: bool = False, ref_model: Any = None, options: Any = None, **settings: Any) -> PPOTrainer:
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=config if lora else None)
    return PPOTrainer(make_config(**settings), model, ref_model, tiny_tokenizer(), **(options or {}))


@pytest.fixture
def trainer() -> PPOTrainer:
    return make_trainer()


# Responses


def test_one_query_gives_one_row_that_begins_with_it(trainer: PPOTrainer) -> None:
    output = trainer.generate(QUERIES[0], max_new_tokens=6, **SAMPLING)
    assert output.shape[0] == 1
    assert output[0, :4].tolist() == [5, 6, 7, 8]
    assert 1 <= output.shape[1] - 4 <= 6
    alone = trainer.generate(QUERIES[0], return_prompt=False, max_new_tokens=6, **SAMPLING)
    assert alone.shape[1] <= 6


def test_a_list_is_one_batch_and_each_response_has_a_length_of_its_own(trainer: PPOTrainer) -> None:
    calls = []
    trainer.model.pretrained_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lengths = iter([3, 5, 1, 4])
    responses = trainer.generate(
        QUERIES, length_sampler=lambda: next(lengths), batch_size=1, return_prompt=False, **SAMPLING
    )
    assert calls[0] == 4
    for response, length in zip(responses, [3, 5, 1, 4], strict=True):
        assert len(response) == length or int(response[-1]) == 0
    assert [response.ndim for response in responses] == [1] * 4


def test_the_seed_decides_what_is_sampled() -> None:
    one, other = (
        [r.tolist() for r in make_trainer(seed=3).generate(QUERIES, max_new_tokens=8, **SAMPLING)] for _ in range(2)
    )
    assert one == other
    assert one != [r.tolist() for r in make_trainer(seed=4).generate(QUERIES, max_new_tokens=8, **SAMPLING)]


def test_greedy_search_is_the_models_own_whatever_the_padding(trainer: PPOTrainer) -> None:
    responses = trainer.generate(QUERIES, return_prompt=False, max_new_tokens=5, do_sample=False)
    for query, response in zip(QUERIES, responses, strict=True):
        expected = trainer.model.pretrained_model.generate(
            input_ids=query.unsqueeze(0),
            attention_mask=torch.ones(1, len(query)),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
        assert response.tolist() == expected[0, len(query) :].tolist()


# Defect 6: with adapters, "reference" responses came from the policy.
@pytest.mark.parametrize("lora", [False, True])
def test_reference_responses_come_from_the_reference(lora: bool) -> None:
    trainer = make_trainer(lora)
    options: dict[str, Any] = {"return_prompt": False, "max_new_tokens": 6, "do_sample": False}
    own, before = trainer.generate(QUERIES, generate_ref_response=True, **options)
    assert [r.tolist() for r in own] == [r.tolist() for r in before]
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or (not lora and "ln_f.weight" in name):
                parameter.normal_(std=2.0)
    own, reference = trainer.generate(QUERIES, generate_ref_response=True, **options)
    assert [r.tolist() for r in reference] == [r.tolist() for r in before]
    assert [r.tolist() for r in own] != [r.tolist() for r in before]


# Defect 11: log-probabilities ignored temperature and truncation, and the KL of an untrained policy was not 0.
@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, {"top_k": 5}, {"temperature": 2.0, "top_p": 0.7}])
def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(sampling: dict[str, Any]) -> None:
    trainer = make_trainer()
    responses = trainer.generate(QUERIES, return_prompt=False, max_new_tokens=4, **SAMPLING | sampling)
    query, response = QUERIES[1], responses[1]
    logits = trainer.model.eval()(input_ids=torch.cat([query, response]).unsqueeze(0))[0][0, len(query) - 1 : -1]
    for warper in (
        TemperatureLogitsWarper(sampling.get("temperature", 1.0)),
        TopKLogitsWarper(sampling.get("top_k", len(logits[0]))),
        TopPLogitsWarper(sampling.get("top_p", 1.0)),
    ):
        logits = warper(None, logits)
    expected = logits.log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1).detach().numpy()
    statistics = trainer.step(QUERIES, responses, SCORES)
    assert statistics["objective/kl"] == pytest.approx(0, abs=1e-5)
    own = statistics["objective/logprobs"][1, len(query) - 1 :][: len(response)]
    np.testing.assert_allclose(own, expected, atol=1e-4)
    # The next step's responses come from elsewhere, so from the plain distribution.
    assert trainer.step(QUERIES, RESPONSES, SCORES)["objective/logprobs"].shape == (4, 6)


# Defect 13: `output[-length:]` took tokens of the query where the end of text came early.
def test_tokens_of_the_query_in_front_of_a_response_are_left_out(trainer: PPOTrainer) -> None:
    with torch.no_grad():
        trainer.model.pretrained_model.transformer.ln_f.bias.copy_(
            5000 * trainer.model.pretrained_model.transformer.wte.weight[0]
        )
    outputs = [trainer.generate(query, max_new_tokens=3, **SAMPLING).squeeze(0) for query in QUERIES]
    assert [len(output) - len(query) for output, query in zip(outputs, QUERIES, strict=True)] == [1] * 4
    with pytest.warns(UserWarning, match="3 of 4 responses began with tokens of their queries"):
        statistics = trainer.step(QUERIES, [output[-2:] for output in outputs[:3]] + [outputs[3][-1:]], SCORES)
    assert statistics["tokens/responses_dist"].tolist() == [1, 1, 1, 1]


# Defect 5: dropout in the rollouts.
def test_dropout_is_off_whatever_mode_the_program_sets(trainer: PPOTrainer) -> None:
    trainer.model.train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(trainer.model(input_ids=ids)[0], trainer.model(input_ids=ids)[0])


# Steps


def test_a_step_returns_the_old_names_in_the_old_shapes(trainer: PPOTrainer) -> None:
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    assert statistics["objective/kl_dist"].shape == (4,)
    assert statistics["objective/logprobs"].shape == statistics["objective/ref_logprobs"].shape == (4, 6)
    assert statistics["tokens/queries_dist"].tolist() == [4, 2, 3, 1]
    assert statistics["tokens/responses_dist"].tolist() == [2, 5, 1, 3]
    assert statistics["ppo/policy/advantages"].shape == (11,)
    for name in (
        *("objective/kl", "objective/kl_coef", "objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores"),
        *("ppo/std_scores", "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/entropy"),
        *("ppo/policy/approxkl", "ppo/policy/policykl", "ppo/policy/clipfrac", "ppo/policy/advantages_mean"),
        *("ppo/policy/ratio", "ppo/returns/mean", "ppo/returns/var", "ppo/val/vpred", "ppo/val/error"),
        *("ppo/val/clipfrac", "ppo/val/mean", "ppo/val/var", "ppo/val/var_explained", "ppo/learning_rate"),
        *("tokens/queries_len_mean", "tokens/queries_len_std", "tokens/responses_len_mean"),
        *("tokens/responses_len_std", "time/ppo/forward_pass", "time/ppo/compute_rewards"),
        *("time/ppo/compute_advantages", "time/ppo/optimize_step", "time/ppo/calc_stats", "time/ppo/total"),
    ):
        assert isinstance(statistics[name], float), name


def test_left_padding_moves_the_columns_and_no_number() -> None:
    right, left = make_trainer(), make_trainer()
    left.tokenizer.padding_side = "left"
    one, other = (t.step(QUERIES, RESPONSES, SCORES)["objective/logprobs"] for t in (right, left))
    assert one[1, 1:6].tolist() == other[1, 1:6].tolist() == [*one[1, 1:6]]
    assert one[0, 3:5].tolist() == other[0, 4:6].tolist()


def test_masked_response_tokens_stay_in_the_context_and_count_nowhere() -> None:
    plain, masked = make_trainer(), make_trainer()
    masks = [torch.tensor(m) for m in ([1, 1], [1, 0, 0, 1, 0], [1], [1, 1, 1])]
    whole = plain.step(QUERIES, RESPONSES, SCORES)
    statistics = masked.step(QUERIES, RESPONSES, SCORES, response_masks=masks)
    assert statistics["objective/logprobs"].tolist() == whole["objective/logprobs"].tolist(), "the same contexts"
    assert statistics["ppo/policy/advantages"].shape == (8,)
    assert statistics["tokens/responses_dist"].tolist() == [2, 5, 1, 3]
    with pytest.raises(ValueError, match=r"response_masks\[2\] has the shape \(1,\) and 0 ones"):
        masked.step(QUERIES, RESPONSES, SCORES, response_masks=[*masks[:2], torch.tensor([0]), masks[3]])


def test_masking_the_last_tokens_pays_the_score_where_leaving_them_out_does() -> None:
    short, masked = make_trainer(), make_trainer()
    masks = [torch.ones(len(r), dtype=torch.long) for r in RESPONSES]
    masks[1][3:] = 0
    cut = [RESPONSES[0], RESPONSES[1][:3], *RESPONSES[2:]]
    one = short.step(QUERIES, cut, SCORES)
    other = masked.step(QUERIES, RESPONSES, SCORES, response_masks=masks)
    for name in ("objective/entropy", "ppo/returns/mean", "ppo/loss/value", "ppo/val/error", "ppo/policy/policykl"):
        assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_the_kl_controller_is_the_programs_to_read_and_replace() -> None:
    trainer = make_trainer(init_kl_coef=0.5, horizon=10.0)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl_coef"] == 0.5
    # No KL yet: error -1, held to -0.2, of 4 samples over a horizon of 10.
    assert trainer.kl_ctl.value == pytest.approx(0.5 * (1 - 0.2 * 4 / 10))
    trainer.kl_ctl = FixedKLController(0.125)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl_coef"] == 0.125
    assert trainer.kl_ctl.value == 0.125


def test_an_optimizer_and_a_schedule_of_ones_own_move_the_weights() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    optimizer = torch.optim.SGD(model.v_head.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=4)
    trainer = PPOTrainer(make_config(), model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=schedule)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = [trainer.step(QUERIES, RESPONSES, SCORES)["ppo/learning_rate"] for _ in range(3)]
    probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    expected = torch.optim.lr_scheduler.OneCycleLR(probe, max_lr=0.5, total_steps=4)
    for rate in rates:
        assert rate == pytest.approx(probe.param_groups[0]["lr"])
        probe.step()
        expected.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"v_head.summary.weight", "v_head.summary.bias"}
    assert trainer.optimizer is optimizer


def test_a_step_moves_the_model_that_the_program_holds_and_not_its_reference() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    reference = create_reference_model(model)
    trainer = PPOTrainer(make_config(), model, reference, tiny_tokenizer())
    before = trainer.model.pretrained_model.transformer.h[0].attn.c_attn.weight.detach().clone()
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert trainer.model is model
    assert not torch.equal(model.pretrained_model.transformer.h[0].attn.c_attn.weight, before)
    assert torch.equal(reference.pretrained_model.transformer.h[0].attn.c_attn.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": QUERIES[:3]}, "3 queries in a step with batch_size=4"),
        ({"scores": SCORES[:3]}, "3 scores in a step with batch_size=4"),
        ({"scores": [*SCORES[:3], torch.tensor([1.0, 2.0])]}, r"score 3 has the shape \(2,\)"),
        ({"scores": [*SCORES[:3], torch.tensor(float("nan"))]}, "scores must be finite"),
        ({"responses": [*RESPONSES[:3], torch.tensor([])]}, "response 3"),
        ({"response_masks": [torch.ones(2)] * 4}, r"response_masks\[1\] has the shape \(2,\)"),
    ],
)
def test_a_step_says_what_is_wrong_with_its_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"queries": QUERIES, "responses": RESPONSES, "scores": SCORES} | change
    with pytest.raises(ValueError, match=message):
        make_trainer().step(**arguments)


def test_a_trainer_goes_on_from_its_state_to_the_bit(tmp_path: Path) -> None:
    def fresh() -> PPOTrainer:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return PPOTrainer(
            make_config(),
            model,
            create_reference_model(model),
            tiny_tokenizer(),
            optimizer=optimizer,
            lr_scheduler=schedule,
        )

    def go_on(trainer: PPOTrainer) -> dict[str, Any]:
        responses = trainer.generate(QUERIES, return_prompt=False, length_sampler=LengthSampler(2, 6), **SAMPLING)
        return {n: v for n, v in trainer.step(QUERIES, responses, SCORES).items() if isinstance(v, float)}

    straight = fresh()
    go_on(straight)
    torch.save({"weights": straight.model.state_dict(), "trainer": straight.state_dict()}, tmp_path / "state.pt")
    expected = go_on(straight)
    resumed = fresh()
    saved = torch.load(tmp_path / "state.pt", weights_only=False)
    resumed.model.load_state_dict(saved["weights"])
    resumed.load_state_dict(saved["trainer"])
    result = go_on(resumed)
    assert {n: v for n, v in result.items() if "time/" not in n} == {
        n: v for n, v in expected.items() if "time/" not in n
    }
    assert result["ppo/learning_rate"] == 5e-3


def test_a_table_of_texts_goes_to_wandb(trainer: PPOTrainer) -> None:
    class Tracker:
        name = "wandb"
        tables: list[dict[str, Any]] = []  # noqa: RUF012
        logged: list[dict[str, Any]] = []  # noqa: RUF012

        def log_table(self, name: str, **table: Any) -> None:
            self.tables.append({"name": name, **table})

        def log(self, values: dict[str, Any], **_: Any) -> None:
            self.logged.append(values)

    trainer.accelerator.trackers = [Tracker()]
    trainer.config.log_with = "wandb"
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    batch = {"query": ["a", "b", "c", "d"], "response": ["e", "f", "g", "h"]}
    trainer.log_stats(statistics, batch, SCORES)
    (table,) = Tracker.tables
    assert table["columns"] == ["query", "response", "reward"]
    assert table["data"][1] == ["b", "f", -2.0]
    assert Tracker.logged[0]["env/reward_dist"].tolist() == [1.0, -2.0, 0.5, 3.0]
    with pytest.raises(ValueError, match="columns_to_log names 'ref_response'"):
        trainer.log_stats(statistics, batch, SCORES, columns_to_log=["query", "ref_response"])


# Set-up


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": None}, "config is a NoneType"),
        ({"model": "gpt2"}, "model is a str"),
        ({"ref_model": tiny_gpt2()}, "ref_model is a GPT2LMHeadModel"),
        ({"tokenizer": None}, "tokenizer is a NoneType"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    whole = {
        "config": make_config(),
        "model": AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()),
        "tokenizer": tiny_tokenizer(),
    }
    with pytest.raises(ConfigError, match=message):
        PPOTrainer(**whole | arguments)


def test_a_two_dimensional_query_is_refused(trainer: PPOTrainer) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        trainer.generate(QUERIES[0].unsqueeze(0))
    with pytest.raises(ValueError, match="num_return_sequences=3"):
        trainer.generate(QUERIES[0], num_return_sequences=3)


@pytest.mark.parametrize("hook", ["compute_rewards", "loss", "train_minibatch", "batched_forward_pass"])
def test_hooks_that_no_step_would_call_are_refused_with_what_to_write(hook: str) -> None:
    with pytest.raises(TypeError, match=f"Own.{hook} would never be called: "):
        type("Own", (PPOTrainer,), {hook: lambda self: None})
    with pytest.raises(AttributeError, match=f"PPOTrainer has no {hook}: "):
        getattr(make_trainer(), hook)


def test_other_methods_may_be_overridden() -> None:
    class Own(PPOTrainer):
        def log_stats(self, *args: Any, **kwargs: Any) -> None:
            self.logged = True

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    own = Own(make_config(), model, None, tiny_tokenizer())
    own.log_stats()
    assert own.logged


@pytest.fixture
def dataset() -> Dataset:
    rows = [{"review": "text", "input_ids": [5 + i, 6], "query": f"query {i}"} for i in range(10)]
    return Dataset.from_list(rows).with_format("torch")


def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def test_the_data_loader_gives_full_batches_of_the_columns_that_are_used(dataset: Dataset) -> None:
    trainer = make_trainer(options={"dataset": dataset, "data_collator": collate})
    assert trainer.dataloader is not None
    batches = list(trainer.dataloader)
    assert [sorted(batch) for batch in batches] == [["input_ids", "query"]] * 2
    assert all(len(batch["query"]) == 4 for batch in batches)
    assert len({query for batch in batches for query in batch["query"]}) == 8
    kept = make_trainer(options={"dataset": dataset, "data_collator": collate}, remove_unused_columns=False)
    assert kept.dataloader is not None
    assert "review" in next(iter(kept.dataloader))


def test_a_data_set_smaller_than_a_batch_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="3 rows, fewer than batch_size=4"):
        make_trainer(options={"dataset": dataset.select(range(3))})


def test_numbers_reach_tensorboard_under_their_names(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    for _ in range(2):
        statistics = trainer.step(QUERIES, RESPONSES, SCORES)
        trainer.log_stats(statistics, {"query": ["q"] * 4, "response": ["r"] * 4}, SCORES)
    trainer.accelerator.end_training()
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    rewards = events.Scalars("env/reward_mean")
    assert [(event.step, event.value) for event in rewards] == [(1, 0.625), (2, 0.625)]
    assert "objective/kl" in events.Tags()["scalars"]


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_is_a_policy_that_the_stages_load(tmp_path: Path, lora: bool) -> None:
    base = tiny_gpt2_dir(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base), peft_config=config if lora else None)
    trainer = PPOTrainer(make_config(), model, None, tiny_tokenizer())
    trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.save_pretrained(str(tmp_path / "saved"))
    assert "PPO steps of 4 samples" in (tmp_path / "saved/README.md").read_text()
    assert (tmp_path / "saved/tokenizer.json").is_file()
    policy = load_policy(tmp_path / "saved", LoraSettings(enabled=lora))
    assert torch.equal(policy.v_head.weight, model.v_head.summary.weight)
    saved = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert saved
    own = dict(model.pretrained_model.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in saved.items())


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_best_policy_is_uploaded_whole(hub: Hub) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "policy"})
    for scores in ([1.0] * 4, [0.5] * 4, [2.0] * 4):
        trainer.step(QUERIES, RESPONSES, [torch.tensor(score) for score in scores])
    assert [name for name, _, _ in hub.commits] == ["me/policy"] * 2
    wanted = {"model.safetensors", "config.json", "value_head.safetensors", "tokenizer.json", "README.md"}
    assert wanted <= hub.repos["me/policy"].keys()
    assert trainer.model.push_to_hub("me/alone", private=True) == f"{hub.url}/me/alone"
    assert "README.md" not in hub.repos["me/alone"]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_hub_that_refuses_the_best_policy_does_not_end_the_training(hub: Hub) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "policy"})
    hub.fail("commit", 403, "no")
    with pytest.warns(UserWarning, match="the best policy so far was not uploaded: policy at .*the hub answers 403"):
        statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    assert statistics["ppo/mean_scores"] == pytest.approx(0.625)
    hub.fail("commit", 403, "no")
    with pytest.raises(HubRejected):  # the program asked for it
        trainer.push_to_hub("policy")
