from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from harness.foreign.hub import TOKEN, Hub, serving
from harness.tiny_models import tiny_gpt2_dir, tiny_tokenizer
from plaudit.policy import packing


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2_dir(tmp_path_factory.mktemp("policy"))


@pytest.fixture(params=["padded", "packed"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the model gets its samples. So few as a test has are not packed by themselves."""
    if request.param == "packed":
        monkeypatch.setattr(packing, "FEW_CELLS", 0)
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> object:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 300 labelled reviews, long enough for prompts; good ones say so in every sentence."""
    import pandas as pd

    words = {0: ("terrible", "boring", "awful"), 1: ("wonderful", "great", "moving")}
    rows = [
        {
            "text": f"Film {i} is {words[i % 2][i % 3]}. " + f"The acting is {words[i % 2][(i + 1) % 3]}. " * 12,
            "label": i % 2,
        }
        for i in range(300)
    ]
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty model hub, to which huggingface_hub uploads by LFS."""
    with serving(Hub()) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served
