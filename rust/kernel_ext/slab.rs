// SPDX-License-Identifier: GPL-2.0-only

//! Slab caches of the kernel's, with objects of a known type.
//!
//! C header: [`include/linux/slab.h`](srctree/include/linux/slab.h)

use crate::{
    bindings::raw,
    kernel_ext::gfp, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::alloc::Flags;

/// A slab cache whose objects are of the type `T`.
///
/// # Invariants
///
/// The cache is never destroyed. Its objects have the size of a `T` and are aligned for one.
pub(crate) struct KmemCache<T>(NonNull<raw::kmem_cache>, PhantomData<T>);

impl<T> KmemCache<T> {
    /// Makes one of a pointer.
    ///
    /// # Safety
    ///
    /// `cache` is a cache that is never destroyed, for objects of the size and with the alignment
    /// of a `T`.
    pub(crate) unsafe fn new(cache: NonNull<raw::kmem_cache>) -> Self {
        // INVARIANT: By the contract.
        Self(cache, PhantomData)
    }

    /// Allocates an object, and moves `value` there. `None` without memory; `value` is dropped.
    ///
    /// # Context
    ///
    /// Sleeps if `flags` allow it.
    pub(crate) fn alloc(&self, value: T, flags: Flags) -> Option<NonNull<T>> {
        // SAFETY: By the invariant the cache is there.
        let object = unsafe { raw::rksm_kmem_cache_alloc(self.0.as_ptr(), gfp::mask(flags)) };
        let object = NonNull::new(object.cast::<T>())?;
        // SAFETY: By the invariant the object has room for a `T`, and it is nobody else's.
        unsafe { object.write(value) };
        Some(object)
    }

    /// Frees an object, and returns what was in it.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Safety
    ///
    /// The object is one of this cache, nobody uses it any more, and it holds a `T`.
    pub(crate) unsafe fn free(&self, object: NonNull<T>) -> T {
        // SAFETY: By the contract.
        unsafe {
            let value = object.read();
            raw::kmem_cache_free(self.0.as_ptr(), object.as_ptr().cast());
            value
        }
    }
}
