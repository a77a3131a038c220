// SPDX-License-Identifier: GPL-2.0-only

#include <linux/capability.h>
#include <linux/cgroup.h>
#include <linux/err.h>
#include <linux/mm.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>

#include "symbols.h"

bool rksm_capable_sys_admin(void)
{
	return capable(CAP_SYS_ADMIN);
}

/* A reference to the leader of the process that a pidfd is for, or an error. */
struct task_struct *rksm_pidfd_get_task(int pidfd)
{
	unsigned int flags;

	return pidfd_get_task(pidfd, &flags);
}

void rksm_put_task_struct(struct task_struct *task)
{
	put_task_struct(task);
}

struct pid *rksm_get_task_tgid(struct task_struct *task)
{
	return get_task_pid(task, PIDTYPE_TGID);
}

bool rksm_pid_is_of(struct pid *pid, struct task_struct *task)
{
	bool same;

	rcu_read_lock();
	same = task_tgid(task) == pid;
	rcu_read_unlock();
	return same;
}

bool rksm_pid_has_task(struct pid *pid)
{
	bool has;

	rcu_read_lock();
	has = pid_task(pid, PIDTYPE_TGID);
	rcu_read_unlock();
	return has;
}

/* Every process of user space, by its leader. `f` runs in an RCU read-side section. */
void rksm_visit_processes(void (*f)(struct task_struct *task, void *data), void *data)
{
	struct task_struct *task;

	rcu_read_lock();
	for_each_process(task) {
		if (!(task->flags & PF_KTHREAD))
			f(task, data);
	}
	rcu_read_unlock();
}

/* In an RCU read-side section. */
bool rksm_task_in_cgroup(struct task_struct *task, struct cgroup *cgroup)
{
	return cgroup_is_descendant(task_dfl_cgroup(task), cgroup);
}

void rksm_cgroup_put(struct cgroup *cgroup)
{
	cgroup_put(cgroup);
}

/* With the task locked: whether nobody else runs in the mm, as the parent of a vfork child does. */
static bool owns_mm(struct task_struct *task, struct mm_struct *mm)
{
#ifdef CONFIG_MEMCG
	struct task_struct *owner;
	bool own;

	rcu_read_lock();
	owner = rcu_dereference(mm->owner);
	own = owner && same_thread_group(owner, task);
	rcu_read_unlock();
	return own;
#else
	return !task->vfork_done;
#endif
}

/*
 * Calls `f` with the mm of a process, if it is its own, while the mm cannot go: in atomic context.
 * Returns -ESRCH if the process has none, -EBUSY if it is that of another process.
 */
int rksm_with_own_mm(struct task_struct *leader, void (*f)(struct mm_struct *mm, void *data),
		     void *data)
{
	struct task_struct *task;
	int err = -ESRCH;

	rcu_read_lock();
	/* for_each_thread() asks lockdep about tasklist_lock, which is not exported. */
	list_for_each_entry_rcu(task, &leader->signal->thread_head, thread_node) {
		task_lock(task);
		if (task->mm && !(task->flags & PF_KTHREAD)) {
			err = owns_mm(task, task->mm) ? 0 : -EBUSY;
			if (!err)
				f(task->mm, data);
		}
		task_unlock(task);
		if (err != -ESRCH)
			break;
	}
	rcu_read_unlock();
	return err;
}

bool rksm_mm_merge_any(struct mm_struct *mm)
{
	return mm_flags_test(MMF_VM_MERGE_ANY, mm);
}

/* The process that an mm belongs to, in the current task's pid namespace; 0 if there is none. */
int rksm_mm_pid(struct mm_struct *mm)
{
	int pid = 0;

#ifdef CONFIG_MEMCG
	struct task_struct *owner;

	rcu_read_lock();
	owner = rcu_dereference(mm->owner);
	if (owner)
		pid = task_tgid_vnr(owner);
	rcu_read_unlock();
#endif
	return pid;
}
