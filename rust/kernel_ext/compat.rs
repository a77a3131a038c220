// SPDX-License-Identifier: GPL-2.0-only

//! Where the supported kernels differ, as seen from Rust: the counterpart of
//! `rust/helpers/compat.h`.
//!
//! Kbuild sets the cfgs by what the kernel's BTF has, and knows no versions.

use crate::bindings::raw::{
    self,
    layout::{
        self,
        ksm_rmap_item, //
    }, //
};
use core::{
    borrow::Borrow,
    mem::offset_of, //
};
use kernel::prelude::*;

/// The `head` and the `hlist` of an item on a node.
#[cfg(rksm_item_index)]
pub(crate) type ItemLinks = layout::ksm_rmap_item__bindgen_ty_3__bindgen_ty_1;
/// The `head` and the `hlist` of an item on a node.
#[cfg(not(rksm_item_index))]
pub(crate) type ItemLinks = layout::ksm_rmap_item__bindgen_ty_2__bindgen_ty_1;

/// Where an item has its [`ItemLinks`].
#[cfg(rksm_item_index)]
pub(crate) const ITEM_LINKS: usize = offset_of!(ksm_rmap_item, __bindgen_anon_3);
/// Where an item has its [`ItemLinks`].
#[cfg(not(rksm_item_index))]
pub(crate) const ITEM_LINKS: usize = offset_of!(ksm_rmap_item, __bindgen_anon_2);

/// Whether an item on a node has the page's index, by which an rmap walk finds the vmas. Where it
/// has none, the word is the scanner's own, and a walk goes through the whole `anon_vma`.
pub(crate) const ITEM_HAS_INDEX: bool = cfg!(rksm_item_index);

/// The name and the place of the word that is, or would be, an item's index.
#[cfg(rksm_item_index)]
pub(crate) const ITEM_INDEX: (&CStr, usize) = (
    c"linear_page_index",
    offset_of!(ksm_rmap_item, __bindgen_anon_2),
);
/// The name and the place of the word that is, or would be, an item's index.
#[cfg(not(rksm_item_index))]
pub(crate) const ITEM_INDEX: (&CStr, usize) =
    (c"oldchecksum", offset_of!(ksm_rmap_item, oldchecksum));

/// `ENODATA`, which not every kernel crate has.
pub(crate) fn no_data() -> Error {
    Error::from_errno(-(raw::ENODATA as c_int))
}

/// A full memory barrier; `kernel::sync::barrier` has it by two names.
pub(crate) fn smp_mb() {
    // SAFETY: Has no requirements.
    unsafe { raw::rksm_smp_mb() };
}

/// A module parameter's value, which some kernel crates give by reference.
pub(crate) fn param<T: Copy>(value: impl Borrow<T>) -> T {
    *value.borrow()
}

/// The module parameter `adopt`: not every `module!` takes a `bool`.
pub(crate) fn param_adopt() -> bool {
    // SAFETY: Only reads a variable that is set before the module's init.
    unsafe { raw::rksm_param_adopt() }
}

/// The module parameter `check`.
pub(crate) fn param_check() -> bool {
    // SAFETY: As above.
    unsafe { raw::rksm_param_check() }
}

/// Refuses kernels for which rksm can be compiled and is not right.
///
/// # Errors
///
/// `EOPNOTSUPP`, after one line in the log.
pub(crate) fn check_kernel() -> Result {
    if cfg!(CONFIG_PREEMPT_RT) {
        pr_err!("cannot load: a real-time kernel (CONFIG_PREEMPT_RT) is not supported: its spinlocks sleep\n");
        return Err(Error::from_errno(-(raw::EOPNOTSUPP as c_int)));
    }
    Ok(())
}
