// SPDX-License-Identifier: GPL-2.0-only
/*
 * Merged memory that others write to or keep: a debugger, another process, a pipe, a core dump.
 * A write from outside breaks the sharing as the process's own would, and reaches nobody else;
 * who has borrowed a merged page keeps its contents, whatever happens to it.
 *
 * runs: cloud-amd64 builtin
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define PAGES		16	/* in each process, all with one content */
#define AT		5	/* the page that is written to */
#define OFFSET		256
#define CORE		"/tmp/rksm.core"

static char *area;
static uint64_t key;
static const char text[] = "written from outside";

static int owner(void *arg)
{
	(void)arg;
	child_step();
	return 0;
}

static bool all_merged(void *pid)
{
	return ksm_mappings(getpid(), area, PAGES) == PAGES &&
	       ksm_mappings(*(pid_t *)pid, area, PAGES) == PAGES;
}

/* A child that runs `fn`, with the same pages as its parent, all of them merged */
static struct child merged_child(int (*fn)(void *arg))
{
	struct child child;

	key = unique_key();
	for (size_t i = 0; i < PAGES; i++)
		fill_page(area + i * PAGE, key);
	child = child_start(fn, NULL);
	if (!child_wait_step(&child))
		die("the child has ended");
	ksm_start();
	if (!ksm_until_true(all_merged, &child.pid, 12))
		die("not everything is merged");
	return child;
}

static bool mine_hold(void)
{
	for (size_t i = 0; i < PAGES; i++) {
		if (!page_holds(area + i * PAGE, key)) {
			ksft_print_msg("page %zu of the parent has changed\n", i);
			return false;
		}
	}
	return true;
}

/* What the child sees, by /proc/PID/mem: the text at AT, and its old contents elsewhere */
static bool child_has_text(pid_t pid)
{
	char path[64], *seen = map_pages(PAGES), *wanted = map_pages(1);
	bool ok;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || pread(fd, seen, PAGES * PAGE, (off_t)area) != (ssize_t)(PAGES * PAGE))
		die("%s: %s", path, strerror(errno));
	close(fd);
	fill_page(wanted, key);
	memcpy(wanted + OFFSET, text, sizeof(text));
	ok = !memcmp(seen + AT * PAGE, wanted, PAGE);
	for (size_t i = 0; i < PAGES; i++)
		ok &= i == AT || page_holds(seen + i * PAGE, key);
	munmap(seen, PAGES * PAGE);
	munmap(wanted, PAGE);
	return ok;
}

static bool write_by_ptrace(pid_t pid)
{
	bool ok = !ptrace(PTRACE_ATTACH, pid, NULL, NULL) && waitpid(pid, NULL, 0) == pid;

	for (size_t at = 0; at < sizeof(text); at += sizeof(long)) {
		char *to = area + AT * PAGE + OFFSET + at;
		size_t len = sizeof(text) - at < sizeof(long) ? sizeof(text) - at : sizeof(long);
		long word;

		errno = 0;
		word = ptrace(PTRACE_PEEKDATA, pid, to, NULL);
		memcpy(&word, text + at, len);
		ok &= !errno && !ptrace(PTRACE_POKEDATA, pid, to, word);
	}
	return ok && !ptrace(PTRACE_DETACH, pid, NULL, NULL);
}

static bool write_by_mem(pid_t pid)
{
	char path[64];
	bool ok;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	fd = open(path, O_RDWR | O_CLOEXEC);
	ok = pwrite(fd, text, sizeof(text), (off_t)(area + AT * PAGE + OFFSET)) == sizeof(text);
	close(fd);
	return ok;
}

static bool write_by_vm(pid_t pid)
{
	struct iovec from = { (void *)text, sizeof(text) };
	struct iovec to = { area + AT * PAGE + OFFSET, sizeof(text) };

	return process_vm_writev(pid, &from, 1, &to, 1, 0) == sizeof(text);
}

static void write_from_outside(const char *name, bool (*by)(pid_t pid))
{
	struct child child = merged_child(owner);
	struct mapping map;
	bool ok = by(child.pid);

	if (!ok && errno == ENOSYS) {
		ksft_test_result_skip("%s: not in this kernel\n", name);
		child_end(&child);
		return;
	}
	if (!ok)
		ksft_print_msg("%s: %s\n", name, strerror(errno));
	mappings_of(child.pid, area + AT * PAGE, 1, &map);
	ok &= map.pfn && !(map.flags & KPF_KSM);
	ksft_test_result(ok && child_has_text(child.pid) && mine_hold() &&
			 ksm_mappings(getpid(), area, PAGES) == PAGES,
			 "%s: one process has it, and a page of its own\n", name);
	child_end(&child);
}

/* The pipe keeps a merged page. What does `then` to it? */
static void kept_by_a_pipe(const char *name, bool (*then)(void))
{
	struct child child = merged_child(owner);
	struct iovec iov = { area + AT * PAGE, PAGE };
	char *seen = map_pages(1);
	int fd[2];
	bool ok;

	if (pipe(fd) || vmsplice(fd[1], &iov, 1, 0) != (ssize_t)PAGE)
		die("vmsplice: %s", strerror(errno));
	ok = then() && mine_hold();
	/* Either this breaks the sharing, or the page is our own: the pipe has the old contents */
	memcpy(area + AT * PAGE + OFFSET, text, sizeof(text));
	ok &= read(fd[0], seen, PAGE) == (ssize_t)PAGE && page_holds(seen, key);
	ksft_test_result(ok, "vmsplice, then %s: the pipe has what it was given\n", name);
	close(fd[0]);
	close(fd[1]);
	munmap(seen, PAGE);
	child_end(&child);
}

static bool nothing(void)
{
	return true;
}

static bool unmerge(void)
{
	ksm_set("run", 2);
	return ksm_all_zero() && !ksm_mappings(getpid(), area, PAGES);
}

static bool compact(void)
{
	return write_file("/proc/sys/vm/compact_memory", "1");
}

static bool reload(void)
{
	return unmerge() && !module_remove() && !module_insert("") && module_loaded();
}

static int dumps(void *arg)
{
	struct rlimit all = { RLIM_INFINITY, RLIM_INFINITY };

	(void)arg;
	setrlimit(RLIMIT_CORE, &all);
	child_step();
	abort();
}

/* Whether the area stands in the dump as it was */
static bool dumped(void)
{
	int fd = open(CORE, O_RDONLY | O_CLOEXEC);
	uint64_t addr = (uint64_t)area;
	char *seen = map_pages(PAGES);
	bool ok = false;
	Elf64_Ehdr elf;
	Elf64_Phdr ph;

	if (fd < 0 || pread(fd, &elf, sizeof(elf), 0) != sizeof(elf)) {
		ksft_print_msg("%s: %s\n", CORE, strerror(errno));
		return false;
	}
	for (int i = 0; i < elf.e_phnum; i++) {
		off_t at = elf.e_phoff + i * sizeof(ph);

		if (pread(fd, &ph, sizeof(ph), at) != sizeof(ph))
			break;
		if (ph.p_type != PT_LOAD || addr < ph.p_vaddr ||
		    addr + PAGES * PAGE > ph.p_vaddr + ph.p_filesz)
			continue;
		at = ph.p_offset + (addr - ph.p_vaddr);
		ok = pread(fd, seen, PAGES * PAGE, at) == (ssize_t)(PAGES * PAGE);
		for (size_t n = 0; n < PAGES; n++)
			ok &= page_holds(seen + n * PAGE, key);
	}
	close(fd);
	munmap(seen, PAGES * PAGE);
	return ok;
}

static void core_dump(void)
{
	char pattern[128] = "core";
	struct child child;
	size_t merged;
	bool ok;
	int status;

	read_file("/proc/sys/kernel/core_pattern", pattern, sizeof(pattern));
	mkdir("/tmp", 01777);
	write_file("/proc/sys/kernel/core_pattern", CORE);
	child = merged_child(dumps);
	ksm_set("run", 0);
	merged = ksm_mappings(getpid(), area, PAGES);
	status = child_end(&child);
	ok = WIFSIGNALED(status) && WCOREDUMP(status);
	ksft_test_result(ok && dumped(), "core dump: merged pages are in it\n");
	ksft_test_result(mine_hold() && ksm_mappings(getpid(), area, PAGES) == merged,
			 "core dump: those who share the pages still do\n");
	unlink(CORE);
	write_file("/proc/sys/kernel/core_pattern", pattern);
}

int main(int argc, char **argv)
{
	test_init(argc, argv);
	test_plan(9);
	ksm_reset();
	area = map_pages(PAGES);
	mergeable(area, PAGES);

	write_from_outside("ptrace", write_by_ptrace);
	write_from_outside("/proc/PID/mem", write_by_mem);
	write_from_outside("process_vm_writev", write_by_vm);
	kept_by_a_pipe("a write", nothing);
	kept_by_a_pipe("run=2", unmerge);
	kept_by_a_pipe("compaction", compact);
	if (module_path)
		kept_by_a_pipe("rmmod", reload);
	else
		ksft_test_result_skip("vmsplice, then rmmod: no module is loaded\n");
	core_dump();
	test_exit();
}
