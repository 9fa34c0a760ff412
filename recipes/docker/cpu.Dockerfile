# lingshu-rl on a CPU: the demo and the tests.
#   docker build -f recipes/docker/cpu.Dockerfile -t lingshu-rl-cpu --build-arg PIP_ARGS="--extra-index-url URL" .
#   docker run --shm-size=4g -v "$PWD/runs:/work/runs" lingshu-rl-cpu
# URL: PyTorch's index of CPU wheels. --shm-size: weights go to the engine through shared memory.
FROM python:3.12-slim
ARG PIP_ARGS=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make git util-linux \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY . .
RUN make .venv/.installed PIP_ARGS="${PIP_ARGS}"
CMD ["make", "demo"]
