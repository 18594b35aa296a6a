# syntax=docker/dockerfile:1
#   docker build -t codefuse-triton .
#   docker run --rm --stop-timeout=40 --gpus=all --shm-size=1g -p 8000:8000 -p 8001:8001 -v /data/my-weights:/weights:ro codefuse-triton
# Without a volume at /weights it serves the demo model; without --gpus it serves on the CPU.

# The base's Python (3.12, Ubuntu 24.04) and CUDA major version (13) must be those of the build image. The oldest toolkit of a
# major version makes binaries for every driver of that version.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.06-py3
ARG CUDA_IMAGE=nvcr.io/nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${CUDA_IMAGE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev python3-pip python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /build
ENV PATH=/build/bin:$PATH
WORKDIR /src
COPY CMakeLists.txt LICENSE README.md pyproject.toml ./
COPY native native
COPY backend_src backend_src
# CUDA_ARCHS: A100 80, L4 and L40 89, H100 and H200 90a
ARG CUDA_ARCHS="80;89;90a"
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
      -C cmake.define.CODEFUSE_CUDA=ON -C "cmake.define.CODEFUSE_CUDA_ARCHS=${CUDA_ARCHS}" \
 && pip install --no-cache-dir /wheels/*.whl
COPY tools tools
COPY model_repository model_repository
# The weights and the tokenizer come from /weights, a volume in production.
RUN python3 tools/convert.py tools/demo/checkpoint /weights \
 && sed -i -e 's|\(key: "weights", value: { string_value: \)""|\1"/weights"|' \
           -e 's|\(key: "tokenizer_dir", value: { string_value: \)"[^"]*"|\1"/weights"|' model_repository/*/config.pbtxt \
 && test -z "$(grep -L 'string_value: "/weights"' model_repository/tokenizer/config.pbtxt \
      model_repository/detokenizer/config.pbtxt model_repository/generator/config.pbtxt)"

FROM ${TRITON_IMAGE}
# cuBLAS comes with the base. The Python backend takes its packages from the first python3 on PATH: this environment.
COPY --from=build /wheels /wheels
RUN python3 -m venv --without-pip /opt/codefuse-triton/venv \
 && python3 -m pip --python /opt/codefuse-triton/venv/bin/python install --no-cache-dir /wheels/*.whl
ENV PATH=/opt/codefuse-triton/venv/bin:$PATH
WORKDIR /opt/codefuse-triton
COPY --from=build /weights /weights
COPY --from=build /src/model_repository model_repository
COPY --from=build /src/tools tools
USER 1000:1000
EXPOSE 8000 8001 8002
# A server whose model process has died still says it is ready: only a real completion shows that it works.
HEALTHCHECK --interval=30s --timeout=20s --start-period=300s --retries=3 \
  CMD ["python3", "-c", "import urllib.request as r; r.urlopen(r.Request('http://127.0.0.1:8000/v2/models/ensemble/generate', b'{\"text_input\": \"#\", \"max_tokens\": 1}'), timeout=15).read()"]
# Starts the image's tritonserver; on SIGTERM it lets running requests finish before it stops.
STOPSIGNAL SIGTERM
CMD ["python3", "tools/serve.py", "--host=0.0.0.0", "--log=/dev/stdout", "--drain=20"]
