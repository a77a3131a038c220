#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Usage (in the booted machine): guest.sh STEP
#
# What the stage packages looks at in one boot.

here=${0%/*}
# shellcheck source=tools/testing/packages/lib.sh
. "$here/lib.sh"
# shellcheck disable=SC1091 # made by the stage
. "$here/names"
# For says
a=$(echo "$A" | sed 's/[.+]/[&]/g')
b=$(echo "$B" | sed 's/[.+]/[&]/g')
ksm=/sys/kernel/mm/ksm

value() {
	[ "$(cat "$1")" = "$2" ] || {
		echo "$1 is $(cat "$1"), not $2"
		return 1
	}
}

merged() {
	[ "$(cat $ksm/pages_sharing)" -ge "$1" ]
}

# Two processes with the same 2048 pages
hold() {
	for i in 1 2; do
		mkfifo "/run/hold$i"
		python3 "$here/hold.py" 1 <"/run/hold$i" >"/run/held$i" &
	done
	exec 3>/run/hold1 4>/run/hold2
	eventually grep -q holds /run/held1
	eventually grep -q holds /run/held2
}

same() {
	echo >&3
	echo >&4
	for i in 1 2; do
		eventually grep -qE 'same|changed' "/run/held$i"
		fails grep -q changed "/run/held$i" || return 1
		echo holds >"/run/held$i"
	done
}

unit() {
	run 0 journalctl -b -o cat --no-pager -u "$1"
}

check "the machine is up, with $(uname -r)" [ "$(systemctl is-system-running)" = "${2:-running}" ]
case ${1:-} in
first)
	check "rksm is not loaded before it is asked for" [ ! -e /sys/module/rksm ]
	check "the built-in KSM is there" value $ksm/run 0
	check "the units are right" run 0 systemd-analyze verify --man=no rksm.service rksm-knobs.service rksm-rules.service
	check "no network but loopback" [ "$(grep -c : /proc/net/dev)" = 1 ]
	sed -i 's/^#options rksm scan_threads=2/options rksm scan_threads=2/' /etc/modprobe.d/rksm.conf
	printf 'run = 1\npages_to_scan = 3000\nsleep_millisecs=10\n' >>/etc/rksm/knobs.conf
	run 0 systemctl restart rksm-knobs
	check "the knobs are set for the built-in" value $ksm/pages_to_scan 3000
	hold
	check "which merges" eventually merged 2000
	check "systemctl enable --now rksm" run 0 systemctl enable --now rksm
	check "it is loaded" value /sys/kernel/mm/rksm/version "$OLD"
	check "with what the built-in has merged" merged 2000
	check "with the parameters of modprobe.d" value /sys/kernel/mm/rksm/scan_threads 2
	check "with the knobs" value $ksm/pages_to_scan 3000
	check "processes have what they had" same
	printf 'nonsense\nno_such = 1\nrun = 7\n' >/run/knobs
	run 1 /usr/libexec/rksm/knobs /run/knobs
	check "knobs: a line for what is none" says "rksm: /run/knobs: 'nonsense' is not NAME = VALUE"
	check "knobs: a line for one that is not there" says "rksm: /run/knobs: there is no $ksm/no_such"
	check "knobs: a line for a value that is refused" says "rksm: /run/knobs: $ksm/run does not take '7'"
	mkdir /sys/fs/cgroup/later
	check "a rule is saved" run 0 rksmctl enable --cgroup /later
	check "rksmctl doctor knows rksm" run 0 sh -c 'rksmctl doctor | grep -q rksm'
	run 0 systemctl stop rksm
	check "systemctl stop hands everything back" merged 2000
	check "to processes that have what they had" same
	check "autopkgtest: load" run 0 "$here/debian/load"
	;;
again)
	check "rksm is loaded at boot" value /sys/kernel/mm/rksm/version "$OLD"
	check "with its parameters" value /sys/kernel/mm/rksm/scan_threads 2
	check "the knobs are set" value $ksm/pages_to_scan 3000
	check "run, too" value $ksm/run 1
	check "and the rules that were saved" eventually sh -c 'rksmctl rules | grep -q /later'
	;;
full)
	check "rksm is not there" [ ! -e /sys/module/rksm ]
	check "the service has failed" [ "$(systemctl is-failed rksm)" = failed ]
	unit rksm
	check "and says what to do" says "^rksm: there is no module for $a, and this says why: dkms autoinstall -k $a"
	check "the built-in KSM has the knobs" value $ksm/pages_to_scan 3000
	;;
no-module)
	check "the service has failed" [ "$(systemctl is-failed rksm)" = failed ]
	unit rksm
	check "and says what to do" says "^rksm: there is no module for $b, as its headers are not there: apt install linux-headers-$b"
	check "the built-in KSM has the knobs" value $ksm/pages_to_scan 3000
	;;
upgrade)
	check "the new version is loaded at boot" value /sys/kernel/mm/rksm/version "$NEW"
	# As it is after an upgrade of the package on a machine that runs: the old one is loaded yet
	run 0 rmmod rksm
	xz -dk /root/rksm.ko.xz
	run 0 insmod /root/rksm.ko
	check "the old version is loaded" value /sys/kernel/mm/rksm/version "$OLD"
	hold
	check "it merges" eventually merged 2000
	echo 0 >$ksm/run
	before=$(cat $ksm/pages_shared $ksm/pages_sharing)
	check "systemctl restart rksm" run 0 systemctl restart rksm
	check "changes to the new version" value /sys/kernel/mm/rksm/version "$NEW"
	check "with everything merged" [ "$(cat $ksm/pages_shared $ksm/pages_sharing)" = "$before" ]
	check "and with all contents" same
	check "apt purge with it loaded" run 0 env DEBIAN_FRONTEND=noninteractive apt-get -q -y purge rksm-dkms rksmctl
	check "it is not loaded any more" [ ! -e /sys/module/rksm ]
	check "what is merged stays merged" [ "$(cat $ksm/pages_shared $ksm/pages_sharing)" = "$before" ]
	echo 1 >$ksm/run
	scans=$(cat $ksm/full_scans)
	check "the built-in goes on" eventually sh -c "[ \$(cat $ksm/full_scans) -gt $scans ]"
	check "with all contents" same
	find / -xdev \( -path /root -o -path /srv -o -path /proc -o -path /tmp -o -path /var/log \
		-o -path /var/lib/vm -o -path /run \) -prune -o -iname '*rksm*' -print >/run/left
	check "nothing is left" [ ! -s /run/left ]
	sed 's/^/# /' /run/left
	;;
*)
	echo "no step '${1:-}'" >&2
	exit 2
	;;
esac
