//! A server and a client of mutual TLS by SPIFFE, with spiffe and spiffe-rustls. Each
//! says whom it wants at the other end, and follows renewals by itself.
//! SPIFFE_ENDPOINT_SOCKET says where the agent is.
//!
//!     example serve 127.0.0.1:8443 spiffe://mesh.example/ns/pay/sa/billing  says hello to that client
//!     example call 127.0.0.1:8443 spiffe://mesh.example/ns/pay/sa/ledger    prints what that server says, each second

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use spiffe::X509Source;
use spiffe_rustls::{authorizer, mtls_client, mtls_server};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let args: Vec<&str> = args.iter().skip(1).map(String::as_str).collect();
    match args[..] {
        ["serve", address, client] => serve(address, client).await,
        ["call", address, server] => call(address, server).await,
        _ => Err("usage: example serve|call ADDRESS SPIFFE-ID".into()),
    }
}

async fn serve(address: &str, client: &str) -> Result<()> {
    let source = X509Source::new().await?; // holds the newest certificate and roots
    let config = mtls_server(source).authorize(authorizer::exact([client])?).build()?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            match timeout(Duration::from_secs(10), greet(&acceptor, stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(err)) => eprintln!("refused: {err}"),
                Err(late) => eprintln!("refused: {late}"),
            }
        });
    }
}

async fn greet(acceptor: &TlsAcceptor, stream: TcpStream) -> Result<()> {
    let mut tls = acceptor.accept(stream).await?;
    let id = id_of(tls.get_ref().1.peer_certificates())?;
    tls.write_all(format!("hello {id}\n").as_bytes()).await?;
    Ok(tls.shutdown().await?)
}

/// The SPIFFE ID in the peer's certificate, which has been verified.
fn id_of(chain: Option<&[CertificateDer<'static>]>) -> Result<String> {
    let leaf = chain.and_then(<[_]>::first).ok_or("the peer showed no certificate")?;
    let (_, cert) = X509Certificate::from_der(leaf)?;
    let names = cert.subject_alternative_name()?.ok_or("the certificate has no names")?;
    for name in &names.value.general_names {
        if let GeneralName::URI(id) = name {
            return Ok((*id).to_owned());
        }
    }
    Err("the certificate names no SPIFFE ID".into())
}

async fn call(address: &str, server: &str) -> Result<()> {
    let source = X509Source::new().await?;
    let config = mtls_client(source).authorize(authorizer::exact([server])?).build()?;
    let connector = TlsConnector::from(Arc::new(config));
    loop {
        let stream = TcpStream::connect(address).await?;
        // The server is known by its SPIFFE ID; a name of a host is not looked at.
        let mut tls = connector.connect(ServerName::try_from("none.invalid")?, stream).await?;
        let mut line = String::new();
        if BufReader::new(&mut tls).read_line(&mut line).await? == 0 {
            return Err("the server says nothing".into());
        }
        print!("{line}");
        sleep(Duration::from_secs(1)).await;
    }
}
