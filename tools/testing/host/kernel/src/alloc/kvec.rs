// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's `Vec`, over the standard one. Capacities grow exactly as the kernel's do.

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
    error::{
        code::EINVAL,
        Error, //
    },
    fmt,
    testing, //
};

use core::{
    marker::PhantomData,
    ops::{
        Deref,
        DerefMut,
        Index,
        IndexMut, //
    },
    slice::SliceIndex, //
};

/// The kernel's `Vec` type: growable, each growth can fail.
pub struct Vec<T, A: Allocator> {
    inner: std::vec::Vec<T>,
    _p: PhantomData<A>,
}

/// A [`Vec`] made by `kmalloc()`.
pub type KVec<T> = Vec<T, Kmalloc>;

/// A [`Vec`] made by `vmalloc()`.
pub type VVec<T> = Vec<T, Vmalloc>;

/// A [`Vec`] made by `kvmalloc()`.
pub type KVVec<T> = Vec<T, KVmalloc>;

/// Error type for [`Vec::push_within_capacity`].
pub struct PushError<T>(pub T);

/// Error type for [`Vec::remove`].
pub struct RemoveError;

/// Error type for [`Vec::insert_within_capacity`].
pub enum InsertError<T> {
    /// The value could not be inserted because the index is out of bounds.
    IndexOutOfBounds(T),
    /// The value could not be inserted because the vector is out of capacity.
    OutOfCapacity(T),
}

impl<T> fmt::Debug for PushError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Not enough capacity")
    }
}

impl fmt::Debug for RemoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Index out of bounds")
    }
}

impl<T> fmt::Debug for InsertError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InsertError::IndexOutOfBounds(_) => f.write_str("Index out of bounds"),
            InsertError::OutOfCapacity(_) => f.write_str("Not enough capacity"),
        }
    }
}

impl<T> From<PushError<T>> for Error {
    fn from(_: PushError<T>) -> Error {
        EINVAL
    }
}

impl From<RemoveError> for Error {
    fn from(_: RemoveError) -> Error {
        EINVAL
    }
}

impl<T> From<InsertError<T>> for Error {
    fn from(_: InsertError<T>) -> Error {
        EINVAL
    }
}

impl<T, A: Allocator> Vec<T, A> {
    /// Returns the number of elements that can be stored without allocating.
    #[inline]
    pub fn capacity(&self) -> usize {
        if size_of::<T>() == 0 {
            usize::MAX
        } else {
            self.inner.capacity()
        }
    }

    /// Returns the number of elements stored within the vector.
    #[inline]
    pub fn len(&self) -> usize {
        self.inner.len()
    }

    /// Returns `true` if the vector contains no elements.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.inner.is_empty()
    }

    /// Returns a slice of the entire vector.
    #[inline]
    pub fn as_slice(&self) -> &[T] {
        self
    }

    /// Returns a mutable slice of the entire vector.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        self
    }

    /// Creates a new, empty vector, without allocating.
    #[inline]
    pub const fn new() -> Self {
        Self {
            inner: std::vec::Vec::new(),
            _p: PhantomData,
        }
    }

    /// Creates a new vector with at least the given capacity.
    pub fn with_capacity(capacity: usize, flags: Flags) -> Result<Self, AllocError> {
        let mut v = Self::new();
        v.reserve(capacity, flags)?;
        Ok(v)
    }

    /// Appends an element to the back.
    #[inline]
    pub fn push(&mut self, v: T, flags: Flags) -> Result<(), AllocError> {
        self.reserve(1, flags)?;
        self.inner.push(v);
        Ok(())
    }

    /// Appends an element to the back without reallocating.
    #[inline]
    pub fn push_within_capacity(&mut self, v: T) -> Result<(), PushError<T>> {
        if self.len() < self.capacity() {
            self.inner.push(v);
            Ok(())
        } else {
            Err(PushError(v))
        }
    }

    /// Inserts an element at the given index without reallocating.
    #[inline]
    pub fn insert_within_capacity(
        &mut self,
        index: usize,
        element: T,
    ) -> Result<(), InsertError<T>> {
        if index > self.len() {
            return Err(InsertError::IndexOutOfBounds(element));
        }
        if self.len() >= self.capacity() {
            return Err(InsertError::OutOfCapacity(element));
        }
        self.inner.insert(index, element);
        Ok(())
    }

    /// Removes the last element.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        self.inner.pop()
    }

    /// Removes the element at the given index.
    #[inline]
    pub fn remove(&mut self, i: usize) -> Result<T, RemoveError> {
        if i >= self.len() {
            return Err(RemoveError);
        }
        Ok(self.inner.remove(i))
    }

    /// Removes all values; the capacity stays.
    #[inline]
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Ensures that the capacity exceeds the length by at least `additional` elements.
    #[inline]
    pub fn reserve(&mut self, additional: usize, _flags: Flags) -> Result<(), AllocError> {
        let (len, cap) = (self.len(), self.capacity());
        if cap - len >= additional {
            return Ok(());
        }
        let new_cap = core::cmp::max(cap * 2, len.checked_add(additional).ok_or(AllocError)?);
        self.set_capacity(new_cap)
    }

    #[cold]
    fn set_capacity(&mut self, new_cap: usize) -> Result<(), AllocError> {
        if size_of::<T>() == 0 {
            return Err(AllocError);
        }
        let bytes = new_cap.checked_mul(size_of::<T>()).ok_or(AllocError)?;
        let cap = self.inner.capacity();
        testing::request()?;
        self.inner
            .try_reserve_exact(new_cap - self.len())
            .map_err(|_| AllocError)?;
        assert_eq!(
            self.inner.capacity(),
            new_cap,
            "the kernel's is what was asked for"
        );
        testing::resized(cap * size_of::<T>(), bytes);
        Ok(())
    }

    /// Shortens the vector to `len` elements, if it is longer.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        self.inner.truncate(len);
    }

    /// Takes all elements out; the capacity stays.
    pub fn drain_all(&mut self) -> impl Iterator<Item = T> + '_ {
        self.inner.drain(..)
    }

    /// Removes all elements that don't match the closure.
    pub fn retain(&mut self, f: impl FnMut(&mut T) -> bool) {
        self.inner.retain_mut(f);
    }
}

impl<T> Vec<T, KVmalloc> {
    /// Shrinks the capacity of the vector with a lower bound.
    pub fn shrink_to(&mut self, min_capacity: usize, _flags: Flags) -> Result<(), AllocError> {
        let target = core::cmp::max(self.len(), min_capacity);
        if self.capacity() <= target || size_of::<T>() == 0 {
            return Ok(());
        }
        if target != 0 {
            testing::request()?;
        }
        let cap = self.inner.capacity();
        self.inner.shrink_to(target);
        assert_eq!(
            self.inner.capacity(),
            target,
            "the kernel's is what was asked for"
        );
        testing::resized(cap * size_of::<T>(), target * size_of::<T>());
        Ok(())
    }
}

impl<T: Clone, A: Allocator> Vec<T, A> {
    /// Extends the vector by `n` clones of `value`.
    pub fn extend_with(&mut self, n: usize, value: T, flags: Flags) -> Result<(), AllocError> {
        self.reserve(n, flags)?;
        self.inner.resize(self.inner.len() + n, value);
        Ok(())
    }

    /// Appends clones of all elements of a slice.
    pub fn extend_from_slice(&mut self, other: &[T], flags: Flags) -> Result<(), AllocError> {
        self.reserve(other.len(), flags)?;
        self.inner.extend_from_slice(other);
        Ok(())
    }

    /// Creates a new vector of `n` clones of `value`.
    pub fn from_elem(value: T, n: usize, flags: Flags) -> Result<Self, AllocError> {
        let mut v = Self::with_capacity(n, flags)?;
        v.extend_with(n, value, flags)?;
        Ok(v)
    }

    /// Resizes the vector to `new_len` elements, the new ones clones of `value`.
    pub fn resize(&mut self, new_len: usize, value: T, flags: Flags) -> Result<(), AllocError> {
        match new_len.checked_sub(self.len()) {
            Some(n) => self.extend_with(n, value, flags),
            None => {
                self.truncate(new_len);
                Ok(())
            }
        }
    }
}

impl<T, A: Allocator> Drop for Vec<T, A> {
    fn drop(&mut self) {
        testing::resized(self.inner.capacity() * size_of::<T>(), 0);
    }
}

impl<T, A: Allocator> Default for Vec<T, A> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: fmt::Debug, A: Allocator> fmt::Debug for Vec<T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl<T, A: Allocator> Deref for Vec<T, A> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        &self.inner
    }
}

impl<T, A: Allocator> DerefMut for Vec<T, A> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.inner
    }
}

impl<T, I: SliceIndex<[T]>, A: Allocator> Index<I> for Vec<T, A> {
    type Output = I::Output;

    #[inline]
    fn index(&self, index: I) -> &Self::Output {
        &self.inner[index]
    }
}

impl<T, I: SliceIndex<[T]>, A: Allocator> IndexMut<I> for Vec<T, A> {
    #[inline]
    fn index_mut(&mut self, index: I) -> &mut Self::Output {
        &mut self.inner[index]
    }
}

impl<T: PartialEq<U>, U, A: Allocator, const N: usize> PartialEq<[U; N]> for Vec<T, A> {
    fn eq(&self, other: &[U; N]) -> bool {
        self[..] == other[..]
    }
}

impl<T: PartialEq, A: Allocator> PartialEq for Vec<T, A> {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

impl<T: Eq, A: Allocator> Eq for Vec<T, A> {}

impl<'a, T, A: Allocator> IntoIterator for &'a Vec<T, A> {
    type Item = &'a T;
    type IntoIter = core::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'a, T, A: Allocator> IntoIterator for &'a mut Vec<T, A> {
    type Item = &'a mut T;
    type IntoIter = core::slice::IterMut<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}

impl<T, A: Allocator> IntoIterator for Vec<T, A> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(mut self) -> Self::IntoIter {
        core::mem::take(&mut self.inner).into_iter()
    }
}
