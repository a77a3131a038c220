// SPDX-License-Identifier: GPL-2.0-only

//! Names of the kernel's allocators; on the host they all come down to the same one.

/// An allocator of the kernel.
pub trait Allocator {}

/// `kmalloc()`: physically contiguous.
pub struct Kmalloc;

/// `vmalloc()`: virtually contiguous.
pub struct Vmalloc;

/// `kvmalloc()`: the first if possible, else the second.
pub struct KVmalloc;

impl Allocator for Kmalloc {}
impl Allocator for Vmalloc {}
impl Allocator for KVmalloc {}
