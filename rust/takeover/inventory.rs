// SPDX-License-Identifier: GPL-2.0-only

//! Takes stock of all that the built-in has merged, and takes it away.
//!
//! The layouts of its objects are compared with the running kernel's when the module is loaded;
//! their rules are known from its source only. So what is found is checked against the rules that
//! `mm/ksm.c` keeps, and against its counters, before anything is changed:
//!
//! - ksmd's cursor is at the head of the list of slots, or at one of them;
//! - the lists of items have `ksm_rmap_items` items, each of the slot's mm, in ascending order of
//!   their addresses, with the flags of none, of an unstable or of a stable item;
//! - each node's `hlist` has as many items as the node says, each with that node as its head, the
//!   flag of a stable item and a link back;
//! - nodes, the items on them, and chains are as many as the counters say, and no item is on a node
//!   but not on a list of an mm.
//!
//! With the mutex held all of that is exact, and allocating and checking is all that can fail.

use crate::{
    bindings::raw::{
        self,
        layout, //
    },
    kernel_ext::{
        compat::{
            ItemLinks,
            ITEM_LINKS, //
        },
        gfp::GFP_METADATA,
        ksm_objects::{
            BuiltinItem,
            BuiltinNode,
            STABLE_FLAG, //
        },
        mm::PinnedMm,
        race_window, //
    },
    takeover::{
        builtin::MmlistLock,
        merged_pages::{
            cond_resched,
            flags,
            DupLinks,
            Item,
            MergedPages,
            Node,
            Slot,
            SEQNR_MASK,
            STABLE_NODE_CHAIN,
            UNSTABLE_FLAG, //
        }, //
    }, //
};
use core::{
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    alloc::AllocError,
    mm::Mm,
    page::PAGE_SIZE,
    prelude::*, //
};

/// Why the built-in's merged pages are not taken over. Nothing has changed then.
pub(crate) enum Unfit {
    /// There is no memory.
    NoMemory,
    /// A signal came.
    Interrupted,
    /// Something is not as `mm/ksm.c` should have it, which is named.
    Unknown(&'static str),
}

impl From<AllocError> for Unfit {
    fn from(_: AllocError) -> Self {
        Self::NoMemory
    }
}

/// All that the built-in has merged.
///
/// # Invariants
///
/// Each slot of `slots` is there, and has rmap items; no other slot has any. `nodes` and `chains`
/// are all stable nodes, and are there. `cursor` is where ksmd has its current slot.
pub(crate) struct Inventory {
    merged: MergedPages,
    cursor: NonNull<*mut layout::ksm_mm_slot>,
    slots: KVVec<Slot>,
    nodes: KVVec<Node>,
    chains: KVVec<Node>,
}

/// Who gets what [`Inventory::take`] takes away.
pub(crate) trait Heir {
    /// The nodes are in no tree and on no list any more.
    fn nodes(&mut self);

    /// An item is on no list of an mm any more. `nth` is the number of its slot, as
    /// [`Inventory::slots`] has them.
    ///
    /// # Context
    ///
    /// May sleep.
    fn item(&mut self, nth: usize, mm: &PinnedMm, addr: usize, item: BuiltinItem);
}

/// The rmap items of a slot, linked by `rmap_list`.
struct Items(Option<Item>);

impl Iterator for Items {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        let item = self.0?;
        // SAFETY: Items on the list are there, and only a scanner changes it. The next one is read
        // before the caller has this one.
        self.0 = NonNull::new(unsafe { (*item.as_ptr()).rmap_list });
        Some(item)
    }
}

impl MergedPages {
    /// Takes stock of all that the built-in has merged.
    ///
    /// # Context
    ///
    /// May sleep, for as long as a look at each item takes. Takes `ksm_mmlist_lock`.
    ///
    /// # Errors
    ///
    /// [`Unfit::NoMemory`], and [`Unfit::Unknown`] if a rule is broken. Nothing has changed.
    pub(crate) fn inventory(self) -> Result<Inventory, Unfit> {
        let mut inventory = Inventory {
            slots: self.slots_with_items()?,
            nodes: KVVec::new(),
            chains: KVVec::new(),
            cursor: self.cursor().ok_or(Unfit::Unknown("where ksmd stands"))?,
            merged: self,
        };
        let items = inventory.check_slots()?;
        inventory.find_nodes()?;
        inventory.check_nodes(items)?;
        Ok(inventory)
    }

    /// The slots with rmap items. While the scanner is kept out they stay, whatever their mms do.
    fn slots_with_items(&self) -> Result<KVVec<Slot>, Unfit> {
        let mut slots = KVVec::new();
        loop {
            let list = MmlistLock::lock(self.builtin);
            // SAFETY: A slot on the list is there while the lock is held.
            let has_items = |slot: &Slot| unsafe { !(*slot.as_ptr()).rmap_list.is_null() };
            let wanted = list.slots().filter(has_items).count();
            if wanted <= slots.capacity() {
                for slot in list.slots().filter(has_items) {
                    // The capacity was just looked at: nothing is allocated under the lock.
                    let _ = slots.push_within_capacity(slot);
                }
                return Ok(slots);
            }
            drop(list);
            // Exits only make them fewer.
            slots.reserve(wanted, GFP_METADATA)?;
        }
    }

    /// Where the built-in's scanner has its current slot, if the kernel has that as this module
    /// takes it.
    fn cursor(&self) -> Option<NonNull<*mut layout::ksm_mm_slot>> {
        let cursor = self.symbols().ksm_scan_mm_slot()?;
        let list = MmlistLock::lock(self.builtin);
        // SAFETY: It is an object of the kernel's, of the size of a pointer at least, and is
        // written under the lock that is held here.
        let slot = unsafe { cursor.read() };
        let head = self.symbols().ksm_mm_head();
        let known = slot == head || list.slots().any(|other| other.as_ptr() == slot);
        known.then_some(cursor)
    }
}

/// The mm of a slot, which is on the list or is kept off it here.
pub(super) fn mm_of(slot: Slot) -> PinnedMm {
    // SAFETY: The slot is there, and pins its mm.
    PinnedMm::mmgrab(unsafe { Mm::from_raw((*slot.as_ptr()).slot.mm) })
}

impl Inventory {
    /// The items of a slot.
    fn items(slot: Slot) -> Items {
        // SAFETY: By the invariant the slot is there. While the mutex is held nobody changes its
        // list but an owner of this.
        Items(NonNull::new(unsafe { (*slot.as_ptr()).rmap_list }))
    }

    /// What all is taken away from.
    pub(crate) fn merged(&self) -> &MergedPages {
        &self.merged
    }

    /// The mms with rmap items, in the order of their numbers, each with its items on stable nodes.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (PinnedMm, MergedItems)> + '_ {
        self.slots
            .iter()
            .map(|slot| (mm_of(*slot), MergedItems(Self::items(*slot))))
    }

    /// The stable nodes, but for chains.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = BuiltinNode> + '_ {
        self.nodes.iter().map(|node| {
            // SAFETY: By the invariant.
            unsafe { BuiltinNode::new(*node) }
        })
    }

    /// Checks the lists of items. Returns how many are on stable nodes.
    fn check_slots(&self) -> Result<u64, Unfit> {
        let counted = self.merged.counters().items;
        let (mut found, mut stable) = (0u64, 0);
        for slot in &self.slots {
            // SAFETY: By the invariant the slot is there.
            let mm = unsafe { (*slot.as_ptr()).slot.mm };
            let mut last = 0;
            for item in Self::items(*slot) {
                found += 1;
                if found > counted {
                    return Err(Unfit::Unknown("more rmap items than are counted"));
                }
                // SAFETY: The item is on the slot's list.
                let (address, of, flags) = unsafe {
                    let item = &*item.as_ptr();
                    (item.address, item.mm, flags(item.into()))
                };
                if of != mm || address - flags < last {
                    return Err(Unfit::Unknown(
                        "an rmap item of another mm, or out of order",
                    ));
                }
                last = address - flags + PAGE_SIZE;
                match flags {
                    STABLE_FLAG => stable += 1,
                    0 => {}
                    flags if flags & !SEQNR_MASK == UNSTABLE_FLAG => {}
                    _ => return Err(Unfit::Unknown("an rmap item with other flags")),
                }
                cond_resched();
            }
        }
        match found == counted {
            true => Ok(stable),
            false => Err(Unfit::Unknown("fewer rmap items than are counted")),
        }
    }

    /// Finds all stable nodes: those in trees, those on chains, those that wait on `migrate_nodes`.
    fn find_nodes(&mut self) -> Result<(), Unfit> {
        let mut dups = 0;
        for root in self.merged.stable_roots() {
            // SAFETY: The tree does not change while the mutex is held.
            let mut at = unsafe { raw::rb_first(root.as_ptr()) };
            while let Some(node) = NonNull::new(at.cast::<layout::ksm_stable_node>()) {
                cond_resched();
                // SAFETY: As above; a node in a tree begins with its link there.
                at = unsafe { raw::rb_next(at) };
                // SAFETY: A node in a tree is there.
                if unsafe { (*node.as_ptr()).rmap_hlist_len } == STABLE_NODE_CHAIN {
                    self.chains.push(node, GFP_METADATA)?;
                    dups += self.find_dups(node)?;
                } else {
                    self.nodes.push(node, GFP_METADATA)?;
                }
            }
        }
        let counters = self.merged.counters();
        if (self.chains.len() as u64, dups) != (counters.chains, counters.dups) {
            return Err(Unfit::Unknown("chains or dups that are not counted"));
        }
        self.find_listed()
    }

    /// Finds the dups of a chain. Returns their number.
    fn find_dups(&mut self, chain: Node) -> Result<u64, Unfit> {
        let mut found = 0;
        // SAFETY: The chain is in a tree.
        let mut link = unsafe { &raw mut (*chain.as_ptr()).hlist.first };
        // SAFETY: A chain has its dups on its list, linked by their `hlist_dup`.
        while let Some(dup) = NonNull::new(unsafe { *link }) {
            cond_resched();
            // SAFETY: As above.
            unsafe {
                let links =
                    kernel::container_of!(dup.as_ptr(), DupLinks, __bindgen_anon_1.hlist_dup);
                // A list that is not linked both ways might have no end.
                if (*dup.as_ptr()).pprev != link || (*links).head != self.merged.dup_head() {
                    return Err(Unfit::Unknown("a dup that is not on its chain"));
                }
                self.nodes
                    .push(NonNull::new_unchecked(links.cast()), GFP_METADATA)?;
                link = &raw mut (*dup.as_ptr()).next;
            }
            found += 1;
        }
        Ok(found)
    }

    /// Finds the nodes that wait on `migrate_nodes`.
    fn find_listed(&mut self) -> Result<(), Unfit> {
        let head = self.merged.symbols().migrate_nodes();
        let mut last = head;
        loop {
            cond_resched();
            // SAFETY: The list does not change while the mutex is held; nodes are on it by `list`.
            unsafe {
                let at = (*last).next;
                // A list that is not linked both ways might have no end.
                if (*at).prev != last {
                    return Err(Unfit::Unknown("a node that is not on its list"));
                }
                if at == head {
                    return Ok(());
                }
                let links = kernel::container_of!(at, DupLinks, __bindgen_anon_1.list);
                if (*links).head != head {
                    return Err(Unfit::Unknown("a node on the list with another head"));
                }
                self.nodes
                    .push(NonNull::new_unchecked(links.cast()), GFP_METADATA)?;
                last = at;
            }
        }
    }

    /// Checks the nodes and their lists of items, of which there are `items` in all.
    fn check_nodes(&self, items: u64) -> Result<(), Unfit> {
        let (mut shared, mut found) = (0u64, 0u64);
        for node in &self.nodes {
            // SAFETY: By the invariant the node is there. Only the built-in's scanner, which is
            // kept out, changes these.
            let (len, mut at) = unsafe {
                (
                    (*node.as_ptr()).rmap_hlist_len,
                    (*node.as_ptr()).hlist.first,
                )
            };
            let mut pprev = node
                .as_ptr()
                .wrapping_byte_add(offset_of!(layout::ksm_stable_node, hlist))
                .cast::<*mut raw::hlist_node>();
            let mut left = u64::try_from(len).map_err(|_| Unfit::Unknown("a chain among dups"))?;
            shared += u64::from(left > 0);
            found += left;
            while !at.is_null() {
                left = left
                    .checked_sub(1)
                    .ok_or(Unfit::Unknown("too many items on a node"))?;
                // SAFETY: Items are on the list by their `hlist`, and have the node as their head.
                unsafe {
                    let links = kernel::container_of!(at, ItemLinks, hlist);
                    let item = links
                        .wrapping_byte_sub(ITEM_LINKS)
                        .cast::<layout::ksm_rmap_item>();
                    let item = NonNull::new_unchecked(item);
                    if (*links).head != node.as_ptr()
                        || (*at).pprev != pprev
                        || flags(item) != STABLE_FLAG
                    {
                        return Err(Unfit::Unknown("an item that is not on its node"));
                    }
                    pprev = &raw mut (*at).next;
                    at = (*at).next;
                }
            }
            if left > 0 {
                return Err(Unfit::Unknown("too few items on a node"));
            }
            cond_resched();
        }
        let counters = self.merged.counters();
        match (shared, found, found - shared) == (counters.shared, items, counters.sharing) {
            true => Ok(()),
            false => Err(Unfit::Unknown("nodes and items that are not counted")),
        }
    }

    /// Takes everything away from the built-in, which has nothing merged then. Items that are on no
    /// stable node are freed, and so are chains, and the slots of mms that are exiting.
    ///
    /// It cannot fail: nothing is allocated.
    ///
    /// # Context
    ///
    /// May sleep. Takes `ksm_mmlist_lock`.
    pub(crate) fn take(self, heir: &mut impl Heir) {
        let merged = &self.merged;
        self.rest_cursor();
        for root in Iterator::chain(merged.stable_roots(), merged.unstable_roots()) {
            // SAFETY: Protected by the mutex.
            unsafe { (*root.as_ptr()).rb_node = ptr::null_mut() };
        }
        // SAFETY: Protected by the mutex.
        unsafe { raw::rksm_init_list_head(merged.symbols().migrate_nodes()) };
        merged.clear_counters();
        if let Some(cache) = merged.nodes_cache() {
            for chain in &self.chains {
                // SAFETY: A chain is in a tree only, which has been emptied.
                unsafe { cache.free(*chain) };
            }
        }
        race_window::sleep();
        heir.nodes();
        for (nth, slot) in self.slots.iter().enumerate() {
            self.take_slot(nth, *slot, heir);
        }
    }

    /// Takes the items of a slot away.
    /// Puts the cursor at rest, as between two full scans: what it says of items is not looked at
    /// then.
    ///
    /// An exit leaves the slot at the cursor to the scanner, also one without items. It goes here.
    fn rest_cursor(&self) {
        let head = self.merged.symbols().ksm_mm_head();
        let list = MmlistLock::lock(self.merged.builtin);
        // SAFETY: The place is written under the lock that is held here.
        let at = unsafe { self.cursor.replace(head) };
        let left = NonNull::new(at).filter(|slot| {
            // SAFETY: A slot at the cursor is on the list, of which the head is one, too.
            let idle = unsafe { (*slot.as_ptr()).rmap_list.is_null() };
            // It keeps its mm, so that what is dropped here is not the last pin.
            idle && slot.as_ptr() != head && mm_of(*slot).ksm_test_exit()
        });
        if let Some(slot) = left {
            unlist(&list, slot);
        }
        drop(list);
        if let Some(slot) = left {
            // SAFETY: It has just been taken off the list.
            unsafe { free_slot(slot) };
        }
    }

    fn take_slot(&self, nth: usize, slot: Slot, heir: &mut impl Heir) {
        let mm = mm_of(slot);
        race_window::sleep();
        let list = MmlistLock::lock(self.merged.builtin);
        let items = Self::items(slot);
        let exited = mm.ksm_test_exit();
        // SAFETY: By the invariant the slot is there. An exit that finds it with items leaves it to
        // the scanner, one that comes later finds it without and frees it, or finds none.
        unsafe { (*slot.as_ptr()).rmap_list = ptr::null_mut() };
        if exited {
            unlist(&list, slot);
        }
        drop(list);
        race_window::sleep();
        let mut freed = 0;
        for item in items {
            // SAFETY: The item is on no list of an mm any more, and only this knows it.
            let (addr, stable) = unsafe {
                let flags = flags(item);
                ((*item.as_ptr()).address - flags, flags == STABLE_FLAG)
            };
            if stable {
                // SAFETY: It is on a stable node, and whoever gets it frees it.
                heir.item(nth, &mm, addr, unsafe { BuiltinItem::new(item) });
            } else if let Some(cache) = self.merged.items_cache() {
                // SAFETY: It was in an unstable tree at most, which has been emptied.
                unsafe { cache.free(item) };
                freed += 1;
            }
            cond_resched();
        }
        // SAFETY: The mm is pinned. Only a scanner changes the count.
        unsafe { raw::rksm_mm_add_rmap_items(mm.as_ptr(), -freed) };
        if exited {
            // SAFETY: It has been taken off the list above.
            unsafe { free_slot(slot) };
        }
    }
}

/// Takes a slot that is there off the list and out of the hash.
fn unlist(_list: &MmlistLock, slot: Slot) {
    // SAFETY: The slot is on both, which the lock protects.
    unsafe {
        raw::rksm_hlist_del(&raw mut (*slot.as_ptr()).slot.hash);
        raw::rksm_list_del(&raw mut (*slot.as_ptr()).slot.mm_node);
    }
}

/// Frees a slot, and drops its pin of the mm.
///
/// # Context
///
/// May sleep.
///
/// # Safety
///
/// The slot has been taken off the list, and nothing uses it.
unsafe fn free_slot(slot: Slot) {
    // SAFETY: By the contract. `kfree` frees objects of any cache.
    unsafe {
        let mm = (*slot.as_ptr()).slot.mm;
        raw::kfree(slot.as_ptr().cast());
        raw::mmdrop(mm);
    }
}

/// The items of a slot that are on stable nodes, in ascending order of their addresses.
pub(crate) struct MergedItems(Items);

impl Iterator for MergedItems {
    type Item = (usize, BuiltinItem);

    fn next(&mut self) -> Option<(usize, BuiltinItem)> {
        loop {
            let item = self.0.next()?;
            // SAFETY: The item is on the slot's list.
            unsafe {
                if flags(item) == STABLE_FLAG {
                    return Some((
                        (*item.as_ptr()).address - STABLE_FLAG,
                        BuiltinItem::new(item),
                    ));
                }
            }
        }
    }
}
