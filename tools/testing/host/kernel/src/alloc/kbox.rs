// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's `Box`.

use super::{
    allocator::{
        KVmalloc,
        Kmalloc,
        Vmalloc, //
    },
    AllocError,
    Allocator,
    Flags, //
};

use crate::{
    fmt,
    testing, //
};

use core::{
    marker::PhantomData,
    mem::MaybeUninit,
    ops::{
        Deref,
        DerefMut, //
    },
    pin::Pin, //
};

/// The kernel's `Box` type: a value of its own allocation.
pub struct Box<T, A: Allocator> {
    // Empty only while `into_inner()` takes the value out.
    value: Option<std::boxed::Box<T>>,
    _p: PhantomData<A>,
}

/// A [`Box`] made by `kmalloc()`.
pub type KBox<T> = Box<T, Kmalloc>;

/// A [`Box`] made by `vmalloc()`.
pub type VBox<T> = Box<T, Vmalloc>;

/// A [`Box`] made by `kvmalloc()`.
pub type KVBox<T> = Box<T, KVmalloc>;

impl<T, A: Allocator> Box<T, A> {
    /// Creates a new `Box<T, A>` and initializes its contents with `x`.
    pub fn new(x: T, _flags: Flags) -> Result<Self, AllocError> {
        testing::request()?;
        testing::resized(0, size_of::<T>());
        Ok(Self {
            value: Some(std::boxed::Box::new(x)),
            _p: PhantomData,
        })
    }

    /// Constructs a new `Pin<Box<T, A>>`.
    pub fn pin(x: T, flags: Flags) -> Result<Pin<Box<T, A>>, AllocError>
    where
        T: Unpin,
        A: 'static,
    {
        Ok(Pin::new(Self::new(x, flags)?))
    }

    /// Creates a new `Box<T, A>` with uninitialized contents.
    pub fn new_uninit(_flags: Flags) -> Result<Box<MaybeUninit<T>, A>, AllocError> {
        testing::request()?;
        testing::resized(0, size_of::<T>());
        Ok(Box {
            value: Some(std::boxed::Box::new_uninit()),
            _p: PhantomData,
        })
    }

    /// Consumes the `Box<T, A>` and returns a raw pointer.
    pub fn into_raw(mut b: Self) -> *mut T {
        std::boxed::Box::into_raw(b.value.take().expect("full until consumed"))
    }

    /// Creates a new `Box<T, A>` from a raw pointer.
    ///
    /// # Safety
    ///
    /// `raw` is what [`Box::into_raw`] returned, and is not used any more.
    #[expect(unsafe_code, reason = "the kernel's own is unsafe, too")]
    pub unsafe fn from_raw(raw: *mut T) -> Self {
        Self {
            // SAFETY: By the contract.
            value: Some(unsafe { std::boxed::Box::from_raw(raw) }),
            _p: PhantomData,
        }
    }

    /// Moves the value out of the [`Box`].
    pub fn into_inner(mut b: Self) -> T {
        testing::resized(size_of::<T>(), 0);
        *b.value.take().expect("full until consumed")
    }
}

impl<T, A: Allocator> Deref for Box<T, A> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("full until consumed")
    }
}

impl<T, A: Allocator> DerefMut for Box<T, A> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("full until consumed")
    }
}

impl<T: fmt::Debug, A: Allocator> fmt::Debug for Box<T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl<T: fmt::Display, A: Allocator> fmt::Display for Box<T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&**self, f)
    }
}

impl<T, A: Allocator> Drop for Box<T, A> {
    fn drop(&mut self) {
        if self.value.is_some() {
            testing::resized(size_of::<T>(), 0);
        }
    }
}
