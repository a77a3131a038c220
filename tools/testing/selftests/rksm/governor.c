// SPDX-License-Identifier: GPL-2.0-only
/*
 * The governor: what its files take and say, that the built-in's pacing files have no effect beside
 * it, that it finds memory which grows, that quiet memory costs a wake-up a second, and that no
 * window of time has more CPU time than was promised, whatever processes do.
 *
 * guest: --no-module
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "device.h"

#define DIR_OWN		"/sys/kernel/mm/rksm/"
#define PAGES		256
#define CONTENTS	16
#define SECONDS		300	/* no memory waits a quarter of it for its next look */
#define SETTLED		15	/* a process is young for less */
#define SOON		30	/* far more than growth takes, far less than a pause may last */
#define GROWTH		4096
#define QUIET		8192
#define QUIET_SECONDS	10
#define PERCENT		2
#define BURST		100	/* ms */
#define SAMPLES		40	/* each after half a second */
/* What the scanner does between two looks at the clock, ms, or its longest hold if that is more */
#define SLICE		100

/* Files */

static bool says(const char *file, const char *want)
{
	char path[64], text[64] = "";

	snprintf(path, sizeof(path), DIR_OWN "%s", file);
	read_file(path, text, sizeof(text));
	if (strcmp(text, want))
		ksft_print_msg("%s says %s", file, text);
	return !strcmp(text, want);
}

static bool shows(const char *file, long value)
{
	char text[32];

	snprintf(text, sizeof(text), "%ld\n", value);
	return says(file, text);
}

static bool defaults(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN), percent = cpus / 2 > 5 ? cpus / 2 : 5;

	return says("governor", "[knobs] auto\n") && shows("cpu_percent", percent) &&
	       shows("pressure_cpu_percent", 2 * percent) && shows("cpu_burst_millisecs", 2000) &&
	       shows("memory_pressure", 0);
}

static bool is_refused(const char *file, const char *text)
{
	int err = ksm_try(file, text);

	if (err != -EINVAL)
		ksft_print_msg("%s: '%s' gives %s\n", file, text, strerror(-err));
	return err == -EINVAL;
}

static void files(void)
{
	static const char *const words[] = {
		"x", "Auto", "aut", "auto knobs", "[auto]", "knobs [auto]", "1", "0", " auto",
	};
	static const char *const numbers[] = {
		"0", "-1", "x", "1 1", "1.5", "5%", "4294967296", "99999999999999999999",
	};
	static const char *const files[] = {
		"cpu_percent", "pressure_cpu_percent", "cpu_burst_millisecs",
	};
	long most[] = { 100 * sysconf(_SC_NPROCESSORS_ONLN), 0, 60000 };
	long value[ARRAY_SIZE(files)];
	bool ok = true;

	most[1] = most[0];
	ksft_test_result(defaults(), "defaults\n");
	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		ok &= is_refused("governor", words[i]);
	for (size_t f = 0; f < ARRAY_SIZE(files); f++) {
		char text[32];

		for (size_t i = 0; i < ARRAY_SIZE(numbers); i++)
			ok &= is_refused(files[f], numbers[i]);
		snprintf(text, sizeof(text), "%ld", most[f] + 1);
		ok &= is_refused(files[f], text);
	}
	ksft_test_result(ok && defaults(), "EINVAL changes nothing\n");

	ok = true;
	for (size_t f = 0; f < ARRAY_SIZE(files); f++) {
		value[f] = ksm_get(files[f]);
		for (long try = 1; try <= most[f]; try += most[f] - 1)
			ok &= !ksm_try_long(files[f], try) && shows(files[f], try);
		ksm_set(files[f], value[f]);
	}
	ok &= !ksm_try("governor", "auto") && says("governor", "knobs [auto]\n");
	ok &= !ksm_try("governor", "auto\n") && says("governor", "knobs [auto]\n");
	ok &= is_refused("governor", "none") && says("governor", "knobs [auto]\n");
	ok &= !ksm_try("governor", "knobs\n") && says("governor", "[knobs] auto\n");
	ksft_test_result(ok && defaults(), "what is good is taken, and shown\n");
}

/* Memory */

static void begin(void)
{
	ksm_reset();
	if (ksm_try("governor", "auto"))
		die("there is no governor");
	ksm_start();
}

static bool is_merged(void *target)
{
	return target_merged(target) == PAGES;
}

static bool merges(struct target *target)
{
	struct rksm_stat_record stat;

	if (holds_late(is_merged, target, SECONDS))
		return target_do(target, OP_INTACT, 0);
	device_stat(target->child.pid, &stat);
	ksft_print_msg("%llu merged, %llu unique, %llu changing, %llu fresh, %llu broken\n",
		       stat.merged, stat.unique, stat.changing, stat.fresh, stat.broken);
	return false;
}

static void without_effect(void)
{
	/* In this order: what the advisor has a say in cannot be written any more */
	static const struct {
		const char *file, *value;
	} paces[] = {
		{ "pages_to_scan", "1" }, { "sleep_millisecs", "3600000" }, { "smart_scan", "1" },
		{ "advisor_mode", "none" }, { "advisor_max_cpu", "1" },
		{ "advisor_target_scan_time", "100000" },
	};
	uint64_t key = unique_key();
	struct target target[4];
	bool ok = true;
	long scanned;

	begin();
	for (size_t i = 0; i < ARRAY_SIZE(paces); i++)
		ok &= !ksm_try(paces[i].file, paces[i].value);
	for (int i = 0; i < 2; i++)
		target[i] = target_start(PAGES, CONTENTS, key, OPT_MADVISE);
	ok &= merges(&target[0]) && merges(&target[1]);
	for (size_t i = 0; i < ARRAY_SIZE(paces); i++)
		ok &= i == 3 || ksm_get(paces[i].file) == strtol(paces[i].value, NULL, 10);
	ksft_test_result(ok, "the built-in's pacing files take and keep values, without effect\n");

	/* A batch of one page now, and the next one in an hour */
	ok = !ksm_try("governor", "knobs");
	scanned = ksm_standing();
	target[2] = target_start(PAGES, CONTENTS, key, OPT_MADVISE);
	sleep(3);
	ok &= ksm_get("pages_scanned") <= scanned + 1 && !target_merged(&target[2]);
	ksft_test_result(ok, "with knobs they are in force\n");
	ok = !ksm_try("governor", "auto") && merges(&target[2]);
	ksft_test_result(ok, "auto ends an hour's pause\n");
	ok = !ksm_try("advisor_mode", "scan-time");
	target[3] = target_start(PAGES, CONTENTS, key, OPT_MADVISE);
	ok &= merges(&target[3]) && !ksm_try("advisor_mode", "none");
	ksft_test_result(ok, "the advisor can be switched on and off\n");
	for (int i = 0; i < 4; i++)
		target_end(&target[i]);
}

static bool has_grown(void *target)
{
	struct rksm_stat_record stat = target_stat(target);

	return known_pages(&stat) == PAGES + GROWTH;
}

static void growth(void)
{
	struct target target;
	bool ok;

	begin();
	target = target_start(PAGES, CONTENTS, unique_key(), OPT_MADVISE);
	ok = merges(&target);
	sleep(SETTLED);
	target_do(&target, OP_TOUCH, GROWTH);
	ok &= holds_late(has_grown, &target, SOON);
	ksft_test_result(ok, "memory of a process that grows is found\n");
	target_end(&target);
}

/* What it costs */

static bool is_alone(void *arg)
{
	(void)arg;
	return !ksm_get("processes");
}

static bool sleeps_on(void *arg)
{
	long wakeups = ksm_get("wakeups");

	(void)arg;
	sleep(4);
	return ksm_get("wakeups") == wakeups;
}

static void quiet(void)
{
	struct target unique, equal;
	long wakeups, cpu;
	bool ok;

	begin();
	unique = target_start(QUIET, QUIET, unique_key(), OPT_MADVISE);
	equal = target_start(QUIET, CONTENTS, unique_key(), OPT_MADVISE);
	sleep(SETTLED);
	wakeups = ksm_get("wakeups");
	cpu = ksm_get("cpu_microsecs");
	sleep(QUIET_SECONDS);
	wakeups = ksm_get("wakeups") - wakeups;
	cpu = ksm_get("cpu_microsecs") - cpu;
	ksft_print_msg("%ld wake-ups and %ld us of CPU in %d s\n", wakeups, cpu, QUIET_SECONDS);
	ok = target_merged(&equal) == QUIET && target_stat(&unique).unique == QUIET;
	ksft_test_result(ok && wakeups >= QUIET_SECONDS / 2 && wakeups <= QUIET_SECONDS * 2,
			 "quiet memory costs about a wake-up a second\n");
	target_end(&unique);
	target_end(&equal);
	ok = holds_late(is_alone, NULL, SECONDS);
	for (int tries = 0; ok && tries < 10 && !sleeps_on(NULL); tries++)
		;
	ksft_test_result(ok && sleeps_on(NULL), "nothing registered: no wake-ups\n");
}

/* CPU time that threads of the scanner have had, ns */
static unsigned long scanner_time(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	unsigned long sum = 0;

	if (!proc)
		die("/proc: %s", strerror(errno));
	while ((entry = readdir(proc))) {
		char path[300], text[64] = "";

		snprintf(path, sizeof(path), "/proc/%s/comm", entry->d_name);
		if (read_file(path, text, sizeof(text)) <= 0 || strncmp(text, "rksmd", 5))
			continue;
		snprintf(path, sizeof(path), "/proc/%s/schedstat", entry->d_name);
		read_file(path, text, sizeof(text));
		sum += strtoul(text, NULL, 10);
	}
	closedir(proc);
	return sum;
}

/* Processes that come, fill some memory, and go */
static int come_and_go(void *arg)
{
	uint64_t *key = arg;

	/* An open descriptor keeps the module */
	device_close();
	for (;;) {
		pid_t pid = fork();

		rnd();
		if (!pid) {
			size_t pages = 1 << rnd_below(9);
			char *area = map_pages(pages);

			mergeable(area, pages);
			for (size_t i = 0; i < pages; i++)
				fill_page(area + i * PAGE, *key + rnd_below(CONTENTS));
			usleep(rnd_below(600000));
			_exit(0);
		}
		usleep(rnd_below(20000));
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
	return KSFT_FAIL;
}

/* A page in each of many places */
static int sparse(void *arg)
{
	size_t places = 2000;
	char *area = mmap(NULL, places * HPAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t *key = arg;

	if (area == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	device_close();
	madvise(area, places * HPAGE, MADV_NOHUGEPAGE);
	mergeable(area, places * (HPAGE / PAGE));
	for (uint64_t n = 0;; n++) {
		fill_page(area + rnd_below(places) * HPAGE, *key + n % CONTENTS);
		usleep(500);
	}
	return KSFT_FAIL;
}

struct sample {
	double before, after;	/* ms: the time when it was taken */
	double used;		/* ms of CPU time */
};

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static struct sample take_sample(void)
{
	struct sample sample;

	sample.before = now();
	sample.used = scanner_time() / 1e6;
	sample.after = now();
	return sample;
}

static void budget(unsigned int threads)
{
	struct sample sample[SAMPLES + 1];
	uint64_t key = unique_key();
	struct target writer[2];
	struct child other[4];
	double over = -1e9, all, cpu, slice;
	long scanned;
	bool ok = true;

	ksm_reset();
	ksm_set("scan_threads", threads);
	ksm_set("cpu_percent", PERCENT);
	ksm_set("pressure_cpu_percent", PERCENT);
	ksm_set("cpu_burst_millisecs", BURST);
	for (int i = 0; i < 2; i++) {
		writer[i] = target_start(QUIET, CONTENTS, key, OPT_MADVISE);
		target_do(&writer[i], OP_HAMMER, QUIET / 2);
	}
	for (int i = 0; i < 4; i++)
		other[i] = child_start(i ? come_and_go : sparse, &key);
	cpu = ksm_get("cpu_microsecs") / 1e3;
	scanned = ksm_get("pages_scanned");
	sample[0] = take_sample();
	if (ksm_try("governor", "auto"))
		die("there is no governor");
	ksm_start();
	for (int i = 1; i <= SAMPLES; i++) {
		usleep(500000);
		sample[i] = take_sample();
	}
	cpu = ksm_get("cpu_microsecs") / 1e3 - cpu;
	scanned = ksm_get("pages_scanned") - scanned;
	ksft_print_msg("%ld pages looked at, %ld are saved\n", scanned, ksm_get("pages_sharing"));
	for (int from = 0; from < SAMPLES; from++)
		for (int to = from + 1; to <= SAMPLES; to++) {
			double time = sample[to].after - sample[from].before;
			double more = sample[to].used - sample[from].used -
				      (BURST + time * PERCENT / 100);

			over = more > over ? more : over;
		}
	all = sample[SAMPLES].used - sample[0].used;
	ksft_print_msg("%.0f ms of CPU in %.0f ms, %.0f ms of them counted; in no window more than %.0f ms above the promise\n",
		       all, sample[SAMPLES].after - sample[0].before, cpu, over);
	/* A host that is busy has the CPU of a guest meanwhile, and the guest does not know */
	slice = threads * ksm_get("longest_hold_usecs") / 1e3;
	slice = slice > SLICE ? slice : SLICE;
	ksft_print_msg("a slice is %.0f ms\n", slice);
	ok = over <= slice && cpu <= all + slice && cpu >= all * 0.8 - slice;
	/* Half of the least that may be used in so long a time */
	ok &= all > BURST / 2 && scanned > 0;
	for (int i = 0; i < 4; i++)
		child_kill(&other[i]);
	for (int i = 0; i < 2; i++) {
		ok &= target_do(&writer[i], OP_STOP, 0);
		target_end(&writer[i]);
	}
	ksft_test_result(ok, "%u threads: the CPU time is what was promised\n", threads);
}

int main(int argc, char **argv)
{
	target_main(argc, argv);
	test_init(argc, argv);
	if (!module_path)
		ksft_exit_skip("no module named\n");
	test_plan(13);
	if (!module_in(""))
		die("insmod");
	files();
	without_effect();
	growth();
	quiet();
	budget(1);
	budget(2);
	ksm_reset();
	device_close();
	ksft_test_result(ksm_all_zero() && module_out(), "nothing stays\n");
	test_exit();
}
