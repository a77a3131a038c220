// SPDX-License-Identifier: GPL-2.0-only

//! The scanner's sleep until a time, and mms that come meanwhile.
//!
//! Who announces an mm takes no lock, and wakes the scanner only where it would sleep for longer
//! than young mms wait. Each side says first what it does, and looks at the other after that: the
//! scanner until when it sleeps, and whether there are newcomers; the other side that there is one,
//! and whether the scanner sleeps. So one of them sees the other.

use super::YOUNG_NSECS;

/// A time until which the scanner does not sleep, or is not to go on with it.
pub const AWAKE: i64 = 0;

/// What the scanner shares with those that announce mms.
pub trait Nap {
    /// Says that there are newcomers, before anything is read that comes after this: a full
    /// barrier.
    fn set_newcomers(&self);

    /// Returns whether there are newcomers.
    fn newcomers(&self) -> bool;

    /// Returns until when the scanner sleeps, or [`AWAKE`].
    fn asleep_until(&self) -> i64;

    /// Changes that.
    fn set_asleep_until(&self, until: i64);

    /// Nanoseconds, as those until which the scanner sleeps.
    fn now(&self) -> i64;

    /// Has the scanner look again whether its sleep [is over](Nap::is_over), if it sleeps.
    fn wake(&self);

    /// Announces a newcomer, which has been registered.
    fn announce(&self) {
        self.set_newcomers();
        if self.is_long(self.asleep_until()) {
            self.end_sleep();
        }
    }

    /// Ends a sleep that is under way.
    fn end_sleep(&self) {
        self.set_asleep_until(AWAKE);
        self.wake();
    }

    /// Returns whether the scanner is to sleep no longer. Between [`Nap::set_asleep_until`] and the
    /// last time that it asks before it sleeps there is a full barrier: that of a wait queue.
    fn is_over(&self) -> bool {
        let until = self.asleep_until();
        until == AWAKE || self.newcomers() && self.is_long(until)
    }

    /// Returns whether a newcomer cannot wait until then.
    fn is_long(&self, until: i64) -> bool {
        until != AWAKE && until - self.now() > YOUNG_NSECS
    }
}
