"""`pipeline` as published programs call it, with the output that they expect.

Today's transformers ignores `return_all_scores=True` in silence and returns one label, the likeliest: a program that
reads `output[1]["score"]` fails, or takes the score of another label. Here the scores come in the order of the model's
labels, as they did. `load_in_8bit=True` among `model_kwargs`, which transformers no longer knows, becomes its
`quantization_config`.
"""

from typing import Any

import transformers

from plaudit import demo_models
from plaudit.classic.arguments import loading_arguments

CLASSIFIERS = ("text-classification", "sentiment-analysis")


class ClassicPipeline:
    """A transformers pipeline for text classification; `tokenizer`, `model` and the like are its own."""

    def __init__(self, pipeline: Any, *, return_all_scores: bool) -> None:
        self._pipeline, self._return_all_scores = pipeline, return_all_scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_pipeline"], name)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """`[{"label": …, "score": …}, …]` in label order for each text, or the likeliest label alone."""
        everything = kwargs.pop("return_all_scores", self._return_all_scores)
        if not everything:
            return self._pipeline(inputs, *args, **kwargs)
        alone = isinstance(inputs, str | dict)
        kwargs["top_k"] = None
        outputs = self._pipeline([inputs] if alone else inputs, *args, **kwargs)
        labels = self._pipeline.model.config.label2id
        return [sorted(output, key=lambda entry: labels[entry["label"]]) for output in outputs]


def pipeline(task: str | None = None, model: Any = None, **kwargs: Any) -> Any:
    """`transformers.pipeline`; for text classification, with `return_all_scores` at its making or at a call."""
    return_all_scores = kwargs.pop("return_all_scores", False)
    placed = {name: kwargs.pop(name) for name in ("device_map",) if name in kwargs}
    wanted = loading_arguments({**kwargs.pop("model_kwargs", {}), **placed})
    if "device_map" in wanted:
        kwargs["device_map"] = wanted.pop("device_map")
    kwargs["model_kwargs"] = wanted
    if isinstance(model, str):
        model = demo_models.resolve(model)
    made = transformers.pipeline(task, model=model, **kwargs)
    if made.task in CLASSIFIERS:
        return ClassicPipeline(made, return_all_scores=return_all_scores)
    return made
