// SPDX-License-Identifier: GPL-2.0-only

//! Files of our own in `/sys/kernel/mm/ksm`.

use crate::{
    bindings::raw,
    kernel_ext::symbols::Symbols,
    takeover::attributes::{
        to_errno, //
        Files,
    }, //
};
use core::slice;
use kernel::{
    error::to_result,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    types::Opaque, //
};

/// A file of our own in `/sys/kernel/mm/ksm`, which is gone when this is dropped. Dropping waits
/// for those who are in its handler.
///
/// # Invariants
///
/// If `added`, the file is there, and its attribute is `attr`.
#[pin_data(PinnedDrop)]
pub(crate) struct ExtraFile<F: Files> {
    #[pin]
    attr: Opaque<raw::kobj_attribute>,
    kobj: *mut raw::kobject,
    group: *const c_char,
    file: usize,
    handler: Arc<F>,
    added: Atomic<bool>,
}

// SAFETY: The kobject is the kernel's, live for ever; the attribute is only used by sysfs, from any
// thread. The handler is `Send` and `Sync`.
unsafe impl<F: Files> Send for ExtraFile<F> {}
// SAFETY: As above.
unsafe impl<F: Files> Sync for ExtraFile<F> {}

impl<F: Files> ExtraFile<F> {
    /// Adds the file `name`, which `handler` answers under the index `file`. With no permission to
    /// write in `mode`, it cannot be written.
    ///
    /// # Errors
    ///
    /// `EEXIST` if there is such a file, `ENOMEM`.
    pub(crate) fn add(
        symbols: Symbols,
        name: &'static CStr,
        mode: u16,
        file: usize,
        handler: Arc<F>,
    ) -> Result<Pin<KBox<Self>>> {
        let kobj = symbols.mm_kobj();
        // SAFETY: The kernel's group is constant.
        let group = unsafe { (*symbols.ksm_attr_group()).name };
        let added = KBox::pin_init(
            pin_init!(Self {
                attr <- Opaque::zeroed(),
                kobj,
                group,
                file,
                handler,
                added: Atomic::new(false),
            }),
            GFP_KERNEL,
        )?;
        let attr = added.attr.get();
        // SAFETY: The attribute is ours alone until it is added, is pinned, and is removed before
        // it goes.
        to_result(unsafe {
            (*attr).attr.name = name.as_char_ptr();
            (*attr).attr.mode = mode;
            raw::rksm_sysfs_attr_init(&raw mut (*attr).attr);
            raw::rksm_kobj_attribute_set(attr, Some(extra_show::<F>), Some(extra_store::<F>));
            raw::sysfs_add_file_to_group(kobj, &raw const (*attr).attr, group)
        })?;
        // INVARIANT: It is there now.
        added.added.store(true, Relaxed);
        Ok(added)
    }
}

#[pinned_drop]
impl<F: Files> PinnedDrop for ExtraFile<F> {
    fn drop(self: Pin<&mut Self>) {
        if !self.added.load(Relaxed) {
            return;
        }
        // SAFETY: By the type invariant. Waits until nobody is in its functions.
        unsafe {
            raw::sysfs_remove_file_from_group(
                self.kobj,
                &raw const (*self.attr.get()).attr,
                self.group,
            )
        };
    }
}

/// The file of an attribute.
///
/// # Safety
///
/// `attr` is that of an `ExtraFile<F>` which is not dropped meanwhile.
unsafe fn extra<'a, F: Files>(attr: *mut raw::kobj_attribute) -> &'a ExtraFile<F> {
    // SAFETY: By the contract.
    unsafe { &*kernel::container_of!(Opaque::cast_from(attr), ExtraFile<F>, attr) }
}

/// Answers a read of a file of our own.
///
/// # Safety
///
/// To be called by sysfs only, as `show` of the attribute of an `ExtraFile<F>`.
unsafe extern "C" fn extra_show<F: Files>(
    _kobj: *mut raw::kobject,
    attr: *mut raw::kobj_attribute,
    text: *mut c_char,
) -> isize {
    // SAFETY: sysfs gives the attribute that this is a function of, whose removal waits for us.
    // Then it gives a zeroed page, for us alone.
    let (extra, page) = unsafe {
        (
            extra::<F>(attr),
            slice::from_raw_parts_mut(text.cast::<u8>(), PAGE_SIZE),
        )
    };
    extra
        .handler
        .show(extra.file, page)
        .map_or_else(to_errno, |len| len as isize)
}

/// Answers a write to a file of our own.
///
/// # Safety
///
/// To be called by sysfs only, as `store` of the attribute of an `ExtraFile<F>`.
unsafe extern "C" fn extra_store<F: Files>(
    _kobj: *mut raw::kobject,
    attr: *mut raw::kobj_attribute,
    data: *const c_char,
    len: usize,
) -> isize {
    // SAFETY: As in `extra_show`. sysfs gives `len` bytes that nobody changes.
    let (extra, data) = unsafe {
        (
            extra::<F>(attr),
            slice::from_raw_parts(data.cast::<u8>(), len),
        )
    };
    extra
        .handler
        .store(extra.file, data)
        .map_or_else(to_errno, |()| len as isize)
}
