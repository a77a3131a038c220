// SPDX-License-Identifier: GPL-2.0-only

//! Control over the stand-in allocators, per thread.

use crate::alloc::AllocError;

use core::cell::Cell;

/// Which allocations fail.
#[derive(Clone, Copy, Debug)]
pub enum Fail {
    /// None.
    Never,
    /// The one after this many successful ones, and only that one.
    Once(u64),
    /// Every one after this many successful ones.
    From(u64),
    /// One in `one_in`, by a generator started with `seed`.
    Random {
        /// State of the generator.
        seed: u64,
        /// The odds; 0 means never.
        one_in: u64,
    },
}

thread_local! {
    static PLAN: Cell<Fail> = const { Cell::new(Fail::Never) };
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static FAILED: Cell<u64> = const { Cell::new(0) };
}

/// Decides which of this thread's allocations fail from now on.
pub fn fail(plan: Fail) {
    PLAN.set(plan);
}

/// Bytes that this thread has allocated and not freed, rounded up as the kernel's allocators do.
///
/// Memory freed by another thread is subtracted there.
pub fn live_bytes() -> isize {
    LIVE.get()
}

/// Number of allocations that succeeded in this thread.
pub fn allocations() -> u64 {
    COUNT.get()
}

/// Number of allocations that were made to fail in this thread.
pub fn failures() -> u64 {
    FAILED.get()
}

/// What the kernel gives out for a request of `size` bytes: the object size of its kmalloc cache,
/// or whole pages in powers of two.
pub fn size_class(size: usize) -> usize {
    const CLASSES: [usize; 14] = [
        0, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192,
    ];
    CLASSES
        .into_iter()
        .find(|&class| class >= size)
        .unwrap_or_else(|| size.next_power_of_two())
}

/// One request for memory: a failure if the plan says so.
pub(crate) fn request() -> Result<(), AllocError> {
    let (plan, fails) = match PLAN.get() {
        Fail::Never => (Fail::Never, false),
        Fail::Once(0) => (Fail::Never, true),
        Fail::Once(left) => (Fail::Once(left - 1), false),
        Fail::From(0) => (Fail::From(0), true),
        Fail::From(left) => (Fail::From(left - 1), false),
        Fail::Random { seed, one_in } => {
            // splitmix64.
            let seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            let fails = one_in != 0 && z % one_in == 0;
            (Fail::Random { seed, one_in }, fails)
        }
    };
    PLAN.set(plan);
    if fails {
        FAILED.set(FAILED.get() + 1);
        return Err(AllocError);
    }
    COUNT.set(COUNT.get() + 1);
    Ok(())
}

/// Accounts for a buffer that changed its size from `old` to `new` bytes.
pub(crate) fn resized(old: usize, new: usize) {
    LIVE.set(LIVE.get() + size_class(new) as isize - size_class(old) as isize);
}
