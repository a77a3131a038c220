// SPDX-License-Identifier: GPL-2.0-only

//! How work is shared by several threads: a stage produces jobs, a pool runs them.

/// Produces the jobs of one stage and processes their results.
///
/// Only the thread that runs the stage calls it.
pub trait Stage<J> {
    /// Returns the next job, `None` if there is none before a job in flight has been completed, or
    /// none at all.
    fn next_job(&mut self) -> Option<J>;

    /// Processes the result of a job.
    fn complete(&mut self, job: J);
}

/// Threads that work together.
pub trait WorkerPool {
    /// Runs `work` on each job of the stage, on several at once, and returns when none is left.
    ///
    /// # Context
    ///
    /// May sleep.
    fn run<J: Send + Unpin>(&self, stage: &mut impl Stage<J>, work: impl Fn(&mut J) + Sync);

    /// Runs `work` on each of the items, on some of them at once, and returns when all is done.
    ///
    /// # Context
    ///
    /// May sleep.
    fn for_each<T: Send>(&self, items: &mut [T], work: impl Fn(&mut T) + Sync) {
        struct Items<'a, T>(core::slice::IterMut<'a, T>);

        impl<'a, T> Stage<&'a mut T> for Items<'a, T> {
            fn next_job(&mut self) -> Option<&'a mut T> {
                self.0.next()
            }

            fn complete(&mut self, _item: &'a mut T) {}
        }
        self.run(&mut Items(items.iter_mut()), |item| work(item));
    }
}
