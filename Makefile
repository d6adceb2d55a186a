# The two commands: `make demo` sets everything up and runs the main job; `make test` sets up and passes every check.
#
#   make demo PYTHON=python3.12            another Python (3.11 or newer)
#   make demo ARGS='--seed 1 --output_dir runs/seed-1'   further flags for the main job
#   make test VENV=/somewhere/else         another place for the virtual environment
#
# The plain commands behind them stand in README.md.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
ROUNDS ?= 2
BIN := $(VENV)/bin

# The environments of `make demo`, `make test` and `make bench`. peft imports bitsandbytes (quantized) where it finds it.
EXTRAS_demo := data,plots
EXTRAS_bench := data,plots,train
EXTRAS_test := data,plots,train,tracking,quantized,dev

.PHONY: demo test families bench learn setup lint types format clean

demo: $(VENV)/.installed-demo
	$(BIN)/accelerate launch --config_file accelerate_config.yaml recipes/ppo_sentiment.py \
		--config recipes/configs/tiny_reviews.yaml $(ARGS)

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

families: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/families/sweep.py --markdown docs/models.md

# About an hour on two cores that do nothing else, 40 minutes with ROUNDS=1; see docs/speed.md.
bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/speed.py --rounds $(ROUNDS) --markdown docs/speed.md
	$(BIN)/python benchmarks/profile_iteration.py --markdown docs/speed.md
	$(BIN)/python benchmarks/scaling.py --markdown docs/speed.md
	$(BIN)/python benchmarks/startup.py --markdown docs/speed.md
	$(BIN)/python benchmarks/memory.py --markdown docs/memory.md

# Several hours, the first task one of them; runs that are there already are not repeated. See docs/results.md.
learn: $(VENV)/.installed-test
	$(BIN)/python benchmarks/learn.py --markdown docs/results.md $(ARGS)
	$(BIN)/python benchmarks/learn.py --task review --markdown docs/results.md $(ARGS)

setup: $(VENV)/.installed-test

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lmppo needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installed anew only when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@start=$$(date +%s); \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS_$*)]' && \
	touch $@ && echo "Set-up took $$(( $$(date +%s) - start )) seconds."
