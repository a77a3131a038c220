// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static pid_t main_pid;

static void __attribute__((constructor)) remember_main(void)
{
	main_pid = getpid();
}

void die(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "rksm-bench: %s: ", opt.workload ? opt.workload : "");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	if (getpid() != main_pid)
		_exit(1);
	exit(1);
}

void note(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "# ");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

void sleep_us(unsigned int us)
{
	struct timespec ts = { us / 1000000, us % 1000000 * 1000l };

	while (nanosleep(&ts, &ts) && errno == EINTR)
		;
}

uint64_t mix64(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

bool read_text(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t have = 0;
	ssize_t n;

	if (fd < 0)
		return false;
	while (have < size - 1 && (n = read(fd, buf + have, size - 1 - have)) > 0)
		have += n;
	close(fd);
	buf[have] = '\0';
	return have > 0;
}

bool write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	size_t len = strlen(text);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, text, len) == (ssize_t)len;
	close(fd);
	return ok;
}

long long field_of(const char *path, const char *key)
{
	size_t len = strlen(key);
	long long value = -1;
	char *line = NULL;
	size_t room = 0;
	FILE *f = fopen(path, "re");

	if (!f)
		return -1;
	while (getline(&line, &room, f) > 0) {
		if (strncmp(line, key, len) == 0 && strchr(": \t", line[len])) {
			value = strtoll(line + len + 1, NULL, 10);
			break;
		}
	}
	free(line);
	fclose(f);
	return value;
}

void json_begin(const char *kase)
{
	printf("{\"workload\":\"%s\",\"case\":\"%s\",\"impl\":\"%s\",\"smart_scan\":%d,\"round\":%d,\"quick\":%s",
	       opt.workload, kase, opt.impl, opt.smart_scan, opt.round,
	       opt.quick ? "true" : "false");
	json_u64("seed", opt.seed);
}

void json_u64(const char *key, uint64_t value)
{
	printf(",\"%s\":%" PRIu64, key, value);
}

void json_f(const char *key, double value)
{
	printf(",\"%s\":%.6g", key, value);
}

void json_str(const char *key, const char *value)
{
	printf(",\"%s\":\"", key);
	for (; *value; value++) {
		if (*value == '"' || *value == '\\')
			putchar('\\');
		if ((unsigned char)*value >= ' ')
			putchar(*value);
	}
	putchar('"');
}

void json_list(const char *key, const uint64_t *values, size_t n)
{
	printf(",\"%s\":[", key);
	for (size_t i = 0; i < n; i++)
		printf("%s%" PRIu64, i ? "," : "", values[i]);
	putchar(']');
}

void json_pairs(const char *key, const uint64_t (*rows)[3], size_t n)
{
	printf(",\"%s\":[", key);
	for (size_t i = 0; i < n; i++)
		printf("%s[%" PRIu64 ",%" PRIu64 ",%" PRIu64 "]", i ? "," : "",
		       rows[i][0], rows[i][1], rows[i][2]);
	putchar(']');
}

void json_end(void)
{
	puts("}");
	fflush(stdout);
}

void times_add(struct times *t, uint64_t value)
{
	if (t->n == t->room) {
		t->room = t->room ? t->room * 2 : 1024;
		t->at = realloc(t->at, t->room * sizeof(*t->at));
		if (!t->at)
			die("out of memory");
	}
	t->at[t->n++] = value;
}

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

void times_sort(struct times *t)
{
	qsort(t->at, t->n, sizeof(*t->at), compare_u64);
}

uint64_t times_at(const struct times *t, unsigned int per_mille)
{
	return t->n ? t->at[(t->n - 1) * per_mille / 1000] : 0;
}

void json_times(const char *name, struct times *t)
{
	static const struct {
		const char *suffix;
		unsigned int per_mille;
	} points[] = { { "p50", 500 }, { "p99", 990 }, { "p999", 999 } };
	char key[64];

	times_sort(t);
	for (size_t i = 0; i < ARRAY_SIZE(points); i++) {
		snprintf(key, sizeof(key), "%s_%s_ns", name, points[i].suffix);
		json_u64(key, times_at(t, points[i].per_mille));
	}
	snprintf(key, sizeof(key), "%s_count", name);
	json_u64(key, t->n);
}
