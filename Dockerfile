# A runner for the rows of an NVIDIA GPU: `docker build -t quantmatrix-cuda .`, then
#   docker run --rm --gpus all -e HF_TOKEN -v "$PWD/packets:/work/packets" quantmatrix-cuda \
#     python -m nox --no-venv -s gpu-h200
# torch from the package index is its CUDA build and brings CUDA's libraries; the host needs a driver alone.
FROM python:3.11-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# a C compiler for torch.compile and Triton, git for the commit that a record names
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:12.* git=1:2.39.* libc6-dev=2.36-* \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 runner && mkdir /work && chown runner:runner /work
USER 1000
WORKDIR /work
ENV PATH=/home/runner/venv/bin:$PATH PIP_NO_CACHE_DIR=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1

COPY --chown=runner:runner . /work
RUN python -m venv /home/runner/venv \
    && python -m pip install -c constraints.txt -e ".[cuda,test]"

CMD ["quantmatrix", "doctor"]
