# All that is done with this repository by hand and by CI. `make` lists it.

# mkfs, losetup and nginx live where an ordinary user's PATH does not look.
export PATH := $(PATH):/usr/sbin:/sbin
RELEASE := target/release
IMAGES  := build/images
TRIPLE_arm64 := aarch64-unknown-linux-gnu

# Our own tools, built here once. Unoptimised: they run for a second and would build for minutes.
DENY := build/tools/cargo-deny-0.20.2
DEB  := build/tools/cargo-deb-3.8.0
quick-install = CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off \
	CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 cargo install --locked --root

.PHONY: help packages vm-packages vm-packages-all setup build test demo demo-vm demo-played bench \
	vm-test vm-all vm-soak check fmt clippy deny doc units image deb size clean-images

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

packages:
	@packaging/setup/debian.sh $(ARCH)

vm-packages:
	@packaging/setup/debian.sh vm

vm-packages-all:
	@packaging/setup/debian.sh arm64 vm vm-arm64

setup: packages vm-packages ## install what building and testing needs: Debian packages, Microsoft's SDKs
	@packaging/setup/sdks.sh

build: packages ## the daemon and the device command, as they are shipped
	cargo build --release --bins

test: setup ## every test, and real boots of the amd64 machine
	cargo test --workspace
	python3 tests/vm ci

demo: $(if $(VM),demo-vm,demo-played) ## one update, from the call to the confirmed boot; VM=1: on a machine with GRUB; ARGS=--fail

demo-vm: vm-packages
	@python3 tests/vm demo $(ARGS)

# The daemon is built apart: together with the demo it would get features that only tests need.
demo-played: build image
	cargo build --release --example demo
	@cargo run --quiet --release --example demo -- $(ARGS)

bench: packages image build ## a whole install against curl | dd: time, bytes, memory
	cargo run --release --example bench -- $(ARGS)

vm-test: vm-packages-all ## real boots of every board: good updates, and an image that hangs
	python3 tests/vm short

vm-all: vm-packages-all ## the boot scripts, every bad image on every board, disks that fail: some hours
	python3 tests/vm/test_uboot_script.py
	python3 tests/vm/test_grub_script.py
	python3 tests/vm all

vm-soak: vm-packages ## power cuts at random moments of a real machine's updates; N=trials SEED=number
	python3 tests/vm soak $(or $(N),100) --seed $(or $(SEED),1)

check: fmt clippy deny doc units ## format, lints, dependencies, documentation, systemd units

fmt:
	cargo fmt --all --check

# The second run is for what clippy.toml bans, in the shipped programs alone.
clippy: packages
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked --lib --bins -- -D warnings -D clippy::disallowed_methods

deny: packages $(DENY)
	$(DENY)/bin/cargo-deny --locked check --hide-inclusion-graph bans licenses sources

doc: packages
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

units: packages
	packaging/check-units.sh

image: packages ## the root file system images of the demo, the tests and the bench
	@tests/image/build.sh $(IMAGES)

deb: packages $(DEB) ## the Debian package for this machine, or ARCH=arm64, in target/debian
ifeq ($(ARCH),)
	$(DEB)/bin/cargo-deb --locked --deb-revision=1
else
	packaging/cross/build.sh $(ARCH)
	$(DEB)/bin/cargo-deb --locked --deb-revision=1 --no-build --no-strip --variant=cross \
		--target=$(TRIPLE_$(ARCH)) --output=target/debian/
endif

size: build ## the size of both programs
	@stat --printf='%n %s bytes\n' $(RELEASE)/twinbootd $(RELEASE)/twinboot

clean-images: ## forget the images, so that the next run builds them anew
	rm -rf $(IMAGES)

$(DENY):
	$(quick-install) $@ cargo-deny --version 0.20.2 --no-default-features

$(DEB):
	$(quick-install) $@ cargo-deb --version 3.8.0
