"""A classifier behind LitServe, as its documentation's image example has it; needs litserve.

python benchmarks/servers/litserve_plain.py PORT [WORKERS [BATCH]]
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import litserve
import torch
import torchvision
from PIL import Image
from torchvision import transforms


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        if workers > 1:  # or each takes all cores
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
        self.model = torchvision.models.shufflenet_v2_x1_0().eval().to(device)
        self.transform = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def decode_request(self, request):  # LitServe reads annotations as FastAPI does
        content = request["image"].file.read()
        return self.transform(Image.open(io.BytesIO(content)).convert("RGB"))

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(output)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(x if x.ndim == 4 else x[None]).softmax(1)

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        top = output.flatten().topk(5)
        return {"classes": top.indices.tolist(), "probabilities": top.values.tolist()}


port, workers, batch = (int(v) for v in (*sys.argv[1:], 1, 1)[:3])

if __name__ == "__main__":
    api = Classifier(max_batch_size=batch, batch_timeout=0.002 if batch > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers)
    server.run(port=port, generate_client_file=False, log_level="warning")
