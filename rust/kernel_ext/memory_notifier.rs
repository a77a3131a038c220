// SPDX-License-Identifier: GPL-2.0-only

//! Memory hot-remove notifications.
//!
//! C header: [`include/linux/memory.h`](srctree/include/linux/memory.h)

use crate::bindings::raw;
use core::marker::PhantomPinned;
use kernel::{
    error::to_result,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// Called for memory that goes offline. Each `going_offline` is followed by one of the other two.
///
/// # Context
///
/// All are called in the task that takes the memory offline, with the hotplug lock held, and may
/// sleep.
pub(crate) trait MemoryEvents: Send + Sync + 'static {
    /// Pages from `start_pfn` on will be migrated away. Once this has returned, no KSM page must be
    /// accessed until one of the other two is called.
    fn going_offline(&self, start_pfn: usize, nr_pages: usize);

    /// The pages are gone; nothing may refer to them any more.
    fn offline(&self, start_pfn: usize, nr_pages: usize);

    /// The pages stay after all.
    fn cancel_offline(&self, start_pfn: usize, nr_pages: usize);
}

/// A registered notifier. Dropping it unregisters it, and sleeps until no call is under way.
#[pin_data(PinnedDrop)]
pub(crate) struct MemoryNotifier<T: MemoryEvents> {
    #[pin]
    block: Opaque<raw::notifier_block>,
    events: Arc<T>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: The block is used by the notifier chain only, under its lock.
unsafe impl<T: MemoryEvents> Send for MemoryNotifier<T> {}
// SAFETY: Nothing can be done with a shared reference; `T` is `Sync` for the calls.
unsafe impl<T: MemoryEvents> Sync for MemoryNotifier<T> {}

impl<T: MemoryEvents> MemoryNotifier<T> {
    /// Registers a notifier with the priority of KSM.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// What `register_memory_notifier()` returns.
    pub(crate) fn register(events: Arc<T>) -> Result<Pin<KBox<Self>>> {
        let notifier = KBox::pin_init(
            pin_init!(Self {
                block <- Opaque::zeroed(),
                events,
                _pin: PhantomPinned,
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The block is pinned, and is unregistered before it goes. Where this fails, that
        // finds nothing to do.
        to_result(unsafe {
            raw::rksm_register_memory_notifier(notifier.block.get(), Some(notify::<T>))
        })?;
        Ok(notifier)
    }
}

#[pinned_drop]
impl<T: MemoryEvents> PinnedDrop for MemoryNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered in `register()`. Afterwards nobody is in `notify`.
        unsafe { raw::rksm_unregister_memory_notifier(self.block.get()) };
    }
}

/// Passes a notification on.
///
/// # Safety
///
/// To be called by the memory notifier chain only, for the block of a `MemoryNotifier<T>`.
unsafe extern "C" fn notify<T: MemoryEvents>(
    block: *mut raw::notifier_block,
    action: c_ulong,
    arg: *mut c_void,
) -> c_int {
    // SAFETY: `block` is that of a `MemoryNotifier<T>`, which is there while registered.
    let notifier =
        unsafe { &*kernel::container_of!(Opaque::cast_from(block), MemoryNotifier<T>, block) };
    // SAFETY: `arg` is a `struct memory_notify` for every action of this chain.
    let (start_pfn, nr_pages) = unsafe {
        (
            raw::rksm_memory_notify_start_pfn(arg),
            raw::rksm_memory_notify_nr_pages(arg),
        )
    };
    match action as u32 {
        raw::memory_block_state_MEM_GOING_OFFLINE => {
            notifier.events.going_offline(start_pfn, nr_pages)
        }
        raw::memory_block_state_MEM_OFFLINE => notifier.events.offline(start_pfn, nr_pages),
        raw::memory_block_state_MEM_CANCEL_OFFLINE => {
            notifier.events.cancel_offline(start_pfn, nr_pages)
        }
        _ => (),
    }
    raw::NOTIFY_OK as c_int
}
