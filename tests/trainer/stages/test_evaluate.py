"""Before against after: the same prompts, the same random numbers, and nothing made up about either."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch

from harness.stub_reward_server import StubRewardServer, stub_reward
from harness.tiny_models import save, tiny_gpt2, tiny_llama2_tokenizer
from plaudit import cli, errors
from plaudit.errors import ConfigError, NotFinite
from plaudit.policy.adapters import add_lora
from plaudit.policy.generation import Draws, generate
from plaudit.report.evaluation import Answers, compare
from plaudit.rewards import RewardRejected
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.run.metrics import KL, REWARD_MEAN, MetricsLog
from plaudit.run.storage import NotWritten
from plaudit.settings.data import DataSettings
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.stages import evaluate

N = 20


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_gpt2(), tmp_path_factory.mktemp("policy"))


def save_adapters(policy_dir: Path, path: Path, *, trained: bool) -> Path:
    model = add_lora(tiny_gpt2(), LoraSettings(r=4))
    model.peft_config["default"].base_model_name_or_path = str(policy_dir)
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(policy_dir, tmp_path_factory.mktemp("trained"), trained=True)


@pytest.fixture(scope="module")
def module_config(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[EvaluateConfig]:
    directory = tmp_path_factory.mktemp("evaluate")
    # Of this module alone: `start_stub` never gives it to a test as a further server.
    server = StubRewardServer()
    texts = directory / "texts.txt"
    texts.write_text("\n".join(f"Film number {i} " + "was a film that I saw. " * 12 for i in range(80)))
    yield EvaluateConfig(
        after=str(trained),
        output_dir=directory / "out",
        dataset=DataSettings(data=str(texts), held_out_fraction=0.5),
        generation=GenerationSettings(batch_size=8),
        reward=RewardSettings.of(url=(server.url,)),
        n_prompts=N,
    )
    server.kill()


@pytest.fixture
def config(module_config: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    return dataclasses.replace(module_config, output_dir=tmp_path / "out")


def judge(config: EvaluateConfig) -> evaluate.EvaluationResult:
    """The evaluation by a reward model."""
    result = evaluate.run(config)
    assert isinstance(result, evaluate.EvaluationResult)
    return result


@pytest.fixture(scope="module")
def judged(module_config: EvaluateConfig) -> evaluate.EvaluationResult:
    """The trained adapters' evaluation, whose files are in `module_config.output_dir`."""
    with MetricsLog(Path(module_config.after), tensorboard=False) as log:
        for step in range(3):
            log.write(step, {REWARD_MEAN: float(step), KL: 0.1 * step})
    return judge(module_config)


def test_untrained_adapters_change_nothing(config, policy_dir, tmp_path):
    untrained = save_adapters(policy_dir, tmp_path / "untrained", trained=False)
    result = judge(dataclasses.replace(config, after=str(untrained)))
    assert all(row.response_before == row.response_after for row in result.samples)
    assert result.evaluation.reward.difference.mean == 0
    assert result.evaluation.kl == pytest.approx(0, abs=1e-4)
    assert result.evaluation.perplexity.ratio == pytest.approx(1)


def test_trained_adapters_answer_otherwise_and_cost_kl(judged):
    assert any(row.response_before != row.response_after for row in judged.samples)
    assert judged.evaluation.kl > 0


def test_every_reward_is_that_of_its_own_prompt_and_response(judged):
    for row in judged.samples:
        assert row.reward_before == pytest.approx(stub_reward(row.query, row.response_before))
        assert row.reward_after == pytest.approx(stub_reward(row.query, row.response_after))


def test_a_whole_model_is_judged_like_the_adapters_it_was_merged_from(config, judged, policy_dir, trained, tmp_path):
    merged = peft.PeftModel.from_pretrained(tiny_gpt2(), str(trained)).merge_and_unload()
    save(merged, tmp_path / "merged")
    whole = judge(dataclasses.replace(config, after=str(tmp_path / "merged"), policy=str(policy_dir)))
    assert whole.samples == judged.samples
    assert whole.evaluation.kl == pytest.approx(judged.evaluation.kl, abs=1e-3)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 20}])
def test_the_perplexity_is_that_of_the_plain_reference_however_responses_were_sampled(config, policy_dir, sampling):
    config = dataclasses.replace(config, generation=dataclasses.replace(config.generation, **sampling))
    config = dataclasses.replace(config, n_prompts=2)
    loss, tokens = 0.0, 0
    policy, tokenizer = evaluate.load_pair(config)
    prompts, settings = evaluate.held_out_prompts(config, policy, tokenizer), config.generation
    draws = Draws.of(settings, 2, seed=config.seed, step=0)
    samples = generate(policy.language_model, prompts.token_ids, draws, settings, tokenizer)
    reference = tiny_gpt2()
    for query, row, mask in zip(prompts.token_ids, samples.response_ids, samples.mask, strict=True):
        response = row[mask].tolist()
        labels = torch.tensor([[-100] * len(query) + response])
        loss += reference(torch.tensor([query + response]), labels=labels).loss.item() * len(response)
        tokens += len(response)
    assert judge(config).evaluation.perplexity.after == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_truncated_sampling_still_gives_a_kl_that_is_finite_and_positive(config):
    generation = GenerationSettings(batch_size=8, temperature=0.7, top_k=20)
    kl = judge(dataclasses.replace(config, generation=generation)).evaluation.kl
    assert 0 < kl < math.inf


def test_the_same_seed_gives_the_same_figures_and_the_batch_size_does_not_matter(config, judged):
    again = judge(dataclasses.replace(config, generation=GenerationSettings(batch_size=7)))
    assert again.samples == judged.samples
    assert again.evaluation.kl == pytest.approx(judged.evaluation.kl, abs=1e-4)
    assert judge(dataclasses.replace(config, seed=1)).samples != judged.samples


def test_the_files_hold_what_was_found(module_config, judged):
    directory = module_config.output_dir
    document = json.loads((directory / "evaluation.json").read_text())
    assert document["n"] == N
    assert document["kl"] == judged.evaluation.kl
    assert document["reward"]["difference"]["mean"] == judged.evaluation.reward.difference.mean
    with (directory / "samples.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["response_after"] for row in rows] == [row.response_after for row in judged.samples]
    assert "3 PPO steps" in (directory / "report.html").read_text()


def test_the_console_shows_the_table_and_where_the_report_is(config, capsys):
    evaluate.run(config)
    printed = capsys.readouterr().out
    for words in ("reward, mean", "distinct responses", "query", str(config.output_dir / "report.html")):
        assert words in printed


def test_all_held_out_prompts_are_taken_with_a_warning_if_there_are_fewer_than_asked_for(config, capsys):
    result = evaluate.by_rewards(dataclasses.replace(config, n_prompts=500))
    n = result.evaluation.n
    assert 2 <= n < 500
    assert (
        f"has {n} held-out prompts, fewer than n_prompts=500: the figures are those of {n}" in capsys.readouterr().err
    )


def test_any_number_of_policies_and_judges(config, judged, policy_dir, tmp_path, start_stub, monkeypatch):
    monkeypatch.setenv("PLAUDIT_REWARD_API_KEY", "secret-of-the-first")
    untrained = save_adapters(policy_dir, tmp_path / "untrained", trained=False)
    servers = [start_stub(), start_stub()]
    judges = RewardSettings(tuple(RewardComponent(name=f"j{i}", url=(s.url,)) for i, s in enumerate(servers)))
    result = judge(dataclasses.replace(config, also=(str(untrained),), judges=judges))
    # The comparison of the first policy is what it was.
    assert result.evaluation == judged.evaluation
    assert result.samples == judged.samples
    before, after, other = result.policies
    assert (before.policy, after.policy, other.policy) == (str(policy_dir), config.after, str(untrained))
    assert after.reward.mean.value == judged.evaluation.reward.after.mean
    assert after.kl.value == judged.evaluation.kl
    # Untrained adapters answer as the policy before does.
    assert other.reward.mean == before.reward.mean
    assert other.reward.win_rate is not None
    assert other.reward.win_rate.value == 0.5
    assert other.perplexity_ratio is not None
    assert other.perplexity_ratio.ci95 == pytest.approx((1, 1))
    for figures in result.policies:
        # All judges are the same function of the text here.
        for name in ("j0", "j1"):
            assert figures.judges[name].mean.value == pytest.approx(figures.reward.mean.value)
        for figure in (figures.reward.mean, figures.reward.median, figures.kl, figures.perplexity, figures.length):
            assert figure.ci95[0] <= figure.value <= figure.ci95[1]
    assert all("authorization" not in server.state["headers"] for server in servers)
    saved = json.loads((config.output_dir / "evaluation.json").read_text())
    assert [policy["policy"] for policy in saved["policies"]] == [str(policy_dir), config.after, str(untrained)]
    page = (config.output_dir / "report.html").read_text()
    assert "j1, win rate" in page
    assert str(untrained) in page


def test_one_policy_named_twice_is_refused(config):
    with pytest.raises(ConfigError, match="one policy stands twice"):
        dataclasses.replace(config, also=(config.after,))


def test_a_directory_without_adapters_or_model_is_one_line(tmp_path, capsys):
    assert cli.run(["evaluate", "--after", str(tmp_path), "--reward.url", "http://127.0.0.1:9"]) == errors.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"plaudit evaluate: after='{tmp_path}' holds neither adapters nor a model")


def test_a_label_that_the_classifier_lacks_is_refused_with_the_labels_there_are(config, capsys):
    flags = ["--after", config.after, "--data", config.dataset.data, "--held-out-fraction", "0.5", "--n-prompts", "5"]
    code = cli.run(["evaluate", *flags, "--reward.url", *config.reward.components[0].url, "--reward.label", "HAPPY"])
    assert code == errors.EXIT_REJECTED
    line = capsys.readouterr().err.splitlines()[-1]
    for words in ("HAPPY", "NEGATIVE", "POSITIVE"):
        assert words in line


def test_a_reward_service_that_is_not_there_ends_with_code_75(config, capsys):
    flags = ["--after", config.after, "--data", config.dataset.data, "--held-out-fraction", "0.5", "--n-prompts", "5"]
    code = cli.run(["evaluate", *flags, "--reward.url", "http://127.0.0.1:9", "--reward.patience-s", "0.2"])
    assert code == errors.EXIT_UNAVAILABLE
    assert "127.0.0.1:9" in capsys.readouterr().err.splitlines()[-1]


def test_a_refused_reward_leaves_the_exchange_on_disk_and_says_where(
    config: EvaluateConfig, stub_reward_server: StubRewardServer
) -> None:
    stub_reward_server.script([{"do": "wrong_count"}])
    with pytest.raises(RewardRejected) as caught:
        evaluate.run(dataclasses.replace(config, reward=RewardSettings.of(url=(stub_reward_server.url,))))
    path = config.output_dir / "rejected-reward.json"
    assert json.loads(path.read_text())["exchange"]["status"] == 200
    assert caught.value.__notes__ == [f"the request and the answer are in {path}"]


def test_two_runs_are_compared_with_each_other_and_not_with_their_base(config, policy_dir, trained, judged, tmp_path):
    """A run beside itself: no difference. Its merged model beside it: none either. Its base is another matter."""
    generation = GenerationSettings(batch_size=8)
    again = judge(dataclasses.replace(config, policy=str(trained), generation=generation))
    assert all(row.response_before == row.response_after for row in again.samples)
    assert [row.response_after for row in again.samples] == [row.response_after for row in judged.samples]
    assert again.evaluation.kl == pytest.approx(0, abs=1e-3)
    other = save_adapters(policy_dir, tmp_path / "other", trained=False)
    turned = judge(dataclasses.replace(config, policy=str(trained), after=str(other), generation=generation))
    assert [row.response_before for row in turned.samples] == [row.response_after for row in judged.samples]
    assert [row.response_after for row in turned.samples] == [row.response_before for row in judged.samples]


def test_adapters_are_put_on_the_model_they_were_trained_on_whatever_they_are_compared_with(config, judged, tmp_path):
    elsewhere = save(tiny_gpt2(seed=5), tmp_path / "elsewhere")
    result = judge(dataclasses.replace(config, policy=str(elsewhere)))
    assert [row.response_after for row in result.samples] == [row.response_after for row in judged.samples]
    assert [row.response_before for row in result.samples] != [row.response_before for row in judged.samples]


def test_adapters_whose_model_has_moved_go_on_the_one_that_is_named_and_it_says_so(
    config, policy_dir, judged, tmp_path, capsys
):
    moved = save_adapters(policy_dir, tmp_path / "moved", trained=True)
    described = moved / "adapter_config.json"
    settings = json.loads(described.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    described.write_text(json.dumps(settings))
    result = judge(dataclasses.replace(config, after=str(moved), policy=str(policy_dir)))
    assert result.samples == judged.samples
    assert "no such directory" in capsys.readouterr().out


def test_policies_with_different_tokenizers_are_not_compared(config, tmp_path):
    tokenizer = tiny_llama2_tokenizer()
    other = save(tiny_gpt2(vocab_size=len(tokenizer)), tmp_path / "other", tokenizer)
    with pytest.raises(ConfigError, match="have different tokenizers"):
        evaluate.run(dataclasses.replace(config, policy=str(other)))


def test_a_directory_that_cannot_be_written_to_is_told_before_any_answer(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match="cannot write"):
        evaluate.run(dataclasses.replace(config, output_dir=tmp_path / "file", after="nowhere"))


def test_prompts_and_answers_must_have_positions(config):
    with pytest.raises(ConfigError, match="has 64 positions, and a prompt of"):
        evaluate.run(dataclasses.replace(config, generation=GenerationSettings(max_new_tokens=64)))


def test_a_figure_that_is_not_finite_is_an_error(judged):
    answers = Answers(("a", "b"), (1.0, 2.0), (-1.0, math.nan), (-1.0, -1.0), (-1.0, -1.0), (1, 1))
    with pytest.raises(NotFinite, match="logprobs of the answer after to prompt 1 is nan"):
        compare(dataclasses.replace(answers, logprobs=(-1.0, -1.0)), answers)
