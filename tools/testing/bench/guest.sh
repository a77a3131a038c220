#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Usage: guest.sh ROUNDS quick|full OPTIONS WORKLOAD...
#
# In the guest: runs the workloads round by round, with each of SIDES (builtin, rksm) by
# turns; rksm once more with governor=auto where that matters. JSON goes to stdout, progress to
# stderr. RKSM_ARGS are parameters of the module, OPTIONS go to rksm-bench, SECONDS_EACH is the
# longest that one may take. With ALL set, long workloads have fewer rounds. With PROFILE set,
# profile/ has where the scanning threads' time went. Exit status 1 if a workload failed.

rounds=$1 size=$2 options=$3
shift 3
[ "$size" = full ] || options="$options --quick"
bench=/root/rksm-bench
failed=0

now() {
	cut -d. -f1 /proc/uptime
}
start=$(now)

run() {
	printf '%5d s  round %d/%d  %-7s  %-9s  smart_scan=%d\n' \
		$(($(now) - start)) "$round" "$rounds" "$2" "$1" "$3" >&2
	record=
	[ -z "$PROFILE" ] || record="perf record -q -a -e cpu-clock -F 997 -o /tmp/perf.data --"
	# shellcheck disable=SC2086 # options are words
	timeout "${SECONDS_EACH:-900}" $record $bench $options --impl "$2" --smart-scan "$3" --round "$round" "$1" || {
		failed=1
		printf '\n{"workload":"%s","impl":"%s","smart_scan":%d,"round":%d,"failed":1}\n' \
			"$1" "$2" "$3" "$round"
	}
	if [ -n "$PROFILE" ]; then
		mkdir -p profile
		perf report -i /tmp/perf.data --stdio --comms ksmd,rksmd --percentage relative --percent-limit 0.5 \
			--fields overhead,symbol 2>&1 | sed 's/ *$//' >"profile/$1-$2-smart_scan-$3-round-$round.txt"
	fi
}

# What the list says of a workload: name, alias, smart scan too, no KSM too, loads rksm itself,
# governor too, rounds at most.
column() {
	$bench --list | grep "^$1 " | cut -d' ' -f"$2"
}

# Whether it says so.
listed() {
	[ "$(column "$1" "$2")" = 1 ]
}

# With what the kernel has by default, and then with governor=auto.
governed() {
	if [ "$2" = builtin ] && listed "$1" 4; then
		run "$1" none 1
	fi
	run "$1" "$2" 1
	[ "$2" = rksm ] || return 0
	if [ -e /sys/kernel/mm/rksm/governor ]; then
		run "$1" auto 1
	else
		echo "$1: no governor=auto, as this module has no file governor" >&2
		printf '{"not_run":"%s, governor=auto: this module has no governor"}\n' "$1"
	fi
}

side() {
	impl=$1 rest=
	shift
	for w; do
		most=$(column "$w" 7)
		if [ -n "$ALL" ] && [ "$most" -gt 0 ] && [ "$round" -gt "$most" ]; then
			continue
		fi
		if ! listed "$w" 5; then
			rest="$rest $w"
		elif [ "$impl" = rksm ]; then
			run "$w" rksm 0
		fi
	done
	[ -n "$rest" ] || return 0
	if [ "$impl" = rksm ]; then
		# shellcheck disable=SC2086 # parameters are words
		insmod /rksm.ko $RKSM_ARGS || {
			echo "rksm.ko does not load; see the kernel's log" >&2
			failed=1
			printf '{"workload":"insmod","impl":"rksm","smart_scan":0,"round":%d,"failed":1}\n' "$round"
			return
		}
	fi
	for w in $rest; do
		if listed "$w" 6; then
			governed "$w" "$impl"
			continue
		fi
		if [ "$impl" = builtin ] && listed "$w" 4; then
			run "$w" none 0
		fi
		run "$w" "$impl" 0
		! listed "$w" 3 || [ "$w-$size" = thp-quick ] || run "$w" "$impl" 1
	done
	if [ "$impl" = rksm ]; then
		echo 2 >/sys/kernel/mm/ksm/run
		rmmod rksm || {
			echo "rksm does not unload" >&2
			exit 1
		}
	fi
}

printf '{"meta":{"release":"%s","cpus":%d,"mem_kb":%d,"cpu":"%s","rounds":%d,"quick":%s}}\n' \
	"$(uname -r)" "$(grep -c ^processor /proc/cpuinfo)" \
	"$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)" \
	"$(sed -n '/^model name/ { s/.*: //p; q }' /proc/cpuinfo)" \
	"$rounds" "$([ "$size" = quick ] && echo true || echo false)"

round=1
while [ "$round" -le "$rounds" ]; do
	# Whoever goes first, goes second in the next round.
	order=
	for impl in $SIDES; do
		if [ $((round % 2)) = 1 ]; then
			order="$order $impl"
		else
			order="$impl $order"
		fi
	done
	for impl in $order; do
		side "$impl" "$@"
	done
	round=$((round + 1))
done
exit $failed
