"""A classifier behind FastAPI as PyTorch's and FastAPI's tutorials have it.

python benchmarks/servers/fastapi_plain.py PORT
"""

from __future__ import annotations

import io
import sys

import torch
import torchvision
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from torchvision import transforms

app = FastAPI()
model = torchvision.models.shufflenet_v2_x1_0().eval()
transform = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


@app.post("/predict")
def predict(image: UploadFile) -> dict[str, object]:
    picture = Image.open(io.BytesIO(image.file.read())).convert("RGB")
    with torch.inference_mode():
        probabilities = model(transform(picture)[None])[0].softmax(0)
    top = probabilities.topk(5)
    return {"classes": top.indices.tolist(), "probabilities": top.values.tolist()}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
