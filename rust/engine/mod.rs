// SPDX-License-Identifier: GPL-2.0-only

//! What KSM knows of pages, and what it decides: safe code without page tables, folios or locks.
//!
//! The [registry] says which mms take part, the [metadata] what is known of their pages, and a
//! [scan] takes the pages of one mm at a time through its stages. What only the kernel can do, as
//! walking a page table or replacing an entry, is asked of a [`backend::Backend`], which `ksm/`
//! implements. Every structure is plain data behind `&mut self` and the callers hold the locks, so
//! the same files are compiled on the host, where their tests run (`tools/testing/host`).
//!
//! # Map
//!
//! Imports go upwards: a file uses those in its own row and above.
//!
//! | files | what they are about |
//! |---|---|
//! | [`types`] | handles, fingerprint, reasons for refusing: data that all others share |
//! | [`container`] | a vector in pages of memory, values by numbers, what allocations cost |
//! | [`policy`], [`smart_scan`], [`accessed`] | when a page is merged, skipped, or read again |
//! | [`pace`] | how long the scanner works before it lets others in |
//! | [`governor`] | `governor=auto`: when a range is looked at, an mm visited; the CPU budget |
//! | [`content_hash`], [`stats`] | the hash of a page's contents; what is counted |
//! | [`sysfs`] | the files in sysfs: parsing, values, effects; `advisor_mode` |
//! | [`control`] | `/dev/rksm`: arguments, replies and records as bytes; the rules |
//! | [`registry`], [`mm_list`] | mm_slots: states, scan list, hash; each step under `mmlist_lock` |
//! | [`page_state`], [`index`] | 8 bytes for each page; pages and nodes by fingerprint |
//! | [`backend`], [`worker_pool`] | what the engine asks of the kernel, and of other threads |
//! | [`metadata`] | what is known of all pages; its invariants, and how they are checked |
//! | [`why`] | the pages of an mm by what keeps them from being merged |
//! | [`scan`] | one pass over an mm: context, page filter, partitions, stages, merges in flight |
//!
//! The words are defined in `Documentation/developing/glossary.md`, the design is explained in
//! `design.md` beside it.
//!
//! # Examples
//!
//! A page finds another one with the same contents:
//!
//! ```
//! use engine::{
//!     content_hash::{ContentKey, WORDS},
//!     index::{Entry, Index},
//!     page_state::PageStates,
//!     types::{Fingerprint, SlotId},
//! };
//! use kernel::{page::PAGE_SIZE, prelude::*};
//!
//! let key = ContentKey::new(core::array::from_fn(|i| (i as u64 + 1).pow(7)));
//! let fingerprint = |page: &[u64]| Fingerprint::new(key.hash(|i| page[i]), 0);
//! let (mut states, mut index, mm) = (PageStates::new(), Index::new(), SlotId(0));
//!
//! // The first page is tracked, and becomes a candidate.
//! assert_eq!(states.track_all(mm, 0..PAGE_SIZE, GFP_KERNEL), 1);
//! let (first, _) = states.at(mm, 0).unwrap();
//! index.insert(fingerprint(&[7; WORDS]), Entry::Candidate(first), GFP_KERNEL, |_| None)?;
//!
//! // A page with the same contents finds it, one with other contents does not.
//! assert!(index.find(fingerprint(&[7; WORDS])).eq([Entry::Candidate(first)]));
//! assert!(index.find(fingerprint(&[8; WORDS])).eq([]));
//! # Ok::<(), Error>(())
//! ```

#![forbid(unsafe_code)]

pub mod accessed;
pub mod backend;
pub mod container;
pub mod content_hash;
pub mod control;
pub mod governor;
pub mod index;
pub mod metadata;
pub mod mm_list;
pub mod pace;
pub mod page_state;
pub mod policy;
pub mod registry;
pub mod scan;
pub mod smart_scan;
pub mod stats;
pub mod sysfs;
pub mod types;
pub mod why;
pub mod worker_pool;
