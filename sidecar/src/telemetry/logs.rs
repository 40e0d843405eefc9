//! Logs: one line an event, to standard error.
//!
//! Invariant: JSON lines carry `timestamp`, `level`, `target`, `message`, and the event's fields beside them (`trace_id` where there is one).
//! Invariant: colour only on a terminal, and not if `NO_COLOR` is set.

use std::io::{self, IsTerminal};

use tracing::Subscriber;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, registry::LookupSpan, util::SubscriberInitExt};

use crate::config::{LogFormat, TelemetryConfig};

/// Why logs cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is none.
    #[error(
        "telemetry.log: {filter:?} is no filter of logs: {cause}; give a level (error, warn, info, debug, trace) or a list as in info,mesh_sidecar=debug"
    )]
    Filter {
        /// The filter.
        filter: String,
        /// Why.
        cause: String,
    },
    /// Somebody else set up logs already.
    #[error("logs are set up already: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Sets up the logs of the process. Once.
///
/// # Errors
/// A filter that cannot be read, or a second call.
pub fn init(config: &TelemetryConfig) -> Result<(), LogError> {
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let registry = tracing_subscriber::registry().with(filter(&config.log)?);
    match config.log_format {
        LogFormat::Json => registry.with(json(io::stderr)).try_init()?,
        LogFormat::Pretty => registry.with(fmt::layer().with_ansi(colour).with_writer(io::stderr)).try_init()?,
    }
    Ok(())
}

/// Reads a filter of logs.
///
/// # Errors
/// Text that is none.
pub fn filter(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder().parse(filter).map_err(|cause| LogError::Filter { filter: filter.to_owned(), cause: cause.to_string() })
}

/// One JSON object a line.
fn json<S, W>(writer: W) -> impl tracing_subscriber::Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    fmt::layer().json().flatten_event(true).with_current_span(false).with_span_list(false).with_writer(writer)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(text);
            Ok(text.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_lines_carry_the_fields_beside_the_message() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::registry().with(filter("info,quiet=warn").unwrap()).with(json(move || writer.clone()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(trace_id = "4bf9", route = "price", count = 3, "dead letter\nwith a \"quote\"");
            tracing::debug!("not this");
            tracing::info!(target: "quiet", "nor this");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let [line] = text.lines().collect::<Vec<_>>().try_into().unwrap();
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["message"], "dead letter\nwith a \"quote\"");
        assert_eq!((&line["trace_id"], &line["route"], &line["count"]), (&"4bf9".into(), &"price".into(), &3.into()));
        assert_eq!(line["target"], "mesh_sidecar::telemetry::logs::tests");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn a_filter_that_is_none_is_refused() {
        for bad in ["mesh_sidecar=loud", "=,=", "a=b=c"] {
            assert!(filter(bad).unwrap_err().to_string().contains(bad), "{bad}");
        }
    }
}
