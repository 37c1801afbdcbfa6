"""The model by other engines, one thread each: torch, ONNX Runtime, OpenVINO, in fp32 or int8.

`load(engine, number_format, directory)` returns a function from texts to rewards. Converted models are kept in the
model's directory for the next server. Settings are those that were fastest of the ones tried
(docs/evidence/reward-speed.md). All tokenise with `tokenizers` alone.
"""

import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
from tokenizers import Tokenizer

MAX_TOKENS = 512
CALIBRATION_TEXTS = 24
PACKAGES = {
    ("torch", "fp32"): ("torch", "transformers"),
    ("torch", "int8"): ("torch", "transformers"),
    ("onnxruntime", "fp32"): ("torch", "transformers", "onnx", "onnxruntime"),
    ("onnxruntime", "int8"): ("torch", "transformers", "onnx", "onnxruntime"),
    ("openvino", "fp32"): ("torch", "transformers", "onnx", "openvino"),
    ("openvino", "int8"): ("torch", "transformers", "onnx", "openvino", "nncf"),
}

Inputs = tuple[numpy.ndarray, numpy.ndarray]
"""Ids and mask, int64 [texts, tokens]."""
Model = Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray]
"""Logits [texts, labels]."""


def load(engine: str, number_format: str, directory: str) -> Callable[[list[str]], list[float]]:
    """Rewards (the logit of label 1) of a list of texts, as one padded batch.

    Exits with one line where this Python lacks a package that the engine needs.
    """
    absent = [name for name in PACKAGES[engine, number_format] if importlib.util.find_spec(name) is None]
    if absent:
        sys.exit(
            f"{engine} in {number_format} needs {', '.join(absent)}: {sys.executable} -m pip install {' '.join(absent)}"
        )
    folder = Path(directory)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = {"torch": _torch, "onnxruntime": _onnxruntime, "openvino": _openvino}[engine](
        folder, number_format, tokenizer
    )
    return lambda texts: model(*_inputs(tokenizer, texts))[:, 1].tolist()


def _inputs(tokenizer: Tokenizer, texts: list[str]) -> Inputs:
    encoded = tokenizer.encode_batch(texts)
    width = min(MAX_TOKENS, max(len(each.ids) for each in encoded))
    ids = numpy.zeros((len(encoded), width), dtype=numpy.int64)
    mask = numpy.zeros_like(ids)
    for row, each in enumerate(encoded):
        tokens = each.ids[:width]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def _torch(folder: Path, number_format: str, _: Tokenizer) -> Model:
    import torch

    torch.set_num_threads(1)
    model = _transformers_model(folder)
    if number_format == "int8":
        with warnings.catch_warnings(action="ignore"):
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def logits(ids: numpy.ndarray, mask: numpy.ndarray) -> numpy.ndarray:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()

    return logits


def _onnxruntime(folder: Path, number_format: str, _: Tokenizer) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    path = _fused_onnx(folder) if number_format == "fp32" else _dynamic_int8_onnx(folder)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()

    def logits(ids: numpy.ndarray, mask: numpy.ndarray) -> numpy.ndarray:
        # The fused embedding takes int32.
        fed = {
            each.name: array.astype(numpy.int32) if "int32" in each.type else array
            for each, array in zip(inputs, (ids, mask), strict=True)
        }
        return session.run(None, fed)[0]

    return logits


def _openvino(folder: Path, number_format: str, tokenizer: Tokenizer) -> Model:
    import openvino

    path = _onnx(folder) if number_format == "fp32" else _calibrated_int8(folder, tokenizer)
    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": 1,
        # It would take bf16 where the processor has it.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda ids, mask: request.infer([ids, mask], share_inputs=True)[0].copy()


def _transformers_model(folder: Path, **settings: str):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()


def _kept(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make` unless it is there. `make` writes beside it, so that half a file is never taken."""
    if not path.exists():
        unfinished = path.with_stem(f"unfinished-{os.getpid()}")
        make(unfinished)
        for suffix in (".xml", ".bin") if path.suffix == ".xml" else (path.suffix,):
            unfinished.with_suffix(suffix).rename(path.with_suffix(suffix))
    return path


def _onnx(folder: Path) -> Path:
    """Exported with plain attention by the older exporter, whose graph ONNX Runtime can fuse."""

    def export(path: Path) -> None:
        import torch

        model = _transformers_model(folder, attn_implementation="eager")

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids, mask):
                return self.model(input_ids=ids, attention_mask=mask).logits

        ids = torch.randint(4, 20, (2, 9))
        any_shape = {0: "texts", 1: "tokens"}
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                Logits(),
                (ids, torch.ones_like(ids)),
                str(path),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_axes={"input_ids": any_shape, "attention_mask": any_shape, "logits": {0: "texts"}},
                opset_version=17,
                dynamo=False,
            )

    return _kept(folder / "plain.onnx", export)


def _fused_onnx(folder: Path) -> Path:
    """Attention, embeddings, layer norms and GELU as one operator each."""

    def fuse(path: Path) -> None:
        from onnxruntime.transformers import optimizer
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        fused = optimizer.optimize_model(str(_onnx(folder)), model_type="bert", opt_level=0, **sizes)
        if (layers := len(fused.get_nodes_by_op_type("Attention"))) != config.num_hidden_layers:
            sys.exit(f"ONNX Runtime fused the attention of {layers} layers out of {config.num_hidden_layers}")
        fused.save_model_to_file(str(path))

    return _kept(folder / "fused.onnx", fuse)


def _dynamic_int8_onnx(folder: Path) -> Path:
    def quantise(path: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(_fused_onnx(folder)),
            str(path),
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )

    return _kept(folder / "int8.onnx", quantise)


def _calibrated_int8(folder: Path, tokenizer: Tokenizer) -> Path:
    """nncf's 8-bit form for transformers: scales of weights and activations fixed by calibration texts."""

    def quantise(path: Path) -> None:
        import nncf
        import openvino

        dice = random.Random(1)
        words = [word for word in tokenizer.get_vocab() if word.isalpha()]
        texts = [" ".join(dice.choices(words, k=dice.randint(5, 200))) for _ in range(CALIBRATION_TEXTS)]
        samples = nncf.Dataset(
            [dict(zip(("input_ids", "attention_mask"), _inputs(tokenizer, [text]), strict=True)) for text in texts]
        )
        plain = openvino.Core().read_model(str(_onnx(folder)))
        quantised = nncf.quantize(plain, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION_TEXTS)
        openvino.save_model(quantised, str(path), compress_to_fp16=False)

    return _kept(folder / "int8.xml", quantise)
