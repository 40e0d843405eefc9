//! Routes with `deliver: pull`: `GET /v1/routes/{route}/records` takes deliveries, as one document or as a stream.
//!
//! Invariant: deliveries whose document never reached the connection are given back at once and cost no attempt; those that did are leased.
//! Invariant: a stream that goes on from `last-event-id` gives back what the one before it was sent after that event; the rest of its leases
//! hold, since their outcomes may still come.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{Response, header, request::Parts};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Api, follow, follow::Form, paths, problem::ApiError};
use crate::{
    deliver::{
        desk::{Attachment, Desk},
        forms,
    },
    json,
    outcome::Delivery,
    publish::Caller,
};

/// The most records of one answer.
const MOST: usize = 1000;
/// How long a pull waits for its first record, unless it says.
const WAIT: Duration = Duration::from_secs(5);
/// How long it may.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// The desk of a route that the caller may act on.
pub(super) fn desk(api: &Api, caller: Caller, route: &str, pull: bool) -> Result<Arc<Desk>, ApiError> {
    let (wants, other) = if pull { ("pull", "stream") } else { ("stream", "pull") };
    let callers = &api.inner.callers;
    let desk = api.inner.desks.get(route).ok_or_else(|| match api.inner.draining.is_cancelled() {
        true => ApiError::Draining,
        false => ApiError::UnknownRoute { route: crate::record::clip(route), mode: wants },
    })?;
    if !callers.is(caller, desk.service()) {
        let caller = callers.name(caller).map_or_else(String::new, |name| name.to_string());
        return Err(ApiError::ForeignRoute { route: route.to_owned(), owner: desk.service().to_string(), caller });
    }
    if desk.is_pull() != pull {
        return Err(ApiError::WrongMode { route: route.to_owned(), has: other, wants });
    }
    Ok(desk)
}

/// Takes deliveries.
pub(super) async fn take(api: &Api, route: &str, parts: &Parts) -> Result<Response<Body>, ApiError> {
    let caller = paths::caller(api, &parts.headers)?;
    let form = Form::of(&parts.headers, Form::Json, &[Form::Json, Form::Lines, Form::Events])?;
    let desk = desk(api, caller, route, true)?;
    let (mut most, mut wait) = (desk.concurrency().clamp(1, MOST), WAIT);
    for (name, value) in follow::query(parts, &["max", "wait"])? {
        match name {
            "max" => match value.parse() {
                Ok(max @ 1..=MOST) => most = max,
                _ => return Err(ApiError::Query { name, reason: format!("must be a number from 1 to {MOST}") }),
            },
            _ => {
                wait = duration(&value)
                    .ok_or_else(|| ApiError::Query { name, reason: "must be a duration such as 10s or 500ms".to_owned() })?
            }
        }
    }
    if form != Form::Json {
        let stream = if form == Form::Events { desk.stream() } else { 0 };
        if let Some(last) = follow::last_event_id(&parts.headers)? {
            let (stream, delivery) = event_id(last).ok_or(ApiError::Header {
                name: follow::LAST_EVENT_ID.to_owned(),
                reason: "is no `id` of an event of this route; leave it out to begin anew",
            })?;
            desk.give_back_after(stream, delivery);
        }
        let draining = api.inner.draining.clone();
        let pulling = Pulling { attached: desk.attach(), desk, stream, form, most, draining, began: false };
        return Ok(follow::streaming(
            form,
            stream::unfold(Some(pulling), |pulling| async {
                let mut pulling = pulling?;
                match pulling.frame().await {
                    Some(frame) => Some((Ok(frame), Some(pulling))),
                    None => pulling.form.farewell().map(|frame| (Ok(frame), None)),
                }
            }),
        ));
    }
    let taken = desk.take(most, wait.min(LONGEST_WAIT)).await.ok_or(ApiError::Draining)?;
    let ids = taken.iter().map(|delivery| delivery.id).collect();
    let mut out = b"{\"records\":[".to_vec();
    for (index, delivery) in taken.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(form, &mut out, 0, delivery);
    }
    out.extend_from_slice(b"]}");
    let mut response = Response::new(Body::new(Leased { body: Some(out.into()), desk, ids }));
    response.headers_mut().insert(header::CONTENT_TYPE, paths::JSON);
    response.headers_mut().insert(header::CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    Ok(response)
}

/// `10s`, `500ms`, or milliseconds as a bare number.
fn duration(text: &str) -> Option<Duration> {
    match text.parse::<u64>() {
        Ok(ms) => Some(Duration::from_millis(ms)),
        Err(_) => humantime::parse_duration(text).ok(),
    }
}

/// An event's id: its stream, and the delivery's id.
fn event_id(text: &str) -> Option<(u64, u64)> {
    let (stream, delivery) = text.split_once('-')?;
    Some((stream.parse().ok()?, delivery.parse().ok()?))
}

fn write(form: Form, out: &mut Vec<u8>, stream: u64, delivery: &Delivery) {
    let event = format_args!("{stream}-{}", delivery.id);
    form.write(out, event, &delivery.position, &delivery.record, |out| {
        forms::write_delivery(out, delivery);
        json::put(out, format_args!("\"lease_ms\":{},", delivery.route.timeout.as_millis()));
    });
}

/// A body of deliveries; dropped before the connection took it, it gives them back.
struct Leased {
    body: Option<Bytes>,
    desk: Arc<Desk>,
    ids: Vec<u64>,
}

impl http_body::Body for Leased {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.ids.clear();
        Poll::Ready(self.body.take().map(|body| Ok(Frame::data(body))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.body.as_ref().map_or(0, |body| body.len() as u64))
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            self.desk.give_back(&self.ids);
        }
    }
}

/// A stream of deliveries over HTTP. What is on its way when the client leaves comes again when its lease ends.
struct Pulling {
    desk: Arc<Desk>,
    #[expect(dead_code, reason = "held for its drop")]
    attached: Attachment,
    stream: u64,
    form: Form,
    most: usize,
    draining: CancellationToken,
    began: bool,
}

impl Pulling {
    async fn frame(&mut self) -> Option<Bytes> {
        if !self.began {
            self.began = true;
            if self.form == Form::Events {
                return Some(Bytes::from_static(b": attached\nretry: 1000\n\n"));
            }
        }
        let alive = Instant::now() + follow::KEEP_ALIVE;
        loop {
            let wait = alive.saturating_duration_since(Instant::now());
            let taken = tokio::select! {
                biased;
                () = self.draining.cancelled() => return None,
                taken = self.desk.take_on(self.stream, self.most, wait) => taken?,
            };
            if !taken.is_empty() {
                let mut out = Vec::with_capacity(4096);
                for delivery in &taken {
                    write(self.form, &mut out, self.stream, delivery);
                }
                return Some(out.into());
            }
            if Instant::now() >= alive {
                match self.form {
                    Form::Events => return Some(Bytes::from_static(b": keep-alive\n\n")),
                    // Nothing may stand between lines but lines.
                    _ => return self.wait_longer().await,
                }
            }
        }
    }

    /// Waits for lines without a limit.
    async fn wait_longer(&self) -> Option<Bytes> {
        loop {
            let taken = tokio::select! {
                biased;
                () = self.draining.cancelled() => return None,
                taken = self.desk.take_on(self.stream, self.most, LONGEST_WAIT) => taken?,
            };
            if !taken.is_empty() {
                let mut out = Vec::with_capacity(4096);
                for delivery in &taken {
                    write(self.form, &mut out, self.stream, delivery);
                }
                return Some(out.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_durations() {
        assert_eq!(duration("250"), Some(Duration::from_millis(250)));
        assert_eq!(duration("10s"), Some(Duration::from_secs(10)));
        assert_eq!(duration("soon"), None);
    }
}
