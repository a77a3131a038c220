// SPDX-License-Identifier: GPL-2.0-only
/*
 * Knob parity: every file of /sys/kernel/mm/ksm, with every input of a long list, in three
 * states of KSM, first on the built-in KSM and then on rksm in the same boot. What open,
 * write and read return, what the file and all other writable files hold afterwards must
 * be the same. Differences are listed in knobs.allow with their reason.
 *
 * Without a module the built-in is compared with itself, which judges this test.
 *
 * runs: none
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util.h"

#define DIR_KSM	"/sys/kernel/mm/ksm/"
#define COPIES	16

struct input {
	const char *bytes;
	size_t n;
};

#define S(text) { text, sizeof(text) - 1 }

static struct input inputs[128] = {
	S(""), S("\n"), S("0"), S("1"), S("2"), S("3"), S("00"), S("01"), S("10"), S("77"),
	S("100"), S("255"), S("256"), S("-1"), S("-0"), S("-2"), S("+1"), S("+0"), S("+"), S("-"),
	S("+-1"), S("++1"), S(" 1"), S("1 "), S("\t1"), S("1\t"), S("1\n"), S("1\n\n"), S("\n1"),
	S("1\r\n"), S("1\r"), S("1 2"), S("1\n2"), S("1,2"), S("1_000"), S("0x1"), S("0x10"),
	S("0b1"), S("0o7"), S("08"), S("1e3"), S("1.5"), S("1k"), S("1;"),
	S("2147483647"), S("2147483648"), S("-2147483648"), S("-2147483649"), S("4294967295"),
	S("4294967296"), S("4294967297"), S("9223372036854775807"), S("9223372036854775808"),
	S("18446744073709551615"), S("18446744073709551616"), S("99999999999999999999999999"),
	S("y"), S("Y"), S("n"), S("N"), S("t"), S("T"), S("f"), S("F"), S("on"), S("off"),
	S("On"), S("oFF"), S("o"), S("ox"), S("yes"), S("no"), S("true"), S("false"), S("yx"),
	S("enable"), S("a"), S("abc"), S("none"), S("none\n"), S("none\n\n"), S("none "),
	S(" none"), S("None"), S("non"), S("nonee"), S("scan-time"), S("scan-time\n"),
	S("scan-time x"), S("scan_time"), S("Scan-Time"), S("[none]"), S("[none] scan-time"),
	S("\0"), S("1\0"), S("1\0002"), S("\0001"), S("1\n\0"), S("none\0"), S("none\0x"),
	S("\xff"), S("1\xff"), S("\xff\xfe\xfd"), S("\xd9\xa1"), S("\x1b[1m"), S(" "), S("   "),
	S("%d"), S("1/*"), S("../run"),
};
static size_t nr_inputs;

/* More than a page, exactly one, and just less, of digits and of others */
static void add_long_inputs(void)
{
	static char zeroes[8192], spaces[8192], ones[8192], line[8192];
	static const size_t lengths[] = { 4095, 4096, 4097, 5000 };

	memset(zeroes, '0', sizeof(zeroes));
	memset(spaces, ' ', sizeof(spaces));
	memset(ones, '1', sizeof(ones));
	memset(line, '0', sizeof(line));
	line[4094] = '1';
	line[4095] = '\n';
	while (nr_inputs < ARRAY_SIZE(inputs) && inputs[nr_inputs].bytes)
		nr_inputs++;
	for (size_t i = 0; i < ARRAY_SIZE(lengths); i++)
		inputs[nr_inputs++] = (struct input){ zeroes, lengths[i] };
	inputs[nr_inputs++] = (struct input){ line, 4096 };
	inputs[nr_inputs++] = (struct input){ line, 4097 };
	inputs[nr_inputs++] = (struct input){ spaces, 4096 };
	inputs[nr_inputs++] = (struct input){ ones, 40 };
	inputs[nr_inputs++] = (struct input){ ones, 5000 };
	if (nr_inputs > ARRAY_SIZE(inputs))
		die("too many inputs");
}

static const char *shown(const struct input *input)
{
	static char text[120];
	size_t at = 0;

	for (size_t i = 0; i < input->n; i++) {
		unsigned char c = input->bytes[i];

		if (at > 48) {
			snprintf(text + at, sizeof(text) - at, "...(%zu)", input->n);
			return text;
		}
		if (c == '\n')
			at += sprintf(text + at, "\\n");
		else if (isprint(c) && c != ' ' && c != '\\')
			text[at++] = c;
		else
			at += sprintf(text + at, "\\x%02x", c);
	}
	text[at] = 0;
	return text;
}

/* States */

enum state { IDLE, MERGED, ADVISED, NR_STATES };
static const char *const state_names[] = { "idle", "merged", "advised" };

static const char *base_of(int file, enum state state)
{
	static const struct {
		const char *file, *value;
	} base[] = {
		{ "run", "0" }, { "sleep_millisecs", "20" }, { "pages_to_scan", "1000" },
		{ "merge_across_nodes", "1" }, { "max_page_sharing", "256" },
		{ "use_zero_pages", "0" }, { "smart_scan", "0" },
		{ "stable_node_chains_prune_millisecs", "2000" }, { "advisor_max_cpu", "70" },
		{ "advisor_min_pages_to_scan", "500" }, { "advisor_max_pages_to_scan", "30000" },
		{ "advisor_target_scan_time", "200" },
	};

	if (!strcmp(ksm_files[file], "advisor_mode"))
		return state == ADVISED ? "scan-time" : "none";
	if (state == ADVISED && !strcmp(ksm_files[file], "pages_to_scan"))
		return NULL;	/* not ours to set */
	for (size_t i = 0; i < ARRAY_SIZE(base); i++)
		if (!strcmp(base[i].file, ksm_files[file]))
			return base[i].value;
	return NULL;
}

static void read_text(const char *file, char *text, size_t size)
{
	char path[128];

	snprintf(path, sizeof(path), DIR_KSM "%s", file);
	if (read_file(path, text, size) < 0)
		snprintf(text, size, "unreadable: %s", strerror(errno));
}

/* All writable files in one line */
static void snapshot(char *text, size_t size)
{
	bool advised = false, runs = false;
	size_t at = 0;

	for (int f = KSM_FIRST_RW; f < KSM_FILES; f++) {
		char value[64];

		read_text(ksm_files[f], value, sizeof(value));
		value[strcspn(value, "\n")] = 0;
		runs |= !strcmp(ksm_files[f], "run") && !strcmp(value, "1");
		advised |= strstr(value, "[scan-time]") != NULL;
		/* What the advisor chooses depends on time */
		if (runs && advised && !strcmp(ksm_files[f], "pages_to_scan"))
			strcpy(value, "?");
		at += snprintf(text + at, size - at, "%s=%s; ", ksm_files[f], value);
	}
}

static char *area;

static void bring_to(enum state state)
{
	static char seen[1024];
	static enum state last = NR_STATES;
	char now[1024];

	snapshot(now, sizeof(now));
	if (state == last && !strcmp(now, seen) &&
	    (state != MERGED || ksm_get("pages_sharing") == COPIES - 1))
		return;
	if (state != MERGED || last != MERGED)
		ksm_set("run", 2);
	ksm_set("run", 0);
	/* Switched on anew, the advisor starts from its lower limit */
	ksm_try("advisor_mode", "none");
	for (int pass = 0; pass < 2; pass++) {
		if (pass)
			ksm_try("advisor_mode", "none");
		for (int f = KSM_FIRST_RW; f < KSM_FILES; f++) {
			const char *value = base_of(f, state);

			if (value && ksm_try(ksm_files[f], value))
				die("cannot set %s to %s", ksm_files[f], value);
		}
	}
	if (state == MERGED) {
		ksm_set("sleep_millisecs", 0);
		ksm_set("run", 1);
		if (!ksm_until("pages_sharing", COPIES - 1, 30))
			die("pages do not merge");
		ksm_set("run", 0);
		ksm_set("sleep_millisecs", 20);
	}
	snapshot(seen, sizeof(seen));
	last = state;
}

/* What happened */

struct record {
	int open_errno;
	ssize_t ret;
	int write_errno;
	char value[64];		/* the file */
	char all[1024];		/* every writable file */
};

static struct record *records[2];

static struct record *record_of(int kind, int file, enum state state, size_t input)
{
	return &records[kind][((size_t)file * NR_STATES + state) * nr_inputs + input];
}

static void try_input(struct record *record, int file, const struct input *input)
{
	char path[128];
	int fd;

	memset(record, 0, sizeof(*record));
	snprintf(path, sizeof(path), DIR_KSM "%s", ksm_files[file]);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0) {
		record->open_errno = errno;
	} else {
		record->ret = write(fd, input->bytes, input->n);
		record->write_errno = record->ret < 0 ? errno : 0;
		close(fd);
	}
	if (file >= KSM_FIRST_RW)
		read_text(ksm_files[file], record->value, sizeof(record->value));
	snapshot(record->all, sizeof(record->all));
}

static void take_records(int kind)
{
	for (enum state state = 0; state < NR_STATES; state++) {
		for (int f = 0; f < KSM_FILES; f++) {
			/* Files that cannot be opened for writing are all the same to each input */
			size_t n = f < KSM_FIRST_RW ? 1 : nr_inputs;

			for (size_t i = 0; i < n; i++) {
				bring_to(state);
				try_input(record_of(kind, f, state, i), f, &inputs[i]);
			}
		}
	}
	bring_to(IDLE);
}

/* The files themselves: names, modes, owners, sizes, and how they can be read */

static char looks[2][16384];

static void look(int kind)
{
	struct dirent **entry;
	char *text = looks[kind];
	size_t at = 0, size = sizeof(looks[kind]);
	int n = scandir(DIR_KSM, &entry, NULL, alphasort);

	for (int i = 0; i < n; i++) {
		char path[512], value[64] = "", other[64];
		struct stat st;
		int fd, bytes = 0;
		char c;

		if (entry[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), DIR_KSM "%s", entry[i]->d_name);
		if (stat(path, &st))
			die("stat %s", path);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		at += snprintf(text + at, size - at, "%s mode %o owner %d:%d size %ld",
			       entry[i]->d_name, st.st_mode, st.st_uid, st.st_gid,
			       (long)st.st_size);
		/* Byte by byte, from an offset, past the end, and again from the start */
		while (read(fd, &c, 1) == 1)
			bytes++;
		pread(fd, value, sizeof(value) - 1, 0);
		at += snprintf(text + at, size - at, " whole %d tail %d past %zd again %d",
			       bytes == (int)strlen(value), (int)pread(fd, other, 63, bytes - 1),
			       pread(fd, other, 63, 100), lseek(fd, 0, SEEK_SET) == 0 &&
			       read(fd, other, 63) == bytes);
		close(fd);
		/* Numbers are compared apart; here only that it is one line with one number */
		if (value[0] == '-')
			memmove(value, value + 1, strlen(value));
		for (char *p = value; *p; p++)
			if (isdigit((unsigned char)*p))
				*p = '9';
		while (strstr(value, "99"))
			memmove(strstr(value, "99"), strstr(value, "99") + 1,
				strlen(strstr(value, "99")));
		at += snprintf(text + at, size - at, " format %s", value);
		free(entry[i]);
	}
	free(entry);
}

/* Counters where nothing is random: with the scanner stopped, idle and merged */

static char counters[2][2][1024];

static void count(int kind)
{
	static const char *const exact[] = {
		"pages_shared", "pages_sharing", "pages_unshared", "pages_volatile",
		"ksm_zero_pages", "stable_node_chains", "stable_node_dups",
	};

	for (enum state state = IDLE; state <= MERGED; state++) {
		char *text = counters[kind][state];
		size_t at = 0;

		bring_to(state);
		for (size_t i = 0; i < ARRAY_SIZE(exact); i++)
			at += snprintf(text + at, sizeof(counters[0][0]) - at, "%s=%ld; ",
				       exact[i], ksm_get(exact[i]));
	}
}

/* Differences that are meant: "file state input   reason" */

static struct allowed {
	char file[48], state[16], input[160], reason[160];
} allowed[64];
static size_t nr_allowed;

static void read_allowed(const char *program)
{
	char path[512], line[512], *copy = strdup(program);
	FILE *f;

	snprintf(path, sizeof(path), "%s/knobs.allow", dirname(copy));
	f = fopen(path, "re");
	free(copy);
	if (!f)
		return;
	while (nr_allowed < ARRAY_SIZE(allowed) && fgets(line, sizeof(line), f)) {
		struct allowed *a = &allowed[nr_allowed];

		if (line[0] == '#' || line[0] == '\n')
			continue;
		if (sscanf(line, "%47s %15s %159s %159[^\n]", a->file, a->state, a->input,
			   a->reason) != 4)
			die("knobs.allow: not 'file state input reason': %s", line);
		nr_allowed++;
	}
	fclose(f);
}

static bool is_allowed(int file, enum state state, const char *input)
{
	for (size_t i = 0; i < nr_allowed; i++) {
		struct allowed *a = &allowed[i];

		if (!fnmatch(a->file, ksm_files[file], 0) &&
		    !fnmatch(a->state, state_names[state], 0) && !fnmatch(a->input, input, 0)) {
			ksft_print_msg("%s, %s: differs as it should: %s\n", ksm_files[file],
				       input, a->reason);
			return true;
		}
	}
	return false;
}

static bool same(const struct record *a, const struct record *b)
{
	return a->open_errno == b->open_errno && a->ret == b->ret &&
	       a->write_errno == b->write_errno && !strcmp(a->value, b->value) &&
	       !strcmp(a->all, b->all);
}

static void print_record(const char *who, const struct record *r)
{
	ksft_print_msg("  %s: open %s, write %zd %s, then %.*s\n", who,
		       r->open_errno ? strerrorname_np(r->open_errno) : "ok", r->ret,
		       r->write_errno ? strerrorname_np(r->write_errno) : "",
		       (int)strcspn(r->value, "\n"), r->value);
	ksft_print_msg("  %s: %s\n", who, r->all);
}

static void compare(int file, enum state state)
{
	size_t n = file < KSM_FIRST_RW ? 1 : nr_inputs, bad = 0;

	for (size_t i = 0; i < n; i++) {
		const struct record *a = record_of(0, file, state, i);
		const struct record *b = record_of(1, file, state, i);
		const char *input = shown(&inputs[i]);

		if (same(a, b) || is_allowed(file, state, input))
			continue;
		if (bad++ >= 5)
			continue;
		ksft_print_msg("%s, %s, input '%s':\n", ksm_files[file], state_names[state],
			       input);
		print_record("built-in", a);
		print_record("here", b);
	}
	ksft_test_result(!bad, "%s, %s: %zu inputs\n", ksm_files[file], state_names[state], n);
}

static bool same_text(const char *what, const char *a, const char *b)
{
	if (!strcmp(a, b))
		return true;
	while (*a || *b) {
		int m = strcspn(a, "\n"), n = strcspn(b, "\n");

		if (m != n || memcmp(a, b, m)) {
			ksft_print_msg("%s, built-in: %.*s\n", what, m, a);
			ksft_print_msg("%s, here:     %.*s\n", what, n, b);
		}
		a += m + !!a[m];
		b += n + !!b[n];
	}
	return false;
}

/* Rejected writes must have left everything as it was, on both */
static bool rejected_change_nothing(int kind)
{
	int bad = 0;

	for (enum state state = 0; state < NR_STATES; state++) {
		char before[1024];

		bring_to(state);
		snapshot(before, sizeof(before));
		for (int f = KSM_FIRST_RW; f < KSM_FILES; f++) {
			for (size_t i = 0; i < nr_inputs; i++) {
				struct record *r = record_of(kind, f, state, i);

				if (r->ret >= 0 || !strcmp(r->all, before) || bad++ >= 5)
					continue;
				ksft_print_msg("%s '%s' was rejected, but: %s\n", ksm_files[f],
					       shown(&inputs[i]), r->all);
			}
		}
	}
	return !bad;
}

int main(int argc, char **argv)
{
	size_t n;

	test_init(argc, argv);
	if (!module_path)
		ksft_exit_fail_msg("no module to compare with\n");
	read_allowed(argv[0]);
	add_long_inputs();
	test_plan(NR_STATES * KSM_FILES + 6);
	if (module_loaded())
		ksft_exit_fail_msg("rksm is loaded already: the built-in comes first\n");

	n = KSM_FILES * NR_STATES * nr_inputs * sizeof(struct record);
	for (int kind = 0; kind < 2; kind++)
		records[kind] = map_shared(n / PAGE + 1);
	area = map_pages(COPIES);
	for (size_t i = 0; i < COPIES; i++)
		fill_page(area + i * PAGE, 1);
	mergeable(area, COPIES);

	for (int kind = 0; kind < 2; kind++) {
		if (kind && module_path) {
			int err = module_insert("");

			if (err)
				ksft_exit_fail_msg("insmod %s: %s\n", module_path, strerror(-err));
		}
		take_records(kind);
		look(kind);
		count(kind);
		ksft_test_result(rejected_change_nothing(kind),
				 "%s: rejected writes change nothing\n",
				 module_loaded() ? "rksm" : "built-in");
	}
	for (enum state state = 0; state < NR_STATES; state++)
		for (int f = 0; f < KSM_FILES; f++)
			compare(f, state);
	ksft_test_result(same_text("files", looks[0], looks[1]),
			 "names, modes, owners and formats of the files\n");
	for (enum state state = IDLE; state <= MERGED; state++)
		ksft_test_result(same_text("counters", counters[0][state], counters[1][state]),
				 "counters when %s\n", state_names[state]);
	ksft_test_result(page_holds(area, 1) && page_holds(area + (COPIES - 1) * PAGE, 1),
			 "contents are as they were\n");
	if (module_path) {
		ksm_set("run", 2);
		module_remove();
	}
	test_exit();
}
