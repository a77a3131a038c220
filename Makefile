# SPDX-License-Identifier: GPL-2.0-only
#
# Front door; the work is in scripts/. The kernel's own build reads Kbuild, not this.

MAKEFLAGS += --no-print-directory
export FLAVOUR KVER KDIR W V CLIPPY MINUTES SEED KERNEL

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  FLAVOUR=NAME (of kernels.toml), KVER=VERSION choose the kernel, KDIR=DIR a prepared"
	@echo "  build directory; W=1, CLIPPY=1 warn more. Every script has --help."

.PHONY: setup
setup: ## Install the host packages (root), or say how
	@scripts/setup

.PHONY: run
run: ## Set everything up and show the main job; VMS=3 with as many real VMs; GOVERNOR=auto
	@scripts/run $(if $(VMS),--vms $(VMS)) $(if $(GOVERNOR),--governor $(GOVERNOR))

.PHONY: modules
modules: ## Build rksm.ko in build/KVER/
	@scripts/build

.PHONY: rksmctl
rksmctl: ## Build the command line tool, build/rksmctl
	@scripts/rksmctl

.PHONY: deb
deb: ## Build Debian packages of both, in build/
	@scripts/deb

.PHONY: shell
shell: modules ## A shell in a guest with rksm loaded
	@scripts/vm --interactive

.PHONY: check
check: ## Formatting, warnings, clippy, host tests
	@scripts/check

.PHONY: rust-analyzer
rust-analyzer: ## rust-project.json for editors, from the kernel's build system
	@scripts/build rust-analyzer

.PHONY: coverage
coverage: ## Lines and branches of the engine that the host tests reach
	@scripts/coverage

.PHONY: mutants
mutants: ## Which small mistakes in the engine the host tests notice; hours
	@scripts/mutants

.PHONY: test
test: ## Every test; ends in "N passed, M failed"
	@scripts/test

.PHONY: test-long
test-long: ## Every test, those that take long, too; hours
	@RKSM_LONG=1 scripts/test

.PHONY: test-kernels
test-kernels: ## What has to hold on every kernel of kernels.toml, the newest that there are
	@scripts/test --kernels

.PHONY: torture
torture: ## Everything at once at random, every byte checked; MINUTES= SEED= KERNEL= UPGRADES= GOVERNOR=
	@scripts/torture

.PHONY: bench
bench: ## Speed and memory against the built-in KSM; tables and plots
	@scripts/bench

.PHONY: bench-quick
bench-quick: ## The same in under 5 minutes
	@scripts/bench --quick

.PHONY: clean
clean: ## Remove what was built, keep the cache
	@rm -rf build
