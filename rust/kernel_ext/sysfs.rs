// SPDX-License-Identifier: GPL-2.0-only

//! Directories of sysfs with files of our own in them.
//!
//! C headers: [`include/linux/kobject.h`](srctree/include/linux/kobject.h),
//! [`include/linux/sysfs.h`](srctree/include/linux/sysfs.h)

use crate::{
    bindings::raw,
    kernel_ext::symbols::Symbols, //
};
use core::{
    ptr::NonNull,
    slice, //
};
use kernel::{
    error::to_result,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// Answers reads and writes of files. `A` says which file.
///
/// Called in process context, in several threads at once, and may sleep.
pub(crate) trait AttributeHandler<A>: Send + Sync + 'static {
    /// Reads a file: fills `text`, which has [`PAGE_SIZE`] zeroed bytes, and returns how many.
    ///
    /// # Errors
    ///
    /// Any errno is what `read()` returns.
    fn show(&self, attribute: A, text: &mut [u8]) -> Result<usize>;

    /// Writes a file. `data` is what was written, at most a page, as it was; it may contain
    /// anything.
    ///
    /// # Errors
    ///
    /// Any errno is what `write()` returns. On success that is the length of `data`.
    fn store(&self, attribute: A, data: &[u8]) -> Result;
}

/// What a function of an attribute returns for an error.
pub(crate) fn to_errno(error: Error) -> isize {
    error.to_errno() as isize
}

/// A directory of our own below `/sys/kernel/mm`, and the files in it.
///
/// Dropping it removes the directory with everything in it, and waits until no reader or writer is
/// inside a handler of its files. Descriptors that stay open get `ENODEV`.
///
/// # Invariants
///
/// `kobj` has been added, and one reference to it is ours. Every file of it is in `files`.
pub(crate) struct Directory<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> {
    kobj: NonNull<raw::kobject>,
    handler: Arc<H>,
    files: KVec<Pin<KBox<OwnAttribute<A, H>>>>,
}

// SAFETY: A kobject may be used from every thread; `A` and `H` are `Send` and `Sync`.
unsafe impl<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> Send for Directory<A, H> {}
// SAFETY: There is nothing to do with a shared reference but to create a subdirectory, which sysfs
// synchronises.
unsafe impl<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> Sync for Directory<A, H> {}

impl<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> Directory<A, H> {
    /// Creates the directory `name` in `/sys/kernel/mm`.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, also if there is something of that name.
    pub(crate) fn in_mm(symbols: Symbols, name: &CStr, handler: Arc<H>) -> Result<Self> {
        // SAFETY: The kernel's kobject is there for ever.
        unsafe { Self::create(symbols.mm_kobj(), name, handler) }
    }

    /// Creates the directory `name` in `parent`.
    ///
    /// It should be dropped before `parent`, which otherwise takes it out of sysfs when it goes.
    /// That is safe: the kobject holds a reference to its parent, and its own removal then finds
    /// nothing left to do.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, also if there is something of that name.
    pub(crate) fn in_directory<B, G>(
        parent: &Directory<B, G>,
        name: &CStr,
        handler: Arc<H>,
    ) -> Result<Self>
    where
        B: Copy + Send + Sync + 'static,
        G: AttributeHandler<B>,
    {
        // SAFETY: By its invariant, `parent` has a kobject that has been added.
        unsafe { Self::create(parent.kobj.as_ptr(), name, handler) }
    }

    /// # Safety
    ///
    /// `parent` has been added, and is there during the call.
    unsafe fn create(parent: *mut raw::kobject, name: &CStr, handler: Arc<H>) -> Result<Self> {
        // SAFETY: By the contract; the name is copied. The type of such a kobject is the core's, so
        // that none of our code runs when its last reference goes.
        let kobj = unsafe { raw::kobject_create_and_add(name.as_char_ptr(), parent) };
        // INVARIANT: It has been added, the reference is ours, and it has no files.
        Ok(Self {
            kobj: NonNull::new(kobj).ok_or(ENOMEM)?,
            handler,
            files: KVec::new(),
        })
    }

    /// Adds the file `name`, which the handler answers as `attribute`. It can be written to if its
    /// `mode` has a permission to write.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `EEXIST` if there is such a file, `ENOMEM`.
    pub(crate) fn add(&mut self, name: &'static CStr, mode: u16, attribute: A) -> Result {
        // First, as nothing can fail after the file is there.
        self.files.reserve(1, GFP_KERNEL)?;
        let handler = self.handler.clone();
        let file = KBox::pin_init(
            pin_init!(OwnAttribute {
                attr <- Opaque::zeroed(),
                attribute,
                handler,
            }),
            GFP_KERNEL,
        )?;
        let attr = file.attr.get();
        // SAFETY: The attribute is not shared before it is added. From then on it stays where it is
        // until the directory has been removed, see `drop`; its name is there for ever. By the type
        // invariant, the kobject has been added.
        to_result(unsafe {
            (*attr).attr.name = name.as_char_ptr();
            (*attr).attr.mode = mode;
            raw::rksm_sysfs_attr_init(&raw mut (*attr).attr);
            raw::rksm_kobj_attribute_set(attr, Some(show::<A, H>), Some(store::<A, H>));
            raw::sysfs_create_file_ns(
                self.kobj.as_ptr(),
                &raw const (*attr).attr,
                core::ptr::null(),
            )
        })?;
        // INVARIANT: There is room, so the file that has been added is in `files` now.
        self.files.push(file, GFP_KERNEL)?;
        Ok(())
    }
}

impl<A: Copy + Send + Sync + 'static, H: AttributeHandler<A>> Drop for Directory<A, H> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it has been added, and the reference is ours. Removing the
        // directory removes its files and waits until nobody is in a function of one, so that
        // `files`, which is dropped after this, is not in use any more.
        unsafe {
            raw::kobject_del(self.kobj.as_ptr());
            raw::kobject_put(self.kobj.as_ptr());
        }
    }
}

/// A file of our own.
#[pin_data]
struct OwnAttribute<A, H> {
    #[pin]
    attr: Opaque<raw::kobj_attribute>,
    attribute: A,
    handler: Arc<H>,
}

/// The file of an attribute.
///
/// # Safety
///
/// `attr` is that of an `OwnAttribute<A, H>` which is there for as long as the result is used.
unsafe fn own<'a, A, H>(attr: *mut raw::kobj_attribute) -> &'a OwnAttribute<A, H> {
    // SAFETY: By the contract.
    unsafe { &*kernel::container_of!(Opaque::cast_from(attr), OwnAttribute<A, H>, attr) }
}

/// Answers a read of a file of our own.
///
/// # Safety
///
/// To be called by sysfs only, as `show` of the attribute of an `OwnAttribute<A, H>`.
unsafe extern "C" fn show<A: Copy, H: AttributeHandler<A>>(
    _kobj: *mut raw::kobject,
    attr: *mut raw::kobj_attribute,
    text: *mut c_char,
) -> isize {
    // SAFETY: sysfs gives the attribute that this is a function of, and its removal waits for the
    // return of this function.
    let own = unsafe { own::<A, H>(attr) };
    // SAFETY: sysfs gives a zeroed page, which nobody else uses during the call.
    let page = unsafe { slice::from_raw_parts_mut(text.cast::<u8>(), PAGE_SIZE) };
    own.handler
        .show(own.attribute, page)
        .map_or_else(to_errno, |len| len as isize)
}

/// Answers a write to a file of our own.
///
/// # Safety
///
/// To be called by sysfs only, as `store` of the attribute of an `OwnAttribute<A, H>`.
unsafe extern "C" fn store<A: Copy, H: AttributeHandler<A>>(
    _kobj: *mut raw::kobject,
    attr: *mut raw::kobj_attribute,
    data: *const c_char,
    len: usize,
) -> isize {
    // SAFETY: sysfs gives the attribute that this is a function of, and its removal waits for the
    // return of this function.
    let own = unsafe { own::<A, H>(attr) };
    // SAFETY: sysfs gives `len` bytes, which nobody changes during the call.
    let data = unsafe { slice::from_raw_parts(data.cast::<u8>(), len) };
    own.handler
        .store(own.attribute, data)
        .map_or_else(to_errno, |()| len as isize)
}
