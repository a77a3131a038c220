// SPDX-License-Identifier: GPL-2.0-only
/*
 * Come and go in place: insmod adopts what the built-in KSM has merged, and rmmod hands back
 * what is merged, at any time. No page moves, none is unmerged, every counter and knob stays;
 * afterwards the KSM in charge finds every mapping of every merged page, goes on merging with
 * them, and leaves nothing behind. Pages merged by either KSM go both ways.
 *
 * With run=0 what is judged is the step itself. Without a module there are no steps: the same is
 * expected of a KSM that stays.
 *
 * guest: --no-module --numa 2 --append slab_nomerge --timeout 1800
 * runs: builtin
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "holders.h"

/* Copies in each of the processes; all of them make full pages and others, chains and none */
#define PROCESSES	4
#define TWINS		20	/* contents */
#define TWIN_COPIES	2
#define POPULAR_COPIES	10	/* of one content */
#define FULL_COPIES	4
#define ZERO_PAGES	6
#define UNIQUE_PAGES	10
#define MERGED_PAGES	(TWINS * TWIN_COPIES + POPULAR_COPIES + FULL_COPIES)
#define PAGES		(MERGED_PAGES + ZERO_PAGES + UNIQUE_PAGES)
#define NEW_PAIRS	8
#define KILLS		15

static const struct shape {
	const char *name;
	long max_page_sharing, across;
	bool moved;	/* one process's pages, to the other node, and KSM has not seen it */
	bool room;	/* another copy of a twin finds a page that is not full */
} shapes[] = {
	{ "one tree", 16, 1, false, true },
	{ "pairs", 2, 1, false, false },
	{ "a tree for each node", 16, 0, false, true },
	{ "on the wrong node", 16, 0, true, true },
};

enum origin { BUILTIN, RKSM };
static const char *const origin_name[] = { "the built-in", "rksm" };

static struct holder holder[HOLDERS_MAX];
static size_t holders;
static uint64_t twin[TWINS];

/* Processes */

static void end_holders(size_t keep)
{
	while (holders > keep)
		holder_end(&holder[--holders]);
}

static void start_holders(const struct shape *shape)
{
	uint64_t key[PAGES], popular = unique_key(), full = unique_key();

	for (size_t t = 0; t < TWINS; t++)
		twin[t] = unique_key();
	while (holders < PROCESSES) {
		size_t n = 0;

		for (size_t i = 0; i < TWINS * TWIN_COPIES; i++)
			key[n++] = twin[i % TWINS];
		for (size_t i = 0; i < POPULAR_COPIES; i++)
			key[n++] = popular;
		for (size_t i = 0; i < FULL_COPIES; i++)
			key[n++] = full;
		for (size_t i = 0; i < ZERO_PAGES; i++)
			key[n++] = 0;
		for (size_t i = 0; i < UNIQUE_PAGES; i++)
			key[n++] = unique_key();
		for (size_t i = PAGES - 1; i > 0; i--) {
			size_t j = rnd_below(i + 1);
			uint64_t swap = key[i];

			key[i] = key[j];
			key[j] = swap;
		}
		holder_start(&holder[holders], PAGES, key, shape->across ? -1 : (int)(holders % 2));
		holders++;
	}
}

static bool all_merged(void *arg)
{
	static struct snapshot shot;

	(void)arg;
	snapshot(&shot, holder, holders);
	return pages_with(&shot, KPF_KSM) == holders * MERGED_PAGES &&
	       pages_with(&shot, KPF_ZERO_PAGE) == holders * ZERO_PAGES;
}

/* The module out, whatever was; then processes whose pages are merged by the one or the other */
static bool prepare(const struct shape *shape, enum origin by)
{
	end_holders(0);
	ksm_reset();
	if (module_path && module_loaded() && !module_out())
		die("the module does not go after run=2");
	if (module_path && by == RKSM && !module_in("check=1"))
		return false;
	ksm_set("max_page_sharing", shape->max_page_sharing);
	ksm_set("merge_across_nodes", shape->across);
	ksm_set("use_zero_pages", 1);
	start_holders(shape);
	ksm_start();
	if (!ksm_until_true(all_merged, NULL, 60)) {
		ksft_print_msg("pages do not merge\n");
		return false;
	}
	/* What is found later: chains that are pruned, copies that had no room */
	ksm_scans(3);
	ksm_set("run", 0);
	return !shape->moved || holders_move(&holder[0], 1);
}

/* What a step must not change: nothing moves, nothing is counted otherwise */

static bool identical(const struct shape *shape, const struct snapshot *was)
{
	static struct snapshot is;
	bool ok;

	(void)shape;
	snapshot(&is, holder, holders);
	ok = same_pages(was, &is);
	ok &= same_counts(was, &is);
	ok &= same_progress(was, &is);
	return ok && holders_intact(holder, holders);
}

/* Every mapping is found from its page */
static bool movable(const struct shape *shape, const struct snapshot *was)
{
	(void)shape;
	(void)was;
	return holders_move(holder, holders) && holders_intact(holder, holders);
}

/* The one in charge merges with what it was given, and does not change it */

static bool newcomer_merged(void *arg)
{
	static struct snapshot shot;

	snapshot(&shot, arg, 1);
	return pages_with(&shot, KPF_KSM) == shot.pages[0];
}

/* Whether one of those that were there maps this page for the same content */
static bool known(uint64_t pfn, uint64_t key, const struct snapshot *was)
{
	for (size_t h = 0; h < was->n; h++)
		for (size_t i = 0; i < was->pages[h]; i++)
			if (was->map[h][i].pfn == pfn)
				return holder[h].key[i] == key;
	return false;
}

static bool welcome(const struct shape *shape, const struct snapshot *was)
{
	static struct snapshot own;
	struct holder newcomer;
	uint64_t key[2 * (TWINS + NEW_PAIRS)];
	size_t n = 0, strangers = 0;
	long shared = was->shared + NEW_PAIRS + (shape->room ? 0 : TWINS);
	bool ok;

	for (size_t i = 0; i < 2 * TWINS; i++)
		key[n++] = twin[i / 2];
	for (size_t i = 0; i < NEW_PAIRS; i++) {
		key[n] = unique_key();
		key[n + 1] = key[n];
		n += 2;
	}
	holder_start(&newcomer, n, key, shape->across ? -1 : 1);
	ok = ksm_until_true(newcomer_merged, &newcomer, 30);
	if (!ok)
		ksft_print_msg("new copies do not merge\n");
	ok &= ksm_until("pages_shared", shared, 10);
	snapshot(&own, &newcomer, 1);
	for (size_t i = 0; i < 2 * TWINS; i++)
		strangers += !known(own.map[0][i].pfn, key[i], was);
	if (shape->room && strangers) {
		ksft_print_msg("%zu of %d new copies are not merged with the page there was\n",
			       strangers, 2 * TWINS);
		ok = false;
	}
	ok &= holders_intact(&newcomer, 1);
	holder_end(&newcomer);
	return ksm_until("pages_shared", was->shared, 20) && ok;
}

static bool goes_on(const struct shape *shape, const struct snapshot *was)
{
	static struct snapshot then, is;
	bool ok;

	ksm_start();
	ksm_scans(5);
	snapshot(&then, holder, holders);
	/* rksm makes one page of those that have met on a node, where the built-in leaves two */
	ok = shape->moved && module_loaded() ? all_merged(NULL) : same_pages(was, &then);
	ok = ok && welcome(shape, &then);
	ksm_set("run", 0);
	snapshot(&is, holder, holders);
	return same_pages(&then, &is) && same_counts(&then, &is) && ok &&
	       holders_intact(holder, holders);
}

/* What was written to before, with the page it had still counted, is noticed */

static bool counted_exactly(void)
{
	static struct snapshot shot;
	long merged;

	snapshot(&shot, holder, holders);
	merged = pages_with(&shot, KPF_KSM);
	if (shot.shared + shot.sharing != merged)
		ksft_print_msg("%ld mappings are counted, %ld there\n", shot.shared + shot.sharing,
			       merged);
	return shot.shared + shot.sharing == merged;
}

static bool noticed(const struct shape *shape, const struct snapshot *was)
{
	static struct snapshot is;
	bool ok;

	/* Whether a page that nobody maps any more is counted does not matter */
	snapshot(&is, holder, holders);
	ok = same_pages(was, &is);
	ksm_start();
	ksm_scans(4);
	ksm_set("run", 0);
	/*
	 * The built-in forgets the last mapping of a page that has come to another node, as they do
	 * here, where all pages like it are full
	 */
	if (shape->across || module_loaded())
		ok = counted_exactly() && movable(shape, was) && ok;
	return ok && holders_intact(holder, holders);
}

/* What is swapped out is swapped in, and merged as it was */

static int reclaim = -1;

static bool swapped_out(void)
{
	static struct snapshot was, is;

	snapshot(&was, holder, holders);
	for (int tries = 0; tries < 5; tries++)
		cgroup_reclaim(reclaim, holders * PAGES);
	snapshot(&is, holder, holders);
	if (2 * pages_with(&is, KPF_KSM) <= pages_with(&was, KPF_KSM))
		return true;
	ksft_print_msg("of %zu merged pages %zu are still there\n", pages_with(&was, KPF_KSM),
		       pages_with(&is, KPF_KSM));
	return false;
}

static bool comes_back(const struct shape *shape, const struct snapshot *was)
{
	static struct snapshot is;
	bool ok;

	snapshot(&is, holder, holders);
	ok = same_pages(was, &is) && holders_intact(holder, holders);
	ksm_start();
	/* Which node a page comes back to is the kernel's affair: a copy may be alone on its own */
	if (shape->across && !ksm_until_true(all_merged, NULL, 60)) {
		ksft_print_msg("what came back does not merge\n");
		ok = false;
	}
	ksm_scans(3);
	ksm_set("run", 0);
	return counted_exactly() && movable(shape, was) && ok;
}

static const struct judge {
	const char *says;
	bool (*judge)(const struct shape *shape, const struct snapshot *was);
	int forks, writes;
	bool swaps;
} judges[] = {
	{ "nothing changes", identical, 2, 0, false },
	{ "every merged page can be moved", movable, 0, 0, false },
	{ "merging goes on", goes_on, 0, 0, false },
	{ "writes are noticed", noticed, 0, 100, false },
	{ "what was swapped out comes back", comes_back, 0, 0, true },
};

static void write_to_some(int writes)
{
	while (writes--)
		holder_write(&holder[rnd_below(holders)], rnd_below(PAGES), unique_key());
}

/* Two steps, from the one KSM to the other and back */
static void both_ways(const struct shape *shape, const struct judge *judge)
{
	static struct snapshot was;

	for (enum origin by = BUILTIN; by <= RKSM; by++) {
		bool ok;

		if (judge->swaps && reclaim < 0) {
			for (int n = 0; n < 2; n++)
				ksft_test_result_skip("no swap\n");
			continue;
		}
		ok = prepare(shape, by);
		for (int f = 0; ok && f < judge->forks; f++)
			holder_fork(&holder[f], &holder[holders++]);
		for (int n = 0; n < 2; n++) {
			bool in = n == (int)by;

			if (ok)
				write_to_some(judge->writes);
			ok = ok && (!judge->swaps || swapped_out());
			snapshot(&was, holder, holders);
			ok = ok && module_step() && judge->judge(shape, &was);
			ksft_test_result(ok, "%s, merged by %s: %s after %s\n", shape->name,
					 origin_name[by], judge->says, in ? "insmod" : "rmmod");
		}
	}
}

/* Nothing is left of what was handed back */

static bool cleared(void)
{
	bool ok;

	ksm_set("run", 2);
	ok = ksm_all_zero() && holders_intact(holder, holders);
	end_holders(0);
	/* The built-in lets go of those that have ended when it next unmerges */
	ksm_set("run", 0);
	ksm_set("run", 2);
	return (module_loaded() || slabs_empty()) && ok;
}

static bool nothing_stays(const struct shape *shape, enum origin by)
{
	bool ok;

	if (!prepare(shape, by))
		return false;
	ok = module_step() && (by == RKSM || module_step()) && all_merged(NULL);
	/* As this test can tell */
	ok = ok && (module_loaded() || slabs_used());
	write_to_some(20);
	ok = ok && holders_intact(holder, holders);
	ksm_start();
	ksm_scans(2);
	end_holders(PROCESSES - 1);
	ksm_scans(2);
	ksm_set("run", 0);
	ok = ok && counted_exactly();
	return cleared() && ok;
}

/* Nobody keeps the mm of a process that has ended, once there is rksm, or has been */
static bool slots_are(long slots)
{
	/* What RCU frees takes a moment */
	return !module_path || slab_comes_to("ksm_mm_slot", slots, 950);
}

/* Processes that end while nobody scans, with the cursor anywhere */

static bool stopped_anywhere(enum origin by)
{
	bool ok = prepare(&shapes[0], by);

	ksm_set("pages_to_scan", 1 + rnd_below(20));
	ksm_set("sleep_millisecs", 1);
	ksm_start();
	usleep(rnd_below(30000));
	ksm_set("run", 0);
	ksm_set("pages_to_scan", 2000);
	ksm_set("sleep_millisecs", 0);
	return ok;
}

static bool exits_before(enum origin by, int scans)
{
	long slots;
	bool ok;

	if (!stopped_anywhere(by))
		return false;
	slots = slab_objects("ksm_mm_slot");
	for (int n = 0; n < 2; n++) {
		struct holder last;
		size_t victim = rnd_below(holders);

		last = holder[victim];
		holder[victim] = holder[holders - 1];
		holder[holders - 1] = last;
		end_holders(holders - 1);
	}
	ok = module_step() && all_merged(NULL) && slots_are(slots - 2);
	if (scans) {
		ksm_start();
		ksm_scans(scans);
		ksm_set("run", 0);
		ok = ok && counted_exactly();
	}
	ok = ok && holders_intact(holder, holders);
	if (by == BUILTIN) {
		/* Half of the time with what is left, otherwise with nothing merged */
		if (rnd_below(2))
			ksm_set("run", 2);
		ok = ok && module_step();
	}
	return cleared() && ok;
}

/* rksm lets go of them with run=0, as does the built-in's list, which has its cursor at rest */
static bool exits_after(void)
{
	bool ok = stopped_anywhere(BUILTIN) && module_step();

	end_holders(0);
	if (!module_path)
		return cleared() && ok;
	return slabs_empty() && ok && module_step() && cleared();
}

/* Knobs */

static char text[2][KSM_FILES][64];

static void read_knobs(int which)
{
	for (int f = KSM_FIRST_RW; f < KSM_FILES; f++) {
		char path[96];

		snprintf(path, sizeof(path), "/sys/kernel/mm/ksm/%s", ksm_files[f]);
		if (read_file(path, text[which][f], sizeof(text[which][f])) <= 0)
			die("cannot read %s", path);
	}
}

static bool knobs_stay(void)
{
	bool ok = true, advised;

	read_knobs(0);
	ok = module_step();
	read_knobs(1);
	advised = !strcmp(text[0][KSM_FIRST_RW + 2], "none [scan-time]\n");
	for (int f = KSM_FIRST_RW; f < KSM_FILES; f++) {
		/* The advisor chooses this one all the time */
		if (advised && !strcmp(ksm_files[f], "pages_to_scan"))
			continue;
		if (!strcmp(text[0][f], text[1][f]))
			continue;
		ksft_print_msg("%s was %s", ksm_files[f], text[0][f]);
		ksft_print_msg("and is now %s", text[1][f]);
		ok = false;
	}
	return ok;
}

static void set_knobs(bool advised)
{
	static const char *const some[] = {
		"sleep_millisecs", "stable_node_chains_prune_millisecs", "advisor_max_cpu",
		"advisor_min_pages_to_scan", "advisor_target_scan_time", "pages_to_scan",
	};

	ksm_try("advisor_mode", advised ? "scan-time" : "none");
	for (size_t i = 0; i < ARRAY_SIZE(some) - advised; i++)
		ksm_set(some[i], 11 + rnd_below(80));
	ksm_set("advisor_max_pages_to_scan", 1000 + rnd_below(1000));
	ksm_set("smart_scan", rnd_below(2));
	ksm_set("use_zero_pages", rnd_below(2));
}

/* Other values before each of two steps */
static void knobs(const struct shape *shape, int run, bool advised)
{
	bool ok = prepare(shape, BUILTIN);

	for (int n = 0; n < 2; n++) {
		ksm_set("run", run);
		set_knobs(advised);
		ok = knobs_stay() && ok;
		ok = ok && all_merged(NULL);
		ksft_test_result(ok && holders_intact(holder, holders),
				 "%s: run=%d and all knobs%s stay after %s\n", shape->name, run,
				 advised ? " with the advisor" : "", n ? "rmmod" : "insmod");
	}
}

/* What is pinned for each mapping: less may be left than of one case */

static const char *const pinned[] = { "mm_struct", "anon_vma" };

static bool nothing_pinned(const long *before)
{
	bool ok = true;

	for (size_t c = 0; c < ARRAY_SIZE(pinned); c++) {
		long objects = slab_objects(pinned[c]);

		ksft_print_msg("%s had %ld objects, and has %ld\n", pinned[c], before[c], objects);
		ok &= before[c] > 0 && objects < before[c] + PROCESSES;
	}
	return ok;
}

/* The way without adoption */
static bool drains(void)
{
	static struct snapshot shot;
	bool ok = prepare(&shapes[0], BUILTIN) && (!module_path || module_in("adopt=0 check=1"));

	if (!module_path)
		ksm_set("run", 2);
	snapshot(&shot, holder, holders);
	if (pages_with(&shot, KPF_KSM)) {
		ksft_print_msg("%zu pages are merged\n", pages_with(&shot, KPF_KSM));
		ok = false;
	}
	ok = ksm_all_zero() && ok && holders_intact(holder, holders);
	ksm_start();
	ok = ksm_until_true(all_merged, NULL, 60) && holders_intact(holder, holders) && ok;
	return module_step() && all_merged(NULL) && ok;
}

/* A build that takes the built-in's objects for others */
static const char *other_path;

static bool unfit(void)
{
	static struct snapshot was;
	const char *own = module_path;
	bool ok = prepare(&shapes[0], BUILTIN);

	snapshot(&was, holder, holders);
	module_path = other_path;
	ok = ok && module_refused("", -EINVAL);
	module_path = own;
	return identical(&shapes[0], &was) && ok;
}

/* insmod that is killed anywhere leaves what there was, or is done */
static bool killed(void)
{
	static struct snapshot was;
	bool ok = prepare(&shapes[0], BUILTIN);
	int refused = 0;

	snapshot(&was, holder, holders);
	for (int n = 0; ok && n < KILLS; n++) {
		pid_t pid = fork();

		if (!pid)
			_exit(!!module_insert("delay=20000"));
		usleep(rnd_below(400000));
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		refused += !module_loaded();
		ok = identical(&shapes[0], &was) && (!module_loaded() || module_out()) &&
		     identical(&shapes[0], &was);
	}
	ksft_print_msg("%d of %d did not load\n", refused, KILLS);
	return ok;
}

int main(int argc, char **argv)
{
	long objects[ARRAY_SIZE(pinned)];
	bool ok;

	test_init(argc, argv);
	if (module_path && module_loaded())
		ksft_exit_fail_msg("rksm is loaded already\n");
	if (access("/sys/devices/system/node/node1", F_OK))
		ksft_exit_skip("one NUMA node only\n");
	other_path = module_path ? getenv("RKSM_OTHER_KO") : NULL;
	test_plan(ARRAY_SIZE(shapes) * (4 * ARRAY_SIZE(judges) + 2) + 4 + 2 + 2 * 3 + 4);
	/* Or the kernel would move pages by itself */
	write_file("/proc/sys/kernel/numa_balancing", "0");
	write_file("/proc/sys/vm/compaction_proactiveness", "0");

	for (size_t c = 0; c < ARRAY_SIZE(pinned); c++)
		objects[c] = slab_objects(pinned[c]);
	/* The processes are in it as well */
	if (swap_on())
		reclaim = cgroup_own();

	for (size_t s = 0; s < ARRAY_SIZE(shapes); s++) {
		for (size_t j = 0; j < ARRAY_SIZE(judges); j++)
			both_ways(&shapes[s], &judges[j]);
		for (enum origin by = BUILTIN; by <= RKSM; by++)
			ksft_test_result(nothing_stays(&shapes[s], by),
					 "%s, merged by %s: nothing stays after rmmod\n",
					 shapes[s].name, origin_name[by]);
	}
	for (int n = 0; n < 4; n++)
		ksft_test_result(exits_before(n % 2, n / 2 * 2),
				 "exits before %s, and %d scans after it\n",
				 n % 2 ? "rmmod" : "insmod", n / 2 * 2);
	for (int n = 0; n < 2; n++)
		ksft_test_result(exits_after(), "exits after insmod\n");
	knobs(&shapes[0], 0, false);
	knobs(&shapes[1], 1, false);
	knobs(&shapes[2], 1, true);
	ksft_test_result(drains(), "insmod adopt=0 unmerges, and merges anew\n");
	if (other_path)
		ksft_test_result(unfit(), "what is not known is left alone\n");
	else
		ksft_test_result_skip("what is not known is left alone: no such build\n");
	if (module_path)
		ksft_test_result(killed(), "insmod that is killed\n");
	else
		ksft_test_result_skip("insmod that is killed: no module\n");
	ok = cleared();
	ksft_test_result(nothing_pinned(objects) && ok, "nothing is pinned by what has gone\n");
	test_exit();
}
