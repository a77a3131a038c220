// SPDX-License-Identifier: GPL-2.0-only
/*
 * The files of rksm's own, in /sys/kernel/mm/rksm, and none besides the built-in's in
 * /sys/kernel/mm/ksm: what is there, what it says, that reasons for refusing a page, processes
 * and what the scanner costs are counted, that nothing can be written that is only read, and
 * that all of it goes with the module while others read it.
 *
 * guest: --no-module
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util.h"

#define DIR_OWN		"/sys/kernel/mm/rksm"
#define ROUNDS		20
#define READERS		3

static const char *const own[] = {
	"cpu_burst_millisecs", "cpu_microsecs", "cpu_percent", "governor", "longest_hold_usecs",
	"memory_pressure", "metadata_bytes", "pressure_cpu_percent", "processes", "refused",
	"scan_threads", "version", "wakeups",
};
static const char *const reasons[] = {
	"busy", "differs", "far_node", "gone", "locked", "no_memory", "pinned", "same", "stale",
	"unsplit", "userfault",
};

/* Of these, those that can be written */
static const char *const writable[] = {
	"cpu_burst_millisecs", "cpu_percent", "governor", "pressure_cpu_percent", "scan_threads",
};

static int is_entry(const struct dirent *entry)
{
	return entry->d_name[0] != '.';
}

/* Whether these are the names in the directory, in order */
static bool lists(const char *dir, const char *const *names, int n)
{
	struct dirent **entry;
	int there = scandir(dir, &entry, is_entry, alphasort);
	bool same = there == n;

	for (int i = 0; i < there; i++) {
		same = same && !strcmp(entry[i]->d_name, names[i]);
		if (!same)
			ksft_print_msg("%s/%s is there\n", dir, entry[i]->d_name);
		free(entry[i]);
	}
	if (there >= 0)
		free(entry);
	return same;
}

static int by_name(const void *a, const void *b)
{
	return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool builtin_files_only(void)
{
	const char *names[KSM_FILES];

	memcpy(names, ksm_files, sizeof(names));
	qsort(names, KSM_FILES, sizeof(names[0]), by_name);
	return lists("/sys/kernel/mm/ksm", names, KSM_FILES);
}

static long refused(const char *reason)
{
	char file[64];

	snprintf(file, sizeof(file), "refused/%s", reason);
	return ksm_get(file);
}

static bool all_refused_zero(void)
{
	bool zero = true;

	for (size_t i = 0; i < ARRAY_SIZE(reasons); i++)
		zero &= refused(reasons[i]) == 0;
	return zero;
}

/* What modinfo reads: a string of the section .modinfo */
static bool in_module(const char *text)
{
	size_t n = strlen(text) + 1;
	struct stat st;
	bool found;
	char *image;
	int fd = open(module_path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &st))
		die("%s: %s", module_path, strerror(errno));
	image = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (image == MAP_FAILED)
		die("mmap");
	found = memmem(image, st.st_size, text, n) != NULL;
	munmap(image, st.st_size);
	close(fd);
	return found;
}

static bool same_version(void)
{
	char version[32] = "", loaded[32] = "", text[64];

	if (read_file(DIR_OWN "/version", version, sizeof(version)) <= 0)
		return false;
	read_file("/sys/module/rksm/version", loaded, sizeof(loaded));
	version[strcspn(version, "\n")] = 0;
	loaded[strcspn(loaded, "\n")] = 0;
	snprintf(text, sizeof(text), "version=%s", version);
	ksft_print_msg("version %s\n", version);
	return version[0] && !strcmp(version, loaded) && in_module(text);
}

/* root may open a read-only file for writing, and is refused by the write */
static bool unwritable(const char *file)
{
	char path[128];
	struct stat st;
	int fd;
	bool ok;

	snprintf(path, sizeof(path), DIR_OWN "/%s", file);
	ok = !stat(path, &st) && (st.st_mode & 07777) == 0444 && !st.st_uid && !st.st_gid;
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return ok && errno == EACCES;
	ok &= write(fd, "0", 1) == -1 && errno == EIO;
	close(fd);
	return ok;
}

/* A page that a pipe holds finds its twins and is refused as pinned */
static bool counts_pinned(void)
{
	char *area = map_pages(4);
	uint64_t key = unique_key();
	struct iovec page = { area + 3 * PAGE, PAGE };
	long before = refused("pinned");
	int pipes[2];
	bool counted = false;

	if (pipe2(pipes, O_CLOEXEC))
		die("pipe");
	for (int i = 0; i < 4; i++)
		fill_page(area + i * PAGE, key);
	if (vmsplice(pipes[1], &page, 1, 0) != (ssize_t)PAGE)
		die("vmsplice: %s", strerror(errno));
	mergeable(area, 4);
	ksm_reset();
	ksm_start();
	for (int n = 0; n < 20 && !counted; n++) {
		ksm_scans(1);
		counted = refused("pinned") > before;
	}
	counted &= !page_is_ksm(area + 3 * PAGE);
	ksm_set("run", 2);
	close(pipes[0]);
	close(pipes[1]);
	munmap(area, 4 * PAGE);
	return counted;
}

/* Whether the file comes to show this within two seconds */
static bool shows(const char *file, long value)
{
	for (int n = 0; n < 200 && ksm_get(file) != value; n++)
		usleep(10000);
	return ksm_get(file) == value;
}

/* A process is in `processes` from when it offers memory until it has exited */
static bool counts_processes(void)
{
	long before = ksm_get("processes");
	int pipes[2], status;
	bool counted;
	pid_t pid;

	if (pipe2(pipes, O_CLOEXEC))
		die("pipe");
	pid = fork();
	if (pid < 0)
		die("fork");
	if (!pid) {
		char c;

		close(pipes[1]);
		mergeable(map_pages(1), 1);
		/* Until the parent closes its end */
		_exit(read(pipes[0], &c, 1) != 0);
	}
	close(pipes[0]);
	counted = shows("processes", before + 1);
	close(pipes[1]);
	counted &= waitpid(pid, &status, 0) == pid && !status;
	return counted && shows("processes", before);
}

/* The scanner sleeps, wakes up and takes CPU time, and nothing of the kind when idle */
static bool counts_cost(void)
{
	char *area = map_pages(256);
	long cpu = ksm_get("cpu_microsecs"), wakeups = ksm_get("wakeups"), slept;
	bool counted;

	for (int i = 0; i < 256; i++)
		fill_page(area + i * PAGE, unique_key());
	mergeable(area, 256);
	ksm_reset();
	ksm_start();
	ksm_scans(3);
	counted = ksm_get("cpu_microsecs") > cpu && ksm_get("wakeups") > wakeups &&
		  ksm_get("metadata_bytes") > 0;
	ksm_set("run", 2);
	munmap(area, 256 * PAGE);
	/* Nothing is merged and nobody comes: it sleeps on */
	usleep(1500000);
	slept = ksm_get("wakeups");
	usleep(1000000);
	ksft_print_msg("%ld us of CPU, %ld wake-ups\n", ksm_get("cpu_microsecs") - cpu,
		       slept - wakeups);
	return counted && ksm_get("wakeups") == slept;
}

/* Readers that are inside while the files come and go */

static atomic_bool stop;
static atomic_long reads, gone, odd;

static void *reader(void *arg)
{
	static const char *const files[] = { "scan_threads", "version", "refused/pinned" };
	char path[128], buf[64];
	int fd = -1;

	snprintf(path, sizeof(path), DIR_OWN "/%s", files[(size_t)arg % ARRAY_SIZE(files)]);
	while (!atomic_load(&stop)) {
		ssize_t n;

		/* Not all the time: loading takes a CPU, too */
		usleep(rnd_below(2000));
		if (fd < 0)
			fd = open(path, O_RDONLY | O_CLOEXEC);
		n = fd < 0 ? -1 : pread(fd, buf, sizeof(buf), 0);
		if (n > 0) {
			atomic_fetch_add(&reads, 1);
			if (buf[n - 1] != '\n')
				atomic_fetch_add(&odd, 1);
			continue;
		}
		if (errno == ENODEV || errno == ENOENT)
			atomic_fetch_add(&gone, 1);
		else
			atomic_fetch_add(&odd, 1);
		if (fd >= 0)
			close(fd);
		fd = -1;
	}
	if (fd >= 0)
		close(fd);
	return NULL;
}

static bool rounds(void)
{
	pthread_t thread[READERS];
	bool ok = true;

	for (size_t i = 0; i < READERS; i++)
		if (pthread_create(&thread[i], NULL, reader, (void *)i))
			die("pthread_create");
	for (int i = 0; i < ROUNDS && ok; i++) {
		int err = module_insert("");

		for (int n = 0; !err && n < 1000 && atomic_load(&reads) <= i; n++)
			usleep(1000);
		err = err ?: module_remove();
		if (err)
			ksft_print_msg("round %d: %s\n", i, strerror(-err));
		ok = !err && access(DIR_OWN, F_OK);
		/* Also winds up the watchdog */
		if (i % 10 == 9)
			ksm_reset();
	}
	atomic_store(&stop, true);
	for (size_t i = 0; i < READERS; i++)
		pthread_join(thread[i], NULL);
	ksft_print_msg("%ld reads, %ld found it gone, %ld odd ones\n", atomic_load(&reads),
		       atomic_load(&gone), atomic_load(&odd));
	return ok && atomic_load(&reads) >= ROUNDS && atomic_load(&gone) && !atomic_load(&odd);
}

int main(int argc, char **argv)
{
	bool ok = true;
	int fd;
	char c;

	test_init(argc, argv);
	if (!module_path)
		ksft_exit_skip("there is no module\n");
	if (module_loaded())
		ksft_exit_skip("the module is loaded already\n");
	test_plan(11);
	ksft_test_result(access(DIR_OWN, F_OK) && errno == ENOENT,
			 "not there without the module\n");
	if (module_insert(""))
		die("cannot load %s", module_path);
	ksft_test_result(builtin_files_only(),
			 "/sys/kernel/mm/ksm has the built-in's files, no more\n");
	ksft_test_result(lists(DIR_OWN, own, ARRAY_SIZE(own)) &&
			 lists(DIR_OWN "/refused", reasons, ARRAY_SIZE(reasons)),
			 "/sys/kernel/mm/rksm has ours\n");
	ksft_test_result(all_refused_zero(), "nothing has been refused at the load\n");
	ksft_test_result(same_version(), "the version is that of modinfo\n");
	for (size_t i = 0, w = 0; i < ARRAY_SIZE(own); i++) {
		if (w < ARRAY_SIZE(writable) && !strcmp(own[i], writable[w]))
			w++;
		else if (strcmp(own[i], "refused"))
			ok &= unwritable(own[i]);
	}
	for (size_t i = 0; i < ARRAY_SIZE(reasons); i++) {
		char file[64];

		snprintf(file, sizeof(file), "refused/%s", reasons[i]);
		ok &= unwritable(file);
	}
	ksft_test_result(ok, "what can only be read is EACCES or EIO to write\n");
	ksft_test_result(counts_pinned(), "a pinned page counts in refused/pinned\n");

	ksft_test_result(counts_processes(), "a process counts while it offers memory\n");
	ksft_test_result(counts_cost(), "CPU time and wake-ups count, and none while it idles\n");

	fd = open(DIR_OWN "/refused/pinned", O_RDONLY | O_CLOEXEC);
	ksft_test_result(!module_remove() && access(DIR_OWN, F_OK) && errno == ENOENT &&
			 pread(fd, &c, 1, 0) == -1 && errno == ENODEV,
			 "gone with the module, ENODEV for a descriptor that is left\n");
	close(fd);
	ksft_test_result(rounds(), "%d rounds of insmod and rmmod with readers inside\n", ROUNDS);
	test_exit();
}
