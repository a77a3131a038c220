// SPDX-License-Identifier: GPL-2.0-only

//! Plain data that the parts of the engine hand to each other.

mod fingerprint;
mod id;
mod mm_pin;
mod progress;
mod refusal;

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
pub use mm_pin::MmPin;
pub use progress::Progress;
pub use refusal::{
    Refusal,
    Refusals,
    Refused, //
};
