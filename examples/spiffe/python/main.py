"""A server and a client of mutual TLS by SPIFFE, with spiffe and spiffe-tls.

Each says whom it wants at the other end, and follows renewals.
SPIFFE_ENDPOINT_SOCKET says where the agent is.

    main.py serve 127.0.0.1:8443 spiffe://mesh.example/ns/pay/sa/billing  says hello to that client
    main.py call 127.0.0.1:8443 spiffe://mesh.example/ns/pay/sa/ledger    prints what that server says, each second
"""

import socket
import sys
import threading
import time

from cryptography import x509
from OpenSSL import SSL
from spiffe import SpiffeId, X509Source
from spiffetls import create_ssl_context, dial
from spiffetls.tlsconfig.authorize import authorize_id


def peer_id(conn):
    """The SPIFFE ID in the peer's certificate, which has been verified."""
    cert = conn.get_peer_certificate().to_cryptography()
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)[0]


def greet(conn):
    try:
        conn.do_handshake()
        conn.sendall(f'hello {peer_id(conn)}\n'.encode())
        conn.shutdown()
    except SSL.Error as err:
        print('refused:', err, file=sys.stderr)
    finally:
        conn.close()


def serve(source, host, port, client):
    # spiffetls.listen() keeps the certificate that it began with (or, before
    # pyOpenSSL 26.2, a chain that some clients refuse). So each connection takes the
    # newest context, of which another is made at every renewal.
    context = None

    def renew():
        nonlocal context
        verify = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
        context = create_ssl_context(SSL.TLS_SERVER_METHOD, source, authorize_id(client), verify)

    source.subscribe_for_updates(renew)
    renew()
    listener = socket.create_server((host, port))
    print('listening on {}:{}'.format(*listener.getsockname()), flush=True)
    while True:
        raw, _ = listener.accept()
        conn = SSL.Connection(context, raw)
        conn.set_accept_state()
        threading.Thread(target=greet, args=(conn,), daemon=True).start()


def call(source, address, server):
    conn = dial(address, source, authorize_fn=authorize_id(server))
    try:
        line = b''
        while not line.endswith(b'\n'):
            line += conn.recv(4096)
        print(line.decode(), end='', flush=True)
    finally:
        conn.close()


def main(command, address, peer):
    host, port = address.rsplit(':', 1)
    with X509Source() as source:
        if command == 'serve':
            serve(source, host, int(port), SpiffeId(peer))
        while command == 'call':
            call(source, address, SpiffeId(peer))
            time.sleep(1)


if __name__ == '__main__':
    if len(sys.argv) != 4 or sys.argv[1] not in ('serve', 'call'):
        sys.exit('usage: main.py serve|call ADDRESS SPIFFE-ID')
    main(*sys.argv[1:])
