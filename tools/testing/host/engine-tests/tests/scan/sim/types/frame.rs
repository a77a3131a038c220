// SPDX-License-Identifier: GPL-2.0-only

//! Page frames: what is in a page, and what refers to it.

use engine_tests::engine::types::NodeId;

/// Small pages of a huge page in the simulation.
pub(in super::super) const HUGE: usize = 8;

/// Frames of one NUMA node.
pub(in super::super) const NODE_FRAMES: usize = 1 << 14;

/// Frames of one memory block, which goes offline as a whole.
pub(crate) const BLOCK: usize = 16;

/// What is in a page; 0 is a page of zeroes.
pub(crate) type Content = u8;

/// The NUMA node of a frame.
pub(crate) fn nid(frame: usize) -> u32 {
    (frame / NODE_FRAMES) as u32
}

/// What `mapping` of a page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    Anon,
    Ksm(NodeId),
    Orphan,
}

#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) content: Content,
    pub(crate) mapping: Mapping,
    /// Page table entries.
    pub(crate) maps: u32,
    /// References of batches.
    pub(crate) refs: u32,
    pub(in super::super) huge: Option<u32>,
    pub(in super::super) locked: bool,
    pub(crate) pinned: bool,
}
