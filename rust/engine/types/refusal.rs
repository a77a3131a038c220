// SPDX-License-Identifier: GPL-2.0-only

//! Why a page was not merged: one list for the counters, their names and the trace events.

use core::ffi::CStr;

/// Declares [`Refusal`]: for each reason its variant, its name and its number in trace events.
macro_rules! refusals {
    ($($(#[$doc:meta])* $reason:ident, $name:literal, $code:literal;)*) => {
        /// Why a page was left as it was.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Refusal {
            $($(#[$doc])* $reason,)*
        }

        impl Refusal {
            /// Every reason, in the order of the counters.
            pub const ALL: &[Self] = &[$(Self::$reason,)*];

            /// Returns the name of the file that counts this reason.
            pub const fn name(self) -> &'static CStr {
                match self {
                    $(Self::$reason => $name,)*
                }
            }

            /// Returns the number that trace events show as `err`.
            ///
            /// The numbers are negative, distinct, and no errno. They do not change when reasons
            /// come or go.
            pub const fn trace_code(self) -> i32 {
                match self {
                    $(Self::$reason => $code,)*
                }
            }
        }
    };
}

refusals! {
    /// The vma is gone or no longer mergeable, or its page table no longer maps the page there.
    Gone, c"gone", -1001;
    /// Another task holds the lock of the folio, or the mmap lock of the process.
    Locked, c"locked", -1002;
    /// A reference is held through which the page could be written to (O_DIRECT, GUP).
    Pinned, c"pinned", -1003;
    /// The contents are not the same, byte for byte.
    Differs, c"differs", -1004;
    /// A huge page could not be split.
    Unsplit, c"unsplit", -1005;
    /// Both addresses map the same page already.
    Same, c"same", -1006;
    /// There is no memory for node, rmap item or page state.
    NoMemory, c"no_memory", -1007;
    /// The merged page is being migrated or locked.
    Busy, c"busy", -1008;
    /// The merged page of the stable node has been freed.
    Stale, c"stale", -1009;
    /// The pages are on different NUMA nodes, and `merge_across_nodes` is 0.
    FarNode, c"far_node", -1010;
    /// The entry is protected for a userfaultfd, against writes or against any access.
    Userfault, c"userfault", -1011;
}

const _: () = {
    // The casts below index the counters, and no code stands for two reasons.
    let all = Refusal::ALL;
    let mut i = 0;
    while i < all.len() {
        assert!(all[i] as usize == i);
        let mut j = 0;
        while j < i {
            assert!(all[i].trace_code() != all[j].trace_code());
            j += 1;
        }
        assert!(all[i].trace_code() < -531 && all[i].trace_code() >= -4095);
        i += 1;
    }
};

/// Whose fault it is that a merge was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// That of the page of the batch, whatever it is merged with.
    Page(Refusal),
    /// That of its target, or of the two together.
    Target(Refusal),
}

impl Refused {
    /// Returns the reason.
    pub const fn reason(self) -> Refusal {
        match self {
            Self::Page(refusal) | Self::Target(refusal) => refusal,
        }
    }
}

/// How often each [`Refusal`] kept a page from being merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals([u64; Refusal::ALL.len()]);

impl From<[u32; Refusal::ALL.len()]> for Refusals {
    fn from(counts: [u32; Refusal::ALL.len()]) -> Self {
        Self(counts.map(u64::from))
    }
}

impl Refusals {
    /// Counts one refusal.
    pub fn count(&mut self, refusal: Refusal) {
        if let Some(count) = self.0.get_mut(refusal as usize) {
            *count = count.wrapping_add(1);
        }
    }

    /// Returns how often a page was refused for this reason.
    pub fn get(&self, refusal: Refusal) -> u64 {
        self.0.get(refusal as usize).copied().unwrap_or(0)
    }
}
