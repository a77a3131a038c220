// SPDX-License-Identifier: GPL-2.0-only

//! Mms that come and go, and memory that goes offline.

use crate::{
    engine::{
        mm_list::MmList,
        registry::Registry,
        scan::Pins, //
        types::SlotId,
    },
    kernel_ext::{
        memory_notifier::MemoryEvents,
        mm::PinnedMm,
        race_window,
        tracepoint::MmEvents, //
    },
    service::Ksm, //
};
use kernel::mm::Mm;

impl MmList for Ksm {
    type Mm = PinnedMm;

    fn locked<R>(&self, f: impl FnOnce(&mut Registry<PinnedMm>) -> R) -> R {
        f(&mut self.mmlist_lock.lock())
    }
}

impl Pins<PinnedMm> for Ksm {
    fn pin(&self, slot: SlotId) -> Option<PinnedMm> {
        self.locked(|registry| registry.pin(slot))
    }
}

impl MmEvents for Ksm {
    fn enter(&self, mm: &Mm) {
        race_window::spin();
        self.register(mm);
    }

    fn exit(&self, mm: &Mm) {
        race_window::spin();
        if MmList::exit(self, mm.as_raw() as usize) {
            self.kick_reaping();
        }
    }
}

impl MemoryEvents for Ksm {
    fn going_offline(&self, _start_pfn: usize, _nr_pages: usize) {
        // Users of the engine are done when this has the lock; those that come later wait.
        let _state = self.waiting(|mutex| mutex.lock());
        self.published.lock().knobs.offline = true;
    }

    fn offline(&self, start_pfn: usize, nr_pages: usize) {
        {
            let mut state = self.waiting(|mutex| mutex.lock());
            state
                .engine
                .metadata
                .forget_frames(start_pfn..start_pfn.saturating_add(nr_pages));
            self.publish(&state);
        }
        self.cancel_offline(start_pfn, nr_pages);
    }

    fn cancel_offline(&self, _start_pfn: usize, _nr_pages: usize) {
        self.published.lock().knobs.offline = false;
        self.offline_wait.wake_up_all();
    }
}
