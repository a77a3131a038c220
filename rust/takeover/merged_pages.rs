// SPDX-License-Identifier: GPL-2.0-only

//! What the built-in has merged, with everybody kept out who works on that: its own scanner, the
//! users of its files, the removal of memory.
//!
//! [`super::inventory`] takes it away, [`super::hand_back`] gives it back.
//!
//! Processes go on meanwhile: they enter and leave the list of slots, and rmap walks look at the
//! `hlist`s of nodes under the locks of folios. None of that looks at what is changed here: the
//! trees and lists by which the scanner finds nodes, and the lists of items of an mm, of which an
//! exit sees under `ksm_mmlist_lock` whether there are any.
//!
//! # Locks
//!
//! [`MergedPages`] holds `ksm_thread_mutex`. Inside that, `ksm_mmlist_lock` is taken for a look at
//! the list of slots, or to change whether a slot has items, and nothing is allocated under it.

use crate::{
    bindings::raw::{
        self,
        layout, //
    },
    kernel_ext::{
        slab::KmemCache,
        symbols::Symbols, //
    },
    takeover::builtin::{
        Builtin,
        ThreadMutex, //
    }, //
};
use core::ptr::{
    self,
    NonNull, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Flags in the address of an rmap item, `SEQNR_MASK` and `UNSTABLE_FLAG`: BTF knows no macros.
pub(super) const SEQNR_MASK: usize = 0xff;
pub(super) const UNSTABLE_FLAG: usize = 0x100;

/// `STABLE_NODE_CHAIN`: the length of a node that is a chain.
pub(super) const STABLE_NODE_CHAIN: c_int = -1024;

pub(super) type Node = NonNull<layout::ksm_stable_node>;
pub(super) type Item = NonNull<layout::ksm_rmap_item>;
pub(super) type Slot = NonNull<layout::ksm_mm_slot>;

/// The links of a node that is in no tree: `head`, `hlist_dup`, `list`.
pub(super) type DupLinks = layout::ksm_stable_node__bindgen_ty_1__bindgen_ty_1;

/// The built-in's merged pages, with nobody else at work on them.
///
/// # Invariants
///
/// `ksm_thread_mutex` is held, and has been since no memory was going offline.
pub(crate) struct MergedPages {
    pub(super) builtin: Builtin,
    mutex: ThreadMutex,
}

/// The flags of an item, which are in the low bits of its address.
///
/// # Safety
///
/// The item is there.
pub(super) unsafe fn flags(item: Item) -> usize {
    // SAFETY: By the contract. Only a scanner changes the field.
    unsafe { (*item.as_ptr()).address % PAGE_SIZE }
}

/// The links of a node that is in no tree: `head`, `hlist_dup`, `list`.
pub(super) fn dup_links(node: Node) -> *mut DupLinks {
    node.as_ptr().cast()
}

impl MergedPages {
    /// Keeps everybody else out. `None` while memory is going offline: then the trees are walked
    /// without the mutex.
    ///
    /// # Context
    ///
    /// May sleep. Takes `ksm_thread_mutex`, and holds it.
    pub(crate) fn lock(builtin: Builtin) -> Option<Self> {
        let mutex = ThreadMutex::lock(builtin.symbols());
        // INVARIANT: It does not begin while the mutex is held.
        (!builtin.offlining(&mutex)).then(|| Self { builtin, mutex })
    }

    /// The kernel's symbols.
    pub(super) fn symbols(&self) -> Symbols {
        self.builtin.symbols()
    }

    /// `STABLE_NODE_DUP_HEAD`: the `head` of a node on a chain.
    pub(super) fn dup_head(&self) -> *mut raw::list_head {
        // SAFETY: Only names a field of the list's head.
        unsafe { (&raw mut (*self.symbols().migrate_nodes()).prev).cast() }
    }

    /// The cache of stable nodes.
    pub(super) fn nodes_cache(&self) -> Option<KmemCache<layout::ksm_stable_node>> {
        let cache = NonNull::new(self.symbols().stable_node_cache())?;
        // SAFETY: The built-in made the cache for such nodes, at boot.
        Some(unsafe { KmemCache::new(cache) })
    }

    /// The cache of rmap items.
    pub(super) fn items_cache(&self) -> Option<KmemCache<layout::ksm_rmap_item>> {
        let cache = NonNull::new(self.symbols().rmap_item_cache())?;
        // SAFETY: The built-in made the cache for such items, at boot.
        Some(unsafe { KmemCache::new(cache) })
    }

    /// The roots of the stable trees.
    pub(super) fn stable_roots(&self) -> impl Iterator<Item = NonNull<raw::rb_root>> {
        // SAFETY: Set at boot, or under the mutex.
        let roots = unsafe { ptr::read(self.symbols().root_stable_tree()) };
        self.roots(roots)
    }

    /// The roots of the unstable trees.
    pub(super) fn unstable_roots(&self) -> impl Iterator<Item = NonNull<raw::rb_root>> {
        // SAFETY: Set at boot, or under the mutex.
        let roots = unsafe { ptr::read(self.symbols().root_unstable_tree()) };
        self.roots(roots)
    }

    fn roots(&self, roots: *mut raw::rb_root) -> impl Iterator<Item = NonNull<raw::rb_root>> {
        let nids = self.builtin.nids(&self.mutex);
        // There is a root for each of these numbers.
        (0..nids).filter_map(move |nid| NonNull::new(roots.wrapping_add(nid)))
    }
}

/// The built-in's counters of what is merged.
#[derive(Default)]
pub(super) struct Counters {
    /// `ksm_pages_shared`: nodes with items.
    pub(super) shared: u64,
    /// `ksm_pages_sharing`: the other items on these nodes, but for one on each.
    pub(super) sharing: u64,
    /// `ksm_rmap_items`: items on any list of an mm.
    pub(super) items: u64,
    /// `ksm_stable_node_chains`.
    pub(super) chains: u64,
    /// `ksm_stable_node_dups`: nodes on chains.
    pub(super) dups: u64,
}

/// What a scanner has done: counts that go on whichever KSM scans.
#[derive(Clone, Copy)]
pub(crate) struct ScanProgress {
    /// Full scans that have ended since everything was unmerged.
    pub(crate) full_scans: u64,
    /// Pages that were looked at.
    pub(crate) pages_scanned: u64,
    /// Pages that smart scan passed over.
    pub(crate) pages_skipped: u64,
}

impl MergedPages {
    /// What the built-in's scanner has done; no full scans where their number cannot be found.
    pub(crate) fn progress(&self) -> ScanProgress {
        let symbols = self.symbols();
        let read = |counter: *mut c_ulong| {
            // SAFETY: Protected by the mutex.
            (unsafe { ptr::read(counter) }) as u64
        };
        ScanProgress {
            full_scans: symbols.ksm_scan_seqnr().map_or(0, |at| read(at.as_ptr())),
            pages_scanned: read(symbols.ksm_pages_scanned()),
            pages_skipped: read(symbols.ksm_pages_skipped()),
        }
    }

    /// Lets the built-in's scanner have done that.
    pub(super) fn set_progress(&self, progress: ScanProgress) {
        let symbols = self.symbols();
        let write = |counter: *mut c_ulong, value: u64| {
            // SAFETY: Protected by the mutex. Readers of the files read it with no lock, so whole.
            unsafe { ptr::write_volatile(counter, value as c_ulong) }
        };
        if let Some(at) = symbols.ksm_scan_seqnr() {
            write(at.as_ptr(), progress.full_scans);
        }
        write(symbols.ksm_pages_scanned(), progress.pages_scanned);
        write(symbols.ksm_pages_skipped(), progress.pages_skipped);
    }

    /// The counters of what is merged.
    pub(super) fn counters(&self) -> Counters {
        let [shared, sharing, items, chains, dups] = self.merged_counters().map(|counter| {
            // SAFETY: Protected by the mutex.
            (unsafe { ptr::read(counter) }) as u64
        });
        Counters {
            shared,
            sharing,
            items,
            chains,
            dups,
        }
    }

    fn merged_counters(&self) -> [*mut c_ulong; 5] {
        let symbols = self.symbols();
        [
            symbols.ksm_pages_shared(),
            symbols.ksm_pages_sharing(),
            symbols.ksm_rmap_items(),
            symbols.ksm_stable_node_chains(),
            symbols.ksm_stable_node_dups(),
        ]
    }

    /// Counts that nothing is merged or tracked.
    ///
    /// # Context
    ///
    /// Any.
    pub(super) fn clear_counters(&self) {
        for counter in Iterator::chain(
            self.merged_counters().into_iter(),
            [self.symbols().ksm_pages_unshared()],
        ) {
            // SAFETY: Protected by the mutex. Readers of the files read it with no lock, so whole.
            unsafe { ptr::write_volatile(counter, 0) };
        }
    }

    /// Counts what has been added.
    ///
    /// # Context
    ///
    /// Any.
    pub(super) fn add_counters(&self, added: &Counters) {
        let added = [
            added.shared,
            added.sharing,
            added.items,
            added.chains,
            added.dups,
        ];
        for (counter, added) in self.merged_counters().into_iter().zip(added) {
            // SAFETY: As above.
            unsafe { ptr::write_volatile(counter, ptr::read(counter) + added as c_ulong) };
        }
    }
}

/// Reschedules if necessary.
///
/// # Context
///
/// May sleep.
pub(super) fn cond_resched() {
    // SAFETY: The callers hold no spinlock.
    unsafe { raw::rksm_cond_resched() };
}
