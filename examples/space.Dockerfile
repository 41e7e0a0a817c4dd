# A Hugging Face Space that serves a model of the hub: app.py's page, on a free CPU.
#
# Name your model and your copy of this repository below, then make a Space of the kind Docker with this file in it:
#
#     hf repos create USER/SPACE --repo-type space --space-sdk docker
#     hf upload USER/SPACE examples/space.Dockerfile Dockerfile --repo-type space
#
# The model comes from `convert_checkpoint.py --push hf:USER/NAME`. To try the image at home:
#
#     docker build --tag space --build-arg MODEL=hf:USER/NAME --file examples/space.Dockerfile .
#     docker run --rm --publish 7860:7860 space

FROM python:3.12-slim

ARG MODEL=hf:USER/NAME
ARG SOURCE=https://github.com/USER/jax-flow-matching

RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
# Spaces run as the user 1000.
RUN useradd --create-home --uid 1000 flow
USER flow
WORKDIR /home/flow
RUN git clone --depth 1 "$SOURCE" app
WORKDIR /home/flow/app
ENV PIP_NO_CACHE_DIR=1
RUN make packages EXTRAS=app

ENV MODEL=$MODEL PYTHONUNBUFFERED=1
EXPOSE 7860
# A Space may be asked by anyone: small requests alone, and few of them at a time.
CMD exec .venv/bin/python app.py --load_dir "$MODEL" --host 0.0.0.0 --port 7860 --max_samples 16 --max_steps 64 --queue 4
