"""What a model directory lacks, or contradicts, is one line at the start; what it holds is what serves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from harness.tiny_judges import tiny_judge
from harness.tiny_models import save, tiny_classifier_dir
from plaudit.reward_service.engine import loading
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.engine.scorer import TransformersScorer, load_scorer
from plaudit.reward_service.settings import Settings
from plaudit.wire.revisions import content_revision

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses attributes by their old names
TEXTS = ["this movie was great", "the worst plot of a film , not good", "x"]
Change = Callable[[Path], Any]


def scorer_of(directory: Path | str, **settings: Any) -> TransformersScorer:
    return load_scorer(Settings(model=str(directory), **settings))


def refusal(directory: Path | str, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        scorer_of(directory, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scores(scorer: TransformersScorer) -> torch.Tensor:
    return torch.tensor(scorer.score(scorer.encode([(text, None) for text in TEXTS]), 0))


def logits(model: Any, directory: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.inference_mode():
        return torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


def configured(directory: Path, **changes: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def with_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def without_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def without_words(directory: Path) -> None:
    without_tokenizer(directory)
    (directory / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")


def deaf(directory: Path) -> None:
    """Every word is the same token to this tokenizer, though it knows many."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"\S+"}, "content": "film"}
    (directory / "tokenizer.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        (
            "distilbert",
            without_tokenizer,
            "no vocabulary for its tokenizer, a BertTokenizer: there is no tokenizer.json",
        ),
        ("distilbert", without_words, "a BertTokenizer, that knows no words, only 5 special tokens"),
        ("distilbert", deaf, "that gives different words the same tokens"),
    ],
)
def test_a_tokenizer_that_tells_no_words_apart_is_refused_by_name(
    tmp_path: Path, family: str, change: Change, said: str
) -> None:
    change(tiny_classifier_dir(tmp_path, family=family))
    with pytest.raises(ModelError, match=said):
        scorer_of(tmp_path)


@pytest.mark.parametrize("token", ["<|user|>", "[PAD]"])
def test_a_token_without_a_row_in_the_embedding_is_named(tmp_path: Path, token: str) -> None:
    tiny_judge(tmp_path, "gpt2", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.save_pretrained(tmp_path)
    assert f"a tokenizer with 301 tokens and a model with an embedding for 300: '{token}' (id 300)" in refusal(tmp_path)


def test_a_padding_token_without_a_row_is_never_used(tmp_path: Path) -> None:
    directory = tiny_judge(tmp_path, "gpt2")
    configured(directory, pad_token_id=5000)
    scorer = scorer_of(directory)
    assert scorer.batching == "by length"
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    torch.testing.assert_close(scores(scorer), logits(model, directory), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"id2label": {"0": "x", "1": "x"}}, "gives the same name to several labels: x, x"),
        ({"id2label": {"0": "NEG", "1": None}}, "calls logit 1 None"),
        ({"id2label": {"0": "NEG", "1": True}}, "calls logit 1 True"),
        ({"id2label": {"1": "NEG", "2": "POS"}}, "names the labels 1, 2 .* and its logits are 0 to 1"),
        (
            {"id2label": {"0": "NEG", "1": "POS"}, "label2id": {"NEG": 1, "POS": 0}},
            "label NEG is logit 0 by id2label and logit 1 by label2id",
        ),
        ({"id2label": {"0": 1, "1": 0}, "label2id": {"0": 0, "1": 1}}, "label 1 is logit 0 by id2label and logit 1"),
    ],
)
def test_labels_that_can_be_read_in_two_ways_are_refused(tmp_path: Path, labels: dict[str, Any], said: str) -> None:
    configured(tiny_classifier_dir(tmp_path), **labels)
    with pytest.raises(ModelError, match=said):
        scorer_of(tmp_path)


def test_numbers_are_names_of_labels_and_the_names_say_which_logit(tmp_path: Path) -> None:
    configured(tiny_classifier_dir(tmp_path), id2label={"0": 1, "1": 0}, label2id={"0": 1, "1": 0})
    assert scorer_of(tmp_path, label="1").labels == ("1", "0")


def poison(number: float) -> Change:
    return lambda directory: with_weights(
        directory, lambda weights: weights["distilbert.embeddings.word_embeddings.weight"][7].fill_(number)
    )


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (poison(float("nan")), {}, r"its weights hold NaN \(distilbert.embeddings.word_embeddings.weight\)"),
        (poison(1e30), {"dtype": "fp16"}, "its weights hold infinity in fp16 .*; try --dtype bf16 or fp32"),
    ],
)
def test_weights_that_are_no_numbers_are_refused_at_the_start(
    tmp_path: Path, change: Change, settings: dict[str, Any], said: str
) -> None:
    change(tiny_classifier_dir(tmp_path))
    with pytest.raises(ModelError, match=said):
        scorer_of(tmp_path, **settings)


def further_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["distilbert.transformer.layer.2.ffn.lin1.weight"] = torch.zeros(64, 32)


def narrow_head(weights: dict[str, torch.Tensor]) -> None:
    weights["classifier.weight"] = torch.zeros(3, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (further_layer, "doesn't have .distilbert.transformer.layer.2.ffn.lin1.weight., so it was trained as"),
        (narrow_head, "classifier.weight is 3x32 in the file and 2x32 by the configuration"),
    ],
)
def test_weights_that_the_configuration_has_no_place_for_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    with_weights(tiny_classifier_dir(tmp_path), change)
    with pytest.raises(ModelError, match=said):
        scorer_of(tmp_path)


def test_a_family_that_classifies_nothing_is_one_line(tmp_path: Path) -> None:
    save(MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, state_size=4)), tmp_path)
    said = refusal(tmp_path)
    assert "is of the family mamba, of which transformers has no sequence classifier; train a judge of another" in said


def test_half_precision_files_are_served_in_the_format_that_is_asked_for(tmp_path: Path) -> None:
    directory = tiny_classifier_dir(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float16).save_pretrained(directory)
    whole = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    torch.testing.assert_close(scores(scorer_of(directory)), logits(whole, directory), atol=1e-5, rtol=0)


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer that does something to its texts before its core gets them."""

    def __call__(self, text: Any = None, *further: Any, **settings: Any) -> Any:
        return super().__call__(text.replace("a", "o"), *further, **settings)


def test_a_tokenizer_that_does_more_than_its_core_is_asked_as_transformers_asks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_classifier_dir(tmp_path)
    monkeypatch.setattr(loading, "AutoTokenizer", Shouting)
    [encoded] = scorer_of(directory).encode([("bad film", None)])
    assert list(encoded.ids) == AutoTokenizer.from_pretrained(directory)("bod film")["input_ids"]


class Trained:
    """Adapters with a trained head for a base without one, as peft saves them."""

    def __init__(self, folder: Path, family: str = "distilbert", **settings: Any) -> None:
        self.base, self.directory = folder / "base", folder / "adapters"
        judge = tiny_classifier_dir(folder / "judge", family=family)
        AutoModel.from_pretrained(judge).save_pretrained(self.base)
        AutoTokenizer.from_pretrained(judge).save_pretrained(self.base)
        heads = {"distilbert": ["pre_classifier", "classifier"], "gpt2": ["score"]}
        settings = {
            "r": 4,
            "fan_in_fan_out": family == "gpt2",
            "modules_to_save": heads[family],
            "task_type": "SEQ_CLS",
        } | settings
        torch.manual_seed(1)
        plain = AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=3)
        self.model = peft.get_peft_model(plain, peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
        self.model.save_pretrained(self.directory)


@pytest.mark.parametrize(("family", "targets"), [("distilbert", ["q_lin", "v_lin"]), ("gpt2", ["c_attn"])])
def test_adapters_serve_on_their_base_model_with_their_own_head(
    tmp_path: Path, family: str, targets: list[str]
) -> None:
    trained = Trained(tmp_path, family, target_modules=targets)
    scorer = scorer_of(trained.directory)
    assert scorer.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    torch.testing.assert_close(scores(scorer), logits(trained.model, trained.base), atol=1e-5, rtol=1e-5)


def test_the_revision_of_adapters_covers_their_base_model(tmp_path: Path) -> None:
    trained = Trained(tmp_path, target_modules=["q_lin"])
    before = scorer_of(trained.directory).revision
    with_weights(trained.base, lambda weights: weights["embeddings.word_embeddings.weight"].add_(0.1))
    assert scorer_of(trained.directory).revision != before


def test_adapters_beside_a_whole_model_are_refused_with_both_ways_on(tmp_path: Path) -> None:
    trained = Trained(tmp_path, target_modules=["q_lin"])
    shutil.copy(tmp_path / "judge" / "model.safetensors", trained.directory)
    shutil.copy(tmp_path / "judge" / "config.json", trained.directory)
    said = refusal(trained.directory)
    assert "holds a whole model and adapters (adapter_config.json)" in said
    assert "if they do, remove adapter_config.json" in said
    assert "if not, remove the model's weights" in said


def base_gone(trained: Trained) -> None:
    shutil.rmtree(trained.base)


def base_unnamed(trained: Trained) -> None:
    file = trained.directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))


def weights_gone(trained: Trained) -> None:
    (trained.directory / "adapter_model.safetensors").unlink()


def head_gone(trained: Trained) -> None:
    file = trained.directory / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if ".classifier" not in key}, file)


def half_gone(trained: Trained) -> None:
    file = trained.directory / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "layer.1.attention.q_lin" not in key}, file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (base_gone, "holds adapters for another model, which adapter_config.json names: there is no directory .*base"),
        (base_unnamed, "names no base_model_name_or_path; write it there"),
        (weights_gone, "no adapter_model.safetensors; give a complete directory"),
        (head_gone, "neither its adapters nor their base model .* hold classifier.bias, classifier.weight"),
        (half_gone, "don't fit their base model .*the adapters' file lacks .*layer.1.attention.q_lin"),
    ],
)
def test_adapters_that_are_not_all_there_are_refused(
    tmp_path: Path, change: Callable[[Trained], None], said: str
) -> None:
    trained = Trained(tmp_path, target_modules=["q_lin"])
    change(trained)
    with pytest.raises(ModelError, match=said):
        scorer_of(trained.directory)


def test_without_peft_adapters_are_refused_with_the_command_that_merges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(tmp_path, target_modules=["q_lin"])
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    said = refusal(trained.directory)
    assert "pip install 'plaudit[adapters]', or merge them first: python -c" in said
    assert f"from_pretrained('{trained.directory}').merge_and_unload()" in said


def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path, target_modules=["q_lin"])
    file = trained.directory / "adapter_config.json"
    prompts = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "SEQ_CLS"}
    file.write_text(json.dumps(prompts | {"base_model_name_or_path": str(trained.base)}))
    assert "adapters of type PROMPT_TUNING, which can't be added to a model's weights" in refusal(trained.directory)


def test_adapters_whose_sum_with_their_base_is_another_model_are_refused(tmp_path: Path) -> None:
    base = tiny_judge(tmp_path / "base", "zamba2")
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    shared = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(plain, shared)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapters")
    assert "the sum judges otherwise than base and adapters, because layers share a weight" in refusal(
        tmp_path / "adapters"
    )


@pytest.mark.parametrize("name", ["bpe.codes", "spm.model", "qwen.tiktoken", "vocab.txt", "merges.txt"])
def test_the_revision_covers_every_file_of_a_vocabulary(tmp_path: Path, name: str) -> None:
    before = content_revision(tmp_path)
    (tmp_path / name).write_text("words")
    assert content_revision(tmp_path) != before


def test_a_hub_id_behind_a_proxy_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **settings: object) -> str:
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "nor a model on the hub (ImportError: Using SOCKS proxy" in refusal("some/judge")


@pytest.mark.parametrize("family", ["gpt2", "roberta", "llama", "t5", "xlnet", "qwen2", "bloom", "esm", "modernbert"])
@pytest.mark.parametrize("kept", ["nothing", "tokenizer_config.json"])
def test_no_family_is_served_without_its_vocabulary(family: str, kept: str, tmp_path: Path) -> None:
    directory = tiny_judge(tmp_path, family)
    for file in directory.glob("tokenizer*"):
        if file.name != kept:
            file.unlink()
    said = refusal(directory)
    assert "holds no vocabulary for its tokenizer" in said or "holds no tokenizer that can be loaded" in said
    assert "copy the files of the tokenizer that the model was trained with" in said
