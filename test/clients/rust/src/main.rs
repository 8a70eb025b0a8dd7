//! A workload in Rust, on the crates spiffe and spiffe-rustls.
//!
//! The commands, and the JSON lines that they print, are described in
//! ../../program_test.go; every language has the same. SPIFFE_ENDPOINT_SOCKET says
//! where the Workload API is.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use spiffe::{JwtSource, JwtSvid, WorkloadApiClient, X509Source};
use spiffe_rustls::{authorizer, mtls_client, mtls_server};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::{TlsAcceptor, TlsConnector};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let Err(err) = run(&args).await {
        say(json!({"error": text(err.as_ref())}));
        std::process::exit(1);
    }
    std::process::exit(0); // sources have tasks that nobody waits for any more
}

async fn run(args: &[&str]) -> Result<()> {
    match args {
        ["fetch"] => fetch().await,
        ["watch", wanted] => watch(wanted.parse()?).await,
        ["serve", pairs @ ..] => serve(pairs).await,
        ["dial"] => dial_each().await,
        ["jwt", audience] => jwt(audience).await,
        ["validate"] => validate().await,
        _ => Err(format!("no command {args:?}").into()),
    }
}

fn say(line: Value) {
    println!("{line}");
}

/// The error and its causes, in one line.
fn text(err: &dyn Error) -> String {
    let mut out = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        let more = err.to_string();
        if !out.contains(&more) {
            out = format!("{out}: {more}");
        }
        cause = err.source();
    }
    out
}

fn base64(der: &[u8]) -> String {
    STANDARD.encode(der)
}

async fn fetch() -> Result<()> {
    let context = WorkloadApiClient::connect_env().await?.fetch_x509_context().await?;
    let svid = context.default_svid().ok_or("no SVID")?;
    let bundle = context.bundle_set().get(svid.spiffe_id().trust_domain()).ok_or("no bundle")?;
    let ders = |certs: &[spiffe::Certificate]| certs.iter().map(|c| base64(c.as_bytes())).collect::<Vec<_>>();
    say(json!({
        "id": svid.spiffe_id().to_string(),
        "chain": ders(svid.cert_chain()),
        "roots": ders(bundle.authorities()),
    }));
    Ok(())
}

async fn watch(wanted: usize) -> Result<()> {
    let source = X509Source::new().await?;
    let mut updates = source.updated();
    let mut seen = Vec::new();
    let (mut polls, mut gaps) = (0, Vec::new());
    while seen.len() < wanted {
        let leaf = base64(source.svid()?.leaf().as_bytes());
        if !seen.contains(&leaf) {
            say(json!({"leaf": leaf}));
            seen.push(leaf);
            continue;
        }
        tokio::select! {
            update = updates.changed() => { update?; }
            () = tokio::time::sleep(Duration::from_millis(20)) => {
                polls += 1;
                if let Err(err) = source.svid() { // it is an error when it has expired
                    gaps.push(text(&err));
                }
            }
        }
    }
    say(json!({"polls": polls, "gaps": gaps}));
    Ok(())
}

fn peer(certs: Option<&[CertificateDer<'static>]>) -> Result<String> {
    Ok(base64(certs.and_then(<[_]>::first).ok_or("the peer showed no certificate")?))
}

async fn serve(pairs: &[&str]) -> Result<()> {
    let source = X509Source::new().await?;
    for pair in pairs.chunks_exact(2) {
        let config = mtls_server(source.clone())
            .authorize(authorizer::exact(pair[1].split(','))?)
            .build()?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(pair[0]).await?;
        let address = listener.local_addr()?.to_string();
        say(json!({"listening": address}));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, address) = (acceptor.clone(), address.clone());
                tokio::spawn(async move {
                    match serve_one(&acceptor, stream).await {
                        Ok(leaf) => say(json!({"server": address, "leaf": leaf})),
                        Err(err) => say(json!({"server": address, "error": text(err.as_ref())})),
                    }
                });
            }
        });
    }
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?; // until the test ends
    Ok(())
}

async fn serve_one(acceptor: &TlsAcceptor, stream: TcpStream) -> Result<String> {
    let mut tls = acceptor.accept(stream).await?;
    let leaf = peer(tls.get_ref().1.peer_certificates())?;
    tls.write_all(b"hello").await?;
    tls.shutdown().await?;
    Ok(leaf)
}

async fn dial_each() -> Result<()> {
    let source = X509Source::new().await?;
    let mut configs: HashMap<String, Arc<ClientConfig>> = HashMap::new(); // by whom they expect
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let (address, expected) = line.split_once(' ').ok_or("want ADDR ID")?;
        if !configs.contains_key(expected) {
            let config = mtls_client(source.clone()).authorize(authorizer::exact([expected])?).build()?;
            configs.insert(expected.to_owned(), Arc::new(config));
        }
        match dial(address, configs[expected].clone()).await {
            Ok((leaf, got)) => say(json!({"leaf": leaf, "got": got})),
            Err(err) => say(json!({"error": text(err.as_ref())})),
        }
    }
    Ok(())
}

async fn dial(address: &str, config: Arc<ClientConfig>) -> Result<(String, String)> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("not-looked-at.test")?;
    let mut tls = TlsConnector::from(config).connect(name, stream).await?;
    let leaf = peer(tls.get_ref().1.peer_certificates())?;
    let mut got = String::new();
    tls.read_to_string(&mut got).await?;
    Ok((leaf, got))
}

async fn jwt(audience: &str) -> Result<()> {
    let svid = WorkloadApiClient::connect_env().await?.fetch_jwt_svid([audience], None).await?;
    say(json!({"id": svid.spiffe_id().to_string(), "token": svid.token()}));
    Ok(())
}

async fn validate() -> Result<()> {
    let client = WorkloadApiClient::connect_env().await?;
    let source = JwtSource::new().await?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let (token, audience) = line.split_once(' ').ok_or("want TOKEN AUDIENCE")?;
        let mut answer = json!({});
        match client.validate_jwt_token(audience, token).await {
            Ok(svid) => answer["agent"] = json!(svid.spiffe_id().to_string()),
            Err(err) => answer["agentError"] = json!(text(&err)),
        }
        match JwtSvid::parse_and_validate(token, &source, &[audience]) {
            Ok(svid) => answer["local"] = json!(svid.spiffe_id().to_string()),
            Err(err) => answer["localError"] = json!(text(&err)),
        }
        say(answer);
    }
    Ok(())
}
