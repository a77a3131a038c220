// SPDX-License-Identifier: GPL-2.0-only
//! The table of `rksmctl top`: what it shows, how that is drawn, and where it comes from.

pub mod model;
pub mod source;
pub mod view;
