# SPDX-License-Identifier: GPL-2.0-only
# How the stages run host tests; sourced, never run.
# shellcheck shell=bash

# cargo_tap OPTION... [-- OPTION...] - `cargo test` in tools/testing/host, in TAP.
cargo_tap() {
	cd "$RKSM_TOP/tools/testing/host" || return
	in_sysroot env CARGO_TARGET_DIR="$RKSM_TOP/build/host" CARGO_TERM_COLOR=never \
		cargo test --no-fail-fast "$@" 2>&1 | to_tap
}

# to_tap - what `cargo test` prints, in TAP.
to_tap() {
	awk '
		/^test .* \.\.\. (ok|FAILED|ignored)/ {
			result = $0; sub(/.* \.\.\. /, "", result)
			name = $0; sub(/^test /, "", name); sub(/ \.\.\. .*/, "", name)
			n++
			if (result ~ /^ok/) print "ok " n " " name
			else if (result ~ /^ignored/) print "ok " n " " name " # SKIP " result
			else print "not ok " n " " name
			fflush(); next
		}
		{ print "# " $0; fflush() }
		END { print "1.." n + 0 }'
}
