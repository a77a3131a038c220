// SPDX-License-Identifier: GPL-2.0-only

//! Plain data that the parts of the engine hand to each other.

mod fingerprint;
mod id;

pub use fingerprint::Fingerprint;
pub use id::{
    ItemId,
    NodeId,
    PageId,
    RangeId,
    SlotId,
    RANGE_PAGES,
    RANGE_SHIFT, //
};
