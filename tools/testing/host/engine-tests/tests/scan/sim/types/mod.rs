// SPDX-License-Identifier: GPL-2.0-only

//! The types of the simulation. Operations on them are in the folder above.

mod event;
mod frame;
mod ksm;
mod process;

pub(crate) use event::*;
pub(crate) use frame::*;
pub(crate) use ksm::*;
pub(crate) use process::*;
