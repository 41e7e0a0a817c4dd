# `make help` lists the targets. Each first installs what it needs into .venv, and nothing that is there already:
# the programs' packages with JAX for DEVICE, then the extras of pyproject.toml that it works with.

PYTHON ?= python3
DEVICE ?= cpu
DEVICES := cpu cuda12 cuda13 tpu
BIN := .venv/bin
EXTRAS ?=
STAMP := .venv/.installed-$(DEVICE)
INCEPTION := .venv/.inception
# TensorFlow, which only data sets prepared by TFDS and their tests need, is half of what the tests install: the programs
# take 1.3 GB and 80 s on two cores, dev 0.6 GB, tfds 1.4 GB and 44 s.
TESTED := $(STAMP)-dev $(STAMP)-tfds $(INCEPTION)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement

ifneq ($(words $(DEVICE)) $(filter-out $(DEVICES),$(DEVICE)),1 )
$(error DEVICE=$(DEVICE) is unknown; use one of $(DEVICES))
endif

.NOTPARALLEL:  # pip runs once at a time
.PHONY: help setup packages demo plot app test coverage lint licences audit docs pins
help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12
	@echo 'For accelerators: make demo DEVICE=cuda13, or DEVICE=cuda12, or DEVICE=tpu.'
	@echo 'To read data sets that TFDS has prepared: make setup EXTRAS=tfds; s3:// and gs://: EXTRAS=cloud; films as MP4: EXTRAS=film. For the notebook: EXTRAS=dev.'

setup: packages $(INCEPTION)  ## .venv with locked packages: those of the programs, and EXTRAS; the weights of Inception

packages: $(STAMP) $(EXTRAS:%=$(STAMP)-%)  ## the packages alone

# Only files with the hashes of requirements/*.txt are installed, wherever they are fetched from.
$(STAMP): requirements/$(DEVICE).txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, not {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) $<
	touch $@

$(STAMP)-%: requirements/%.txt $(STAMP)
	$(INSTALL) $<
	touch $@

$(INCEPTION): $(STAMP)
	$(BIN)/python -m utils.metrics.inception
	touch $@

DEMO := runs/demo
DEMO_STEPS := 1500
DEMO_FLAGS :=
demo: $(STAMP) $(INCEPTION)  ## train on real digits; leaves images, a film and a FID in runs/demo
	$(BIN)/python train_flow.py --dataset_name digits --use_stable_vae 0 --save_dir $(DEMO) --wandb.name demo \
	  --wandb.mode disabled --model.hidden_size 128 --model.depth 4 --model.num_heads 4 --model.mlp_ratio 4 \
	  --model.patch_size 2 --model.num_classes 10 --model.lr 1e-3 --model.target_update_rate 0.998 \
	  --model.cfg_scale 2 --batch_size 128 --max_steps $(DEMO_STEPS) --log_interval 100 --eval_interval 500 \
	  --save_interval 500 $(DEMO_FLAGS)
	test $(DEMO)/fid.json -nt $(DEMO)/checkpoints/$(DEMO_STEPS) || $(BIN)/python eval_fid.py --load_dir $(DEMO) \
	  --denoise_timesteps 64 --cfg_scale 2 --num_samples 500 --batch_size 25 --save_samples $(DEMO)/samples.npz \
	  --wandb.mode disabled
	$(BIN)/python benchmarks/recognise_digits.py $(DEMO)/samples.npz
	$(BIN)/python sample.py --load_dir $(DEMO) --classes all --num_samples 20 --cfg_scale 2 --film --quiet
	@echo "images: $(DEMO)/samples_64_2.png, $(DEMO)/samples/ and $(DEMO)/images/; FID: $(DEMO)/fid.json; metrics: $(DEMO)/metrics.jsonl"

RUNS := $(DEMO)
PLOT_FLAGS :=
plot: $(STAMP)  ## metrics of runs as curves: make plot RUNS=runs/a,runs/b
	$(BIN)/python plot_metrics.py --runs $(RUNS) $(PLOT_FLAGS)

RUN := $(DEMO)
APP_FLAGS :=
app: $(STAMP)-app  ## a page to play with a model: make app RUN=runs/a
	$(BIN)/python app.py --load_dir $(RUN) $(APP_FLAGS)

WORKERS := 2
# Coverage costs little where Python can monitor itself (3.12), and a fifth of the time before.
COVERAGE = $(if $(shell $(BIN)/python -c 'import sys; print(sys.version_info >= (3, 12) or "")'),--cov --cov-report=term)
test: $(TESTED)  ## the tests but for those marked slow
	COVERAGE_CORE=sysmon $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup $(COVERAGE)

coverage: $(TESTED)  ## the same, with the lines that it covers
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --cov --cov-report=term

lint: $(TESTED)  ## ruff and ty
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python .venv

# Licences are those that packages state. GPL and LGPL are refused, and packages that state none, but namex (Apache 2.0).
licences: $(TESTED)  ## the licences of what is installed
	$(BIN)/pip-licenses --partial-match --fail-on "GPL;UNKNOWN" --ignore-packages namex > /dev/null

# Asks the registry for advisories; --strict fails where it does not answer, rather than pass.
audit: licences $(STAMP)-release  ## licences, and known advisories of every lock: needs the network
	for lock in $(LOCKS); do $(BIN)/pip-audit --strict --disable-pip --require-hashes \
	  --requirement requirements/$$lock.txt || exit 1; done

# The versions that everybody installs, from the ranges in pyproject.toml: of all packages together in requirements.txt,
# and of each device and extra with the hashes of their files. PINS_FLAGS=--upgrade takes newer ones.
LOCKED := dev app cloud film tfds text tensorboard aot release
LOCKS := $(DEVICES) $(LOCKED)
COMPILE = env -u UV_INDEX -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-annotate --quiet --no-config \
  --custom-compile-command "make pins"
pins: $(STAMP)-release  ## requirements.txt and requirements/*.txt from pyproject.toml
	$(COMPILE) $(LOCKED:%=--extra %) $(PINS_FLAGS) --output-file requirements.txt
	for lock in $(LOCKS); do \
	  $(COMPILE) $$(test $$lock = cpu || echo --extra $$lock) --generate-hashes --no-strip-extras $(PINS_FLAGS) \
	    --constraint requirements.txt --output-file requirements/$$lock.txt || exit 1; done

docs: $(STAMP)  ## docs/flags.md from the flags
	JAX_PLATFORMS=cpu $(BIN)/python docs/make_flags.py
