# What people and CI both run. Every target installs what it needs: Debian or Ubuntu packages when run
# as root, Python packages into .venv, nothing anywhere else. Built things live in dist/ and in
# $XDG_CACHE_HOME/microguest (default ~/.cache/microguest). What stands behind ## is what `make help` says.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
ARCH ?= x86_64
GUEST := dist/guest/$(ARCH)
DEMO_IMAGE := dist/demo
TEST ?= tests
# Most tests wait for processes and machines: so many run at once, each file by one worker.
TEST_WORKERS ?= 3
SIDE_BY_SIDE := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST_OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-slowed soak man docs check guest bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready $(VENV)/.guestsys ## the Python environment in .venv, with everything that the other targets use

$(VENV)/.ready: pyproject.toml
	$(PYTHON) build/packages.py setup
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[guest,dev]'
	touch $@

# Without a compiler this only says what does not work then, each time.
$(VENV)/.guestsys: $(VENV)/.ready build/host_module.py build/native/guestsys.c
	$(BIN)/python build/host_module.py $@

# The stages behind this are cached by a hash of their inputs: with nothing changed it takes no time.
guest: setup ## the guest's program, kernel and initramfs, in dist/guest
	$(PYTHON) build/packages.py guest
	$(BIN)/python build/make.py guest

$(DEMO_IMAGE)/index.json: build/demo_image.py
	$(PYTHON) build/packages.py image
	$(BIN)/python build/demo_image.py $(DEMO_IMAGE)

demo: guest $(DEMO_IMAGE)/index.json ## boot a machine from an image and run commands in it
	$(PYTHON) build/packages.py run
	$(BIN)/python docs/examples/demo.py oci:$(DEMO_IMAGE):busybox

test: guest $(DEMO_IMAGE)/index.json ## all tests; TEST=tests/test_log.py takes a file, TEST_WORKERS=1 one at a time
	$(PYTHON) build/packages.py run
	$(PYTHON) build/packages.py test
	$(BIN)/pytest $(SIDE_BY_SIDE) --durations 10 $(PYTEST_OPTIONS) $(TEST)

# Left out: what starts whole machines, in namespaces too, as each of its tests waits for a boot and an
# end; what goes through a call moment by moment; what waits for a bound or a server to have its time;
# and what asks other programs for comparison.
FAST_LEAVES_OUT := $(addprefix tests/test_,agent_held_pipes.py agent_traced.py aio_cancellation.py \
	boot_chart.py cli.py cli_docker.py cli_doctor.py cli_environment.py cli_processes.py cli_progress.py cli_terminal.py cli_words.py \
	console_lives.py differential.py guide.py host_deadlines.py host_docs.py images_bounds.py images_layers.py \
	init_network.py init_traced.py interrupts.py log.py log_times.py machine_%.py many_boots.py named_machines.py pains.py \
	public_api.py shares.py shortage.py slow_host.py soak.py vm_%.py)
FAST := $(filter-out $(FAST_LEAVES_OUT),$(sort $(wildcard tests/test_*.py)))

test-fast: guest $(DEMO_IMAGE)/index.json ## contract, agent, PID 1, library, images: no whole machine, about 3 minutes
	$(PYTHON) build/packages.py run
	$(PYTHON) build/packages.py test
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not qemu and not slow" --durations 10 $(PYTEST_OPTIONS) $(FAST)

# The demo, and of each part some tests, on a fifth of this machine: what holds only where it is quiet
# shows. About ten minutes.
SLOWED := $(BIN)/python tests/slowed.py 0.2
SLOWED_TESTS := $(addprefix tests/test_,machine_agent.py machine_end.py machine_monitor.py cli.py \
	cli_processes.py agent_exec.py agent_service.py agent_streams.py guest_reports.py init_boot.py \
	init_supervision.py)

test-slowed: guest $(DEMO_IMAGE)/index.json ## some tests of each part on a fifth of this machine, as root
	$(PYTHON) build/packages.py run
	$(PYTHON) build/packages.py test
	$(SLOWED) $(BIN)/python docs/examples/demo.py oci:$(DEMO_IMAGE):busybox
	$(SLOWED) $(BIN)/pytest -m "not qemu and not slow" $(SLOWED_TESTS)

soak: guest $(DEMO_IMAGE)/index.json ## boot machines for a long time, and count what each leaves
	$(PYTHON) build/packages.py run
	$(PYTHON) build/packages.py test
	MICROGUEST_SOAK=5 $(BIN)/pytest -s tests/test_many_boots.py

man: setup ## docs/reference/microguest.1 anew, from the command line's parser
	$(BIN)/python build/man_page.py docs/reference/microguest.1

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

# A link that leads nowhere, or a page that no list has, is an error.
docs: $(VENV)/.docs ## the pages as a site: dist/docs/index.html
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --write-all -d dist/.docs docs dist/docs

# The wheel is tried with a machine, for which the guest is made first.
check: guest $(DEMO_IMAGE)/index.json ## format, lint, types, and the wheel in an empty environment
	$(PYTHON) build/packages.py run
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=src:build:build/native $(BIN)/mypy build/*.py docs/examples/*.py benchmarks/*.py
	$(BIN)/python build/check_wheel.py

bench: guest $(DEMO_IMAGE)/index.json ## measure start, boot and exec; prints tables
	$(PYTHON) build/packages.py run
	$(PYTHON) build/packages.py bench
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/boot.py
	$(BIN)/python benchmarks/exec.py

clean: ## remove dist, .venv and the tools' caches here; the cache of built things stays
	rm -rf dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
