# lingshu-rl with CUDA (the toolkit that torch of the `cuda` extra is built for; its compiler serves kernels built at run time).
#   docker build -f recipes/docker/cuda.Dockerfile -t lingshu-rl .
#   docker run --gpus all --ipc=host -v "$PWD/data:/work/data" -v "$PWD/runs:/work/runs" lingshu-rl \
#       accelerate launch recipes/grpo_medvqa.py --config recipes/configs/lingshu_rl_7b.yaml data.train=data/train.jsonl ...
# --ipc=host: NCCL and the image queues of vLLM use shared memory. PIP_ARGS names another package index.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}
ARG PIP_ARGS=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
COPY . .
RUN pip install --no-cache-dir ${PIP_ARGS} -e ".[cuda,eval]"
CMD ["lingshu-rl", "train", "--dry-run", "--config", "recipes/configs/lingshu_rl_7b.yaml"]
