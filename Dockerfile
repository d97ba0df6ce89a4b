# CPU:         docker build --tag llmtune .
# NVIDIA GPU:  docker build --tag llmtune --build-arg TORCH=cu128 .
# Run:         docker run --rm --volume "$PWD:/work" llmtune run recipe.yaml    (on a GPU: docker run --gpus all ...)
FROM debian:bookworm-slim AS python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libgomp1 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/llmtune/bin:$PATH

FROM python AS build
# A build of torch by PyTorch's own name: cpu, cu128, ...
ARG TORCH=cpu
RUN python3 -m venv /opt/llmtune \
    && pip install torch --index-url https://download.pytorch.org/whl/$TORCH
COPY . /src
RUN pip install "/src[judge,serve,speech]"

FROM python
COPY --from=build /opt/llmtune /opt/llmtune
# Group root may write too, for clusters that choose the user id.
RUN useradd --uid 1000 --gid root --no-create-home --home-dir /home/llmtune llmtune \
    && install --directory --owner llmtune --mode 775 /home/llmtune /work
ENV HOME=/home/llmtune
WORKDIR /work
USER llmtune
ENTRYPOINT ["llmtune"]
