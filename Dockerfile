# The programs and what they need, for CPUs or GPUs, without root and without the packages of the tests.
#
#     docker build --tag flow .
#     docker build --tag flow --build-arg DEVICE=cuda13 --build-arg EXTRAS=tfds .
#     docker run --rm --gpus all --volume "$PWD/runs:/app/runs" flow python train_flow.py --dataset_name digits ...
#
# docs/installing.md says more. tests/test_container.py runs these steps where there is no Docker.

ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# cpu, cuda12, cuda13 or tpu. CUDA's libraries are Python packages: the host only brings the driver.
ARG DEVICE=cpu
# tfds, which brings TensorFlow; text, app, film, tensorboard. Several are separated by spaces.
ARG EXTRAS=""
# Who runs the programs, and owns what they write in folders of the host: --build-arg UID=$(id -u).
ARG UID=1000

RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid "$UID" flow && install --directory --owner flow /app /app/runs
WORKDIR /app
USER flow

# The packages first: changes of the code do not install them again.
ENV PIP_NO_CACHE_DIR=1
COPY --chown=flow Makefile ./
COPY --chown=flow requirements/ requirements/
RUN make packages DEVICE="$DEVICE" EXTRAS="$EXTRAS"

# The programs, and the weights with which samples are scored.
COPY --chown=flow . .
RUN make setup DEVICE="$DEVICE" EXTRAS="$EXTRAS"

ENV PATH="/app/.venv/bin:$PATH" PYTHONUNBUFFERED=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["python", "train_flow.py", "--help"]
