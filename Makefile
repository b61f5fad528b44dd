# make quickstart    train the nano model through the whole curriculum, export it, compare exports;
#                    run again to resume, or only to export
# make test          every test
# make test-fast     the tests that are not marked slow
# make lint          the linter
# make benchmark     speed, beside what one would use instead
# make bench-gpu     speed on an NVIDIA GPU at 1B scale: at most 10 minutes a command, the most
#                    valuable first
# make test-gpu      the tests that need an NVIDIA GPU (Hopper)

# The first Python of version 3.11 or 3.12 that runs; name another with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
		&& echo $$p && break; done)
REQUIREMENTS := $(shell nvidia-smi -L >/dev/null 2>&1 \
	&& echo requirements-cuda12.txt || echo requirements.txt)
RUN := .venv/bin/python
# Large pages for large allocations (glibc; ignored elsewhere): on a CPU, XLA allocates its buffers
# again at every step.
QUICK := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

NANO := runs/curriculum_nano

.PHONY: quickstart test test-fast lint benchmark bench-gpu test-gpu
quickstart: .venv/installed-$(REQUIREMENTS)
	$(QUICK) $(RUN) main.py --config configs/curriculum.py:nano
	$(RUN) tools/export_hf.py --checkpoint $(NANO) --out $(NANO)/exports/hf --overwrite
	$(RUN) tools/export_gguf.py --checkpoint $(NANO) --type q8_0 --overwrite \
		--out $(NANO)/exports/nano-q8_0.gguf
	$(RUN) tools/compare_exports.py --checkpoint $(NANO) --prompt 'Question:' \
		--hf $(NANO)/exports/hf --gguf $(NANO)/exports/nano-q8_0.gguf
	$(RUN) tools/chat.py --checkpoint $(NANO) \
		--ask 'State the final answer to the following arithmetic problem: 12 + 7 ='
	$(RUN) tools/chat.py --checkpoint $(NANO) --tools get_price,get_weather \
		--ask 'What does a ball cost in Berlin?'
	@echo "Talk to it: $(RUN) tools/chat.py --checkpoint $(NANO)"

test: .venv/installed-dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/installed-dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: .venv/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

benchmark: .venv/installed-dev
	$(RUN) tools/benchmark.py train
	$(RUN) tools/benchmark.py data
	$(RUN) tools/benchmark.py decode

# A command that fails does not keep the next from running.
bench-gpu: .venv/installed-dev
	-$(RUN) tools/benchmark.py train --scale 1b --seq_len 4096 --json runs/benchmarks/train_4096.json
	-$(RUN) tools/benchmark.py train --scale 1b --seq_len 16384 --json runs/benchmarks/train_16384.json
	-$(RUN) tools/benchmark.py kernels --scale 1b --json runs/benchmarks/kernels.json
	-$(RUN) tools/benchmark.py torch --scale 1b --seq_len 4096 --json runs/benchmarks/torch_4096.json
	-$(RUN) tools/benchmark.py torch --scale 1b --seq_len 16384 --json runs/benchmarks/torch_16384.json
	-$(RUN) tools/benchmark.py breakdown --scale 1b --json runs/benchmarks/breakdown_4096.json
	-$(RUN) tools/benchmark.py decode --scale 1b --json runs/benchmarks/decode.json

test-gpu: .venv/installed-dev
	NANOLLAMA_TEST_GPU=1 $(RUN) -m pytest tests/gpu

# One stamp per requirements file, so that installing a driver later installs the GPU build.
.venv/installed-$(REQUIREMENTS): requirements.txt $(REQUIREMENTS)
	@test -n "$(PYTHON)" || { \
		echo "error: no Python 3.11 or 3.12 found: install one, or set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check --quiet -r $(REQUIREMENTS)
	@touch $@

.venv/installed-dev: .venv/installed-$(REQUIREMENTS) requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@
