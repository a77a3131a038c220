// SPDX-License-Identifier: GPL-2.0-only
/*
 * Loading and unloading: what was there before is there afterwards, descriptors of the
 * files live through it, the module goes while merged pages exist, and nothing leaks.
 *
 * guest: --no-module --timeout 1200
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define COPIES		32
#define CYCLES		200
#define WARMUP		10

static char *area;

static bool intact(void)
{
	for (size_t i = 0; i < COPIES; i++)
		if (!page_holds(area + i * PAGE, 1))
			return false;
	return true;
}

static int tasks_named(const char *name)
{
	DIR *dir = opendir("/proc");
	struct dirent *entry;
	int n = 0;

	while ((entry = readdir(dir))) {
		char path[300], comm[32];

		snprintf(path, sizeof(path), "/proc/%s/comm", entry->d_name);
		if (entry->d_name[0] < '0' || entry->d_name[0] > '9' ||
		    read_file(path, comm, sizeof(comm)) <= 0)
			continue;
		n += !strncmp(comm, name, strlen(name)) && comm[strlen(name)] == '\n';
	}
	closedir(dir);
	return n;
}

static bool merges(void)
{
	ksm_start();
	return ksm_until("pages_sharing", COPIES - 1, 30) && intact();
}

/* Descriptors */

static int fds[KSM_FILES];

static void open_all(void)
{
	for (int f = 0; f < KSM_FILES; f++) {
		char path[128];

		snprintf(path, sizeof(path), "/sys/kernel/mm/ksm/%s", ksm_files[f]);
		fds[f] = open(path, (f < KSM_FIRST_RW ? O_RDONLY : O_RDWR) | O_CLOEXEC);
		if (fds[f] < 0)
			die("open %s: %s", path, strerror(errno));
	}
}

/* Each descriptor reads what a fresh one reads, and what is written through it arrives */
static bool descriptors_work(void)
{
	bool ok = true;

	ksm_set("run", 0);
	for (int f = 0; f < KSM_FILES; f++) {
		char path[128], old[64] = "", fresh[64] = "";

		snprintf(path, sizeof(path), "/sys/kernel/mm/ksm/%s", ksm_files[f]);
		if (lseek(fds[f], 0, SEEK_SET) || read(fds[f], old, sizeof(old) - 1) <= 0 ||
		    read_file(path, fresh, sizeof(fresh)) <= 0 || strcmp(old, fresh)) {
			ksft_print_msg("%s: old descriptor reads '%s', a new one '%s' (%s)\n",
				       ksm_files[f], old, fresh, strerror(errno));
			ok = false;
		}
	}
	for (int f = KSM_FIRST_RW; f < KSM_FILES; f++) {
		long value = 1;

		if (strcmp(ksm_files[f], "sleep_millisecs"))
			continue;
		for (value = 5; value < 8; value++) {
			char text[8];
			int n = snprintf(text, sizeof(text), "%ld", value);

			ok &= pwrite(fds[f], text, n, 0) == n &&
			      ksm_get("sleep_millisecs") == value;
		}
	}
	return ok;
}

/* Knobs and the mms that were there before */

static bool carried_over(void)
{
	static const struct {
		const char *file;
		long value;
	} set[] = {
		{ "sleep_millisecs", 7 }, { "pages_to_scan", 321 }, { "max_page_sharing", 99 },
		{ "use_zero_pages", 1 }, { "smart_scan", 0 }, { "merge_across_nodes", 1 },
		{ "stable_node_chains_prune_millisecs", 1234 }, { "advisor_max_cpu", 55 },
		{ "advisor_min_pages_to_scan", 111 }, { "advisor_max_pages_to_scan", 2222 },
		{ "advisor_target_scan_time", 33 },
	};
	bool ok = true;

	ksm_set("run", 2);
	for (size_t i = 0; i < ARRAY_SIZE(set); i++)
		ksm_set(set[i].file, set[i].value);
	ksm_set("run", 0);
	for (int loaded = 1; loaded >= 0; loaded--) {
		ok &= loaded ? module_in("") : module_out();
		ok &= ksm_get("run") == 0;
		for (size_t i = 0; i < ARRAY_SIZE(set); i++) {
			if (ksm_get(set[i].file) == set[i].value)
				continue;
			ksft_print_msg("%s is %ld, not %ld, after %s\n", set[i].file,
				       ksm_get(set[i].file), set[i].value,
				       loaded ? "insmod" : "rmmod");
			ok = false;
		}
	}
	ksm_reset();
	return ok;
}

static bool merging_goes_on(void)
{
	bool ok = merges();

	/* Merged by the built-in, registered before rksm came */
	ok &= module_in("");
	ok &= ksm_get("run") == 1;
	ok &= ksm_until("pages_sharing", COPIES - 1, 30) && intact();
	ok &= tasks_named("rksmd") == 1;
	return ok;
}

static bool goes_while_used(void)
{
	bool ok = module_out() && intact() && ksm_get("run") == 1;

	ksm_set("run", 0);
	ok &= ksm_get("pages_sharing") == COPIES - 1 && intact();
	ok &= module_in("") && ksm_get("pages_sharing") == COPIES - 1;
	return ok && ksm_get("run") == 0 && intact();
}

/* Under load: writers in all files, readers, processes that come and go */

static void churn(int kind)
{
	static const char *const values[] = { "0",    "1",	   "2",	 "100",
					      "none", "scan-time", "-1", "x" };

	rnd_fork(kind);
	for (;;) {
		if (kind < 2) {
			/* Mostly merging, often unmerging, and bad input */
			int f = KSM_FIRST_RW + rnd_below(KSM_FILES - KSM_FIRST_RW);

			if (rnd_below(3) == 0)
				ksm_try("run", rnd_below(2) ? "1" : "2");
			else if (strcmp(ksm_files[f], "run"))
				ksm_try(ksm_files[f], values[rnd_below(ARRAY_SIZE(values))]);
			usleep(rnd_below(500));
			continue;
		}
		pid_t pid = fork();

		if (!pid) {
			char *mine = map_pages(16);

			for (size_t i = 0; i < 16; i++)
				fill_page(mine + i * PAGE, rnd_below(4));
			if (rnd_below(2))
				prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
			else
				mergeable(mine, 16);
			usleep(rnd_below(8000));
			_exit(0);
		}
		waitpid(pid, NULL, 0);
	}
}

static bool under_load(int cycles)
{
	pid_t pid[5];
	int loaded = 0, removed = 0, refused = 0;
	bool ok = true;

	fflush(NULL);
	for (int c = 0; c < 5; c++) {
		pid[c] = fork();
		if (!pid[c]) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			alarm(0);
			churn(c);
		}
	}
	for (int n = 0; n < cycles && ok; n++) {
		int err = module_insert("");

		/* Memory that the built-in cannot let go of right now */
		if (err && err != -EBUSY && err != -EAGAIN && err != -EINTR) {
			ksft_print_msg("insmod: %s\n", strerror(-err));
			ok = false;
			break;
		}
		loaded += !err;
		usleep(rnd_below(30000));
		for (int tries = 0; module_loaded(); tries++) {
			ksm_try("run", "2");
			err = module_remove();
			removed += !err;
			refused += err == -EWOULDBLOCK;
			if ((err && err != -EWOULDBLOCK) || tries > 20000) {
				ksft_print_msg("rmmod: %s\n", strerror(-err));
				ok = false;
				break;
			}
		}
	}
	for (int c = 0; c < 5; c++) {
		kill(pid[c], SIGKILL);
		waitpid(pid[c], NULL, 0);
	}
	ksft_print_msg("%d times in, %d times out, %d times refused\n", loaded, removed, refused);
	return ok && loaded && removed == loaded;
}

/* Leaks */

/*
 * A kernel that lacks something is as good as a module that wants something else: the names
 * in a copy of the module are misspelt. It must refuse to load with err, in one line that
 * has what is missing, and leave the built-in as it is.
 */
static bool refused(const char *const *names, int err)
{
	static const char copy[] = "/tmp/misspelt.ko";
	const char *path = module_path;
	int in = open(path, O_RDONLY | O_CLOEXEC);
	int out = open(copy, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	off_t size = in < 0 ? 0 : lseek(in, 0, SEEK_END);
	char *image = malloc(size);
	bool ok;

	if (pread(in, image, size, 0) != size)
		die("cannot read %s: %s", path, strerror(errno));
	for (; *names; names++) {
		size_t len = strlen(*names);
		char *at = image;

		while ((at = memmem(at, image + size - at, *names, len)))
			at[len - 1] = '_';
	}
	if (write(out, image, size) != size || close(out))
		die("cannot write %s: %s", copy, strerror(errno));
	free(image);
	close(in);
	module_path = copy;
	ok = module_refused("", err);
	module_path = path;
	unlink(copy);
	return merges() && ok;
}

/* The built-in scans without a pause when its files are handed back to it */
static bool restless(void)
{
	char *own = map_pages(1);
	bool ok;

	fill_page(own, 7);
	madvise(area, COPIES * PAGE, MADV_UNMERGEABLE);
	mergeable(own, 1);
	ksm_reset();
	ksm_set("sleep_millisecs", 0);
	ksm_start();
	ok = module_in("") && module_out() && ksm_get("run") == 1 &&
	     ksm_get("sleep_millisecs") == 0;
	ksm_reset();
	munmap(own, PAGE);
	mergeable(area, COPIES);
	return ok && merges();
}

static long meminfo(const char *field)
{
	char buf[4096], *at;

	if (read_file("/proc/meminfo", buf, sizeof(buf)) <= 0 || !(at = strstr(buf, field)))
		die("no %s in /proc/meminfo", field);
	return strtol(at + strlen(field) + 1, NULL, 10);
}

static bool nothing_leaks(void)
{
	/* kB; what page and slab caches may keep, and per cycle far below a page */
	static const struct {
		const char *field;
		long slack;
	} watched[] = {
		{ "SUnreclaim", 256 + CYCLES }, { "VmallocUsed", 256 + CYCLES },
		{ "KernelStack", 128 }, { "PageTables", 256 }, { "Percpu", CYCLES },
	};
	/* At the beginning, half way, and at the end */
	long used[3][ARRAY_SIZE(watched)];
	bool ok = true;

	for (int n = 0; n < WARMUP + CYCLES; n++) {
		if (n % 50 == 0)
			ksm_reset();
		if (n == WARMUP || n == WARMUP + CYCLES / 2)
			for (size_t i = 0; i < ARRAY_SIZE(watched); i++)
				used[n > WARMUP][i] = meminfo(watched[i].field);
		if (!module_in(""))
			return false;
		if (n % 10 == 0) {
			ok &= merges();
			ksm_set("run", 2);
		}
		if (!module_out())
			return false;
	}
	for (size_t i = 0; i < ARRAY_SIZE(watched); i++) {
		long first, second;

		used[2][i] = meminfo(watched[i].field);
		first = used[1][i] - used[0][i];
		second = used[2][i] - used[1][i];
		ksft_print_msg("%s grew by %ld and %ld kB in twice %d cycles\n", watched[i].field,
			       first, second, CYCLES / 2);
		/*
		 * What leaks does so all the time; the memory for modules' text grows by 2 MiB now
		 * and then
		 */
		ok &= 2 * (first < second ? first : second) <= watched[i].slack;
	}
	return ok;
}

int main(int argc, char **argv)
{
	bool ok;

	test_init(argc, argv);
	if (!module_path)
		ksft_exit_skip("no module named\n");
	if (module_loaded())
		ksft_exit_fail_msg("rksm is loaded already\n");
	test_plan(23);
	ksm_reset();
	open_all();
	area = map_pages(COPIES);
	for (size_t i = 0; i < COPIES; i++)
		fill_page(area + i * PAGE, 1);
	mergeable(area, COPIES);

	ksft_test_result(descriptors_work(), "descriptors work on the built-in\n");
	ok = module_in("");
	ksft_test_result(ok && ksm_get("run") == 0, "insmod, with run as it was\n");
	ksft_test_result(descriptors_work(), "descriptors opened before insmod work after it\n");
	ksft_test_result(module_out() && tasks_named("rksmd") == 0, "rmmod\n");
	ksft_test_result(descriptors_work(), "descriptors opened before insmod work after rmmod\n");

	ksm_reset();
	ksft_test_result(carried_over(), "knobs are carried over and back\n");
	ksft_test_result(merging_goes_on(), "insmod while merging goes on merging\n");
	ksft_test_result(module_insert("") == -EEXIST && merges(), "a second insmod is refused\n");
	ksft_test_result(goes_while_used(), "rmmod and insmod while pages are merged\n");
	ksm_set("run", 2);
	ksft_test_result(module_out() && intact(), "rmmod after run=2\n");
	ksft_test_result(merges(), "the built-in merges again\n");
	ksm_set("run", 2);
	ksft_test_result(ksm_all_zero(), "and unmerges\n");

	ok = module_insert("no_such_parameter=1") == 0;
	ksft_test_result(!ok || module_out(), "an unknown parameter does no harm\n");
	ok = module_insert("run=1x");
	ksft_test_result(ok && !module_loaded() && merges(),
			 "a bad parameter is refused, and the built-in merges on\n");
	ksft_test_result(refused((const char *[]){ "root_stable_tree", "migrate_nodes", NULL },
				 -ENOENT),
			 "a kernel without two symbols is refused, and the built-in merges on\n");
	ksft_test_result(refused((const char *[]){ "rmap_hlist_len", NULL }, -EINVAL),
			 "a kernel with another layout is refused, and the built-in merges on\n");
	ksft_test_result(refused((const char *[]){ "kallsyms_on_each_match_symbol", NULL },
				 -ENOENT),
			 "a kernel without kallsyms is refused, and the built-in merges on\n");
	ksm_set("run", 0);
	ok = module_in("run=1") && ksm_get("run") == 1 &&
	     ksm_until("pages_sharing", COPIES - 1, 30);
	ksm_set("run", 2);
	ksft_test_result(ok && module_out(), "insmod run=1 merges at once\n");

	ksft_test_result(restless(), "rmmod while the built-in does not sleep\n");
	ksm_set("run", 2);
	ksft_test_result(nothing_leaks(), "%d cycles leak nothing\n", CYCLES);
	ksm_reset();
	ksft_test_result(under_load(20), "insmod and rmmod under load\n");
	ksm_reset();
	ksft_test_result(!module_loaded() && merges(), "the built-in merges after all that\n");
	ksm_set("run", 2);
	ksft_test_result(intact() && descriptors_work(),
			 "contents and descriptors are as they were\n");
	test_exit();
}
