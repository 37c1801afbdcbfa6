"""KServe's own model server around the stand-ins' model. Run by an interpreter that has `kserve`, not by the tests'."""

import argparse
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

from harness.foreign.stand_ins import LABELS, logits


class Judge(Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("judge")
        self.ready = True

    def get_input_types(self) -> list[dict[str, Any]]:
        return [{"name": "text", "datatype": "BYTES", "shape": [-1]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        return [{"name": "logits", "datatype": "FP64", "shape": [-1, len(LABELS)]}]

    async def predict(self, payload: InferRequest, *arguments: Any, **named: Any) -> InferResponse:
        texts = [text.decode() if isinstance(text, bytes) else text for text in payload.inputs[0].data]
        flat = [logit for text in texts for logit in logits(text)]
        output = InferOutput(name="logits", shape=[len(texts), len(LABELS)], datatype="FP64", data=flat)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    ModelServer(http_port=parser.parse_args().port, enable_grpc=False).start([Judge()])
