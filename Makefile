# make quickstart   from nothing to a small base model that writes, on this machine's own text
# make test         every test         make lint   ruff and mypy         make install   what the others share
# make test-cluster launching on two hosts and in a Slurm, which this machine plays where it may: as root

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*/*)

.PHONY: install quickstart test cluster test-cluster lint clean

install: $(VENV)/installed

$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("megalm needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plot]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[curation,plot,test]'
	@touch $@

quickstart: $(VENV)/installed
	$(BIN)/python tools/quickstart.py $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/pytest --numprocesses=logical --dist=loadfile $(ARGS)

# What two hosts and a Slurm on this machine need. Where it cannot be installed, their tests are skipped and say why.
CLUSTER := openssh-server openssh-client pdsh iproute2 util-linux procps slurm-wlm munge
cluster:
	@for tool in sshd ssh pdsh ip nsenter pkill slurmctld slurmd sbatch munged; do command -v $$tool; done | wc -l | grep -qx 10 \
	    || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null \
	    || { apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(CLUSTER); } >/dev/null 2>&1 || true

test-cluster: $(VENV)/installed-test cluster
	$(BIN)/pytest tests/cluster -m 'cluster and not full' $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info megalm/*.so quickstart
