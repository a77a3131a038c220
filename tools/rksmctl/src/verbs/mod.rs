// SPDX-License-Identifier: GPL-2.0-only
//! The verbs, one file each.

pub mod disable;
pub mod doctor;
pub mod enable;
pub mod estimate;
pub mod export;
pub mod merge;
pub mod never;
pub mod record;
pub mod report;
pub mod rules;
pub mod run;
pub mod status;
pub mod top;
pub mod tune;
pub mod unmerge;
pub mod why;
