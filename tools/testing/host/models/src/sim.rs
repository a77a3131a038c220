// SPDX-License-Identifier: GPL-2.0-only

//! What of the kernel's mm the protocols depend on: two counts, a lock, and memory that is gone.

use std::{
    cell::Cell,
    sync::atomic::{
        AtomicBool,
        Ordering::Relaxed, //
    },
};

use loom::{
    sync::{
        atomic::{
            AtomicUsize,
            Ordering::SeqCst, //
        },
        RwLock,
        RwLockReadGuard,
        RwLockWriteGuard, //
    },
    thread::{
        self,
        ThreadId, //
    },
};

thread_local! {
    /// The thread that has the registry's lock. Loom runs all its threads in one.
    static HOLDER: Cell<Option<ThreadId>> = const { Cell::new(None) };
}

/// Notes that the current thread has the registry's lock, or that it has it no more.
pub fn holds_lock(yes: bool) {
    HOLDER.set(yes.then(|| thread::current().id()));
}

/// An address space: what the mmap lock protects.
#[derive(Debug)]
pub struct Space {
    /// The maple tree is there.
    pub vmas: bool,
    /// It has pages.
    pub pages: bool,
    /// One of them is merged.
    pub merged: bool,
}

/// An `mm_struct`. Its memory is never freed, so that its use after its end can be told.
#[derive(Debug)]
pub struct Mm {
    key: usize,
    /// `mm_users`.
    users: AtomicUsize,
    /// `mm_count`.
    count: AtomicUsize,
    mmap_lock: RwLock<Space>,
    freed: AtomicBool,
}

impl Mm {
    /// Makes an mm with one user. The pin is the one that its users have together.
    pub fn create(key: usize, space: Space) -> (&'static Self, Pin) {
        let mm: &'static Self = Box::leak(Box::new(Self {
            key,
            users: AtomicUsize::new(1),
            count: AtomicUsize::new(1),
            mmap_lock: RwLock::new(space),
            freed: AtomicBool::new(false),
        }));
        (mm, Pin { mm, owned: true })
    }

    /// The address of the `mm_struct`.
    pub fn key(&self) -> usize {
        self.key
    }

    /// Whether the `mm_struct` has been freed.
    pub fn freed(&self) -> bool {
        self.freed.load(Relaxed)
    }

    fn used(&self) {
        assert!(!self.freed(), "an mm is used after its end");
    }

    /// `mm_users` is zero: `ksm_test_exit()`.
    pub fn exiting(&self) -> bool {
        self.used();
        self.users.load(SeqCst) == 0
    }

    /// The last user goes.
    pub fn last_user_goes(&self) {
        self.used();
        self.users.store(0, SeqCst);
    }

    /// Takes the mmap lock for reading.
    pub fn mmap_read_lock(&'static self) -> MmapRead {
        self.used();
        MmapRead {
            mm: self,
            space: Some(self.mmap_lock.read().unwrap()),
        }
    }

    /// Takes the mmap lock for writing.
    pub fn mmap_write_lock(&'static self) -> RwLockWriteGuard<'static, Space> {
        self.used();
        self.mmap_lock.write().unwrap()
    }

    /// Another pin (`mmgrab`).
    pub fn pin(&'static self) -> Pin {
        self.used();
        self.count.fetch_add(1, SeqCst);
        Pin {
            mm: self,
            owned: true,
        }
    }
}

/// The mmap lock, held for reading.
#[derive(Debug)]
pub struct MmapRead {
    mm: &'static Mm,
    space: Option<RwLockReadGuard<'static, Space>>,
}

impl MmapRead {
    /// Whether the maple tree is there.
    pub fn vmas(&self) -> bool {
        self.space.as_ref().is_some_and(|space| space.vmas)
    }

    /// Whether there are pages.
    pub fn pages(&self) -> bool {
        self.space.as_ref().is_some_and(|space| space.pages)
    }
}

impl Drop for MmapRead {
    fn drop(&mut self) {
        drop(self.space.take());
        if !std::thread::panicking() {
            // A writer may go on from here, but the lock is still looked at, to wake others.
            self.mm.users.load(SeqCst);
            self.mm.used();
        }
    }
}

/// A reference to an mm by `mm_count`.
#[derive(Debug)]
pub struct Pin {
    mm: &'static Mm,
    owned: bool,
}

impl Pin {
    /// The mm.
    pub fn mm(&self) -> &'static Mm {
        self.mm
    }

    /// A handle to an mm that somebody else's pin is relied on for. Only without a fix.
    pub fn borrowed(&self) -> Self {
        Self {
            mm: self.mm,
            owned: false,
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if std::thread::panicking() || !self.owned {
            return;
        }
        assert!(
            HOLDER.get() != Some(thread::current().id()),
            "an mm is dropped under the registry's lock"
        );
        self.mm.used();
        if self.mm.count.fetch_sub(1, SeqCst) == 1 {
            self.mm.freed.store(true, Relaxed);
        }
    }
}

/// Implements the registry's trait of a variant for [`Pin`], with `borrowed` where it asks for it.
#[macro_export]
macro_rules! pinned_mm {
    ($trait:path $(, $borrowed:ident)?) => {
        impl $trait for $crate::sim::Pin {
            fn key(&self) -> usize {
                self.mm().key()
            }

            fn exiting(&self) -> bool {
                self.mm().exiting()
            }

            fn clone_pin(&self) -> Self {
                self.mm().pin()
            }

            $(
                fn $borrowed(&self) -> Self {
                    self.$borrowed()
                }
            )?
        }
    };
}

/// An `anon_vma`: freed when its last reference goes.
#[derive(Debug)]
pub struct AnonVma {
    references: AtomicUsize,
}

impl AnonVma {
    /// Makes one, with the reference that its vma has.
    pub fn create() -> &'static Self {
        Box::leak(Box::new(Self {
            references: AtomicUsize::new(1),
        }))
    }

    /// Takes a reference (`get_anon_vma`).
    pub fn get(&self) {
        let before = self.references.fetch_add(1, SeqCst);
        assert!(before != 0, "an anon_vma is referenced after its end");
    }

    /// Gives a reference up (`put_anon_vma`).
    pub fn put(&self) {
        self.references.fetch_sub(1, SeqCst);
    }

    /// Takes its lock, as an rmap walk does.
    pub fn walk(&self) {
        let references = self.references.load(SeqCst);
        assert!(references != 0, "an anon_vma is walked after its end");
    }
}
