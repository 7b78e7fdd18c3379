# docker build -t llmkit .      CUDA comes with PyTorch's wheels; the machine needs its driver and NVIDIA's container toolkit.
# docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t llmkit .      CPU only: 1.5 GB instead of 8.
FROM debian:bookworm-slim

# A C++ compiler, for torch.compile.
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
 && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/llmkit/bin:$PATH PYTHONUNBUFFERED=1
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=log,hf
WORKDIR /llmkit

# PyTorch in a layer of its own, which a change of the code leaves as it is.
COPY constraints.txt ./
RUN python3 -m venv /opt/llmkit \
 && pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY llmkit llmkit
COPY configs configs
COPY data data
COPY scripts scripts
RUN pip install --no-cache-dir -c constraints.txt -e ".[$EXTRAS]"

# Not root, so that files in mounted folders and programs that a model wrote have an ordinary user's rights.
RUN useradd --create-home --uid 1000 llmkit && mkdir /runs && chown llmkit /runs
USER llmkit
VOLUME /runs

# `docker run llmkit plan RECIPE`; torchrun is `docker run --entrypoint python llmkit -m torch.distributed.run ...`
ENTRYPOINT ["llmkit"]
CMD ["--help"]
