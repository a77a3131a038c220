// SPDX-License-Identifier: GPL-2.0-only
//! The little of HTTP/1.1 that a scraper needs: GET and HEAD of one path, on loopback, one client
//! after the other, each for a short time.

use crate::exit::{reason, Doing, Failure};
use crate::metrics::Format;
use crate::signals::{Event, Signals};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// For a request as a whole, so that nobody keeps the others waiting byte by byte.
const TIME: Duration = Duration::from_secs(2);
/// The longest request.
const SIZE: usize = 8192;

/// Opens the port. Only this machine may ask: there is neither a password nor encryption.
pub fn listen(address: SocketAddr) -> Result<TcpListener, Failure> {
    if !address.ip().to_canonical().is_loopback() {
        return Err(Failure::usage(format!(
            "--listen takes loopback addresses only, as 127.0.0.1:9100, not {address}"
        )));
    }
    let opened = TcpListener::bind(address).and_then(|listener| {
        // A client may have gone before it is accepted.
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    opened.doing(format!("cannot listen on {address}"))
}

/// Answers until a signal says to end.
pub fn serve(
    listener: &TcpListener,
    signals: &Signals,
    metrics: &dyn Fn(Format) -> Result<String, Failure>,
) -> Result<(), Failure> {
    loop {
        match signals.wait(None, Some(listener.as_fd()))? {
            Event::End { .. } => return Ok(()),
            Event::Readable => match listener.accept() {
                // A client that is not there any more is none of our business.
                Ok((stream, _)) => {
                    let _ = answer(stream, metrics);
                }
                Err(e) if is_of_the_client(e.kind()) => {}
                Err(e) => {
                    // Out of descriptors, perhaps: it may pass, and must not take all the CPU.
                    eprintln!("rksmctl: cannot accept: {}", reason(&e));
                    let pause = Instant::now() + Duration::from_secs(1);
                    if let Event::End { .. } = signals.wait(Some(pause), None)? {
                        return Ok(());
                    }
                }
            },
            _ => {}
        }
    }
}

fn is_of_the_client(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted
    )
}

fn answer(
    mut stream: TcpStream,
    metrics: &dyn Fn(Format) -> Result<String, Failure>,
) -> std::io::Result<()> {
    let until = Instant::now() + TIME;
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(TIME))?;
    let response = match head(&mut stream, until)? {
        None => return Ok(()),
        Some(Ok(head)) => respond(&head, metrics),
        Some(Err(status)) => Response::error(status),
    };
    stream.write_all(&response.bytes())?;
    // Closing while there is something left to read would take the response away again.
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut rest = [0; 1024];
    for _ in 0..64 {
        if !wait_until(&stream, until) || stream.read(&mut rest)? == 0 {
            break;
        }
    }
    Ok(())
}

/// Sets how long a read may take; false where the time is over.
fn wait_until(stream: &TcpStream, until: Instant) -> bool {
    let left = until.saturating_duration_since(Instant::now());
    !left.is_zero() && stream.set_read_timeout(Some(left)).is_ok()
}

/// The request up to its empty line, or the status to answer instead; nothing from a client that
/// says nothing.
fn head(
    stream: &mut TcpStream,
    until: Instant,
) -> std::io::Result<Option<Result<String, &'static str>>> {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    loop {
        let end = request.windows(4).position(|four| four == b"\r\n\r\n");
        if let Some(end) = end.filter(|end| *end <= SIZE) {
            let head = request.get(..end).unwrap_or_default();
            let head = std::str::from_utf8(head).map(str::to_string);
            return Ok(Some(head.map_err(|_| "400 Bad Request")));
        }
        if request.len() > SIZE {
            return Ok(Some(Err("431 Request Header Fields Too Large")));
        }
        let read = if wait_until(stream, until) {
            stream.read(&mut part)
        } else {
            Err(ErrorKind::TimedOut.into())
        };
        match read {
            Ok(0) if request.is_empty() => return Ok(None),
            Ok(0) => return Ok(Some(Err("400 Bad Request"))),
            Ok(n) => request.extend_from_slice(part.get(..n).unwrap_or_default()),
            Err(e) if matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => {
                return Ok(Some(Err("408 Request Timeout")));
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

struct Response {
    status: &'static str,
    content_type: &'static str,
    body: String,
    with_body: bool,
}

impl Response {
    fn error(status: &'static str) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: format!("{status}\n"),
            with_body: true,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let allow = match self.status.starts_with("405") {
            true => "Allow: GET, HEAD\r\n",
            false => "",
        };
        let head = format!(
            "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n{allow}\
             X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n",
            self.status,
            self.content_type,
            self.body.len()
        );
        let body = if self.with_body { &self.body } else { "" };
        [head.as_bytes(), body.as_bytes()].concat()
    }
}

fn respond(head: &str, metrics: &dyn Fn(Format) -> Result<String, Failure>) -> Response {
    let mut lines = head.split("\r\n");
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else {
        return Response::error("400 Bad Request");
    };
    let headers: Option<Vec<(String, &str)>> = lines
        .map(|line| {
            let (name, value) = line.split_once(':')?;
            let good = !name.is_empty() && !name.contains([' ', '\t']);
            good.then(|| (name.to_ascii_lowercase(), value.trim()))
        })
        .collect();
    let Some(headers) = headers else {
        return Response::error("400 Bad Request");
    };
    let hosts = headers.iter().filter(|(name, _)| name == "host").count();
    match version {
        "HTTP/1.1" if hosts == 1 => {}
        "HTTP/1.0" => {}
        v if v.starts_with("HTTP/") && v != "HTTP/1.1" => {
            return Response::error("505 HTTP Version Not Supported");
        }
        _ => return Response::error("400 Bad Request"),
    }
    if !matches!(method, "GET" | "HEAD") {
        return Response::error("405 Method Not Allowed");
    }
    let path = target.split('?').next().unwrap_or_default();
    let mut response = if path == "/metrics" {
        let accept: Vec<&str> = headers
            .iter()
            .filter(|(name, _)| name == "accept")
            .map(|(_, value)| *value)
            .collect();
        let format = wanted(&accept.join(","));
        match metrics(format) {
            Ok(body) => Response {
                status: "200 OK",
                content_type: format.content_type(),
                body,
                with_body: true,
            },
            Err(failure) => Response {
                body: format!("{failure}\n"),
                ..Response::error("503 Service Unavailable")
            },
        }
    } else {
        Response {
            body: "there is only /metrics here\n".into(),
            ..Response::error("404 Not Found")
        }
    };
    response.with_body = method == "GET";
    response
}

/// OpenMetrics, but for who names only plain text.
fn wanted(accept: &str) -> Format {
    let named = |wanted: &str| {
        accept.split(',').any(|one| {
            let mut parts = one.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default();
            let refused = parts.any(|p| p.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0)));
            kind.eq_ignore_ascii_case(wanted) && !refused
        })
    };
    if named("text/plain") && !named("application/openmetrics-text") {
        Format::Prometheus
    } else {
        Format::Openmetrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        for (accept, format) in [
            ("", Format::Openmetrics),
            ("*/*", Format::Openmetrics),
            ("text/plain", Format::Prometheus),
            (
                "application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
                Format::Openmetrics,
            ),
            (
                "application/openmetrics-text;q=0, Text/Plain;version=0.0.4",
                Format::Prometheus,
            ),
        ] {
            assert_eq!(wanted(accept), format, "{accept}");
        }
    }

    #[test]
    fn requests() {
        let metrics = |_: Format| Ok("text".to_string());
        for (head, status) in [
            ("GET /metrics HTTP/1.1\r\nHost: x", "200 OK"),
            ("GET /metrics?x=y HTTP/1.1\r\nhost:x", "200 OK"),
            ("GET /metrics HTTP/1.0", "200 OK"),
            ("GET /metrics HTTP/1.1", "400 Bad Request"),
            (
                "GET /metrics HTTP/1.1\r\nHost: x\r\nHost: y",
                "400 Bad Request",
            ),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\nx", "400 Bad Request"),
            ("GET /metrics HTTP/1.1\r\nHost : x", "400 Bad Request"),
            ("GET /metrics", "400 Bad Request"),
            ("", "400 Bad Request"),
            (
                "GET /metrics HTTP/2.0\r\nHost: x",
                "505 HTTP Version Not Supported",
            ),
            ("GET / HTTP/1.1\r\nHost: x", "404 Not Found"),
            ("GET /metrics/ HTTP/1.1\r\nHost: x", "404 Not Found"),
            (
                "POST /metrics HTTP/1.1\r\nHost: x",
                "405 Method Not Allowed",
            ),
        ] {
            assert_eq!(respond(head, &metrics).status, status, "{head}");
        }
        let failing = |_: Format| Err(Failure::failed("no KSM"));
        let response = respond("GET /metrics HTTP/1.0", &failing);
        assert_eq!(
            (response.status, response.body.as_str()),
            ("503 Service Unavailable", "no KSM\n")
        );
        let response = respond("HEAD /metrics HTTP/1.0", &metrics);
        let text = String::from_utf8(response.bytes()).unwrap();
        assert!(text.contains("Content-Length: 4\r\n") && text.ends_with("\r\n\r\n"));
    }
}
