// SPDX-License-Identifier: GPL-2.0-only
/*
 * Unmerging needs memory. When there is none, in a memory cgroup or at all, it ends with a
 * clean error or after the OOM killer has made room, waits for nobody who waits for it, and
 * what is killed is free at once. The scanner's own bookkeeping is worth no process: it never
 * calls the OOM killer. Needs a guest with little memory.
 *
 * guest: --mem 320M
 * guest sanitizer: --mem 640M
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "util.h"

#define CGROUP		"/sys/fs/cgroup/oom"
#define LIMIT		(6 << 20)
#define PAGES		4096	/* of which the limit lets no half exist at once */
#define STEP		128	/* pages that exist before they are merged */
#define HOLDERS		4
#define BALLAST		6144	/* pages */
#define SPARSE		16384	/* pages */
#define LEFT		128	/* KiB */
#define CRUMBS		48
#define CRUMB		16	/* pages */
#define SYSLOG_ACTION_READ_ALL	3

/* Fills pages with one content, a few at a time, so that all of them never exist at once */
static char *fill_merged(size_t pages, size_t step)
{
	char *area = map_pages(pages);

	mergeable(area, pages);
	for (size_t i = 0; i < pages; i++) {
		fill_page(area + i * PAGE, 1);
		if (i % step == step - 1 || i == pages - 1) {
			size_t first = i / step * step;

			while (ksm_mappings(getpid(), area + first * PAGE, i - first + 1) <=
			       i - first)
				ksm_scans(1);
		}
	}
	return area;
}

static bool intact(const char *area, size_t pages)
{
	for (size_t i = 0; i < pages; i++)
		if (!page_holds(area + i * PAGE, 1))
			return false;
	return true;
}

static void set_cgroup(const char *file, const char *text)
{
	char path[96];

	snprintf(path, sizeof(path), CGROUP "/%s", file);
	if (!write_file(path, text))
		die("cannot write %s to %s: %s", text, path, strerror(errno));
}

static long killed_in_cgroup(void)
{
	char buf[512], *at;

	if (read_file(CGROUP "/memory.events", buf, sizeof(buf)) <= 0 ||
	    !(at = strstr(buf, "oom_kill ")))
		return -1;
	return strtol(at + strlen("oom_kill "), NULL, 10);
}

static int limited(void *arg)
{
	char *area, pid[16];

	(void)arg;
	write_file("/proc/self/oom_score_adj", "0");
	snprintf(pid, sizeof(pid), "%d", getpid());
	set_cgroup("cgroup.procs", pid);
	area = fill_merged(PAGES, STEP);
	child_step();
	return intact(area, PAGES) ? KSFT_PASS : KSFT_FAIL;
}

/* A writer of run=2 of its own, as who does it may be killed. Its errno, or the signal */
static int unmerge_in_child(bool in_cgroup)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		char text[16];

		write_file("/proc/self/oom_score_adj", "0");
		snprintf(text, sizeof(text), "%d", getpid());
		if (in_cgroup)
			set_cgroup("cgroup.procs", text);
		_exit(-ksm_try("run", "2"));
	}
	waitpid(pid, &status, 0);
	return WIFSIGNALED(status) ? WTERMSIG(status) + 1000 : WEXITSTATUS(status);
}

static bool ends_well(int how)
{
	long run = ksm_get("run");

	ksft_print_msg("run=2 %s%s, run is %ld\n", how > 1000 ? "was killed: " : "ended: ",
		       how > 1000 ? strsignal(how - 1000) : strerror(how), run);
	if (how == 0)
		return run == 2;
	/* Killed while it waited for its turn, or in the middle */
	return (how == ENOMEM || how == EINTR || how == 1000 + SIGKILL) && run == 0;
}

static void with_limit(bool kill_meanwhile, bool writer_in_cgroup)
{
	struct child child;
	char text[32];
	long before;
	pid_t killer = 0;
	bool ended;
	int status;

	ksm_reset();
	ksm_start();
	snprintf(text, sizeof(text), "%d", LIMIT);
	set_cgroup("memory.max", text);
	before = killed_in_cgroup();
	child = child_start(limited, NULL);
	if (!child_wait_step(&child))
		die("the limit is too low for merged pages");
	if (kill_meanwhile) {
		killer = fork();
		if (!killer) {
			usleep(rnd_below(20000));
			kill(child.pid, SIGKILL);
			_exit(0);
		}
	}
	ended = ends_well(unmerge_in_child(writer_in_cgroup));
	if (killer)
		waitpid(killer, NULL, 0);
	ksft_print_msg("%ld killed in the cgroup\n", killed_in_cgroup() - before);
	/* Who is left has what it had */
	set_cgroup("memory.max", "max");
	status = child_end(&child);
	ksft_test_result(ended && (!status || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)),
			 "run=2 of what a cgroup has no room for%s%s\n",
			 writer_in_cgroup ? ", from inside" : "",
			 kill_meanwhile ? ", killed meanwhile" : "");
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero(), "nothing is left of it\n");
}

/* What is killed when there is no memory left after all */
static int ballast(void *arg)
{
	size_t pages = *(size_t *)arg;
	char *area = map_pages(pages);

	write_file("/proc/self/oom_score_adj", "1000");
	for (size_t i = 0; i < pages; i++)
		fill_page(area + i * PAGE, unique_key());
	child_step();
	return KSFT_PASS;
}

static int holder(void *arg)
{
	size_t pages = *(size_t *)arg;
	char *area;

	write_file("/proc/self/oom_score_adj", "0");
	area = fill_merged(pages, 4096);
	child_step();
	return intact(area, pages) ? KSFT_PASS : KSFT_FAIL;
}

static long meminfo(const char *field)
{
	char buf[4096], *at;

	if (read_file("/proc/meminfo", buf, sizeof(buf)) <= 0 || !(at = strstr(buf, field)))
		die("no %s in /proc/meminfo", field);
	return strtol(at + strlen(field) + 1, NULL, 10);
}

static void without_memory(void)
{
	struct child child[HOLDERS], spare;
	size_t pages, kept = BALLAST;
	bool ended, alive = true;
	int how, dead = 0;

	ksm_reset();
	ksm_set("max_page_sharing", 100000);
	ksm_start();
	pages = (size_t)meminfo("MemAvailable:") / 4 * 5 / 4 / HOLDERS;
	for (int c = 0; c < HOLDERS; c++) {
		child[c] = child_start(holder, &pages);
		if (!child_wait_step(&child[c]))
			die("a holder is gone");
	}
	spare = child_start(ballast, &kept);
	if (!child_wait_step(&spare))
		die("the ballast is gone");
	ksft_print_msg("%d processes of %zu pages, %ld KiB available\n", HOLDERS, pages,
		       meminfo("MemAvailable:"));
	how = unmerge_in_child(false);
	ended = ends_well(how);
	child_kill(&spare);
	ksft_test_result(ended && how, "run=2 of more than there is memory\n");
	/*
	 * Who asked for it is the one to go, not those whose memory it is. But what is gone by
	 * then is gone, and the next one who needs a page may find none before the ballast has
	 * been given back: where the writer was killed, one of them may follow.
	 */
	ksm_start();
	for (int c = 0; c < HOLDERS; c++) {
		int status = child_end(&child[c]);

		dead += WIFSIGNALED(status);
		alive &= !status || WIFSIGNALED(status);
	}
	ksft_print_msg("%d of %d holders were killed\n", dead, HOLDERS);
	ksft_test_result(alive && dead <= (how > 1000), "the processes go on with what they had\n");
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero(), "nothing is left of it\n");
}

/* A page in each page table: most bookkeeping for each page */
static int sparse(void *arg)
{
	size_t pages = *(size_t *)arg;
	uint64_t first = unique_key();
	bool ok = true;
	char *area;

	write_file("/proc/self/oom_score_adj", "0");
	area = mmap(NULL, pages * HPAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED || madvise(area, pages * HPAGE, MADV_NOHUGEPAGE))
		die("mmap: %s", strerror(errno));
	for (size_t i = 0; i < pages; i++)
		fill_page(area + i * HPAGE, first + i);
	child_step();
	if (madvise(area, pages * HPAGE, MADV_MERGEABLE))
		die("MADV_MERGEABLE: %s", strerror(errno));
	child_step();
	for (size_t i = 0; i < pages; i++)
		ok &= page_holds(area + i * HPAGE, first + i);
	return ok ? KSFT_PASS : KSFT_FAIL;
}

/* Takes what memory there is, until the OOM killer is called or soon will be */
static int hog(void *arg)
{
	size_t pages = meminfo("MemTotal:") / 4;
	long kills = vmstat("oom_kill") + CRUMBS / 3;
	char *area = map_pages(pages);

	(void)arg;
	write_file("/proc/self/oom_score_adj", "0");
	for (size_t i = 0; i < pages; i++) {
		if (i % 8 == 0 && (meminfo("MemAvailable:") <= LEFT || vmstat("oom_kill") > kills))
			break;
		area[i * PAGE] = 1;
	}
	child_step();
	return KSFT_PASS;
}

/* How often the scanner has called the OOM killer */
static int called_by_scanner(void)
{
	static char log[1 << 20];
	int len = klogctl(SYSLOG_ACTION_READ_ALL, log, sizeof(log) - 1), n = 0;

	if (len < 0)
		die("syslog: %s", strerror(errno));
	log[len] = 0;
	for (char *at = log; (at = strstr(at, "ksmd invoked oom-killer")); at++)
		n++;
	return n;
}

static void bookkeeping(void)
{
	size_t pages = SPARSE, crumb = CRUMB;
	struct child child, full, crumbs[CRUMBS];
	long refused;
	int before = called_by_scanner(), called, status;

	ksm_reset();
	child = child_start(sparse, &pages);
	if (!child_wait_step(&child))
		die("the sparse process is gone");
	/* Others than the scanner call the OOM killer: these go then, and leave little each */
	for (int c = 0; c < CRUMBS; c++) {
		crumbs[c] = child_start(ballast, &crumb);
		child_wait_step(&crumbs[c]);
	}
	full = child_start(hog, NULL);
	if (!child_wait_step(&full))
		die("the hog is gone");
	ksft_print_msg("%zu page tables of one page, %ld KiB available\n", pages,
		       meminfo("MemAvailable:"));
	child_go(&child);
	if (!child_wait_step(&child))
		die("the sparse process is gone");
	refused = ksm_get("refused/no_memory");
	ksm_start();
	ksm_scans(1);
	refused = ksm_get("refused/no_memory") - refused;
	/* Not before: what is needed to read the log would call the OOM killer, too */
	status = child_end(&full);
	for (int c = 0; c < CRUMBS; c++)
		child_kill(&crumbs[c]);
	called = called_by_scanner() - before;
	ksft_print_msg("no memory for %ld pages, the OOM killer was called %d times\n", refused,
		       called);
	ksft_test_result(refused > 0 && !called && !status,
			 "bookkeeping that finds no memory kills nobody\n");
	ksm_scans(2);
	ksft_test_result(ksm_get("pages_unshared") + ksm_get("pages_volatile") >= SPARSE,
			 "all pages are looked at when there is memory\n");
	ksft_test_result(!child_end(&child), "the pages are what they were\n");
}

int main(int argc, char **argv)
{
	/*
	 * This and the monitor outlive those whose memory it is; whatever is started for that may
	 * be killed
	 */
	write_file("/proc/self/oom_score_adj", "-1000");
	test_init(argc, argv);
	if (!write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory") ||
	    (mkdir(CGROUP, 0755) && errno != EEXIST)) {
		monitor_verdict();
		ksft_exit_skip("no memory cgroups\n");
	}
	test_plan(3 * 2 + 3 + 3);
	/* Something to scan always, as no scan is counted otherwise */
	mergeable(map_pages(1), 1);
	with_limit(false, false);
	with_limit(true, false);
	with_limit(false, true);
	without_memory();
	bookkeeping();
	test_exit();
}
