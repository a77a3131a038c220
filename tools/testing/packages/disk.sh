#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Usage: disk.sh STEP
#
# What the stage packages does to a machine's disk while it is not booted, in a chroot without a
# network: packages are installed, and DKMS compiles, as that would take an hour in a guest.

here=${0%/*}
# shellcheck source=tools/testing/packages/lib.sh
. "$here/lib.sh"
# shellcheck disable=SC1091 # made by the stage: the kernels A and B, the versions OLD and NEW
. "$here/names"
# For says
a=$(echo "$A" | sed 's/[.+]/[&]/g')

apt() {
	run 0 apt-get -q -y -o Dpkg::Use-Pty=0 "$@"
}

module() {
	modinfo -k "$1" -F "${2:-version}" rksm
}

built() {
	[ "$(module "$1")" = "$2" ] || {
		dkms status
		cat /var/lib/dkms/rksm/*/build/make.log
		return 1
	}
}

not_built() {
	fails modinfo -k "$1" rksm
}

# fill MIB - leaves so much room on the disk
fill() {
	rm -f /fill
	free=$(df --output=avail -m / | tail -n 1)
	[ "$1" -ge "$free" ] || fallocate -l $((free - $1))M /fill
}

autoinstall() {
	run "$1" dkms autoinstall -k "$A"
}

case ${1:-} in
wrong-rustc)
	check "no network here" [ "$(grep -c : /proc/net/dev)" = 1 ]
	apt update
	# As if another rustc were in its place
	dpkg-divert --quiet --local --rename --add /usr/bin/rustc
	printf '#!/bin/sh\necho "rustc 1.99.0 (123456789 2027-01-01)"\n' >/usr/bin/rustc
	chmod +x /usr/bin/rustc
	check "rksm-dkms installs with a rustc that is not the kernel's" \
		apt install --no-install-recommends "/mnt/rksm-dkms_${OLD}_all.deb"
	check "a line says which rustc it has to be" \
		says "^rksm: $a was built by rustc 1\.85\.[0-9]+, and /usr/bin/rustc is 1\.99\.0: apt install rustc"
	check "and what becomes of the kernel" says "^rksm: not built for $a, which keeps the built-in KSM"
	check "nothing is built" not_built "$A"
	rm /usr/bin/rustc
	dpkg-divert --quiet --local --rename --remove /usr/bin/rustc
	;;
no-source)
	autoinstall 0
	check "without the kernel's source, a line names the package" \
		says "^rksm: the headers of $a have no Rust metadata, .*: apt install linux-source-"
	source=$(printf '%s\n' "$said" | sed -n 's/^rksm: .*: apt install \(linux-source-[0-9.]*=[^ ]*[^ .]\)[ .]*$/\1/p')
	echo "$source" >/root/source
	mv /usr/bin/bindgen /usr/bin/pahole /root
	autoinstall 0
	check "missing tools are one line" says "^rksm: missing: bindgen pahole: apt install bindgen dwarves"
	mv /root/bindgen /root/pahole /usr/bin/
	;;
full-disk)
	fill 800
	check "the command in that line installs the source" apt install "$(cat /root/source)"
	check "a disk with little room is one line" \
		says "^rksm: /var/cache/rksm has [0-9]+ MiB of room, and making the Rust metadata of $a takes [0-9]+: free some"
	check "nothing is left behind of it" [ ! -e "/var/cache/rksm/$A" ]
	check "nothing is built" not_built "$A"
	rm /fill
	;;
install)
	start=$(date +%s)
	check "with room, when the source comes, the module is built" apt install --reinstall "$(cat /root/source)"
	echo "#| kept for $A: $(du -sm "/var/cache/rksm/$A" | cut -f1) MiB"
	echo "#| metadata and module of $A: $(($(date +%s) - start)) s"
	check "the module is there" built "$A" "$OLD"
	check "signed by DKMS's key" [ "$(module "$A" signer)" = "DKMS module signing key" ]
	check "rksmctl installs" apt install "/mnt/rksmctl_${OLD}_amd64.deb"
	check "no configuration is lacking" run 0 dpkg --audit
	for parameter in $(modinfo -k "$A" -F parm rksm | cut -d: -f1); do
		grep -q "^#options rksm $parameter=" /etc/modprobe.d/rksm.conf || echo "# no $parameter"
	done >/tmp/lacking
	check "modprobe.d tells of each parameter" [ ! -s /tmp/lacking ]
	check "autopkgtest: build" run 0 "$here/debian/build"
	check "autopkgtest: rksmctl" run 0 "$here/debian/rksmctl"
	check "man pages" [ -f /usr/share/man/man4/rksm.4.gz -a -f /usr/share/man/man1/rksmctl-rules.1.gz ]
	;;
full-compile)
	cp "/lib/modules/$A/updates/dkms/"rksm.ko* /root/
	run 0 dkms unbuild "rksm/$OLD" -k "$A"
	fill 8
	check "compiling on a full disk fails" autoinstall 11
	check "and is said to have failed" says "^Autoinstall on $a failed for module.*rksm"
	check "nothing half-made is installed" not_built "$A"
	# To the last block, for the boot
	dd if=/dev/zero of=/fill2 bs=4k 2>/dev/null || true
	;;
room)
	rm -f /fill /fill2
	check "with room again it is built" autoinstall 0
	check "the module is there, again" built "$A" "$OLD"
	;;
kernel-without-headers)
	check "a kernel without its headers installs" apt install --no-install-recommends "linux-image-$B"
	check "DKMS says that they are missing" says "kernel headers for this kernel do not seem to be installed"
	check "no module for it" not_built "$B"
	check "it is to be booted" [ "$(readlink -f /vmlinuz)" = "/boot/vmlinuz-$B" ]
	;;
headers)
	check "with its headers the module is built before it boots" apt install "linux-headers-$B"
	check "the module is there for the new kernel" built "$B" "$OLD"
	check "and still for the old one" built "$A" "$OLD"
	;;
upgrade)
	cp "/lib/modules/$B/updates/dkms/"rksm.ko* /root/
	start=$(date +%s)
	check "an upgrade of rksm builds for all kernels" \
		apt install "/mnt/rksm-dkms_${NEW}_all.deb" "/mnt/rksmctl_${NEW}_amd64.deb"
	echo "#| modules of $A and $B: $(($(date +%s) - start)) s"
	check "new module for $A" built "$A" "$NEW"
	check "new module for $B" built "$B" "$NEW"
	check "no old version is left" [ "$(dkms status | grep -c rksm)" = 2 ]
	# Headers that come with Rust metadata, as other distributions have them
	cp -a "/var/cache/rksm/$B" /root/kdir
	;;
elsewhere)
	# As on a distribution that knows no rksm-dkms, and whose headers have the metadata. Their
	# paths are in them.
	rm -f /usr/src/linux-source-*
	mkdir -p /var/cache/rksm
	mv /root/kdir "/var/cache/rksm/$B"
	run 0 /mnt/packages/newer/tools/dkms/install
	check "tools/dkms/install and dkms add" run 0 dkms add "rksm/$NEW"
	check "builds with the metadata of the headers" \
		run 0 dkms install "rksm/$NEW" -k "$B" --kernelsourcedir "/var/cache/rksm/$B/build"
	check "the module is there, without a package" built "$B" "$NEW"
	;;
*)
	echo "no step '${1:-}'" >&2
	exit 2
	;;
esac
