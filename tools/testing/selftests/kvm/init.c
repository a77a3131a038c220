// SPDX-License-Identifier: GPL-2.0-only
/*
 * The first and only process of a VM that vms.py starts: fills memory with what the seed says,
 * partly as in all VMs, and verifies every word of it again and again.
 * It is told what to do by single letters on the serial port:
 *
 *   s  say how it is going
 *   v  verify everything once more, then say how it is going
 *   b  be busy: verify all the time (so it starts)
 *   i  be idle: wait for the next letter
 *   w  write at full speed to every page that is as in all VMs, verify now and then
 *   r  take back what was written, and be busy
 *
 * Parameters on the kernel's command line: seed=, own=, and pages: common=, unique=.
 */
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#define PAGE	4096UL
#define WORDS	(PAGE / sizeof(uint64_t))
#define STEP	64	/* pages from one look at the serial port to the next */
#define ROUNDS	64	/* of writing, from one verification to the next */

static uint64_t seed, own;
static size_t common, pages;
static uint64_t *memory, *version;
static unsigned long passes, bad, writes;

static size_t parameter(const char *name)
{
	const char *value = getenv(name);

	return value ? strtoul(value, NULL, 0) : 0;
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

/* The first word of page I as it was filled; each next one is a step further */
static uint64_t first(size_t i)
{
	return mix(mix(i < common ? seed : seed + own) + i);
}

static void fill(size_t i)
{
	uint64_t *page = memory + i * WORDS, x = first(i);

	for (size_t n = 0; n < WORDS; n++, x += 0x9e3779b97f4a7c15)
		page[n] = x;
}

static void verify(size_t i)
{
	const volatile uint64_t *page = memory + i * WORDS;
	uint64_t x = first(i), wrong = 0;

	wrong |= page[0] ^ (x + version[i]);
	for (size_t n = 1; n < WORDS; n++) {
		x += 0x9e3779b97f4a7c15;
		wrong |= page[n] ^ x;
	}
	if (wrong && ++bad <= 10)
		printf("vm: wrong page %zu\n", i);
}

static void write_to(size_t i)
{
	version[i]++;
	*(volatile uint64_t *)(memory + i * WORDS) = first(i) + version[i];
	writes++;
}

/* The modules that are in the image are numbered in their order. */
static void load_modules(void)
{
	struct dirent **list;
	int n = scandir("/modules", &list, NULL, alphasort);

	for (int i = 0; i < n; i++) {
		char path[300];
		int fd;

		if (list[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/modules/%s", list[i]->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (syscall(SYS_finit_module, fd, "", 0))
			printf("vm: cannot load %s: %m\n", path);
		close(fd);
	}
}

/* The next letter, or 0 if there is none and the VM does not wait for one */
static char letter(bool wait)
{
	struct pollfd in = { .events = POLLIN };
	char c;

	if (poll(&in, 1, wait ? -1 : 0) != 1 || read(0, &c, 1) != 1)
		return 0;
	return c;
}

static void status(const char *what)
{
	printf("vm: %s passes %lu bad %lu writes %lu\n", what, passes, bad, writes);
}

static void verify_all(void)
{
	for (size_t i = 0; i < pages; i++)
		verify(i);
	passes++;
}

int main(void)
{
	char state = 'b', c;
	size_t at = 0, rounds = 0;
	struct termios raw;

	mkdir("/proc", 0555);
	mount("proc", "/proc", "proc", 0, NULL);
	tcgetattr(0, &raw);
	cfmakeraw(&raw);
	raw.c_oflag |= OPOST | ONLCR;
	tcsetattr(0, TCSANOW, &raw);
	setvbuf(stdout, NULL, _IOLBF, 0);
	load_modules();

	seed = parameter("seed");
	own = parameter("own");
	common = parameter("common");
	pages = common + parameter("unique");
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	version = calloc(pages, sizeof(*version));
	if (memory == MAP_FAILED || !version) {
		printf("vm: no memory for %zu pages\n", pages);
		return 1;
	}
	for (size_t i = 0; i < pages; i++)
		fill(i);
	verify_all();
	status("ready");

	for (;;) {
		size_t end;

		c = letter(state == 'i');
		switch (c) {
		case 's':
			status("status");
			break;
		case 'v':
			verify_all();
			status("verified");
			break;
		case 'r':
			for (size_t i = 0; i < common; i++) {
				version[i] = 0;
				memory[i * WORDS] = first(i);
			}
			state = 'b';
			break;
		case 'b':
		case 'i':
		case 'w':
			state = c;
			at = 0;
			break;
		}
		if (state == 'i')
			continue;
		end = state == 'w' ? common : pages;
		for (int i = 0; i < STEP && at < end; i++) {
			if (state == 'w')
				write_to(at++);
			else
				verify(at++);
		}
		if (at < end)
			continue;
		at = 0;
		if (state == 'b')
			passes++;
		else if (++rounds % ROUNDS == 0)
			verify_all();
	}
}
