# SPDX-License-Identifier: GPL-2.0-only
# Results in TAP, for scripts on the machine's disk; sourced, never run.
# shellcheck shell=sh

# Never on the disk, which may be full
notes=$(mktemp -p /dev/shm)
trap 'rm -f "$notes"' EXIT

# check TEXT COMMAND [ARG]... - whether it succeeds; what it says is told where it does not
check() {
	text=$1
	shift
	if "$@" >"$notes" 2>&1; then
		echo "ok $text"
	else
		echo "$*" | cat - "$notes" | tail -n 40 | sed 's/^/# /'
		echo "not ok $text"
	fi
}

# run STATUS COMMAND [ARG]... - it ends so; $said is what it said
run() {
	wants=$1 status=0
	shift
	said=$("$@" 2>&1) || status=$?
	[ "$status" = "$wants" ] || {
		echo "status $status, not $wants:"
		echo "$said"
		return 1
	}
}

# says REGEX - one line of what the last command of run said
says() {
	lines=$(printf '%s\n' "$said" | grep -cE "$1")
	[ "$lines" = 1 ] || {
		echo "$lines lines match: $1"
		printf '%s\n' "$said"
		return 1
	}
}

fails() {
	! "$@"
}

# eventually COMMAND [ARG]... - within two minutes
eventually() {
	for _ in $(seq 120); do
		"$@" >/dev/null 2>&1 && return
		sleep 1
	done
	"$@"
}
