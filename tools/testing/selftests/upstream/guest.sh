#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Usage (in a guest): guest.sh DIRECTORY PART
#
# Runs upstream's KSM tests in DIRECTORY, first on the built-in KSM and then on rksm. Before
# the TAP of each stands a line "#### KSM: program options", after it "#### exit STATUS";
# compare.pl reads them.

cd "$1" || exit 1

cases() {
	case $1 in
	one-node)
		# As run_vmtests.sh runs them, and what it leaves out: unmerge time, COW time,
		# prctl instead of madvise. -l is the limit for the slowest host.
		for options in "-M -p 10" -U "-Z -p 10 -z 0" "-Z -p 10 -z 1" "-P -s 100" "-H -s 100" "-D -s 20" -C; do
			echo "ksm_tests $options -l 500"
		done
		for options in "-M -p 10" -U "-Z -p 10 -z 0" "-Z -p 10 -z 1" "-D -s 20" -C; do
			echo "ksm_tests $options -t 1 -l 500"
		done
		echo ksm_functional_tests
		echo merge
		;;
	two-nodes)
		echo "ksm_tests -N -m 1"
		echo "ksm_tests -N -m 0"
		echo rmap
		;;
	esac
}

run_all() {
	cases "$2" | while read -r program; do
		# -U waits for one full scan, which may have passed the pages before it wrote to them:
		# a case of ksm_tests has three tries, on either KSM.
		for _ in 1 2 3; do
			echo "#### $1: $program"
			# shellcheck disable=SC2086 # a program and its options
			./$program </dev/null 2>&1
			status=$?
			echo
			echo "#### exit $status"
			if [ $status != 1 ] || [ "${program#ksm_tests}" = "$program" ]; then
				break
			fi
		done
	done
}

run_all built-in "$2"
insmod /rksm.ko || exit 1
run_all rksm "$2"
echo 2 >/sys/kernel/mm/ksm/run
rmmod rksm
