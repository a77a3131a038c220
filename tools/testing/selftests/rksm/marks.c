// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a merge does with the bits of a page table entry and the flags of a folio: the rows
 * of Documentation/developing/marks.md that a program can see. Small pages and huge ones,
 * KSM pages and zero pages, one process and several, with a fork between the steps, and
 * reclaim with swap and without.
 *
 * runs: cloud-amd64
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "util.h"

#define SCANS		30
#define AREA		(HPAGE / PAGE)
#define KPF_DIRTY	(1ULL << 4)
#define KPF_SWAPBACKED	(1ULL << 14)
#define KPF_MLOCKED	(1ULL << 33)
#define PM_SOFT_DIRTY	(1ULL << 55)
#define PM_UFFD_WP	(1ULL << 57)

/* A process that does what it is told with an area of its own */

enum op {
	MAP,
	MAP_HUGE,
	FILL,
	FLIP,
	RETURN,
	HOLDS,
	FREE,
	LOCK,
	UNLOCK,
	PROTECT,
	PKEY,
	TRY,
	CLEAR_REFS,
	WATCH,
	UNWATCH,
	FORK
};
enum access { READ, WRITE, EXECUTE };

struct order {
	enum op op;
	size_t page;
	uint64_t arg;
	bool ok;
	char *area;
};

struct actor {
	struct child child;
	struct order *order;
};

/* A page of an actor's area */
struct place {
	struct actor *actor;
	size_t page;
};

static sigjmp_buf fault;

static void faulted(int sig)
{
	siglongjmp(fault, sig);
}

/* Whether the page can be accessed so */
static bool try_access(volatile char *page, enum access access)
{
	bool worked = false;

	signal(SIGSEGV, faulted);
	if (!sigsetjmp(fault, 1)) {
		switch (access) {
		case READ:
			(void)*page;
			break;
		case WRITE:
			*page = *page;
			break;
		case EXECUTE:
			((void (*)(void))(uintptr_t)page)();
			break;
		}
		worked = true;
	}
	signal(SIGSEGV, SIG_DFL);
	return worked;
}

static char *map_area(bool huge)
{
	char *area = map_at(NULL, 2 * AREA);

	area = (char *)(((uintptr_t)area + HPAGE - 1) & ~(HPAGE - 1));
	madvise(area, HPAGE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	/* Nothing in a huge page but what a test puts there is like anything else */
	for (size_t i = 0; i < (huge ? AREA : 8); i++)
		fill_page(area + i * PAGE, unique_key());
	mergeable(area, AREA);
	return area;
}

static bool watch(char *page, bool on)
{
	static int fd = -1;
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect wp = { .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };

	if (fd < 0) {
		fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
		if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
			return false;
	}
	reg.range = wp.range = (struct uffdio_range){ (uintptr_t)page, PAGE };
	return (!on || !ioctl(fd, UFFDIO_REGISTER, &reg)) && !ioctl(fd, UFFDIO_WRITEPROTECT, &wp);
}

static bool carry_out(struct order *order)
{
	char *page = order->area + order->page * PAGE;

	switch (order->op) {
	case MAP:
	case MAP_HUGE:
		order->area = map_area(order->op == MAP_HUGE);
		return true;
	case FILL:
		fill_page(page, order->arg);
		return true;
	case FLIP:
		page[PAGE / 2] ^= 1;
		return true;
	case RETURN:
		/* A function that does nothing */
		page[0] = (char)0xc3;
		return true;
	case HOLDS:
		return page_holds(page, order->arg);
	case FREE:
		return !madvise(page, order->arg * PAGE, MADV_FREE);
	case LOCK:
		return !mlock(page, PAGE);
	case UNLOCK:
		return !munlock(page, PAGE);
	case PROTECT:
		return !mprotect(page, PAGE, order->arg);
	case PKEY:
		return !pkey_mprotect(page, PAGE, PROT_READ | PROT_WRITE,
				      pkey_alloc(0, PKEY_DISABLE_ACCESS));
	case TRY:
		return try_access(page, order->arg);
	case CLEAR_REFS:
		return write_file("/proc/self/clear_refs", "4");
	case WATCH:
	case UNWATCH:
		return watch(page, order->op == WATCH);
	case FORK:
		if (!fork()) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			pause();
		}
		return true;
	}
	return false;
}

static int act(void *arg)
{
	struct order *order = arg;

	for (;;) {
		child_step();
		order->ok = carry_out(order);
	}
	return KSFT_FAIL;
}

static bool tell(const struct place *at, enum op op, uint64_t arg)
{
	struct order *order = at->actor->order;

	order->op = op;
	order->page = at->page;
	order->arg = arg;
	child_go(&at->actor->child);
	if (!child_wait_step(&at->actor->child))
		die("an actor has ended");
	return order->ok;
}

/* One process or two, and in each of them an area */
static struct actor actors[2];

static void begin(bool several, bool huge, struct place places[2])
{
	ksm_reset();
	for (int a = 0; a <= several; a++) {
		if (!actors[a].order)
			actors[a].order = map_shared(1);
		actors[a].child = child_start(act, actors[a].order);
		if (!child_wait_step(&actors[a].child))
			die("an actor has ended");
	}
	for (int p = 0; p < 2; p++) {
		places[p] = (struct place){ &actors[several ? p : 0], p };
		if (!p || several)
			tell(&places[p], huge ? MAP_HUGE : MAP, 0);
	}
}

static void end(bool several)
{
	for (int a = 0; a <= several; a++)
		child_kill(&actors[a].child);
}

static char *address(const struct place *at)
{
	return at->actor->order->area + at->page * PAGE;
}

static struct mapping mapping_of(const struct place *at)
{
	struct mapping map;

	mappings_of(at->actor->child.pid, address(at), 1, &map);
	return map;
}

static uint64_t entry_of(const struct place *at)
{
	char path[64];
	uint64_t entry = 0;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", at->actor->child.pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)address(at) / PAGE * 8) != 8)
		die("cannot read %s", path);
	close(fd);
	return entry;
}

/* Both places have one merged page, or the zero page */
static bool are_merged(void *arg)
{
	const struct place *places = arg;
	struct mapping a = mapping_of(&places[0]), b = mapping_of(&places[1]);

	return a.pfn && a.pfn == b.pfn && a.flags & (KPF_KSM | KPF_ZERO_PAGE);
}

static bool merged(struct place places[2])
{
	ksm_start();
	if (ksm_until_true(are_merged, places, SCANS))
		return true;
	ksft_print_msg("not merged after %d full scans\n", SCANS);
	return false;
}

/* What waits in caches of a CPU for its place on a list of reclaim gets there */
static void drain(void)
{
	write_file("/proc/sys/vm/drop_caches", "1");
}

static int cgroup;

static void reclaim(void)
{
	for (int n = 0; n < 4; n++) {
		drain();
		cgroup_reclaim(cgroup, 16 * AREA);
	}
}

/*
 * MADV_FREE makes a folio that one process maps clean, and takes it out of swap-backed memory, so
 * that reclaim may drop it. A merge gives it to others, who have not asked for that.
 */

static bool is_kept(const struct place *at)
{
	uint64_t flags;

	drain();
	flags = mapping_of(at).flags;
	if ((flags & (KPF_DIRTY | KPF_SWAPBACKED)) == (KPF_DIRTY | KPF_SWAPBACKED))
		return true;
	ksft_print_msg("the merged page is%s dirty and%s swap-backed\n",
		       flags & KPF_DIRTY ? "" : " not", flags & KPF_SWAPBACKED ? "" : " not");
	return false;
}

/* A merged page that one place has left, and the other has freed, gets the first one back */
static bool join_freed(bool several, bool huge, bool forks)
{
	struct place places[2];
	uint64_t key = unique_key();
	bool ok;

	begin(several, huge, places);
	tell(&places[0], FILL, key);
	tell(&places[1], FILL, key);
	ok = merged(places);
	tell(&places[1], FLIP, 0);
	drain();
	ok &= tell(&places[0], FREE, 1);
	drain();
	if (forks)
		ok &= tell(&places[0], FORK, 0);
	tell(&places[1], FLIP, 0);
	ok = ok && merged(places) && is_kept(&places[0]);
	reclaim();
	ok &= tell(&places[1], HOLDS, key);
	end(several);
	return ok;
}

/* Of two pages one has been freed: whichever of them becomes the merged page */
static bool pair_freed(bool several, bool huge, int which)
{
	struct place places[2], all;
	uint64_t key = unique_key();
	bool ok = true;

	begin(several, huge, places);
	tell(&places[0], FILL, key);
	tell(&places[1], FILL, key);
	drain();
	/* A huge page stays one only where all of it is freed */
	all = (struct place){ places[which].actor, huge ? 0 : places[which].page };
	ok &= tell(&all, FREE, huge ? AREA : 1);
	drain();
	ok = ok && merged(places) && is_kept(&places[0]);
	reclaim();
	ok &= tell(&places[!which], HOLDS, key);
	end(several);
	return ok;
}

static void lazily_freed(const char *swap)
{
	for (int several = 0; several < 2; several++) {
		const char *who = several ? "several processes" : "one process";

		for (int huge = 0; huge < 2; huge++) {
			const char *size = huge ? "huge" : "small";

			for (int forks = 0; forks < 2; forks++)
				ksft_test_result(
					join_freed(several, huge, forks),
					"MADV_FREE of a merged page%s, %s, of a %s one, %s\n",
					forks ? ", then fork" : "", who, size, swap);
			for (int which = 0; which < 2; which++)
				ksft_test_result(pair_freed(several, huge, which),
						 "MADV_FREE of page %d of two, %s, %s, %s\n",
						 which + 1, who, size, swap);
		}
	}
}

/* Soft-dirty: a page is written if it says so, and only then */

static bool soft_dirty_is(struct place places[2], bool written, const char *when)
{
	bool ok = true;

	for (int p = 0; p < 2; p++) {
		bool dirty = entry_of(&places[p]) & PM_SOFT_DIRTY;

		if (dirty != written)
			ksft_print_msg("page %d %s is%s soft-dirty\n", p, when,
				       dirty ? "" : " not");
		ok &= dirty == written;
	}
	return ok;
}

static bool soft_dirty(bool several, bool huge, bool zero, bool written, bool forks)
{
	uint64_t key = zero ? 0 : unique_key();
	struct place places[2];
	bool ok = true;

	begin(several, huge, places);
	ksm_set("use_zero_pages", zero);
	for (int p = 0; p < 2 && !written; p++)
		tell(&places[p], FILL, key);
	for (int p = 0; p <= several; p++)
		ok &= tell(&places[p], CLEAR_REFS, 0);
	for (int p = 0; p < 2 && written; p++)
		tell(&places[p], FILL, key);
	if (forks)
		ok &= tell(&places[0], FORK, 0);
	ok &= soft_dirty_is(places, written, "before");
	ok = ok && merged(places) && soft_dirty_is(places, written, "merged");
	ksm_set("run", 2);
	ok = ok && soft_dirty_is(places, written, "unmerged");
	end(several);
	return ok;
}

static void softly(void)
{
	if (access("/proc/self/clear_refs", W_OK) || !write_file("/proc/self/clear_refs", "4"))
		die("no soft-dirty marks here");
	for (int n = 0; n < 32; n++) {
		bool several = n & 1, huge = n & 2, zero = n & 4, written = n & 8, forks = n & 16;

		ksft_test_result(soft_dirty(several, huge, zero, written, forks),
				 "%s since clear_refs: %s pages of %s%s that become %s\n",
				 written ? "written" : "not written", huge ? "huge" : "small",
				 several ? "several processes" : "one process",
				 forks ? ", forked," : "", zero ? "zero pages" : "KSM pages");
	}
}

/* Who may do what with a page does not depend on what it shares */

static bool protection(bool zero, enum op op, uint64_t arg, bool readable)
{
	uint64_t key = zero ? 0 : unique_key();
	struct place places[2], third;
	bool ok;

	begin(false, false, places);
	ksm_set("use_zero_pages", zero);
	third = (struct place){ places[0].actor, 2 };
	tell(&places[0], FILL, key);
	tell(&places[1], FILL, key);
	tell(&third, FILL, key);
	ok = tell(&places[0], op, arg);
	ok = ok && merged(places);
	ok &= tell(&places[0], TRY, READ) == readable;
	ok &= !tell(&places[0], TRY, WRITE);
	ok &= tell(&places[1], TRY, READ) && tell(&places[1], TRY, WRITE);
	end(false);
	return ok;
}

/* An area without PROT_EXEC has no code in it, whatever else maps the page */
static bool no_execute(void)
{
	struct place places[2];
	uint64_t key = unique_key();
	bool ok;

	begin(false, false, places);
	for (int p = 0; p < 2; p++) {
		tell(&places[p], FILL, key);
		tell(&places[p], RETURN, 0);
	}
	ok = tell(&places[0], PROTECT, PROT_READ | PROT_EXEC) && merged(places);
	ok &= tell(&places[0], TRY, EXECUTE) && !tell(&places[1], TRY, EXECUTE);
	end(false);
	return ok;
}

static bool has_pkeys(void)
{
	int key = pkey_alloc(0, 0);

	if (key > 0)
		pkey_free(key);
	return key > 0;
}

static void protections(void)
{
	for (int zero = 0; zero < 2; zero++) {
		const char *page = zero ? "zero page" : "KSM page";

		ksft_test_result(protection(zero, PROTECT, PROT_NONE, false),
				 "PROT_NONE stays, over a %s\n", page);
		ksft_test_result(protection(zero, PROTECT, PROT_READ, true),
				 "PROT_READ stays, over a %s\n", page);
		if (has_pkeys())
			ksft_test_result(protection(zero, PKEY, 0, false),
					 "a protection key stays, over a %s\n", page);
		else
			ksft_test_result_skip("no protection keys here\n");
	}
	ksft_test_result(no_execute(), "no PROT_EXEC stays\n");
}

/* A merged page is locked in memory while one of those that map it has it so */
static bool locked(int which)
{
	struct place places[2];
	uint64_t key = unique_key();
	bool ok;

	begin(true, false, places);
	tell(&places[0], FILL, key);
	tell(&places[1], FILL, key);
	ok = tell(&places[which], LOCK, 0) && merged(places);
	drain();
	ok &= !!(mapping_of(&places[0]).flags & KPF_MLOCKED);
	reclaim();
	/* Its entry is there still */
	ok &= mapping_of(&places[which]).pfn && tell(&places[!which], HOLDS, key);
	ok &= tell(&places[which], UNLOCK, 0);
	drain();
	ok &= !(mapping_of(&places[0]).flags & KPF_MLOCKED);
	end(true);
	return ok;
}

/* An entry that a userfaultfd watches is left alone */
static bool watched(bool *possible)
{
	struct place places[2];
	uint64_t key = unique_key(), pfn;
	bool ok = true;

	begin(true, false, places);
	tell(&places[0], FILL, key);
	tell(&places[1], FILL, key);
	*possible = tell(&places[0], WATCH, 0);
	if (*possible) {
		pfn = mapping_of(&places[0]).pfn;
		ksm_start();
		for (int n = 0; n < 8; n++) {
			ksm_scans(1);
			ok &= mapping_of(&places[0]).pfn == pfn &&
			      entry_of(&places[0]) & PM_UFFD_WP;
		}
		ok &= tell(&places[0], UNWATCH, 0) && merged(places);
	}
	end(true);
	return ok;
}

int main(int argc, char **argv)
{
	bool possible, ok;

	test_init(argc, argv);
	test_plan(16 + 32 + 7 + 2 + 1 + 16);
	cgroup = cgroup_own();
	if (cgroup < 0)
		die("no memory cgroup");
	lazily_freed("no swap");
	softly();
	protections();
	for (int which = 0; which < 2; which++)
		ksft_test_result(locked(which),
				 "page %d of two is mlocked, and so is the merged page\n",
				 which + 1);
	ok = watched(&possible);
	if (possible)
		ksft_test_result(ok, "an entry that a userfaultfd protects is left as it is\n");
	else
		ksft_test_result_skip("no userfaultfd here\n");
	if (swap_on())
		lazily_freed("swap");
	else
		for (int n = 0; n < 16; n++)
			ksft_test_result_skip("no zram to swap to\n");
	test_exit();
}
