// SPDX-License-Identifier: GPL-2.0-only

//! Taking over what the built-in has merged, and handing it back, with no page unmerged.
//!
//! # Locks
//!
//! `thread_mutex` and the built-in's `ksm_thread_mutex` are held for the whole of either. Inside
//! are taken, one at a time, `mmlist_lock` and `ksm_mmlist_lock`, and the folio lock of a node that
//! loses an item of an mm that is exiting. The files are held, so that of others only who takes
//! memory offline waits for these two.

use crate::{
    engine::{
        backend::{
            Backend as _,
            StableNodes as _, //
        },
        mm_list::MmList,
        registry::Claim,
        scan::Engine,
        stats::Counters,
        types::SlotId, //
    },
    kernel_ext::{
        gfp::GFP_METADATA,
        ksm_objects::BuiltinItem,
        mm::PinnedMm,
        race_window,
        wait::signal_pending, //
    },
    ksm::stable_nodes::StableNodes,
    service::{
        Ksm,
        ScanState, //
    },
    takeover::{
        hand_back::{
            ItemList,
            Return, //
        },
        inventory::{
            Heir,
            Inventory,
            Unfit, //
        },
        merged_pages::{
            MergedPages,
            ScanProgress, //
        }, //
    }, //
};
use kernel::{
    prelude::*,
    sync::lock::mutex::MutexGuard,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Microseconds between two looks at whether memory is still going offline.
const OFFLINE_USECS: i64 = 10_000;

/// The engine, and which of its slots the slots of an inventory are.
struct Successor<'a> {
    engine: &'a mut Engine<StableNodes>,
    slots: KVVec<Option<SlotId>>,
}

/// Most nodes that are put into the built-in's trees, which takes a look at some twenty pages each;
/// with a `max_page_sharing` that is small, most nodes are full.
const MAX_IN_TREES: usize = 1 << 20;

/// Goes on counting from what another scanner has done.
fn go_on(counters: &mut Counters, progress: ScanProgress) {
    counters.full_scans = progress.full_scans;
    counters.pages_scanned = progress.pages_scanned;
    counters.pages_skipped = progress.pages_skipped;
}

impl Heir for Successor<'_> {
    fn nodes(&mut self) {
        self.engine.metadata.backend().take_nodes();
    }

    fn item(&mut self, nth: usize, mm: &PinnedMm, addr: usize, item: BuiltinItem) {
        let metadata = &mut self.engine.metadata;
        let id = StableNodes::item_id(&item);
        let slot = self.slots.get(nth).copied().flatten();
        let page = slot.and_then(|slot| metadata.inherited(slot, addr));
        metadata.backend().take_item(item, mm, page);
        if page.is_none() {
            // The mm is exiting.
            let _ = metadata.backend().release_item(id);
            metadata.backend().account_tracked(mm, -1);
        }
    }
}

impl Ksm {
    /// Keeps both scanners and the removal of memory out.
    ///
    /// # Context
    ///
    /// Sleeps for as long as memory is going offline, with neither lock. Takes `thread_mutex`, then
    /// `ksm_thread_mutex`.
    fn lock_both(&self) -> (MutexGuard<'_, ScanState>, MergedPages) {
        loop {
            let state = self.waiting(|mutex| mutex.lock());
            if !self.offlining() {
                if let Some(merged) = MergedPages::lock(self.builtin) {
                    return (state, merged);
                }
            }
            drop(state);
            fsleep(Delta::from_micros(OFFLINE_USECS));
        }
    }

    /// Takes over all that the built-in has merged. Its scanner is stopped, and `rksmd` does not
    /// scan yet.
    ///
    /// First all is noted that will be needed; from [`Inventory::take`] on nothing can fail.
    ///
    /// # Context
    ///
    /// May sleep. Takes `thread_mutex`, then `ksm_thread_mutex`.
    ///
    /// # Errors
    ///
    /// [`Unfit::NoMemory`], [`Unfit::Interrupted`] after a signal, [`Unfit::Unknown`] where the
    /// built-in does not have it as `mm/ksm.c` should. Nothing has changed then.
    pub(crate) fn adopt(&self) -> Result<(), Unfit> {
        let knobs = self.knobs();
        let (mut state, merged) = self.lock_both();
        let inventory = merged.inventory()?;
        let mut successor = Successor {
            engine: &mut state.engine,
            slots: KVVec::new(),
        };
        if let Err(error) = self.prepare(&inventory, &mut successor) {
            successor.engine.metadata.backend().forget_noted_nodes();
            successor.engine.metadata.disinherit();
            return Err(error);
        }
        race_window::sleep();
        let progress = inventory.merged().progress();
        inventory.take(&mut successor);
        let metadata = &mut state.engine.metadata;
        go_on(&mut metadata.counters, progress);
        race_window::sleep();
        // A search looks at the first nodes of a chain only: these are to have room.
        for full in [true, false] {
            let mut at = None;
            while let Some(node) = metadata.backend().next(at) {
                at = Some(node);
                let mappings = metadata.backend().mappings(node);
                if (mappings >= knobs.max_page_sharing) == full {
                    let across = knobs.merge_across_nodes;
                    metadata.inherit_node(node, across, knobs.max_page_sharing);
                }
            }
        }
        self.publish(&state);
        drop(state);
        self.kick_housekeeping();
        Ok(())
    }

    /// Notes all merged pages, with all the memory that is needed for them. Mms that are exiting
    /// are not registered, and get no number.
    ///
    /// # Errors
    ///
    /// [`Unfit::NoMemory`], [`Unfit::Interrupted`]. Notes remain.
    fn prepare(&self, inventory: &Inventory, successor: &mut Successor<'_>) -> Result<(), Unfit> {
        for (mm, items) in inventory.slots() {
            let (mut slot, mut result) = (None, Ok(()));
            self.visit_key(mm.as_ptr() as usize, |claim: &Claim<PinnedMm>| {
                slot = Some(claim.id());
                let metadata = &mut successor.engine.metadata;
                result = { items }.try_for_each(|(addr, item)| {
                    metadata.inherit(claim.id(), addr, StableNodes::item_id(&item))
                });
                metadata.tracks(claim.id())
            });
            result.map_err(|_| Unfit::NoMemory)?;
            successor.slots.push(slot, GFP_METADATA)?;
            if signal_pending() {
                return Err(Unfit::Interrupted);
            }
        }
        for node in inventory.nodes() {
            let noted = successor.engine.metadata.backend().note_node(node);
            noted.map_err(|_| Unfit::NoMemory)?;
        }
        Ok(())
    }

    /// Goes on counting from what the built-in's scanner has done, which has nothing merged.
    ///
    /// # Context
    ///
    /// May sleep. Takes `thread_mutex`, then `ksm_thread_mutex`.
    pub(crate) fn follow(&self) {
        let (mut state, merged) = self.lock_both();
        go_on(&mut state.engine.metadata.counters, merged.progress());
        self.publish(&state);
    }

    /// Forgets all mms, where nothing has been taken over. The probes are gone.
    ///
    /// # Context
    ///
    /// May sleep. Takes `thread_mutex`.
    pub(crate) fn forget_mms(&self) {
        let mut state = self.thread_mutex.lock();
        self.clear(|slot, mm| state.engine.metadata.forget_mm(slot, mm));
    }

    /// Hands everything that is merged back to the built-in, whose scanner is stopped, and forgets
    /// all mms and pages. The thread and the probes are gone.
    ///
    /// It cannot fail. With the parameter `check` the inventory is taken of what was handed back,
    /// and a rule that is broken is a warning in the log.
    ///
    /// # Context
    ///
    /// May sleep. Takes `thread_mutex`, then `ksm_thread_mutex`.
    pub(crate) fn hand_over(&self) {
        let knobs = self.knobs();
        let (mut state, merged) = self.lock_both();
        // A smaller pool needs no memory, so this does not fail.
        let _ = state.pool.resize(self.symbols, 1);
        self.hand_back_zero_pages();
        let mut back = Return::begin(merged);
        let metadata = &mut state.engine.metadata;
        let counters = metadata.counters;
        metadata.backend().begin_hand_back();
        back.for_each_live_mm(|mm| {
            let mut list = ItemList::default();
            self.visit_key(mm.as_ptr() as usize, |claim: &Claim<PinnedMm>| {
                metadata.bequeath(claim.id(), claim.mm(), |backend, item| {
                    if let Some(item) = backend.give_item(item) {
                        list.push(item);
                    }
                });
                false
            });
            list
        });
        race_window::sleep();
        // Mms that are exiting keep what they map, but no items.
        self.clear(|slot, mm| metadata.forget_mm(slot, mm));
        race_window::sleep();
        metadata.remove_all_nodes();
        let (mut at, mut trees_left) = (None, MAX_IN_TREES);
        while let Some((id, node)) = metadata.backend().give_node(at) {
            at = Some(id);
            let backend = metadata.backend();
            let nid = backend
                .page_nid(&node)
                .filter(|_| trees_left > 0 && !backend.can_wait(&node, knobs.max_page_sharing));
            match nid {
                Some(nid) => {
                    trees_left -= 1;
                    let nid = if knobs.merge_across_nodes { 0 } else { nid };
                    back.insert_node(node, nid, |a, b| backend.compare(a, b));
                }
                None => back.list_node(node),
            }
        }
        let progress = ScanProgress {
            full_scans: counters.full_scans,
            pages_scanned: counters.pages_scanned,
            pages_skipped: counters.pages_skipped,
        };
        if let Some(what) = back.end(progress, self.check) {
            pr_err!("handed back what is not right: {what}\n");
            kernel::warn_on!(true);
        }
    }
}
