# make demo | test | soak | bench | gpu | study: each sets itself up in .venv; nothing else is needed than Python 3.11, make, a compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
TORCHRUN := $(PY) -m torch.distributed.run --standalone

.PHONY: demo test soak bench gpu study clean

.venv/ready: requirements.txt requirements-dev.txt
	@echo "== installing into .venv"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The whole path on synthetic scans: two CPU cores, ten minutes. Everything it makes is under demo/.
FINETUNE := $(PY) finetune.py configs/demo_finetune.yaml
PRETRAINED := --ckpt demo/runs/pretrain/last.pt
SCRATCH := --model unet_demo --features 16
demo: .venv/ready
	rm -rf demo
	@echo "== 1/6 phantoms: 40 unlabelled and 20 labelled subjects, and four new scans"
	$(PY) tests/phantom.py --out demo/raw --subjects 40 --labelled 20 --layout bids --size 64 --seed 1
	$(PY) tests/phantom.py --out demo/new --subjects 0 --labelled 4 --layout bids --size 64 --seed 2
	@echo "== 2/6 prepare (section 2)"
	$(PY) prepare_data.py --source bids --input demo/raw --out demo/prepared --workers 2
	@echo "== 3/6 pretrain: AMAES (section 3.1)"
	$(TORCHRUN) --nproc_per_node=2 pretrain.py configs/demo.yaml
	@echo "== 4/6 finetune, from scratch and pretrained, with all and with spatial augmentation (section 3.2)"
	@echo "   (two at a time, about five minutes; what a run says is printed at its end)"
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(DEMO_RUNS)
	@echo "== 5/6 segment the new scans with the networks of all folds together, and score them"
	$(PY) predict.py --ckpt demo/runs/amaes --input demo/new --truth demo/new --overlap 0 --out demo/segmented
	@echo "== 6/6 compare"
	$(PY) compare.py demo/runs/scratch demo/runs/amaes --out demo/table_all.md
	$(PY) compare.py demo/runs/scratch_spatial demo/runs/amaes_spatial --out demo/table_spatial.md
	$(PY) docs/figures.py preview demo/runs/pretrain --out demo/preview.png
	$(PY) docs/figures.py dice demo/runs/scratch demo/runs/amaes --out demo/dice.png
	$(PY) docs/figures.py cohort demo/segmented --out demo/cohort.png
	@echo "Few cases of one synthetic cohort: a difference below the table's 'could find' says nothing."

# Two at a time with a thread each are sooner done than one after the other with two.
DEMO_RUNS := demo/runs/scratch demo/runs/amaes demo/runs/scratch_spatial demo/runs/amaes_spatial
demo/runs/scratch:
	OMP_NUM_THREADS=1 $(FINETUNE) $(SCRATCH) --augment all --out $@
demo/runs/amaes:
	OMP_NUM_THREADS=1 $(FINETUNE) $(PRETRAINED) --augment all --out $@
demo/runs/scratch_spatial:
	OMP_NUM_THREADS=1 $(FINETUNE) $(SCRATCH) --augment spatial --out $@
demo/runs/amaes_spatial:
	OMP_NUM_THREADS=1 $(FINETUNE) $(PRETRAINED) --augment spatial --out $@

test: .venv/ready
	.venv/bin/ruff check .
	$(PY) -m pytest -m "not soak" --numprocesses 2 --dist loadfile

# The second line fills memory that nobody has written with numbers of 1e38, so that reading it is seen.
soak: .venv/ready
	$(PY) -m pytest -m soak
	MALLOC_PERTURB_=129 $(PY) -m pytest tests/test_fast.py

# What is measured beside ours; without their own requirements, so that torch and numpy stay as they are.
PEERS := monai==1.6.1 einops==0.8.2 yucca==1.1.7 batchgenerators==0.25.5 batchgeneratorsv2==0.3.6 torchio==1.2.1 \
	surface-distance==0.1 connected-components-3d==4.1.1 deprecated==1.3.1 fft-conv-pytorch==1.2.0 humanize==4.17.0 jaxtyping==0.3.11 \
	importlib_resources==7.1.0 pandas==3.1.1 pytz==2026.6 simpleitk==2.5.7 tzdata==2026.6 wadler_lindig==0.1.8 \
	wrapt==2.5.2
.venv/peers: .venv/ready Makefile
	@echo "== installing the peers"
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps $(PEERS)
	@touch $@

# make bench BENCH="step window" runs some of them.
BENCH ?= cost evaluate prepare loader models window augment pipeline compare segment step
bench: .venv/peers
	@$(PY) -c "import platform, os, torch; print(f'# Measurements\n\n{os.cpu_count()} cores, {platform.machine()}, Linux; Python ' \
		f'{platform.python_version()}, torch {torch.__version__}. What each is, and its conditions: the first lines of bench/*.py.')" \
		> bench/RESULTS.md
	for name in $(BENCH); do echo "== bench/$$name.py"; printf '\n## bench/%s.py\n\n' $$name >> bench/RESULTS.md; \
		$(PY) -W ignore bench/$$name.py >> bench/RESULTS.md || exit 1; done
	cat bench/RESULTS.md

# What only a GPU can say, in minutes: bench/GPU.md reads it. Lines are appended to bench/GPU.jsonl.
gpu: .venv/ready
	$(PY) bench/gpu.py --minutes 8

# The paper in miniature on synthetic heads: 3.8 hours of two idle cores by estimate, resumable. DRY=1 lists what is left;
# SIZE=gpu DEVICE=cuda for a GPU; JOBS is how many runs go at a time.
JOBS ?= 2
study: .venv/ready
	$(PY) study/study.py --size $(or $(SIZE),cpu) --device $(or $(DEVICE),auto) --jobs $(JOBS) $(if $(DRY),--dry)
	$(if $(DRY),,$(PY) study/report.py --size $(or $(SIZE),cpu))

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache
