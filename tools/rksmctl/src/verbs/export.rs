// SPDX-License-Identifier: GPL-2.0-only
//! `rksmctl export`: the counters as OpenMetrics.

use crate::exit::{Doing, Failure, Status};
use crate::files;
use crate::host::Context;
use crate::http;
use crate::metrics::{self, Format};
use crate::signals::Signals;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Serve them by HTTP at this loopback address, with a port
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["output", "format"])]
    pub listen: Option<SocketAddr>,
    /// Write them to this file, as a whole, instead of to standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The text to write
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

pub fn run(args: &Args, cx: &Context) -> Result<Status, Failure> {
    if let Some(address) = args.listen {
        return listen(address, cx);
    }
    let families = metrics::collect(&cx.host)?;
    let text = if cx.json {
        serde_json::to_string_pretty(&families)? + "\n"
    } else {
        metrics::text(&families, args.format)
    };
    match &args.output {
        Some(path) => files::write_whole(path, text.as_bytes())?,
        None => std::io::stdout()
            .lock()
            .write_all(text.as_bytes())
            .doing("cannot write the output")?,
    }
    Ok(Status::Ok)
}

fn listen(address: SocketAddr, cx: &Context) -> Result<Status, Failure> {
    if cx.json {
        return Err(Failure::usage("--listen serves no JSON"));
    }
    let listener = http::listen(address)?;
    // What cannot be read now could not be served, either.
    metrics::collect(&cx.host)?;
    let signals = Signals::catch()?;
    let address = listener
        .local_addr()
        .doing(format!("cannot listen on {address}"))?;
    eprintln!("rksmctl: http://{address}/metrics");
    http::serve(&listener, &signals, &|format| {
        Ok(metrics::text(&metrics::collect(&cx.host)?, format))
    })?;
    Ok(Status::Ok)
}
