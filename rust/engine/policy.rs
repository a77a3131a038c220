// SPDX-License-Identifier: GPL-2.0-only

//! The knobs that decide about a page.

/// The knobs that decide about a page, as they are for one batch.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// `smart_scan`.
    pub smart_scan: bool,
    /// `use_zero_pages`.
    pub use_zero_pages: bool,
    /// `merge_across_nodes`.
    pub merge_across_nodes: bool,
    /// `max_page_sharing`: mappings of a merged page.
    pub max_page_sharing: u32,
    /// Somebody vouches that contents stay: pages are hashed and merged at first sight, whatever is
    /// known of them. Accessed bits are left to the scanner.
    pub vouched: bool,
}
