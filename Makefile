# make quickstart: install, prepare a text, train on it and print samples; a second call reuses all of it
# make test: install and run the tests
# make quickstart TORCH=cpu: the same with another build of torch than pip's own; its index names them: cpu, cu126, ...
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: quickstart test

quickstart: .venv/requirements.txt data/quickstart/train.bin
	$(RUN) train.py config/quickstart.py --init_from=$(if $(wildcard out-quickstart/last.pt),resume,scratch)
	$(RUN) sample.py --out_dir=out-quickstart --start="The " --num_samples=3 --max_new_tokens=400
	@ls out-quickstart/* | sed 's/^/wrote /'
	@echo 'next: $(RUN) sample.py --out_dir=out-quickstart --start="Return a " --stream=True'

test: .venv/requirements-dev.txt
	$(RUN) -m pytest

data/quickstart/train.bin: data/quickstart/prepare.py | .venv/requirements.txt
	$(RUN) data/quickstart/prepare.py

# each requirements file is copied into .venv when all that it names is installed
.venv/%.txt: %.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: $(PYTHON) is Python %d.%d; Python 3.10 or newer is needed; type make PYTHON=python3.12" % sys.version_info[:2])'
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(if $(TORCH),$(RUN) -m pip install "`grep '^torch' requirements.txt`" --index-url https://download.pytorch.org/whl/$(TORCH))
	$(RUN) -m pip install --disable-pip-version-check -r $<
	cp $< $@

.venv/requirements-dev.txt: requirements.txt
