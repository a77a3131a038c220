# SPDX-License-Identifier: GPL-2.0-only
# Functions and paths shared by the scripts; sourced, never run.
# shellcheck shell=bash

set -euo pipefail

RKSM_TOP=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RKSM_CACHE=${RKSM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rksm}
mkdir -p "$RKSM_CACHE"
RKSM_CACHE=$(cd -P "$RKSM_CACHE" && pwd)
export RKSM_TOP RKSM_CACHE

JOBS=${JOBS:-$(nproc)}
export JOBS

say() {
	printf 'rksm: %s\n' "$*" >&2
}

die() {
	printf 'rksm: %s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

# The leading comment of a script is its help.
usage() {
	sed -n '/^# SPDX/d; 2,/^[^#]/ { s/^# \{0,1\}//p }' "$0" | sed '/./,$!d'
}

# Run a command as root of a private mount namespace. Who is not root gets a user
# namespace with the sub-ids that setup's uidmap package and /etc/sub[ug]id grant.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		unshare --mount --propagation private -- "$@"
	else
		unshare --user --map-root-user --map-auto --mount --propagation private -- "$@"
	fi
}

# Take the lock NAME for the rest of this shell, or say what is being waited for.
lock() {
	local fd
	exec {fd}>"$RKSM_CACHE/.lock-$1"
	if ! flock -n "$fd"; then
		say "waiting for another run that makes the $1"
		flock "$fd"
	fi
}

# with_lock NAME COMMAND... - run it, and let others have the lock then.
with_lock() (
	lock "$1"
	shift
	"$@"
)

# Run a long command with its output in a log; show only that it is going on,
# and the end of the log where it fails.
logged() {
	local log=$1 what=$2 start=$SECONDS status
	shift 2
	say "$what (log: $log)"
	# As part of a condition the command would run without -e.
	set +e
	(
		set -e
		"$@"
	) >"$log" 2>&1
	status=$?
	set -e
	if [ $status != 0 ]; then
		tail -n 30 "$log" >&2
		die "$what: failed after $((SECONDS - start)) s; the whole log is $log"
	fi
	say "$what: done in $((SECONDS - start)) s"
}

# key_of SCRIPT [TEXT] - the key of what a script makes; its comments do not count.
key_of() {
	# TEXT that could not be had would give a key all the same.
	[ $# = 1 ] || [ -n "$2" ] || return 1
	{
		sed '/^[[:space:]]*#/d; /^[[:space:]]*$/d' "$1"
		[ $# = 1 ] || echo "$2"
	} | sha256sum | cut -c1-12
}

# What kernels.toml says; see scripts/kernels --help. Every script asks more than once, and python
# takes a while to start.
kernels() {
	local script=$RKSM_TOP/scripts/kernels words=$* kept new
	command -v python3 >/dev/null || "$RKSM_TOP/scripts/setup" >&2
	case ${1:-} in
	names | get | suite | suites | stages | default) ;;
	*)
		python3 -B "$script" "$@"
		return
		;;
	esac
	kept=$RKSM_TOP/build/kernels/${words//[ \/]/+}
	if [ ! "$kept" -nt "$RKSM_TOP/kernels.toml" ] || [ ! "$kept" -nt "$script" ]; then
		mkdir -p "${kept%/*}"
		new=$kept.$BASHPID
		python3 -B "$script" "$@" >"$new" || {
			rm -f "$new"
			return 1
		}
		mv "$new" "$kept"
	fi
	cat "$kept"
}

# The suite whose sysroot is meant: that of RKSM_SUITE, or the one that has all tools.
sysroot_suite() {
	local suites
	suites=$(kernels suites) || return 1
	echo "${RKSM_SUITE:-${suites%%$'\n'*}}"
}

sysroot_dir() {
	local suite text key
	suite=$(sysroot_suite) && text=$(kernels suite "$suite") || return 1
	key=$(key_of "$RKSM_TOP/scripts/sysroot" "$text") || return 1
	printf '%s/sysroot-%s-%s\n' "$RKSM_CACHE" "$suite" "$key"
}

# What a compiler may have a say in, as it is in the sysroot.
toolchain() {
	local root
	root=$("$RKSM_TOP/scripts/sysroot") || return 1
	awk '/^Package: / { name = $2 }
	/^Version: / && name ~ /^(clang|lld|llvm|libllvm|libclang|gcc|binutils|rustc|rust-src|bindgen|dwarves|pahole)[-0-9.]*$/ { print name, $2 }' \
		"$root/var/lib/dpkg/status"
}

in_sysroot() {
	"$RKSM_TOP/scripts/sysroot-run" "$@"
}

# add_to_sysroot PACKAGE... - what only some scripts need, and the toolchain's key need not know.
add_to_sysroot() {
	local root package lacking=()
	root=$("$RKSM_TOP/scripts/sysroot") || return 1
	for package; do
		# Packages that can be had for several architectures have one in the name.
		compgen -G "$root/var/lib/dpkg/info/$package.list" >/dev/null ||
			compgen -G "$root/var/lib/dpkg/info/$package:*.list" >/dev/null || lacking+=("$package")
	done
	[ ${#lacking[@]} -gt 0 ] || return 0
	# shellcheck disable=SC2317 # called by logged
	install_more() {
		in_sysroot apt-get -q update
		in_sysroot env DEBIAN_FRONTEND=noninteractive apt-get -q -o APT::Sandbox::User=root \
			install -y --no-install-recommends "${lacking[@]}"
	}
	with_lock sysroot logged "$RKSM_CACHE/sysroot-more.log" "adding ${lacking[*]} to the sysroot" install_more
}

# copy_module_source DIR - what the module is built of; what was built there of it stays.
copy_module_source() {
	local part
	for part in Kbuild Makefile kernels.toml rust scripts tools/testing/sanitizer tools/testing/host; do
		rm -rf "${1:?}/$part"
		mkdir -p "$(dirname "$1/$part")"
		cp -rp "$RKSM_TOP/$part" "$1/$part"
	done
}

# Whether scripts/vm takes --kernel WHAT for the name of a kernel, as kernels.toml has them.
is_kernel() {
	local names
	names=$(kernels names) || return 1
	[ "$1" = sanitizer ] || grep -qxF -- "$1" <<<"$names"
}

# Build the module for what scripts/vm calls --kernel WHAT, where that is a name.
build_for() {
	if ! is_kernel "$1" || is_made "$1"; then
		return
	fi
	KVER='' FLAVOUR=$1 "$RKSM_TOP/scripts/build" >/dev/null
	made "$1"
}

# Whether an earlier stage of this run of scripts/test has made it: nobody changes a source then.
is_made() {
	[ -n "${RKSM_RUN:-}" ] && [ "$(cat "$RKSM_TOP/build/test/.made-$1" 2>/dev/null)" = "$RKSM_RUN" ]
}

# Notes that it is.
made() {
	[ -z "${RKSM_RUN:-}" ] || echo "$RKSM_RUN" >"$RKSM_TOP/build/test/.made-$1"
}
