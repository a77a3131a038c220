// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's unexported symbols.
//!
//! `rust/helpers/symbols_list.h` names them. [`Symbols::resolve`] finds all of them, or none is
//! used: a caller of one of these functions, or of the address of one of these objects, must be
//! able to show a [`Symbols`].

use crate::bindings::raw;
use core::{
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{fmt, prelude::*};

/// Proof that every symbol of the list is resolved.
#[derive(Clone, Copy)]
pub(crate) struct Symbols(());

/// The vmlinux symbols of one name.
#[derive(Clone, Copy, Default)]
struct Matches {
    count: usize,
    address: usize,
}

/// The names that are not there exactly once, for one line of the log.
///
/// # Invariants
///
/// There is one entry for each symbol of the list, in its order.
struct Unusable<'a>(&'a [Matches]);

impl fmt::Display for Unusable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, matches) in self.0.iter().enumerate() {
            // SAFETY: By the invariant the list has a symbol `i`.
            let name = unsafe { name(i) }.to_str().unwrap_or_default();
            match matches.count {
                0 => write!(f, " {name}")?,
                1 => (),
                n => write!(f, " {name} ({n} of that name)")?,
            }
        }
        Ok(())
    }
}

impl Symbols {
    /// Finds every symbol, and makes the functions callable.
    ///
    /// Nothing of the kernel is changed.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT`, after one line in the log that names all those that are missing or ambiguous.
    pub(crate) fn resolve() -> Result<Self> {
        // kallsyms_lookup_name() would fall back to modules, where it would find our own functions
        // of the same names.
        const LOOKUP: &CStr = c"kallsyms_on_each_match_symbol";

        // SAFETY: `LOOKUP` is a C string.
        let lookup = unsafe { raw::rksm_kprobe_address(LOOKUP.as_char_ptr()) };
        if lookup == 0 {
            pr_err!("cannot load: no {LOOKUP:?} in this kernel, or no kprobes\n");
            return Err(ENOENT);
        }
        // SAFETY: The kernel has that function there, or just past the ENDBR at its start, which a
        // direct call may skip.
        unsafe { raw::rksm_kallsyms_set(lookup) };

        // SAFETY: Only reads the size of an array.
        let count = unsafe { raw::rksm_symbol_count() };
        let mut found = KVec::with_capacity(count, GFP_KERNEL)?;
        for i in 0..count {
            // SAFETY: `i` is below the count; the function has been set above.
            found.push(unsafe { matches(name(i)) }, GFP_KERNEL)?;
        }
        if found.iter().any(|matches| matches.count != 1) {
            // INVARIANT: One has been pushed for each symbol.
            pr_err!(
                "cannot load: symbols missing in this kernel:{}\n",
                Unusable(&found)
            );
            return Err(ENOENT);
        }
        for (i, matches) in found.iter().enumerate() {
            // SAFETY: `i` is below the count, and the address is that of the one symbol of vmlinux
            // that has this name. The list's prototypes are checked against the kernel's headers.
            unsafe { raw::rksm_symbol_set(i, matches.address) };
        }
        Ok(Self(()))
    }

    /// `mm_kobj`, `/sys/kernel/mm`.
    pub(crate) fn mm_kobj(self) -> *mut raw::kobject {
        // SAFETY: By the type invariant the pointer is resolved; set once at boot.
        unsafe { ptr::read(raw::rksm_data_mm_kobj()) }
    }

    /// `ksm_attr_group`, the files of `/sys/kernel/mm/ksm`.
    pub(crate) fn ksm_attr_group(self) -> *const raw::attribute_group {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_attr_group() }
    }

    /// `ksm_run`, written under [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_run(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_run() }
    }

    /// `ksm_thread_mutex`, which serializes the built-in's scanner and its users.
    pub(crate) fn ksm_thread_mutex(self) -> *mut raw::mutex {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_thread_mutex() }
    }

    /// `ksm_mmlist_lock`, which protects the list at [`Self::ksm_mm_head`].
    pub(crate) fn ksm_mmlist_lock(self) -> *mut raw::spinlock_t {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_mmlist_lock() }
    }

    /// `ksm_mm_head`, the slot that heads the built-in's list of mms.
    pub(crate) fn ksm_mm_head(self) -> *mut raw::layout::ksm_mm_slot {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_mm_head() }.cast()
    }

    /// `migrate_nodes`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn migrate_nodes(self) -> *mut raw::list_head {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_migrate_nodes() }
    }

    /// `root_stable_tree`, protected by [`Self::ksm_thread_mutex`]: a pointer to
    /// [`Self::ksm_nr_node_ids`] roots.
    pub(crate) fn root_stable_tree(self) -> *mut *mut raw::rb_root {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_root_stable_tree() }
    }

    /// `ksm_nr_node_ids`, protected by [`Self::ksm_thread_mutex`]; null without `CONFIG_NUMA`.
    pub(crate) fn ksm_nr_node_ids(self) -> *mut c_int {
        #[cfg(CONFIG_NUMA)]
        // SAFETY: Only reads a pointer that is resolved.
        return unsafe { raw::rksm_data_ksm_nr_node_ids() };
        #[cfg(not(CONFIG_NUMA))]
        ptr::null_mut()
    }

    /// `stable_node_cache`, made at boot: the slab cache of `struct ksm_stable_node`.
    pub(crate) fn stable_node_cache(self) -> *mut raw::kmem_cache {
        // SAFETY: By the type invariant the pointer is resolved; set once at boot.
        unsafe { ptr::read(raw::rksm_data_stable_node_cache()) }
    }

    /// `rmap_item_cache`, made at boot: the slab cache of `struct ksm_rmap_item`.
    pub(crate) fn rmap_item_cache(self) -> *mut raw::kmem_cache {
        // SAFETY: By the type invariant the pointer is resolved; set once at boot.
        unsafe { ptr::read(raw::rksm_data_rmap_item_cache()) }
    }

    /// `ksm_pages_shared`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_pages_shared(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_pages_shared() }
    }

    /// `ksm_pages_sharing`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_pages_sharing(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_pages_sharing() }
    }

    /// `ksm_pages_scanned`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_pages_scanned(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_pages_scanned() }
    }

    /// `ksm_pages_skipped`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_pages_skipped(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_pages_skipped() }
    }

    /// `ksm_pages_unshared`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_pages_unshared(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_pages_unshared() }
    }

    /// `ksm_stable_node_chains`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_stable_node_chains(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_stable_node_chains() }
    }

    /// `ksm_stable_node_dups`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_stable_node_dups(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_stable_node_dups() }
    }

    /// `root_unstable_tree`, protected by [`Self::ksm_thread_mutex`]: a pointer to
    /// [`Self::ksm_nr_node_ids`] roots.
    pub(crate) fn root_unstable_tree(self) -> *mut *mut raw::rb_root {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_root_unstable_tree() }
    }

    /// `ksm_scan`, where the built-in's scanner stands. `None` where the compiler has not kept it
    /// whole.
    ///
    /// # Context
    ///
    /// May sleep.
    fn ksm_scan(self) -> Option<NonNull<raw::layout::ksm_scan>> {
        self.find(c"ksm_scan")
    }

    /// The first member of `ksm_scan`, the current slot. Clang makes an object of its own of each
    /// member. `None` where the kernel has neither.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn ksm_scan_mm_slot(self) -> Option<NonNull<*mut raw::layout::ksm_mm_slot>> {
        let whole = self.ksm_scan().map(NonNull::cast);
        whole.or_else(|| self.find(c"ksm_scan.0"))
    }

    /// The last member of `ksm_scan`, the number of full scans; as [`Self::ksm_scan_mm_slot`].
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn ksm_scan_seqnr(self) -> Option<NonNull<c_ulong>> {
        match self.ksm_scan() {
            Some(scan) => {
                let offset = offset_of!(raw::layout::ksm_scan, seqnr);
                NonNull::new(scan.as_ptr().wrapping_byte_add(offset).cast())
            }
            None => self.find(c"ksm_scan.3"),
        }
    }

    /// Finds an object that not every kernel has.
    fn find<T>(self, name: &CStr) -> Option<NonNull<T>> {
        // SAFETY: `resolve` has set the function that looks symbols up.
        let found = unsafe { matches(name) };
        match found.count {
            1 => NonNull::new(found.address as *mut T),
            _ => None,
        }
    }

    /// `ksm_rmap_items`, protected by [`Self::ksm_thread_mutex`].
    pub(crate) fn ksm_rmap_items(self) -> *mut c_ulong {
        // SAFETY: Only reads a pointer that is resolved.
        unsafe { raw::rksm_data_ksm_rmap_items() }
    }
}

/// The name of symbol `i` of the list.
///
/// # Safety
///
/// `i` is below `rksm_symbol_count()`.
unsafe fn name(i: usize) -> &'static CStr {
    // SAFETY: Every entry of the list has a name, which is a string constant; by the contract there
    // is such an entry.
    unsafe { CStr::from_char_ptr(raw::rksm_symbol_name(i)) }
}

/// Looks up all symbols of vmlinux with the name `name`.
///
/// # Safety
///
/// `rksm_kallsyms_set()` has set the function that looks them up.
unsafe fn matches(name: &CStr) -> Matches {
    /// Counts a match.
    ///
    /// # Safety
    ///
    /// `data` is a `Matches` that nothing else refers to during the call.
    unsafe extern "C" fn count(data: *mut c_void, address: c_ulong) -> c_int {
        // SAFETY: By the contract.
        let found = unsafe { &mut *data.cast::<Matches>() };
        found.count += 1;
        found.address = address;
        0
    }

    let mut found = Matches::default();
    // SAFETY: By the contract the function that this calls has been set. `count` gets nothing but
    // `found`, which outlives the call.
    unsafe {
        raw::rksm_kallsyms_on_each_match_symbol(
            Some(count),
            name.as_char_ptr(),
            (&raw mut found).cast(),
        )
    };
    found
}
