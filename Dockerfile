# A service that answers for the run folder mounted at /run-folder:
#   docker build -t meshuffle .
#   docker run --rm -p 8000:8000 -v "$PWD/runs/demo:/run-folder:ro" meshuffle
# PyTorch as pip finds it brings CUDA: run with --gpus all. For an image of a tenth of the size, CPU
# only, name the index of PyTorch's CPU wheels, which its installation page gives:
#   docker build --build-arg TORCH_INDEX=… -t meshuffle .
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
ARG TORCH_INDEX=
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir torch torchvision ${TORCH_INDEX:+--index-url $TORCH_INDEX} \
 && /venv/bin/pip install --no-cache-dir '.[serve,openvino]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin meshuffle
COPY --from=build /venv /venv
USER 10001
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s --interval=15s --timeout=5s CMD \
  ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["meshuffle", "serve", "/run-folder", "--host", "0.0.0.0"]
