// SPDX-License-Identifier: GPL-2.0-only

//! A crate of its own, so that who only runs the tests need not build what the benchmarks ask for.
