# Two commands on a fresh machine, each does its own set-up: make demo, make test. Needs Python >= 3.10 and make; the tests also a C++ compiler.
PYTHON ?= python3
BIN = .venv/bin
# For each of two processes: with more, threads wait for a core instead of working
ONE_THREAD = OMP_NUM_THREADS=1
.PHONY: install demo check test bench lab docs export crf-if-possible

install: .venv/ready

demo: .venv/ready
	$(BIN)/ppc demo

# In two minutes: style, sync of notebooks and package, unit tests; no training, no notebook
check: .venv/ready
	$(BIN)/ruff check
	$(ONE_THREAD) $(BIN)/python -m pytest tests -q -n 2 -m "not slow"

test: .venv/ready .venv/crf
	$(BIN)/ruff check
	$(ONE_THREAD) $(BIN)/python -m pytest tests -n 2 --dist loadgroup

# Fast forms against the plain loops they replace; writes runs/bench/<device>.json
bench: .venv/ready crf-if-possible
	$(BIN)/python tests/bench.py

lab: .venv/ready
	$(BIN)/jupyter lab nbs/index.ipynb

# The book as linked pages that open from disk, as the notebooks are: nothing is executed
docs: .venv/ready
	rm -rf _docs
	$(BIN)/python -c "from ppc.pages import book_pages; print('open', book_pages('nbs', '_docs')[0])"

# After a change in nbs/: strip what execution leaves behind, then write the modules of ppc/ anew (__init__.py, __main__.py, recipes/, templates/ and starts/ are not from there)
export: .venv/ready
	$(BIN)/nbdev_clean
	rm -f ppc/[a-z]*.py
	$(BIN)/nbdev_export
	$(BIN)/python nbs/export.py

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# Only to be compared with. pydensecrf's generated C++ is older than today's Python: have Cython write it again, and the last Cython that can
.venv/crf: .venv/ready
	echo 'cython<3' > .venv/constraint.txt
	CYTHON_FORCE_REGEN=1 PIP_CONSTRAINT=.venv/constraint.txt PIP_BUILD_CONSTRAINT=.venv/constraint.txt \
		$(BIN)/pip install --quiet --use-pep517 pydensecrf
	touch $@

# The bench goes on without its row where this cannot be built
crf-if-possible: .venv/ready
	-$(MAKE) .venv/crf
