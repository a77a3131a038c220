// SPDX-License-Identifier: GPL-2.0-only
/*
 * Allocations that fail, at random and one after the other: every failure is a clean errno
 * or a page that is passed over, contents stay, and afterwards everything merges as if
 * nothing had been. Needs a kernel with fault injection, and loads the module itself.
 *
 * guest: --no-module
 * runs: sanitizer
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define DEBUG		"/sys/kernel/debug/"
#define PAGES		256
#define CONTENTS	32
#define FEW		12	/* pages that are unmerged once for each allocation that can fail */
#define ROUNDS		3
#define PROCESSES	300	/* more than a registry has room for at first */
#define LOADS		24	/* of insmod, which takes seconds on such a kernel */

static const char *const kinds[] = { "failslab", "fail_page_alloc" };
static char *area;

static void set_fault(const char *kind, const char *file, const char *value)
{
	char path[96];

	snprintf(path, sizeof(path), DEBUG "%s/%s", kind, file);
	/* Not every kind has every file */
	if (!access(path, F_OK) && !write_file(path, value))
		die("cannot write %s to %s: %s", value, path, strerror(errno));
}

static long get_fault(const char *kind, const char *file)
{
	char path[96], buf[32];

	snprintf(path, sizeof(path), DEBUG "%s/%s", kind, file);
	if (read_file(path, buf, sizeof(buf)) <= 0)
		die("cannot read %s", path);
	return strtol(buf, NULL, 0);
}

/* Only allocations with such an address among their callers fail */
static void only_from(const char *kind, uint64_t start, uint64_t end)
{
	char text[32];

	snprintf(text, sizeof(text), "%#" PRIx64, start);
	set_fault(kind, "require-start", text);
	snprintf(text, sizeof(text), "%#" PRIx64, end);
	set_fault(kind, "require-end", text);
}

static void faults_init(void)
{
	for (size_t k = 0; k < ARRAY_SIZE(kinds); k++) {
		set_fault(kinds[k], "probability", "0");
		set_fault(kinds[k], "interval", "1");
		set_fault(kinds[k], "space", "0");
		set_fault(kinds[k], "verbose", "0");
		set_fault(kinds[k], "ignore-gfp-wait", "N");
		set_fault(kinds[k], "ignore-gfp-highmem", "N");
		set_fault(kinds[k], "min-order", "0");
		only_from(kinds[k], 0, UINT64_MAX);
	}
}

/*
 * The text of modules lies above that of the kernel, and no other module runs here. So this holds
 * for rksm's init as well, whose address nobody knows before it is loaded, but not for what the
 * loader allocates for a module: what becomes of that is the kernel's affair.
 */
static void only_from_modules(void)
{
	FILE *f = fopen("/proc/kallsyms", "re");
	uint64_t etext = 0;
	char line[1024];

	while (!etext && f && fgets(line, sizeof(line), f))
		if (strstr(line, " _etext\n"))
			etext = strtoull(line, NULL, 16);
	if (f)
		fclose(f);
	if (!etext)
		die("no end of the kernel's text");
	for (size_t k = 0; k < ARRAY_SIZE(kinds); k++)
		only_from(kinds[k], etext, UINT64_MAX);
}

static void inject(int which, const char *probability)
{
	for (size_t k = 0; k < ARRAY_SIZE(kinds); k++) {
		set_fault(kinds[k], "times", "1000000");
		set_fault(kinds[k], "probability", which & 1 << k ? probability : "0");
	}
}

static long injected(void)
{
	long n = 0;

	for (size_t k = 0; k < ARRAY_SIZE(kinds); k++)
		n += 1000000 - get_fault(kinds[k], "times");
	return n;
}

/*
 * fail-nth of this thread, open for good: to open it takes allocations, which could be the ones to
 * fail
 */
static int nth_fd(void)
{
	static int fd = -1;

	if (fd < 0)
		fd = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		die("fail-nth: %s", strerror(errno));
	return fd;
}

/* The nth allocation of this thread fails, from here on */
static void fail_nth(unsigned int n)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%u", n);

	if (pwrite(nth_fd(), text, len, 0) != len)
		die("fail-nth: %s", strerror(errno));
}

/* So many allocations are left until one fails; 0 after that */
static unsigned int nth_left(void)
{
	char buf[16] = "";

	if (pread(nth_fd(), buf, sizeof(buf) - 1, 0) <= 0)
		die("fail-nth: %s", strerror(errno));
	return atoi(buf);
}

/* Switches that off; whether it came so far */
static bool has_failed(void)
{
	bool failed = !nth_left();

	fail_nth(0);
	return failed;
}

static void fill(char *pages, size_t n, size_t contents)
{
	for (size_t i = 0; i < n; i++)
		fill_page(pages + i * PAGE, 1 + i % contents);
}

static bool holds(const char *pages, size_t n, size_t contents)
{
	for (size_t i = 0; i < n; i++)
		if (!page_holds(pages + i * PAGE, 1 + i % contents))
			return false;
	return true;
}

static bool intact(void)
{
	return holds(area, PAGES, CONTENTS);
}

/* As if nothing had been */
static bool merges_all(void)
{
	bool ok;

	ksm_reset();
	fill(area, PAGES, CONTENTS);
	ksm_start();
	ok = ksm_until("pages_sharing", PAGES - CONTENTS, 30) &&
	     ksm_until("pages_shared", CONTENTS, 30) && intact();
	ksm_set("run", 2);
	/* Zero pages are not asserted, see contents.c */
	return ok && !ksm_get("pages_shared") && !ksm_get("pages_sharing") &&
	       !ksm_get("pages_unshared") && !ksm_get("stable_node_dups") && intact();
}

/* Unmerging may fail, and then says so */
static bool unmerge(int *failures)
{
	int err = ksm_try("run", "2");

	if (!err)
		return ksm_get("run") == 2;
	++*failures;
	if (err != -ENOMEM && err != -EINTR) {
		ksft_print_msg("run=2: %s\n", strerror(-err));
		return false;
	}
	return ksm_get("run") == 0;
}

/* Processes that come, merge, fork and go, with their contents checked */
static int busy(void *arg)
{
	char *mine = map_pages(64);
	bool ok = true;

	(void)arg;
	mergeable(mine, 64);
	for (int round = 0; ok; round++) {
		pid_t pid;

		for (size_t i = 0; i < 64; i++)
			fill_page(mine + i * PAGE, (i + round) % 8);
		pid = fork();
		if (!pid) {
			for (size_t i = 0; i < 64; i++)
				ok &= page_holds(mine + i * PAGE, (i + round) % 8);
			_exit(!ok);
		}
		usleep(20000);
		if (pid > 0) {
			int status;

			waitpid(pid, &status, 0);
			ok &= WIFEXITED(status) && !WEXITSTATUS(status);
		}
		for (size_t i = 0; i < 64; i++)
			ok &= page_holds(mine + i * PAGE, (i + round) % 8);
		if (getppid() == 1)
			break;
		if (round % 8 == 7)
			child_step();
	}
	return ok ? KSFT_PASS : KSFT_FAIL;
}

static void at_random(int which, const char *probability)
{
	struct child child[2];
	int failures = 0;
	bool clean = true, alive = true;
	long n;

	ksm_reset();
	ksm_set("use_zero_pages", 1);
	fill(area, PAGES, CONTENTS);
	for (int c = 0; c < 2; c++)
		child[c] = child_start(busy, NULL);
	inject(which, probability);
	for (int round = 0; round < ROUNDS; round++) {
		clean &= !ksm_try("run", "1");
		for (int c = 0; c < 2; c++) {
			alive &= child_wait_step(&child[c]);
			child_go(&child[c]);
		}
		clean &= unmerge(&failures);
		alive &= intact();
	}
	n = injected();
	inject(0, "0");
	for (int c = 0; c < 2; c++) {
		alive &= child_wait_step(&child[c]);
		child_kill(&child[c]);
	}
	ksft_print_msg("%ld allocations failed, run=2 failed %d times of %d\n", n, failures,
		       ROUNDS);
	ksft_test_result(clean && alive && n > 0,
			 "%s %s %% of all allocations: clean errors, contents stay\n",
			 which == 3 ? "both" : kinds[which >> 1], probability);
	ksft_test_result(merges_all(), "and afterwards everything merges\n");
}

/* run=2 with its first allocation failing, then its second, and so on */
static void unmerge_one_by_one(void)
{
	unsigned int n, failures = 0;
	char *few = map_pages(FEW);
	bool ok = true;

	ksm_reset();
	madvise(area, PAGES * PAGE, MADV_UNMERGEABLE);
	mergeable(few, FEW);
	for (n = 1; ok && n < 1000; n++) {
		int failed = 0;
		bool reached;

		fill(few, FEW, FEW / 2);
		ksm_start();
		if (!ksm_until("pages_sharing", FEW / 2, 30))
			break;
		fail_nth(n);
		ok = unmerge(&failed);
		reached = has_failed();
		failures += failed;
		ok &= holds(few, FEW, FEW / 2);
		if (!reached)
			break;
		ksm_set("run", 2);
		ok &= !ksm_get("pages_sharing") && !ksm_get("pages_shared");
	}
	ksft_print_msg("%u allocations failed one by one, run=2 failed for %u of them\n", n - 1,
		       failures);
	munmap(few, FEW * PAGE);
	mergeable(area, PAGES);
	ksft_test_result(ok && n > FEW && n < 1000, "run=2 with each of its allocations failing\n");
}

static struct mapping was[PAGES], is[PAGES];

/* Everything merged, by either, and nothing under way */
static bool merge_all(void)
{
	bool ok;

	fill(area, PAGES, CONTENTS);
	ksm_start();
	ok = ksm_until("pages_sharing", PAGES - CONTENTS, 30) &&
	     ksm_until("pages_shared", CONTENTS, 30);
	ksm_set("run", 0);
	mappings_of(getpid(), area, PAGES, was);
	return ok && intact();
}

/* Each page is in the frame in which it was, and is counted as it was */
static bool unmoved(void)
{
	size_t moved = 0;
	long shared = ksm_get("pages_shared"), sharing = ksm_get("pages_sharing");

	mappings_of(getpid(), area, PAGES, is);
	for (size_t i = 0; i < PAGES; i++)
		moved += is[i].pfn != was[i].pfn || is[i].flags != was[i].flags;
	if (moved || shared != CONTENTS || sharing != PAGES - CONTENTS)
		ksft_print_msg("%zu pages have moved; %ld shared, %ld sharing\n", moved, shared,
			       sharing);
	return !moved && shared == CONTENTS && sharing == PAGES - CONTENTS && intact();
}

/*
 * insmod over merged pages with one of the allocations of rksm's init failing: some of them each
 * time this runs
 */
static void load_one_by_one(void)
{
	unsigned int all, loads, refused = 0;
	bool ok;
	int err;

	ksm_set("run", 2);
	if (module_remove())
		die("rksm does not go");
	ksm_reset();
	ok = merge_all();
	fail_nth(1000000);
	err = module_insert("check=1");
	all = 1000000 - nth_left();
	fail_nth(0);
	ok &= unmoved();
	if (err || module_remove())
		die("rksm does not load and unload: %s", strerror(-err));
	loads = all < LOADS ? all : LOADS;
	for (unsigned int i = 0; i < loads && ok; i++) {
		unsigned int first = i * all / loads, next = (i + 1) * all / loads;
		unsigned int n = 1 + first + rnd_below(next - first);

		fail_nth(n);
		err = module_insert("check=1");
		has_failed();
		refused += !!err;
		if (err && err != -ENOMEM) {
			ksft_print_msg("insmod with failure %u of %u: %s\n", n, all,
				       strerror(-err));
			ok = false;
		}
		/* The built-in has all that it had, or rksm has */
		ok &= module_loaded() == !err && unmoved();
		if (!err && module_remove())
			ok = false;
		if (!ok)
			ksft_print_msg("with failure %u of %u\n", n, all);
	}
	ksft_print_msg("insmod allocates %u times; refused %u times of %u\n", all, refused, loads);
	ksft_test_result(ok && refused > 0, "insmod with allocations failing one by one\n");
	ksft_test_result(ok && !ksm_try("run", "2") && intact() && merge_all(),
			 "the built-in goes on after that\n");
	if (module_insert("check=1"))
		die("rksm does not load any more");
	ksft_test_result(unmoved() && merges_all(), "and so does rksm\n");
}

/* rmmod without memory: it goes, whatever it can have */
static void unload_at_random(void)
{
	static const char *const probabilities[] = { "1", "30", "100" };
	bool ok = true;
	long n = 0;

	for (size_t p = 0; ok && p < ARRAY_SIZE(probabilities); p++) {
		ksm_reset();
		/* Nodes go into trees, and chains */
		ksm_set("max_page_sharing", p ? 4 : 256);
		fill(area, PAGES, CONTENTS);
		ksm_start();
		ksm_scans(5);
		ksm_set("run", 0);
		mappings_of(getpid(), area, PAGES, was);
		inject(3, probabilities[p]);
		ok = !module_remove();
		n += injected();
		inject(0, "0");
		mappings_of(getpid(), area, PAGES, is);
		ok &= !memcmp(was, is, sizeof(was)) && intact();
		ksm_start();
		ksm_scans(3);
		ok &= intact() && !ksm_try("run", "2") && ksm_all_zero() && intact();
		if (module_insert("check=1"))
			die("rksm does not load any more");
	}
	ksft_print_msg("%ld allocations failed\n", n);
	ksft_test_result(ok, "rmmod with allocations failing\n");
	ksft_test_result(merges_all(), "and afterwards everything merges\n");
}

static int newcomer(void *arg)
{
	char *page = map_pages(1);

	(void)arg;
	fill_page(page, 1);
	mergeable(page, 1);
	child_step();
	return page_holds(page, 1) ? KSFT_PASS : KSFT_FAIL;
}

/* No room for mms that come: they are found later */
static void found_later(void)
{
	static struct child child[PROCESSES];
	bool ok = true;

	ksm_reset();
	madvise(area, PAGES * PAGE, MADV_UNMERGEABLE);
	ksm_start();
	inject(3, "100");
	for (int c = 0; c < PROCESSES; c++) {
		child[c] = child_start(newcomer, NULL);
		ok &= child_wait_step(&child[c]);
	}
	usleep(200000);
	inject(0, "0");
	/* What found no memory is tried again after half a second */
	usleep(1500000);
	ok &= ksm_until("pages_sharing", PROCESSES - 2, 100) ||
	      ksm_until("pages_sharing", PROCESSES - 1, 10);
	ksft_print_msg("%ld of %d pages saved\n", ksm_get("pages_sharing"), PROCESSES - 1);
	for (int c = 0; c < PROCESSES; c++)
		ok &= !child_end(&child[c]);
	ksft_test_result(ok, "processes for which there was no room are found later\n");
	mergeable(area, PAGES);
}

int main(int argc, char **argv)
{
	static const char *const probabilities[] = { "5", "60" };

	test_init(argc, argv);
	if (access(DEBUG "failslab/probability", W_OK) || !module_path) {
		monitor_verdict();
		ksft_exit_skip("this kernel has no fault injection, or no module is named\n");
	}
	test_plan(3 * 2 * 2 + 7);
	faults_init();
	if (!module_loaded() && module_insert("check=1"))
		die("rksm does not load");
	only_from_modules();
	area = map_pages(PAGES);
	mergeable(area, PAGES);

	for (int which = 1; which <= 3; which++)
		for (size_t p = 0; p < ARRAY_SIZE(probabilities); p++)
			at_random(which, probabilities[p]);
	found_later();
	unmerge_one_by_one();
	load_one_by_one();
	unload_at_random();
	faults_init();
	test_exit();
}
