#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Usage (in a guest): guest.sh DIRECTORY PART TRIES KSM...
#
# Runs the kernel's mm tests in DIRECTORY that belong to PART, once for each KSM: "without"
# it, with the "built-in", with "rksm", and with "rksm-zero", which is use_zero_pages=1. With
# a KSM each program is opted in as a whole, and the scanner runs at full speed. A program
# with cases that did not pass, but did without KSM (or by without.txt), is run up to TRIES
# times. Before the TAP of each stands a line
# "#### KSM: program options", after it "#### exit STATUS SECONDS COPIES", where COPIES is how
# many merged pages were written to, and copied, meanwhile; judge.pl reads them.
#
# RKSM_TEST_SECONDS=N   time limit of a program (240)
# RKSM_PARAMETERS=...   of the module

part=$2 tries=$3
here=$PWD
cd "$1" || exit 1
shift 3
ksm=/sys/kernel/mm/ksm
thp=/sys/kernel/mm/transparent_hugepage
cgroup=/sys/fs/cgroup/transparency

# programs PART - each line is a program and its options
programs() {
	case $1 in
	# What make test has time for.
	quick)
		programs marks
		programs sharing
		;;
	marks)
		printf '%s\n' pagemap_ioctl mkdirty guard-regions madv_populate mlock-random-test \
			mlock2-tests mrelease_test process_madv mseal_test droppable pfnmap memfd_secret \
			map_fixed_noreplace map_populate mremap_dontunmap
		;;
	sharing)
		printf '%s\n' gup_longterm memory-failure merge rmap mdwe_test "uffd-stress anon 20 4"
		;;
	# These depend on the CPU.
	pkeys) printf '%s\n' protection_keys_64 pkey_sighandler_tests_64 ;;
	soft-dirty) echo soft-dirty ;;
	swapped-out) printf '%s\n' cow uffd-wp-mremap ;;
	huge)
		printf '%s\n' prctl_thp_disable split_huge_page_test "transhuge-stress -d 5" mremap_test
		;;
	khugepaged) printf '%s\n' khugepaged "khugepaged -s 2" "khugepaged -c 4 mthp_khugepaged:anon" ;;
	split-race) printf '%s\n' folio_split_race_test ;;
	userfaultfd) printf '%s\n' uffd-unit-tests "uffd-stress anon 20 16" "uffd-stress shmem-private 20 16" ;;
	migration) printf '%s\n' migration ;;
	devices) printf '%s\n' hmm-tests "gup_test -ct -F 0x1 0 19 0x1000" "gup_test -a -n -1" ;;
	esac
}

# thp_settings - all that can be set, as lines "FILE VALUE"
thp_settings() {
	find $thp -type f -perm -200 | while read -r file; do
		value=$(cat "$file" 2>/dev/null) || continue
		case $value in
		*\[*) value=${value#*[} value=${value%%]*} ;;
		esac
		echo "$file $value"
	done
}

# What a program left behind, running or set, must not be the next one's start.
set_up() {
	echo 1 >$cgroup/cgroup.kill
	while grep -q 'populated 1' $cgroup/cgroup.events; do
		sleep 0.1
	done
	while read -r file value; do
		echo "$value" >"$file"
	done </tmp/thp 2>/dev/null
	echo 0 >/proc/sys/vm/nr_hugepages
	echo 3 >/proc/sys/vm/drop_caches
	echo 0 >$ksm/run
	[ "$1" != without ] || return 0
	echo 100000 >$ksm/pages_to_scan
	echo 0 >$ksm/sleep_millisecs
	echo 0 >$ksm/smart_scan
	case $1 in
	rksm-zero) echo 1 >$ksm/use_zero_pages ;;
	*) echo 0 >$ksm/use_zero_pages ;;
	esac
	echo 1 >$ksm/run
}

copies() {
	sed -n 's/^cow_ksm //p' /proc/vmstat
}

now() {
	sed 's/\..*//' /proc/uptime
}

# in_cgroup COMMAND... - so that all that it leaves running can be found
in_cgroup() {
	sh -c "echo 0 >$cgroup/cgroup.procs"' && exec "$@"' sh "$@"
}

# What another try may mend: cases that passed without KSM and in no try so far, and a program
# that ended early. A line of /tmp/without is "PROGRAM OPTIONS: NUMBERS"; /tmp/tries has what the
# tries printed, /tmp/ends how they ended.
to_try_again() {
	grep -q ended /tmp/ends || return 0
	awk -v program="$1" '
		FILENAME == "/tmp/without" {
			if (index($0, program ": ") == 1)
				for (i = split(substr($0, length(program) + 3), range, " "); i > 0; i--) {
					n = split(range[i], end, "-")
					for (k = end[1] + 0; k <= end[n] + 0; k++)
						wanted[k] = 1
				}
			next
		}
		FILENAME == "/tmp/expected" { expected[$0] = 1; next }
		/^(not )?ok / {
			sub(/\r$/, "")
			passed = $1 == "ok" && !/# (SKIP|XFAIL)/
			n = $1 == "ok" ? $2 : $3
			sub(/^(not )?ok [0-9]+ (- )?/, "")
			sub(/^# SKIP */, "")
			sub(/ *# (SKIP|XFAIL).*/, "")
			split(program, word, " ")
			if (passed || (word[1] ": " $0) in expected)
				delete wanted[n + 0]
		}
		END { for (n in wanted) exit 0; exit 1 }
	' /tmp/without /tmp/expected /tmp/tries
}

# passed_numbers FILE - of the cases that passed, as ranges
passed_numbers() {
	awk '
		function put() { if (last) printf " %s", first < last ? first "-" last : first }
		/^ok / && !/# (SKIP|XFAIL)/ {
			if (!last || $2 + 0 != last + 1) { put(); first = $2 + 0 }
			last = $2 + 0
		}
		END { put() }
	' "$1"
}

run_all() {
	programs "$part" | while read -r program; do
		try=0
		: >/tmp/tries
		: >/tmp/ends
		while [ $try -lt "$tries" ]; do
			try=$((try + 1))
			set_up "$1"
			echo "#### $1: $program"
			before=$(copies) start=$(now)
			launcher=../opt-in
			[ "$1" != without ] || launcher="env"
			# shellcheck disable=SC2086 # a program and its options
			in_cgroup timeout -s KILL "${RKSM_TEST_SECONDS:-240}" $launcher ./$program </dev/null >/tmp/output 2>&1
			status=$?
			cat /tmp/output
			echo
			echo "#### exit $status $(($(now) - start)) $(($(copies) - before))"
			if [ "$1" = without ]; then
				echo "$program:$(passed_numbers /tmp/output)" >>/tmp/without
				break
			fi
			cat /tmp/output >>/tmp/tries
			case $status in
			0 | 1 | 4) grep '^Bail out!' /tmp/output | grep -qv ' tests failed' || echo ended >>/tmp/ends ;;
			esac
			to_try_again "$program" || break
		done
	done
}

mkdir $cgroup || exit 1
modprobe zram && echo 512M >/sys/block/zram0/disksize && mkswap /dev/zram0 >/dev/null && swapon /dev/zram0 || exit 1
modprobe hwpoison-inject || exit 1
modprobe -q test_hmm
echo always >$thp/enabled
thp_settings >/tmp/thp
sed -n '/^[#~]/d; s/\t.*//p' "$here/expected.txt" >/tmp/expected
case " $* " in
*" without "*) : >/tmp/without ;;
*) grep -v '^#' "$here/without.txt" >/tmp/without ;;
esac
for kind in "$@"; do
	case $kind in
	rksm*)
		# shellcheck disable=SC2086 # a list
		[ -d /sys/module/rksm ] || insmod /rksm.ko $RKSM_PARAMETERS || exit 1
		;;
	esac
	run_all "$kind"
done
set_up without
if [ -d /sys/module/rksm ]; then
	echo 2 >$ksm/run
	rmmod rksm
fi
