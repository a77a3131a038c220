// SPDX-License-Identifier: GPL-2.0-only

//! Tests of the files of `rust/ksm` that compile on the host; see the folder `tests`.
